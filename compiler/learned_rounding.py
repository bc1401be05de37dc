"""Learns how one layer's weight is rounded, by gradients of the error of the layer's outputs.

adaround: each code is one of two neighbours; which one is a soft choice that a penalty hardens.
    Source: M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos, T. Blankevoort, "Up or down? Adaptive
    rounding for post-training quantization" (arXiv 2004.10568).
adaquant: weights move freely and so do scales and zero points; gradients pass through the rounding
    as if it were not there. Source: I. Hubara, Y. Nahshan, Y. Hanani, R. Banner, D. Soudry,
    "Improving post training neural quantization" (arXiv 2006.10518).

Both learn the bias too, see errors behind the ReLU where one follows, and end with moves of single
codes. Rates and the penalty are in steps of the grid and in units of the outputs, so that they fit
any layer. Importing this module imports torch (the extra `torch`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grids import Grid
from .layer_sample import Rows, Sample
from .layer_torch import Clipped, Linear, Objective, State, loss
from .quantizers import Floats

Doubles = npt.NDArray[np.float64]
Method = Literal["adaround", "adaquant"]

STEPS = 1000
CHECKS = 10  # looks at the held-out samples on the way

LEVEL_RATE = 1e-2  # of the outputs' root mean square

STRETCH = (-0.1, 1.1)  # the sigmoid's ends, before it is clipped to 0 and 1
LEANING = 0.25  # the share of a given code's neighbour at the start
PENALTY = 1.0  # of a choice halfway, in errors of one step
WARM_UP = 0.2  # of the steps, without the penalty
FLATNESS = (20.0, 2.0)  # the penalty's exponent, from first to last
CHOICE_RATE = 0.05

MOVE_RATE = 4e-3  # steps of the grid
CENTRING = 0.45  # steps: how far a weight lies from its given code at most
SCALE_RATE = 2e-3  # of the scale at the start
SCALES = (0.5, 2.0)  # likewise
ZERO_RATE = 1e-2  # codes


@dataclass(frozen=True)
class Learned:
    """How a layer's weight is rounded.

    Attributes:
        codes: Whole numbers, [rows, columns].
        grid: What they are on; adaround leaves it as it was.
        bias: The bias that goes with them, float32 [rows]; None where the layer has none.
        before: Squared error of the outputs over the square of the right ones, on samples held
            out, with the codes and the bias of the start.
        after: The same with these.
    """

    codes: Doubles
    grid: Grid
    bias: Floats | None
    before: float
    after: float


def learn(
    grid: Grid,
    sample: Sample,
    method: Method,
    *,
    relu: bool = False,
    codes: Doubles | None = None,
    steps: int = STEPS,
) -> Learned:
    """Return the codes that keep a layer's outputs best on samples that are held out.

    They are never worse than those at the start. The same arguments give the same numbers.

    Args:
        grid: What the codes are on.
        sample: The layer, and rows of what it reads.
        method: `adaround`: a code becomes the one below or above its weight; or, where codes are
            given, it stays or becomes the neighbour that lowers the error. `adaquant`: any code,
            on scales from half to twice the grid's.
        relu: Whether a ReLU reads the layer's output, and nothing else does.
        codes: Where to start, on the grid, [rows, columns]; None starts from the nearest.
        steps: Steps of gradient descent.

    Raises:
        DataError: The sample is empty.
    """
    known, held = sample.split()
    biased = sample.bias is not None
    start = _Start.of(grid, sample, codes, Linear(known, biased))
    search = _Search(held, relu, start)
    before = search.error
    run = _adaround if method == "adaround" else _adaquant
    with torch.enable_grad():
        search.through(run(start, steps))
        if relu:  # The quadratic is fast and well conditioned; what a ReLU hides comes behind it.
            objective = Clipped(known, biased)
            start = replace(start, objective=objective, state=search.best, fresh=False)
            search.through(run(start, steps))
    return search.learned(grid, sample.bias, before)


@dataclass(frozen=True)
class _Start:
    """Where learning starts, laid out by groups.

    Attributes:
        objective: The error on the rows that are learned from.
        state: The codes.
        fresh: Whether the codes are only the nearest ones, and weights say more.
        weights: The float weights.
        least: What adaround's codes may be at least.
        greatest: What they may be at most.
        owner: Which scale an element has, numbered from zero.
        limits: The least and the greatest code.
        scales: What adaquant's scales may be at least and at most.
    """

    objective: Objective
    state: State
    fresh: bool
    weights: Tensor
    least: Tensor
    greatest: Tensor
    owner: Tensor
    limits: tuple[int, int]
    scales: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, grid: Grid, sample: Sample, codes: Doubles | None, objective: Objective) -> _Start:
        """Lay out what a layer has."""

        def grouped(array: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.array(array)).reshape(*objective.level.shape, -1)

        exact = sample.weights / grid.scale + grid.shift
        sides = np.floor(exact), np.ceil(exact)
        if codes is not None:
            sides = codes - 1, codes + 1
        least, greatest = (grouped(np.clip(side, *grid.limits)).float() for side in sides)
        nearest = grid.codes(np.asarray(sample.weights, np.float64))
        state = State(
            grouped(nearest if codes is None else codes).float(),
            grouped(grid.scale).float(),
            grouped(grid.shift).float(),
            torch.zeros_like(objective.level),
        )
        if sample.bias is not None:
            state = replace(state, level=objective.level_of(grouped(sample.bias)[..., 0], state))
        smallest, largest = (share * state.scale for share in SCALES)
        return cls(
            objective,
            state,
            codes is None,
            grouped(sample.weights),
            least,
            greatest,
            grouped(grid.local),
            grid.limits,
            (smallest.maximum(grouped(grid.least).float()), largest),
        )

    @property
    def exact(self) -> Tensor:
        """The float weights in codes, before rounding."""
        return self.weights / self.state.scale + self.state.shift


class _Search:
    """The state with the least error on rows that are held out."""

    def __init__(self, held: Rows, relu: bool, start: _Start) -> None:
        self._held, self._relu, self._start = held, relu, start
        self.best, self.error = start.state, self._of(start.state)

    def through(self, states: Iterable[State]) -> None:
        """Look at states."""
        for state in states:
            error = self._of(state)
            if error < self.error:
                self.best, self.error = state, error

    def learned(self, grid: Grid, bias: Floats | None, before: float) -> Learned:
        """Return the best state; what did not change is what was given."""
        first, best = self._start.state, self.best
        if best.scale is not first.scale:
            grid = replace(grid, scale=_matrix(best.scale), shift=_matrix(best.shift))
        if best is not first and bias is not None:
            bias = self._start.objective.bias_of(best).flatten().numpy()
        return Learned(_matrix(best.codes), grid, bias, before, self.error)

    def _of(self, state: State) -> float:
        bias = self._start.objective.bias_of(state)
        return loss(self._held, state.weights, bias, self._relu)


def _matrix(array: Tensor) -> Doubles:
    """Return [groups, rows, columns] as [groups * rows, columns]."""
    return np.asarray(array.flatten(0, 1).numpy(), np.float64)


def _adaround(start: _Start, steps: int) -> Iterator[State]:
    """Yield states on the way; see `learn`."""
    objective, first = start.objective, start.objective.levelled(start.state)
    yield first
    yield objective.descended(first, start.least, start.greatest)
    low, high = STRETCH
    least, greatest, share = _neighbours(start)
    choice = torch.logit((share.clamp(0.01, 0.99) - low) / (high - low)).requires_grad_()
    level = first.level.clone().requires_grad_()
    optimizer = _adam([(choice, CHOICE_RATE)], objective, level)
    stiffness = objective.stiffness(first.scale)

    def hardened() -> State:
        codes = torch.where(choice.detach() > 0, greatest, least)
        return replace(first, codes=codes, level=level.detach())

    for step in range(steps):
        soft = (torch.sigmoid(choice) * (high - low) + low).clamp(0, 1)
        state = replace(first, codes=least + soft * (greatest - least), level=level)
        error = (objective.misses(state.weights, level, step) / stiffness).sum()
        if step >= WARM_UP * steps:
            error = error + PENALTY * (1 - (2 * soft - 1).abs() ** _flatness(step / steps)).sum()
        _step(optimizer, error)
        if _is_due(step, steps):
            yield objective.levelled(hardened())
    yield objective.descended(hardened(), start.least, start.greatest)


def _neighbours(start: _Start) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two codes that each may become, and the share of the greater at the start."""
    if start.fresh:
        return start.least, start.greatest, start.exact - start.exact.floor()
    codes = start.state.codes
    falls = start.objective.slopes(start.objective.levelled(start.state)) > 0
    least = torch.where(falls, codes - 1, codes).minimum(start.greatest - 1).maximum(start.least)
    share = torch.where(codes > least, 1 - LEANING, LEANING)
    return least, (least + 1).minimum(start.greatest), share


def _flatness(progress: float) -> float:
    """Return the penalty's exponent: flat at first, so that only codes near the ends are held."""
    first, last = FLATNESS
    done = (progress - WARM_UP) / (1 - WARM_UP)
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def _adaquant(start: _Start, steps: int) -> Iterator[State]:
    """Yield states on the way; see `learn`."""
    objective, first = start.objective, start.objective.levelled(start.state)
    yield first
    bounds = [torch.full_like(first.codes, limit) for limit in start.limits]
    yield objective.descended(first, *bounds)
    moved = _Moved(start, first)
    optimizer = _adam(moved.rates, objective, moved.level)
    rates = [group["lr"] for group in optimizer.param_groups]
    stiffness = objective.stiffness(first.scale)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        state = moved.state()
        _step(optimizer, (objective.misses(state.weights, state.level, step) / stiffness).sum())
        if _is_due(step, steps):
            yield objective.levelled(moved.state().still)
    yield objective.descended(moved.state().still, *bounds)


class _Moved:
    """Weights, scales, zero points and the level as what is learned."""

    def __init__(self, start: _Start, first: State) -> None:
        self._start, self._first = start, first
        exact, codes = start.exact, first.codes
        if not start.fresh:
            exact = codes + (exact - codes).clamp(-CENTRING, CENTRING)
        owners = int(start.owner.max()) + 1
        self._exact = (exact - first.shift).requires_grad_()
        self._factor = torch.ones(owners, requires_grad=True)
        self._zero = torch.zeros(owners, requires_grad=True)
        self.level = first.level.clone().requires_grad_()
        self.rates = [(self._exact, MOVE_RATE), (self._factor, SCALE_RATE)]
        # A signed format's zero point is zero.
        if start.limits[0] == 0:
            self.rates.append((self._zero, ZERO_RATE))

    def state(self) -> State:
        """Return what they stand for, with gradients that pass through rounding."""
        limits, before = self._start.limits, self._first.scale
        scale = (before * self._spread(self._factor)).clamp(*self._start.scales)
        shift = _through(self._first.shift + self._spread(self._zero)).clamp(*limits)
        codes = _through(self._exact * (before / scale) + shift).clamp(*limits)
        return State(codes, scale, shift, self.level)

    def _spread(self, stored: Tensor) -> Tensor:
        owner = self._start.owner
        return stored.index_select(0, owner.flatten()).reshape(owner.shape)


def _through(values: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return values + (values.round() - values).detach()


def _adam(
    rates: Sequence[tuple[Tensor, float]], objective: Objective, level: Tensor
) -> torch.optim.Adam:
    """Return the optimizer of what is learned; of the level too where there is a bias."""
    size = float(objective.t.square().mean().sqrt())
    every = [*rates, (level, LEVEL_RATE * size)] if objective.biased else rates
    return torch.optim.Adam([{"params": [one], "lr": rate} for one, rate in every])


def _step(optimizer: torch.optim.Optimizer, error: Tensor) -> None:
    optimizer.zero_grad()
    error.backward()
    optimizer.step()


def _is_due(step: int, steps: int) -> bool:
    """Whether the held-out samples are looked at after a step; after the last they always are."""
    return (step + 1) * CHECKS // steps > step * CHECKS // steps
