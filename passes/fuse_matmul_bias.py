"""Lets the integer MatMul add its bias itself and write float.

before:  Add(MatMul(DequantizeLinear(xq, xs, xz), DequantizeLinear(wq, ws)), b)
becomes: com.microsoft.MatMulIntegerToFloat(xq, wq, xs, ws, xz, , b)

onnxruntime fuses the MatMul by itself but leaves the Add; then it fuses that Add with a Gelu
behind it into a BiasGelu
that takes longer than Gelu. Figures in docs/targets.md.
"""

from __future__ import annotations

import onnx_ir as ir

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_constant, is_standard, sole_consumer

EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


class FuseMatmulBias(Pass):
    """Fold a constant bias into the integer MatMul before it."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Fuse wherever the product is read by the bias alone; return how many."""
        changed = 0
        for node in list(model.graph):
            add = _bias_add(node)
            if add is not None:
                _fuse(node, add, model.graph)
                changed += 1
        if changed:
            model.graph.opset_imports["com.microsoft"] = 1
        return changed


def _bias_add(node: ir.Node) -> ir.Node | None:
    """Return the Add of a constant vector behind an integer MatMul, or None."""
    if not is_standard(node, "MatMul") or not _fits(node.inputs[0]):
        return None
    if not _fits(node.inputs[1], columns=True):
        return None
    add = sole_consumer(node.outputs[0])
    if add is None or not is_standard(add, "Add"):
        return None
    weight, bias = node.inputs[1], _other(add, node.outputs[0])
    if weight is None or weight.shape is None or len(weight.shape) != 2 or not is_constant(bias):
        return None
    is_vector = (
        bias is not None and bias.shape is not None and tuple(bias.shape) == (weight.shape[1],)
    )
    return add if is_vector else None


def _fits(value: ir.Value | None, columns: bool = False) -> bool:
    """Whether the value is dequantized in a form that the kernel takes.

    That is 8-bit codes with one scale, or with one for each of the `columns`.
    """
    producer = value.producer() if value is not None else None
    if producer is None or not is_standard(producer, "DequantizeLinear"):
        return False
    codes, scale = producer.inputs[:2]
    if codes is None or codes.dtype not in EIGHT_BITS or scale is None or scale.shape is None:
        return False
    rank = len(scale.shape)
    by_column = columns and rank == 1 and producer.attributes.get_int("axis", 1) in (1, -1)
    return rank == 0 or by_column


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the operand of a two-operand node that is not `value`."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _fuse(matmul: ir.Node, add: ir.Node, graph: ir.Graph) -> None:
    """Replace the two nodes, and drop the DequantizeLinear nodes that nobody else reads."""
    sources = [v.producer() for v in matmul.inputs if v is not None]
    x, w = sources
    assert x is not None
    assert w is not None
    output = add.outputs[0]
    name = str(output.name)
    fused = constants.make_node(
        "MatMulIntegerToFloat",
        [
            *(x.inputs[0], w.inputs[0], x.inputs[1], w.inputs[1]),
            *(source.inputs[2] if len(source.inputs) > 2 else None for source in (x, w)),
            _other(add, matmul.outputs[0]),
        ],
        str(matmul.name),
        output,
        domain="com.microsoft",
        output=f"{name}_fused",
    )
    graph.insert_before(add, fused)
    ir.convenience.replace_all_uses_with(output, fused.outputs[0], replace_graph_outputs=True)
    graph.remove([add, matmul], safe=True)
    output.name = f"{name}_unfused"
    fused.outputs[0].name = name
    for source in (x, w):
        if not tuple(source.outputs[0].uses()):
            graph.remove(source, safe=True)
