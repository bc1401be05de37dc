"""Adds initializers and nodes to a graph, with names that are free and types that are declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# numpy has no types below one byte; ml_dtypes brings them and onnx_ir packs them when it saves.
_NARROW = {
    ir.DataType.INT2: ml_dtypes.int2,
    ir.DataType.UINT2: ml_dtypes.uint2,
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.UINT4: ml_dtypes.uint4,
}


def add(
    graph: ir.Graph, name: str, array: npt.ArrayLike, dtype: ir.DataType | None = None
) -> ir.Value:
    """Add an initializer and return its value; `dtype` stores codes in a narrower container.

    A taken name gets a number. An array that is already there under the name with the same content
    is shared, which keeps one scale for all readers of one value.
    """
    data = np.asarray(array)
    if dtype is not None:
        data = data.astype(_NARROW.get(dtype, dtype.numpy()))
    taken = graph.initializers.get(name)
    if taken is not None and taken.const_value is not None:
        same = taken.const_value.numpy()
        if same.dtype == data.dtype and np.array_equal(same, data):
            return taken
    name = free(graph, name)
    tensor = ir.tensor(data, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def zero_points(graph: ir.Graph, scale: npt.NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
    """Return zeros in the shape of a scale, one initializer for all of a shape.

    ONNX takes a missing zero point for zero; onnxruntime's QGemm fusion wants to see it.
    """
    shape = "x".join(map(str, scale.shape)) or "scalar"
    return add(graph, f"zero_point_{dtype.name.lower()}_{shape}", np.zeros(scale.shape), dtype)


def free(graph: ir.Graph, name: str) -> str:
    """Return the name, numbered when an initializer, input or node output already has it."""
    taken = set(graph.initializers) | {v.name for v in graph.inputs}
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value,
    attributes: Mapping[str, int | float | str] | None = None,
    dtype: ir.DataType | None = None,
    domain: str = "",
    output: str | None = None,
) -> ir.Node:
    """Return a one-output node whose output is shaped `like` a value (and typed, unless `dtype`).

    The output is called `<name>_Output`, as onnxruntime's quantizer does it.
    """
    node = ir.node(op_type, inputs, attributes=attributes, name=name, domain=domain)
    made = node.outputs[0]
    made.name = output or f"{name}_Output"
    element = dtype or like.dtype
    made.type = ir.TensorType(element) if element is not None else None
    made.shape = like.shape.copy() if like.shape is not None else None
    return node
