import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler import notes
from fourfold.compiler.formats import Format
from fourfold.compiler.quantizers import affine_parameters, quantize_affine
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.insert_qdq import InsertQdq

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
DRAW = np.random.default_rng(0)
RECIPE = 'calibrate{method="minmax"},assign-bits%s,insert-qdq,round-weights,quantize-biases'


def constant(name, *shape):
    """Print a float initializer of normal numbers."""
    numbers = ", ".join(f"{v:.4f}" for v in DRAW.normal(size=shape).ravel())
    return f"float[{','.join(map(str, shape))}] {name} = {{{numbers}}}"


def image(count=16, channels=4, size=6):
    return np.random.default_rng(1).normal(size=(count, channels, size, size)).astype(np.float32)


@pytest.fixture
def quantized(parse, fed):
    """`quantized(text, x=...)`: calibrate, decide, round and insert; return the model."""

    def compiled(text, options="", **feeds):
        model = parse(text)
        after, rows = run(Recipe.parse(RECIPE % options), model, fed(model, **feeds))
        assert [row.lost_notes for row in rows] == [()] * len(rows)
        return after

    return compiled


def node(model, name):
    return next(n for n in model.graph if n.name == name)


def ops(nodes):
    return [n.op_type for n in nodes]


def scale_of(model, value):
    """Return (scale, zero point) of the quantizer that stands at a value."""
    quantizer = node(model, f"{value}_QuantizeLinear")
    scale, zero = (v.const_value.numpy() for v in quantizer.inputs[1:])
    return float(scale), int(zero)


def scale_of_output(model):
    """Return the scale of the quantizer that makes the graph's first output."""
    return float(model.graph.outputs[0].producer().inputs[1].const_value.numpy())


def sqnr(first, second):
    return 10 * np.log10(np.square(first).sum() / np.square(first - second).sum())


# What the pass writes.

MATMUL = f"""{HEADER} g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {{
    y = MatMul (x, w)
}}"""
STATIC = {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 1.55}
WEIGHT = {"format": "int8 per_axis(1)", "mode": "static"}


def test_a_static_value_gets_a_fixed_scale(becomes, parse, context):
    text = f"""{HEADER} g (float[2,2] x) => (float[2,2] y)
    <int8[2,2] c = {{42, 64, 127, 127}}, float[2] s = {{0.023, 0.031}}, int8[2] z = {{0, 0}}> {{
        w = DequantizeLinear <axis = 1> (c, s, z)
        y = MatMul (x, w)
    }}"""
    model = parse(text)
    notes.apply_plan(model, {"x": STATIC})
    after = becomes(
        InsertQdq(),
        model,
        f"""{HEADER} g (float[2,2] x) => (float[2,2] y)
        <int8[2,2] c = {{42, 64, 127, 127}}, float[2] s = {{0.023, 0.031}}, int8[2] z = {{0, 0}},
         float xs = {{0.01}}, uint8 xz = {{100}}> {{
            q = QuantizeLinear (x, xs, xz)
            d = DequantizeLinear (q, xs, xz)
            w = DequantizeLinear <axis = 1> (c, s, z)
            y = MatMul (d, w)
        }}""",
    )
    assert InsertQdq().run(after, context) == 0


def test_a_dynamic_value_gets_its_scale_at_run_time(becomes, parse, context):
    text = f"""{HEADER} g (float[2,2] x) => (float[2,2] y)
    <int8[2,2] c = {{42, 64, 127, 127}}, float[2] s = {{0.023, 0.031}}, int8[2] z = {{0, 0}}> {{
        w = DequantizeLinear <axis = 1> (c, s, z)
        y = MatMul (x, w)
    }}"""
    model = parse(text)
    notes.apply_plan(model, {"x": {"format": "uint8 per_tensor", "mode": "dynamic"}})
    after = becomes(
        InsertQdq(),
        model,
        f"""{HEADER} g (float[2,2] x) => (float[2,2] y)
        <int8[2,2] c = {{42, 64, 127, 127}}, float[2] s = {{0.023, 0.031}},
         int8[2] z = {{0, 0}}> {{
            q, xs, xz = DynamicQuantizeLinear (x)
            d = DequantizeLinear (q, xs, xz)
            w = DequantizeLinear <axis = 1> (c, s, z)
            y = MatMul (d, w)
        }}""",
    )
    assert InsertQdq().run(after, context) == 0


def test_what_is_not_planned_or_planned_float_is_left_alone(becomes, parse):
    becomes(InsertQdq(), MATMUL, MATMUL)
    model = parse(MATMUL)
    notes.apply_plan(model, {"x": {"mode": "float", "low": -1.0, "high": 1.0}})
    becomes(InsertQdq(), model, MATMUL)


def test_an_int8_activation_is_asymmetric_too(parse, context):
    model = parse(MATMUL)
    notes.apply_plan(model, {"x": {**STATIC, "format": "int8 per_tensor"}})
    InsertQdq().run(model, context)
    assert scale_of(model, "x") == (pytest.approx(0.01), -28)


# What onnxruntime makes of it.

CONV = f"""{HEADER} g (float[n,4,6,6] x) => (float[n,4,6,6] y)
<{constant("w", 4, 4, 3, 3)}, {constant("b", 4)}, {constant("v", 4, 4, 1, 1)}> {{
    [conv] c = Conv <pads = [1,1,1,1]> (x, w, b)
    [relu] r = Relu (c)
    [last] y = Conv (r, v)
}}"""


def test_nothing_stands_between_conv_and_relu(quantized, kernels, outputs, parse):
    model = quantized(CONV, x=image())
    assert node(model, "relu").inputs[0].producer() is node(model, "conv")
    assert scale_of(model, "r")[1] == 0  # the range was taken behind Relu
    found = kernels(model)
    assert found["QLinearConv"] == 2
    assert not found.keys() & {"Conv", "FusedConv", "Relu"}
    expected = outputs(parse(CONV), x=image())["y"]
    assert sqnr(expected, outputs(model, x=image())["y"]) > 30


def test_a_clip_at_zero_is_folded_like_relu(quantized, kernels):
    text = CONV.replace("Relu (c)", "Clip (c, zero, six)").replace(
        "<float", "<float zero = {0}, float six = {6}, float"
    )
    found = kernels(quantized(text, x=image()))
    assert found["QLinearConv"] == 2
    assert not found.keys() & {"Conv", "FusedConv", "Clip"}


RESIDUAL = f"""{HEADER} g (float[n,4,6,6] x) => (float[n,4,6,6] y)
<{constant("w", 4, 4, 3, 3)}, {constant("v", 4, 4, 1, 1)}> {{
    [first] a = Conv <pads = [1,1,1,1]> (x, w)
    [second] b = Conv (x, v)
    [add] s = Add (a, b)
    [relu] r = Relu (s)
    [last] y = Conv (r, v)
}}"""


def test_a_residual_add_is_one_kernel_and_its_operands_keep_their_scales(quantized, kernels):
    model = quantized(RESIDUAL, x=image())
    assert node(model, "relu").inputs[0].producer() is node(model, "add")
    scales = {scale_of(model, name) for name in "abr"}
    assert len(scales) == 3
    found = kernels(model)
    assert (found["QLinearAdd"], found["QLinearConv"]) == (1, 3)
    assert not found.keys() & {"Add", "Relu", "Conv", "FusedConv"}


GEMM = f"""{HEADER} g (float[n,8] x) => (float[n,4] y)
<{constant("w", 6, 8)}, {constant("b", 6)}, {constant("v", 6, 4)}> {{
    [first] a = Gemm <transB = 1> (x, w, b)
    [relu] r = Relu (a)
    [second] y = Gemm (r, v)
}}"""


def rows(count=32, width=8):
    return np.random.default_rng(2).normal(size=(count, width)).astype(np.float32)


def test_gemm_with_and_without_transposed_weight_becomes_qgemm(quantized, kernels):
    model = quantized(GEMM, x=rows())
    assert node(model, "relu").inputs[0].producer() is node(model, "first")
    found = kernels(model)
    assert found["QGemm"] == 2
    assert not found.keys() & {"Gemm", "FusedGemm", "Relu", "MatMul"}


def test_matmul_becomes_the_kernel_that_writes_float(quantized, kernels):
    text = f"""{HEADER} g (float[n,8] x) => (float[n,6] y) <{constant("w", 8, 6)}> {{
        [one] y = MatMul (x, w)
    }}"""
    static = quantized(text, "{activations=static}", x=rows())
    found = kernels(static)
    assert found["MatMulIntegerToFloat"] == 1
    assert "MatMul" not in found
    dynamic = quantized(text, "{activations=dynamic}", x=rows())
    found = kernels(dynamic)
    assert found["DynamicQuantizeMatMul"] == 1
    assert "MatMul" not in found


CONCAT = f"""{HEADER} g (float[n,4,6,6] x) => (float[n,4,6,6] y)
<{constant("w", 4, 4, 3, 3)}, {constant("v", 4, 4, 1, 1)}, {constant("u", 4, 8, 1, 1)}> {{
    [first] a = Conv <pads = [1,1,1,1]> (x, w)
    [second] b = Conv (x, v)
    [join] j = Concat <axis = 1> (a, b)
    [last] y = Conv (j, u)
}}"""


def test_concat_and_its_operands_share_one_scale(quantized, kernels):
    model = quantized(CONCAT, x=image())
    assert scale_of(model, "a") == scale_of(model, "b") == scale_of(model, "j")
    assert len({id(node(model, f"{n}_QuantizeLinear").inputs[1]) for n in "abj"}) == 1
    found = kernels(model)
    assert (found["QLinearConcat"], found["QLinearConv"]) == (1, 3)
    assert "Concat" not in found


def test_a_relu_into_concat_with_negative_numbers_is_still_folded(quantized, kernels):
    text = CONCAT.replace("b = Conv (x, v)", "c = Conv (x, v) b = Relu (c)")
    model = quantized(text, x=image())
    assert scale_of(model, "b")[1] == 0
    found = kernels(model)
    assert (found["QLinearConcat"], found["QLinearConv"]) == (1, 3)
    assert not found.keys() & {"Concat", "Relu", "FusedConv", "Conv"}


CARRIES = {
    "MaxPool": "MaxPool <kernel_shape = [2,2]> (r)",
    "Reshape": "Reshape (r, flat)",
    "Transpose": "Transpose <perm = [0,2,3,1]> (r)",
    "Flatten": "Flatten (r)",
    "Slice": "Slice (r, starts, ends, axes)",
    "Pad": "Pad (r, pads)",
    "Unsqueeze": "Unsqueeze (r, axes)",
}


@pytest.mark.parametrize("op", CARRIES)
def test_what_carries_codes_keeps_their_scale_and_runs_on_them(
    op, quantized, optimized, outputs, parse
):
    text = f"""{HEADER} g (float[n,4,6,6] x) => (float y)
    <{constant("w", 4, 4, 1, 1)}, int64[2] flat = {{0, -1}}, int64[1] starts = {{1}},
     int64[1] ends = {{3}}, int64[1] axes = {{1}}, int64[8] pads = {{0,0,1,1,0,0,1,1}},
     int64[1] every = {{-1}}> {{
        [first] c = Conv (x, w)
        [relu] r = Relu (c)
        [carry] m = {CARRIES[op]}
        [again] k = Reshape (m, every)
        [total] y = ReduceMax <keepdims = 0> (k)
    }}"""
    x = image()
    model = quantized(text, x=x)
    assert scale_of(model, "m") == scale_of(model, "r")
    expected, got = (outputs(m, x=x)["y"] for m in (parse(text), model))
    assert abs(got - expected) < 0.02 * abs(expected) + scale_of(model, "r")[0]
    nodes = optimized(model).node
    makers = {name: n.op_type for n in nodes for name in n.output}
    carriers = [n for n in nodes if n.op_type.removeprefix("Nhwc") == op]
    # onnxruntime 1.32 fuses no Pad; it stands between two conversions.
    assert any(makers[n.input[0]] == "DequantizeLinear" for n in carriers) == (op == "Pad")
    assert "QLinearConv" in makers.values()


RESIDUAL_FLOAT = f"""{HEADER} g (float[n,8] x) => (float[n,8] y)
<{constant("w", 8, 8)}, {constant("gamma", 8)}> {{
    [norm] h = LayerNormalization (x, gamma)
    [one] m = MatMul (h, w)
    [add] y = Add (m, h)
}}"""


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_float_reader_of_a_float_value_reads_it_unquantized(mode, quantized):
    model = quantized(RESIDUAL_FLOAT, f"{{activations={mode}}}", x=rows())
    norm = node(model, "norm").outputs[0]
    assert node(model, "add").inputs[1] is norm
    read = node(model, "one").inputs[0].producer()
    assert read.op_type == "DequantizeLinear"
    assert read.inputs[0].producer().inputs[0] is norm


def test_a_float_reader_of_codes_reads_them(quantized):
    # The Conv writes codes; its float output does not exist at run time.
    model = quantized(CONV.replace("Conv (r, v)", "Exp (r)"), x=image())
    assert node(model, "last").inputs[0].producer().name == "r_DequantizeLinear"


def test_a_quantized_output_keeps_its_name(quantized, kernels):
    text = CONV.replace("[relu] r = Relu (c)", "").replace("Conv (r, v)", "Relu (c)")
    model = quantized(text, x=image())
    output = model.graph.outputs[0]
    assert output.name == "y"
    assert output.producer().op_type == "DequantizeLinear"
    assert output.type == ir.TensorType(ir.DataType.FLOAT)
    assert kernels(model)["QLinearConv"] == 1


def test_a_value_inside_that_is_an_output_keeps_its_name(quantized):
    text = CONV.replace("(float[n,4,6,6] y)", "(float[n,4,6,6] y, float[n,4,6,6] r)")
    model = quantized(text, x=image())
    assert [v.name for v in model.graph.outputs] == ["y", "r"]


# The numbers.


def test_a_bias_is_int32_with_the_product_of_the_scales(quantized):
    model = quantized(CONV, x=image())
    bias = node(model, "conv").inputs[2].producer()
    codes, scale, zero = (v.const_value.numpy() for v in bias.inputs)
    assert (codes.dtype, zero.dtype) == (np.int32, np.int32)
    assert not zero.any()
    weight = model.graph.initializers["w_scale"].const_value.numpy()
    np.testing.assert_allclose(scale, scale_of(model, "x")[0] * weight, rtol=1e-6)
    numbers = CONV.partition("] b = {")[2].partition("}")[0]
    bias = np.array([float(v) for v in numbers.split(",")])
    np.testing.assert_allclose(codes * scale, bias, atol=float(scale.max()) * 0.51)
    assert "b" not in model.graph.initializers


def test_a_matrix_of_biases_stays_float(quantized, outputs, parse):
    text = f"""{HEADER} g (float[4,8] x) => (float[4,4] y)
    <{constant("w", 8, 4)}, {constant("b", 4, 1)}> {{ [one] y = Gemm (x, w, b) }}"""
    x = rows(4)
    model = quantized(text, x=x)
    assert node(model, "one").inputs[2].name == "b"
    assert sqnr(outputs(parse(text), x=x)["y"], outputs(model, x=x)["y"]) > 30


def test_gemm_computes_what_integers_give(quantized, outputs):
    """Emulate codes, int32 sums and the one rounding at the end in numpy."""
    text = f"""{HEADER} g (float[n,8] x) => (float[n,6] y)
    <{constant("w", 6, 8)}, {constant("b", 6)}> {{ [one] y = Gemm <transB = 1> (x, w, b) }}"""
    x = rows()
    model = quantized(text, x=x)
    initial = {k: v.const_value.numpy() for k, v in model.graph.initializers.items()}
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale, zero = affine_parameters(low, high, Format("uint8"))
    assert scale_of(model, "x") == (float(scale), zero)
    codes = quantize_affine(x, scale, zero, Format("uint8")).astype(np.int64) - zero
    sums = codes @ initial["w_quantized"].T.astype(np.int64) + initial["b_quantized"]
    expected = sums * (scale * initial["w_scale"].astype(np.float64))
    got = outputs(model, x=x)["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", [CONV, RESIDUAL, CONCAT])
def test_fused_kernels_give_the_numbers_of_the_unfused_form(text, quantized, outputs):
    model = quantized(text, x=image())
    fused, plain = (outputs(model, plain=plain, x=image())["y"] for plain in (False, True))
    # A sum that falls between two codes may go to either; nothing else may differ.
    step = scale_of_output(model)
    assert np.abs(fused - plain).max() <= 2 * step
    assert (fused != plain).mean() < 0.01


@pytest.mark.parametrize("text", [CONV, RESIDUAL, CONCAT, GEMM, RESIDUAL_FLOAT])
def test_a_second_run_changes_nothing(text, quantized, context):
    model = quantized(text, x=image() if "n,4,6,6" in text else rows())
    before = str(model.graph)
    assert InsertQdq().run(model, context) == 0
    assert str(model.graph) == before


def test_a_float_embedding_does_not_keep_the_layer_behind_it_float(context, kernels, parse):
    """Its table is a constant too, and is no weight of that layer."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[n] x) => (float[n,4] y)
    <float[3,4] t = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12},
     float[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}> {
        [look_up] e = Gather (t, x)
        [layer] y = MatMul (e, w)
    }"""
    recipe = 'assign-bits{activations="dynamic" embeddings=false},insert-qdq,round-weights'
    after, _ = run(Recipe.parse(recipe), parse(text), context)
    assert "DynamicQuantizeMatMul" in kernels(after)
