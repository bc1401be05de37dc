import functools
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler.errors import DataError, ModelError, UnsupportedError
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.graph import weight_of
from fourfold.compiler.model import load, save
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.compiler.session import open_runner
from fourfold.compiler.weights import opened
from fourfold.passes.tidy import Tidy

torch = pytest.importorskip("torch")
from fourfold.compiler.torch_graph import TorchGraph  # noqa: E402 - it imports torch

pytestmark = pytest.mark.torch

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "tasks.py").is_file(),
    reason=f"no tasks.py in {DATA}; set FOURFOLD_DATA to the folder with trained models",
)


def fed(model):
    """Return random feeds for the one input of a zoo's model; its open axis is 5."""
    (x,) = model.graph.inputs
    shape = [d if isinstance(d, int) else 5 for d in x.shape]
    return {x.name: np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)}


@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_gradients_are_slopes_of_onnxruntime(zoo, name, tmp_path):
    """Along one random direction of all weights, between two points nearby."""
    model = zoo[name]()
    names = list(model.graph.initializers)
    feeds = fed(model)
    graph = TorchGraph(model, names)
    y = graph(feeds)["y"]
    draw = np.random.default_rng(1)
    mix = draw.normal(0, 1, y.shape)
    slopes = torch.autograd.grad((y * torch.from_numpy(mix)).sum(), list(graph.weights.values()))
    step, ends = 2e-4, []
    moves = [draw.normal(0, 1, slope.shape) for slope in slopes]
    expected = sum(float((s.numpy() * m).sum()) for s, m in zip(slopes, moves, strict=True))
    for sign in (1, -1):
        moved = model.clone()
        for each, move in zip(names, moves, strict=True):
            value = moved.graph.initializers[each]
            array = value.const_value.numpy() + np.float32(sign * step) * move
            value.const_value = ir.tensor(array.astype(np.float32), name=each)
        path = tmp_path / f"{sign}.onnx"
        save(moved, path)
        ends.append(float((open_runner(path)(feeds)["y"] * mix).sum()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-2)


def test_values_that_are_outputs_inputs_or_read_twice():
    model = ir.from_onnx_text(f"""{HEADER}
    g (float[n,2] x) => (float[n,2] x, float[2] w, float[n,2] h, float[n,2] z)
    <float[2] w = {{1, 2}}> {{ h = Mul (x, w) dead = Exp (h) z = Add (h, h) }}""")
    got = TorchGraph(model, ["w"])({"x": np.ones((3, 2), np.float32)})
    assert [tensor.requires_grad for tensor in got.values()] == [False, True, True, True]
    assert got["z"].tolist() == [[2, 4]] * 3


def test_weights_share_memory_and_can_be_replaced(zoo):
    model = zoo["mlp"]()
    graph = TorchGraph(model, ["w1"])
    leaf = graph.weights["w1"]
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert np.shares_memory(leaf.detach().numpy(), model.graph.initializers["w1"].const_value)
    before = graph(fed(model))["y"]
    graph.weights["w1"] = torch.zeros_like(leaf)
    assert not torch.equal(graph(fed(model))["y"], before)


def test_weights_on_disk_and_in_protos(zoo, tmp_path):
    model = zoo["convnet"]()
    expected = TorchGraph(model, ["w2"])(fed(model))["y"]
    for name, limit in (("external", 0), ("inside", 1 << 30)):
        path = tmp_path / f"{name}.onnx"
        save(model, path, external_above=limit)
        read = load(path)
        graph = TorchGraph(read, ["w2"])
        with opened(read.graph.initializers["w2"]):  # gives the pages back, which are read anew
            pass
        assert torch.equal(graph(fed(model))["y"], expected)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_narrow_floats_get_float32_gradients(dtype):
    letters = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}[dtype]
    model = ir.from_onnx_text(f"""{HEADER}
    g ({letters}[2] x) => ({letters}[2] y) <float[2] w = {{1, 2}}> {{ y = Mul (x, w) }}""")
    value = model.graph.initializers["w"]
    narrow = value.const_value.numpy().astype(dtype.numpy())
    value.const_value, value.dtype = ir.tensor(narrow, name="w"), dtype
    graph = TorchGraph(model, ["w"])
    y = graph({"x": np.array([3, 4], dtype.numpy())})["y"]
    assert y.tolist() == [3, 8]
    y.sum().backward()
    assert graph.weights["w"].grad.dtype == torch.float32
    assert graph.weights["w"].grad.tolist() == [3, 4]


def test_strings_and_foreign_operators_are_refused():
    text = """<ir_version: 10, opset_import: ["" : 21, "com.acme" : 1]>
    g (float[2] x) => (float[2] y) { [odd] y = com.acme.Relu (x) }"""
    with pytest.raises(UnsupportedError, match=r"node 'odd' \(com.acme::Relu\)"):
        TorchGraph(ir.from_onnx_text(text), [])
    model = ir.from_onnx_text(f"{HEADER} g (int64[2] x) => (int64[2] y) {{ y = Identity (x) }}")
    words = ir.Value(name="words", const_value=ir.tensor(["a", "b"]))
    model.graph.register_initializer(words)
    TorchGraph(model, [])  # nobody reads them
    model.graph[0].replace_input_with(0, words)
    with pytest.raises(UnsupportedError, match="initializer 'words'"):
        TorchGraph(model, [])


def test_wrong_weights_and_feeds_are_named(zoo):
    model = zoo["mlp"]()
    with pytest.raises(ModelError, match="no initializer is called 'w4'; did you mean 'w"):
        TorchGraph(model, ["w4"])
    shape = ir.from_onnx_text(f"""{HEADER} g (float[4] x) => (float[2,2] y)
    <int64[2] s = {{2,2}}> {{ y = Reshape (x, s) }}""")
    with pytest.raises(ModelError, match="'s' is INT64: expected floats"):
        TorchGraph(shape, ["s"])
    with pytest.raises(DataError, match="no feeds for the inputs \\['x'\\]"):
        TorchGraph(model, [])({})
    with pytest.raises(DataError, match="no input is called 'z'"):
        TorchGraph(model, [])({"z": np.zeros(1, np.float32)})


@functools.cache
def tasks():
    """Import tasks.py by its path."""
    spec = importlib.util.spec_from_file_location("fourfold_torch_tasks", DATA / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TASKS = (
    "cifar-resnet20",
    "cifar-resnet56",
    "vww",
    "kws",
    "kwt",
    "squeezenet",
    "stories",
    "minilm-sts",
)


@needs_data
def test_no_real_model_is_left_out():
    assert set(TASKS) == set(tasks().TASKS)


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_real_models_are_those_of_onnxruntime(name, context):
    task = tasks().TASKS[name]
    path = tasks().model_path(task, DATA)
    model, _ = run(Recipe((Tidy(),)), load(path), context)
    found = [weight_of(node) for node in model.graph]
    graph = TorchGraph(model, [weight.value.name for weight in found if weight is not None])
    given, _ = task.feeds(DATA, "calib")
    part = {name: array[:8] for name, array in given.items()}
    reference = open_runner(path)
    for feeds in Feeds.read(part, input_specs(model), batch=4):
        ((output, expected),) = reference(feeds).items()
        got = graph(feeds)
        assert list(got) == [output]
        y = got[output]
        assert y.detach().numpy().dtype == expected.dtype
        assert y.shape == expected.shape
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=atol)
    slopes = torch.autograd.grad(y.square().sum(), list(graph.weights.values()))
    assert all(bool(slope.isfinite().all() and slope.any()) for slope in slopes)
