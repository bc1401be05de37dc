"""Chooses one form for every weight under budgets: exactly, or in a greedy order.

The exact way is the integer program of Hubara et al., "Accurate post training quantization with
small calibration sets" (ICML 2021), section 4: losses are taken to add up, each weight takes
exactly one form, and every budget is a linear row. HiGHS solves it (`scipy.optimize.milp`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from .errors import BudgetError

Goal = Literal["loss", "bytes", "seconds"]
Doubles = npt.NDArray[np.float64]

QUANTITIES = ("average bits", "bytes", "seconds", "loss")
SLACK = 1e-9  # relative; what a budget may be missed by for the sake of rounding
# The solver's own tolerances are 1e-6, so limits and the largest cost are made this large.
LIMIT, COST = 1e4, 1e6
ROUGH = 300.0  # largest cost of one form over the cost of the whole that still is exact


@dataclass(frozen=True)
class Option:
    """One form of one weight.

    Attributes:
        choice: Its text.
        bits: Stored bits of a code.
        loss: Predicted loss.
        bytes: Stored bytes.
        seconds: Seconds of one call; 0 where no budget asks for them.
    """

    choice: str
    bits: int
    loss: float
    bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Item:
    """One weight with its forms.

    Attributes:
        name: The weight.
        elements: How many numbers it holds.
        options: Its forms, at least one.
        tie: Items of one tie take the same choice; None ties nothing.
    """

    name: str
    elements: int
    options: tuple[Option, ...]
    tie: str | None = None


@dataclass(frozen=True)
class Limits:
    """Budgets over all items together; None is no budget.

    Attributes:
        average_bits: Stored code bits per element.
        bytes: Stored bytes.
        seconds: Seconds of one call of every weighted node.
        loss: Predicted loss.
    """

    average_bits: float | None = None
    bytes: float | None = None
    seconds: float | None = None
    loss: float | None = None

    def rows(self) -> dict[str, float]:
        """Return the budgets that are set, by the quantity's name."""
        limits = (self.average_bits, self.bytes, self.seconds, self.loss)
        return {
            name: value
            for name, value in zip(QUANTITIES, limits, strict=True)
            if value is not None
        }


Chosen = tuple[int, ...]  # the index of the option that each item takes


def totals(items: Sequence[Item], chosen: Chosen) -> dict[str, float]:
    """Return average bits, bytes, seconds and loss of a choice."""
    taken = [item.options[index] for item, index in zip(items, chosen, strict=True)]
    elements = sum(item.elements for item in items)
    bits = sum(o.bits * i.elements for o, i in zip(taken, items, strict=True))
    return {
        "average bits": bits / elements if elements else 0.0,
        "bytes": float(sum(o.bytes for o in taken)),
        "seconds": float(sum(o.seconds for o in taken)),
        "loss": float(sum(o.loss for o in taken)),
    }


def solve(
    items: Sequence[Item],
    goal: Goal,
    limits: Limits,
    pinned: Mapping[str, int] | None = None,
) -> Chosen:
    """Return the options with the least `goal` under all limits; exact, and always the same.

    Where the goal is not the loss, many choices have the same bytes or seconds: of those the one
    of least loss is taken.

    Args:
        items: The weights.
        goal: What is made small.
        limits: The budgets.
        pinned: Item name -> index of the option that it must take.

    Raises:
        BudgetError: No choice keeps the limits; says which one, and the nearest that can be kept.
    """
    if not items:
        return ()
    program = _Program(items, pinned or {})
    rows = limits.rows()
    found = program.least(goal, rows)
    if found is None:
        raise BudgetError(_nearest(program, rows))
    if goal == "loss":
        return found
    reached = totals(items, found)[goal]
    held = {**rows, goal: min(rows.get(goal, np.inf), reached * (1 + SLACK))}
    return program.least("loss", held) or found


def _nearest(program: _Program, rows: Mapping[str, float]) -> str:
    """Say which budget cannot be kept, and how near it can be come to."""
    if program.least("loss", {}) is None:
        return "weights that are tied to one form have no form in common"
    for name, limit in rows.items():
        found = program.least(name, {})
        assert found is not None
        least = totals(program.items, found)[name]
        if least > limit * (1 + SLACK):
            return f"no legal choice has {name} of {limit:.6g}; the least there is are {least:.6g}"
    tried = []
    for name in rows:
        others = {key: value for key, value in rows.items() if key != name}
        found = program.least(name, others)
        if found is not None:
            least = totals(program.items, found)[name]
            tried.append(f"{name} of {least:.6g} instead of {rows[name]:.6g}")
    return "the budgets cannot be kept together; nearest, with the others kept: " + (
        "; or ".join(tried) or "none: keep fewer budgets"
    )


class _Program:
    """The integer program: a 0/1 variable for every option, one row an item that sums to 1."""

    def __init__(self, items: Sequence[Item], pinned: Mapping[str, int]) -> None:
        self.items = items
        self._starts = np.cumsum([0, *(len(item.options) for item in items)])
        options = [option for item in items for option in item.options]
        owners = [item for item in items for _ in item.options]
        elements = sum(item.elements for item in items) or 1
        pairs = zip(options, owners, strict=True)
        self._columns = {
            "average bits": np.array([o.bits * (i.elements / elements) for o, i in pairs]),
            "bytes": np.array([float(option.bytes) for option in options]),
            "seconds": np.array([option.seconds for option in options]),
            "loss": np.array([option.loss for option in options]),
        }
        self._allowed = np.ones(len(options), bool)
        for number, item in enumerate(items):
            if item.name in pinned:
                self._allowed[self._starts[number] : self._starts[number + 1]] = False
                self._allowed[self._starts[number] + pinned[item.name]] = True

    def least(self, goal: str, rows: Mapping[str, float]) -> Chosen | None:
        """Return the choice with the least of one quantity under limits, or None."""
        limits, cost = dict(rows), self._columns[goal]
        allowed = self._within(rows)
        for _ in range(len(cost) + 4):
            found = self._solved(goal, limits, allowed)
            if found is None:
                return None
            over = self._over(found, rows)
            most = totals(self.items, found)[goal]
            if not over and float(cost[allowed].max(initial=0)) <= ROUGH * most:
                return found
            if not over:
                # No form that alone has more than this whole choice is in a better one; without
                # them the scale is that of the differences that count.
                allowed &= cost <= most
                continue
            # A 0.9999999 was rounded up to 1: ask for that much less.
            for name, by in over.items():
                limits[name] -= 2 * by
        return None

    def _within(self, rows: Mapping[str, float]) -> npt.NDArray[np.bool_]:
        """Return the options that keep every limit by themselves; no quantity is below zero."""
        allowed = self._allowed.copy()
        for name, limit in rows.items():
            allowed &= self._columns[name] <= limit * (1 + SLACK)
        return allowed

    def _over(self, found: Chosen, rows: Mapping[str, float]) -> dict[str, float]:
        """Return by how much each limit is passed after rounding to whole numbers."""
        sums = totals(self.items, found)
        passed = {name: sums[name] - limit for name, limit in rows.items()}
        return {n: by for n, by in passed.items() if by > SLACK * max(abs(rows[n]), 1e-12)}

    def _solved(
        self, goal: str, rows: Mapping[str, float], allowed: npt.NDArray[np.bool_]
    ) -> Chosen | None:
        """Ask HiGHS; rows and goal are scaled, since its tolerances are absolute."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        constraints = [LinearConstraint(self._one_each(), 1, 1)]
        for name, limit in rows.items():
            column = np.where(allowed, self._columns[name], 0)
            scale = max(abs(limit), 1e-30) / LIMIT
            constraints.append(LinearConstraint(column[None] / scale, -np.inf, limit / scale))
        ties = self._ties()
        if len(ties):
            constraints.append(LinearConstraint(ties, 0, 0))
        cost = np.where(allowed, self._columns[goal], 0)
        spread = float(cost.max(initial=0))
        with _silent_stdout():
            result = milp(
                cost / spread * COST if spread > 0 else cost,
                integrality=np.ones(len(cost)),
                bounds=Bounds(0, allowed.astype(np.float64)),
                constraints=constraints,
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            return None
        parts = [result.x[a:b] for a, b in zip(self._starts, self._starts[1:], strict=False)]
        return tuple(int(part.argmax()) for part in parts)

    def _one_each(self) -> Doubles:
        """Return the rows that let every item take one option."""
        rows = np.zeros((len(self.items), int(self._starts[-1])))
        for number in range(len(self.items)):
            rows[number, self._starts[number] : self._starts[number + 1]] = 1
        return rows

    def _ties(self) -> Doubles:
        """Return the rows that give tied items one choice: those of the first item minus ours."""
        first: dict[str, int] = {}
        rows = []
        for number, item in enumerate(self.items):
            if item.tie is None or first.setdefault(item.tie, number) == number:
                continue
            head = self.items[first[item.tie]]
            for choice in dict.fromkeys(o.choice for o in (*head.options, *item.options)):
                row = np.zeros(int(self._starts[-1]))
                for sign, which in ((1, first[item.tie]), (-1, number)):
                    for index, option in enumerate(self.items[which].options):
                        if option.choice == choice:
                            row[self._starts[which] + index] += sign
                rows.append(row)
        return np.array(rows)


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep what HiGHS prints by itself (scipy 1.17) out of the output that a machine may read."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # a process without a standard output has none to keep clean
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
