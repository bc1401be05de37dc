"""The way of a model from a file to a checked artifact; `compile` reads from top to bottom."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from . import runner
from .artifact import REPORT, Artifact, fresh, seal, write_json
from .budgets import hold
from .contract import Progress, Target, silent
from .errors import RecipeError
from .feeds import Feeds
from .intake import (
    Data,
    Options,
    Source,
    find_metric,
    read_feeds,
    read_options,
    read_source,
)
from .lookup import make_target
from .recipe import Recipe
from .report import (
    FeedsRow,
    Report,
    SourceRow,
)
from .saved_plan import SavedPlan
from .variant import Made, Variant

PACKAGES = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


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
        BudgetError: A budget is missed; where a variant could be made, the artifact is there.
        BrokenPassError: A pass broke the model.
    """
    wanted = read_options(options)
    targets = [make_target(text) for text in wanted.targets]
    if not targets or len({t.name for t in targets}) < len(targets):
        raise RecipeError(f"name each target once, at least one; got {list(wanted.targets)}")
    precision = wanted.widths_asked(data is not None)
    recipes = [_recipe(wanted.recipe, target) for target in targets]
    saved = [_plan(wanted, target) for target in targets]
    with fresh(Path(out), wanted.force) as (build, work):
        source = read_source(model, work, wanted.stage)
        feeds = read_feeds(source.model, data, check_data, wanted, work)
        metric = find_metric(wanted, feeds)
        made: dict[str, Made] = {}
        for target, recipe, plan in zip(targets, recipes, saved, strict=True):
            one = Variant(
                target,
                plan.recipe(target.recipe(precision)) if plan is not None else recipe,
                precision,
                wanted.budgets(),
                source,
                feeds,
                metric,
                wanted,
                build,
                work,
                progress,
                plan,
            )
            made[target.name] = one.compile()
        _write(build, source, feeds, wanted, made)
    artifact = Artifact(Path(out))
    hold([one.report for one in made.values()], wanted.budgets(), artifact.folder)
    return artifact


def _plan(wanted: Options, target: Target) -> SavedPlan | None:
    """Return the plan to obey for one target, if one was given."""
    if wanted.plan is None:
        return None
    if isinstance(wanted.plan, SavedPlan):
        return wanted.plan
    return SavedPlan.read(Path(wanted.plan), target.name)


def _recipe(given: Recipe | str | Path | None, target: Target) -> Recipe | None:
    """Return the recipe asked for; None leaves it to the target."""
    if given is None:
        return None
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str) and not given.endswith(".toml"):
        return Recipe.parse(given)
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {given}: {error}") from None
    return Recipe.from_toml(text)


def _write(
    build: Path, source: Source, feeds: Data, wanted: Options, made: Mapping[str, Made]
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
        targets=tuple(one.report for one in made.values()),
    )
    write_json(build / REPORT, report.to_json())
    plans = {name: one.plan.as_json() for name, one in made.items()}
    write_json(build / "plan.json", plans, sort=False)  # graph order is the plan's order
    for name, one in made.items():
        (build / name / "recipe.toml").write_text(one.recipe.to_toml())
    seal(
        build,
        {
            "fourfold": own_version(),
            "versions": versions,
            "seed": wanted.seed,
            "source": {"name": source.name, "sha256": source.sha256},
            "calibration": feeds.calibration.sha256() if feeds.calibration else None,
            "variants": {n: str(one.entry.relative_to(build)) for n, one in made.items()},
        },
    )


def _feeds_row(feeds: Feeds | None, data: Data) -> FeedsRow | None:
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
