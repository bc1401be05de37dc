"""Which values are gauges, and that any positive factors on one change nothing."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.gauges import find
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
        _put_in(model.graph, gauge, draw.integers(-6, 7, gauge.count) * gauge.free)
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
    "joined": (
        """a = Conv(x,w1,b1) r = Relu(a) p = Conv(r,w2) q = Conv<pads=[1,1,1,1]>(r,w3,b3)
           j = Concat<axis=1>(p,q) k = Relu(j) y = Conv(k,w4)""",
        CONV | {"w3": (3, 8, 3, 3), "b3": (3,), "w4": (2, 9, 1, 1)},
    ),
    "joined twice, and with what cannot be scaled": (
        """a = Conv(x,w1,b1) s = Sigmoid(a) p = Conv(a,w2) j = Concat<axis=-3>(s,a,p)
           k = Concat<axis=1>(p,s) y = Conv(j,w4) z = Conv(k,w5)""",
        CONV | {"w4": (2, 22, 1, 1), "w5": (2, 14, 1, 1)},
    ),
    "depthwise": (
        "a = Conv(x,w1,b1) d = Conv<group=8>(a,wd,bd) r = Relu(d) y = Conv(r,w2)",
        CONV | {"wd": (8, 1, 3, 3), "bd": (8,)},
    ),
}
SEQUENCES = {
    "a half gates the other": (
        """a = MatMul(x,w1) p, q = Split<axis=-1, num_outputs=2>(a) s = Sigmoid(p) m = Mul(s,q)
           y = MatMul(m,w2)""",
        {"w1": (8, 12), "w2": (6, 3)},
    ),
    "a half is the factor of the other": (
        "a = MatMul(x,w1) p, q = Split<axis=-1, num_outputs=2>(a) m = Mul(p,q) y = MatMul(m,w2)",
        {"w1": (8, 12), "w2": (6, 3)},
    ),
    "queries, keys and values of one weight": (
        """a = MatMul(x,w1) b = Add(a,b1) q, k, v = Split<axis=-1, num_outputs=3>(b)
           t = Transpose<perm=[0,2,1]>(k) s = MatMul(q,t) p = Softmax(s) m = MatMul(p,v)
           y = MatMul(m,w2)""",
        {"w1": (8, 12), "b1": (12,), "w2": (4, 3)},
    ),
    "the same, picked of an axis": (
        """a = MatMul(x,w1) r = Reshape(a,three) h = Transpose<perm=[2,0,3,1,4]>(r)
           q = Gather<axis=0>(h,i0) k = Gather<axis=0>(h,i1) v = Gather<axis=0>(h,i2)
           t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q,t) p = Softmax(s) m = MatMul(p,v)
           u = Transpose<perm=[0,2,1,3]>(m) f = Reshape(u,four) y = MatMul(f,w2)""",
        {"w1": (8, 12), "w2": (4, 3)},
    ),
    "every second channel, backwards": (
        "a = MatMul(x,w1) s = Slice(a,last,before,end,back) y = MatMul(s,w2)",
        {"w1": (8, 8), "w2": (4, 3)},
    ),
    "the first token, its channels last": (
        "a = MatMul(x,w1) t = Gather<axis=1>(a,i0) y = MatMul(t,w2)",
        {"w1": (8, 6), "w2": (6, 3)},
    ),
    "mixed tokens": (
        """a = MatMul(x,w1) t = Transpose<perm=[0,2,1]>(a) m = MatMul(t,w3)
           u = Transpose<perm=[0,2,1]>(m) y = MatMul(u,w2)""",
        {"w1": (8, 6), "w3": (5, 4), "w2": (6, 3)},
    ),
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
    "three": [2, 5, 3, 2, 2],
    "four": [2, 5, 4],
    "last": [-1],
    "before": [-99],
    "end": [2],
    "back": [-2],
}
NUMBERS = {"i0": 0, "i1": 1, "i2": 2}


def build(body, weights, inputs="float[2,4,6,6] x", outputs="y"):
    """Parse a graph; weights, name -> shape, are drawn, and lists of integers taken from above."""
    header = ", ".join(
        f"int64[{len(v)}] {n} = {{{','.join(map(str, v))}}}"
        for n, v in INTEGERS.items()
        if f",{n}" in body
    )
    numbers = [f"int64 {n} = {{{v}}}" for n, v in NUMBERS.items() if f",{n})" in body]
    header = ", ".join([*filter(None, [header]), *numbers])
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
    "the Gemm sums over another axis": """a = Conv(x,w1,b1) g = GlobalAveragePool(a)
        f = Flatten(g) y = Gemm<transA=1>(f,h)""",
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
    model = build(REFUSED[reason], CONV | {"b": (), "c": (), "h": (2, 3)}, inputs, outputs)
    found = find(model.graph)
    assert found.exact == []
    assert reason in found.refused["a"]


def test_a_shared_weight_is_refused_wherever_it_reads():
    body = "a = MatMul(x,w1) r = Relu(a) b = MatMul(r,w2) s = Sigmoid(b) y = MatMul(s,w2)"
    found = find(build(body, {"w1": (8, 8), "w2": (8, 8)}, "float[2,5,8] x").graph)
    reason = "the weight w2 is shared with another layer"
    assert found.refused == {"a": reason, "b": reason}
    assert [g.value.name for g in found.possible] == ["x"]
    assert found.exact == []


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Conv(x,w1) f = Flatten(a) y = MatMul(f,w2)", {"w1": (1, 4, 1, 1), "w2": (36, 2)}),
        ("a = MatMul(x,w1) t = MaxPool<kernel_shape=[1,2]>(a) y = MatMul(t,w2)",
         {"w1": (6, 8), "w2": (7, 2)}),
        ("a = MatMul(x,w1) t = GlobalAveragePool(a) f = Flatten(t) y = MatMul(f,w2)",
         {"w1": (6, 8), "w2": (4, 2)}),
        ("a = MatMul(x,w1) t = MaxPool<kernel_shape=[2,2]>(a) s = Sigmoid(v) u = MatMul(t,s) "
         "y = MatMul(u,w2)", {"w1": (6, 6), "v": (5,), "w2": (5, 2)}),
        ("a = MatMul(x,w1) y = MatMul(a,w2)", {"w1": (6, 6), "w2": (4, 6, 3)}),
        ("a = MatMul(x,w1) c = Concat<axis=1>(a,x) y = MatMul(c,w2)",
         {"w1": (6, 6), "w2": (6, 2)}),
        ("a = MatMul(x,w1) n = Neg(a) c = Concat<axis=3>(a,n) y = MatMul(c,w2)",
         {"w1": (6, 6), "w2": (12, 2)}),
    ],
)  # fmt: skip
def test_where_one_scale_would_meet_several_channels_nothing_is_scaled(body, weights):
    model = build(body, weights)
    before = answer(model)
    assert scaled_at_random(model) == 0
    assert answer(model).tobytes() == before.tobytes()


def test_only_what_can_be_scaled_is_free():
    body, weights = EXACT["joined twice, and with what cannot be scaled"]
    (gauge,) = find(build(body, weights, outputs="y z").graph).exact
    assert gauge.value.name == "p"
    places = {
        reader.share.value.name: np.flatnonzero(gauge.free[reader.channels]).tolist()
        for reader in gauge.readers
    }
    assert places == {"w4": list(range(16, 22)), "w5": list(range(6))}
    assert {value.name for value in gauge.scaled} == {"p", "j", "k"}
    body, weights = SEQUENCES["queries, keys and values of one weight"]
    (gauge,) = find(build(body, weights, "float[2,5,8] x").graph).exact
    assert np.flatnonzero(gauge.free).tolist() == [8, 9, 10, 11]
    assert [value.name for value in gauge.scaled] == ["a", "b", "v", "m"]
    body = body.replace("Transpose<perm=[0,2,1]>(k)", "Add(k,w3)").replace("(q,t)", "(t,q2)")
    body = body.replace("s = MatMul", "q2 = Transpose<perm=[0,2,1]>(q) s = MatMul")
    (gauge,) = find(build(body, weights | {"w3": (4,)}, "float[2,5,8] x").graph).exact
    assert [share.value.name for share in gauge.written] == ["w1", "b1"]


def test_small_numbers_that_float16_does_not_hold_are_left_alone():
    model = build("a = MatMul(x,w1) y = MatMul(a,w2)", {"w1": (8, 6), "w2": (6, 3)},
                  "float[2,5,8] x")  # fmt: skip
    for value in model.graph.initializers.values():
        half = value.const_value.numpy().astype(np.float16)
        value.const_value, value.dtype = ir.tensor(half, name=value.name), ir.DataType.FLOAT16
    found = find(model.graph)
    assert (found.exact, found.possible) == ([], [])
    assert "float16" in found.refused["a"]


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
