"""One target's way through a compile: rewrite, emit, check, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import compare
from .budgets import Budgets
from .contract import Placement, Progress, Target
from .errors import UnsupportedError
from .intake import Data, Options, Source
from .precision import Precision
from .recipe import Recipe
from .report import TargetReport, verdict
from .saved_plan import SavedPlan
from .search import search
from .storage import stored_bits
from .workbench import Attempt, Workbench


@dataclass(frozen=True)
class Made:
    """What one target's compile left: its report, the file to open, the plan and the recipe."""

    report: TargetReport
    entry: Path
    plan: SavedPlan
    recipe: Recipe


@dataclass(frozen=True)
class Variant:
    """One target's way through: rewrite, emit, check, report.

    `recipe` is one that was given, or None to choose by `precision` and `budgets`.
    """

    target: Target
    recipe: Recipe | None
    precision: Precision
    budgets: Budgets
    source: Source
    feeds: Data
    metric: compare.Metric | None
    wanted: Options
    build: Path
    work: Path
    progress: Progress
    plan: SavedPlan | None = None

    def bench(self) -> Workbench:
        """Return the workbench of this target; refuse a model that it cannot run.

        Raises:
            UnsupportedError: The target's package is missing, or it cannot run the model.
        """
        self._refuse_unsupported()
        work = self.work / self.target.name
        work.mkdir()
        values = self.plan.values if self.plan is not None else None
        return Workbench(
            self.target, self.source, self.feeds, self.wanted, work, self.progress, values
        )

    def compile(self) -> Made:
        """Return the variant, moved to its place in the build folder."""
        bench = self.bench()
        attempt = self._attempt(bench)
        folder = self.build / self.target.name
        attempt.emitted.entry.parent.rename(folder)
        entry = folder / attempt.emitted.entry.name
        placement = Placement({}, {})
        accuracy: compare.Comparison | None = None
        latency: tuple[compare.Latency, ...] = ()
        if self.feeds.check is not None:  # loading takes the memory of a run
            placement = self.target.placement(attempt.model, entry)
            accuracy, latency = self._measure(entry, bench)
        report = TargetReport(
            target=str(self.target),
            capability=self.target.capability.name,
            precision=self._asked(),
            recipe=str(attempt.recipe),
            file_bytes=attempt.bytes,
            stored_bits=stored_bits(attempt.model),
            weight_memory=placement.weight_bytes,
            decision=attempt.decision,
            kernels=placement.kernels,
            stayed_float=placement.stayed_float,
            accuracy=accuracy,
            latency=latency,
            verdict=tuple(verdict(accuracy, latency, self.source.bytes, attempt.bytes)),
            passes=attempt.rows,
            remarks=attempt.remarks,
            seconds=attempt.seconds,
        )
        return Made(report, entry, SavedPlan.of(attempt.recipe, attempt.plan), attempt.recipe)

    def _asked(self) -> str:
        """Return the widths that were asked for."""
        return "by recipe" if self.wanted.recipe is not None else str(self.precision)

    def _attempt(self, bench: Workbench) -> Attempt:
        """Make the variant, or search for it where bits are open."""
        if self.recipe is not None:
            return bench.attempt(self.recipe)
        if self.precision.widths:
            return search(bench, self.precision, self.budgets, self.metric)
        return bench.attempt(bench.recipe(self.precision))

    def _refuse_unsupported(self) -> None:
        """Stop before any work when the target cannot run the model."""
        missing = self.target.missing()
        if missing is not None:
            raise UnsupportedError(
                f"target {self.target.name} needs a package: pip install 'fourfold[{missing}]'"
            )
        lines = self.target.unsupported(self.source.model)
        if lines:
            raise UnsupportedError(
                f"target {self.target.name} cannot run {self.source.name}: {'; '.join(lines[:5])}"
            )

    def _measure(
        self, entry: Path, bench: Workbench
    ) -> tuple[compare.Comparison, tuple[compare.Latency, ...]]:
        """Compare source and variant on the check feeds, and time both in turns."""
        feeds, threads = self.feeds.check, self.wanted.threads
        assert feeds is not None
        source, variant = bench.reference, self.target.open(entry, threads)
        accuracy = compare.compare(source, variant, feeds, self.metric, self.progress)
        sizes = (1, 8) if feeds.rebatchable else (0,)
        rows = []
        for size in sizes:
            batch = next(iter(feeds.rebatched(size) if size else feeds))
            rows.append(compare.latency(source, variant, batch, threads))
        return accuracy, tuple(rows)
