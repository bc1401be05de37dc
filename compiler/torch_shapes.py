"""Operators of ONNX that shape, cut, pick and pad, as torch functions, for `torch_ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Ints = Sequence[int]
Sides = list[tuple[int, int]]  # (before, after) of each of the last axes


def ints(given: Tensor | Ints | None) -> list[int]:
    """Return the elements of an integer tensor or of an attribute; none where there is neither."""
    elements = given.reshape(-1).tolist() if isinstance(given, Tensor) else given
    return [int(i) for i in elements or ()]


def padded(x: Tensor, sides: Sides, value: float = 0.0) -> Tensor:
    """Pad the last axes; negative numbers crop."""
    flat = [side for pair in reversed(sides) for side in pair]
    return torch.nn.functional.pad(x, flat, value=value) if any(flat) else x


def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Reshape; 0 keeps an axis, unless zeros are allowed, and -1 is what is left."""
    sizes = ints(shape)
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


def squeeze(x: Tensor, axes: Tensor | Ints | None = None) -> Tensor:
    """Drop axes of length one; all of them without `axes`."""
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def unsqueeze(x: Tensor, axes: Tensor | Ints) -> Tensor:
    """Insert axes of length one, counted in the result."""
    rank = x.dim() + len(ints(axes))
    for axis in sorted(axis % rank for axis in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def split(
    x: Tensor, split: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    """Cut into parts of given sizes, or into a number of equal ones, the last perhaps smaller."""
    if split is None and num_outputs is None:
        raise ValueError("neither sizes nor num_outputs are given: expected one of them")
    size = ints(split) if split is not None else -(-x.shape[axis] // num_outputs)
    return tuple(torch.split(x, size, axis))


def slice_(
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Cut along some axes; torch itself knows no negative steps."""
    count = starts.numel()
    along = ints(axes) if axes is not None else range(count)
    strides = ints(steps) if steps is not None else [1] * count
    for axis, start, end, step in zip(along, ints(starts), ints(ends), strides, strict=True):
        kept = _kept(x.shape[axis], start, end, step)
        if step == 1:
            x = x.narrow(axis, kept.start if kept else 0, len(kept))
        else:
            x = x.index_select(axis, torch.tensor(list(kept), dtype=torch.int64))
    return x


def _kept(size: int, start: int, end: int, step: int) -> range:
    """Return the indices of a slice; backwards, ONNX starts at 0 where Python would not start."""
    if step < 0:
        start = max(start + size if start < 0 else start, 0)
    return range(size)[start:end:step]


def _from_front(indices: Tensor, size: int) -> Tensor:
    """Return indices from the front; negative ones count from the end."""
    return torch.where(indices < 0, indices + size, indices).long()


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Pick slices along an axis; the indices' axes stand in its place."""
    axis %= x.dim()
    picked = x.index_select(axis, _from_front(indices, x.shape[axis]).reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Pick one element along the axis for each index, at its own place along the others."""
    return torch.gather(x, axis, _from_front(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Pick what each row of indices points at; the first axes run along with them."""
    rows = indices.shape[:-1]
    batch = [
        torch.arange(rows[i]).reshape([-1 if k == i else 1 for k in range(len(rows))]).expand(rows)
        for i in range(batch_dims)
    ]
    return x[(*batch, *indices.unbind(-1))]


def scatter_nd(
    x: Tensor, indices: Tensor, updates: Tensor, *, reduction: Literal["none", "add"] = "none"
) -> Tensor:
    """Replace, or add to, what each row of indices points at."""
    return x.index_put(indices.unbind(-1), updates, accumulate=reduction == "add")


def pad(
    x: Tensor,
    pads: Tensor,
    constant_value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: Literal["constant"] = "constant",
) -> Tensor:
    """Pad by a number, or crop where pads are negative."""
    if constant_value is not None and constant_value.requires_grad:
        raise ValueError("what it pads with depends on a weight: expected a constant")
    amounts, along = ints(pads), ints(axes) if axes is not None else range(x.dim())
    sides = [(0, 0)] * x.dim()
    for number, axis in enumerate(along):
        sides[axis] = amounts[number], amounts[number + len(amounts) // 2]
    return padded(x, sides, 0 if constant_value is None else constant_value.item())


def constant(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Ints | None = None,
) -> Tensor:
    """Return the attribute that is given."""
    if value is not None:
        return value
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_floats if value_float is None else value_float).float()
    return torch.tensor(value_ints if value_int is None else value_int, dtype=torch.int64)


def constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """Fill a shape with one number; without it, with float zeros."""
    return torch.zeros(ints(shape)) if value is None else value.reshape(()).expand(ints(shape))


def arange(start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """Count from start to below the limit; there may be nothing to count."""
    count = max(math.ceil((limit - start).item() / step.item()), 0)
    return start + step * torch.arange(count, dtype=start.dtype)
