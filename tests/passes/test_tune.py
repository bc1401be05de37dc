import importlib.util
import os
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.model import load
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.tune import Tune

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
DRAW = np.random.default_rng(0)
SHAPES = {"mlp": (40, 16), "convnet": (40, 3, 8, 8), "attention": (20, 6, 16)}


def rounded(model, context, how, x=None):
    """Return a model after `insert-qdq` and `round-weights`, and the context that it was made in.

    The context keeps the float model.
    """
    x = DRAW.normal(size=SHAPES[model.graph.name]) if x is None else x
    feeds = Feeds.read({"x": x.astype(np.float32)}, input_specs(model))
    context = replace(context, feeds=feeds, remarks=[], floats=[])
    first = f"widen-floats,tidy,fold-batchnorm,calibrate,assign-bits{{{how}}}"
    model, _ = run(Recipe.parse(first), model, context)
    context.float_model(model)
    model, _ = run(Recipe.parse("insert-qdq,round-weights"), model, context)
    context.remarks.clear()
    return model, context


def graph_of(model):
    """Print nodes, and codes and other whole numbers."""
    nodes = [(n.op_type, [v and v.name for v in n.inputs], n.name) for n in model.graph]
    stored = {
        name: value.const_value.tobytes()
        for name, value in model.graph.initializers.items()
        if not value.dtype.is_floating_point()
    }
    return nodes, stored


def floats_of(model):
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.dtype.is_floating_point()
    }


def noise(context, model, outputs):
    """Return the share of noise in y, on the calibration feeds."""
    (whole,) = context.feeds.rebatched(context.feeds.count)
    expected, got = (outputs(m, **whole)["y"] for m in (context.floats[0], model))
    return np.square(expected - got).sum() / np.square(expected).sum()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mlp", 'weights=4 activations="static"'),
        ("mlp", 'weights=4 activations="dynamic"'),
        ("mlp", 'weights=4 activations="float" block=16'),
        ("convnet", "weights=4"),
        ("attention", "weights=4"),
    ],
)
def test_outputs_come_back_and_codes_stay(name, how, zoo, context, outputs):
    before, context = rounded(zoo[name](), context, how)
    after, rows = run(Recipe.parse("tune{steps=40}"), before, context)
    assert rows[0].changed > 0
    assert graph_of(after) == graph_of(before)
    old, new = floats_of(before), floats_of(after)
    moved = [key for key in old if not np.array_equal(old[key], new[key])]
    assert len(moved) == rows[0].changed
    assert all(old[key].dtype == new[key].dtype for key in old)
    (remark,) = [r.reason for r in context.remarks]
    assert remark.startswith(f"tuned {len(moved)} tensors: loss ")
    assert noise(context, after, outputs) < 0.97 * noise(context, before, outputs)
    again, rows = run(Recipe.parse("tune{steps=40}"), after, context)
    assert rows[0].changed == 0
    assert floats_of(again).keys() == new.keys()
    assert all(np.array_equal(array, new[key]) for key, array in floats_of(again).items())


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("scales=false ranges=false", ("b1", "b2", "b3")),
        ("biases=false ranges=false", ("w1_scale", "w2_scale", "w3_scale")),
        ("biases=false scales=false", ("x_scale", "r1_scale", "r2_scale")),
    ],
)
def test_options_say_what_moves(option, names, zoo, context):
    before, context = rounded(zoo["mlp"](), context, "weights=8")
    for name in names:  # something to make up for
        value = before.graph.initializers[name]
        value.const_value = ir.tensor(0.7 * value.const_value.numpy(), name=name)
    after, rows = run(Recipe.parse(f"tune{{steps=20 rate=4 {option}}}"), before, context)
    old, new = floats_of(before), floats_of(after)
    assert {key for key in old if not np.array_equal(old[key], new[key])} == set(names)
    assert rows[0].changed == len(names)


@pytest.mark.parametrize("how", ["weights=4", "weights=3 affine=true", "weights=4 block=8"])
def test_codes_move_where_outputs_outnumber_them(how, context, outputs):
    weight = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    numbers = ",".join(map(str, weight.ravel()))
    model = ir.from_onnx_text(
        f"{HEADER} g (float[n,16] x) => (float[n,16] y) "
        f"<float[16,16] w = {{{numbers}}}> {{ y = MatMul (x, w) }}"
    )
    x = DRAW.normal(size=(200, 4)) @ DRAW.normal(size=(4, 16))
    before, context = rounded(model, context, f'{how} activations="float"', x)
    kept, _ = run(Recipe.parse("tune{codes=false}"), before, context)
    after, _ = run(Recipe.parse("tune"), before, context)
    old, stay, new = (graph_of(one)[1] for one in (before, kept, after))
    assert old == stay
    assert {key for key in old if old[key] != new[key]} == {"w_quantized"}
    dtypes = [one.graph.initializers["w_quantized"].dtype for one in (before, after)]
    assert dtypes[0] == dtypes[1]
    assert noise(context, after, outputs) < 0.8 * noise(context, kept, outputs)
    reasons = [remark.reason for remark in context.remarks]
    assert [reason.endswith("; codes stayed") for reason in reasons] == [True, False]


def test_biases_still_fit_and_the_recipe_goes_on(zoo, context, outputs):
    model, context = rounded(zoo["convnet"](), context, "weights=4")
    rest = "quantize-biases,pad-codes,unpack-weights"
    plain, _ = run(Recipe.parse(rest), model, context)
    tuned, _ = run(Recipe.parse(f"tune{{steps=40}},{rest}"), model, context)
    assert noise(context, tuned, outputs) < 0.97 * noise(context, plain, outputs)


def test_without_a_float_model_nothing_is_done(zoo, context):
    model, context = rounded(zoo["mlp"](), context, "weights=4")
    context.floats.clear()
    before = floats_of(model)
    assert Tune().run(model, context) == 0
    assert [r.reason for r in context.remarks] == ["no pass has kept the float model: not tuned"]
    assert all(np.array_equal(array, before[key]) for key, array in floats_of(model).items())


def test_a_float_model_is_no_matter(zoo, context):
    model = zoo["mlp"]()
    assert list(Tune().requires(model, context)) == []
    assert Tune().run(model, context) == 0
    assert context.remarks == []


def test_what_is_exact_already_is_left_with_both_figures(zoo, context):
    model, context = rounded(zoo["mlp"](), context, "weights=4")
    context.floats[:] = [model.clone()]
    assert Tune(steps=3).run(model, context) == 0
    (remark,) = context.remarks
    assert remark.reason == (
        "nothing gained, left as it was: loss 0 before, 0 after 3 steps; codes stayed"
    )


def test_a_gain_of_chance_is_not_taken(zoo, context):
    model, context = rounded(zoo["mlp"](), context, "weights=4")
    before = floats_of(model)
    assert Tune(steps=3, rate=1e-3).run(model, context) == 0
    assert "nothing gained" in context.remarks[0].reason
    assert all(np.array_equal(array, before[key]) for key, array in floats_of(model).items())


def test_operators_without_a_gradient_are_named(context):
    text = f"""{HEADER} g (float[n,2,2] x) => (float[n] y)
    <float s = {{0.1}}, uint8 z = {{0}}> {{
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        [odd] y = Det (d)
    }}"""
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    x = DRAW.normal(size=(10, 2, 2)).astype(np.float32)
    context = replace(context, feeds=Feeds.read({"x": x}, input_specs(model)))
    context.floats.append(model.clone())
    assert Tune().run(model, context) == 0
    (remark,) = context.remarks
    assert remark.reason == ("not tuned: node 'odd' (Det): gradients do not cover this operator")


def test_one_sample_cannot_be_held_out(zoo, context):
    model, context = rounded(zoo["mlp"](), context, "weights=4")
    context = replace(context, feeds=context.feeds.head(1))
    assert Tune().run(model, context) == 0
    assert context.remarks[0].reason.startswith("not tuned: cannot hold out samples of 1")


def test_it_asks_for_feeds_and_torch(zoo, context, monkeypatch):
    model, context = rounded(zoo["mlp"](), context, "weights=4")
    assert list(Tune().requires(model, context)) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    feeds, extra = Tune().requires(model, replace(context, feeds=None))
    assert "--data FILE" in feeds
    assert "pip install 'fourfold[torch]'" in extra


@pytest.mark.skipif(
    not (DATA / "tasks.py").exists(),
    reason=f"no tasks.py in {DATA}; set FOURFOLD_DATA to the folder with trained models",
)
def test_a_trained_network_of_three_bits(context, outputs):
    tasks = runpy.run_path(str(DATA / "tasks.py"), run_name="tasks")
    task = tasks["TASKS"]["cifar-resnet20"]
    arrays, _ = task.feeds(DATA, "calib")
    source = load(tasks["model_path"](task, DATA))
    (name,) = arrays
    given = {name: arrays[name][:25]}
    around = replace(context, feeds=Feeds.read(given, input_specs(source)), floats=[])
    first = "widen-floats,tidy{opset=25},fold-batchnorm,calibrate,assign-bits{weights=3}"
    model, _ = run(Recipe.parse(first), source, around)
    around.float_model(model)
    model, _ = run(Recipe.parse("insert-qdq,round-weights"), model, around)
    after, rows = run(Recipe.parse("tune{steps=6}"), model, around)
    assert rows[0].changed > 60
    other = {name: arrays[name][800:825]}
    expected, rough, fine = (
        next(iter(outputs(m, **other).values())) for m in (around.floats[0], model, after)
    )
    assert np.square(fine - expected).sum() < 0.8 * np.square(rough - expected).sum()
