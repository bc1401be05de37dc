import functools
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.errors import DataError
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.losses import OutputLoss
from fourfold.compiler.tunables import Tunables

torch = pytest.importorskip("torch")
from fourfold.compiler.moves import LARGEST, Moves  # noqa: E402 - it imports torch
from fourfold.compiler.torch_graph import TorchGraph  # noqa: E402
from fourfold.compiler.tuning import Schedule, tuned  # noqa: E402

pytestmark = pytest.mark.torch

X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
CODES = "{3,-2,5,1,-7,6,2,4,-1,0,7,-5}"
QUICK = Schedule(steps=60, batch=16, biases=0.05, scales=0.05, ranges=0.05)


def parsed(text, batch="n"):
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    model = ir.from_onnx_text(f"{header} g (float[{batch},4] x) => (float[{batch},3] y) {text}")
    ShapeInferencePass()(model)
    return model


def layer(scales="0.1,0.2,0.3", step=0.03, bias="0.5,-0.5,1", tail="y = Relu (a)", **more):
    """Return a layer of int4 codes; its activations have codes of 8 bits."""
    return parsed(
        f"""<int8[4,3] c = {CODES}, float[3] ws = {{{scales}}}, float xs = {{{step}}},
        uint8 z = {{128}}, float[3] b = {{{bias}}}> {{
            q = QuantizeLinear (x, xs, z)
            d = DequantizeLinear (q, xs, z)
            w = DequantizeLinear <axis = 1> (c, ws)
            m = MatMul (d, w)
            a = Add (m, b)
            {tail}
        }}""",
        **more,
    )


def split(model, x=X, batch=8):
    return Feeds.read({"x": x}, input_specs(model), batch).split(5)


def tune(model, teacher, schedule=QUICK, **flags):
    return tuned(model, teacher, Tunables.of(model, **flags), split(model), schedule)


def data(model):
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}


def written(model, values):
    changed = model.clone()
    for name, array in values.items():
        changed.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return changed


def run(model, x):
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("wrong", "name", "group"),
    [
        ({"bias": "0.8,-0.2,0.8"}, "b", "biases"),
        ({"scales": "0.12,0.18,0.33"}, "ws", "scales"),
        ({"step": 0.012}, "xs", "ranges"),
    ],
)
def test_what_is_off_comes_back(wrong, name, group):
    right, model = layer(), layer(**wrong)
    others = dict.fromkeys({"biases", "scales", "ranges"} - {group}, False)
    found = tune(model, right, **others)
    assert list(found.values) == [name]
    assert found.after < 0.02 * found.before
    if group != "ranges":  # a range only has to be wide enough
        np.testing.assert_allclose(found.values[name], data(right)[name], rtol=0.1)
    assert all(
        array.dtype == data(model)[n].dtype and array.shape == data(model)[n].shape
        for n, array in found.values.items()
    )


@pytest.mark.parametrize(
    ("kind", "tail", "form"),
    [
        ("mse", "y = Relu (a)", "logits"),
        ("kl", "y = Identity (a)", "logits"),
        ("kl", "y = Softmax (a)", "probabilities"),
        ("kl", "y = LogSoftmax (a)", "log-probabilities"),
    ],
)
def test_the_figures_are_those_of_the_runtime_on_held_out_samples(kind, tail, form):
    teacher = layer(tail=tail)
    model = layer("0.15,0.15,0.25", 0.02, "0.8,-0.2,0.8", tail=tail)
    found = tune(model, teacher, replace(QUICK, kind=kind))
    held = X[::5]
    for values, figure in (({}, found.before), (found.values, found.after)):
        total = OutputLoss(kind, form)
        total.add({"y": run(teacher, held)}, {"y": run(written(model, values), held)})
        assert figure == pytest.approx(total.value, rel=1e-3)
    assert found.after < 0.3 * found.before


def test_the_model_is_left_as_it_is_and_two_runs_agree():
    model, teacher = layer(step=0.015), layer()
    before = {name: array.copy() for name, array in data(model).items()}
    first, second = tune(model, teacher), tune(model, teacher)
    assert all(np.array_equal(before[name], array) for name, array in data(model).items())
    assert first.steps == second.steps
    assert first.after == second.after
    for name, array in first.values.items():
        np.testing.assert_array_equal(array, second.values[name])


def test_another_seed_takes_another_way():
    model, teacher = layer(bias="0.8,-0.2,0.8"), layer()
    first = tune(model, teacher, replace(QUICK, steps=7))
    second = tune(model, teacher, replace(QUICK, steps=7, seed=1))
    assert first.after != second.after


def test_steps_that_lead_nowhere_leave_the_start():
    model, teacher = layer(bias="0.6,-0.5,1"), layer()
    found = tune(model, teacher, QUICK.faster(1e4))
    assert found.values == {}
    assert found.after == found.before
    assert found.steps < QUICK.steps  # it ended early


def test_few_samples_are_not_learned_from_endlessly():
    model, teacher = layer(bias="0.8,-0.2,0.8"), layer()
    schedule = replace(QUICK, steps=1000, epochs=4)
    found = tune(model, teacher, schedule)
    assert found.steps == 4 * 3  # 48 samples, 16 a step


def test_batches_of_a_fixed_size_are_put_together():
    model, teacher = layer(step=0.01, batch="1"), layer(batch="1")
    found = tune(model, teacher, replace(QUICK, steps=1000, epochs=2))
    assert found.steps == 2 * 3
    assert found.after < found.before


def test_outputs_that_are_not_finite_are_refused():
    tail = "e = Div (a, a) f = Sub (a, a) g = Div (e, f) y = Sub (g, g)"
    with pytest.raises(DataError, match="not finite"):
        tune(layer(tail=tail), layer(tail=tail))


def test_a_bias_is_moved_in_units_of_its_channel():
    model = layer()
    graph, tunables = TorchGraph(model, ["b", "ws", "xs"]), Tunables.of(model)
    moves = Moves.of(model, model, graph, tunables, {"x": X})
    assert moves.arrays(model) == {}
    with torch.no_grad():
        moves.moved["b"] += 2
        moves.moved["ws"] -= 50
    tail = layer(tail="y = Identity (a)")
    rms = np.sqrt(np.square(run(tail, X)).mean(0))
    found = moves.arrays(model)
    np.testing.assert_allclose(found["b"], data(model)["b"] + 2 * rms, rtol=1e-4)
    assert (found["ws"] > 0).all()
    assert "xs" not in found


INTEGER = """<int8[4,3] c = {CODES}, float{size} ws = {{{scales}}}, float xs = {{0.02}},
    uint8 z = {{128}}, float[3] b = {{0.5,-0.5,1}}> {{
        q = QuantizeLinear (x, xs, z)
        d = DequantizeLinear (q, xs, z)
        w = DequantizeLinear <axis = 1> (c, ws)
        y = Gemm (d, w, b)
    }}"""
FLAGS = [(), ("scales",), ("scales", "ranges"), ("biases", "scales"), ("biases",)]
NUMBERS = st.floats(-20, 20, width=32)


def of_codes(codes):
    """Return a layer of int4 codes whose plan says so, and the float layer that it was."""
    model = parsed(
        f"""<int8[4,3] w_quantized = {{{codes}}}, float[3] ws = {{0.1,0.2,0.3}}> {{
            w = DequantizeLinear <axis = 1> (w_quantized, ws)
            y = MatMul (x, w)
        }}"""
    )
    notes.apply_plan(model, {"w_quantized": {"format": "int4 per_axis(1)", "mode": "static"}})
    return model


WHOLE = np.arange(-6, 6).reshape(4, 3)
FLOAT = np.float32([0.1, 0.2, 0.3]) * (WHOLE + 0.3)


def float_layer():
    numbers = ",".join(map(str, FLOAT.ravel()))
    return parsed(f"<float[4,3] w = {{{numbers}}}> {{ y = MatMul (x, w) }}")


def test_codes_that_are_off_come_back():
    """All are at the nearest but two, which only other codes can make up for."""
    off = WHOLE.copy()
    off[0, 0] += 2
    off[3, 2] -= 2
    model = of_codes(",".join(map(str, off.ravel())))
    schedule = Schedule(steps=300, batch=16, scales=0, codes=0.05)
    found = tuned(model, float_layer(), Tunables.of(model), split(model), schedule)
    assert found.codes
    assert found.after < 0.3 * found.before
    codes = found.values["w_quantized"]
    assert codes.dtype == data(model)["w_quantized"].dtype
    assert np.abs(codes.astype(int) - WHOLE).max() <= 1
    assert codes.astype(int)[0, 0] in (WHOLE[0, 0], WHOLE[0, 0] + 1)


def test_codes_stay_where_outputs_are_fewer():
    model = of_codes(",".join(map(str, (WHOLE + 1).ravel())))
    few = Feeds.read({"x": X[:4]}, input_specs(model), 1).split(2)  # 2 x 3 outputs, 12 codes
    found = tuned(model, float_layer(), Tunables.of(model), few, QUICK)
    assert not found.codes
    assert "w_quantized" not in found.values


def test_weights_start_inside_the_cells_of_their_codes():
    off = WHOLE.copy()
    off[0, 0] += 2
    model = of_codes(",".join(map(str, off.ravel())))
    tunables = Tunables.of(model)
    graph = TorchGraph(model, tunables.names)
    moves = Moves.of(model, float_layer(), graph, tunables, {"x": X})
    expected = np.full((4, 3), 0.3)
    expected[0, 0] = -0.45  # the float weight lies beyond the edge
    np.testing.assert_allclose(moves.moved["w_quantized"].detach(), expected, atol=1e-5)
    assert moves.arrays(model) == {}
    with torch.no_grad():
        moves.moved["w_quantized"] += 0.25
        moves.moved["w_quantized"][3] += 100
    found = moves.arrays(model)["w_quantized"].astype(int)
    assert found[0, 0] == off[0, 0]
    np.testing.assert_array_equal(found[1:3], WHOLE[1:3] + 1)
    assert (found[3] == 7).all()


@functools.cache
def integer_layer(per_tensor, fixed):
    """Return a layer whose bias hardly fits, and moves of all but the fixed groups."""
    size, scales = ("", "1e-8") if per_tensor else ("[3]", "1e-8,0.1,3e-9")
    model = parsed(INTEGER.format(CODES=CODES, size=size, scales=scales))
    tunables = Tunables.of(model, **dict.fromkeys(fixed, False))
    return model, Moves.of(model, model, TorchGraph(model, tunables.names), tunables, {"x": X})


@settings(max_examples=60)
@given(st.sampled_from(FLAGS), st.booleans(), st.lists(NUMBERS, min_size=7, max_size=7))
def test_biases_fit_int32_wherever_they_and_the_scales_go(fixed, per_tensor, numbers):
    model, moves = integer_layer(per_tensor, fixed)
    with torch.no_grad():
        for at, leaf in enumerate(moves.moved.values()):
            part = torch.tensor(numbers[at : at + 3])
            leaf.copy_(part[: leaf.numel()].reshape(leaf.shape))
    found = {**data(model), **moves.arrays(model)}
    codes = np.abs(found["b"] / (found["xs"].astype(np.float64) * found["ws"]))
    assert codes.max() <= LARGEST * (1 + 1e-5)
    assert (found["ws"] > 0).all()
    assert found["xs"] > 0
    if "scales" not in fixed and "ranges" not in fixed:  # then only scales of weights give way
        start, step = np.float32(0.02), float(moves.moved["xs"].detach())
        assert found["xs"] == pytest.approx(start * np.exp(step), rel=1e-5)
