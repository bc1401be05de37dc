"""The operators of ONNX (opset 13 and newer) as torch functions, for `torch_graph`.

An operator takes its inputs by position; its other parameters are its attributes, with ONNX's
defaults. So a signature says what is covered: an attribute that it does not name is refused, and
so is a value outside a Literal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from . import torch_codes, torch_shapes, torch_windows
from .torch_shapes import Ints, ints

Operator = Callable[..., Any]

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
CastTo = Literal[1, 2, 3, 5, 6, 7, 9, 10, 11, 16]  # the keys of DTYPES, as `to` gives them

F = nn.functional


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's name
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """Return alpha * a @ b + beta * c, with either matrix transposed first."""
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: Literal[0] = 0,
) -> Tensor:
    """Normalize channels by stored statistics; torch's own has no gradient for those."""
    channels = [-1, *[1] * (x.dim() - 2)]
    factor = scale * torch.rsqrt(variance + epsilon)
    return x * factor.reshape(channels) + (bias - mean * factor).reshape(channels)


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: Literal[1] = 1,
) -> Tensor:
    """Normalize over the axes from `axis` on; scale and bias broadcast."""
    y = F.layer_norm(x, x.shape[axis:], None, None, epsilon) * scale
    return y if bias is None else y + bias


def _rms_norm(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: Literal[1] = 1
) -> Tensor:
    """Divide by the root mean square over the axes from `axis` on."""
    return F.rms_norm(x, x.shape[axis:], None, epsilon) * scale


def _reduce(
    reduction: Callable[..., Tensor],
    x: Tensor,
    axes: Tensor | Ints | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    """Reduce over the axes (an input or, before opset 18, an attribute), or over all of them."""
    chosen = ints(axes) or ([] if noop_with_empty_axes else list(range(x.dim())))
    if not chosen:  # each element is reduced alone
        return reduction(x[None], [0], False).to(x.dtype)
    return reduction(x, chosen, bool(keepdims)).to(x.dtype)


def _plain(function: Callable[..., Tensor]) -> Operator:
    """Return an operator without attributes; torch's own functions have no signature to read."""

    def run(*inputs: Tensor) -> Tensor:
        return function(*inputs)

    return run


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return an operator that takes any number of inputs, two at a time."""
    return lambda *inputs: functools.reduce(function, inputs)


def _div(x: Tensor, y: Tensor) -> Tensor:
    """Divide; integers round towards zero."""
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def _clip(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    """Limit x; where the limits cross, the upper one rules."""
    return x if min is None and max is None else torch.clamp(x, min, max)


def _gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """Return x times the share of a normal distribution below x, exactly or by tanh."""
    return F.gelu(x, approximate=approximate)


def _cast(x: Tensor, *, to: CastTo, saturate: int = 1) -> Tensor:
    """Convert to another element type; `saturate` is about float8 alone."""
    return x.to(DTYPES[ir.DataType(to)])


def _dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    seed: int | None = None,
) -> Tensor:
    """Return x."""
    if training_mode is not None and training_mode.item():
        raise ValueError("training_mode is true: expected false")
    return x


def _arg(
    function: Callable[..., Tensor],
    x: Tensor,
    *,
    axis: int = 0,
    keepdims: int = 1,
    select_last_index: Literal[0] = 0,
) -> Tensor:
    """Return where the largest or least element is, the first one of equals."""
    return function(x, axis, bool(keepdims))


def _cumsum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Return running sums along the axis, from the end or without the element itself."""
    (along,) = ints(axis)
    x = x.flip(along) if reverse else x
    sums = torch.cumsum(x, along, dtype=x.dtype)
    if exclusive:
        start = torch.zeros_like(sums.narrow(along, 0, 1))
        sums = torch.cat([start, sums.narrow(along, 0, x.shape[along] - 1)], along)
    return sums.flip(along) if reverse else sums


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Div": _div,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, ints(shape))),
    "Floor": torch.floor,
    "GlobalAveragePool": lambda x: x.mean(list(range(2, x.dim())), True),
    "GlobalMaxPool": lambda x: x.amax(list(range(2, x.dim())), True),
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Range": torch_shapes.arange,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Size": lambda x: torch.tensor(x.numel()),
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Tile": lambda x, repeats: x.repeat(ints(repeats)),
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
_FOLDED = {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceSum": torch.sum,
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keep),
}

OPERATORS: dict[str, Operator] = {
    **{name: _plain(function) for name, function in _PLAIN.items()},
    **{name: _folded(function) for name, function in _FOLDED.items()},
    **{name: functools.partial(_reduce, each) for name, each in _REDUCTIONS.items()},
    "ArgMax": functools.partial(_arg, torch.argmax),
    "ArgMin": functools.partial(_arg, torch.argmin),
    "AveragePool": torch_windows.average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Constant": torch_shapes.constant,
    "ConstantOfShape": torch_shapes.constant_of_shape,
    "Conv": torch_windows.conv,
    "ConvTranspose": torch_windows.conv_transpose,
    "CumSum": _cumsum,
    "DequantizeLinear": torch_codes.dequantize_linear,
    "Dropout": _dropout,
    "DynamicQuantizeLinear": torch_codes.dynamic_quantize_linear,
    "Elu": lambda x, *, alpha=1.0: F.elu(x, alpha),
    "Flatten": lambda x, *, axis=1: x.reshape(
        math.prod(x.shape[:axis]), math.prod(x.shape[axis:])
    ),
    "Gather": torch_shapes.gather,
    "GatherElements": torch_shapes.gather_elements,
    "GatherND": torch_shapes.gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "LogSoftmax": lambda x, *, axis=-1: torch.log_softmax(x, axis),
    "MaxPool": torch_windows.max_pool,
    "Mod": lambda x, y, *, fmod=0: torch.fmod(x, y) if fmod else torch.remainder(x, y),
    "Pad": torch_shapes.pad,
    "QuantizeLinear": torch_codes.quantize_linear,
    "RMSNormalization": _rms_norm,
    "Reshape": torch_shapes.reshape,
    "ScatterND": torch_shapes.scatter_nd,
    "Shape": lambda x, *, start=0, end=None: torch.tensor(list(x.shape)[start:end]).long(),
    "Slice": torch_shapes.slice_,
    "Softmax": lambda x, *, axis=-1: torch.softmax(x, axis),
    "Split": torch_shapes.split,
    "Squeeze": torch_shapes.squeeze,
    "Swish": lambda x, *, alpha=1.0: x * torch.sigmoid(alpha * x),
    "Transpose": lambda x, *, perm=None: x.permute(perm or list(range(x.dim()))[::-1]),
    "Trilu": lambda x, k=None, *, upper=1: (torch.triu if upper else torch.tril)(
        x, 0 if k is None else int(k)
    ),
    "Unsqueeze": torch_shapes.unsqueeze,
}
