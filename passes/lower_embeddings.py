"""Looks embeddings up in codes, and rescales only the rows that were looked up.

before:  Gather(DequantizeLinear(table: int8 [V, D], scale [V], axis=0), ids)   all rows, each call
becomes: Mul(Cast(Gather(table, ids), to=float), Gather(scale [V, 1], ids))

A 4- or 2-bit table goes through a Cast to int8 that is folded at load, as other narrow weights.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..compiler import constants, notes
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_standard

SIGNED = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT2)


class LowerEmbeddings(Pass):
    """Gather codes and their scales instead of dequantizing whole tables."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite every Gather from a dequantized table; return how many."""
        changed = 0
        for node in list(model.graph):
            table = node.inputs[0] if is_standard(node, "Gather") else None
            source = table.producer() if table is not None else None
            if source is None or node.attributes.get_int("axis", 0) != 0 or not _by_row(source):
                continue
            _lower(node, source, model.graph)
            changed += 1
        return changed


def _by_row(source: ir.Node) -> bool:
    """Whether this is a DequantizeLinear with a scale a row and zero points of zero."""
    if not is_standard(source, "DequantizeLinear"):
        return False
    if source.attributes.get_int("block_size", 0) != 0:
        return False
    codes, scale, *rest = source.inputs
    if codes is None or codes.dtype not in SIGNED or scale is None or scale.const_value is None:
        return False
    zero = rest[0] if rest else None
    if zero is not None and (zero.const_value is None or np.any(zero.const_value.numpy())):
        return False
    return len(scale.const_value.shape) == 1 and source.attributes.get_int("axis", 1) == 0


def _lower(gather: ir.Node, source: ir.Node, graph: ir.Graph) -> None:
    """Rewrite one lookup; the DequantizeLinear goes when nobody else reads it."""
    codes, scale, ids, output = (
        source.inputs[0],
        source.inputs[1],
        gather.inputs[1],
        gather.outputs[0],
    )
    assert codes is not None
    assert scale is not None
    assert scale.const_value is not None
    name = str(output.name)
    rows = scale.const_value.numpy()
    rank = len(codes.shape or ())
    column = constants.add(graph, f"{codes.name}_row_scale", rows.reshape(-1, *[1] * (rank - 1)))
    notes.write(column, part=notes.read(codes).part or str(codes.name))
    made: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value | None], suffix: str, dtype: ir.DataType) -> ir.Value:
        to = {"to": dtype.value} if op == "Cast" else None
        made.append(constants.make_node(op, inputs, f"{name}_{suffix}", output, to, dtype))
        return made[-1].outputs[0]

    if codes.dtype != ir.DataType.INT8:
        narrow = add("Cast", [codes], "table", ir.DataType.INT8)
        narrow.shape = codes.shape
        codes = narrow
    looked_up = add("Gather", [codes, ids], "codes", ir.DataType.INT8)
    scales = add("Gather", [column, ids], "scales", ir.DataType.FLOAT)
    scales.shape = None
    floats = add("Cast", [looked_up], "floats", ir.DataType.FLOAT)
    product = add("Mul", [floats, scales], "rescaled", ir.DataType.FLOAT)
    graph.insert_before(gather, made)
    ir.convenience.replace_all_uses_with(output, product, replace_graph_outputs=True)
    graph.remove(gather, safe=True)
    output.name = f"{name}_lowered"
    product.name = name
    if not tuple(source.outputs[0].uses()):
        parameters = source.inputs[1:]
        graph.remove(source, safe=True)
        for unread in parameters:
            if unread is not None and not tuple(unread.uses()):
                graph.initializers.pop(str(unread.name))
