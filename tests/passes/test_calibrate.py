from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.errors import DataError, RecipeError
from fourfold.compiler.formats import Format
from fourfold.compiler.quantizers import affine_parameters, dequantize_affine, quantize_affine
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.calibrate import Calibrate

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
# Conv 1x1 with weight 2 and bias 1, so that every range can be computed in the head.
TEXT = f"""{HEADER} g (float[n,1,2,2] x) => (float[n,1,2,2] y)
<float[1,1,1,1] w = {{2}}, float[1] b = {{1}}> {{
    [conv] c = Conv (x, w, b)
    [relu] r = Relu (c)
    [soft] s = Softsign (r)
    [conv_after] y = Conv (s, w)
}}"""


def parsed(text=TEXT):
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


def samples(count=20, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 1, 2, 2)).astype(np.float32)


def ranges(model):
    return {n: (f["low"], f["high"]) for n, f in notes.plan(model).items()}


def test_ranges_are_the_extremes_of_all_batches(fed, outputs):
    model, x = parsed(), samples()
    before = str(model.graph)
    assert Calibrate(method="minmax").run(model, fed(model, x=x)) == 4
    assert str(model.graph) == before
    relu = np.maximum(2 * x + 1, 0)
    soft = relu / (1 + relu)
    expected = {
        "x": (x.min(), x.max()),
        "r": (0.0, relu.max()),  # what the kernel writes after Conv and Relu became one
        "s": (0.0, soft.max()),
        "y": (0.0, 2 * soft.max()),
    }
    got = ranges(model)
    assert got.keys() == expected.keys()
    for name, bounds in expected.items():
        np.testing.assert_allclose(got[name], bounds, rtol=1e-6, err_msg=name)


def test_ranges_do_not_depend_on_how_samples_are_batched(fed):
    found = []
    for batch in (1, 7, 20):
        model = parsed()
        context = fed(model, x=samples())
        Calibrate().run(model, replace(context, feeds=context.feeds.rebatched(batch)))
        found.append(ranges(model))
    assert found[0] == found[1] == found[2]


def test_ranges_do_not_depend_on_the_bound_on_memory(fed):
    found = []
    for memory in (1, 1 << 30):
        model = parsed()
        Calibrate().run(model, replace(fed(model, x=samples()), memory=memory))
        found.append(ranges(model))
    assert found[0] == found[1]


def test_the_expected_sqnr_is_that_of_the_quantizer(fed):
    model, x = parsed(), samples(500)
    Calibrate(method="minmax").run(model, fed(model, x=x))
    note = notes.read(model.graph.inputs[0])
    format = Format("uint8")
    scale, zero_point = affine_parameters(note.low, note.high, format)
    image = dequantize_affine(quantize_affine(x, scale, zero_point, format), scale, zero_point)
    measured = 10 * np.log10(np.square(x).sum() / np.square(image - x).sum())
    assert note.sqnr_db == pytest.approx(measured, abs=0.3)


def test_methods_differ_in_what_they_do_with_an_outlier(fed):
    x = samples(4000)
    x[0, 0, 0, 0] = 1000.0
    found = {}
    for method in ("minmax", "percentile", "entropy", "mse"):
        model = parsed()
        Calibrate(method=method, percentile=99.9).run(model, fed(model, x=x))
        found[method] = notes.read(model.graph.inputs[0])
    assert found["minmax"].high == 1000.0
    assert found["percentile"].high < 10
    assert found["entropy"].high < 500
    # That one outlier holds most of the power, so the least squared error keeps nearly all of it.
    assert max(note.sqnr_db for note in found.values()) == found["mse"].sqnr_db
    assert found["mse"].sqnr_db > found["percentile"].sqnr_db


def test_an_attention_mask_is_no_signal_and_that_is_told(fed):
    model, x = parsed(), samples()
    x[0, 0, 0] = -3.4e38
    context = fed(model, x=x)
    Calibrate(method="minmax").run(model, context)
    note = notes.read(model.graph.inputs[0])
    assert note.low == x[x > -1e30].min()
    told = "2 elements beyond 3e4 were taken for an attention mask"
    assert ("x", told) in [(r.subject, r.reason) for r in context.remarks]


def test_only_what_can_run_in_integers_is_observed(fed, context):
    text = f"{HEADER} g (float[2] x) => (float[2] y) {{ y = Relu (x) }}"
    model = parsed(text)
    assert Calibrate().run(model, fed(model, x=np.ones((1, 2), np.float32)[0])) == 0
    assert notes.plan(model) == {}


def test_without_feeds_it_says_what_to_do(context):
    with pytest.raises(RecipeError, match=r"^calibrate cannot run: .*--data FILE, or --ranges dy"):
        run(Recipe((Calibrate(),)), parsed(), context)


def test_nan_is_the_callers_fault(fed):
    model, x = parsed(), samples()
    x[3] = np.nan
    with pytest.raises(DataError, match="'x' is NaN on the given feeds"):
        Calibrate().run(model, fed(model, x=x))


def test_other_fields_of_a_note_stay_and_a_second_run_changes_nothing(fed):
    model = parsed()
    notes.write(model.graph.inputs[0], why="asked for", mode="float")
    context = fed(model, x=samples())
    assert Calibrate().run(model, context) == 4
    note = notes.read(model.graph.inputs[0])
    assert (note.why, note.mode) == ("asked for", "float")
    assert Calibrate().run(model, context) == 0
