"""Keeps a residual sum and its LayerNormalization two kernels.

before:  LayerNormalization(Add(x, skip), gamma, beta)
becomes: LayerNormalization(Sum(x, skip), gamma, beta)

onnxruntime fuses Add + LayerNormalization into SkipLayerNormalization, whose CPU kernel is
slower than the two kernels it replaces; Sum means the same and is not matched. Figures in
docs/targets.md.
"""

from __future__ import annotations

import onnx_ir as ir

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_standard


class SplitSkipLayernorm(Pass):
    """Write the residual Add before a LayerNormalization as Sum."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite every Add that a LayerNormalization reads; return how many."""
        changed = 0
        for node in list(model.graph):
            source = (
                node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            )
            if (
                source is None
                or not is_standard(node, "LayerNormalization")
                or not is_standard(source, "Add")
            ):
                continue
            _rewrite(source, model.graph)
            changed += 1
        return changed


def _rewrite(add: ir.Node, graph: ir.Graph) -> None:
    """Replace one Add by Sum under the same names."""
    old = add.outputs[0]
    name = str(old.name)
    total = constants.make_node("Sum", list(add.inputs), f"{add.name}", old, output=f"{name}_sum")
    graph.insert_before(add, total)
    ir.convenience.replace_all_uses_with(old, total.outputs[0], replace_graph_outputs=True)
    graph.remove(add, safe=True)
    old.name = f"{name}_add"
    total.outputs[0].name = name
