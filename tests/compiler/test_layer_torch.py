"""The error of a layer: gradients, levels and moves, against the plain computation."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from fourfold.compiler import layer_torch  # noqa: E402 - it imports torch
from fourfold.compiler.layer_sample import Rows  # noqa: E402
from fourfold.compiler.layer_torch import Clipped, Linear, State, loss  # noqa: E402

pytestmark = pytest.mark.torch

KINDS = [Linear, Clipped]


def rows_of(seed, groups=2, rows=3, columns=4, count=60):
    """Return rows whose right outputs are those of some weights, with noise, and the weights."""
    draw = np.random.default_rng(seed)
    x = np.abs(draw.normal(size=(groups, count, columns))) + draw.normal(size=(groups, 1, columns))
    weights = draw.normal(size=(groups, rows, columns))
    t = x @ weights.swapaxes(1, 2) + 0.1 * draw.normal(size=(groups, count, rows)) - 0.5
    return Rows(x.astype(np.float32), t.astype(np.float32)), weights


def state_of(weights, scale=0.4, seed=0):
    draw = np.random.default_rng(seed)
    steps = scale * draw.uniform(0.7, 1.3, weights.shape)
    shift = draw.integers(-1, 2, weights.shape)
    codes = np.rint(weights / steps) + shift
    level = draw.normal(size=weights.shape[:2])
    return State(*(torch.tensor(a, dtype=torch.float32) for a in (codes, steps, shift, level)))


def moved(state, **changes):
    return State(**{**{k: getattr(state, k) for k in state.__dataclass_fields__}, **changes})


def error(objective, kind, weights, level):
    """Return each row's mean squared error, the plain way."""
    y = objective.x @ weights.mT + level[:, None]
    t = objective.t if kind is Clipped else objective.t - objective.level[:, None]
    y = y.relu() if kind is Clipped else y - level[:, None]
    return (y - t).square().mean(1)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_error(kind, biased):
    rows, weights = rows_of(1)
    objective, state = kind(rows, biased), state_of(weights)
    w = state.weights.clone().requires_grad_()
    error(objective, kind, w, state.level).sum().backward()
    expected, w.grad = w.grad, None
    objective.misses(w, state.level, 3).sum().backward()  # one batch is all rows here
    torch.testing.assert_close(w.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(2 * objective.slopes(state), expected, rtol=1e-4, atol=1e-5)


def test_batches_go_through_all_rows_alike(monkeypatch):
    monkeypatch.setattr(layer_torch, "BATCH", 48)
    rows, weights = rows_of(1, 1, 1, 2, 100)
    objective, state = Clipped(rows, True), state_of(weights)
    seen = torch.zeros(1, 100, 1)
    for step in range(25):
        objective.t = torch.full((1, 100, 1), 1e3).requires_grad_()
        objective.misses(state.weights, state.level, step).sum().backward()
        seen += objective.t.grad != 0
    assert (seen == 12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bias_and_level_say_the_same(kind):
    rows, weights = rows_of(2)
    objective, state = kind(rows, True), state_of(weights)
    bias = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    state = moved(state, level=objective.level_of(bias, state))
    torch.testing.assert_close(objective.bias_of(state), bias)
    y = objective.x @ state.weights.mT + state.level[:, None]
    plain = torch.from_numpy(rows.x) @ state.weights.mT + bias[:, None]
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)


def test_without_a_bias_the_level_stays_zero():
    rows, weights = rows_of(2)
    state = moved(state_of(weights), level=torch.zeros(2, 3))
    for kind in KINDS:
        objective = kind(rows, False)
        bounds = state.codes - 1, state.codes + 1
        for found in (objective.levelled(state), objective.descended(state, *bounds)):
            assert not objective.bias_of(found).any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_level_is_better(kind):
    rows, weights = rows_of(3)
    objective, state = kind(rows, True), state_of(weights)
    found = objective.levelled(state)
    relu = kind is Clipped

    def of(level):
        bias = objective.bias_of(moved(state, level=level))
        return loss(rows, state.weights, bias, relu)

    best = of(found.level)
    assert best <= of(state.level)
    for shift in (-0.05, 0.05):
        assert best < of(found.level + shift)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_moves_lower_the_error_inside_their_bounds(kind, seed):
    rows, weights = rows_of(seed, 2, 4, 12, 200)
    objective, state = kind(rows, True), objective_start(kind, rows, weights, seed)
    least, greatest = state.codes - 1, state.codes + 1
    least[0, 0], greatest[0, 0] = state.codes[0, 0], state.codes[0, 0]
    found = objective.descended(state, least, greatest)
    before = loss(rows, state.weights, objective.bias_of(state), kind is Clipped)
    after = loss(rows, found.weights, objective.bias_of(found), kind is Clipped)
    assert after < 0.95 * before
    assert ((found.codes >= least) & (found.codes <= greatest)).all()
    assert (found.codes != state.codes).any()
    torch.testing.assert_close(found.codes, found.codes.round(), rtol=0, atol=0)


def objective_start(kind, rows, weights, seed):
    """Return a state whose codes are a little wrong, with the best level."""
    state = state_of(weights, 0.3, seed)
    off = torch.randint(-1, 2, state.codes.shape, generator=torch.Generator().manual_seed(seed))
    return kind(rows, True).levelled(moved(state, codes=state.codes + off))


def test_a_move_that_only_seems_to_help_is_not_made():
    """The slope sees the output above zero, not the two that the move would bring there."""
    ahead = np.array([0.1, -0.25, -0.25])
    x = np.stack([np.ones(3), ahead], 1)[None].astype(np.float32)
    t = np.where(ahead > 0, 1.0, -1.0)[None, :, None].astype(np.float32)
    zeros, codes = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 1.0]]])
    state = State(codes, torch.tensor([[[0.9, 1.0]]]), zeros, torch.zeros(1, 1))
    objective = Clipped(Rows(x, t), False)
    assert objective.slopes(state)[0, 0, 0] < 0
    found = objective.descended(state, torch.tensor([[[-1.0, 1.0]]]), torch.ones(1, 1, 2))
    assert torch.equal(found.codes, codes)


def test_a_descent_on_a_quadratic_ends_where_no_code_can_move_alone():
    rows, weights = rows_of(5, 1, 3, 6, 300)
    objective = Linear(rows, True)
    state = objective_start(Linear, rows, weights, 1)
    bounds = state.codes - 3, state.codes + 3
    found = objective.descended(state, *bounds)
    best = error(objective, Linear, found.weights, found.level)
    for row, column, step in itertools.product(range(3), range(6), (-1, 1)):
        codes = found.codes.clone()
        codes[0, row, column] += step
        if not bounds[0][0, row, column] <= codes[0, row, column] <= bounds[1][0, row, column]:
            continue
        other = error(objective, Linear, moved(found, codes=codes).weights, found.level)
        assert other[0, row] >= best[0, row] - 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_meet(kind):
    rows, weights = rows_of(6, 3, 2, 5, 80)
    state = objective_start(kind, rows, weights, 2)
    whole = kind(rows, True).descended(state, state.codes - 1, state.codes + 1)
    for group in range(3):
        part = slice(group, group + 1)
        alone = Rows(rows.x[part], rows.t[part])
        one = moved(state, **{k: getattr(state, k)[part] for k in state.__dataclass_fields__})
        found = kind(alone, True).descended(one, one.codes - 1, one.codes + 1)
        same = (found.codes == whole.codes[part]).float().mean()
        assert same > 0.7  # columns go in another order


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_meet_zeros_and_rows_that_are_never_above_zero_stay(kind):
    rows, weights = rows_of(7, 1, 3, 5)
    rows.x[..., 2] = 0
    rows.t[..., 1] = -100
    state = kind(rows, True).levelled(state_of(weights))
    objective = kind(rows, True)
    found = objective.descended(state, state.codes - 2, state.codes + 2)
    torch.testing.assert_close(found.codes[..., 2], state.codes[..., 2])
    assert torch.isfinite(found.level).all()
    assert (objective.stiffness(state.scale) > 0).all()
    dead = kind(Rows(np.zeros_like(rows.x), rows.t), True)
    torch.testing.assert_close(dead.stiffness(state.scale), torch.ones(1, 3))


def test_stiffness_is_what_one_step_costs():
    rows, weights = rows_of(8, 1, 2, 4, 500)
    objective, state = Linear(rows, True), state_of(weights)
    base = error(objective, Linear, state.weights, state.level)
    costs = []
    for column in range(4):
        up, down = (state.codes.clone() for _ in range(2))
        up[..., column] += 1
        down[..., column] -= 1
        sides = [
            error(objective, Linear, moved(state, codes=c).weights, state.level)
            for c in (up, down)
        ]
        costs.append(sum(sides) / 2 - base)
    expected = torch.stack(costs).mean(0)
    torch.testing.assert_close(objective.stiffness(state.scale), expected, rtol=1e-3, atol=1e-4)


def test_seldom_positive_rows_are_softer():
    rows, _ = rows_of(9, 1, 2, 4, 500)
    rows.t[..., 0] -= np.quantile(rows.t[..., 0], 0.9)
    rows.t[..., 1] -= rows.t[..., 1].min() - 1
    stiff = Clipped(rows, True).stiffness(torch.ones(1, 2, 4))[0]
    assert stiff[0] < 0.6 * stiff[1]
    torch.testing.assert_close(stiff[1], Linear(rows, True).stiffness(torch.ones(1, 2, 4))[0, 1])


def test_the_loss_is_relative_and_blind_below_a_relu():
    x = np.ones((1, 2, 1), np.float32)
    rows = Rows(x, np.array([[[2.0], [-3.0]]], np.float32))
    weights, bias = torch.tensor([[[1.0]]]), torch.tensor([[0.0]])
    assert loss(rows, weights, bias, relu=False) == pytest.approx((1 + 16) / 13)
    assert loss(rows, weights, bias, relu=True) == pytest.approx((1 + 1) / 4)
    assert loss(rows, weights, torch.tensor([[-4.0]]), relu=True) == pytest.approx(1)
    zeros = Rows(x, np.full((1, 2, 1), -1, np.float32))
    assert loss(zeros, weights, bias, relu=True) == pytest.approx(2)
