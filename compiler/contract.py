"""The two contracts: a Pass rewrites or decides, a Target emits and runs.

Both are frozen pydantic models whose fields are their options, so that an unknown or ill-typed
option is refused before anything runs. The name of either is the name of its file, with hyphens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy.typing as npt
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from .capability import Capability
from .errors import UnsupportedError

if TYPE_CHECKING:
    from .choices import Choice
    from .cost_table import CostTable
    from .costs import Cost, Workload
    from .feeds import Feeds
    from .precision import Precision
    from .recipe import Recipe

Arrays = Mapping[str, npt.NDArray[Any]]
Runner = Callable[[Arrays], dict[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Remark:
    """A refusal or choice, with the thing it is about; shown by `fourfold explain`."""

    source: str
    subject: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """How the bits of one plan were chosen.

    Attributes:
        method: How: uniform, milp, greedy or plan.
        signal: The signal that predicted the losses, or None.
        loss_kind: `mse` (noise power over signal power of the outputs) or `kl` (nats).
        average_bits: Stored code bits per weight element, scales left out.
        predicted_loss: Sum of the predicted losses; None where the signal predicts no loss of the
            outputs.
        measured_loss: Loss of the whole plan on calibration feeds, or None.
        first_loss: The same before any repair.
        repairs: Exchanges that lowered the measured loss.
        trials: Whole plans that were measured.
        predicted_seconds: Sum of the weighted nodes' seconds, or None.
        cost_source: Where these seconds come from.
    """

    method: str
    average_bits: float
    signal: str | None = None
    loss_kind: str | None = None
    predicted_loss: float | None = None
    measured_loss: float | None = None
    first_loss: float | None = None
    repairs: tuple[str, ...] = ()
    trials: int = 0
    predicted_seconds: float | None = None
    cost_source: str | None = None


class Progress(Protocol):
    """Wraps an iterable so that a person can watch it; the default watches nothing."""

    def __call__(
        self, steps: Iterable[Any], title: str, total: int | None = None
    ) -> Iterable[Any]:
        """Yield the steps unchanged."""
        ...


def silent(steps: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
    """Show no progress."""
    return steps


@dataclass(frozen=True)
class Context:
    """What a pass may know beside the model.

    Attributes:
        capability: What the target can run.
        folder: Work folder; gone after the compile.
        feeds: Calibration feeds, or None.
        seed: Seed for whatever draws numbers.
        memory: Bound in bytes on activations held at once.
        progress: Shows long steps.
        remarks: Where `remark` collects.
        cost: What a workload costs in one of its forms on the target, or None.
        plan: A plan to obey instead of deciding anew: value name -> fields of its note.
        jobs: Processes for work that can be shared out.
        decisions: Where passes put how they chose.
        floats: Where the float model is kept; see `float_model`.
    """

    capability: Capability
    folder: Path
    feeds: Feeds | None = None
    seed: int = 0
    memory: int = 1 << 30
    progress: Progress = silent
    remarks: list[Remark] = field(default_factory=list)
    cost: Callable[[Workload, Choice], Cost] | None = None
    plan: Mapping[str, Mapping[str, Any]] | None = None
    jobs: int = 1
    decisions: list[Decision] = field(default_factory=list)
    floats: list[ir.Model] = field(default_factory=list)

    def float_model(self, model: ir.Model) -> ir.Model:
        """Return the model as it was before anything was lost; the first call keeps it.

        A pass that loses anything calls this before it edits; a pass that makes up for what was
        lost compares with it. Values are the same where names are. Weights are shared.
        """
        if not self.floats:
            self.floats.append(model.clone())
        return self.floats[0]

    def remark(self, source: Pass, subject: str | None, reason: str) -> None:
        """Record why a pass did or did not do something to `subject`."""
        self.remarks.append(Remark(source.name, subject or "", reason))


class Option(BaseModel):
    """What passes and targets share: frozen options that print as text."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """The file's name with hyphens."""
        return type(self).__module__.rpartition(".")[2].replace("_", "-")

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, as plain data."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def __str__(self) -> str:
        options = " ".join(f"{k}={_text(v)}" for k, v in self.changed().items())
        return f"{self.name}{{{options}}}" if options else self.name


def _text(value: Any) -> str:
    """Print an option so that the recipe's parser reads it back."""
    return json.dumps(value, separators=(",", ":"))


class Pass(Option, ABC):
    """One rewrite or one decision.

    `run` edits the model in place and returns how many places changed; `requires` yields a line
    for every need that is not met. A pass holds no state beside its options.
    """

    kind: ClassVar[str] = "passes"
    decides: ClassVar[bool] = False  # whether it writes notes, that is: a part of the plan

    @abstractmethod
    def run(self, model: ir.Model, context: Context) -> int:
        """Edit `model` in place; return how many places changed (0: nothing to do)."""

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Yield what is missing for this pass to run."""
        return ()


@dataclass(frozen=True)
class Placement:
    """Which kernels the runtime really ran.

    Attributes:
        kernels: Kernel (op type) -> number of nodes, of the graph as the runtime executes it.
        stayed_float: Name of a source node with a weight -> why it ran in float.
        weight_bytes: Bytes of all constants of that graph: what they take in memory, narrow
            weights unpacked; None where it is not known.
    """

    kernels: dict[str, int]
    stayed_float: dict[str, str]
    weight_bytes: int | None = None


@dataclass(frozen=True)
class Emitted:
    """What a target wrote: the file to open, and every file that the runtime needs."""

    entry: Path
    files: tuple[Path, ...]


class Target(Option, ABC):
    """One runtime or chip."""

    kind: ClassVar[str] = "targets"

    @property
    @abstractmethod
    def capability(self) -> Capability:
        """What this target can run, for the machine class in its options."""

    @abstractmethod
    def recipe(self, precision: Precision) -> Recipe:
        """Return the default passes for a precision."""

    def reference(self) -> tuple[Pass, ...]:
        """Return passes that let onnxruntime CPU run a source that it refuses as it came."""
        return ()

    @abstractmethod
    def cost(self, workload: Workload, choice: Choice) -> Cost:
        """Return the stored bytes of the weight in that form, and the seconds of one call."""

    def profile(
        self, workloads: Sequence[Workload], folder: Path, progress: Progress = silent
    ) -> CostTable:
        """Measure every form of these workloads (none: a grid of common ones) on this machine.

        The table is kept under the cache folder, so that `cost` finds it from then on.

        Args:
            workloads: What to measure.
            folder: An existing folder for the models that are timed.
            progress: Shows the steps.

        Raises:
            UnsupportedError: This target cannot be timed here.
        """
        raise UnsupportedError(f"target {self.name} has no profile: its costs are computed")

    @abstractmethod
    def unsupported(self, model: ir.Model) -> list[str]:
        """Return a line for everything in the model that this target cannot run."""

    @abstractmethod
    def emit(self, model: ir.Model, folder: Path) -> Emitted:
        """Write the variant into an empty folder."""

    @abstractmethod
    def placement(self, model: ir.Model, entry: Path) -> Placement:
        """Load what `emit` wrote of `model` and say which kernels the runtime makes of it."""

    @abstractmethod
    def open(self, entry: Path, threads: int = 1) -> Runner:
        """Load a variant into the real runtime; the callable maps feeds to outputs by name.

        Raises:
            UnsupportedError: The runtime is not installed or refuses the variant.
        """

    def missing(self) -> str | None:
        """Return the extra to install when this target's runtime is absent, else None."""
        return None
