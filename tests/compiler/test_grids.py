"""A grid lays a format's codes out by rows, and gives its scales back as they are stored."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler.formats import Format
from fourfold.compiler.grids import Grid
from fourfold.compiler.rounding import rounded
from fourfold.compiler.splitting import Channels

FORMATS = [
    f"{dtype} {groups}"
    for dtype in ("int8", "int4:3", "uint4", "uint2")
    for groups in ("per_tensor", "per_axis(0)", "per_axis(1)", "per_block(0,4)", "per_block(1,4)")
]


def laid_out(format, axis, seed=0, shape=(10, 6), floor=0.0):
    """Return (weight rounded to nearest, its channels, its grid, the weight by rows)."""
    values = np.random.default_rng(seed).normal(0.3, 1, shape).astype(np.float32)
    start = rounded(values, Format.parse(format), "minmax")
    channels = Channels(axis)
    grid = Grid.of(start, channels.rows, np.float32(floor))
    return start, channels, grid, channels.rows(values).astype(np.float64)


@given(st.sampled_from(FORMATS), st.sampled_from([0, 1]), st.integers(0, 10**6))
def test_codes_and_floats_are_those_of_the_rounding(format, axis, seed):
    start, channels, grid, rows = laid_out(format, axis, seed)
    codes = channels.rows(start.codes.astype(np.float64))
    np.testing.assert_array_equal(grid.codes(grid.floats(codes)), codes)
    # A quotient of float32 may fall to the other side of a half.
    apart = np.abs(grid.codes(rows) - codes)
    assert apart.max() <= 1
    assert apart.mean() < 0.05
    np.testing.assert_allclose(grid.floats(codes), channels.rows(start.floats()), rtol=1e-6)


@given(st.sampled_from(["per_axis(0)", "per_tensor"]), st.integers(0, 10**6), st.integers(1, 9))
def test_a_row_takes_only_the_codes_that_it_has(groups, seed, count):
    draw = np.random.default_rng(seed)
    entries = draw.normal(size=(5, count)).astype(np.float32)
    values = np.take_along_axis(entries, draw.integers(0, count, (5, 12)), axis=1)
    start = rounded(values, Format.parse(f"int8 {groups}"), "minmax")
    grid = Grid.of(start, Channels(0).rows, np.float32(0), table=True)
    wanted = draw.normal(size=(5, 12))
    codes = grid.codes(wanted)
    for row in range(5):
        free = start.codes if groups == "per_tensor" else start.codes[row]
        best = np.abs(grid.scale[row, 0] * free.ravel().astype(float)[:, None] - wanted[row])
        assert set(codes[row]) <= set(free.ravel().astype(float))
        found = np.abs(grid.floats(codes)[row] - wanted[row])
        np.testing.assert_allclose(found, best.min(0), atol=1e-6)
    by_column = np.stack([grid.nearest(wanted[:, at], at) for at in range(12)], axis=1)
    np.testing.assert_array_equal(by_column, codes)
    np.testing.assert_array_equal(grid.part(slice(2, 4)).codes(wanted[2:4]), codes[2:4])


@given(st.sampled_from(FORMATS), st.sampled_from([0, 1]))
def test_scales_and_shifts_come_back_as_they_are_stored(format, axis):
    start, _, grid, _ = laid_out(format, axis)
    for values, like in ((grid.scale, start.scale), (grid.shift, start.zero_point)):
        found = grid.stored(values, like)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, like)


@given(st.sampled_from(FORMATS), st.integers(0, 9))
def test_a_column_alone_is_rounded_as_in_the_whole(format, column):
    _, _, grid, rows = laid_out(format, 1)
    codes = grid.codes(3 * rows)  # beyond the range of some
    np.testing.assert_array_equal(grid.nearest(3 * rows[:, column], column), codes[:, column])
    found = grid.column(3 * rows[:, column], column)
    np.testing.assert_array_equal(found, grid.floats(codes)[:, column])


@pytest.mark.parametrize(
    ("format", "axis", "by_row", "blocks"),
    [
        ("int8 per_tensor", 1, False, [10]),
        ("int8 per_axis(1)", 1, True, [10]),
        ("int8 per_axis(0)", 1, False, [1] * 10),
        ("int8 per_axis(0)", 0, True, [6]),
        ("int8 per_block(0,4)", 1, True, [4, 4, 2]),
        ("int8 per_block(1,4)", 1, False, [1] * 10),
        ("int8 per_block(1,4)", 0, True, [4, 2]),
    ],
)
def test_which_elements_share_a_scale(format, axis, by_row, blocks):
    start, _, grid, _ = laid_out(format, axis)
    assert grid.by_row is by_row
    found = list(grid.blocks())
    assert [len(columns) for columns in found] == blocks
    assert sorted(np.concatenate(found)) == list(range(grid.scale.shape[1]))
    for columns in found:
        assert all(len(set(row)) == 1 for row in grid.owner[:, columns].tolist())
    assert len(np.unique(grid.owner)) == start.scale.size


@pytest.mark.parametrize(
    ("format", "limits"),
    [
        ("int8 per_tensor", (-127, 127)),
        ("uint4 per_tensor", (0, 15)),
        ("uint2 per_tensor", (0, 3)),
    ],
)
def test_codes_stay_within_the_format(format, limits):
    _, _, grid, rows = laid_out(format, 0)
    codes = grid.codes(100 * rows)
    assert grid.limits == limits
    assert (codes.min(), codes.max()) == limits


def test_scales_stay_above_what_they_may_not_fall_below():
    start, _, grid, _ = laid_out("int8 per_axis(1)", 1)
    floor = start.scale * np.float32(0.5)
    bound = Grid.of(start, Channels(1).rows, floor)
    np.testing.assert_array_equal(bound.scaled(bound.scale * 2).scale, grid.scale * 2)
    low = bound.scaled(bound.scale * 0.1)
    np.testing.assert_array_equal(low.stored(low.scale, start.scale), floor)
    np.testing.assert_array_equal(bound.scale, grid.scale)  # the first is as it was
    np.testing.assert_array_equal(grid.scaled(grid.scale * 0.1).scale, grid.scale * 0.1)


def test_a_part_owns_its_rows_and_numbers_them_from_zero():
    _, _, grid, rows = laid_out("int8 per_block(0,4)", 1)
    part = grid.part(slice(2, 5))
    np.testing.assert_array_equal(part.codes(rows[2:5]), grid.codes(rows)[2:5])
    np.testing.assert_array_equal(part.owner, grid.owner[2:5])
    assert sorted(set(part.local.ravel().tolist())) == list(range(9))
    for owner in np.unique(part.owner):
        assert len(np.unique(part.local[part.owner == owner])) == 1
