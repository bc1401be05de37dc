import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.feeds import Feeds, input_specs, made_up
from fourfold.compiler.trial import Reference

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def parsed(text):
    model = ir.from_onnx_text(HEADER + text)
    ShapeInferencePass()(model)
    return model


def answers(model, batch):
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, batch), strict=True))


def shaken(model, by=0.01, seed=0):
    """The model with noise on every weight."""
    model, draw = model.clone(), np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy()
        noise = draw.normal(0, by, array.shape).astype(np.float32)
        value.const_value = ir.tensor(array + noise, name=name)
    return model


def noise_over_signal(first, second, feeds):
    noise = signal = 0.0
    for batch in feeds:
        expected, got = answers(first, batch), answers(second, batch)
        for name, array in expected.items():
            noise += float(((got[name].astype(np.float64) - array) ** 2).sum())
            signal += float((array.astype(np.float64) ** 2).sum())
    return noise / signal


@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_loss_is_noise_over_signal(name, batch, zoo, tmp_path):
    model = zoo[name]()
    feeds = made_up(input_specs(model), 0, 8, batch=batch)
    reference = Reference(model, feeds, 0, "mse", tmp_path)
    other = shaken(model)
    expected = noise_over_signal(model, other, feeds)
    assert reference.loss(other) == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-6
    assert reference.loss(model) == 0


def test_classes_are_held_against_each_other(tmp_path):
    text = """g (float[n,3] x) => (float[n,3] y) <float[3,3] w = {1,-2,3,4,5,-6,0.5,1,2}> {
        a = MatMul (x, w) y = Softmax (a) }"""
    model = parsed(text)
    feeds = made_up(input_specs(model), 0, 6, batch=4)
    other = shaken(model, 0.1)
    total = rows = 0.0
    for batch in feeds:
        p, q = (answers(m, batch)["y"].astype(np.float64) for m in (model, other))
        total += float((p * np.log(p / q)).sum())
        rows += len(p)
    reference = Reference(model, feeds, 0, "kl", tmp_path)
    assert reference.loss(other) == pytest.approx(total / rows, rel=1e-3)


@settings(max_examples=10)
@given(st.integers(0, 1000), st.floats(1e-3, 1))
def test_more_noise_is_more_loss(seed, by):
    model = parsed(
        "g (float[n,3] x) => (float[n,3] y) <float[3,3] w = {1,-2,3,4,5,-6,0.5,1,2}> {"
        " y = MatMul (x, w) }"
    )
    with tempfile.TemporaryDirectory() as folder:
        feeds = made_up(input_specs(model), seed, 6)
        reference = Reference(model, feeds, 0, "mse", Path(folder))
        little, much = (reference.loss(shaken(model, by * scale, seed)) for scale in (1, 4))
    assert much == pytest.approx(16 * little, rel=1e-2)


def test_only_some_samples_are_used(zoo, tmp_path):
    model = zoo["mlp"]()
    feeds = made_up(input_specs(model), 0, 12)
    other = shaken(model)
    some = Reference(model, feeds, 4, "mse", tmp_path).loss(other)
    assert some == pytest.approx(noise_over_signal(model, other, feeds.split(3)[1]), rel=1e-3)
    assert some != Reference(model, feeds, 0, "mse", tmp_path).loss(other)


def test_a_lone_fixed_batch_is_used_whole(tmp_path):
    model = parsed(
        "g (float[8,2] x) => (float[8,2] y) <float[2,2] w = {1,2,3,4}> { y = MatMul (x, w) }"
    )
    feeds = made_up(input_specs(model), 0, 8)
    other = shaken(model)
    found = Reference(model, feeds, 2, "mse", tmp_path).loss(other)
    assert found == pytest.approx(noise_over_signal(model, other, feeds), rel=1e-3)


def test_whole_numbers_are_not_compared(tmp_path):
    text = """g (float[n,3] x) => (float[n,3] y, int64[n,1] best)
        <float[3,3] w = {1,-2,3,4,5,-6,0.5,1,2}> {
            y = MatMul (x, w) best = ArgMax <axis = 1> (y) }"""
    model = parsed(text)
    feeds = made_up(input_specs(model), 0, 6)
    alone = parsed(
        "g (float[n,3] x) => (float[n,3] y) <float[3,3] w = {1,-2,3,4,5,-6,0.5,1,2}> {"
        " y = MatMul (x, w) }"
    )
    both = Reference(model, feeds, 0, "mse", tmp_path).loss(shaken(model))
    assert both == pytest.approx(noise_over_signal(alone, shaken(alone), feeds), rel=1e-3)


def test_nothing_is_left_in_the_folder_or_on_the_model(zoo, tmp_path):
    model = zoo["mlp"]()
    other = shaken(model)
    before = ir.to_proto(other).SerializeToString(deterministic=True)
    feeds = made_up(input_specs(model), 0, 4)
    reference = Reference(model, feeds, 0, "mse", tmp_path)
    first = reference.loss(other)
    assert reference.loss(other) == first  # and again, from the same reference
    assert list(tmp_path.iterdir()) == []
    assert ir.to_proto(other).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("threads", [1, 2])
def test_samples_of_several_shapes(threads, tmp_path):
    model = parsed(
        "g (float[n,t,2] x) => (float[n,t,2] y) <float[2,2] w = {1,2,3,4}> { y = MatMul (x, w) }"
    )
    parts = [{"x": np.full((2, size, 2), size, np.float32)} for size in (3, 1, 5)]
    feeds = Feeds.read(parts, input_specs(model))
    other = shaken(model)
    found = Reference(model, feeds, 0, "mse", tmp_path, threads).loss(other)
    assert found == pytest.approx(noise_over_signal(model, other, feeds), rel=1e-3)
