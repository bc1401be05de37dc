"""Orthogonal matrices that spread what lies in few channels over all of them.

Where a Hadamard matrix of the width is known (2^k, or 12, 20, 28, 36, 44, 60 and other orders of
Paley times 2^k), rows get seeded signs and every element is +-1/sqrt(width). For any other width
the matrix is drawn from all orthogonal ones; it is multiplied into weights, so that it has no
structure costs nothing.
Source: S. Ashkboos et al., QuaRot (arXiv 2404.00456), section 3; R. Paley, "On orthogonal
matrices" (1933).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def rotation(width: int, seed: int, keeps_mean: bool = False) -> Doubles:
    """Return an orthogonal matrix R, [width, width]; rows x are rotated as x R.

    Args:
        width: Channels.
        seed: Seed, 0 or more.
        keeps_mean: Whether R has to map the vector of ones to itself, so that a LayerNormalization
            subtracts the same mean before and after: normalized(x) R = normalized(x R).
    """
    draw = np.random.default_rng((seed, width))
    flat = hadamard(width)
    if flat is None:
        matrix = _drawn(width, draw)
    else:
        matrix = flat * draw.choice([-1.0, 1.0], (width, 1)) / math.sqrt(width)
    return _kept_mean(matrix) if keeps_mean else matrix


def hadamard(width: int) -> Doubles | None:
    """Return a matrix of +-1 with orthogonal rows, [width, width], or None if none is known here.

    It is the Kronecker product of a power of two and the smallest order of Paley that fits.
    """
    order = width
    while order % 2 == 0:
        order //= 2
    while width % order == 0:
        core = _paley(order)
        if core is not None:
            from scipy.linalg import hadamard as of_power

            return np.kron(of_power(width // order).astype(np.float64), core)
        order *= 2
    return None


def _paley(order: int) -> Doubles | None:
    """Return a Hadamard matrix of that order by Paley's constructions over primes, or None."""
    if order == 1:
        return np.ones((1, 1))
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        skew = _bordered(order - 1, -1.0)
        return np.eye(order) + skew
    half = order // 2
    if order % 4 == 0 and _is_prime(half - 1) and (half - 1) % 4 == 1:
        symmetric = _bordered(half - 1, 1.0)
        other = np.array([[1.0, 1.0], [1.0, -1.0]])
        own = np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(symmetric, other) + np.kron(np.eye(half), own)
    return None


def _bordered(prime: int, left: float) -> Doubles:
    """Return which differences i - j are squares modulo a prime (+-1), within a border of ones."""
    character = np.full(prime, -1.0)
    character[np.arange(prime) ** 2 % prime] = 1.0
    character[0] = 0.0
    numbers = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    matrix[0, 1:], matrix[1:, 0] = 1.0, left
    return matrix


def _is_prime(number: int) -> bool:
    """Whether a number is a prime."""
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def _drawn(width: int, draw: np.random.Generator) -> Doubles:
    """Return an orthogonal matrix drawn uniformly from all of them."""
    matrix, triangle = np.linalg.qr(draw.standard_normal((width, width)))
    signs = np.where(np.diagonal(triangle) < 0, -1.0, 1.0)
    return np.asarray(matrix * signs)


def _kept_mean(matrix: Doubles) -> Doubles:
    """Return the matrix behind a reflection that takes the image of ones back to ones."""
    target = np.full(len(matrix), 1 / math.sqrt(len(matrix)))
    axis = target @ matrix - target
    length = axis @ axis
    if length < 1e-24:  # they are the same already
        return matrix
    return matrix - np.outer(matrix @ axis, axis * (2 / length))
