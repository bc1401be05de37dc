"""The loss of outputs against the report's figure, against hand-made ones, and at the edges."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, softmax

from fourfold.compiler.compare import compare
from fourfold.compiler.losses import (
    WORST,
    OutputLoss,
    float_outputs,
    kind_of,
    scale_of,
)

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
NAN, INF = float("nan"), float("inf")
KINDS = pytest.mark.parametrize("kind", ["mse", "kl"])


def loss(kind, expected, got, scale="logits"):
    """Return the loss of one output, or of several, in one batch."""
    pair = [x if isinstance(x, dict) else {"y": np.asarray(x)} for x in (expected, got)]
    one = OutputLoss(kind, scale)
    one.add(*pair)
    return one.value


FLOATS = st.floats(-1e3, 1e3, width=32)


@st.composite
def pairs(draw):
    """Float32 outputs [samples, classes] of a model and of its variant."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(2, 5)))
    return draw(arrays(np.float32, shape, elements=FLOATS)), draw(
        arrays(np.float32, shape, elements=FLOATS)
    )


# mse


@given(pairs(), st.integers(1, 6))
def test_mse_is_the_inverse_of_the_reports_sqnr(pair, size):
    expected, got = pair
    batches = [{"number": np.int64(n)} for n in range(0, len(expected), size)]

    def of(array):
        parts = {int(b["number"]): array[int(b["number"]) :][:size] for b in batches}
        return lambda batch: {"y": parts[int(batch["number"])]}

    report = compare(of(expected), of(got), batches, None)
    found = OutputLoss("mse")
    for batch in batches:
        found.add(of(expected)(batch), of(got)(batch))
    if found.value == 0:
        assert report.sqnr_db == INF
    elif np.square(expected.astype(np.float64)).sum() > 1e-20:
        assert -10 * math.log10(found.value) == pytest.approx(report.sqnr_db, abs=1e-9)


def test_mse_by_hand():
    assert loss("mse", [[3.0, 4.0]], [[3.0, 3.0]]) == 1 / 25
    assert loss("mse", [[3.0, 4.0]], [[0.0, 0.0]]) == 1
    # All float outputs together: power over power, not the mean of two shares.
    two = {"a": np.float32([[3.0]]), "b": np.float32([[4.0]])}
    assert loss("mse", two, {"a": np.float32([[2.0]]), "b": np.float32([[2.0]])}) == 5 / 25
    # An image, and a scalar.
    assert loss("mse", np.ones((2, 3, 4, 4)), np.zeros((2, 3, 4, 4))) == 1
    assert loss("mse", np.float32(2), np.float32(1)) == 1 / 4


@given(pairs(), st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
def test_the_scale_of_the_outputs_does_not_matter_to_mse(pair, factor):
    expected, got = (x.astype(np.float64) for x in pair)
    plain = loss("mse", expected, got)
    if np.square(expected).sum() > 1e-12:
        assert loss("mse", expected * factor, got * factor) == pytest.approx(plain, rel=1e-9)


def test_a_model_whose_outputs_are_all_zero():
    assert loss("mse", np.zeros((2, 3)), np.zeros((2, 3))) == 0
    assert loss("mse", np.zeros((2, 3)), np.ones((2, 3))) == WORST


# kl


def test_kl_by_hand():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    nats = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert loss("kl", p, q, "probabilities") == pytest.approx(nats, rel=1e-12)
    # From the float model to the variant, not back.
    back = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert loss("kl", q, p, "probabilities") == pytest.approx(back, rel=1e-12)
    # The mean over samples.
    both = loss("kl", np.vstack([p, p]), np.vstack([q, p]), "probabilities")
    assert both == pytest.approx(nats / 2, rel=1e-12)
    # softmax([0, ln 3]) is [1/4, 3/4].
    logits = loss("kl", [[0.0, 0.0]], [[0.0, math.log(3)]])
    assert logits == pytest.approx(nats, rel=1e-12)
    # A certain class that the variant gives a half.
    certain = loss("kl", [[1.0, 0.0]], [[0.5, 0.5]], "probabilities")
    assert certain == pytest.approx(math.log(2), rel=1e-12)


@given(pairs())
def test_kl_is_the_same_on_every_scale(pair):
    expected, got = (np.clip(x.astype(np.float64), -20, 20) for x in pair)
    logits = loss("kl", expected, got)
    likely = loss("kl", softmax(expected, -1), softmax(got, -1), "probabilities")
    logs = loss("kl", log_softmax(expected, -1), log_softmax(got, -1), "log-probabilities")
    assert likely == pytest.approx(logits, rel=1e-9, abs=1e-12)
    assert logs == pytest.approx(logits, rel=1e-9, abs=1e-12)


@given(pairs(), st.floats(-100, 100))
def test_a_constant_on_all_logits_changes_no_class(pair, shift):
    expected, got = (x.astype(np.float64) for x in pair)
    moved = loss("kl", expected, got + shift)
    assert moved == pytest.approx(loss("kl", expected, got), rel=1e-9, abs=1e-9)
    assert loss("kl", expected, expected + shift) == pytest.approx(0, abs=1e-9)


def test_kl_looks_at_the_first_output_alone():
    first = {"y": np.array([[0.0, 1.0]]), "z": np.array([[5.0, 1.0]])}
    assert loss("kl", first, {**first, "z": np.array([[-5.0, 9.0]])}) == 0
    assert loss("kl", first, {**first, "y": np.array([[1.0, 0.0]])}) > 0.1


def test_kl_over_positions_and_of_one_vector():
    draw = np.random.default_rng(0)
    expected, got = draw.normal(size=(2, 2, 3, 4, 5))
    flat = loss("kl", expected.reshape(-1, 5), got.reshape(-1, 5))
    assert loss("kl", expected, got) == pytest.approx(flat, rel=1e-12)
    vector = loss("kl", expected[0, 0, 0], got[0, 0, 0])
    assert vector == pytest.approx(loss("kl", expected[0, 0, :1], got[0, 0, :1]), rel=1e-12)


def test_probabilities_that_vanish():
    """A float32 Softmax rounds to 0, which has no logarithm: it counts as 1e-30."""
    got = loss("kl", [[1.0, 0.0]], [[0.0, 1.0]], "probabilities")
    assert got == pytest.approx(-math.log(1e-30), rel=1e-12)
    assert loss("kl", [[1.0, 0.0]], [[1.0, 0.0]], "probabilities") == 0


# Both


@KINDS
@given(data=st.data())
def test_the_loss_is_a_finite_number_from_zero_up(kind, data):
    expected, got = data.draw(pairs())
    found = loss(kind, expected, got)
    assert 0 <= found <= WORST
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert loss(kind, expected, expected) == 0


@KINDS
@given(data=st.data())
def test_the_split_into_batches_does_not_matter(kind, data):
    expected, got = data.draw(pairs())
    cuts = data.draw(st.lists(st.integers(1, len(expected)), max_size=3).map(sorted))
    parts = OutputLoss(kind)
    for start, end in zip([0, *cuts], [*cuts, len(expected)], strict=True):
        parts.add({"y": expected[start:end]}, {"y": got[start:end]})
    assert parts.value == pytest.approx(loss(kind, expected, got), rel=1e-9, abs=1e-15)


@KINDS
def test_nothing_added_is_no_loss(kind):
    assert OutputLoss(kind).value == 0


@KINDS
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_outputs_that_are_not_finite_are_the_worst(kind, bad, dtype):
    expected = np.array([[1.0, 2.0], [3.0, 4.0]], dtype)
    got = expected.copy()
    got[1, 0] = bad
    assert loss(kind, expected, got) == WORST
    assert loss(kind, expected, np.full_like(expected, bad)) == WORST


@KINDS
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_source_that_is_not_finite_gives_a_number_too(kind, bad):
    expected = np.array([[1.0, bad]])
    for got in (expected, np.array([[1.0, 2.0]])):
        assert 0 <= loss(kind, expected, got) <= WORST


@KINDS
def test_one_bad_batch_among_good_ones_is_the_worst(kind):
    one = OutputLoss(kind)
    fine = {"y": np.array([[1.0, 2.0]])}
    one.add(fine, fine)
    one.add(fine, {"y": np.array([[NAN, 2.0]])})
    one.add(fine, fine)
    assert one.value == WORST


@pytest.mark.parametrize("scale", ["logits", "probabilities", "log-probabilities"])
def test_the_worst_of_classes_on_every_scale(scale):
    assert loss("kl", [[0.25, 0.75]], [[NAN, 0.5]], scale) == WORST


def test_float16_is_added_up_in_float64():
    expected = np.full((1, 4), 60000, np.float16)  # whose square is beyond float16
    assert loss("mse", expected, expected / 2) == pytest.approx(0.25)


# What the model ends in


def ending(text, outputs="float[n,4] y"):
    return ir.from_onnx_text(f"{HEADER} g (float[n,4] x) => ({outputs}) {{ {text} }}")


@pytest.mark.parametrize(
    ("text", "scale", "kind"),
    [
        ("y = Softmax (x)", "probabilities", "kl"),
        ("y = LogSoftmax (x)", "log-probabilities", "kl"),
        ("y = Relu (x)", "logits", "mse"),
        ("s = Softmax (x) y = Relu (s)", "logits", "mse"),
        ("y = com.acme.Softmax (x)", "logits", "mse"),
    ],
)
def test_the_end_of_a_model_tells_its_scale(text, scale, kind):
    assert scale_of(ending(text)) == scale
    assert kind_of(ending(text)) == kind


def test_the_first_float_output_tells_the_scale():
    text = "k = ArgMax (x) y = Softmax (x) z = Relu (x)"
    model = ending(text, "int64[n] k, float[n,4] y, float[n,4] z")
    assert float_outputs(model) == ["y", "z"]
    assert (scale_of(model), kind_of(model)) == ("probabilities", "kl")
    other = ending(text, "float[n,4] z, float[n,4] y")
    assert (scale_of(other), kind_of(other)) == ("logits", "mse")


def test_a_model_without_float_outputs():
    model = ending("k = ArgMax (x)", "int64[n] k")
    assert float_outputs(model) == []
    assert (scale_of(model), kind_of(model)) == ("logits", "mse")
