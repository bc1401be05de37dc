"""Streaming statistics of one value, and the range that a quantizer should keep of it.

The histogram lies on a lattice whose bin width is a power of two. When a value falls outside, the
width doubles and neighbouring bins merge; since floor(floor(x / w) / 2) = floor(x / 2w), the
result is exactly that of a histogram which knew the final width from the start. So memory is
constant, one pass is enough, and neither the order of the data nor its split into batches changes
a single count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import DataError
from .formats import Format
from .quantizers import affine_parameters

HALF = 2048  # bins on each side of zero; 8 to 16 of them in one step of an 8-bit quantizer

# Beyond this a value is a mask ("minus infinity" before a softmax), not a signal. Attention masks
# are made of -3.4e38, -1e9, or -65504 in float16; no activation of a sound network comes near.
MASK = 3e4

Method = Literal["minmax", "percentile", "entropy", "mse"]
Doubles = npt.NDArray[np.float64]


@dataclass
class Histogram:
    """Counts of a value's elements on the lattice, with exact extremes and moments.

    Attributes:
        exponent: log2 of the bin width; None before the first non-zero element.
        counts: int64 [2 * HALF]; bin i holds [(i - HALF) * width, (i - HALF + 1) * width).
        low: Least element that is not a mask.
        high: Greatest element that is not a mask.
        count: Elements that are not masks.
        zeros: Elements that are exactly zero (ReLU, padding); any quantizer keeps them exact.
        masked: Elements beyond `MASK` in magnitude.
    """

    exponent: int | None = None
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * HALF, np.int64))
    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    zeros: int = 0
    masked: int = 0

    def add(self, array: npt.NDArray[Any], name: str) -> None:
        """Count every element.

        Raises:
            DataError: The array holds NaN.
        """
        x = np.asarray(array, np.float32).ravel()
        low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
        if np.isnan(low) or np.isnan(high):
            raise DataError(
                f"the activation {name!r} is NaN on the given feeds; check feeds and model"
            )
        if low < -MASK or high > MASK:
            keep = np.abs(x) <= MASK
            self.masked += int(x.size - keep.sum())
            x = x[keep]
            low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
        if not x.size:
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.count += x.size
        self.zeros += int(x.size - np.count_nonzero(x))
        self._widen(max(abs(low), abs(high)))
        self._count(x)

    def _widen(self, magnitude: float) -> None:
        """Grow the bin width until the magnitude is inside."""
        if magnitude == 0:
            return
        # frexp: magnitude < 2**e; HALF bins of 2**(e - log2 HALF) reach exactly that far.
        needed = int(np.frexp(magnitude)[1]) - (HALF.bit_length() - 1)
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[HALF // 2 : HALF // 2 + HALF] = merged
            self.exponent += 1

    def _count(self, x: npt.NDArray[np.float32]) -> None:
        """Add elements that lie inside the lattice."""
        if self.exponent is None:  # nothing but zeros so far
            self.counts[HALF] += x.size
            return
        index = np.floor(np.ldexp(x.astype(np.float64), -self.exponent)).astype(np.int64)
        self.counts += np.bincount(index + HALF, minlength=2 * HALF)

    def cells(self) -> tuple[Doubles, Doubles]:
        """Return the centres of the non-empty bins and the share of elements in each."""
        counts = self.counts.copy()
        counts[HALF] -= self.zeros
        used = np.flatnonzero(counts)
        centres = np.clip((used - HALF + 0.5) * 2.0 ** (self.exponent or 0), self.low, self.high)
        at = int(np.searchsorted(centres, 0.0))
        centres = np.insert(centres, at, 0.0)  # a bin's centre would move what is exactly zero
        share = np.insert(counts[used], at, self.zeros) / max(self.count, 1)
        return centres[share > 0], share[share > 0]

    def range(
        self, method: Method, format: Format, percentile: float = 99.999
    ) -> tuple[float, float]:
        """Return the range (low, high) to keep, containing zero.

        `minmax` keeps everything; `percentile` cuts the same share of elements at both ends;
        `entropy` minimises the KL divergence between the values and their quantized image (NVIDIA,
        "8-bit inference with TensorRT", 2017); `mse` minimises the mean squared error.
        """
        if not self.count:
            return 0.0, 0.0
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if low == high or method == "minmax":
            return low, high
        if method == "percentile":
            return self._percentile(low, high, percentile)
        score = self._divergence if method == "entropy" else self.error
        return _search(lambda lo, hi: score(lo, hi, format), low, high)

    def _percentile(self, low: float, high: float, percentile: float) -> tuple[float, float]:
        """Cut (100 - percentile) / 2 percent of the elements at either end."""
        centres, share = self.cells()
        tail = (100 - percentile) / 200
        below = np.cumsum(share)
        first, last = int(np.searchsorted(below, tail)), int(np.searchsorted(below, 1 - tail))
        # Where the outermost cell is kept, its extreme is known better than by its centre.
        keep_low = low if first == 0 else float(centres[first])
        keep_high = high if last >= centres.size - 1 else float(centres[last])
        return max(low, min(keep_low, 0.0)), min(high, max(keep_high, 0.0))

    def error(self, low: float, high: float, format: Format) -> float:
        """Return the mean squared error of an affine quantizer with the range [low, high]."""
        scale, zero_point = affine_parameters(low, high, format)
        least, greatest = format.codes
        centres, share = self.cells()
        codes = np.clip(np.rint(centres / scale) + zero_point, least, greatest)
        miss = centres - (codes - zero_point) * float(scale)
        return float(share @ miss**2)

    def sqnr_db(self, low: float, high: float, format: Format) -> float:
        """Return the expected SQNR in dB of quantizing with the range [low, high]."""
        centres, share = self.cells()
        power, noise = float(share @ centres**2), self.error(low, high, format)
        if power == 0 or noise == 0:
            return float("inf")
        return float(10 * np.log10(power / noise))

    def _divergence(self, low: float, high: float, format: Format) -> float:
        """Return KL(values || quantized values) in nats for the range [low, high]."""
        scale, zero_point = affine_parameters(low, high, format)
        least, greatest = format.codes
        centres, share = self.cells()
        codes = np.rint(centres / scale) + zero_point
        inside = np.clip(codes, least, greatest).astype(np.int64) - least
        levels = greatest - least + 1
        mass = np.bincount(inside, share, levels)
        bins = np.bincount(inside[(codes >= least) & (codes <= greatest)], minlength=levels)
        kept = bins[inside] > 0
        image = np.zeros_like(share)
        # A level's mass is spread over the bins it stands for; clipped bins have no image of their
        # own.
        image[kept] = mass[inside[kept]] / bins[inside[kept]]
        image[(codes < least) | (codes > greatest)] = 1e-12
        return float(np.sum(share * np.log(share / np.maximum(image, 1e-12))))


def _search(score: Any, low: float, high: float) -> tuple[float, float]:
    """Minimise score(low, high) by shrinking both ends together, then each one alone."""
    both = [(float(s), float(s)) for s in np.linspace(1.0, 0.05, 96)]
    one = [float(s) for s in np.geomspace(1.0, 0.02, 24)]  # an outlier at one end leaves the other
    ends = [*both, *((1.0, s) for s in one if high > 0), *((s, 1.0) for s in one if low < 0)]
    _, below, above = min((score(low * a, high * b), -a, -b) for a, b in ends)
    low, high = low * -below, high * -above
    for _ in range(2):
        grow = np.linspace(0.7, 1.3, 25)
        if low < 0:
            low *= min((score(low * s, high), abs(s - 1), s) for s in grow)[2]
        if high > 0:
            high *= min((score(low, high * s), abs(s - 1), s) for s in grow)[2]
    return float(low), float(high)
