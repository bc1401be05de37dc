import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.unpack_weights import UnpackWeights

HEADER = '<ir_version: 13, opset_import: ["" : 25]>'
NUMPY = {"int8": np.int8, "int4": ml_dtypes.int4, "int2": ml_dtypes.int2}
LIMITS = {"int4": 7, "int2": 1}
BIAS = "int32[2] bc = {10, -20}, float[2] bs = {0.01, 0.02}, int32[2] bz = {0, 0}"
ACTIVATION = "float xs = {0.02}, uint8 xz = {128}"
NODES = {
    "Conv": ("[n,2,4,4]", "2,2,1,1", 0, "Conv (d, w, b)"),
    "Gemm": ("[n,2]", "2,2", 0, "Gemm <transB = 1> (d, w, b)"),
    "MatMul": ("[n,2]", "2,2", 1, "MatMul (d, w)"),
}
QUANTIZE = {
    "static": "q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz)",
    "dynamic": "q, qs, qz = DynamicQuantizeLinear (x) d = DequantizeLinear (q, qs, qz)",
}


def model_of(op, codes=(1, -1, 0, 1), mode="static"):
    """Return the text of one quantized node with a weight of these codes."""
    shape, weight, axis, node = NODES[op]
    biased = op != "MatMul"
    numbers = ", ".join(map(str, codes))
    # A Conv's output is quantized as well, or onnxruntime would keep its kernel in float.
    last = "y = DequantizeLinear (p, xs, xz)" if op == "Conv" else "y = Identity (o)"
    quantized = "p = QuantizeLinear (o, xs, xz)" if op == "Conv" else ""
    return f"""{HEADER} g (float{shape} x) => (float{shape} y)
    <int8[{weight}] c = {{{numbers}}}, float[2] s = {{0.5, 1}}, int8[2] z = {{0, 0}},
     {BIAS if biased else ""}{"," if biased else ""} {ACTIVATION}> {{
        {QUANTIZE[mode]}
        w = DequantizeLinear <axis = {axis}> (c, s, z)
        {"b = DequantizeLinear <axis = 0> (bc, bs, bz)" if biased else ""}
        o = {node}
        {quantized}
        {last}
    }}"""


def stored(model, dtype):
    """Store int8 codes in a narrower type; the text's parser packs those types wrongly."""
    for name in ("c", "z"):
        value = model.graph.initializers[name]
        codes = value.const_value.numpy().astype(NUMPY[dtype])
        value.const_value = ir.tensor(codes, name=name)
        value.dtype = value.const_value.dtype
    return model


def feed(op, count=5):
    shape = [count if d == "n" else int(d) for d in NODES[op][0].strip("[]").split(",")]
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_narrow_weight_gets_a_cast_to_the_type_of_the_kernel(becomes, context):
    before = f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <int4[2,2] c = {{0, 0, 0, 0}}, float[2] s = {{0.5, 1}}, int4[2] z = {{0, 0}}, {ACTIVATION}> {{
        q = QuantizeLinear (x, xs, xz)
        d = DequantizeLinear (q, xs, xz)
        w = DequantizeLinear <axis = 1> (c, s, z)
        y = MatMul (d, w)
    }}"""
    after = before.replace("int4[2] z", "int8[2] z").replace(
        "w = DequantizeLinear <axis = 1> (c,",
        "k = Cast <to = 3> (c) w = DequantizeLinear <axis = 1> (k,",
    )
    model = becomes(UnpackWeights(), before, after)
    assert model.graph.initializers["c"].dtype == ir.DataType.INT4  # the file stays small
    assert UnpackWeights().run(model, context) == 0


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("op", "mode"),
    [("Conv", "static"), ("Gemm", "static"), ("MatMul", "static"), ("MatMul", "dynamic")],
)
def test_narrow_weights_run_on_the_int8_kernel_to_the_bit(
    op, mode, dtype, parse, context, optimized, kernels, outputs
):
    limit = LIMITS[dtype]
    codes = (limit, -limit, 0, 1)
    narrow = stored(parse(model_of(op, codes, mode)), dtype)
    assert UnpackWeights().run(narrow, context) == 1
    wide = parse(model_of(op, codes, mode))
    graph = optimized(narrow)
    assert not [n.name for n in graph.node if n.op_type == "Cast"]
    constants = {tensor.name for tensor in graph.initializer}
    dequantized = [n for n in graph.node if n.op_type == "DequantizeLinear"]
    assert not [n.name for n in dequantized if n.input[0] in constants]
    assert kernels(narrow) == kernels(wide)
    assert not kernels(narrow).keys() & {"Conv", "FusedConv", "Gemm", "MatMul"}
    x = feed(op)
    got, expected = (outputs(model, x=x)["y"] for model in (narrow, wide))
    assert got.tobytes() == expected.tobytes()


def test_int8_weights_with_integer_readers_stay(becomes):
    for op in NODES:
        text = model_of(op)
        becomes(UnpackWeights(), text, text)


def float_reader(dtype, scale="float[2] s = {0.5, 1}", zero="[2] z = {0, 0}"):
    return f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <{dtype}[2,2] c = {{0, 0, 0, 0}}, {scale}, {dtype}{zero}> {{
        w = DequantizeLinear <axis = 1> (c, s, z)
        y = MatMul (x, w)
    }}"""


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_a_weight_for_a_float_kernel_is_widened_to_float(dtype, becomes, context):
    model = becomes(
        UnpackWeights(),
        float_reader(dtype),
        f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
        <{dtype}[2,2] c = {{0, 0, 0, 0}}, float[1,2] s = {{0.5, 1}}> {{
            f = Cast <to = 1> (c)
            w = Mul (f, s)
            y = MatMul (x, w)
        }}""",
    )
    assert UnpackWeights().run(model, context) == 0


def test_one_scale_for_the_tensor_is_widened_too(becomes):
    becomes(
        UnpackWeights(),
        float_reader("int4", "float s = {0.5}", " z = {0}"),
        f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
        <int4[2,2] c = {{0, 0, 0, 0}}, float[1] s = {{0.5}}> {{
            f = Cast <to = 1> (c)
            w = Mul (f, s)
            y = MatMul (x, w)
        }}""",
    )


def test_a_weight_with_a_reader_of_one_operand_is_widened_to_float(becomes):
    before = f"""{HEADER} g (float[n,2] x) => (float[n,3] y)
    <int8[3,2] c = {{1, 2, 3, 4, 5, 6}}, float[3] s = {{0.5, 1, 2}}> {{
        w = DequantizeLinear <axis = 0> (c, s)
        t = Transpose (w)
        y = MatMul (x, t)
    }}"""
    becomes(
        UnpackWeights(),
        before,
        before.replace("float[3] s", "float[3,1] s").replace(
            "w = DequantizeLinear <axis = 0> (c, s)", "f = Cast <to = 1> (c) w = Mul (f, s)"
        ),
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_weight_with_zero_points_is_widened_to_float(dtype, becomes, context):
    model = becomes(
        UnpackWeights(),
        float_reader(dtype, zero="[2] z = {0, 3}"),
        f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
        <{dtype}[2,2] c = {{0, 0, 0, 0}}, {dtype}[1,2] z = {{0, 3}},
         float[1,2] s = {{0.5, 1}}> {{
            f = Cast <to = 1> (c)
            g = Cast <to = 1> (z)
            h = Sub (f, g)
            w = Mul (h, s)
            y = MatMul (x, w)
        }}""",
    )
    assert UnpackWeights().run(model, context) == 0


def test_an_int8_weight_with_zero_points_is_left_to_the_kernel(becomes):
    """Less its zero point a code of eight bits need not fit an int8."""
    text = model_of("MatMul").replace("int8[2] z = {0, 0}", "int8[2] z = {0, 3}")
    becomes(UnpackWeights(), text, text)


def shifted(model, dtype, zero):
    """Store unsigned codes, and zero points of the same type."""
    numpy = {"uint4": ml_dtypes.uint4, "uint2": ml_dtypes.uint2}[dtype]
    homes = model.graph.initializers
    for name, array in (("c", homes["c"].const_value.numpy()), ("z", np.array(zero))):
        value = homes[name]
        value.const_value = ir.tensor(array.astype(numpy), name=name)
        value.dtype = value.const_value.dtype
    return model


@pytest.mark.parametrize(("dtype", "zero"), [("uint4", (7, 15)), ("uint2", (1, 3))])
@pytest.mark.parametrize(
    ("op", "mode"),
    [("Conv", "static"), ("Gemm", "static"), ("MatMul", "static"), ("MatMul", "dynamic")],
)
def test_affine_weights_run_on_the_int8_kernel_to_the_bit(
    op, mode, dtype, zero, parse, context, optimized, kernels, outputs
):
    greatest = 15 if dtype == "uint4" else 3
    codes = np.array([[greatest, 0], [2, 1]])
    narrow = shifted(parse(model_of(op, codes.ravel(), mode)), dtype, zero)
    assert UnpackWeights().run(narrow, context) == 1
    axis = NODES[op][2]
    less = codes - np.expand_dims(zero, 1 - axis)
    wide = parse(model_of(op, less.ravel(), mode))
    graph = optimized(narrow)
    assert not [n.name for n in graph.node if n.op_type in ("Cast", "Sub")]
    assert kernels(narrow) == kernels(wide)
    assert not kernels(narrow).keys() & {"Conv", "FusedConv", "Gemm", "MatMul"}
    x = feed(op)
    got, expected = (outputs(model, x=x)["y"] for model in (narrow, wide))
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "zero"), [("uint4", (7, 15)), ("uint2", (1, 3))])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_an_affine_weight_multiplies_as_numpy_does(dtype, zero, mode, parse, context, outputs):
    greatest = 15 if dtype == "uint4" else 3
    codes = np.array([[greatest, 0], [2, 1]])
    model = shifted(parse(model_of("MatMul", codes.ravel(), mode)), dtype, zero)
    assert UnpackWeights().run(model, context) == 1
    x = feed("MatMul")
    scale, point = np.float32(0.02), 128
    if mode == "dynamic":
        low, high = min(x.min(), 0), max(x.max(), 0)
        scale = np.float32((high - low) / 255)
        point = np.clip(np.rint(-low / scale), 0, 255)
    quantized = np.clip(np.rint(x / scale) + point, 0, 255) - point
    expected = quantized @ (codes - zero) * scale * np.float32([0.5, 1])
    for plain in (True, False):
        got = outputs(model, plain=plain, x=x)["y"]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "zero"), [("uint4", (7, 15)), ("uint2", (1, 3))])
def test_one_zero_point_serves_the_whole_weight(dtype, zero, parse, context, outputs, kernels):
    text = model_of("MatMul", (1, 0, 2, 3)).replace("float[2] s = {0.5, 1}", "float s = {0.5}")
    text = text.replace("int8[2] z = {0, 0}", "int8 z = {0}").replace("<axis = 1> ", "")
    model = shifted(parse(text), dtype, zero[0])
    before = model.clone()
    assert UnpackWeights().run(model, context) == 1
    assert UnpackWeights().run(model, context) == 0
    x = feed("MatMul")
    first, second = (outputs(m, plain=True, x=x)["y"] for m in (before, model))
    assert first.tobytes() == second.tobytes()
    assert kernels(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}


AFFINE = 'assign-bits{weights=%d activations="float" affine=true},round-weights,unpack-weights'


@pytest.mark.parametrize(("bits", "container"), [(4, "UINT4"), (2, "UINT2"), (8, "INT8")])
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_affine_weights_beside_floats_are_floats_at_load(
    name, bits, container, zoo, context, kernels, outputs
):
    source = zoo[name]()
    model, _ = run(Recipe.parse(f"tidy{{opset=25}},{AFFINE % bits}"), source, context)
    stored = [v for n, v in model.graph.initializers.items() if n.endswith("_quantized")]
    assert {value.dtype.name for value in stored} == {container}
    assert kernels(model) == kernels(run(Recipe.parse("tidy{opset=25}"), source, context)[0])
    rounded, _ = run(Recipe.parse(f"tidy{{opset=25}},{AFFINE % bits}"[:-15]), source, context)
    shape = [3 if not isinstance(d, int) else d for d in source.graph.inputs[0].shape]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    first, second = (outputs(m, plain=True, x=x)["y"] for m in (rounded, model))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


WEIGHT_ONLY = 'assign-bits{weights=%d activations="float"},round-weights,unpack-weights'


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_with_weights_only_the_runtime_runs_the_float_graph(
    name, bits, zoo, context, kernels, outputs
):
    source = zoo[name]()
    model, rows = run(Recipe.parse(f"tidy{{opset=25}},{WEIGHT_ONLY % bits}"), source, context)
    assert rows[-1].changed > 0
    assert kernels(model) == kernels(run(Recipe.parse("tidy{opset=25}"), source, context)[0])
    # And the numbers are those of the rounded weights, to float's last digits.
    rounded, _ = run(Recipe.parse(f"tidy{{opset=25}},{WEIGHT_ONLY % bits}"[:-15]), source, context)
    shape = [3 if not isinstance(d, int) else d for d in source.graph.inputs[0].shape]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    first, second = (outputs(m, plain=True, x=x)["y"] for m in (rounded, model))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


def test_biases_and_blocks_are_left_alone(becomes):
    text = f"""{HEADER} g (float[n,4] x) => (float[n,2] y)
    <int4[4,2] c = {{0, 0, 0, 0, 0, 0, 0, 0}}, float[2,2] s = {{0.5, 1, 2, 3}}> {{
        w = DequantizeLinear <axis = 0, block_size = 2> (c, s)
        y = MatMul (x, w)
    }}"""
    becomes(UnpackWeights(), text, text)
    text = f"""{HEADER} g (float[n,2] x) => (float[n,2] y) <{BIAS}> {{
        b = DequantizeLinear <axis = 0> (bc, bs, bz)
        y = Add (x, b)
    }}"""
    becomes(UnpackWeights(), text, text)


def test_the_note_stays_with_the_codes(context, zoo):
    recipe = Recipe.parse(WEIGHT_ONLY % 4)
    after, rows = run(recipe, zoo["mlp"](), context)
    assert [row.lost_notes for row in rows] == [()] * 3
    assert after.graph.initializers["w1_quantized"].dtype == ir.DataType.INT4
