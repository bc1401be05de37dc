"""How a float weight becomes codes: one place for the pass that stores and for what predicts.

Symmetric codes, zero point zero, restricted range. Source: Krishnamoorthi, arXiv 1806.08342,
section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from . import notes
from .formats import Format, PerAxis, PerBlock
from .graph import Weight
from .quantizers import (
    Codes,
    Floats,
    affine_parameters,
    dequantize_symmetric,
    quantize_symmetric,
    symmetric_scale,
)
from .weights import opened

Clip = Literal["auto", "minmax", "mse"]

CLIPS = np.arange(1.0, 0.199, -0.02)


def rounded(
    values: Floats, format: Format, clip: Clip = "auto", readers: Sequence[Weight] = ()
) -> tuple[Codes, Floats]:
    """Return (codes, scale) of a float32 weight.

    Args:
        values: The weight.
        format: What it becomes.
        clip: `minmax` keeps the largest weight of each group; `mse` shrinks each group's range to
            where the mean squared error is least; `auto` is mse below four bits: from four on,
            clipping the few large weights costs the layer's output more than it saves.
        readers: The weight as its readers see it; their biases bound the scale from below.
    """
    scale = _scale(values, format, clip)
    for reader in readers:
        scale = np.maximum(scale, _least_scale(reader, format))
    return quantize_symmetric(values, scale, format), scale


def simulated(
    values: Floats, format: Format, clip: Clip = "auto", readers: Sequence[Weight] = ()
) -> Floats:
    """Return the float32 weight that the runtime computes with after rounding."""
    codes, scale = rounded(values, format, clip, readers)
    return dequantize_symmetric(codes, scale, format)


def _scale(values: Floats, format: Format, clip: Clip) -> Floats:
    """Choose the scale of each group."""
    scale = symmetric_scale(values, format)
    if clip == "minmax" or (clip == "auto" and format.bits >= 4):
        return scale
    best = _group_error(values, scale, format)
    chosen = scale
    for share in CLIPS[1:]:
        shrunk = (scale * np.float32(share)).astype(np.float32)
        error = _group_error(values, shrunk, format)
        chosen = np.where(error < best, shrunk, chosen)
        best = np.minimum(error, best)
    return chosen


def _group_error(values: Floats, scale: Floats, format: Format) -> Floats:
    """Return the summed squared error of each group that shares a scale."""
    codes = quantize_symmetric(values, scale, format)
    miss = np.square(dequantize_symmetric(codes, scale, format) - values)
    match format.granularity:
        case PerAxis(axis):
            others = tuple(i for i in range(miss.ndim) if i != axis % miss.ndim)
            return np.asarray(miss.sum(axis=others), np.float32)
        case PerBlock(axis, size):
            starts = np.arange(0, miss.shape[axis], size)
            return np.asarray(np.add.reduceat(miss, starts, axis=axis), np.float32)
        case _:
            return np.asarray(miss.sum(), np.float32)


def _least_scale(weight: Weight, format: Format) -> Floats:
    """Return the least scale at which the int32 bias b / (s_x * s_w) still fits.

    Dead channels after batch-norm folding have tiny weights and an ordinary bias.
    """
    note = notes.read(weight.node.inputs[0]) if weight.node.inputs[0] is not None else notes.EMPTY
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
