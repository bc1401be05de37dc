"""The part of a model behind some nodes, as a model of its own that is fed what crosses the cut.

What lies before a weight does not change when the weight does. So the values that cross from
before to behind are computed once, and only the rest runs again for every form of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from .graph import Weight, is_constant, is_standard, operand_of, subgraphs


@dataclass(frozen=True)
class Cut:
    """Where a model is cut for one weight.

    Attributes:
        behind: Name of every node that depends on the weight, in graph order: its first output.
        crossing: Values that those nodes read and do not make, weights left out.
        probed: (first output name, input index, name of the new input) of every operand that is
            fed instead of read: what the weight's readers read beside it.
        sources: New input's name -> the value that it stands for; the weight is fed under its own.
    """

    behind: tuple[str, ...]
    crossing: tuple[str, ...]
    probed: tuple[tuple[str, int, str], ...]
    sources: Mapping[str, str]


def cut(model: ir.Model, readers: Sequence[Weight]) -> Cut:
    """Return the cut of one weight; its readers' other operands are probed where they can be.

    A reader that lies behind another reader of the same weight reads what that one made: its
    operand is not probed. Nor is a constant, which no kernel quantizes, nor what a reader in the
    body of an If or Loop reads, since bodies stay float.
    """
    weight = readers[0].value
    behind = _behind(model.graph, weight)
    made = {id(v) for node in behind for v in node.outputs}
    probed: list[tuple[str, int, str]] = []
    sources = {str(weight.name): str(weight.name)}
    for number, reader in enumerate(r for r in readers if r.node.graph is model.graph):
        value = operand_of(reader)
        if is_standard(reader.node, "Gather") or id(value) in made or is_constant(value):
            continue
        name = f"{value.name}__probe{number}"
        probed.append((_key(reader.node), reader.node.inputs.index(value), name))
        sources[name] = str(value.name)
    taken = {(node, place) for node, place, _ in probed}
    constant = {id(v) for v in model.graph.initializers.values()}
    crossing: dict[str, None] = {}
    for node in behind:
        for place, value in reads(node):
            known = id(value) in made or id(value) in constant
            if not known and (_key(node), place) not in taken:
                crossing[str(value.name)] = None
    names = tuple(_key(node) for node in behind)
    return Cut(names, tuple(crossing), tuple(probed), sources)


def _key(node: ir.Node) -> str:
    """Return the node's first output that is not left out, as an LSTM may leave out its own."""
    return next(str(value.name) for value in node.outputs if value.name)


def _behind(graph: ir.Graph, weight: ir.Value) -> list[ir.Node]:
    """Return all nodes that depend on the weight, in graph order."""
    made = {id(weight)}
    found = []
    for node in graph:
        if any(id(value) in made for _, value in reads(node)):
            made |= {id(value) for value in node.outputs}
            found.append(node)
    return found


def reads(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """Yield (input index, value); what bodies of If and Loop read from outside has index -1."""
    yield from ((i, value) for i, value in enumerate(node.inputs) if value is not None)
    bodies = [graph for body in subgraphs(node) for graph in (body, *body.subgraphs())]
    own = {id(v) for body in bodies for v in (*body.inputs, *body.initializers.values())}
    own |= {id(v) for body in bodies for inner in body for v in inner.outputs}
    for body in bodies:
        read = [value for inner in body for value in inner.inputs if value is not None]
        yield from ((-1, value) for value in (*read, *body.outputs) if id(value) not in own)


def suffix(
    proto: onnx.ModelProto, where: Cut, arrays: Mapping[str, npt.NDArray[np.generic]]
) -> onnx.ModelProto:
    """Return the model behind a cut; its inputs are the crossing values and the probes.

    Args:
        proto: The whole model; external data keeps its place.
        where: The cut.
        arrays: One batch of every crossing value and every source, for their types.
    """
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    del part.graph.node[:], part.graph.input[:], part.graph.output[:]
    del part.graph.initializer[:], part.graph.value_info[:]
    behind = set(where.behind)
    nodes = [node for node in proto.graph.node if _proto_key(node) in behind]
    part.graph.node.extend(nodes)
    homes = {_proto_key(node): node for node in part.graph.node}
    for output, place, name in where.probed:
        homes[output].input[place] = name
    made = {name for node in nodes for name in node.output}
    part.graph.output.extend(v for v in proto.graph.output if v.name in made)
    names = {name: name for name in where.crossing} | dict(where.sources)
    for name, source in names.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(arrays[source].dtype)
        part.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    text = {name for node in part.graph.node for name in _named(node)}
    stay = (t for t in proto.graph.initializer if t.name in text and t.name not in names)
    part.graph.initializer.extend(stay)
    return part


def _proto_key(node: onnx.NodeProto) -> str:
    """Return what `_key` does of the same node."""
    return next(filter(None, node.output), "")


def _named(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every name that a node reads, the bodies of its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from _named(inner)
            yield from (value.name for value in body.output)
