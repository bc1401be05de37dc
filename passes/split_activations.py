"""Cuts an activation function, and the layer that reads it, into chunks of the channels.

before:  MatMul(Gelu(x), w [K, N])
becomes: x1, x2, x3 = Split(x, axis=-1)
         Add(Add(MatMul(Gelu(x1), w1), MatMul(Gelu(x2), w2)), MatMul(Gelu(x3), w3))

w1, w2, w3 are slices of w along the axis that the layer sums over. Each chunk gets a range of its
own, so this pass stands before calibrate; a Concat in front of one quantizer would undo that. It
pays where the layer's kernel writes float; where it writes codes (Conv on onnxruntime), every part
is rounded before it is added. Channels are cut by position, the first n mod parts chunks one
longer than the others. A function behind a Split is left alone: a second run would find its own.
Source: J. Song and F. Lin, SplitQuant (arXiv 2501.12428), activation splitting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler import constants, notes
from ..compiler.branches import branch
from ..compiler.contract import Context, Pass
from ..compiler.graph import Weight, is_constant, is_standard, sole_consumer, weight_of
from ..compiler.weights import opened

ELEMENTWISE = (
    *("Relu", "Clip", "LeakyRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Gelu", "Erf"),
    *("Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Swish", "Mish", "Softplus", "Softsign"),
)


@dataclass(frozen=True)
class _Site:
    """A function that can be cut, and the layers that read it.

    Attributes:
        nodes: The nodes of the function in order; the last one makes its output.
        source: What the function is of.
        readers: The weights of the layers behind it.
        axis: The axis of the channels: -1 (MatMul and Gemm) or 1 (Conv).
    """

    nodes: tuple[ir.Node, ...]
    source: ir.Value
    readers: tuple[Weight, ...]
    axis: int

    @property
    def channels(self) -> int:
        """How many channels there are, as the weight tells it."""
        tensor = self.readers[0].value.const_value
        assert tensor is not None
        return tensor.shape.numpy()[1 - self.readers[0].axis]

    def replaced(self) -> Iterator[ir.Value]:
        """Yield every value whose note would have to say something else of each chunk."""
        yield self.source
        for node in (*self.nodes, *(reader.node for reader in self.readers)):
            yield node.outputs[0]
        yield from (reader.value for reader in self.readers)


class SplitActivations(Pass):
    """Give chunks of an activation function's channels scales of their own.

    Attributes:
        parts: Chunks to cut the channels into.
    """

    parts: int = Field(3, ge=2, le=64)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for an opset whose Split takes sizes, and for values with nothing decided."""
        sites = [found for _, found in self._found(model.graph) if isinstance(found, _Site)]
        opsets = model.graph.opset_imports
        opset = opsets.get("", opsets.get("ai.onnx", 0))
        if sites and opset < 13:
            yield f"Split takes sizes from opset 13 on, and the model has {opset}; put tidy before"
        values = (value for site in sites for value in site.replaced())
        planned = next((value.name for value in values if notes.read(value) != notes.EMPTY), None)
        if planned is not None:
            yield (
                f"{planned} is planned already, and its note would not fit the chunks; put "
                f"{self.name} before calibrate and assign-bits"
            )

    def run(self, model: ir.Model, context: Context) -> int:
        """Cut every function that only layers with a weight read; return how many layers."""
        changed = 0
        for output, found in self._found(model.graph):
            if isinstance(found, _Site):
                _cut(found, self.parts, model.graph)
                changed += len(found.readers)
            else:
                context.remark(self, output.name, f"kept whole: {found}")
        return changed

    def _found(self, graph: ir.Graph) -> Iterator[tuple[ir.Value, _Site | str]]:
        """Yield the output of every function before a layer, with its site or what forbids it."""
        for node in list(graph):
            function = _function_of(node)
            if function is None:
                continue
            nodes, source = function
            output, producer = node.outputs[0], source.producer()
            if producer is not None and is_standard(producer, "Split"):
                continue
            # A function that no layer reads is not worth a word.
            if any(use.idx == 0 and weight_of(use.node) for use in output.uses()):
                yield output, self._site(nodes, source, graph)

    def _site(self, nodes: tuple[ir.Node, ...], source: ir.Value, graph: ir.Graph) -> _Site | str:
        """Return where to cut, or why not."""
        output = nodes[-1].outputs[0]
        if output.is_graph_output():
            return "it is an output"
        if any(sole_consumer(node.outputs[0]) is None for node in nodes[:-1]):
            return "a part of the function is read elsewhere"
        readers = []
        for use in output.uses():
            reader = _reader(use.node, use.idx, graph)
            if isinstance(reader, str):
                return reader
            readers.append(reader)
        axes = {1 if reader.node.op_type == "Conv" else -1 for reader in readers}
        if len(axes) > 1:
            return "its readers sum over different axes"
        site = _Site(nodes, source, tuple(readers), axes.pop())
        if site.channels < self.parts:
            return f"{site.channels} channels make no {self.parts} chunks"
        return _bound(site) or site


def _function_of(node: ir.Node) -> tuple[tuple[ir.Node, ...], ir.Value] | None:
    """Return the nodes of the activation function that ends here and its operand, or None."""
    if is_standard(node, *ELEMENTWISE, "PRelu", "Softmax") and node.inputs[0] is not None:
        return (node,), node.inputs[0]
    if not is_standard(node, "Mul"):
        return None
    for source, gate in (node.inputs, node.inputs[::-1]):  # SiLU is x * Sigmoid(x)
        sigmoid = gate.producer() if gate is not None else None
        if source is None or sigmoid is None or not is_standard(sigmoid, "Sigmoid"):
            continue
        if sigmoid.inputs[0] is source:
            return (sigmoid, node), source
    return None


def _reader(node: ir.Node, index: int, graph: ir.Graph) -> Weight | str:
    """Return the weight that an input of a layer meets, or why the layer cannot be cut."""
    weight = weight_of(node) if index == 0 else None
    if node.graph is not graph:
        return "an If or Loop reads it"
    if weight is None or node.op_type not in ("Conv", "Gemm", "MatMul"):
        return f"{node.op_type} reads it, and is no Conv, Gemm or MatMul with a constant weight"
    if node.op_type == "MatMul" and weight.axis != 1:
        return f"the weight {weight.value.name} of its MatMul has more than two axes"
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) != 0:
        return "its Gemm transposes it"
    if node.attributes.get_int("group", 1) != 1:
        return "its Conv is grouped: no output channel sums over the channels of all chunks"
    return weight


def _bound(site: _Site) -> str | None:
    """Return what keeps a function's channels together, or None."""
    node, mine = site.nodes[-1], _from_end(site.axis, site.source)
    unknown = f"its {node.op_type} meets a shape that is not known"
    if node.op_type == "Softmax":
        other = _from_end(node.attributes.get_int("axis", -1), site.source)
        if mine is None or other is None:
            return unknown
        return "its Softmax runs along the channels" if mine == other else None
    if node.op_type == "PRelu":
        slope = node.inputs[1]
        if mine is None or slope is None or slope.shape is None:
            return unknown
        if _runs_along(slope, mine) and not is_constant(slope):
            return "the slope of its PRelu is computed"
    return None


def _from_end(axis: int, value: ir.Value) -> int | None:
    """Return an axis counted from the end, or None where that takes a rank that is not known."""
    rank = len(value.shape) if value.shape is not None else None
    return axis if axis < 0 else None if rank is None else axis - rank


def _runs_along(slope: ir.Value, axis: int) -> bool:
    """Whether a slope differs along an axis of what it broadcasts to (counted from the end)."""
    assert slope.shape is not None
    return len(slope.shape) >= -axis and slope.shape[axis] != 1


def _cut(site: _Site, parts: int, graph: ir.Graph) -> None:
    """Put chunks of the function and of its readers in their places."""
    whole, more = divmod(site.channels, parts)
    sizes = [whole + (part < more) for part in range(parts)]  # as torch.tensor_split cuts
    chunks = _apply(site, _split(site, sizes, graph), sizes, graph)
    for reader in site.readers:
        _sum(reader, chunks, sizes, graph)
    read = [value for node in site.nodes for value in node.inputs]
    graph.remove(site.nodes, safe=True)
    for value in read:
        _drop_unread(value, graph)


def _split(site: _Site, sizes: list[int], graph: ir.Graph) -> list[ir.Value]:
    """Insert a Split of the function's operand; return the chunks."""
    source, name = site.source, f"{_name(site.nodes[-1])}_split"
    lengths = constants.add(graph, f"{source.name}_sizes", np.array(sizes, np.int64))
    split = ir.node(
        "Split", [source, lengths], {"axis": site.axis}, num_outputs=len(sizes), name=name
    )
    for number, (chunk, size) in enumerate(zip(split.outputs, sizes, strict=True)):
        chunk.name = constants.free(graph, f"{name}_{number}")
        chunk.type = source.type
        if source.shape is not None:
            chunk.shape = source.shape.copy()
            chunk.shape[site.axis] = size
    graph.insert_before(site.nodes[-1], split)
    return list(split.outputs)


def _apply(
    site: _Site, chunks: list[ir.Value], sizes: list[int], graph: ir.Graph
) -> list[ir.Value]:
    """Insert the function once a chunk; return what comes out of each."""
    end, axis = site.nodes[-1], _from_end(site.axis, site.source)
    slope = end.inputs[1] if end.op_type == "PRelu" else None
    slopes: list[ir.Value | None] = [slope] * len(chunks)
    if slope is not None and axis is not None and _runs_along(slope, axis):
        slopes[:] = _slices(slope, axis, sizes, graph)
    found = []
    for number, (chunk, own) in enumerate(zip(chunks, slopes, strict=True)):
        now = {slope: own, site.source: chunk}
        for node in site.nodes:
            inputs = [now.get(value, value) for value in node.inputs]
            now[node.outputs[0]] = made = _copy(node, inputs, number, chunk, end)
        found.append(made)
    return found


def _sum(reader: Weight, chunks: list[ir.Value], sizes: list[int], graph: ir.Graph) -> None:
    """Replace a layer by the sum of its parts, the first of which adds the bias."""
    # Of a weight's first two axes, the one that is not the output's is summed over.
    weights = _slices(reader.value, 1 - reader.axis, sizes, graph)
    bias = reader.node.inputs[2] if len(reader.node.inputs) > 2 else None
    branch(graph, reader.node, weights, [bias, *[None] * (len(chunks) - 1)], chunks)
    _drop_unread(reader.value, graph)


def _copy(
    node: ir.Node, inputs: list[ir.Value | None], number: int, like: ir.Value, before: ir.Node
) -> ir.Value:
    """Insert a node like this one for one chunk; return its output, shaped `like` a value."""
    graph = before.graph
    assert isinstance(graph, ir.Graph)
    name = constants.free(graph, f"{_name(node)}_part_{number}")
    made = constants.make_node(node.op_type, inputs, name, like, output=name)
    made.attributes.update(node.attributes)
    graph.insert_before(before, made)
    return made.outputs[0]


def _name(node: ir.Node) -> str:
    """Return what to call nodes that stand for this one."""
    return str(node.name or node.outputs[0].name)


def _slices(value: ir.Value, axis: int, sizes: list[int], graph: ir.Graph) -> list[ir.Value]:
    """Add the slices of a constant along an axis as initializers; they are shared by content."""
    ends = np.cumsum(sizes)[:-1].tolist()
    with opened(value) as array:
        # Copies: a view would keep a file of weights mapped.
        pieces = [piece.copy() for piece in np.split(array, ends, axis)]
    name = value.name
    return [constants.add(graph, f"{name}_slice_{n}", p) for n, p in enumerate(pieces)]


def _drop_unread(value: ir.Value | None, graph: ir.Graph) -> None:
    """Remove an initializer that nobody reads any more."""
    if value is not None and is_constant(value) and not (value.uses() or value.is_graph_output()):
        graph.initializers.pop(str(value.name), None)
