"""What a rounded layer's outputs lack in the mean and in their spread, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .covariance import Sums

Doubles = npt.NDArray[np.float64]
Spread = Literal["none", "least-squares", "variance"]


@dataclass(frozen=True)
class Outputs:
    """Moments of each output channel: t of the float layer, z of the rounded one, no biases.

    Attributes:
        t: E[t], [rows].
        z: E[z].
        tz: cov(t, z).
        zz: var(z).
        tt: var(t); None where it was not asked for.
    """

    t: Doubles
    z: Doubles
    tz: Doubles
    zz: Doubles
    tt: Doubles | None

    @classmethod
    def of(cls, floats: Doubles, rounded: Doubles, sums: Sums) -> Outputs:
        """Return the moments that weights [rows, columns] make of what their layer met."""
        groups = sums.meeting.groups
        parts = zip(np.split(floats, groups), np.split(rounded, groups), strict=True)
        found = []
        for group, (weights, codes) in enumerate(parts):
            met = sums.moments(group, centred=True)
            tz = ((weights @ met.yx) * codes).sum(1)
            zz = ((codes @ met.xx) * codes).sum(1)
            tt = ((weights @ met.yy) * weights).sum(1) if met.yy is not None else np.zeros(0)
            found.append((weights @ met.y, codes @ met.x, tz, zz, tt))
        t, z, tz, zz, tt = (np.concatenate(one) for one in zip(*found, strict=True))
        return cls(t, z, tz, zz, tt if tt.size else None)

    def factors(self, spread: Spread) -> Doubles:
        """Return by what each channel's scale should be multiplied; 1 where nothing tells."""
        ones = np.ones_like(self.t)
        over = np.maximum(self.zz, np.finfo(np.float64).tiny)
        if spread == "least-squares":
            wanted = self.tz / over
        elif spread == "variance":
            assert self.tt is not None
            wanted = np.sqrt(self.tt / over)
        else:
            return ones
        # A channel that is constant, or runs against the float one, has no scale to learn.
        return np.where((wanted > 0.5) & (wanted < 2.0), wanted, ones)

    def gap(self, factors: Doubles) -> Doubles:
        """Return how far the means are apart when scales have these factors."""
        return self.t - factors * self.z

    def error(self, factors: Doubles, delta: Doubles) -> float:
        """Return the squared error of the outputs, up to what no correction changes."""
        spread = factors**2 * self.zz - 2 * factors * self.tz
        return float((spread + (self.gap(factors) - delta) ** 2).sum())
