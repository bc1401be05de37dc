"""The mixed mode of assign-bits: widths chosen for each weight; see test_assign_bits.py too."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.choices import Choice, open_weights
from fourfold.compiler.costs import Cost, Workload, stored_bytes
from fourfold.compiler.errors import BudgetError, RecipeError, UnsupportedError
from fourfold.compiler.feeds import input_specs, made_up
from fourfold.compiler.graph import weights_of
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.assign_bits import AssignBits
from fourfold.passes.calibrate import Calibrate
from fourfold.passes.rank_weights import RankWeights
from fourfold.passes.tidy import Tidy
from fourfold.targets.cpu import Cpu

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
CPU = Cpu(isa="vnni").capability
EDITS = Recipe.parse(
    "insert-qdq,round-weights,quantize-biases,pad-codes,lower-embeddings,unpack-weights,fuse-matmul-bias"
)
AXES = {"w1": 1, "w2": 1, "w3": 0}  # of the channels of the mlp's weights
EIGHT, FOUR, TWO = (f"int{bits} per_axis(1) x uint8" for bits in (8, 4, 2))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ready(context):
    """`ready(model)`: a context with feeds; the model has ranges, and an opset with two bits."""

    def with_feeds(model, count=16, **changed):
        feeds = made_up(input_specs(model), 0, count)
        found = replace(context, feeds=feeds, remarks=[], decisions=[], **changed)
        Tidy(opset=25).run(model, found)
        Calibrate().run(model, found)
        return found

    return with_feeds


def ranked(model, context, *signals, widths=(8, 4, 2), activations="auto"):
    signals = signals or ("quantization-error",)
    one = RankWeights(signals=signals, widths=widths, activations=activations)
    one.run(model, context)
    return model


def predicted(model, losses, widths=(8, 4, 2), activations="auto"):
    """Write losses by hand: weight -> choice -> loss; choices that are not named cost 9."""
    for one in open_weights(model, CPU, widths, activations):
        mine = losses.get(one.name, {})
        found = {str(choice): float(mine.get(str(choice), 9.0)) for choice in one.choices}
        notes.write(one.value, losses=found, importance={"measured": found[str(one.choices[-1])]})
    return model


def decided(model, context, **options):
    """Run the pass; return (weight -> form, decision)."""
    before = len(context.decisions)
    AssignBits(**options).run(model, context)
    assert len(context.decisions) == before + 1
    return forms(model), context.decisions[-1]


def forms(model):
    found = {}
    for value in weights_of(model):
        note = notes.read(value)
        form = Choice() if note.mode == "float" else Choice(note.format, note.activation)
        found[str(value.name)] = str(form)
    return found


def loss_in_notes(model):
    """The sum of the predicted losses of the forms that were taken."""
    return sum(notes.read(value).loss for value in weights_of(model))


def average(model):
    """The average bits of the forms in the notes."""
    elements = {str(v.name): v.const_value.size for v in weights_of(model)}
    bits = {name: Choice.parse(text).bits for name, text in forms(model).items()}
    return sum(bits[n] * size for n, size in elements.items()) / sum(elements.values())


def sizes(model, capability=CPU, widths=(8, 4, 2), activations="auto"):
    """Weight -> choice -> stored bytes."""
    return {
        one.name: {str(c): stored_bytes(Workload.of(one.readers[0], ()), c) for c in one.choices}
        for one in open_weights(model, capability, widths, activations)
    }


def every_plan(model, widths=(8, 4, 2)):
    """Yield (forms, loss, average bits, bytes) of every plan there is."""
    weights = open_weights(model, CPU, widths, "auto")
    held, elements = sizes(model, widths=widths), sum(one.elements for one in weights)
    losses = {one.name: {**notes.read(one.value).losses, "float": 0.0} for one in weights}
    for choices in product(*(one.choices for one in weights)):
        pairs = list(zip(weights, choices, strict=True))
        yield (
            {one.name: str(choice) for one, choice in pairs},
            sum(losses[one.name][str(choice)] for one, choice in pairs),
            sum(choice.bits * one.elements for one, choice in pairs) / elements,
            sum(held[one.name][str(choice)] for one, choice in pairs),
        )


# Budgets.


@pytest.mark.parametrize("bits", [2, 2.5, 3.3, 4, 5, 6.5, 8, 20])
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_average_bits(name, bits, zoo, ready):
    model = zoo[name]()
    context = ready(model)
    ranked(model, context)
    best = min(plan[1] for plan in every_plan(model) if plan[2] <= bits)
    found, decision = decided(model, context, widths=(8, 4, 2), average_bits=bits, trials=0)
    assert decision.average_bits == pytest.approx(average(model))
    assert decision.average_bits <= bits
    assert loss_in_notes(model) == pytest.approx(best)
    assert (decision.method, decision.signal) == ("milp", "quantization-error")
    assert set(moved(found).values()) == {8} or bits < 8


def test_only_losses_of_the_outputs_are_told(zoo, ready):
    for signal, there in (("measured", True), ("quantization-error", False)):
        model = zoo["mlp"]()
        context = ready(model)
        ranked(model, context, signal)
        _, decision = decided(model, context, widths=(8, 4), average_bits=6.0, trials=0)
        assert decision.signal == signal
        told = pytest.approx(loss_in_notes(model)) if there else None
        assert decision.predicted_loss == told


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_bytes(name, share, zoo, ready):
    model = zoo[name]()
    context = ready(model)
    ranked(model, context)
    plans = list(every_plan(model))
    limit = max(plan[3] for plan in plans) * share
    best = min((p[1] for p in plans if p[3] <= limit), default=None)
    if best is None:
        with pytest.raises(BudgetError, match=r"no legal choice has bytes of .*; the least"):
            decided(model, context, widths=(8, 4, 2), max_bytes=limit, trials=0)
        return
    found, _ = decided(model, context, widths=(8, 4, 2), max_bytes=limit, trials=0)
    assert sum(sizes(model)[one][form] for one, form in found.items()) <= limit
    assert loss_in_notes(model) == pytest.approx(best)
    assert {notes.read(v).bytes for v in weights_of(model)} == {
        sizes(model)[one][form] for one, form in found.items()
    }


@pytest.mark.parametrize("goal", ["bytes", "loss"])
def test_a_predicted_loss(goal, zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    ranked(model, context)
    plans = list(every_plan(model))
    limit = sorted(plan[1] for plan in plans)[len(plans) // 2]
    decided(model, context, widths=(8, 4, 2), max_loss=limit, goal=goal, trials=0)
    assert loss_in_notes(model) <= limit * (1 + 1e-9)
    held = sum(notes.read(value).bytes for value in weights_of(model))
    if goal == "bytes":
        assert held == min(plan[3] for plan in plans if plan[1] <= limit)
    else:
        assert loss_in_notes(model) == pytest.approx(min(plan[1] for plan in plans))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.floats(0, 1), min_size=9, max_size=9),
    st.floats(2, 8),
    st.floats(400, 1600) | st.none(),
)
def test_the_best_of_all_plans(zoo, context, numbers, bits, held):
    model = zoo["mlp"]()
    rows = (numbers[:3], numbers[3:6], numbers[6:])
    losses = {
        name: {f"int{b} per_axis({axis}) x uint8": x for b, x in zip((8, 4, 2), row, strict=True)}
        for (name, axis), row in zip(AXES.items(), rows, strict=True)
    }
    predicted(model, losses)
    possible = [
        plan for plan in every_plan(model) if plan[2] <= bits and (held is None or plan[3] <= held)
    ]
    around = replace(context, decisions=[], remarks=[])
    options = {"widths": (8, 4, 2), "average_bits": bits, "max_bytes": held, "trials": 0}
    if not possible:
        with pytest.raises(BudgetError):
            decided(model, around, **options)
        return
    found, _ = decided(model, around, **options)
    assert loss_in_notes(model) == pytest.approx(min(p[1] for p in possible), abs=1e-9)
    assert found in [plan[0] for plan in possible]


def seconds_of(table, default=1.0):
    """A cost in which a form takes the seconds of the table: (op, form) or form alone."""

    def cost(workload, choice):
        text = str(choice)
        seconds = table.get((workload.op_type, text), table.get(text, default))
        return Cost(stored_bytes(workload, choice), seconds, "measured")

    return cost


def test_seconds(zoo, ready):
    model = zoo["attention"]()
    table = {EIGHT: 1.0, FOUR: 0.5, TWO: 0.25}
    context = ready(model, cost=seconds_of(table, 2.0))
    ranked(model, context)
    for budget in (6.0, 5.0, 3.0, 2.0):
        around = replace(context, decisions=[], remarks=[])
        found, decision = decided(model, around, widths=(8, 4, 2), max_seconds=budget, trials=0)
        taken = sum(table[form] for form in found.values())
        assert decision.predicted_seconds == pytest.approx(taken)
        assert taken <= budget
        within = [p for p in every_plan(model) if sum(table[f] for f in p[0].values()) <= budget]
        assert loss_in_notes(model) == pytest.approx(min(plan[1] for plan in within))
        assert decision.cost_source == "measured"
        note = notes.read(model.graph.initializers["wq"])
        assert (note.seconds, note.cost_source) == (table[found["wq"]], "measured")
    with pytest.raises(BudgetError, match="no legal choice has seconds of 1"):
        decided(model, around, widths=(8, 4, 2), max_seconds=1.0, trials=0)


def test_the_least_seconds_are_a_goal(zoo, ready):
    model = zoo["attention"]()
    context = ready(model, cost=seconds_of({EIGHT: 1.0, FOUR: 0.5, TWO: 0.75}, 2.0))
    ranked(model, context)
    found, decision = decided(model, context, widths=(8, 4, 2), goal="seconds", trials=0)
    assert set(found.values()) == {FOUR}
    assert decision.predicted_seconds == 3


def test_seconds_of_one_weight_are_those_of_all_its_readers(parse, ready):
    model = parse(
        f"""{HEADER} g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {{1,2,3,4}}> {{
            a = MatMul (x, w) y = MatMul (a, w) }}"""
    )
    context = ready(model, cost=seconds_of({}, 1.5))
    ranked(model, context)
    _, decision = decided(model, context, widths=(8,), max_seconds=4.0, trials=0)
    assert decision.predicted_seconds == 3
    assert notes.read(model.graph.initializers["w"]).seconds == 3


def test_a_time_that_nobody_knows_is_told(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model, cost=lambda workload, choice: Cost(1))
    ranked(model, context)
    with pytest.raises(UnsupportedError, match=r"no time is known for 'w1' as int8 .* profile"):
        decided(model, context, widths=(8, 4), max_seconds=1.0, trials=0)
    _, decision = decided(model, context, widths=(8, 4), average_bits=6, trials=0)
    assert decision.predicted_seconds is None


# Forms that are slower than float.


def test_forms_that_are_slower_than_float_are_dropped(zoo, ready):
    model = zoo["mlp"]()
    slow = {("MatMul", EIGHT): 3.0, ("MatMul", FOUR): 2.5, ("Gemm", "float"): 2.0}
    slow |= {("MatMul", "float"): 2.0}
    context = ready(model, cost=seconds_of(slow, 1.0))
    ranked(model, context, widths=(8, 4, 32), activations="any")
    # The slow forms are the most accurate ones.
    note = notes.read(model.graph.initializers["w2"])
    notes.write(model.graph.initializers["w2"], losses={**note.losses, EIGHT: 0.0, FOUR: 0.0})
    found, _ = decided(
        model, context, widths=(8, 4, 32), activations="any", max_seconds=6.0, trials=0
    )
    assert found["w2"] not in (EIGHT, FOUR)
    assert [(r.subject, r.reason) for r in context.remarks if "slower" in r.reason] == [
        ("w2", f"{EIGHT} is slower than float in this shape"),
        ("w2", f"{FOUR} is slower than float in this shape"),
    ]


def test_a_form_as_slow_as_float_is_kept(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model, cost=seconds_of({}, 2.0))
    ranked(model, context, widths=(8, 32))
    found, _ = decided(model, context, widths=(8, 32), max_seconds=6.0, average_bits=8, trials=0)
    assert set(found.values()) == {EIGHT, "int8 per_axis(0) x uint8"}
    assert not [r for r in context.remarks if "slower" in r.reason]


def test_where_all_forms_are_slower_the_weight_stays_float(zoo, ready):
    model = zoo["mlp"]()
    table = {(op, "float"): 0.5 for op in ("MatMul", "Gemm")}
    context = ready(model, cost=seconds_of(table, 1.0))
    ranked(model, context, widths=(8, 4, 32))
    found, decision = decided(model, context, widths=(8, 4, 32), goal="seconds", trials=0)
    assert set(found.values()) == {"float"}
    assert decision.average_bits == 32
    assert decision.predicted_seconds == 1.5
    with pytest.raises(BudgetError, match="add 32 to the widths"):
        decided(ranked(zoo["mlp"](), context), context, widths=(8, 4), goal="seconds", trials=0)


def test_without_a_budget_on_time_nothing_is_dropped(zoo, ready):
    model = zoo["mlp"]()
    table = {(op, "float"): 0.5 for op in ("MatMul", "Gemm")}
    context = ready(model, cost=seconds_of(table, 1.0))
    ranked(model, context, widths=(8, 4, 32))
    found, _ = decided(model, context, widths=(8, 4, 32), average_bits=8, trials=0)
    assert "float" not in found.values()
    assert not [r for r in context.remarks if "slower" in r.reason]


# The papers' greedy order.

LAYERS = f"""{HEADER} g (float[n,4] x, float[4,4] w0, float[4,4] w1, float[4,4] w2,
    float[4,4] w3, float[4,4] head) => (float[n,4] y) {{
    a = MatMul (x, w0) b = Relu (a) c = MatMul (b, w1) h = Add (c, x)
    d = MatMul (h, w2) e = Relu (d) f = MatMul (e, w3) k = Add (f, h)
    y = MatMul (k, head) }}"""


@pytest.fixture
def layers(parse):
    """Two residual blocks of two weights each, and a head."""

    def made(scale=1.0):
        model, draw = ir.from_onnx_text(LAYERS), np.random.default_rng(2)
        for value in list(model.graph.inputs)[1:]:
            array = draw.standard_t(3, (4, 4)).astype(np.float32)
            if value.name in ("w0", "w1"):
                array *= np.float32(scale)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
        ShapeInferencePass()(model)
        return model

    return made


def moved(found):
    """The bits of each weight."""
    return {name: Choice.parse(form).bits for name, form in found.items()}


@pytest.mark.parametrize("signal", ["kurtosis", "quantization-error", "activation-weighted"])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5])
def test_weights_move_in_the_order_of_a_signal(signal, count, layers, ready):
    model = layers()
    context = ready(model)
    ranked(model, context, "quantization-error", signal)
    rank = {v.name: notes.read(v).importance[signal] for v in weights_of(model)}
    order = sorted(rank, key=rank.__getitem__)
    bits = (4 * count + 8 * (5 - count)) / 5
    found, decision = decided(
        model, context, widths=(8, 4), method="greedy", signal=signal, average_bits=bits, trials=0
    )
    assert moved(found) == {name: 4 if name in order[:count] else 8 for name in rank}
    assert (decision.method, decision.signal) == ("greedy", signal)
    assert {notes.read(v).why for v in weights_of(model)} == {"in the greedy order"}


@pytest.mark.parametrize("signal", ["lim", "zd"])
def test_blocks_move_as_a_whole(signal, layers, ready):
    model = layers(0.01)  # the first block turns little
    context = ready(model)
    ranked(model, context, signal, "quantization-error")
    rank = {v.name: notes.read(v).importance.get(signal) for v in weights_of(model)}
    assert rank["w0"] == rank["w1"] != rank["w2"] == rank["w3"]
    found, _ = decided(model, context, widths=(8, 4), method="greedy", average_bits=7.5, trials=0)
    first = ("w0", "w1") if rank["w0"] < rank["w2"] else ("w2", "w3")
    if rank["head"] is not None and rank["head"] < min(rank["w0"], rank["w2"]):
        first = ("head",)
    assert moved(found) == {name: 4 if name in first else 8 for name in rank}


def test_a_weight_outside_of_the_order_never_moves(layers, ready):
    model = layers()
    context = ready(model)
    ranked(model, context, "lim", "quantization-error")
    options = {"widths": (8, 4), "method": "greedy", "trials": 0}
    found, decision = decided(model, context, average_bits=5.0, **options)
    assert moved(found) == {"w0": 4, "w1": 4, "w2": 4, "w3": 4, "head": 8}
    assert decision.signal == "lim"
    with pytest.raises(BudgetError, match="greedy order does not reach the budget: average bits"):
        decided(model, context, average_bits=4.0, **options)


def test_the_whole_order_goes_one_width_down_before_the_next(layers, ready):
    model = layers()
    context = ready(model)
    ranked(model, context, "kurtosis", "quantization-error")
    rank = {v.name: notes.read(v).importance["kurtosis"] for v in weights_of(model)}
    order = sorted(rank, key=rank.__getitem__)
    found, _ = decided(
        model, context, widths=(2, 8, 4), method="greedy", average_bits=3.2, trials=0
    )
    assert moved(found) == {name: 2 if name in order[:2] else 4 for name in rank}


def test_an_order_that_nobody_made(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    ranked(model, context)
    with pytest.raises(RecipeError, match="no weight has an importance by zd; run rank-weights"):
        decided(model, context, widths=(8, 4), method="greedy", signal="zd", trials=0)


def test_the_greedy_plan_is_measured_once(layers, ready):
    model = layers()
    context = ready(model)
    ranked(model, context, "kurtosis", "measured")
    _, decision = decided(model, context, widths=(8, 4), method="greedy", average_bits=6)
    assert decision.trials == 1
    assert decision.measured_loss == decision.first_loss > 0
    assert decision.repairs == ()


# What must have one form.


@pytest.mark.parametrize("method", ["milp", "greedy"])
@pytest.mark.parametrize("bits", [3.0, 4.0, 5.0, 6.0, 7.0])
def test_an_attention_has_one_form(method, bits, zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    ranked(model, context)
    tied = replace(context, capability=replace(CPU, ties_attention=True), decisions=[])
    options = {"widths": (8, 4, 2), "average_bits": bits, "method": method, "trials": 0}
    found, decision = decided(model, tied, **options)
    assert found["wq"] == found["wk"] == found["wv"]
    assert decision.average_bits <= bits
    if method == "milp":
        plans = [p for p in every_plan(model) if p[2] <= bits]
        one = [p for p in plans if len({p[0][name] for name in ("wq", "wk", "wv")}) == 1]
        assert loss_in_notes(model) == pytest.approx(min(p[1] for p in one))


def test_a_form_that_one_of_them_lacks_is_no_form(zoo, ready):
    # Each alone has its own best form; together they have to agree.
    model = zoo["attention"]()
    context = ready(model)
    zero = {EIGHT: 0.0, FOUR: 0.5, TWO: 0.1}
    losses = dict.fromkeys(("wo", "w1", "w2"), zero)
    losses |= {"wq": {EIGHT: 1, FOUR: 0, TWO: 2}, "wk": {EIGHT: 0, FOUR: 3, TWO: 0.25}}
    losses |= {"wv": {EIGHT: 2, FOUR: 2, TWO: 0}}
    predicted(model, losses)
    free, _ = decided(model, context, widths=(8, 4, 2), trials=0)
    assert [free[name] for name in ("wq", "wk", "wv")] == [FOUR, EIGHT, TWO]
    tied = replace(context, capability=replace(CPU, ties_attention=True))
    found, _ = decided(model, tied, widths=(8, 4, 2), trials=0)
    assert [found[name] for name in ("wq", "wk", "wv")] == [TWO] * 3
    assert loss_in_notes(model) == 2.25


@pytest.mark.parametrize("method", ["milp", "greedy"])
def test_a_form_that_is_slow_for_one_is_open_to_none(method, zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    asked = Counter()

    def cost(workload, choice):
        asked[str(choice)] += 1
        second = asked[str(choice)] == 2  # wq is the first weight, wk the second
        slow = second and str(choice) == EIGHT
        return Cost(stored_bytes(workload, choice), 3.0 if slow else 1.0, "measured")

    ranked(model, context, widths=(8, 4))
    tied = replace(context, capability=replace(CPU, ties_attention=True), cost=cost)
    options = {"widths": (8, 4), "max_seconds": 9.0, "method": method, "trials": 0}
    found, _ = decided(model, tied, **options)
    assert [found[name] for name in ("wq", "wk", "wv")] == [FOUR] * 3
    assert {found[name] for name in ("wo", "w1", "w2")} == {EIGHT}
    told = [(r.subject, r.reason) for r in tied.remarks if "slower" in r.reason]
    assert told == [("wk", f"{EIGHT} is slower than float in this shape")]


def test_tied_weights_without_a_common_form(zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    asked = Counter()

    def cost(workload, choice):
        asked[str(choice)] += 1
        slow = (asked[str(choice)], str(choice)) in ((1, EIGHT), (2, FOUR))
        return Cost(stored_bytes(workload, choice), 3.0 if slow else 1.0, "measured")

    ranked(model, context, widths=(8, 4))
    tied = replace(context, capability=replace(CPU, ties_attention=True), cost=cost)
    with pytest.raises(BudgetError, match="'wq' must have one form with the rest of attention 0"):
        decided(model, tied, widths=(8, 4), max_seconds=9.0, trials=0)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_the_tied_move_when_the_most_important_of_them_does(count, zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    rank = {"wq": 1.0, "wk": 4.0, "wv": 2.0, "wo": 3.0, "w1": 5.0, "w2": 0.5}
    for name, figure in rank.items():
        value = model.graph.initializers[name]
        notes.write(value, importance={"measured": figure}, losses={EIGHT: 0.0, FOUR: figure})
    order = [["w2"], ["wo"], ["wq", "wk", "wv"], ["w1"]][:count]
    low = {name for group in order for name in group}
    elements = {name: model.graph.initializers[name].const_value.size for name in rank}
    bits = sum((4 if n in low else 8) * size for n, size in elements.items())
    tied = replace(context, capability=replace(CPU, ties_attention=True))
    found, _ = decided(
        model,
        tied,
        widths=(8, 4),
        method="greedy",
        average_bits=bits / sum(elements.values()),
        trials=0,
    )
    assert {name for name, one in moved(found).items() if one == 4} == low


# Kernels of several kinds side by side.

BLOCKED = "int4 per_block(0,32) x float"
MIXED = f"""{HEADER} g (float[n,6,64] x, float[64,64] w1, float[64,64] w2, float[64] b1)
    => (float[n,6,64] y, float[n,6,64] z) {{
    [one] a = MatMul (x, w1) [bias] y = Add (a, b1) [two] z = MatMul (x, w2) }}"""
IMAGES = f"""{HEADER} g (float[n,8,8,8] x, float[8,8,3,3] w0, float[512,64] w1, float[512,64] w2)
    => (float[n,64] y, float[n,64] z) {{
    [conv] c = Conv <pads = [1,1,1,1]> (x, w0) r = Relu (c) f = Flatten (r)
    [one] y = MatMul (f, w1) [two] z = MatMul (f, w2) }}"""


@pytest.fixture
def filled():
    """`filled(text)`: the model with normal numbers for all inputs but the first."""

    def made(text):
        model, draw = ir.from_onnx_text(text), np.random.default_rng(0)
        for value in list(model.graph.inputs)[1:]:
            shape = value.shape.numpy()
            array = draw.normal(0, 1 / np.sqrt(shape[0]), shape).astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
        ShapeInferencePass()(model)
        return model

    return made


@pytest.fixture
def carried_out(ready):
    """`carried_out(model, form by weight)`: the variant with these forms, and its decision."""

    def made(model, wanted, **options):
        model = model.clone()
        context = ready(model)
        losses = {name: {form: 0.0} for name, form in wanted.items()}
        predicted(model, losses, widths=(8, 4), activations="any")
        found, _ = decided(model, context, widths=(8, 4), activations="any", trials=0, **options)
        assert found == wanted
        return run(EDITS, model, context)[0]

    return made


def sqnr(outputs, first, second):
    batch = next(iter(made_up(input_specs(first), 0, 16, batch=16)))
    expected, got = outputs(first, **batch), outputs(second, **batch)
    return {
        name: 10 * np.log10(np.square(array).sum() / np.square(got[name] - array).sum())
        for name, array in expected.items()
    }


def reads(model, name):
    """The ops that make what a node reads: the activation, and the weight or its codes."""
    node = next(node for node in model.graph if node.name == name)
    producers = [value.producer() for value in node.inputs[:2]]
    return [one.op_type if one is not None else "none" for one in producers]


@pytest.mark.parametrize(
    ("options", "quantizer", "kernel"),
    [
        ({}, "QuantizeLinear", "MatMulIntegerToFloat"),
        ({"floor_db": 99.0}, "DynamicQuantizeLinear", "DynamicQuantizeMatMul"),
    ],
)
def test_two_kernels_read_one_activation(
    options, quantizer, kernel, filled, carried_out, outputs, kernels
):
    model = filled(MIXED)
    found = carried_out(model, {"w1": EIGHT, "w2": BLOCKED}, **options)
    assert reads(found, "one") == [quantizer, "none"]  # with its bias it reads the codes
    assert reads(found, "two") == ["none", "DequantizeLinear"]
    ops = Counter(node.op_type for node in found.graph)
    assert ops[quantizer] == 1
    ran = kernels(found)
    assert (ran["MatMulNBits"], ran[kernel], ran["MatMul"]) == (1, 1, 0)
    near = sqnr(outputs, model, found)
    assert near["y"] > 35
    assert near["z"] > 15


def test_the_block_wise_kernel_is_as_good_as_alone(filled, carried_out, outputs):
    model = filled(MIXED)
    beside = carried_out(model, {"w1": EIGHT, "w2": BLOCKED})
    alone = carried_out(model, {"w1": BLOCKED, "w2": BLOCKED})
    assert "QuantizeLinear" not in {node.op_type for node in alone.graph}
    batch = next(iter(made_up(input_specs(model), 1, 4)))
    assert (outputs(beside, **batch)["z"] == outputs(alone, **batch)["z"]).all()


def test_a_widened_weight_reads_the_float_beside_an_integer_kernel(
    filled, carried_out, outputs, kernels
):
    model = filled(MIXED)
    found = carried_out(model, {"w1": EIGHT, "w2": "int8 per_axis(1) x float"})
    assert reads(found, "two") == ["none", "Mul"]
    ran = kernels(found)
    assert (ran["MatMulIntegerToFloat"], ran["MatMul"], ran["MatMulNBits"]) == (1, 1, 0)
    near = sqnr(outputs, model, found)
    assert near["z"] > near["y"] > 35  # no activation is rounded for z


@pytest.mark.parametrize("form", [BLOCKED, "int8 per_axis(1) x float"])
def test_what_leaves_its_kernel_in_codes_is_dequantized_for_all(
    form, filled, carried_out, outputs, kernels
):
    model = filled(IMAGES)
    found = carried_out(model, {"w0": "int8 per_axis(0) x uint8", "w1": EIGHT, "w2": form})
    assert reads(found, "two")[0] == "DequantizeLinear"
    ran = kernels(found)
    assert ran["QLinearConv"] == 1
    assert ran["MatMulIntegerToFloat"] >= 1
    near = sqnr(outputs, model, found)
    assert near["y"] > 30
    assert near["z"] > 15


def test_an_integer_layer_among_weights_alone(filled, carried_out, outputs, kernels):
    model = filled(IMAGES)
    wide = "int8 per_axis(0) x float"
    found = carried_out(model, {"w0": wide, "w1": EIGHT, "w2": BLOCKED})
    ran = kernels(found)
    assert (ran["QLinearConv"], ran["MatMulIntegerToFloat"], ran["MatMulNBits"]) == (0, 1, 1)
    assert reads(found, "two")[0] == "Flatten"
    assert min(sqnr(outputs, model, found).values()) > 15


def test_a_table_is_no_kernel(parse, ready):
    model = parse(
        f"""{HEADER} g (int64[n,3] x) => (float[n,3,2] y)
        <float[5,2] table = {{1,2,3,4,5,6,7,8,9,1}}, float[2,2] w = {{1,2,3,4}}> {{
            [look] a = Gather (table, x) [head] y = MatMul (a, w) }}"""
    )
    context = ready(model)
    ranked(model, context)
    found, _ = decided(model, context, widths=(8,), trials=0)
    assert found == {"table": "int8 per_axis(0) x float", "w": EIGHT}
    assert not [r for r in context.remarks if r.subject == "look"]
    assert notes.read(model.graph.initializers["w"].uses()[0].node.inputs[0]).mode == "static"


# The record of a decision.


def loss_of(model, plan, context):
    """Carry a plan out and run it: noise over signal of all outputs."""

    def session(one):
        content = ir.to_proto(one).SerializeToString()
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    variant, _ = run(EDITS, plan, context)
    first, second = session(model), session(variant)
    noise = signal = 0.0
    for batch in context.feeds:
        for expected, got in zip(first.run(None, batch), second.run(None, batch), strict=True):
            noise += float(np.square(got.astype(np.float64) - expected).sum())
            signal += float(np.square(expected.astype(np.float64)).sum())
    return noise / signal


@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_the_whole_plan_is_measured_as_it_will_run(name, zoo, ready):
    model = zoo[name]()
    context = ready(model)
    ranked(model, context, "zd", "measured")
    graph = str(model.graph)
    _, decision = decided(model, context, widths=(8, 4, 2), average_bits=5, samples=0)
    assert str(model.graph) == graph
    assert decision.measured_loss == pytest.approx(
        loss_of(model, model.clone(), context), rel=1e-2
    )
    assert decision.loss_kind == "mse"
    assert decision.signal == "measured"  # zd only orders
    assert decision.average_bits == pytest.approx(average(model))
    told = sum(notes.read(value).loss for value in weights_of(model))
    assert decision.predicted_loss == pytest.approx(told)
    losses = {v.name: notes.read(v).losses[forms(model)[v.name]] for v in weights_of(model)}
    assert {v.name: notes.read(v).loss for v in weights_of(model)} == losses
    assert decision.measured_loss <= decision.first_loss
    assert 1 <= decision.trials <= 12
    if decision.measured_loss == decision.first_loss:
        assert decision.repairs == ()


def test_a_plan_whose_losses_do_not_add_up_is_repaired(zoo, ready):
    def misled():
        """One weight is told to lose a tenth of what it does."""
        model = zoo["attention"]()
        context = ready(model)
        ranked(model, context, "measured")
        value = model.graph.initializers["w1"]
        told = notes.read(value).losses.items()
        notes.write(value, losses={form: loss / 10 for form, loss in told})
        return model, context

    options = {"widths": (8, 4, 2), "average_bits": 4.0, "samples": 0}
    model, context = misled()
    bare, first = decided(model, context, trials=1, **options)
    found, decision = decided(model, context, trials=12, **options)
    assert bare["w1"] == TWO != found["w1"]
    assert decision.first_loss == first.measured_loss == first.first_loss
    assert decision.measured_loss < decision.first_loss
    assert 1 < decision.trials <= 12
    assert decision.average_bits <= 4
    values = [decision.first_loss]
    for line in decision.repairs:
        name, _, rest = line.partition(" raised: loss ")
        before, after = map(float, rest.split(" -> "))
        assert name in found
        assert before == pytest.approx(values[-1], rel=1e-3)
        assert after < before
        values.append(after)
    assert len(values) > 1
    assert values[-1] == pytest.approx(decision.measured_loss, rel=1e-3)
    assert loss_of(model, model.clone(), context) == pytest.approx(values[-1], rel=1e-2)
    again, around = misled()
    assert decided(again, around, trials=12, **options) == (found, decision)


def test_trials_are_a_limit(zoo, ready):
    for trials in (1, 2, 3):
        model = zoo["attention"]()
        context = ready(model)
        names = ("wq", "wk", "wv", "wo", "w1", "w2")
        predicted(model, {name: {EIGHT: 1e-6, FOUR: 2e-6, TWO: 3e-6} for name in names})
        _, decision = decided(model, context, widths=(8, 4, 2), average_bits=4.0, trials=trials)
        assert decision.trials == trials
        assert (decision.repairs == ()) or trials > 1


def test_a_budget_on_the_loss_is_held_by_what_is_measured(zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    ranked(model, context, "measured")
    limit = 0.01
    _, decision = decided(
        model, context, widths=(8, 4, 2), max_loss=limit, goal="bytes", samples=0
    )
    assert decision.measured_loss <= limit
    assert loss_of(model, model.clone(), context) <= limit * 1.01
    assert decision.average_bits < 8
    with pytest.raises(BudgetError, match=r"measured loss is .* more than the budget of 1e-09|"
                       "no legal choice has loss of 1e-09"):  # fmt: skip
        decided(model, context, widths=(8, 4, 2), max_loss=1e-9, goal="bytes", samples=0)


@pytest.mark.parametrize("signal", ["quantization-error", "kurtosis"])
@pytest.mark.parametrize("method", ["milp", "greedy"])
def test_without_feeds_the_prediction_is_trusted(signal, method, zoo, context):
    model = zoo["attention"]()
    ranked(model, context, "quantization-error", signal)
    options = {"widths": (8, 4, 2), "average_bits": 5.0, "method": method, "signal": signal}
    around = replace(context, decisions=[], cost=seconds_of({}, 1.0))
    with_trials, first = decided(model, around, **options)
    without, second = decided(model, around, trials=0, **options)
    assert with_trials == without
    assert first == second
    assert (second.trials, second.measured_loss, second.first_loss) == (0, None, None)
    assert second.signal == (signal if method == "greedy" else "quantization-error")
    assert second.average_bits <= 5
    assert second.predicted_seconds == 6


def test_feeds_are_not_run_without_trials(zoo, ready, monkeypatch):
    model = zoo["mlp"]()
    context = ready(model)
    ranked(model, context)
    monkeypatch.setattr("fourfold.passes.assign_bits.Reference", None)
    _, decision = decided(model, context, widths=(8, 4), average_bits=6.0, trials=0)
    assert decision.measured_loss is None


# What is open, and what is not.


def test_a_reason_says_what_fewer_bits_would_cost(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    costs = {8: 0.001, 4: 0.25}
    losses = {
        name: {f"int{bits} per_axis({axis}) x uint8": cost for bits, cost in costs.items()}
        for name, axis in AXES.items()
    }
    predicted(model, losses, widths=(8, 4))
    decided(model, context, widths=(8, 4), trials=0)
    assert notes.read(model.graph.initializers["w1"]).why == "loss 0.001; with 4 bits 0.25"
    decided(model, context, widths=(8, 4), average_bits=4.0, trials=0)
    why = notes.read(model.graph.initializers["w1"]).why
    assert why == "loss 0.25, in the narrowest form"


@pytest.mark.parametrize("activations", ["auto", "float"])
def test_kept_nodes_are_not_open(activations, zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    ranked(model, context, activations=activations)
    found, decision = decided(
        model,
        context,
        widths=(8, 4, 2),
        activations=activations,
        average_bits=4.0,
        keep=("up", "query"),
        trials=0,
    )
    assert found["w1"] == found["wq"] == "float"
    assert notes.read(model.graph.initializers["w1"]).why == "MatMul: kept as asked"
    assert decision.average_bits <= 4  # of those that are open
    assert "float" not in {form for name, form in found.items() if name not in ("w1", "wq")}


def test_a_weight_without_a_form_of_these_widths_stays_float(zoo, ready):
    rows = tuple(
        replace(row, weights=("int8",)) if row.op_type == "Conv" else row for row in CPU.rows
    )
    wide = tuple(
        replace(row, weights=("int8",)) if row.op_type == "Conv" else row for row in CPU.widened
    )
    model = zoo["convnet"]()
    context = ready(model, capability=replace(CPU, rows=rows, widened=wide))
    ranked(model, context, widths=(4, 2))
    found, _ = decided(model, context, widths=(4, 2), average_bits=4.0, trials=0)
    assert found == {"w1": "float", "w2": "float", "w3": "int4 per_axis(0) x uint8"}
    why = "Conv: no legal form of the widths asked for"
    assert notes.read(model.graph.initializers["w1"]).why == why
    by_name = {v.name: v for node in model.graph for v in node.outputs}
    assert notes.read(by_name["c2"]).mode == "float"
    assert notes.read(model.graph.inputs[0]).mode is None  # its reader runs in float


def test_widths_alone_mean_the_best_forms(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    ranked(model, context, "measured")
    found, decision = decided(model, context, widths=(8, 4, 2))
    assert set(moved(found).values()) == {8}
    assert decision.average_bits == 8


def test_a_weight_that_nobody_ranked(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    with pytest.raises(
        RecipeError, match=r"no predicted loss for 'w1' as int8 .* run rank-weights"
    ):
        decided(model, context, widths=(8, 4), trials=0)
    ranked(model, context, "zd")
    with pytest.raises(RecipeError, match="a signal that predicts losses"):
        decided(model, context, widths=(8, 4), trials=0)
    ranked(model, context, widths=(8, 4))
    with pytest.raises(RecipeError, match="no predicted loss for 'w1' as int2"):
        decided(model, context, widths=(8, 4, 2), trials=0)


def split_forms(model, context, **options):
    """Rank and choose with split forms among the others; return (weight -> form, decision)."""
    wanted = {"widths": (4, 2), "split": "auto", "over": "channel"}
    RankWeights(signals=("quantization-error",), **wanted).run(model, context)
    return decided(model, context, **wanted, **options)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["mlp", "convnet", "attention"])
def test_split_forms_are_weighed_as_the_others_are(name, bits, zoo, ready):
    model = zoo[name]()
    context = ready(model)
    plain, _ = decided(
        ranked(model.clone(), context, widths=(4, 2)), context, widths=(4, 2),
        average_bits=bits, trials=0,
    )  # fmt: skip
    found, decision = split_forms(model, context, average_bits=bits, trials=0)
    assert decision.average_bits <= bits + 1e-9
    losses = loss_in_notes(model)
    for value in weights_of(model):
        note = notes.read(value)
        assert note.loss == note.losses[str(Choice(note.format, note.activation))]
        note_of_plain = note.losses[plain[str(value.name)]]
        assert bits < 4 or note.loss <= note_of_plain
    assert losses <= sum(
        notes.read(value).losses[plain[str(value.name)]] for value in weights_of(model)
    ) * (1 + 1e-9)
    splits = {form for form in found.values() if "split" in form}
    assert bool(splits) <= (bits > 2)


def test_a_plan_with_splits_is_measured_as_it_will_run(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    outlying(model)
    found, decision = split_forms(model, context, average_bits=4, trials=3)
    assert any("split(int8-grid" in form for form in found.values())
    after, _ = run(Recipe.parse(f"split-layers,{EDITS}"), model, context)
    reference, variant = session_of(model), session_of(after)
    noise = signal = 0.0
    for batch in context.feeds:
        expected, got = (one.run(None, dict(batch))[0] for one in (reference, variant))
        noise += np.square(expected - got).sum()
        signal += np.square(expected).sum()
    assert decision.measured_loss == pytest.approx(noise / signal, rel=1e-3)


def outlying(model):
    """Let a few weights of each channel lie far out, where equal steps do badly."""
    draw = np.random.default_rng(5)
    for value in weights_of(model):
        array = value.const_value.numpy().copy()
        array[draw.random(array.shape) < 0.06] *= 12
        value.const_value = ir.tensor(array, name=value.name)


def session_of(model):
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("method", ["milp", "greedy"])
def test_a_second_run_changes_nothing(method, zoo, ready):
    for make in zoo.values():
        model = make()
        context = ready(model)
        ranked(model, context)
        one = AssignBits(widths=(8, 4, 2), average_bits=5.0, method=method, trials=3)
        assert one.run(model, context) > 0
        assert one.run(model, context) == 0


def test_a_model_without_weights(parse, ready):
    model = parse(f"{HEADER} g (float[n,2] x) => (float[n,2] y) {{ y = Relu (x) }}")
    context = ready(model)
    found, decision = decided(model, context, widths=(8, 4), average_bits=2.0)
    assert (found, decision.average_bits) == ({}, 0.0)


@pytest.mark.parametrize(
    ("widths", "opset", "line"),
    [
        ((8, 4, 2), 21, "a weight of 2 bits takes opset 25, and the model has 21; put "
         "tidy{opset=25} before"),
        ((8, 4), 20, "a weight of 4 bits takes opset 21, and the model has 20; put "
         "tidy{opset=21} before"),
        ((8, 4, 2), 25, None),
        ((8, 4, 32), 21, None),
        ((8, 32), 20, None),
        ((), 20, None),
    ],
)  # fmt: skip
def test_widths_ask_for_an_opset_that_stores_them(widths, opset, line, zoo, context):
    model = zoo["mlp"]()
    model.graph.opset_imports[""] = opset
    told = list(AssignBits(widths=widths).requires(model, context))
    assert told == ([] if line is None else [line])
