import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler.rotations import hadamard, rotation


@settings(max_examples=40)
@given(width=st.integers(1, 130), seed=st.integers(0, 99), keeps_mean=st.booleans())
def test_every_width_gets_an_orthogonal_matrix(width, seed, keeps_mean):
    matrix = rotation(width, seed, keeps_mean)
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(matrix, rotation(width, seed, keeps_mean))
    if keeps_mean:
        np.testing.assert_allclose(np.ones(width) @ matrix, 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(matrix @ np.ones(width), 1, rtol=0, atol=1e-12)


def centred(x):
    less = x - x.mean(axis=-1, keepdims=True)
    return less / np.sqrt(np.square(less).mean(axis=-1, keepdims=True) + 1e-5)


def square(x):
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5)


@settings(max_examples=30)
@given(width=st.integers(2, 80), seed=st.integers(0, 99))
def test_normalizations_commute_with_it(width, seed):
    x = np.random.default_rng(seed).normal(1, 2, (3, width))
    plain, kept = rotation(width, seed), rotation(width, seed, keeps_mean=True)
    np.testing.assert_allclose(square(x @ plain), square(x) @ plain, rtol=0, atol=1e-9)
    np.testing.assert_allclose(centred(x @ kept), centred(x) @ kept, rtol=0, atol=1e-9)
    np.testing.assert_allclose(square(x @ kept), square(x) @ kept, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "width", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 48, 60, 64, 68, 76, 84, 108, 192, 320, 384, 768]
)
def test_known_orders_are_flat(width):
    matrix = hadamard(width)
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, width * np.eye(width))
    np.testing.assert_allclose(np.abs(rotation(width, 5)), width**-0.5, rtol=1e-12)


@pytest.mark.parametrize("width", [3, 6, 10, 14, 22, 50, 52, 92, 100, 172])
def test_other_widths_have_none_here(width):
    assert hadamard(width) is None


@pytest.mark.parametrize("width", [16, 10])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_another_seed_makes_another_matrix(width, keeps_mean):
    first, second = (rotation(width, seed, keeps_mean) for seed in (0, 1))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("width", [64, 384, 100])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_what_lies_in_one_channel_is_spread(width, keeps_mean):
    assert np.abs(rotation(width, 0, keeps_mean)).max() < 6 * width**-0.5
