import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler.covariance import Moments
from fourfold.compiler.grids import Grid
from fourfold.compiler.layer_rounding import Fit, solve


def grid(scale, columns, limits=(-4, 3), shift=0.0, blocks=1):
    """Return a grid of one scale a row, or of some blocks a row."""
    rows = len(scale)
    owner = np.arange(rows)[:, None] * blocks + np.arange(columns) * blocks // columns
    whole = np.broadcast_to(np.asarray(scale, np.float64)[:, None], (rows, columns)).copy()
    return Grid(whole, np.full((rows, columns), shift), owner, limits, np.full_like(whole, 1e-9))


def layer(seed, rows=8, columns=24, samples=2000, gap=0.0):
    """Return (weights, x, y): correlated inputs, and the float model's beside them."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(samples, 5)) @ rng.normal(size=(5, columns))
    y = np.maximum(y + 0.3 * rng.normal(size=y.shape), 0)
    lost = gap * y @ rng.normal(size=(columns, columns)) / columns**0.5
    return rng.normal(size=(rows, columns)), y + lost, y


def moments(x, y):
    n = len(x)
    return Moments(x.T @ x / n, y.T @ x / n, x.mean(0), y.mean(0))


def start(weights, limits=(-4, 3), blocks=1):
    return grid(np.abs(weights).max(1) / limits[1], weights.shape[1], limits, blocks=blocks)


def miss(found, weights, x, y):
    return float(np.square(x @ found.T - y @ weights.T).mean())


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_inputs_that_do_not_correlate_give_the_nearest(seed, columns, energy):
    weights = np.random.default_rng(seed).normal(size=(5, columns))
    eye = energy * np.eye(columns)
    fit = Fit.of(weights, Moments(eye, eye, np.zeros(columns), np.zeros(columns)), None)
    plain = start(weights)
    codes, found = solve(fit, plain, rounds=0, search=False)
    np.testing.assert_array_equal(codes, plain.codes(weights))
    np.testing.assert_array_equal(found.scale, plain.scale)


@given(st.integers(0, 10**6), st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None)
def test_each_step_lessens_the_error(seed, blocks):
    """Nearest, column by column, searched scales, scales fitted: never worse than before."""
    weights, x, _ = layer(seed)
    own = moments(x, x)
    fit, plain = Fit.of(weights, own, None), start(weights, blocks=blocks)
    errors = [fit.errors(plain.floats(plain.codes(weights))).sum()]
    for rounds, search in ((0, False), (2, False)):
        codes, found = solve(fit, plain, rounds, search)
        assert codes.min() >= -4
        assert codes.max() <= 3
        errors.append(fit.errors(found.floats(codes)).sum())
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] <= errors[1]


def test_searched_and_fitted_scales_pay_at_two_bits():
    weights, x, _ = layer(0)
    fit, plain = Fit.of(weights, moments(x, x), None), start(weights, (-2, 1))
    errors = []
    for rounds, search in ((0, False), (0, True), (2, True)):
        codes, found = solve(fit, plain, rounds, search)
        errors.append(fit.errors(found.floats(codes)).sum())
        assert set(np.unique(codes)) <= {-2, -1, 0, 1}
        for row in found.scale:
            assert len(set(row)) == 1
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


def test_scales_stay_above_what_they_may_not_fall_below():
    weights, x, _ = layer(1)
    plain = start(weights, (-2, 1))
    high = Grid(plain.scale, plain.shift, plain.owner, plain.limits, plain.scale * 0.9)
    _, found = solve(Fit.of(weights, moments(x, x), None), high, rounds=2, search=True)
    assert (found.scale >= high.least).all()
    assert (found.scale < high.scale).any()


def test_scales_that_rows_share_stay():
    weights, x, _ = layer(2)
    one = grid(np.full(8, 0.7), 24)
    shared = Grid(one.scale, one.shift, np.zeros_like(one.owner), one.limits, one.least)
    codes, found = solve(Fit.of(weights, moments(x, x), None), shared, rounds=2, search=True)
    np.testing.assert_array_equal(found.scale, shared.scale)
    own, _ = solve(Fit.of(weights, moments(x, x), None), one, rounds=0, search=False)
    np.testing.assert_array_equal(codes, own)


def test_zero_points_are_kept():
    weights, x, _ = layer(3)
    plain = grid(np.ptp(weights, axis=1) / 7, 24, (0, 7), shift=3.0)
    codes, found = solve(Fit.of(weights, moments(x, x), None), plain, rounds=1, search=True)
    np.testing.assert_array_equal(found.shift, plain.shift)
    assert set(np.unique(codes)) <= set(range(8))


def test_a_dead_column_and_a_dead_layer_are_harmless():
    weights, x, _ = layer(4)
    x[:, 3] = 0
    for inputs in (x, np.zeros_like(x)):
        fit = Fit.of(weights, moments(inputs, inputs), None)
        codes, found = solve(fit, start(weights), rounds=1, search=True)
        assert np.isfinite(found.floats(codes)).all()


# What the float model's inputs are good for.


def folds(x, y):
    return moments(x[:1500], y[:1500]), moments(x[1500:], y[1500:])


def test_following_the_float_model_makes_up_for_what_its_inputs_lost():
    weights, x, y = layer(5, gap=0.2)
    fit = Fit.of(weights, moments(x, y), folds(x, y))
    assert fit.followed > 0.9
    assert miss(fit.weights, weights, x, y) < 0.1 * miss(weights, weights, x, y)


def test_equal_inputs_ask_for_no_other_weight():
    weights, x, _ = layer(6)
    fit = Fit.of(weights, moments(x, x), folds(x, x))
    np.testing.assert_array_equal(fit.weights, weights)
    assert fit.followed == 0


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_few_samples_is_not_followed(seed):
    """What two dozen samples seem to say about 24 columns is mostly noise."""
    rng = np.random.default_rng(seed)
    weights, _, y = layer(seed, samples=2000)
    x = y + 0.5 * rng.normal(size=y.shape)
    few = slice(0, 24)
    plain = moments(x[few], y[few])
    blind = Fit.of(weights, plain, (plain, plain))  # nothing held out
    fit = Fit.of(weights, plain, (moments(x[:18], y[:18]), moments(x[18:24], y[18:24])))
    rest = x[100:], y[100:]
    kept, followed, unseen = (
        miss(one, weights, *rest) for one in (weights, fit.weights, blind.weights)
    )
    assert followed < unseen
    assert followed < 1.1 * kept
