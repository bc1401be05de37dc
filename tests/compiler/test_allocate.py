"""The integer program against brute force."""

import os
import re
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fourfold.compiler.allocate import (
    QUANTITIES,
    SLACK,
    Item,
    Limits,
    Option,
    solve,
    totals,
)
from fourfold.compiler.errors import BudgetError

FIELDS = ("average_bits", "bytes", "seconds", "loss")  # of Limits, in the order of QUANTITIES
GOALS = ("loss", "bytes", "seconds")
CLOSE = 1e-9


def item(name, elements, losses, seconds=None, tie=None):
    """Return an item from bits -> loss; a float form has 32 bits."""
    options = tuple(
        Option(f"int{b}", b, loss, elements * b // 8, (seconds or {}).get(b, 0.0))
        for b, loss in losses.items()
    )
    return Item(name, elements, options, tie)


def joined(items, pinned):
    """Return (columns, choices) of each group of items that are tied: what one may choose from.

    Columns are [options, 4]: bits times elements, bytes, seconds, loss.
    """
    groups = {}
    for number, one in enumerate(items):
        groups.setdefault(one.tie or number, []).append(one)
    found = []
    for group in groups.values():
        rows = []
        for choice in dict.fromkeys(o.choice for o in group[0].options):
            taken = [next((o for o in i.options if o.choice == choice), None) for i in group]
            legal = all(
                o is not None and pinned.get(i.name, i.options.index(o)) == i.options.index(o)
                for i, o in zip(group, taken, strict=True)
            )
            if legal:
                pairs = list(zip(group, taken, strict=True))
                rows.append(
                    [
                        sum(o.bits * i.elements for i, o in pairs),
                        *(sum(getattr(o, f) for _, o in pairs) for f in FIELDS[1:]),
                    ]
                )
        found.append(np.array(rows, np.float64).reshape(-1, 4))
    return found


def all_sums(items, pinned=None):
    """Yield the totals [choices, 4] of every legal choice, in parts that fit into memory."""
    groups = joined(items, pinned or {})
    elements = sum(one.elements for one in items)
    halves = []
    for part in (groups[: len(groups) // 2], groups[len(groups) // 2 :]):
        sums = np.zeros((1, 4))
        for rows in part:
            sums = (sums[:, None] + rows[None]).reshape(-1, 4)
        halves.append(sums)
    step = max((1 << 20) // max(len(halves[1]), 1), 1)
    for start in range(0, len(halves[0]), step):
        sums = (halves[0][start : start + step, None] + halves[1][None]).reshape(-1, 4)
        sums[:, 0] /= elements
        yield sums


def best(items, goal, limits, pinned=None):
    """Return (least goal, least loss there) under the limits, or None, for two roundings of them.

    A choice that passes a limit by less than the slack may be taken or not.
    """
    column, found = QUANTITIES.index(goal), ([], [])
    for sums in all_sums(items, pinned):
        for slack, parts in zip((1e-13, SLACK), found, strict=True):
            holds = np.ones(len(sums), bool)
            for name, limit in limits.rows().items():
                holds &= sums[:, QUANTITIES.index(name)] <= limit * (1 + slack)
            kept = sums[holds]
            if len(kept):
                kept = kept[kept[:, column] <= kept[:, column].min() * (1 + CLOSE)]
                parts.append((float(kept[:, column].min()), float(kept[:, 3].min())))
    return [_least(parts) for parts in found]


def _least(parts):
    if not parts:
        return None
    least = min(one[0] for one in parts)
    return least, min(loss for one, loss in parts if one <= least * (1 + CLOSE))


def check(items, goal, limits, pinned=None):
    """Hold `solve` to brute force, and say whether there was a choice at all."""
    expected = best(items, goal, limits, pinned)
    try:
        chosen = solve(items, goal, limits, pinned)
    except BudgetError:
        assert None in expected
        return False
    sums = totals(items, chosen)
    for name, limit in limits.rows().items():
        assert sums[name] <= limit * (1 + SLACK), name
    got = (sums[goal], sums["loss"])
    assert any(one is not None and got == pytest.approx(one, rel=CLOSE, abs=0) for one in expected)
    ties = {}
    for one, index in zip(items, chosen, strict=True):
        choice = one.options[index].choice
        assert index == (pinned or {}).get(one.name, index)
        assert one.tie is None or ties.setdefault(one.tie, choice) == choice
    assert chosen == solve(items, goal, limits, pinned)
    return True


# Random instances

WIDTHS = (32, 8, 4, 2)
# Whole numbers of a unit, so that two totals are the same or clearly not.
COUNTS = st.integers(0, 10**4) | st.integers(1, 10**8)


@st.composite
def instances(draw, most=8, tied=False):
    items = []
    for number in range(draw(st.integers(1, most))):
        elements = draw(st.integers(1, 1000))
        widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4))
        options = tuple(
            Option(
                f"{bits} {place}" if not tied else f"{bits}",
                bits,
                draw(COUNTS) * 1e-6,
                elements * bits // 8 + draw(st.sampled_from([0, 4, 4 * elements])),
                draw(COUNTS) * 1e-8,
            )
            for place, bits in enumerate(dict.fromkeys(widths) if tied else widths)
        )
        tie = draw(st.sampled_from([None, "one", "two"])) if tied else None
        items.append(Item(f"w{number}", elements, options, tie))
    return items


@st.composite
def limits_of(draw, items, count):
    """Limits that some choice just keeps, or that lie anywhere from nothing to everything."""
    fields = draw(st.lists(st.sampled_from(FIELDS), max_size=count, unique=True))
    chosen = tuple(draw(st.integers(0, len(i.options) - 1)) for i in items)
    kept = draw(st.booleans())
    found = {}
    for field in fields:
        name = QUANTITIES[FIELDS.index(field)]
        share = draw(st.floats(0.01, 1.2))
        if kept:
            limit = totals(items, chosen)[name]
        else:
            limit = share * max(sums[:, QUANTITIES.index(name)].max() for sums in all_sums(items))
        found[field] = limit or 1e-6
    return Limits(**found)


@settings(max_examples=120)
@given(st.data())
def test_the_program_is_exact(data):
    items = data.draw(instances())
    check(items, data.draw(st.sampled_from(GOALS)), data.draw(limits_of(items, 4)))


@settings(max_examples=50)
@given(st.data())
def test_the_program_is_exact_with_ties_and_pins(data):
    items = data.draw(instances(most=6, tied=True))
    assume(all(len(rows) for rows in joined(items, {})))
    limits = data.draw(limits_of(items, 2))
    names = data.draw(st.lists(st.sampled_from([one.name for one in items]), max_size=2))
    pinned = {
        one.name: data.draw(st.integers(0, len(one.options) - 1))
        for one in items
        if one.name in names
    }
    check(items, data.draw(st.sampled_from(GOALS)), limits, pinned)


def layers(count, seed, spread=2.0):
    """Return layers of real sizes, with float, 8, 4 and 2 bits and losses over many decades."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        elements = int(draw.integers(1, 64)) * 1024
        eight = float(np.exp(draw.normal(-9, spread)))
        losses = {32: 0.0, 8: eight}
        losses[4] = eight * float(draw.uniform(50, 300))
        losses[2] = losses[4] * float(draw.uniform(5, 30))
        times = {b: elements * 1e-9 * f for b, f in ((32, 1.0), (8, 0.4), (4, 0.42), (2, 0.45))}
        seconds = {b: t * float(draw.uniform(0.9, 1.1)) for b, t in times.items()}
        found.append(item(f"w{number}", elements, losses, seconds))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_twelve_layers_of_four_forms(seed):
    items = layers(12, seed)
    every = totals(items, (1,) * 12)  # all at eight bits
    two = {"average_bits": 3.4, "seconds": every["seconds"] * 1.05}
    assert check(items, "loss", Limits(**two))
    assert check(items, "bytes", Limits(loss=5 * every["loss"], seconds=every["seconds"] * 1.5))
    assert check(items, "seconds", Limits(bytes=every["bytes"] * 0.8, loss=0.5))


@pytest.mark.parametrize("goal", GOALS)
def test_without_limits_every_weight_takes_what_is_least(goal):
    items = layers(40, 7)
    chosen = solve(items, goal, Limits())
    field = {"loss": "loss", "bytes": "bytes", "seconds": "seconds"}[goal]
    for one, index in zip(items, chosen, strict=True):
        least = min(getattr(option, field) for option in one.options)
        assert getattr(one.options[index], field) == least


def test_the_worked_example():
    """Two weights at four bits would save more than is asked, and cost more."""
    items = [
        item("a", 100, {8: 0.0, 4: 0.02}),
        item("b", 200, {8: 0.0, 4: 0.01}),
        item("c", 50, {8: 0.0, 4: 0.001}),
    ]
    # A quarter of the 2800 bits of all at eight is 700; b alone saves 800.
    chosen = solve(items, "loss", Limits(average_bits=6))
    assert [one.options[n].bits for one, n in zip(items, chosen, strict=True)] == [8, 4, 8]
    sums = totals(items, chosen)
    assert sums["loss"] == 0.01
    assert sums["average bits"] * 350 == 2800 - 800


def test_no_items():
    assert solve([], "loss", Limits(average_bits=1)) == ()
    assert totals([], ()) == {"average bits": 0, "bytes": 0, "seconds": 0, "loss": 0}


def test_totals_by_hand():
    items = [
        item("a", 100, {8: 0.25, 4: 0.5}, {8: 1.0, 4: 2.0}),
        item("b", 300, {8: 0.125, 4: 2.0}, {8: 4.0, 4: 8.0}),
    ]
    assert totals(items, (1, 0)) == {
        "average bits": (400 + 2400) / 400,
        "bytes": 50 + 300,
        "seconds": 6.0,
        "loss": 0.625,
    }


# Numbers that a solver with absolute tolerances gets wrong


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e15])
def test_the_unit_of_the_loss_does_not_matter(scale):
    items = layers(9, 3)
    scaled = [
        Item(
            i.name,
            i.elements,
            tuple(Option(o.choice, o.bits, o.loss * scale, o.bytes, o.seconds) for o in i.options),
        )
        for i in items
    ]
    for bits in (2.5, 4.0, 7.5):
        limits = Limits(average_bits=bits)
        assert solve(scaled, "loss", limits) == solve(items, "loss", limits)
        assert check(scaled, "loss", limits)


def test_one_form_that_is_out_of_the_question_hides_no_other_difference():
    """A form whose outputs are not finite has a loss of 1e30; the rest lie below 1e-3."""
    items = layers(8, 5)
    broken = Option("broken", 2, 1e30, 0, 0.0)
    items = [Item(i.name, i.elements, (*i.options, broken)) for i in items]
    for bits in (3.0, 5.0, 8.0):
        assert check(items, "loss", Limits(average_bits=bits))


def test_a_small_loss_is_found_among_large_ones():
    """All at eight bits is 1e-8 of the worst form; the difference of two small ones counts."""
    draw = np.random.default_rng(0)
    items = [
        item(f"w{n}", 1000, {8: float(draw.uniform(1e-9, 2e-9)), 4: 1e-7, 2: 1.0})
        for n in range(8)
    ]
    for bits in (8.0, 7.5, 6.0):
        assert check(items, "loss", Limits(average_bits=bits))


@pytest.mark.parametrize("short", [1, 2, 10, 100, 1000])
def test_a_limit_that_is_missed_by_a_few_bytes_of_a_gigabyte(short):
    """All at four bits is half a gigabyte: it is over the limit, if only by one byte."""
    items = [item(f"w{n}", 125_000_000, {8: 0.0, 4: 1.0 + n, 2: 1000.0 + n}) for n in range(8)]
    full = totals(items, (1,) * 8)["bytes"]
    chosen = solve(items, "loss", Limits(bytes=full - short))
    sums = totals(items, chosen)
    assert sums["bytes"] <= full - short
    assert check(items, "loss", Limits(bytes=full))
    assert check(items, "loss", Limits(bytes=full - short))


@pytest.mark.parametrize("seed", range(12))
def test_totals_that_differ_by_a_hundred_millionth(seed):
    """What passes a limit by 1e-8 of it is refused, and what keeps it by as much is found."""
    draw = np.random.default_rng(seed)
    items = [
        item(
            f"w{number}",
            int(draw.integers(1, 1000)),
            {b: 1 + int(draw.integers(0, 1000)) * 1e-8 for b in (8, 4, 2)},
            {b: 1e-5 * (1 + int(draw.integers(0, 1000)) * 1e-8) for b in (8, 4, 2)},
        )
        for number in range(6)
    ]
    every = np.concatenate(list(all_sums(items)))
    for field, column in (("seconds", 2), ("loss", 3)):
        limit = float(draw.choice(every[:, column]))
        for share in (1.0, 1 + 3e-8, 1 - 3e-8, 1 - 1e-7):
            for goal in GOALS:
                check(items, goal, Limits(**{field: limit * share}))


def test_a_limit_that_is_just_kept():
    items = layers(8, 1)
    for index in range(4):
        sums = totals(items, (index,) * 8)
        for field, name in zip(FIELDS, QUANTITIES, strict=True):
            if sums[name]:
                assert check(items, "loss", Limits(**{field: sums[name]}))


# What cannot be kept


def figures(error):
    """Return the numbers that a message names."""
    return [float(text) for text in re.findall(r"(?<![\w.])\d[\d.]*(?:e[+-]?\d+)?", str(error))]


@pytest.mark.parametrize("field", FIELDS)
def test_a_limit_that_nothing_keeps_is_refused_with_the_least_there_is(field):
    items = [
        Item(i.name, i.elements, tuple(o for o in i.options if o.bits < 32)) for i in layers(6, 2)
    ]
    name = QUANTITIES[FIELDS.index(field)]
    least = min(sums[:, QUANTITIES.index(name)].min() for sums in all_sums(items))
    with pytest.raises(BudgetError, match=f"no legal choice has {name} of ") as error:
        solve(items, "loss", Limits(**{field: least / 2}))
    assert figures(error.value) == pytest.approx([least / 2, least], rel=1e-5)
    assert not error.value.built
    assert check(items, "loss", Limits(**{field: least * (1 + 1e-6)}))
    # Where two are impossible, the first one is told.
    with pytest.raises(BudgetError, match=r"has average bits of 1; the least there is are 2$"):
        solve(items, "bytes", Limits(average_bits=1, bytes=1))


def test_two_limits_that_fail_together_are_told_with_what_each_could_be():
    items = [
        Item(i.name, i.elements, tuple(o for o in i.options if o.bits < 32)) for i in layers(6, 4)
    ]
    eight, two = totals(items, (0,) * 6), totals(items, (2,) * 6)
    limits = Limits(average_bits=3.0, loss=2 * eight["loss"])
    for one in (Limits(average_bits=3.0), Limits(loss=2 * eight["loss"])):
        assert check(items, "loss", one)
    assert two["average bits"] == 2
    sums = np.concatenate(list(all_sums(items)))
    bits = sums[sums[:, 3] <= limits.loss, 0].min()
    loss = sums[sums[:, 0] <= 3.0, 3].min()
    with pytest.raises(BudgetError, match="cannot be kept together") as error:
        solve(items, "loss", limits)
    assert figures(error.value) == pytest.approx([bits, 3.0, loss, limits.loss], rel=1e-5)
    assert "average bits of" in str(error.value)
    assert "; or loss of" in str(error.value)
    # The figures are right: each can be kept with the other limit.
    assert check(items, "loss", Limits(average_bits=bits * (1 + 1e-6), loss=limits.loss))
    assert check(items, "loss", Limits(average_bits=3.0, loss=loss * (1 + 1e-6)))


def test_limits_of_which_no_single_one_is_to_blame():
    """Three limits of which any two can be kept."""
    forms = ((1, 9, 9), (9, 1, 9), (9, 9, 1))  # loss, bytes, seconds
    options = tuple(Option(f"{n}", 8, x, y, z) for n, (x, y, z) in enumerate(forms))
    items = [Item(name, 1, options) for name in ("a", "b")]
    limits = Limits(loss=11, bytes=11, seconds=11)
    with pytest.raises(BudgetError, match="cannot be kept together") as error:
        solve(items, "loss", limits)
    assert figures(error.value) == [18, 11, 18, 11, 18, 11]


def test_ties_and_pins_that_contradict_each_other_are_refused():
    items = [item(name, 8, {8: 0.0, 4: 1.0}, tie="attention") for name in ("q", "k")]
    for limits in (Limits(), Limits(average_bits=6), Limits(average_bits=6, loss=9.0)):
        with pytest.raises(BudgetError, match="tied to one form have no form in common"):
            solve(items, "loss", limits, {"q": 0, "k": 1})
    apart = [item("q", 8, {8: 0.0}, tie="attention"), item("k", 8, {4: 0.0}, tie="attention")]
    with pytest.raises(BudgetError):
        solve(apart, "loss", Limits(average_bits=6))


def test_pins_leave_the_rest_the_best():
    items = layers(7, 8)
    free = solve(items, "loss", Limits(average_bits=4))
    pinned = {"w3": 1, "w5": 3}
    chosen = solve(items, "loss", Limits(average_bits=4), pinned)
    assert (chosen[3], chosen[5]) == (1, 3)
    assert totals(items, chosen)["loss"] >= totals(items, free)["loss"]
    assert check(items, "loss", Limits(average_bits=4), pinned)
    with pytest.raises(BudgetError, match=r"average bits of 4; the least there is are "):
        solve(items, "loss", Limits(average_bits=4), {f"w{n}": 0 for n in range(7)})


# Ties


def test_tied_items_take_one_choice():
    """Alone, q would stay at eight bits and k go to four; together they are dearer than v."""
    items = [
        item("q", 100, {8: 0.0, 4: 5.0}, tie="attention"),
        item("k", 100, {8: 0.0, 4: 1.0}, tie="attention"),
        item("v", 200, {8: 0.0, 4: 4.0}),
    ]
    chosen = solve(items, "loss", Limits(average_bits=6))
    assert chosen == (0, 0, 1)
    alone = [Item(one.name, one.elements, one.options) for one in items]
    assert solve(alone, "loss", Limits(average_bits=7)) == (0, 1, 0)
    assert solve(items, "loss", Limits(average_bits=7)) == (0, 0, 1)


def test_tied_items_take_a_choice_that_both_have():
    items = [
        item("q", 100, {8: 0.0, 4: 1.0}, tie="one"),
        item("k", 100, {4: 1.0, 2: 0.0}, tie="one"),
        item("other", 100, {8: 0.0, 4: 1.0}, tie="two"),
    ]
    assert solve(items, "loss", Limits()) == (1, 0, 0)


def test_bytes_and_seconds_are_least_with_the_least_loss():
    """Among choices of the same size the one of least loss is taken."""
    options = (
        Option("worse", 4, 3.0, 10, 1.0),
        Option("better", 4, 1.0, 10, 2.0),
        Option("large", 8, 0.0, 20, 2.0),
    )
    items = [Item(f"w{n}", 10, options) for n in range(5)]
    assert solve(items, "bytes", Limits()) == (1,) * 5
    assert solve(items, "seconds", Limits()) == (0,) * 5
    limited = solve(items, "bytes", Limits(seconds=8))
    assert sorted(limited) == [0, 0, 1, 1, 1]


# What the solver prints


@pytest.mark.parametrize("start", [0, 20, 40])
def test_nothing_is_printed(start, capfd):
    for seed in range(start, start + 21):
        draw = np.random.default_rng(seed)
        items = []
        for number in range(57):
            elements = int(draw.integers(100, 40_000))
            loss = float(draw.lognormal(-8, 2))
            steps = draw.lognormal(2, 1, 2)
            narrow = loss * (1 + float(steps[0])), loss * (1 + float(steps.sum()) * 5)
            items.append(item(f"w{number}", elements, {8: loss, 4: narrow[0], 2: narrow[1]}))
        sums = totals(items, solve(items, "loss", Limits(average_bits=3.4)))
        assert sums["average bits"] <= 3.4 * (1 + SLACK)
    assert capfd.readouterr() == ("", "")


def test_what_others_print_still_comes_out(capfd):
    os.write(1, b"before\n")
    solve(layers(5, 0), "loss", Limits(average_bits=4))
    sys.stdout.write("after\n")
    assert capfd.readouterr().out == "before\nafter\n"


# Greedy
