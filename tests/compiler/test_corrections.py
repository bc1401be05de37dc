"""Moments of a layer's outputs are those of the outputs themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler.corrections import Outputs
from fourfold.compiler.covariance import Meeting, Sums

ROWS, COLUMNS = 4, 6


def met(seed, groups=1, spread=True, samples=300):
    """Return (floats, rounded, sums, t, z): two weights and what they make, [samples, rows]."""
    rng = np.random.default_rng(seed)
    size = (samples, groups, COLUMNS)
    y = rng.normal(0.5, 1, size).astype(np.float32)
    x = (y + 0.2 * rng.normal(size=size)).astype(np.float32)
    kernel = {"kernel": (1,), "strides": (1,), "dilations": (1,), "pads": (0, 0)}
    op_type, more = ("MatMul", {}) if groups == 1 else ("Conv", kernel)
    meeting = Meeting("x", op_type, COLUMNS, groups, **more)
    sums = Sums.empty(meeting, apart=True, spread=spread)
    shape = (samples, COLUMNS) if groups == 1 else (samples, groups * COLUMNS, 1)
    sums.add(x.reshape(shape), y.reshape(shape))
    floats = rng.normal(size=(groups * ROWS, COLUMNS))
    stored = floats + 0.3 * rng.normal(size=floats.shape)
    t, z = (
        np.einsum("ngc,grc->ngr", one.astype(np.float64), w.reshape(groups, ROWS, COLUMNS))
        for one, w in ((y, floats), (x, stored))
    )
    return floats, stored, sums, t.reshape(samples, -1), z.reshape(samples, -1)


@pytest.mark.parametrize("groups", [1, 3])
def test_moments_are_those_of_the_outputs(groups):
    floats, stored, sums, t, z = met(0, groups)
    found = Outputs.of(floats, stored, sums)
    near = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(found.t, t.mean(0), **near)
    np.testing.assert_allclose(found.z, z.mean(0), **near)
    np.testing.assert_allclose(found.zz, z.var(0), **near)
    np.testing.assert_allclose(found.tt, t.var(0), **near)
    np.testing.assert_allclose(found.tz, ((t - t.mean(0)) * (z - z.mean(0))).mean(0), **near)


def test_the_spread_of_the_float_layer_is_there_where_it_was_asked_for():
    floats, stored, sums, _, _ = met(1, spread=False)
    found = Outputs.of(floats, stored, sums)
    assert found.tt is None
    assert found.factors("none").tolist() == [1.0] * ROWS


@given(st.integers(0, 10**6), st.floats(-1, 1), st.floats(-1, 1))
def test_least_squares_make_the_error_least(seed, turn, move):
    floats, stored, sums, t, z = met(seed)
    found = Outputs.of(floats, stored, sums)
    factors = found.factors("least-squares")
    learned = factors != 1.0  # the others tell no scale
    delta = found.gap(factors)
    other = np.where(learned, factors + turn, factors)
    least = found.error(factors, delta)
    assert least <= found.error(other, found.gap(other)) + 1e-9
    assert least <= found.error(factors, delta + move) + 1e-9
    assert least <= found.error(np.ones(ROWS), np.zeros(ROWS)) + 1e-9
    # It is the error itself, but for what no correction changes.
    made = [np.square(f * z + d - t).mean(0).sum() for f, d in ((factors, delta), (other, move))]
    told = found.error(other, move) - found.error(factors, delta)
    np.testing.assert_allclose(told, made[1] - made[0], rtol=1e-3, atol=1e-3)


def test_variance_gives_a_channel_its_old_spread_and_mean():
    floats, stored, sums, t, z = met(2)
    found = Outputs.of(floats, stored, sums)
    factors = found.factors("variance")
    assert np.all(np.abs(factors - 1) > 1e-3)
    after = factors * z + found.gap(factors)
    np.testing.assert_allclose(after.std(0), t.std(0), rtol=1e-4)
    np.testing.assert_allclose(after.mean(0), t.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", ["least-squares", "variance"])
def test_a_channel_that_tells_no_scale_keeps_its_own(spread):
    rng = np.random.default_rng(3)
    sums = Sums.empty(Meeting("x", "MatMul", COLUMNS), apart=True, spread=True)
    x = rng.normal(size=(200, COLUMNS)).astype(np.float32)
    sums.add(x, x)
    floats = rng.normal(size=(ROWS, COLUMNS))
    stored = floats * [[1 / 1.5], [0.0], [-1.0], [1 / 3]]  # learned, dead, turned, far away
    factors = Outputs.of(floats, stored, sums).factors(spread)
    turned = factors[2] if spread == "least-squares" else 1.0  # a spread has no sign
    np.testing.assert_allclose([*factors[:2], turned, factors[3]], [1.5, 1, 1, 1], rtol=1e-5)
