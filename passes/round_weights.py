"""Rounds every planned weight to its codes and stores codes, scale and a DequantizeLinear.

before:  MatMul(x, w)                    note on w: int4 per_axis(1)
becomes: MatMul(x, DequantizeLinear(w_quantized: int4, w_scale, axis=1))

A signed format has zero points of zero, an unsigned one those of its ranges. The codes themselves
are chosen in `compiler/rounding.py`; a format with a split is `split-layers`' to obey first.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..compiler import constants, notes
from ..compiler.contract import Context, Pass
from ..compiler.errors import RecipeError
from ..compiler.formats import Format, PerAxis, PerBlock
from ..compiler.graph import Weight, first_reader, readers_of, weight_of
from ..compiler.rounding import Clip, Rounded, rounded
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
                if note.format.split is not None:
                    raise RecipeError(
                        f"round-weights: {weight.value.name!r} is planned as {note.format}; put "
                        "split-layers before"
                    )
                done.add(id(weight.value))
                self._round(weight, note.format, model.graph)
        return len(done)

    def _round(self, weight: Weight, format: Format, graph: ir.Graph) -> None:
        """Replace one float weight by codes, scale and DequantizeLinear."""
        with opened(weight.value) as array:
            values = np.asarray(array, np.float32)
            found = rounded(values, format, self.clip, readers_of(weight.value))
            del values, array
        _store(weight, found, graph)


def _store(weight: Weight, found: Rounded, graph: ir.Graph) -> None:
    """Write initializers and the DequantizeLinear node, and rewire every reader."""
    old, name, element = weight.value, str(weight.value.name), found.format.onnx_type
    stored = constants.add(graph, f"{name}_quantized", found.codes, element)
    scales = constants.add(graph, f"{name}_scale", found.scale)
    if np.any(found.zero_point):
        zero = constants.add(graph, f"{name}_zero_point", found.zero_point, element)
    else:
        zero = constants.zero_points(graph, found.scale, element)
    attributes: dict[str, int] = {}
    match found.format.granularity:
        case PerAxis(axis):
            attributes = {"axis": axis}
        case PerBlock(axis, size):
            attributes = {"axis": axis, "block_size": size}
    node = constants.make_node(
        "DequantizeLinear",
        [stored, scales, zero],
        f"{name}_DequantizeLinear",
        like=old,
        attributes=attributes,
    )
    output = node.outputs[0]
    notes.move(old, stored)
    graph.insert_before(first_reader(old, graph), node)
    ir.convenience.replace_all_uses_with(old, output)
    graph.initializers.pop(name)
