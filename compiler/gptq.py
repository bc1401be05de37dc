"""GPTQ: rounds a weight column by column, and lets the columns to come make up for each error.

Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: accurate post-training
quantization for generative pre-trained transformers" (arXiv 2210.17323). Columns go by falling
energy of their input; grids are fixed beforehand, so any granularity takes that order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import DataError

Doubles = npt.NDArray[np.float64]

BLOCK = 128  # columns whose errors are spread together; changes speed, not the result
DAMPING = 0.01  # of the mean energy, added to every column's

# (values [rows] of one column, its number) -> the nearest values that can be stored
RoundColumn = Callable[[Doubles, int], Doubles]


@dataclass(frozen=True)
class Curvature:
    """How errors of a layer's columns act on its outputs, in the order of rounding.

    Attributes:
        order: Column numbers by falling energy.
        dead: Whether a column, by its own number, meets zeros alone.
        factor: Upper triangular U with inverse(E[x x^T]) = U^T U, in that order.
    """

    order: npt.NDArray[np.intp]
    dead: npt.NDArray[np.bool_]
    factor: Doubles

    @classmethod
    def of(cls, covariance: Doubles) -> Curvature:
        """Return the curvature of E[x x^T], [columns, columns].

        Raises:
            DataError: It is not finite.
        """
        if not np.isfinite(covariance).all():
            raise DataError("the covariance of a layer's input is not finite; look at the feeds")
        energy = np.diagonal(covariance)
        dead = energy <= 0
        order = np.argsort(-energy, kind="stable")
        alive = covariance + np.diag(dead * (energy.max() or 1.0))
        return cls(order, dead, _inverse_factor(alive[np.ix_(order, order)]))


def gptq(
    weights: npt.NDArray[np.floating],
    curvature: Curvature,
    rounded: RoundColumn,
    block: int = BLOCK,
) -> Doubles:
    """Return weights that can be stored and keep the layer's outputs, [rows, columns].

    Args:
        weights: A row an output channel.
        curvature: Of what the columns meet.
        rounded: Rounds one column to its grid.
        block: Columns that are worked on at once.
    """
    columns = weights.shape[1]
    factor, order = curvature.factor, curvature.order
    left = np.where(curvature.dead, 0.0, weights.astype(np.float64))[:, order]
    found = np.empty_like(left)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = np.empty((len(weights), stop - start))
        for j in range(start, stop):
            found[:, j] = rounded(left[:, j], int(order[j]))
            errors[:, j - start] = (left[:, j] - found[:, j]) / factor[j, j]
            left[:, j:stop] -= np.outer(errors[:, j - start], factor[j, j:stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    back = np.empty(weights.shape)
    back[:, order] = found
    return back


def _inverse_factor(covariance: Doubles) -> Doubles:
    """Return the upper triangular U with inverse(covariance) = U^T U, damped until it exists."""
    from scipy.linalg import cholesky
    from scipy.linalg.lapack import dpotri

    mean = float(np.diagonal(covariance).mean())
    share = DAMPING
    while True:
        damped = covariance + np.eye(len(covariance)) * (share * mean)
        try:
            lower = cholesky(damped, lower=True)
            inverse, _ = dpotri(lower, lower=1)
            # dpotri writes the lower triangle alone.
            return np.asarray(cholesky(np.tril(inverse) + np.tril(inverse, -1).T))
        except np.linalg.LinAlgError:
            share *= 10
