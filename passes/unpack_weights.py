"""Stores narrow weights so that the runtime unpacks them once, at load.

before:  MatMul(dq(x), DequantizeLinear(w: int4, s))     the DequantizeLinear runs on every call
becomes: MatMul(dq(x), DequantizeLinear(Cast(w: int4, to=int8), s))     the Cast is folded at load,
         and the int8 kernel takes the rest
before:  MatMul(dq(x), DequantizeLinear(w: uint4, s, z))
becomes: MatMul(dq(x), DequantizeLinear(Cast(Sub(Cast(w, to=int32), z), to=int8), s))
before:  MatMul(x, DequantizeLinear(w: int8, s))         float x: there is no integer kernel
becomes: MatMul(x, Mul(Cast(w, to=float), s))            folded at load: the float kernel's speed
before:  MatMul(x, DequantizeLinear(w: uint4, s, z))
becomes: MatMul(x, Mul(Sub(Cast(w, to=float), Cast(z, to=float)), s))

The file keeps the narrow form. In memory the weight has the width of the kernel that reads it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_constant, is_standard

NARROW = (ir.DataType.INT4, ir.DataType.INT2)
SHIFTED = (ir.DataType.UINT4, ir.DataType.UINT2)  # code less zero point fits an int8


class UnpackWeights(Pass):
    """Unpack weights at load instead of on every call."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite the DequantizeLinear of every stored weight; return how many."""
        changed = 0
        for node in list(model.graph):
            if not is_standard(node, "DequantizeLinear") or not is_constant(node.inputs[0]):
                continue
            if node.attributes.get_int("block_size", 0) or _is_bias(node) or not _known(node):
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


def _known(node: ir.Node) -> bool:
    """Whether scale and zero point are constants."""
    return all(value is None or value.const_value is not None for value in node.inputs[1:])


def _shift(node: ir.Node) -> ir.Value | None:
    """Return the zero point, or None where it is zero."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None or zero.const_value is None or not np.any(zero.const_value.numpy()):
        return None
    return zero


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
    """Put what makes int8 codes before the DequantizeLinear; return 1 when it was needed."""
    stored, scale, shift = node.inputs[0], node.inputs[1], _shift(node)
    assert stored is not None
    assert scale is not None
    assert scale.const_value is not None
    if stored.dtype not in (SHIFTED if shift is not None else NARROW + SHIFTED):
        return 0
    made: list[ir.Node] = []
    codes = stored
    if shift is not None:
        wide = _cast(stored, ir.DataType.INT32, f"{stored.name}_widen", made)
        zeros = _cast(_spread(node, shift, graph), ir.DataType.INT32, f"{shift.name}_widen", made)
        codes = _apply("Sub", [wide, zeros], f"{stored.name}_shift", wide, made)
    codes = _cast(codes, ir.DataType.INT8, f"{stored.name}_unpack", made)
    graph.insert_before(node, made)
    node.replace_input_with(0, codes)
    zero = constants.zero_points(graph, scale.const_value.numpy(), ir.DataType.INT8)
    node.replace_input_with(2, zero)
    return 1


def _widen_to_float(node: ir.Node, graph: ir.Graph) -> None:
    """Replace the DequantizeLinear by Cast, Sub and Mul, which are folded."""
    stored, scale, shift = node.inputs[0], node.inputs[1], _shift(node)
    assert stored is not None
    assert scale is not None
    made: list[ir.Node] = []
    floats = _cast(stored, ir.DataType.FLOAT, f"{stored.name}_widen", made)
    if shift is not None:
        zeros = _cast(_spread(node, shift, graph), ir.DataType.FLOAT, f"{shift.name}_widen", made)
        floats = _apply("Sub", [floats, zeros], f"{stored.name}_shift", floats, made)
    factors = [floats, _spread(node, scale, graph)]
    output = node.outputs[0]
    product = _apply("Mul", factors, f"{stored.name}_rescale", output, made)
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(output, product)
    graph.remove(node, safe=True)


def _spread(node: ir.Node, value: ir.Value, graph: ir.Graph) -> ir.Value:
    """Return a scale or zero point in a shape that broadcasts against the codes."""
    assert value.const_value is not None
    assert node.inputs[0] is not None
    array = value.const_value.numpy()
    if array.ndim == 1:
        rank = len(node.inputs[0].shape or ())
        axis = node.attributes.get_int("axis", 1)
        array = array.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    return constants.add(graph, f"{value.name}_spread", np.ascontiguousarray(array), value.dtype)


def _cast(source: ir.Value, to: ir.DataType, name: str, made: list[ir.Node]) -> ir.Value:
    """Add a Cast."""
    made.append(constants.make_node("Cast", [source], name, source, {"to": to.value}, to))
    return made[-1].outputs[0]


def _apply(
    op_type: str, inputs: list[ir.Value], name: str, like: ir.Value, made: list[ir.Node]
) -> ir.Value:
    """Add a node of two inputs."""
    made.append(constants.make_node(op_type, inputs, name, like))
    return made[-1].outputs[0]
