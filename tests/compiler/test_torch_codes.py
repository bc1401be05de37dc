import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import constants
from fourfold.compiler.formats import Format
from fourfold.compiler.quantizers import quantize_shifted, spread

torch = pytest.importorskip("torch")
from fourfold.compiler.torch_codes import (  # noqa: E402 - it imports torch
    dequantize_linear,
    dynamic_quantize_linear,
    limits,
    quantize_linear,
)
from fourfold.compiler.torch_graph import TorchGraph  # noqa: E402

pytestmark = pytest.mark.torch

TYPES = ["uint8", "int8", "uint4", "int4", "uint2", "int2"]
WHERE = [("", ()), ("axis = 1,", (6,)), ("axis = 0, block_size = 2,", (3, 6))]
X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


def dtype_of(name):
    return ir.DataType[name.upper()]


def built(name, body, shape):
    """Return `body` on x [5,6], with codes c of every size, scales s and zero points z."""
    text = f'<ir_version: 13, opset_import: ["" : 25]> g (float[5,6] x) => (float y) {{ {body} }}'
    model = ir.from_onnx_text(text)
    draw, ends = np.random.default_rng(1), limits(dtype_of(name))
    made = {
        "c": (draw.integers(ends[0], ends[1] + 1, (5, 6)), dtype_of(name)),
        "s": (np.asarray(draw.uniform(0.02, 0.5, shape), np.float32), None),
        "z": (draw.integers(ends[0], ends[1] + 1, shape), dtype_of(name)),
    }
    missing = {v.name: v for node in model.graph for v in node.inputs if v.producer() is None}
    for key, (array, dtype) in made.items():
        if key in missing:
            added = constants.add(model.graph, f"{key}_", array, dtype)
            ir.convenience.replace_all_uses_with(missing[key], added)
    model.graph.outputs[0].type = model.graph.outputs[0].shape = None
    ShapeInferencePass()(model)
    return model


def reference(model):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("where", "shape"), WHERE)
@pytest.mark.parametrize("zero", ["", ", z"])
def test_codes_are_read_as_onnxruntime_reads_them(name, where, shape, zero):
    attributes = f"<{where.rstrip(',')}>" if where else ""
    body = f"d = DequantizeLinear {attributes} (c, s{zero}) y = Add (d, x)"
    model = built(name, body, shape)
    got = TorchGraph(model, [])({"x": X})["y"].numpy()
    np.testing.assert_array_equal(got, reference(model))


@pytest.mark.parametrize("name", [t for t in TYPES if t[-1] != "2"])
@pytest.mark.parametrize(("where", "shape"), WHERE)
@pytest.mark.parametrize("form", ["zero", "attribute"])
def test_codes_are_made_as_onnxruntime_makes_them(name, where, shape, form):
    number = dtype_of(name).value
    z, type_ = (", z", "") if form == "zero" else ("", f"output_dtype = {number},")
    quantizer = f"<{where}{type_}>".replace(",>", ">").replace("<>", "")
    reader = f"<{where.rstrip(',')}>" if where else ""
    body = f"q = QuantizeLinear {quantizer} (x, s{z}) y = DequantizeLinear {reader} (q, s{z})"
    model = built(name, body, shape)
    got = TorchGraph(model, [])({"x": X})["y"].numpy()
    np.testing.assert_array_equal(got, reference(model))


@pytest.mark.parametrize("name", ["uint2 per_axis(1)", "uint2 per_block(0,2)"])
def test_two_bits_are_made_as_the_formula_says(name):
    """onnxruntime has no QuantizeLinear of two bits."""
    format = Format.parse(name)
    shape = (6,) if "axis" in name else (3, 6)
    draw = np.random.default_rng(3)
    scale = draw.uniform(0.3, 1, shape).astype(np.float32)
    zero = draw.integers(0, 4, shape).astype(np.float32)
    expected = quantize_shifted(X, scale, zero, format)
    axis, size = (1, 0) if "axis" in name else (0, 2)
    got = quantize_linear(
        torch.tensor(X),
        torch.tensor(scale),
        torch.tensor(zero.astype(np.uint8)),
        axis=axis,
        block_size=size,
        output_dtype=25,
    )
    np.testing.assert_array_equal(got.numpy(), expected)
    floats = (expected - spread(zero, X.shape, format)) * spread(scale, X.shape, format)
    back = dequantize_linear(
        got, torch.tensor(scale), torch.tensor(zero), axis=axis, block_size=size
    )
    np.testing.assert_allclose(back.numpy(), floats, rtol=1e-6)


NUMBERS = st.floats(-20, 20, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.floats(0.01, 1), st.sampled_from(TYPES))
def test_gradients_are_those_of_lsq(numbers, step, name):
    """LSQ, equation 3, with limits relative to the zero point."""
    dtype, (least, greatest) = dtype_of(name), limits(dtype_of(name))
    zero = (least + greatest) // 2
    x = torch.tensor(numbers, requires_grad=True)
    scale = torch.tensor(step, requires_grad=True)
    shift = torch.tensor(zero)
    codes = quantize_linear(x, scale, shift, output_dtype=dtype.value)
    y = dequantize_linear(codes, scale, shift)
    weight = torch.linspace(0.5, 2, len(numbers))
    (y * weight).sum().backward()

    v = np.array(numbers, np.float32) / np.float32(step)
    low, high = least - zero, greatest - zero
    inside = (v >= low) & (v <= high)
    slope = np.where(inside, np.rint(v) - v, np.where(v < low, low, high))
    np.testing.assert_allclose(x.grad, inside * weight.numpy(), atol=1e-5)
    expected = float((slope * weight.numpy()).sum())
    assert float(scale.grad) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_what_rounds_to_the_outermost_code_from_outside_counts_as_outside():
    x = torch.tensor([7.3, -8.3, 6.8], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    y = dequantize_linear(quantize_linear(x, scale, output_dtype=22), scale)
    np.testing.assert_array_equal(y.detach(), [7, -8, 7])
    for at, slope in enumerate((7, -8, 0.2)):
        to_x, to_scale = torch.autograd.grad(y[at], (x, scale), retain_graph=True)
        assert to_x.tolist() == [0, 0, at == 2]
        assert float(to_scale) == pytest.approx(slope)


def test_a_scale_of_a_weight_gets_the_sum_of_what_its_codes_get():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    codes = torch.tensor([[1, -2], [3, 4], [5, 6]], dtype=torch.int8)
    dequantize_linear(codes, scale, axis=0, block_size=2).sum().backward()
    np.testing.assert_array_equal(scale.grad, [[4, 2], [5, 6]])


def test_gradients_pass_a_dynamic_quantizer_as_if_nothing_was_rounded():
    x = torch.tensor([-1.0, 0.1, 0.33, 2.0], requires_grad=True)
    codes, scale, zero = dynamic_quantize_linear(x)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (dequantize_linear(codes, scale, zero) * weight).sum().backward()
    np.testing.assert_allclose(x.grad, weight)
    assert not scale.requires_grad
    assert not zero.requires_grad


def test_halves_are_quantized_in_float32():
    x = torch.tensor([1.0, 300.0], dtype=torch.float16)
    scale = torch.tensor(0.01, dtype=torch.float16)
    codes = quantize_linear(x, scale, torch.tensor(0, dtype=torch.int16), output_dtype=5)
    assert codes.dtype == torch.float32
    assert dequantize_linear(codes, scale).dtype == torch.float16
    assert dequantize_linear(codes, scale, output_dtype=1).dtype == torch.float32
