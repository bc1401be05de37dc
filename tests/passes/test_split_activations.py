import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.compiler import notes
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.formats import Format
from fourfold.compiler.model import load
from fourfold.compiler.quantizers import affine_parameters, dequantize_affine, quantize_affine
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.split_activations import ELEMENTWISE, SplitActivations

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
W = "float[5,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}"
SLICES = (
    "float[2,2] w1 = {1, 2, 3, 4}, float[2,2] w2 = {5, 6, 7, 8}, float[1,2] w3 = {9, 10}, "
    "int64[3] sizes = {2, 2, 1}"
)
CUT = "a, b, c = Split <axis = -1> (x, sizes)"
DRAW = np.random.default_rng(0)
X = DRAW.normal(0, 2, (4, 5)).astype(np.float32)
IMAGE = DRAW.normal(size=(2, 4, 6, 6)).astype(np.float32)


def text(nodes, weights=W, ins="float[n,5] x", outs="float[n,2] y", header=HEADER):
    return f"{header} g ({ins}) => ({outs}) <{weights}> {{ {nodes} }}"


def numbers(count, seed=1):
    return ", ".join(f"{x:.4f}" for x in np.random.default_rng(seed).normal(size=count))


def changed(model, context, **options):
    """Run the pass with the verifier around it; return the model and how many layers were cut."""
    after, rows = run(Recipe((SplitActivations(**options),)), model, context)
    assert "Concat" not in [node.op_type for node in after.graph]
    return after, rows[0].changed


MATMUL = text("h = Gelu (x) y = MatMul (h, w)")
MATMUL_CUT = text(
    f"{CUT} d = Gelu (a) e = Gelu (b) f = Gelu (c) p = MatMul (d, w1) q = MatMul (e, w2) "
    "r = MatMul (f, w3) s = Add (p, q) y = Add (s, r)",
    SLICES,
)


def test_each_chunk_meets_its_rows_of_a_matmul(becomes, context, parse, outputs, close):
    after = becomes(SplitActivations(), MATMUL, MATMUL_CUT)
    close(outputs(parse(MATMUL), plain=True, x=X), outputs(after, x=X))
    assert {str(value.shape) for value in after.graph[0].outputs} == {"[n,2]", "[n,1]"}
    assert SplitActivations(parts=2).run(after, context) == 0
    assert context.remarks == []


def test_the_names_tell_where_they_come_from(context, parse):
    before = MATMUL.replace("y = MatMul", "[layer] y = MatMul").replace("h =", "[act] h =")
    after, count = changed(parse(before), context)
    names = [node.name for node in after.graph]
    assert count == 1
    assert names[0] == "act_split"
    assert names[1:4] == ["act_part_0", "act_part_1", "act_part_2"]
    assert sorted(names[4:]) == [
        *(f"layer_part_{i}" for i in "012"),
        *("layer_sum_1", "layer_sum_2"),
    ]
    assert [v.name for v in after.graph.outputs] == ["y"]
    assert list(after.graph.initializers) == ["x_sizes", *(f"w_slice_{i}" for i in "012")]


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_adds_its_bias_once(transposed, becomes, parse, outputs, close):
    scaled = f"<alpha = 2.0, transB = {transposed}, beta = 0.5>"
    weight, slices = W, SLICES
    if transposed:
        weight = "float[2,5] w = {1, 3, 5, 7, 9, 2, 4, 6, 8, 10}"
        slices = SLICES.replace("{1, 2, 3, 4}", "{1, 3, 2, 4}").replace("{5, 6", "{5, 7")
        slices = slices.replace("7, 7, 8}", "7, 6, 8}").replace("[1,2]", "[2,1]")
    bias = "float[2] k = {100, 200}"
    before = text(f"h = Relu (x) y = Gemm {scaled} (h, w, k)", f"{weight}, {bias}")
    after = becomes(
        SplitActivations(),
        before,
        text(
            f"{CUT} d = Relu (a) e = Relu (b) f = Relu (c) p = Gemm {scaled} (d, w1, k) "
            f"q = Gemm {scaled} (e, w2) r = Gemm {scaled} (f, w3) s = Add (p, q) y = Add (s, r)",
            f"{slices}, {bias}",
        ),
    )
    close(outputs(parse(before), plain=True, x=X), outputs(after, x=X))


def test_a_conv_sums_over_chunks_of_its_channels(becomes, parse, outputs, close):
    how = "<pads = [1,0,1,0], strides = [2,1]>"
    ins, outs = "float[n,4,6,6] x", "float[n,2,4,5] y"
    bias = "float[2] k = {10, 20}"
    weight = f"float[2,4,2,2] w = {{{', '.join(map(str, range(32)))}}}"
    slices = [
        "float[2,2,2,2] w1 = {0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23}",
        "float[2,1,2,2] w2 = {8,9,10,11,24,25,26,27}",
        "float[2,1,2,2] w3 = {12,13,14,15,28,29,30,31}",
        "int64[3] sizes = {2, 1, 1}",
    ]
    before = text(f"h = Sigmoid (x) y = Conv {how} (h, w, k)", f"{weight}, {bias}", ins, outs)
    after = becomes(
        SplitActivations(),
        before,
        text(
            "a, b, c = Split <axis = 1> (x, sizes) d = Sigmoid (a) e = Sigmoid (b) "
            f"f = Sigmoid (c) p = Conv {how} (d, w1, k) q = Conv {how} (e, w2) "
            f"r = Conv {how} (f, w3) s = Add (p, q) y = Add (s, r)",
            ", ".join([*slices, bias]),
            *(ins, outs),
        ),
    )
    close(outputs(parse(before), plain=True, x=IMAGE), outputs(after, x=IMAGE))


CALLS = {
    "Clip": "Clip (x, low, high)",
    "LeakyRelu": "LeakyRelu <alpha = 0.3> (x)",
    "Elu": "Elu <alpha = 2.0> (x)",
    "Celu": "Celu <alpha = 2.0> (x)",
    "Selu": "Selu <alpha = 1.5, gamma = 1.1> (x)",
    "Gelu": 'Gelu <approximate = "tanh"> (x)',
    "HardSigmoid": "HardSigmoid <alpha = 0.3, beta = 0.4> (x)",
    "ThresholdedRelu": "ThresholdedRelu <alpha = 0.7> (x)",
}


@pytest.mark.parametrize("function", ELEMENTWISE)
@pytest.mark.parametrize("layer", ["MatMul (h, w)", "Gemm (h, w)", "Conv (h, v)"])
def test_every_function_keeps_the_numbers(function, layer, context, parse, outputs, close):
    weights = (
        f"float[4,3] w = {{{numbers(12)}}}, float[3,4,2,2] v = {{{numbers(48)}}}, "
        "float low = {-0.5}, float high = {1}"
    )
    image = "Conv" in layer
    model = parse(
        text(
            f"h = {CALLS.get(function, f'{function} (x)')} y = {layer}",
            *(weights, "float[n,4,6,6] x" if image else "float[n,4] x"),
            "float[n,3,5,5] y" if image else "float[n,3] y",
            HEADER.replace("21", "24").replace("10", "13") if function == "Swish" else HEADER,
        )
    )
    x = IMAGE if image else IMAGE.reshape(-1, 4)
    after, count = changed(model, context)
    assert count == 1
    assert [node.op_type for node in after.graph].count(function) == 3
    close(outputs(model, plain=True, x=x), outputs(after, plain=True, x=x))


SLOPES = {
    "along the channels": ("float[4,1,1]", 3),
    "along the channels of a batch": ("float[1,4,1,1]", 3),
    "one for all": ("float[1]", 1),
    "one for all as a scalar": ("float", 1),
    "along the width": ("float[6]", 1),
    "along height and width": ("float[1,6,6]", 1),
}


@pytest.mark.parametrize("name", SLOPES)
def test_a_slope_is_cut_where_it_runs_along(name, context, parse, outputs, close):
    kind, count = SLOPES[name]
    shape = [int(d) for d in kind[6:-1].split(",") if d]
    weights = (
        f"{kind} slope = {{{numbers(int(np.prod(shape)))}}}, float[3,4,1,1] w = {{{numbers(12)}}}"
    )
    nodes = "h = PRelu (x, slope) y = Conv (h, w)"
    model = parse(text(nodes, weights, "float[n,4,6,6] x", "float[n,3,6,6] y"))
    after, cut = changed(model, context)
    assert cut == 1
    slopes = {node.inputs[1].name for node in after.graph if node.op_type == "PRelu"}
    assert len(slopes) == count
    assert ("slope" in after.graph.initializers) == (count == 1)
    close(outputs(model, plain=True, x=IMAGE), outputs(after, x=IMAGE))


def test_a_slope_along_the_last_axis_of_a_matmul(context, parse, outputs, close):
    weights = f"{W}, float[5] slope = {{1, 2, 3, 4, 5}}"
    model = parse(text("h = PRelu (x, slope) y = MatMul (h, w)", weights))
    after, cut = changed(model, context)
    assert cut == 1
    close(outputs(model, plain=True, x=X), outputs(after, x=X))


@pytest.mark.parametrize("layer", ["MatMul (h, v)", "Conv (h, w)"])
@pytest.mark.parametrize("axis", [None, -4, -3, -2, -1, 0, 1, 2, 3])
def test_a_softmax_is_cut_across_its_axis_only(axis, layer, context, parse, outputs, close):
    weights = f"float[3,4,1,1] w = {{{numbers(12)}}}, float[6,6] v = {{{numbers(36)}}}"
    given = "" if axis is None else f"<axis = {axis}>"
    nodes = f"h = Softmax {given} (x) y = {layer}"
    channels = 3 if "Conv" in layer else 4
    model = parse(text(nodes, weights, "float[n,4,6,6] x", f"float[n,{channels},6,6] y"))
    after, cut = changed(model, context)
    along = 3 if axis is None else axis % 4
    assert cut == (along != (1 if "Conv" in layer else 3))
    close(outputs(model, plain=True, x=IMAGE), outputs(after, x=IMAGE))
    if not cut:
        reason = "kept whole: its Softmax runs along the channels"
        assert [(r.subject, r.reason) for r in context.remarks] == [("h", reason)]


@pytest.mark.parametrize("product", ["Mul (x, s)", "Mul (s, x)"])
def test_silu_in_two_nodes_is_one_function(product, becomes, parse, outputs, close):
    before = text(f"s = Sigmoid (x) h = {product} y = MatMul (h, w)")
    functions = " ".join(
        f"s{v} = Sigmoid ({v}) h{v} = {product.replace('x', v).replace('s', f's{v}')}"
        for v in "abc"
    )
    after = becomes(
        SplitActivations(),
        before,
        text(
            f"{CUT} {functions} p = MatMul (ha, w1) q = MatMul (hb, w2) r = MatMul (hc, w3) "
            "t = Add (p, q) y = Add (t, r)",
            SLICES,
        ),
    )
    close(outputs(parse(before), plain=True, x=X), outputs(after, x=X))
    assert "Sigmoid" in [node.op_type for node in after.graph]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.integers(2, 16), more=st.integers(0, 30), seed=st.integers(0, 99))
def test_chunks_are_those_of_array_split(parts, more, seed, context, parse, outputs, close):
    channels = parts + more
    weights = f"float[{channels},2] w = {{{numbers(2 * channels, seed)}}}"
    model = parse(text("h = Tanh (x) y = MatMul (h, w)", weights, f"float[n,{channels}] x"))
    after, count = changed(model, context, parts=parts)
    assert count == 1
    (split,) = [node for node in after.graph if node.op_type == "Split"]
    (source,) = [v for v in model.graph.initializers.values() if v.name == "w"]
    wanted = np.array_split(source.const_value.numpy(), parts)
    assert split.inputs[1].const_value.numpy().tolist() == [len(piece) for piece in wanted]
    layers = [node for node in after.graph if node.op_type == "MatMul"]
    for layer, piece in zip(layers, wanted, strict=True):
        np.testing.assert_array_equal(layer.inputs[1].const_value.numpy(), piece)
    x = np.random.default_rng(seed).normal(size=(3, channels)).astype(np.float32)
    close(outputs(model, plain=True, x=x), outputs(after, x=x))


OUT = "float[n,2] y"
TWO = f"{OUT}, float[n,2] z"
TALL = f"float[2,5,2] t = {{{numbers(20)}}}"
SQUARE = f"float[5,5] w = {{{numbers(25)}}}"
CONV = {"ins": "float[n,4,6,6] x", "outs": "float[n,4,6,6] y"}
KEPT = {
    "it is an output": text("h = Relu (x) y = MatMul (h, w)", outs="float[n,2] y, float[n,5] h"),
    "Exp reads it, and is no Conv, Gemm or MatMul with a constant weight": text(
        "h = Relu (x) y = MatMul (h, w) z = Exp (h)", outs="float[n,2] y, float[n,5] z"
    ),
    "Gemm reads it, and is no Conv, Gemm or MatMul with a constant weight": text(
        "h = Relu (x) y = Gemm (h, w, h)",
        SQUARE,
        outs="float[n,5] y",
    ),
    "ConvTranspose reads it, and is no Conv, Gemm or MatMul with a constant weight": text(
        "h = Relu (x) y = ConvTranspose (h, w)", f"float[4,4,1,1] w = {{{numbers(16)}}}", **CONV
    ),
    "the weight t of its MatMul has more than two axes": text(
        "h = Relu (x) y = MatMul (h, t)", TALL, outs="float[2,n,2] y"
    ),
    "its Gemm transposes it": text(
        "h = Relu (x) y = Gemm <transA = 1> (h, w)", ins="float[5,n] x"
    ),
    "its Conv is grouped: no output channel sums over the channels of all chunks": text(
        "h = Relu (x) y = Conv <group = 4> (h, w)", f"float[4,1,1,1] w = {{{numbers(4)}}}", **CONV
    ),
    "its readers sum over different axes": text(
        "h = Relu (x) y = Conv (h, v) z = MatMul (h, u)",
        f"float[4,4,1,1] v = {{{numbers(16)}}}, float[6,6] u = {{{numbers(36)}}}",
        CONV["ins"],
        "float[n,4,6,6] y, float[n,4,6,6] z",
    ),
    "2 channels make no 3 chunks": text(
        "h = Relu (x) y = MatMul (h, w)", "float[2,2] w = {1, 2, 3, 4}", "float[n,2] x"
    ),
    "the slope of its PRelu is computed": text(
        "h = PRelu (x, s) y = MatMul (h, w)", ins="float[n,5] x, float[5] s"
    ),
    "a part of the function is read elsewhere": text(
        "s = Sigmoid (x) h = Mul (x, s) y = MatMul (h, w) z = Exp (s)", outs=f"{OUT}, float[n,5] z"
    ),
    "an If or Loop reads it": text(
        "h = Relu (x) y = MatMul (h, w) z = If (c) <then_branch = t () => (o) "
        "{ o = MatMul (h, w) }, else_branch = e () => (p) { p = MatMul (x, w) }>",
        ins="float[n,5] x, bool c",
        outs=TWO,
    ),
}
SIGMOID_OUT = text("s = Sigmoid (x) h = Mul (x, s) y = MatMul (h, w)", outs=f"{OUT}, float[n,5] s")
# What comes out of a Reshape to a computed shape has no known rank.
UNKNOWN = text(
    "e = Reshape (x, f) h = CALL (e) y = Conv (h, w)",
    f"float[4,4,1,1] w = {{{numbers(16)}}}, float[4,1,1] v = {{1, 2, 3, 4}}",
    "float[n,5] x, int64[r] f",
    "float[a,b,c,d] y",
)
CASES = [
    *KEPT.items(),
    ("a part of the function is read elsewhere", SIGMOID_OUT),
    ("its Softmax meets a shape that is not known", UNKNOWN.replace("CALL", "Softmax")),
    ("its PRelu meets a shape that is not known", UNKNOWN.replace("CALL (e)", "PRelu (e, v)")),
]


@pytest.mark.parametrize(("reason", "before"), CASES)
def test_what_cannot_be_cut_stays_and_is_told(reason, before, becomes, context):
    becomes(SplitActivations(), before, before)
    assert [r.reason for r in context.remarks] == [f"kept whole: {reason}"]
    assert context.remarks[0].subject == "h"


SILENT = {
    "a function that no layer reads": text("h = Relu (x) y = Exp (h)", "", outs="float[n,5] y"),
    "a weight that is computed": text("v = Neg (w) h = Relu (x) y = MatMul (h, v)"),
    "a weight that is an input": text(
        "h = Relu (x) y = MatMul (h, w)", "float e = {1}", "float[n,5] x, float[5,2] w"
    ),
    "a weight on the left": text(
        "h = Relu (x) y = MatMul (w, h)", W.replace("5,2", "2,5"), "float[5,n] x", "float[2,n] y"
    ),
    "a function that is a bias": text(
        "h = Relu (x) y = Gemm (x, w, h)", f"float[5,5] w = {{{numbers(25)}}}", outs="float[n,5] y"
    ),
    "no function": text("h = Add (x, x) y = MatMul (h, w)"),
    "a function of another domain": text("h = com.microsoft.Gelu (x) y = MatMul (h, w)").replace(
        "21]", '21, "com.microsoft" : 1]'
    ),
    "the sigmoid of something else": text(
        "e = Neg (x) s = Sigmoid (e) h = Mul (x, s) y = MatMul (h, w)"
    ),
    "a function behind a Split": text(
        "a, b = Split <axis = 0, num_outputs = 2> (x) h = Relu (a) y = MatMul (h, w)",
        ins="float[4,5] x",
        outs="float[2,2] y",
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_is_none_of_its_business(name, becomes, context):
    becomes(SplitActivations(), SILENT[name], SILENT[name])
    assert context.remarks == []


def test_two_readers_share_the_chunks(context, parse, outputs, close):
    nodes = "h = Gelu (x) y = MatMul (h, w) z = Gemm <transB = 1> (h, v)"
    weights = f"{W}, float[2,5] v = {{{numbers(10)}}}"
    model = parse(text(nodes, weights, outs=TWO))
    after, count = changed(model, context)
    assert count == 2
    kinds = [node.op_type for node in after.graph]
    assert [kinds.count(op) for op in ("Split", "Gelu", "MatMul", "Gemm", "Add")] == [
        1,
        3,
        3,
        3,
        4,
    ]
    close(outputs(model, plain=True, x=X), outputs(after, x=X))


def test_a_shared_weight_is_sliced_once_and_stays_for_its_other_readers(
    context, parse, outputs, close
):
    nodes = "h = Gelu (x) k = Relu (x) y = MatMul (h, w) z = MatMul (k, w)"
    outs = "float[n,2] y, float[n,2] z"
    model = parse(text(nodes, outs=outs))
    after, count = changed(model, context)
    assert count == 2
    assert list(after.graph.initializers) == ["x_sizes", *(f"w_slice_{i}" for i in "012")]
    close(outputs(model, plain=True, x=X), outputs(after, x=X))
    model = parse(text(f"{nodes} v = MatMul (x, w)", outs=f"{outs}, float[n,2] v"))
    after, count = changed(model, context)
    assert count == 2
    assert "w" in after.graph.initializers
    close(outputs(model, plain=True, x=X), outputs(after, x=X))


def test_a_weight_that_is_an_output_stays(context, parse):
    model = parse(MATMUL)
    model.graph.outputs.append(model.graph.initializers["w"])
    after, count = changed(model, context)
    assert count == 1
    assert [v.name for v in after.graph.outputs] == ["y", "w"]


def test_one_weight_along_both_axes(context, parse, outputs, close):
    nodes = "h = Gelu (x) y = Gemm (h, w) z = Gemm <transB = 1> (h, w)"
    model = parse(text(nodes, SQUARE, outs="float[n,5] y, float[n,5] z"))
    after, count = changed(model, context)
    assert count == 2
    close(outputs(model, plain=True, x=X), outputs(after, x=X))


def test_operands_of_the_function_that_are_computed_or_absent(context, parse, outputs, close):
    nodes = "m = ReduceMax <keepdims = 0> (x) h = Clip (x, , m) y = MatMul (h, w)"
    model = parse(text(nodes))
    after, count = changed(model, context)
    assert count == 1
    close(outputs(model, plain=True, x=X), outputs(after, x=X))


def test_the_result_is_read_on_under_its_name(context, parse, outputs, close):
    nodes = "h = Gelu (x) y = MatMul (h, w) k = Relu (y) z = MatMul (k, v) u = Exp (y)"
    weights = f"{W}, float[2,3] v = {{{numbers(6)}}}"
    model = parse(text(nodes, weights, outs="float[n,2] y, float[n,3] z, float[n,2] u"))
    after, count = changed(model, context, parts=2)
    assert count == 2
    close(outputs(model, plain=True, x=X), outputs(after, x=X))
    # The slices, nodes and values of one layer must not take the names of another.
    assert changed(after, context, parts=2)[1] == 0


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "double"])
def test_weights_keep_their_type(kind, context, parse):
    before = MATMUL.replace("float", kind)
    after, count = changed(parse(before), context)
    assert count == 1
    (source,) = parse(before).graph.initializers.values()
    slices = [v for name, v in after.graph.initializers.items() if name.startswith("w_")]
    assert {value.dtype for value in slices} == {source.dtype}
    joined = np.concatenate([value.const_value.numpy() for value in slices])
    np.testing.assert_array_equal(joined, source.const_value.numpy())
    assert {value.dtype for value in after.graph[0].outputs} == {source.dtype}


@pytest.mark.parametrize("name", "xhyw")
def test_a_planned_model_is_refused(name, parse, context):
    model = parse(MATMUL)
    notes.apply_plan(model, {name: {"low": -1.0, "high": 1.0}})
    with pytest.raises(RecipeError, match=f"{name} is planned already.*before calibrate"):
        changed(model, context)


def test_an_opset_whose_split_has_an_attribute_is_refused(parse, context):
    header = HEADER.replace("21", "12").replace("10", "7")
    model = parse(text("h = Relu (x) y = MatMul (h, w)", header=header))
    with pytest.raises(RecipeError, match="opset 13 on, and the model has 12; put tidy before"):
        changed(model, context)
    assert changed(parse(text("y = MatMul (x, w)", header=header)), context)[1] == 0


def decibels(signal, got):
    signal = np.float64(signal)
    return 10 * np.log10(np.square(signal).sum() / np.square(signal - got).sum())


def grouped():
    """Return a layer whose three groups of channels matter alike and differ in magnitude."""
    draw = np.random.default_rng(3)
    magnitude = np.repeat([0.1, 3, 100], 16)
    x = (np.abs(draw.normal(1, 1, (256, 48))) * magnitude).astype(np.float32)
    w = (draw.normal(size=(48, 24)) / magnitude[:, None]).astype(np.float32)
    model = ir.from_onnx_text(
        text(
            "h = Relu (x) y = MatMul (h, w)", "", "float[n,48] x, float[48,24] w", "float[n,24] y"
        )
    )
    (_, value) = model.graph.inputs
    value.const_value = ir.tensor(w, name="w")
    model.graph.inputs.remove(value)
    model.graph.register_initializer(value)
    return model, x, w


def rounded(values):
    """Return values as eight bits with one scale keep them."""
    scale, zero = affine_parameters(values.min(), values.max(), Format("uint8"))
    return dequantize_affine(quantize_affine(values, scale, zero, Format("uint8")), scale, zero)


def test_a_scale_for_each_chunk_is_what_it_is_for():
    _, x, w = grouped()
    exact = np.float64(x) @ w
    cuts = [16, 32]
    one = decibels(exact, rounded(x) @ w)
    own = decibels(exact, np.concatenate([rounded(p) for p in np.split(x, cuts, 1)], 1) @ w)
    assert one < 15
    assert own > 40


@pytest.mark.parametrize("ranges", ["static", "dynamic"])
def test_the_compiled_layer_is_nearer_to_float(ranges, context, parse, outputs):
    model, x, _ = grouped()
    feeds = Feeds.read({"x": x[:128]}, input_specs(model))
    around = replace(context, feeds=feeds)
    rest = f'calibrate,assign-bits{{activations="{ranges}"}},insert-qdq,round-weights'
    held = {"x": x[128:]}
    exact = outputs(model, **held)["y"]
    found = []
    for first in ("widen-floats,tidy", "widen-floats,tidy,split-activations"):
        after, _ = run(Recipe.parse(f"{first},{rest}"), model, around)
        found.append(decibels(exact, outputs(after, **held)["y"]))
    assert found[0] < 15
    assert found[1] > 35


ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))


def opened(name):
    """Return the inputs of a real task's held-out samples and its float model."""
    spec = importlib.util.spec_from_file_location("fourfold_test_tasks_split", DATA / "tasks.py")
    tasks = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tasks  # dataclasses look their module up
    spec.loader.exec_module(tasks)
    task = tasks.TASKS[name]
    arrays, _ = task.feeds(DATA, "eval")
    return {key: array[:8] for key, array in arrays.items()}, load(tasks.model_path(task, DATA))


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "tasks.py").is_file(),
    reason=f"no tasks.py in {DATA}; set FOURFOLD_DATA to the folder with trained models",
)
@pytest.mark.parametrize(
    ("name", "layers"), [("minilm-sts", 6), ("cifar-resnet20", 9), ("kwt", 0)]
)
def test_real_models_keep_their_answers(name, layers, context, outputs, close):
    feeds, model = opened(name)
    recipe = Recipe.parse("widen-floats,tidy,fold-batchnorm,split-activations,split-activations")
    after, rows = run(recipe, model, context)
    assert [row.changed for row in rows[-2:]] == [layers, 0]
    close(outputs(model, **feeds), outputs(after, **feeds))
