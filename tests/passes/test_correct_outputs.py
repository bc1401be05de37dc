from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.capability import Capability
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.passes.correct_outputs import CorrectOutputs
from fourfold.passes.round_weights import RoundWeights

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
# name -> (body, shapes of constants, shape of a sample)
MODELS = {
    "gemm": ("[one] y = Gemm <transB = 1> (x, w, b)", {"w": (6, 16), "b": (6,)}, (16,)),
    "matmul": ("[one] m = MatMul (x, w) y = Add (m, b)", {"w": (16, 6), "b": (6,)}, (5, 16)),
    "alone": ("[one] y = MatMul (x, w)", {"w": (16, 6)}, (5, 16)),
    "conv": ("[one] y = Conv (x, w)", {"w": (6, 4, 3)}, (4, 9)),
    "grouped": ("[one] y = Conv <group = 2> (x, w, b)", {"w": (6, 4, 3), "b": (6,)}, (8, 9)),
    "depthwise": ("[one] y = Conv <group = 6> (x, w, b)", {"w": (6, 1, 5), "b": (6,)}, (6, 9)),
    "two": (
        "[one] m = MatMul (x, w) a = Add (m, b) r = Relu (a) [two] y = Gemm (r, v, c)",
        {"w": (16, 12), "b": (12,), "v": (12, 6), "c": (6,)},
        (16,),
    ),
}
AXES = {"gemm": 0, "matmul": 1, "alone": 1, "conv": 0, "grouped": 0, "depthwise": 0, "two": 1}
CHANNEL = {"conv": 1, "grouped": 1, "depthwise": 1}  # of the output; else the last


def float_model(name):
    body, shapes, sample = MODELS[name]
    text = ", ".join(f"float[{','.join(map(str, s))}] {n}" for n, s in shapes.items())
    size = ",".join(map(str, sample))
    model = ir.from_onnx_text(f"{HEADER} g (float[n,{size}] x, {text}) => (y) {{ {body} }}")
    draw = np.random.default_rng(5)
    for value in list(model.graph.inputs)[1:]:
        array = draw.normal(0.1, 0.5, shapes[value.name]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ShapeInferencePass()(model)
    return model


def samples(name, seed, count=200):
    """Return correlated samples whose mean is not zero."""
    rng, shape = np.random.default_rng(seed), MODELS[name][2]
    mix = np.random.default_rng(9).normal(size=(shape[-1], shape[-1])) / shape[-1] ** 0.5
    return np.asarray(rng.normal(0.6, 1, (count, *shape)) @ mix + 0.3, np.float32)


def context_of(model, tmp_path, x):
    feeds = Feeds.read({"x": x}, input_specs(model))
    return Context(Capability("any", (21, 25), ()), tmp_path, feeds=feeds)


@pytest.fixture
def rounded(tmp_path):
    """`rounded(name, groups)`: the model rounded to three bits, its context and feeds."""

    def make(name, groups=None, dtype="int4:3", clip="minmax"):
        model, x = float_model(name), samples(name, 1)
        context = context_of(model, tmp_path, x)
        groups = groups or f"per_axis({AXES[name]})"
        plan = {"format": f"{dtype} {groups}", "mode": "static"}
        weights = {n: plan for n in model.graph.initializers if n in "wv"}
        notes.apply_plan(model, weights)
        assert RoundWeights(clip=clip).run(model, context) == len(weights)
        return model, context, x

    return make


def constants(model):
    """Return what every reader of a constant sees of it: (node, input index) -> array."""
    return {
        (node.name or node.op_type, index): value.const_value.numpy().astype(np.float64)
        for node in model.graph
        for index, value in enumerate(node.inputs)
        if value is not None and value.const_value is not None
    }


def gaps(first, second, name):
    """Return how far the means of the channels are apart."""
    axis = CHANNEL.get(name, first.ndim - 1)
    others = tuple(i for i in range(first.ndim) if i != axis)
    return np.abs((first - second).mean(others, dtype=np.float64))


def scale_change(model, before):
    """Return by what the scales of `w` were multiplied."""
    place = ("w_DequantizeLinear", 1)
    return constants(model)[place] / before[place]


def test_a_channel_gets_its_scale_and_mean_back(becomes, tmp_path):
    def text(scale, bias, name="float[n,2] x"):
        return f"""{HEADER} g ({name}) => (float[n,2] y)
        <int8[2,2] w = {{1, 0, 0, 1}}, float[2] s = {{{scale}}}, float[2] b = {{{bias}}}> {{
            d = DequantizeLinear <axis = 1> (w, s)
            [one] y = Gemm (x, d, b)
        }}"""

    floats = ir.from_onnx_text(f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
    <float[2,2] w = {{1, 0, 0, 2}}, float[2] b = {{1, -1}}> {{ [one] y = Gemm (x, w, b) }}""")
    x = np.random.default_rng(0).normal(0.5, 1, size=(40, 2)).astype(np.float32)
    context = context_of(floats, tmp_path, x)
    context.float_model(floats)
    before, after = text("0.8, 2.5", "0.5, 0.25"), text("1, 2", "1, -1")
    model = becomes(CorrectOutputs(), before, after, context)
    assert CorrectOutputs().run(model, context) == 0
    assert context.remarks == []


@pytest.mark.parametrize("spread", ["none", "least-squares", "variance"])
@pytest.mark.parametrize("name", [n for n in MODELS if n != "alone"])
def test_the_gap_closes_and_unseen_outputs_gain(name, spread, rounded, outputs):
    model, context, x = rounded(name)
    floats, unseen = float_model(name), samples(name, 2, 400)
    t, u = (outputs(floats, plain=True, x=one)["y"] for one in (x, unseen))
    before = [outputs(model, plain=True, x=one)["y"] for one in (x, unseen)]
    one = CorrectOutputs(spread=spread, samples=0)
    assert one.run(model, context) == (2 if name == "two" else 1)
    after = [outputs(model, plain=True, x=one)["y"] for one in (x, unseen)]
    assert gaps(after[0], t, name).max() < 1e-4
    assert gaps(before[0], t, name).max() > 1e-2
    assert np.square(after[1] - u).mean() < np.square(before[1] - u).mean()
    text = str(model.graph)
    assert one.run(model, context) == 0  # it settles
    assert str(model.graph) == text


def test_variance_gives_channels_their_old_spread(rounded, outputs):
    model, context, x = rounded("gemm")
    before = constants(model)
    assert CorrectOutputs(spread="variance", samples=0).run(model, context) == 1
    t, z = (outputs(one, plain=True, x=x)["y"] for one in (float_model("gemm"), model))
    np.testing.assert_allclose(z.std(0), t.std(0), rtol=1e-3)
    assert np.abs(scale_change(model, before) - 1).max() > 0.01


@pytest.mark.parametrize(
    ("name", "groups", "shape"),
    [
        ("matmul", "per_axis(1)", (6,)),
        ("gemm", "per_axis(0)", (6,)),
        ("matmul", "per_block(0,4)", (4, 6)),
        ("gemm", "per_block(1,4)", (6, 4)),
    ],
)
def test_scales_of_one_channel_change_alike_and_codes_stay(name, groups, shape, rounded):
    model, context, _ = rounded(name, groups)
    before = constants(model)
    assert CorrectOutputs().run(model, context) == 1
    change = scale_change(model, before)
    assert change.shape == shape
    rows = change if name == "gemm" else change.T
    rows = rows.reshape(6, -1)
    np.testing.assert_allclose(rows, np.broadcast_to(rows[:, :1], rows.shape), rtol=1e-5)
    assert len(set(np.round(rows[:, 0], 5))) > 3
    after = constants(model)
    np.testing.assert_array_equal(after["w_DequantizeLinear", 0], before["w_DequantizeLinear", 0])


@pytest.mark.parametrize("groups", ["per_tensor", "per_axis(0)"])
def test_scales_that_channels_share_are_left_alone(groups, rounded):
    model, context, _ = rounded("matmul", groups)
    before = constants(model)
    assert CorrectOutputs().run(model, context) == 1
    assert np.all(scale_change(model, before) == 1)
    assert np.abs(constants(model)["Add", 1] - before["Add", 1]).max() > 1e-2


@pytest.mark.parametrize("groups", ["per_block(1,3)"])
def test_blocks_across_channels_are_left_alone(groups, rounded):
    model, context, _ = rounded("matmul", groups)
    before = constants(model)
    assert CorrectOutputs().run(model, context) == 1
    assert np.all(scale_change(model, before) == 1)


def test_options_leave_out_means_or_spreads(rounded):
    for fields, scales, biases in (
        ({"means": False}, True, False),
        ({"spread": "none"}, False, True),
    ):
        model, context, _ = rounded("gemm")
        before = constants(model)
        assert CorrectOutputs(**fields).run(model, context) == 1
        assert bool(np.any(scale_change(model, before) != 1)) is scales
        assert bool(np.any(constants(model)["one", 2] != before["one", 2])) is biases
    model, context, _ = rounded("gemm")
    assert CorrectOutputs(means=False, spread="none").run(model, context) == 0


def test_a_matmul_without_a_bias_gets_none(rounded, outputs):
    model, context, _ = rounded("alone")
    ops = [node.op_type for node in model.graph]
    before = constants(model)
    unseen = samples("alone", 2, 200)
    u = outputs(float_model("alone"), plain=True, x=unseen)["y"]
    first = outputs(model, plain=True, x=unseen)["y"]
    assert CorrectOutputs().run(model, context) == 1
    assert [node.op_type for node in model.graph] == ops
    assert np.any(scale_change(model, before) != 1)
    second = outputs(model, plain=True, x=unseen)["y"]
    assert np.square(second - u).mean() < np.square(first - u).mean()


def test_a_conv_without_a_bias_gets_one(rounded):
    model, context, _ = rounded("conv")
    assert len(next(n for n in model.graph if n.name == "one").inputs) == 2
    assert CorrectOutputs().run(model, context) == 1
    assert len(next(n for n in model.graph if n.name == "one").inputs) == 3


@pytest.mark.parametrize(("sign", "changed"), [(1, 1), (-1, 0)])
def test_what_held_out_samples_lose_by_is_not_done(sign, changed, rounded, tmp_path):
    model, context, _ = rounded("gemm")
    x = np.full((20, 16), 2, np.float32) + samples("gemm", 3, 20) * np.float32(0.1)
    x[4::5] *= sign  # every fifth sample is held out
    context = replace(context_of(float_model("gemm"), tmp_path, x), floats=context.floats)
    text = str(model.graph)
    assert CorrectOutputs(spread="none").run(model, context) == changed
    assert (str(model.graph) == text) is not bool(changed)


def test_what_lost_nothing_is_left_alone(rounded):
    for name in ("gemm", "two"):
        model, context, _ = rounded(name, dtype="int8", clip="mse")
        for value in list(context.floats[0].graph.initializers.values()):
            if value.name in "wv":  # the float model has what the codes stand for
                codes, scale = (
                    model.graph.initializers[f"{value.name}_{n}"].const_value.numpy()
                    for n in ("quantized", "scale")
                )
                turned = scale[:, None] if name == "gemm" else scale
                array = (codes * turned).astype(np.float32)
                value.const_value = ir.tensor(array, name=value.name)
        text = str(model.graph)
        assert CorrectOutputs().run(model, context) == 0
        assert str(model.graph) == text


def test_without_the_float_model_nothing_is_done(rounded):
    model, context, _ = rounded("gemm")
    context.floats.clear()
    text = str(model.graph)
    assert CorrectOutputs().run(model, context) == 0
    assert str(model.graph) == text
    assert context.floats == []


def test_a_model_without_codes_is_left_alone(tmp_path):
    model = float_model("two")
    context = Context(Capability("any", (21, 25), ()), tmp_path)
    context.float_model(model)
    assert list(CorrectOutputs().requires(model, context)) == []
    assert CorrectOutputs().run(model, context) == 0


def test_it_asks_for_feeds(rounded, tmp_path):
    model, _, _ = rounded("gemm")
    (need,) = CorrectOutputs().requires(model, Context(Capability("any", (21, 25), ()), tmp_path))
    assert "--data FILE" in need


def renamed(model):
    next(n for n in model.graph if n.name == "one").name = "other"


def unknown(model):
    next(n for n in model.graph if n.name == "two").inputs[0].name = "elsewhere"


@pytest.mark.parametrize(
    ("edit", "subject", "reason"),
    [
        (renamed, "w_quantized", "the float model has no such layer"),
        (unknown, "v_quantized", "the float model has no value like its operand"),
    ],
)
def test_refusals_are_remarked(edit, subject, reason, rounded):
    model, context, _ = rounded("two")
    edit(model)
    assert CorrectOutputs().run(model, context) == 1  # the other layer
    (remark,) = context.remarks
    assert remark.source == "correct-outputs"
    assert (remark.subject, remark.reason) == (subject, f"not corrected: {reason}")


def test_the_same_twice(rounded):
    texts = []
    for _ in range(2):
        model, context, _ = rounded("two")
        CorrectOutputs().run(model, context)
        texts.append(
            {n: v.const_value.numpy().tolist() for n, v in model.graph.initializers.items()}
        )
    assert texts[0] == texts[1]
