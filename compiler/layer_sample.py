"""Rows of what one layer reads, and what it should make of them, drawn in bounded memory.

Rows are laid out by groups: inputs [groups, samples, columns], outputs [groups, samples, rows].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .covariance import Meeting
from .errors import DataError
from .quantizers import Floats

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]

MEMORY = 2**29  # bytes
COPIES = 4  # of the rows at once, while they are learned from
POSITIONS = 2**15  # rows, where memory allows them
HELD_OUT = 5  # every fifth sample


@dataclass(frozen=True)
class Rows:
    """What a layer reads, and what it should make of it.

    Attributes:
        x: Inputs, float32 [groups, samples, columns].
        t: Outputs before a ReLU, float32 [groups, samples, rows].
    """

    x: Floats
    t: Floats


class Sample:
    """Rows of one layer, as many from every sample, as they come.

    Args:
        meeting: How the layer lays its input out.
        weights: Of the float layer, a row an output channel.
        bias: What the float layer adds, [rows]; None where there is none that could change.
        samples: How many samples will come.
        memory: Bound in bytes on the rows and what learning copies of them; it holds unless more
            samples come.
        seed: Of the draw.
    """

    def __init__(
        self,
        meeting: Meeting,
        weights: Floats,
        bias: Floats | None,
        samples: int,
        memory: int = MEMORY,
        seed: int = 0,
    ) -> None:
        self.meeting = meeting
        self.weights = np.asarray(weights, np.float32)
        self.bias = None if bias is None else np.asarray(bias, np.float32)
        row = 4 * (meeting.groups * meeting.columns + len(weights))
        self._each = max(min(memory // (COPIES * row), POSITIONS) // max(samples, 1), 1)
        self._seed, self._draw = seed, np.random.default_rng(seed)
        self._drawn: list[Rows] = []

    def add(self, x: Array, y: Array | None = None, chances: Array | None = None) -> None:
        """Draw rows from a batch.

        Args:
            x: What the layer reads, as it lies in the model, samples along its first axis.
            y: The same of the float model, where it may differ.
            chances: How likely each row is drawn, at least zero, [rows]; None draws all alike.

        Raises:
            DataError: A number is not finite.
        """
        x, y = (one.T if self.meeting.turned else one for one in (x, x if y is None else y))
        each = [None] * len(x) if chances is None else chances.reshape(len(x), -1)
        for own, right, chance in zip(x, y, each, strict=True):
            rows = self._rows(own, right, chance)
            if not (np.isfinite(rows.x).all() and np.isfinite(rows.t).all()):
                where = f"the layer that reads {self.meeting.operand!r}"
                raise DataError(f"an input or output of {where} is not finite; look at the feeds")
            self._drawn.append(rows)

    def split(self) -> tuple[Rows, Rows]:
        """Return the rows to learn from, in random order, and those of every fifth sample.

        Every fifth row is held out where there are fewer than five samples. Of fewer than five
        rows none is: both are the same.

        Raises:
            DataError: There are no rows.
        """
        counts = [rows.x.shape[1] for rows in self._drawn]
        total = sum(counts)
        if total == 0:
            raise DataError(f"no rows of {self.meeting.operand!r} to learn from; add feeds")
        x = np.concatenate([rows.x for rows in self._drawn], 1)
        t = np.concatenate([rows.t for rows in self._drawn], 1)
        unit = np.arange(total)
        if len(counts) >= HELD_OUT:
            unit = np.repeat(np.arange(len(counts)), counts)
        held = unit % HELD_OUT == HELD_OUT - 1
        known = np.random.default_rng(self._seed).permutation(np.flatnonzero(~held))
        apart = np.flatnonzero(held) if held.any() else known
        return Rows(x[:, known], t[:, known]), Rows(x[:, apart], t[:, apart])

    def _rows(self, x: Array, y: Array, chance: Array | None) -> Rows:
        """Return drawn rows of one sample."""
        shape = _positions(x, self.meeting)
        at = self._places(int(np.prod(shape)), chance)
        own, right = (
            np.asarray(_taken(one, at, shape, self.meeting), np.float32) for one in (x, y)
        )
        groups, columns = self.meeting.groups, self.meeting.columns
        t = right @ self.weights.reshape(groups, -1, columns).swapaxes(1, 2)
        if self.bias is not None:
            t = t + self.bias.reshape(groups, 1, -1)
        return Rows(own, np.asarray(t, np.float32))

    def _places(self, count: int, chance: Array | None) -> Indices:
        """Draw positions of one sample."""
        if chance is None:
            return self._draw.permutation(count)[: self._each]
        possible = np.flatnonzero(chance)
        if len(possible) <= self._each:
            return possible
        share = chance[possible] / chance[possible].sum()
        return self._draw.choice(possible, self._each, replace=False, p=share)


def _positions(x: Array, meeting: Meeting) -> Sequence[int]:
    """Return how many rows one sample has, along each axis of the output."""
    if meeting.op_type != "Conv":
        return (x.size // meeting.columns,)
    rank = len(meeting.kernel)
    pads = zip(meeting.pads[:rank], meeting.pads[rank:], strict=True)
    windows = zip(meeting.kernel, meeting.strides, meeting.dilations, strict=True)
    return tuple(
        (size + sum(pad) - (kernel - 1) * dilation - 1) // stride + 1
        for size, pad, (kernel, stride, dilation) in zip(x.shape[1:], pads, windows, strict=True)
    )


def _taken(x: Array, at: Indices, shape: Sequence[int], meeting: Meeting) -> Array:
    """Return what a layer reads at some positions of one sample, [groups, positions, columns]."""
    if meeting.op_type != "Conv":
        return x.reshape(1, -1, meeting.columns)[:, at]
    rank, groups = len(meeting.kernel), meeting.groups
    sides = zip(meeting.pads[:rank], meeting.pads[rank:], strict=True)
    padded = np.pad(x, [(0, 0), *sides])
    taps: list[Any] = [slice(None)]
    for axis, place in enumerate(np.unravel_index(at, shape)):
        size = meeting.kernel[axis]
        along = place[:, None] * meeting.strides[axis] + np.arange(size) * meeting.dilations[axis]
        taps.append(along.reshape(len(at), *(size if i == axis else 1 for i in range(rank))))
    found: Array = padded[tuple(taps)]  # [channels, positions, kernel...]
    found = found.reshape(groups, len(x) // groups, len(at), -1)
    return found.swapaxes(1, 2).reshape(groups, len(at), meeting.columns)
