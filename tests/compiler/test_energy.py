from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.choices import open_weights
from fourfold.compiler.contract import Context
from fourfold.compiler.energy import energies
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.rounding import simulated
from fourfold.compiler.signals import by_activation_weighted
from fourfold.targets.cpu import Cpu

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
CPU = Cpu(isa="vnni").capability
DRAW = np.random.default_rng(0)


def model_of(text, **weights):
    """Parse a model and give its inputs of these names data."""
    model = ir.from_onnx_text(HEADER + text)
    for name, array in weights.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


def context_of(model, tmp_path, batch=2, **arrays):
    return Context(CPU, tmp_path, Feeds.read(arrays, input_specs(model), batch))


def found(model, context):
    weights = open_weights(model, CPU, (8, 4, 2, 32), "any")
    return weights, energies(model, weights, context)


def floats(*shape):
    return DRAW.normal(0, 1, shape).astype(np.float32)


def direct(op, x, shape, group=1, trans_a=False, trans_b=False):
    """The sum of x^2 that every single weight element meets, element by element."""
    square = np.square(x.astype(np.float64))
    whole = np.zeros(shape)
    for place in np.ndindex(*shape):
        match op:
            case "MatMul":
                whole[place] = square[..., place[-2]].sum()
            case "Gemm":
                inner = place[1] if trans_b else place[0]
                whole[place] = (square[inner] if trans_a else square[:, inner]).sum()
            case "Conv":
                first = place[0] // (shape[0] // group) * shape[1]
                whole[place] = square[:, first + place[1]].sum()
            case "ConvTranspose":
                whole[place] = square[:, place[0]].sum()
    return whole


def check(op, model, x, tmp_path, **options):
    (one,), energy = found(model, context_of(model, tmp_path, x=x))
    weight = one.value.const_value.numpy()
    expected = direct(op, x, weight.shape, **options)
    np.testing.assert_allclose(np.broadcast_to(energy["w"], weight.shape), expected, rtol=1e-12)
    ranking = by_activation_weighted(model, [one], context_of(model, tmp_path, x=x), clip="minmax")
    for choice in one.choices:
        loss = ranking.losses["w"][str(choice)]
        if choice.format is None:
            assert loss == 0
            continue
        miss = simulated(weight, choice.format, "minmax").astype(np.float64) - weight
        direct_loss = (expected * miss**2).sum() / (
            expected * weight.astype(np.float64) ** 2
        ).sum()
        assert loss == pytest.approx(direct_loss, rel=1e-9)
        assert loss > 0


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4), (5, 2, 3, 4)])
def test_a_matmul_sums_over_all_leading_axes(shape, tmp_path):
    given = ",".join(["n", *map(str, shape[1:])])
    text = (
        f"g (float[{given}] x, float[4,3] w) => (float[{given[:-1]}3] y) {{ y = MatMul (x, w) }}"
    )
    check("MatMul", model_of(text, w=floats(4, 3)), floats(*shape), tmp_path)


def test_a_matmul_of_a_vector(tmp_path):
    model = model_of(
        "g (float[4] x, float[4,3] w) => (float[3] y) { y = MatMul (x, w) }", w=floats(4, 3)
    )
    x = floats(4)
    feeds = Feeds.read([{"x": x}], input_specs(model))
    _, energy = found(model, Context(CPU, tmp_path, feeds))
    np.testing.assert_allclose(energy["w"], np.square(x.astype(np.float64))[:, None])


def test_a_stack_of_matrices(tmp_path):
    text = "g (float[n,2,3,4] x, float[2,4,3] w) => (float[n,2,3,3] y) { y = MatMul (x, w) }"
    model = model_of(text, w=floats(2, 4, 3))
    x = floats(5, 2, 3, 4)
    _, energy = found(model, context_of(model, tmp_path, x=x))
    whole = np.broadcast_to(energy["w"], (2, 4, 3))
    np.testing.assert_allclose(whole, direct("MatMul", x, (2, 4, 3)), rtol=1e-12)


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_gemm_both_ways_around(trans_a, trans_b, tmp_path):
    given, weight = ("4,5" if trans_a else "5,4"), ("3,4" if trans_b else "4,3")
    model = model_of(
        f"""g (float[{given}] x, float[{weight}] w, float[3] b) => (float[5,3] y) {{
            y = Gemm <transA = {trans_a}, transB = {trans_b}> (x, w, b) }}""",
        w=floats(*map(int, weight.split(","))),
        b=floats(3),
    )
    x = floats(*map(int, given.split(",")))
    check("Gemm", model, x, tmp_path, trans_a=bool(trans_a), trans_b=bool(trans_b))


@pytest.mark.parametrize(
    ("group", "channels", "outputs"), [(1, 4, 6), (2, 4, 6), (4, 4, 4), (4, 4, 8)]
)
def test_a_convolution_by_groups(group, channels, outputs, tmp_path):
    model = model_of(
        f"""g (float[n,{channels},5,5] x, float[{outputs},{channels // group},3,3] w) =>
            (float[n,{outputs},3,3] y) {{ y = Conv <group = {group}, strides = [2,2],
            pads = [1,1,1,1]> (x, w) }}""",
        w=floats(outputs, channels // group, 3, 3),
    )
    check("Conv", model, floats(3, channels, 5, 5), tmp_path, group=group)


def test_a_convolution_along_one_axis(tmp_path):
    model = model_of(
        "g (float[n,2,7] x, float[3,2,3] w) => (float[n,3,5] y) { y = Conv (x, w) }",
        w=floats(3, 2, 3),
    )
    check("Conv", model, floats(3, 2, 7), tmp_path)


@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution(group, tmp_path):
    model = model_of(
        f"""g (float[n,4,5,5] x, float[4,3,2,2] w) => (float[n,{3 * group},10,10] y) {{
            y = ConvTranspose <group = {group}, strides = [2,2]> (x, w) }}""",
        w=floats(4, 3, 2, 2),
    )
    check("ConvTranspose", model, floats(3, 4, 5, 5), tmp_path)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_a_table_counts_its_lookups(kind, tmp_path):
    name = np.dtype(kind).name
    model = model_of(
        f"g ({name}[n,3] x, float[6,2] w) => (float[n,3,2] y) {{ y = Gather (w, x) }}",
        w=floats(6, 2),
    )
    x = np.array([[0, 1, -1], [5, 5, 3], [-6, 1, 1]], kind)
    _, energy = found(model, context_of(model, tmp_path, x=x))
    assert energy["w"].tolist() == [[2], [3], [0], [1], [0], [3]]


def test_rows_that_nobody_looks_up_cost_nothing(tmp_path):
    table = np.array([[1, 1], [100, 0.3], [0.5, -0.25]], np.float32)
    model = model_of(
        "g (int64[n] x, float[3,2] w) => (float[n,2] y) { y = Gather (w, x) }", w=table
    )
    weights, _ = found(model, context_of(model, tmp_path, x=np.array([0, 0])))
    ranking = by_activation_weighted(
        model, weights, context_of(model, tmp_path, x=np.array([0, 0])), clip="auto"
    )
    assert max(ranking.losses["w"].values()) < 1e-12  # row 0 is exact in any symmetric form


def test_readers_of_one_weight_add_up(tmp_path):
    text = """g (float[n,4] x, float[4,4] w) => (float[n,4] y) {
        a = Relu (x) b = MatMul (a, w) c = MatMul (x, w) y = Sub (b, c) }"""
    model = model_of(text, w=floats(4, 4))
    x = floats(6, 4)
    _, energy = found(model, context_of(model, tmp_path, x=x))
    expected = direct("MatMul", x, (4, 4)) + direct("MatMul", np.maximum(x, 0), (4, 4))
    np.testing.assert_allclose(np.broadcast_to(energy["w"], (4, 4)), expected, rtol=1e-12)


def test_a_tied_table_is_looked_up_and_multiplied(tmp_path):
    text = """g (int64[n] x, float[5,2] w) => (float[n,5] y) {
        a = Gather (w, x) y = Gemm <transB = 1> (a, w) }"""
    table = floats(5, 2)
    model = model_of(text, w=table)
    x = np.array([0, 3, 3])
    _, energy = found(model, context_of(model, tmp_path, x=x))
    lookups = np.array([1, 0, 0, 2, 0])[:, None]
    products = np.square(table[x].astype(np.float64)).sum(axis=0)[None]
    np.testing.assert_allclose(energy["w"], lookups + products, rtol=1e-12)


def test_what_a_constant_meets(tmp_path):
    text = """g (float[n,4] x, float[5,4] w, int64[2] ids, float[3,5] a, float[5,1] v) =>
        (float[n,4] y) { b = Gather (w, ids) c = ReduceSum <keepdims = 0> (b)
            d = MatMul (a, v) e = ReduceSum <keepdims = 0> (d) f = Add (x, c) y = Mul (f, e) }"""
    a, ids = floats(3, 5), np.array([1, 1])
    model = model_of(text, w=floats(5, 4), v=floats(5, 1), a=a, ids=ids)
    _, energy = found(model, context_of(model, tmp_path, x=floats(4, 4), batch=4))
    assert energy["w"].ravel().tolist() == [0, 2, 0, 0, 0]
    np.testing.assert_allclose(energy["v"], direct("MatMul", a, (5, 1)), rtol=1e-12)


def test_branches_do_not_count(tmp_path):
    text = """g (float[n,4] x, bool c, float[4,4] w) => (float[n,4] y) {
        a = MatMul (x, w)
        y = If (c) <then_branch = t () => (o) { o = MatMul (a, w) },
                    else_branch = e () => (p) { p = Neg (a) }> }"""
    model = model_of(text, w=floats(4, 4))
    x = floats(3, 4)
    feeds = Feeds.read([{"x": x, "c": np.bool_(True)}], input_specs(model))
    _, energy = found(model, Context(CPU, tmp_path, feeds))
    np.testing.assert_allclose(energy["w"], direct("MatMul", x, (4, 4))[:, :1], rtol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_batches_and_memory_change_nothing(batch, memory, zoo, tmp_path):
    model = zoo["mlp"]()
    x = floats(6, 16)
    context = context_of(model, tmp_path, batch=batch, x=x)
    _, energy = found(model, replace(context, memory=memory))
    hidden = np.maximum(answers(model, x, "h1"), 0)
    np.testing.assert_allclose(energy["w1"], direct("MatMul", x, (16, 1)), rtol=1e-12)
    np.testing.assert_allclose(energy["w2"], direct("MatMul", hidden, (32, 1)), rtol=1e-5)


def answers(model, x, name="y"):
    """Run a model up to one of its values."""
    model = model.clone()
    made = [value for node in model.graph for value in node.outputs]
    model.graph.outputs[:] = [next(value for value in made if value.name == name)]
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


LONE = {
    "MatMul": "g (float[n,6] x, float[6,4] w) => (float[n,4] y) { y = MatMul (x, w) }",
    "Gemm": "g (float[n,6] x, float[4,6] w) => (float[n,4] y) { y = Gemm <transB = 1> (x, w) }",
    "Conv": "g (float[n,6,1,1] x, float[4,6,1,1] w) => (float[n,4,1,1] y) { y = Conv (x, w) }",
    "depthwise": """g (float[n,6,1,1] x, float[6,1,1,1] w) => (float[n,6,1,1] y) {
        y = Conv <group = 6> (x, w) }""",
    "ConvTranspose": """g (float[n,6,1,1] x, float[6,4,1,1] w) => (float[n,4,1,1] y) {
        y = ConvTranspose (x, w) }""",
    "Gather": "g (int64[n] x, float[6,4] w) => (float[n,4] y) { y = Gather (w, x) }",
}


@pytest.mark.parametrize("name", LONE)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([8, 4, 2]))
def test_lone_features_give_the_true_error(name, seed, bits, tmp_path_factory):
    # Where each sample has one feature only, errors of different features never meet in a sum.
    draw = np.random.default_rng(seed)
    shape = next(v for v in model_of(LONE[name]).graph.inputs if v.name == "w").shape.numpy()
    floats = draw.standard_t(3, shape).astype(np.float32)
    model = model_of(LONE[name], w=floats)
    if name == "Gather":
        x = draw.integers(-6, 6, 12)
    else:
        x = (np.eye(6)[draw.integers(0, 6, 12)] * draw.normal(0, 1, (12, 1))).astype(np.float32)
        x = x.reshape(12, 6, *[1] * (2 if "Conv" in name or name == "depthwise" else 0))
    context = context_of(model, tmp_path_factory.mktemp("energy"), x=x)
    (one,) = open_weights(model, CPU, (bits,), "float")
    form = one.choices[0]
    ranking = by_activation_weighted(model, [one], context, clip="auto")
    expected = answers(model, x).astype(np.float64)
    rounded = model_of(LONE[name], w=simulated(floats, form.format))
    miss = answers(rounded, x) - expected
    true = float((miss**2).sum() / (expected**2).sum())
    assert ranking.losses["w"][str(form)] == pytest.approx(true, rel=1e-3, abs=1e-10)
