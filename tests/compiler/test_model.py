import os
import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fourfold.compiler import external
from fourfold.compiler.errors import DataError, ModelError
from fourfold.compiler.model import load, newest_opset, refuse_non_finite, save
from fourfold.compiler.weights import opened

TEXT = """<ir_version: 9, opset_import: ["" : 20]>
g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1,2,3,4}> { y = MatMul(x, w) }"""


def write_text(path, text):
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def made(nodes, initializers=(), opset=20, shape=("n", 20), out=("n", 20)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@pytest.fixture
def weight():
    return np.arange(400, dtype=np.float32).reshape(20, 20)


@pytest.fixture
def folder(tmp_path, weight):
    """A folder with model.onnx, whose weights lie in model.onnx_data."""
    home = tmp_path / "home"
    home.mkdir()
    proto = made(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        [
            onnx.numpy_helper.from_array(weight, "w"),
            onnx.numpy_helper.from_array(np.ones(20, np.float32), "b"),
        ],
    )
    onnx.save(
        proto,
        home / "model.onnx",
        save_as_external_data=True,
        location="model.onnx_data",
        size_threshold=0,
    )
    return home


def relocated(folder, location):
    """Let the model's tensors point to another place."""
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert not text.endswith(".")
    return text


def test_loads_what_was_saved(tmp_path):
    model = load(write_text(tmp_path / "m.onnx", TEXT))
    assert [n.op_type for n in model.graph] == ["MatMul"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value, [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no graph"),
        (b"\x08\x07", "holds no graph"),
        (b"hello, this is text and no protobuf", "not an ONNX model"),
    ],
)
def test_refuses_what_is_no_model(tmp_path, content, said):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=said) as error:
        load(path)
    assert str(path) in one_line(error)


def test_refuses_a_truncated_model(tmp_path):
    path = write_text(tmp_path / "m.onnx", TEXT)
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 7):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError) as error:
            load(path)
        one_line(error)


def test_refuses_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


def test_external_data_stays_on_disk(folder, weight):
    model = load(folder / "model.onnx")
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None
    # onnx's C++ code would look for small external tensors beside the current directory.
    assert not isinstance(model.graph.initializers["b"].const_value, ir.ExternalTensor)
    with opened(model.graph.initializers["w"]) as array:
        np.testing.assert_array_equal(array, weight)
    ir.passes.common.CheckerPass()(model)


def test_relative_path_is_checked_as_well(folder, monkeypatch):
    monkeypatch.chdir(folder)
    relocated(folder, "../secret")
    with pytest.raises(ModelError, match="outside"):
        load("model.onnx")


def test_a_large_model_loads_without_its_weights(tmp_path):
    shape = (1024, 1024, 700)  # 2.7 GiB, a hole on disk
    big = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=shape)
    big.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", "w.bin"),
        ("offset", "0"),
        ("length", str(4 * 1024 * 1024 * 700)),
    ):
        big.external_data.add(key=key, value=value)
    proto = made(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [big],
        shape=(1024, 1, 1024),
        out=(1024, 1, 700),
    )
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(4 * 1024 * 1024 * 700)
    load(tmp_path / "m.onnx")  # imports are warm now
    start = time.perf_counter()
    model = load(tmp_path / "m.onnx")
    assert time.perf_counter() - start < 0.5
    assert model.graph.initializers["w"].const_value.raw is None


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("gone.bin", "cannot be opened"),
        ("/etc/passwd", "outside the model's folder"),
        ("../../x", "outside the model's folder"),
        ("sub/../../x", "outside the model's folder"),
        (".", "is not a file"),
    ],
)
def test_refuses_external_data_elsewhere(folder, tmp_path, location, said):
    relocated(folder, location)
    for stage in (None, tmp_path / "stage"):
        with pytest.raises(ModelError, match=said) as error:
            load(folder / "model.onnx", stage=stage)
        one_line(error)


def test_refuses_external_data_that_is_cut_off(folder):
    os.truncate(folder / "model.onnx_data", 1000)
    with pytest.raises(ModelError, match=r"initializer 'w' is cut off: expected 1600 .* got 1000"):
        load(folder / "model.onnx")


def test_refuses_external_data_of_another_length(folder):
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    proto.graph.initializer[0].dims[:] = [20, 10]
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"needs 800 bytes, but .* 1600 bytes"):
        load(folder / "model.onnx")


def hugging_face_cache(folder):
    """Turn the folder into blobs and a snapshot of links to them."""
    blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file, blob in (("model.onnx", "aaa"), ("model.onnx_data", "bbb")):
        (folder / file).rename(blobs / blob)
        (snapshot / file).symlink_to(f"../../blobs/{blob}")
    return snapshot / "model.onnx"


def test_linked_data_needs_a_stage(folder, tmp_path, weight):
    path = hugging_face_cache(folder)
    with pytest.raises(ModelError, match="--stage") as error:
        load(path)
    assert "bbb" in one_line(error)
    stage = tmp_path / "stage"
    for _ in range(2):  # the second run finds the copies of the first
        model = load(path, stage=stage)
        with opened(model.graph.initializers["w"]) as array:
            np.testing.assert_array_equal(array, weight)
    (copies,) = stage.iterdir()
    assert sorted(file.name for file in copies.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert not any(file.is_symlink() for file in copies.iterdir())


def test_hard_linked_data_needs_a_stage(folder, tmp_path):
    os.link(folder / "model.onnx_data", tmp_path / "other")
    with pytest.raises(ModelError, match="2 hard links"):
        load(folder / "model.onnx")
    assert load(folder / "model.onnx", stage=tmp_path / "stage")


def test_linked_model_file_without_linked_data_needs_none(tmp_path):
    write_text(tmp_path / "blob", TEXT)
    (tmp_path / "m.onnx").symlink_to("blob")
    assert load(tmp_path / "m.onnx")


def test_copy_falls_back_where_the_kernel_cannot(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "cross-device")

    monkeypatch.setattr(external.os, "copy_file_range", refuse)
    path = hugging_face_cache(folder)
    load(path, stage=tmp_path / "stage")
    (copy,) = (tmp_path / "stage").glob("*/model.onnx_data")
    assert copy.read_bytes() == (tmp_path / "blobs" / "bbb").read_bytes()


def test_inputs_that_are_initializers_are_legal(tmp_path):
    proto = onnx.parser.parse_model(TEXT.replace("ir_version: 9", "ir_version: 3"))
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2]))
    proto.opset_import[0].version = 11
    onnx.save(proto, tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    assert [v.name for v in model.graph.inputs] == ["x", "w"]
    assert "w" in model.graph.initializers


def test_unsorted_graph_is_sorted_and_a_cycle_named(tmp_path):
    nodes = [
        helper.make_node("Relu", ["a"], ["y"], name="late"),
        helper.make_node("Neg", ["x"], ["a"], name="early"),
    ]
    onnx.save(made(nodes), tmp_path / "m.onnx")
    assert [n.name for n in load(tmp_path / "m.onnx").graph] == ["early", "late"]
    nodes = [
        helper.make_node("Neg", ["x"], ["d"], name="outside"),
        helper.make_node("Add", ["d", "b"], ["a"], name="first"),
        helper.make_node("Neg", ["a"], ["b"], name="second"),
        helper.make_node("Relu", ["b"], ["y"], name="after"),
    ]
    onnx.save(made(nodes), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="cycle") as error:
        load(tmp_path / "m.onnx")
    text = one_line(error)
    assert "'first'" in text
    assert "'second'" in text
    assert "outside" not in text
    assert "after" not in text


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Relu", ["nothing"], ["y"]),
        helper.make_node("Relu", ["x"], ["z"]),
        helper.make_node("NoSuchOp", ["x"], ["y"]),
        helper.make_node("Relu", ["x"], ["y"], alpha=1.0),
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64),
        helper.make_node("BitwiseNot", ["x"], ["y"]),
    ],
)
def test_refuses_a_broken_graph_in_one_line(tmp_path, node):
    onnx.save(made([node]), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not a sound ONNX model") as error:
        load(tmp_path / "m.onnx")
    one_line(error)


def test_refuses_two_nodes_with_one_output(tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    onnx.save(made(nodes), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not a sound ONNX model"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [7, 10, 1000])
def test_refuses_old_and_unknown_opsets(tmp_path, opset):
    onnx.save(made([helper.make_node("Relu", ["x"], ["y"])], opset=opset), tmp_path / "m.onnx")
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(ModelError, match=rf"opset {opset}: expected 11\.\.{newest}"):
        load(tmp_path / "m.onnx")


def test_refuses_weights_without_elements(tmp_path):
    proto = made(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        [onnx.numpy_helper.from_array(np.zeros((20, 0), np.float32), "w")],
        out=("n", 0),
    )
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="weights without elements: w"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ir.DataType.BFLOAT16.numpy()])
def test_refuses_non_finite_weights(dtype):
    model = ir.from_onnx_text(TEXT)
    refuse_non_finite(model)
    bad = np.array([[1, 2], [np.nan, np.inf]]).astype(dtype)
    model.graph.initializers["w"].const_value = ir.tensor(bad, name="w")
    model.graph.initializers["w"].dtype = ir.DataType.from_numpy(np.dtype(dtype))
    with pytest.raises(ModelError, match=r"'w' holds 1 NaN and 1 infinite of 4 .* at \[1, 0\]"):
        refuse_non_finite(model)


def test_opened_gives_back_what_it_mapped(folder, weight):
    tensor = load(folder / "model.onnx").graph.initializers["w"].const_value
    with opened(tensor) as array, pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    np.testing.assert_array_equal(array, weight)  # a view that outlives the block can be read
    del array
    with opened(tensor):
        pass
    assert tensor.raw is None
    with pytest.raises(RuntimeError, match="mine"), opened(tensor):
        raise RuntimeError("mine")
    with pytest.raises(ModelError, match="'x' has no data"), opened(ir.Value(name="x")):
        pass


def test_opened_says_when_the_file_is_gone(folder):
    tensor = load(folder / "model.onnx").graph.initializers["w"].const_value
    (folder / "model.onnx_data").unlink()
    with pytest.raises(ModelError, match="'w' cannot be read"), opened(tensor):
        pass


def same(first, second):
    x = {"x": np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)}
    outputs = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, x)[0]
        for path in (first, second)
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("above", [10, 10**9])
def test_save_is_deterministic_and_keeps_the_model(folder, tmp_path, above):
    model = load(folder / "model.onnx")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save(model, tmp_path / name / "m.onnx", above)
        same(folder / "model.onnx", tmp_path / name / "m.onnx")
        assert load(tmp_path / name / "m.onnx")
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == (["m.onnx", "m.onnx.data"] if above == 10 else ["m.onnx"])
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_save_never_overwrites(tmp_path):
    model = ir.from_onnx_text(TEXT)
    save(model, tmp_path / "m.onnx")
    with pytest.raises(DataError, match="not overwritten"):
        save(model, tmp_path / "m.onnx")
    (tmp_path / "n.onnx.data").write_text("mine")
    with pytest.raises(DataError, match="not overwritten"):
        save(model, tmp_path / "n.onnx")
    with pytest.raises(DataError, match="cannot write"):
        save(model, tmp_path / "none" / "m.onnx")


def test_newest_opset_is_taken_by_both():
    assert 20 <= newest_opset() <= onnx.defs.onnx_opset_version()
