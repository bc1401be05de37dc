"""Layers come wave by wave, with sums of what they really meet."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.capability import Capability
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.graph import readers_of, weight_of, weights_of
from fourfold.compiler.layers import Layer, Layers, View, layer_of, read_layer

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
FAN = f"""{HEADER} fan (float[n,4] x) => (float[n,2] y)
<float[4,2] w1 = {{1,2,3,4,5,6,7,8}}, float[4,2] w2 = {{1,2,3,4,5,6,7,8}},
 float[4,2] w3 = {{1,2,3,4,5,6,7,8}}> {{
    a = Relu (x) b = Neg (x)
    [one] c = MatMul (a, w1) [two] d = MatMul (a, w2) [three] e = MatMul (b, w3)
    y = Sum (c, d, e)
}}"""
SAMPLES, BATCH = 23, 4


def layers_of(model, floats):
    found = [layer_of(value, floats) for value in weights_of(model)]
    assert all(isinstance(one, Layer) for one in found)
    return found


def fed(model, tmp_path, **arrays):
    feeds = Feeds.read(arrays, input_specs(model), batch=BATCH)
    return Context(Capability("any", (21, 25), ()), tmp_path, feeds=feeds)


def walking(model, floats, context, **view):
    layers = layers_of(model, floats)
    return Layers(model, floats, layers, context.feeds, context, View(**view))


def change(model, name, array):
    """Give a weight other data."""
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def data(model, name):
    return model.graph.initializers[name].const_value.numpy()


def inputs_of(model, x):
    """Return what each layer of the MLP reads, in plain numpy."""
    w1, b1, w2, b2 = (data(model, name) for name in ("w1", "b1", "w2", "b2"))
    first = np.maximum(x @ w1 + b1, 0)
    return {"w1": x, "w2": first, "w3": np.maximum(first @ w2 + b2, 0)}


def split(array):
    """Return the rows to learn from, and those held out."""
    held = np.arange(len(array)) % 5 == 4
    return array[~held], array[held]


@pytest.fixture
def lossy(zoo, tmp_path):
    """The MLP, the same with other weights in its first layer, its samples and a context."""
    floats, model = zoo["mlp"](), zoo["mlp"]()
    change(model, "w1", np.round(2 * data(model, "w1")).astype(np.float32) / 2)
    x = np.random.default_rng(1).normal(size=(SAMPLES, 16)).astype(np.float32)
    return model, floats, x, fed(floats, tmp_path, x=x)


def assert_sums(sums, x, y):
    near = {"rtol": 1e-4, "atol": 1e-3}
    assert sums.count == len(x)
    np.testing.assert_allclose(sums.xx[0], x.T @ x, **near)
    np.testing.assert_allclose(sums.yx[0], y.T @ x, **near)
    np.testing.assert_allclose(sums.x[0], x.sum(0), **near)
    np.testing.assert_allclose(sums.y[0], y.sum(0), **near)
    if sums.yy is not None:
        np.testing.assert_allclose(sums.yy[0], y.T @ y, **near)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", [["w1"], ["w2"], ["w3"]]),
        ("convnet", [["w1"], ["w2"], ["w3"]]),
        ("attention", [["wq", "wk", "wv"], ["wo"], ["w1"], ["w2"]]),
    ],
)
def test_waves_are_by_how_many_layers_lie_before(name, expected, zoo, tmp_path):
    model = zoo[name]()
    _, *sample = model.graph.inputs[0].shape
    context = fed(model, tmp_path, x=np.ones((2, *sample), np.float32))
    walk = walking(model, model, context)
    assert [[one.name for one in wave] for wave in walk.waves] == expected
    assert [[met.layer.name for met in walk.next()] for _ in expected] == expected


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (1 << 30, [["w1", "w2", "w3"]]),
        (4 * 32 * 16 * 2, [["w1", "w2", "w3"]]),
        (4 * 32 * 16, [["w1", "w2"], ["w3"]]),  # those that meet the same share their sums
        (1, [["w1", "w2"], ["w3"]]),
    ],
)
def test_a_wave_is_cut_where_its_sums_do_not_fit(memory, expected, tmp_path):
    model = ir.from_onnx_text(FAN)
    ShapeInferencePass()(model)
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    walk = walking(model, model, replace(fed(model, tmp_path, x=x), memory=memory))
    waves = [[one.name for one in wave] for wave in walk.waves]
    assert waves == expected
    found = {
        met.layer.name: met.learn.plus(met.held).xx[0] for _ in walk.waves for met in walk.next()
    }
    for name, rows in (("w1", np.maximum(x, 0)), ("w2", np.maximum(x, 0)), ("w3", -x)):
        np.testing.assert_allclose(found[name], rows.T @ rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", [False, True])
def test_sums_are_those_of_plain_numpy(lossy, spread):
    model, floats, x, context = lossy
    walk = walking(model, floats, context, spread=spread)
    own, right = inputs_of(model, x), inputs_of(floats, x)
    assert np.abs(own["w2"] - right["w2"]).max() > 0.1
    for name in ("w1", "w2", "w3"):
        (met,) = walk.next()
        assert met.layer.name == name
        assert met.sample is None
        assert (met.learn.yy is not None) is spread
        parts = (split(one[name]) for one in (own, right))
        for sums, rows, others in zip((met.learn, met.held), *parts, strict=True):
            assert_sums(sums, rows, others)


def test_inputs_of_the_float_model_alone(lossy):
    model, floats, x, context = lossy
    walk = walking(model, floats, context, own=False)
    right = inputs_of(floats, x)
    for name in ("w1", "w2", "w3"):
        (met,) = walk.next()
        assert met.learn.yx is met.learn.xx
        for sums, rows in zip((met.learn, met.held), split(right[name]), strict=True):
            assert_sums(sums, rows, rows)


def test_a_wave_meets_what_was_changed_before_it(lossy):
    model, floats, x, context = lossy
    walk = walking(model, floats, context)
    walk.next()
    change(model, "w1", data(model, "w1") * np.float32(0.5))
    (met,) = walk.next()
    rows, others = (split(inputs_of(one, x)["w2"])[0] for one in (model, floats))
    assert_sums(met.learn, rows, others)


@pytest.mark.parametrize("skipped", [1, 2])
@pytest.mark.parametrize("own", [False, True])
def test_waves_can_be_passed_by(lossy, skipped, own):
    model, floats, _, context = lossy
    whole, walk = (walking(model, floats, context, own=own) for _ in range(2))
    for _ in range(skipped):
        whole.next()
        walk.skip()
    for _ in range(3 - skipped):
        (expected,), (found,) = whole.next(), walk.next()
        assert found.layer.name == expected.layer.name
        np.testing.assert_array_equal(found.learn.xx, expected.learn.xx)
        np.testing.assert_array_equal(found.held.yx, expected.held.yx)


@pytest.mark.parametrize("follow", [False, True])
def test_rows_of_a_sample_are_what_the_layer_reads_and_should_make(lossy, follow):
    model, floats, x, context = lossy
    walk = walking(model, floats, context, sample=True, follow=follow)
    walk.skip()
    (met,) = walk.next()
    known, apart = met.sample.split()
    own, right = (inputs_of(one, x)["w2"] for one in (model, floats))
    made = (right if follow else own) @ data(floats, "w2") + data(floats, "b2")
    rows = np.concatenate([known.x[0], apart.x[0]])
    outputs = np.concatenate([known.t[0], apart.t[0]])
    assert len(rows) == len(x)
    order = [int(np.abs(own - row).sum(1).argmin()) for row in rows]
    assert sorted(order) == list(range(len(x)))
    np.testing.assert_allclose(rows, own[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs, made[order], rtol=1e-4, atol=1e-4)


def test_padding_counts_nowhere(tmp_path):
    model = ir.from_onnx_text(f"""{HEADER} g (float[n,5,4] x, float[n,1,5] mask)
    => (float[n,5,2] y)
    <float[4,2] w = {{1,2,3,4,5,6,7,8}}> {{
        t = Transpose <perm = [0,2,1]> (x)
        s = MatMul (x, t)
        m = Add (s, mask)
        p = Softmax (m)
        a = MatMul (p, x)
        [one] y = MatMul (a, w)
    }}""")
    ShapeInferencePass()(model)
    x = np.random.default_rng(0).normal(size=(8, 5, 4)).astype(np.float32)
    mask = np.zeros((8, 1, 5), np.float32)
    mask[::2, :, 3:] = -1e9
    (met,) = walking(model, model, fed(model, tmp_path, x=x, mask=mask)).next()
    assert met.learn.count + met.held.count == 4 * 5 + 4 * 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = MatMul (x, w) y = MatMul (a, w)", "several layers read it"),
        ("a = MatMul (x, w) y = Add (a, w)", "several layers read it"),
        ("y = MatMul (v, w)", "its operand is a constant"),
        ("y = Gather (w, i)", "Gather reads it"),
        ("a = Neg (x) y = MatMul (a, w)", "the float model has no value like its operand"),
    ],
)
def test_what_cannot_be_looked_at(body, reason):
    text = f"""{HEADER} g (float[2,2] x, int64[2] i) => (float[2,2] y)
    <float[2,2] w = {{1,2,3,4}}, float[2,2] v = {{1,2,3,4}}> {{ {body} }}"""
    model = ir.from_onnx_text(text)
    floats = ir.from_onnx_text(
        text.replace("a = Neg (x)", "b = Neg (x)").replace("(a, w)", "(x, w)")
    )
    assert layer_of(model.graph.initializers["w"], floats) == reason


def test_behind_a_quantizer_a_layer_is_compared_with_the_float_value():
    head = f"{HEADER} g (float[2,2] x) => (float[2,2] y)"
    weight = "float[2,2] w = {1,2,3,4}"
    floats = ir.from_onnx_text(f"{head} <{weight}> {{ a = Relu (x) y = MatMul (a, w) }}")
    model = ir.from_onnx_text(f"""{head} <{weight}, float s = {{0.1}}, uint8 z = {{0}}> {{
        a = Relu (x) q = QuantizeLinear (a, s, z) d = DequantizeLinear (q, s, z)
        y = MatMul (d, w)
    }}""")
    (reader,) = readers_of(model.graph.initializers["w"])
    found = read_layer(reader, floats)
    assert (found.name, found.operand, found.source) == ("w", "d", "a")
    assert weight_of(found.reader.node) == reader
