"""Decides the format of every weight and activation, by one width for all.

before:  ranges on values
becomes: Note(format, mode, why) on every weight, every quantized activation, and the output of
         every node that stays float with the reason

Which forms are legal is the target's to say; this pass never edits the graph.
"""

from __future__ import annotations

import re

import onnx_ir as ir
from pydantic import Field

from ..compiler import notes, regions
from ..compiler.contract import Context, Pass
from ..compiler.errors import RecipeError
from ..compiler.formats import Format, PerAxis, PerTensor
from ..compiler.graph import Weight, activations_of, weight_of


class AssignBits(Pass):
    """Give every weight one width and every activation eight bits or none.

    Attributes:
        weights: Bits of a weight.
        activations: `auto` (static where the range is accurate, else dynamic), `static`,
        `dynamic`,
            or `float` for weight-only.
        floor_db: Expected SQNR in dB under which `auto` does not trust a static range.
        keep: Regular expressions; nodes whose whole name matches one stay float.
        embeddings: Whether embedding tables are quantized too.
    """

    weights: int = Field(8, ge=2, le=8)
    activations: str = Field("auto", pattern="^(auto|static|dynamic|float)$")
    floor_db: float = 15.0
    keep: tuple[str, ...] = ()
    embeddings: bool = True

    def run(self, model: ir.Model, context: Context) -> int:
        """Write the plan; return how many values have a decision."""
        before = notes.plan(model)
        keep = self._kept(model)
        if self.activations == "float":
            self._weight_only(model, context, keep)
        else:
            self._integer(model, context, keep)
        if self.embeddings:
            self._tables(model, context, keep)
        after = notes.plan(model)
        return sum(1 for name, note in after.items() if note != before.get(name))

    def _kept(self, model: ir.Model) -> frozenset[str]:
        """Return the names of nodes to keep float.

        Raises:
            RecipeError: An expression matches no node, or is none.
        """
        names = [str(node.name) for node in model.graph if node.name]
        kept: set[str] = set()
        for expression in self.keep:
            try:
                hits = [name for name in names if re.fullmatch(expression, name)]
            except re.error as error:
                raise RecipeError(
                    f"assign-bits: keep={expression!r} is no expression: {error}"
                ) from None
            if not hits:
                raise RecipeError(
                    f"assign-bits: keep={expression!r} matches no node name, e.g. {names[:3]}"
                )
            kept |= set(hits)
        return frozenset(kept)

    def _weight_only(self, model: ir.Model, context: Context, keep: frozenset[str]) -> None:
        """Plan weights in codes that are widened before the kernel."""
        for node in model.graph:
            weight = weight_of(node)
            if weight is None or node.op_type == "Gather":
                continue
            format = regions.weight_format(node, self.weights, context.capability, "float")
            if format is None or node.name in keep:
                reason = "kept as asked" if format else "no legal weight-only form"
                notes.write(weight.value, mode="float", why=reason)
            else:
                self._plan_weight(weight, format, "weights only: activations stay float", context)

    def _integer(self, model: ir.Model, context: Context, keep: frozenset[str]) -> None:
        """Plan the integer regions."""
        found = regions.find(model, context.capability, self.weights, keep)
        code = Format(context.capability.activation)
        for node in found.integer.values():
            weight = weight_of(node)
            if weight is None:
                continue
            format = regions.weight_format(node, self.weights, context.capability, code.dtype)
            assert format is not None  # regions.find asked the same question
            self._plan_weight(weight, format, f"finest legal form of {node.op_type}", context)
        _part_clips(found, context)
        _join_ranges(found)
        for name, value in found.quantized.items():
            self._plan_activation(value, code, found, context, name)
        for node in model.graph:
            for output in node.outputs:
                if output.name in found.why_float:
                    self._plan_float(node, output, found, context)

    def _plan_weight(self, weight: Weight, format: Format, why: str, context: Context) -> None:
        """Write a weight's format; two readers that want different axes get one scale for all."""
        planned = notes.read(weight.value).format
        if planned is not None and planned.granularity != format.granularity:
            format = Format(format.dtype, PerTensor(), format.bits)
            why = "read along two different axes, so one scale serves the whole tensor"
            context.remark(self, weight.value.name, why)
        notes.write(weight.value, format=format, mode="static", why=why)

    def _plan_activation(
        self, value: ir.Value, code: Format, found: regions.Regions, context: Context, name: str
    ) -> None:
        """Choose static or dynamic for one activation."""
        root = found.root(name)
        dynamic_legal = root == name and _readers_take_dynamic(value, found, context)
        note = notes.read(value)
        shares = root if root != name else None
        if self.activations == "dynamic" or (self.activations == "auto" and dynamic_legal):
            sqnr = note.sqnr_db
            unsure = sqnr is None or sqnr < self.floor_db
            if dynamic_legal and (self.activations == "dynamic" or unsure):
                why = (
                    "asked for"
                    if self.activations == "dynamic"
                    else f"static range gives {sqnr} dB"
                )
                notes.write(value, format=code, mode="dynamic", why=f"range at run time: {why}")
                return
        if note.low is None:
            notes.write(value, mode="float", why="no range: not calibrated, and no dynamic form")
            context.remark(
                self, name, "stays float: it has no calibrated range and no dynamic form"
            )
            return
        why = (
            f"takes the scale of {shares}" if shares else f"calibrated, {note.sqnr_db} dB expected"
        )
        notes.write(value, format=code, mode="static", shares=shares, why=why)

    def _plan_float(
        self, node: ir.Node, output: ir.Value, found: regions.Regions, context: Context
    ) -> None:
        """Write why a node stays float on its output and its weight, and tell of the weight."""
        reason = found.why_float[str(output.name)]
        weight = weight_of(node)
        homes = (
            [weight.value] if weight is not None and notes.read(weight.value).mode is None else []
        )
        if output.name not in found.quantized:  # else an integer reader has planned it
            homes.append(output)
        for value in homes:
            notes.write(value, mode="float", why=f"{node.op_type}: {reason}")
        if weight is not None:
            context.remark(self, node.name, f"{node.op_type} stays float: {reason}")

    def _tables(self, model: ir.Model, context: Context, keep: frozenset[str]) -> None:
        """Plan embedding tables: one scale a row, gathered with it."""
        for node in model.graph:
            weight = weight_of(node) if node.op_type == "Gather" else None
            if weight is None or node.name in keep:
                continue
            dtype, used = regions.container(self.weights)
            format = Format(dtype, PerAxis(0), used)
            if context.capability.legal("Gather", format, "float"):
                self._plan_weight(weight, format, "embedding: one scale a row", context)


def _part_clips(found: regions.Regions, context: Context) -> None:
    """Let no Relu or Clip share a scale whose range goes below zero.

    The runtime folds them into a quantizer only where the zero point is the least code. What they
    part from is a Concat, whose kernel can rescale its operands.
    """

    def low(name: str) -> float:
        return notes.read(found.quantized[name]).low or 0.0

    def clips(name: str) -> bool:
        producer = found.quantized[name].producer()
        return producer is not None and producer.op_type in context.capability.fuses

    below = {found.root(name) for name in found.quantized if low(name) < 0}
    for name, shared in list(found.shares.items()):
        if found.root(name) in below and (clips(name) or (clips(shared) and low(name) < 0)):
            del found.shares[name]


def _join_ranges(found: regions.Regions) -> None:
    """Give the root of every group that shares a scale the union of the group's ranges."""
    for name in found.shares:
        root, member = found.quantized.get(found.root(name)), found.quantized.get(name)
        if root is None or member is None:
            continue
        ours, theirs = notes.read(root), notes.read(member)
        if ours.low is None or theirs.low is None:
            continue
        low, high = min(ours.low, theirs.low), max(ours.high or 0.0, theirs.high or 0.0)
        notes.write(root, low=low, high=high)


def _readers_take_dynamic(value: ir.Value, found: regions.Regions, context: Context) -> bool:
    """Whether every integer reader of a value can take its range at run time."""
    if value.name in found.codes:
        return False
    readers = [use.node for use in value.uses() if found.runs(use.node)]
    rows = [
        row for node in readers for row in context.capability.rows_of(node.op_type) if row.weights
    ]
    weighted = all(
        weight_of(node) is not None and len(activations_of(node)) == 1 for node in readers
    )
    return bool(rows) and weighted and all(row.dynamic for row in rows)
