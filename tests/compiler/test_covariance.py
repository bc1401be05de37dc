"""Second moments of what weights meet: the rows are what the operators really multiply."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.covariance import ROWS, Meeting, Sums
from fourfold.compiler.errors import DataError
from fourfold.compiler.graph import readers_of, weights_of
from fourfold.compiler.splitting import Channels

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

LAYERS = {
    "matmul": ("float[n,3,4] x", "MatMul (x, w)", (4, 6), (5, 3, 4)),
    "gemm": ("float[n,4] x", "Gemm (x, w)", (4, 6), (5, 4)),
    "gemm, weight turned": ("float[n,4] x", "Gemm <transB = 1> (x, w)", (6, 4), (5, 4)),
    "gemm, input turned": ("float[4,n] x", "Gemm <transA = 1> (x, w)", (4, 6), (4, 5)),
    "conv": ("float[n,4,7,6] x", "Conv <pads = [1,0,2,1]> (x, w)", (6, 4, 3, 2), (5, 4, 7, 6)),
    "conv, strided": (
        "float[n,4,9,8] x",
        "Conv <strides = [2,3], dilations = [2,1]> (x, w)",
        (6, 4, 3, 2),
        (5, 4, 9, 8),
    ),
    "conv, grouped": ("float[n,4,6,6] x", "Conv <group = 2> (x, w)", (6, 2, 3, 3), (5, 4, 6, 6)),
    "conv, depthwise": ("float[n,4,9] x", "Conv <group = 4> (x, w)", (8, 1, 3), (5, 4, 9)),
}


def model_of(inputs, node, shape):
    weight = f"float[{','.join(map(str, shape))}] w"
    model = ir.from_onnx_text(f"{HEADER} g ({inputs}, {weight}) => (y) {{ [one] y = {node} }}")
    value = model.graph.inputs.pop()
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    value.const_value = ir.tensor(array, name="w")
    model.graph.register_initializer(value)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ShapeInferencePass()(model)
    return model


def met(name):
    """Return (weight as rows, meeting, x, model)."""
    inputs, node, shape, size = LAYERS[name]
    model = model_of(inputs, node, shape)
    (reader,) = readers_of(weights_of(model)[0])
    x = np.random.default_rng(2).normal(size=size).astype(np.float32)
    rows = Channels.of(reader).rows(reader.value.const_value.numpy())
    return rows, Meeting.of(reader), x, model


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_output(name):
    rows, meeting, x, model = met(name)
    got = [part @ one.T for part, one in zip(
        meeting.rows(x), np.split(rows, meeting.groups), strict=True
    )]  # fmt: skip
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    channels = -1 if name[0] in "mg" else 1
    flat = np.moveaxis(y, channels, -1).reshape(-1, len(rows))
    np.testing.assert_allclose(np.hstack(got), flat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_means_over_all_positions(name):
    _, meeting, x, _ = met(name)
    y = x + np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    sums = Sums.empty(meeting, apart=True)
    sums.add(x, y)
    exact = (meeting.rows(one.astype(np.float64)) for one in (x, y))
    for group, (a, b) in enumerate(zip(*exact, strict=True)):
        plain, centred = (sums.moments(group, one) for one in (False, True))
        close(plain.xx, a.T @ a / len(a))
        close(plain.yx, b.T @ a / len(a))
        close(plain.x, a.mean(0))
        close(plain.y, b.mean(0))
        close(centred.xx, np.cov(a.T, bias=True).reshape(plain.xx.shape))
        close(centred.yx, (b - b.mean(0)).T @ (a - a.mean(0)) / len(a))


def close(first, second):
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["conv", "conv, grouped", "matmul"])
def test_neither_batches_nor_slices_change_anything(name, monkeypatch):
    _, meeting, x, _ = met(name)
    whole, one_by_one = (Sums.empty(meeting, apart=False) for _ in range(2))
    assert x.size < ROWS
    whole.add(x)
    monkeypatch.setattr("fourfold.compiler.covariance.ROWS", 1)
    halves = [Sums.empty(meeting, apart=False) for _ in range(2)]
    one_by_one.add(x)
    halves[0].add(x[:2])
    halves[1].add(x[2:])
    both = halves[0].plus(halves[1])
    for other in (one_by_one, both):
        assert other.count == whole.count
        close(other.xx, whole.xx)
        close(other.x, whole.x)
    assert both.yx is both.xx


def test_weights_count_rows_as_if_they_came_so_often():
    _, meeting, x, _ = met("matmul")
    often, weighted = (Sums.empty(meeting, apart=True) for _ in range(2))
    y, counts = x + 1, np.arange(15)
    weighted.add(x, y, counts.astype(np.float32))
    flat = [np.repeat(one.reshape(15, 4), counts, axis=0) for one in (x, y)]
    often.add(*flat)
    assert weighted.count == often.count
    for centred in (False, True):
        first, second = (one.moments(0, centred) for one in (weighted, often))
        for name in ("xx", "yx", "x", "y"):
            close(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("weight", [1.0, 0.5, 8.0])
def test_rows_that_all_count_alike_change_no_bit(weight):
    """Constant token weights give GPTQ itself (RSQ)."""
    _, meeting, x, _ = met("matmul")
    plain, weighted = (Sums.empty(meeting, apart=True) for _ in range(2))
    plain.add(x, x + 1)
    weighted.add(x, x + 1, np.full(15, weight, np.float32))
    for centred in (False, True):
        first, second = (one.moments(0, centred) for one in (plain, weighted))
        for name in ("xx", "yx", "x", "y"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    _, meeting, x, _ = met("matmul")
    sums = Sums.empty(meeting, apart=False)
    sums.add(np.full_like(x, bad))
    with pytest.raises(DataError, match="'x', which a layer reads, is not finite"):
        sums.moments(0, centred=False)


@pytest.mark.parametrize(
    ("inputs", "node", "shape"),
    [
        ("float[n,4,5,5] x", "ConvTranspose (x, w)", (4, 6, 2, 2)),
        ("float[2,n,4] x", "MatMul (x, w)", (2, 4, 6)),
        ('float[n,4,5,5] x', 'Conv <auto_pad = "SAME_UPPER"> (x, w)', (6, 4, 3, 3)),
    ],
)  # fmt: skip
def test_layers_that_are_not_known_how(inputs, node, shape):
    model = model_of(inputs, node, shape)
    assert Meeting.of(readers_of(weights_of(model)[0])[0]) is None
