import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.tunables import Codes, Fit, Tunables, is_rounded

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def parsed(text):
    model = ir.from_onnx_text(f"{HEADER} {text}")
    ShapeInferencePass()(model)
    return model


CONV = """g (float[n,2,4,4] x) => (float[n,2,4,4] y)
<float xs = {0.1}, uint8 z = {3}, int8[2,2,1,1] c = {1,2,3,4}, float[2] ws = {1,2},
 int8[2] wz = {0,0}, float[2] b = {1,2}> {
    q = QuantizeLinear (x, xs, z)
    d = DequantizeLinear (q, xs, z)
    w = DequantizeLinear <axis = 0> (c, ws, wz)
    y = Conv (d, w, b)
}"""


def test_a_conv_gives_its_bias_its_scales_and_what_limits_them():
    found = Tunables.of(parsed(CONV))
    assert found.biases == {"b": ("y", 1)}
    assert found.scales == ("ws",)
    assert found.ranges == ("xs",)
    assert found.fits == (Fit("b", "xs", "ws"),)
    assert found.names == ("b", "ws", "xs")


def test_groups_can_be_left_out():
    model = parsed(CONV)
    assert Tunables.of(model, biases=False).names == ("ws", "xs")
    assert Tunables.of(model, scales=False).names == ("b", "xs")
    assert Tunables.of(model, ranges=False).names == ("b", "ws")
    assert Tunables.of(model, biases=False).fits == (Fit("b", "xs", "ws"),)


def test_a_vector_behind_a_matmul_is_a_bias_wherever_it_stands():
    text = """g (float[n,3] x) => (float[n,2] y, float[n,2] u, float[n,2] v)
    <float[3,2] w = {1,2,3,4,5,6}, float[2] a = {1,2}, float[1,2] b = {1,2}, float[1] c = {1},
     float[2] d = {1,2}> {
        m = MatMul (x, w)
        y = Add (a, m)
        u = Add (m, b)
        e = Add (m, c)
        r = Relu (e)
        v = Add (r, d)
    }"""
    expected = {"a": ("y", -1), "b": ("u", -1), "c": ("e", -1)}
    assert Tunables.of(parsed(text)).biases == expected


def test_a_quantizer_between_product_and_bias_does_not_hide_it():
    text = """g (float[n,3] x) => (float[n,2] y)
    <float[3,2] w = {1,2,3,4,5,6}, float[2] b = {1,2}, float s = {1}, uint8 z = {0}> {
        m = MatMul (x, w)
        q = QuantizeLinear (m, s, z)
        d = DequantizeLinear (q, s, z)
        y = Add (d, b)
    }"""
    found = Tunables.of(parsed(text))
    assert found.biases == {"b": ("y", -1)}
    assert found.ranges == ("s",)
    assert found.fits == ()


def test_scales_that_others_dictate_or_see_stay():
    text = """g (float[n,3] x, float given) => (float[n,2] y, float out, float[n,3] v)
    <float s = {1}, float out = {1}, int8[3,2] c = {1,2,3,4,5,6}, int32[2] k = {1,2},
     float bs = {1}, float both = {1}, uint8 z = {0}> {
        w = DequantizeLinear (c, both)
        b = DequantizeLinear (k, bs)
        h = DequantizeLinear (c, out)
        q = QuantizeLinear (x, both, z)
        d = DequantizeLinear (q, both, z)
        p = QuantizeLinear (x, given, z)
        v = DequantizeLinear (p, given, z)
        y = Gemm (d, w, b)
    }"""
    found = Tunables.of(parsed(text))
    assert found.names == ()
    assert found.fits == ()


def test_a_shared_scale_is_named_once():
    text = """g (float[n,2] x) => (float[n,2] y)
    <float s = {1}, uint8 z = {0}, int8[2,2] c = {1,2,3,4}, float[2] t = {1,2}> {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        w = DequantizeLinear (c, t)
        u = DequantizeLinear <axis = 0> (c, t)
        m = MatMul (d, w)
        k = QuantizeLinear (m, s, z)
        e = DequantizeLinear (k, s, z)
        y = MatMul (e, u)
    }"""
    found = Tunables.of(parsed(text))
    assert found.scales == ("t",)
    assert found.ranges == ("s",)


def test_what_counts_as_rounded():
    assert is_rounded(parsed(CONV))
    plain = "g (float[n,2] x) => (float[n,2] y) { y = Relu (x) }"
    assert not is_rounded(parsed(plain))
    fed = "g (uint8[n,2] x, float s) => (float[n,2] y) { y = DequantizeLinear (x, s) }"
    assert not is_rounded(parsed(fed))
    dynamic = "g (float[n,2] x) => (uint8[n,2] y) { y, s, z = DynamicQuantizeLinear (x) }"
    assert is_rounded(parsed(dynamic))


def test_free_codes_are_named_with_their_limits_and_the_weight_that_they_were():
    text = """g (float[n,2] x) => (float[n,2] y)
    <int4[2,2] w_quantized = {1,2,3,-4}, float[2] s = {1,2}, int4[2,2] t = {1,2,3,4},
     uint4[2,2] u_quantized = {1,2,3,4}, uint4[2] z = {1,2}> {
        w = DequantizeLinear <axis = 1> (w_quantized, s)
        v = DequantizeLinear <axis = 1> (t, s)
        u = DequantizeLinear <axis = 1> (u_quantized, s, z)
        a = MatMul (x, w)
        b = MatMul (a, v)
        y = MatMul (b, u)
    }"""
    model = parsed(text)
    plan = {
        "w_quantized": {"format": "int4 per_axis(1)", "mode": "static"},
        "t": {"format": "int4 per_axis(1)", "mode": "static", "split": "a table"},
        "u_quantized": {"format": "uint4 per_axis(1)", "mode": "static"},
    }
    notes.apply_plan(model, plan)
    found = Tunables.of(model)
    assert found.codes == {
        "w_quantized": Codes((-8, 7), "w", (2, 2)),
        "u_quantized": Codes((0, 15), "u", (2, 2)),
    }
    assert found.names == ("s", "w_quantized", "u_quantized")
    assert found.without_codes().names == ("s",)
    assert Tunables.of(model, codes=False).codes == {}
    floats = (
        "g (float[n,2] x) => (float[n,2] y) <float[2,2] u = {1,2,3,4}, float[4] w = {1,2,3,4}>"
    )
    floats = parsed(f"{floats} {{ v = MatMul (x, u) y = Add (v, w) }}")
    assert set(found.known_to(floats).codes) == {"u_quantized"}  # w is of another shape
