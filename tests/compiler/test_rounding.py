"""How weights become codes: any rank, one group at a time, and as the runtime reads them."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fourfold.compiler import notes
from fourfold.compiler.constants import add
from fourfold.compiler.formats import Format, PerAxis, PerBlock, PerTensor
from fourfold.compiler.graph import weight_of
from fourfold.compiler.model import save
from fourfold.compiler.quantizers import affine_parameters
from fourfold.compiler.rounding import rounded, simulated
from fourfold.compiler.session import open_runner

HEADER = '<ir_version: 13, opset_import: ["" : 25]>'
CLIPS = st.sampled_from(["auto", "minmax", "mse"])
SIGNED = [("int8", 8), ("int8", 7), ("int8", 5), ("int4", 4), ("int4", 3), ("int2", 2)]
SHIFTED = [("uint8", 8), ("uint8", 5), ("uint4", 4), ("uint4", 3), ("uint2", 2)]
FORMS = st.sampled_from(SIGNED + SHIFTED)
ELEMENTS = st.floats(-1e3, 1e3, width=32).map(lambda x: np.float32(x if abs(x) > 1e-9 else 0))
SHAPES = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)


@st.composite
def weights(draw):
    return draw(arrays(np.float32, draw(SHAPES), elements=ELEMENTS))


@settings(max_examples=60)
@given(st.data(), weights(), FORMS, CLIPS)
def test_each_channel_is_rounded_on_its_own(data, array, form, clip):
    dtype, bits = form
    axis = data.draw(st.integers(0, array.ndim - 1))
    format = Format(dtype, PerAxis(axis), bits)
    found = rounded(array, format, clip)
    assert found.format == format
    assert (found.codes.shape, found.codes.dtype) == (array.shape, format.numpy_type)
    assert found.scale.shape == found.zero_point.shape == (array.shape[axis],)
    for number in range(array.shape[axis]):
        channel = np.take(array, number, axis=axis)
        alone = rounded(channel, Format(dtype, PerTensor(), bits), clip)
        np.testing.assert_array_equal(np.take(found.codes, number, axis=axis), alone.codes)
        assert found.scale[number] == alone.scale
        assert found.zero_point[number] == alone.zero_point


@settings(max_examples=60)
@given(st.data(), FORMS, CLIPS)
def test_each_block_is_rounded_on_its_own(data, form, clip):
    dtype, bits = form
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 4)))
    array = data.draw(arrays(np.float32, shape, elements=ELEMENTS))
    axis, size = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 4))
    found = rounded(array, Format(dtype, PerBlock(axis, size), bits), clip)
    across = PerAxis(1 - axis)
    for number in range(-(-shape[axis] // size)):
        place = slice(number * size, (number + 1) * size)
        part = (place, slice(None)) if axis == 0 else (slice(None), place)
        alone = rounded(array[part], Format(dtype, across, bits), clip)
        np.testing.assert_array_equal(found.codes[part], alone.codes)
        np.testing.assert_array_equal(np.take(found.scale, number, axis=axis), alone.scale)
        zero = np.take(found.zero_point, number, axis=axis)
        np.testing.assert_array_equal(zero, alone.zero_point)


@settings(max_examples=60)
@given(st.data(), st.sampled_from(SIGNED), st.sampled_from(["minmax", "mse"]))
def test_a_weight_that_is_a_scale_times_codes_stays_as_it_is(data, form, clip):
    dtype, bits = form
    limit = Format(dtype, PerTensor(), bits).limit
    shape = data.draw(SHAPES)
    axis = data.draw(st.integers(0, len(shape) - 1))
    codes = data.draw(arrays(np.int64, shape, elements=st.integers(-limit, limit)))
    first = [0 if n != axis else slice(None) for n in range(len(shape))]
    codes[tuple(first)] = limit
    scale = data.draw(arrays(np.float64, shape[axis], elements=st.integers(-20, 20)))
    spread = np.exp2(scale).reshape([-1 if n == axis else 1 for n in range(len(shape))])
    array = (codes * spread).astype(np.float32)
    before = array.copy()
    format = Format(dtype, PerAxis(axis), bits)
    found = rounded(array, format, clip)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, np.exp2(scale))
    assert not found.zero_point.any()
    np.testing.assert_array_equal(simulated(array, format, clip), array)
    np.testing.assert_array_equal(array, before)


@given(st.data(), weights(), FORMS, CLIPS)
def test_codes_are_in_their_range(data, array, form, clip):
    dtype, bits = form
    format = Format(dtype, data.draw(st.sampled_from([PerTensor(), PerAxis(0)])), bits)
    found = rounded(array, format, clip)
    least, greatest = format.symmetric_codes if format.signed else format.codes
    assert least <= found.codes.min() <= found.codes.max() <= greatest
    assert np.all(found.scale > 0)
    assert np.all(np.isfinite(found.scale))
    assert not found.floats()[array == 0].any()


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize(
    ("shape", "format"),
    [
        ((3, 2, 2, 2), Format("int8", PerAxis(0))),
        ((3, 4, 2, 2), Format("int4", PerAxis(1))),
        ((3, 4, 2), Format("int2", PerAxis(2))),
        ((6, 4), Format("int8", PerTensor(), 7)),
        ((64, 3), Format("int4", PerBlock(0, 32))),
        ((3, 64), Format("int2", PerBlock(1, 16))),
        ((6, 4), Format("uint8", PerTensor())),
        ((3, 2, 2, 2), Format("uint8", PerAxis(0), 7)),
        ((3, 4, 2), Format("uint4", PerAxis(2))),
        ((5, 6), Format("uint2", PerAxis(1))),
        ((64, 3), Format("uint4", PerBlock(0, 32))),
        ((3, 64), Format("uint2", PerBlock(1, 16))),
    ],
)
def test_the_runtime_computes_with_what_is_simulated(shape, format, clip, tmp_path):
    array = np.random.default_rng(0).normal(0.5, size=shape).astype(np.float32)
    found = rounded(array, format, clip)
    assert bool(found.zero_point.any()) is not format.signed
    options = {
        PerAxis: lambda g: f"<axis = {g.axis}>",
        PerBlock: lambda g: f"<axis = {g.axis}, block_size = {g.size}>",
        PerTensor: lambda g: "",
    }[type(format.granularity)](format.granularity)
    sizes = ",".join(map(str, shape))
    model = ir.from_onnx_text(
        f"{HEADER} g (float[{sizes}] x) => (float[{sizes}] y) "
        f"{{ d = DequantizeLinear {options} (c, s, z) y = Add (d, x) }}"
    )
    first = model.graph[0]
    zero = add(model.graph, "zero", found.zero_point, format.onnx_type)
    first.replace_input_with(0, add(model.graph, "codes", found.codes, format.onnx_type))
    first.replace_input_with(1, add(model.graph, "scale", found.scale))
    first.replace_input_with(2, zero)
    save(model, tmp_path / "model.onnx")
    got = open_runner(tmp_path / "model.onnx")({"x": np.zeros(shape, np.float32)})["y"]
    np.testing.assert_array_equal(got, simulated(array, format, clip))


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
def test_auto_is_mse_below_four_bits(bits):
    array = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)
    format = Format("int8" if bits > 4 else "int4" if bits > 2 else "int2", PerAxis(1), bits)
    found = {clip: simulated(array, format, clip).tolist() for clip in ("auto", "minmax", "mse")}
    assert found["minmax"] != found["mse"]
    assert found["auto"] == found["minmax" if bits >= 4 else "mse"]


def test_codes_by_hand():
    array = np.float32([[7, -7.4, 0], [3.4, 0.6, -3.6]])
    found = rounded(array, Format("int4", PerAxis(0)), "minmax")
    assert found.scale.tolist() == [np.float32(x) / np.float32(7) for x in (7.4, 3.6)]
    assert found.codes.tolist() == [[7, -7, 0], [7, 1, -7]]
    found = rounded(array, Format("int8", PerTensor()), "minmax")
    assert found.scale == np.float32(7.4) / np.float32(127)
    assert found.codes.tolist() == [[120, -127, 0], [58, 10, -62]]


def test_shifted_codes_by_hand():
    array = np.float32([[7, -8, 0.4], [3, 0.6, 0.4], [-3, -1, -0.6]])
    found = rounded(array, Format("uint4", PerAxis(0)), "minmax")
    assert found.scale.tolist() == [np.float32(x) for x in (1.0, 0.2, 0.2)]
    assert found.zero_point.tolist() == [8, 0, 15]
    assert found.codes.tolist() == [[15, 0, 8], [15, 3, 2], [0, 10, 12]]
    assert found.floats()[0].tolist() == [7, -8, 0]
    found = rounded(array, Format("uint2", PerTensor()), "minmax")
    assert (found.scale, found.zero_point) == (5, 2)
    assert found.codes.tolist() == [[3, 0, 2], [3, 2, 2], [1, 2, 2]]


@settings(max_examples=60)
@given(st.data(), weights(), FORMS)
def test_mse_is_never_worse_than_the_whole_range(data, array, form):
    dtype, bits = form
    axis = data.draw(st.integers(0, array.ndim - 1))
    format = Format(dtype, PerAxis(axis), bits)
    others = tuple(n for n in range(array.ndim) if n != axis)
    wide = array.astype(np.float64)
    errors = [
        np.square(rounded(array, format, clip).floats() - wide).sum(axis=others)
        for clip in ("mse", "minmax")
    ]
    assert np.all(errors[0] <= errors[1] * (1 + 1e-5))  # errors are summed in float32


def test_mse_shrinks_both_ends_and_keeps_the_code_of_zero():
    array = np.random.default_rng(0).standard_t(3, (4, 500)).astype(np.float32)
    whole = rounded(array, Format("uint2", PerAxis(0)), "minmax")
    shrunk = rounded(array, Format("uint2", PerAxis(0)), "mse")
    np.testing.assert_array_equal(shrunk.zero_point, whole.zero_point)
    share = shrunk.scale / whole.scale
    assert np.all((share >= 0.2 - 1e-6) & (share < 0.7))


@settings(max_examples=60)
@given(weights(), st.sampled_from(SHIFTED))
def test_a_shifted_weight_is_within_half_a_step(array, form):
    dtype, bits = form
    found = rounded(array, Format(dtype, PerAxis(0), bits), "minmax")
    step = found.scale.reshape(-1, *[1] * (array.ndim - 1)).astype(np.float64)
    assert np.all(np.abs(found.floats() - array.astype(np.float64)) <= step * (0.5 + 1e-3))


def test_a_shifted_range_is_finer_than_a_symmetric_one():
    """All of a one-sided range is used, so that the step is half as wide."""
    array = np.random.default_rng(0).random((8, 64)).astype(np.float32)
    one, two = (rounded(array, Format(d, PerAxis(0)), "minmax") for d in ("uint4", "int4"))
    np.testing.assert_allclose(two.scale / one.scale, 15 / 7, rtol=1e-6)
    assert not one.zero_point.any()
    assert np.square(one.floats() - array).sum() < 0.3 * np.square(two.floats() - array).sum()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint4"])
@pytest.mark.parametrize(
    ("granularity", "scales"),
    [(PerAxis(1), [100.0, 1.0]), (PerTensor(), 100.0), (PerBlock(0, 1), 100.0)],
)
def test_the_scale_is_large_enough_for_every_bias(granularity, scales, dtype):
    """b / (s_x * s_w) stays below 2**30; one scale for all serves the largest bias."""
    model = ir.from_onnx_text(
        f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
        <float[2,2] w = {{0, 0.000001, 0, 0}}, float[2] b = {{-100, 1}}> {{
            y = Gemm (x, w, b)
        }}"""
    )
    weight = weight_of(model.graph[0])
    array = np.float32([[1e-12, 1e-12], [0, 0]])
    format = Format(dtype, granularity)
    free = rounded(array, format, "minmax", [weight]).scale
    assert np.all((free < 1e-12) | (free == 1))  # the input has no range yet
    plan = {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 1.0}
    notes.apply_plan(model, {"x": plan})
    found = rounded(array, format, "minmax", [weight])
    x_scale, _ = affine_parameters(-1, 1, Format("uint8"))
    least = np.float32(scales) / (x_scale * np.float32(2**30))
    floored = np.where(free == 1, 1, np.broadcast_to(least, free.shape))
    np.testing.assert_allclose(found.scale, floored, rtol=1e-6)
    assert not found.floats().any()
    np.testing.assert_array_equal(simulated(array, format, "minmax", [weight]), 0 * array)
    notes.apply_plan(model, {"x": {**plan, "mode": "dynamic"}})
    np.testing.assert_array_equal(rounded(array, format, "minmax", [weight]).scale, free)
