"""Replaces a layer by several of its kind whose outputs are added.

before:  MatMul(x, w)                     w = w1 + w2 + w3
becomes: Add(Add(MatMul(x, w1), MatMul(x, w2)), MatMul(x, w3))

The parts of a weight may be added (`split-layers`) or lie one behind the other along the axis that
is summed over, each with its own chunk of the input (`split-activations`). An operator's own bias
goes to the first layer, or one part of it to each. The output keeps its name and its note.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from . import constants, notes
from .graph import WEIGHTED


def branch(
    graph: ir.Graph,
    node: ir.Node,
    parts: Sequence[ir.Value],
    biases: Sequence[ir.Value | None],
    sources: Sequence[ir.Value] | None = None,
) -> list[ir.Value]:
    """Replace one weighted node; return the new values before the sum, in graph order.

    Args:
        graph: The main graph, for names that are free.
        node: A MatMul, Gemm, Conv or ConvTranspose; may be in the body of another.
        parts: The weight of each layer, at least two.
        biases: The bias of each layer, or None.
        sources: What each layer reads; None lets all read what the node reads.
    """
    home = node.graph
    assert home is not None
    old, name = node.outputs[0], str(node.outputs[0].name)
    layers = [
        _layer(graph, node, part, bias, number)
        for number, (part, bias) in enumerate(zip(parts, biases, strict=True))
    ]
    for layer, source in zip(layers, sources or (), strict=sources is not None):
        layer.replace_input_with(0, source)
    made, total = list(layers), layers[0].outputs[0]
    for number, layer in enumerate(layers[1:], 1):
        label = constants.free(graph, f"{name}_sum_{number}")
        add = constants.make_node(
            "Add", [total, layer.outputs[0]], f"{_name(node)}_sum_{number}", old, output=label
        )
        made.append(add)
        total = add.outputs[0]
    home.insert_before(node, made)
    notes.move(old, total)
    ir.convenience.replace_all_uses_with(old, total, replace_graph_outputs=True)
    home.remove(node, safe=True)
    old.name = constants.free(graph, f"{name}_whole")
    total.name = name
    return [one.outputs[0] for one in made[:-1]]


def _layer(
    graph: ir.Graph, node: ir.Node, part: ir.Value, bias: ir.Value | None, number: int
) -> ir.Node:
    """Return one layer of the node's kind, with its attributes, around a part of its weight."""
    index, bias_index = WEIGHTED[node.op_type]
    inputs = list(node.inputs)
    inputs[index] = part
    if bias_index is not None and len(inputs) > bias_index:
        inputs = [*inputs[:bias_index], *([bias] if bias is not None else [])]
    attributes = list(node.attributes.values())
    name = f"{_name(node)}_part_{number}"
    layer = ir.Node(node.domain, node.op_type, inputs, attributes, name=name)
    old, output = node.outputs[0], layer.outputs[0]
    output.name = constants.free(graph, f"{old.name}_part_{number}")
    output.type = old.type
    output.shape = old.shape.copy() if old.shape is not None else None
    return layer


def _name(node: ir.Node) -> str:
    """Return what to call nodes that stand for this one."""
    return str(node.name or node.outputs[0].name)
