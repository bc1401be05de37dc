"""The way of a model from a file to a checked artifact; `compile` reads from top to bottom."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir

from . import compare, notes, runner
from .artifact import REPORT, Artifact, fresh, seal, sha256, write_json
from .contract import Context, Progress, Remark, Runner, Target, silent
from .errors import BudgetError, DataError, ModelError, RecipeError, UnsupportedError
from .external import data_files
from .feeds import Feeds, input_specs, made_up
from .graph import is_float
from .lookup import make_target
from .model import load, refuse_non_finite, refuse_unsound, save
from .named import is_name
from .precision import Precision
from .recipe import Recipe
from .report import (
    AccuracyRow,
    FeedsRow,
    LatencyRow,
    PassReport,
    RemarkRow,
    Report,
    SourceRow,
    TargetReport,
    verdict,
)
from .session import open_runner

PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
CALIBRATION_BATCH = 8
HOLD_OUT = 5  # every 5th sample checks when no check feeds are given


@dataclass(frozen=True)
class Options:
    """What a compile may be told; the command line's options have the same names.

    Attributes:
        targets: Targets as text, e.g. `cpu` or `cpu{isa="avx2"}`.
        precision: `w8a8`, `w4a8`, `w2a8`, or `w8` and so on for weights only.
        ranges: Where activation ranges come from; see `Precision`.
        recipe: A recipe instead of the target's own: text, or the path of a .toml file.
        metric: `top1`, `module:function` or a function; scores outputs. Default: top1 if there are
        labels.
        max_drop: Budget on the metric's drop, in the metric's unit.
        seed: Seed of everything that draws.
        memory: Bound in bytes on the activations held at once during calibration.
        threads: Threads of the runtime while latency is measured.
        stage: Copy a model of a linked store (Hugging Face cache) into the work folder first.
        force: Replace an older artifact under the same name.
        check: Whether to compare the variant with its source at the end.
    """

    targets: tuple[str, ...] = ("cpu",)
    precision: str = "w8a8"
    ranges: Literal["auto", "static", "dynamic"] = "auto"
    recipe: str | None = None
    metric: str | compare.Metric | None = None
    max_drop: float | None = None
    seed: int = 0
    memory: int = 1 << 30
    threads: int = 1
    stage: bool = False
    force: bool = False
    check: bool = True


@dataclass(frozen=True)
class _Source:
    """The model that came in, and the file that a runtime opens for it."""

    name: str
    model: ir.Model
    path: Path
    sha256: str
    bytes: int


@dataclass(frozen=True)
class _Data:
    """Feeds of one compile."""

    calibration: Feeds | None
    check: Feeds | None
    held_out: bool


def compile(
    model: str | Path | ir.Model | onnx.ModelProto,
    out: str | Path,
    data: Any = None,
    check_data: Any = None,
    progress: Progress = silent,
    **options: Any,
) -> Artifact:
    """Compile a model for one or several targets and check every variant against it.

    Args:
        model: A .onnx file, `package.module:function` for PyTorch, an `onnx_ir.Model` or a
        ModelProto.
        out: The artifact's folder; must not exist (unless `force`).
        data: Calibration feeds: anything that `Feeds.read` takes.
        check_data: Held-out feeds, with `labels` for a metric; without them every fifth sample of
        `data`
            is held out.
        progress: Shows long steps.
        **options: The fields of `Options`.

    Returns:
        The artifact under `out`.

    Raises:
        ModelError: The model cannot be read or is not sound.
        RecipeError: An unknown target, pass or option.
        DataError: Feeds, metric or output folder cannot be used.
        UnsupportedError: A target cannot run the model.
        BudgetError: `max_drop` is missed; the artifact is there, so that it can be looked at.
        BrokenPassError: A pass broke the model.
    """
    try:
        wanted = Options(**options)
    except TypeError as error:
        raise RecipeError(f"compile: {error}") from None
    targets = [make_target(text) for text in wanted.targets]
    if not targets or len({t.name for t in targets}) < len(targets):
        raise RecipeError(f"name each target once, at least one; got {list(wanted.targets)}")
    precision = Precision.parse(wanted.precision, wanted.ranges)
    recipes = [_recipe(wanted.recipe, target, precision) for target in targets]
    with fresh(Path(out), wanted.force) as (build, work):
        source = _source(model, work, wanted.stage)
        feeds = _feeds(source.model, data, check_data, wanted, work)
        metric = _metric(wanted, feeds)
        reports, variants, plans = [], {}, {}
        for target, recipe in zip(targets, recipes, strict=True):
            one = _Variant(
                target, recipe, precision, source, feeds, metric, wanted, build, work, progress
            )
            report, entry, plan = one.compile()
            reports.append(report)
            variants[target.name] = str(entry.relative_to(build))
            plans[target.name] = plan
        _write(build, source, feeds, wanted, reports, variants, plans, recipes)
    artifact = Artifact(Path(out))
    _hold_to_budget(reports, wanted.max_drop, artifact)
    return artifact


def _recipe(given: str | None, target: Target, precision: Precision) -> Recipe:
    """Return the recipe asked for, or the target's own."""
    if given is None:
        return target.recipe(precision)
    if given.endswith(".toml"):
        try:
            return Recipe.from_toml(Path(given).read_text())
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {given}: {error.strerror}") from None
    return Recipe.parse(given)


def _source(model: str | Path | ir.Model | onnx.ModelProto, work: Path, stage: bool) -> _Source:
    """Load or export the model; what came from memory is written to a file for the runtime."""
    path, name = None, "model"
    if isinstance(model, str) and is_name(model):
        from .export import from_text

        name, loaded = model, from_text(model)
    elif isinstance(model, str | Path):
        path, name = Path(model), Path(model).name
        loaded = load(path, stage=work / "staged" if stage else None)
        path = next(
            (work / "staged").glob(f"*/{path.name}"), path
        )  # where it was copied to, if it was
    elif isinstance(model, onnx.ModelProto):
        loaded = ir.from_proto(model)
    elif isinstance(model, ir.Model):
        loaded = model.clone()
    else:
        raise ModelError(
            f"cannot compile a {type(model).__name__}: expected a path, ir.Model or ModelProto"
        )
    if path is None:
        refuse_unsound(loaded, name)
        path = work / "source.onnx"
        save(loaded, path)
    refuse_non_finite(loaded)
    files = [path, *data_files(path)]
    digest = "+".join(sha256(file) for file in files)
    return _Source(name, loaded, path, digest, sum(file.stat().st_size for file in files))


def _feeds(model: ir.Model, data: Any, check_data: Any, wanted: Options, work: Path) -> _Data:
    """Read feeds, and hold out a part of them when nothing else can check."""
    inputs = input_specs(model)
    calibration = None
    if data is not None:
        calibration = Feeds.read(data, inputs, CALIBRATION_BATCH, folder=work)
    if not wanted.check:
        return _Data(calibration, None, True)
    if check_data is not None:
        return _Data(
            calibration, Feeds.read(check_data, inputs, CALIBRATION_BATCH, folder=work), True
        )
    if calibration is None:
        return _Data(None, made_up(inputs, wanted.seed, 8), True)
    if calibration.count < HOLD_OUT:
        return _Data(calibration, calibration, False)
    kept, held = calibration.split(HOLD_OUT)
    return _Data(kept, held, True)


@dataclass(frozen=True)
class _Variant:
    """One target's way through: rewrite, emit, check, report."""

    target: Target
    recipe: Recipe
    precision: Precision
    source: _Source
    feeds: _Data
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
        accuracy, latency = self._measure(emitted.entry) if self.feeds.check else (None, ())
        size = sum(file.stat().st_size for file in emitted.files)
        report = TargetReport(
            target=str(self.target),
            capability=self.target.capability.name,
            precision=str(self.precision),
            recipe=str(self.recipe),
            file_bytes=size,
            bits_per_weight=bits_per_weight(rewritten),
            kernels=emitted.placement.kernels,
            stayed_float=emitted.placement.stayed_float,
            accuracy=accuracy,
            latency=latency,
            verdict=tuple(verdict(accuracy, latency, self.source.bytes, size)),
            passes=tuple(PassReport.of(row) for row in rows),
            remarks=tuple(RemarkRow.of(remark) for remark in remarks),
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

    def _measure(self, entry: Path) -> tuple[AccuracyRow, tuple[LatencyRow, ...]]:
        """Compare source and variant on the check feeds, and time both in turns."""
        feeds, threads = self.feeds.check, self.wanted.threads
        assert feeds is not None
        source, variant = self._reference(threads), self.target.open(entry, threads)
        accuracy = compare.compare(source, variant, feeds, self.metric, self.progress)
        sizes = (1, 8) if feeds.rebatchable else (0,)
        rows = []
        for size in sizes:
            batch = next(iter(feeds.rebatched(size) if size else feeds))
            rows.append(LatencyRow.of(compare.latency(source, variant, batch, threads)))
        return AccuracyRow.of(accuracy), tuple(rows)

    def _reference(self, threads: int) -> Runner:
        """Open the source; what onnxruntime refuses as it came is rewritten by `reference`."""
        passes = self.target.reference()
        try:
            return open_runner(self.source.path, threads)
        except UnsupportedError:
            if not passes.passes:
                raise
        path = self.work / f"{self.target.name}-reference.onnx"
        rewritten, _ = runner.run(
            passes, self.source.model, Context(self.target.capability, self.work)
        )
        save(rewritten, path)
        return open_runner(path, threads)


def bits_per_weight(model: ir.Model) -> float | None:
    """Return stored bits (codes and scales) per element over all quantized weights, or None."""
    bits = elements = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or notes.read(value).format is None:
            continue
        bits += tensor.nbytes * 8
        elements += tensor.size
    scales = {
        id(v): v.const_value.nbytes * 8
        for name, v in model.graph.initializers.items()
        if v.const_value is not None and is_float(v) and name.endswith(("_scale", "_spread"))
    }
    return (bits + sum(scales.values())) / elements if elements else None


def _write(
    build: Path,
    source: _Source,
    feeds: _Data,
    wanted: Options,
    reports: list[TargetReport],
    variants: Mapping[str, str],
    plans: Mapping[str, Any],
    recipes: list[Recipe],
) -> None:
    """Write report, plan, recipes and the manifest over them."""
    versions = {name: version(name) for name in PACKAGES}
    report = Report(
        fourfold=own_version(),
        versions=versions,
        machine=platform.machine(),
        seed=wanted.seed,
        source=SourceRow(
            name=source.name,
            sha256=source.sha256,
            opset=source.model.graph.opset_imports.get("", 0),
            nodes=sum(1 for _ in source.model.graph.all_nodes()),
            weight_bytes=runner.weight_bytes(source.model),
            file_bytes=source.bytes,
        ),
        calibration=_feeds_row(feeds.calibration, feeds),
        check=_feeds_row(feeds.check, feeds),
        targets=tuple(reports),
    )
    write_json(build / REPORT, report.to_json())
    write_json(build / "plan.json", plans, sort=False)  # graph order is the plan's order
    for name, recipe in zip(variants, recipes, strict=True):
        (build / name / "recipe.toml").write_text(recipe.to_toml())
    seal(
        build,
        {
            "fourfold": own_version(),
            "versions": versions,
            "seed": wanted.seed,
            "source": {"name": source.name, "sha256": source.sha256},
            "calibration": feeds.calibration.sha256() if feeds.calibration else None,
            "variants": dict(variants),
        },
    )


def _feeds_row(feeds: Feeds | None, data: _Data) -> FeedsRow | None:
    """Describe feeds."""
    if feeds is None:
        return None
    return FeedsRow(
        samples=feeds.count, sha256=feeds.sha256(), held_out=data.held_out, made_up=feeds.made_up
    )


def own_version() -> str:
    """Return the installed version, or what a plain checkout is."""
    try:
        return version("fourfold")
    except PackageNotFoundError:
        return "checkout"


def _metric(wanted: Options, feeds: _Data) -> compare.Metric | None:
    """Return the metric asked for; labels alone ask for top1.

    Raises:
        DataError: The metric cannot be found, or a budget on it is set and there is none.
    """
    labels = feeds.check is not None and feeds.check.labels is not None
    asked = wanted.metric or ("top1" if labels else None)
    if asked is None and wanted.max_drop is not None:
        raise DataError("--max-drop needs a metric: give --metric, or labels in the check feeds")
    return compare.find_metric(asked) if isinstance(asked, str) else asked


def _hold_to_budget(
    reports: list[TargetReport], max_drop: float | None, artifact: Artifact
) -> None:
    """Raise when a variant loses more than it may."""
    for report in reports:
        drop = report.accuracy.drop if report.accuracy is not None else None
        if max_drop is None or drop is None or drop <= max_drop:
            continue
        assert report.accuracy is not None
        raise BudgetError(
            f"{report.target}: {report.accuracy.metric} drops by {drop:.3f}, {drop - max_drop:.3f} "
            f"more than the budget of {max_drop:g}; the artifact is in {artifact.folder}"
        )
