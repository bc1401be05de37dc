"""Parts of a weight by value: their supports, their rounding, and where the channels lie."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler import notes
from fourfold.compiler.formats import Format, PerAxis, PerBlock, PerTensor, Split
from fourfold.compiler.graph import weight_of
from fourfold.compiler.kmeans import kmeans
from fourfold.compiler.quantizers import spread, symmetric_scale
from fourfold.compiler.rounding import rounded, simulated
from fourfold.compiler.splitting import (
    Channels,
    centres_of,
    joined,
    masked,
    parts_of,
    rounded_to,
    split_floats,
    sqnr_db,
)

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def reader_of(op, shape, transposed=0, group=1):
    """Return a node's weight of zeros; the node reads x."""
    attributes = {"transB": 1} if transposed else {"group": group} if group > 1 else {}
    x = ir.val("x", ir.DataType.FLOAT)
    w = ir.val("w", const_value=ir.tensor(np.zeros(shape, np.float32), name="w"))
    w.type, w.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    return weight_of(ir.node(op, [x, w], attributes=attributes))


@st.composite
def readers(draw):
    """Draw a weighted node: any operator, rank and grouping, with sides from one up."""
    side = st.integers(1, 5)
    op = draw(st.sampled_from(["MatMul", "Gemm", "Conv", "ConvTranspose"]))
    if op == "MatMul":
        return reader_of(op, tuple(draw(st.lists(side, min_size=2, max_size=3))))
    if op == "Gemm":
        return reader_of(op, (draw(side), draw(side)), draw(st.integers(0, 1)))
    kernel = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    group = draw(st.integers(1, 4))
    # One channel a group is a depthwise layer.
    return reader_of(op, (group * draw(st.integers(1, 3)), draw(side), *kernel), group=group)


KINDS = ("normal", "heavy", "constant", "two", "duplicates", "zeros", "extreme")


def samples(kind, shape, seed=0, dtype=np.float32):
    """Return a weight of one distribution."""
    draw = np.random.default_rng(seed)
    limit = min(float(np.finfo(dtype).max), 1e18)  # its square is still a float32
    match kind:
        case "normal":
            array = draw.normal(0, 0.05, shape)
        case "heavy":
            array = np.clip(draw.standard_t(1.2, shape), -1e4, 1e4)
        case "constant":
            array = np.full(shape, draw.normal())
        case "two":
            array = draw.choice([0.5, 1.0], shape)
        case "duplicates":
            array = draw.normal(0, 1, shape).round(0)
        case "zeros":
            array = np.where(draw.random(shape) < 0.7, 0.0, draw.normal(0, 1, shape))
        case _:
            array = draw.choice([limit, -limit, 1e-7, -1e-7, 0.0], shape)
    return array.astype(dtype)


@st.composite
def weights(draw, dtypes=(np.float32,)):
    """Draw a node and the values of its weight."""
    reader = draw(readers())
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 99))
    shape = tuple(reader.value.const_value.shape.numpy())
    return reader, samples(kind, shape, seed, draw(st.sampled_from(dtypes)))


SPANS = st.one_of(
    st.just(PerTensor()), st.just(PerAxis(0)), st.builds(PerBlock, st.just(0), st.integers(1, 7))
)
CLUSTERS = st.integers(2, 5)


def groups_of(rows, over):
    """Return the values that one clustering spans, group by group, of a matrix of channels."""
    match over:
        case PerTensor():
            return [rows.ravel()]
        case PerAxis():
            return list(rows)
        case PerBlock(_, size):
            cuts = range(size, rows.shape[1], size)
            return [block for row in rows for block in np.split(row, cuts)]


# The paper's example by hand


GOLDEN = np.float32([[-2, -0.5, 0.1, 0.3], [1.8, -0.2, 0.4, 2.2]])
LITERAL = Format.parse("uint2 per_tensor split(branches,3,per_tensor,zero)")
OWN = Format.parse("uint2 per_tensor split(codebook,3,per_tensor)")


def whole(values, format, clip="minmax", channels=Channels()):  # noqa: B008 - it is frozen
    """Split a weight and round its parts."""
    return joined(values, parts_of(values, format.split, channels), format, channels, clip)


def mse(values, actual):
    return float(np.square(values.astype(np.float64) - actual).mean())


def test_parts_by_hand():
    ids = parts_of(GOLDEN, LITERAL.split, Channels())
    assert ids.dtype == np.uint8
    assert ids.tolist() == [[0, 1, 1, 1], [2, 1, 1, 2]]
    lower, middle, upper = masked(GOLDEN, ids)
    assert lower.tolist() == [[-2, 0, 0, 0], [0, 0, 0, 0]]
    assert middle.tolist() == np.float32([[0, -0.5, 0.1, 0.3], [0, -0.2, 0.4, 0]]).tolist()
    assert upper.tolist() == np.float32([[0, 0, 0, 0], [1.8, 0, 0, 2.2]]).tolist()


def test_parts_with_zero_in_their_ranges_by_hand():
    codes = [[-3, -2, 0, 1], [2, -1, 1, 3]]
    lower, middle, upper = (np.float32(x) for x in (2 / 3, 0.3, 2.2 / 3))
    scale = np.where([[1, 0, 0, 0], [0, 0, 0, 0]], lower, middle)
    scale = np.where([[0, 0, 0, 0], [1, 0, 0, 1]], upper, scale)
    found = whole(GOLDEN, LITERAL)
    np.testing.assert_array_equal(found, np.float32(codes) * scale)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(
        np.array([[-2, -0.6, 0, 0.3], [1.466667, -0.3, 0.3, 2.2]]), abs=1e-6
    )
    assert mse(GOLDEN, found) == pytest.approx(0.0188889, rel=1e-5)


def test_parts_in_ranges_of_their_own_by_hand():
    found = whole(GOLDEN, OWN)
    assert found.tolist() == np.float32([[-2, -0.5, 0.1, 0.4], [1.8, -0.2, 0.4, 2.2]]).tolist()
    assert mse(GOLDEN, found) == pytest.approx(0.00125, rel=1e-5)


def test_the_same_weight_unsplit_by_hand():
    found = rounded(GOLDEN, Format("uint2"), "minmax").floats()
    assert mse(GOLDEN, found) == pytest.approx(0.17875, rel=1e-5)


def test_clusters_means_by_hand():
    split = Split(clusters=3, levels=1)
    expected = np.float32([[-2, 0.02, 0.02, 0.02], [2, 0.02, 0.02, 2]])
    found = centres_of(GOLDEN, split, Channels())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(whole(GOLDEN, Format("uint2", split=split)), found)
    assert float(np.square(found - GOLDEN).sum()) == pytest.approx(0.628)


# How much splitting is worth, in dB


NORMAL = (np.random.default_rng(0).standard_normal((128, 512)) * 0.05).astype(np.float32)
STUDENT = (np.random.default_rng(0).standard_t(4, (128, 512)) * 0.05).astype(np.float32)


def outliers():
    """Return NORMAL with one weight in a thousand ten to twenty times as far out."""
    draw = np.random.default_rng(1)
    far = draw.uniform(0.5, 1.0, NORMAL.shape) * draw.choice([-1, 1], NORMAL.shape)
    return np.where(draw.random(NORMAL.shape) < 0.0009, far, NORMAL).astype(np.float32)


def decibels(values, text):
    format = Format.parse(text)
    if format.split is None:
        return sqnr_db(values, rounded(values, format, "minmax").floats())
    return sqnr_db(values, whole(values, format))


ZERO, OWN_RANGE = "split(codebook,3,per_tensor,zero)", "split(codebook,3,per_tensor)"


@pytest.mark.parametrize(
    ("form", "two", "four", "eight"),
    [
        ("uint{} per_tensor", 1.7, 15.0, 39.6),
        ("uint{} per_axis(0)", 4.6, 18.5, 43.1),
        ("int{} per_axis(0)", 1.5, 17.3, 42.5),
        ("uint{} per_tensor " + ZERO, 8.2, 23.5, 48.0),
        ("uint{} per_axis(0) " + ZERO, 13.1, 26.6, 51.2),
        ("int{} per_tensor " + ZERO, 0.5, 17.3, 42.1),
        ("uint{} per_tensor " + OWN_RANGE, 10.8, 24.6, 49.2),
    ],
)
def test_a_normal_weight(form, two, four, eight):
    found = [decibels(NORMAL, form.format(bits)) for bits in (2, 4, 8)]
    assert found == pytest.approx([two, four, eight], abs=0.06)


def test_tables_of_a_normal_weight():
    found = [decibels(NORMAL, f"uint4 per_tensor split(codebook,{k},per_tensor,levels=1)")
             for k in (12, 16)]  # fmt: skip
    assert found == pytest.approx([17.85, 20.17], abs=0.02)


@pytest.mark.parametrize("values", [STUDENT, outliers()], ids=["student", "outliers"])
def test_far_weights_want_scales_for_channels(values):
    """What is far out spoils the outer parts of the whole tensor; a table is best by far."""
    unsplit = decibels(values, "uint2 per_axis(0)")
    tensor, channel = (
        decibels(values, f"uint2 {g} {ZERO}") for g in ("per_tensor", "per_axis(0)")
    )
    own = decibels(values, f"uint2 per_tensor {OWN_RANGE}")
    table = decibels(values, "uint2 per_tensor split(codebook,16,per_tensor,levels=1)")
    four = decibels(values, "uint4 per_axis(0)")
    assert tensor < unsplit < own < channel < four < table
    assert channel > unsplit + 4
    assert table > four + 2


@pytest.mark.parametrize("values", [NORMAL, STUDENT], ids=["normal", "student"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_axis(0)"])
def test_tables_of_the_same_size_in_the_order_of_their_freedom(values, granularity):
    """Equal steps over zero, equal steps over a part's own range, and the best 12 values."""
    over = granularity
    zero = decibels(values, f"uint2 {granularity} split(codebook,3,{over},zero)")
    own = decibels(values, f"uint2 {granularity} split(codebook,3,{over})")
    best = decibels(values, f"uint2 {granularity} split(codebook,12,{over},levels=1)")
    assert zero < own < best


def test_clusters_of_a_normal_weight():
    """The cuts of a normal weight are at 0.61 sigma, and 27, 46 and 27 in 100 lie between."""
    ids = parts_of(NORMAL, Split(), Channels())
    cut = float(NORMAL[ids == 1].max()) / 0.05
    assert cut == pytest.approx(0.61, abs=0.02)
    shares = np.bincount(ids.ravel()) / ids.size
    assert shares == pytest.approx([0.27, 0.46, 0.27], abs=0.01)
    assert np.unique(whole(NORMAL, LITERAL)).size == 10
    assert np.unique(whole(NORMAL, OWN)).size == 12


@pytest.mark.parametrize("levels", [2, 3, 5, 9])
def test_levels_of_a_part(levels):
    """They do not hang on the bits, and each more of them is worth something."""
    text = f"uint2 per_tensor split(codebook,3,per_tensor,levels={levels})"
    assert np.unique(whole(NORMAL, Format.parse(text))).size == 3 * levels
    more = text.replace(f"={levels}", f"={levels + 1}")
    assert decibels(NORMAL, more) > decibels(NORMAL, text) + 0.4


# Parts


@settings(max_examples=150)
@given(weights((np.float16, np.float32, np.float64)), SPANS, CLUSTERS)
def test_a_weight_is_the_exact_sum_of_its_parts(weight, over, clusters):
    reader, values = weight
    before = values.copy()
    ids = parts_of(values, Split(clusters=clusters, over=over), Channels.of(reader))
    assert (ids.shape, ids.dtype) == (values.shape, np.uint8)
    parts = list(masked(values, ids))
    assert len(parts) <= clusters
    total = np.zeros_like(values)
    held = np.zeros(values.shape, int)
    for part in parts:
        assert (part.shape, part.dtype) == (values.shape, values.dtype)
        assert part.any()  # a layer of zeros is left out
        held += part != 0
        total += part
    assert held.max(initial=0) <= 1, "an element is in two parts"
    assert total.tobytes() == (values + 0.0).tobytes()  # to the bit, but for the sign of a zero
    np.testing.assert_array_equal(values, before)


@settings(max_examples=150)
@given(weights(), SPANS, CLUSTERS)
def test_parts_ascend_and_are_dense_in_every_group(weight, over, clusters):
    reader, values = weight
    channels = Channels.of(reader)
    ids = parts_of(values, Split(clusters=clusters, over=over), channels)
    pairs = (groups_of(channels.rows(a), over) for a in (values, ids))
    for group, parts in zip(*pairs, strict=True):
        used = min(clusters, np.unique(group).size)
        assert np.unique(parts).tolist() == list(range(used))
        ranges = [group[parts == number] for number in range(used)]
        assert all(one.max() < next_.min() for one, next_ in pairwise(ranges))


@settings(max_examples=100)
@given(weights(), SPANS, CLUSTERS)
def test_every_group_is_clustered_on_its_own(weight, over, clusters):
    """A channel, a block, and a block that is shorter than the others."""
    reader, values = weight
    channels, split = Channels.of(reader), Split(clusters=clusters, over=over, levels=1)
    found = [parts_of(values, split, channels), centres_of(values, split, channels)]
    assert all(one.flags.c_contiguous for one in found)
    pairs = (groups_of(channels.rows(a), over) for a in (values, *found))
    for group, parts, centres in zip(*pairs, strict=True):
        alone = kmeans(group.reshape(1, -1), clusters)
        np.testing.assert_array_equal(parts, alone.ids[0])
        np.testing.assert_array_equal(centres, alone.centres[0, parts].astype(np.float32))


def test_blocks_with_a_shorter_one_at_the_end():
    values = np.float32([[0, 9, 1, 5, 5, 6, 7, -1], [3, 3, 3, 1, 2, 9, 0, 0]])
    ids = parts_of(values, Split(clusters=2, over=PerBlock(1, 3)), Channels(0))
    assert ids.tolist() == [[0, 1, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0]]
    turned = parts_of(values.T, Split(clusters=2, over=PerBlock(0, 3)), Channels(1))
    assert turned.T.tolist() == ids.tolist()
    short = parts_of(values, Split(clusters=2, over=PerBlock(1, 9)), Channels(0))
    assert (
        short.tolist()
        == parts_of(values, Split(clusters=2, over=PerAxis(0)), Channels(0)).tolist()
    )


def test_a_channel_is_split_as_if_it_were_alone():
    draw = np.random.default_rng(0)
    values = (draw.normal(0, 1, (4, 3, 3, 3)) * [[[[1]]], [[[9]]], [[[0.1]]], [[[5]]]]).astype(
        "f4"
    )
    format = Format("uint2", PerAxis(0), split=Split(over=PerAxis(0)))
    found = whole(values, format)
    for number in range(4):
        alone = whole(values[number : number + 1], format)
        np.testing.assert_array_equal(found[number : number + 1], alone)
        tensor = whole(values[number], Format("uint2", split=Split()))
        np.testing.assert_array_equal(found[number], tensor)


@pytest.mark.parametrize("value", [0.5, -0.5, 0.0, 3e38, 1e-45])
@pytest.mark.parametrize("over", [PerTensor(), PerAxis(0), PerBlock(1, 2)])
@pytest.mark.parametrize("form", ["branches", "codebook", "int8-grid"])
def test_a_constant_weight_stays_what_it_is(value, over, form):
    """It is one part: nothing is doubled."""
    values = np.full((3, 5), value, np.float32)
    split = Split(form, over=over, zero=form == "branches")
    ids = parts_of(values, split, Channels())
    assert not ids.any()
    (part,) = list(masked(values, ids)) or [values]
    assert part.tobytes() == values.tobytes()
    found = whole(values, Format("uint4", PerAxis(0), split=split))
    # 1e-45 is below the least scale.
    np.testing.assert_allclose(found, values, rtol=1e-6, atol=1e-40)


def test_two_values_are_two_parts():
    values = np.float32([[0.5, 1], [1, 0.5]])
    ids = parts_of(values, Split(), Channels())
    assert [part.tolist() for part in masked(values, ids)] == [
        [[0.5, 0], [0, 0.5]],
        [[0, 1], [1, 0]],
    ]


def test_a_part_of_zeros_is_left_out():
    values = np.float32([[0, -0.0, 5], [0, -5, 0]])
    ids = parts_of(values, Split(), Channels())
    assert ids.max() == 2
    assert [part.tolist() for part in masked(values, ids)] == [
        [[0, 0, 0], [0, -5, 0]],
        [[0, 0, 5], [0, 0, 0]],
    ]
    nothing = np.zeros((2, 2), np.float32)
    assert list(masked(nothing, parts_of(nothing, Split(), Channels()))) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    values = np.float32([[1, 2], [bad, 4]])
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        parts_of(values, Split(), Channels())


# Channels


@given(weights())
def test_rows_and_back(weight):
    reader, values = weight
    channels = Channels.of(reader)
    rows = channels.rows(values)
    assert rows.shape == (values.shape[reader.axis] * channels.groups, values.size // len(rows))
    np.testing.assert_array_equal(channels.back(rows, values.shape), values)
    numbers = np.arange(values.size).reshape(values.shape)
    assert sorted(channels.rows(numbers).ravel().tolist()) == list(range(values.size))
    np.testing.assert_array_equal(channels.rows(channels.back(rows, values.shape)), rows)


@pytest.mark.parametrize(
    ("op", "shape", "fields", "axis", "groups"),
    [
        ("MatMul", (4, 6), {}, 1, 1),
        ("MatMul", (2, 4, 6), {}, 2, 1),
        ("Gemm", (4, 6), {}, 1, 1),
        ("Gemm", (6, 4), {"transposed": 1}, 0, 1),
        ("Conv", (6, 4, 3), {}, 0, 1),
        ("Conv", (6, 2, 3, 3), {"group": 2}, 0, 1),  # an axis holds all of a Conv's channels
        ("ConvTranspose", (4, 6, 3, 3), {}, 1, 1),
        ("ConvTranspose", (4, 6, 3), {"group": 2}, 1, 2),
        ("Gather", (6, 4), {}, 0, 1),
    ],
)
def test_where_channels_lie(op, shape, fields, axis, groups):
    if op == "Gather":
        w = ir.val("w", ir.DataType.FLOAT, shape)
        w.const_value = ir.tensor(np.zeros(shape, np.float32))
        reader = weight_of(ir.node(op, [w, ir.val("x", ir.DataType.INT64)]))
    else:
        reader = reader_of(op, shape, **fields)
    assert Channels.of(reader) == Channels(axis, groups)


def convolved(weight, x, op, **attributes):
    """Return what onnxruntime makes of one layer."""
    w = ir.val("w", ir.DataType.FLOAT, weight.shape)
    w.const_value = ir.tensor(weight, name="w")
    node = ir.node(op, [ir.val("x", ir.DataType.FLOAT, x.shape), w], attributes=attributes)
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [node.inputs[0]], [y], nodes=[node], initializers=[w], opset_imports={"": 21}, name="g"
    )
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("op", "shape", "x", "attributes"),
    [
        ("MatMul", (4, 6), (3, 4), {}),
        ("MatMul", (2, 4, 6), (2, 3, 4), {}),
        ("Gemm", (4, 6), (3, 4), {}),
        ("Gemm", (6, 4), (3, 4), {"transB": 1}),
        ("Conv", (6, 4, 3), (1, 4, 8), {}),
        ("Conv", (6, 2, 3, 3), (1, 4, 8, 8), {"group": 2}),
        ("Conv", (6, 1, 2, 2), (1, 6, 5, 5), {"group": 6}),
        ("Conv", (4, 2, 2, 2, 2), (1, 2, 4, 4, 4), {}),
        ("ConvTranspose", (4, 6, 3), (1, 4, 5), {}),
        ("ConvTranspose", (4, 3, 3), (1, 4, 5), {"group": 2}),
        ("ConvTranspose", (6, 2, 3, 2), (1, 6, 4, 4), {"group": 3}),
        ("ConvTranspose", (4, 1, 3, 3), (1, 4, 5, 5), {"group": 4}),
        ("ConvTranspose", (4, 2, 2, 2, 2), (1, 4, 3, 3, 3), {"group": 2}),
    ],
)
def test_rows_are_the_output_channels_in_their_order(op, shape, x, attributes):
    """A row of zeros silences its own channel, and no other."""
    draw = np.random.default_rng(0)
    values, x = (draw.normal(0, 1, size).astype(np.float32) for size in (shape, x))
    flag = {"transposed": attributes.get("transB", 0), "group": attributes.get("group", 1)}
    channels = Channels.of(reader_of(op, shape, **flag))
    before = convolved(values, x, op, **attributes)
    place = 1 if "Conv" in op else -1
    rows = channels.rows(values)
    assert len(rows) == before.shape[place]
    for number in range(len(rows)):
        changed = rows.copy()
        changed[number] = 0
        after = convolved(channels.back(changed, values.shape), x, op, **attributes)
        assert not np.take(after, number, place).any()
        np.testing.assert_allclose(
            np.delete(after, number, place), np.delete(before, number, place), atol=1e-5
        )


# Rounding of parts


GRANULARITIES = st.sampled_from(["tensor", "axis", "block"])


@st.composite
def cases(draw, forms=("branches", "codebook"), zeros=(True, False), levels=(0, 0, 1, 3)):
    """Draw a node, the values of its weight, and a format with a split."""
    reader, values = draw(weights())
    form = draw(st.sampled_from(forms))
    held = form == "branches" or draw(st.sampled_from(zeros))
    count = 0 if held else draw(st.sampled_from(levels))
    dtype = draw(st.sampled_from(["uint2", "uint4", "int2"]))
    axis = reader.axis
    granularity = {
        "tensor": PerTensor(),
        "axis": PerAxis(axis),
        "block": PerBlock(0 if axis else 1, draw(st.integers(1, 4))),
    }[draw(GRANULARITIES)]
    split = Split(form, draw(CLUSTERS), draw(SPANS), count, held)
    return reader, values, Format(dtype, granularity, split=split)


def scales_of(values, format):
    """Return which scale each element has, as a number."""
    scale = symmetric_scale(values, format)
    numbers = np.array(np.arange(scale.size).reshape(scale.shape), np.float32)
    return np.broadcast_to(spread(numbers, values.shape, format), values.shape)


@settings(max_examples=100)
@given(cases(zeros=(True,)), st.sampled_from(["minmax", "mse", "auto"]))
def test_the_whole_is_the_sum_of_parts_that_are_rounded_apart(case, clip):
    """In ranges that hold zero the parts are layers of their own, and the table their sum."""
    reader, values, format = case
    channels = Channels.of(reader)
    ids = parts_of(values, format.split, channels)
    total = np.zeros(values.shape, np.float32)
    for part in masked(values, ids):
        floats = rounded(part, format.plain, clip).floats()
        assert not floats[part == 0].any()  # its zeros stay zeros
        total += floats
    np.testing.assert_array_equal(joined(values, ids, format, channels, clip), total)


@settings(max_examples=150)
@given(cases())
def test_the_values_are_no_more_than_the_split_says(case):
    """Within one scale and one clustering."""
    reader, values, format = case
    channels = Channels.of(reader)
    found = whole(values, format, "auto", channels)
    # Means have no scale.
    scaled = format if format.split.levels != 1 else Format("int8")
    number = scales_of(values, scaled)
    spans = groups_of(
        channels.rows(np.arange(values.size).reshape(values.shape)), format.split.over
    )
    for span in spans:
        scales = number.ravel()[span]
        for one in np.unique(scales):
            group = found.ravel()[span[scales == one]]
            assert np.unique(group).size <= format.split.entries(format.bits)


@settings(max_examples=100)
@given(cases(("codebook",), (False,), levels=(0, 3)))
def test_a_part_is_within_half_a_step_of_its_own_range(case):
    reader, values, format = case
    channels = Channels.of(reader)
    ids = parts_of(values, format.split, channels)
    found = joined(values, ids, format, channels)
    number = scales_of(values, format)
    steps = (format.split.levels or 2**format.bits) - 1
    for place in {*zip(ids.ravel().tolist(), number.ravel().tolist(), strict=True)}:
        member = (ids == place[0]) & (number == place[1])
        group, actual = values[member].astype(np.float64), found[member].astype(np.float64)
        step = (group.max() - group.min()) / steps
        slack = 1e-6 * np.abs(group).max()
        assert np.all(np.abs(actual - group) <= step / 2 + slack)
        ends = (group.min(), group.max())
        assert (actual.min(), actual.max()) == pytest.approx(ends, rel=1e-7, abs=slack * 1e-6)


@settings(max_examples=60)
@given(cases(("codebook",), (False,), levels=(1,)))
def test_each_elements_value_is_that_of_its_cluster(case):
    """With one level the table holds the means, whatever the scales."""
    reader, values, format = case
    channels = Channels.of(reader)
    ids = parts_of(values, format.split, channels)
    np.testing.assert_array_equal(
        joined(values, ids, format, channels), centres_of(values, format.split, channels)
    )


@settings(max_examples=60)
@given(cases(("int8-grid",)), st.sampled_from([7, 8]))
def test_the_grid_is_within_half_a_step_of_the_parts(case, grid):
    reader, values, format = case
    format = replace(format, split=replace(format.split, grid=grid))
    parts = whole(values, format, "auto", Channels.of(reader))
    found = split_floats(values, format, "auto", [reader])
    behind = rounded_to(format, reader)
    assert (behind.dtype, behind.bits, behind.split) == ("int8", grid, None)
    scale = symmetric_scale(parts, behind)
    step = np.broadcast_to(spread(scale, values.shape, behind), values.shape).astype(np.float64)
    assert np.all(np.abs(found.astype(np.float64) - parts) <= step * (0.5 + 1e-4))
    # A value of the table is one of the grid's, so there are no more of them than before.
    pairs = {*zip(parts.ravel().tolist(), step.ravel().tolist(), strict=True)}
    after = {*zip(found.ravel().tolist(), step.ravel().tolist(), strict=True)}
    assert len(after) <= len(pairs)


@pytest.mark.parametrize(
    ("text", "op", "shape", "expected"),
    [
        ("uint2 per_axis(1) split(branches,3,per_tensor,zero)", "MatMul", (64, 8), None),
        ("uint2 per_axis(1) split(codebook,3,per_tensor)", "MatMul", (64, 8), None),
        ("uint2 per_tensor split(int8-grid,3,per_tensor)", "MatMul", (64, 8), "int8 per_tensor"),
        ("uint2 per_axis(1) split(int8-grid,3,per_tensor)", "Gemm", (64, 8), "int8 per_axis(1)"),
        (
            "uint2 per_axis(0) split(int8-grid,3,per_tensor,grid=7)",
            "Conv",
            (8, 4, 3, 3),
            "int8:7 per_axis(0)",
        ),
        # An int8 kernel has no scales for blocks.
        (
            "uint2 per_block(0,32) split(int8-grid,3,per_tensor)",
            "MatMul",
            (64, 8),
            "int8 per_axis(1)",
        ),
        (
            "uint2 per_axis(1) split(nearest,3,per_tensor)",
            "MatMul",
            (64, 8),
            "int4 per_block(0,32)",
        ),
    ],
)
def test_what_the_sum_of_the_parts_is_rounded_to(text, op, shape, expected):
    reader = reader_of(op, shape)
    format = Format.parse(text)
    behind = rounded_to(format, reader)
    assert (behind and str(behind)) == expected
    values = samples("normal", shape)
    parts = whole(values, format, "auto", Channels.of(reader))
    found = split_floats(values, format, "auto", [reader])
    last = parts if behind is None else rounded(parts, behind).floats()
    np.testing.assert_array_equal(found, last)
    np.testing.assert_array_equal(simulated(values, format, "auto", [reader]), found)


def test_blocks_of_a_gemm_whose_weight_is_turned():
    reader = reader_of("Gemm", (8, 64), transposed=1)
    format = Format.parse("uint2 per_axis(0) split(nearest,3,per_tensor)")
    assert rounded_to(format, reader) == Format("int4", PerBlock(1, 32))


@pytest.mark.parametrize("form", ["branches", "codebook", "int8-grid"])
def test_splitting_is_the_same_on_every_run(form):
    reader = reader_of("MatMul", (64, 32))
    values = samples("heavy", (64, 32))
    before = values.copy()
    split = Split(form, zero=form == "branches")
    format = Format("uint2", PerAxis(1), split=split)
    first, second = (split_floats(values, format, "auto", [reader]) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    np.testing.assert_array_equal(values, before)


def test_a_turned_weight_has_the_same_parts():
    """Flattened, [K, N] of a MatMul and [N, K] of a Gemm hold the same values."""
    values = samples("heavy", (12, 7))
    matmul, gemm = reader_of("MatMul", (12, 7)), reader_of("Gemm", (7, 12), transposed=1)
    for over, turned in ((PerTensor(), PerTensor()), (PerAxis(1), PerAxis(0))):
        one = Format("uint2", PerAxis(1), split=Split(over=over))
        two = Format("uint2", PerAxis(0), split=Split(over=turned))
        found = [split_floats(values, one, "auto", [matmul])]
        found.append(split_floats(values.T.copy(), two, "auto", [gemm]).T)
        np.testing.assert_array_equal(*found)


def test_a_bias_bounds_the_scales_of_every_branch():
    """What the unsplit weight keeps to, its parts keep to: the int32 bias must fit."""
    text = f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <float[2,2] w = {{0, 0, 0, 0}}, float[2] b = {{100, 100}}> {{ y = Gemm (x, w, b) }}"""
    model = ir.from_onnx_text(text)
    plan = {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 1.0}
    notes.apply_plan(model, {"x": plan})
    reader = weight_of(model.graph[0])
    values = np.float32([[1e-9, -1e-9], [1e-6, 2e-6]])
    format = Format("uint4", PerAxis(1), split=Split("branches", zero=True))
    assert not split_floats(values, format, "auto", [reader]).any()
    notes.apply_plan(model, {"x": {**plan, "mode": "dynamic"}})
    assert split_floats(values, format, "auto", [reader]).any()


# Signal over noise


def test_decibels_by_hand():
    values = np.float32([3, 4])
    assert sqnr_db(values, np.float32([3, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(values, np.float32([0, 0])) == 0
    assert sqnr_db(values, values) == math.inf
    assert sqnr_db(np.zeros(2, np.float32), np.zeros(2, np.float32)) == math.inf


def test_decibels_of_the_widest_weights():
    values = np.float32([3e38, -3e38])
    assert sqnr_db(values, values * np.float32(0.9)) == pytest.approx(20.0, abs=1e-4)
    assert sqnr_db(values * np.float32(1e-38), values * np.float32(0.9e-38)) == pytest.approx(20.0)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0)])
@pytest.mark.parametrize("over", [PerAxis(0), PerBlock(1, 32)])
def test_a_part_has_the_range_of_what_its_clustering_spans(over, granularity):
    """Rounding the blocks of a weight one by one gives what rounding it whole does."""
    draw = np.random.default_rng(3)
    weight = draw.normal(0, 1, (5, 80)).astype(np.float32)
    weight *= np.repeat(draw.uniform(0.1, 10, (5, 10)), 8, axis=1).astype(np.float32)
    whole = Format("uint2", granularity, split=Split("codebook", 3, over))
    alone = Format("uint2", PerTensor(), split=Split("codebook", 3, PerTensor()))

    def rounded_parts(values, format):
        ids = parts_of(values, format.split, Channels())
        return joined(values, ids, format, Channels())

    size = over.size if isinstance(over, PerBlock) else weight.shape[1]
    found = rounded_parts(weight, whole)
    for row in range(5):
        for start in range(0, 80, size):  # the last block is shorter
            block = np.s_[row : row + 1, start : start + size]
            np.testing.assert_array_equal(found[block], rounded_parts(weight[block], alone))


def test_blocks_of_a_format_that_are_smaller_than_those_of_the_split_have_ranges_of_their_own():
    values = np.random.default_rng(5).normal(size=(3, 64)).astype(np.float32)
    over, few = PerBlock(1, 64), PerBlock(1, 4)
    split = Split("codebook", 2, over)
    wide, narrow = (
        joined(
            values,
            parts_of(values, split, Channels()),
            Format("uint2", one, split=split),
            Channels(),
        )
        for one in (PerAxis(0), few)
    )
    assert sqnr_db(values, narrow) > sqnr_db(values, wide) + 3
