"""Rounds every planned weight to its codes and stores codes, scale and a DequantizeLinear.

before:  MatMul(x, w)                    note on w: int4 per_axis(1)
becomes: MatMul(x, DequantizeLinear(w_quantized: int4, w_scale, axis=1))

Symmetric codes, zero point zero, restricted range. Source: Krishnamoorthi, arXiv 1806.08342,
section 2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from ..compiler import constants, notes
from ..compiler.contract import Context, Pass
from ..compiler.formats import Format, PerAxis, PerBlock
from ..compiler.graph import Weight, weight_of
from ..compiler.quantizers import (
    Codes,
    Floats,
    affine_parameters,
    dequantize_symmetric,
    quantize_symmetric,
    symmetric_scale,
)
from ..compiler.weights import opened

CLIPS = np.arange(1.0, 0.199, -0.02)


class RoundWeights(Pass):
    """Round weights to nearest.

    Attributes:
        clip: `minmax` keeps the largest weight of each group; `mse` shrinks each group's range to
            where the mean squared error is least; `auto` is mse below four bits: from four on,
            clipping the few large weights costs the layer's output more than it saves.
    """

    clip: Literal["auto", "minmax", "mse"] = "auto"

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
            scale = self._scale(values, format)
            for reader in _readers(weight):
                scale = np.maximum(scale, _least_scale(reader, format))
            codes = quantize_symmetric(values, scale, format)
            del values, array
        _store(weight, codes, scale, format, graph)

    def _scale(self, values: Floats, format: Format) -> Floats:
        """Choose the scale of each group."""
        scale = symmetric_scale(values, format)
        if self.clip == "minmax" or (self.clip == "auto" and format.bits >= 4):
            return scale
        best = _group_error(values, scale, format)
        chosen = scale
        for share in CLIPS[1:]:
            shrunk = (scale * np.float32(share)).astype(np.float32)
            error = _group_error(values, shrunk, format)
            chosen = np.where(error < best, shrunk, chosen)
            best = np.minimum(error, best)
        return chosen


def _group_error(values: Floats, scale: Floats, format: Format) -> Floats:
    """Return the summed squared error of each group that shares a scale."""
    codes = quantize_symmetric(values, scale, format)
    miss = np.square(dequantize_symmetric(codes, scale, format) - values)
    match format.granularity:
        case PerAxis(axis):
            others = tuple(i for i in range(miss.ndim) if i != axis % miss.ndim)
            return np.asarray(miss.sum(axis=others), np.float32)
        case PerBlock(axis, size):
            starts = np.arange(0, miss.shape[axis], size)
            return np.asarray(np.add.reduceat(miss, starts, axis=axis), np.float32)
        case _:
            return np.asarray(miss.sum(), np.float32)


def _readers(weight: Weight) -> list[Weight]:
    """Return the weight as each of its readers sees it."""
    found = [weight_of(use.node) for use in weight.value.uses()]
    return [reader for reader in found if reader is not None and reader.value is weight.value]


def _least_scale(weight: Weight, format: Format) -> Floats:
    """Return the least scale at which the int32 bias b / (s_x * s_w) still fits.

    Dead channels after batch-norm folding have tiny weights and an ordinary bias.
    """
    note = notes.read(weight.node.inputs[0]) if weight.node.inputs[0] is not None else notes.EMPTY
    if weight.bias is None or note.mode != "static" or note.format is None or note.low is None:
        return np.zeros((), np.float32)
    input_scale, _ = affine_parameters(note.low, note.high or 0.0, note.format)
    with opened(weight.bias) as array:
        bias = np.abs(np.asarray(array, np.float32))
    if bias.size != np.size(bias, -1 if bias.ndim else None):
        return np.zeros((), np.float32)  # a Gemm's matrix of biases stays float
    least = bias.ravel() / (input_scale * np.float32(2**30))
    per_channel = format.granularity == PerAxis(weight.axis)
    return np.asarray(least if per_channel else least.max(initial=0), np.float32)


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
    graph.insert_before(weight.node, node)
    ir.convenience.replace_all_uses_with(old, output)
    graph.initializers.pop(name)
