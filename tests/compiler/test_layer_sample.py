"""Rows of a layer: what they are, how many, which are held out, and what is refused."""

import numpy as np
import pytest

from fourfold.compiler.covariance import Meeting
from fourfold.compiler.errors import DataError
from fourfold.compiler.layer_sample import COPIES, Sample

# kernel, channels, rows, groups, strides, dilations, pads, sizes
CONVOLUTIONS = {
    "rank 1": ((3,), 4, 5, 1, (2,), (1,), (1, 0), (9,)),
    "rank 1, dilated": ((3,), 4, 5, 1, (1,), (3,), (2, 2), (11,)),
    "rank 2": ((3, 2), 3, 4, 1, (1, 2), (1, 1), (1, 0, 1, 2), (6, 5)),
    "rank 2, grouped": ((3, 3), 6, 4, 2, (1, 1), (2, 1), (2, 1, 2, 1), (7, 5)),
    "depthwise": ((3, 3), 6, 12, 6, (2, 2), (1, 1), (0, 1, 1, 0), (6, 7)),
    "rank 3": ((2, 1, 3), 2, 3, 1, (1, 1, 1), (1, 1, 2), (1, 0, 0, 0, 0, 1), (3, 4, 6)),
    "kernel of one": ((1, 1), 4, 3, 1, (2, 2), (1, 1), (0, 0, 0, 0), (5, 4)),
}


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear(columns=3, rows=2, samples=5, **options):
    weights = floats(rows, columns, seed=9)
    return Sample(Meeting("x", "MatMul", columns), weights, None, samples, **options)


def ordered(rows):
    """Return rows in an order that their numbers set, so that draws can be compared."""
    return rows[np.lexsort(np.round(rows, 3).T)]


@pytest.mark.torch
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_rows_of_a_convolution_make_its_outputs(case):
    torch = pytest.importorskip("torch")
    kernel, channels, rows, groups, strides, dilations, pads, sizes = CONVOLUTIONS[case]
    rank, columns = len(kernel), channels // groups * int(np.prod(kernel))
    weights, bias = floats(rows, channels // groups, *kernel), floats(rows, seed=1)
    x, y = floats(5, channels, *sizes, seed=2), floats(5, channels, *sizes, seed=3)
    meeting = Meeting("x", "Conv", columns, groups, False, kernel, strides, dilations, pads)
    sample = Sample(meeting, weights.reshape(rows, -1), bias, 5)
    sample.add(x, y)
    known, held = sample.split()
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[rank]
    sides = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]

    def outputs(array):
        padded, w, b = (torch.from_numpy(a) for a in (np.pad(array, sides), weights, bias))
        made = conv(padded, w, b, strides, 0, dilations, groups)
        return made.reshape(len(array), rows, -1).movedim(1, 2).reshape(-1, rows).numpy()

    for part, which in ((known, slice(4)), (held, slice(4, 5))):
        made = part.x @ weights.reshape(groups, -1, columns).swapaxes(1, 2)
        own = np.concatenate(made + bias.reshape(groups, 1, -1), 1)
        found = np.hstack([own, np.concatenate(part.t, 1)])
        right = np.hstack([outputs(x[which]), outputs(y[which])])
        np.testing.assert_allclose(ordered(found), ordered(right), rtol=1e-4, atol=1e-4)


def test_rows_of_a_matmul_are_those_of_its_last_axis():
    sample = linear()
    x = floats(5, 4, 3)
    sample.add(x[:3])
    sample.add(x[3:])
    known, held = sample.split()
    np.testing.assert_array_equal(ordered(known.x[0]), ordered(x[:4].reshape(-1, 3)))
    np.testing.assert_array_equal(ordered(held.x[0]), ordered(x[4]))
    np.testing.assert_allclose(held.t, held.x @ sample.weights.T, rtol=1e-6)


def test_a_gemm_that_turns_its_operand_reads_its_columns():
    x = floats(3, 7)
    sample = Sample(Meeting("x", "Gemm", 3, turned=True), floats(2, 3), floats(2), 7)
    sample.add(x)
    known, held = sample.split()
    np.testing.assert_array_equal(held.x[0], x.T[4:5])
    np.testing.assert_array_equal(ordered(known.x[0]), ordered(x.T[[0, 1, 2, 3, 5, 6]]))


def test_every_fifth_sample_is_held_out_however_batches_are_cut():
    x = np.repeat(np.arange(12, dtype=np.float32), 6).reshape(12, 2, 3)
    whole, cut = linear(samples=12), linear(samples=12)
    whole.add(x)
    for part in np.split(x, [1, 5, 11]):
        cut.add(part)
    for one, other in zip(whole.split(), cut.split(), strict=True):
        np.testing.assert_array_equal(one.x, other.x)
    assert set(whole.split()[1].x.ravel()) == {4, 9}
    np.testing.assert_array_equal(whole.split()[0].x, whole.split()[0].x)


def test_few_samples_hold_out_rows():
    sample = linear(samples=2)
    sample.add(np.arange(30, dtype=np.float32).reshape(2, 5, 3))
    known, held = sample.split()
    assert (known.x.shape, held.x.shape) == ((1, 8, 3), (1, 2, 3))
    assert not set(known.x.ravel()) & set(held.x.ravel())


def test_a_few_rows_are_learned_from_and_held_out_alike():
    sample = linear(samples=1)
    sample.add(floats(1, 4, 3))
    known, held = sample.split()
    np.testing.assert_array_equal(known.x, held.x)


@pytest.mark.parametrize("each", [1, 3])
def test_memory_bounds_the_rows(each):
    row = 4 * (3 + 2)  # three columns and two outputs
    sample = linear(samples=10, memory=COPIES * row * 10 * each + 7)
    sample.add(floats(10, 50, 3))
    assert [part.x.shape[1] for part in sample.split()] == [8 * each, 2 * each]


def test_rows_are_spread_over_a_sample():
    sample = linear(samples=10, memory=COPIES * 20 * 10 * 5)
    x = np.repeat(np.arange(100, dtype=np.float32), 3).reshape(1, 100, 3)
    sample.add(np.repeat(x, 10, axis=0))
    drawn = np.concatenate([part.x[0, :, 0] for part in sample.split()])
    assert len(set(drawn)) > 25
    assert drawn.max() > 80
    assert drawn.min() < 20


@pytest.mark.parametrize("each", [3, 50])
def test_a_row_without_a_chance_is_never_drawn(each):
    x = np.arange(40, dtype=np.float32).repeat(3).reshape(2, 20, 3)
    chances = np.zeros((2, 20))
    chances[:, 5:9] = [1, 2, 3, 4]
    sample = linear(samples=2, memory=COPIES * 20 * 2 * each)
    sample.add(x, chances=chances.ravel())
    drawn = {float(n) for part in sample.split() for n in part.x[0, :, 0]}
    assert drawn <= {5, 6, 7, 8, 25, 26, 27, 28}
    assert len(drawn) == min(2 * each, 8)


def test_a_sample_without_chances_gives_no_rows():
    sample = linear(samples=2)
    sample.add(floats(2, 4, 3), chances=np.repeat([0.0, 1.0], 4))
    assert sum(part.x.shape[1] for part in sample.split()[:1]) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    x = floats(5, 4, 3)
    x[3, 2, 1] = bad
    with pytest.raises(DataError, match="'x' is not finite"):
        linear().add(x)
    with pytest.raises(DataError, match="'x' is not finite"):
        linear().add(floats(5, 4, 3), x)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows of 'x'"):
        linear().split()
    sample = linear()
    sample.add(floats(5, 4, 3), chances=np.zeros(20))
    with pytest.raises(DataError, match="no rows of 'x'"):
        sample.split()
