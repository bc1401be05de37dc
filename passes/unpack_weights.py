"""Stores narrow weights so that the runtime unpacks them once, at load.

before:  MatMul(dq(x), DequantizeLinear(w: int4, s))     the DequantizeLinear runs on every call
becomes: MatMul(dq(x), DequantizeLinear(Cast(w: int4, to=int8), s))     the Cast is folded at load,
         and the int8 kernel takes the rest
before:  MatMul(x, DequantizeLinear(w: int8, s))         float x: there is no integer kernel
becomes: MatMul(x, Mul(Cast(w, to=float), s))            folded at load: the float kernel's speed

The file keeps the narrow form. In memory the weight has the width of the kernel that reads it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_constant, is_standard

KERNEL = {ir.DataType.INT4: ir.DataType.INT8, ir.DataType.INT2: ir.DataType.INT8}


class UnpackWeights(Pass):
    """Unpack weights at load instead of on every call."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite the DequantizeLinear of every stored weight; return how many."""
        changed = 0
        for node in list(model.graph):
            if not is_standard(node, "DequantizeLinear") or not is_constant(node.inputs[0]):
                continue
            if node.attributes.get_int("block_size", 0) or _is_bias(node) or _is_shifted(node):
                continue
            if _integer_readers_only(node):
                changed += _widen_to_kernel(node, model.graph)
            else:
                _widen_to_float(node, model.graph)
                changed += 1
        RemoveUnusedNodesPass()(model)  # zero points of the narrow type
        return changed


def _is_bias(node: ir.Node) -> bool:
    """Whether the codes are an int32 bias, which the integer kernel takes as it is."""
    return node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT32


def _is_shifted(node: ir.Node) -> bool:
    """Whether a zero point is not zero, as in models that came quantized; those stay."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None:
        return False
    return zero.const_value is None or bool(np.any(zero.const_value.numpy()))


def _integer_readers_only(node: ir.Node) -> bool:
    """Whether every reader has its other operand in codes too."""
    uses = [use for use in node.outputs[0].uses() if use.idx < 2]
    return all(
        len(use.node.inputs) > 1 and _dequantized(use.node.inputs[1 - use.idx]) for use in uses
    )


def _dequantized(value: ir.Value | None) -> bool:
    """Whether a value comes out of a DequantizeLinear."""
    producer = value.producer() if value is not None else None
    return producer is not None and is_standard(producer, "DequantizeLinear")


def _widen_to_kernel(node: ir.Node, graph: ir.Graph) -> int:
    """Put a Cast to the kernel's type before the DequantizeLinear; return 1 when it was needed."""
    stored = node.inputs[0]
    assert stored is not None
    kernel = KERNEL.get(stored.dtype) if stored.dtype is not None else None
    if kernel is None:
        return 0
    cast = constants.make_node(
        "Cast",
        [stored],
        f"{stored.name}_unpack",
        stored,
        attributes={"to": kernel.value},
        dtype=kernel,
    )
    graph.insert_before(node, cast)
    node.replace_input_with(0, cast.outputs[0])
    scale = node.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    node.replace_input_with(2, constants.zero_points(graph, scale.const_value.numpy(), kernel))
    return 1


def _widen_to_float(node: ir.Node, graph: ir.Graph) -> None:
    """Replace the DequantizeLinear by Cast and Mul, which are folded; zero points are zero."""
    stored, scale = node.inputs[0], node.inputs[1]
    assert stored is not None
    assert scale is not None
    assert scale.const_value is not None
    array = scale.const_value.numpy()
    if array.ndim == 1:
        rank = len(stored.shape or ())
        axis = node.attributes.get_int("axis", 1)
        array = array.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    spread = constants.add(graph, f"{scale.name}_spread", np.ascontiguousarray(array))
    to = {"to": ir.DataType.FLOAT.value}
    cast = constants.make_node(
        "Cast", [stored], f"{stored.name}_widen", stored, attributes=to, dtype=ir.DataType.FLOAT
    )
    output = node.outputs[0]
    product = constants.make_node(
        "Mul", [cast.outputs[0], spread], f"{stored.name}_rescale", output
    )
    graph.insert_before(node, [cast, product])
    ir.convenience.replace_all_uses_with(output, product.outputs[0])
    graph.remove(node, safe=True)
