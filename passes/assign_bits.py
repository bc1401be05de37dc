"""Decides the form of every weight and activation.

before:  ranges on values, predicted losses on weights
becomes: Note(format, activation, mode, loss, bytes, seconds, why) on every weight, Note(format,
         mode, why) on every quantized activation, and on the output of every node that stays
         float the reason

Uniform: one width for all. With several `widths`, each weight gets one of its legal forms: by an
integer program over predicted losses and the target's costs, or in the papers' greedy order. The
plan is then measured as a whole and repaired where the losses did not add up. Which forms are
legal is the target's to say; this pass never edits the graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from ..compiler import notes, picks, regions, selection
from ..compiler.activations import Activations, forgotten, keep_words, without_form
from ..compiler.allocate import Chosen, Goal, Item, Limits, solve, totals
from ..compiler.choices import Activations as Kernels
from ..compiler.choices import Choice, Open
from ..compiler.contract import Context, Decision, Pass, silent
from ..compiler.errors import RecipeError
from ..compiler.graph import is_standard, readers_of, weights_of
from ..compiler.greedy import greedy
from ..compiler.losses import Kind, kind_of
from ..compiler.picks import Pick, Picks
from ..compiler.rounding import Clip
from ..compiler.shapes import operand_shapes
from ..compiler.signals import Signal, of_outputs, predicts
from ..compiler.split_plan import Over, SplitWish, offered, split_picks
from ..compiler.ties import agreed, ties_of, together
from ..compiler.trial import Reference
from .insert_qdq import InsertQdq
from .lower_embeddings import LowerEmbeddings
from .quantize_biases import QuantizeBiases
from .round_weights import RoundWeights
from .split_layers import SplitLayers
from .unpack_weights import UnpackWeights


class AssignBits(Pass):
    """Give every weight one of its legal forms, and every activation eight bits or none.

    Attributes:
        weights: Bits of a weight, where all have one width.
        widths: Stored bits that a weight may get (32: float); empty gives all `weights` bits.
        method: `milp` (exact), `greedy` (least important first), or `plan` (obey the notes).
        goal: What `milp` makes small: the loss, the stored bytes or the seconds.
        average_bits: Budget on stored code bits per weight element.
        max_bytes: Budget on stored bytes of all weights and scales.
        max_seconds: Budget on the seconds of all weighted nodes in one call; then no form that
            is slower than float in its layer's own shape is taken.
        max_loss: Budget on the loss of the outputs on calibration feeds.
        signal: Whose order `greedy` follows; None takes the first one that ranked.
        trials: Whole plans that may be measured; 0 trusts the prediction.
        samples: Calibration samples of such a measurement.
        clip: How weights are rounded for it; give `round-weights` the same.
        loss: How outputs are compared; give `rank-weights` the same.
        activations: `auto` (static where the range is accurate, else dynamic), `static`,
            `dynamic`, `float` for weight-only, or `any` to mix kernels.
        floor_db: Expected SQNR in dB under which `auto` does not trust a static range.
        keep: Regular expressions; nodes whose whole name matches one stay float.
        embeddings: Whether embedding tables are quantized too.
        affine: Whether weights of fewer than 8 bits have zero points where they may.
        block: With one width and float activations: neighbours that share a scale, where that is
            legal; 0 takes one scale a channel.
        split: How narrow weights may be split by value before they are rounded (`auto`: in the
            form that costs least); `split-layers` carries it out.
        clusters: Parts of a split weight.
        over: What one clustering of a split weight spans.
        levels: Values of a part; 0 takes as many as its bits have codes, 1 makes a k-means table.
    """

    decides: ClassVar[bool] = True

    weights: int = Field(8, ge=2, le=8)
    widths: tuple[int, ...] = ()
    method: Literal["milp", "greedy", "plan"] = "milp"
    goal: Goal = "loss"
    average_bits: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_bytes: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_loss: float | None = Field(None, gt=0, allow_inf_nan=False)
    signal: Signal | None = None
    trials: int = Field(12, ge=0)
    samples: int = Field(128, ge=0)
    clip: Clip = "auto"
    loss: Literal["auto", "mse", "kl"] = "auto"
    activations: Kernels = "auto"
    floor_db: float = 15.0
    keep: tuple[str, ...] = ()
    embeddings: bool = True
    affine: bool = False
    block: int = Field(0, ge=0)
    split: Literal["none", "auto", "branches", "codebook", "int8-grid", "nearest"] = "none"
    clusters: int = Field(3, ge=2, le=255)
    over: Over = "tensor"
    levels: int = Field(0, ge=0, le=256)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for an opset that stores the narrowest of several widths."""
        bits = min(self.widths, default=32)
        least = context.capability.packed.get(f"int{bits}", 0)
        opset = int(model.graph.opset_imports.get("", 0))
        if opset < least:
            yield (
                f"a weight of {bits} bits takes opset {least}, and the model has {opset}; put "
                f"tidy{{opset={least}}} before"
            )

    def run(self, model: ir.Model, context: Context) -> int:
        """Write the plan; return how many values have a decision."""
        before = notes.plan(model)
        kept = self._kept(model)
        wanted: dict[str, notes.Note] = {}
        if self.method == "plan":
            wanted = forgotten(model)
            taken, decision = picks.stored(model, context.capability), Decision("plan", 0.0)
        elif self.widths:
            taken, decision = self._chosen(model, context, kept)
        else:
            options = (self.weights, self.activations, kept, self.affine, self.block)
            taken = picks.uniform(model, context.capability, *options)
            if self._wish is not None:
                told = partial(context.remark, self)
                taken = split_picks(model, taken, self._wish, context, told)
                self._refuse_unsplit(taken, context)
            decision = Decision("uniform", 0.0)
        self._write(model, context, taken, kept, wanted)
        context.decisions.append(picks.told(model, taken, decision))
        after = notes.plan(model)
        return sum(1 for name, note in after.items() if note != before.get(name))

    def _refuse_unsplit(self, taken: Picks, context: Context) -> None:
        """Stop where a split was asked for and no weight can have it.

        Raises:
            RecipeError: It names the last reason.
        """
        formats = [pick.choice.format for pick in taken.values() if pick.choice.format is not None]
        if formats and all(format.split is None for format in formats):
            raise RecipeError(f"assign-bits: split={self.split}: {context.remarks[-1].reason}")

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
        if not self.embeddings:
            kept |= {str(node.name) for node in model.graph if is_standard(node, "Gather")}
        return frozenset(kept)

    def _chosen(
        self, model: ir.Model, context: Context, kept: frozenset[str]
    ) -> tuple[Picks, Decision]:
        """Choose a form for every weight that is open."""
        weights = [
            one
            for one in self._open(model, context)
            if not all(str(reader.node.name) in kept for reader in one.readers)
        ]
        timed = self.max_seconds is not None or self.goal == "seconds"
        shapes = operand_shapes(model, weights, context) if context.cost is not None else {}
        forms = selection.forms_of(weights, context, shapes)
        ties = ties_of(model) if context.capability.ties_attention else {}
        machine, exact = context.capability.name, self.method == "milp"
        items = selection.items_of(weights, forms, ties, timed, machine, predicted=exact)
        if timed:
            # An embedding's lookup takes microseconds in any form, and its table is half a file.
            floats = {
                one.name: seconds
                for one in weights
                if any(reader.node.op_type != "Gather" for reader in one.readers)
                and (seconds := forms[one.name][str(Choice())].seconds) is not None
            }
            items, dropped = selection.without_slow(items, floats)
            for name, choice in dropped:
                context.remark(self, name, f"{choice} is slower than float in this shape")
        items = agreed(items)
        limits = Limits(self.average_bits, self.max_bytes, self.max_seconds, self.max_loss)
        found = self._solved(model, context, weights, items, limits, kept)
        taken: Picks = {}
        for one, item, index in zip(weights, items, found.chosen, strict=True):
            option = item.options[index]
            cost = forms[item.name][option.choice]
            why = self._reason(item, index)
            known = notes.read(one.value).losses is not None
            loss = option.loss if known else None
            taken[item.name] = Pick(Choice.parse(option.choice), why, loss, cost)
        return taken, self._decision(model, context, weights, found, timed)

    def _open(self, model: ir.Model, context: Context) -> list[Open]:
        """Return the weights that have a choice."""
        wanted = (self.widths, self.activations, self.affine, self._wish)
        return offered(model, context.capability, *wanted)

    @property
    def _wish(self) -> SplitWish | None:
        """How weights are to be split, or None."""
        if self.split == "none":
            return None
        return SplitWish(self.split, self.clusters, self.over, levels=self.levels)

    def _solved(
        self,
        model: ir.Model,
        context: Context,
        weights: Sequence[Open],
        items: Sequence[Item],
        limits: Limits,
        kept: frozenset[str],
    ) -> selection.Found:
        """Choose by the program or the order; measure the whole where there are feeds."""
        if self.method == "greedy":
            order = together(selection.order_of(weights, self._followed(weights)), items)
            chosen = greedy(items, order, sorted(self.widths, reverse=True), limits)
        else:
            chosen = solve(items, self.goal, limits)
        if not self.trials or context.feeds is None or not items:
            return selection.Found(chosen, totals(items, chosen))
        kind = self._kind(model)
        reference = Reference(
            model, context.feeds, self.samples, kind, context.folder, context.jobs
        )

        def measure(chosen: Chosen) -> float:
            pairs = zip(items, chosen, strict=True)
            taken = {i.name: Pick(Choice.parse(i.options[n].choice), "") for i, n in pairs}
            return reference.loss(self._rounded(model, context, taken, kept))

        if self.method == "greedy":
            loss = measure(chosen)
            return selection.Found(chosen, totals(items, chosen), loss, loss, (), 1)
        comparable = of_outputs(self._followed(weights))
        return selection.repaired(
            items, self.goal, limits, chosen, measure, self.trials, comparable
        )

    def _rounded(
        self, model: ir.Model, context: Context, taken: Picks, kept: frozenset[str]
    ) -> ir.Model:
        """Return a clone in which a plan has been carried out, in the form onnxruntime runs."""
        clone = model.clone()
        quiet = replace(context, remarks=[], decisions=[], floats=[], progress=silent)
        self._write(clone, quiet, taken, kept, {})
        edits = (
            SplitLayers(clip=self.clip),
            InsertQdq(),
            RoundWeights(clip=self.clip),
            QuantizeBiases(),
            LowerEmbeddings(),
            UnpackWeights(),
        )
        for one in edits:
            one.run(clone, quiet)
        return clone

    def _reason(self, item: Item, index: int) -> str:
        """Say what the form is predicted to cost, and what a narrower one would have."""
        taken = item.options[index]
        narrower = [o for o in item.options if o.bits < taken.bits and o.loss > taken.loss]
        if self.method == "greedy":
            return "in the greedy order"
        if not narrower:
            return f"loss {taken.loss:.2g}, in the narrowest form"
        nearest = min(narrower, key=lambda option: option.loss)
        return f"loss {taken.loss:.2g}; with {nearest.bits} bits {nearest.loss:.2g}"

    def _decision(
        self,
        model: ir.Model,
        context: Context,
        weights: Sequence[Open],
        found: selection.Found,
        timed: bool,
    ) -> Decision:
        """Return the record of how the plan was chosen."""
        signal = self._followed(weights)
        predicted = found.predicted["loss"] if of_outputs(signal) else None
        return Decision(
            method=self.method,
            average_bits=0.0,
            signal=signal,
            loss_kind=self._kind(model),
            predicted_loss=predicted,
            measured_loss=found.measured,
            first_loss=found.first,
            repairs=found.repairs,
            trials=found.trials,
            predicted_seconds=found.predicted["seconds"] if timed else None,
        )

    def _kind(self, model: ir.Model) -> Kind:
        """Return how outputs are compared."""
        return kind_of(model) if self.loss == "auto" else self.loss

    def _followed(self, weights: Sequence[Open]) -> str | None:
        """Return the signal whose order or losses are followed: the first that can be."""
        if self.method == "greedy" and self.signal is not None:
            return self.signal
        # Of a signal that ranks blocks alone, a weight outside of them knows nothing.
        every = [list(notes.read(one.value).importance or {}) for one in weights]
        known = max(every, key=len, default=[])
        return next((s for s in known if self.method == "greedy" or predicts(s)), None)

    def _write(
        self,
        model: ir.Model,
        context: Context,
        taken: Picks,
        kept: frozenset[str],
        wanted: Mapping[str, notes.Note],
    ) -> None:
        """Write weights first, then the integer regions that follow from them."""
        reasons = dict.fromkeys(kept, "kept as asked")
        bits: dict[str, int] = {}
        for value in weights_of(model):
            readers = readers_of(value)
            pick = taken.get(str(value.name))
            if pick is None and self.widths:
                pick = picks.closed(readers, kept)
            if pick is None:
                bits[str(value.name)] = self.weights
                continue
            picks.write(value, pick)
            if pick.choice.format is not None:
                bits[str(value.name)] = pick.choice.format.bits
            if pick.choice.activation != "float":
                continue
            plain = "chosen" if pick.choice.format is None else f"it reads {pick.choice}"
            for reader in readers:
                # A lookup has no kernel of its own to choose.
                if pick.choice.format is None or not is_standard(reader.node, "Gather"):
                    reasons.setdefault(str(reader.node.name), plain)
        for name, pick in taken.items():
            if "two different axes" in pick.why:
                context.remark(self, name, pick.why)
        integer = any(pick.choice.activation != "float" for pick in taken.values())
        if self.activations == "float" or (self.method == "plan" and not integer and not wanted):
            return  # weights only
        found = regions.find(model, context.capability, bits, reasons)
        mode = "auto" if self.activations == "any" else self.activations
        modes = {
            name: str(note.mode)
            for name, note in wanted.items()
            if note.mode != "float" or not without_form(name, found, context)
        }
        Activations(mode, self.floor_db, modes).write(self, model, found, context)
        keep_words(model, wanted)
