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

from .graph import WEIGHTED, Weight, is_standard, subgraphs


@dataclass(frozen=True)
class Cut:
    """Where a model is cut for one weight.

    Attributes:
        behind: First output name of every node that depends on the weight, in graph order.
        crossing: Values that those nodes read and do not make, weights left out.
        probed: (first output name, input index, name of the new input) of every operand that is
            fed instead of read: the weight, and what its readers read beside it.
        sources: New input's name -> the value that it stands for.
    """

    behind: tuple[str, ...]
    crossing: tuple[str, ...]
    probed: tuple[tuple[str, int, str], ...]
    sources: Mapping[str, str]


def cut(model: ir.Model, readers: Sequence[Weight]) -> Cut:
    """Return the cut of one weight; its readers' other operands are probed where they can be.

    A reader that lies behind another reader of the same weight reads what that one made: its
    operand is not probed.
    """
    behind = _behind(model.graph, [reader.node for reader in readers])
    made = {id(v) for node in behind for v in node.outputs}
    probed: list[tuple[str, int, str]] = []
    sources: dict[str, str] = {}
    for number, reader in enumerate(readers):
        index, _ = WEIGHTED[reader.node.op_type]
        for place in (index,) if is_standard(reader.node, "Gather") else (index, 1 - index):
            value = reader.node.inputs[place]
            if value is None or id(value) in made:
                continue
            name = f"{value.name}__probe{number if place != index else ''}"
            probed.append((str(reader.node.outputs[0].name), place, name))
            sources[name] = str(value.name)
    taken = {(node, place) for node, place, _ in probed}
    constant = {id(v) for v in model.graph.initializers.values()}
    crossing: dict[str, None] = {}
    for node in behind:
        for place, value in _reads(node):
            known = id(value) in made or id(value) in constant
            if not known and (str(node.outputs[0].name), place) not in taken:
                crossing[str(value.name)] = None
    names = tuple(str(node.outputs[0].name) for node in behind)
    return Cut(names, tuple(crossing), tuple(probed), sources)


def _behind(graph: ir.Graph, start: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes and all that depend on them, in graph order."""
    first = {id(node) for node in start}
    made: set[int] = set()
    found = []
    for node in graph:
        if id(node) in first or any(id(value) in made for _, value in _reads(node)):
            made |= {id(value) for value in node.outputs}
            found.append(node)
    return found


def _reads(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    """Yield (input index, value); what the bodies of If and Loop read has index -1."""
    yield from ((i, value) for i, value in enumerate(node.inputs) if value is not None)
    for body in subgraphs(node):
        for inner in body.all_nodes():
            yield from ((-1, value) for value in inner.inputs if value is not None)
        yield from ((-1, value) for value in body.outputs)


def suffix(
    proto: onnx.ModelProto, where: Cut, arrays: Mapping[str, npt.NDArray[np.generic]]
) -> onnx.ModelProto:
    """Return the model behind a cut; its inputs are the crossing values and the probes.

    Args:
        proto: The whole model; external data keeps its place.
        where: The cut.
        arrays: One batch of every crossing value and every probed source, for their types.
    """
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    del part.graph.node[:], part.graph.input[:], part.graph.output[:]
    del part.graph.initializer[:], part.graph.value_info[:]
    behind = set(where.behind)
    nodes = [node for node in proto.graph.node if node.output and node.output[0] in behind]
    part.graph.node.extend(nodes)
    homes = {node.output[0]: node for node in part.graph.node}
    for output, place, name in where.probed:
        homes[output].input[place] = name
    made = {name for node in nodes for name in node.output}
    part.graph.output.extend(v for v in proto.graph.output if v.name in made)
    names = {name: name for name in where.crossing} | dict(where.sources)
    for name, source in names.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(arrays[source].dtype)
        part.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    text = {name for node in part.graph.node for name in _named(node)}
    part.graph.initializer.extend(t for t in proto.graph.initializer if t.name in text)
    return part


def _named(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every name that a node reads, the bodies of its subgraphs included."""
    yield from node.input
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            for inner in body.node:
                yield from _named(inner)
            yield from (value.name for value in body.output)
