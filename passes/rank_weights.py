"""Decides how important every weight is, and what each of its legal forms would cost in accuracy.

before:  ranges on activations
becomes: Note(importance={signal: figure}, losses={choice: predicted loss}, block) on every weight
         that may be quantized

The signals are in `compiler/signals.py`; `measured`, the most exact and the slowest one, is in
`compiler/sensitivity.py`. The first signal of the list that predicts losses leads: its losses are
what `assign-bits` weighs. No edit is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from ..compiler import losses, notes, signals
from ..compiler.blocks import find_blocks
from ..compiler.choices import Activations, Open
from ..compiler.contract import Context, Pass
from ..compiler.rounding import Clip
from ..compiler.sensitivity import measured
from ..compiler.signals import Ranking, Signal
from ..compiler.split_plan import Over, SplitWish, offered


class RankWeights(Pass):
    """Write the importance of every weight, by one signal or several.

    Attributes:
        signals: What to measure; the first one that predicts losses leads.
        widths: Stored bits that a weight may get; 32 is float.
        activations: Which kernels are open to it; see `open_weights`.
        loss: `mse` on the outputs, `kl` on their classes; `auto` is kl where a Softmax makes them.
        samples: Calibration samples that `measured` uses, evenly spread; 0 takes all.
        clip: How weights are rounded; give `round-weights` the same.
        affine: Whether weights of fewer than 8 bits have zero points where they may.
        split: How narrow weights may be split by value before they are rounded (`auto`: in the
            form that costs least); `split-layers` carries it out.
        clusters: Parts of a split weight.
        over: What one clustering of a split weight spans.
        levels: Values of a part; 0 takes as many as its bits have codes, 1 makes a k-means table.
    """

    decides: ClassVar[bool] = True

    signals: tuple[Signal, ...] = Field(("measured",), min_length=1)
    widths: tuple[int, ...] = Field((8, 4, 2), min_length=1)
    activations: Activations = "auto"
    loss: Literal["auto", "mse", "kl"] = "auto"
    samples: int = Field(128, ge=0)
    clip: Clip = "auto"
    affine: bool = False
    split: Literal["none", "auto", "branches", "codebook", "int8-grid", "nearest"] = "none"
    clusters: int = Field(3, ge=2, le=255)
    over: Over = "tensor"
    levels: int = Field(0, ge=0, le=256)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for feeds where a signal runs the model, and for outputs that can be compared."""
        wanting = [signal for signal in self.signals if signals.needs_data(signal)]
        if wanting and context.feeds is None:
            yield (
                f"there are no calibration feeds, and the signal {wanting[0]} runs the model; "
                "pass --data FILE, or choose --signal quantization-error"
            )
        if "measured" in self.signals and not losses.float_outputs(model):
            yield (
                "the signal measured compares float outputs, and the model has none; choose "
                "--signal activation-weighted"
            )

    def run(self, model: ir.Model, context: Context) -> int:
        """Write notes; return how many weights have a new one."""
        wish = None
        if self.split != "none":
            wish = SplitWish(self.split, self.clusters, self.over, levels=self.levels)
        wanted = (self.widths, self.activations, self.affine, wish)
        weights = offered(model, context.capability, *wanted)
        before = {one.name: notes.read(one.value) for one in weights}
        homes = {one.name: one for one in weights}
        blocks = find_blocks(model)
        for block in blocks:
            for name in block.weights:
                if name in homes:
                    notes.write(homes[name].value, block=block.index)
        rankings = {signal: self._rank(signal, model, weights, context) for signal in self.signals}
        leading = next((r.losses for r in rankings.values() if r.losses is not None), {})
        for one in weights:
            importance = {
                signal: float(ranking.importance[one.name])
                for signal, ranking in rankings.items()
                if one.name in ranking.importance
            }
            found = dict(leading[one.name]) if one.name in leading else None
            notes.write(one.value, importance=importance, losses=found)
        return sum(1 for one in weights if notes.read(one.value) != before[one.name])

    def _rank(  # noqa: PLR0911 - one return a signal reads best
        self, signal: Signal, model: ir.Model, weights: Sequence[Open], context: Context
    ) -> Ranking:
        """Return what one signal says."""
        kind = losses.kind_of(model) if self.loss == "auto" else self.loss
        match signal:
            case "zd":
                return signals.by_zd(weights, find_blocks(model))
            case "kurtosis":
                return signals.by_kurtosis(weights)
            case "quantization-error":
                return signals.by_quantization_error(weights, self.clip)
            case "lim":
                return self._lim(model, context)
            case "activation-weighted":
                return signals.by_activation_weighted(model, weights, context, self.clip)
            case "fisher":
                return signals.by_fisher(model, weights, context, kind, self.clip)
            case "measured":
                found = measured(model, weights, context, kind, self.samples, self.clip)
                return Ranking.of_losses(found)

    def _lim(self, model: ir.Model, context: Context) -> Ranking:
        """Rank by LIM, and say so where the model has no blocks for it."""
        ranking = signals.by_lim(model, find_blocks(model), context)
        if not ranking.importance:
            context.remark(
                self,
                model.graph.name,
                "lim ranks nothing here: no residual block has an input and output of one shape",
            )
        return ranking
