"""Finds gauges: values whose channels may be scaled without changing what the model computes.

    Conv(Relu(Conv(x, w1, b1)), w2) = Conv(Relu(Conv(x, w1 f, b1 f)), w2 / f)     f > 0 a channel

A writer takes the factors into its constants, ops in between pass positive factors through, and
every reader takes the inverse into its weight along the axis that it sums over. Channels for which
one of these is not so keep the factor 1.
Sources: Nagel et al., arXiv 1906.04721; Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .channels import Channels, Went, aligned, along, passed, rank_of
from .graph import is_constant, is_float, is_standard, weight_of
from .weights import opened

Mask = npt.NDArray[np.bool_]

LAYERS = ("Conv", "Gemm", "MatMul")
# op type -> (index of the gain, index of the offset or None)
NORMS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "BatchNormalization": (1, 2),
}
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
        axis: The axis of the activation that the layer sums over.
        channels: The channel of each place along that axis.
        places: Places along that axis that broadcast against the weight.
    """

    share: Share
    operand: ir.Value
    axis: int
    channels: Channels
    places: Channels


@dataclass(frozen=True, eq=False)
class Gauge:
    """Channels that may be scaled.

    Attributes:
        value: What the writer makes; or the value that a Mul would have to be put behind.
        free: For each channel whether it may take a factor; the others are only joined to them.
        written: Constants of the writer, and of ops in between that add something.
        readers: Layers that take the inverse.
        scaled: Values whose content changes with the factors; none where a Mul is needed.
    """

    value: ir.Value
    free: Mask
    written: tuple[Share, ...]
    readers: tuple[Reader, ...]
    scaled: tuple[ir.Value, ...] = ()

    @property
    def count(self) -> int:
        """Number of channels."""
        return self.free.size

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
    """Return every gauge of the main graph; none whose places before layers others all have."""
    found, refused = Found(), []
    taken: dict[int, Mask] = {}
    for node in graph:
        for written, channels in _writers(node):
            walk = _Walk(graph, node.outputs[0], channels, written)
            gauge = walk.gauge()
            if gauge is None:
                refused.append(walk)
            elif _takes_more(gauge, taken):
                found.exact.append(gauge)
    for walk in refused:
        if not {id(layer) for layer in walk.layers} <= taken.keys():
            found.refused.setdefault(str(walk.value.name), str(walk.reason))
    found.possible += _in_front_of_readers(graph, taken)
    return found


def _takes_more(gauge: Gauge, taken: dict[int, Mask]) -> bool:
    """Take a gauge's places before its layers; return whether one of them was not taken yet."""
    more = False
    for reader in gauge.readers:
        places = gauge.free[reader.channels]
        before = taken.get(id(reader.share.node), np.zeros_like(places))
        more = more or bool((places & ~before).any())
        taken[id(reader.share.node)] = before | places
    return more


def _in_front_of_readers(graph: ir.Graph, taken: dict[int, Mask]) -> Iterator[Gauge]:
    """Yield values that MatMul and Gemm layers read which no gauge has taken."""
    layers = [
        node
        for node in graph
        if is_standard(node, "MatMul", "Gemm") and weight_of(node) and id(node) not in taken
    ]
    sources = dict.fromkeys(node.inputs[0] for node in layers)
    for value in sources:
        count, rank = _last(value)
        if value is None or is_constant(value) or rank is None or count < 2:
            continue
        channels = along(count, rank - 1, rank)
        read = [_reader(node, value, channels) for node in layers if node.inputs[0] is value]
        readers = tuple(reader for reader in read if isinstance(reader, Reader))
        if readers:
            yield Gauge(value, np.ones(count, np.bool_), (), readers)


def _writers(node: ir.Node) -> Iterator[tuple[tuple[Share, ...], Channels]]:
    """Yield the constants of a node that could take factors, and the channels of its output."""
    count, rank = _last(node.outputs[0]) if node.outputs else (0, None)
    if _is_layer(node):
        yield from _layer(node, rank)
    elif node.op_type in NORMS and node.domain in ("", "ai.onnx", "com.microsoft"):
        yield from _norm(node)
    elif is_standard(node, "Mul") and rank is not None:
        for index, value in enumerate(node.inputs):
            if value is not None and is_constant(value) and _tail(value) in (1, count):
                yield (Share(node, index, np.arange(count)),), along(count, rank - 1, rank)


def _is_layer(node: ir.Node) -> bool:
    """Whether the node meets an activation with a constant weight."""
    return is_standard(node, *LAYERS) and weight_of(node) is not None


def _layer(node: ir.Node, rank: int | None) -> Iterator[tuple[tuple[Share, ...], Channels]]:
    """Yield weight and bias of a layer."""
    weight = weight_of(node)
    assert weight is not None and weight.value.const_value is not None
    shape = weight.value.const_value.shape.numpy()
    rank = {"Conv": len(shape), "Gemm": 2}.get(node.op_type, rank)
    if rank is None or (node.op_type == "MatMul" and len(shape) != 2):
        return
    count = shape[weight.axis]
    shares = [Share(node, 1, along(count, weight.axis, len(shape)))]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        shares.append(Share(node, 2, np.arange(count)))
    yield tuple(shares), along(count, 1 if node.op_type == "Conv" else rank - 1, rank)


def _norm(node: ir.Node) -> Iterator[tuple[tuple[Share, ...], Channels]]:
    """Yield gain and offset of a normalization."""
    gain, rank = node.inputs[1], rank_of(node.inputs[0])
    if rank is None or gain is None or gain.shape is None or not gain.shape.is_static():
        return
    shape = gain.shape.numpy()
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


def _last(value: ir.Value | None) -> tuple[int, int | None]:
    """Return (length of the last axis or 0, rank or None)."""
    if value is None or value.shape is None or not len(value.shape):
        return 0, None
    length = value.shape[-1]
    return length if isinstance(length, int) else 0, len(value.shape)


class _Walk:
    """Follows one writer's channels to the layers that read them.

    Attributes:
        layers: What reads them with a weight.
        reason: What first kept channels from being scaled, or None.
    """

    def __init__(
        self, graph: ir.Graph, value: ir.Value, channels: Channels, written: tuple[Share, ...]
    ) -> None:
        self.value, self.layers = value, list[ir.Node]()
        self.reason: str | None = None
        self._graph, self._count = graph, channels.size
        self._written, self._readers = list(written), list[Reader]()
        self._frozen: set[int] = set()
        self._met: list[tuple[ir.Value, Channels]] = []
        self._seen: set[int] = set()
        for share in written:
            if why := _unscalable(share):
                self._freeze(channels, why)
        if channels.size > 1:  # a lone channel has no other to be evened out with
            self._visit(value, channels)

    def gauge(self) -> Gauge | None:
        """Return what was found; None where no channel can be scaled."""
        free = np.ones(self._count, np.bool_)
        free[sorted(self._frozen)] = False
        readers = tuple(r for r in self._readers if free[r.channels].any())
        if not readers:
            return None
        written = tuple(share for share in self._written if free[share.channels].any())
        scaled = tuple(value for value, at in self._met if free[at].any())
        return Gauge(self.value, free, written, readers, scaled)

    def _freeze(self, channels: Channels, reason: str) -> None:
        """Let channels keep the factor 1, and keep the first reason."""
        self._frozen.update(channels.ravel().tolist())
        self.reason = self.reason or reason

    def _visit(self, value: ir.Value, channels: Channels) -> None:
        """Follow a value to all its uses, and what passes its channels through likewise."""
        waiting = [(value, channels)]
        while waiting:
            value, at = waiting.pop()
            self._met.append((value, at))
            if value.is_graph_output():
                self._freeze(at, f"{value.name} is an output")
            for use in value.uses():
                waiting += self._use(use.node, use.idx, value, at)

    def _use(self, node: ir.Node, index: int, value: ir.Value, at: Channels) -> Went:
        """Return where the channels pass on to; freeze those that do not."""
        if node.graph is not self._graph:
            self._freeze(at, f"the body of an If, Loop or Scan reads {value.name}")
            return []
        if id(node) in self._seen:
            self._freeze(at, f"a {node.op_type} reads it twice")
            return []
        self._seen.add(id(node))
        if is_standard(node, "Add", "Sub"):
            went = self._sum(node, index, at)
        else:
            went = passed(node, index, at, self._count)
        if index == 0 and _is_layer(node):
            reader = _reader(node, value, at)
            if isinstance(reader, Reader) or isinstance(went, str):
                self.layers.append(node)
            if isinstance(reader, Reader):
                self._readers.append(reader)
                return []
            went = reader if isinstance(went, str) else went
        if isinstance(went, str):
            self._freeze(at, went)
            behind = node.outputs[0].uses() if is_standard(node, *BENT) else ()
            self.layers += [use.node for use in behind if use.idx == 0 and _is_layer(use.node)]
            return []
        last = max(int(channels.max()) for _, channels in went)
        self._frozen.update(range(self._count, last + 1))  # what was joined to them
        self._count = max(self._count, last + 1)
        return went

    def _sum(self, node: ir.Node, index: int, at: Channels) -> Went | str:
        """Let a constant that is added take the factors too."""
        output, other = node.outputs[0], node.inputs[1 - index]
        rank = rank_of(output)
        if other is None or rank is None or not is_constant(other) or other.shape is None:
            return f"{node.op_type} adds {'?' if other is None else other.name} to it"
        at = own = aligned(at, rank)
        while own.ndim > len(other.shape) and own.shape[0] == 1:
            own = own[0]
        self._written.append(Share(node, 1 - index, own))
        return [(output, at)]


def _unscalable(share: Share) -> str | None:
    """Return why a constant cannot be replaced by a scaled copy, or None."""
    value, weight = share.value, weight_of(share.node)
    if not is_constant(value) or not is_float(value):
        return f"{value.name} is no constant"
    if value.dtype == ir.DataType.FLOAT16:
        return f"{value.name} is float16, which small numbers do not fit exactly"
    if weight is not None and weight.value is value and _is_shared(value):
        return f"the weight {value.name} is shared with another layer"
    return None


def _is_shared(weight: ir.Value) -> bool:
    """Whether a scaled copy of a weight would stand beside the weight."""
    return len(tuple(weight.uses())) > 1 or weight.is_graph_output()


def _reader(node: ir.Node, value: ir.Value, at: Channels) -> Reader | str:
    """Return a layer as a reader of the channels of its first input, or why it is none."""
    weight = weight_of(node)
    assert weight is not None and weight.value.const_value is not None
    shape = weight.value.const_value.shape.numpy()
    axis = 1 if node.op_type == "Conv" else at.ndim - 1
    if (
        at.size != at.shape[axis]
        or node.attributes.get_int("transA", 0) != 0
        or (node.op_type == "MatMul" and len(shape) != 2)
    ):
        return f"the {node.op_type} sums over another axis than that of the channels"
    places = np.arange(at.size)
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        repeats = shape[0] // groups if groups > 1 else 1
        places = np.repeat(places.reshape(groups, -1), repeats, axis=0)
        places = places.reshape(places.shape + (1,) * (len(shape) - 2))
    else:
        places = places.reshape((1, -1) if weight.axis == 0 else (-1, 1))
    channels = at.ravel()
    share = Share(node, 1, channels[places], inverse=True)
    return _unscalable(share) or Reader(share, value, axis, channels, places)
