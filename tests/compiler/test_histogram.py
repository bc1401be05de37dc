import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fourfold.compiler.errors import DataError
from fourfold.compiler.formats import Format
from fourfold.compiler.histogram import HALF, Histogram
from fourfold.compiler.quantizers import affine_parameters, dequantize_affine, quantize_affine

UINT8 = Format("uint8")
METHODS = ["minmax", "percentile", "entropy", "mse"]

# Powers of two over the whole of float32 below the masks, denormals included, and plain numbers.
OCTAVES = st.builds(
    lambda mantissa, exponent: float(np.ldexp(mantissa, exponent)),
    st.integers(-255, 255),
    st.integers(-149, 6),
)
VALUES = st.one_of(OCTAVES, st.floats(-100, 100, width=32), st.just(0.0), st.just(-1e9))
DATA = hnp.arrays(np.float32, st.integers(1, 60), elements=VALUES)


def made(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.add(np.asarray(batch, np.float32), "x")
    return histogram


def facts(histogram):
    h = histogram
    return h.exponent, h.counts.tolist(), h.low, h.high, h.count, h.zeros, h.masked


def gaussian(seed=0, size=20_000, low=None):
    x = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    return x if low is None else np.maximum(x, low)


@given(DATA, st.data())
def test_neither_order_nor_batches_matter(x, data):
    whole = facts(made(x))
    shuffled = x[data.draw(st.permutations(range(x.size)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, x.size), max_size=6)))
    assert facts(made(*np.split(shuffled, cuts))) == whole


@given(DATA)
def test_counts_what_is_there(x):
    histogram = made(x[: x.size // 2], x[x.size // 2 :])
    kept = x[np.abs(x) <= 3e4]
    assert histogram.count == kept.size == histogram.counts.sum()
    assert histogram.zeros == (kept == 0).sum()
    assert histogram.masked == x.size - kept.size
    if kept.size:
        assert (histogram.low, histogram.high) == (kept.min(), kept.max())
    if histogram.exponent is not None:
        width = 2.0**histogram.exponent
        index = np.floor(kept.astype(np.float64) / width).astype(int) + HALF
        assert histogram.counts.tolist() == np.bincount(index, minlength=2 * HALF).tolist()


def test_the_lattice_widens_by_octaves():
    histogram = made([1.0], [1000.0])
    assert histogram.exponent == 10 - 11  # 1000 < 2**10, and 2048 = 2**11 bins reach that far
    assert np.flatnonzero(histogram.counts).tolist() == [HALF + 2, HALF + 2000]


@given(DATA, st.sampled_from(METHODS), st.sampled_from(["uint8", "int8"]))
@settings(max_examples=60)
def test_ranges_contain_zero(x, method, dtype):
    low, high = made(x).range(method, Format(dtype))
    assert low <= 0 <= high
    assert np.isfinite([low, high]).all()


@given(DATA)
@settings(max_examples=40)
def test_mse_is_no_worse_than_minmax(x):
    histogram = made(x)
    best, plain = (histogram.range(method, UINT8) for method in ("mse", "minmax"))
    assert histogram.error(*best, UINT8) <= histogram.error(*plain, UINT8)


def test_mse_gains_on_a_gaussian_at_four_bits():
    histogram, int4 = made(gaussian()), Format("uint4")
    best, plain = (histogram.error(*histogram.range(m, int4), int4) for m in ("mse", "minmax"))
    assert best < 0.6 * plain


@given(DATA)
def test_minmax_is_the_exact_range(x):
    kept = x[np.abs(x) <= 3e4]
    expected = (min(kept.min(), 0), max(kept.max(), 0)) if kept.size else (0, 0)
    assert made(x).range("minmax", UINT8) == expected


@given(DATA)
def test_percentile_100_is_minmax(x):
    histogram = made(x)
    assert histogram.range("percentile", UINT8, 100) == histogram.range("minmax", UINT8)


def test_percentile_cuts_both_ends_alike():
    histogram = made(np.linspace(-10, 30, 40_001))
    low, high = histogram.range("percentile", UINT8, 90)
    assert (low, high) == (pytest.approx(-8, abs=0.05), pytest.approx(28, abs=0.05))


@pytest.mark.parametrize("mask", [-3.4e38, -1e9, -65504.0, 1e9, -np.inf])
def test_masks_are_excluded_and_counted(mask):
    x = gaussian(size=1000)
    masked = np.where(np.arange(x.size) % 10 == 0, np.float32(mask), x)
    histogram = made(masked)
    assert histogram.masked == 100
    assert histogram.count == 900
    kept = masked[np.arange(x.size) % 10 != 0]
    assert histogram.range("minmax", UINT8) == (kept.min(), kept.max())


def test_nothing_but_masks():
    histogram = made([-3.4e38, -1e9])
    assert (histogram.count, histogram.masked) == (0, 2)
    assert [histogram.range(method, UINT8) for method in METHODS] == [(0.0, 0.0)] * 4


@pytest.mark.parametrize("batch", [[np.nan], [1.0, np.nan, 2.0], [-1e9, np.nan]])
def test_nan_is_an_error_that_names_the_value(batch):
    with pytest.raises(DataError, match="'conv1_out' is NaN"):
        Histogram().add(np.array(batch, np.float32), "conv1_out")


def test_entropy_cuts_a_lonely_outlier():
    x = np.append(gaussian(), np.float32(60))
    low, high = made(x).range("entropy", UINT8)
    assert 3 < high < 15
    assert -15 < low < -1


def test_entropy_leaves_a_uniform_alone():
    x = np.random.default_rng(0).uniform(-1, 1, 20_000)
    low, high = made(x).range("entropy", UINT8)
    assert (low, high) == (pytest.approx(-1, abs=0.15), pytest.approx(1, abs=0.15))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint4"])
@pytest.mark.parametrize(
    "x",
    [
        gaussian(1),
        gaussian(2, low=0),  # after a Relu
        np.abs(gaussian(3)) ** 3,
        gaussian(4) * 1e-6,
        np.append(gaussian(5), [25, -40]).astype(np.float32),
        gaussian(6) + np.float32(4),
    ],
    ids=["gaussian", "relu", "cubed", "tiny", "outliers", "shifted"],
)
def test_expected_sqnr_is_the_true_one(x, dtype, method):
    format, histogram = Format(dtype), made(x)
    low, high = histogram.range(method, format)
    scale, zero_point = affine_parameters(low, high, format)
    codes = quantize_affine(x, scale, zero_point, format)
    miss = dequantize_affine(codes, scale, zero_point) - x.astype(np.float64)
    true = 10 * np.log10(np.square(x.astype(np.float64)).sum() / np.square(miss).sum())
    assert histogram.sqnr_db(low, high, format) == pytest.approx(true, abs=0.5)


def test_zeros_alone():
    histogram = made(np.zeros(5), np.zeros(3))
    assert (histogram.exponent, histogram.count, histogram.zeros) == (None, 8, 8)
    assert histogram.range("mse", UINT8) == (0.0, 0.0)
    assert histogram.sqnr_db(0.0, 0.0, UINT8) == float("inf")


def test_cells_keep_zero_apart():
    centres, share = made([0.0, 0.0, 0.0, 1.0]).cells()
    assert centres.tolist() == [0.0, 1.0]  # the bin's centre is beyond the greatest element
    assert share.tolist() == [0.75, 0.25]


def test_empty_and_integer_arrays():
    histogram = Histogram()
    histogram.add(np.zeros((0, 4), np.float32), "x")
    assert facts(histogram) == facts(Histogram())
    histogram.add(np.array([[1, -2]], np.int64), "x")
    assert (histogram.low, histogram.high, histogram.count) == (-2, 1, 2)
