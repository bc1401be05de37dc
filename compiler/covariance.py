"""Second moments of what the rows of a weight meet, E[x x^T], summed batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .graph import Weight, operand_of

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

ROWS = 1 << 22  # elements of rows that are laid out at once


@dataclass(frozen=True)
class Meeting:
    """How a layer lays out what a row of its weight meets.

    Attributes:
        operand: Name of the activation.
        op_type: MatMul, Gemm or Conv.
        columns: Elements of a row of the weight.
        groups: Parts of the channels, each with a covariance of its own.
        turned: Whether a Gemm transposes the activation.
        kernel: Spatial sizes of a Conv's kernel; the others of a Conv likewise.
        strides: Steps between positions.
        dilations: Steps within the kernel.
        pads: Zeros before and behind each spatial axis.
    """

    operand: str
    op_type: str
    columns: int
    groups: int = 1
    turned: bool = False
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @classmethod
    def of(cls, reader: Weight) -> Meeting | None:
        """Return how one reader meets its weight; None where that is not known how."""
        node, tensor = reader.node, reader.value.const_value
        assert tensor is not None
        shape = tuple(int(n) for n in tensor.shape.numpy())
        operand = str(operand_of(reader).name)
        if node.op_type in ("MatMul", "Gemm") and len(shape) == 2:
            turned = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1
            return cls(operand, node.op_type, shape[1 - reader.axis], turned=turned)
        if node.op_type != "Conv" or node.attributes.get_string("auto_pad", "NOTSET") not in (
            "NOTSET",
            "VALID",
        ):
            return None
        rank = len(shape) - 2

        def ints(name: str, default: int, count: int) -> tuple[int, ...]:
            found = node.attributes.get_ints(name, ())
            return tuple(int(n) for n in found) or (default,) * count

        return cls(
            operand,
            "Conv",
            prod(shape[1:]),
            node.attributes.get_int("group", 1),
            kernel=shape[2:],
            strides=ints("strides", 1, rank),
            dilations=ints("dilations", 1, rank),
            pads=ints("pads", 0, 2 * rank),
        )

    def rows(self, array: Array) -> Iterator[Array]:
        """Yield [positions, columns] for each group."""
        if self.op_type != "Conv":
            array = array.T if self.turned else array
            yield array.reshape(-1, self.columns)
            return
        rank = len(self.kernel)
        sides = list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        padded = np.pad(array, [(0, 0), (0, 0), *sides])
        reach = tuple(d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True))
        axes = tuple(range(2, 2 + rank))
        windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes)
        steps = tuple(slice(None, None, s) for s in self.strides)
        within = tuple(slice(None, None, d) for d in self.dilations)
        windows = windows[(slice(None), slice(None), *steps, *within)]
        width = array.shape[1] // self.groups
        for group in range(self.groups):
            part = windows[:, group * width : (group + 1) * width]
            # [n, channels, positions..., kernel...] -> [n, positions..., channels, kernel...]
            yield np.moveaxis(part, 1, 1 + rank).reshape(-1, self.columns)


@dataclass(frozen=True)
class Moments:
    """What a layer's rows meet in the mean: x in the model at hand, y in the float model.

    Attributes:
        xx: E[xx'], or about the means, [columns, columns].
        yx: E[yx'] likewise.
        x: E[x], [columns].
        y: E[y].
        yy: E[yy'] likewise; None where it was not asked for.
    """

    xx: Doubles
    yx: Doubles
    x: Doubles
    y: Doubles
    yy: Doubles | None = None


@dataclass
class Sums:
    """Second moments and means of what the rows of a layer's weight meet, summed as it comes.

    Attributes:
        meeting: How the layer lays it out.
        xx: Sum of xx', [groups, columns, columns].
        yx: Sum of yx'; the same array as `xx` where x and y are one.
        x: Sum of x, [groups, columns].
        y: Sum of y; the same array as `x` where they are one.
        count: Rows so far.
        yy: Sum of yy', where it is wanted.
        samples: Samples so far, along the first axis of what was added.
    """

    meeting: Meeting
    xx: Doubles
    yx: Doubles
    x: Doubles
    y: Doubles
    count: float = 0.0
    yy: Doubles | None = None
    samples: int = 0

    @classmethod
    def empty(cls, meeting: Meeting, apart: bool, spread: bool = False) -> Sums:
        """Return sums of nothing; `apart` where x and y may differ, `spread` where yy' counts."""
        square = (meeting.groups, meeting.columns, meeting.columns)
        xx, x = np.zeros(square), np.zeros(square[:2])
        if not apart:
            return cls(meeting, xx, xx, x, x)
        yy = np.zeros(square) if spread else None
        return cls(meeting, xx, np.zeros(square), x, np.zeros(square[:2]), yy=yy)

    def add(self, x: Array, y: Array | None = None, weights: Array | None = None) -> None:
        """Add a batch.

        Args:
            x: What the layer reads, as it lies in the model.
            y: The same of the float model, where it may differ.
            weights: How much every row counts, [rows]; None counts all alike.
        """
        self.samples += len(x)
        if self.meeting.op_type != "Conv":
            self._add(x, y, weights)
            return
        # The windows of a convolution overlap, so its rows take many times the memory of a sample.
        step = max(1, ROWS // (self.meeting.columns * self.meeting.groups * max(x[0, 0].size, 1)))
        for n in range(0, len(x), step):
            self._add(x[n : n + step], None if y is None else y[n : n + step], weights)

    def _add(self, x: Array, y: Array | None, weights: Array | None) -> None:
        """Add a batch, or one sample of it."""
        rows = self.meeting.rows(np.asarray(x, np.float32))
        others = repeat(None) if y is None else self.meeting.rows(np.asarray(y, np.float32))
        for group, (row, other) in enumerate(zip(rows, others, strict=False)):
            counted = row if weights is None else row * weights[:, None]
            self.xx[group] += counted.T @ row
            self.x[group] += counted.sum(0, dtype=np.float64)
            if other is not None:
                self.yx[group] += other.T @ counted
                means = other if weights is None else other * weights[:, None]
                self.y[group] += means.sum(0, dtype=np.float64)
                if self.yy is not None:
                    self.yy[group] += means.T @ other
            if group == 0:
                self.count += len(row) if weights is None else float(weights.sum())

    def plus(self, other: Sums) -> Sums:
        """Return the sums of both."""
        xx, x = self.xx + other.xx, self.x + other.x
        count, samples = self.count + other.count, self.samples + other.samples
        if self.yx is self.xx:
            return Sums(self.meeting, xx, xx, x, x, count, samples=samples)
        yx, y = self.yx + other.yx, self.y + other.y
        yy = self.yy + other.yy if self.yy is not None and other.yy is not None else None
        return Sums(self.meeting, xx, yx, x, y, count, yy, samples)

    def moments(self, group: int, centred: bool) -> Moments:
        """Return the moments of one group of channels; `centred` takes them about the means.

        Raises:
            DataError: What was met is not finite.
        """
        if not (np.isfinite(self.xx[group]).all() and np.isfinite(self.yx[group]).all()):
            raise DataError(
                f"{self.meeting.operand!r}, which a layer reads, is not finite on the "
                "calibration feeds; look at the feeds"
            )
        count = self.count or 1.0
        x, y = self.x[group] / count, self.y[group] / count
        xx, yx = self.xx[group] / count, self.yx[group] / count
        yy = self.yy[group] / count if self.yy is not None else None
        if centred:
            xx, yx = xx - np.outer(x, x), yx - np.outer(y, x)
            yy = yy - np.outer(y, y) if yy is not None else None
        return Moments(xx, yx, x, y, yy)
