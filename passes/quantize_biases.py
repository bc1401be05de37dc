"""Turns the bias of an integer Conv or Gemm into int32 codes of scale s_x * s_w.

before:  Conv(dq(q(x)), dq(w), b)
becomes: Conv(dq(q(x)), dq(w), dq(b_quantized))

The kernel adds such a bias to its sums as it is. It comes after all that changes biases or scales.
Source: Jacob et al., arXiv 1712.05877, section 2.4.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import channel_axis, is_constant, is_standard
from ..compiler.weights import opened

INT32 = 2**31 - 1


class QuantizeBiases(Pass):
    """Store the biases of layers whose operand and weight are in codes with constant scales."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Quantize every such bias; return how many layers got one."""
        return sum(_quantize_bias(model.graph, node) for node in list(model.graph))


def _quantize_bias(graph: ir.Graph, node: ir.Node) -> bool:
    """Store the bias of one layer; return whether it has one to store."""
    bias = node.inputs[2] if is_standard(node, "Conv", "Gemm") and len(node.inputs) > 2 else None
    if bias is None or not is_constant(bias):
        return False
    scales = [_constant_scale(value) for value in node.inputs[:2]]
    if any(scale is None for scale in scales):
        return False
    with opened(bias) as array:
        floats = np.array(array, np.float64)
    if floats.size != np.size(floats, -1 if floats.ndim else None):
        return False  # a Gemm's matrix of biases has no scale for each channel
    floats = floats.ravel()
    x_scale, w_scale = scales
    assert x_scale is not None
    assert w_scale is not None
    if w_scale.ndim > 1 or (w_scale.size > 1 and not _by_channel(node)):
        return False
    scale = np.asarray(x_scale.astype(np.float64) * w_scale, np.float32).ravel()
    codes = np.clip(np.rint(floats / scale.astype(np.float64)), -INT32, INT32).astype(np.int32)
    name = str(bias.name)
    stored = constants.add(graph, f"{name}_quantized", codes)
    shaped = scale if scale.size > 1 else np.asarray(scale[0])
    dequantize = constants.make_node(
        "DequantizeLinear",
        [
            stored,
            constants.add(graph, f"{name}_scale", shaped),
            constants.zero_points(graph, shaped, ir.DataType.INT32),
        ],
        f"{node.name}_{name}_DequantizeLinear",
        like=bias,
        attributes={"axis": 0},
    )
    dequantize.outputs[0].name = constants.free(graph, f"{node.name}_{name}_dequantized")
    graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])
    if not tuple(bias.uses()) and not bias.is_graph_output():
        graph.initializers.pop(name)
    return True


def _by_channel(node: ir.Node) -> bool:
    """Whether the scales of a layer's weight lie along its output channels."""
    weight = node.inputs[1]
    made = weight.producer() if weight is not None else None
    codes = made.inputs[0] if made is not None else None
    assert made is not None
    assert codes is not None
    assert codes.const_value is not None
    rank = len(codes.const_value.shape)
    return made.attributes.get_int("axis", 1) % rank == channel_axis(node, rank)


def _constant_scale(value: ir.Value | None) -> np.ndarray | None:
    """Return the scale behind a dequantized operand, or None when it is float or dynamic."""
    producer = value.producer() if value is not None else None
    if producer is None or not is_standard(producer, "DequantizeLinear"):
        return None
    scale = producer.inputs[1]
    return (
        scale.const_value.numpy() if scale is not None and scale.const_value is not None else None
    )
