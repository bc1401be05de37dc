"""Second moments of what weights meet, E[x x^T], streamed over feeds in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .contract import Context
from .graph import Weight, operand_of
from .observe import Observer
from .sensitivity import spread

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

SHARE = 2  # of the memory bound: what covariances may take, the rest is for activations


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


def covariances(
    model: ir.Model, meetings: Sequence[Meeting], context: Context, samples: int = 0
) -> Iterator[tuple[Meeting, Doubles]]:
    """Yield (meeting, [groups, columns, columns]) for each, as many at once as memory allows.

    Means over all positions, float64.

    Args:
        model: The model that the meetings are of.
        meetings: What to look at; each is yielded once.
        context: Its feeds, work folder and memory bound.
        samples: How many samples are used, evenly spread; 0 takes all.
    """
    assert context.feeds is not None
    feeds = spread(context.feeds, samples)
    observer = Observer(model, context.folder, context.memory // SHARE)
    for part in _slices(list(dict.fromkeys(meetings)), context.memory // SHARE):
        sums = {one: np.zeros((one.groups, one.columns, one.columns)) for one in part}
        counts = dict.fromkeys(part, 0)
        names = list(dict.fromkeys(one.operand for one in part))
        for name, array in observer.batches(names, feeds, context.progress):
            for one in part:
                if one.operand != name:
                    continue
                counts[one] += _add(one, np.asarray(array, np.float32), sums[one])
        for one in part:
            yield one, sums.pop(one) / max(counts[one], 1)


def _add(one: Meeting, array: Array, sums: Doubles) -> int:
    """Add the second moments of a batch; return how many positions each group had."""
    # The windows of a convolution overlap: one sample at a time bounds what they are copied to.
    parts = [array] if one.op_type != "Conv" else [array[n : n + 1] for n in range(len(array))]
    positions = 0
    for part in parts:
        for group, rows in enumerate(one.rows(part)):
            sums[group] += rows.T @ rows
        positions += len(rows)
    return positions


def _slices(meetings: Sequence[Meeting], memory: int) -> Iterator[list[Meeting]]:
    """Cut into runs whose covariances fit the memory bound together; one always does."""
    part: list[Meeting] = []
    used = 0
    for one in meetings:
        size = 8 * one.groups * one.columns**2
        if part and used + size > memory:
            yield part
            part, used = [], 0
        part.append(one)
        used += size
    if part:
        yield part
