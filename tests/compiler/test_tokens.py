"""Padding is what gets no attention; other tokens count by how much they get."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.capability import Capability
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.tokens import Tokens, attention_of, attentions

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
MASKED = f"""{HEADER} masked (float[n,2,5,4] q, float[n,2,5,4] k, float[n,1,1,5] mask)
=> (float[n,2,5,4] y) {{
    [turn] t = Transpose <perm = [0,1,3,2]> (k)
    [scores] s = MatMul (q, t)
    [told] m = Add (s, mask)
    [soft] p = Softmax <axis = -1> (m)
    [mix] y = MatMul (p, k)
}}"""
TWO = f"""{HEADER} two (float[n,3,4] x, float[4,4] r) => (float[n,3,4] y, float[n,3,4] z)
<float[4,4] w = {{1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}}> {{
    [alone] z = MatMul (x, w)
    [q1] a = MatMul (x, w)
    [t1] at = Transpose <perm = [0,2,1]> (a)
    [s1] as = MatMul (a, at)
    [soft1] p1 = Softmax (as)
    [mix1] m1 = MatMul (p1, x)
    [out1] o1 = MatMul (m1, w)
    [up1] u1 = MatMul (o1, w)
    [gelu] g1 = Gelu (u1)
    [q2] b = MatMul (g1, w)
    [s2] bs = MatMul (b, at)
    [soft2] p2 = Softmax (bs)
    [mix2] m2 = MatMul (p2, x)
    [out2] y = MatMul (m2, w)
}}"""


def parsed(text):
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


def tokens(*batches, name="p"):
    return Tokens({name: [np.float32(batch) for batch in batches]})


@pytest.fixture
def masked(tmp_path):
    """Tokens of five samples of which three tokens, the last, are padding; and the arrays."""
    model = parsed(MASKED)
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(5, 2, 5, 4)).astype(np.float32) for _ in "qk")
    mask = np.zeros((5, 1, 1, 5), np.float32)
    mask[1, ..., 4] = mask[3, ..., 3:] = -1e9
    arrays = {"q": q, "k": k, "mask": mask}
    feeds = Feeds.read(arrays, input_specs(model), batch=2)
    context = Context(Capability("any", (21, 25), ()), tmp_path, feeds=feeds)
    return Tokens.of(model, attentions(model), feeds, context), arrays


def test_attention_received_is_the_mean_over_heads_and_queries(masked):
    found, given = masked
    scores = given["q"] @ given["k"].swapaxes(2, 3) + given["mask"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    assert list(found.received) == ["p"]
    assert [len(batch) for batch in found.received["p"]] == [2, 2, 1]
    got = np.concatenate(found.received["p"])
    np.testing.assert_allclose(got, weights.mean((1, 2)), rtol=1e-4)


def test_what_belongs_to_padding_is_left_out(masked):
    found, _ = masked
    value = np.arange(2 * 5 * 4).reshape(2, 5, 4)
    np.testing.assert_array_equal(found.kept(0, value), np.concatenate([value[0], value[1, :4]]))
    heads = np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)  # tokens are on axis 2
    rows = np.moveaxis(heads, 2, 1)
    np.testing.assert_array_equal(found.kept(1, heads), np.concatenate([rows[0], rows[1, :3]]))


@pytest.mark.parametrize("shape", [(2, 4), (2, 5), (2, 4, 4), (3, 5, 4), (2, 5, 5, 4), ()])
def test_a_value_without_one_axis_of_tokens_is_kept_whole(masked, shape):
    found, _ = masked
    value = np.ones(shape)
    assert found.kept(0, value) is value


def test_nothing_is_left_out_without_padding_or_attention(masked):
    found, _ = masked
    value = np.ones((1, 5, 4))
    assert found.kept(2, value) is value
    assert Tokens({}).kept(0, value) is value
    assert found.weights(2, "p", value.shape, 1.0) is None
    assert Tokens({}).weights(0, "p", value.shape, 0.1) is None


def test_all_tokens_but_padding_count_alike(masked):
    found, _ = masked
    assert found.weights(0, "p", (2, 5, 4), 1.0).tolist() == [1] * 9 + [0]
    assert found.weights(1, "", (2, 5, 7), 1.0).tolist() == [1] * 8 + [0] * 2
    for shape in ((2, 5), (10, 4), (2, 2, 5, 4), (2, 4, 4), (1, 5, 4)):
        assert found.weights(0, "p", shape, 1.0) is None


def test_tokens_count_by_what_they_get():
    found = tokens([[0.1, 0.5, 0.3]], [[0.2, 0.2, 0.6]])
    np.testing.assert_allclose(found.weights(0, "p", (1, 3, 8), 0.2), [0.2, 1, 0.6], rtol=1e-6)
    np.testing.assert_allclose(found.weights(1, "p", (1, 3, 8), 0.0), [0, 0, 1], atol=1e-6)
    two = Tokens({**found.received, **tokens([[0.3, 0.1, 0.3]], name="other").received})
    np.testing.assert_allclose(two.weights(0, "other", (1, 3, 8), 0.2), [1, 0.2, 1], rtol=1e-6)


def test_padding_is_not_the_token_with_the_least_attention():
    """The least of the others has the least weight, whether its sample is padded or not."""
    whole, padded = tokens([[0.1, 0.5, 0.3]]), tokens([[0.1, 0.5, 0.3, 0.0]])
    expected = whole.weights(0, "p", (1, 3, 8), 0.2)
    found = padded.weights(0, "p", (1, 4, 8), 0.2)
    assert found[3] == 0
    np.testing.assert_allclose(found[:3], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Softmax <axis = -1>", "Softmax <axis = 1>"),
        ("Softmax <axis = -1>", "Sigmoid"),
        ("y = MatMul (p, k)", "y = MatMul (k, p)"),
        ("y = MatMul (p, k)", "y = Mul (p, p)"),
    ],
)
def test_what_is_no_attention(old, new):
    assert old in MASKED
    assert attentions(ir.from_onnx_text(MASKED.replace(old, new))) == []
    assert attentions(parsed(MASKED.replace("axis = -1", "axis = 3"))) == ["p"]


def test_a_softmax_before_a_weight_is_no_attention():
    text = f"""{HEADER} g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {{1,2,3,4}}> {{
        p = Softmax (x) y = MatMul (p, w)
    }}"""
    assert attentions(parsed(text)) == []


def test_a_layer_belongs_to_the_attention_it_feeds_or_the_last_before_it():
    model = parsed(TWO)
    names = attentions(model)
    assert names == ["p1", "p2"]
    found = {node.name: attention_of(node, names) for node in model.graph}
    layers = ("alone", "q1", "out1", "up1", "q2", "out2")
    assert [found[one] for one in layers] == ["", "p1", "p1", "p1", "p2", "p2"]
    assert attention_of(model.graph[0], []) == ""
