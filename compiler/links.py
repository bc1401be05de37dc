"""How nodes move channels without mixing them: which axis of which operand is which of the output.

A node is a link if, whatever matrix the channels of its operands are multiplied by, its output's
channels come out multiplied by the same. Axes of channels are counted from the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from .graph import is_constant, is_standard

UNKNOWN = "the shapes that it meets are not known; put tidy before"
ALONG = "it works along the channels"
OTHER = "no rotation passes through it"


@dataclass(frozen=True)
class Link:
    """Where a node has its channels.

    Attributes:
        inputs: Index of each input that carries them -> their axis.
        output: Their axis in the output.
    """

    inputs: Mapping[int, int]
    output: int


def linked(node: ir.Node, at: int | None, axis: int) -> Link | str:
    """Return how a node moves channels, or what speaks against it.

    Args:
        node: The node.
        at: The input whose channels are known, or None for the output.
        axis: Their axis there, counted from the end.
    """
    if is_standard(node, "Add", "Sub"):
        return Link({0: axis, 1: axis}, axis)
    if is_standard(node, "Concat"):
        joined = _from_end(node.attributes.get_int("axis", 0), node.outputs[0])
        if joined in (None, axis):
            return UNKNOWN if joined is None else ALONG
        return Link(dict.fromkeys(range(len(node.inputs)), axis), axis)
    if is_standard(node, "Mul", "Div"):
        return _scaled(node, at, axis)
    moved = MOVES.get(node.op_type) if is_standard(node, node.op_type) else None
    if moved is None or at not in (None, 0):
        return OTHER
    return _moved(node, moved, at, axis)


def _moved(node: ir.Node, moved: Move, at: int | None, axis: int) -> Link | str:
    """Return the link of a node that moves one operand."""
    if at == 0:
        output = moved(node, axis)
        return output if isinstance(output, str) else Link({0: axis}, output)
    rank = _rank(node.inputs[0])
    found = [moved(node, place) for place in range(-(rank or 0), 0)]
    if axis in found and rank is not None:
        return Link({0: found.index(axis) - rank}, axis)
    return next((reason for reason in found if isinstance(reason, str)), UNKNOWN)


def _scaled(node: ir.Node, at: int | None, axis: int) -> Link | str:
    """Return the link of a product with one number."""
    numbers = [index for index in (0, 1) if _is_number(node.inputs[index])]
    if len(numbers) != 1 or numbers == [at] or (node.op_type == "Div" and numbers == [0]):
        return "it scales every channel differently"
    return Link({1 - numbers[0]: axis}, axis)


def _is_number(value: ir.Value | None) -> bool:
    """Whether a value is a constant of one element."""
    return value is not None and is_constant(value) and _size(value) == 1


def _size(value: ir.Value) -> int:
    """Return how many elements a constant has."""
    assert value.const_value is not None
    return int(value.const_value.size)


def _same(node: ir.Node, axis: int) -> int | str:
    """Return where channels go in Identity and Expand."""
    return axis


def _transposed(node: ir.Node, axis: int) -> int | str:
    """Return where a Transpose takes an axis."""
    rank = _rank(node.inputs[0])
    if rank is None:
        return UNKNOWN
    order = list(node.attributes.get_ints("perm", tuple(range(rank))[::-1]))
    return order.index(rank + axis) - rank


def _reshaped(node: ir.Node, axis: int) -> int | str:
    """Return where an axis goes that keeps its length and all that lies before or behind it."""
    source, target = _dims(node.inputs[0]), _dims(node.outputs[0])
    if source is None or target is None:
        return UNKNOWN
    before, behind = source[: len(source) + axis], source[len(source) + axis + 1 :]
    for place, length in enumerate(target):
        if length == source[axis] and (
            _alike(before, target[:place]) or _alike(behind, target[place + 1 :])
        ):
            return place - len(target)
    return ALONG


def _sliced(node: ir.Node, axis: int) -> int | str:
    """Return where a Slice along other axes leaves the channels."""
    cut = _integers(node.inputs[3] if len(node.inputs) > 3 else None)
    places = [_from_end(one, node.inputs[0]) for one in cut or ()]
    if not places or None in places:
        return UNKNOWN
    return ALONG if axis in places else axis


def _gathered(node: ir.Node, axis: int) -> int | str:
    """Return where channels go when entries along another axis are looked up."""
    rank, more = _rank(node.inputs[0]), _rank(node.inputs[1])
    if rank is None or more is None:
        return UNKNOWN
    along = node.attributes.get_int("axis", 0)
    along = along - rank if along >= 0 else along
    if along == axis:
        return ALONG
    return axis if axis > along else axis - more + 1


def _averaged(node: ir.Node, axis: int) -> int | str:
    """Return where the mean over other axes leaves the channels."""
    given = tuple(node.attributes.get_ints("axes", ())) or _integers(
        node.inputs[1] if len(node.inputs) > 1 else None
    )
    places = [_from_end(one, node.inputs[0]) for one in given or ()]
    if not places or axis in places:
        return ALONG
    if None in places:
        return UNKNOWN
    if node.attributes.get_int("keepdims", 1):
        return axis
    return axis + sum(place is not None and place > axis for place in places)


Move = Callable[[ir.Node, int], int | str]

MOVES: dict[str, Move] = {
    "Identity": _same,
    "Expand": _same,
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Flatten": _reshaped,
    "Squeeze": _reshaped,
    "Unsqueeze": _reshaped,
    "Slice": _sliced,
    "Gather": _gathered,
    "ReduceMean": _averaged,
}

Dim = int | str | None


def _rank(value: ir.Value | None) -> int | None:
    """Return the number of axes, or None where it is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def _dims(value: ir.Value | None) -> list[Dim] | None:
    """Return the axes' lengths: numbers, names, or None."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _alike(first: Sequence[Dim], second: Sequence[Dim]) -> bool:
    """Whether two runs of axes hold equally many elements, as far as names can tell."""
    if None in first or None in second:
        return False
    names = [sorted(dim for dim in dims if isinstance(dim, str)) for dims in (first, second)]
    sizes = [prod(dim for dim in dims if isinstance(dim, int)) for dims in (first, second)]
    return names[0] == names[1] and sizes[0] == sizes[1]


def _from_end(axis: int, value: ir.Value | None) -> int | None:
    """Return an axis counted from the end, or None where that takes a rank that is not known."""
    if axis < 0:
        return axis
    rank = _rank(value)
    return None if rank is None else axis - rank


def _integers(value: ir.Value | None) -> list[int] | None:
    """Return the numbers of a constant, or None."""
    if value is None or not is_constant(value):
        return None
    assert value.const_value is not None
    return [int(number) for number in value.const_value.numpy().ravel()]
