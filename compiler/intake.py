"""Takes in what a compile is given: options, the model, feeds and the metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from . import compare
from .artifact import sha256
from .budgets import Budgets
from .errors import DataError, ModelError, RecipeError, did_you_mean
from .external import data_files, external_tensors
from .feeds import Feeds, input_specs, made_up
from .model import load, refuse_non_finite, refuse_unsound, save
from .named import is_name
from .precision import Precision
from .recipe import Recipe
from .saved_plan import SavedPlan
from .signals import Signal, needs_data
from .split_plan import SplitWish

CALIBRATION_BATCH = 8
HOLD_OUT = 5  # every 5th sample checks when no check feeds are given


class Options(BaseModel):
    """What a compile may be told; the command line's options have the same names.

    Attributes:
        targets: Targets as text, e.g. `cpu` or `cpu{isa="avx2"}`.
        precision: `w8a8`, `w4a8`, `w2a8`, `w8` and so on for weights only, or `auto`: every weight
            gets the width that it deserves. None is `auto` under a budget, else `w8a8`.
        ranges: Where activation ranges come from; see `Precision`.
        effort: What is done so that outputs stay, 0 to 3; see `Precision`. None is 1 with data and
            0 without; an explicit 0 takes nothing from data, ranges included.
        recipe: A recipe instead of the target's own: a Recipe, its text, or the path of a .toml
            file. It alone decides the widths then.
        set: Other options for passes of the target's recipe, as text: `assign-bits{block=32}`.
        metric: `top1`, `module:function` or a function; scores outputs. Default: top1 if there are
            labels.
        max_drop: Budget on the metric's drop, in the metric's unit.
        max_size: Budget on the bytes of all files.
        max_latency: Budget on the seconds of one call with a batch of one.
        average_bits: Budget on stored code bits per quantizable weight.
        widths: Stored bits that `auto` may give a weight.
        split: How narrow weights are split by value: `auto` (SplitQuant, in the form that costs
            least), `kmeans` (16 values a channel), or a form with clusters, span and levels, e.g.
            `int8-grid,16,channel,levels=1`.
        signals: What tells `auto` how important a weight is; the first that predicts losses leads.
        method: How `auto` chooses: `milp`, or the papers' `greedy` order.
        plan: A plan.json to obey instead of deciding; formats in it may have been edited.
        jobs: Processes that measured importance may use; 0 takes a process a core.
        seed: Seed of everything that draws.
        memory: Bound in bytes on the activations held at once during calibration.
        threads: Threads of the runtime while latency is measured.
        stage: Copy a model of a linked store (Hugging Face cache) into the work folder first.
        force: Replace an older artifact under the same name.
        check: Whether to compare the variant with its source at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...] = ("cpu",)
    precision: str | None = None
    ranges: Literal["auto", "static", "dynamic"] = "auto"
    effort: Literal[0, 1, 2, 3] | None = None
    recipe: str | Path | InstanceOf[Recipe] | None = None
    set: str | None = None
    metric: str | Callable[..., float] | None = None
    max_drop: float | None = Field(None, allow_inf_nan=False)
    max_size: int | None = Field(None, ge=1)
    max_latency: float | None = Field(None, gt=0, allow_inf_nan=False)
    average_bits: float | None = Field(None, gt=0, allow_inf_nan=False)
    widths: tuple[Literal[2, 4, 8], ...] = Field((8, 4, 2), min_length=1)
    split: str | None = None
    signals: tuple[Signal, ...] = Field(("measured",), min_length=1)
    method: Literal["milp", "greedy"] = "milp"
    plan: str | Path | InstanceOf[SavedPlan] | None = None
    seed: int = Field(0, ge=0)
    memory: int = Field(1 << 30, ge=1)
    threads: int = Field(1, ge=1)
    jobs: int = Field(0, ge=0)
    stage: bool = False
    force: bool = False
    check: bool = True

    def budgets(self) -> Budgets:
        """Return the budgets."""
        return Budgets(self.max_drop, self.max_size, self.max_latency, self.average_bits)

    def widths_asked(self, data: bool) -> Precision:
        """Return the precision; a budget without one leaves the widths open.

        Args:
            data: Whether there are calibration feeds.

        Raises:
            RecipeError: It is no precision, or two of the options contradict each other.
        """
        said = (self.recipe, self.precision, self.split, self.set)
        if self.plan is not None and any(one is not None for one in said):
            raise RecipeError(
                "a plan says all: leave out --recipe, --precision, --split and --set"
            )
        if self.recipe is not None and self.set is not None:
            raise RecipeError("a recipe says its options itself: leave out --recipe or --set")
        if self.plan is not None:
            return self.with_effort(Precision(ranges=self.ranges, planned=True), data)
        given = self.recipe is not None
        text = self.precision or ("auto" if self.budgets().any and not given else "w8a8")
        asked = Precision.parse(text, self.ranges)
        if self.split is not None:
            asked = self._split(asked)
        if asked.widths:
            chosen = {"widths": self.widths, "signals": self.signals, "method": self.method}
            asked = asked.model_copy(update=chosen)
        return self.with_effort(asked, data)

    def with_effort(self, asked: Precision, data: bool) -> Precision:
        """Return the precision with its effort; an explicit 0 takes nothing from data.

        Raises:
            RecipeError: Effort 0 with static ranges, which are taken from data.
        """
        if self.effort != 0:
            effort = self.effort or (1 if data else 0)
            return asked.model_copy(update={"effort": effort})
        if self.ranges == "static":
            raise RecipeError("--effort 0 takes nothing from data, and --ranges static are")
        free = tuple(one for one in asked.signals if not needs_data(one))
        update = {"ranges": "dynamic", "signals": free or ("quantization-error",)}
        return asked.model_copy(update={**update, "effort": 0})

    def _split(self, asked: Precision) -> Precision:
        """Return the precision with its weights split."""
        if self.recipe is not None:
            raise RecipeError("a recipe says all: leave out --split, write split-layers into it")
        if not asked.widths and asked.weights > 4:
            raise RecipeError(
                f"--split with {asked}: 8-bit weights gain nothing by being split; ask for w2a8, "
                "w4a8, w2 or w4, or write split-layers into a recipe"
            )
        return asked.model_copy(update={"split": SplitWish.parse(str(self.split))})


@dataclass(frozen=True)
class Source:
    """The model that came in, and the file that a runtime opens for it."""

    name: str
    model: ir.Model
    path: Path
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Data:
    """Feeds of one compile."""

    calibration: Feeds | None
    check: Feeds | None
    held_out: bool


def read_options(given: dict[str, Any]) -> Options:
    """Check options.

    Raises:
        RecipeError: An unknown option, or a value of the wrong type or size.
    """
    for name in sorted(set(given) - set(Options.model_fields)):
        raise RecipeError(
            f"compile has no option {name!r}{did_you_mean(name, Options.model_fields)}"
        )
    try:
        return Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise RecipeError(f"option {name} = {given[name]!r}: {first['msg'].lower()}") from None


def read_source(model: str | Path | ir.Model | onnx.ModelProto, work: Path, stage: bool) -> Source:
    """Load or export the model; what came from memory is written to a file for the runtime."""
    path, name = None, "model"
    if isinstance(model, str) and is_name(model):
        from .export import from_text

        name, loaded = model, from_text(model)
    elif isinstance(model, str | Path):
        path, name, staged = Path(model), Path(model).name, work / "staged"
        loaded = load(path, stage=staged if stage else None)
        if staged.is_dir():  # the runtime opens the copies too
            path = next(staged.iterdir()) / name
    elif isinstance(model, onnx.ModelProto):
        loaded = _from_proto(model)
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
    return Source(name, loaded, path, digest, sum(file.stat().st_size for file in files))


def _from_proto(proto: onnx.ModelProto) -> ir.Model:
    """Return the model of a proto that carries its weights.

    Raises:
        ModelError: A malformed proto, or one whose weights lie in files.
    """
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises whatever a malformed field leads to
        raise ModelError(f"the ModelProto is not a sound ONNX model: {error}") from error
    for tensor in external_tensors(model):
        raise ModelError(
            f"the ModelProto keeps {tensor.name!r} in the file {str(tensor.location)!r}, and does "
            "not say where that is; give the path of the model file, or load it with its data"
        )
    return model


def read_feeds(model: ir.Model, data: Any, check_data: Any, wanted: Options, work: Path) -> Data:
    """Read feeds, and hold out a part of them when nothing else can check."""
    inputs = input_specs(model)
    calibration = None
    if data is not None:
        calibration = Feeds.read(data, inputs, CALIBRATION_BATCH, folder=work)
    if not wanted.check:
        return Data(calibration, None, True)
    if check_data is not None:
        return Data(
            calibration, Feeds.read(check_data, inputs, CALIBRATION_BATCH, folder=work), True
        )
    if calibration is None:
        return Data(None, made_up(inputs, wanted.seed, 8), True)
    if calibration.count < HOLD_OUT:
        return Data(calibration, calibration, False)
    kept, held = calibration.split(HOLD_OUT)
    return Data(kept, held, True)


def find_metric(wanted: Options, feeds: Data) -> compare.Metric | None:
    """Return the metric asked for; labels alone ask for top1.

    Raises:
        DataError: The metric cannot be found, or a budget on it is set and there is none, or
            nothing is checked at all.
    """
    measured = (wanted.metric, wanted.max_drop, wanted.max_latency)
    if not wanted.check and any(one is not None for one in measured):
        raise DataError(
            "a metric, --max-drop and --max-latency need the check: leave out --no-check"
        )
    labels = feeds.check is not None and feeds.check.labels is not None
    asked = wanted.metric or ("top1" if labels else None)
    if asked is None and wanted.max_drop is not None:
        raise DataError("--max-drop needs a metric: give --metric, or labels in the check feeds")
    return compare.find_metric(asked) if isinstance(asked, str) else asked
