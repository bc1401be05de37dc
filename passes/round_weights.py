"""Rounds every planned weight to its codes and stores codes, scale and a DequantizeLinear.

before:  MatMul(x, w)                    note on w: int4 per_axis(1)
becomes: MatMul(x, DequantizeLinear(w_quantized: int4, w_scale, axis=1))

The codes themselves are chosen in `compiler/rounding.py`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..compiler import constants, notes
from ..compiler.contract import Context, Pass
from ..compiler.formats import Format, PerAxis, PerBlock
from ..compiler.graph import Weight, readers_of, subgraphs, weight_of
from ..compiler.quantizers import Codes, Floats
from ..compiler.rounding import Clip, rounded
from ..compiler.weights import opened


class RoundWeights(Pass):
    """Round weights to nearest.

    Attributes:
        clip: How each group's range is chosen: minmax, mse, or auto; see `compiler/rounding.py`.
    """

    clip: Clip = "auto"

    def run(self, model: ir.Model, context: Context) -> int:
        """Round every planned weight once; return how many."""
        done: set[int] = set()
        nodes = list(model.graph)
        for node in context.progress(nodes, "round weights", len(nodes)):
            weight = weight_of(node)
            if weight is None or id(weight.value) in done:
                continue
            note = notes.read(weight.value)
            if note.mode == "static" and note.format is not None:
                done.add(id(weight.value))
                self._round(weight, note.format, model.graph)
        return len(done)

    def _round(self, weight: Weight, format: Format, graph: ir.Graph) -> None:
        """Replace one float weight by codes, scale and DequantizeLinear."""
        with opened(weight.value) as array:
            values = np.asarray(array, np.float32)
            codes, scale = rounded(values, format, self.clip, readers_of(weight.value))
            del values, array
        _store(weight, codes, scale, format, graph)


def _store(weight: Weight, codes: Codes, scale: Floats, format: Format, graph: ir.Graph) -> None:
    """Write initializers and the DequantizeLinear node, and rewire every reader."""
    old, name = weight.value, str(weight.value.name)
    stored = constants.add(graph, f"{name}_quantized", codes, format.onnx_type)
    scales = constants.add(graph, f"{name}_scale", scale)
    attributes: dict[str, int] = {}
    match format.granularity:
        case PerAxis(axis):
            attributes = {"axis": axis}
        case PerBlock(axis, size):
            attributes = {"axis": axis, "block_size": size}
    node = constants.make_node(
        "DequantizeLinear",
        [stored, scales, constants.zero_points(graph, scale, format.onnx_type)],
        f"{name}_DequantizeLinear",
        like=old,
        attributes=attributes,
    )
    output = node.outputs[0]
    notes.move(old, stored)
    graph.insert_before(_first_reader(old, graph), node)
    ir.convenience.replace_all_uses_with(old, output)
    graph.initializers.pop(name)


def _first_reader(value: ir.Value, graph: ir.Graph) -> ir.Node:
    """Return the first node of the graph that reads a value, or whose bodies do."""
    reads = {id(use.node) for use in value.uses()}
    return next(
        node
        for node in graph
        if id(node) in reads
        or any(id(inner) in reads for body in subgraphs(node) for inner in body.all_nodes())
    )
