import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler import compare as module
from fourfold.compiler.compare import _Tally, compare, find_metric, interleaved, latency, top1
from fourfold.compiler.errors import DataError
from fourfold.compiler.feeds import Feeds, input_specs


def feeds(arrays, batch=2, labels=None):
    """Feeds of one float input x of shape [n, 2]."""
    spec = ir.val("x", ir.DataType.FLOAT, ["n", 2])
    model = ir.Model(ir.Graph([spec], [spec], nodes=[], opset_imports={"": 21}), ir_version=10)
    given = {"x": np.asarray(arrays, np.float32)}
    if labels is not None:
        given["labels"] = np.asarray(labels)
    return Feeds.read(given, input_specs(model), batch)


def tallied(expected, got, cuts=()):
    """Compare two arrays (one output), cut into batches at the given places."""
    tally = _Tally()
    sides = (np.split(np.asarray(side, np.float32), cuts) for side in (expected, got))
    for one, two in zip(*sides, strict=True):
        tally.add({"y": one}, {"y": two})
    return tally.result()


def identity(batch):
    return {"y": batch["x"]}


def test_equal_outputs():
    result = tallied([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    assert result.sqnr_db == float("inf")
    assert result.cosine == pytest.approx(1)
    assert (result.agreement, result.max_error) == (1.0, 0.0)


def test_golden_figures():
    result = tallied([[3, 4], [0, 10]], [[3, 4.5], [0.5, 10]])
    assert result.sqnr_db == pytest.approx(10 * np.log10(125 / 0.5))
    cosines = (9 + 18) / (5 * np.hypot(3, 4.5)), 100 / (10 * np.hypot(0.5, 10))
    assert result.cosine == pytest.approx(np.mean(cosines))
    assert result.max_error == 0.5
    assert result.agreement == 1.0


@pytest.mark.parametrize(("noise", "decibel"), [(0.1, 20), (0.01, 40), (1, 0)])
def test_sqnr_is_in_decibel(noise, decibel):
    x = np.random.default_rng(0).normal(size=(64, 4))
    assert tallied(x, x * (1 + noise)).sqnr_db == pytest.approx(decibel, abs=1e-4)


def test_agreement_counts_positions():
    logits = np.zeros((2, 3, 4))  # two sequences of three tokens
    logits[..., 1] = 1
    other = logits.copy()
    other[0, 2, 3] = 2
    assert tallied(logits, other).agreement == pytest.approx(5 / 6)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_no_classifier_no_agreement(shape):
    assert tallied(np.ones(shape), np.ones(shape)).agreement is None


@pytest.mark.parametrize(
    ("expected", "got", "cosine"),
    [
        ([[1, 0]], [[0, 1]], 0),
        ([[1, 0]], [[-2, 0]], -1),
        ([[0, 0]], [[0, 0]], 1),
        ([[1, 2]], [[0, 0]], 0),  # a variant that says nothing is not like its source
        ([[0, 0]], [[1, 2]], 0),
        ([[1, 2], [3, 4]], [[1, 2], [np.nan, 4]], None),
        ([[1, 2], [3, 4]], [[1, 2], [np.inf, 4]], None),
    ],
)
def test_cosine(expected, got, cosine):
    result = tallied(expected, got)
    if cosine is None:  # not a number must not look like a good one
        assert 0.5 < result.cosine < 0.95
        assert result.sqnr_db < 10
    else:
        assert result.cosine == pytest.approx(cosine, abs=1e-7)


@given(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=4), st.integers(0, 5))
def test_batches_do_not_matter(samples, cuts, seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(samples, 3)).astype(np.float32)
    y = x + 0.3 * draw.normal(size=x.shape).astype(np.float32)
    whole = tallied(x, y)
    parts = tallied(x, y, sorted({c for c in cuts if 0 < c < samples}))
    assert vars(parts) == pytest.approx(vars(whole), nan_ok=True)


def test_all_float_outputs_count_and_integers_do_not():
    tally = _Tally()
    expected = {
        "ids": np.array([7, 8]),
        "a": np.array([[3.0], [0.0]], np.float32),
        "b": np.array([[4.0, 0.0], [0.0, 2.0]], np.float16),
    }
    got = {"ids": np.array([0, 0]), "a": expected["a"] + 1, "b": expected["b"]}
    tally.add(expected, got)
    assert tally.result().sqnr_db == pytest.approx(10 * np.log10((9 + 16 + 4) / 2))


def test_outputs_with_and_without_samples():
    tally = _Tally()
    expected = {"y": np.ones((3, 2), np.float32), "loss": np.float32(2)}
    tally.add(expected, {"y": expected["y"], "loss": np.float32(1)})
    result = tally.result()
    assert result.sqnr_db == pytest.approx(10 * np.log10(6 + 4))
    assert result.max_error == 1


def test_integers_alone_cannot_be_compared():
    with pytest.raises(DataError, match=r"no float outputs to compare, only \['ids'\]"):
        _Tally().add({"ids": np.array([1])}, {"ids": np.array([1])})


def test_a_source_that_is_not_finite():
    with pytest.raises(DataError, match="not finite"):
        tallied([[np.inf, 1]], [[1, 1]])


def accuracy(outputs, feeds, labels):
    return float((outputs["y"].argmax(1) == labels).mean() * 100)


def perplexity(outputs, feeds, labels):
    return float(outputs["y"].mean() + feeds["x"].mean() * 0)


perplexity.lower_is_better = True


def test_a_metric_sees_everything_at_once():
    seen = []

    def record(outputs, feeds, labels):
        seen.append((outputs["y"].tolist(), feeds["x"].tolist(), labels.tolist()))
        return 0.0

    x = [[1, 2], [3, 4], [5, 6]]
    compare(identity, lambda b: {"y": -b["x"]}, feeds(x, labels=[0, 1, 1]), record)
    assert seen == [(x, x, [0, 1, 1]), ([[-a, -b] for a, b in x], x, [0, 1, 1])]


def test_drop_of_a_score():
    data = feeds([[1, 0], [1, 0], [0, 1], [0, 1]], labels=[0, 0, 1, 1])

    def flipped(batch):
        return {"y": np.where(batch["x"][:, :1] > 0, batch["x"], batch["x"][:, ::-1])}

    result = compare(identity, flipped, data, accuracy)
    assert (result.metric, result.source_score, result.variant_score) == ("accuracy", 100, 50)
    assert result.drop == 50
    better = compare(flipped, identity, data, accuracy)
    assert better.drop == -50


def test_lower_is_better():
    result = compare(identity, lambda b: {"y": b["x"] + 1}, feeds([[1, 1]]), perplexity)
    assert (result.source_score, result.variant_score, result.drop) == (1, 2, 1)


def test_no_metric():
    result = compare(identity, identity, feeds([[1, 2]]), None)
    assert (result.metric, result.source_score, result.drop) == (None, None, None)


def test_top1():
    outputs = {"y": np.array([[1, 2], [4, 3]], np.float32), "other": np.zeros(2)}
    assert top1(outputs, {}, np.array([1, 1])) == 50
    with pytest.raises(DataError, match="top1 needs labels"):
        top1(outputs, {}, None)


def test_a_metric_that_fails_is_named():
    def shaky(outputs, feeds, labels):
        raise KeyError("logits")

    with pytest.raises(DataError, match="the metric shaky failed: KeyError: 'logits'"):
        compare(identity, identity, feeds([[1, 2]]), shaky)


def test_a_metric_needs_samples_of_one_shape():
    def growing(batch):
        return {"y": np.ones((2, int(batch["x"][0, 0])), np.float32)}

    with pytest.raises(DataError, match="samples of one shape"):
        compare(growing, growing, feeds([[1, 0], [1, 0], [2, 0], [2, 0]]), accuracy)


def test_find_metric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_metric.py").write_text(
        "def score(outputs, feeds, labels):\n    return 7\n"
    )
    (tmp_path / "my_broken_metric.py").write_text("raise RuntimeError('no')\n")
    assert find_metric("top1") is top1
    assert find_metric("my_own_metric:score")({}, {}, None) == 7
    for text in ("my_own_metric:scroe", "nowhere_to_be_found:f", "top5", "my_broken_metric:f", ""):
        with pytest.raises(DataError):
            find_metric(text)


def test_interleaved_takes_turns():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 4)
    assert "".join(calls) == "ab" + "abbaabba"  # a warm-up, then neither is always first
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4}
    assert all(time >= 0 for times in seconds.values() for time in times)


def test_latency(monkeypatch):
    # A clock that only the runs move: the source takes 3 s, the variant 1 s.
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        def run(batch):
            now[0] += seconds
            return {}

        return run

    batch = {"x": np.zeros((8, 2))}
    result = latency(takes(3.0), takes(1.0), batch, threads=2, budget=40)
    assert (result.batch, result.source, result.variant) == (8, 3.0, 1.0)
    assert (result.ratio, result.rounds, result.threads) == (3.0, 10, 2)
    assert latency(takes(3.0), takes(1.0), batch, threads=1, budget=0.1).rounds == 5


def test_latency_of_a_scalar_input():
    result = latency(lambda b: {}, lambda b: {}, {"x": np.float32(1)}, threads=1, budget=0)
    assert result.batch == 1
