"""Uniform quantizers: affine for activations and unsigned weights, symmetric for signed ones.

Source: R. Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference"
(arXiv 1806.08342), sections 2 and 3. Rounding is half to even, as ONNX QuantizeLinear does it.
Zero is exact in both: padding and ReLU must not shift.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .formats import Format, PerAxis, PerBlock, PerTensor

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.generic]

# Below this a reciprocal overflows float32 or becomes denormal on the way; dead channels land
# here.
SCALE_FLOOR = np.float32(2.0**-100)


def affine_parameters(low: float, high: float, format: Format) -> tuple[np.float32, int]:
    """Return (scale, zero_point) for the range [low, high], widened to contain zero.

    An empty range gives scale 1 and the code nearest to zero. `zero_point` is a legal code.
    """
    least, greatest = format.codes
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if high == low:
        return np.float32(1.0), max(least, 0)
    scale = max(np.float32((high - low) / (greatest - least)), SCALE_FLOOR)
    zero_point = round(least - low / float(scale))
    return scale, int(np.clip(zero_point, least, greatest))


def symmetric_scale(weights: Floats, format: Format) -> Floats:
    """Return max|w| / limit for each group of the format's granularity, shape as ONNX wants it.

    Shapes: () per tensor, [channels] per axis, the weight's shape with the axis divided by the
    block size (rounded up) per block. A group of zeros gets scale 1.
    """
    magnitude = grouped_max(np.abs(weights), format)
    scale = (magnitude / np.float32(format.limit)).astype(np.float32)
    return np.where(magnitude == 0, np.float32(1), np.maximum(scale, SCALE_FLOOR)).astype(
        np.float32
    )


def affine_scale(weights: Floats, format: Format) -> tuple[Floats, Floats]:
    """Return (scale, zero point) of each group's range, widened to contain zero.

    Shapes as those of `symmetric_scale`; zero points are whole numbers in float32. A group of
    zeros gets scale 1.
    """
    least, greatest = format.codes
    low = -grouped_max(-weights, format).astype(np.float64)
    high = grouped_max(weights, format).astype(np.float64)
    step = np.maximum(((high - low) / (greatest - least)).astype(np.float32), SCALE_FLOOR)
    scale = np.where(high == low, np.float32(1), step).astype(np.float32)
    zero_point = np.clip(np.rint(least - low / scale), least, greatest)
    return scale, zero_point.astype(np.float32)


def grouped_max(values: Floats, format: Format, initial: float = 0.0) -> Floats:
    """Return the maximum of each group that shares a scale, in the shape of the scale.

    It is `initial` where no value of the group is above that.
    """
    match format.granularity:
        case PerTensor():
            return np.asarray(values.max(initial=initial), np.float32)
        case PerAxis(axis):
            others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
            return np.asarray(values.max(axis=others, initial=initial), np.float32)
        case PerBlock(axis, size):
            starts = np.arange(0, values.shape[axis], size)
            greatest = np.maximum.reduceat(values, starts, axis=axis)
            return np.maximum(greatest, np.float32(initial)).astype(np.float32)


def spread(scale: Floats, shape: tuple[int, ...], format: Format) -> Floats:
    """Return a scale (or zero point) in a shape that broadcasts against the tensor it is for."""
    match format.granularity:
        case PerTensor():
            return scale
        case PerAxis(axis):
            return scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
        case PerBlock(axis, size):
            wide = np.repeat(scale, size, axis=axis)
            return np.asarray(np.take(wide, np.arange(shape[axis]), axis=axis), np.float32)


def quantize_symmetric(weights: Floats, scale: Floats, format: Format) -> Codes:
    """Return round(w / scale) inside `format.symmetric_codes`, shape of `weights`."""
    codes = np.rint(weights / spread(scale, weights.shape, format))
    clipped: Codes = np.clip(codes, *format.symmetric_codes).astype(format.numpy_type)
    return clipped


def dequantize_symmetric(codes: Codes, scale: Floats, format: Format) -> Floats:
    """Return codes * scale as float32, shape of `codes`."""
    wide = codes.astype(np.float32) * spread(scale, codes.shape, format)
    return np.asarray(wide, np.float32)


def quantize_shifted(weights: Floats, scale: Floats, zero_point: Floats, format: Format) -> Codes:
    """Return clip(round(w / scale) + zero_point), shape of `weights`; see `affine_scale`."""
    shape = weights.shape
    codes = np.rint(weights / spread(scale, shape, format)) + spread(zero_point, shape, format)
    clipped: Codes = np.clip(codes, *format.codes).astype(format.numpy_type)
    return clipped


def dequantize_shifted(codes: Codes, scale: Floats, zero_point: Floats, format: Format) -> Floats:
    """Return (codes - zero_point) * scale as float32, shape of `codes`."""
    shifted = codes.astype(np.float32) - spread(zero_point, codes.shape, format)
    return np.asarray(shifted * spread(scale, codes.shape, format), np.float32)


def quantize_affine(values: Floats, scale: np.float32, zero_point: int, format: Format) -> Codes:
    """Return clip(round(x / scale) + zero_point) in `format.numpy_type`, shape of `values`."""
    codes = np.rint(values / scale) + zero_point
    clipped: Codes = np.clip(codes, *format.codes).astype(format.numpy_type)
    return clipped


def dequantize_affine(codes: Codes, scale: np.float32, zero_point: int) -> Floats:
    """Return (codes - zero_point) * scale as float32, shape of `codes`."""
    return ((codes.astype(np.int32) - zero_point) * scale).astype(np.float32)
