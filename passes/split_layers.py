"""Splits weights by value, so that each part is rounded in a narrow range of its own (SplitQuant).

before:  MatMul(x, w)        note on w: uint2 per_axis(1) split(branches,3,per_tensor,zero)
becomes: Add(Add(MatMul(x, w1), MatMul(x, w2)), MatMul(x, w3))     w = w1 + w2 + w3, each uint2
before:  MatMul(x, w)        note on w: uint2 per_axis(1) split(codebook,3,per_tensor)
becomes: MatMul(x, w')       w' is the sum of the rounded parts; of form int8-grid and nearest
                             w' is planned as int8 and int4 in blocks, for round-weights

Weights without a plan become branches of floats, which compute the same as before. Weights in a
plan are split as their format says, or as the options ask. `pack-tables` stores the few values of
a codebook or a grid as indices and a table.
Source: J. Song and F. Lin, SplitQuant (arXiv 2501.12428); docs/splitting.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler import constants, notes
from ..compiler.branches import branch
from ..compiler.choices import Choice
from ..compiler.contract import Context, Pass
from ..compiler.formats import Format, Split
from ..compiler.graph import WEIGHTED, Weight, readers_of, weights_of
from ..compiler.histogram import Histogram
from ..compiler.observe import Observer
from ..compiler.quantizers import Floats
from ..compiler.rounding import Clip, rounded
from ..compiler.split_plan import Over, SplitWish
from ..compiler.splitting import Channels, Ids, joined, masked, parts_of, rounded_to, sqnr_db
from ..compiler.weights import opened


class SplitLayers(Pass):
    """Split weights into parts by value.

    Attributes:
        form: `planned` obeys each weight's format, and makes branches of weights without a plan;
            branches, codebook, int8-grid or nearest split every planned weight in that form.
        clusters: Parts of a weight at most.
        over: What one clustering spans: `tensor` (the paper's), `channel` or `block`.
        block: Neighbours along the axis that is summed over that make a block.
        levels: Values of a part; 0 takes as many as the format's bits have codes, 1 makes a
            k-means table.
        zero: Whether each part's range holds zero in a table too, as it must in branches.
        clip: How the range of a part that holds zero is chosen; give `round-weights` the same.
        biases: `first` leaves an operator's bias to the first branch, `split` splits it as well.
    """

    form: Literal["planned", "branches", "codebook", "int8-grid", "nearest"] = "planned"
    clusters: int = Field(3, ge=2, le=255)
    over: Over = "tensor"
    block: int = Field(32, ge=2)
    levels: int = Field(0, ge=0, le=256)
    zero: bool = False
    clip: Clip = "auto"
    biases: Literal["first", "split"] = "first"

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for a plan where the form rounds."""
        planned = any(notes.read(value).format is not None for value in weights_of(model))
        if self.form not in ("planned", "branches") and not planned and weights_of(model):
            yield f"form {self.form} rounds weights, and none is planned; put assign-bits before"
        if context.plan is not None and context.feeds is None:
            branching = next(
                (v for v in weights_of(model) if _branches_in_codes(v, context)), None
            )
            if branching is not None:
                yield (
                    f"the plan has branches of {branching.name} that write codes, whose ranges "
                    "take calibration feeds; pass --data FILE, as when the plan was made"
                )

    def run(self, model: ir.Model, context: Context) -> int:
        """Split every weight once; return how many."""
        homes = weights_of(model)
        unplanned = all(notes.read(v).mode is None or notes.read(v).part for v in homes)
        changed = 0
        fresh: list[ir.Value] = []
        asked = [(v, self._format(v, readers_of(v), unplanned, context)) for v in homes]
        # Branches compute what their layer did, so they come before anything is lost.
        asked.sort(key=lambda one: _is_rounded(one[1]))
        for value, format in context.progress(asked, "split layers", len(asked)):
            if format is None:
                continue
            if _is_rounded(format):
                context.float_model(model)
            made = self._split(model.graph, _Weight(value, readers_of(value)), format, context)
            changed += made is not None
            fresh += made or []
        _give_ranges(model, fresh, context)
        return changed

    def _format(
        self, value: ir.Value, readers: Sequence[Weight], unplanned: bool, context: Context
    ) -> Format | Split | None:
        """Return what the weight's parts become (a bare split: they stay float), or None."""
        note = notes.read(value)
        if note.split is not None or note.part is not None:
            return None  # it has been split, or is a part
        form = "branches" if self.form == "planned" else self.form
        wish = SplitWish(form, self.clusters, self.over, self.block, self.levels, self.zero)
        found: Format | Split | str | None = note.format
        if note.format is None and unplanned and form == "branches":
            split = Split("branches", self.clusters, wish.span(readers), zero=True)
            found = wish.refusal(readers) or split
        elif note.format is not None and note.format.split is None:
            choice = Choice(note.format, note.activation or "float")
            planned = self.form == "planned"
            found = None if planned else wish.of(readers, choice, context.capability)
        if isinstance(found, str):
            context.remark(self, value.name, f"not split: {found}")
            return None
        return found

    def _split(
        self, graph: ir.Graph, one: _Weight, format: Format | Split, context: Context
    ) -> list[ir.Value] | None:
        """Split one weight; return new values that leave kernels in codes, or None if left whole.

        A remark says what came of it.
        """
        split = format.split if isinstance(format, Format) else format
        assert split is not None
        reason, told = one.unfit(), ""
        ids = one.parts(split) if not reason else np.zeros(0, np.uint8)
        parts = list(masked(one.whole, ids)) if split.form == "branches" and not reason else []
        floats = None
        if not reason and (not ids.any() or (split.form == "branches" and len(parts) < 2)):
            reason = "it has one part only"
        if (
            not reason
            and parts
            and _writes_codes(one.value, one.readers, context)
            and context.feeds is None
        ):
            reason = "its branches' outputs need ranges, and there are no feeds to take them from"
        if not reason and isinstance(format, Format):
            floats = joined(one.floats, ids, format, one.channels, self.clip, one.readers)
            reason, told = self._judged(one, floats, format)
        if reason:
            context.remark(self, one.value.name, f"not split: {reason}")
            if isinstance(format, Format) and notes.read(one.value).format == format:
                notes.write(one.value, format=format.plain)
            return None
        context.remark(self, one.value.name, told or f"into {len(parts)} branches of floats")
        if split.form == "branches":
            return self._branch(graph, one, parts, format, context)
        assert isinstance(format, Format)
        assert floats is not None
        one.replace(floats, format)
        return []

    def _judged(self, one: _Weight, floats: Floats, format: Format) -> tuple[str, str]:
        """Return (why the unsplit quantizer is better or nothing, what the split comes to)."""
        split, behind = format.split, rounded_to(format, one.readers[0])
        assert split is not None
        stored = floats
        if behind is not None:
            stored = rounded(floats, behind, self.clip, one.readers).floats()
        unsplit = rounded(one.floats, format.plain, self.clip, one.readers).floats()
        ours, plain = sqnr_db(one.floats, stored), sqnr_db(one.floats, unsplit)
        gain = f"{ours:.1f} dB of the weight, {plain:.1f} dB unsplit"
        if ours < plain:
            return f"it would lose: {gain}", ""
        told = f"into {split.parts(format.bits)}: {gain}"
        if behind is not None:
            told += f"; stored as {behind}, {sqnr_db(floats, stored):.1f} dB from the parts"
        return "", f"{told} ({split.form}, {format.stored_bits} code bits a weight)"

    def _branch(
        self,
        graph: ir.Graph,
        one: _Weight,
        parts: Sequence[Floats],
        format: Format | Split,
        context: Context,
    ) -> list[ir.Value]:
        """Give every reader a branch a part; the parts of a shared weight are shared."""
        note, name = notes.read(one.value), str(one.value.name)
        plain = format.plain if isinstance(format, Format) else None
        homes = []
        for number, part in enumerate(parts):
            homes.append(constants.add(graph, f"{name}_part_{number}", part))
            homes[-1].meta[notes.KEY] = replace(note, format=plain, part=name, split=str(format))
        codes = _writes_codes(one.value, one.readers, context)
        fresh: list[ir.Value] = []
        for reader in one.readers:
            node = reader.node  # a body stays float, and so does what was kept
            integer = codes and node.graph is graph and notes.read(node.outputs[0]).mode != "float"
            made = branch(graph, node, homes, self._biases(graph, reader, len(homes)))
            fresh += made if integer else []
        for value in (one.value, *(reader.bias for reader in one.readers)):
            if value is not None and not (value.uses() or value.is_graph_output()):
                graph.initializers.pop(str(value.name), None)
        return fresh

    def _biases(self, graph: ir.Graph, reader: Weight, count: int) -> list[ir.Value | None]:
        """Return the bias of each branch."""
        _, index = WEIGHTED[reader.node.op_type]
        inputs = reader.node.inputs
        own = inputs[index] if index is not None and len(inputs) > index else None
        if self.biases == "first" or reader.bias is None:
            return [own, *[None] * (count - 1)]
        with opened(reader.bias) as array:
            whole = np.array(array)
        if not np.isfinite(whole).all():
            return [own, *[None] * (count - 1)]
        ids = parts_of(np.asarray(whole, np.float32), Split(clusters=count), Channels())
        parts: list[ir.Value | None] = [
            constants.add(graph, f"{reader.bias.name}_part_{number}", part)
            for number, part in enumerate(masked(whole, ids))
        ]
        return parts + [None] * (count - len(parts))


class _Weight:
    """A weight with its data, in its own type and in float32."""

    def __init__(self, value: ir.Value, readers: Sequence[Weight]) -> None:
        self.value, self.readers = value, readers
        self.channels = Channels.of(readers[0])
        with opened(value) as array:
            self.whole = np.array(array)
        self.floats = np.asarray(self.whole, np.float32)

    def unfit(self) -> str:
        """Return why its values cannot be clustered; empty where they can."""
        bad = int(self.floats.size - np.count_nonzero(np.isfinite(self.floats)))
        return f"{bad} of its {self.floats.size} values are not finite" if bad else ""

    def parts(self, split: Split) -> Ids:
        """Return the part of each element."""
        return parts_of(self.floats, split, self.channels)

    def replace(self, floats: Floats, format: Format) -> None:
        """Put the split values in the weight's place, with a note of what is to follow."""
        tensor = ir.tensor(floats.astype(self.whole.dtype), name=self.value.name)
        self.value.const_value = tensor
        behind = rounded_to(format, self.readers[0])
        if behind is None:  # the values are final
            notes.write(self.value, mode="float", format=format, split=str(format))
        else:
            notes.write(self.value, format=behind, split=str(format))


def _is_rounded(format: Format | Split | None) -> bool:
    """Whether splitting a weight rounds it, as every form but branches does."""
    split = format.split if isinstance(format, Format) else format
    return split is not None and split.form != "branches"


def _writes_codes(value: ir.Value, readers: Sequence[Weight], context: Context) -> bool:
    """Whether the weight's kernel is an integer one that cannot write floats."""
    if notes.read(value).activation in (None, "float"):
        return False
    rows = [row for one in readers for row in context.capability.rows_of(one.node.op_type)]
    return not all(row.float_output for row in rows)


def _branches_in_codes(value: ir.Value, context: Context) -> bool:
    """Whether a weight is planned as branches whose outputs need ranges."""
    format = notes.read(value).format
    split = format.split if format is not None else None
    branches = split is not None and split.form == "branches"
    return branches and _writes_codes(value, readers_of(value), context)


def _give_ranges(model: ir.Model, fresh: Sequence[ir.Value], context: Context) -> None:
    """Calibrate the outputs of branches whose kernels write codes."""
    if not fresh:
        return
    assert context.feeds is not None
    histograms = {str(value.name): Histogram() for value in fresh}
    observer = Observer(model, context.folder, context.memory)
    for name, array in observer.batches(list(histograms), context.feeds, context.progress):
        histograms[name].add(array, name)
    format = Format(context.capability.activation)
    for value in fresh:
        low, high = histograms[str(value.name)].range("mse", format)
        notes.write(
            value, format=format, mode="static", low=low, high=high, why="output of a branch"
        )
