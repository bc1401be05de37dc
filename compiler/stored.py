"""Weights that have been rounded: constant codes behind a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import constants
from .graph import WEIGHTED, Weight, channel_axis, is_constant, is_standard
from .weights import opened

Doubles = npt.NDArray[np.float64]

SUFFIX = "_quantized"  # of the name of codes, behind the weight's


@dataclass(frozen=True)
class Stored:
    """A rounded weight with the one node that reads it.

    Attributes:
        reader: The node, with the codes as its weight.
        dequantize: The DequantizeLinear between them.
    """

    reader: Weight
    dequantize: ir.Node

    @property
    def name(self) -> str:
        """Name of the codes."""
        return str(self.reader.value.name)

    @property
    def scale(self) -> ir.Value:
        """The scales."""
        value = self.dequantize.inputs[1]
        assert value is not None
        return value

    def floats(self) -> Doubles:
        """Return what the codes stand for, in their shape."""
        with opened(self.reader.value) as codes, opened(self.scale) as scale:
            steps = codes.astype(np.float64) - self._spread(self._zeros(), codes.shape)
            return np.asarray(steps * self._spread(scale.astype(np.float64), codes.shape))

    @property
    def by_row(self) -> bool:
        """Whether each output channel has scales of its own."""
        assert self.reader.value.const_value is not None
        assert self.scale.const_value is not None
        channels = self.reader.value.const_value.shape[self.reader.axis]
        shape = self.scale.const_value.shape
        if len(shape) > 1:
            return self._axis() != self.reader.axis
        return len(shape) == 1 and shape[0] == channels and self._axis() == self.reader.axis

    def scale_rows(self, graph: ir.Graph, factors: Doubles) -> None:
        """Multiply the scales of every output channel, [channels]; the channels have their own.

        Others that read the same scales keep them.
        """
        axis, rank = self.reader.axis, self._rank()
        along = [-1 if rank == 1 or place == axis else 1 for place in range(rank)]
        with opened(self.scale) as array:
            found = (array.astype(np.float64) * factors.reshape(along)).astype(np.float32)
        old = self.scale
        self.dequantize.replace_input_with(1, constants.add(graph, f"{old.name}_fitted", found))
        if not tuple(old.uses()):
            graph.initializers.pop(str(old.name))

    def _rank(self) -> int:
        """Return the rank of the scales: 0 for one scale, 1 along an axis, more for blocks."""
        assert self.scale.const_value is not None
        return len(self.scale.const_value.shape)

    def _axis(self) -> int:
        """Return the axis that scales lie along, counted from the front."""
        assert self.reader.value.const_value is not None
        axis = self.dequantize.attributes.get_int("axis", 1)
        return axis % len(self.reader.value.const_value.shape)

    def _zeros(self) -> Doubles:
        """Return the zero points."""
        value = self.dequantize.inputs[2] if len(self.dequantize.inputs) > 2 else None
        if value is None:
            return np.zeros(())
        with opened(value) as array:
            return np.array(array, np.float64)

    def _spread(self, array: Doubles, shape: tuple[int, ...]) -> Doubles:
        """Return scales or zero points for every element."""
        axis = self._axis()
        if array.ndim == len(shape) and array.ndim > 1:
            size = self.dequantize.attributes.get_int("block_size", 0)
            return np.repeat(array, size, axis=axis).take(range(shape[axis]), axis=axis)
        if array.size == 1:
            return array.reshape(())
        return array.reshape([-1 if place == axis else 1 for place in range(len(shape))])


def stored_weights(model: ir.Model) -> Iterator[Stored]:
    """Yield every rounded weight of the main graph that one MatMul, Gemm or Conv reads."""
    for node in model.graph:
        if not is_standard(node, *WEIGHTED) or node.op_type == "Gather":
            continue
        index, bias = WEIGHTED[node.op_type]
        weight = node.inputs[index]
        before = weight.producer() if weight is not None else None
        codes = before.inputs[0] if before is not None else None
        if before is None or codes is None or not is_standard(before, "DequantizeLinear"):
            continue
        if not is_constant(codes) or len(tuple(before.outputs[0].uses())) != 1:
            continue
        if len(tuple(codes.uses())) != 1 or not is_constant(before.inputs[1]):
            continue
        assert codes.const_value is not None
        own = node.inputs[bias] if bias is not None and len(node.inputs) > bias else None
        axis = channel_axis(node, len(codes.const_value.shape))
        yield Stored(Weight(node, codes, axis, own if is_constant(own) else None), before)
