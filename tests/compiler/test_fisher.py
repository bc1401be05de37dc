import builtins
import contextlib
import functools
import itertools
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.compiler.errors import DataError, ModelError, RecipeError, UnsupportedError
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.fisher import fisher

torch = pytest.importorskip("torch")
from fourfold.compiler.torch_graph import TorchGraph  # noqa: E402 - it imports torch

pytestmark = pytest.mark.torch

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
LINEAR = f"""{HEADER} g (float[n,3] x) => (float[n,2] y)
<float[3,2] w = {{1,-2,3,4,0,1}}> {{ y = MatMul (x, w) }}"""
# Two layers that bend, so that gradients differ from sample to sample.
BENT = f"""{HEADER} g (float[n,3] x) => (float[n,2] y)
<float[3,2] w = {{1,-2,0.5,1,0,1}}, float[2,2] v = {{1,0.5,-1,2}}, float[2] b = {{0.1,-0.2}}> {{
    h = MatMul (x, w)
    t = Tanh (h)
    y = Gemm (t, v, b)
}}"""
X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def feeds_of(model, batch=8, **arrays):
    return Feeds.read(arrays or {"x": X}, input_specs(model), batch)


def jacobian(model, feeds, change=lambda y: y):
    """Return weight name -> d change(y) / d weight, [elements of all samples, *weight's shape]."""
    graph = TorchGraph(model, list(model.graph.initializers))
    names = list(graph.weights)

    def outputs(*weights):
        graph.weights.update(zip(names, weights, strict=True))
        return torch.cat([change(graph(batch)["y"]).reshape(-1) for batch in feeds])

    found = torch.autograd.functional.jacobian(outputs, tuple(graph.weights.values()))
    return {name: part.numpy() for name, part in zip(names, found, strict=True)}


def softmax(y):
    return torch.softmax(torch.as_tensor(y).double(), -1).numpy()


def exact(model, feeds, loss):
    """Return the diagonal from the whole Jacobian."""
    y = np.concatenate([TorchGraph(model, [])(batch)["y"].numpy() for batch in feeds])
    if loss == "mse":
        return {
            name: np.square(part).sum(0) / np.square(y).sum()
            for name, part in jacobian(model, feeds).items()
        }
    p = softmax(y)
    scores = jacobian(model, feeds, lambda y: torch.log_softmax(y, -1))
    return {
        name: np.tensordot(p.ravel(), np.square(part), 1) / (2 * p[..., 0].size)
        for name, part in scores.items()
    }


def close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == np.float32
        assert got[name].shape == array.shape
        assert np.abs(got[name] - array).sum() <= tolerance * np.abs(array).sum()


def test_a_linear_model_has_a_closed_form():
    """F of w[i,j] is the sum of x[i]^2 over that of y^2; alone in its batch, a sample gives it."""
    model = ir.from_onnx_text(LINEAR)
    w = model.graph.initializers["w"].const_value.numpy()
    expected = np.square(X).sum(0)[:, None] / np.square(X @ w).sum() * np.ones((1, 2))
    close(fisher(model, ["w"], feeds_of(model, batch=1), "mse", probes=1), {"w": expected}, 1e-6)
    close(fisher(model, ["w"], feeds_of(model), "mse", probes=4000), {"w": expected}, 0.05)


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("batch", [2, 5])
def test_many_probes_come_to_the_whole_jacobian(loss, batch):
    model = ir.from_onnx_text(BENT)
    feeds = feeds_of(model, batch)
    got = fisher(model, ["w", "v", "b"], feeds, loss, probes=4000)
    close(got, exact(model, feeds, loss), 0.05)


@contextlib.contextmanager
def every_sign(count):
    """Make `fisher` go through all directions for this many elements; yields how many there are.

    With as many probes and one batch, its mean is exact and not a sample.
    """
    signs = itertools.product((0, 1), repeat=count)

    def following(low, high, shape, **_):
        return torch.tensor(next(signs)).reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", following)
        yield 2**count


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_all_signs_together_are_exact(loss):
    model = ir.from_onnx_text(BENT)
    feeds = feeds_of(model, x=X[:3])
    with every_sign(6) as probes:
        got = fisher(model, ["w", "v", "b"], feeds, loss, probes=probes)
    close(got, exact(model, feeds, loss), 1e-5)


def test_two_classes_by_hand():
    """The classes have 1/4 and 3/4, the other way around in the second sample."""
    model = ir.from_onnx_text(f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <float[2,2] w = {{0,1.0986123,1.0986123,0}}, float[2] b = {{0,0}}> {{ y = Gemm (x, w, b) }}""")
    feeds = feeds_of(model, x=np.eye(2, dtype=np.float32))
    with every_sign(4) as probes:
        got = fisher(model, ["b"], feeds, "kl", probes=probes)
    assert got["b"] == pytest.approx([3 / 32] * 2)  # half of p (1 - p)


FAR = st.one_of(st.floats(-5, 5, width=32), st.floats(-200, 200, width=32))


@pytest.mark.parametrize("form", ["Identity", "Softmax", "LogSoftmax"])
@given(logits=st.lists(FAR, min_size=2, max_size=5))
@settings(max_examples=50)
def test_the_second_moment_is_that_of_a_softmax(form, logits):
    """It is M = diag(p) - p p^T in the logits, also where p is zero in float32.

    One weight for each pair moves the logits i and j together, so its F is half of
    M[i,i] + 2 M[i,j] + M[j,j], and all of them tell all of M.
    """
    k = len(logits)
    pairs = np.eye(k, dtype=int)[:, None] + np.eye(k, dtype=int)
    rows, zeros = (",".join(map(str, a.ravel())) for a in (pairs, np.zeros((k, k), int)))
    model = ir.from_onnx_text(f"""{HEADER} g (float[n,{k}] x) => (float[n,{k}] y)
    <float[1,{k * k}] t = {{{zeros}}}, float[{k * k},{k}] v = {{{rows}}}> {{
        d = MatMul (t, v)
        z = Add (x, d)
        y = {form} (z)
    }}""")
    with every_sign(k) as probes:
        feeds = feeds_of(model, x=np.array([logits], np.float32))
        got = fisher(model, ["t"], feeds, "kl", probes=probes)["t"]
    p = softmax(logits)
    moment = np.diag(p) - np.outer(p, p)
    expected = np.diag(moment)[:, None] + 2 * moment + np.diag(moment)
    assert 2 * got.reshape(k, k) == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("form", ["Identity", "Softmax", "LogSoftmax"])
def test_a_confident_classifier_needs_no_luck(form):
    """The second class has p = 8e-7, and one draw is within 2 sqrt(p) of the expectation."""
    model = ir.from_onnx_text(f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <float[2] b = {{14,0}}> {{ z = Add (x, b) y = {form} (z) }}""")
    feeds = feeds_of(model, x=np.zeros((1, 2), np.float32))
    p = float(softmax([14.0, 0])[1])
    for seed in range(4):
        got = fisher(model, ["b"], feeds, "kl", seed, probes=1)["b"]
        assert got == pytest.approx([p * (1 - p) / 2] * 2, rel=0.003)


def measured(model, names, feeds, loss, moves):
    """Return the mean loss over changed weights; each move is name -> array."""
    graph = TorchGraph(model, names)
    kept = dict(graph.weights)
    losses = []
    with torch.no_grad():
        before = np.concatenate([graph(batch)["y"].numpy() for batch in feeds]).astype(np.float64)
        for move in moves:
            graph.weights.update({n: kept[n] + torch.from_numpy(move[n]) for n in names})
            after = np.concatenate([graph(batch)["y"].numpy() for batch in feeds])
            if loss == "mse":
                losses.append(np.square(after - before).sum() / np.square(before).sum())
            else:
                p, q = softmax(before), softmax(after)
                losses.append((p * np.log(p / q)).sum(-1).mean())
    return float(np.mean(losses))


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_the_predicted_loss_is_the_measured_one(zoo, name, loss):
    model = zoo[name]()
    names = ["w1", "w2", "b1"]
    draw = np.random.default_rng(0)
    shape = (32, 16) if name == "mlp" else (32, 6, 16)
    feeds = feeds_of(model, x=draw.normal(0, 1, shape).astype(np.float32))
    found = fisher(model, names, feeds, loss, probes=32)
    moves = [
        {n: (0.01 * draw.normal(0, 1, f.shape)).astype(np.float32) for n, f in found.items()}
        for _ in range(100)
    ]
    predicted = np.mean([sum((found[n] * m[n] ** 2).sum() for n in names) for m in moves])
    assert predicted == pytest.approx(measured(model, names, feeds, loss, moves), rel=0.1)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_probabilities_are_taken_as_they_are(op):
    bare = ir.from_onnx_text(BENT)
    text = BENT.replace("y = Gemm", "z = Gemm").replace("}\n", "}", 1)
    ended = ir.from_onnx_text(text[: text.rindex("}")] + f"y = {op} <axis = 1> (z) }}")
    names = ["w", "v", "b"]
    expected = fisher(bare, names, feeds_of(bare), "kl")
    close(fisher(ended, names, feeds_of(ended), "kl"), expected, 1e-4)


def test_a_softmax_along_another_axis_leaves_logits():
    text = f"""{HEADER} g (float[n,3] x) => (float[n,3] y) <float[3] w = {{1,2,3}}> {{
        h = Mul (x, w)
        y = Softmax <axis = 0> (h)
    }}"""
    model = ir.from_onnx_text(text)
    feeds = feeds_of(model)
    close(fisher(model, ["w"], feeds, "kl", probes=4000), exact(model, feeds, "kl"), 0.05)


def test_positions_are_all_axes_but_the_last():
    """Samples cut into rows are as many positions, if nothing else tells them apart."""
    flat = ir.from_onnx_text(LINEAR)
    wide = ir.from_onnx_text(LINEAR.replace("[n,", "[n,2,"))
    x = np.concatenate([X, X[:3]])
    got = fisher(wide, ["w"], feeds_of(wide, x=x.reshape(4, 2, 3)), "kl")
    close(got, fisher(flat, ["w"], feeds_of(flat, x=x), "kl"), 1e-6)


def test_several_outputs_and_what_no_output_reads():
    model = ir.from_onnx_text(f"""{HEADER}
    g (float[n,2] x) => (int64[2] s, float[n,2] x, float[n,2] y, float[n,2] z)
    <float[2] a = {{1, 2}}, float[2] b = {{3, 1}}, float[2] c = {{1, 1}}> {{
        s = Shape (x)
        y = Mul (x, a)
        z = Mul (x, b)
        dead = Add (x, c)
    }}""")
    x = np.array([[1, 2]], np.float32)
    got = fisher(model, ["a", "b", "c"], feeds_of(model, x=x), "mse")
    power = np.square([1, 2, 1, 4, 3, 2]).sum()
    slope = np.square(x[0]) / power
    close(got, {"a": slope, "b": slope, "c": np.zeros(2)}, 1e-6)
    # For kl the first float output counts, and the input itself depends on no weight.
    assert not any(f.any() for f in fisher(model, ["a", "b"], feeds_of(model, x=x), "kl").values())


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_the_seed_decides(loss):
    model = ir.from_onnx_text(BENT)
    run = functools.partial(fisher, model, ["w"], feeds_of(model), loss)
    first = run()["w"]
    torch.manual_seed(99)  # not the global generator
    with torch.no_grad():
        assert (run()["w"] == first).all()
    assert (run(seed=1)["w"] != first).any()


def test_the_model_stays_and_progress_counts_batches():
    model = ir.from_onnx_text(BENT)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    told = []

    def progress(steps, title, total=None):
        told.append((title, total))
        yield from steps

    assert fisher(model, [], feeds_of(model, batch=2), "kl", progress=progress) == {}
    fisher(model, ["v"], feeds_of(model, batch=2), "mse", progress=progress)
    assert told == [("fisher", 3)] * 2
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("change", "loss", "options", "error", "said"),
    [
        ({}, "mse", {"probes": 0}, RecipeError, "probes is 0: expected 1 or more"),
        ({}, "mse", {"names": ["u"]}, ModelError, "no initializer is called 'u'"),
        ({"Tanh": "Det"}, "mse", {}, UnsupportedError, "Det.*choose another signal"),
        ({"Tanh": "Log"}, "mse", {}, DataError, "output 'y' is not finite"),
        ({"Tanh": "Log"}, "kl", {}, DataError, "output 'y' is not finite"),
        ({"Gemm (t, v, b)": "Sub (t, t)"}, "mse", {}, DataError, "zero on all samples"),
        ({"Gemm (t, v, b)": "Shape (t)", "float[n,2] y": "int64[2] y"}, "kl", {}, DataError,
         "no float outputs"),
        ({"Gemm (t, v, b)": "ReduceSum <keepdims = 0> (t)", "float[n,2] y": "float y"}, "kl", {},
         DataError, "output 'y' is one number"),
        ({"Tanh (h)": "Sqrt (z)", "t =": "z = Sub (h, h) t ="}, "mse", {}, UnsupportedError,
         "weight 'w' has gradients that are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(change, loss, options, error, said):
    text = BENT
    for old, new in change.items():
        text = text.replace(old, new)
    model = ir.from_onnx_text(text)
    names = options.pop("names", ["w"])
    with pytest.raises(error, match=said):
        fisher(model, names, feeds_of(model), loss, **options)


def test_without_torch_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name in ("torch", "torch_graph"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    model = ir.from_onnx_text(LINEAR)
    with pytest.raises(UnsupportedError, match=r"pip install 'fourfold\[torch\]'"):
        fisher(model, ["w"], feeds_of(model), "mse")


def test_importing_it_leaves_torch_alone():
    code = "import sys, fourfold.compiler.fisher; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
