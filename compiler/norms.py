"""Recognizes normalizations over the last axis: LayerNormalization and the forms of RMSNorm.

RMSNorm is one node (RMSNormalization, SimplifiedLayerNormalization), or what exporters write for
it: x / sqrt(mean(x^2) + epsilon), and then perhaps a product with a gain.
Source: B. Zhang and R. Sennrich, "Root mean square layer normalization" (arXiv 1910.07467).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .graph import is_constant, is_standard, sole_consumer
from .weights import opened

DOMAINS = ("", "ai.onnx", "com.microsoft")
OF_ROOT_MEAN_SQUARE = ("RMSNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class Norm:
    """A normalization over the last axis.

    Attributes:
        source: What is normalized.
        output: What comes out, scaled by the gain.
        nodes: Its nodes in order; the last one makes the output.
        inner: Values on the way that turn with the source; only its own nodes read them.
        centres: Whether the mean is subtracted first.
        gain: The constant that every channel is scaled by, or None.
        bias: The constant that is added at the end, or None.
        width: Channels.
    """

    source: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    inner: tuple[ir.Value, ...]
    centres: bool
    gain: ir.Value | None
    bias: ir.Value | None
    width: int

    @cached_property
    def gains(self) -> npt.NDArray[np.float64]:
        """The factor of each channel, [width]."""
        if self.gain is None:
            return np.ones(self.width)
        with opened(self.gain) as array:
            return np.broadcast_to(array.astype(np.float64).ravel(), self.width)

    @property
    def energy(self) -> npt.NDArray[np.float64]:
        """The mean square of each channel of the output, [width], where all turn out alike."""
        energy: npt.NDArray[np.float64] = np.square(self.gains)
        if self.bias is not None:
            with opened(self.bias) as array:
                energy = energy + np.square(array.astype(np.float64).ravel())
        return energy

    @property
    def folds(self) -> bool:
        """Whether channels are scaled differently, so that a rotation cannot pass the gain."""
        return bool(np.ptp(self.gains) > 0)


def norms_of(graph: ir.Graph) -> list[Norm]:
    """Return every normalization over the last axis whose gain is a constant, in graph order."""
    found = (_one_node(node) or _several_nodes(node) for node in graph)
    return [norm for norm in found if norm is not None]


def _one_node(node: ir.Node) -> Norm | None:
    """Return the normalization that one node is."""
    centres = is_standard(node, "LayerNormalization")
    square = node.domain in DOMAINS and node.op_type in OF_ROOT_MEAN_SQUARE
    if not (centres or square) or any(value.uses() for value in node.outputs[1:]):
        return None
    source, gain, bias = (*node.inputs, None, None)[:3]
    width = _width(source)
    last = len(source.shape) - 1 if source is not None and source.shape is not None else None
    if source is None or node.attributes.get_int("axis", -1) not in (-1, last):
        return None
    if width is None or not _is_vector(gain, width) or not (bias is None or is_constant(bias)):
        return None
    return Norm(source, node.outputs[0], (node,), (), centres, gain, bias, width)


def _several_nodes(node: ir.Node) -> Norm | None:
    """Return the RMSNorm whose product with the inverse root, or quotient, this node is."""
    for source, inverse in _quotients(node):
        width = _width(source)
        chain = _root_mean_square(inverse, source)
        if width is None or chain is None:
            continue
        normalized = node.outputs[0]
        scaling = sole_consumer(normalized)
        gain = _gain(scaling, normalized, width) if scaling is not None else None
        square = chain[0].outputs[0]
        if gain is None or scaling is None:
            return Norm(source, normalized, (*chain, node), (square,), False, None, None, width)
        nodes, inner = (*chain, node, scaling), (square, normalized)
        return Norm(source, scaling.outputs[0], nodes, inner, False, gain, None, width)
    return None


def _quotients(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Yield (x, the node that makes r) of every way to read a node as x / r."""
    if not is_standard(node, "Mul", "Div"):
        return
    first, second = node.inputs
    ways = [(first, second)] if node.op_type == "Div" else [(first, second), (second, first)]
    for source, other in ways:
        maker = other.producer() if other is not None else None
        if source is None or maker is None:
            continue
        if node.op_type == "Div":
            yield source, maker
        elif is_standard(maker, "Reciprocal") and (root := _maker(maker, 0)) is not None:
            yield source, root
        elif is_standard(maker, "Div") and _is_number(maker.inputs[0], 1.0):
            root = _maker(maker, 1)
            if root is not None:
                yield source, root


def _root_mean_square(root: ir.Node, source: ir.Value) -> tuple[ir.Node, ...] | None:
    """Return the nodes of sqrt(mean(x^2) + epsilon) that end in a root, or None."""
    if not is_standard(root, "Sqrt"):
        return None
    sum_ = _maker(root, 0)
    if sum_ is None or not is_standard(sum_, "Add"):
        return None
    places = [i for i in (0, 1) if _is_number(sum_.inputs[1 - i])]
    mean = _maker(sum_, places[0]) if places else None
    if mean is None or not is_standard(mean, "ReduceMean") or not _over_the_last(mean):
        return None
    square = _maker(mean, 0)
    if square is None or sole_consumer(square.outputs[0]) is not mean:
        return None
    power = is_standard(square, "Pow") and _is_number(square.inputs[1], 2.0)
    product = is_standard(square, "Mul") and square.inputs[0] is square.inputs[1]
    if square.inputs[0] is not source or not (power or product):
        return None
    return square, mean, sum_, root


def _over_the_last(mean: ir.Node) -> bool:
    """Whether a ReduceMean runs over the last axis alone and keeps it."""
    source = mean.inputs[0]
    axes = list(mean.attributes.get_ints("axes", ()))
    if len(mean.inputs) > 1 and mean.inputs[1] is not None and is_constant(mean.inputs[1]):
        with opened(mean.inputs[1]) as array:
            axes = [int(axis) for axis in array.ravel()]
    rank = len(source.shape) if source is not None and source.shape is not None else 0
    return axes in ([-1], [rank - 1]) and bool(mean.attributes.get_int("keepdims", 1))


def _gain(node: ir.Node, normalized: ir.Value, width: int) -> ir.Value | None:
    """Return the constant that a Mul scales every channel by, or None."""
    if not is_standard(node, "Mul") or normalized not in node.inputs:
        return None
    other = node.inputs[1 - node.inputs.index(normalized)]
    return other if _is_vector(other, width) else None


def _maker(node: ir.Node, index: int) -> ir.Node | None:
    """Return the node that makes an input."""
    value = node.inputs[index]
    return value.producer() if value is not None else None


def _is_vector(value: ir.Value | None, width: int) -> bool:
    """Whether a value is a constant of a number for each channel, on the last axis."""
    if value is None or not is_constant(value) or value.const_value is None:
        return False
    shape = [int(length) for length in value.const_value.shape.numpy()]
    return shape[-1:] == [width] and value.const_value.size == width


def _is_number(value: ir.Value | None, number: float | None = None) -> bool:
    """Whether a value is a constant of one element, and perhaps which."""
    if value is None or not is_constant(value) or value.const_value is None:
        return False
    if value.const_value.size != 1:
        return False
    return number is None or float(value.const_value.numpy().ravel()[0]) == number


def _width(value: ir.Value | None) -> int | None:
    """Return the length of the last axis, or None where it is not known."""
    if value is None or value.shape is None or not value.shape:
        return None
    last = value.shape[-1]
    return last if isinstance(last, int) else None
