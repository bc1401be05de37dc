"""Looks embeddings up in codes, and rescales only the rows that were looked up.

before:  Gather(DequantizeLinear(table: int8 [V, D], scale [V], axis=0), ids)   all rows, each call
becomes: Mul(Cast(Gather(table, ids), to=float), Gather(scale [V, 1], ids))

A 4- or 2-bit table goes through a Cast to int8 that is folded at load, as other narrow weights.
"""

from __future__ import annotations

import onnx_ir as ir

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_standard


class LowerEmbeddings(Pass):
    """Gather codes and their scales instead of dequantizing whole tables."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite every Gather from a dequantized table; return how many."""
        changed = 0
        for node in list(model.graph):
            table = node.inputs[0] if is_standard(node, "Gather") else None
            source = table.producer() if table is not None else None
            if source is None or not is_standard(source, "DequantizeLinear"):
                continue
            scale = source.inputs[1]
            if (
                source.attributes.get_int("axis", 1) != 0
                or scale is None
                or scale.const_value is None
            ):
                continue
            _lower(node, source, model.graph)
            changed += 1
        return changed


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
        graph.remove(source, safe=True)
        if not tuple(scale.uses()):
            graph.initializers.pop(str(scale.name))
