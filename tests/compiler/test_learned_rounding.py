"""Learned rounding of one layer: what it gains, what it never does, and what it leaves alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler.covariance import Meeting
from fourfold.compiler.errors import DataError
from fourfold.compiler.gptq import Curvature, gptq
from fourfold.compiler.grids import Grid
from fourfold.compiler.layer_sample import Sample

torch = pytest.importorskip("torch")
from fourfold.compiler.layer_torch import Linear, State  # noqa: E402 - it imports torch
from fourfold.compiler.learned_rounding import _neighbours, _Start, learn  # noqa: E402

pytestmark = pytest.mark.torch

METHODS = ["adaround", "adaquant"]


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on many threads wait for one another more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grid_of(weights, bits, owner=None, unsigned=False, least=0.0):
    """Return a grid of the weights' range; `owner` numbers what shares a scale."""
    owner = np.arange(len(weights))[:, None] if owner is None else owner
    owner = np.broadcast_to(owner, weights.shape)
    scale, shift = np.empty(weights.shape), np.zeros(weights.shape)
    limit = 2 ** (bits - 1) - 1
    limits = (0, 2**bits - 1) if unsigned else (-limit - 1, limit)
    for number in np.unique(owner):
        part, here = weights[owner == number], owner == number
        if unsigned:
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale[here] = np.float32((high - low) / limits[1])
            shift[here] = np.rint(-low / scale[here])
        else:
            scale[here] = np.float32(np.abs(part).max() / limit)
    return Grid(scale, shift, owner.astype(np.intp), limits, np.full(weights.shape, least))


class Layer:
    """A linear layer with inputs that correlate, as behind a ReLU, and weights of heavy tails."""

    def __init__(self, seed=0, rows=16, columns=24, count=600, drop=0.0):
        draw = np.random.default_rng(seed)
        self.weights = (draw.standard_t(4, (rows, columns)) / np.sqrt(columns)).astype(np.float32)
        self.bias = (draw.normal(size=rows) - drop).astype(np.float32)
        shared = draw.normal(size=(2 * count, 12)) @ draw.normal(size=(12, columns)) / 4
        own = 0.5 * draw.normal(size=(2 * count, columns)) + 0.3 * draw.normal(size=columns)
        self.floats = np.maximum(shared + own, 0).astype(np.float32)
        step = self.floats.max() / 255
        self.inputs = (np.rint(self.floats / step) * step).astype(np.float32)
        self.count = count

    def sample(self, bias=True, seed=0):
        columns = self.weights.shape[1]
        meeting = Meeting("x", "MatMul", columns)
        sample = Sample(meeting, self.weights, self.bias if bias else None, self.count, seed=seed)
        sample.add(self.inputs[: self.count], self.floats[: self.count])
        return sample

    def error(self, weights, bias, relu=False):
        """Return the relative error on inputs that were never seen."""
        right = self.floats[self.count :] @ self.weights.T + self.bias
        found = self.inputs[self.count :] @ weights.astype(np.float32).T + bias
        if relu:
            right, found = np.maximum(right, 0), np.maximum(found, 0)
        return float(np.square(found - right).sum() / np.square(right).sum())

    def corrected(self, weights):
        """Return the bias that makes up for the mean of what rounded weights miss."""
        x, y = self.inputs[: self.count].mean(0), self.floats[: self.count].mean(0)
        return self.bias + self.weights @ y - weights @ x

    def learned(self, found, relu=False):
        return self.error(found.grid.floats(found.codes), found.bias, relu)


@pytest.mark.parametrize("bits", [3, 4])
def test_both_beat_the_nearest_with_its_bias_corrected(bits):
    layer = Layer(0, rows=64, columns=96, count=800)
    grid = grid_of(layer.weights, bits)
    nearest = grid.floats(grid.codes(layer.weights.astype(np.float64)))
    plain = layer.error(nearest, layer.bias)
    corrected = layer.error(nearest, layer.corrected(nearest))
    assert corrected < plain
    for method, share in (("adaround", 0.75), ("adaquant", 0.8)):
        found = learn(grid, layer.sample(), method, steps=200)
        assert layer.learned(found) < share * corrected
        assert found.after < share * corrected / plain * found.before


def test_what_another_method_found_is_made_better():
    layer = Layer(1, rows=32, columns=48)
    grid = grid_of(layer.weights, 3)
    x = layer.inputs[: layer.count].astype(np.float64)
    curvature = Curvature.of(np.cov(x.T, bias=True))
    first = gptq(layer.weights, curvature, grid.column).astype(np.float64)
    codes = np.rint(first / grid.scale)
    before = layer.error(first, layer.corrected(first))
    for method, share in (("adaround", 0.99), ("adaquant", 0.8)):
        found = learn(grid, layer.sample(), method, codes=codes, steps=300)
        assert layer.learned(found) < share * before


@pytest.mark.parametrize("method", METHODS)
def test_errors_that_a_relu_hides_do_not_count(method):
    layer = Layer(2, rows=8, columns=16, count=3000, drop=1.0)
    right = np.maximum(layer.floats @ layer.weights.T + layer.bias, 0)
    assert (right == 0).mean() > 0.6
    grid = grid_of(layer.weights, 2)
    blind = learn(grid, layer.sample(), method, steps=150)
    aware = learn(grid, layer.sample(), method, relu=True, steps=150)
    assert layer.learned(aware, relu=True) < 0.9 * layer.learned(blind, relu=True)
    assert layer.learned(aware) > layer.learned(blind)


@given(
    st.integers(0, 1000),
    st.sampled_from(METHODS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([2, 4]),
)
@settings(max_examples=12)
def test_held_out_samples_never_get_worse(seed, method, relu, biased, given_codes, bits):
    layer = Layer(seed, rows=4, columns=6, count=30)
    grid = grid_of(layer.weights, bits)
    codes = None
    if given_codes:
        draw = np.random.default_rng(seed)
        codes = draw.integers(grid.limits[0], grid.limits[1] + 1, layer.weights.shape).astype(
            float
        )
    sample = layer.sample(biased)
    found = learn(grid, sample, method, relu=relu, codes=codes, steps=12)
    assert found.after <= found.before
    start = codes if given_codes else grid.codes(layer.weights.astype(np.float64))
    assert held_error(sample, grid, start, sample.bias, relu) == pytest.approx(
        found.before, rel=1e-3, abs=1e-9
    )
    assert held_error(sample, found.grid, found.codes, found.bias, relu) == pytest.approx(
        found.after, rel=1e-3, abs=1e-9
    )
    assert (found.bias is None) == (not biased)


def held_error(sample, grid, codes, bias, relu):
    """Return the relative error on the rows that are held out, the plain way."""
    _, held = sample.split()
    y, t = held.x[0] @ grid.floats(codes).T, held.t[0]
    y = y if bias is None else y + bias
    if relu:
        y, t = np.maximum(y, 0), np.maximum(t, 0)
    right = float(np.square(t).sum())
    return float(np.square(y - t).sum()) / (right or 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_weights_on_the_grid_stay(method, relu, started):
    layer = Layer(3)
    grid = grid_of(layer.weights, 4)
    codes = grid.codes(layer.weights.astype(np.float64))
    layer.weights, layer.inputs = grid.floats(codes).astype(np.float32), layer.floats
    found = learn(
        grid, layer.sample(), method, relu=relu, codes=codes if started else None, steps=30
    )
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.grid.scale, grid.scale, rtol=1e-4)
    np.testing.assert_allclose(found.bias, layer.bias, atol=1e-4)
    assert found.after < 1e-9


@pytest.mark.parametrize("relu", [False, True])
def test_adaround_goes_to_a_neighbour_of_the_weight_at_most(relu):
    layer = Layer(4)
    grid = grid_of(0.5 * layer.weights, 3)  # a quarter of a step's range, many are clipped
    found = learn(grid, layer.sample(), "adaround", relu=relu, steps=60)
    exact = layer.weights / grid.scale
    assert (np.abs(exact) > 4).any()
    below, above = (np.clip(f(exact), *grid.limits) for f in (np.floor, np.ceil))
    assert ((found.codes == below) | (found.codes == above)).all()
    assert (found.codes != grid.codes(layer.weights.astype(np.float64))).any()
    assert found.grid is grid


@pytest.mark.parametrize("relu", [False, True])
def test_adaround_goes_to_a_neighbour_of_a_given_code_at_most(relu):
    layer = Layer(5)
    grid = grid_of(layer.weights, 3)
    noise = np.random.default_rng(0).integers(-2, 3, layer.weights.shape)
    codes = np.clip(grid.codes(layer.weights.astype(np.float64)) + noise, *grid.limits)
    found = learn(grid, layer.sample(), "adaround", relu=relu, codes=codes, steps=60)
    assert np.abs(found.codes - codes).max() == 1
    assert found.codes.min() >= grid.limits[0]
    assert found.codes.max() <= grid.limits[1]
    assert found.after < 0.5 * found.before


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("owner", ["tensor", "row", "block"])
def test_adaquant_keeps_what_shares_a_scale_together(owner, unsigned):
    layer = Layer(9, rows=8)
    rows, columns = layer.weights.shape
    numbers = {
        "tensor": np.zeros((1, 1)),
        "row": 5 + np.arange(rows)[:, None],
        "block": np.arange(rows)[:, None] * 3 + np.arange(columns)[None] // 8,
    }[owner]
    grid = grid_of(1.4 * layer.weights, 3, numbers, unsigned)  # wider than need be
    found = learn(grid, layer.sample(), "adaquant", steps=150)
    assert found.after < 0.8 * found.before
    assert not np.array_equal(found.grid.scale, grid.scale)
    for number in np.unique(grid.owner):
        part = grid.owner == number
        assert len(set(found.grid.scale[part])) == 1
        assert len(set(found.grid.shift[part])) == 1
    ratio = found.grid.scale / grid.scale
    assert 0.5 <= ratio.min() < 0.98
    assert ratio.max() > ratio.min() + 0.01 or owner == "tensor"
    for whole in (found.codes, found.grid.shift):
        np.testing.assert_array_equal(whole, np.rint(whole))
    assert found.codes.min() >= grid.limits[0]
    assert found.codes.max() <= grid.limits[1]
    assert unsigned or not found.grid.shift.any()
    np.testing.assert_array_equal(found.grid.scale, found.grid.scale.astype(np.float32))


def test_adaquant_learns_zero_points():
    layer = Layer(7, rows=8)
    layer.weights = np.abs(layer.weights) + np.float32(0.05)
    grid = grid_of(layer.weights, 3, unsigned=True)
    assert not grid.shift.any()
    shifted = Grid(grid.scale, grid.shift + 2, grid.owner, grid.limits, grid.least)
    found = learn(shifted, layer.sample(), "adaquant", steps=300)
    assert (found.grid.shift < 2).any()
    assert found.grid.shift.min() >= 0


def test_signed_codes_keep_their_zero_point():
    layer = Layer(7, rows=8)
    layer.weights = np.abs(layer.weights)
    grid = grid_of(0.4 * layer.weights, 3)  # many are clipped, so a shift would help
    found = learn(grid, layer.sample(), "adaquant", steps=150)
    assert found.after < 0.5 * found.before
    assert found.grid.scale.max() > grid.scale.max()
    assert not found.grid.shift.any()


def test_adaround_starts_from_the_weights_themselves():
    layer = Layer(11)
    grid = grid_of(layer.weights, 2)
    start = _Start.of(grid, layer.sample(), None, Linear(layer.sample().split()[0], True))
    least, greatest, share = _neighbours(start)
    soft = State(least + share * (greatest - least), start.state.scale, start.state.shift, None)
    np.testing.assert_allclose(soft.weights[0], layer.weights, atol=1e-6)


def test_adaquant_keeps_scales_above_their_floor():
    layer = Layer(8)
    loose = grid_of(layer.weights, 2)
    shrunk = learn(loose, layer.sample(), "adaquant", steps=150).grid.scale / loose.scale
    assert shrunk.min() < 0.95
    tight = Grid(loose.scale, loose.shift, loose.owner, loose.limits, 0.97 * loose.scale)
    held = learn(tight, layer.sample(), "adaquant", steps=150).grid.scale / loose.scale
    assert held.min() == pytest.approx(0.97, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relu", [False, True])
def test_the_same_twice(method, relu):
    layer = Layer(9)
    grid = grid_of(layer.weights, 3)
    sample = layer.sample()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second, other = (
        learn(grid, one, method, relu=relu, steps=40)
        for one in (sample, sample, layer.sample(seed=1))
    )
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.bias, second.bias)
    np.testing.assert_array_equal(first.grid.scale, second.grid.scale)
    assert first.after == second.after
    assert other.after == pytest.approx(first.after, rel=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_arrays_stay_and_gradients_may_be_off(method):
    layer = Layer(10)
    grid = grid_of(layer.weights, 3)
    codes = grid.codes(layer.weights.astype(np.float64))
    kept = [a.copy() for a in (layer.weights, layer.bias, grid.scale, grid.shift, codes)]
    with torch.no_grad():
        found = learn(grid, layer.sample(), method, relu=True, codes=codes, steps=20)
    assert found.after < found.before
    for array, copy in zip(
        (layer.weights, layer.bias, grid.scale, grid.shift, codes), kept, strict=True
    ):
        np.testing.assert_array_equal(array, copy)


def convolution(kernel, groups, sizes, rows=6, channels=6, seed=0, **window):
    """Return (grid, sample, outputs of weights and a bias on other inputs) of a convolution."""
    draw = np.random.default_rng(seed)
    rank = len(kernel)
    columns = channels // groups * int(np.prod(kernel))
    weights = draw.normal(size=(rows, columns)).astype(np.float32)
    bias = (draw.normal(size=rows) - 0.5).astype(np.float32)
    strides = window.get("strides", (1,) * rank)
    pads = window.get("pads", (1,) * 2 * rank)
    meeting = Meeting("x", "Conv", columns, groups, False, kernel, strides, (1,) * rank, pads)
    smooth = draw.normal(size=(24, channels, *sizes))
    smooth = np.maximum(smooth + np.roll(smooth, 1, -1) + smooth.mean(1, keepdims=True) + 0.5, 0)
    inputs = smooth.astype(np.float32)
    sample = Sample(meeting, weights, bias, 12)
    sample.add(inputs[:12])
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[rank]

    def outputs(found, level):
        w = torch.from_numpy(np.asarray(found, np.float32).reshape(rows, -1, *kernel))
        sides = zip(pads[:rank], pads[rank:], strict=True)
        padded = torch.from_numpy(np.pad(inputs[12:], [(0, 0), (0, 0), *sides]))
        return conv(padded, w, torch.from_numpy(level), strides, 0, 1, groups).numpy()

    return weights, bias, sample, outputs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kernel", "groups", "sizes", "window"),
    [
        ((3,), 1, (20,), {}),
        ((3, 3), 1, (7, 6), {"strides": (2, 1), "pads": (1, 0, 0, 1)}),
        ((3, 3), 3, (6, 6), {}),
        ((3, 3), 6, (8, 8), {}),
        ((2, 1, 2), 2, (3, 4, 5), {"pads": (0,) * 6}),
    ],
)
def test_convolutions_come_out_nearer(method, kernel, groups, sizes, window):
    weights, bias, sample, outputs = convolution(kernel, groups, sizes, **window)
    grid = grid_of(weights, 3)
    right = np.maximum(outputs(weights, bias), 0)
    nearest = grid.floats(grid.codes(weights.astype(np.float64)))
    found = learn(grid, sample, method, relu=True, steps=60)
    before, after = (
        float(np.square(np.maximum(made, 0) - right).sum())
        for made in (
            outputs(nearest, bias),
            outputs(found.grid.floats(found.codes), found.bias),
        )
    )
    assert after < 0.85 * before


def test_a_depthwise_convolution_is_as_many_layers():
    """Each group by itself comes to the same error as all groups together."""
    weights, bias, sample, _ = convolution((3, 3), 6, (8, 8))
    grid = grid_of(weights, 3)
    whole = learn(grid, sample, "adaround", steps=100)
    known, held = sample.split()
    for group in range(6):
        alone = Sample(Meeting("x", "MatMul", 9), weights[group : group + 1], bias[group:][:1], 1)
        alone.add(known.x[group][None])
        found = learn(grid.part(slice(group, group + 1)), alone, "adaround", steps=100)
        x, t = held.x[group], held.t[group][:, 0]

        def error(codes, level, x=x, t=t, group=group):
            return np.square(x @ (codes * grid.scale[group]) + level - t).mean()

        one = error(found.codes[0], found.bias[0])
        all_of_them = error(whole.codes[group], whole.bias[group])
        assert all_of_them == pytest.approx(one, rel=0.5)


def test_few_weights_come_near_the_best_of_all_choices():
    for seed in range(3):
        layer = Layer(seed, rows=2, columns=7, count=400)
        grid = grid_of(layer.weights, 3)
        sample = layer.sample()
        found = learn(grid, sample, "adaround", steps=200)
        exact = layer.weights / grid.scale
        least, greatest = np.floor(exact), np.clip(np.ceil(exact), *grid.limits)
        known, _ = sample.split()
        x, t = (part[0] - part[0].mean(0) for part in (known.x, known.t))
        choices = np.array(list(np.ndindex(*(2,) * 7)))
        for row in range(2):
            codes = np.where(choices, greatest[row], least[row])
            errors = np.square(x @ (codes * grid.scale[row]).T - t[:, [row]]).mean(0)
            mine = np.square(x @ (found.codes[row] * grid.scale[row]) - t[:, row]).mean()
            assert mine <= 1.2 * errors.min()


def test_nothing_to_learn_from_is_refused():
    layer = Layer(0)
    sample = Sample(Meeting("x", "MatMul", 24), layer.weights, layer.bias, 3)
    with pytest.raises(DataError, match="no rows"):
        learn(grid_of(layer.weights, 4), sample, "adaround")


def test_inputs_of_zeros_leave_the_start():
    layer = Layer(0)
    layer.inputs, layer.floats = np.zeros_like(layer.inputs), np.zeros_like(layer.floats)
    grid = grid_of(layer.weights, 4)
    for method in METHODS:
        found = learn(grid, layer.sample(), method, steps=20)
        assert np.isfinite(found.codes).all()
        np.testing.assert_allclose(found.bias, layer.bias, atol=1e-6)
