"""How a float weight becomes codes: one place for the pass that stores and for what predicts.

Signed formats are symmetric: zero point zero, restricted range. Unsigned ones are affine: their
range ends at the least and the greatest weight. A format with a split rounds each part on its own.
Source: Krishnamoorthi, arXiv 1806.08342, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from . import notes
from .formats import Format, PerAxis, PerBlock
from .graph import Weight, undequantized
from .quantizers import (
    Codes,
    Floats,
    affine_parameters,
    affine_scale,
    dequantize_shifted,
    dequantize_symmetric,
    quantize_shifted,
    quantize_symmetric,
    symmetric_scale,
)
from .weights import opened

Clip = Literal["auto", "minmax", "mse"]

CLIPS = np.arange(1.0, 0.199, -0.02)


@dataclass(frozen=True)
class Rounded:
    """A weight in codes.

    Attributes:
        codes: Shape of the weight, in the format's `numpy_type`.
        scale: float32, one for each group of the format's granularity.
        zero_point: Whole numbers in float32, shape of `scale`; all zero in signed formats.
        format: What the codes are in.
    """

    codes: Codes
    scale: Floats
    zero_point: Floats
    format: Format

    def floats(self) -> Floats:
        """Return the float32 weight that the codes stand for."""
        if self.format.signed:
            return dequantize_symmetric(self.codes, self.scale, self.format)
        return dequantize_shifted(self.codes, self.scale, self.zero_point, self.format)


def rounded(
    values: Floats, format: Format, clip: Clip = "auto", readers: Sequence[Weight] = ()
) -> Rounded:
    """Return a float32 weight in codes.

    Args:
        values: The weight.
        format: What it becomes; has no split.
        clip: `minmax` keeps the outermost weights of each group; `mse` shrinks each group's range
            to where the mean squared error is least; `auto` is mse below four bits: from four on,
            clipping the few large weights costs the layer's output more than it saves.
        readers: The weight as its readers see it; their biases bound the scale from below.
    """
    assert format.split is None
    floor = floor_of(readers, format)
    whole = np.ones((), np.float32)
    best = _coded(values, whole, floor, format)
    if clip == "minmax" or (clip == "auto" and format.bits >= 4):
        return best
    error, chosen = _group_error(values, best), whole
    for share in CLIPS[1:]:
        trial = _group_error(values, _coded(values, whole * np.float32(share), floor, format))
        chosen = np.where(trial < error, np.float32(share), chosen)
        error = np.minimum(trial, error)
    return _coded(values, chosen, floor, format)


def _coded(values: Floats, share: Floats, floor: Floats, format: Format) -> Rounded:
    """Round to a share of each group's range, with a scale that is not below the floor."""
    if format.signed:
        scale = np.maximum(symmetric_scale(values, format) * share, floor).astype(np.float32)
        zeros = np.zeros_like(scale)
        return Rounded(quantize_symmetric(values, scale, format), scale, zeros, format)
    scale, zero_point = affine_scale(values, format)
    # Both ends shrink alike, so zero keeps its code.
    scale = np.maximum(scale * share, floor).astype(np.float32)
    return Rounded(quantize_shifted(values, scale, zero_point, format), scale, zero_point, format)


def simulated(
    values: Floats, format: Format, clip: Clip = "auto", readers: Sequence[Weight] = ()
) -> Floats:
    """Return the float32 weight that the runtime computes with after rounding."""
    if format.split is not None:
        from .splitting import split_floats

        return split_floats(values, format, clip, readers)
    return rounded(values, format, clip, readers).floats()


def _group_error(values: Floats, coded: Rounded) -> Floats:
    """Return the summed squared error of each group that shares a scale."""
    miss = np.square(coded.floats() - values)
    match coded.format.granularity:
        case PerAxis(axis):
            others = tuple(i for i in range(miss.ndim) if i != axis % miss.ndim)
            return np.asarray(miss.sum(axis=others), np.float32)
        case PerBlock(axis, size):
            starts = np.arange(0, miss.shape[axis], size)
            return np.asarray(np.add.reduceat(miss, starts, axis=axis), np.float32)
        case _:
            return np.asarray(miss.sum(), np.float32)


def floor_of(readers: Sequence[Weight], format: Format) -> Floats:
    """Return what a weight's scales may not fall below, of a shape that fits them."""
    least = [_least_scale(reader, format) for reader in readers]
    floor = np.maximum.reduce(np.broadcast_arrays(np.zeros((), np.float32), *least))
    return np.asarray(floor, np.float32)


def _least_scale(weight: Weight, format: Format) -> Floats:
    """Return the least scale at which the int32 bias b / (s_x * s_w) still fits.

    Dead channels after batch-norm folding have tiny weights and an ordinary bias.
    """
    operand = weight.node.inputs[0]
    note = notes.read(undequantized(operand)) if operand is not None else notes.EMPTY
    if weight.bias is None or note.mode != "static" or note.format is None or note.low is None:
        return np.zeros((), np.float32)
    input_scale, _ = affine_parameters(note.low, note.high or 0.0, note.format)
    with opened(weight.bias) as array:
        bias = np.abs(np.asarray(array, np.float32))
    if bias.size != np.size(bias, -1 if bias.ndim else None):
        return np.zeros((), np.float32)  # a Gemm's matrix of biases stays float
    least = bias.ravel() / (input_scale * np.float32(2**30))
    per_channel = format.granularity == PerAxis(weight.axis)
    return np.asarray(least if per_channel else least.max(initial=0), np.float32)
