"""Operators of ONNX that move a window, convolutions and pools, for `torch_ops`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from torch import Tensor, nn

from .torch_shapes import Ints, Sides, padded

AMBIGUOUS = "runtimes differ on auto_pad SAME here: expected explicit pads"

F = nn.functional
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class Window(TypedDict, total=False):
    """The attributes that convolutions and pools share."""

    kernel_shape: Ints
    strides: Ints
    pads: Ints
    dilations: Ints
    auto_pad: Literal["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]


@dataclass(frozen=True)
class _Frame:
    """Where windows lie: `over` is how far the last ones hang over the padding (ceil mode)."""

    strides: Ints
    dilations: Ints
    padding: Sides
    over: Sides


def _frame(sizes: Ints, kernel: Ints, window: Window, ceil: int = 0) -> _Frame:
    """Return where windows of this kernel lie on spatial axes of these sizes."""
    ones = [1] * len(sizes)
    strides, dilations = window.get("strides", ones), window.get("dilations", ones)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if window.get("auto_pad", "").startswith("SAME") and (ceil or max(dilations, default=1) > 1):
        raise ValueError(AMBIGUOUS)
    padding, over = [], []
    for axis, (size, span, stride) in enumerate(zip(sizes, spans, strides, strict=True)):
        before, after = _sides(axis, size, span, stride, window)
        padding.append((before, after))
        steps = -(-(size + before + after - span) // stride)
        if steps * stride >= size + before:  # a window that starts in the padding is left out
            steps -= 1
        beyond = steps * stride + span - (size + before + after)
        over.append((0, max(beyond, 0) if ceil else 0))
    return _Frame(strides, dilations, padding, over)


def _sides(axis: int, size: int, span: int, stride: int, window: Window) -> tuple[int, int]:
    """Return the padding before and after one axis."""
    mode = window.get("auto_pad", "NOTSET")
    if not mode.startswith("SAME"):
        pads = window.get("pads", []) if mode == "NOTSET" else []
        return (pads[axis], pads[axis + len(pads) // 2]) if pads else (0, 0)
    total = (-(-size // stride) - 1) * stride + span - size
    if total < -1:  # strides beyond the kernel: is the input cropped, and where?
        raise ValueError(AMBIGUOUS)
    total = max(total, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, group: int = 1, **window: Unpack[Window]
) -> Tensor:
    """Convolve [n, c, *spatial] with [m, c / group, *kernel]; one to three spatial axes."""
    frame = _frame(x.shape[2:], w.shape[2:], window)
    inner = [before for before, _ in frame.padding]
    if any(before != after for before, after in frame.padding):
        x, inner = padded(x, frame.padding), [0] * len(inner)
    return CONV[len(inner)](x, w, b, frame.strides, inner, frame.dilations, group)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    group: int = 1,
    output_padding: Ints | None = None,
    **window: Unpack[Window],
) -> Tensor:
    """Spread [n, c, *spatial] by [c, m / group, *kernel]."""
    if window.get("auto_pad", "").startswith("SAME"):
        raise ValueError(AMBIGUOUS)
    frame = _frame(x.shape[2:], w.shape[2:], window)
    rank = len(frame.strides)
    y = CONV_TRANSPOSE[rank](x, w, None, frame.strides, 0, 0, group, frame.dilations)
    longer = zip(frame.padding, output_padding or [0] * rank, strict=True)
    y = padded(y, [(-before, more - after) for (before, after), more in longer])
    return y if b is None else y + b.reshape(-1, *[1] * rank)


def max_pool(
    x: Tensor, *, ceil_mode: int = 0, storage_order: int = 0, **window: Unpack[Window]
) -> Tensor:
    """Return the largest element of each window; the order is that of indices, an output less."""
    kernel = window["kernel_shape"]
    frame = _frame(x.shape[2:], kernel, window, ceil_mode)
    x = padded(padded(x, frame.padding, -math.inf), frame.over, -math.inf)
    return MAX_POOL[len(kernel)](x, kernel, frame.strides, 0, frame.dilations)


def average_pool(
    x: Tensor, *, ceil_mode: int = 0, count_include_pad: int = 0, **window: Unpack[Window]
) -> Tensor:
    """Return the mean of each window: what a kernel of ones sums up, over what it counts."""
    kernel = window["kernel_shape"]
    frame = _frame(x.shape[2:], kernel, window, ceil_mode)
    counted = padded(x.new_ones(1, 1, *x.shape[2:]), frame.padding, float(count_include_pad))
    summed = padded(x, frame.padding).flatten(0, 1)[:, None]
    total, count = (
        CONV[len(kernel)](
            padded(part, frame.over),
            x.new_ones(1, 1, *kernel),
            stride=frame.strides,
            dilation=frame.dilations,
        )
        for part in (summed, counted)
    )
    return (total / count).reshape(*x.shape[:2], *total.shape[2:])
