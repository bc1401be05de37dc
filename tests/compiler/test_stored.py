"""What stored codes stand for is what onnxruntime makes of them."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import constants
from fourfold.compiler.stored import stored_weights

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
SHAPE = (8, 6)


def around(codes, scale, dtype="int8", zero=None, node="MatMul (x, d)", **attributes):
    """Return a model of one layer behind stored codes."""
    model = ir.from_onnx_text(f"{HEADER} g (float[n,8] x, float d) => (y) {{ [one] y = {node} }}")
    graph, element = model.graph, ir.DataType[dtype.upper()]
    placeholder = graph.inputs.pop()
    inputs = [
        constants.add(graph, "w", codes, element),
        constants.add(graph, "s", np.asarray(scale, np.float32)),
    ]
    if zero is not None:
        inputs.append(constants.add(graph, "z", zero, element))
    made = ir.node("DequantizeLinear", inputs, attributes=attributes, name="dq")
    made.outputs[0].name = "dequantized"
    graph.insert_before(graph[0], made)
    ir.convenience.replace_all_uses_with(placeholder, made.outputs[0])
    graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ShapeInferencePass()(model)
    return model


def dequantized(model, name="dequantized"):
    """Return what onnxruntime's DequantizeLinear makes."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    proto.graph.output.add(name=name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    shapes = {
        i.name: [d if isinstance(d, int) else 2 for d in i.shape] for i in session.get_inputs()
    }
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return session.run([name], feeds)[0]


def drawn(dtype, scale_shape, zeros, seed=0, shape=SHAPE):
    """Return (codes, scale, zero points or None)."""
    rng = np.random.default_rng(seed)
    low, high = {"int8": (-127, 127), "uint8": (0, 255), "int4": (-7, 7), "uint4": (0, 15)}[dtype]
    codes = rng.integers(low, high + 1, shape)
    scale = rng.uniform(0.01, 0.1, scale_shape)
    return codes, scale, rng.integers(max(low, 0), high + 1, scale_shape) if zeros else None


def one(model):
    (found,) = stored_weights(model)
    return found


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("scale_shape", "attributes", "by_row"),
    [
        ((), {}, False),
        ((6,), {}, True),  # along axis 1, as it is where nothing is said
        ((6,), {"axis": -1}, True),
        ((8,), {"axis": 0}, False),
        ((2, 6), {"axis": 0, "block_size": 4}, True),
        ((3, 6), {"axis": -2, "block_size": 3}, True),  # the last block is shorter
    ],
)
def test_floats_are_those_of_onnxruntime(dtype, zeros, scale_shape, attributes, by_row):
    codes, scale, zero = drawn(dtype, scale_shape, zeros)
    model = around(codes, scale, dtype, zero, **attributes)
    found = one(model)
    assert found.name == "w"
    assert found.by_row is by_row
    np.testing.assert_allclose(found.floats(), dequantized(model), rtol=1e-6)


@pytest.mark.parametrize(
    ("node", "scale_shape", "attributes", "axis"),
    [
        ("MatMul (x, d)", (6,), {"axis": 1}, 1),
        ("MatMul (x, d)", (2, 6), {"axis": 0, "block_size": 4}, 1),
        ("Gemm <transB = 1> (x, d)", (6,), {"axis": 0}, 0),
        ("Gemm <transB = 1> (x, d)", (6, 2), {"axis": 1, "block_size": 4}, 0),
    ],
)
def test_rows_are_scaled(node, scale_shape, attributes, axis):
    shape = SHAPE if axis == 1 else SHAPE[::-1]
    codes, scale, zero = drawn("uint8", scale_shape, True, shape=shape)
    model = around(codes, scale, "uint8", zero, node, **attributes)
    found = one(model)
    before, factors = found.floats(), np.arange(1.0, 7.0)
    found.scale_rows(model.graph, factors)
    expected = before * (factors if axis == 1 else factors[:, None])
    np.testing.assert_allclose(found.floats(), expected, rtol=1e-6)
    np.testing.assert_allclose(dequantized(model), expected, rtol=1e-6)
    assert found.scale.const_value.shape == scale_shape
    assert "s" not in model.graph.initializers


def test_others_keep_the_scales_that_they_share():
    model = ir.from_onnx_text(f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <int8[2,2] w = {{1, 2, 3, 4}}, int8[2,2] v = {{5, 6, 7, 8}}, float[2] s = {{1, 2}}> {{
        a = DequantizeLinear <axis = 1> (w, s)
        b = DequantizeLinear <axis = 1> (v, s)
        c = MatMul (x, a)
        y = MatMul (c, b)
    }}""")
    first, second = stored_weights(model)
    first.scale_rows(model.graph, np.array([10.0, 100.0]))
    assert first.floats().tolist() == [[10, 400], [30, 800]]
    assert second.floats().tolist() == [[5, 12], [7, 16]]
    assert model.graph.initializers["s"].const_value.numpy().tolist() == [1, 2]
    second.scale_rows(model.graph, np.array([2.0, 3.0]))
    assert (first.floats()[0].tolist(), second.floats()[0].tolist()) == ([10, 400], [10, 36])
    assert "s" not in model.graph.initializers


@pytest.mark.parametrize(
    ("scale_shape", "attributes"),
    [((1,), {"axis": 1}), ((8, 2), {"axis": 1, "block_size": 3})],
)
def test_scales_that_output_channels_share_are_not_by_row(scale_shape, attributes):
    codes, scale, _ = drawn("int8", scale_shape, False)
    model = around(codes, scale, **attributes)
    np.testing.assert_allclose(one(model).floats(), dequantized(model), rtol=1e-6)
    assert not one(model).by_row


@pytest.mark.parametrize(
    "body",
    [
        "d = DequantizeLinear (w, s) e = MatMul (x, d) y = MatMul (e, d)",  # two readers
        "d = DequantizeLinear (w, s) f = DequantizeLinear (w, s) e = MatMul (x, d) "
        "y = MatMul (e, f)",  # two readers of the codes
        "d = DequantizeLinear (w, t) y = MatMul (x, d)",  # the scale is an input
        "d = DequantizeLinear (w, s) y = Add (x, d)",
        "d = DequantizeLinear (w, s) y = MatMul (d, x)",  # not where weights are looked for
        "c = Cast <to = 1> (w) y = MatMul (x, c)",
    ],
)
def test_what_is_no_stored_weight(body):
    text = f"""{HEADER} g (float[2,2] x, float t) => (float[2,2] y)
    <int8[2,2] w = {{1, 2, 3, 4}}, float s = {{0.5}}> {{ {body} }}"""
    assert list(stored_weights(ir.from_onnx_text(text))) == []


def test_the_bias_of_the_operator_is_told():
    text = f"""{HEADER} g (float[n,2,4] x) => (float[n,3,4] y)
    <int8[3,2,1] w = {{1, 2, 3, 4, 5, 6}}, float[3] s = {{1, 2, 3}}, float[3] b = {{1, 2, 3}}> {{
        d = DequantizeLinear <axis = 0> (w, s)
        y = Conv (x, d, b)
    }}"""
    found = one(ir.from_onnx_text(text))
    assert found.reader.bias.name == "b"
    assert found.reader.axis == 0
    assert found.by_row
