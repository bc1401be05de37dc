from typing import get_args

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.errors import UnsupportedError

torch = pytest.importorskip("torch")
from fourfold.compiler.torch_graph import TorchGraph  # noqa: E402 - it imports torch
from fourfold.compiler.torch_ops import DTYPES, CastTo  # noqa: E402

pytestmark = pytest.mark.torch

# Inputs and constants, each ended by a semicolon, then the nodes that make y.
CASES = [
    # convolutions
    "float[2,3,9,8] x; float[4,3,3,2] w; y = Conv (x, w)",
    "float[2,3,9,8] x; float[4,3,3,2] w; float[4] b; "
    "y = Conv <strides = [2,1], dilations = [1,2], pads = [0,1,2,3]> (x, w, b)",
    "float[2,4,9,8] x; float[6,2,3,3] w; float[6] b; "
    "y = Conv <group = 2, pads = [1,1,1,1], kernel_shape = [3,3]> (x, w, b)",
    "float[2,4,9] x; float[4,1,4] w; y = Conv <group = 4, pads = [2,1], strides = [2]> (x, w)",
    "float[2,3,9,8] x; float[4,3,4,3] w; "
    'y = Conv <auto_pad = "SAME_UPPER", strides = [2,3]> (x, w)',
    "float[2,3,9,8] x; float[4,3,4,2] w; "
    'y = Conv <auto_pad = "SAME_LOWER", strides = [1,2]> (x, w)',
    'float[2,3,9,8] x; float[4,3,4,3] w; y = Conv <auto_pad = "VALID"> (x, w)',
    "float[1,2,5,6,4] x; float[3,2,2,3,2] w; y = Conv <pads = [1,0,1,0,1,0]> (x, w)",
    "float[2,3,5,4] x; float[3,4,3,2] w; y = ConvTranspose (x, w)",
    "float[2,4,5,4] x; float[4,3,3,3] w; float[6] b; y = ConvTranspose <group = 2, "
    "strides = [2,3], dilations = [2,1], pads = [1,0,2,1], output_padding = [1,2]> (x, w, b)",
    "float[2,4,5] x; float[4,3,3] w; float[3] b; "
    "y = ConvTranspose <strides = [3], output_padding = [2]> (x, w, b)",
    # products
    "float[4,5] a; float[5,3] b; float[3] c; y = Gemm (a, b, c)",
    "float[5,4] a; float[3,5] b; float[4,1] c; "
    "y = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (a, b, c)",
    "float[4,5] a; float[5,3] b; y = Gemm <beta = 3.0> (a, b)",
    "float[2,1,4,5] a; float[3,5,6] b; y = MatMul (a, b)",
    "float[5] a; float[3,5,6] b; y = MatMul (a, b)",
    # elementwise, two or more inputs
    *[f"float[2,1,4] a; float[3,1] b; y = {op} (a, b)" for op in ("Add", "Sub", "Mul", "Div")],
    *[
        f"float[4] a; float[3,4] b; float[3,1] c; y = {op} (a, b, c)"
        for op in ("Min", "Max", "Sum")
    ],
    "float[3,4] x; y = Max (x)",
    *[
        f"int64[4] a; int64[4] b = {{3,-3,2,-2}}; int64 m = {{7}}; c = Sub (a, m) y = {op} (c, b)"
        for op in ("Div", "Mod", "Mod <fmod = 1>")
    ],
    "float[9] a; float b = {0.3}; y = Mod <fmod = 1> (a, b)",
    "float[9] x; float p = {2}; y = Pow (x, p)",
    "float[9] x; int64 p = {3}; y = Pow (x, p)",
    "int64[9] x; float p = {2}; y = Pow (x, p)",
    "float[3,4] x; float[3,1] s; y = PRelu (x, s)",
    # elementwise, one input
    *[f"float[3,7] x; a = Abs (x) y = {op} (a)" for op in ("Sqrt", "Log", "Reciprocal")],
    *[
        f"float[3,7] x; float f = {{3}}; a = Mul (x, f) y = {op} (a)"
        for op in (
            "Exp",
            "Neg",
            "Abs",
            "Relu",
            "LeakyRelu",
            "Elu",
            "Sigmoid",
            "Tanh",
            "Erf",
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Softplus",
            "Sin",
            "Cos",
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "Identity",
            "Dropout",
            "Softmax",
            "LogSoftmax",
        )
    ],
    "float[4] x = {0.5,1.5,2.5,-0.5}; float[1] o; a = Add (x, o) b = Sub (a, o) y = Round (x)",
    'float[3,7] x; y = Gelu <approximate = "tanh"> (x)',
    "float[3,7] x; y = LeakyRelu <alpha = 0.3> (x)",
    "float[3,7] x; y = HardSigmoid <alpha = 0.4, beta = 0.3> (x)",
    "float[3,4,2] x; y = Softmax <axis = 1> (x)",
    "float[3,4,2] x; y = LogSoftmax <axis = 0> (x)",
    "float[3,7] x; float l = {-0.5}; float h = {0.2}; y = Clip (x, l, h)",
    "float[3,7] x; float h = {0.2}; y = Clip (x, , h)",
    "float[3,7] x; float l = {0.5}; float h = {0.2}; y = Clip (x, l, h)",
    "float[3,7] x; y = Clip (x)",
    "24: float[3,7] x; y = Swish <alpha = 0.5> (x)",
    # norms
    "float[2,3,4] x; float[4] s; float[4] b; y = LayerNormalization (x, s, b)",
    "float[2,3,4] x; float[3,4] s; y = LayerNormalization <axis = 1, epsilon = 0.1> (x, s)",
    "float[2,3,4] x; float[4] s; float[1] b; y = LayerNormalization <axis = -2> (x, s, b)",
    "23: float[2,3,4] x; float[4] s; y = RMSNormalization (x, s)",
    "23: float[2,3,4] x; float[3,4] s; y = RMSNormalization <axis = 1, epsilon = 0.1> (x, s)",
    "float[2,3,4,4] x; float[3] s; float[3] b; float[3] m; float[3] v; a = Abs (v) "
    "y = BatchNormalization <epsilon = 0.01> (x, s, b, m, a)",
    "float[5,3] x; float[3] s; float[3] b; float[3] m; float[3] v; a = Abs (v) "
    "y = BatchNormalization <momentum = 0.1> (x, s, b, m, a)",
    # pools
    *[
        f"float[2,3,9,8] x; y = {op} <kernel_shape = [3,2]{rest}> (x)"
        for op in ("MaxPool", "AveragePool")
        for rest in (
            "",
            ", strides = [2,3]",
            ", strides = [2,2], pads = [1,0,2,1]",
            ", strides = [2,3], ceil_mode = 1",
            ", strides = [2,3], pads = [1,1,0,0], ceil_mode = 1",
            ', auto_pad = "SAME_UPPER", strides = [2,3]',
            ', auto_pad = "SAME_LOWER"',
            ', auto_pad = "VALID", strides = [2,2]',
            ", dilations = [2,3], pads = [1,1,1,1]",
        )
    ],
    "float[2,3,9,8] x; y = AveragePool <kernel_shape = [3,3], pads = [1,1,2,2], "
    "count_include_pad = 1> (x)",
    "float[2,3,9,8] x; y = AveragePool <kernel_shape = [3,3], strides = [3,3], pads = [1,0,1,1], "
    "count_include_pad = 1, ceil_mode = 1> (x)",
    "float[2,3,7] x; y = AveragePool <kernel_shape = [3], pads = [1,1]> (x)",
    "float[2,3,4] x; "
    "y = MaxPool <kernel_shape = [2], strides = [3], pads = [1,1], ceil_mode = 1> (x)",
    "float[2,3,4,5] x; y = GlobalAveragePool (x)",
    "float[2,3,4] x; y = GlobalMaxPool (x)",
    # reductions
    *[
        f"float[2,3,4] x; int64[2] a = {{-1,0}}; y = {op} <keepdims = 0> (x, a)"
        for op in (
            "ReduceMean",
            "ReduceSum",
            "ReduceMax",
            "ReduceMin",
            "ReduceL1",
            "ReduceL2",
            "ReduceSumSquare",
        )
    ],
    "float[2,3,4] x; int64[1] a = {1}; y = ReduceMean (x, a)",
    "float[2,3,4] x; y = ReduceSum (x)",
    "float[2,3,4] x; y = ReduceMax <keepdims = 0> (x)",
    "float[2,3,4] x; y = ReduceSum <noop_with_empty_axes = 1> (x)",
    "int32[2,3,4] x; y = ReduceSum (x)",
    "13: float[2,3,4] x; y = ReduceMean <axes = [-1], keepdims = 0> (x)",
    "float[2,3,4] x; y = ArgMax (x)",
    "float[2,3,4] x; y = ArgMax <axis = -1, keepdims = 0> (x)",
    "int64[2,30] x; y = ArgMin <axis = 1> (x)",
    "float[2,3,4] x; int64 a = {1}; y = CumSum (x, a)",
    "float[2,3,4] x; int64[1] a = {-1}; y = CumSum <exclusive = 1, reverse = 1> (x, a)",
    "int32[2,3,4] x; int64 a = {1}; y = CumSum <exclusive = 1> (x, a)",
    # shapes
    "float[2,3,4] x; int64[3] s = {0,-1,2}; y = Reshape (x, s)",
    "float[2,0,4] x; int64[2] s = {0,3}; y = Reshape <allowzero = 1> (x, s)",
    *[f"float[2,3,4] x; y = Flatten <axis = {axis}> (x)" for axis in (0, 1, 2, 3, -1)],
    "float[2,3,4] x; y = Transpose (x)",
    "float[2,3,4] x; y = Transpose <perm = [1,0,2]> (x)",
    "float[2,1,3,1] x; y = Squeeze (x)",
    "float[2,1,3,1] x; int64[1] a = {-1}; y = Squeeze (x, a)",
    "float[2,3] x; int64[3] a = {-1,0,2}; y = Unsqueeze (x, a)",
    "float[2,3] x; float[4,3] z; y = Concat <axis = 0> (x, z, x)",
    "float[2,3] x; float[2,1] z; y = Concat <axis = -1> (x, z)",
    "float[6,3] x; int64[3] s = {1,3,2}; a, b, c = Split (x, s) y = Concat <axis = 0> (b, a)",
    "float[3,7] x; a, b = Split <axis = -1, num_outputs = 2> (x) y = Concat <axis = 1> (b, a)",
    "float[5,6] x; int64[2] s = {1,-4}; int64[2] e = {-1,9223372036854775807}; "
    "y = Slice (x, s, e)",
    "float[5,6] x; int64[2] s = {-1,9}; int64[2] e = {-9223372036854775807,0}; "
    "int64[2] a = {0,-1}; int64[2] t = {-2,-1}; y = Slice (x, s, e, a, t)",
    "float[5,6] x; int64[1] s = {4}; int64[1] e = {2}; int64[1] a = {1}; y = Slice (x, s, e, a)",
    "float[5,6] x; int64[1] s = {-30}; int64[1] e = {30}; int64[1] a = {1}; int64[1] t = {4}; "
    "y = Slice (x, s, e, a, t)",
    "float[5,6] x; int64[1] s = {-9}; int64[1] e = {-8}; int64[1] a = {0}; int64[1] t = {-3}; "
    "y = Slice (x, s, e, a, t)",
    "float[5,6] x; int64[2,2] i = {1,-1,0,4}; y = Gather (x, i)",
    "float[5,6] x; int64 i = {-2}; y = Gather <axis = -1> (x, i)",
    "float[5] x; int32 i = {3}; y = Gather (x, i)",
    "float[3,4] x; int64[2,4] i = {0,-1,2,1,1,1,0,-3}; y = GatherElements (x, i)",
    "float[3,4] x; int64[3,2] i = {0,-1,2,1,1,1}; y = GatherElements <axis = 1> (x, i)",
    "float[3,4,2] x; int64[2,2] i = {0,-1,2,1}; y = GatherND (x, i)",
    "float[2,3,4] x; int64[2,5,1] i = {0,1,2,2,-1,1,1,0,-2,0}; "
    "y = GatherND <batch_dims = 1> (x, i)",
    "float[3,4] x; int64[2,1] i = {2,0}; float[2,4] u; y = ScatterND (x, i, u)",
    "float[3,4] x; int64[3,2] i = {2,0,1,1,2,0}; float[3] u; "
    'y = ScatterND <reduction = "add"> (x, i, u)',
    "float[3,1] x; int64[3] s = {2,1,4}; y = Expand (x, s)",
    "float[2,3] x; int64[2] r = {2,3}; y = Tile (x, r)",
    "float[2,3,4] x; y = Shape (x)",
    "float[2,3,4] x; y = Shape <start = -2, end = -1> (x)",
    "float[2,3,4] x; y = Shape <start = 5> (x)",
    "float[2,3,4] x; y = Size (x)",
    "float[5,4] x; y = Trilu (x)",
    "float[2,5,4] x; int64 k = {-1}; y = Trilu <upper = 0> (x, k)",
    "float[2,3] x; int64[4] p = {1,0,2,1}; float v = {0.5}; y = Pad (x, p, v)",
    "float[2,3] x; int64[4] p = {-1,0,2,-1}; y = Pad (x, p)",
    "float[2,3,4] x; int64[2] p = {1,2}; int64[1] a = {-2}; y = Pad (x, p, , a)",
    "int64[2,3] x; int64[4] p = {1,0,2,1}; y = Pad (x, p)",
    # codes; those of less than a byte are in test_torch_codes.py
    *[
        f"float[3,8] x; float s = {{{scale}}}; {t} z = {{{zero}}}; "
        "q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)"
        for t, scale, zero in (
            *[("uint8", 0.01, 128), ("int8", 0.01, -3), ("uint16", 1e-4, 30000)],
            ("int16", 1e-4, 5),
        )
    ],
    "float[5,2] x; float[3,2] s = {1,2,3,4,5,6}; "
    "q = QuantizeLinear <axis = 0, block_size = 2> (x, s) "
    "y = DequantizeLinear <axis = 0, block_size = 2> (q, s)",
    "float[2,3] x; float s = {0.05}; "
    "q = QuantizeLinear <output_dtype = 3> (x, s) y = DequantizeLinear (q, s)",
    "float[1] x; int32[3] c = {2000000001,-5,7}; float[3] s = {1e-9,2,3}; int32[3] z = {0,0,0}; "
    "d = DequantizeLinear <axis = 0> (c, s, z) y = Add (d, x)",
    *[
        f"float[3,40] x; float m = {{{shift}}}; a = Add (x, m) "
        "q, s, z = DynamicQuantizeLinear (a) y = DequantizeLinear (q, s, z)"
        for shift in (0.3, 9, -9)
    ],
    "float[4] x; float m = {0}; a = Mul (x, m) q, s, z = DynamicQuantizeLinear (a) "
    "y = DequantizeLinear (q, s, z)",
    # made from numbers, and logic
    "float[1] x; c = Constant <value = float[2] {1, 2}> () y = Add (x, c)",
    "float[1] x; c = Constant <value_float = 1.5> () y = Add (x, c)",
    "float[1] x; c = Constant <value_floats = [1.5, 2.5]> () y = Add (x, c)",
    "int64[1] x; c = Constant <value_int = 3> () y = Add (x, c)",
    "int64[1] x; c = Constant <value_ints = [3, 4]> () y = Add (x, c)",
    "int64[2] x; y = ConstantOfShape (x)",
    "int64[2] x; y = ConstantOfShape <value = int64[1] {7}> (x)",
    "int64 x; int64 s = {-3}; int64 d = {2}; y = Range (s, x, d)",
    "float x; float s = {1.0}; float e = {-0.2}; float d = {-0.3}; y = Range (s, e, d)",
    "float x; float s = {1.0}; float e = {2.0}; float d = {-0.3}; y = Range (s, e, d)",
    "float[9] x; y = Cast <to = 7> (x)",
    "int64[9] x; y = Cast <to = 9> (x)",
    "int64[9] x; b = Cast <to = 9> (x) y = Cast <to = 1> (b)",
    "float[9] x; h = Cast <to = 10> (x) y = Cast <to = 11> (h)",
    "bool[3,1] c; float[4] x; float z = {0}; y = Where (c, x, z)",
    *[
        f"int64[9] a; int64[9] b; y = {op} (a, b)"
        for op in ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
    ],
    *[f"bool[9] a; bool[9] b; y = {op} (a, b)" for op in ("And", "Or", "Xor")],
    "bool[9] a; y = Not (a)",
    "float[9] x; s = Sqrt (x) y = IsNaN (s)",
]


def parse(text):
    """Return the model of a case; a number before a colon is its opset."""
    opset, _, text = text.rpartition(": ")
    *declared, body = text.split("; ")
    constants = ", ".join(part for part in declared if "=" in part)
    inputs = ", ".join(part for part in declared if "=" not in part)
    version = opset or "21"
    header = f'<ir_version: {10 if int(version) < 23 else 11}, opset_import: ["" : {version}]>'
    model = ir.from_onnx_text(f"{header} g ({inputs}) => (float y) <{constants}> {{ {body} }}")
    model.graph.outputs[0].type = model.graph.outputs[0].shape = None
    ShapeInferencePass()(model)
    return model


def fed(model):
    """Return random feeds of the model's declared shapes."""
    draw = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = value.shape.numpy()
        numbers = draw.normal(0, 1, shape)
        if not value.dtype.is_floating_point():
            numbers = draw.integers(0, 2 if value.dtype == ir.DataType.BOOL else 12, shape)
        feeds[value.name] = np.asarray(numbers, value.dtype.numpy())
    return feeds


def reference(model, feeds):
    """Return what onnxruntime makes of the feeds, without fusions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, feeds)
    return y


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("text", CASES)
def test_operators_are_those_of_onnxruntime(text):
    model = parse(text)
    feeds = fed(model)
    expected, got = reference(model, feeds), TorchGraph(model, [])(feeds)["y"].numpy()
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    scale = max(float(np.abs(expected[np.isfinite(expected)]).max(initial=0)), 1e-6)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("float[4] x; y = Det (x)", r"node 'y' \(Det\): .* do not cover this operator; choose an"),
        ("12: float[4] x; y = Relu (x)", "opset 12: expected 13 or newer"),
        (
            'float[2,3] x; int64[4] p = {1,0,0,0}; y = Pad <mode = "edge"> (x, p)',
            "mode is 'edge': expected 'constant'",
        ),
        ("float[4] x; y = Cast <to = 17> (x)", "to is 17: expected 1, 2"),
        (
            "float[1,1,4] x; float[1,1,2] w; y = ConvTranspose <output_shape = [5]> (x, w)",
            "attribute 'output_shape'",
        ),
        (
            "float[1,1,4] x; y, i = MaxPool <kernel_shape = [2]> (x) z = Shape (i)",
            "first output only, and 'i' is read",
        ),
        ("float[4] x; y, z = Split (x) a = Add (y, z)", "num_outputs are given"),
        ("float[5] x; y, a, b, c = Split <num_outputs = 4> (x)", "it makes 3 parts: expected 4"),
        (
            "float[4] x; float r = {0.5}; bool t = {1}; y = Dropout (x, r, t)",
            "training_mode is true: expected false",
        ),
        (
            'float[1,1,4] x; float[1,1,2] w; y = ConvTranspose <auto_pad = "SAME_UPPER"> (x, w)',
            "expected explicit pads",
        ),
        (
            'float[1,1,9] x; y = MaxPool <auto_pad = "SAME_LOWER", kernel_shape = [2], '
            "dilations = [2]> (x)",
            "expected explicit pads",
        ),
        (
            'float[1,1,8] x; y = AveragePool <auto_pad = "SAME_UPPER", kernel_shape = [1], '
            "strides = [4]> (x)",
            "expected explicit pads",
        ),
        ("float[1,1,2,2,2,2] x; float[1,1,1,1,1,1] w; y = Conv (x, w)", "torch cannot run it"),
        ("float[4] x; y = Relu <slope = 2> (x)", "do not cover its form"),
        (
            "float[4] x; float s = {1}; y = QuantizeLinear <output_dtype = 17> (x, s)",
            "output_dtype is 17: expected 0, 2",
        ),
        ("float[1,1,4] x; y = MaxPool <kernel_shape = [2], size = 2> (x)", "attribute 'size'"),
    ],
)
def test_what_is_not_covered_is_refused(text, said):
    model = parse(text)
    with pytest.raises(UnsupportedError, match=said):
        TorchGraph(model, [])(fed(model))


def test_gradients_are_never_dropped_silently():
    model = parse("float[2] x; float w = {3}; int64[2] p = {1,1}; y = Pad (x, p, w)")
    TorchGraph(model, [])(fed(model))
    with pytest.raises(UnsupportedError, match="depends on a weight"):
        TorchGraph(model, ["w"])(fed(model))


def test_cast_covers_what_torch_has():
    assert set(get_args(CastTo)) == {dtype.value for dtype in DTYPES}
