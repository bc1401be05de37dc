from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fourfold.compiler.formats import Format, PerAxis, PerBlock, PerTensor
from fourfold.compiler.quantizers import (
    SCALE_FLOOR,
    affine_parameters,
    affine_scale,
    dequantize_affine,
    dequantize_shifted,
    dequantize_symmetric,
    grouped_max,
    quantize_affine,
    quantize_shifted,
    quantize_symmetric,
    spread,
    symmetric_scale,
)

FORMATS = st.sampled_from(
    [Format("uint8"), Format("int8"), Format("int8", bits=7), Format("uint4"), Format("int4")]
)
SHIFTED = st.sampled_from(
    [Format("uint8"), Format("uint8", bits=5), Format("uint4"), Format("uint2")]
)
ENDS = st.floats(-1e6, 1e6, width=32)
# Bounded away from zero, where the scale's floor would rule; that has tests of its own.
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=7),
    elements=st.floats(-100, 100, width=32).map(lambda x: 0.0 if abs(x) < 1e-20 else x),
)


def mse(weights, format):
    scale = symmetric_scale(weights, format)
    codes = quantize_symmetric(weights, scale, format)
    return float(np.square(dequantize_symmetric(codes, scale, format) - weights).mean())


@given(ENDS, ENDS, FORMATS)
def test_affine_keeps_zero_exact(a, b, format):
    scale, zero_point = affine_parameters(min(a, b), max(a, b), format)
    least, greatest = format.codes
    assert least <= zero_point <= greatest
    assert scale > 0
    codes = quantize_affine(np.zeros(3, np.float32), scale, zero_point, format)
    assert (dequantize_affine(codes, scale, zero_point) == 0).all()


@given(ENDS, ENDS, FORMATS, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_affine_error_is_half_a_step_inside_the_range(a, b, format, positions):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    x = (low + (high - low) * np.array([0.0, 1.0, *positions])).astype(np.float32)
    scale, zero_point = affine_parameters(low, high, format)
    codes = quantize_affine(x, scale, zero_point, format)
    assert codes.dtype == format.numpy_type
    miss = np.abs(dequantize_affine(codes, scale, zero_point).astype(np.float64) - x)
    # The float32 scale may round down: a few millionths of a step, times the number of steps.
    assert miss.max() <= float(scale) * (0.5 + 1e-3)


@given(WEIGHTS, st.sampled_from(["int8", "int4", "int2"]), st.integers(0, 3))
def test_symmetric_error_is_half_a_step_and_zero_is_exact(weights, dtype, axis):
    format = Format(dtype, PerAxis(axis % weights.ndim))
    scale = symmetric_scale(weights, format)
    codes = quantize_symmetric(weights, scale, format)
    back = dequantize_symmetric(codes, scale, format)
    assert np.abs(codes).max() <= format.limit  # a scale of max|w| / limit needs no more
    assert (back[weights == 0] == 0).all()
    step = np.broadcast_to(spread(scale, weights.shape, format), weights.shape)
    assert (np.abs(back - weights) <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("seed", range(4))
def test_finer_scales_are_at_least_as_good(dtype, seed):
    draw = np.random.default_rng(seed)
    weights = draw.normal(0, 1, (8, 64)) * draw.lognormal(0, 1.5, (8, 1))
    weights = weights.astype(np.float32)
    tensor, axis, block = (
        mse(weights, Format(dtype, g)) for g in (PerTensor(), PerAxis(0), PerBlock(1, 16))
    )
    assert axis <= tensor
    assert block <= axis


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["int8", "int4"]))
def test_channels_of_zeros_get_scale_one(zeros, others, dtype):
    weights = np.concatenate([np.zeros((zeros, 5)), np.full((others, 5), 3.0)]).astype(np.float32)
    format = Format(dtype, PerAxis(0))
    scale = symmetric_scale(weights, format)
    assert scale[:zeros].tolist() == [1.0] * zeros
    assert scale[zeros:] == pytest.approx(3.0 / format.limit)
    codes = quantize_symmetric(weights, scale, format)
    assert not codes[:zeros].any()


def test_tiny_ranges_end_at_the_floor():
    tiny = np.full((2, 3), 1e-38, np.float32)
    assert (symmetric_scale(tiny, Format("int8", PerAxis(0))) == SCALE_FLOOR).all()
    scale, zero_point = affine_parameters(-1e-38, 1e-38, Format("uint8"))
    assert scale == SCALE_FLOOR
    assert zero_point == 0
    assert np.isfinite(np.float32(1) / SCALE_FLOOR)


# Krishnamoorthi's formulas on numbers that can be checked by hand.
@pytest.mark.parametrize(
    ("low", "high", "format", "scale", "zero_point"),
    [
        (-1.0, 1.55, "uint8", 0.01, 100),
        (0.0, 2.55, "uint8", 0.01, 0),  # one-sided: [0, x_max]
        (0.5, 2.55, "uint8", 0.01, 0),  # widened down to zero
        (-2.55, -1.0, "uint8", 0.01, 255),  # widened up to zero
        (-1.28, 1.27, "int8", 0.01, 0),
        (0.0, 2.55, "int8", 0.01, -128),
        (-0.5, 1.0, "uint4", 0.1, 5),
        (0.0, 0.0, "uint8", 1.0, 0),  # an empty range
        (0.0, 0.0, "int8", 1.0, 0),
    ],
)
def test_affine_golden(low, high, format, scale, zero_point):
    got = affine_parameters(low, high, Format(format))
    assert got == (pytest.approx(scale, rel=1e-6), zero_point)
    assert isinstance(got[0], np.float32)


def test_affine_codes_golden():
    x = np.array([-2.0, -1.0, -0.006, 0.0, 0.004, 0.016, 1.55, 9.0], np.float32)
    codes = quantize_affine(x, np.float32(0.01), 100, Format("uint8"))
    assert codes.tolist() == [0, 0, 99, 100, 100, 102, 255, 255]
    back = dequantize_affine(codes, np.float32(0.01), 100)
    expected = [-1.0, -1.0, -0.01, 0.0, 0.0, 0.02, 1.55, 1.55]
    assert back == pytest.approx(expected, abs=1e-6)
    assert back.dtype == np.float32


def test_rounding_is_half_to_even():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)
    codes = quantize_affine(x, np.float32(1), 10, Format("uint8"))
    assert codes.tolist() == [10, 12, 12, 10, 8, 8]
    codes = quantize_symmetric(x, np.float32(1), Format("int8"))
    assert codes.tolist() == [0, 2, 2, 0, -2, -2]


def test_symmetric_golden():
    weights = np.array([[12.7, -6.35], [0.5, -1.27]], np.float32)
    format = Format("int8", PerAxis(0))
    scale = symmetric_scale(weights, format)
    assert scale == pytest.approx([0.1, 0.01])
    codes = quantize_symmetric(weights, scale, format)
    assert codes.tolist() == [[127, -64], [50, -127]]  # -63.5 goes to the even neighbour


def test_int4_and_seven_bits_use_their_own_limits():
    weights = np.array([[-7.0, 3.0]], np.float32)
    for format, limit in ((Format("int4"), 7), (Format("int8", bits=7), 63)):
        scale = symmetric_scale(weights, format)
        assert scale == pytest.approx(7.0 / limit)
        assert quantize_symmetric(weights, scale, format).min() == -limit


@pytest.mark.parametrize(
    ("format", "least", "greatest"),
    [
        (Format("int8"), -127, 127),
        (Format("int8", bits=7), -63, 63),  # restricted: kernels add two products in 16 bits
        (Format("int4"), -8, 7),
        (Format("int2"), -2, 1),
    ],
)
def test_a_scale_that_clips(format, least, greatest):
    assert format.symmetric_codes == (least, greatest)
    weights = np.array([[-1000.0, 1000.0]], np.float32)
    codes = quantize_symmetric(weights, np.float32(0.1), format)
    assert codes.tolist() == [[least, greatest]]


@given(WEIGHTS, st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=50)
def test_per_block_is_per_axis_on_each_block(weights, size, axis):
    axis %= weights.ndim
    format = Format("int4", PerBlock(axis, size))
    scale = symmetric_scale(weights, format)
    codes = quantize_symmetric(weights, scale, format)
    wide = spread(scale, weights.shape, format)
    assert wide.shape == weights.shape
    assert scale.shape[axis] == -(-weights.shape[axis] // size)
    # By hand: every line of `size` neighbours is a tensor of its own.
    lines = np.moveaxis(weights, axis, -1).reshape(-1, weights.shape[axis])
    got = np.moveaxis(codes, axis, -1).reshape(lines.shape)
    for line, line_codes in zip(lines, got, strict=True):
        for start in range(0, line.size, size):
            block = line[start : start + size][None]
            one = Format("int4", PerAxis(0))
            expected = quantize_symmetric(block, symmetric_scale(block, one), one)
            assert line_codes[start : start + size].tolist() == expected[0].tolist()


# Ranges of a whole group: zero points as whole numbers in floats.


@given(WEIGHTS, SHIFTED)
def test_a_range_for_the_whole_is_that_of_the_activations_quantizer(weights, format):
    scale, zero_point = affine_scale(weights, format)
    expected = affine_parameters(weights.min(), weights.max(), format)
    assert (scale, zero_point) == expected
    assert scale.dtype == zero_point.dtype == np.float32
    codes = quantize_shifted(weights, scale, zero_point, format)
    np.testing.assert_array_equal(codes, quantize_affine(weights, *expected, format))
    back = dequantize_shifted(codes, scale, zero_point, format)
    np.testing.assert_array_equal(back, dequantize_affine(codes, *expected))


@given(WEIGHTS, SHIFTED, st.integers(0, 3))
def test_each_channel_has_a_range_of_its_own(weights, format, axis):
    axis %= weights.ndim
    scale, zero_point = affine_scale(weights, replace(format, granularity=PerAxis(axis)))
    assert scale.shape == zero_point.shape == (weights.shape[axis],)
    for number, channel in enumerate(np.moveaxis(weights, axis, 0)):
        expected = affine_parameters(channel.min(), channel.max(), format)
        assert (scale[number], zero_point[number]) == expected


@given(WEIGHTS, SHIFTED, st.integers(0, 3), st.integers(1, 5))
def test_each_block_has_a_range_of_its_own(weights, format, axis, size):
    axis %= weights.ndim
    scale, zero_point = affine_scale(weights, replace(format, granularity=PerBlock(axis, size)))
    blocks = -(-weights.shape[axis] // size)
    assert scale.shape == zero_point.shape
    assert scale.shape == tuple(blocks if n == axis else d for n, d in enumerate(weights.shape))
    rows = np.moveaxis(weights, axis, -1).reshape(-1, weights.shape[axis])
    pairs = (np.moveaxis(one, axis, -1).reshape(-1, blocks) for one in (scale, zero_point))
    for row, scales, zeros in zip(rows, *pairs, strict=True):
        for number in range(blocks):
            block = row[number * size : (number + 1) * size]
            expected = affine_parameters(block.min(), block.max(), format)
            assert (scales[number], zeros[number]) == expected


@given(WEIGHTS, SHIFTED, st.sampled_from([PerTensor(), PerAxis(0), PerBlock(1, 3)]))
def test_shifted_codes_keep_zero_and_are_within_half_a_step(weights, format, granularity):
    format = replace(format, granularity=granularity)
    scale, zero_point = affine_scale(weights, format)
    codes = quantize_shifted(weights, scale, zero_point, format)
    assert (codes.shape, codes.dtype) == (weights.shape, np.uint8)
    least, greatest = format.codes
    assert least <= codes.min() <= codes.max() <= greatest
    back = dequantize_shifted(codes, scale, zero_point, format)
    assert back.dtype == np.float32
    assert (back[weights == 0] == 0).all()
    step = np.broadcast_to(spread(scale, weights.shape, format), weights.shape)
    assert (np.abs(back.astype(np.float64) - weights) <= step * (0.5 + 1e-3)).all()


def test_shifted_golden():
    """Three parts of a weight of 2 bits, by hand."""
    format = Format("uint2")
    parts = np.float32([[-2, 0, 0, 0], [-0.5, 0.1, 0.3, 0.4], [1.8, 2.2, 0, 0]])
    found = [affine_scale(part, format) for part in parts]
    assert [float(zero) for _, zero in found] == [3, 2, 0]
    assert [scale for scale, _ in found] == [np.float32(x) for x in (2 / 3, 0.3, 2.2 / 3)]
    codes = [quantize_shifted(p, *one, format) for p, one in zip(parts, found, strict=True)]
    assert [one.tolist() for one in codes] == [[0, 3, 3, 3], [0, 2, 3, 3], [2, 3, 0, 0]]
    scale, zero_point = affine_scale(parts, replace(format, granularity=PerAxis(0)))
    assert scale.tolist() == [one for one, _ in found]
    assert zero_point.tolist() == [3, 2, 0]


def test_a_group_without_a_range():
    zeros = np.zeros((2, 3), np.float32)
    scale, zero_point = affine_scale(zeros, Format("uint4", PerAxis(0)))
    assert (scale.tolist(), zero_point.tolist()) == ([1, 1], [0, 0])
    tiny = np.float32([[-1e-38, 1e-38], [0, 1e-38]])
    scale, zero_point = affine_scale(tiny, Format("uint4", PerAxis(0)))
    assert (scale == SCALE_FLOOR).all()
    assert zero_point.tolist() == [0, 0]


def test_the_widest_range():
    """The difference of both ends is beyond float32; the scale is not."""
    weights = np.float32([[-3e38, 3e38, 1e38, 0]])
    scale, zero_point = affine_scale(weights, Format("uint4"))
    codes = quantize_shifted(weights, scale, zero_point, Format("uint4"))
    assert codes.tolist() == [[0, 15, 10, 8]]
    back = dequantize_shifted(codes, scale, zero_point, Format("uint4"))
    assert np.isfinite(back).all()
    assert back[0, 3] == 0


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerTensor(), ()),
        (PerAxis(0), (4,)),
        (PerAxis(-1), (6,)),
        (PerBlock(1, 4), (4, 2)),  # six columns in blocks of four: the last one is short
        (PerBlock(0, 2), (2, 6)),
    ],
)
def test_shapes_of_scales(granularity, shape):
    weights = np.arange(24, dtype=np.float32).reshape(4, 6) - 11
    format = Format("int8", granularity)
    scale = symmetric_scale(weights, format)
    assert scale.shape == shape
    assert scale.dtype == np.float32
    back = dequantize_symmetric(quantize_symmetric(weights, scale, format), scale, format)
    assert back.shape == weights.shape
    assert back == pytest.approx(weights, abs=float(scale.max()))
    shifted = affine_scale(weights, Format("uint8", granularity))
    assert [one.shape for one in shifted] == [shape, shape]


def test_grouped_max():
    values = np.array([[1, 5, 2], [4, 3, 0]], np.float32)
    assert grouped_max(values, Format("int8")) == 5
    assert grouped_max(values, Format("int8", PerAxis(1))).tolist() == [4, 5, 2]
    assert grouped_max(values, Format("int8", PerBlock(1, 2))).tolist() == [[5, 2], [4, 0]]


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (PerTensor(), -1),
        (PerAxis(0), [-1, -4]),
        (PerAxis(1), [-1, -5, -2]),
        (PerBlock(1, 2), [[-1, -2], [-4, -6]]),
    ],
)
def test_grouped_max_of_negative_values(granularity, expected):
    values = np.array([[-1, -5, -2], [-4, -8, -6]], np.float32)
    format = Format("int8", granularity)
    assert grouped_max(values, format, -np.inf).tolist() == expected
    assert grouped_max(values, format, -2.0).tolist() == np.maximum(expected, -2).tolist()
    assert not grouped_max(values, format).any()  # a range holds zero


def test_grouped_max_of_groups_without_members():
    nothing = np.full((2, 3), -np.inf, np.float32)
    for granularity in (PerTensor(), PerAxis(0), PerBlock(1, 2)):
        found = grouped_max(nothing, Format("int8", granularity), -np.inf)
        assert (found == -np.inf).all()
        assert found.dtype == np.float32
