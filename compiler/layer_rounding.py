"""Rounds one layer's weight so that the layer's outputs stay, by its inputs' second moments.

With x what the layer reads and y what it reads in the float model, codes q are chosen to make
E|W y - q x|^2 small. The weight that would be best if it needed no rounding is W E[yx'] E[xx']^-1;
errors against that one count by E[xx'] alone. It is followed as far as held-out samples say that
it helps. Where a layer has a bias, moments are taken about means, and the bias makes up for what
is left. Sources: GPTQ (arXiv 2210.17323); the float model's inputs as the target, as in GPTAQ
(arXiv 2504.02692); coordinate descent on codes as in CDQuant (arXiv 2406.17542).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .biases import Bias
from .covariance import Moments
from .gptq import BLOCK, DAMPING, Curvature, Doubles, gptq
from .grids import Grid
from .layers import Met

SHARES = np.arange(1.0, 0.29, -0.05)  # of a group's range, tried for its scale
PULLS = (0.01, 0.1, 1.0)  # towards the weight as it was, in mean energies of a column
SWEEPS = 2  # of coordinate descent over all columns


@dataclass(frozen=True)
class Fit:
    """What some rows are rounded to.

    Attributes:
        weights: The weight that would be best if it needed no rounding, [rows, columns].
        energy: E[xx'], damped: how errors of columns count together, [columns, columns].
        curvature: The same for GPTQ.
        followed: How far the weight went from the one as it was, 0 to 1.
    """

    weights: Doubles
    energy: Doubles
    curvature: Curvature
    followed: float

    @classmethod
    def of(cls, weights: Doubles, own: Moments, folds: tuple[Moments, Moments] | None) -> Fit:
        """Return what to round to.

        Args:
            weights: The rows as they were, float64.
            own: Moments of all samples.
            folds: Of those to learn from and of those held out; they tell how far the float
                model's inputs are followed. None follows not at all.
        """
        damped = own.xx + DAMPING * _mean_energy(own.xx) * np.eye(len(own.xx))
        best, share = weights, 0.0
        if folds is not None:
            best, share = _followed(weights, own, *folds)
        return cls(best, damped, Curvature.of(own.xx), share)

    def errors(self, values: Doubles) -> Doubles:
        """Return the error that each row makes at its output, squared, [rows]."""
        miss = self.weights - values
        return np.asarray(np.einsum("rc,rc->r", miss @ self.energy, miss))


def _mean_energy(energy: Doubles) -> float:
    """Return the mean energy of a column; 1 where all are dead."""
    return float(np.diagonal(energy).mean()) or 1.0


def _followed(
    weights: Doubles, own: Moments, learn: Moments, held: Moments
) -> tuple[Doubles, float]:
    """Return the best weight, and how far held-out samples say that it should be followed."""
    gap = weights @ (held.yx - held.xx)  # downhill on held-out samples
    gains: list[tuple[float, float, float]] = []
    for pull in PULLS:
        step = _step(weights, learn, pull)
        along = float(np.vdot(gap, step))
        square = float(np.vdot(step @ held.xx, step))
        if along <= 0 or square <= 0:
            continue
        share = min(along / square, 1.0)
        gains.append((2 * share * along - share**2 * square, share, pull))
    if not gains:
        return weights, 0.0
    _, share, pull = max(gains)
    return weights + share * _step(weights, own, pull), share


def _step(weights: Doubles, moments: Moments, pull: float) -> Doubles:
    """Return how the best weight differs from the one as it was."""
    from scipy.linalg import cho_factor, cho_solve

    kept = moments.xx + pull * _mean_energy(moments.xx) * np.eye(len(moments.xx))
    gap = weights @ (moments.yx - moments.xx)
    return np.asarray(cho_solve(cho_factor(kept), gap.T).T)


def solve(fit: Fit, grid: Grid, rounds: int, search: bool) -> tuple[Doubles, Grid]:
    """Return codes [rows, columns] and the grid whose scales may have been fitted to them.

    Args:
        fit: What is rounded to.
        grid: The grid that the format asks for.
        rounds: How often scales and codes are fitted to each other in turn.
        search: Whether scales are searched for at the start.

    Scales that rows share stay as they are.
    """
    if not grid.by_row:
        return _coded(fit, grid), grid
    if search:
        grid = _searched(fit, grid)
    codes = _coded(fit, grid)
    errors = fit.errors(grid.floats(codes))
    for _ in range(rounds):
        trial = _refitted(fit, grid, codes)
        for found in (_coded(fit, trial), _descended(fit, trial, codes)):
            made = fit.errors(trial.floats(found))
            better = made < errors
            scale = np.where(better[:, None], trial.scale, grid.scale)
            codes = np.where(better[:, None], found, codes)
            grid, errors = replace(grid, scale=scale), np.minimum(errors, made)
    return codes, grid


def _coded(fit: Fit, grid: Grid) -> Doubles:
    """Return codes by GPTQ and coordinate descent behind it."""
    floats = gptq(fit.weights, fit.curvature, grid.column)
    return _descended(fit, grid, np.rint(floats / grid.scale) + grid.shift)


def _descended(fit: Fit, grid: Grid, codes: Doubles) -> Doubles:
    """Return codes of which none can be changed alone to lessen the error, or few."""
    codes, energy = codes.copy(), np.diagonal(fit.energy)
    columns = codes.shape[1]
    for _ in range(SWEEPS):
        before = codes.copy()
        slope = (grid.floats(codes) - fit.weights) @ fit.energy
        for start in range(0, columns, BLOCK):
            part = slice(start, min(start + BLOCK, columns))
            moved = np.zeros((len(codes), part.stop - start))
            near = slope[:, part]
            for j in range(part.stop - start):
                at = start + j
                now = grid.scale[:, at] * (codes[:, at] - grid.shift[:, at])
                found = grid.nearest(now - near[:, j] / energy[at], at)
                moved[:, j] = (found - codes[:, at]) * grid.scale[:, at]
                codes[:, at] = found
                near += np.outer(moved[:, j], fit.energy[at, part])
            slope[:, part.stop :] += moved @ fit.energy[part, part.stop :]
        if np.array_equal(codes, before):
            break
    return codes


def _searched(fit: Fit, grid: Grid) -> Grid:
    """Return the grid with the share of each scale that nearest rounding does best with."""
    chosen = least = None
    for share in SHARES:
        trial = grid.scaled(grid.scale * share)
        miss = fit.weights - trial.floats(trial.codes(fit.weights))
        made = _by_owner(fit, grid, miss)
        if least is None or chosen is None:
            least, chosen = made, np.full(len(made), share)
            continue
        chosen = np.where(made < least, share, chosen)
        least = np.minimum(made, least)
    assert chosen is not None
    return grid.scaled(grid.scale * chosen[grid.local])


def _by_owner(fit: Fit, grid: Grid, miss: Doubles) -> Doubles:
    """Return the error that the columns of each scale make at the output among themselves."""
    each = np.empty_like(miss)
    for columns in grid.blocks():
        part = miss[:, columns]
        each[:, columns] = (part @ fit.energy[np.ix_(columns, columns)]) * part
    return np.asarray(np.bincount(grid.local.ravel(), each.ravel()), np.float64)


def _refitted(fit: Fit, grid: Grid, codes: Doubles) -> Grid:
    """Return the grid with the scales that are best for these codes."""
    steps, blocks = codes - grid.shift, list(grid.blocks())
    pull = fit.weights @ fit.energy
    right = np.stack([(pull[:, b] * steps[:, b]).sum(1) for b in blocks], axis=1)
    left = np.empty((len(codes), len(blocks), len(blocks)))
    for i, block in enumerate(blocks):
        met = steps[:, block] @ fit.energy[block]
        left[:, i] = np.stack([(met[:, b] * steps[:, b]).sum(1) for b in blocks], axis=1)
    # Codes that are all zero tell no scale.
    small = 1e-12 * np.trace(left, axis1=1, axis2=2).clip(1e-30)
    found = np.linalg.solve(left + small[:, None, None] * np.eye(len(blocks)), right[..., None])
    scale = grid.scale.copy()
    for i, block in enumerate(blocks):
        old, new = grid.scale[:, block[0]], found[:, i, 0]
        kept = np.where((new > 0.5 * old) & (new < 2 * old), new, old)
        scale[:, block] = kept[:, None]
    return grid.scaled(scale)


def rounded_layer(
    met: Met, grid: Grid, follow: bool, rounds: int, search: bool, blind: bool = False
) -> tuple[Doubles, Grid, Doubles]:
    """Return a layer's codes, their grid, and what its bias should gain for them, [rows].

    Args:
        met: The layer and what it met.
        grid: The grid of its format, [rows, columns].
        follow: Whether the float model's inputs are followed.
        rounds: See `solve`.
        search: See `solve`.
        blind: Whether nothing is taken from samples that are held out.
    """
    weights = met.layer.rows()
    centred = Bias.of(met.layer.reader) is not None
    both = met.learn if blind else met.learn.plus(met.held)
    folds = follow and met.held.count > 0
    codes, scale, delta = np.empty_like(weights), grid.scale.copy(), np.zeros(len(weights))
    for group, rows in _parts(len(weights), met.layer.meeting.groups):
        own = both.moments(group, centred)
        learn, held = (one.moments(group, centred) for one in (met.learn, met.held))
        fit = Fit.of(weights[rows], own, (learn, held) if folds else None)
        codes[rows], found = solve(fit, grid.part(rows), rounds, search)
        scale[rows] = found.scale
        delta[rows] = weights[rows] @ own.y - found.floats(codes[rows]) @ own.x
    return codes, replace(grid, scale=scale), delta if centred else np.zeros(0)


def _parts(rows: int, groups: int) -> Iterator[tuple[int, slice]]:
    """Yield (group, its rows) of a weight."""
    each = rows // groups
    yield from ((group, slice(group * each, (group + 1) * each)) for group in range(groups))
