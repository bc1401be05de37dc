"""One width for all, plans that are obeyed, and the notes that come of them."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.capability import Capability, Legality
from fourfold.compiler.choices import Choice, legal_choices
from fourfold.compiler.contract import Decision
from fourfold.compiler.costs import Cost
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import Format, PerAxis
from fourfold.compiler.graph import readers_of, values, weights_of
from fourfold.compiler.picks import Pick, obeyed, stored, told, uniform, write
from fourfold.targets.cpu import Cpu

CPU = Cpu(isa="vnni").capability
TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (int64[n] ids, float[n,2] x) => (float[n,2] y)
<float[3,2] table = {1,2,3,4,5,6}, float[2,2] w = {1,2,3,4}, float[2,2] v = {1,2,3,4}> {
    [look_up] e = Gather (table, ids)
    [first] a = MatMul (e, w)
    [join] b = Add (a, x)
    [second] c = Gemm <transB = 1> (b, v)
    [third] y = MatMul (c, v)
}"""


@pytest.fixture
def model():
    """A table, a weight w of one reader, and v that two readers see along two axes."""
    parsed = ir.from_onnx_text(TEXT)
    ShapeInferencePass()(parsed)
    return parsed


def of(model, bits=8, activations="auto", kept=(), capability=CPU):
    """Return weight -> (choice, reason) of one width for all."""
    picks = uniform(model, capability, bits, activations, frozenset(kept))
    return {name: (str(pick.choice), pick.why) for name, pick in picks.items()}


def planned(model, **fields):
    """Write a plan's notes: value name -> fields."""
    notes.apply_plan(model, {"table": {"mode": "float"}, "v": {"mode": "float"}, **fields})
    return model


ALIKE = "read along two different axes, so one scale serves the whole tensor"


# One width for all


@pytest.mark.parametrize("activations", ["auto", "static", "dynamic"])
def test_integer_kernels(model, activations):
    assert of(model, 8, activations) == {
        "table": ("int8 per_axis(0) x float", "embedding: one scale a row"),
        "w": ("int8 per_axis(1) x uint8", "finest legal form of MatMul"),
        "v": ("int8 per_tensor x uint8", ALIKE),
    }


def test_weights_only(model):
    assert of(model, 4, "float") == {
        "table": ("int4 per_axis(0) x float", "embedding: one scale a row"),
        "w": ("int4 per_axis(1) x float", "weights only: activations stay float"),
        "v": ("int4 per_tensor x float", ALIKE),
    }


@pytest.mark.parametrize(
    ("bits", "vnni", "avx2"),
    [
        (8, "int8", "int8:7"),
        (7, "int8:7", "int8:7"),
        (6, "int8:6", "int8:6"),
        (5, "int8:5", "int8:5"),
        (4, "int4", "int4"),
        (3, "int4:3", "int4:3"),
        (2, "int2", "int2"),
    ],
)
@pytest.mark.parametrize("activations", ["auto", "float"])
def test_a_width_gets_its_container(model, bits, vnni, avx2, activations):
    other = "float" if activations == "float" else "uint8"
    assert of(model, bits, activations)["w"][0] == f"{vnni} per_axis(1) x {other}"
    narrow = Cpu(isa="avx2").capability
    assert of(model, bits, activations, (), narrow)["w"][0] == f"{avx2} per_axis(1) x {other}"


def test_kept_nodes(model):
    found = of(model, kept=("first", "look_up", "second"))
    assert found["w"] == ("float", "MatMul: kept as asked")
    assert found["table"] == ("float", "Gather: kept as asked")
    assert found["v"][0] == "int8 per_tensor x uint8"  # its other reader is not kept
    assert of(model, kept=("second", "third"))["v"] == ("float", "Gemm: kept as asked")


def test_a_width_that_a_target_has_not():
    parsed = ir.from_onnx_text(TEXT)
    rows = (Legality("MatMul", ("int8",), granularity=("per_axis",)),)
    widened = (Legality("Gather", ("int8",), ("float",), ("per_axis",)),)
    chip = Capability("chip", (21, 21), rows, widened)
    assert set(of(parsed, 8, capability=chip)) == {"table", "w"}  # v has no form for two axes
    assert of(parsed, 4, capability=chip) == {}
    no = ("float", "no legal weight-only form")
    table = ("int8 per_axis(0) x float", "embedding: one scale a row")
    assert of(parsed, 8, "float", capability=chip) == {"table": table, "w": no, "v": no}


def test_every_pick_is_legal(zoo):
    for make in zoo.values():
        model = make()
        for bits in (8, 4, 2):
            for activations in ("auto", "float"):
                picks = uniform(model, CPU, bits, activations, frozenset())
                assert list(picks) == [str(value.name) for value in weights_of(model)]
                for value in weights_of(model):
                    legal = legal_choices(readers_of(value), CPU)
                    assert picks[str(value.name)].choice in legal


@pytest.mark.parametrize(
    ("bits", "form"),
    [(8, "int8"), (6, "int8:6"), (4, "uint4"), (3, "uint4:3"), (2, "uint2")],
)
@pytest.mark.parametrize("activations", ["auto", "float"])
def test_zero_points_where_they_are_asked_for(model, bits, form, activations):
    """Eight bits have none, and an embedding has none."""
    picks = uniform(model, CPU, bits, activations, frozenset(), affine=True)
    other = "float" if activations == "float" else "uint8"
    assert str(picks["w"].choice) == f"{form} per_axis(1) x {other}"
    assert str(picks["v"].choice) == f"{form} per_tensor x {other}"
    assert str(picks["table"].choice) == f"{form.removeprefix('u')} per_axis(0) x float"


BLOCKS = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,64] x, float[64,4] w, float[4,64] v, float[4,64] u) => (y) {
    [first] a = MatMul (x, w) [second] b = MatMul (a, v) [third] y = Gemm <transB = 1> (b, u)
}"""


@pytest.fixture
def blocks():
    """MatMuls of 64 and of 4 inner elements, and a Gemm, whose kernel has no blocks."""
    parsed = ir.from_onnx_text(BLOCKS)
    for value in list(parsed.graph.inputs)[1:]:
        value.const_value = ir.tensor(np.ones(value.shape.numpy(), np.float32), name=value.name)
        parsed.graph.inputs.remove(value)
        parsed.graph.register_initializer(value)
    return parsed


@pytest.mark.parametrize(
    ("block", "affine", "form"),
    [
        (32, False, "int4 per_block(0,32)"),
        (32, True, "uint4 per_block(0,32)"),
        (64, False, "int4 per_axis(1)"),  # no kernel of that size
        (128, False, "int4 per_axis(1)"),  # the axis is shorter
        (0, False, "int4 per_axis(1)"),
        (0, True, "uint4 per_axis(1)"),
    ],
)
def test_scales_for_blocks_where_they_are_legal(blocks, block, affine, form):
    picks = uniform(blocks, CPU, 4, "float", frozenset(), affine, block)
    sign = "u" if affine else ""
    assert {name: str(pick.choice) for name, pick in picks.items()} == {
        "w": f"{form} x float",
        "v": f"{sign}int4 per_axis(1) x float",
        "u": f"{sign}int4 per_axis(0) x float",
    }


def test_eight_bits_have_no_blocks(blocks):
    picks = uniform(blocks, CPU, 8, "float", frozenset(), block=32)
    assert str(picks["w"].choice) == "int8 per_axis(1) x float"


# A plan


def test_a_plan_is_obeyed(model):
    plan = {
        "table": {"mode": "static", "format": "int4 per_axis(0)", "why": "by hand"},
        "w": {
            "mode": "static",
            "format": "int2 per_block(0,32)",
            "activation": "float",
        },
        "v": {"mode": "float", "loss": 0.5},
    }
    with pytest.raises(RecipeError, match=r"'w' cannot be int2 per_block\(0,32\) x float on "):
        obeyed(planned(model, **plan), CPU)
    plan["w"] |= {"format": "int4 per_axis(1)", "bytes": 10, "seconds": 0.25, "loss": 2.0}
    plan["w"]["cost_source"] = "nearest"
    assert obeyed(planned(model, **plan), CPU) == {
        "table": Pick(Choice(Format("int4", PerAxis(0))), "by hand", None, Cost(0)),
        "w": Pick(
            Choice(Format("int4", PerAxis(1))), "by the plan", 2.0, Cost(10, 0.25, "nearest")
        ),
        # A float weight costs no loss: this one had another form when its figures were noted.
        "v": Pick(Choice(), "edited in the plan", 0.0, Cost(16)),
    }


@pytest.mark.parametrize("activations", ["auto", "float"])
@pytest.mark.parametrize("bits", [8, 3, 2])
def test_what_was_written_is_obeyed(model, bits, activations):
    picks = uniform(model, CPU, bits, activations, frozenset({"first"}))
    for value in weights_of(model):
        write(value, picks[str(value.name)])
    again = obeyed(model, CPU)
    assert {name: (pick.choice, pick.why) for name, pick in again.items()} == {
        name: (pick.choice, pick.why) for name, pick in picks.items()
    }


def test_a_plan_that_does_not_say_what_the_kernel_reads_gets_what_fits(model):
    form = {"mode": "static", "format": "int8 per_axis(1)"}
    free = obeyed(planned(model, w=form), CPU)["w"].choice
    assert free == Choice(Format("int8", PerAxis(1)), "float")  # the first that is legal
    integer = obeyed(planned(model, w={**form, "activation": "uint8"}), CPU)["w"].choice
    assert integer == Choice(Format("int8", PerAxis(1)), "uint8")
    fewer = obeyed(planned(model, w={**form, "format": "int8:5 per_axis(1)"}), CPU)["w"].choice
    assert fewer.format == Format("int8", PerAxis(1), 5)


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "static", "format": "int8 per_axis(0)"},
        {"mode": "static", "format": "int8 per_axis(-1)"},
        {"mode": "static", "format": "uint8 per_axis(1)", "activation": "uint8"},
        {"mode": "static", "format": "uint4 per_axis(0)"},
        {"mode": "static", "format": "int16 per_axis(1)"},
        {"mode": "static", "format": "int8 per_axis(1)", "activation": "int8"},
        {"mode": "static", "format": "int4 per_block(0,32)", "activation": "uint8"},
    ],
)
def test_a_form_that_is_not_legal_is_refused_with_those_that_are(model, fields):
    with pytest.raises(RecipeError, match=r"plan: weight 'w' cannot be .* legal: .*") as error:
        obeyed(planned(model, w=fields), CPU)
    legal = legal_choices(readers_of(model.graph.initializers["w"]), CPU)
    assert str(error.value).endswith(f"legal: {', '.join(map(str, legal))}")


BRANCHES = "uint2 per_axis(1) split(branches,3,per_tensor,zero)"
GRID = "uint4 per_axis(1) split(int8-grid,16,per_axis(1),levels=1)"
TABLE = "uint2 per_axis(1) split(codebook,3,per_tensor)"
NEAR = "uint2 per_axis(1) split(nearest,3,per_tensor)"


@pytest.mark.parametrize(
    ("text", "activation", "taken"),
    [
        (BRANCHES, "float", True),
        (BRANCHES, "uint8", True),
        (GRID, "float", True),
        (GRID, "uint8", True),
        (TABLE, "float", True),
        (TABLE, "uint8", False),  # a table of floats makes a float kernel
        (NEAR, "float", True),
        (NEAR, "uint8", False),
        ("uint2 per_axis(0) split(branches,3,per_tensor,zero)", "uint8", False),
        ("uint2 per_axis(1) split(branches,3,per_tensor,zero)", "int8", False),
    ],
)
def test_a_split_plan_is_held_to_what_runs_its_parts(model, text, activation, taken):
    note = {"mode": "static", "format": text, "activation": activation}
    if taken:
        found = obeyed(planned(model, w=note), CPU)["w"].choice
        assert found == Choice(Format.parse(text), activation)
        return
    with pytest.raises(RecipeError, match="plan: weight 'w' cannot be uint2 per_axis"):
        obeyed(planned(model, w=note), CPU)


@pytest.mark.parametrize(
    ("text", "container", "least"),
    [
        ("int2 per_axis(1)", "int2", 25),
        ("uint2 per_axis(1)", "uint2", 25),
        ("uint4 per_axis(1)", "uint4", 21),
        (BRANCHES, "uint2", 25),
        (TABLE, "uint4", 21),  # indices of four bits name the values of parts of two
        ("uint4 per_axis(1) split(codebook,4,per_tensor,levels=1)", "uint2", 25),
        (NEAR, "int4", 21),
    ],
)
def test_a_plan_needs_an_opset_that_stores_its_weights(model, text, container, least):
    note = {"mode": "static", "format": text, "activation": "float"}
    planned(model, w=note)
    for opset in (20, 21, 24, 25):
        model.graph.opset_imports[""] = opset
        if opset >= least:
            assert stored(model, CPU)["w"].choice.format == Format.parse(text)
            continue
        with pytest.raises(RecipeError) as error:
            stored(model, CPU)
        assert str(error.value) == (
            f"plan: weight 'w' cannot be stored in {container}: it takes opset {least}, and the "
            f"plan's passes lead to {opset}; write tidy{{opset={least}}} where the plan says "
            "`before`"
        )


def test_a_plan_of_another_class_of_cpu_is_refused_where_it_would_saturate(model):
    """Eight bits where pairs of products are added in 16 bits."""
    plan = {"mode": "static", "format": "int8 per_axis(1)", "activation": "uint8"}
    seven = {**plan, "format": "int8:7 per_axis(1)"}
    avx2 = Cpu(isa="avx2").capability
    assert obeyed(planned(model, w=plan), CPU)["w"].choice.format.bits == 8
    with pytest.raises(RecipeError, match="'w' cannot be int8 per_axis"):
        obeyed(planned(model, w=plan), avx2)
    for capability in (CPU, avx2):
        assert obeyed(planned(model, w=seven), capability)["w"].choice.format.bits == 7


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"format": "int8 per_axis(1)"},
        {"importance": {"fisher": 1.0}},
        {"mode": "static"},
        {"mode": "static", "activation": "uint8"},
        {"mode": "dynamic", "format": "int8 per_axis(1)"},
    ],
)
def test_a_weight_without_a_form_is_refused(model, fields):
    message = "plan: weight 'w' .*; give it static with a format, or float"
    with pytest.raises(RecipeError, match=message):
        obeyed(planned(model, w=fields), CPU)


def test_float_with_a_left_over_format_is_float(model):
    found = obeyed(planned(model, w={"mode": "float", "format": "int8 per_axis(1)"}), CPU)
    assert found["w"].choice == Choice()


def test_a_weight_that_has_no_choice_needs_no_note(model):
    chip = Capability("chip", (21, 21), ())
    assert obeyed(model, chip) == {}


# Notes


def test_a_pick_becomes_a_note(model):
    w = model.graph.initializers["w"]
    notes.write(w, importance={"fisher": 1.0}, losses={"float": 0.0}, block=3)
    form = Format("int4", PerAxis(1))
    cost = Cost(12, 0.5, "shipped")
    write(w, Pick(Choice(form, "uint8"), "because", 0.25, cost))
    assert notes.read(w) == notes.Note(
        format=form,
        mode="static",
        activation="uint8",
        block=3,
        importance={"fisher": 1.0},
        losses={"float": 0.0},
        loss=0.25,
        bytes=12,
        seconds=0.5,
        cost_source="shipped",
        why="because",
    )
    write(w, Pick(Choice(), "kept"))  # nothing of the first is left
    assert notes.read(w) == notes.Note(
        mode="float",
        activation="float",
        block=3,
        importance={"fisher": 1.0},
        losses={"float": 0.0},
        why="kept",
    )


# What is told


def picks_of(**choices):
    return {
        name: Pick(Choice.parse(text), "", None, cost) for name, (text, cost) in choices.items()
    }


def test_the_average_counts_elements_of_the_weights_that_were_picked(model):
    eight = ("int8 per_axis(0) x float", None)
    found = told(
        model, picks_of(table=eight, w=("int2 per_axis(1) x uint8", None)), Decision("milp", 0.0)
    )
    assert found == Decision("milp", (6 * 8 + 4 * 2) / 10)
    seven = picks_of(w=("int8:7 per_axis(1) x uint8", None), v=("float", None))
    assert told(model, seven, Decision("milp", 0.0)).average_bits == (4 * 8 + 4 * 32) / 8
    parts = picks_of(w=(f"{BRANCHES} x float", None), v=(f"{TABLE} x float", None))
    assert told(model, parts, Decision("milp", 0.0)).average_bits == (4 * 6 + 4 * 4) / 8
    assert told(model, {}, Decision("plan", 3.0)) == Decision("plan", 0.0)
    assert told(model, picks_of(other=eight), Decision("plan", 3.0)).average_bits == 0


def test_seconds_are_told_where_all_are_known(model):
    form = "int8 per_axis(0) x float"
    known = picks_of(
        table=(form, Cost(1, 0.5, "measured")),
        w=(form, Cost(1, 0.25, "shipped")),
        v=(form, Cost(1, 0.25, "shipped")),
    )
    found = told(model, known, Decision("milp", 0.0, predicted_seconds=9.0))
    assert (found.predicted_seconds, found.cost_source) == (1.0, "measured and shipped")
    for cost in (None, Cost(1)):
        part = told(model, {**known, **picks_of(v=(form, cost))}, Decision("milp", 0.0))
        assert (part.predicted_seconds, part.cost_source) == (None, "measured and shipped")
    nothing = told(model, picks_of(w=(form, None)), Decision("milp", 0.0))
    assert (nothing.predicted_seconds, nothing.cost_source) == (None, None)


def test_a_decision_keeps_its_other_fields(model):
    before = Decision("milp", 0.0, "measured", "mse", 0.5, 0.25, 0.75, ("w raised",), 3)
    after = told(model, picks_of(w=("float", None)), before)
    assert after == Decision("milp", 32.0, "measured", "mse", 0.5, 0.25, 0.75, ("w raised",), 3)


def test_the_models_graph_is_not_touched(model):
    before = str(model.graph)
    picks = uniform(model, CPU, 4, "auto", frozenset())
    for value in weights_of(model):
        write(value, picks[str(value.name)])
    obeyed(model, CPU)
    assert str(model.graph) == before
    assert {v.name for v in values(model) if notes.read(v) != notes.EMPTY} == {"table", "w", "v"}


def test_an_edited_form_gets_its_own_figures(model):
    """The note's losses tell that its format is another one than its figures are of."""
    losses = {"int8 per_axis(1) x uint8": 0.25, "int4 per_axis(1) x uint8": 2.0}
    note = {
        "format": "int4 per_axis(1)", "activation": "uint8", "mode": "static", "losses": losses,
        "loss": 0.25, "bytes": 999, "seconds": 0.5, "cost_source": "measured", "why": "loss 0.25",
    }  # fmt: skip
    plan = {"table": {"mode": "float"}, "w": note, "v": {"mode": "float"}}
    pick = obeyed(planned(model, **plan), CPU)["w"]
    assert (pick.loss, pick.why) == (2.0, "edited in the plan")
    assert pick.cost.seconds is None
    assert 0 < pick.cost.bytes < 999
    plan["w"] = note | {"loss": 2.0, "why": "loss 2"}
    pick = obeyed(planned(model, **plan), CPU)["w"]
    assert (pick.loss, pick.why, pick.cost.bytes, pick.cost.seconds) == (2.0, "loss 2", 999, 0.5)
