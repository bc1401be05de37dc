import pickle
import sys
from itertools import pairwise

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.compiler.errors import DataError, ModelError
from fourfold.compiler.feeds import Feeds, InputSpec, input_specs, made_up

F32 = np.dtype(np.float32)
X = [InputSpec("x", F32, ("n", 2))]
FIXED = [InputSpec("x", F32, (4, 2))]
TWO = [
    InputSpec("ids", np.dtype(np.int64), ("n", "t")),
    InputSpec("mask", np.dtype(bool), ("n", "t")),
]
SCALAR = [InputSpec("x", F32, (3, 2)), InputSpec("t", F32, ())]


def rows(count, start=0):
    return np.arange(2 * start, 2 * (start + count), dtype=np.float32).reshape(count, 2)


def sizes(feeds):
    return [len(next(iter(batch.values()))) for batch in feeds]


def together(feeds, name="x"):
    return np.concatenate([batch[name] for batch in feeds])


def refused(source, specs=X, **options):
    with pytest.raises(DataError) as error:
        Feeds.read(source, specs, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_input_specs():
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[n,2] x, bfloat16[?,3] z) => (float[n,2] y) <float[2,2] w = {1,2,3,4}>
        { y = MatMul(x, w) }"""
    )
    model.graph.inputs.append(model.graph.initializers["w"])
    assert input_specs(model) == [
        InputSpec("x", F32, ("n", 2)),
        InputSpec("z", np.dtype(ml_dtypes.bfloat16), (None, 3)),
    ]
    model.graph.inputs[0].shape = None
    with pytest.raises(ModelError, match="'x'"):
        input_specs(model)


def test_a_dict_is_cut_into_batches():
    feeds = Feeds.read({"x": rows(10), "labels": np.arange(10)}, X, batch=4)
    assert (len(feeds), feeds.count, sizes(feeds)) == (3, 10, [4, 4, 2])
    for _ in range(2):
        np.testing.assert_array_equal(together(feeds), rows(10))
    np.testing.assert_array_equal(feeds.labels, np.arange(10))
    assert feeds.rebatchable
    assert not feeds.made_up


def parts_of(array, cuts):
    edges = [0, *sorted(cuts), len(array)]
    return [{"x": array[a:b]} for a, b in pairwise(edges) if b > a]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 20),
    cuts=st.sets(st.integers(1, 19), max_size=6),
    batch=st.integers(1, 7),
    spool=st.booleans(),
)
def test_nothing_depends_on_how_samples_were_split(count, cuts, batch, spool):
    parts = parts_of(rows(count), {c for c in cuts if c < count})
    one = Feeds.read({"x": rows(count)}, X, batch)
    other = Feeds.read(iter(parts) if spool else parts, X, batch)
    assert one.sha256() == other.sha256() == one.rebatched(3).sha256()
    assert len(one) == len(other) == len(list(other))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 25), every=st.integers(2, 9), cuts=st.sets(st.integers(1, 24)))
def test_split_and_head_go_by_sample(count, every, cuts):
    parts = parts_of(rows(count), {c for c in cuts if c < count})
    for part in parts:
        part["labels"] = part["x"][:, 0] / 2
    others, held = Feeds.read(parts, X, batch=3).split(every)
    assert others.count + held.count == count
    assert len(held) == len(list(held))
    assert len(others) == len(list(others))
    index = np.arange(count)
    np.testing.assert_array_equal(together(held), rows(count)[index % every == 0])
    np.testing.assert_array_equal(together(others), rows(count)[index % every != 0])
    np.testing.assert_array_equal(held.labels, together(held)[:, 0] / 2)
    first = others.head(2)
    np.testing.assert_array_equal(together(first), together(others)[:2])
    np.testing.assert_array_equal(first.labels, others.labels[:2])


def test_a_change_of_shape_starts_a_new_batch():
    def sentences(count, length):
        return {"ids": np.ones((count, length), np.int64), "mask": np.ones((count, length), bool)}

    feeds = Feeds.read([sentences(3, 5), sentences(2, 5), sentences(3, 7)], TWO, batch=4)
    assert [b["ids"].shape for b in feeds] == [(4, 5), (1, 5), (3, 7)]
    assert len(feeds) == 3
    assert feeds.split(2)[0].count == 4


def test_the_digest_sees_everything():
    base = Feeds.read({"x": rows(4)}, X).sha256()
    assert base == Feeds.read({"x": rows(4)}, X).sha256()
    assert base != Feeds.read({"x": rows(4) + 1}, X).sha256()
    assert base != Feeds.read({"x": rows(3)}, X).sha256()
    assert base != Feeds.read({"x": rows(4), "labels": np.zeros(4)}, X).sha256()
    assert base != Feeds.read({"z": rows(4)}, [InputSpec("z", F32, ("n", 2))]).sha256()


def test_a_fixed_batch_is_kept():
    feeds = Feeds.read([{"x": rows(6)}, {"x": rows(6, 6)}], FIXED, batch=3)
    assert sizes(feeds) == [4, 4, 4]
    assert not feeds.rebatchable
    assert sizes(feeds.rebatched(1)) == [4, 4, 4]
    assert sizes(feeds.head(5)) == [4, 4]
    others, held = feeds.split(2)
    np.testing.assert_array_equal(together(others), rows(4, 4))
    np.testing.assert_array_equal(together(held), np.concatenate([rows(4), rows(4, 8)]))
    assert "2 are left over" in refused({"x": rows(6)}, FIXED)
    one = Feeds.read({"x": rows(3)}, [InputSpec("x", F32, (1, 2))])
    assert sizes(one) == [1, 1, 1]


def test_without_a_sample_axis_each_dict_is_a_sample():
    part = {"x": rows(3), "t": np.float32(1), "labels": np.arange(3)}
    feeds = Feeds.read([part, part, part], SCALAR)
    assert (feeds.count, len(feeds)) == (3, 3)
    assert [b["x"].shape for b in feeds] == [(3, 2)] * 3
    assert [b["t"].shape for b in feeds] == [()] * 3
    assert feeds.labels.shape == (9,)
    assert [f.count for f in feeds.split(2)] == [1, 2]
    assert feeds.split(2)[1].labels.shape == (6,)
    assert "input 'x' expects float32[3,2], got float32[2, 2]" in refused(
        {"x": rows(2), "t": np.float32(1)}, SCALAR
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"y": rows(2), "x": rows(2)}, "no input 'y'"),
        ({"pixels": rows(2)}, "no input 'pixels'; known: x"),
        ({}, "no array for input 'x'"),
        (
            {"x": rows(2).astype(np.float64)},
            "got float64[2, 2]; cast it with array.astype('float32')",
        ),
        ({"x": [[1.0, 2.0]]}, "got float64[1, 2]; cast it"),
        ({"x": rows(2)[0]}, "expects float32[n,2], got float32[2]"),
        ({"x": np.ones((2, 3), np.float32)}, "expects float32[n,2], got float32[2, 3]"),
        ({"x": rows(0)}, "holds no samples"),
        ({"x": rows(2), "labels": np.arange(3)}, "labels of shape [3] for 2 samples"),
        ([], "the feeds hold no samples"),
        (iter([]), "the feeds hold no samples"),
        ([rows(2)], "batch 0: expected a dict of arrays, got a ndarray"),
        ([{"x": rows(2)}, {"x": rows(2), "labels": np.arange(2)}], "1 of 2 batches have labels"),
        (3, "cannot read feeds from a int"),
        ("nowhere.npz", "no such file or folder"),
    ],
)
def test_refuses(given, said):
    assert said in refused(given)


def test_refuses_with_a_hint_and_a_position():
    ids, mask = np.ones((2, 3), np.int64), np.ones((3, 3), bool)
    assert "did you mean 'mask'" in refused({"ids": ids, "masc": mask}, TWO)
    assert "different numbers of samples" in refused({"ids": ids, "mask": mask}, TWO)
    assert "batch 1: " in refused(iter([{"x": rows(2)}, {"x": rows(2)[0]}]))
    assert "batch of 0" in refused({"x": rows(2)}, batch=0)
    feeds = Feeds.read({"x": rows(1)}, X)
    with pytest.raises(DataError, match="expected at least 2"):
        feeds.split(2)
    with pytest.raises(DataError, match="expected 2 or more"):
        feeds.split(1)


def test_a_generator_is_written_to_files_as_it_comes(tmp_path):
    alive = []

    def batches():
        for index in range(5):
            alive.append(len(list(tmp_path.rglob("*.npz"))))
            yield {"x": rows(2, 2 * index), "labels": np.array(["a", "b"])}

    feeds = Feeds.read(batches(), X, batch=3, folder=tmp_path)
    assert alive == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(together(feeds), rows(10))
    np.testing.assert_array_equal(together(feeds.rebatched(7)), rows(10))
    assert list(feeds.labels) == ["a", "b"] * 5

    def broken():
        yield {"x": rows(2)}
        raise KeyError("oops")

    assert "feeds raised KeyError after batch 1" in refused(broken())


def test_a_calibration_data_reader_is_read():
    class Reader:
        def __init__(self):
            self.left = [{"x": rows(2)}, {"x": rows(2, 2)}]

        def get_next(self):
            return self.left.pop(0) if self.left else None

    np.testing.assert_array_equal(together(Feeds.read(Reader(), X)), rows(4))


@pytest.mark.parametrize(
    "dtype", [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(object)]
)
def test_types_that_numpy_does_not_store_survive(tmp_path, dtype):
    specs = [InputSpec("x", dtype, ("n", 2))]
    array = np.array([["a", "bc"]], object) if dtype.kind == "O" else rows(3).astype(dtype)
    direct = Feeds.read({"x": array}, specs)
    spooled = Feeds.read(iter([{"x": array}]), specs)
    assert direct.sha256() == spooled.sha256()
    assert together(spooled).dtype == dtype
    if dtype.kind != "O":
        np.savez(tmp_path / "f.npz", x=array)
        assert Feeds.read(tmp_path / "f.npz", specs).sha256() == direct.sha256()


def test_npz_and_folders(tmp_path):
    whole = Feeds.read({"x": rows(6), "labels": np.arange(6)}, X)
    np.savez(tmp_path / "all.npz", x=rows(6), labels=np.arange(6))
    many, named, unnamed = (tmp_path / name for name in ("many", "named", "unnamed"))
    for folder in (many, named, unnamed):
        folder.mkdir()
    for i in range(3):
        np.savez(many / f"b{i}.npz", x=rows(2, 2 * i), labels=np.arange(2 * i, 2 * i + 2))
        np.save(unnamed / f"b{i}.npy", rows(2, 2 * i))
    np.save(unnamed / "labels.npy", np.arange(6))
    np.save(named / "x.npy", rows(6))
    np.save(named / "labels.npy", np.arange(6))
    for source in (tmp_path / "all.npz", str(tmp_path / "all.npz"), many, named, unnamed):
        feeds = Feeds.read(source, X)
        assert feeds.sha256() == whole.sha256()
        np.testing.assert_array_equal(feeds.labels, whole.labels)
    np.save(unnamed / "labels.npy", np.arange(5))
    assert "labels of shape [1] for 2 samples" in refused(unnamed)
    np.save(many / "extra.npy", rows(2))
    assert "got .npz and .npy" in refused(many)
    (tmp_path / "empty").mkdir()
    assert "got none of them" in refused(tmp_path / "empty")
    np.save(named / "z.npy", rows(6))
    assert "no input 'z'" in refused(named)


def test_unreadable_files(tmp_path):
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    assert "pickled objects" in refused(tmp_path / "pickled.npz")
    (tmp_path / "really.npz").write_bytes(pickle.dumps([1]))
    assert "pickled objects" in refused(tmp_path / "really.npz")
    (tmp_path / "text.npz").write_text("hello")
    assert "text.npz" in refused(tmp_path / "text.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    assert "not a readable numpy file" in refused(tmp_path / "empty.npz")
    np.savez(tmp_path / "cut.npz", x=rows(50))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:200])
    assert "cut.npz" in refused(tmp_path / "cut.npz")
    (tmp_path / "feeds.csv").write_text("1,2")
    assert "expected .npz, .npy or a folder" in refused(tmp_path / "feeds.csv")


def test_onnx_test_data(tmp_path):
    for i in (2, 10, 0):
        folder = tmp_path / f"test_data_set_{i}"
        folder.mkdir()
        ids = onnx.numpy_helper.from_array(np.full((1, 3), i, np.int64), "ids")
        mask = onnx.numpy_helper.from_array(np.ones((1, 3), bool))
        (folder / "input_0.pb").write_bytes(ids.SerializeToString())
        (folder / "input_1.pb").write_bytes(mask.SerializeToString())
    feeds = Feeds.read(tmp_path, TWO)
    assert list(together(feeds, "ids")[:, 0]) == [0, 2, 10]
    (tmp_path / "test_data_set_2" / "input_1.pb").unlink()
    assert "test_data_set_2: no array for input 'mask'" in refused(tmp_path, TWO)
    (tmp_path / "test_data_set_2" / "input_1.pb").write_bytes(b"junk")
    assert "not a TensorProto" in refused(tmp_path, TWO)


def test_a_function_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "feeds_of_this_test.py").write_text(
        "import numpy as np\n"
        "def good():\n"
        "    import helper_of_this_test\n"
        "    for i in range(3):\n"
        "        yield {'x': np.full((2, 2), i, np.float32)}\n"
        "def bad():\n"
        "    raise ValueError('oops')\n"
    )
    (tmp_path / "helper_of_this_test.py").write_text("")
    before = list(sys.path)
    assert Feeds.read("feeds_of_this_test:good", X).count == 6
    assert sys.path == before
    assert "feeds_of_this_test:bad raised ValueError: oops" in refused("feeds_of_this_test:bad")
    assert "did you mean 'good'" in refused("feeds_of_this_test:god")
    assert "did you mean 'feeds_of_this_test'" in refused("feeds_of_this_tes:good")


def test_made_up_feeds():
    specs = [
        InputSpec("x", F32, ("n", 3, "h")),
        InputSpec("ids", np.dtype(np.int64), ("n", "t")),
        InputSpec("flag", np.dtype(bool), ("n",)),
        InputSpec("b", np.dtype(ml_dtypes.bfloat16), ("n",)),
    ]
    feeds = made_up(specs, 7, 10, {"h": 5})
    assert feeds.made_up
    assert feeds.head(3).made_up
    assert sizes(feeds) == [8, 2]
    assert [a.shape[1:] for a in next(iter(feeds)).values()] == [(3, 5), (32,), (), ()]
    assert [a.dtype for a in next(iter(feeds)).values()] == [s.dtype for s in specs]
    assert set(together(feeds, "ids").reshape(-1)) == {0, 1}
    assert feeds.sha256() == made_up(specs, 7, 10, {"h": 5}, batch=3).sha256()
    assert feeds.head(4).sha256() == made_up(specs, 7, 4, {"h": 5}).sha256()
    assert feeds.sha256() != made_up(specs, 8, 10, {"h": 5}).sha256()
    assert sizes(made_up(FIXED, 0, 5)) == [4, 4]
    assert [b["x"].shape for b in made_up(SCALAR, 0, 2)] == [(3, 2)] * 2
    assert next(iter(made_up(X, 0, 1, 4)))["x"].shape == (1, 2)
    with pytest.raises(DataError, match="'s'"):
        made_up([InputSpec("s", np.dtype(object), ("n",))], 0, 1)
