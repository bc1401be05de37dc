"""Exact k-means in one dimension: the split of a row of weights by value that costs least.

Sorted, the clusters of a row are intervals, so the best partition is a shortest path over cuts.
The best last cut never moves left when the prefix grows, so each layer of the dynamic programme
is found by divide and conquer; a level of it is one pass over all prefixes of all rows.

Sources: X. Wu, "Optimal quantization by matrix searching" (Journal of Algorithms 12, 1991);
H. Wang, M. Song, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic
programming" (The R Journal 3/2, 2011); divide and conquer as in A. Grønlund et al., "Fast exact
k-means, k-medians and Bregman divergence clustering in 1D" (arXiv 1701.07204).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

MOST_CLUSTERS = 255

# Values that are worked on at once, in whole rows: the arrays of a level stay in the cache.
CHUNK = 2**18

# A row with more distinct values than EXACT is cut between SKETCH groups first and then polished.
EXACT = 2**22
SKETCH = 2**16
POLISHES = 100


@dataclass(frozen=True)
class Clustering:
    """How the values of each row fall into clusters.

    Attributes:
        ids: The cluster of each value, uint8, shape of the input [rows, n]. Ascending with the
            value and dense from 0: a row with d distinct values uses min(d, clusters) of them.
        centres: The mean of each cluster, float64 [rows, clusters], ascending; nan for the
            clusters that a row does not use, which are its last.
        sse: The sum of squared distances to the centres, float64 [rows]; inf if beyond float64.
    """

    ids: npt.NDArray[np.uint8]
    centres: Doubles
    sse: Doubles

    @property
    def bounds(self) -> Doubles:
        """The midpoints between neighbouring centres, float64 [rows, clusters - 1], or nan."""
        # Halved before they are added: the sum of two large float64 may overflow.
        return self.centres[:, :-1] * 0.5 + self.centres[:, 1:] * 0.5


@dataclass(frozen=True)
class _Sorted:
    """Rows in ascending order, as the dynamic programme wants them.

    Attributes:
        exact: The values as they came, [rows, n].
        scaled: The values times 2**-exponents, float64 [rows, n], all within [-1, 1].
        exponents: One for each row, int32 [rows, 1].
        centred: `scaled` minus about its mean, so that prefix sums do not cancel.
        prefix: Sum of the first i centred values at column i, [rows, n + 1].
        starts: Where each distinct value starts, then n up to the end, [rows, most distinct + 1].
        distinct: How many distinct values each row has, [rows].
    """

    exact: npt.NDArray[np.floating]
    scaled: Doubles
    exponents: npt.NDArray[np.int32]
    centred: Doubles
    prefix: Doubles
    starts: Places
    distinct: Places


@dataclass(frozen=True)
class _Points:
    """Where rows may be cut: `last + 1` places each, padded to one width.

    Attributes:
        sums: Sum of the centred values before each place, [rows, width].
        counts: Number of values before each place, float64 [rows, width].
        last: The place at the end of each row, [rows].
    """

    sums: Doubles
    counts: Doubles
    last: Places


def kmeans(rows: npt.NDArray[np.floating], clusters: int) -> Clustering:
    """Cluster the values of each row on its own into at most `clusters` clusters.

    The partition has the least sum of squared distances to the cluster means, up to float64
    rounding of the row's sum of squares: what an outlier millions of times the rest drowns is
    not told apart. Equal values share a cluster (-0.0 and 0.0 are equal). Among partitions of
    equal cost it is the one whose last cut is smallest, then the one before, and so on; the same
    row always gives the same clustering, whatever rows stand beside it.

    A row with more than EXACT (2**22) distinct values is not solved exactly: its values are taken
    in at most SKETCH (2**16) groups of neighbours, half of them of equal size and half spaced
    like the levels of the best quantizer (P. F. Panter, W. Dite, "Quantization distortion in
    pulse-count modulation", Proc. IRE 39, 1951). The best cuts between groups are found, and
    Lloyd's iterations over all values move them until they rest, POLISHES (100) times at most.

    Time is n log n for each cluster of a row. Extra memory is some 200 bytes, and 4 more for each
    cluster, for every one of CHUNK (2**18) values or of one row, whichever is more.

    Args:
        rows: float16, float32 or float64 [rows, n], n at least 1, all finite.
        clusters: From 1 to 255.

    Raises:
        TypeError: `rows` has another dtype.
        ValueError: `rows` has another shape or values that are not finite, or `clusters` is out
            of range.
    """
    _check(rows, clusters)
    count, n = rows.shape
    ids = np.empty(rows.shape, np.uint8)
    centres = np.empty((count, clusters))
    sse = np.empty(count)
    # Back-pointers are kept for every cluster, so many clusters mean fewer rows.
    step = 1 if n > EXACT else max(1, CHUNK // (n * (1 + clusters // 16)))
    for start in range(0, count, step):
        part = slice(start, start + step)
        values = _sorted(rows[part])
        cuts = _cuts(values, clusters)
        ids[part] = _ids(rows[part], values, cuts)
        centres[part], sse[part] = _centres(values, cuts)
    return Clustering(ids, centres, sse)


def _check(rows: npt.NDArray[np.floating], clusters: int) -> None:
    """Refuse what `kmeans` does not take."""
    if rows.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"k-means takes float16, float32 or float64, not {rows.dtype}")
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"k-means takes [rows, n] with n at least 1, not {list(rows.shape)}")
    if not 1 <= clusters <= MOST_CLUSTERS:
        raise ValueError(f"the number of clusters is 1 to {MOST_CLUSTERS}, not {clusters}")
    bad = rows.size - int(np.count_nonzero(np.isfinite(rows)))
    if bad:
        raise ValueError(f"{bad} of {rows.size} values are not finite")


def _sorted(rows: npt.NDArray[np.floating]) -> _Sorted:
    """Sort, scale and sum [rows, n]."""
    exact = np.sort(rows, axis=1)
    wide = exact.astype(np.float64)
    largest = np.maximum(np.abs(wide[:, :1]), np.abs(wide[:, -1:]))
    # A power of two scales without rounding, so denormals and 3e38 lose nothing.
    exponents = np.frexp(largest)[1]
    scaled = np.ldexp(wide, -exponents)
    centred = scaled - scaled.mean(axis=1, keepdims=True)
    prefix = np.zeros((exact.shape[0], exact.shape[1] + 1))
    np.cumsum(centred, axis=1, out=prefix[:, 1:])
    starts, distinct = _starts(exact)
    return _Sorted(exact, scaled, exponents, centred, prefix, starts, distinct)


def _starts(exact: npt.NDArray[np.floating]) -> tuple[Places, Places]:
    """Return where each distinct value starts and how many there are (see `_Sorted`)."""
    count, n = exact.shape
    fresh = exact[:, 1:] != exact[:, :-1]
    changes = np.count_nonzero(fresh, axis=1)
    row, before = np.nonzero(fresh)
    rank = np.arange(row.size) - np.repeat(np.cumsum(changes) - changes, changes)
    starts = np.full((count, int(changes.max(initial=0)) + 2), n, np.intp)
    starts[:, 0] = 0
    starts[row, rank + 1] = before + 1
    return starts, changes + 1


def _cuts(values: _Sorted, clusters: int) -> Places:
    """Return where each cluster starts in the sorted row, then n, [rows, clusters + 1]."""
    order = np.arange(clusters + 1)
    # Right as it is for a row with too few values to choose from: each is a cluster.
    places = np.minimum(order, values.distinct[:, None])
    hard = np.flatnonzero(values.distinct > clusters)
    starts, last = values.starts, values.distinct
    sketched = starts.shape[0] == 1 and starts.shape[1] > EXACT + 1
    if sketched:
        starts = starts[:, _sketch(values)]
        last = np.array([starts.shape[1] - 1])
    if hard.size:
        sums = values.prefix[hard[:, None], starts[hard]]
        points = _Points(sums, starts[hard].astype(np.float64), last[hard])
        places[hard] = _best_places(points, clusters)
    cuts: Places = np.take_along_axis(starts, places, axis=1)
    return _polished(values, cuts) if sketched else cuts


def _sketch(values: _Sorted) -> Places:
    """Return at most SKETCH + 1 of the places where the one row may be cut, ends included.

    Half of them are spread evenly over the distinct values, half as the levels of the best
    quantizer are, with the cube root of the density: that sets outliers apart.
    """
    last, starts = int(values.distinct[0]), values.starts[0]
    half = SKETCH // 2
    even = np.arange(half + 1) * last // half
    gaps = np.diff(values.scaled[0, starts[:-1]])
    # A gap g that holds one value has density 1 / g: its share is g * g**(-1/3).
    share = np.cumsum(np.cbrt(gaps * gaps))
    ranks = np.searchsorted(share, np.linspace(0.0, share[-1], half + 1)[1:-1]) + 1
    return np.union1d(even, ranks)


def _best_places(points: _Points, clusters: int) -> Places:
    """Return the places of the best cuts, first and last included, [rows, clusters + 1].

    A cluster with the sum s of w values lowers the squared error by s * s / w, which is what is
    made largest here: the squares of the values themselves are the same for every partition.
    """
    rows = np.arange(points.last.size)
    places = np.zeros((rows.size, clusters + 1), np.intp)
    places[:, clusters] = points.last
    gains = np.square(points.sums) / np.maximum(points.counts, 1.0)
    layers = []
    for layer in range(2, clusters):
        cuts, gains = _layer(points, gains, layer)
        layers.append(cuts)
    if clusters > 1:
        low = np.full(rows.size, clusters - 1)
        ends, _ = _best_cuts(points, gains, rows, points.last, low, points.last - 1)
        places[:, clusters - 1] = ends
    for layer in range(clusters - 1, 1, -1):
        places[:, layer - 1] = layers[layer - 2][rows, places[:, layer]]
    return places


def _layer(
    points: _Points, previous: Doubles, layer: int
) -> tuple[npt.NDArray[np.int32], Doubles]:
    """Return the best last cut of every prefix in `layer` clusters, and its gain.

    Both are [rows, width]; columns before `layer` and after a row's last place mean nothing.
    `previous` holds the gains with one cluster less.
    """
    width = points.sums.shape[1]
    cuts = np.full(points.sums.shape, layer - 1, np.int32)
    gains = np.zeros(points.sums.shape)
    stride = 1 << width.bit_length()
    while stride := stride >> 1:
        # Odd multiples of the stride: their neighbours on both sides are known already.
        columns = np.arange(stride, width, 2 * stride)
        columns = columns[columns >= layer]
        row, column = np.nonzero(columns <= points.last[:, None])
        end = columns[column]
        if not end.size:
            continue
        last, after = points.last[row], np.minimum(end + stride, width - 1)
        low = cuts[row, end - stride].astype(np.intp)
        high = np.where(end + stride <= last, cuts[row, after], last)
        cut, gain = _best_cuts(points, previous, row, end, low, np.minimum(high, end - 1))
        cuts[row, end] = cut
        gains[row, end] = gain
    return cuts, gains


def _best_cuts(
    points: _Points, previous: Doubles, row: Places, end: Places, low: Places, high: Places
) -> tuple[Places, Doubles]:
    """Return the best last cut before each `end` and its gain; of equal cuts the smallest.

    `row`, `end`, `low` and `high` are [m]: prefix i is that of `end[i]` in `row[i]`, and its cut
    lies in [low[i], high[i]], which is never empty.
    """
    lengths = high - low + 1
    starts = np.cumsum(lengths) - lengths
    base = row * points.sums.shape[1]
    cuts = np.arange(lengths.sum())
    cuts += np.repeat(base + low - starts, lengths)
    gains = np.repeat(points.sums[row, end], lengths)
    gains -= points.sums.ravel().take(cuts)
    gains *= gains
    counts = np.repeat(points.counts[row, end], lengths)
    counts -= points.counts.ravel().take(cuts)
    gains /= counts
    gains += previous.ravel().take(cuts)
    best = np.maximum.reduceat(gains, starts)
    hits = np.flatnonzero(gains == np.repeat(best, lengths))
    first = hits[np.searchsorted(hits, starts)]
    return cuts[first] - base, best


def _polished(values: _Sorted, cuts: Places) -> Places:
    """Move the cuts [1, clusters + 1] of one long row to between the means, until they rest."""
    row, prefix = values.centred[0], values.prefix[0]
    places = cuts[0]
    for _ in range(POLISHES):
        means = np.diff(prefix[places]) / np.diff(places)
        moved = places.copy()
        moved[1:-1] = np.searchsorted(row, (means[:-1] + means[1:]) * 0.5)
        # A cluster may lose all its values; then the cuts before were better.
        if (moved == places).all() or (np.diff(moved) <= 0).any():
            break
        places = moved
    polished: Places = places.reshape(cuts.shape)
    return polished


def _ids(rows: npt.NDArray[np.floating], values: _Sorted, cuts: Places) -> npt.NDArray[np.uint8]:
    """Return the cluster of each value, in the order of `rows`."""
    n = rows.shape[1]
    ids = np.zeros(rows.shape, np.uint8)
    for cut in cuts.T[1:-1]:
        least = values.exact[np.arange(len(cut)), np.minimum(cut, n - 1)]
        ids += (rows >= least[:, None]) & (cut < n)[:, None]
    return ids


def _centres(values: _Sorted, cuts: Places) -> tuple[Doubles, Doubles]:
    """Return the mean of each cluster (nan if empty) [rows, clusters] and the error [rows]."""
    count, n = values.scaled.shape
    lengths = np.diff(cuts, axis=1)
    used = lengths > 0
    sizes = lengths[used]
    first = (cuts[:, :-1] + np.arange(count)[:, None] * n)[used]
    final = first + sizes - 1
    # Taken from the cluster's own first value: a cluster of equal values has just that mean.
    origin = values.scaled.ravel()[first]
    offsets = values.scaled.ravel() - np.repeat(origin, sizes)
    shift = np.add.reduceat(offsets, first) / sizes if count else origin
    offsets -= np.repeat(shift, sizes)
    error = np.square(offsets).reshape(count, n).sum(axis=1)
    exponents = np.broadcast_to(values.exponents, lengths.shape)[used]
    exact = values.exact.ravel()
    centres = np.full(lengths.shape, np.nan)
    with np.errstate(over="ignore"):
        means = np.ldexp(origin + shift, exponents)
        error = np.ldexp(error, 2 * values.exponents[:, 0])
    # Rounding must not carry a mean out of its cluster.
    centres[used] = np.clip(means, exact[first], exact[final])
    return centres, error
