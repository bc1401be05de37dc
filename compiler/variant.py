"""One target's way through a compile: rewrite, emit, check, report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from . import compare, notes, runner
from .contract import Context, Placement, Progress, Remark, Runner, Target
from .errors import UnsupportedError
from .intake import Data, Options, Source
from .model import save
from .precision import Precision
from .recipe import Recipe
from .report import TargetReport, verdict
from .session import open_runner


@dataclass(frozen=True)
class Variant:
    """One target's way through: rewrite, emit, check, report."""

    target: Target
    recipe: Recipe
    precision: Precision
    source: Source
    feeds: Data
    metric: compare.Metric | None
    wanted: Options
    build: Path
    work: Path
    progress: Progress

    def compile(self) -> tuple[TargetReport, Path, dict[str, Any]]:
        """Return the report, the file to open and the plan."""
        self._refuse_unsupported()
        remarks: list[Remark] = []
        work = self.work / self.target.name
        work.mkdir()
        context = Context(
            self.target.capability,
            work,
            self.feeds.calibration,
            self.wanted.seed,
            self.wanted.memory,
            self.progress,
            remarks,
        )
        start = time.perf_counter()
        rewritten, rows = runner.run(self.recipe, self.source.model, context)
        plan = notes.plan(rewritten)
        folder = self.build / self.target.name
        folder.mkdir()
        emitted = self.target.emit(rewritten, folder)
        seconds = time.perf_counter() - start
        placement = Placement({}, {})
        accuracy: compare.Comparison | None = None
        latency: tuple[compare.Latency, ...] = ()
        if self.feeds.check is not None:  # loading takes the memory of a run
            placement = self.target.placement(rewritten, emitted.entry)
            accuracy, latency = self._measure(emitted.entry)
        size = sum(file.stat().st_size for file in emitted.files)
        report = TargetReport(
            target=str(self.target),
            capability=self.target.capability.name,
            precision=str(self.precision) if self.wanted.recipe is None else "by recipe",
            recipe=str(self.recipe),
            file_bytes=size,
            bits_per_weight=bits_per_weight(rewritten),
            kernels=placement.kernels,
            stayed_float=placement.stayed_float,
            accuracy=accuracy,
            latency=latency,
            verdict=tuple(verdict(accuracy, latency, self.source.bytes, size)),
            passes=tuple(rows),
            remarks=tuple(remarks),
            seconds=seconds,
        )
        return report, emitted.entry, plan

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

    def _measure(self, entry: Path) -> tuple[compare.Comparison, tuple[compare.Latency, ...]]:
        """Compare source and variant on the check feeds, and time both in turns."""
        feeds, threads = self.feeds.check, self.wanted.threads
        assert feeds is not None
        source, variant = self._reference(threads), self.target.open(entry, threads)
        accuracy = compare.compare(source, variant, feeds, self.metric, self.progress)
        sizes = (1, 8) if feeds.rebatchable else (0,)
        rows = []
        for size in sizes:
            batch = next(iter(feeds.rebatched(size) if size else feeds))
            rows.append(compare.latency(source, variant, batch, threads))
        return accuracy, tuple(rows)

    def _reference(self, threads: int) -> Runner:
        """Open the source; what onnxruntime refuses as it came is rewritten by `reference`."""
        passes = self.target.reference()
        try:
            return open_runner(self.source.path, threads)
        except UnsupportedError:
            if not passes:
                raise
        path = self.work / f"{self.target.name}-reference.onnx"
        rewritten, _ = runner.run(
            Recipe(passes), self.source.model, Context(self.target.capability, self.work)
        )
        save(rewritten, path)
        return open_runner(path, threads)


def bits_per_weight(model: ir.Model) -> float | None:
    """Return stored bits (codes and scales) per element of all quantized weights, or None."""
    stored = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    planned = [n for n in stored if notes.read(model.graph.initializers[n]).format is not None]
    elements = sum(stored[name].size for name in planned)
    bits = 0
    for name in planned:
        plain = name.removesuffix("_quantized")
        forms = (name, f"{plain}_scale", f"{plain}_scale_spread", f"{name}_row_scale")
        bits += sum(stored[form].nbytes * 8 for form in forms if form in stored)
    return bits / elements if elements else None
