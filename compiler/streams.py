"""Finds residual streams: the sums that the blocks of a pre-norm transformer read and add to.

A stream is what hangs together through Add and through ops that move channels without mixing
them. It begins at constants (embedding tables, position embeddings, class tokens) and at the
layers that write into it, and ends at normalizations, behind which other layers read it. Every
constant that holds its channels is found, so that all of them can be multiplied by one matrix.
Channel axes are counted from the end, as broadcasting does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from .graph import is_constant, is_standard
from .links import linked
from .norms import Norm, norms_of

WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
POST_NORM = "a normalization makes it, and it is a part of the sums (post-norm)"


@dataclass(frozen=True)
class Touch:
    """A constant, as one node reads it, with an axis along which the stream's channels lie.

    Attributes:
        node: The node that reads the constant.
        index: The input that it is.
        axis: The axis of the channels in the constant, counted from the front.
        writes: Whether it becomes a part of the stream; else it is multiplied with what is read.
        norm: The normalization between the stream and a layer that reads it, or None.
        layer: The layer that this is a weight of; `node` unless a Transpose lies between.
    """

    node: ir.Node
    index: int
    axis: int
    writes: bool
    norm: Norm | None
    layer: ir.Node

    @property
    def value(self) -> ir.Value:
        """The constant."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def reads(self) -> bool:
        """Whether it is the weight of a layer that reads the stream."""
        return not self.writes and self.layer.op_type in ("MatMul", "Gemm")


@dataclass
class Stream:
    """A residual stream.

    Attributes:
        width: Channels.
        norms: The normalizations that read it, in the order in which they were met.
        touches: The constants that hold its channels.
        changed: Values whose content is rotated with it, those behind normalizations too.
        refusals: (name of a value, why the stream cannot be rotated there).
    """

    width: int
    norms: list[Norm] = field(default_factory=list)
    touches: list[Touch] = field(default_factory=list)
    changed: list[ir.Value] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)

    @property
    def keeps_mean(self) -> bool:
        """Whether the mean over channels has to stay what it is."""
        return any(norm.centres for norm in self.norms)

    @property
    def centred(self) -> bool:
        """Whether nobody reads the mean over channels, so that it can be left out.

        A table that both writes and is read would need to be kept twice, so it keeps its mean.
        """
        direct = any(touch.reads and touch.norm is None for touch in self.touches)
        read = {id(touch.value) for touch in self.touches if not touch.writes}
        both = any(touch.writes and id(touch.value) in read for touch in self.touches)
        return all(norm.centres for norm in self.norms) and not direct and not both

    def matrix_key(self, touch: Touch) -> tuple[int, bool, int]:
        """Return what tells apart the matrices that a constant is multiplied by."""
        gain = touch.norm.gain if touch.norm is not None and touch.norm.folds else None
        return touch.axis, self.centred and touch.writes, id(gain)

    def tied(self) -> Iterator[ir.Value]:
        """Yield weights that would have to be stored twice, since readers need different forms."""
        for value in dict.fromkeys(touch.value for touch in self.touches):
            if value.shape is None or len(value.shape) < 2:
                continue
            mine = [touch for touch in self.touches if touch.value is value]
            others = {(use.node, use.idx) for use in value.uses()}
            others -= {(touch.node, touch.index) for touch in mine}
            if others or len({self.matrix_key(touch) for touch in mine}) > 1:
                yield value


def streams_of(graph: ir.Graph) -> list[Stream]:
    """Return every residual stream of a graph, in the order of its first normalization."""
    norms = norms_of(graph)
    found: list[Stream] = []
    seen: set[int] = set()
    for norm in norms:
        if id(norm.source) not in seen:
            search = _Search(graph, norms, norm)
            seen |= {id(value) for value in search.axes}
            found.append(search.stream)
    return found


class _Search:
    """Walks over all that hangs together with one normalization's input."""

    def __init__(self, graph: ir.Graph, norms: Sequence[Norm], first: Norm) -> None:
        self.graph = graph
        self.stream = Stream(first.width)
        self.axes: dict[ir.Value, int] = {}
        self._norms = norms
        self._touched: dict[tuple[ir.Node, int], Touch] = {}
        self._open: list[ir.Value] = []
        self._enter(first.source, -1)
        while self._open:
            value = self._open.pop()
            self._made(value)
            self._read(value)
        self.stream.touches = list(self._touched.values())

    def _refuse(self, value: ir.Value, reason: str) -> None:
        """Note why the stream cannot be rotated."""
        self.stream.refusals.append((str(value.name), reason))

    def _enter(self, value: ir.Value, axis: int) -> None:
        """Take a value into the stream, with its channels on an axis."""
        if value in self.axes:
            if self.axes[value] != axis:
                self._refuse(value, "its channels lie on two axes")
            return
        self.axes[value] = axis
        self.stream.changed.append(value)
        self._open.append(value)
        self._fits(value, axis)

    def _fits(self, value: ir.Value, axis: int) -> bool:
        """Whether the value has the stream's channels on that axis; refuse where it has not."""
        shape, width = value.shape, self.stream.width
        channels = None if shape is None else shape[axis] if len(shape) >= -axis else 1
        if not isinstance(channels, int):
            self._refuse(value, "its shape is not known; put tidy before")
        elif channels != width:
            self._refuse(value, f"it has {channels} channels there and the stream {width}")
        elif value.dtype not in WIDE:
            self._refuse(value, f"it is {value.dtype}, in which a rotation would lose digits")
        else:
            return True
        return False

    def _touch(
        self,
        node: ir.Node,
        index: int,
        axis: int,
        writes: bool,
        norm: Norm | None = None,
        layer: ir.Node | None = None,
    ) -> None:
        """Take a node's constant into the stream; the axis is counted from the end."""
        value = node.inputs[index]
        assert value is not None
        if not self._fits(value, axis):
            return
        assert value.shape is not None
        one = Touch(node, index, len(value.shape) + axis, writes, norm, layer or node)
        known = self._touched.setdefault((node, index), one)
        if known != one:
            self._refuse(value, f"{node.op_type} both reads the stream and writes into it")

    def _made(self, value: ir.Value) -> None:
        """Follow a value of the stream to what it is made of."""
        node, axis = value.producer(), self.axes[value]
        norm = next((norm for norm in self._norms if norm.output is value), None)
        if value.is_graph_output():
            self._refuse(value, "it is an output of the graph")
        if node is None:
            self._refuse(value, "it is an input of the graph")
        elif norm is not None:
            self._refuse(value, POST_NORM)
        elif is_standard(node, "MatMul", "Gemm", "Conv"):
            self._written(node, value, axis)
        else:
            self._linked(node, None, value, axis)

    def _written(self, node: ir.Node, value: ir.Value, axis: int) -> None:
        """Take the weight and the bias of a layer that writes into the stream."""
        weight, rank = node.inputs[1], len(value.shape or ())
        conv = node.op_type == "Conv"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if weight is None or not _is_matrix(weight, conv):
            self._refuse(value, f"{node.op_type} makes it of a weight that is no constant matrix")
        elif axis != (1 - rank if conv else -1):
            self._refuse(value, f"its channels are not those that {node.op_type} makes")
        elif node.attributes.get_int("group", 1) != 1:
            self._refuse(value, "Conv makes it in groups of channels, which a rotation mixes")
        elif bias is not None and not is_constant(bias):
            self._refuse(value, f"{node.op_type} adds a bias that is no constant")
        else:
            front = conv or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)
            self._touch(node, 1, -len(weight.shape or ()) if front else -1, True)
            if bias is not None:
                self._touch(node, 2, -1, True)

    def _linked(self, node: ir.Node, at: int | None, value: ir.Value, axis: int) -> None:
        """Take in all that a node moves along with one of its values."""
        link = linked(node, at, axis)
        if isinstance(link, str):
            self._refuse(value, f"{node.op_type} {'makes' if at is None else 'reads'} it: {link}")
            return
        for index, place in link.inputs.items():
            operand = node.inputs[index]
            assert operand is not None
            if is_constant(operand):
                self._touch(node, index, place, True)
            else:
                self._enter(operand, place)
        self._enter(node.outputs[0], link.output)

    def _read(self, value: ir.Value) -> None:
        """Follow a value of the stream to its readers."""
        axis = self.axes[value]
        for norm in self._norms:
            if norm.source is value and axis == -1:
                self.stream.norms.append(norm)
                self._behind(norm)
        inside = {node for norm in self.stream.norms for node in norm.nodes}
        for node, index in self._readers(value):
            if node not in inside and not self._layer_reads(node, index, axis, None):
                self._linked(node, index, value, axis)

    def _readers(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        """Return which inputs of which nodes a value's content goes to."""
        if any(use.node.graph is not self.graph for use in value.uses()):
            self._refuse(value, "an If or Loop reads it")
        return [
            (use.node, use.idx)
            for use in value.uses()
            if use.node.graph is self.graph and not is_standard(use.node, "Shape", "Size")
        ]

    def _layer_reads(self, node: ir.Node, index: int, axis: int, norm: Norm | None) -> bool:
        """Take the weight of a layer that reads the stream; return whether it is one."""
        if index != 0 or axis != -1 or not is_standard(node, "MatMul", "Gemm"):
            return False
        if node.attributes.get_int("transA", 0) or node.inputs[1] is None:
            return False
        weight, turned = node.inputs[1], bool(node.attributes.get_int("transB", 0))
        turn = weight.producer()
        if _is_matrix(weight):
            self._touch(node, 1, -1 if turned else -2, False, norm)
        elif turn is not None and _is_turned_matrix(turn) and len(weight.uses()) == 1:
            self.stream.changed.append(weight)
            self._touch(turn, 0, -2 if turned else -1, False, norm, node)
        else:
            return False
        return True

    def _behind(self, norm: Norm) -> None:
        """Follow what comes out of a normalization to the layers that can take its gain."""
        if norm.bias is not None and not norm.folds:
            self._touch(norm.nodes[-1], norm.nodes[-1].inputs.index(norm.bias), -1, False)
        self.stream.changed += [value for value in norm.inner if value not in self.axes]
        places = [(norm.output, -1)]
        for value, axis in places:
            if value in self.axes:
                continue  # it is a part of the sums, and that is refused elsewhere
            self.stream.changed.append(value)
            if value is not norm.output:  # whose shape is that of what is normalized
                self._fits(value, axis)
            if value.is_graph_output():
                self._refuse(value, "it is an output of the graph")
            for node, index in self._readers(value):
                if not self._layer_reads(node, index, axis, norm):
                    places += self._passed(node, index, value, axis, norm)

    def _passed(
        self, node: ir.Node, index: int, value: ir.Value, axis: int, norm: Norm
    ) -> list[tuple[ir.Value, int]]:
        """Return where a node that is no layer moves what a normalization made."""
        link = linked(node, index, axis)
        if isinstance(link, str):
            self._refuse(value, f"{node.op_type} reads it: {link}")
        elif norm.bias is not None and is_standard(node, "Mul", "Div"):
            self._refuse(value, f"{node.op_type} scales it and its bias")
        elif len(link.inputs) > 1:
            self._enter(value, axis)  # it is added to the stream, which will be refused
        else:
            return [(node.outputs[0], link.output)]
        return []


def _is_matrix(value: ir.Value, any_rank: bool = False) -> bool:
    """Whether a value is a constant of two axes (or more)."""
    if not is_constant(value) or value.shape is None:
        return False
    return len(value.shape) == 2 or (any_rank and len(value.shape) > 2)


def _is_turned_matrix(node: ir.Node) -> bool:
    """Whether a node transposes a constant of two axes."""
    source = node.inputs[0] if node.inputs else None
    if not is_standard(node, "Transpose") or source is None or not _is_matrix(source):
        return False
    return tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)
