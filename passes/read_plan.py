"""Puts a saved plan's notes back on the values that they were about.

before:  values without notes
becomes: every note of plan.json: formats, ranges, importance, as they were written or edited

`assign-bits{method="plan"}` then checks the forms and derives the integer regions from them. The
plan comes with the context (`--plan plan.json`), so that a recipe holds no path.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import onnx_ir as ir

from ..compiler import notes
from ..compiler.contract import Context, Pass


class ReadPlan(Pass):
    """Write the notes of a saved plan."""

    decides: ClassVar[bool] = True

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for a plan."""
        if context.plan is None:
            yield "there is no plan; pass --plan plan.json"

    def run(self, model: ir.Model, context: Context) -> int:
        """Write every note; return how many values changed."""
        assert context.plan is not None
        before = notes.plan(model)
        notes.apply_plan(model, context.plan)
        after = notes.plan(model)
        return sum(1 for name, note in after.items() if note != before.get(name))
