import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.walk import Shelf, Walk

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
# d skips two stops; the If reads a value from outside; u is read by nobody.
TEXT = f"""{HEADER} g (float[n,3] x) => (float[n,3] y)
<float[3,3] w = {{1, 2, 0, -1, 1, 0.5, 0, 3, 1}}> {{
    a = MatMul (x, w)
    u = Neg (a)
    b = Relu (a)
    d = Mul (b, x)
    e = MatMul (b, w)
    one = ReduceMax <keepdims = 0> (e)
    t = Greater (one, one)
    f = If (t) <then_branch = p () => (q) {{ q = Neg (d) }},
                else_branch = r () => (s) {{ s = Abs (d) }}>
    y = Add (e, f)
}}"""


def model():
    return ir.from_onnx_text(TEXT)


def feeds(one, count=7, batch=2):
    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    return Feeds.read({"x": x}, input_specs(one), batch=batch)  # the last one is smaller


def exact(batch, weight):
    x = batch["x"]
    a = x @ weight
    b = np.maximum(a, 0)
    e = b @ weight
    return {"x": x, "a": a, "b": b, "d": b * x, "e": e, "f": np.abs(b * x)}


WEIGHT = np.array([[1, 2, 0], [-1, 1, 0.5], [0, 3, 1]], np.float32)


@pytest.mark.parametrize("memory", [0, 100, 1 << 20])
@pytest.mark.parametrize(
    "stops",
    [
        [["a"], ["b", "d"], ["e"], ["f"]],
        [["x", "a"], ["a", "e"], ["x", "b"]],
        [["f"], ["f", "d"]],
        [["y"]],
    ],
)
def test_every_stop_yields_what_the_model_makes(stops, memory, tmp_path):
    one = model()
    walk = Walk(one, stops, feeds(one), tmp_path, memory)
    for names in stops:
        for batch, found in zip(feeds(one), walk.next(), strict=True):
            expected = exact(batch, WEIGHT)
            expected["y"] = expected["e"] + expected["f"]
            assert list(found) == names
            for name in names:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_what_changes_ahead_is_seen_and_what_lies_behind_is_not_run_again(tmp_path):
    one = model()
    walk = Walk(one, [["b"], ["d", "e"]], feeds(one), tmp_path, 1 << 20)
    before = [found["b"] for found in walk.next()]
    one.graph.initializers["w"].const_value = ir.tensor(2 * WEIGHT, name="w")
    for first, batch, found in zip(before, feeds(one), walk.next(), strict=True):
        np.testing.assert_allclose(found["e"], first @ (2 * WEIGHT), rtol=1e-6)
        np.testing.assert_allclose(found["d"], first * batch["x"], rtol=1e-6)


def test_stops_that_are_passed_by_are_run_through(tmp_path):
    one = model()
    walk = Walk(one, [["a"], ["b"], ["e"], ["f"]], feeds(one), tmp_path, 1 << 20)
    list(walk.next())
    for batch, found in zip(feeds(one), walk.next(skip=2), strict=True):
        np.testing.assert_allclose(found["f"], exact(batch, WEIGHT)["f"], rtol=1e-6)
    assert walk.at == 4


def test_what_is_kept_beyond_the_bound_lies_on_disk_until_it_has_been_read(tmp_path):
    one = model()
    walk = Walk(one, [["a"], ["b"], ["y"]], feeds(one), tmp_path, 0)
    list(walk.next())
    assert len(list(tmp_path.rglob("*.npy"))) == 4  # a, for each batch
    list(walk.next())
    assert len(list(tmp_path.rglob("*.npy"))) == 4  # b; x is at hand
    list(walk.next())
    assert not list(tmp_path.rglob("*.npy"))


def test_a_shelf_keeps_some_in_memory(tmp_path):
    shelf = Shelf(tmp_path, 100)
    arrays = [np.full(20, n, np.float32) for n in range(3)]
    for number, array in enumerate(arrays):
        shelf.put(number, {"v": array})
    kept = [shelf.get(number)["v"] for number in range(3)]
    assert [isinstance(one, np.memmap) for one in kept] == [False, True, True]
    for one, array in zip(kept, arrays, strict=True):
        np.testing.assert_array_equal(one, array)
