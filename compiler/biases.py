"""Where the bias of a layer is, and how it is changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import constants
from .graph import Weight, is_constant, is_standard, sole_consumer
from .weights import opened


@dataclass(frozen=True)
class Bias:
    """A constant that is added to every row of a layer's output.

    Attributes:
        node: The node that adds it: the layer itself, or the Add behind a MatMul.
        index: Which of the node's inputs it is.
        value: The constant, or None where the layer could have one and has none yet.
        size: Output channels.
    """

    node: ir.Node
    index: int
    value: ir.Value | None
    size: int

    @classmethod
    def of(cls, reader: Weight) -> Bias | None:
        """Return where a layer's bias is; None where it can have none."""
        assert reader.value.const_value is not None
        size = int(reader.value.const_value.shape.numpy()[reader.axis])
        node = reader.node
        if is_standard(node, "MatMul"):
            return _behind(node, size)
        if not is_standard(node, "Conv", "Gemm"):
            return None
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return None
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is not None and (not is_constant(value) or not _is_vector(value, size)):
            return None
        return cls(node, 2, value, size)

    @property
    def output(self) -> ir.Value:
        """The value to which it has been added."""
        return self.node.outputs[0]

    def floats(self) -> npt.NDArray[np.float64]:
        """Return the bias, [channels]; zeros where there is none yet."""
        if self.value is None:
            return np.zeros(self.size)
        with opened(self.value) as array:
            return np.array(array, np.float64).ravel()

    def add(self, graph: ir.Graph, delta: npt.NDArray[np.floating]) -> None:
        """Add to the bias, [channels]; other layers that read the same constant keep it."""
        old = self.value
        name = str(old.name) if old is not None else f"{self.node.outputs[0].name}_bias"
        shape = old.const_value.shape.numpy() if old is not None and old.const_value else None
        found = (self.floats() + delta).astype(np.float32).reshape(shape or (self.size,))
        new = constants.add(graph, f"{name}_corrected", found)
        if len(self.node.inputs) <= self.index:
            self.node.resize_inputs(self.index + 1)
        self.node.replace_input_with(self.index, new)
        if old is not None and not tuple(old.uses()) and not old.is_graph_output():
            graph.initializers.pop(name)


def _behind(node: ir.Node, size: int) -> Bias | None:
    """Return the bias in an Add behind a MatMul."""
    add = sole_consumer(node.outputs[0])
    if add is None or not is_standard(add, "Add") or add.inputs[0] is add.inputs[1]:
        return None
    index = 1 if add.inputs[0] is node.outputs[0] else 0
    value = add.inputs[index]
    if value is None or not is_constant(value) or not _is_vector(value, size):
        return None
    return Bias(add, index, value, size)


def _is_vector(value: ir.Value, size: int) -> bool:
    """Whether a constant has one float32 number for each of the last axis' channels."""
    tensor = value.const_value
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    plain = value.dtype == ir.DataType.FLOAT and len(shape) > 0 and shape[-1] == size
    return plain and all(n == 1 for n in shape[:-1]) and size > 0
