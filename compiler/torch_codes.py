"""QuantizeLinear, DynamicQuantizeLinear and DequantizeLinear as torch functions, for `torch_ops`.

Codes are whole numbers in float32 here, since gradients pass through floats only. Rounding lets
gradients straight through, so a quantizer and its DequantizeLinear together have those of LSQ
(arXiv 1902.08153): with v = x / scale, the gradient to x is 1 inside the range and 0 outside, the
gradient to the scale is round(v) - v inside, and the outermost code less the zero point outside.
"""

from __future__ import annotations

from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor

# ONNX's numbers of uint8, int8, uint16, int16, uint4, int4, uint2 and int2; 0 is not said.
CodeType = Literal[0, 2, 3, 4, 5, 21, 22, 25, 26]
# What a number is dequantized to: as its scale, float, float16, double, bfloat16.
FloatType = Literal[0, 1, 10, 11, 16]

FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


class _Round(torch.autograd.Function):  # type: ignore[misc]
    """Rounds half to even; the gradient passes as if nothing was rounded."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        """Return the nearest whole numbers."""
        return torch.round(x)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Return the gradient as it is."""
        return gradient


def straight(x: Tensor) -> Tensor:
    """Return the nearest whole numbers; gradients pass as if nothing was rounded."""
    rounded: Tensor = _Round.apply(x)
    return rounded


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: CodeType = 0,
    precision: Literal[0, 1] = 0,
    saturate: int = 1,
) -> Tensor:
    """Return clip(round(x / scale) + zero) in float32; `saturate` is about float8 alone.

    `output_dtype` gives the limits; a tensor cannot tell which of four bits or eight its zero is.
    """
    least, greatest = limits(ir.DataType(output_dtype or ir.DataType.UINT8.value))
    shift = torch.zeros(()) if zero is None else _spread(zero.float(), x, axis, block_size)
    share = x.float() / _spread(scale.float(), x, axis, block_size)
    # Limits before rounding: what rounds to the outermost code may still lie outside the range.
    inside = torch.maximum(torch.minimum(share, greatest - shift), least - shift)
    rounded: Tensor = _Round.apply(inside)
    return rounded + shift


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes of 0 to 255, scale and zero point for the range of x, widened to contain zero.

    The range counts as constant: gradients pass to x as if nothing was rounded.
    """
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    scale = torch.where(high == low, torch.ones(()), (high - low) / 255)
    zero = torch.round(torch.clamp(-low / scale, 0, 255))
    rounded: Tensor = _Round.apply(x / scale)
    return torch.clamp(rounded + zero, 0, 255), scale, zero


def dequantize_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: FloatType = 0,
) -> Tensor:
    """Return (codes - zero) * scale in the type of the scale, or in `output_dtype`."""
    if not codes.is_floating_point():
        codes = codes.to(torch.int32)
    if zero is not None:
        codes = codes - _spread(zero.to(codes.dtype), codes, axis, block_size)
    floats = codes.to(scale.dtype) * _spread(scale, codes, axis, block_size)
    return floats.to(FLOATS[output_dtype]) if output_dtype else floats


def limits(dtype: ir.DataType) -> tuple[int, int]:
    """Return the least and the greatest code of an integer type."""
    if dtype.is_signed():
        return -(2 ** (dtype.bitwidth - 1)), 2 ** (dtype.bitwidth - 1) - 1
    return 0, 2**dtype.bitwidth - 1


def _spread(scale: Tensor, like: Tensor, axis: int, block_size: int) -> Tensor:
    """Return a scale or zero point in a shape that broadcasts against `like`.

    It has one number, one for each index along the axis, or, with a block size, the shape of
    `like` with the axis divided by that and rounded up.
    """
    if scale.numel() == 1 and not block_size:
        return scale.reshape(())
    axis %= like.dim()
    if not block_size:
        return scale.reshape([-1 if i == axis else 1 for i in range(like.dim())])
    shape = list(scale.shape)
    shape.insert(axis + 1, block_size)
    wide = scale.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)
    return wide.narrow(axis, 0, like.shape[axis])
