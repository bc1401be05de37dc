import numpy as np
import pytest

from fourfold.compiler import notes
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.fuse_matmul_bias import FuseMatmulBias

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
CODES = """int8[3,2] c = {1, -2, 3, 4, -5, 6}, float[2] s = {0.5, 0.25}, int8[2] z = {0, 0},
    float xs = {0.02}, uint8 xz = {128}"""
BIAS = "float[2] b = {0.5, -1}"
QUANTIZED = """q = QuantizeLinear (x, xs, xz)
    d = DequantizeLinear (q, xs, xz)
    w = DequantizeLinear <axis = 1> (c, s, z)"""


def text(nodes="m = MatMul (d, w) y = Add (m, b)", bias=BIAS, outs="float[n,2] y", codes=CODES):
    weights = f"{codes}, {bias}" if bias else codes
    return f"{HEADER} g (float[n,3] x) => ({outs}) <{weights}> {{ {QUANTIZED} {nodes} }}"


FUSED = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[n,3] x) => (float[n,2] y) <{CODES}, {BIAS}> {{
    q = QuantizeLinear (x, xs, xz)
    y = com.microsoft.MatMulIntegerToFloat (q, c, xs, s, xz, z, b)
}}"""
X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


@pytest.mark.parametrize("add", ["Add (m, b)", "Add (b, m)"])
def test_the_bias_goes_into_the_kernel(add, becomes, context, parse, outputs, close):
    before = text(f"m = MatMul (d, w) y = {add}")
    after = becomes(FuseMatmulBias(), before, FUSED)
    assert after.graph.opset_imports["com.microsoft"] == 1
    assert FuseMatmulBias().run(after, context) == 0
    close(outputs(parse(before), plain=True, x=X), outputs(after, x=X))


def test_a_range_taken_at_run_time(becomes, parse, outputs, close):
    static, dynamic = "q = QuantizeLinear (x, xs, xz)", "q, ds, dz = DynamicQuantizeLinear (x)"
    weights = CODES.partition("},\n")[0] + "}"
    before = text(codes=weights)
    before = before.replace(static, dynamic).replace("(q, xs, xz)", "(q, ds, dz)")
    after = FUSED.replace(CODES, weights).replace(static, dynamic)
    model = becomes(FuseMatmulBias(), before, after.replace("xs, s, xz", "ds, s, dz"))
    close(outputs(parse(before), plain=True, x=X), outputs(model, x=X))


def test_dequantizers_that_others_read_stay(becomes):
    nodes = "m = MatMul (d, w) y = Add (m, b) u = Exp (d)"
    outs = "float[n,2] y, float[n,3] u"
    becomes(
        FuseMatmulBias(),
        text(nodes, outs=outs),
        FUSED.replace("(float[n,2] y)", f"({outs})").replace(
            "y = com", "d = DequantizeLinear (q, xs, xz) u = Exp (d) y = com"
        ),
    )


def test_quantizers_without_zero_points(becomes):
    before = text().replace("(c, s, z)", "(c, s)").replace(", int8[2] z = {0, 0}", "")
    after = FUSED.replace("xz, z, b)", "xz, , b)").replace(", int8[2] z = {0, 0}", "")
    becomes(FuseMatmulBias(), before, after)


ALONE = {
    "a product that is read elsewhere": text(
        "m = MatMul (d, w) y = Add (m, b) u = Exp (m)", outs="float[n,2] y, float[n,2] u"
    ),
    "a product that is an output": text(outs="float[n,2] y, float[n,2] m"),
    "a float operand": text("m = MatMul (x, w) y = Add (m, b)"),
    "a bias that is no vector of the columns": text(bias="float[1] b = {0.5}"),
    "a bias that is computed": text(
        "e = ReduceMax (x) m = MatMul (d, w) y = Add (m, e)", bias="", outs="float[n,2] y"
    ),
    "no bias": text("y = MatMul (d, w)", bias=""),
    "weights with a scale for each row": text(
        codes=CODES.replace("float[2] s = {0.5, 0.25}", "float[3] s = {1, 2, 3}").replace(
            "int8[2] z = {0, 0}", "int8[3] z = {0, 0, 0}"
        )
    ).replace("axis = 1", "axis = 0"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_it_leaves_alone(name, becomes):
    becomes(FuseMatmulBias(), ALONE[name], ALONE[name])


def test_the_note_of_the_sum_stays_and_that_of_the_product_is_told(parse, context):
    model = parse(text())
    notes.apply_plan(model, {"y": {"mode": "float", "why": "a"}, "m": {"mode": "float"}})
    after, rows = run(Recipe((FuseMatmulBias(),)), model, context)
    assert (rows[0].changed, rows[0].lost_notes) == (1, ("m",))
    assert notes.plan(after) == {"y": {"mode": "float", "why": "a"}}


RECIPE = (
    "tidy{opset=25},calibrate,assign-bits{weights=%d activations=%s},insert-qdq,round-weights,"
    "quantize-biases,unpack-weights,fuse-matmul-bias"
)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_every_width_runs_as_one_kernel(bits, mode, zoo, fed, kernels):
    source = zoo["attention"]()
    x = np.random.default_rng(0).normal(size=(8, 6, 16)).astype(np.float32)
    model, rows = run(Recipe.parse(RECIPE % (bits, mode)), source, fed(source, x=x))
    assert rows[-1].changed == 3
    found = kernels(model)
    assert found["MatMulIntegerToFloat"] + found["DynamicQuantizeMatMul"] == 6
    assert found["MatMul"] + found["FusedMatMul"] == 2  # scores and mix: two activations
    assert "Cast" not in found
    assert "BiasGelu" not in found
