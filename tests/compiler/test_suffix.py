import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.feeds import input_specs, made_up
from fourfold.compiler.graph import readers_of, weights_of
from fourfold.compiler.observe import with_outputs
from fourfold.compiler.suffix import cut, suffix

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
# Weights of four rows and four columns, which any chain of values [n,4] can read.
SQUARES = ", ".join(
    f"float[4,4] w{number} = {{{', '.join(str(x) for x in row)}}}"
    for number, row in enumerate(
        np.random.default_rng(0).normal(0, 0.5, (3, 16)).round(3).tolist()
    )
)


def parsed(text):
    model = ir.from_onnx_text(HEADER + text)
    ShapeInferencePass()(model)
    return model


def chain(body, output="y", inputs="float[n,4] x"):
    return f"g ({inputs}) => (float[n,4] {output}) <{SQUARES}> {{ {body} }}"


TEXTS = {
    "sequential": chain("a = MatMul (x, w0) b = Relu (a) c = MatMul (b, w0) y = Add (c, x)"),
    "parallel": chain(
        "a = MatMul (x, w0) b = Tanh (x) c = MatMul (b, w0) d = MatMul (a, w1) y = Add (c, d)"
    ),
    "two looks": chain("a = MatMul (x, w0) y = Gemm <transB = 1> (a, w0)"),
    "skips": chain(
        """a = MatMul (x, w0) b = Relu (a) c = Add (b, x)
           d = MatMul (c, w1) e = Relu (d) f = Add (e, c)
           h = MatMul (f, w2) y = Add (h, x)"""
    ),
    "aside": """g (float[n,4] x) => (float[n,4] y, float[n,4] z)"""
    f"<{SQUARES}> {{ a = MatMul (x, w0) y = Relu (a) z = Gemm <transA = 0> (x, w1) }}",
    "one operand": chain("a = Relu (x) b = MatMul (a, w0) y = Add (b, a)"),
    "contrib": chain("a = com.microsoft.FastGelu (x) b = MatMul (a, w0) y = Add (b, a)"),
    "constant operand": chain(
        "a = MatMul (w1, w0) b = ReduceSum <keepdims = 0> (a) c = MatMul (x, w0) y = Mul (c, b)"
    ),
    "lookup": """g (int64[n,3] x) => (float[n,3,2] y)
    <float[5,2] table = {1,-2,3,4,5,-6,7,8,9,1}, float[2,2] w = {1,2,-3,4}> {
        a = Gather (table, x) b = MatMul (a, w) y = Add (b, a) }""",
    "tied": """g (int64[n,3] x) => (float[n,3,5] y)
    <float[5,2] table = {1,-2,3,4,5,-6,7,8,9,1}> {
        t = Transpose <perm = [1,0]> (table) a = Gather (table, x) y = MatMul (a, t) }""",
    "tied gemm": """g (int64[n] x) => (float[n,5] y)
    <float[5,2] table = {1,-2,3,4,5,-6,7,8,9,1}> {
        a = Gather (table, x) b = Tanh (a) y = Gemm <transB = 1> (b, table) }""",
    "convolutions": f"""g (float[n,2,5,5] x) => (float[n,2,9,9] y)
    <float[4,1,3,3] w = {{{", ".join(["1.5", "-2", "0.25"] * 12)}}},
     float[4,2,3,3] v = {{{", ".join(["-1", "0.5", "2"] * 24)}}}, float[4] b = {{1,2,3,4}}> {{
        a = Conv <group = 2, pads = [1,1,1,1]> (x, w, b)
        r = Relu (a)
        y = ConvTranspose <strides = [2,2], pads = [1,1,1,1]> (r, v) }}""",
    "branches": chain(
        """a = MatMul (x, w0) b = MatMul (a, w1) s = Relu (a)
           y = If (c) <then_branch = t () => (o) { h = Abs (b) o = Add (h, s) },
                       else_branch = e () => (p) { k = Sub (b, x) p = MatMul (k, w2) }>""",
        inputs="float[n,4] x, bool c",
    ),
    "weight in a branch": chain(
        """a = MatMul (x, w0)
           y = If (c) <then_branch = t () => (o) { h = MatMul (a, w0) o = Add (h, a) },
                       else_branch = e () => (p) { q = If (c) <
                           then_branch = t1 () => (o1) { o1 = Relu (a) },
                           else_branch = e1 () => (p1) { r1 = Neg (x) p1 = MatMul (r1, w0) }>
                           p = Relu (q) }>""",
        inputs="float[n,4] x, bool c",
    ),
}


def lstm():
    """Two LSTMs whose first output is left out; the weight stands between them."""
    proto = onnx.parser.parse_model(
        f"""{HEADER} g (float[4,n,4] x) => (float[1,n,2] y)
    <{SQUARES}, float[1,8,4] wl = {{{",".join(["0.5", "-0.25"] * 16)}}},
     float[1,8,2] rl = {{{",".join(["0.5", "-0.5"] * 8)}}}> {{
        l1, h1 = LSTM <hidden_size = 2> (x, wl, rl)
        m = MatMul (x, w0)
        l2, h2 = LSTM <hidden_size = 2> (m, wl, rl)
        y = Add (h1, h2) }}"""
    )
    for node in proto.graph.node:
        if node.op_type == "LSTM":
            node.output[0] = ""
    return ir.from_proto(proto)


def session(proto):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    content = proto.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def answers(proto, feeds):
    found = session(proto)
    names = [output.name for output in found.get_outputs()]
    return dict(zip(names, found.run(names, feeds), strict=True))


def other(proto, name, array):
    """The same model with another weight."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    tensors = changed.graph.initializer
    place = next(n for n, tensor in enumerate(tensors) if tensor.name == name)
    tensors[place].CopyFrom(onnx.numpy_helper.from_array(array, name))
    return changed


def close(got, expected):
    scale = max(float(np.abs(expected).max()), 1e-3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * scale)


def check(model, weight, feeds):
    """Hold the suffix of one weight against the whole model, as it is and with another weight."""
    name, proto = str(weight.name), ir.to_proto(model)
    where = cut(model, readers_of(weight))
    inputs = set(feeds)
    floats = weight.const_value.numpy()
    wanted = dict.fromkeys((*where.crossing, *where.sources.values()))
    inner = [value for value in wanted if value not in inputs and value != name]
    known = feeds | {name: floats}
    known |= answers(with_outputs(proto, model, inner), feeds) if inner else {}
    part = suffix(proto, where, known)
    open_part = session(part)
    made = [output.name for output in open_part.get_outputs()]
    assert {one.name for one in open_part.get_inputs()} == {*where.crossing, *where.sources}
    changed = floats * np.float32(0.5) + np.float32(0.125)
    for array in (floats, changed):
        expected = answers(other(proto, name, array), feeds)
        given = {one: known[one] for one in where.crossing}
        given |= {one: known[source] for one, source in where.sources.items()}
        found = dict(zip(made, open_part.run(made, given | {name: array}), strict=True))
        assert found
        for output, reference in expected.items():
            close(found.get(output, answers(proto, feeds)[output]), reference)
    assert len(part.graph.node) == len(where.behind)


def batch(model, seed=0, count=4):
    """Random feeds; a scalar condition is true for even seeds."""
    conditions = [v for v in model.graph.inputs if v.dtype == ir.DataType.BOOL]
    specs = [spec for spec in input_specs(model) if spec.dtype != np.bool_]
    feeds = next(iter(made_up(specs, seed, count, size_of_dynamic_axes=3, batch=count)))
    return feeds | {str(v.name): np.asarray(seed % 2 == 0) for v in conditions}


@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_the_zoo(name, zoo):
    model = zoo[name]()
    weights = weights_of(model)
    assert len(weights) >= 3
    for weight in weights:
        check(model, weight, batch(model))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_structures(name, seed):
    model = parsed(TEXTS[name])
    weights = weights_of(model)
    assert weights
    for weight in weights:
        check(model, weight, batch(model, seed))


def test_a_node_without_its_first_output():
    model = lstm()
    (weight,) = weights_of(model)
    check(model, weight, batch(model))
    assert cut(model, readers_of(weight)).behind == ("m", "h2", "y")


def cut_of(text, name):
    model = parsed(text)
    return cut(model, readers_of(model.graph.initializers[name]))


def test_what_a_cut_holds():
    where = cut_of(TEXTS["skips"], "w1")
    assert where.behind == ("d", "e", "f", "h", "y")
    assert where.crossing == ("c", "x")
    assert where.probed == (("d", 0, "c__probe0"),)
    assert where.sources == {"w1": "w1", "c__probe0": "c"}


def test_a_reader_behind_another_is_not_probed():
    where = cut_of(TEXTS["sequential"], "w0")
    assert where.probed == (("a", 0, "x__probe0"),)
    assert where.crossing == ("x",)


def test_readers_side_by_side_are_probed_each():
    where = cut_of(TEXTS["parallel"], "w0")
    assert where.probed == (("a", 0, "x__probe0"), ("c", 0, "b__probe1"))
    assert where.crossing == ()


def test_the_indices_of_a_lookup_cross():
    where = cut_of(TEXTS["lookup"], "table")
    assert (where.probed, where.crossing) == ((), ("x",))


def test_a_constant_beside_a_weight_is_no_activation():
    where = cut_of(TEXTS["constant operand"], "w0")
    assert where.probed == (("c", 0, "x__probe1"),)
    assert where.crossing == ()


def test_bodies_read_only_what_is_outside_of_them():
    where = cut_of(TEXTS["branches"], "w1")
    assert where.behind == ("b", "y")
    assert where.crossing == ("c", "s", "x")
    where = cut_of(TEXTS["weight in a branch"], "w0")
    assert where.behind == ("a", "y")
    assert where.crossing == ("c", "x")


def test_what_lies_before_is_left_out():
    model = parsed(TEXTS["skips"])
    proto = ir.to_proto(model)
    where = cut(model, readers_of(model.graph.initializers["w2"]))
    arrays = {name: np.ones((4, 4), np.float32) for name in ("f", "x", "w2")}
    part = suffix(proto, where, arrays)
    assert [node.output[0] for node in part.graph.node] == ["h", "y"]
    assert not part.graph.initializer
    assert len(proto.graph.node) == 8  # the whole is left alone


def test_inputs_have_the_types_of_the_arrays():
    model = parsed(TEXTS["lookup"])
    where = cut(model, readers_of(model.graph.initializers["table"]))
    arrays = {"x": np.ones((2, 3), np.int64), "table": np.ones((5, 2), np.float32)}
    part = suffix(ir.to_proto(model), where, arrays)
    types = {value.name: value.type.tensor_type.elem_type for value in part.graph.input}
    assert types == {"x": onnx.TensorProto.INT64, "table": onnx.TensorProto.FLOAT}


@st.composite
def graphs(draw):
    """A random graph of values [n,4] that read three weights, in any order and number."""
    values, lines = ["x"], []
    for number in range(draw(st.integers(2, 8))):
        first, second = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        weight = f"w{draw(st.integers(0, 2))}"
        name = f"v{number}"
        lines.append(
            draw(
                st.sampled_from(
                    [
                        f"{name} = MatMul ({first}, {weight})",
                        f"{name} = Gemm <transB = 1> ({first}, {weight})",
                        f"{name} = Add ({first}, {second})",
                        f"{name} = Tanh ({first})",
                        f"""{name} = If (c) <
                            then_branch = t () => (o) {{ o = Sub ({first}, {second}) }},
                            else_branch = e () => (p) {{ p = MatMul ({first}, {weight}) }}>""",
                    ]
                )
            )
        )
        values.append(name)
    lines.append(f"y = Sum ({', '.join(values[1:])})")
    return chain("\n".join(lines), inputs="float[n,4] x, bool c")


@settings(max_examples=30)
@given(graphs(), st.integers(0, 3))
def test_any_graph(text, seed):
    model = parsed(text)
    for weight in weights_of(model):
        check(model, weight, batch(model, seed))
