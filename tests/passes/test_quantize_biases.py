import numpy as np
import pytest

from fourfold.passes.quantize_biases import QuantizeBiases

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
OPERAND = "q = QuantizeLinear (x, xs, xz) d = DequantizeLinear (q, xs, xz)"
SCALES = "float xs = {0.5}, uint8 xz = {128}"


def conv(bias, more="", body="[one] y = Conv (d, e, b)", out="float[n,2,3] y"):
    """Return a Conv whose operand has a scale of 0.5, and its channels 0.25 and 2."""
    return f"""{HEADER} g (float[n,1,3] x) => ({out})
    <{SCALES}, int8[2,1,1] w = {{1, 2}}, float[2] ws = {{0.25, 2}}{bias}> {{
        {OPERAND}
        e = DequantizeLinear <axis = 0> (w, ws)
        {more}
        {body}
    }}"""


def test_a_bias_becomes_codes_of_the_product_of_the_scales(becomes, context):
    model = becomes(
        QuantizeBiases(),
        conv(", float[2] b = {1.05, -7.4}"),
        conv(
            ", int32[2] c = {8, -7}, float[2] s = {0.125, 1}, int32[2] z = {0, 0}",
            "b = DequantizeLinear <axis = 0> (c, s, z)",
        ),
    )
    before = str(model.graph)
    assert QuantizeBiases().run(model, context) == 0
    assert str(model.graph) == before


def gemm(weight, scale, bias, axis=1, attributes="<axis = 1>", shape="2,3"):
    """Return a Gemm with a weight in codes, and its context."""
    return f"""{HEADER} g (float[4,2] x) => (float[4,3] y)
    <{SCALES}, int8[{shape}] w = {{{weight}}}, float{scale}, float{bias}> {{
        {OPERAND}
        e = DequantizeLinear {attributes} (w, ws)
        [one] y = Gemm (d, e, b)
    }}"""


@pytest.mark.parametrize(
    ("scale", "bias", "product"),
    [
        ("[3] ws = {0.25, 2, 1}", "[3] b = {3, -4.2, 5}", [0.125, 1, 0.5]),
        ("[3] ws = {0.25, 2, 1}", "[1,3] b = {3, -4.2, 5}", [0.125, 1, 0.5]),
        ("[3] ws = {0.25, 2, 1}", " b = {3}", [0.125, 1, 0.5]),
        (" ws = {0.25}", "[3] b = {3, -4.2, 5}", 0.125),
    ],
)
def test_biases_keep_their_value_to_half_a_step(scale, bias, product, parse, outputs, context):
    text = gemm("1, 2, 3, 4, 5, 6", scale, bias)
    model = parse(text)
    assert QuantizeBiases().run(model, context) == 1
    made = next(n for n in model.graph if n.name == "one").inputs[2].producer()
    codes, found, zero = (v.const_value.numpy() for v in made.inputs)
    assert (codes.dtype, zero.dtype, zero.any()) == (np.int32, np.int32, False)
    assert found.tolist() == product
    assert "b" not in model.graph.initializers
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    before, after = (outputs(one, plain=True, x=x)["y"] for one in (parse(text), model))
    assert np.all(np.abs(before - after) <= np.array(product) * 0.5001)


def test_a_matrix_of_biases_stays_float(parse, context):
    numbers = ", ".join(map(str, range(12)))
    for bias in (f"[4,3] b = {{{numbers}}}", "[4,1] b = {1, 2, 3, 4}"):
        model = parse(gemm("1, 2, 3, 4, 5, 6", "[3] ws = {0.25, 2, 1}", bias))
        before = str(model.graph)
        assert QuantizeBiases().run(model, context) == 0
        assert str(model.graph) == before


def test_a_bias_behind_a_weight_in_blocks_stays_float(parse, context):
    """Scales of blocks are no scales of output channels."""
    attributes = "<axis = 0, block_size = 1>"
    scale = "[2,3] ws = {0.25, 2, 1, 0.5, 1, 2}"
    model = parse(gemm("1, 2, 3, 4, 5, 6", scale, "[3] b = {1, 2, 3}", attributes=attributes))
    assert QuantizeBiases().run(model, context) == 0
    assert "b" in model.graph.initializers


def test_a_bias_behind_scales_of_inputs_stays_float(parse, context):
    scale = "[2] ws = {0.25, 2}"
    model = parse(gemm("1, 2, 3, 4, 5, 6", scale, "[3] b = {1, 2, 3}", attributes="<axis = 0>"))
    assert QuantizeBiases().run(model, context) == 0
    assert "b" in model.graph.initializers


@pytest.mark.parametrize(
    "body",
    [
        "[one] y = Conv (x, e, b)",  # a float operand
        "f = Cast <to = 1> (w) [one] y = Conv (d, f, b)",  # a float weight
        "[one] y = Conv (d, e)",  # no bias
        "r = Neg (b) [one] y = Conv (d, e, r)",  # a bias that is no constant
        "v, vs, vz = DynamicQuantizeLinear (x) u = DequantizeLinear (v, vs, vz) "
        "[one] y = Conv (u, e, b)",  # a scale that is made at run time
    ],
)
def test_biases_of_other_layers_stay_float(body, parse, context):
    model = parse(conv(", float[2] b = {1, 2}", body=body))
    before = str(model.graph)
    assert QuantizeBiases().run(model, context) == 0
    assert str(model.graph) == before


def test_every_reader_of_a_shared_bias_gets_codes_of_its_own(parse, outputs, context):
    text = f"""{HEADER} g (float[n,1,3] x) => (float[n,2,3] y)
    <{SCALES}, int8[2,1,1] w = {{1, 2}}, float[2] ws = {{0.25, 2}}, float[2] b = {{1, 2}},
     int8[2,1,1] v = {{3, 4}}, float[2] vs = {{1, 4}}> {{
        {OPERAND}
        e = DequantizeLinear <axis = 0> (w, ws)
        f = DequantizeLinear <axis = 0> (v, vs)
        [one] a = Conv (d, e, b)
        [two] c = Conv (d, f, b)
        [three] k = Conv (x, e, b)
        y = Sum (a, c, k)
    }}"""
    model = parse(text)
    assert QuantizeBiases().run(model, context) == 2
    nodes = {n.name: n for n in model.graph}
    scales = [nodes[n].inputs[2].producer().inputs[1].const_value.numpy() for n in ("one", "two")]
    assert [scale.tolist() for scale in scales] == [[0.125, 1], [0.5, 2]]
    assert nodes["three"].inputs[2].name == "b"  # a float layer keeps its own
    x = np.random.default_rng(0).normal(size=(2, 1, 3)).astype(np.float32)
    before, after = (outputs(one, plain=True, x=x)["y"] for one in (parse(text), model))
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_a_bias_that_is_an_output_stays_one(parse, outputs, context):
    model = parse(conv(", float[2] b = {1, 2}", out="float[n,2,3] y, float[2] b"))
    assert QuantizeBiases().run(model, context) == 1
    assert outputs(model, x=np.ones((1, 1, 3), np.float32))["b"].tolist() == [1, 2]
