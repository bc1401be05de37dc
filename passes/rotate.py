"""Multiplies residual streams by an orthogonal matrix R, so that no channel stands out.

before:  x = Add(MatMul(a, Wo), MatMul(b, Wd));  y = MatMul(LayerNormalization(x, gamma, beta), Wi)
becomes: x' = Add(MatMul(a, Wo R), MatMul(b, Wd R))
         y = Add(MatMul(LayerNormalization(x', 1), R^T diag(gamma) Wi), beta Wi)        x' = x R

Normalizations commute with R but for their gains, which move into the layers that read them. For
LayerNormalization R keeps the vector of ones, and what writes into the stream loses its mean over
channels, which nobody reads. Every constant that holds the stream's channels changes, so a stream
is rotated as a whole or not at all. Values that turn get new names. R is chosen in
`compiler/rotations.py`. It is an exact rewrite; it is made where rounding is predicted to lose
less behind it.
Source: S. Ashkboos et al., QuaRot (arXiv 2404.00456) and SliceGPT (arXiv 2401.15024), section 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler import notes
from ..compiler.contract import Context, Pass
from ..compiler.graph import Weight, weight_of
from ..compiler.layer_noise import noises
from ..compiler.streams import Stream, streams_of
from ..compiler.turning import rotate

KEY = "fourfold.rotated"  # of the model's metadata: what the normalizations of streams read


class Rotate(Pass):
    """Rotate the residual streams of pre-norm transformers where that lowers rounding noise.

    The noise that is compared: that of the stream's layers with weights rounded to nearest, a
    scale an output channel, and with 8-bit inputs of one scale a tensor, in units of the power of
    their outputs. It is measured on calibration samples; without feeds the weights alone count.

    Attributes:
        weights: Bits that weights are expected to get.
        least: Percent of the noise that have to go away, or the stream stays as it is.
        untie: Whether a table that is the embedding and the last layer too may be stored twice.
        force: Whether to rotate whatever is predicted.
    """

    weights: int = Field(4, ge=2, le=8)
    least: float = Field(3.0, ge=0, lt=100)
    untie: bool = False
    force: bool = False

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for streams in which nothing is decided yet."""
        done = _done(model)
        for stream in streams_of(model.graph):
            if stream.refusals or done & _names(stream):
                continue
            values = (*stream.changed, *(touch.value for touch in stream.touches))
            planned = next((v.name for v in values if notes.read(v) != notes.EMPTY), None)
            if planned is not None:
                yield (
                    f"{planned} is planned already, and would be another value; put {self.name} "
                    "before calibrate and assign-bits"
                )

    def run(self, model: ir.Model, context: Context) -> int:
        """Rotate the streams that gain by it; return how many constants changed."""
        done = _done(model)
        changed = 0
        for number in range(len(streams_of(model.graph))):
            stream = streams_of(model.graph)[number]  # anew: edits of one may touch another
            if done & _names(stream):
                continue
            refusal = self._refusal(stream)
            if refusal is not None:
                context.remark(self, refusal[0], f"its stream is not rotated: {refusal[1]}")
                continue
            wanted, why = self._wanted(model, number, stream, context)
            if wanted:
                rotate(model.graph, stream, context.seed)
                done |= _names(stream)
                changed += len(stream.touches)
            context.remark(self, stream.norms[-1].source.name, why)
        if changed:
            model.metadata_props[KEY] = json.dumps(sorted(done))
        return changed

    def _refusal(self, stream: Stream) -> tuple[str, str] | None:
        """Return (a value, what forbids to rotate its stream), or None."""
        if stream.refusals:
            return stream.refusals[0]
        tied = next(stream.tied(), None)
        if tied is None or self.untie:
            return None
        return str(tied.name), (
            "it is read in two forms, as an embedding and a last layer behind a gain are, and "
            "would have to be stored twice; untie=true allows that"
        )

    def _wanted(
        self, model: ir.Model, number: int, stream: Stream, context: Context
    ) -> tuple[bool, str]:
        """Return whether to rotate a stream, and why, with the figures."""
        if self.force:
            return True, f"{stream.width} channels are rotated, as asked for"
        if context.plan is not None:
            named = [f"{touch.value.name}_rotated" for touch in stream.touches]
            planned = any(name in context.plan for name in named)
            return planned, f"{'rotated' if planned else 'not rotated'}, as when the plan was made"
        before, after, layers = self._noise(model, number, context)
        gains = after < before * (1 - self.least / 100)
        figures = (
            f"predicted noise {100 * after:.3g} % of the output of {layers} layers at "
            f"{self.weights} bits, {100 * before:.3g} % unrotated"
        )
        return gains, f"{stream.width} channels are {'' if gains else 'not '}rotated: {figures}"

    def _noise(self, model: ir.Model, number: int, context: Context) -> tuple[float, float, int]:
        """Return mean noise over signal of a stream's layers (before, after), and how many."""
        trial = model.clone()
        stream = streams_of(trial.graph)[number]
        norms = {
            touch.layer: touch.norm
            for touch in stream.touches
            if (weight := weight_of(touch.layer)) is not None and weight.value is touch.value
        }
        met = [None if norm is None else norm.energy for norm in norms.values()]
        before = noises(trial, _weights_of(norms), self.weights, context, met)
        rotate(trial.graph, stream, context.seed)
        folded = [norm is None or norm.folds for norm in norms.values()]
        met = [None if gone else one for gone, one in zip(folded, met, strict=True)]
        after = noises(trial, _weights_of(norms), self.weights, context, met)
        # In units of one and the same output: a moved bias would change the other.
        shares = [
            (old.power / old.signal_power, new.power / old.signal_power)
            for old, new in zip(before, after, strict=True)
            if old.signal > 0
        ]
        means = np.mean(shares, axis=0) if shares else np.zeros(2)
        return float(means[0]), float(means[1]), len(shares)


def _done(model: ir.Model) -> set[str]:
    """Return what the normalizations of streams read that have been rotated."""
    return set(json.loads(model.metadata_props.get(KEY, "[]")))


def _names(stream: Stream) -> set[str]:
    """Return the names of what a stream's normalizations read."""
    return {str(norm.source.name) for norm in stream.norms}


def _weights_of(layers: Iterable[ir.Node]) -> list[Weight]:
    """Return the weight of each of some layers that have one."""
    return [weight for weight in map(weight_of, layers) if weight is not None]
