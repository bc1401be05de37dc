import importlib
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import signals
from fourfold.compiler.blocks import find_blocks
from fourfold.compiler.choices import Choice, open_weights
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import Feeds, input_specs, made_up
from fourfold.compiler.rounding import simulated
from fourfold.compiler.signals import Ranking, kurtosis, lim, zd
from fourfold.targets.cpu import Cpu

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
CPU = Cpu(isa="vnni").capability
GAUSSIAN = np.random.default_rng(0).normal(3, 0.2, (500, 1000)).astype(np.float32)


def lim_of(first, second):
    return lim(np.array([first], np.float64), np.array([second], np.float64)).item()


# The figures of the papers.


def test_lim_of_vectors():
    assert lim_of([1, 2, 3], [1, 2, 3]) == pytest.approx(-1, abs=1e-12)
    assert lim_of([1, 0, 0], [0, 1, 0]) == 0
    assert lim_of([1, 0, 0], [1, 1, 0]) == pytest.approx(-0.70711, abs=5e-6)
    assert lim_of([1, 2], [-1, -2]) == pytest.approx(1, abs=1e-12)


def test_a_zero_vector_did_not_turn():
    assert lim_of([0, 0], [1, 2]) == lim_of([1, 2], [0, 0]) == lim_of([0, 0], [0, 0]) == -1


def test_each_token_has_its_own_figure():
    first = np.array([[1.0, 0], [1, 0], [0, 0]])
    second = np.array([[2.0, 0], [0, 3], [1, 1]])
    assert lim(first, second).tolist() == [-1, 0, -1]


VECTORS = arrays(np.float64, (3, 4), elements=st.floats(-100, 100).map(lambda x: round(x, 3)))


@given(VECTORS, VECTORS, st.floats(0.01, 100), st.floats(0.01, 100))
def test_lim_knows_no_scale(first, second, up, down):
    figure = lim(first, second)
    assert (np.abs(figure) <= 1 + 1e-9).all()
    np.testing.assert_allclose(lim(first * up, second * down), figure, atol=1e-9)
    np.testing.assert_allclose(lim(second, first), figure, atol=1e-9)
    turned = (first.any(axis=1) & second.any(axis=1))[:, None]
    np.testing.assert_allclose(lim(-first, second)[turned[:, 0]], -figure[turned[:, 0]], atol=1e-9)


def test_zd_counts_the_positive_tail_alone():
    assert zd([np.array([0] * 8 + [3, -3], np.float32)]) == 0.1
    assert zd([np.array([0] * 9 + [-3], np.float32)]) == 0
    assert zd([np.array([0] * 9 + [3], np.float32)]) == 0.1
    assert zd([np.array([1, -1], np.float32)]) == 0  # one deviation is not more than one


def test_zd_of_a_gaussian():
    assert zd([GAUSSIAN]) == pytest.approx(0.1587, abs=0.003)


def test_zd_of_a_block_is_over_all_its_weights_together():
    small, large = np.full((2, 4), 1, np.float32), np.array([[9, 9]], np.float32)
    assert zd([small]) == zd([large]) == 0
    assert zd([small, large]) == 0.2
    assert zd([large, small]) == 0.2
    assert zd([GAUSSIAN[:250], GAUSSIAN[250:]]) == pytest.approx(zd([GAUSSIAN]), abs=1e-9)


def test_kurtosis_of_shapes():
    assert kurtosis(GAUSSIAN) == pytest.approx(0, abs=0.05)
    uniform = np.linspace(-1, 1, 10001, dtype=np.float32)
    assert kurtosis(uniform) == pytest.approx(-1.2, abs=0.01)
    assert kurtosis(np.array([1, -1, 1, -1], np.float32)) == -2
    spike = np.zeros(1000, np.float32)
    spike[7] = 50
    assert kurtosis(spike) > 900


@given(st.floats(-(2**60), 2**60, width=32, allow_subnormal=False), st.integers(1, 1000))
def test_equal_weights_have_no_spread(value, count):
    same = np.full(count, value, np.float32)
    assert kurtosis(same) == 0
    assert zd([same]) == 0
    assert zd([same, same[:1]]) == 0


LISTS = arrays(np.float32, st.integers(2, 40), elements=st.integers(-50, 50).map(float))


@given(LISTS)
def test_at_most_half_the_weights_lie_a_deviation_above(weights):
    assert 0 <= zd([weights]) <= 0.5


@given(LISTS, st.sampled_from([0.25, 2.0, 64.0]), st.integers(-100, 100))
def test_kurtosis_knows_no_scale_and_no_shift(weights, scale, shift):
    moved = weights * np.float32(scale) + np.float32(shift)
    assert kurtosis(moved) == pytest.approx(kurtosis(weights), rel=1e-6, abs=1e-6)
    assert kurtosis(weights) >= -2 - 1e-9


# Rankings of whole models.


def parsed(text):
    model = ir.from_onnx_text(HEADER + text)
    ShapeInferencePass()(model)
    return model


def with_weights(text, seed=0, **given):
    """Parse a model whose inputs w0, w1, ... are weights; they get random or given data."""
    model, draw = ir.from_onnx_text(HEADER + text), np.random.default_rng(seed)
    for value in [v for v in model.graph.inputs if v.name.startswith("w")]:
        array = given.get(value.name, draw.normal(0, 0.5, value.shape.numpy()))
        value.const_value = ir.tensor(np.asarray(array, np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


def weights_in(model, widths=(8, 4, 2, 32), activations="any"):
    return open_weights(model, CPU, widths, activations)


TOKENS = """g (float[n,t,4] x{mask}, float[4,6] w0, float[6,4] w1, float[4,6] w2, float[6,4] w3,
    float[4,3] w4) => (float[n,t,3] y) {{
    a = MatMul (x, w0) b = Relu (a) c = MatMul (b, w1) h = Add (c, x)
    d = MatMul (h, w2) e = Relu (d) f = MatMul (e, w3) k = Add (f, h)
    y = MatMul (k, w4) }}"""


def layers(x, model):
    """The hidden states of TOKENS, in numpy: before, between and behind its two layers."""
    weight = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    between = np.maximum(x @ weight["w0"], 0) @ weight["w1"] + x
    return x, between, np.maximum(between @ weight["w2"], 0) @ weight["w3"] + between


def minus_cosine(first, second):
    """The mean of -cosine over the rows of [..., width]."""
    wide = [array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (first, second)]
    product = (wide[0] * wide[1]).sum(axis=1)
    return -(product / np.linalg.norm(wide[0], axis=1) / np.linalg.norm(wide[1], axis=1)).mean()


def fed(model, tmp_path, batch=3, **given):
    return Context(CPU, tmp_path, Feeds.read(given, input_specs(model), batch))


def lim_ranking(model, context):
    return signals.by_lim(model, find_blocks(model), context)


def test_lim_of_two_residual_layers(tmp_path):
    model = with_weights(TOKENS.format(mask=""))
    x = np.random.default_rng(1).normal(0, 1, (7, 5, 4)).astype(np.float32)
    states = layers(x, model)
    found = lim_ranking(model, fed(model, tmp_path, x=x))
    assert found.losses is None
    assert set(found.importance) == {"w0", "w1", "w2", "w3"}  # the head is in no block
    for names, first, second in (("w0 w1", *states[:2]), ("w2 w3", *states[1:])):
        for name in names.split():
            assert found.importance[name] == pytest.approx(minus_cosine(first, second), abs=1e-6)


def test_a_layer_that_turns_more_is_more_important(tmp_path):
    little = {"w1": np.full((6, 4), 0.001)}
    model = with_weights(TOKENS.format(mask=""), **little)
    x = np.random.default_rng(1).normal(0, 1, (4, 5, 4)).astype(np.float32)
    found = lim_ranking(model, fed(model, tmp_path, x=x)).importance
    assert found["w0"] == found["w1"] < found["w2"] == found["w3"]
    assert found["w0"] == pytest.approx(-1, abs=1e-4)


@pytest.mark.parametrize("name", ["attention_mask", "Mask", "padding_mask"])
@pytest.mark.parametrize("kind", ["int64", "int32", "bool"])
def test_padding_is_left_out(name, kind, tmp_path):
    model = with_weights(TOKENS.format(mask=f", {kind}[n,t] {name}"))
    draw = np.random.default_rng(2)
    x = draw.normal(0, 1, (4, 5, 4)).astype(np.float32)
    mask = np.arange(5) < np.array([5, 2, 1, 4])[:, None]
    padded = np.where(mask[..., None], x, 1000).astype(np.float32)
    kept = {name: mask.astype(kind)}
    found = lim_ranking(model, fed(model, tmp_path, x=padded, **kept)).importance
    first, second, third = (state[mask] for state in layers(x, model))
    assert found["w0"] == pytest.approx(minus_cosine(first, second), abs=1e-6)
    assert found["w3"] == pytest.approx(minus_cosine(second, third), abs=1e-6)


@pytest.mark.parametrize("extra", [", float[n,t] attention_mask", ", int64[n,1] attention_mask"])
def test_what_does_not_say_which_tokens_are_real(extra, tmp_path):
    model = with_weights(TOKENS.format(mask=extra))
    x = np.random.default_rng(2).normal(0, 1, (4, 5, 4)).astype(np.float32)
    zeros = np.zeros((4, 1), np.int64) if "int64" in extra else np.zeros((4, 5), np.float32)
    found = lim_ranking(model, fed(model, tmp_path, x=x, attention_mask=zeros)).importance
    assert found["w0"] == pytest.approx(minus_cosine(*layers(x, model)[:2]), abs=1e-6)


def test_a_block_without_a_real_token_has_no_rank(tmp_path):
    model = with_weights(TOKENS.format(mask=", int64[n,t] attention_mask"))
    x, mask = np.ones((4, 5, 4), np.float32), np.zeros((4, 5), np.int64)
    assert lim_ranking(model, fed(model, tmp_path, x=x, attention_mask=mask)).importance == {}


IMAGE = """g (float[n,3,4,4] x, float[3,3,3,3] w0, float[3,3,3,3] w1, float[6,3,3,3] w2,
    float[6,6,3,3] w3, float[6,3,1,1] w4, float[6,6,3,3] w5, float[6,6,3,3] w6)
    => (float[n,6,2,2] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0) b = Relu (a)
    c = Conv <pads = [1,1,1,1]> (b, w1) d = Add (c, x)
    h = Conv <pads = [1,1,1,1], strides = [2,2]> (d, w2) i = Relu (h)
    j = Conv <pads = [1,1,1,1]> (i, w3) k = Conv <strides = [2,2]> (d, w4) l = Add (j, k)
    m = Conv <pads = [1,1,1,1]> (l, w5) o = Relu (m)
    p = Conv <pads = [1,1,1,1]> (o, w6) y = Add (p, l) }"""


def test_pixels_are_the_tokens_of_images(tmp_path, values_of):
    model = with_weights(IMAGE)
    x = np.random.default_rng(3).normal(0, 1, (5, 3, 4, 4)).astype(np.float32)
    context = fed(model, tmp_path, x=x)
    found = lim_ranking(model, context).importance
    got = values_of(model, x, "d", "l", "y")
    pixels = {name: np.moveaxis(array, 1, -1) for name, array in {"x": x, **got}.items()}
    assert found["w0"] == found["w1"] == pytest.approx(minus_cosine(pixels["x"], pixels["d"]))
    assert found["w5"] == found["w6"] == pytest.approx(minus_cosine(pixels["l"], pixels["y"]))
    # A block whose output has another shape than its input turns nothing that can be compared.
    assert set(found) == {"w0", "w1", "w5", "w6"}


@pytest.fixture
def values_of():
    import onnxruntime

    def run(model, x, *names):
        model = model.clone()
        made = {v.name: v for node in model.graph for v in node.outputs}
        model.graph.outputs[:] = [made[name] for name in names]
        content = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(None, {"x": x}), strict=True))

    return run


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_lim_does_not_depend_on_batches(batch, zoo, tmp_path):
    model = zoo["attention"]()
    feeds = made_up(input_specs(model), 0, 5)
    whole = lim_ranking(model, Context(CPU, tmp_path, feeds)).importance
    cut = lim_ranking(model, Context(CPU, tmp_path, feeds.rebatched(batch))).importance
    assert set(whole) == {"wq", "wk", "wv", "wo", "w1", "w2"}
    assert cut == pytest.approx(whole, abs=1e-6)


def test_zd_is_one_figure_a_block(tmp_path):
    model = with_weights(TOKENS.format(mask=""))
    weights = weights_in(model)
    arrays = {one.name: one.value.const_value.numpy() for one in weights}
    found = signals.by_zd(weights, find_blocks(model)).importance
    assert found["w0"] == found["w1"] == -zd([arrays["w0"], arrays["w1"]])
    assert found["w2"] == found["w3"] == -zd([arrays["w2"], arrays["w3"]])
    assert found["w4"] == -zd([arrays["w4"]])  # the head is a block of its own


def test_kurtosis_is_a_figure_a_weight(zoo):
    weights = weights_in(zoo["convnet"]())
    found = signals.by_kurtosis(weights)
    assert found.losses is None
    assert found.importance == {
        one.name: kurtosis(one.value.const_value.numpy()) for one in weights
    }


@pytest.mark.parametrize("clip", ["minmax", "mse", "auto"])
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_the_quantizers_own_error(name, clip, zoo):
    weights = weights_in(zoo[name]())
    found = signals.by_quantization_error(weights, clip)
    assert list(found.losses) == [one.name for one in weights]
    for one in weights:
        floats = one.value.const_value.numpy().astype(np.float64)
        for choice in one.choices:
            form = choice.format
            rounded = floats if form is None else simulated(floats.astype(np.float32), form, clip)
            expected = ((rounded - floats) ** 2).sum() / (floats**2).sum()
            assert found.losses[one.name][str(choice)] == pytest.approx(expected, rel=1e-6)


def test_a_weight_of_zeros_loses_nothing():
    model = parsed(
        "g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {0,0,0,0}> { y = MatMul (x, w) }"
    )
    found = signals.by_quantization_error(weights_in(model), "auto")
    assert set(found.losses["w"].values()) == {0.0}
    assert signals.by_kurtosis(weights_in(model)).importance == {"w": 0.0}
    assert signals.by_zd(weights_in(model), []).importance == {"w": 0.0}


def test_activation_weighted_is_the_error_behind_the_energy(zoo, tmp_path):
    # Where all channels have the same energy it is the quantizer's own error.
    model = zoo["mlp"]()
    x = np.where(np.random.default_rng(0).random((8, 16)) < 0.5, -1, 1).astype(np.float32)
    first = [one for one in weights_in(model) if one.name == "w1"]
    context = fed(model, tmp_path, x=x)
    found = signals.by_activation_weighted(model, first, context, "auto")
    plain = signals.by_quantization_error(first, "auto")
    assert found.losses["w1"] == pytest.approx(plain.losses["w1"], rel=1e-9)
    assert found.importance == {"w1": found.losses["w1"]["int4 per_axis(1) x float"]}


# What stands for a weight's importance.


def test_importance_is_the_loss_at_four_bits():
    found = Ranking.of_losses(
        {
            "a": {"int8 per_axis(0) x uint8": 0.1, "int4 per_axis(0) x uint8": 0.5, "float": 0.0},
            "b": {"int4:3 per_axis(0) x uint8": 0.7, "int2 per_axis(0) x uint8": 0.9},
        }
    )
    assert found.importance == {"a": 0.5, "b": 0.7}
    assert found.losses["b"]["int2 per_axis(0) x uint8"] == 0.9


def test_without_four_bits_it_is_the_loss_of_the_narrowest_form():
    eight, two = "int8 per_axis(0) x uint8", "int2 per_axis(0) x uint8"
    assert Ranking.of_losses({"a": {eight: 0.1, two: 0.3}}).importance == {"a": 0.3}
    assert Ranking.of_losses({"a": {eight: 0.1, "float": 0.0}}).importance == {"a": 0.1}
    assert Ranking.of_losses({"a": {"float": 0.0}}).importance == {"a": 0.0}


@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_every_choice_has_a_loss(name, zoo, tmp_path):
    model = zoo[name]()
    context = Context(CPU, tmp_path, made_up(input_specs(model), 0, 4))
    weights = weights_in(model)
    for found in (
        signals.by_quantization_error(weights, "auto"),
        signals.by_activation_weighted(model, weights, context, "auto"),
    ):
        for one in weights:
            losses = found.losses[one.name]
            assert list(losses) == [str(choice) for choice in one.choices]
            assert losses["float"] == 0
            by_bits = {}
            for text, loss in losses.items():
                by_bits.setdefault(Choice.parse(text).bits, []).append(loss)
            assert max(by_bits[8]) < min(by_bits[4])
            assert max(by_bits[4]) < min(by_bits[2])


def test_signals_that_run_the_model():
    data = {"lim", "activation-weighted", "fisher", "measured"}
    every = {*data, "zd", "kurtosis", "quantization-error"}
    assert {signal for signal in every if signals.needs_data(signal)} == data


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_fisher_is_the_curvature_times_the_squared_error(kind, zoo, tmp_path):
    fisher = importlib.import_module("fourfold.compiler.fisher").fisher
    model = zoo["mlp"]()
    feeds = made_up(input_specs(model), 0, 8)
    context = replace(Context(CPU, tmp_path, feeds), seed=3)
    weights = weights_in(model)
    found = signals.by_fisher(model, weights, context, kind, "auto")
    diagonal = fisher(model, [one.name for one in weights], feeds, kind, seed=3)
    for one in weights:
        floats = one.value.const_value.numpy()
        assert found.losses[one.name]["float"] == 0
        for choice in one.choices[:-1]:
            miss = simulated(floats, choice.format, "auto").astype(np.float64) - floats
            expected = float((miss**2 * diagonal[one.name]).sum())
            assert found.losses[one.name][str(choice)] == pytest.approx(expected, rel=1e-5)
            assert expected > 0
