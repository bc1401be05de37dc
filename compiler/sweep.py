"""A sweep: the same model at several average widths, and which of the variants are worth having.

The folder that it leaves holds `front.json`, `front.svg` and a plan for every point: `compile
--plan` makes any of them again, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .allocate import Limits
from .artifact import fresh, seal, write_json
from .budgets import Budgets
from .compare import Comparison, Decibel, compare
from .contract import Progress, silent
from .driver import own_version
from .errors import DataError, RecipeError
from .intake import Options, find_metric, read_feeds, read_options, read_source
from .lookup import make_target
from .precision import Precision
from .saved_plan import SavedPlan
from .variant import Variant
from .workbench import Workbench

FRONT = "front.json"


class Point(BaseModel):
    """One variant of a sweep.

    Attributes:
        name: `source`, or the average bits that were asked for.
        average_bits: Stored code bits per weight; None for the source.
        bytes: Of all files.
        seconds: Median of one call with a batch of one.
        ratio: How many times faster than the source, measured in turns with it.
        sqnr_db: Of the outputs against the source.
        metric: Name of the metric, or None.
        score: The metric on the check feeds.
        drop: How much worse than the source, in the metric's unit.
        front: Whether no other point is at least as good in size, time and accuracy and better in
            one of them.
        plan: File of the plan that makes it, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    average_bits: float | None
    bytes: int
    seconds: float
    ratio: float
    sqnr_db: Decibel
    metric: str | None
    score: float | None
    drop: float | None
    front: bool = False
    plan: str | None = None

    @property
    def loss(self) -> float:
        """What is compared as accuracy: the drop, or the noise where there is no metric."""
        return self.drop if self.drop is not None else -self.sqnr_db


class Front(BaseModel):
    """All points of a sweep; the first is the source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    fourfold: str
    source: str
    target: str
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for front.json."""
        return self.model_dump(mode="json")


def sweep(
    model: Any,
    out: str | Path,
    data: Any = None,
    check_data: Any = None,
    points: int = 8,
    progress: Progress = silent,
    **options: Any,
) -> Front:
    """Compile a model at several average widths, from the widest to the narrowest.

    Args:
        model: As for `compile`.
        out: The folder of the front; must not exist (unless `force`).
        data: Calibration feeds.
        check_data: Held-out feeds.
        points: How many widths, evenly spread; at least 2.
        progress: Shows long steps.
        **options: As for `compile`; one target, no recipe, plan or budget.

    Raises:
        RecipeError: Options that a sweep cannot take; else as `compile`.
        DataError: The check is switched off.
    """
    wanted = read_options(options)
    _refuse(wanted, points)
    target = make_target(wanted.targets[0])
    asked = Precision.parse("auto", wanted.ranges).model_copy(
        update={"widths": wanted.widths, "signals": wanted.signals, "method": wanted.method}
    )
    asked = wanted.with_effort(asked, data is not None)
    with fresh(Path(out), wanted.force) as (build, work):
        source = read_source(model, work, wanted.stage)
        feeds = read_feeds(source.model, data, check_data, wanted, work)
        metric = find_metric(wanted, feeds)
        one = Variant(
            target, None, asked, Budgets(), source, feeds, metric, wanted, build, work, progress
        )
        runs = _Runs(one, one.bench(), build)
        budgets = list(_widths(asked.widths, points))
        made = [runs.point(bits) for bits in progress(budgets, "sweep", len(budgets))]
        front = Front(
            fourfold=own_version(),
            source=source.name,
            target=str(target),
            points=marked([runs.source(), *made]),
        )
        write_json(build / FRONT, front.to_json())
        from .front_plot import draw

        draw(front, build / "front.svg")
        seal(build, {"fourfold": own_version(), "variants": {}, "source": source.sha256})
    return front


def _refuse(wanted: Options, points: int) -> None:
    """Raise for options that a sweep cannot take."""
    if len(wanted.targets) != 1:
        raise RecipeError(f"a sweep takes one target, got {list(wanted.targets)}")
    if points < 2:
        raise RecipeError(f"a sweep of {points} points: expected at least 2")
    if wanted.recipe is not None or wanted.plan is not None or wanted.budgets().any:
        raise RecipeError("a sweep sets the widths itself: leave out --recipe, --plan and budgets")
    if wanted.precision not in (None, "auto"):
        raise RecipeError(f"a sweep mixes widths: leave out --precision {wanted.precision}")
    if not wanted.check:
        raise DataError("a sweep measures every point: leave out --no-check")


def _widths(widths: Sequence[int], points: int) -> list[float]:
    """Return average widths from the widest to the narrowest, evenly spread."""
    high, low = max(widths), min(widths)
    return [round(high - (high - low) * n / (points - 1), 2) for n in range(points)]


@dataclass(frozen=True)
class _Runs:
    """Makes and measures the points of one sweep."""

    variant: Variant
    bench: Workbench
    build: Path

    def source(self) -> Point:
        """Return the source as a point."""
        feeds, metric = self.variant.feeds.check, self.variant.metric
        assert feeds is not None
        own = compare(self.bench.reference, self.bench.reference, feeds, metric)
        seconds = self.bench.latency(None).source
        return self._point("source", self.variant.source.bytes, own, seconds, 1.0)

    def point(self, bits: float) -> Point:
        """Return the variant of least loss at an average width."""
        asked = self.variant.precision.model_copy(
            update={"limits": Limits(average_bits=bits), "trials": 4}
        )
        attempt = self.bench.attempt(self.bench.recipe(asked))
        feeds = self.variant.feeds.check
        assert feeds is not None
        found = self.bench.compared(attempt, feeds, self.variant.metric)
        time = self.bench.latency(attempt)
        name = f"{bits:.2f} bits"
        file = f"plans/{bits:.2f}.json"
        (self.build / "plans").mkdir(exist_ok=True)
        plan = SavedPlan.of(attempt.recipe, attempt.plan)
        write_json(self.build / file, {self.bench.target.name: plan.as_json()}, sort=False)
        made = self._point(name, attempt.bytes, found, time.variant, time.ratio)
        decided = attempt.decision.average_bits if attempt.decision is not None else None
        return made.model_copy(update={"average_bits": decided, "plan": file})

    @staticmethod
    def _point(name: str, size: int, found: Comparison, seconds: float, ratio: float) -> Point:
        """Return a point of what was measured."""
        return Point(
            name=name,
            average_bits=None,
            bytes=size,
            seconds=seconds,
            ratio=ratio,
            sqnr_db=found.sqnr_db,
            metric=found.metric,
            score=found.variant_score,
            drop=found.drop,
        )


def marked(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points with those on the Pareto front marked."""
    return tuple(
        point.model_copy(update={"front": not any(_dominates(other, point) for other in points)})
        for point in points
    )


def _dominates(first: Point, second: Point) -> bool:
    """Whether the first is nowhere worse and somewhere better; times within 2 % are equal."""
    slower = first.ratio < second.ratio * 0.98
    faster = first.ratio > second.ratio * 1.02
    worse = first.bytes > second.bytes or first.loss > second.loss or slower
    better = first.bytes < second.bytes or first.loss < second.loss or faster
    return better and not worse
