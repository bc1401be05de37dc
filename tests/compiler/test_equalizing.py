"""What is seen of activations, which factors are tried, and which are taken."""

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import equalizing
from fourfold.compiler.covariance import Meeting
from fourfold.compiler.equalizing import Balance, Gathering, Operand, decide
from fourfold.compiler.gauges import find


def model_of(body, inputs="float[9,4] x", **weights):
    """Parse a graph whose weights are given, or drawn where only their shape is."""
    draw = np.random.default_rng(7)
    arrays = {
        name: np.float32(draw.normal(size=w) if isinstance(w, tuple) else w)
        for name, w in weights.items()
    }
    listed = ", ".join(f"float{list(a.shape)} {n}" for n, a in arrays.items())
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}, {listed}) => (float[a,b] y) '
        f"{{ {body} }}"
    )
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor(arrays[value.name], name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


def seen(rows):
    """Return what a layer reads, [rows, columns]."""
    rows = np.float32(rows)
    ends = rows.min(0, initial=0).astype(float), rows.max(0, initial=0).astype(float)
    return Operand(rows[None], *ends, np.abs(rows).max(0).astype(float))


def chain(bits=8, spread=4, **weights):
    """Return the balance of x -> a -> b -> y, with what was seen before the last two layers."""
    shapes = {"w1": (4, 6), "w2": (6, 5), "w3": (5, 3)} | weights
    model = model_of("a = MatMul(x,w1) b = MatMul(a,w2) y = MatMul(b,w3)", **shapes)
    gauges, draw = find(model.graph).exact, np.random.default_rng(2)
    operands = {
        id(gauge.readers[0].share.node): seen(
            draw.normal(size=(50, gauge.count)) * float(spread) ** np.arange(gauge.count)
        )
        for gauge in gauges
    }
    return Balance(gauges, operands, bits, (0.25, 0.75))


def joined():
    """Return the balance of two values that one layer reads side by side, the second one great."""
    model = model_of(
        "a = MatMul(x,w1) b = MatMul(x,w2) c = Concat<axis=1>(a,b) y = MatMul(c,w3)",
        w1=(4, 3), w2=(4, 3), w3=(6, 5),
    )  # fmt: skip
    gauges, draw = find(model.graph).exact, np.random.default_rng(4)
    rows = draw.normal(size=(60, 6)) * [1, 1, 1, 64, 64, 64]
    return Balance(gauges, {id(gauges[0].readers[0].share.node): seen(rows)}, 8, (0.5,))


def test_equal_ranges_are_left_and_unequal_ones_meet_in_the_middle():
    first, second = [[16, 1, 0], [-8, 1, 0]], [[1, -1], [1, 0], [1, 1]]
    model = model_of("a = MatMul(x,w1) y = MatMul(a,w2)", "float[1,2] x", w1=first, w2=second)
    balance = Balance(find(model.graph).exact, {}, 8, ())
    np.testing.assert_array_equal(balance.ranges(0, inverse=False), [16, 1, 0])
    np.testing.assert_array_equal(balance.ranges(0, inverse=True), [1, 1, 1])
    np.testing.assert_array_equal(balance.balanced()[0], [-2, 0, 0])  # 16/4 and 1*4; dead stays
    balance.exponents[0] = balance.balanced()[0]
    np.testing.assert_array_equal(balance.ranges(0, inverse=False), [4, 1, 0])
    np.testing.assert_array_equal(balance.ranges(0, inverse=True), [4, 1, 1])
    assert balance.loss(0) == pytest.approx(1 - (1 + 1 / 16) / 3)


def test_equalized_chains_are_balanced_as_a_whole():
    balance = chain(w1=np.diag([1.0, 4, 16, 64]) @ np.ones((4, 6)) * [1, 64, 1, 1, 64, 1])
    before = [np.ptp(np.log2(balance.ranges(n, inverse=False))) for n in (0, 1)]
    balance.exponents = balance.balanced()
    for number in (0, 1):
        ranges = [balance.ranges(number, inverse) for inverse in (False, True)]
        assert np.abs(np.log2(ranges[0] / ranges[1])).max() <= 1  # half a step off at most
    assert before[0] == 6
    assert [step.any() for step in balance.balanced()] != [] and all(
        (one == two).all() for one, two in zip(balance.balanced(), balance.exponents, strict=True)
    )


def test_smoothing_follows_the_formula():
    great, weight = np.array([64.0, 1, 0, 4]), np.array([1.0, 1, 1, 4])
    np.testing.assert_array_equal(equalizing._smoothing(great, weight, 0.5, 0.5), [-3, 0, 0, 0])
    np.testing.assert_array_equal(equalizing._smoothing(great, weight, 1.0, 0.0), [-4, 2, 0, 0])


@given(seed=st.integers(0, 99), bits=st.sampled_from([2, 4, 8]))
@settings(max_examples=20)
def test_rounding_errs_by_half_a_step_at_most(seed, bits):
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(2, 3, 5)).astype(np.float32)
    step = np.abs(weight).max(axis=2, keepdims=True) / (2 ** (bits - 1) - 1)
    error = np.abs(equalizing.rounded_weight(weight, bits) - weight)
    assert (error <= step * 0.501).all()
    rows = draw.normal(size=(1, 7, 5)).astype(np.float32)
    low, high = float(rows.min()), float(rows.max())
    step = (max(high, 0) - min(low, 0)) / 255
    whole = np.abs(equalizing._affine(rows, low, high) - rows).max()
    assert whole <= step * 1.01
    best = np.square(equalizing.rounded_rows(rows, low, high) - rows).sum()
    assert best <= np.square(equalizing._affine(rows, low, high) - rows).sum()


def test_a_range_is_clipped_where_that_errs_less():
    draw = np.random.default_rng(0)
    many = draw.normal(size=(1, 60000, 4)).astype(np.float32)
    many[0, 0, 0] = 8
    assert 3 < equalizing.rounded_rows(many, float(many.min()), 8.0).max() < 7
    few = many[:, :400]
    assert equalizing.rounded_rows(few, float(few.min()), 8.0).max() == pytest.approx(8, abs=0.1)


def test_a_gathering_keeps_ends_of_all_and_rows_of_some():
    gathering = Gathering(Meeting("x", "MatMul", 2), quota=3, seed=0)
    first = np.float32([[[1, -9], [2, 0], [3, 1], [4, -1]]])
    second = np.float32([[[-1, 50], [0, 7]]])
    gathering.add(first)
    gathering.add(second)
    operand = gathering.operand()
    assert (operand.low.tolist(), operand.high.tolist()) == ([-1, -9], [4, 50])
    assert operand.half.tolist() == [4, 9]  # of the first batch alone
    assert operand.rows.shape == (1, 5, 2)
    known = {tuple(row) for array in (first, second) for row in array[0].tolist()}
    assert {tuple(row) for row in operand.rows[0].tolist()} <= known


def test_a_gathering_lays_convolutions_out_by_samples():
    meeting = Meeting("x", "Conv", 4, groups=2, kernel=(2, 2), strides=(1, 1), dilations=(1, 1),
                      pads=(0, 0, 0, 0))  # fmt: skip
    gathering = Gathering(meeting, quota=3, seed=0)
    x = np.arange(2 * 2 * 9, dtype=np.float32).reshape(2, 2, 3, 3)
    gathering.add(x)
    operand = gathering.operand()
    assert operand.rows.shape == (2, 4, 4)  # two positions of either sample
    assert (operand.low.tolist(), operand.high.tolist()) == ([0, 0], [26, 35])
    np.testing.assert_array_equal(operand.rows[1] - operand.rows[0], 9)
    corners = operand.rows[0][:, 0]
    assert len(set(corners.tolist())) == 4
    assert set(corners.tolist()) <= {0, 1, 3, 4, 18, 19, 21, 22}


def test_candidates_do_not_depend_on_what_was_chosen_before():
    balance = chain()
    first = balance.candidates(0, balance.exponents[0])
    balance.exponents[0] = np.arange(6) - 3
    second = balance.candidates(0, balance.exponents[0])
    assert len(first) == 5
    for name in first.keys() - {"weight ranges"}:
        np.testing.assert_array_equal(first[name], second[name])


def test_candidates_follow_what_the_first_half_shows():
    balance = chain()
    (operand,) = (balance.operands[id(r.share.node)] for r in balance.gauges[0].readers)
    expected = equalizing._smoothing(operand.half, np.ones(6), 0.75, 0.0)
    np.testing.assert_array_equal(
        balance.candidates(0, balance.exponents[0])["alpha 0.75, weights aside"], expected
    )
    operand.half[5] = 1.0
    fewer = balance.candidates(0, balance.exponents[0])["alpha 0.75, weights aside"]
    assert fewer[5] > expected[5]


def test_noise_is_what_rounding_leaves_of_each_row():
    balance = chain()
    reader = balance.gauges[1].readers[0]
    operand = balance.operands[id(reader.share.node)]
    weight = reader.share.value.const_value.numpy()
    exponents = np.array([0, -1, -3, -5, -6])
    rows = operand.rows[0] * 2.0**exponents
    low, high = ((end * 2.0**exponents) for end in (operand.low, operand.high))
    rows = equalizing.rounded_rows(np.float32(rows), low.min(), high.max())
    exact = operand.rows[0] @ weight
    rounded = equalizing.rounded_weight((weight / np.float32(2.0**exponents)[:, None]).T[None], 8)
    error = rows @ rounded[0].T - exact
    own = np.square(exact).sum(1)
    share = own + np.median(own)
    expected = (np.square(error).sum(1) / share).sum() / (own / share).sum()
    assert balance.loss(1, exponents) == pytest.approx(expected, rel=1e-4)


def test_outputs_count_as_the_next_gauge_scales_them():
    balance = chain()
    before = balance.loss(0)
    balance.exponents[1] = np.array([0, 3, 0, -3, 0])
    assert balance.loss(0) != before
    balance.exponents[1] = np.full(5, 3)
    assert balance.loss(0) == pytest.approx(before, rel=1e-9)


def test_a_question_leaves_the_exponents_as_they_were():
    balance = chain()
    balance.exponents[0] = np.arange(6)
    kept = balance.exponents[0]
    balance.loss(0, np.zeros(6, np.int64))
    balance.candidates(0, kept)
    balance.balanced()
    assert balance.exponents[0] is kept


def test_choices_lose_noise_and_settle_and_fixed_gauges_stay():
    balance = chain()
    before = [balance.loss(n) for n in (0, 1)]
    chosen = decide(balance, 0.02, 0.5)
    assert all(name and left < 0.98 for name, left in chosen)
    after = [balance.loss(n) for n in (0, 1)]
    assert sum(after) < 0.5 * sum(before)
    kept = [one.copy() for one in balance.exponents]
    assert decide(balance, 0.0, 0.0) == [("", 1.0), ("", 1.0)]
    np.testing.assert_array_equal(np.concatenate(kept), np.concatenate(balance.exponents))
    fixed = chain()
    fixed.fixed = frozenset({0})
    decide(fixed, 0.02, 0.5)
    assert not fixed.exponents[0].any()
    assert fixed.exponents[1].any()


def test_of_candidates_about_as_good_the_closest_factors_are_taken():
    losses = {(0, 0): 1.0, (0, -9): 0.1, (0, -3): 0.11, (1, -3): 0.105, (0, -2): 0.13}
    balance = SimpleNamespace(
        exponents=[np.zeros(2, np.int64)], loss=lambda _, one: losses[tuple(one.tolist())]
    )
    tried = {str(one): np.array(one) for one in list(losses)[1:]}
    assert equalizing._mildest(balance, 0, tried) == ("(0, -3)", 0.11)
    losses[0, 0] = 0.2
    assert equalizing._mildest(balance, 0, tried) == ("(0, -9)", 0.1)


def test_two_gauges_before_one_layer_are_weighed_together():
    balance = joined()
    assert [gauge.free.sum() for gauge in balance.gauges] == [3, 3]
    before = balance.loss(0)
    assert balance.loss(1) == before  # what they share
    chosen = decide(balance, 0.02, 0.5)
    assert balance.loss(0) == balance.loss(1) < 0.6 * before
    assert any(name for name, _ in chosen)
    one, two = (g.free for g in balance.gauges)
    small, great = balance.exponents[0][one], balance.exponents[1][two]
    assert small.min() - great.max() >= 2  # the great ones come down, or the others up
    for gauge, exponents in zip(balance.gauges, balance.exponents, strict=True):
        assert not exponents[~gauge.free].any()


def test_factors_on_a_factor_of_the_value_are_part_of_what_is_seen():
    model = model_of(
        """a = MatMul(x,w1) r = Relu(a) b = MatMul(x,w2) m = Mul(r,b) c = MatMul(m,w3)
           d = MatMul(b,w4) y = Add(c,d)""",
        w1=(4, 3), w2=(4, 3), w3=(3, 5), w4=(3, 5),
    )  # fmt: skip
    gauges = find(model.graph).exact
    assert [len(gauge.readers) for gauge in gauges] == [1, 2]
    rows = np.random.default_rng(4).normal(size=(60, 3))
    layers = {r.share.value.name: id(r.share.node) for r in gauges[1].readers}
    operands = {layers["w3"]: seen(1000 * rows), layers["w4"]: seen(rows)}
    balance = Balance(gauges, operands, 8, (1.0,))
    first = balance.candidates(1, balance.exponents[1])["alpha 1"]
    balance.exponents[0] = np.array([2, 0, -1])
    second = balance.candidates(1, balance.exponents[1])["alpha 1"]
    assert (first - second - (first - second)[1]).tolist() == [2, 0, -1]


def test_only_free_channels_are_balanced():
    model = model_of(
        "a = MatMul(x,w1) y = MatMul(a,w2) p, q = Split<axis=1, num_outputs=2>(a) s = Sigmoid(q)",
        w1=np.ones((4, 6)) * [64, 1, 1, 64, 1, 1], w2=(6, 5),
    )  # fmt: skip
    balance = Balance(find(model.graph).exact, {}, 8, ())
    assert balance.gauges[0].free.tolist() == [True] * 3 + [False] * 3
    (found,) = balance.balanced()
    assert found[0] < 0
    assert not found[3:].any()


def test_weights_alone_decide_where_a_layer_was_not_seen():
    balance = chain(w1=np.ones((4, 6)) * [1, 64, 1, 1, 64, 1])
    missing = id(balance.gauges[0].readers[0].share.node)
    balance.operands = {key: one for key, one in balance.operands.items() if key != missing}
    assert not balance.sees(0)
    assert set(balance.candidates(0, balance.exponents[0])) == {"weight ranges"}
    (name, left), _ = decide(balance, 0.02, 0.5)
    assert name == "weight ranges"
    assert 0 <= left < 1
