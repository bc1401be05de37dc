"""Finds gauges: values whose channels may be scaled without changing what the model computes.

    Conv(Relu(Conv(x, w1, b1)), w2) = Conv(Relu(Conv(x, w1 f, b1 f)), w2 / f)     f > 0 a channel

A writer takes the factors into its constants, ops in between pass positive factors through, and
every reader takes the inverse into its weight along the axis that it sums over. Which channel an
element belongs to is kept as an array of channel numbers that broadcasts against the value; so it
survives reshapes, transposes, heads that are split and merged, and heads that are repeated.
Sources: Nagel et al., arXiv 1906.04721; Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .graph import is_constant, is_float, is_standard, weight_of
from .weights import opened

Channels = npt.NDArray[np.intp]

# op type -> (index of the gain, index of the offset or None)
NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "BatchNormalization": (1, 2),
}
# f(c x) = c f(x) for c > 0, element by element or along axes that hold no channels.
HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Neg", "Abs"}
    | {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
)
# Linear in one operand, whatever the other is.
BINARY = frozenset({"Mul", "Div", "MatMul", "Expand"})
# Element by element, and not homogeneous: a layer behind one of these shows what was missed.
BENT = frozenset(
    {"Clip", "Elu", "Selu", "Celu", "Gelu", "Erf", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"}
    | {"Swish", "Mish", "Softplus", "Softsign", "ThresholdedRelu"}
)


@dataclass(frozen=True, eq=False)
class Share:
    """A constant that takes a gauge's factors, or their inverse.

    Attributes:
        node: The node that reads it.
        index: Which input of the node it is.
        channels: Channel numbers that broadcast against the constant (or the other way round,
            where one number serves all channels).
        inverse: Whether it takes 1 / f.
    """

    node: ir.Node
    index: int
    channels: Channels
    inverse: bool = False

    @property
    def value(self) -> ir.Value:
        """The initializer."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    def scaled(self, exponents: npt.NDArray[np.integer]) -> npt.NDArray[np.generic]:
        """Return the constant times 2**exponents, one exponent a channel; exact but for range."""
        signed = -exponents if self.inverse else exponents
        with opened(self.value) as array:
            scaled: npt.NDArray[np.generic] = array * np.ldexp(1.0, signed[self.channels])
            return scaled.astype(array.dtype)


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that takes the inverse factors into its weight.

    Attributes:
        share: Its weight.
        operand: The activation that the weight meets.
        channels: Channel numbers that broadcast against the activation.
    """

    share: Share
    operand: ir.Value
    channels: Channels


@dataclass(frozen=True, eq=False)
class Gauge:
    """Channels that may be scaled.

    Attributes:
        value: What the writer makes; or the value that a Mul would have to be put behind.
        count: Number of channels.
        written: Constants of the writer, and of ops in between that add something.
        readers: Layers that take the inverse.
        scaled: Values whose content changes with the factors; none where a Mul is needed.
    """

    value: ir.Value
    count: int
    written: tuple[Share, ...]
    readers: tuple[Reader, ...]
    scaled: tuple[ir.Value, ...] = ()

    @property
    def needs_mul(self) -> bool:
        """Whether nothing can take the factors in front of the readers."""
        return not self.written


@dataclass
class Found:
    """The gauges of a graph.

    Attributes:
        exact: Those that cost nothing at run time, in graph order.
        possible: Those that need a Mul in front of their MatMul and Gemm readers.
        refused: Name of a value that is no gauge although a layer reads it -> the reason.
    """

    exact: list[Gauge] = field(default_factory=list)
    possible: list[Gauge] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def find(graph: ir.Graph) -> Found:
    """Return every gauge of the main graph; no layer reads two of them."""
    found, walks = Found(), []
    taken: set[int] = set()
    for node in graph:
        for written, channels in _writers(node):
            walk = _Walk(graph, node.outputs[0], channels, written)
            if not walk.readers or {id(r.share.node) for r in walk.readers} <= taken:
                continue
            if walk.reason is None:
                taken |= {id(reader.share.node) for reader in walk.readers}
                found.exact.append(walk.gauge())
            else:
                walks.append(walk)
    for walk in walks:
        if not {id(reader.share.node) for reader in walk.readers} <= taken:
            found.refused.setdefault(str(walk.value.name), str(walk.reason))
    found.possible += _in_front_of_readers(graph, taken)
    return found


def _in_front_of_readers(graph: ir.Graph, taken: set[int]) -> Iterator[Gauge]:
    """Yield values that MatMul and Gemm layers read which no gauge has taken."""
    sources: dict[int, ir.Value] = {}
    for node in graph:
        if is_standard(node, "MatMul", "Gemm") and weight_of(node) and id(node) not in taken:
            operand = node.inputs[0]
            if operand is not None and not is_constant(operand):
                sources.setdefault(id(operand), operand)
    for value in sources.values():
        count, rank = _last(value)
        if rank is None or count < 2:
            continue
        channels = _along(count, rank - 1, rank)
        uses = [use.node for use in value.uses() if use.node.graph is graph and use.idx == 0]
        read = [
            _reader(node, 0, value, channels)
            for node in uses
            if is_standard(node, "MatMul", "Gemm") and id(node) not in taken
        ]
        readers = tuple(reader for reader in read if isinstance(reader, Reader))
        if readers:
            yield Gauge(value, count, (), readers)


def _writers(node: ir.Node) -> Iterator[tuple[tuple[Share, ...], Channels]]:
    """Yield the constants of a node that could take factors, and the channels of its output."""
    count, rank = _last(node.outputs[0]) if node.outputs else (0, None)
    weight = weight_of(node)
    if weight is not None and is_standard(node, "Conv", "Gemm", "MatMul"):
        tensor = weight.value.const_value
        assert tensor is not None
        shape = tensor.shape.numpy()
        axis = 1 if node.op_type == "Conv" else 2 if rank is None else rank - 1
        rank = len(shape) if node.op_type == "Conv" else 2 if node.op_type == "Gemm" else rank
        if rank is None or (node.op_type == "MatMul" and len(shape) != 2):
            return
        channels = np.arange(shape[weight.axis])
        shares = [Share(node, 1, _along(channels.size, weight.axis, len(shape)))]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            shares.append(Share(node, 2, channels))
        yield tuple(shares), _along(channels.size, 1 if node.op_type == "Gemm" else axis, rank)
    elif node.op_type in NORMS and node.domain in ("", "ai.onnx", "com.microsoft"):
        yield from _norm(node)
    elif is_standard(node, "Mul") and rank is not None and count > 1:
        for index, value in enumerate(node.inputs):
            if value is not None and is_constant(value) and _tail(value) in (1, count):
                channels = _along(count, rank - 1, rank)
                yield (Share(node, index, np.arange(count)),), channels


def _norm(node: ir.Node) -> Iterator[tuple[tuple[Share, ...], Channels]]:
    """Yield gain and offset of a normalization."""
    source, gain = node.inputs[0], node.inputs[1]
    if source is None or source.shape is None or gain is None or gain.shape is None:
        return
    if not gain.shape.is_static():
        return
    shape, rank = gain.shape.numpy(), len(source.shape)
    if len(shape) > rank:
        return
    own = np.arange(prod(shape)).reshape(shape)
    behind = rank - 2 if node.op_type == "BatchNormalization" else 0
    channels = own.reshape((1,) * (rank - len(shape) - behind) + shape + (1,) * behind)
    inputs = [index for index in NORMS[node.op_type] if index is not None]
    given = [i for i in inputs if i < len(node.inputs) and node.inputs[i] is not None]
    yield tuple(Share(node, index, own) for index in given), channels


def _tail(value: ir.Value) -> int:
    """Return the elements of a constant that is a number or a vector along the last axis, or 0."""
    if value.shape is None or not value.shape.is_static():
        return 0
    shape = value.shape.numpy()
    return shape[-1] if shape and prod(shape[:-1]) == 1 else int(not shape)


def _last(value: ir.Value) -> tuple[int, int | None]:
    """Return (length of the last axis or 0, rank or None)."""
    if value.shape is None or not len(value.shape):
        return 0, None
    length = value.shape[-1]
    return length if isinstance(length, int) else 0, len(value.shape)


def _along(count: int, axis: int, rank: int) -> Channels:
    """Return 0, 1, ... along one axis."""
    return np.arange(count).reshape([-1 if a == axis else 1 for a in range(rank)])


class _Walk:
    """Follows one writer's channels to the layers that read them.

    Attributes:
        readers: The layers.
        reason: What keeps the channels from being scaled, or None.
    """

    def __init__(
        self, graph: ir.Graph, value: ir.Value, channels: Channels, written: tuple[Share, ...]
    ) -> None:
        self.value, self.count = value, int(channels.size)
        self.written, self.readers = list(written), list[Reader]()
        self.scaled: dict[int, ir.Value] = {}
        self.reason: str | None = None
        self._graph = graph
        self._seen: set[int] = set()
        self._note(next((why for s in written if (why := _unscalable(s))), None))
        self._note("it has one channel" if self.count < 2 else None)
        self._visit(value, channels)

    def gauge(self) -> Gauge:
        """Return what was found, where nothing forbids it."""
        scaled = tuple(self.scaled.values())
        return Gauge(self.value, self.count, tuple(self.written), tuple(self.readers), scaled)

    def _note(self, reason: str | None) -> None:
        """Keep the first reason."""
        self.reason = self.reason or reason

    def _visit(self, value: ir.Value, channels: Channels) -> None:
        """Follow a value to all its uses, and what passes its channels through likewise."""
        waiting = [(value, channels)]
        while waiting:
            value, channels = waiting.pop()
            self.scaled[id(value)] = value
            self._note(f"{value.name} is an output" if value.is_graph_output() else None)
            for use in value.uses():
                went = self._use(use.node, use.idx, value, channels)
                if went is not None:
                    waiting.append((use.node.outputs[0], went))

    def _use(self, node: ir.Node, index: int, value: ir.Value, at: Channels) -> Channels | None:
        """Return the channels of the node's output where they pass; note what forbids it."""
        if node.graph is not self._graph:
            self._note(f"the body of an If, Loop or Scan reads {value.name}")
            return None
        if id(node) in self._seen:
            self._note(f"a {node.op_type} reads it twice")
            return None
        self._seen.add(id(node))
        if index == 0 and weight_of(node) and is_standard(node, "Conv", "Gemm", "MatMul"):
            reader = _reader(node, index, value, at)
            if isinstance(reader, Reader):
                self.readers.append(reader)
                return None
        if is_standard(node, "Add", "Sub"):
            return self._sum(node, index, at)
        went = passed(node, index, at)
        if isinstance(went, str):
            self._note(went)
            return at if is_standard(node, *BENT) else None
        return went

    def _sum(self, node: ir.Node, index: int, at: Channels) -> Channels | None:
        """Let a constant that is added take the factors too."""
        other = node.inputs[1 - index]
        rank = _rank(node.outputs[0])
        if other is None or rank is None or not is_constant(other) or other.shape is None:
            self._note(f"{node.op_type} adds {'?' if other is None else other.name} to it")
            return None
        at = _aligned(at, rank)
        own = at
        while own.ndim > len(other.shape) and own.shape[0] == 1:
            own = own[0]
        self.written.append(Share(node, 1 - index, own))
        return at


def _unscalable(share: Share) -> str | None:
    """Return why a constant cannot be replaced by a scaled copy, or None."""
    value = share.value
    if not is_constant(value) or not is_float(value):
        return f"{value.name} is no constant"
    weight = weight_of(share.node)
    if weight is not None and weight.value is value and _is_shared(value):
        return f"the weight {value.name} is shared with another layer"
    return None


def _is_shared(weight: ir.Value) -> bool:
    """Whether a scaled copy of a weight would stand beside the weight."""
    return len(tuple(weight.uses())) > 1 or weight.is_graph_output()


def _reader(node: ir.Node, index: int, value: ir.Value, at: Channels) -> Reader | str:
    """Return the layer as a reader of these channels, or why it is none."""
    weight = weight_of(node)
    if index != 0 or weight is None:
        return f"{node.op_type} reads it, and has no constant weight for it"
    if _is_shared(weight.value):
        return f"the weight {weight.value.name} is shared with another layer"
    tensor = weight.value.const_value
    assert tensor is not None
    shape = tensor.shape.numpy()
    axis = 1 if node.op_type == "Conv" else at.ndim - 1
    if (
        at.size != at.shape[axis]
        or node.attributes.get_int("transA", 0) != 0
        or (node.op_type == "MatMul" and len(shape) != 2)
    ):
        return f"the {node.op_type} sums over another axis than that of the channels"
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        own = np.repeat(at.reshape(groups, -1), shape[0] // groups, axis=0)
        own = own.reshape(own.shape + (1,) * (len(shape) - 2))
    else:
        own = at.reshape((1, -1) if weight.axis == 0 else (-1, 1))
    return Reader(Share(node, 1, own, inverse=True), value, at)


def passed(node: ir.Node, index: int, at: Channels) -> Channels | str:
    """Return the channels of a node's output, given those of one input; or why factors end there.

    Args:
        node: A node that is no layer with a weight and no sum.
        index: Which input it is.
        at: Channel numbers that broadcast against the input.
    """
    op = node.op_type
    refusal = f"{op} passes no factors through"
    if not is_standard(node, op) or any(output.uses() for output in node.outputs[1:]):
        return refusal
    if op in BINARY:
        return _broadcast(node, index, at, refusal)
    if index == 0 and op in HOMOGENEOUS:
        return at
    return MOVING[op](node, at) if index == 0 and op in MOVING else refusal


def _broadcast(node: ir.Node, index: int, at: Channels, refusal: str) -> Channels | str:
    """Multiply by something, but sum over no channels."""
    rank = _rank(node.outputs[0])
    if rank is None or (index != 0 and node.op_type in ("Div", "Expand")):
        return refusal
    if node.op_type == "MatMul":
        contracted = -1 if index == 0 else -2
        if at.ndim < 2 or at.shape[contracted] != 1:
            return refusal
    return _aligned(at, rank)


def _transposed(node: ir.Node, at: Channels) -> Channels:
    """Permute the axes."""
    order = node.attributes.get_ints("perm", tuple(reversed(range(at.ndim))))
    return at.transpose([int(axis) for axis in order])


def _reshaped(node: ir.Node, at: Channels) -> Channels | str:
    """Lay the axes from the first one with channels on out anew."""
    source, output = node.inputs[0], node.outputs[0]
    unknown = f"{node.op_type} changes a shape that is not known"
    if source is None or source.shape is None or output.shape is None:
        return unknown
    first = next(axis for axis, length in enumerate(at.shape) if length > 1)
    before = [n for n in source.shape[first:] if isinstance(n, int)]
    if len(before) != len(source.shape) - first:
        return unknown
    flat = np.broadcast_to(at, at.shape[:first] + tuple(before)).ravel()
    after: list[int] = []
    for length in reversed(list(output.shape)):
        if prod(after) >= flat.size or not isinstance(length, int):
            break
        after.insert(0, length)
    if prod(after) != flat.size:
        return unknown
    start = len(output.shape) - len(after)
    new = flat.reshape((1,) * start + tuple(after))
    for axis in range(start, new.ndim):
        one = new.take([0], axis)
        new = one if np.array_equal(np.broadcast_to(one, new.shape), new) else new
    return new


def _reduced(node: ir.Node, at: Channels) -> Channels | str:
    """Reduce axes without channels."""
    axes = _ints(node, 1, "axes", None)
    if axes is None or any(at.shape[axis] != 1 for axis in axes):
        return f"{node.op_type} reduces its channels, or axes that are not known"
    if node.attributes.get_int("keepdims", 1):
        return at
    return at.squeeze(tuple(axes))


def _padded(node: ir.Node, at: Channels) -> Channels | str:
    """Pad with zeros, or with what is there, but add no channels."""
    refusal = "Pad adds channels, or a number that is not known to be zero"
    axes = _ints(node, 3, "", range(at.ndim))
    pads = _ints(node, 1, "pads", None)
    if pads is None or axes is None:
        return refusal
    both = zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True)
    if any(at.shape[axis] != 1 and (low or high) for axis, low, high in both):
        return refusal
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    zero = node.attributes.get_float("value", 0.0) == 0.0
    if filler is not None and node.attributes.get_string("mode", "constant") == "constant":
        zero = is_constant(filler) and not np.any(_data(filler))
    return at if zero else refusal


MOVING = {
    "Transpose": _transposed,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax"), _reduced),
    "Pad": _padded,
}


def _ints(node: ir.Node, index: int, name: str, default: range | None) -> list[int] | range | None:
    """Return a node's constant list of integers: an input, or the attribute of older opsets."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is not None:
        return [int(n) for n in _data(value)] if is_constant(value) else None
    if name and name in node.attributes:
        return [int(n) for n in node.attributes.get_ints(name, ())]
    return default


def _data(value: ir.Value) -> npt.NDArray[np.generic]:
    """Copy a constant."""
    with opened(value) as array:
        return array.copy()


def _rank(value: ir.Value) -> int | None:
    """Return the value's rank, where it is known."""
    return None if value.shape is None else len(value.shape)


def _aligned(at: Channels, rank: int) -> Channels:
    """Return the channels against a value of a greater rank."""
    return at.reshape((1,) * (rank - at.ndim) + at.shape)
