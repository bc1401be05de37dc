"""The greedy order against its definition."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler.allocate import SLACK, Item, Limits, Option, totals
from fourfold.compiler.errors import BudgetError
from fourfold.compiler.greedy import greedy


def item(name, elements, losses, seconds=None, tie=None):
    """Return an item from bits -> loss; a float form has 32 bits."""
    options = tuple(
        Option(f"int{b}", b, loss, elements * b // 8, (seconds or {}).get(b, 0.0))
        for b, loss in losses.items()
    )
    return Item(name, elements, options, tie)


def blocks(count=40):
    """Return equal blocks of two weights each; the least important ones come last."""
    items, order = [], []
    for number in range(count):
        names = [f"b{number}.a", f"b{number}.b"]
        items += [item(name, 64, {8: 0.0, 4: 1.0, 2: 4.0}) for name in names]
        order.append(names)
    return items, order[::-1]


def bits_of(items, chosen):
    return {one.name: one.options[n].bits for one, n in zip(items, chosen, strict=True)}


def test_the_average_of_the_papers_example():
    """Forty equal blocks, ten of which at two bits: 30 * 4 + 10 * 2 over 40 is 3.5."""
    items, order = blocks()
    chosen = greedy(items, order, (4, 2), Limits(average_bits=3.5))
    bits = bits_of(items, chosen)
    moved = {name for group in order[:10] for name in group}
    assert {name for name in bits if bits[name] == 2} == moved
    assert totals(items, chosen)["average bits"] == 3.5


@pytest.mark.parametrize(("average", "moved"), [(8, 0), (7.99, 1), (7.9, 1), (7.89, 2), (4, 40)])
def test_how_many_groups_move(average, moved):
    items, order = blocks()
    bits = bits_of(items, greedy(items, order, (8, 4), Limits(average_bits=average)))
    assert [bits[group[0]] for group in order] == [4] * moved + [8] * (40 - moved)
    assert all(len({bits[name] for name in group}) == 1 for group in order)


def test_no_limit_moves_nothing():
    items, order = blocks()
    assert greedy(items, order, (8, 4, 2), Limits()) == (0,) * 80
    assert set(bits_of(items, greedy(items, order, (4, 2), Limits())).values()) == {4}


def test_the_whole_order_goes_to_the_second_width_before_any_goes_to_the_third():
    items, order = blocks(4)
    seen = []
    for moves in range(9):
        limit = 8 - moves if moves <= 4 else 4 - (moves - 4) / 2
        bits = bits_of(items, greedy(items, order, (8, 4, 2), Limits(average_bits=limit)))
        seen.append([bits[group[0]] for group in order])
    assert seen == [
        [8, 8, 8, 8],
        [4, 8, 8, 8],
        [4, 4, 8, 8],
        [4, 4, 4, 8],
        [4, 4, 4, 4],
        [2, 4, 4, 4],
        [2, 2, 4, 4],
        [2, 2, 2, 4],
        [2, 2, 2, 2],
    ]


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=10),
    st.randoms(use_true_random=False),
    st.lists(st.floats(2, 8), min_size=2, max_size=2),
)
def test_a_smaller_budget_never_widens_a_weight(sizes, random, budgets):
    items = [item(f"w{n}", size, {8: 0.0, 4: 1.0, 2: 4.0}) for n, size in enumerate(sizes)]
    order = [[one.name] for one in items]
    random.shuffle(order)
    wide, narrow = (
        greedy(items, order, (8, 4, 2), Limits(average_bits=b))
        for b in sorted(budgets, reverse=True)
    )
    assert all(a <= b for a, b in zip(wide, narrow, strict=True))
    for chosen, budget in zip((wide, narrow), sorted(budgets, reverse=True), strict=True):
        bits = bits_of(items, chosen)
        average = sum(bits[i.name] * i.elements for i in items) / sum(sizes)
        assert average <= budget * (1 + SLACK)
        assert totals(items, chosen)["average bits"] == pytest.approx(average, rel=1e-12)
        # No more moved than had to: the order is one of widths that never grow.
        assert all(bits[a[0]] <= bits[b[0]] for a, b in pairwise(order))
        assert len(set(bits.values())) <= 2


def test_a_weight_that_is_in_no_group_stays():
    items, order = blocks(4)
    bits = bits_of(items, greedy(items, order[1:], (8, 4), Limits(average_bits=5)))
    assert [bits[name] for name in order[0]] == [8, 8]
    with pytest.raises(BudgetError, match="average bits of 4, nearest 5"):
        greedy(items, order[1:], (8, 4), Limits(average_bits=4))


def test_a_weight_without_a_form_of_some_width():
    items = [
        item("a", 100, {8: 0.0, 2: 4.0}),
        item("b", 100, {8: 0.0, 4: 1.0}),
        item("c", 100, {4: 1.0, 2: 4.0}),
    ]
    order = [[one.name] for one in items]
    assert greedy(items, order, (8, 4, 2), Limits()) == (0, 0, 0)
    chosen = greedy(items, order, (8, 4, 2), Limits(average_bits=16 / 3))
    assert bits_of(items, chosen) == {"a": 8, "b": 4, "c": 4}
    chosen = greedy(items, order, (8, 4, 2), Limits(average_bits=8 / 3))
    assert bits_of(items, chosen) == {"a": 2, "b": 4, "c": 2}


def test_of_several_forms_of_a_width_the_quickest_is_taken():
    """Where no time is asked for all take none, and the first form is taken."""
    forms = [("float kernel", 8, 4.0), ("integer kernel", 8, 2.0), ("a", 4, 1.0), ("b", 4, 1.0)]
    timed = tuple(Option(name, bits, 0.0, bits, time) for name, bits, time in forms)
    items = [Item(f"w{n}", 8, timed) for n in range(2)]
    order = [["w0"], ["w1"]]
    assert greedy(items, order, (8, 4), Limits()) == (1, 1)
    assert greedy(items, order, (8, 4), Limits(seconds=3)) == (2, 1)
    plain = [Item(i.name, 8, tuple(Option(*form[:2], 0.0, 1) for form in forms)) for i in items]
    assert greedy(plain, order, (8, 4), Limits(average_bits=6)) == (2, 0)


def test_greedy_refuses_with_the_nearest_figure():
    items, order = blocks(4)
    with pytest.raises(BudgetError) as error:
        greedy(items, order, (8, 4), Limits(average_bits=3, bytes=10, loss=100.0))
    assert str(error.value) == (
        "the greedy order does not reach the budget: average bits of 3, nearest 4; "
        "bytes of 10, nearest 256"
    )


def test_greedy_names_what_each_budget_could_be_with_the_other_kept():
    items = [item(f"w{n}", 64, {8: 0.125, 4: 1.0}) for n in range(4)]
    order = [[one.name] for one in items]
    # All at eight bits keep the loss; three at four bits are the first to keep the bits.
    with pytest.raises(BudgetError) as error:
        greedy(items, order, (8, 4), Limits(average_bits=5, loss=1.0))
    assert str(error.value) == (
        "the greedy order does not reach the budget: average bits of 5, nearest 8; "
        "loss of 1, nearest 3.125"
    )


def test_greedy_keeps_every_limit():
    items, order = blocks(8)
    least = 8 * 64 * 2  # bytes at eight bits
    limits = Limits(average_bits=7, bytes=least * 5 / 8)
    sums = totals(items, greedy(items, order, (8, 4), limits))
    assert sums["bytes"] == least * 5 / 8
    assert sums["average bits"] == 5


def test_greedy_names_the_nearest_figure_where_narrower_is_not_better():
    """The loss is least before anything moves, and so is the time of these forms."""
    seconds = {8: 1.0, 4: 3.0}
    items = [item(f"w{n}", 64, {8: 0.5, 4: 1.0}, seconds) for n in range(4)]
    order = [[one.name] for one in items]
    with pytest.raises(BudgetError, match=r"loss of 1, nearest 2$"):
        greedy(items, order, (8, 4), Limits(loss=1.0))
    with pytest.raises(BudgetError, match=r"seconds of 3, nearest 4$"):
        greedy(items, order, (8, 4), Limits(seconds=3.0))
