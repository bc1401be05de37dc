"""Stores a weight that takes few values as indices and a table, unpacked once, at load.

before:  MatMul(dq(x), DequantizeLinear(w: int8 of at most 16 values, s))
becomes: MatMul(dq(x), DequantizeLinear(Gather(table: int8 [16], Cast(index: uint4, to=int32)), s))
before:  Conv(x, w: float of at most 16 values a channel)
becomes: Conv(x, Reshape(GatherElements(table [O, 16], Cast(index: uint4 [O, n]), axis=1), shape))

Weights that `split-layers` gave few values, and only where indices and tables are smaller. The
runtime folds the Gather, so that in memory the weight has the width of the kernel that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..compiler import constants, notes
from ..compiler.contract import Context, Pass
from ..compiler.formats import Format, PerBlock, index_bits
from ..compiler.graph import WEIGHTED, channel_axis, first_reader, is_standard
from ..compiler.splitting import Channels
from ..compiler.weights import opened

Array = npt.NDArray[Any]

UNPACKS = ("Cast", "Sub", "Mul", "DequantizeLinear")  # what may lie between codes and a kernel

MOST = 256  # entries of a table; an index has a byte at most
CONTAINERS = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


@dataclass(frozen=True)
class Packed:
    """A weight as indices and tables.

    Attributes:
        index: Shape of the weight where one table serves all of it, else [groups, n].
        table: [entries], or [groups, entries].
        channels: Where the channels of the weight lie, or None where one table serves all.
        bits: Width of an index.
    """

    index: Array
    table: Array
    channels: Channels | None
    bits: int

    @property
    def bytes(self) -> int:
        """Stored bytes of indices and tables."""
        return -(-self.index.size * self.bits // 8) + self.table.nbytes


class PackTables(Pass):
    """Store split weights as indices into tables."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Pack every split weight of few values; return how many."""
        narrowest = 2 if int(model.graph.opset_imports.get("", 0)) >= 25 else 4
        changed = 0
        for value in list(model.graph.initializers.values()):
            note = notes.read(value)
            if note.split is None or note.part is not None or value.const_value is None:
                continue
            if value.dtype not in (ir.DataType.INT8, ir.DataType.FLOAT):
                continue
            with opened(value) as array:
                whole = np.array(array)
            found = min(_candidates(value, whole, narrowest), key=lambda p: p.bytes, default=None)
            if found is None or found.bytes >= whole.nbytes:
                context.remark(self, value.name, "a table would be no smaller than the weight")
                continue
            _store(model.graph, value, found, whole.shape)
            changed += 1
        return changed


def _candidates(value: ir.Value, whole: Array, narrowest: int) -> Iterator[Packed]:
    """Yield the weight with one table, with one a channel, and with one a block."""
    distinct = np.unique(whole)
    if distinct.size <= MOST:
        index = np.searchsorted(distinct, whole).astype(np.uint8)
        yield Packed(index, distinct, None, max(index_bits(distinct.size), narrowest))
    note = notes.read(value)
    assert note.split is not None
    asked = Format.parse(note.split)
    channels = _channels(value)
    if channels is None or channels.axis > 1:  # its note must fit an index of two axes
        return
    rows = channels.rows(whole)
    widths = [rows.shape[1]]
    over = asked.split.over if asked.split is not None else None
    if isinstance(over, PerBlock) and rows.shape[1] % over.size == 0:
        widths.append(over.size)
    for width in widths:
        found = _tables(rows.reshape(-1, width))
        if found is not None:
            index, table = found
            yield Packed(index, table, channels, max(index_bits(table.shape[1]), narrowest))


def _channels(value: ir.Value) -> Channels | None:
    """Return where the channels of a stored weight lie, as the node that it ends in sees them."""
    ahead, rank = [value], len(value.shape or ())
    while ahead:
        current = ahead.pop(0)
        for use in current.uses():
            weight = WEIGHTED.get(use.node.op_type, (None,))[0]
            if use.idx == weight and is_standard(use.node, use.node.op_type):
                return Channels.of_node(use.node, channel_axis(use.node, rank))
            ahead += use.node.outputs if use.node.op_type in UNPACKS else []
    return None


def _tables(rows: Array) -> tuple[Array, Array] | None:
    """Return indices and a table for each row; None where a row takes too many values."""
    if np.unique(rows[0]).size > MOST:
        return None
    order = np.argsort(rows, axis=1, kind="stable")
    ascending = np.take_along_axis(rows, order, 1)
    rank = np.zeros(rows.shape, np.intp)
    np.cumsum(ascending[:, 1:] != ascending[:, :-1], axis=1, out=rank[:, 1:])
    entries = int(rank.max()) + 1
    if entries > MOST:
        return None
    index = np.empty(rows.shape, np.uint8)
    np.put_along_axis(index, order, rank.astype(np.uint8), 1)
    table = np.repeat(ascending[:, -1:], entries, axis=1)
    np.put_along_axis(table, rank, ascending, 1)
    return index, table


def _store(graph: ir.Graph, value: ir.Value, packed: Packed, shape: tuple[int, ...]) -> None:
    """Write index and table, and rewire the weight's readers to what unpacks them."""
    name = str(value.name)
    index = constants.add(graph, f"{name}_index", packed.index, CONTAINERS[packed.bits])
    table = constants.add(graph, f"{name}_table", packed.table)
    made: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], label: str, like: ir.Value, **more: Any) -> ir.Value:
        dtype = ir.DataType.INT32 if op == "Cast" else table.dtype
        made.append(constants.make_node(op, inputs, f"{name}_{label}", like, more, dtype))
        return made[-1].outputs[0]

    places = add("Cast", [index], "places", index, to=ir.DataType.INT32.value)
    if packed.channels is None:
        unpacked = add("Gather", [table, places], "unpacked", value)
    else:
        unpacked = add("GatherElements", [table, places], "looked_up", index, axis=1)
        unpacked = _reshaped(graph, add, unpacked, value, packed.channels, shape)
    graph.insert_before(first_reader(value, graph), made)
    notes.move(value, index)
    ir.convenience.replace_all_uses_with(value, unpacked)
    graph.initializers.pop(name)


def _reshaped(
    graph: ir.Graph,
    add: Any,
    rows: ir.Value,
    value: ir.Value,
    channels: Channels,
    shape: tuple[int, ...],
) -> ir.Value:
    """Bring rows of channels into the weight's own shape; the inverse of `Channels.rows`."""
    name, axis, groups = str(value.name), channels.axis, channels.groups

    def to(source: ir.Value, sizes: tuple[int, ...], label: str) -> ir.Value:
        target = constants.add(graph, f"{name}_{label}", np.asarray(sizes, np.int64))
        made: ir.Value = add("Reshape", [source, target], label, value)
        made.shape = ir.Shape(sizes)
        return made

    if groups > 1:
        first, *rest = shape
        inner = (groups, rest[axis - 1], first // groups, *rest[: axis - 1], *rest[axis:])
        order = [0, *range(2, axis + 2), 1, *range(axis + 2, len(inner))]
        moved: ir.Value = add(
            "Transpose", [to(rows, inner, "grouped")], "turned", value, perm=order
        )
        moved.shape = ir.Shape([inner[i] for i in order])
        return to(moved, shape, "shaped")
    front = (shape[axis], *(n for i, n in enumerate(shape) if i != axis))
    if axis == 0:
        return to(rows, shape, "shaped")
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    turned: ir.Value = add("Transpose", [to(rows, front, "front")], "turned", value, perm=order)
    return turned
