"""The error of one layer's outputs as a function of its codes: to learn by, and to descend on.

Everything is laid out by groups: weights [groups, rows, columns], inputs [groups, samples,
columns], outputs [groups, samples, rows]. A layer with a bias is looked at about the mean of its
input, without which the error is ill conditioned; its output at that mean is called the level.

Importing this module imports torch (the extra `torch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .layer_sample import Rows

BATCH = 1024  # rows of data a step
CHUNK = 4096  # rows of data whose outputs are held at once
HELD = 2**23  # outputs that are held while codes are moved one by one
SWEEPS = 5  # over the columns of a quadratic
CLIPPED_SWEEPS = 2  # where each column reads the rows of data
NEWTON = 4  # steps towards the best level


@dataclass(frozen=True)
class State:
    """Codes of a layer with the grid that they are on, and the layer's level.

    Attributes:
        codes: Whole numbers, float32 [groups, rows, columns].
        scale: Step of each code, likewise.
        shift: Zero point of each code, likewise.
        level: Output at the mean input, float32 [groups, rows].
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor
    level: Tensor

    @property
    def weights(self) -> Tensor:
        """What the codes stand for, float32 [groups, rows, columns]."""
        return (self.codes - self.shift) * self.scale

    @property
    def still(self) -> State:
        """The same, as a copy without gradients."""
        return State(*(getattr(self, field.name).detach().clone() for field in fields(self)))


class Objective(ABC):
    """The error of a layer's outputs on the rows that are learned from.

    Args:
        rows: What is learned from.
        biased: Whether the layer has a bias that may change.

    Attributes:
        mean: What inputs are taken about, [groups, 1, columns]; zero without a bias.
        level: Mean of the right outputs, [groups, rows]; zero without a bias.
    """

    def __init__(self, rows: Rows, biased: bool) -> None:
        x, t = torch.from_numpy(rows.x), torch.from_numpy(rows.t)
        self.biased = biased
        self.mean = x.mean(1, keepdim=True) * biased
        self.level = t.mean(1) * biased
        self.x, self.t = x - self.mean, t

    def level_of(self, bias: Tensor, state: State) -> Tensor:
        """Return the level that a bias [groups, rows] makes with these codes."""
        return bias + (self.mean @ state.weights.mT)[:, 0]

    def bias_of(self, state: State) -> Tensor:
        """Return the bias that makes a level, [groups, rows]; zero without a bias."""
        return state.level - (self.mean @ state.weights.mT)[:, 0]

    @abstractmethod
    def misses(self, weights: Tensor, level: Tensor, step: int) -> Tensor:
        """Return what has the gradient of each row's mean squared error, [groups, rows]."""

    @abstractmethod
    def slopes(self, state: State) -> Tensor:
        """Return half the gradient of the mean squared error by the weights."""

    @abstractmethod
    def stiffness(self, scale: Tensor) -> Tensor:
        """Return how a row's mean squared error grows with one code's, in the mean of its columns.

        Its shape is [groups, rows]; it is 1 where nothing grows.
        """

    @abstractmethod
    def levelled(self, state: State) -> State:
        """Return the state with the level that is best for its codes."""

    @abstractmethod
    def descended(self, state: State, least: Tensor, greatest: Tensor) -> State:
        """Return the state after moves of single codes, each of which lowers the error.

        Args:
            state: Where to start.
            least: Bounds of the codes, [groups, rows, columns].
            greatest: Likewise.
        """


class Linear(Objective):
    """A layer whose outputs are read as they are: its error is a quadratic in the weight."""

    def __init__(self, rows: Rows, biased: bool) -> None:
        super().__init__(rows, biased)
        count = self.x.shape[1]
        self._square = self.x.mT @ self.x / count
        self._cross = (self.t - self.level[:, None]).mT @ self.x / count

    def misses(self, weights: Tensor, level: Tensor, step: int) -> Tensor:
        """Return what has the gradient of the whole error; the level has none."""
        slopes = 2 * (weights.detach() @ self._square - self._cross)
        return (slopes * weights).sum(-1)

    def slopes(self, state: State) -> Tensor:
        """Return half the gradient of the mean squared error by the weights."""
        return state.weights @ self._square - self._cross

    def stiffness(self, scale: Tensor) -> Tensor:
        """Return the mean of step^2 E[x^2] over each row."""
        return _usable((scale.square() * _diagonal(self._square)[:, None]).mean(-1))

    def levelled(self, state: State) -> State:
        """Return the state with the mean of the right outputs as its level."""
        return replace(state, level=self.level)

    def descended(self, state: State, least: Tensor, greatest: Tensor) -> State:
        """Move each code to its best place while the others stay, column by column."""
        energy = _diagonal(self._square)
        codes = state.codes.clone()
        for _ in range(SWEEPS):
            slopes, before = self.slopes(replace(state, codes=codes)), codes.clone()
            for column in _order(energy):
                step = state.scale[..., column]
                steps = _quotient(slopes[..., column], energy[:, column, None] * step)
                new = (codes[..., column] - steps).round()
                new = new.clamp(least[..., column], greatest[..., column])
                change = (new - codes[..., column]) * step
                at = change.nonzero(as_tuple=True)
                slopes[at] += change[at][:, None] * self._square[at[0], column]
                codes[..., column] = new
            if torch.equal(codes, before):
                break
        return self.levelled(replace(state, codes=codes))


class Clipped(Objective):
    """A layer whose outputs a ReLU reads: where both are below zero they are alike."""

    def __init__(self, rows: Rows, biased: bool) -> None:
        super().__init__(rows, biased)
        self._active = (self.t > 0).float()
        self.t = self.t.relu()
        self._some = max(HELD // (self.t.shape[0] * self.t.shape[2]), BATCH)

    def misses(self, weights: Tensor, level: Tensor, step: int) -> Tensor:
        """Return the mean squared error over a batch of rows; the step chooses which."""
        y = _batch(self.x, step) @ weights.mT + level[:, None]
        return (y.relu() - _batch(self.t, step)).square().mean(1)

    def slopes(self, state: State) -> Tensor:
        """Return half the gradient of the mean squared error by the weights."""
        x, t = self.x[:, : self._some], self.t[:, : self._some]
        y = x @ state.weights.mT + state.level[:, None]
        return ((y.relu() - t) * (y > 0)).mT @ x / x.shape[1]

    def stiffness(self, scale: Tensor) -> Tensor:
        """Return the mean of step^2 E[x^2] over each row, over outputs above zero."""
        every = self.x.square().mean(1)[:, None]
        energy = self._active.mT @ self.x.square() / self.x.shape[1]
        # A channel that is seldom above zero must not be rounded by its penalty alone.
        return _usable((scale.square() * torch.maximum(energy, every * 1e-3)).mean(-1))

    def levelled(self, state: State) -> State:
        """Return the state with a level that no step of Newton's makes better."""
        x, t = self.x[:, : self._some], self.t[:, : self._some].mT
        y = state.weights @ x.mT + state.level[..., None]
        return replace(state, level=state.level + _lift(y, t) * self.biased)

    def descended(self, state: State, least: Tensor, greatest: Tensor) -> State:
        """Move codes by one step where that lowers the error, column by column."""
        x, t = self.x[:, : self._some].mT.contiguous(), self.t[:, : self._some].mT
        codes, level = state.codes.clone(), state.level
        for _ in range(CLIPPED_SWEEPS):
            y = replace(state, codes=codes).weights @ x + level[..., None]
            lift = _lift(y, t) * self.biased
            outputs, level, before = _Outputs(y + lift[..., None], t), level + lift, codes.clone()
            for column in _order(x.square().mean(-1)):
                step, along = state.scale[..., column], x[:, column]
                slope, energy = outputs.along(along)
                steps = _quotient(slope, energy * step).round().clamp(-1, 1)
                new = (codes[..., column] - steps).clamp(least[..., column], greatest[..., column])
                change = (new - codes[..., column]) * step
                codes[..., column] = torch.where(
                    outputs.move(change, along), new, codes[..., column]
                )
            if torch.equal(codes, before):
                break
        return self.levelled(replace(state, codes=codes, level=level))


class _Outputs:
    """Outputs before a ReLU, [groups, rows, samples], and how far they miss the right ones."""

    def __init__(self, y: Tensor, t: Tensor) -> None:
        self._y, self._t = y, t
        self._active = (y > 0).float()
        self._miss = y.relu() - t
        self._error = self._miss.square().sum(-1)

    def along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return slope and curvature of the error, [groups, rows], along inputs of a column."""
        slope = (self._miss * self._active) @ x[..., None]
        return slope[..., 0], (self._active @ x.square()[..., None])[..., 0]

    def move(self, change: Tensor, x: Tensor) -> Tensor:
        """Change the weight of a column where that lowers the error; return where it did.

        Args:
            change: Of each row's weight, [groups, rows]; zero for none.
            x: Inputs of the column, [groups, samples].
        """
        at = change.nonzero(as_tuple=True)
        y = self._y[at] + change[at][:, None] * x[at[0]]
        miss = y.relu() - self._t[at]
        error = miss.square().sum(-1)
        lower = error < self._error[at]
        moved = torch.zeros_like(change, dtype=torch.bool)
        moved[at] = lower
        at = (at[0][lower], at[1][lower])
        self._y[at], self._miss[at], self._error[at] = y[lower], miss[lower], error[lower]
        self._active[at] = (y[lower] > 0).float()
        return moved


def loss(rows: Rows, weights: Tensor, bias: Tensor, relu: bool) -> float:
    """Return the squared error of the outputs over the square of the right ones, if not all zero.

    Args:
        rows: What it is measured on.
        weights: float32 [groups, rows, columns].
        bias: float32 [groups, rows].
        relu: Whether both are clipped at zero first.
    """
    x, right = torch.from_numpy(rows.x), torch.from_numpy(rows.t)
    wrong, whole = 0.0, 0.0
    for start in range(0, x.shape[1], CHUNK):
        y = x[:, start : start + CHUNK] @ weights.mT + bias[:, None]
        t = right[:, start : start + CHUNK]
        y, t = (y.relu(), t.relu()) if relu else (y, t)
        wrong += float((y - t).square().sum(dtype=torch.float64))
        whole += float(t.square().sum(dtype=torch.float64))
    return wrong / whole if whole else wrong


def _batch(values: Tensor, step: int) -> Tensor:
    """Return the rows of data [groups, rows, ...] of a step, which go round and round."""
    count = values.shape[1]
    size = min(BATCH, count)
    start = step * size % count
    found = values[:, start : start + size]
    missing = size - found.shape[1]
    return torch.cat([found, values[:, :missing]], 1) if missing else found


def _lift(y: Tensor, t: Tensor) -> Tensor:
    """Return what to add to outputs [groups, rows, samples] so that a ReLU's come nearest to t."""
    lift = torch.zeros_like(y[..., 0])
    error = (y.relu() - t).square().sum(-1)
    for _ in range(NEWTON):
        now = y + lift[..., None]
        active = now > 0
        step = ((now - t) * active).sum(-1) / active.sum(-1).clamp(min=1)
        trial = ((now - step[..., None]).relu() - t).square().sum(-1)
        lift = torch.where(trial < error, lift - step, lift)
        error = torch.minimum(error, trial)
    return lift


def _order(energy: Tensor) -> list[int]:
    """Return the columns by falling energy, [groups, columns]."""
    order: list[int] = torch.argsort(energy.mean(0), descending=True, stable=True).tolist()
    return order


def _quotient(slope: Tensor, energy: Tensor) -> Tensor:
    """Return how far to go; nowhere along what is always zero."""
    return torch.where(energy > 0, slope / energy, 0.0)


def _diagonal(square: Tensor) -> Tensor:
    return square.diagonal(dim1=-2, dim2=-1)


def _usable(stiffness: Tensor) -> Tensor:
    """Return it with ones for zeros, so that it can divide."""
    return torch.where(stiffness > 0, stiffness, 1.0)
