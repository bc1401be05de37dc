"""Adds initializers and nodes to a graph, with names that are free and types that are declared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def add(
    graph: ir.Graph, name: str, array: npt.ArrayLike, dtype: ir.DataType | None = None
) -> ir.Value:
    """Add an initializer and return its value; `dtype` stores codes in a narrower container.

    A taken name gets a number. An array that is already there under the name with the same content
    is shared, which keeps one scale for all readers of one value.
    """
    data = np.asarray(array)
    tensor = _tensor(data, dtype)
    taken = graph.initializers.get(name)
    if taken is not None and _same(taken.const_value, tensor):
        return taken
    tensor.name = name = free(graph, name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(data.shape))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def _same(first: ir.TensorProtocol | None, second: ir.TensorProtocol) -> bool:
    """Whether two tensors have one type and one content."""
    if first is None or first.dtype != second.dtype:
        return False
    return np.array_equal(first.numpy(), second.numpy())


def _tensor(data: npt.NDArray[np.generic], dtype: ir.DataType | None) -> ir.TensorProtocol:
    """Return a tensor of the data; codes of less than a byte lie packed, the first one lowest."""
    if dtype is None:
        return ir.tensor(data)
    if dtype.bitwidth >= 8:
        return ir.tensor(data.astype(dtype.numpy()))
    per_byte = 8 // dtype.bitwidth
    codes = data.astype(np.int8).view(np.uint8).ravel() & (2**dtype.bitwidth - 1)
    codes = np.pad(codes, (0, -codes.size % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(codes), np.uint8)
    for position in range(per_byte):
        packed |= codes[:, position] << np.uint8(position * dtype.bitwidth)
    return ir.PackedTensor(packed, dtype, shape=data.shape)


def zero_points(graph: ir.Graph, scale: npt.NDArray[np.generic], dtype: ir.DataType) -> ir.Value:
    """Return zeros in the shape of a scale, one initializer for all of a shape.

    ONNX takes a missing zero point for zero; onnxruntime's QGemm fusion wants to see it.
    """
    shape = "x".join(map(str, scale.shape)) or "scalar"
    return add(graph, f"zero_point_{dtype.name.lower()}_{shape}", np.zeros(scale.shape), dtype)


def free(graph: ir.Graph, name: str) -> str:
    """Return the name, numbered when an initializer, input or node output already has it."""
    taken = set(graph.initializers) | {v.name for v in graph.inputs}
    taken |= {v.name for node in graph for v in node.outputs}
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value,
    attributes: Mapping[str, int | float | str | list[int]] | None = None,
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
