"""Rounding that keeps a layer's outputs: identities, and what it gains over the nearest."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler.errors import DataError
from fourfold.compiler.gptq import Curvature, gptq


def grid(scale, limit=3):
    """Return what rounds to symmetric codes of these steps, [rows] or [rows, columns]."""

    def rounded(values, column):
        step = scale if np.ndim(scale) < 2 else scale[:, column]
        return np.clip(np.rint(values / step), -limit - 1, limit) * step

    return rounded


def nearest(weights, rounded):
    columns = range(weights.shape[1])
    return np.stack([rounded(weights[:, j].astype(np.float64), j) for j in columns], 1)


def correlated(rng, columns=64, samples=1000, rank=12):
    """Return inputs [samples, columns] that share a few directions."""
    shared = rng.normal(size=(samples, rank)) @ rng.normal(size=(rank, columns))
    return shared + 0.3 * rng.normal(size=(samples, columns))


def layer(seed, rows=32, columns=64):
    """Return (weights, steps of three bits a row, inputs)."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(rows, columns)).astype(np.float32)
    return weights, np.abs(weights).max(axis=1) / 3, correlated(rng, columns)


def miss(weights, found, inputs):
    """Return the relative squared error of the outputs."""
    wrong, right = inputs @ (found - weights).T, inputs @ weights.T
    return float(np.square(wrong).sum() / np.square(right).sum())


@given(st.integers(0, 1000), st.integers(1, 40), st.floats(0.01, 100))
@settings(max_examples=30)
def test_inputs_that_do_not_correlate_give_the_nearest(seed, columns, energy):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(5, columns)).astype(np.float32)
    rounded = grid(np.full(5, 0.4))
    found = gptq(weights, Curvature.of(np.eye(columns) * energy), rounded)
    np.testing.assert_array_equal(found, nearest(weights, rounded))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_block_changes_nothing(block):
    weights, steps, inputs = layer(0)
    curvature = Curvature.of(inputs.T @ inputs / len(inputs))
    first = gptq(weights, curvature, grid(steps))
    np.testing.assert_allclose(gptq(weights, curvature, grid(steps), block), first, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_far_nearer_than_by_rounding_to_nearest(seed):
    weights, steps, inputs = layer(seed)
    found = gptq(weights, Curvature.of(inputs.T @ inputs / len(inputs)), grid(steps))
    plain = nearest(weights, grid(steps))
    assert miss(weights, found, inputs) < 0.4 * miss(weights, plain, inputs)
    codes = found / steps[:, None]
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-5)
    assert np.rint(codes).min() >= -4
    assert np.rint(codes).max() <= 3


def test_the_energy_sets_the_order_not_the_answers_place():
    """Columns that are exchanged, weights and inputs alike, come back exchanged."""
    weights, steps, inputs = layer(1)
    turn = np.random.default_rng(0).permutation(64)
    whole = gptq(weights, Curvature.of(inputs.T @ inputs), grid(steps))
    moved = inputs[:, turn]
    turned = gptq(weights[:, turn], Curvature.of(moved.T @ moved), grid(steps))
    np.testing.assert_allclose(turned, whole[:, turn], atol=1e-6)


def test_a_grid_of_each_column_is_met_at_its_own_place():
    weights, _, inputs = layer(2)
    steps = np.random.default_rng(1).uniform(0.2, 0.9, weights.shape)
    found = gptq(weights, Curvature.of(inputs.T @ inputs), grid(steps, 100))
    np.testing.assert_allclose(found / steps, np.rint(found / steps), atol=1e-4)


def test_a_column_that_meets_zeros_becomes_zero():
    weights, steps, inputs = layer(3)
    inputs[:, [4, 40]] = 0
    found = gptq(weights, Curvature.of(inputs.T @ inputs), grid(steps))
    assert not found[:, [4, 40]].any()
    assert found[:, 5].any()


def test_fewer_samples_than_columns_are_damped():
    weights, steps, inputs = layer(4)
    few = inputs[:10]
    found = gptq(weights, Curvature.of(few.T @ few), grid(steps))
    assert np.isfinite(found).all()
    assert miss(weights, found, few) < miss(weights, nearest(weights, grid(steps)), few)


def test_a_covariance_with_negative_energies_is_damped_until_it_has_a_factor():
    matrix = np.eye(6)
    matrix[0, 1] = matrix[1, 0] = 1.4
    assert np.isfinite(Curvature.of(matrix).factor).all()


def test_inputs_of_zeros_leave_zeros():
    weights, steps, _ = layer(5)
    assert not gptq(weights, Curvature.of(np.zeros((64, 64))), grid(steps)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_covariance_that_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match="not finite"):
        Curvature.of(np.full((3, 3), bad))
