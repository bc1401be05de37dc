"""Weights that must have one form: q, k and v of an attention that the runtime fuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from .allocate import Item
from .blocks import attention_groups
from .errors import BudgetError


def ties_of(model: ir.Model) -> dict[str, str]:
    """Return weight -> name of the attention that must have one form."""
    groups = attention_groups(model)
    return {name: f"attention {n}" for n, group in enumerate(groups) for name in group}


def agreed(items: Sequence[Item]) -> list[Item]:
    """Leave tied weights the forms that all of them have.

    Raises:
        BudgetError: There is none.
    """
    common: dict[str | None, set[str]] = {}
    for item in items:
        mine = {option.choice for option in item.options}
        common[item.tie] = common.get(item.tie, mine) & mine
    found = []
    for item in items:
        allowed = common[item.tie]
        if item.tie is not None and not allowed:
            raise BudgetError(
                f"{item.name!r} must have one form with the rest of {item.tie}, and no form that "
                "all of them have is as fast as float; add 32 to the widths, so that they may "
                "stay float"
            )
        kept = [o for o in item.options if item.tie is None or o.choice in allowed]
        found.append(replace(item, options=tuple(kept)))
    return found


def together(order: Sequence[Sequence[str]], items: Sequence[Item]) -> list[list[str]]:
    """Let tied weights move as one, at the place of the most important of them."""
    ranked = {name for group in order for name in group}
    tied: dict[str, list[str]] = {}
    for item in items:
        mates = [o.name for o in items if o is item or (o.tie is not None and o.tie == item.tie)]
        tied[item.name] = mates if ranked.issuperset(mates) else []
    done: set[str] = set()
    groups = []
    for group in reversed(order):
        whole = dict.fromkeys(mate for name in group for mate in tied[name] if mate not in done)
        done |= set(whole)
        groups.append(list(whole))
    return groups[::-1]
