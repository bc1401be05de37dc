from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fourfold.compiler.kmeans as module
from fourfold.compiler.kmeans import Clustering, kmeans

# Few distinct values, so that most rows have duplicates.
COARSE = st.integers(-4, 4).map(lambda i: i / 2)
FINE = st.floats(-100, 100, width=32)
ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.one_of(COARSE, COARSE, FINE),
)
CLUSTERS = st.integers(1, 4)


def samples(kind, n=2000, seed=0):
    draw = np.random.default_rng(seed)
    match kind:
        case "normal":
            row = draw.normal(0, 1, n)
        case "student":
            row = draw.standard_t(3, n)
        case "far":
            row = np.append(draw.normal(0, 1, n - 1), 1e5)
        case _:
            row = np.where(draw.random(n) < 0.01, 1e3, 1.0) * draw.normal(0, 1, n)
    return row.astype(np.float32)


def squares(row):
    wide = row.astype(np.float64)
    return float(np.square(wide - wide.mean()).sum())


def least_sse(row, clusters):
    """Try every set of cuts between distinct values."""
    values = np.sort(row.astype(np.float64))
    places = np.flatnonzero(np.diff(values)) + 1
    most = min(clusters - 1, len(places))
    return min(
        sum(squares(part) for part in np.split(values, cuts))
        for cuts in combinations(places, most)
    )


def lloyd_sse(row, clusters, draw):
    """Run Lloyd's iterations from random values of the row."""
    row = np.sort(row.astype(np.float64))
    centres = np.sort(draw.choice(row, clusters, replace=False))
    for _ in range(60):
        ids = np.searchsorted((centres[1:] + centres[:-1]) / 2, row)
        counts = np.bincount(ids, minlength=clusters)
        sums = np.bincount(ids, row, clusters)
        centres = np.sort(np.where(counts, sums / np.maximum(counts, 1), centres))
    ids = np.searchsorted((centres[1:] + centres[:-1]) / 2, row)
    return sum(squares(row[ids == i]) for i in range(clusters) if (ids == i).any())


def check(rows, clusters, got):
    """Assert all that holds for every clustering but that it is the best."""
    assert got.ids.shape == rows.shape
    assert got.ids.dtype == np.uint8
    assert got.centres.shape == (len(rows), clusters)
    assert got.bounds.shape == (len(rows), clusters - 1)
    assert got.sse.shape == (len(rows),)
    for row, ids, centres, bounds, sse in zip(
        rows, got.ids, got.centres, got.bounds, got.sse, strict=True
    ):
        used = min(clusters, len(np.unique(row)))
        assert np.unique(ids).tolist() == list(range(used))
        order = np.argsort(row, kind="stable")
        assert (np.diff(ids[order].astype(int)) >= 0).all()
        assert (ids[order][1:] == ids[order][:-1])[np.diff(row[order]) == 0].all()
        assert np.isnan(centres[used:]).all()
        assert np.isnan(bounds[used - 1 :]).all()
        wide = row.astype(np.float64)
        means = [wide[ids == i].mean() for i in range(used)]
        slack = 1e-12 * np.abs(wide).max()
        assert centres[:used] == pytest.approx(means, rel=1e-12, abs=slack)
        assert bounds[: used - 1] == pytest.approx((centres[1:] + centres[:-1])[: used - 1] / 2)
        total = sum(squares(row[ids == i]) for i in range(used))
        assert sse == pytest.approx(total, rel=1e-9, abs=slack**2)


def same(a: Clustering, b: Clustering):
    return (
        np.array_equal(a.ids, b.ids)
        and np.array_equal(a.centres, b.centres, equal_nan=True)
        and np.array_equal(a.sse, b.sse)
    )


def one_by_one(rows, clusters):
    parts = [kmeans(row[None], clusters) for row in rows]
    return Clustering(
        *(np.concatenate([getattr(p, f) for p in parts]) for f in ("ids", "centres", "sse"))
    )


def test_golden():
    row = np.array([[-2, -0.5, 0.1, 0.3, 1.8, -0.2, 0.4, 2.2]])
    got = kmeans(row, 3)
    assert got.ids.tolist() == [[0, 1, 1, 1, 2, 1, 1, 2]]
    assert got.centres[0] == pytest.approx([-2, 0.02, 2])
    assert got.bounds[0] == pytest.approx([-0.99, 1.01])
    assert got.sse[0] == pytest.approx(0.628)
    assert got.centres.dtype == got.bounds.dtype == got.sse.dtype == np.float64


@settings(max_examples=400)
@given(ROWS, CLUSTERS)
@example(np.array([[0, 0, 0, 1, 2, 2, 9]], np.float32), 3)
def test_no_partition_is_better(rows, clusters):
    got = kmeans(rows, clusters)
    check(rows, clusters, got)
    for row, sse in zip(rows, got.sse, strict=True):
        slack = 1e-12 * float(np.square(row.astype(np.float64)).sum())
        assert sse == pytest.approx(least_sse(row, clusters), rel=1e-9, abs=slack)


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_no_partition_is_better_on_longer_rows(clusters):
    draw = np.random.default_rng(clusters)
    rows = draw.standard_t(2, (6, 22)).round(2)
    got = kmeans(rows, clusters)
    check(rows, clusters, got)
    assert got.sse == pytest.approx([least_sse(row, clusters) for row in rows])


@given(ROWS, CLUSTERS)
def test_rows_do_not_touch_each_other(rows, clusters):
    assert same(kmeans(rows, clusters), one_by_one(rows, clusters))


@pytest.mark.parametrize("clusters", [1, 3, 8, 255])
def test_long_rows_do_not_touch_each_other(clusters):
    rows = np.stack([samples(kind, 600) for kind in ("normal", "student", "outliers")])
    rows[1] = rows[1].round(1)
    got = kmeans(rows, clusters)
    check(rows, clusters, got)
    assert same(got, one_by_one(rows, clusters))


@pytest.mark.parametrize("kind", ["normal", "student", "outliers"])
@pytest.mark.parametrize("clusters", [2, 3, 7])
def test_lloyd_never_finds_better(kind, clusters):
    row = samples(kind)
    got = kmeans(row[None], clusters)
    check(row[None], clusters, got)
    draw = np.random.default_rng(1)
    found = [lloyd_sse(row, clusters, draw) for _ in range(25)]
    assert got.sse[0] <= min(found) * (1 + 1e-9)


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3e38, 1e-45])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_constant_row_is_one_cluster(value, n, clusters):
    rows = np.full((2, n), value, np.float32)
    got = kmeans(rows, clusters)
    check(rows, clusters, got)
    assert (got.centres[:, 0] == rows[:, 0]).all()
    assert (got.sse == 0).all()


@pytest.mark.parametrize("clusters", [2, 3, 255])
def test_two_distinct_values_are_two_clusters(clusters):
    rows = np.array([[0.1, 0.7, 0.1, 0.1, 0.7], [5, -5, -5, -5, -5]], np.float32)
    got = kmeans(rows, clusters)
    check(rows, clusters, got)
    assert got.ids.tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert got.centres[:, :2].tolist() == [rows[0, :2].tolist(), [-5, 5]]
    assert (got.sse == 0).all()


def test_fewer_values_than_clusters():
    rows = np.array([[3, 1, 2, 4], [3, 1, 1, 4], [2, 2, 2, 2]], np.float64)
    got = kmeans(rows, 5)
    check(rows, 5, got)
    assert got.ids.tolist() == [[2, 0, 1, 3], [1, 0, 0, 2], [0, 0, 0, 0]]


def test_both_zeros_are_one_value():
    rows = np.array([[0.0, -0.0, 1.0, -0.0, -1.0]], np.float32)
    assert kmeans(rows, 3).ids.tolist() == [[1, 1, 2, 1, 0]]
    assert kmeans(rows[:, :2], 2).ids.tolist() == [[0, 0]]


def test_of_equal_cuts_the_smallest():
    assert kmeans(np.array([[-1.0, 0.0, 1.0]]), 2).ids.tolist() == [[0, 1, 1]]
    # Three cuts of 0 1 2 3 cost one half each; in the middle layer there is a tie too.
    assert kmeans(np.array([[0.0, 1.0, 2.0, 3.0]]), 3).ids.tolist() == [[0, 1, 2, 2]]
    row = np.array([[-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]])
    assert kmeans(row, 4).ids.tolist() == [[0, 1, 1, 2, 3, 3]]


@given(ROWS, CLUSTERS, st.integers(-60, 60))
def test_scaling_by_a_power_of_two_and_mirroring(rows, clusters, power):
    rows = rows.astype(np.float64)
    got = kmeans(rows, clusters)
    scaled = kmeans(np.ldexp(rows, power), clusters)
    assert np.array_equal(scaled.ids, got.ids)
    assert np.array_equal(scaled.centres, np.ldexp(got.centres, power), equal_nan=True)
    assert np.array_equal(scaled.sse, np.ldexp(got.sse, 2 * power))
    slack = 1e-12 * float(np.square(rows).sum())
    assert kmeans(-rows, clusters).sse == pytest.approx(got.sse, rel=1e-9, abs=slack)


@given(ROWS, CLUSTERS, st.randoms(use_true_random=False))
def test_a_permutation_moves_the_ids(rows, clusters, random):
    order = random.sample(range(rows.shape[1]), rows.shape[1])
    got, moved = kmeans(rows, clusters), kmeans(rows[:, order], clusters)
    assert same(moved, Clustering(got.ids[:, order], got.centres, got.sse))


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-38, 3e-45])
def test_extreme_magnitudes(size):
    shape = np.array([-1, -1, -0.9, 0, 0.05, 1, 1], np.float64)
    rows = np.stack([(shape * size).astype(np.float32), shape.astype(np.float32)])
    got = kmeans(rows, 3)
    check(rows, 3, got)
    assert got.ids.tolist() == [[0, 0, 0, 1, 1, 2, 2]] * 2


def test_large_and_tiny_in_one_row():
    rows = np.array([[3e38, 1e-45, -3e38, 3e-45]], np.float32)
    for clusters in (2, 3, 4):
        check(rows, clusters, kmeans(rows, clusters))
    assert kmeans(rows, 3).ids.tolist() == [[2, 1, 0, 1]]
    got = kmeans(rows, 4)
    assert got.ids.tolist() == [[3, 1, 0, 2]]
    assert got.centres.tolist() == np.sort(rows.astype(np.float64)).tolist()


def test_the_ends_of_float64():
    top = np.finfo(np.float64).max
    rows = np.array([[top, -top, top, 5e-324], [5e-324, 0, 1e-323, 0]])
    got = kmeans(rows, 3)
    assert got.ids.tolist() == [[2, 0, 2, 1], [1, 0, 2, 0]]
    assert got.centres.tolist() == [[-top, 5e-324, top], [0, 5e-324, 1e-323]]
    assert kmeans(np.array([[top, top / 2]]), 2).bounds[0, 0] == pytest.approx(0.75 * top)
    assert kmeans(rows, 1).sse[0] == np.inf
    assert kmeans(rows[:, ::2], 1).centres[0, 0] == pytest.approx(top)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_agree(dtype):
    rows = samples("normal", 300).astype(np.float16).reshape(3, 100)
    assert same(kmeans(rows.astype(dtype), 4), kmeans(rows.astype(np.float64), 4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad):
    rows = np.zeros((2, 5), np.float32)
    rows[0, 1] = rows[1, 4] = bad
    with pytest.raises(ValueError, match="2 of 10 values are not finite"):
        kmeans(rows, 3)


@pytest.mark.parametrize("clusters", [-1, 0, 256])
def test_refuses_clusters_out_of_range(clusters):
    with pytest.raises(ValueError, match=f"1 to 255, not {clusters}"):
        kmeans(np.zeros((1, 3)), clusters)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"takes \[rows, n\]"):
        kmeans(np.zeros(shape), 2)


def test_refuses_other_dtypes():
    with pytest.raises(TypeError, match="not int64"):
        kmeans(np.zeros((1, 3), np.int64), 2)


def test_no_rows():
    got = kmeans(np.zeros((0, 3), np.float32), 2)
    check(np.zeros((0, 3), np.float32), 2, got)


def test_most_clusters():
    rows = np.random.default_rng(0).permuted(np.arange(600.0).reshape(2, 300), axis=1)
    got = kmeans(rows, 255)
    check(rows, 255, got)
    assert got.ids.max() == 254
    assert got.sse.tolist() == [45 * 0.5] * 2  # 45 pairs, 210 values alone


def test_the_input_stays_as_it_was():
    rows = samples("normal", 60).reshape(2, 30)
    before = rows.copy()
    kmeans(rows, 3)
    assert np.array_equal(rows, before)
    assert same(kmeans(np.asfortranarray(rows), 3), kmeans(rows, 3))


@pytest.mark.parametrize("chunk", [1, 50, 250])
def test_chunks_change_nothing(monkeypatch, chunk):
    rows = samples("student", 700).reshape(14, 50).round(1)
    whole = [kmeans(rows, clusters) for clusters in (3, 20)]
    monkeypatch.setattr(module, "CHUNK", chunk)
    sizes = []
    monkeypatch.setattr(
        module, "_sorted", lambda part, f=module._sorted: sizes.append(len(part)) or f(part)
    )
    assert same(kmeans(rows, 3), whole[0])
    assert max(sizes) == max(1, chunk // 50)
    assert same(kmeans(rows, 20), whole[1])


@pytest.mark.parametrize("kind", ["normal", "student", "outliers", "far"])
@pytest.mark.parametrize("clusters", [1, 2, 3, 6])
def test_a_sketch_is_nearly_as_good(monkeypatch, kind, clusters):
    rows = np.stack([samples(kind, 5000, seed) for seed in range(2)])
    rows[0] = rows[0].round(2)
    exact = kmeans(rows, clusters)
    monkeypatch.setattr(module, "EXACT", 300)
    monkeypatch.setattr(module, "SKETCH", 256)
    polished = []
    monkeypatch.setattr(
        module, "_polished", lambda *given, f=module._polished: polished.append(1) or f(*given)
    )
    got = kmeans(rows, clusters)
    assert len(polished) == 2
    check(rows, clusters, got)
    assert (got.sse <= exact.sse * 1.001).all()
    assert (got.sse >= exact.sse * (1 - 1e-9)).all()


def test_a_sketch_sets_outliers_apart(monkeypatch):
    monkeypatch.setattr(module, "SKETCH", 64)
    row = np.append(samples("normal", 996), [-900, 100, 300, 500]).astype(np.float32)
    places = module._sketch(module._sorted(row[None]))
    assert {0, 1, 997, 998, 999, 1000} <= set(places.tolist())
    assert len(places) <= 65


def test_polishing_rests_at_the_midpoints(monkeypatch):
    row = samples("student", 5000)
    monkeypatch.setattr(module, "EXACT", 200)
    monkeypatch.setattr(module, "SKETCH", 8)
    got = kmeans(row[None], 3)
    assert np.array_equal(np.searchsorted(got.bounds[0], row), got.ids[0])


def test_polishing_stops_before_a_cluster_is_empty():
    # The means are -0.1, 5 and 10.1: neither 0 nor 10 is nearest to its own.
    values = module._sorted(np.array([[-0.2, -0.1, 0.0, 10.0, 10.1, 10.2]]))
    cuts = np.array([[0, 2, 4, 6]])
    assert module._polished(values, cuts).tolist() == cuts.tolist()
