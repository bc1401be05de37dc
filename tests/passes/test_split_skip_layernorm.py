import numpy as np
import pytest

from fourfold.compiler import notes
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.split_skip_layernorm import SplitSkipLayernorm

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
BEFORE = f"""{HEADER} g (float[n,2,4] x, float[n,2,4] skip) => (float[n,2,4] y)
<float[4] gamma = {{1, 2, 3, 4}}, float[4] beta = {{0, 1, 0, 1}}> {{
    [add] s = Add (x, skip)
    [norm] y = LayerNormalization <axis = -1> (s, gamma, beta)
}}"""
FEEDS = dict(
    zip(
        ("x", "skip"),
        np.random.default_rng(0).normal(size=(2, 3, 2, 4)).astype(np.float32),
        strict=True,
    )
)


def test_the_residual_sum_stays_a_kernel_of_its_own(
    becomes, context, parse, kernels, outputs, close
):
    # The reason for this pass: without it the runtime fuses the two.
    assert kernels(parse(BEFORE)) == {"SkipLayerNormalization": 1}
    after = becomes(SplitSkipLayernorm(), BEFORE, BEFORE.replace("Add", "Sum"))
    assert kernels(after) == {"Sum": 1, "LayerNormalization": 1}
    assert SplitSkipLayernorm().run(after, context) == 0
    close(outputs(parse(BEFORE), plain=True, **FEEDS), outputs(after, **FEEDS))


def test_a_sum_that_is_an_output_or_read_elsewhere_keeps_its_name(becomes):
    text = BEFORE.replace("=> (", "=> (float[n,2,4] s, float[n,2,4] e, ").replace(
        "[norm]", "[other] e = Exp (s) [norm]"
    )
    model = becomes(SplitSkipLayernorm(), text, text.replace("Add", "Sum"))
    assert [v.name for v in model.graph.outputs] == ["s", "e", "y"]


ALONE = {
    "an Add before anything else": BEFORE.replace("LayerNormalization <axis = -1>", "PRelu"
        ).replace("gamma, beta)", "gamma)").replace(", float[4] beta = {0, 1, 0, 1}", ""),
    "a LayerNormalization of something else": BEFORE.replace("Add", "Mul"),
    "a LayerNormalization of an input": BEFORE.replace("(s, gamma", "(x, gamma"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_it_leaves_alone(name, becomes):
    becomes(SplitSkipLayernorm(), ALONE[name], ALONE[name])


def test_one_sum_for_two_normalizations_is_rewritten_once(parse, context):
    text = BEFORE.replace("=> (", "=> (float[n,2,4] z, ").replace(
        "[norm]", "z = LayerNormalization (s, beta) [norm]"
    )
    model = parse(text)
    assert SplitSkipLayernorm().run(model, context) == 1
    assert sorted(n.op_type for n in model.graph) == [
        "LayerNormalization", "LayerNormalization", "Sum",
    ]  # fmt: skip


def test_the_note_of_the_sum_stays(parse, context):
    model = parse(BEFORE)
    notes.apply_plan(model, {"s": {"mode": "float", "why": "Add: its inputs are float"}})
    after, rows = run(Recipe((SplitSkipLayernorm(),)), model, context)
    assert (rows[0].changed, rows[0].lost_notes) == (1, ())
    assert notes.plan(after) == notes.plan(model)
