"""Follows channels through operators, as far as positive factors on them pass.

Which channel an element belongs to is kept as an array of channel numbers that broadcasts against
the value, one axis for each of the value's. So it survives reshapes, transposes, heads that are
split, merged and repeated, and values that are cut and joined along the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .graph import is_constant, is_standard
from .weights import opened

Channels = npt.NDArray[np.intp]
Went = list[tuple[ir.Value, Channels]]

# f(c x) = c f(x) for c > 0, element by element.
HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Neg", "Abs"})
# Linear in one operand, whatever the other is.
BINARY = frozenset({"Mul", "Div", "MatMul", "Expand"})


def along(count: int, axis: int, rank: int) -> Channels:
    """Return 0, 1, ... along one axis of so many."""
    return np.arange(count).reshape([-1 if a == axis else 1 for a in range(rank)])


def aligned(at: Channels, rank: int) -> Channels:
    """Return the channels against a value of a greater rank, which they broadcast to."""
    return at.reshape((1,) * (rank - at.ndim) + at.shape)


def rank_of(value: ir.Value | None) -> int | None:
    """Return the value's rank, where it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def passed(node: ir.Node, index: int, at: Channels, fresh: int) -> Went | str:
    """Return the outputs that the factors pass to with their channels; or why they end there.

    Args:
        node: A node that takes no factors itself.
        index: Which input of the node it is.
        at: The channels of that input.
        fresh: A number that no channel has yet; what is joined to them is numbered from there.
    """
    op = node.op_type
    refusal = f"{op} passes no factors through"
    if not is_standard(node, op):
        return refusal
    if op == "Split" and index == 0:
        return _split(node, at)
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return refusal
    went: Channels | str = refusal
    if op == "Concat":
        went = _joined(node, index, at, fresh)
    elif op in BINARY:
        went = _broadcast(node, index, at)
    elif index == 0 and op in HOMOGENEOUS:
        went = at
    elif index == 0 and op in MOVING:
        went = MOVING[op](node, at)
    return went if isinstance(went, str) else [(node.outputs[0], went)]


def _broadcast(node: ir.Node, index: int, at: Channels) -> Channels | str:
    """Multiply by something, but sum over no channels."""
    refusal = f"{node.op_type} passes no factors through"
    rank, other = rank_of(node.outputs[0]), rank_of(node.inputs[1 - index])
    if rank is None or (index != 0 and node.op_type in ("Div", "Expand")):
        return refusal
    if node.op_type != "MatMul":
        return aligned(at, rank)
    # A vector has one axis less, or more, than what comes of it.
    matrices = at.ndim > 1 and other is not None and other > 1
    return aligned(at, rank) if matrices and at.shape[-1 - index] == 1 else refusal


def _pooled(node: ir.Node, at: Channels) -> Channels | str:
    """Take the greatest or the mean of elements of one channel."""
    if prod(at.shape[2:]) != 1:
        return f"{node.op_type} mixes its channels"
    return at


def _transposed(node: ir.Node, at: Channels) -> Channels:
    """Permute the axes."""
    order = node.attributes.get_ints("perm", tuple(reversed(range(at.ndim))))
    return at.transpose([int(axis) for axis in order])


def _reshaped(node: ir.Node, at: Channels) -> Channels | str:
    """Lay the axes from the first one with channels on out anew."""
    source, output = node.inputs[0], node.outputs[0]
    unknown = f"{node.op_type} cuts its channels, or changes a shape that is not known"
    if source is None or source.shape is None or output.shape is None:
        return unknown
    if at.size == 1:
        return at.reshape((1,) * len(output.shape))
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
    axes = _ints(node, 1, "axes")
    if not axes or any(at.shape[axis] != 1 for axis in axes):  # no axes: all of them
        return f"{node.op_type} reduces its channels, or axes that are not known"
    if node.attributes.get_int("keepdims", 1):
        return at
    return at.squeeze(tuple(axes))


def _padded(node: ir.Node, at: Channels) -> Channels | str:
    """Pad with zeros, or with what is there, but add no channels."""
    refusal = "Pad adds channels, or a number that is not known to be zero"
    axes = _ints(node, 3, "", range(at.ndim))
    pads = _ints(node, 1, "pads")
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


def _sliced(node: ir.Node, at: Channels) -> Channels | str:
    """Keep a range of each axis."""
    refusal = "Slice cuts its channels at places that are not known"
    starts, ends = _ints(node, 1, "starts"), _ints(node, 2, "ends")
    if starts is None or ends is None:
        return refusal
    axes, steps = _ints(node, 3, "axes", range(len(starts))), _ints(node, 4, "", [1] * len(starts))
    if axes is None or steps is None:
        return refusal
    for axis, *cut in zip(axes, starts, ends, steps, strict=True):
        if at.shape[axis] != 1:
            at = np.moveaxis(np.moveaxis(at, axis, 0)[slice(*cut)], 0, axis)
    return at if at.size else refusal


def _gathered(node: ir.Node, at: Channels) -> Channels | str:
    """Pick elements along one axis."""
    axis, picks = node.attributes.get_int("axis", 0), node.inputs[1]
    if at.shape[axis] == 1:
        rank = rank_of(picks)
        chosen = None if rank is None else np.zeros((1,) * rank, np.intp)
    else:
        chosen = _data(picks).astype(np.intp) if picks is not None and is_constant(picks) else None
    if chosen is None or not chosen.size:
        return "Gather picks channels that are not known"
    return at.take(chosen, axis)


def _split(node: ir.Node, at: Channels) -> Went | str:
    """Cut along one axis."""
    axis = node.attributes.get_int("axis", 0)
    if at.shape[axis] == 1:
        return [(output, at) for output in node.outputs]
    sizes = [None if o.shape is None else o.shape[axis] for o in node.outputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != len(sizes) or sum(known) != at.shape[axis]:
        return "Split cuts its channels at places that are not known"
    cuts = np.cumsum(known)[:-1].tolist()
    return list(zip(node.outputs, np.split(at, cuts, axis), strict=True))


def _joined(node: ir.Node, index: int, at: Channels, fresh: int) -> Channels | str:
    """Join other values along the channels; they get numbers of their own."""
    axis = node.attributes.get_int("axis", 0)
    shapes = [None if v is None or v.shape is None else v.shape[axis] for v in node.inputs]
    known = [size for size in shapes if isinstance(size, int)]
    if len(known) != len(shapes) or at.size != at.shape[axis] or at.size != known[index]:
        return "Concat joins it to others along an axis that is not known to be its channels'"
    numbers = np.arange(fresh, fresh + sum(known))
    start = sum(known[:index])
    numbers[start : start + at.size] = at.ravel()
    return numbers.reshape([-1 if a == axis % at.ndim else 1 for a in range(at.ndim)])


MOVING: dict[str, Callable[[ir.Node, Channels], Channels | str]] = {
    "Transpose": _transposed,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax"), _reduced),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pooled),
    "Pad": _padded,
    "Slice": _sliced,
    "Gather": _gathered,
}


def _ints(
    node: ir.Node, index: int, name: str, default: range | list[int] | None = None
) -> list[int] | range | None:
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
