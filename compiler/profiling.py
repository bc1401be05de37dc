"""Measures a target's cost table on this machine: for one model's own shapes, or a common grid."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import runner
from .choices import FLOAT_BITS, open_weights
from .contract import Context, Progress, Target, silent
from .cost_table import FLOAT, CostTable
from .costs import Workload
from .feeds import Feeds, input_specs
from .intake import Options, read_source
from .lookup import make_target
from .precision import Precision
from .recipe import Recipe
from .shapes import operand_shapes


@dataclass(frozen=True)
class Profile:
    """What was measured, and the part of it that was asked for.

    Attributes:
        table: The machine's whole table.
        workloads: The model's workloads, or all of the table's.
    """

    table: CostTable
    workloads: tuple[Workload, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the machine, and a row a workload with seconds by form."""
        rows = []
        for workload in self.workloads:
            entries = self.table.entries.items()
            found = {form: seconds for (work, form), seconds in entries if work == workload}
            rows.append(
                {
                    "op": workload.op_type,
                    "weight": list(workload.weight),
                    "input": list(workload.input),
                    "attributes": dict(workload.attributes),
                    "seconds": dict(sorted(found.items(), key=lambda item: item[0] != FLOAT)),
                }
            )
        table = self.table
        head = {"machine": table.machine, "runtime": table.runtime, "isa": table.isa}
        return {**head, "workloads": rows}


def profile(
    target: str = "cpu",
    model: str | Path | None = None,
    data: Any = None,
    progress: Progress = silent,
) -> Profile:
    """Measure what is missing in the machine's table, and keep it for later compiles.

    Args:
        target: The target as text.
        model: Whose shapes are measured, with a batch of one; None takes a grid of common ones.
        data: Feeds for open axes: the sample of median size tells their lengths; without them 32.
        progress: Shows the steps.

    Raises:
        UnsupportedError: The target cannot be timed on this machine.
        ModelError: The model cannot be read.
        DataError: The feeds cannot be used, or the table cannot be kept.
    """
    one = make_target(target)
    with tempfile.TemporaryDirectory(prefix="fourfold-profile-") as folder:
        work = Path(folder)
        workloads = () if model is None else workloads_of(one, model, data, work)
        table = one.profile(workloads, work, progress)
    measured = {workload for workload, _ in table.entries}
    wanted = workloads or tuple(dict.fromkeys(workload for workload, _ in table.entries))
    return Profile(table, tuple(workload for workload in wanted if workload in measured))


def workloads_of(target: Target, model: str | Path, data: Any, work: Path) -> tuple[Workload, ...]:
    """Return each workload of a model once, after the target's exact rewrites."""
    source = read_source(model, work, stage=False)
    inputs = input_specs(source.model)
    feeds = Feeds.read(data, inputs, folder=work) if data is not None else None
    context = Context(target.capability, work, feeds, Options().seed)
    widths = (*Options().widths, FLOAT_BITS)
    first, _, _ = target.recipe(Precision(widths=widths)).parts()
    exact = Recipe(tuple(one for one in first.passes if not one.decides))
    rewritten, _ = runner.run(exact, source.model, context)
    weights = open_weights(rewritten, target.capability, widths, "any")
    shapes = operand_shapes(rewritten, weights, context)
    readers = [reader for one in weights for reader in one.readers]
    found = (Workload.of(reader, shapes[str(reader.node.name)]) for reader in readers)
    return tuple(dict.fromkeys(found))
