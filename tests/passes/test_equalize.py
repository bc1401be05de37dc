"""The pass as a whole: what it chooses, that no number changes, what it leaves alone and why."""

import importlib.util
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.feeds import Feeds, input_specs, made_up
from fourfold.compiler.gauges import find
from fourfold.compiler.model import load
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.equalize import Equalize, _put_in

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def test_ranges_of_two_layers_meet_without_feeds(becomes, context):
    before = f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <float[2,2] w1 = {{16, 1, -8, 1}}, float[2] b1 = {{8, 1}}, float[2,2] w2 = {{1, 1, 0, 16}}> {{
        [a] a = Gemm (x, w1, b1)
        [r] r = Relu (a)
        [y] y = MatMul (r, w2)
    }}"""
    after = before.replace("16, 1, -8, 1", "4, 4, -2, 4").replace("8, 1}", "2, 4}")
    model = becomes(Equalize(), before, after.replace("1, 1, 0, 16", "4, 4, 0, 4"))
    assert [v.name for n in model.graph for v in n.outputs] == ["a_equalized", "r_equalized", "y"]
    assert set(model.graph.initializers) == {"w1_equalized", "b1_equalized", "w2_equalized"}
    assert [r.reason for r in context.remarks] == [
        "scaled by weight ranges: -100 % of the room that its weights leave"
    ]
    assert Equalize().run(model, context) == 0


CLIPPED = f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
<float[2,2] w1 = {{16, 1, -8, 1}}, float low = {{0}}, float high = {{6}},
 float[2,2] w2 = {{1, 1, 0, 1}}> {{
    a = MatMul (x, w1)
    r = Clip (a, low, high)
    y = MatMul (r, w2)
}}"""


def test_a_clip_is_refused_with_a_remark(becomes, context):
    becomes(Equalize(), CLIPPED, CLIPPED)
    remarks = [(r.subject, r.reason) for r in context.remarks]
    assert remarks == [("a", "left: Clip passes no factors through")]


SHARED = CLIPPED.replace("Clip (a, low, high)", "MatMul (a, w1)").replace(
    "float low = {0}, float high = {6},", ""
)


def test_a_shared_weight_is_refused_with_a_remark(becomes, context):
    becomes(Equalize(), SHARED, SHARED)
    # The second layer would read a, but with the weight of the first.
    assert ("r", "left: the weight w1 is shared with another layer") in [
        (r.subject, r.reason) for r in context.remarks
    ]


def sequence(body, seed=0, outputs="y", **weights):
    """Return a model of float[n,6,8] x whose weights are given or drawn (shapes)."""
    draw = np.random.default_rng(seed)
    arrays = {
        name: draw.normal(0, 0.5, w) if isinstance(w, tuple) else np.asarray(w)
        for name, w in weights.items()
    }
    listed = ", ".join(f"float{list(a.shape) or ''} {n}" for n, a in arrays.items())
    made = ", ".join(f"float[n,6,m] {n}" for n in outputs.split())
    model = ir.from_onnx_text(f"{HEADER} g (float[n,6,8] x, {listed}) => ({made}) {{ {body} }}")
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor(arrays[value.name].astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = node.outputs[0].name
    ShapeInferencePass()(model)
    return model


def samples(count=16, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 6, 8)).astype(np.float32)


OUTLIER = np.float32([1, 1, 60, 1, 1, 1, 1, 1])
NORM = "n = LayerNormalization(x,g,b) q = MatMul(n,wq) k = MatMul(n,wk) s = Add(q,k)"
POST = f"{NORM} y = Add(s,n)"


def operators(model):
    return Counter(node.op_type for node in model.graph)


def test_an_outlier_of_a_normalization_moves_into_the_weights(fed, outputs):
    model = sequence(f"{NORM} y = Relu(s)", g=OUTLIER, b=(8,), wq=(8, 8), wk=(8, 8))
    x = samples()
    before = outputs(model, plain=True, x=x)
    around = fed(model, x=x)
    assert Equalize().run(model, around) == 1
    np.testing.assert_array_equal(outputs(model, plain=True, x=x)["y"], before["y"])
    gain = model.graph.initializers["g_equalized"].const_value.numpy()
    assert abs(gain).max() / np.median(abs(gain)) < 20
    assert operators(model) == {"LayerNormalization": 1, "MatMul": 2, "Add": 1, "Relu": 1}
    (remark,) = around.remarks
    assert remark.subject == "n"
    assert remark.reason.startswith("scaled by alpha")


def test_one_mul_serves_all_layers_where_a_residual_reads_the_value_too(fed, outputs):
    model = sequence(POST, g=OUTLIER, b=(8,), wq=(8, 8), wk=(8, 8))
    x = samples()
    before = outputs(model, plain=True, x=x)
    around = fed(model, x=x)
    assert Equalize().run(model, around) == 1
    np.testing.assert_array_equal(outputs(model, plain=True, x=x)["y"], before["y"])
    nodes = {node.name: node for node in model.graph}
    assert operators(model)["Mul"] == 1
    assert nodes["y"].inputs[1].name == "n"  # the residual reads what it read
    assert {nodes[n].inputs[0].name for n in "qk"} == {"n_equalized"}
    factors = nodes["n_equalized"].inputs[1].const_value.numpy()
    assert factors.shape == (8,)
    assert (np.frexp(factors)[0] == 0.5).all()
    (remark,) = around.remarks
    assert remark.reason.startswith("a Mul before its layers scales it by alpha")
    again = replace(around, remarks=[])
    assert Equalize().run(model, again) == 0
    assert again.remarks == []


@pytest.mark.parametrize(
    ("options", "gain"),
    [({"insert": False}, OUTLIER), ({"insert_gain": 2.0}, OUTLIER), ({}, np.ones(8))],
)
def test_no_mul_without_leave_or_gain(options, gain, fed):
    model = sequence(POST, g=gain, b=np.zeros(8), wq=np.eye(8), wk=np.eye(8))
    around = fed(model, x=samples())
    assert Equalize(**options).run(model, around) == 0
    assert "Mul" not in operators(model)
    assert [(r.subject, r.reason) for r in around.remarks] == [("n", "left: Add adds s to it")]


def test_a_value_that_is_even_already_is_left_with_a_remark(fed):
    model = sequence("n = LayerNormalization(x,g,b) y = MatMul(n,w)", g=np.ones(8), b=np.zeros(8),
                     w=np.eye(8))  # fmt: skip
    around = fed(model, x=np.sign(samples()))
    assert Equalize(gain=60.0).run(model, around) == 0
    assert [(r.subject, r.reason) for r in around.remarks] == [
        ("n", "left: no factors take 60 % of the predicted noise behind it")
    ]


def test_values_pass_their_factors_through_attention(fed, outputs):
    body = """v = MatMul(x,wv) c = Add(v,bv) q = MatMul(x,wq) t = Transpose<perm=[0,2,1]>(x)
              d = MatMul(q,t) p = Softmax(d) m = MatMul(p,c) y = MatMul(m,wo)"""
    uneven = np.random.default_rng(5).normal(size=(8, 8)) * OUTLIER
    model = sequence(body, wv=uneven, bv=(8,), wq=(8, 8), wo=(8, 4))
    x = samples()
    before = outputs(model, plain=True, x=x)
    assert Equalize(insert=False).run(model, fed(model, x=x)) == 1
    np.testing.assert_array_equal(outputs(model, plain=True, x=x)["y"], before["y"])
    assert {"wv_equalized", "bv_equalized", "wo_equalized"} <= set(model.graph.initializers)
    assert "wq" in model.graph.initializers
    assert model.graph.node("m").outputs[0].name == "m_equalized"


def test_values_of_a_packed_weight_are_scaled_and_queries_and_keys_stay(fed, outputs):
    body = """a = MatMul(x,w) b = Add(a,c) q, k, v = Split<axis=-1, num_outputs=3>(b)
              t = Transpose<perm=[0,2,1]>(k) d = MatMul(q,t) p = Softmax(d) m = MatMul(p,v)
              y = MatMul(m,wo)"""
    uneven = np.random.default_rng(5).normal(size=(8, 12)) * [*[1] * 9, 60, 1, 1]
    model = sequence(body, w=uneven, c=(12,), wo=(4, 4))
    x = samples()
    before = outputs(model, plain=True, x=x)
    assert Equalize(insert=False).run(model, fed(model, x=x)) == 1
    np.testing.assert_array_equal(outputs(model, plain=True, x=x)["y"], before["y"])
    now = model.graph.initializers["w_equalized"].const_value.numpy()
    np.testing.assert_array_equal(now[:, :8], np.float32(uneven[:, :8]))
    assert np.abs(now[:, 9]).max() < 0.3 * np.abs(uneven[:, 9]).max()
    assert {o.name for node in model.graph for o in node.outputs} >= {"q", "k", "v_equalized"}


def test_what_padding_holds_sets_no_factors(fed):
    body = """s = Transpose<perm=[0,2,1]>(x) d = MatMul(x,s) e = Mul(d,small) l = Add(e,mask)
              p = Softmax(l) m = MatMul(p,x) r = Add(m,x) y = MatMul(r,w)"""
    mask = np.zeros((6, 6))
    mask[:, 4:] = -1e6  # the last two tokens get no attention
    found = []
    for padding in ([1, 1, 1, 1, 1, 900, 1, 1], [1, 1, 1, 1, 1, 0, 1, 1]):
        x = samples() * OUTLIER
        x[:, 4:] *= np.float32(padding)
        model = sequence(body, mask=mask, small=1e-7, w=np.eye(8))
        assert Equalize().run(model, fed(model, x=x)) == 1
        found.append(model.graph.initializers["r_equalized_factors"].const_value.numpy())
    np.testing.assert_array_equal(found[0], found[1])


def test_a_graph_output_keeps_its_content_and_name(fed, outputs):
    model = sequence(NORM.replace("s = Add", "y = Add"), outputs="y n", g=OUTLIER, b=(8,),
                     wq=(8, 8), wk=(8, 8))  # fmt: skip
    x = samples()
    before = outputs(model, plain=True, x=x)
    around = fed(model, x=x)
    assert Equalize().run(model, around) == 1
    after = outputs(model, plain=True, x=x)
    for name in ("y", "n"):
        np.testing.assert_array_equal(after[name], before[name])
    assert [(r.subject, r.reason[:5]) for r in around.remarks] == [("n", "a Mul")]


def test_two_runs_choose_the_same(fed):
    found = []
    for _ in range(2):
        model = sequence(POST, g=OUTLIER, b=(8,), wq=(8, 8), wk=(8, 8))
        around = fed(model, x=samples())
        Equalize().run(model, around)
        weights = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
        found.append(({n: w.tobytes() for n, w in weights.items()}, around.remarks))
    assert found[0] == found[1]


def test_a_planned_value_is_refused_before_the_run(context):
    model = ir.from_onnx_text(CLIPPED.replace("Clip (a, low, high)", "Relu (a)"))
    ShapeInferencePass()(model)
    assert list(Equalize().requires(model, context)) == []
    notes.write(model.graph.initializers["w2"], mode="static")
    (line,) = Equalize().requires(model, context)
    assert line.startswith("w2 is planned already")


def test_a_planned_weight_behind_a_mul_is_refused_too(fed):
    model = sequence(POST, g=OUTLIER, b=(8,), wq=(8, 8), wk=(8, 8))
    notes.write(model.graph.initializers["wk"], mode="static")
    around = fed(model, x=samples())
    assert [line[:21] for line in Equalize().requires(model, around)] == ["wk is planned already"]
    assert list(Equalize(insert=False).requires(model, around)) == []
    assert list(Equalize().requires(model, replace(around, feeds=None))) == []


def test_the_whole_recipe_loses_less_behind_an_outlier(context, outputs):
    model = sequence(POST, g=OUTLIER, b=(8,), wq=(8, 8), wk=(8, 8))
    x, held = samples(), samples(seed=9)
    feeds = Feeds.read({"x": x}, input_specs(model))
    expected = outputs(model, x=held)["y"]
    lost = {}
    for first in ("", "equalize,"):
        recipe = Recipe.parse(f"{first}calibrate,assign-bits,insert-qdq,round-weights")
        made, _ = run(recipe, model, replace(context, feeds=feeds, remarks=[]))
        lost[first] = np.square(outputs(made, x=held)["y"] - expected).sum()
    assert lost["equalize,"] < 0.8 * lost[""]


# Trained models; where they are not, these tests are skipped.

real = pytest.mark.skipif(
    not (DATA / "tasks.py").is_file(),
    reason=f"no tasks.py in {DATA}; set FOURFOLD_DATA to the folder with trained models",
)


def trained(name, context):
    """Return a trained model after tidy and fold-batchnorm."""
    spec = importlib.util.spec_from_file_location("fourfold_test_tasks", DATA / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    model = load(module.model_path(module.TASKS[name], DATA))
    return run(Recipe.parse("tidy,fold-batchnorm"), model, context)[0]


@real
@pytest.mark.parametrize("name", ["kws", "cifar-resnet20"])
def test_trained_convolutions_keep_every_bit(name, context, outputs):
    model = trained(name, context)
    feeds = made_up(input_specs(model), seed=0, count=4)
    batch = next(iter(feeds))
    before, ops = outputs(model, plain=True, **batch), operators(model)
    assert Equalize(samples=4).run(model, replace(context, feeds=feeds)) >= 1
    assert operators(model) == ops
    after = outputs(model, plain=True, **batch)
    for output, array in before.items():
        np.testing.assert_array_equal(after[output], array)


@real
@pytest.mark.parametrize(
    ("name", "exact", "possible"),
    [("kwt", 25, 25), ("minilm-sts", 6, 18), ("stories", 16, 5), ("squeezenet", 25, 0)],
)
def test_trained_models_keep_every_bit_whatever_the_factors(
    name, exact, possible, context, outputs
):
    model = trained(name, context)
    draw = np.random.default_rng(0)
    x = {}
    for spec in input_specs(model):
        shape = [
            n if isinstance(n, int) else free
            for n, free in zip(spec.shape, (2, 7, 7, 7), strict=False)
        ]
        x[spec.name] = draw.normal(size=shape).astype(np.float32)
        if spec.dtype == np.int64:
            x[spec.name] = draw.integers(1, 500, shape) ** (spec.name != "attention_mask")
    before = outputs(model, plain=True, **x)
    found = find(model.graph)
    assert (len(found.exact), len(found.possible)) == (exact, possible)
    for gauge in (*found.exact, *found.possible):
        _put_in(model.graph, gauge, draw.integers(-3, 4, gauge.count) * gauge.free)
    after = outputs(model, plain=True, **x)
    for output, array in before.items():
        np.testing.assert_array_equal(after[output], array)
