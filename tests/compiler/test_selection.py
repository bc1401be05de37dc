"""From notes and costs to items, orders and plans that are measured and repaired."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler import notes
from fourfold.compiler.allocate import SLACK, Item, Limits, Option, solve, totals
from fourfold.compiler.choices import Choice, open_weights
from fourfold.compiler.costs import Cost, Workload, stored_bytes
from fourfold.compiler.errors import BudgetError, RecipeError, UnsupportedError
from fourfold.compiler.selection import (
    TRUSTED,
    cost_of,
    forms_of,
    items_of,
    order_of,
    repaired,
    without_slow,
)
from fourfold.targets.cpu import Cpu

CPU = Cpu(isa="vnni").capability


@pytest.fixture
def weights(zoo):
    """The open weights of the MLP: w1 [16,32], w2 [32,24], w3 [10,24]."""
    return open_weights(zoo["mlp"](), CPU, (8, 4), "auto")


def texts(one):
    return [str(choice) for choice in one.choices]


def with_losses(weights):
    """Predict a loss for every form: 1, 2, 3, ... in order."""
    count = 0
    for one in weights:
        losses = {}
        for text in texts(one):
            count += 1
            losses[text] = float(count)
        notes.write(one.value, losses=losses)
    return weights


# What forms cost


def test_without_shapes_or_a_table_forms_have_bytes_alone(weights, context):
    shapes = {"fc1": (1, 16), "fc2": (1, 32), "fc3": (1, 24)}
    timed = replace(context, cost=lambda work, choice: Cost(1, 1.0, "measured"))
    for around, known in ((context, shapes), (context, {}), (timed, {})):
        forms = forms_of(weights, around, known)
        assert list(forms) == ["w1", "w2", "w3"]
        for one in weights:
            work = Workload.of(one.readers[0], ())
            expected = {str(c): Cost(stored_bytes(work, c)) for c in (*one.choices, Choice())}
            assert forms[one.name] == expected
    assert forms["w1"]["int8 per_axis(1) x uint8"].bytes == 16 * 32 + 4 * 32
    assert forms["w1"]["int4 per_axis(1) x uint8"].bytes == 16 * 32 // 2 + 4 * 32
    assert forms["w1"]["float"].bytes == 4 * 16 * 32


def test_the_time_of_all_readers_together_by_the_weakest_source(context):
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n,4] x) => (float[n,4] y)
    <float[4,4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
        [one] a = MatMul (x, w) [two] b = MatMul (a, w) [three] y = Gemm (b, w)
    }"""
    weights = open_weights(ir.from_onnx_text(text), CPU, (8,), "auto")
    asked = []

    def cost(work, choice):
        asked.append((work.op_type, work.input, str(choice)))
        if choice.format is None:
            return Cost(0)  # nothing is known of the float kernel
        sources = {(1, 4): "measured", (2, 4): "shipped", (3, 4): "nearest"}
        return Cost(0, 0.5 * work.input[0], sources[work.input])

    shapes = {"one": (1, 4), "two": (2, 4), "three": (3, 4)}
    forms = forms_of(weights, replace(context, cost=cost), shapes)
    assert forms["w"] == {
        "int8 per_axis(1) x uint8": Cost(16 + 16, 3.0, "shipped"),
        "float": Cost(64),
    }
    assert {(op, shape) for op, shape, _ in asked} == {
        ("MatMul", (1, 4)),
        ("MatMul", (2, 4)),
        ("Gemm", (3, 4)),
    }


@pytest.mark.parametrize(
    ("text", "kernels"),
    [
        ("uint2 per_axis(1) split(branches,3,per_tensor,zero) x uint8", ["uint2 per_axis(1)"] * 3),
        ("uint2 per_axis(1) split(int8-grid,3,per_tensor) x uint8", ["int8 per_axis(1)"]),
        ("uint2 per_axis(1) split(codebook,3,per_tensor) x float", []),
    ],
)
def test_the_time_of_a_split_form_is_that_of_its_kernels(weights, context, text, kernels):
    asked = []

    def cost(work, choice):
        asked.append(str(choice))
        return Cost(7, 0.25 * choice.bits, "nearest")

    choice = Choice.parse(text)
    expected = [f"{kernel} x uint8" for kernel in kernels] or ["float"]
    found = cost_of(weights[0], choice, replace(context, cost=cost), {"fc1": (1, 16)})
    assert asked == expected
    seconds = sum(0.25 * Choice.parse(kernel).bits for kernel in expected)
    size = stored_bytes(Workload.of(weights[0].readers[0], ()), choice)
    assert found == Cost(size, seconds, "nearest")
    assert cost_of(weights[0], choice, context, {"fc1": (1, 16)}) == Cost(size)


def test_a_split_form_of_which_one_kernel_is_unknown_has_no_time(weights, context):
    times = iter([0.5, None, 0.5])
    around = replace(context, cost=lambda work, choice: Cost(1, next(times), "measured"))
    choice = Choice.parse("uint2 per_axis(1) split(branches,3,per_tensor,zero) x uint8")
    assert cost_of(weights[0], choice, around, {"fc1": (1, 16)}).seconds is None


# Items


def test_items_hold_what_notes_and_costs_say(weights, context):
    with_losses(weights)
    forms = forms_of(weights, context, {})
    items = items_of(weights, forms, {"w1": "t", "w3": "t"}, timed=False, machine="chip")
    assert [(one.name, one.elements, one.tie) for one in items] == [
        ("w1", 16 * 32, "t"),
        ("w2", 32 * 24, None),
        ("w3", 10 * 24, "t"),
    ]
    assert [o.loss for one in items for o in one.options] == [1, 2, 3, 4, 5, 6]
    for one, item in zip(weights, items, strict=True):
        assert [o.choice for o in item.options] == texts(one)
        assert [o.bits for o in item.options] == [8, 4]
        assert [o.bytes for o in item.options] == [forms[one.name][t].bytes for t in texts(one)]
        assert all(o.seconds == 0 for o in item.options)


def test_float_has_no_loss(zoo, context):
    weights = open_weights(zoo["mlp"](), CPU, (8, 32), "auto")
    for one in weights:
        notes.write(one.value, losses={texts(one)[0]: 0.5, "float": 7.0})
    items = items_of(weights, forms_of(weights, context, {}), {}, timed=False, machine="chip")
    assert [[o.loss for o in item.options] for item in items] == [[0.5, 0.0]] * 3


def test_times_count_only_where_they_are_asked_for(weights, context):
    with_losses(weights)
    shapes = {"fc1": (1, 16), "fc2": (1, 32), "fc3": (1, 24)}
    around = replace(context, cost=lambda work, choice: Cost(1, float(choice.bits), "measured"))
    forms = forms_of(weights, around, shapes)
    timed = items_of(weights, forms, {}, timed=True, machine="chip")
    assert [[o.seconds for o in item.options] for item in timed] == [[8, 4]] * 3
    plain = items_of(weights, forms, {}, timed=False, machine="chip")
    assert [[o.seconds for o in item.options] for item in plain] == [[0, 0]] * 3


def test_a_weight_without_predicted_losses_is_refused(weights, context):
    with_losses(weights[:1])
    forms = forms_of(weights, context, {})
    with pytest.raises(RecipeError, match=r"no predicted loss for 'w2' as int8 .* rank-weights"):
        items_of(weights, forms, {}, timed=False, machine="chip")
    notes.write(weights[1].value, losses={texts(weights[1])[0]: 1.0})
    with pytest.raises(RecipeError, match="no predicted loss for 'w2' as int4"):
        items_of(weights, forms, {}, timed=False, machine="chip")


def test_a_form_without_a_time_is_refused_where_time_is_asked_for(weights, context):
    with_losses(weights)
    forms = forms_of(weights, context, {})
    assert len(items_of(weights, forms, {}, timed=False, machine="chip")) == 3
    with pytest.raises(UnsupportedError, match=r"no time is known for 'w1' as int8 .* on chip"):
        items_of(weights, forms, {}, timed=True, machine="chip")


def test_no_weights_are_no_items():
    assert items_of([], {}, {}, timed=True, machine="chip") == []


# The order of greedy


def ranked(weights, **by_name):
    for one in weights:
        if one.name in by_name:
            notes.write(one.value, importance=by_name[one.name])
    return weights


def test_the_least_important_weight_is_first(weights):
    ranked(weights, w1={"kurtosis": 3.0}, w2={"kurtosis": -1.0}, w3={"kurtosis": 2.0})
    assert order_of(weights, "kurtosis") == [["w2"], ["w3"], ["w1"]]
    assert order_of(weights, None) == [["w2"], ["w3"], ["w1"]]


def test_equally_important_weights_are_in_graph_order(weights):
    ranked(weights, w1={"kurtosis": 1.0}, w2={"kurtosis": 0.0}, w3={"kurtosis": 1.0})
    assert order_of(weights, "kurtosis") == [["w2"], ["w1"], ["w3"]]


def test_the_signal_that_is_named_decides(weights):
    ranked(
        weights,
        w1={"fisher": 1.0, "measured": 9.0},
        w2={"fisher": 2.0, "measured": 8.0},
        w3={"fisher": 3.0, "measured": 7.0},
    )
    assert order_of(weights, "fisher") == [["w1"], ["w2"], ["w3"]]
    assert order_of(weights, "measured") == [["w3"], ["w2"], ["w1"]]
    assert order_of(weights, None) == order_of(weights, "fisher")  # the first one that ranked


@pytest.mark.parametrize("signal", ["lim", "zd"])
def test_blocks_move_together(weights, signal):
    ranked(weights, w1={signal: 0.5}, w2={signal: 0.1}, w3={signal: 0.5})
    notes.write(weights[0].value, block=0)
    notes.write(weights[2].value, block=0)
    assert order_of(weights, signal) == [["w2"], ["w1", "w3"]]


def test_other_signals_rank_weights_of_a_block_one_by_one(weights):
    ranked(weights, w1={"fisher": 0.5}, w2={"fisher": 0.1}, w3={"fisher": 0.3})
    for one in weights:
        notes.write(one.value, block=0)
    assert order_of(weights, "fisher") == [["w2"], ["w3"], ["w1"]]


def test_a_weight_outside_of_blocks_is_a_group_of_its_own(weights):
    ranked(weights, w1={"zd": 0.5}, w2={"zd": 0.5}, w3={"zd": 0.5})
    assert order_of(weights, "zd") == [["w1"], ["w2"], ["w3"]]


def test_a_weight_without_a_rank_never_moves(weights):
    ranked(weights, w1={"lim": 0.5}, w3={"lim": 0.1})
    assert order_of(weights, "lim") == [["w3"], ["w1"]]


def test_a_signal_that_ranked_nothing_is_refused(weights):
    with pytest.raises(RecipeError, match="no weight has an importance by any signal"):
        order_of(weights, None)
    ranked(weights, w1={"zd": 0.5}, w2={}, w3={})
    with pytest.raises(RecipeError, match="no weight has an importance by lim; run rank-weights"):
        order_of(weights, "lim")


# Forms that are slower than float


def timed(**seconds):
    """Return an item whose forms take these seconds."""
    options = [Option(name, 8, 0.0, 1, value) for name, value in seconds.items()]
    return Item("w", 1, tuple(options))


def test_forms_slower_than_float_are_dropped_and_told():
    item = timed(slow=3.0, same=2.0, quick=1.0, slower=2.5)
    (kept,), dropped = without_slow([item], {"w": 2.0})
    assert [option.choice for option in kept.options] == ["same", "quick"]
    assert dropped == [("w", "slow"), ("w", "slower")]
    assert replace(kept, options=item.options) == item


def test_without_a_float_time_all_forms_stay():
    item = timed(slow=3.0, quick=1.0)
    assert without_slow([item], {"v": 0.5}) == ([item], [])
    assert without_slow([], {}) == ([], [])


def test_a_weight_all_of_whose_forms_are_slower_is_refused():
    with pytest.raises(BudgetError, match=r"every offered form of 'w' is slower .* 1e\+06 us"):
        without_slow([timed(slow=3.0, less=1.0)], {"w": 0.5})


# Repairs


def layers(losses, tie=None):
    """Return items of 64 numbers, each with bits -> loss."""
    return [
        Item(
            f"w{number}",
            64,
            tuple(Option(f"int{b}", b, loss, 8 * b) for b, loss in one.items()),
            tie if number < 2 else None,
        )
        for number, one in enumerate(losses)
    ]


class Measure:
    """Counts the plans that it measures; the loss of some pairs is more than that of the two."""

    def __init__(self, items, factor=1.0, pairs=(), extra=0.0):
        self.items, self.factor, self.pairs, self.extra = items, factor, pairs, extra
        self.plans = []

    def __call__(self, chosen):
        self.plans.append(chosen)
        taken = [item.options[index] for item, index in zip(self.items, chosen, strict=True)]
        joint = sum(self.extra for a, b in self.pairs if taken[a].bits < 8 and taken[b].bits < 8)
        return self.factor * sum(option.loss for option in taken) + joint


def test_losses_that_add_up_are_left_alone():
    items = layers([{8: 0.0, 4: 1.0 + n} for n in range(4)])
    limits = Limits(average_bits=6)
    chosen = solve(items, "loss", limits)
    measure = Measure(items, factor=TRUSTED)
    found = repaired(items, "loss", limits, chosen, measure, 12)
    assert measure.plans == [chosen]
    assert (found.chosen, found.trials, found.repairs) == (chosen, 1, ())
    assert found.first == found.measured == TRUSTED * totals(items, chosen)["loss"]
    assert found.predicted == totals(items, chosen)


def test_a_pair_that_goes_badly_together_is_parted():
    """w0 and w1 are the cheapest two; together they cost 100 more."""
    items = layers([{8: 0.0, 4: 1.0}, {8: 0.0, 4: 1.1}, {8: 0.0, 4: 2.0}, {8: 0.0, 4: 3.0}])
    limits = Limits(average_bits=6)
    chosen = solve(items, "loss", limits)
    assert chosen == (1, 1, 0, 0)
    measure = Measure(items, pairs=[(0, 1)], extra=100.0)
    found = repaired(items, "loss", limits, chosen, measure, 12)
    assert found.first == pytest.approx(102.1)
    assert found.chosen == (1, 0, 1, 0)  # the weight of the larger loss was raised, w2 made room
    assert found.measured == pytest.approx(3.0)
    assert found.repairs[0] == "w1 raised: loss 102.1 -> 3"
    assert found.trials == len(measure.plans) <= 12
    assert found.predicted["average bits"] == 6


def test_a_raised_weight_goes_to_its_next_better_form():
    items = layers([{8: 0.0, 4: 1.0, 2: 10.0}, {8: 0.0, 4: 50.0, 2: 500.0}])
    chosen = (2, 0)
    measure = Measure(items, factor=2.0)
    found = repaired(items, "loss", Limits(average_bits=7), chosen, measure, 2)
    assert measure.plans == [(2, 0), (1, 0)]
    assert (found.chosen, found.measured) == ((1, 0), 2.0)


@pytest.mark.parametrize(("gain", "taken"), [(0.001, False), (0.01, False), (0.05, True)])
def test_a_gain_that_is_too_small_is_not_taken(gain, taken):
    items = layers([{8: 0.0, 4: 1.0}, {8: 0.0, 4: 0.5}])
    plans = {(1, 1): 3.0, (0, 1): 3.0 * (1 - gain), (1, 0): 3.0}
    found = repaired(items, "loss", Limits(average_bits=6), (1, 1), lambda p: plans[p], 2)
    assert (found.chosen, found.trials) == ((0, 1) if taken else (1, 1), 2)
    assert found.measured == plans[found.chosen]
    assert len(found.repairs) == taken


@pytest.mark.parametrize("goal", ["bytes", "seconds"])
def test_bytes_and_seconds_are_not_given_up_for_the_loss(goal):
    items = [
        replace(one, options=tuple(replace(o, seconds=o.bits * 1e-6) for o in one.options))
        for one in layers([{8: 0.0, 4: 1.0 + n} for n in range(4)])
    ]
    limits = Limits(average_bits=8)
    chosen = solve(items, goal, limits)
    assert chosen == (1, 1, 1, 1)
    measure = Measure(items, factor=5.0)
    found = repaired(items, goal, limits, chosen, measure, 12)
    assert measure.plans == [chosen]
    assert (found.chosen, found.measured, found.repairs) == (chosen, found.first, ())


@pytest.mark.parametrize("trials", [1, 2, 3, 12])
def test_the_number_of_plans_is_bounded(trials):
    items = layers([{8: 0.0, 4: 1.0 + n, 2: 20.0 + n} for n in range(8)])
    limits = Limits(average_bits=4)
    chosen = solve(items, "loss", limits)
    measure = Measure(items, factor=5.0)
    found = repaired(items, "loss", limits, chosen, measure, trials)
    assert found.trials == len(measure.plans) <= trials
    assert len(set(measure.plans)) == len(measure.plans), "a plan was measured twice"
    if trials == 1:
        assert found.chosen == chosen


LOSSES = st.tuples(*(st.integers(0, 1000) for _ in range(3))).map(sorted)


@st.composite
def instances(draw, tie=None):
    count = draw(st.integers(2, 6))
    # The narrower, the larger the loss; some widths are missing.
    rows = [dict(zip((8, 4, 2), draw(LOSSES), strict=True)) for _ in range(count)]
    rows = [
        {b: x * 1e-3 for b, x in row.items() if b != draw(st.sampled_from([2, 3]))} for row in rows
    ]
    return layers(rows, tie)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([None, "attention"]), st.floats(1.0, 20.0))
def test_a_repair_never_makes_it_worse_and_keeps_every_limit(data, tie, factor):
    items = data.draw(instances(tie))
    average = data.draw(st.floats(4, 8))
    limits = Limits(average_bits=average, bytes=50 * len(items))
    chosen = solve(items, "loss", limits)
    places = st.integers(0, len(items) - 1)
    pairs = data.draw(st.lists(st.tuples(places, places), max_size=4))
    measure = Measure(items, factor, pairs, extra=data.draw(st.floats(0, 10)))
    trials = data.draw(st.integers(1, 10))
    found = repaired(items, "loss", limits, chosen, measure, trials)
    assert found.trials == len(measure.plans) <= trials
    assert (measure.plans[0], found.first) == (chosen, measure(chosen))
    assert found.measured == measure(found.chosen) <= found.first
    assert (found.chosen == chosen) == (found.repairs == ())
    assert found.predicted == totals(items, found.chosen)
    for plan in measure.plans:
        sums = totals(items, plan)
        assert sums["average bits"] <= average * (1 + SLACK)
        assert sums["bytes"] <= limits.bytes * (1 + SLACK)
    if tie:
        first, second = (items[n].options[found.chosen[n]].choice for n in range(2))
        assert first == second


# A limit on the loss


def test_a_limit_on_the_loss_is_held_to_by_the_measurement():
    items = layers([{8: 0.001, 4: 0.1 + n / 100, 2: 1.0} for n in range(6)])
    limits = Limits(loss=0.3)
    chosen = solve(items, "bytes", limits)
    measure = Measure(items, factor=2.0)
    found = repaired(items, "bytes", limits, chosen, measure, 12)
    assert found.first == 2 * totals(items, chosen)["loss"] > 0.3
    assert found.measured == measure(found.chosen) <= 0.3
    assert found.trials > 1
    assert found.predicted["bytes"] < totals(items, (0,) * 6)["bytes"]


def test_a_limit_on_the_loss_that_is_kept_at_once():
    items = layers([{8: 0.0, 4: 0.1} for _ in range(4)])
    limits = Limits(loss=0.25)
    chosen = solve(items, "bytes", limits)
    measure = Measure(items, factor=1.2)
    found = repaired(items, "bytes", limits, chosen, measure, 1)
    assert measure.plans == [chosen]
    assert (found.chosen, found.measured, found.trials) == (chosen, pytest.approx(0.24), 1)


@pytest.mark.parametrize("trials", [1, 5])
def test_a_limit_on_the_loss_that_no_plan_keeps(trials):
    items = layers([{8: 0.2, 4: 0.25} for _ in range(2)])
    limits = Limits(loss=0.5)
    measure = Measure(items, factor=10.0)
    chosen = solve(items, "bytes", limits)
    with pytest.raises(
        BudgetError, match=r"measured loss is \d+, \d.* the budget of 0.5"
    ) as error:
        repaired(items, "bytes", limits, chosen, measure, trials)
    assert 1 <= len(measure.plans) <= trials
    assert f"after {len(measure.plans)} plan" in str(error.value)
    assert not error.value.built


def test_the_plan_of_least_loss_is_tried_before_a_limit_is_given_up():
    """The narrow forms do far worse than predicted, the wide one does not."""
    items = layers([{8: 0.05, 4: 0.09, 2: 0.1}])
    plans = {(0,): 0.08, (1,): 0.2, (2,): 0.3}
    found = repaired(items, "bytes", Limits(loss=0.1), (2,), plans.__getitem__, 12)
    assert (found.chosen, found.measured, found.first) == ((0,), 0.08, 0.3)


@settings(max_examples=60)
@given(st.data(), st.floats(0.5, 10.0))
def test_a_limit_on_the_loss_is_kept_or_refused(data, factor):
    items = data.draw(instances())
    most = totals(items, tuple(len(one.options) - 1 for one in items))["loss"]
    limits = Limits(loss=max(most, 1e-3) * data.draw(st.floats(0.1, 1.0)), average_bits=8)
    goal = data.draw(st.sampled_from(["bytes", "loss"]))
    trials = data.draw(st.integers(1, 8))
    try:
        chosen = solve(items, goal, limits)
    except BudgetError:
        return
    measure = Measure(items, factor, [(0, 1)], extra=data.draw(st.floats(0, 1)))
    try:
        found = repaired(items, goal, limits, chosen, measure, trials)
    except BudgetError:
        used = len(measure.plans)
        assert all(measure(plan) > limits.loss for plan in measure.plans[:used])
        if used < trials:  # then it came down to the plan of least loss
            assert measure.plans[used - 1] == solve(items, "loss", Limits(average_bits=8))
        return
    assert found.trials == len(measure.plans) <= trials
    assert found.measured == measure(found.chosen) <= limits.loss
    assert found.predicted["average bits"] <= 8
    np.testing.assert_equal(found.predicted, totals(items, found.chosen))
