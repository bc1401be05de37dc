"""Budgets on a variant, and whether what was measured of it keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import BudgetError
from .report import TargetReport


@dataclass(frozen=True)
class Budgets:
    """What a variant must keep; None is no budget.

    Attributes:
        drop: Of the metric, in its unit.
        size: Bytes of all files.
        latency: Seconds of one call with a batch of one (or the model's fixed batch).
        average_bits: Stored code bits per quantizable weight.
    """

    drop: float | None = None
    size: int | None = None
    latency: float | None = None
    average_bits: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is a budget at all."""
        return self != Budgets()

    @property
    def bounds(self) -> bool:
        """Whether one of them bounds the integer program."""
        return replace(self, drop=None) != Budgets()


def hold(reports: Sequence[TargetReport], budgets: Budgets, folder: Path) -> None:
    """Hold variants to their budgets, by what was measured of them.

    Raises:
        BudgetError: One is missed; says by how much, and where the variant that came nearest is.
    """
    for report in reports:
        missed = list(_missed(report, budgets))
        if missed:
            told = f"{report.target}: {'; '.join(missed)}; the artifact is in {folder}"
            raise BudgetError(told, built=True)


def _missed(report: TargetReport, budgets: Budgets) -> Iterator[str]:
    """Yield a line for every budget that one variant misses."""
    accuracy, decision = report.accuracy, report.decision
    drop = accuracy.drop if accuracy is not None else None
    if budgets.drop is not None and drop is not None and drop > budgets.drop:
        assert accuracy is not None
        yield (
            f"{accuracy.metric} drops by {drop:.3f}, {drop - budgets.drop:.3f} more than the "
            f"budget of {budgets.drop:g}"
        )
    if budgets.size is not None and report.file_bytes > budgets.size:
        over = report.file_bytes - budgets.size
        yield f"{report.file_bytes} bytes, {over} more than the budget of {budgets.size}"
    if budgets.latency is not None and report.latency:
        seconds = report.latency[0].variant
        if seconds > budgets.latency:
            yield (
                f"{seconds * 1e3:.3f} ms a call, {(seconds - budgets.latency) * 1e3:.3f} ms more "
                f"than the budget of {budgets.latency * 1e3:g} ms"
            )
    if budgets.average_bits is not None and decision is not None:
        over_bits = decision.average_bits - budgets.average_bits
        if over_bits > 1e-6:
            yield (
                f"{decision.average_bits:.3f} bits a weight on average, {over_bits:.3f} more than "
                f"the budget of {budgets.average_bits:g}"
            )
