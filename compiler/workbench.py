"""Makes variants of one model for one target: what they share is done once for all attempts."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from . import compare, notes, runner
from .contract import Context, Decision, Emitted, Progress, Remark, Runner, Target
from .errors import UnsupportedError
from .feeds import Feeds
from .intake import Data, Options, Source
from .model import save
from .precision import Precision
from .recipe import Recipe
from .runner import PassRow
from .session import open_runner


@dataclass(frozen=True)
class Attempt:
    """A variant that was decided, rewritten and written.

    Attributes:
        recipe: The passes that made it.
        model: The rewritten model, with its notes.
        emitted: Its files.
        plan: What was decided, by value name in graph order.
        decision: How the bits were chosen; None for a recipe that decides nothing.
        rows: A row for every pass.
        remarks: What passes remarked.
        bytes: Bytes of all files.
        seconds: Duration of the passes and of writing.
    """

    recipe: Recipe
    model: ir.Model
    emitted: Emitted
    plan: dict[str, dict[str, Any]]
    decision: Decision | None
    rows: tuple[PassRow, ...]
    remarks: tuple[Remark, ...]
    bytes: int
    seconds: float


class Workbench:
    """The model, feeds and target of one line of attempts.

    Args:
        target: What the variants are for.
        source: The model that came in.
        feeds: Calibration and check feeds.
        wanted: Seed, memory, threads, jobs.
        work: A work folder of its own.
        progress: Shows long steps.
        plan: A saved plan, or None.
    """

    def __init__(
        self,
        target: Target,
        source: Source,
        feeds: Data,
        wanted: Options,
        work: Path,
        progress: Progress,
        plan: dict[str, dict[str, Any]] | None,
    ) -> None:
        self.target, self.source, self.feeds, self.wanted = target, source, feeds, wanted
        self._work, self._progress = work, progress
        self._context = Context(
            target.capability,
            work,
            feeds.calibration,
            wanted.seed,
            wanted.memory,
            progress,
            cost=target.cost,
            plan=plan,
            jobs=wanted.jobs or _cores(),
        )
        # Recipe of the shared passes -> what they made, in how long, with which remarks.
        self._shared: dict[str, tuple[ir.Model, tuple[PassRow, ...], tuple[Remark, ...], float]]
        self._shared = {}
        self._count = 0

    def recipe(self, precision: Precision) -> Recipe:
        """Return the target's passes for a precision, with the options that were asked for."""
        found = self.target.recipe(precision)
        return found.with_options(self.wanted.set) if self.wanted.set else found

    def attempt(self, recipe: Recipe) -> Attempt:
        """Run a recipe and write the variant; passes before the last decision run once for all."""
        shared, decide, behind = recipe.parts()
        model, rows, remarks, spent = self._ranked(shared)
        context = replace(self._context, remarks=[], decisions=[], floats=[])
        start = time.perf_counter()
        decided, second = runner.run(decide, model, context)
        plan = notes.plan(decided) if decide.passes else {}
        rewritten, third = runner.run(behind, decided, context)
        self._count += 1
        folder = self._work / f"attempt-{self._count}"
        folder.mkdir()
        emitted = self.target.emit(rewritten, folder)
        return Attempt(
            recipe,
            rewritten,
            emitted,
            plan,
            context.decisions[-1] if context.decisions else None,
            (*rows, *second, *third),
            (*remarks, *context.remarks),
            sum(file.stat().st_size for file in emitted.files),
            spent + time.perf_counter() - start,
        )

    def _ranked(
        self, shared: Recipe
    ) -> tuple[ir.Model, tuple[PassRow, ...], tuple[Remark, ...], float]:
        """Return the model after the shared passes."""
        key = str(shared)
        if key not in self._shared:
            context = replace(self._context, remarks=[], decisions=[], floats=[])
            start = time.perf_counter()
            model, rows = runner.run(shared, self.source.model, context)
            spent = time.perf_counter() - start
            self._shared[key] = (model, tuple(rows), tuple(context.remarks), spent)
        return self._shared[key]

    @cached_property
    def reference(self) -> Runner:
        """The source in onnxruntime; what that refuses as it came is rewritten first."""
        threads = self.wanted.threads
        passes = self.target.reference()
        try:
            return open_runner(self.source.path, threads)
        except UnsupportedError:
            if not passes:
                raise
        path = self._work / "reference.onnx"
        context = Context(self.target.capability, self._work)
        rewritten, _ = runner.run(Recipe(passes), self.source.model, context)
        save(rewritten, path)
        return open_runner(path, threads)

    def compared(
        self, attempt: Attempt, feeds: Feeds, metric: compare.Metric | None
    ) -> compare.Comparison:
        """Run source and variant over feeds."""
        variant = self.target.open(attempt.emitted.entry, self.wanted.threads)
        return compare.compare(self.reference, variant, feeds, metric, self._progress)

    def latency(self, attempt: Attempt | None, size: int = 1) -> compare.Latency:
        """Time one batch of `size` check samples on source and variant, in turns.

        Without an attempt the source is timed beside itself.
        """
        feeds, threads = self.feeds.check, self.wanted.threads
        assert feeds is not None
        variant = self.reference
        if attempt is not None:
            variant = self.target.open(attempt.emitted.entry, threads)
        batch = next(iter(feeds.rebatched(size) if feeds.rebatchable else feeds))
        return compare.latency(self.reference, variant, batch, threads)


def _cores() -> int:
    """Return how many cores this process may use."""
    from joblib import cpu_count

    return int(cpu_count())
