"""Chooses forms as the layer-wise paper does: the least important layers move first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf

from .allocate import SLACK, Chosen, Item, Limits, totals
from .errors import BudgetError


def greedy(
    items: Sequence[Item], order: Iterable[Sequence[str]], widths: Sequence[int], limits: Limits
) -> Chosen:
    """Return the papers' choice: all at the widest form, then group after group one width lower.

    Source: arXiv 2406.17415, section 3: the least important layers move first, until the budget is
    reached. With several widths the whole order goes to the second before any goes to the third.

    Args:
        items: The weights; one without an option of some width skips it.
        order: Names of items that move together, the least important group first; others stay.
        widths: Stored bits, the widest first.
        limits: The budgets.

    Raises:
        BudgetError: All have moved, and a budget is not reached.
    """
    groups = [list(group) for group in order]
    place = {item.name: number for number, item in enumerate(items)}
    chosen = [_of_width(item, widths[0]) for item in items]
    rows = limits.rows()

    alone: dict[str, float] = {}  # least of each quantity where only its own budget is missed
    among: dict[str, float] = {}  # the same where others are missed too

    def missed() -> bool:
        sums = totals(items, tuple(chosen))
        over = [name for name, limit in rows.items() if sums[name] > limit * (1 + SLACK)]
        for name in over:
            least = alone if len(over) == 1 else among
            least[name] = min(least.get(name, inf), sums[name])
        return bool(over)

    for width in widths[1:]:
        for group in groups:
            if not missed():
                return tuple(chosen)
            for name in group:
                number = place[name]
                chosen[number] = _of_width(items[number], width, chosen[number])
    if missed():
        nearest = alone or among
        told = "; ".join(f"{n} of {rows[n]:.6g}, nearest {nearest[n]:.6g}" for n in nearest)
        raise BudgetError(f"the greedy order does not reach the budget: {told}")
    return tuple(chosen)


def _of_width(item: Item, bits: int, otherwise: int = 0) -> int:
    """Return the index of the quickest option of that width, of equally quick ones the first."""
    found = [n for n, option in enumerate(item.options) if option.bits == bits]
    return min(found, key=lambda n: item.options[n].seconds, default=otherwise)
