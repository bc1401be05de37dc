"""Questions that passes ask of a graph: its values, constants, consumers and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)

# op type -> (index of the weight, index of the bias or None)
WEIGHTED = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (1, None),
    "Gather": (0, None),
}


@dataclass(frozen=True)
class Weight:
    """A node's constant operand that is worth quantizing.

    Attributes:
        node: The node that reads it.
        value: The float initializer.
        axis: The axis of the output channels (rows for an embedding), counted from the front.
        bias: The bias initializer, where the operator itself takes one.
    """

    node: ir.Node
    value: ir.Value
    axis: int
    bias: ir.Value | None


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield each value once: inputs, initializers and node outputs, subgraphs included."""
    seen: set[int] = set()
    graphs = [model.graph, *(g for node in model.graph.all_nodes() for g in subgraphs(node))]
    for graph in graphs:
        for value in (*graph.inputs, *graph.initializers.values()):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        for node in graph:
            for value in node.outputs:
                if value.name:
                    yield value


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs in a node's attributes (the bodies of If, Loop and Scan)."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def is_standard(node: ir.Node, *op_types: str) -> bool:
    """Whether the node is one of these ops of the ONNX domain."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is known to be a floating-point tensor."""
    return value is not None and value.dtype in FLOATS


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer with data that no caller can override."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """Return the only reader of the value, or None; a graph output counts as a reader."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def weight_of(node: ir.Node) -> Weight | None:
    """Return the node's weight: a float constant of rank 2 or more; None where it has none."""
    if not is_standard(node, *WEIGHTED):
        return None
    index, bias_index = WEIGHTED[node.op_type]
    value = node.inputs[index]
    if value is None or not is_constant(value) or not is_float(value):
        return None
    assert value.const_value is not None
    rank = len(value.const_value.shape)
    if rank < 2 or value.const_value.size == 0:
        return None
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) != 0:
        return None
    bias = (
        node.inputs[bias_index]
        if bias_index is not None and len(node.inputs) > bias_index
        else None
    )
    return Weight(node, value, channel_axis(node, rank), bias if is_constant(bias) else None)


def operand_of(weight: Weight) -> ir.Value:
    """Return what a weight meets in its node: the activation, or the indices of an embedding."""
    index, _ = WEIGHTED[weight.node.op_type]
    value = weight.node.inputs[1 - index]
    assert value is not None
    return value


def undequantized(value: ir.Value) -> ir.Value:
    """Return the float value behind a quantizer and its DequantizeLinear; any other as it is."""
    node = value.producer()
    if node is None or not is_standard(node, "DequantizeLinear") or node.inputs[0] is None:
        return value
    quantizer = node.inputs[0].producer()
    if quantizer is None or not is_standard(quantizer, "QuantizeLinear", "DynamicQuantizeLinear"):
        return value
    source = quantizer.inputs[0]
    assert source is not None
    return source


def first_reader(value: ir.Value, graph: ir.Graph) -> ir.Node:
    """Return the first node of the graph that reads a value, or whose bodies do."""
    reads = {id(use.node) for use in value.uses()}
    return next(
        node
        for node in graph
        if id(node) in reads
        or any(id(inner) in reads for body in subgraphs(node) for inner in body.all_nodes())
    )


def readers_of(value: ir.Value) -> list[Weight]:
    """Return an initializer as each of the nodes that reads it as its weight sees it."""
    found = [weight_of(node) for node in dict.fromkeys(use.node for use in value.uses())]
    return [reader for reader in found if reader is not None and reader.value is value]


def weights_of(model: ir.Model) -> list[ir.Value]:
    """Return every weight of the main graph once, in the order in which it is first read."""
    found = (weight_of(node) for node in model.graph)
    return list(dict.fromkeys(weight.value for weight in found if weight is not None))


def channel_axis(node: ir.Node, rank: int) -> int:
    """Return the axis of the weight that becomes the output's channel axis."""
    match node.op_type:
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if node.attributes.get_int("transB", 0) else 1
        case "MatMul":
            return rank - 1
        case _:  # Conv filters, and the rows of an embedding
            return 0


def activations_of(node: ir.Node) -> list[ir.Value]:
    """Return the node's float inputs that are not constants, each once, in order."""
    found: dict[int, ir.Value] = {}
    for value in node.inputs:
        if value is not None and not is_constant(value) and is_float(value):
            found.setdefault(id(value), value)
    return list(found.values())
