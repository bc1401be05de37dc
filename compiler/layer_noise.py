"""Predicts how much rounding a layer's weight and its input would disturb the layer's output.

Weights are rounded to nearest, symmetrically with a scale an output channel; the input to 8 bits
with one scale for the tensor. Both errors are taken as they act on the rows that the layer really
meets.
Source: Krishnamoorthi, arXiv 1806.08342, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .contract import Context
from .covariance import Meeting
from .graph import Weight, is_standard, operand_of
from .observe import Observer
from .quantizers import Floats
from .weights import opened

SAMPLES = 8  # calibration samples that are looked at
ROWS = 512  # rows of a layer's input a batch, evenly spaced


@dataclass
class Noise:
    """Mean power of a layer's output, and of what rounding adds to it, summed over channels.

    Attributes:
        signal: Of the output without its bias.
        weights: Of the error that the rounded weight makes.
        low: Least element of the input, at most 0.
        high: Greatest element of the input, at least 0.
        gain: Power at the output of an input of power 1 in every element.
        rows: Rows that the powers are sums of.
    """

    signal: float = 0.0
    weights: float = 0.0
    low: float = 0.0
    high: float = 0.0
    gain: float = 0.0
    rows: int = 0

    @property
    def power(self) -> float:
        """Power of the whole error; an 8-bit step makes an error of its square over 12."""
        step = (self.high - self.low) / 255
        return self.weights / max(self.rows, 1) + step**2 / 12 * self.gain

    @property
    def signal_power(self) -> float:
        """Power of the output."""
        return self.signal / max(self.rows, 1)


def noises(
    model: ir.Model,
    readers: Sequence[Weight],
    bits: int,
    context: Context,
    energies: Sequence[npt.NDArray[np.float64] | None],
) -> list[Noise]:
    """Return the noise of each layer.

    Args:
        model: The model that the layers are in.
        readers: The layers; an embedding counts with the error of its table alone.
        bits: Bits of the rounded weights.
        context: Gives feeds and the work folder. Without feeds, or with random ones, inputs are
            taken as independent numbers and are not rounded.
        energies: Mean square of each element of a layer's input, for when there are no feeds; None
            stands for ones.
    """
    found = [Noise() for _ in readers]
    fed = context.feeds is not None and not context.feeds.made_up
    waiting: dict[str, list[int]] = {}
    for number, (reader, energy) in enumerate(zip(readers, energies, strict=True)):
        if not fed or is_standard(reader.node, "Gather") or Meeting.of(reader) is None:
            _add_alone(found[number], reader, bits, energy)
        else:
            waiting.setdefault(str(operand_of(reader).name), []).append(number)
    if waiting and context.feeds is not None:
        observer = Observer(model, context.folder, context.memory)
        feeds = context.feeds.head(SAMPLES)
        for name, array in observer.batches(list(waiting), feeds, context.progress):
            for number in waiting[name]:
                _add_rows(found[number], readers[number], bits, array)
    return found


def _add_rows(noise: Noise, reader: Weight, bits: int, array: npt.NDArray[np.generic]) -> None:
    """Add what the rounded weight makes of one batch of inputs."""
    meeting = Meeting.of(reader)
    assert meeting is not None
    weight = _rows_of(reader)
    miss = weight - nearest(weight, bits)
    noise.low = min(noise.low, float(array.min(initial=0)))
    noise.high = max(noise.high, float(array.max(initial=0)))
    noise.gain = float(np.square(weight).sum(dtype=np.float64))
    share = len(weight) // meeting.groups
    for group, rows in enumerate(meeting.rows(np.asarray(array, np.float32))):
        mine = slice(group * share, (group + 1) * share)
        some = rows[:: max(len(rows) // ROWS, 1)]
        noise.signal += float(np.square(some @ weight[mine].T).sum(dtype=np.float64))
        noise.weights += float(np.square(some @ miss[mine].T).sum(dtype=np.float64))
        noise.rows += len(some) if group == 0 else 0


def _add_alone(
    noise: Noise, reader: Weight, bits: int, energy: npt.NDArray[np.float64] | None
) -> None:
    """Add what the rounded weight makes of inputs with independent elements."""
    weight = _rows_of(reader)
    met = np.ones(weight.shape[1]) if energy is None else energy
    noise.rows = 1
    noise.signal = float((np.square(weight) @ met).sum())
    noise.weights = float((np.square(weight - nearest(weight, bits)) @ met).sum())


def nearest(weight: Floats, bits: int) -> Floats:
    """Return a weight, [channels, columns], rounded to +-(2^(bits - 1) - 1) steps a channel."""
    limit = np.float32(2 ** (bits - 1) - 1)
    greatest = np.abs(weight).max(axis=1, keepdims=True, initial=0)
    scale = np.where(greatest == 0, np.float32(1), greatest / limit)
    return np.asarray(np.rint(weight / scale) * scale, np.float32)


def _rows_of(reader: Weight) -> Floats:
    """Return a weight as [output channels, columns]; a table as its rows."""
    with opened(reader.value) as array:
        moved = np.moveaxis(np.asarray(array, np.float32), reader.axis, 0)
        return moved.reshape(len(moved), -1)
