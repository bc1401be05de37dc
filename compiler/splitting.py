"""Parts a weight by value, and rounds each part in a range of its own.

A weight is the exact sum of its parts: each of its elements is in one of them, and zero in the
others. Source: J. Song and F. Lin, SplitQuant (arXiv 2501.12428). The clusters are exact and the
same on every run, and no element is ever in two parts, which the authors' code does not hold for
constant tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .formats import Format, Granularity, PerAxis, PerBlock, PerTensor, Split
from .graph import Weight
from .kmeans import Clustering, kmeans
from .quantizers import Floats, grouped_max, spread
from .rounding import Clip, rounded

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.uint8]

NEAREST_BLOCK = 32


@dataclass(frozen=True)
class Channels:
    """A weight as a matrix of one row an output channel, and the way back.

    A grouped ConvTranspose has its channels on two axes: group, and channel of the group.
    """

    axis: int = 0
    groups: int = 1

    @classmethod
    def of(cls, reader: Weight) -> Channels:
        """Return how one reader sees its weight."""
        return cls.of_node(reader.node, reader.axis)

    @classmethod
    def of_node(cls, node: ir.Node, axis: int) -> Channels:
        """Return how a node sees a weight that has its channels on an axis."""
        transposed = node.op_type == "ConvTranspose"
        return cls(axis, node.attributes.get_int("group", 1) if transposed else 1)

    def rows(self, array: Array) -> Array:
        """Return [channels, elements of a channel]."""
        if self.groups > 1:
            array = array.reshape(self.groups, -1, *array.shape[1:])
            array = np.moveaxis(array, self.axis + 1, 1)
            return array.reshape(array.shape[0] * array.shape[1], -1)
        array = np.moveaxis(array, self.axis, 0)
        return array.reshape(len(array), -1)

    def back(self, rows: Array, shape: Sequence[int]) -> Array:
        """Return the rows in the weight's own shape."""
        if self.groups > 1:
            first, *rest = shape
            moved = (self.groups, rest[self.axis - 1], first // self.groups)
            others = rest[: self.axis - 1] + rest[self.axis :]
            array = np.moveaxis(rows.reshape(*moved, *others), 1, self.axis + 1)
            return array.reshape(shape)
        others = [n for i, n in enumerate(shape) if i != self.axis]
        return np.moveaxis(rows.reshape(shape[self.axis], *others), 0, self.axis)


def parts_of(values: Floats, split: Split, channels: Channels) -> Ids:
    """Return the part of each element, ascending by value and dense from 0 in each group.

    Args:
        values: The weight, finite.
        split: Into how many clusters, and over what.
        channels: Where its output channels lie.
    """
    return _over(values, split, channels, lambda found, _: found.ids)


def centres_of(values: Floats, split: Split, channels: Channels) -> Floats:
    """Return the mean of each element's cluster, shape of the weight."""
    return _over(
        values,
        split,
        channels,
        lambda found, _: np.take_along_axis(found.centres, found.ids, 1).astype(np.float32),
    )


def _over(
    values: Floats, split: Split, channels: Channels, told: Callable[[Clustering, Floats], Array]
) -> Array:
    """Cluster what the split spans, and return what is told of each in the weight's shape."""

    def clustered(rows: Floats) -> Array:
        return told(kmeans(rows, split.clusters), rows)

    if isinstance(split.over, PerTensor):
        return clustered(values.reshape(1, -1)).reshape(values.shape)
    rows = channels.rows(values)
    if isinstance(split.over, PerAxis):
        return np.ascontiguousarray(channels.back(clustered(rows), values.shape))
    size, (count, width) = split.over.size, rows.shape
    whole = width // size * size  # the last block of a row may be shorter
    parts = []
    if whole:
        parts.append(clustered(rows[:, :whole].reshape(-1, size)).reshape(count, whole))
    if whole < width:
        parts.append(clustered(rows[:, whole:]))
    return np.ascontiguousarray(channels.back(np.hstack(parts), values.shape))


def masked(values: Floats, ids: Ids) -> Iterator[Floats]:
    """Yield the parts: the weight where an element is of the part, zero elsewhere.

    A part of zeros alone is left out; the sum of the others is the weight.
    """
    for part in range(int(ids.max(initial=0)) + 1):
        floats = np.where(ids == part, values, np.zeros((), values.dtype))
        if np.any(floats):
            yield floats


def split_floats(
    values: Floats, format: Format, clip: Clip = "auto", readers: Sequence[Weight] = ()
) -> Floats:
    """Return the float32 weight that the runtime computes with after splitting and rounding.

    Args:
        values: The weight, finite.
        format: What a part becomes, with the split.
        clip: How each part's range is chosen where it holds zero; see `rounded`.
        readers: The weight as its readers see it, at least one.
    """
    assert format.split is not None
    channels = Channels.of(readers[0])
    ids = parts_of(values, format.split, channels)
    floats = joined(values, ids, format, channels, clip, readers)
    behind = rounded_to(format, readers[0])
    return floats if behind is None else rounded(floats, behind, clip, readers).floats()


def joined(
    values: Floats,
    ids: Ids,
    format: Format,
    channels: Channels,
    clip: Clip = "auto",
    readers: Sequence[Weight] = (),
) -> Floats:
    """Return the sum of the rounded parts as float32.

    A part's range is taken over what the clustering spans or over what shares a scale in the
    format, whichever is finer; ranges that hold zero are the format's, as those of branches are.
    """
    split = format.split
    assert split is not None
    if split.levels == 1:
        return centres_of(values, split, channels)
    floats: Floats = np.zeros(values.shape, np.float32)
    if split.zero:
        for part in masked(values, ids):  # supports are disjoint, so the sum is exact
            floats += rounded(part, format.plain, clip, readers).floats()
        return floats
    if _fineness(split.over) < _fineness(format.granularity):
        return _in_own_ranges(values, ids, format)
    # A range is that of a part where the clusters are its own.
    by_row = replace(format, granularity=PerAxis(0))
    return _over(
        values, split, channels, lambda found, rows: _in_own_ranges(rows, found.ids, by_row)
    )


def _fineness(granularity: Granularity) -> tuple[int, int]:
    """Return a key that is greater for finer granularities."""
    match granularity:
        case PerBlock(_, size):
            return 2, -size
        case PerAxis():
            return 1, 0
    return 0, 0


def _in_own_ranges(values: Floats, ids: Ids, format: Format) -> Floats:
    """Round each part in its own range."""
    floats: Floats = np.zeros(values.shape, np.float32)
    for number in range(int(ids.max(initial=0)) + 1):
        member = ids == number
        floats = np.where(member, _in_own_range(values, member, format), floats)
    return floats


def _in_own_range(values: Floats, member: npt.NDArray[np.bool_], format: Format) -> Floats:
    """Round to equal steps between the least and the greatest member of each group.

    The range need not hold zero: an index names the value itself.
    """
    assert format.split is not None
    low = -grouped_max(np.where(member, -values, -np.inf), format, -np.inf)
    high = grouped_max(np.where(member, values, -np.inf), format, -np.inf)
    origin = spread(np.minimum(low, high), values.shape, format).astype(np.float64)
    width = spread(np.maximum(high, low), values.shape, format) - origin
    steps = (format.split.levels or 2**format.bits) - 1
    step = np.where(member & (width > 0), width, 1.0) / steps
    index = np.rint((np.where(member, values, 0.0) - np.where(member, origin, 0.0)) / step)
    return np.where(member, origin + index * step, 0.0).astype(np.float32)


def rounded_to(format: Format, reader: Weight) -> Format | None:
    """Return the format that the sum of the parts is rounded to; None where it stays as it is."""
    assert format.split is not None
    if format.split.form == "nearest":
        return Format("int4", PerBlock(1 - reader.axis, NEAREST_BLOCK))
    if format.split.form == "int8-grid":
        blocked = isinstance(format.granularity, PerBlock)
        granularity = PerAxis(reader.axis) if blocked else format.granularity
        return Format("int8", granularity, format.split.grid)
    return None


def sqnr_db(reference: Floats, actual: Floats) -> float:
    """Return signal over noise power in dB; inf where both are the same."""
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(actual.astype(np.float64) - reference).sum())
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
