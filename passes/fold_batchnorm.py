"""Folds an inference BatchNormalization into the Conv, ConvTranspose or Gemm before it.

before:  y = BatchNormalization(Conv(x, W, b), gamma, beta, mean, var)
becomes: y = Conv(x, W * s, (b - mean) * s + beta),   s = gamma / sqrt(var + epsilon)

s scales output channels. It must happen before weights get ranges: folded channels differ by
orders of magnitude. Source: Krishnamoorthi, arXiv 1806.08342, section 3.2.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import Weight, is_constant, is_standard, sole_consumer, weight_of
from ..compiler.weights import opened

CHANNELS_OF = ("Conv", "ConvTranspose", "Gemm")


class FoldBatchnorm(Pass):
    """Fold BatchNormalization into the layer before it, exactly up to rounding."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Fold wherever the layer feeds the normalization alone; return how many were folded."""
        folded = 0
        for node in list(model.graph.all_nodes()):
            if not is_standard(node, "BatchNormalization"):
                continue
            reason = self._refusal(node)
            if reason is None:
                _fold(node)
                folded += 1
            else:
                context.remark(self, node.outputs[0].name, reason)
        RemoveUnusedNodesPass()(model)  # the statistics that nobody reads any more
        return folded

    def _refusal(self, norm: ir.Node) -> str | None:  # noqa: PLR0911 - one return a reason
        """Return why this normalization cannot be folded, or None."""
        layer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if layer is None or not is_standard(layer, *CHANNELS_OF):
            return "kept: no Conv, ConvTranspose or Gemm before it"
        if sole_consumer(layer.outputs[0]) is not norm:
            return f"kept: {layer.outputs[0].name} is also read elsewhere"
        weight = weight_of(layer)
        if weight is None or not all(is_constant(v) for v in norm.inputs[1:5]):
            return "kept: its weights are not constants"
        if len(tuple(weight.value.uses())) > 1:
            return f"kept: the weight {weight.value.name} is shared with another layer"
        if layer.op_type == "ConvTranspose" and layer.attributes.get_int("group", 1) != 1:
            return "kept: grouped ConvTranspose has its channels on two axes"
        if layer.op_type == "Gemm" and _awkward_gemm(layer, weight):
            return "kept: the Gemm scales its operands (alpha, beta) or its bias is no vector"
        if len(layer.inputs) > 2 and layer.inputs[2] is not None and weight.bias is None:
            return "kept: the layer's bias is not a constant"
        if norm.attributes.get_int("training_mode", 0) or len(norm.outputs) > 1:
            return "kept: it runs in training mode"
        with opened(_constant(norm, 4)) as variance:
            if np.any(variance.astype(np.float64) + _epsilon(norm) <= 0):
                return "kept: a variance is not positive"
        return None


def _awkward_gemm(layer: ir.Node, weight: Weight) -> bool:
    """Whether folding into this Gemm would need more than a scaled weight and a vector bias."""
    bias = weight.bias
    vector = bias is None or (
        bias.shape is not None and len(bias.shape) == 1 and bias.shape[0] != 1
    )
    plain = all(layer.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return not (vector and plain)


def _epsilon(norm: ir.Node) -> float:
    """Return the normalization's epsilon; 1e-5 is the operator's default."""
    return norm.attributes.get_float("epsilon", 1e-5)


def _constant(node: ir.Node, index: int) -> ir.Value:
    """Return a constant input that `_refusal` has seen to be one."""
    value = node.inputs[index]
    assert value is not None
    return value


def _fold(norm: ir.Node) -> None:
    """Write the folded weight and bias, and let the layer make the normalization's output."""
    before = norm.inputs[0]
    assert before is not None
    layer = before.producer()
    assert layer is not None
    weight = weight_of(layer)
    assert weight is not None
    gamma, beta, mean, variance = (_read(_constant(norm, i)) for i in (1, 2, 3, 4))
    scale = gamma / np.sqrt(variance + _epsilon(norm))
    old = _read(weight.value)
    shape = [-1 if axis == weight.axis else 1 for axis in range(old.ndim)]
    bias = (_read(weight.bias) if weight.bias is not None else 0.0) - mean
    graph = layer.graph
    assert isinstance(graph, ir.Graph)
    new_weight = constants.add(
        graph, f"{weight.value.name}_folded", (old * scale.reshape(shape)).astype(np.float32)
    )
    new_bias = constants.add(
        graph, f"{weight.value.name}_folded_bias", (bias * scale + beta).astype(np.float32)
    )
    layer.replace_input_with(1, new_weight)
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, new_bias)
    _hand_over(norm, layer, graph)


def _read(value: ir.Value) -> np.ndarray:
    """Copy a constant to float64."""
    with opened(value) as array:
        return array.astype(np.float64)


def _hand_over(norm: ir.Node, layer: ir.Node, graph: ir.Graph) -> None:
    """Give the normalization's output (and its name) to the layer and drop the normalization."""
    old, new = norm.outputs[0], layer.outputs[0]
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.type, new.shape = old.type or new.type, old.shape or new.shape
    graph.remove(norm, safe=True)
    old.name = f"{name}_folded"
    new.name = name
