"""Finds the variant that keeps the budgets: bits are chosen, the variant measured, and so on.

Two cases. Under budgets on size, time or average bits, the least loss: what was measured of one
attempt says how much the weights of the next may take. Under a budget on the metric alone, the
smallest: the average width is halved in, and each attempt is scored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from . import compare
from .allocate import Limits
from .budgets import Budgets
from .choices import FLOAT_BITS
from .errors import BudgetError
from .precision import Precision
from .workbench import Attempt, Workbench

ATTEMPTS = 4  # halvings of the range of a limit on time
HALVINGS = 6  # of the range of average bits
TRIALS = 3  # whole plans measured for an attempt that only narrows a range
MARGIN = 0.97  # of a time budget that is aimed at, since a run's time varies


def search(
    bench: Workbench, precision: Precision, budgets: Budgets, metric: compare.Metric | None
) -> Attempt:
    """Return the best attempt that keeps the budgets, or else the one that came nearest.

    Args:
        bench: Makes the attempts.
        precision: The widths that may be mixed.
        budgets: The budgets.
        metric: Scores attempts where the budget is on its drop.

    Raises:
        BudgetError: No legal choice of forms can keep a budget.
    """
    if budgets.bounds:
        return _most_accurate(bench, precision, budgets)
    if budgets.drop is not None and metric is not None:
        return _smallest(bench, precision, budgets.drop, metric)
    return bench.attempt(bench.recipe(precision))


def _most_accurate(bench: Workbench, precision: Precision, budgets: Budgets) -> Attempt:
    """Return the attempt of least loss under budgets on size, time and average bits."""
    if budgets.latency is not None:
        widths = (*precision.widths, FLOAT_BITS)
        precision = precision.model_copy(update={"widths": widths})
    limits = Limits(budgets.average_bits, budgets.size, budgets.latency)
    attempt = _made(bench, precision, limits)
    if budgets.size is not None and attempt.bytes > budgets.size:
        # Graph, biases and what cannot be quantized take what they take: the weights get the rest.
        beside = attempt.bytes - sum(int(n.get("bytes", 0)) for n in attempt.plan.values())
        limits = replace(limits, bytes=float(max(budgets.size - beside, 1)))
        try:
            attempt = _made(bench, precision, limits)
        except BudgetError:  # the smallest is the nearest
            attempt = _least(bench, precision, limits, "bytes")
    if budgets.latency is None or _seconds(bench, attempt) <= budgets.latency:
        return attempt
    return _fast_enough(bench, precision, limits, budgets.latency)


def _fast_enough(
    bench: Workbench, precision: Precision, limits: Limits, latency: float
) -> Attempt:
    """Return the attempt of least loss whose measured time keeps the budget, or the fastest.

    Kernels' times add up, but the conversions between them do not show in their table. So the
    limit on the kernels is halved in, between that of the fastest choice and the budget itself.
    """
    precision = precision.model_copy(update={"trials": TRIALS})
    best = _least(bench, precision, limits, "seconds")
    if _seconds(bench, best) > latency or best.decision is None:
        return best
    low, high = best.decision.predicted_seconds or 0.0, latency
    for _ in range(ATTEMPTS):
        middle = (low + high) / 2
        attempt = _made(bench, precision, replace(limits, seconds=middle))
        if _seconds(bench, attempt) <= MARGIN * latency:
            best, low = attempt, middle
        else:
            high = middle
    return best


def _seconds(bench: Workbench, attempt: Attempt) -> float:
    """Return the measured median of one call."""
    return bench.latency(attempt).variant


def _made(bench: Workbench, precision: Precision, limits: Limits) -> Attempt:
    """Return the attempt of least loss under limits."""
    asked = precision.model_copy(update={"limits": limits})
    return bench.attempt(bench.recipe(asked))


def _least(
    bench: Workbench, precision: Precision, limits: Limits, goal: Literal["bytes", "seconds"]
) -> Attempt:
    """Return the attempt with the least of one quantity, under the limits on the others."""
    changed = {"limits": replace(limits, **{goal: None}), "goal": goal, "trials": TRIALS}
    return bench.attempt(bench.recipe(precision.model_copy(update=changed)))


def _smallest(
    bench: Workbench, precision: Precision, drop: float, metric: compare.Metric
) -> Attempt:
    """Return the attempt of fewest average bits whose metric drops by no more than the budget.

    The calibration feeds score where they have labels, so that the check stays unseen; else the
    check feeds do.
    """
    feeds = bench.feeds.calibration
    if feeds is None or feeds.labels is None:
        feeds = bench.feeds.check
    assert feeds is not None

    def attempt(bits: float, widths: tuple[int, ...]) -> tuple[bool, Attempt]:
        limits = Limits(average_bits=bits)
        changed = {"limits": limits, "widths": widths, "trials": TRIALS}
        asked = precision.model_copy(update=changed)
        made = bench.attempt(bench.recipe(asked))
        found = bench.compared(made, feeds, metric).drop
        assert found is not None
        return found <= drop, made

    low, high, widths = (
        float(min(precision.widths)),
        float(max(precision.widths)),
        precision.widths,
    )
    kept, best = attempt(high, widths)
    if not kept:  # the widest integers lose too much: let weights stay float
        low, high, widths = high, float(FLOAT_BITS), (*precision.widths, FLOAT_BITS)
        kept, best = attempt(high, widths)
        if not kept:
            return best
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        kept, made = attempt(middle, widths)
        if kept:
            best, high = made, middle
        else:
            low = middle
    return best
