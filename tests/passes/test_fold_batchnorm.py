import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourfold.compiler import notes
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.fold_batchnorm import FoldBatchnorm

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
STATISTICS = "float[2] gamma = {2, 1}, float[2] beta = {0.5, 1}, float[2] mean = {1, 0}"
VARIANCE = "float[2] variance = {4, 1}"
NORM = "BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, variance)"


def conv(nodes, weights="float[2,1,1,1] w = {3, 1}", shape="float[1,1,2,2] x", outs="y"):
    """Return a model with the statistics above and a Conv weight of one input channel."""
    outputs = ", ".join(f"float[1,2,2,2] {name}" for name in outs)
    head = f"{HEADER} g ({shape}) => ({outputs})"
    return f"{head} <{weights}, {STATISTICS}, {VARIANCE}> {{ {nodes} }}"


def test_the_golden_numbers_of_one_channel(becomes, context):
    model = becomes(
        FoldBatchnorm(),
        f"""{HEADER} g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[1,1,1,1] w = {{3}}, float[1] b = {{0.25}}, float[1] gamma = {{2}},
         float[1] beta = {{0.5}}, float[1] mean = {{1}}, float[1] variance = {{4}}> {{
            c = Conv (x, w, b)
            y = {NORM}
        }}""",
        f"""{HEADER} g (float[1,1,2,2] x) => (float[1,1,2,2] y)
        <float[1,1,1,1] w = {{3}}, float[1] b = {{-0.25}}> {{ y = Conv (x, w, b) }}""",
    )
    assert FoldBatchnorm().run(model, context) == 0
    assert context.remarks == []


def test_a_conv_without_bias_gets_one(becomes):
    becomes(
        FoldBatchnorm(),
        conv(f"c = Conv (x, w) y = {NORM}"),
        f"""{HEADER} g (float[1,1,2,2] x) => (float[1,2,2,2] y)
        <float[2,1,1,1] w = {{3, 1}}, float[2] b = {{-0.5, 1}}> {{ y = Conv (x, w, b) }}""",
    )


def gemm(attributes="", bias=", b", weights="float[2] b = {0.25, 0}"):
    return f"""{HEADER} g (float[3,1] x) => (float[3,2] y)
    <float[1,2] w = {{3, 1}}, {weights}, {STATISTICS}, {VARIANCE}> {{
        c = Gemm {attributes} (x, w{bias})
        y = {NORM}
    }}"""


def test_a_gemm_folds_along_its_columns(becomes):
    becomes(
        FoldBatchnorm(),
        gemm(),
        f"""{HEADER} g (float[3,1] x) => (float[3,2] y)
        <float[1,2] w = {{3, 1}}, float[2] b = {{-0.25, 1}}> {{ y = Gemm (x, w, b) }}""",
    )


REFUSED = {
    "kept: no Conv, ConvTranspose or Gemm before it": f"""{HEADER}
        g (float[1,2,2,2] x) => (float[1,2,2,2] y) <{STATISTICS}, {VARIANCE}> {{
            c = Relu (x)
            y = {NORM}
        }}""",
    "kept: c is also read elsewhere": conv(f"c = Conv (x, w) y = {NORM} z = Neg (c)", outs="yz"),
    "kept: its weights are not constants": conv(
        f"w2 = Neg (w) c = Conv (x, w2) y = {NORM}",
    ),
    "kept: the weight w is shared with another layer": conv(
        f"c = Conv (x, w) y = {NORM} z = Conv (x, w)", outs="yz"
    ),
    "kept: the layer's bias is not a constant": conv(
        f"c = Conv (x, w, b) y = {NORM}", shape="float[1,1,2,2] x, float[2] b"
    ),
    "kept: a variance is not positive": conv(f"c = Conv (x, w) y = {NORM}").replace(
        "variance = {4, 1}", "variance = {4, 0}"
    ),
    "kept: it runs in training mode": conv(
        f"c = Conv (x, w) y, m, v = {NORM.replace('0.0', '0.0, training_mode = 1')}"
    ),
    "kept: grouped ConvTranspose has its channels on two axes": conv(
        f"c = ConvTranspose <group = 2> (x, w) y = {NORM}", shape="float[1,2,2,2] x"
    ),
    "kept: the Gemm scales its operands (alpha, beta) or its bias is no vector": gemm(
        "<alpha = 2.0>"
    ),
}
MATRIX = gemm(weights="float[3,2] b = {1, 2, 3, 4, 5, 6}")
SCALAR = gemm(weights="float[1] b = {1}")
SCALED = gemm("<beta = 0.5>")
AWKWARD = "kept: the Gemm scales its operands (alpha, beta) or its bias is no vector"
CASES = [*REFUSED.items(), (AWKWARD, MATRIX), (AWKWARD, SCALAR), (AWKWARD, SCALED)]


@pytest.mark.parametrize(("reason", "text"), CASES)
def test_what_cannot_be_folded_stays_and_is_told(reason, text, becomes, context):
    becomes(FoldBatchnorm(), text, text)
    assert [(r.subject, r.reason) for r in context.remarks] == [("y", reason)]


def test_a_gemm_without_bias_gets_one(becomes):
    becomes(
        FoldBatchnorm(),
        gemm(bias=""),
        f"""{HEADER} g (float[3,1] x) => (float[3,2] y)
        <float[1,2] w = {{3, 1}}, float[2] b = {{-0.5, 1}}> {{ y = Gemm (x, w, b) }}""",
    )


def test_the_note_of_the_result_stays(context):
    model = ir.from_onnx_text(conv(f"c = Conv (x, w) y = {NORM}"))
    wanted = {"y": {"mode": "static", "format": "uint8 per_tensor", "low": -1.0, "high": 2.0}}
    notes.apply_plan(model, wanted)
    after, rows = run(Recipe((FoldBatchnorm(),)), model, context)
    assert (rows[0].changed, rows[0].lost_notes) == (1, ())
    assert notes.plan(after) == wanted
    assert [node.op_type for node in after.graph] == ["Conv"]


LAYERS = {
    "conv": ("Conv <pads = [1,1,1,1]>", [4, 3, 3, 3], [2, 3, 5, 5]),
    "grouped conv": ("Conv <group = 2>", [4, 2, 3, 3], [2, 4, 5, 5]),
    "depthwise conv": ("Conv <group = 4>", [4, 1, 3, 3], [2, 4, 5, 5]),
    "conv in one dimension": ("Conv", [4, 3, 3], [2, 3, 5]),
    "transposed conv": ("ConvTranspose <strides = [2,2]>", [3, 4, 3, 3], [2, 3, 5, 5]),
    "gemm": ("Gemm", [6, 4], [5, 6]),
    "gemm with a transposed weight": ("Gemm <transB = 1>", [4, 6], [5, 6]),
}


@pytest.mark.parametrize("layer", LAYERS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    epsilon=st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
    biased=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_folding_keeps_the_numbers(layer, seed, epsilon, biased, spread, context, outputs, close):
    op, weight, shape = LAYERS[layer]
    draw = np.random.default_rng(seed)
    text = f"""{HEADER} g (float{shape} x, float{weight} w, float[4] b, float[4] gamma,
        float[4] beta, float[4] mean, float[4] variance) => (float[{",".join("?" * len(shape))}] y)
    {{
        c = {op} (x, w{", b" if biased else ""})
        y = BatchNormalization <epsilon = {epsilon:.6f}> (c, gamma, beta, mean, variance)
    }}"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        array = draw.normal(0, spread, value.shape.numpy())
        if value.name == "variance":
            array = draw.uniform(0.01, 1, 4) * spread
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    x = draw.normal(size=shape).astype(np.float32)
    before = outputs(model, plain=True, x=x)
    after, rows = run(Recipe((FoldBatchnorm(),)), model, context)
    assert rows[0].changed == 1
    assert len(after.graph) == 1
    close(before, outputs(after, plain=True, x=x))
