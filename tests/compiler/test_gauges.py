"""Which values are gauges, and that any positive factors on one change nothing."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import equalizing
from fourfold.compiler.gauges import find, passed
from fourfold.passes.equalize import _put_in


def answer(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    shape = model.graph.inputs[0].shape.numpy()
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    return session.run(None, {model.graph.inputs[0].name: x})[0]


def scaled_at_random(model, seed=0, possible=False):
    """Put random factors on every gauge of a kind; return how many there were."""
    draw = np.random.default_rng(seed)
    found = find(model.graph)
    gauges = found.possible if possible else found.exact
    for gauge in gauges:
        _put_in(model.graph, gauge, draw.integers(-6, 7, gauge.count))
    return len(gauges)


CONV = {"w1": (8, 4, 3, 3), "b1": (8,), "w2": (6, 8, 1, 1)}
HEAD = {"w1": (8, 4, 3, 3), "b1": (8,)}
EXACT = {
    "relu": ("a = Conv(x,w1,b1) r = Relu(a) y = Conv(r,w2)", CONV),
    "no bias, leaky": ("a = Conv(x,w1) r = LeakyRelu<alpha=0.3>(a) y = Conv(r,w2)", CONV),
    "prelu": ("a = Conv(x,w1,b1) r = PRelu(a,s) y = Conv(r,w2)", CONV | {"s": (8, 1, 1)}),
    "two readers": (
        "a = Conv(x,w1,b1) p = Conv(a,w2) q = Conv(a,w3) y = Concat<axis=1>(p,q)",
        CONV | {"w3": (2, 8, 1, 1)},
    ),
    "grouped": (
        "a = Conv(x,w1,b1) r = Relu(a) y = Conv<group=2>(r,w2)",
        CONV | {"w2": (6, 4, 1, 1)},
    ),
    "pools and pad": (
        """a = Conv(x,w1,b1) m = MaxPool<kernel_shape=[2,2]>(a)
           v = AveragePool<kernel_shape=[2,2]>(m)
           p = Pad(v,pads) y = Conv(p,w2)""",
        CONV,
    ),
    "flatten": (
        "a = Conv(x,w1,b1) m = MaxPool<kernel_shape=[2,2]>(a) f = Flatten(m) y = Gemm(f,w2)",
        HEAD | {"w2": (72, 5)},
    ),
    "global pool, transposed gemm": (
        "a = Conv(x,w1,b1) m = GlobalAveragePool(a) f = Flatten(m) y = Gemm<transB=1>(f,w2)",
        HEAD | {"w2": (5, 8)},
    ),
    "reduced": (
        "a = Conv(x,w1,b1) m = ReduceMean<keepdims=0>(a,axes) y = MatMul(m,w2)",
        HEAD | {"w2": (8, 5)},
    ),
    "channels last": (
        "a = Conv(x,w1,b1) t = Transpose<perm=[0,2,3,1]>(a) y = MatMul(t,w2)",
        HEAD | {"w2": (8, 5)},
    ),
    "squeezed excitation": (
        """a = Conv(x,w1,b1) g = GlobalAveragePool(a) e = Conv(g,w3) s = Sigmoid(e)
           m = Mul(a,s) y = Conv(m,w2)""",
        CONV | {"w3": (8, 8, 1, 1)},
    ),
    "a shift and a constant factor": (
        "a = Conv(x,w1) s = Sub(c,a) m = Mul(s,c) y = Conv(m,w2)",
        CONV | {"c": (1, 8, 1, 1)},
    ),
    "a number as shift": (
        "a = Conv(x,w1) s = Add(a,c) y = Conv(s,w2)",
        CONV | {"c": ()},
    ),
    "gemms": (
        "f = Flatten(x) a = Gemm<alpha=0.5,beta=2.0,transB=1>(f,w1,b1) r = Relu(a) y = Gemm(r,w2)",
        {"w1": (8, 144), "b1": (1, 8), "w2": (8, 3)},
    ),
    "depthwise": (
        "a = Conv(x,w1,b1) d = Conv<group=8>(a,wd,bd) r = Relu(d) y = Conv(r,w2)",
        CONV | {"wd": (8, 1, 3, 3), "bd": (8,)},
    ),
}
SEQUENCES = {
    "layernorm": (
        "n = LayerNormalization(x,g,b) q = MatMul(n,w1) k = MatMul(n,w2) y = Add(q,k)",
        {"g": (8,), "b": (8,), "w1": (8, 8), "w2": (8, 8)},
    ),
    "simplified": (
        "n = SimplifiedLayerNormalization(x,g) y = MatMul(n,w)",
        {"g": (8,), "w": (8, 3)},
    ),
    "gain": (
        "s = Sigmoid(x) n = Mul(g,s) y = MatMul(n,w)",
        {"g": (8,), "w": (8, 3)},
    ),
    "a number as gain": (
        "s = Sigmoid(x) n = Mul(g,s) y = MatMul(n,w)",
        {"g": (), "w": (8, 3)},
    ),
    "gated": (
        "u = MatMul(x,w1) g = MatMul(x,w3) s = Sigmoid(g) m = Mul(s,u) y = MatMul(m,w2)",
        {"w1": (8, 6), "w3": (8, 6), "w2": (6, 3)},
    ),
    "values through heads": (
        """v = MatMul(x,wv) c = Add(bv,v) h = Reshape(c,split) t = Transpose<perm=[0,2,1,3]>(h)
           m = MatMul(scores,t) u = Transpose<perm=[0,2,1,3]>(m) f = Reshape(u,merge)
           y = MatMul(f,wo)""",
        {"wv": (8, 12), "bv": (12,), "scores": (2, 3, 5, 5), "wo": (12, 8)},
    ),
    "repeated heads": (
        """v = MatMul(x,wv) h = Reshape(v,narrow) t = Expand(h,wide) f = Reshape(t,merge)
           y = MatMul(f,wo)""",
        {"wv": (8, 6), "wo": (12, 8)},
    ),
}
INTEGERS = {
    "pads": [0, 0, 1, 1, 0, 0, 1, 1],
    "axes": [2, 3],
    "split": [0, 0, 3, 4],
    "merge": [2, 5, 12],
    "narrow": [2, 5, 3, 1, 2],
    "wide": [2, 5, 3, 2, 2],
}


MORE = {"wide": [0, 1, 0, 0, 0, 0, 0, 0], "pads": INTEGERS["pads"], "channels": [1]}


def build(body, weights, inputs="float[2,4,6,6] x", outputs="y"):
    """Parse a graph; weights, name -> shape, are drawn, and lists of integers taken from above."""
    header = ", ".join(
        f"int64[{len(v)}] {n} = {{{','.join(map(str, v))}}}"
        for n, v in INTEGERS.items()
        if f",{n})" in body
    )
    listed = ", ".join([inputs, *(f"float{list(s) or ''} {n}" for n, s in weights.items())])
    made = ", ".join(f"float[a{n}] {n}" for n in outputs.split())
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({listed}) => ({made}) <{header}> '
    model = ir.from_onnx_text(text + f"{{ {body} }}")
    draw = np.random.default_rng(7)
    for value in [v for v in model.graph.inputs if v.name in weights]:
        array = np.asarray(draw.normal(size=value.shape.numpy()), np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for output in model.graph.outputs:
        output.shape = None
    ShapeInferencePass()(model)
    return model


def cases():
    for name, (body, weights) in EXACT.items():
        yield pytest.param(body, weights, "float[2,4,6,6] x", id=name)
    for name, (body, weights) in SEQUENCES.items():
        yield pytest.param(body, weights, "float[2,5,8] x", id=name)


@pytest.mark.parametrize(("body", "weights", "inputs"), list(cases()))
def test_any_powers_of_two_leave_every_bit(body, weights, inputs):
    model = build(body, weights, inputs)
    before = answer(model)
    names = {v.name for node in model.graph for v in node.outputs}
    exact = scaled_at_random(model, possible=False)
    assert exact >= 1
    np.testing.assert_array_equal(answer(model), before)
    after = {v.name for node in model.graph for v in node.outputs}
    assert len(after - names) == len(names - after) >= exact  # what changed has another name


@pytest.mark.parametrize(("body", "weights", "inputs"), list(cases()))
def test_a_mul_in_front_of_layers_leaves_every_bit(body, weights, inputs):
    model = build(body, weights, inputs)
    before = answer(model)
    scaled_at_random(model, possible=True)
    np.testing.assert_array_equal(answer(model), before)


REFUSED = {
    "Clip passes no factors through": "a = Conv(x,w1,b1) r = Clip(a,b,c) y = Conv(r,w2)",
    "a is an output": "a = Conv(x,w1,b1) y = Conv(a,w2) ",
    "Add adds z to it": "a = Conv(x,w1,b1) z = Sigmoid(x) s = Add(a,z) y = Conv(a,w2)",
    "Add adds r to it": "a = Conv(x,w1,b1) r = Relu(a) s = Add(a,r) y = Conv(r,w2)",
    "the weight w2 is shared with another layer": """a = Conv(x,w1,b1) r = Conv(a,w2)
        t = Sigmoid(a) y = Conv(t,w2)""",
    "Pad adds channels, or a number that is not known to be zero": """a = Conv(x,w1,b1)
        p = Pad(a,pads,b) y = Conv(a,w2)""",
    "the body of an If, Loop or Scan reads a": """a = Conv(x,w1,b1) y = Conv(a,w2)
        i = If(k) <then_branch = t () => (o) { o = Neg(a) },
                   else_branch = e () => (p) { p = Abs(a) }>""",
    "a Mul reads it twice": "a = Conv(x,w1,b1) m = Mul(a,a) y = Conv(a,w2)",
    "v is no constant": "v = Neg(b) a = Conv(x,w1,v) y = Conv(a,w2)",
    "Softmax passes no factors through": "a = Conv(x,w1,b1) s = Softmax(a) y = Conv(a,w2)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_gauge_has_a_reason(reason):
    outputs = "y a" if reason == "a is an output" else "y i" if "If" in reason else "y"
    inputs = "float[2,4,6,6] x" + (", bool k" if "If" in reason else "")
    model = build(REFUSED[reason], CONV | {"b": (), "c": ()}, inputs, outputs)
    found = find(model.graph)
    if "shared" not in reason:
        assert found.exact == []
        assert reason in found.refused["a"]
    assert not any(reader.share.value.name == "w2" for g in found.exact for reader in g.readers)


@pytest.mark.parametrize(
    ("op", "index", "channels", "why"),
    [
        ("m = MatMul(x,z)", 0, (1, 4, 1, 6), "MatMul passes no factors through"),
        ("m = MatMul(z,x)", 1, (1, 4, 6, 1), "MatMul passes no factors through"),
        ("m = Div(z,x)", 1, (1, 4, 1, 1), "Div passes no factors through"),
        ("m = Pad(x,wide)", 0, (1, 4, 1, 1), "Pad adds channels"),
        ("m = Pad(x,pads,one)", 0, (1, 4, 1, 1), "Pad adds channels"),
        ("m = ReduceMean(x,channels)", 0, (1, 4, 1, 1), "ReduceMean reduces its channels"),
        ("m = Softmax(x)", 0, (1, 4, 1, 1), "Softmax passes no factors through"),
    ],
)
def test_what_ends_factors(op, index, channels, why):
    listed = ", ".join(f"int64[{len(v)}] {n} = {{{str(v)[1:-1]}}}" for n, v in MORE.items())
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[2,4,6,6] x, float[2,4,6,6] z) => (float[a,b,c,d] m)
    <{listed}, float one = {{1}}> {{ {op} }}"""
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    at = np.arange(int(np.prod(channels))).reshape(channels)
    went = passed(next(iter(model.graph)), index, at)
    assert isinstance(went, str)
    assert why in went


def test_a_gain_between_layers_is_part_of_the_gauge_before_it():
    found = find(
        build(
            "a = MatMul(x,w1) m = Mul(a,c) y = MatMul(m,w2)",
            {"w1": (8, 6), "c": (6,), "w2": (6, 3)},
            "float[2,5,8] x",
        ).graph
    )
    assert [gauge.value.name for gauge in found.exact] == ["a"]


def test_what_no_layer_reads_is_not_worth_a_word():
    body = "q = MatMul(x,w1) k = MatMul(x,w2) t = Transpose<perm=[0,2,1]>(k) y = MatMul(q,t)"
    found = find(build(body, {"w1": (8, 8), "w2": (8, 8)}, "float[2,5,8] x").graph)
    assert found.exact == []
    assert found.refused == {}
    assert [g.value.name for g in found.possible] == ["x"]


def test_a_value_of_unknown_rank_is_left_out():
    model = build("a = Conv(x,w1,b1) r = Reshape(a,k) y = MatMul(r,w2)", HEAD | {"w2": (8, 3)},
                  "float[2,4,6,6] x, int64[n] k")  # fmt: skip
    found = find(model.graph)
    assert found.exact == []


@given(
    widths=st.lists(st.integers(2, 5), min_size=3, max_size=4),
    bent=st.lists(
        st.sampled_from(["Relu", "Neg", "LeakyRelu", "Identity"]), min_size=3, max_size=3
    ),
    gemm=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_chains_of_any_length_keep_every_bit(widths, bent, gemm, seed):
    weights, body, last = {}, "", "x"
    for n, (rows, columns) in enumerate(zip([4, *widths], widths, strict=False)):
        weights |= {f"w{n}": (rows, columns), f"b{n}": (columns,)}
        layer = f"Gemm({last},w{n},b{n})" if gemm else f"MatMul({last},w{n})"
        body += f"h{n} = {layer} "
        body += "" if gemm else f"s{n} = Add(b{n},h{n}) "
        body += f"r{n} = {bent[n % 3]}({'h' if gemm else 's'}{n}) "
        last = f"r{n}"
    model = build(body + f"y = Sigmoid({last})", weights, "float[3,4] x")
    before = answer(model)
    assert scaled_at_random(model, seed=seed) == len(widths) - 1
    np.testing.assert_array_equal(answer(model), before)


def test_equal_ranges_are_left_and_unequal_ones_meet_in_the_middle():
    model = build(
        "a = MatMul(x,w1) y = MatMul(a,w2)", {"w1": (2, 3), "w2": (3, 2)}, "float[1,2] x"
    )
    first = np.float32([[16, 1, 0], [-8, 1, 0]])
    second = np.float32([[1, -1], [1, 0], [1, 1]])
    for name, array in (("w1", first), ("w2", second)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    balance = equalizing.Balance(find(model.graph).exact, [None], 8, ())
    np.testing.assert_array_equal(balance.ranges(0, inverse=False), [16, 1, 0])
    np.testing.assert_array_equal(balance.ranges(0, inverse=True), [1, 1, 1])
    np.testing.assert_array_equal(balance.balanced()[0], [-2, 0, 0])  # 16/4 and 1*4; dead stays
    balance.exponents[0] = balance.balanced()[0]
    np.testing.assert_array_equal(balance.ranges(0, inverse=False), [4, 1, 0])
    np.testing.assert_array_equal(balance.ranges(0, inverse=True), [4, 1, 1])
    assert balance.criterion(0, balance.exponents[0]) == pytest.approx(1 - (1 + 1 / 16) / 3)


def test_smoothing_follows_the_formula():
    seen, weight = np.array([64.0, 1, 0, 4]), np.array([1.0, 1, 1, 4])
    np.testing.assert_array_equal(equalizing._smoothing(seen, weight, 0.5, 0.5), [-3, 0, 0, 0])
    np.testing.assert_array_equal(equalizing._smoothing(seen, weight, 1.0, 0.0), [-4, 2, 0, 0])


@given(seed=st.integers(0, 99), bits=st.sampled_from([2, 4, 8]))
@settings(max_examples=20)
def test_rounding_errs_by_half_a_step_at_most(seed, bits):
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(2, 5, 3)).astype(np.float32)
    step = np.abs(weight).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    error = np.abs(equalizing.rounded_weight(weight, bits) - weight)
    assert (error <= step * 0.501).all()
    rows = draw.normal(size=(1, 7, 5)).astype(np.float32)
    low, high = float(rows.min()), float(rows.max())
    step = (max(high, 0) - min(low, 0)) / 255
    whole = np.abs(equalizing._affine(rows, low, high) - rows).max()
    assert whole <= step * 1.01
    best = np.square(equalizing.rounded_rows(rows, low, high) - rows).sum()
    assert best <= np.square(equalizing._affine(rows, low, high) - rows).sum()


def test_one_outlier_is_clipped_where_that_errs_less():
    rows = np.full((1, 1000, 4), 0.3, np.float32)
    rows[0, 0, 0] = 2.0
    part = equalizing.rounded_rows(rows, 0.0, 2.0).max()
    assert part in (pytest.approx(2.0, abs=0.02), pytest.approx(1.8, abs=0.2))


def chain(bits=8):
    """Return the balance of x -> a -> b -> y, with what was seen before the last two layers."""
    weights = {"w1": (4, 6), "w2": (6, 5), "w3": (5, 3)}
    model = build("a = MatMul(x,w1) b = MatMul(a,w2) y = MatMul(b,w3)", weights, "float[9,4] x")
    draw = np.random.default_rng(2)
    seen = []
    for width in (6, 5):
        rows = draw.normal(size=(1, 50, width)).astype(np.float32) * np.float32(4) ** np.arange(
            width
        )
        low, high = (edge(rows[0], axis=0).astype(float) for edge in (np.min, np.max))
        seen.append([equalizing.Operand(rows, low, high)])
    return equalizing.Balance(find(model.graph).exact, seen, bits, (0.25, 0.75))


def test_candidates_do_not_depend_on_what_was_chosen_before():
    balance = chain()
    first = balance.candidates(0, balance.exponents[0])
    balance.exponents[0] = np.arange(6) - 3
    second = balance.candidates(0, balance.exponents[0])
    assert len(first) == 5
    for name in first.keys() - {"weight ranges"}:
        np.testing.assert_array_equal(first[name], second[name])


def test_noise_is_what_rounding_leaves():
    balance = chain()
    (operand,) = balance.operands[1]
    weight = balance.gauges[1].readers[0].share.value.const_value.numpy()
    rows = equalizing.rounded_rows(operand.rows, operand.low.min(), operand.high.max())[0]
    exact = operand.rows[0] @ weight
    error = rows @ equalizing.rounded_weight(weight[None], 8)[0] - exact
    expected = np.square(error).sum() / np.square(exact).sum()
    assert balance.noise(1, balance.exponents[1]) == pytest.approx(expected, rel=1e-4)


def test_outputs_count_as_the_next_gauge_scales_them():
    balance = chain()
    before = balance.noise(0, balance.exponents[0])
    balance.exponents[1] = np.array([0, 3, 0, -3, 0])
    assert balance.noise(0, balance.exponents[0]) != before
    balance.exponents[1] = np.full(5, 3)
    assert balance.noise(0, balance.exponents[0]) == pytest.approx(before, rel=1e-9)


def test_choices_lose_noise_and_settle_and_fixed_gauges_stay():
    balance = chain()
    before = [balance.noise(n, balance.exponents[n]) for n in (0, 1)]
    chosen = equalizing.decide(balance, 0.02, 0.5)
    assert all(name and left < 0.98 for name, left in chosen)
    after = [balance.noise(n, balance.exponents[n]) for n in (0, 1)]
    assert sum(after) < 0.5 * sum(before)
    assert all(name == "" for name, _ in equalizing.decide(balance, 0.02, 0.5))
    fixed = chain()
    fixed.fixed = frozenset({0})
    equalizing.decide(fixed, 0.02, 0.5)
    assert not fixed.exponents[0].any()
    assert fixed.exponents[1].any()
