"""Decides where each activation's range comes from, given which nodes run in integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from . import notes, regions
from .contract import Context, Pass
from .errors import RecipeError
from .formats import Format
from .graph import activations_of, values, weight_of, weights_of


@dataclass(frozen=True)
class Activations:
    """How activations are planned.

    Attributes:
        mode: `auto` (static where the range is accurate, else dynamic), `static` or `dynamic`.
        floor_db: Expected SQNR in dB under which `auto` does not trust a static range.
        wanted: Value name -> the mode that a plan made by hand asks for.
    """

    mode: str
    floor_db: float
    wanted: Mapping[str, str]

    def write(
        self, source: Pass, model: ir.Model, found: regions.Regions, context: Context
    ) -> None:
        """Write the note of every activation that is quantized and of every node that is not.

        Args:
            source: The pass on whose behalf remarks are made.
            model: The model, with the notes of its weights written.
            found: Its integer regions.
            context: The target's capability, and where remarks go.
        """
        _part_clips(found, context)
        _join_ranges(found)
        for value in found.quantized.values():
            self._plan(source, value, found, context)
        for node in model.graph:
            for output in node.outputs:
                if output.name in found.why_float:
                    _plan_float(source, node, output, found, context)
        for name, mode in self.wanted.items():
            if name not in found.quantized and mode != "float":
                context.remark(source, name, f"the plan's {mode} has no integer kernel beside it")

    def _plan(
        self, source: Pass, value: ir.Value, found: regions.Regions, context: Context
    ) -> None:
        """Choose static or dynamic for one activation."""
        name, code = str(value.name), Format(context.capability.activation)
        root = found.root(name)
        dynamic_legal = root == name and _readers_take_dynamic(value, found, context)
        mode = self._mode(name, dynamic_legal)
        note = notes.read(value)
        shares = root if root != name else None
        if mode == "dynamic" or (mode == "auto" and dynamic_legal):
            sqnr = note.sqnr_db
            unsure = sqnr is None or sqnr < self.floor_db
            if dynamic_legal and (mode == "dynamic" or unsure):
                why = "asked for" if mode == "dynamic" else f"static range gives {sqnr} dB"
                notes.write(value, format=code, mode="dynamic", why=f"range at run time: {why}")
                return
        if note.low is None:
            notes.write(value, mode="float", why="no range: not calibrated, and no dynamic form")
            context.remark(
                source, name, "stays float: it has no calibrated range and no dynamic form"
            )
            return
        why = (
            f"takes the scale of {shares}" if shares else f"calibrated, {note.sqnr_db} dB expected"
        )
        notes.write(value, format=code, mode="static", shares=shares, why=why)

    def _mode(self, name: str, dynamic_legal: bool) -> str:
        """Return the mode that a plan asks for, or the general one.

        Raises:
            RecipeError: The plan asks for what no kernel can do.
        """
        wanted = self.wanted.get(name, self.mode)
        if name in self.wanted and wanted == "float":
            raise RecipeError(
                f"plan: activation {name!r} is read by an integer kernel and cannot be float; "
                "set the mode of that kernel's weight to float"
            )
        if name in self.wanted and wanted == "dynamic" and not dynamic_legal:
            raise RecipeError(
                f"plan: activation {name!r} cannot be dynamic: one of its kernels needs a fixed "
                "scale; set its mode to static"
            )
        return wanted


def _plan_float(
    source: Pass, node: ir.Node, output: ir.Value, found: regions.Regions, context: Context
) -> None:
    """Write why a node stays float on its output and its weight, and tell of the weight."""
    reason = found.why_float[str(output.name)]
    weight = weight_of(node)
    homes = [weight.value] if weight is not None and notes.read(weight.value).mode is None else []
    if output.name not in found.quantized:  # else an integer reader has planned it
        homes.append(output)
    for value in homes:
        notes.write(value, mode="float", why=f"{node.op_type}: {reason}")
    if weight is not None:
        context.remark(source, node.name, f"{node.op_type} stays float: {reason}")


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


def forgotten(model: ir.Model) -> dict[str, notes.Note]:
    """Return what a plan says of each activation, and take it off, to be decided anew."""
    weights = {id(value) for value in weights_of(model)}
    wanted = {}
    for value in values(model):
        note = notes.read(value)
        if id(value) not in weights and note.mode is not None:
            wanted[str(value.name)] = note
            notes.write(value, format=None, mode=None, shares=None, why=None)
    return wanted


def without_form(name: str, found: regions.Regions, context: Context) -> bool:
    """Whether a value has no range, and a kernel beside it takes none at run time."""
    value = found.quantized.get(name)
    if value is None or notes.read(value).low is not None:
        return False
    kernels = [use.node.op_type for use in value.uses() if found.runs(use.node)]
    rows = [row for op_type in kernels for row in context.capability.rows_of(op_type)]
    at_run_time = bool(rows) and all(row.dynamic for row in rows)
    return name in found.codes or found.root(name) != name or not at_run_time


def keep_words(model: ir.Model, wanted: Mapping[str, notes.Note]) -> None:
    """Give an activation that became what its plan says the plan's reason, where that still fits.

    Why a range is taken at run time, or why a node stays float, may lie in what the plan's own
    recipe asked for.
    """
    for value in values(model):
        old, new = wanted.get(str(value.name)), notes.read(value)
        if old is None or old.why is None or old.mode != new.mode:
            continue
        if old.mode == "float" or (old.mode == "dynamic" and "at run time" in old.why):
            notes.write(value, why=old.why)
