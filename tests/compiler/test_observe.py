import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.errors import UnsupportedError
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.observe import PROBE, Observer

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
TEXT = f"""{HEADER}
g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {{1,2,3,4}}> {{
    h = MatMul(x, w)
    y = Relu(h)
}}"""
X = np.arange(-6, 4, dtype=np.float32).reshape(5, 2)
W = np.array([[1, 2], [3, 4]], np.float32)


def parse(text):
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


@pytest.fixture
def model():
    return parse(TEXT)


def feeds_of(model, batch=2, **arrays):
    return Feeds.read(arrays or {"x": X}, input_specs(model), batch)


def observed(observer, names, feeds):
    """Return each value over all batches."""
    found = {}
    for name, array in observer.batches(names, feeds):
        found.setdefault(name, []).append(array.copy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize("memory", [1, 100, 1 << 30])
def test_values_are_the_models_whatever_the_memory(model, tmp_path, memory):
    observer = Observer(model, tmp_path, memory)
    found = observed(observer, ["x", "h", "y"], feeds_of(model))
    assert found.keys() == {"x", "h", "y"}
    assert (found["x"] == X).all()
    assert found["h"] == pytest.approx(X @ W)
    assert found["y"] == pytest.approx(np.maximum(X @ W, 0))


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_batches_do_not_matter(model, tmp_path, batch):
    found = observed(Observer(model, tmp_path, 1 << 20), ["h"], feeds_of(model, batch))
    assert found["h"] == pytest.approx(X @ W)


def test_inputs_alone_need_no_run(model, tmp_path, monkeypatch):
    observer = Observer(model, tmp_path, 1)
    monkeypatch.setattr(observer, "_session", None)
    assert (observed(observer, ["x"], feeds_of(model))["x"] == X).all()


def test_sizes_are_of_the_largest_batch(model, tmp_path):
    observer = Observer(model, tmp_path, 1)
    assert observer.sizes(["h", "y"], feeds_of(model, batch=2)) == {"h": 16, "y": 16}
    assert observer.sizes(["h"], feeds_of(model, batch=8)) == {"h": 40}  # five samples


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (1, [["h"], ["y"]]),  # what does not fit still runs, alone
        (16, [["h"], ["y"]]),
        (31, [["h"], ["y"]]),
        (32, [["h", "y"]]),
    ],
)
def test_slices_fit_the_memory(model, tmp_path, memory, expected):
    assert Observer(model, tmp_path, memory).slices(["h", "y"], feeds_of(model)) == expected


def test_more_values_than_one_probe(tmp_path):
    count = PROBE + 5
    chain = " ".join(f"v{i + 1} = Neg(v{i})" for i in range(count))
    model = parse(f"{HEADER} g (float[n,2] v0) => (float[n,2] v{count}) {{ {chain} }}")
    feeds = feeds_of(model, v0=X)
    names = [f"v{i}" for i in range(1, count + 1)]
    found = observed(Observer(model, tmp_path, 10 * 16), names, feeds)
    assert list(found) == names
    assert all((found[f"v{i}"] == X * (-1) ** i).all() for i in range(1, count + 1))


def test_progress_counts_slices_times_batches(model, tmp_path):
    told = []

    def progress(steps, title, total=None):
        told.append((title, total))
        for step in steps:
            told.append(step[0])
            yield step

    list(Observer(model, tmp_path, 1).batches(["h", "y"], feeds_of(model), progress))
    assert told == [("calibrate", 6), *[["h"]] * 3, *[["y"]] * 3]


def test_the_model_is_left_alone(model, tmp_path):
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    observed(Observer(model, tmp_path, 1), ["h"], feeds_of(model))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_two_observers_share_a_folder(model, tmp_path):
    one, two = Observer(model, tmp_path, 1), Observer(model, tmp_path, 1)
    feeds = feeds_of(model)
    assert (observed(one, ["h"], feeds)["h"] == observed(two, ["h"], feeds)["h"]).all()


def test_a_fixed_batch_is_not_cut(tmp_path):
    model = parse(TEXT.replace("[n,2]", "[4,2]"))
    feeds = feeds_of(model, x=np.ones((8, 2), np.float32))
    observer = Observer(model, tmp_path, 1 << 20)
    assert observer.sizes(["h"], feeds) == {"h": 32}
    assert [array.shape for _, array in observer.batches(["h"], feeds)] == [(4, 2)] * 2


def test_a_scalar_input(tmp_path):
    model = parse(
        f"{HEADER} g (float s, float[2] x) => (float[2] y) {{ h = Mul(s, x) y = Relu(h) }}"
    )
    feeds = feeds_of(model, s=np.float32(3), x=np.ones(2, np.float32))
    found = observed(Observer(model, tmp_path, 1 << 20), ["h"], feeds)
    assert found["h"].tolist() == [3, 3]


def test_a_model_that_the_runtime_refuses(tmp_path):
    model = parse(
        TEXT.replace('"" : 21', '"" : 21, "com.acme" : 1').replace("Relu", "com.acme.Relu")
    )
    for node in model.graph:
        node.outputs[0].dtype = ir.DataType.FLOAT
    observer = Observer(model, tmp_path, 1)
    with pytest.raises(UnsupportedError, match=r"onnxruntime .* refuses"):
        list(observer.batches(["y"], feeds_of(model)))
