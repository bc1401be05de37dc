"""A layer's bias is found where it is, and changed for that layer alone."""

import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler.biases import Bias
from fourfold.compiler.graph import weight_of

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
DELTA = np.array([10.0, 20.0, 30.0])
W = "float[2,3] w = {1,2,3,4,5,6}"
KERNEL = "float[3,2,1] k = {1,2,3,4,5,6}"
B = "float[3] b = {1,2,3}"


def model_of(body, *constants, x="float[n,2] x", y="y"):
    outputs = ", ".join(f"float[n,m] {name}" for name in y)
    head = f"{HEADER} g ({x}) => ({outputs})"
    return ir.from_onnx_text(f"{head} <{', '.join(constants)}> {{ {body} }}")


def layer(model, number=0):
    found = [reader for reader in map(weight_of, model.graph) if reader is not None]
    return found[number]


@pytest.mark.parametrize(
    ("body", "constants", "x", "adds"),
    [
        ("y = Gemm (x, w, b)", (W, B), "float[n,2] x", "Gemm"),
        ("y = Conv (x, k, b)", (KERNEL, B), "float[n,2,4] x", "Conv"),
        ("m = MatMul (x, w) y = Add (m, b)", (W, B), "float[n,2] x", "Add"),
        ("m = MatMul (x, w) y = Add (b, m)", (W, B), "float[n,2] x", "Add"),
        (
            "m = MatMul (x, w) y = Add (m, b)",
            (W, "float[1,1,3] b = {1,2,3}"),
            "float[n,2] x",
            "Add",
        ),
        ("y = Gemm (x, w, b)", (W, "float[1,3] b = {1,2,3}"), "float[n,2] x", "Gemm"),
    ],
)
def test_a_bias_is_found_and_changed(body, constants, x, adds):
    model = model_of(body, *constants, x=x)
    found = Bias.of(layer(model))
    shape = tuple(found.value.const_value.shape)
    assert (found.node.op_type, found.value.name, found.size) == (adds, "b", 3)
    assert found.output.name == "y"
    assert found.floats().tolist() == [1, 2, 3]
    found.add(model.graph, DELTA)
    after = Bias.of(layer(model))
    assert after.floats().tolist() == [11, 22, 33]
    assert tuple(after.value.const_value.shape) == shape
    assert after.value.dtype == ir.DataType.FLOAT
    assert "b" not in model.graph.initializers
    assert model.graph.initializers[after.value.name] is after.value


@pytest.mark.parametrize(
    ("body", "constants", "x"),
    [
        ("y = Gemm (x, w)", (W,), "float[n,2] x"),
        ("y = Conv (x, k)", (KERNEL,), "float[n,2,4] x"),
        ("y = Gemm <transB = 1> (x, t)", ("float[3,2] t = {1,2,3,4,5,6}",), "float[n,2] x"),
    ],
)
def test_a_layer_that_has_none_gets_one(body, constants, x):
    model = model_of(body, *constants, x=x)
    found = Bias.of(layer(model))
    assert found.value is None
    assert found.floats().tolist() == [0, 0, 0]
    found.add(model.graph, DELTA)
    assert len(found.node.inputs) == 3
    assert Bias.of(layer(model)).floats().tolist() == DELTA.tolist()


def test_a_grouped_conv_has_a_bias_for_every_channel():
    kernel = "float[4,1,1] k = {1,2,3,4}"
    model = model_of("y = Conv <group = 2> (x, k)", kernel, x="float[n,2,4] x")
    assert Bias.of(layer(model)).size == 4


@pytest.mark.parametrize(
    "body",
    [
        "a = Gemm (x, w, b) y = Gemm (x, w, b)",
        "m = MatMul (x, w) a = Add (m, b) l = MatMul (x, w) y = Add (b, l)",
    ],
)
def test_others_keep_a_bias_that_they_share(body):
    model = model_of(body, W, B, y="ya")
    first, second = (Bias.of(layer(model, number)) for number in (0, 1))
    first.add(model.graph, DELTA)
    assert Bias.of(layer(model, 0)).floats().tolist() == [11, 22, 33]
    assert Bias.of(layer(model, 1)).floats().tolist() == [1, 2, 3]
    assert "b" in model.graph.initializers
    second.add(model.graph, -DELTA)  # a name that is taken already
    assert Bias.of(layer(model, 0)).floats().tolist() == [11, 22, 33]
    assert Bias.of(layer(model, 1)).floats().tolist() == [-9, -18, -27]


def test_a_bias_that_is_an_output_stays_one():
    model = model_of("y = Gemm (x, w, b)", W, B, y="yb")
    Bias.of(layer(model)).add(model.graph, DELTA)
    assert model.graph.initializers["b"].const_value.numpy().tolist() == [1, 2, 3]
    assert [v.name for v in model.graph.outputs] == ["y", "b"]


MATRIX = "float[2,3] b = {1,2,3,4,5,6}"


@pytest.mark.parametrize(
    ("body", "constants", "x", "y"),
    [
        ("y = MatMul (x, w)", (W,), "float[n,2] x", "y"),
        ("m = MatMul (x, w) y = Add (m, b)", (W, B), "float[n,2] x", "ym"),
        ("m = MatMul (x, w) a = Add (m, b) y = Neg (m)", (W, B), "float[n,2] x", "ya"),
        ("m = MatMul (x, w) y = Add (m, m)", (W,), "float[n,2] x", "y"),
        ("m = MatMul (x, w) y = Add (m, r)", (W,), "float[n,2] x, float[3] r", "y"),
        ("m = MatMul (x, w) y = Add (m, b)", (W, "float b = {1}"), "float[n,2] x", "y"),
        ("m = MatMul (x, w) y = Add (m, b)", (W, MATRIX), "float[n,2] x", "y"),
        ("m = MatMul (x, w) y = Sub (m, b)", (W, B), "float[n,2] x", "y"),
        ("y = Gemm (x, w, b)", (W, MATRIX), "float[n,2] x", "y"),
        ("y = Gemm (x, w, b)", (W, "float[1] b = {1}"), "float[n,2] x", "y"),
        ("y = Gemm (x, w, r)", (W,), "float[n,2] x, float[3] r", "y"),
        ("y = Gemm <alpha = 0.5> (x, w, b)", (W, B), "float[n,2] x", "y"),
        ("y = Gemm <beta = 0.5> (x, w)", (W,), "float[n,2] x", "y"),
        ("y = Gather (w, x)", (W,), "int64[n] x", "y"),
    ],
)
def test_where_there_is_no_bias_to_change(body, constants, x, y):
    assert Bias.of(layer(model_of(body, *constants, x=x, y=y))) is None
