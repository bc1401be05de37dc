import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.links import Link, linked
from fourfold.compiler.norms import norms_of
from fourfold.compiler.streams import streams_of

HEADER = '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'
CONSTANTS = {
    "two": np.float32(2), "one": np.float32(1), "tiny": np.float32(1e-5),
    "last": np.int64([-1]), "first": np.int64([0]), "second": np.int64([1]), "most": np.int64([9]),
    "flat": np.int64([-1, 4]), "deep": np.int64([-1, 3, 4]), "tall": np.int64([-1, 4, 3]),
    "number": np.int64(0),
    "cube": np.int64([-1, 4, 4]),
}  # fmt: skip


def model_of(text, seed=0, **given):
    """Parse a graph; inputs named like a constant or beginning with w, b, g get data."""
    model = ir.from_onnx_text(f"{HEADER} {text}")
    draw = np.random.default_rng(seed)
    for value in list(model.graph.inputs):
        if value.name in CONSTANTS or value.name[0] in "wbg":
            kind, shape = value.dtype.numpy(), value.shape.numpy()
            array = given.get(value.name, CONSTANTS.get(value.name))
            array = draw.normal(1, 0.5, shape).astype(kind) if array is None else array
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


# x = t + t wo, and what is normalized of it is read by wi.
INS = (
    "int64[n,3] t, float[9,4] w, float[4,4] wo, float[4] b, float[4] g, float[4] bg, float[4,5] wi"
)
STREAM = "e = Gather (w, t) o = MatMul (e, wo) ob = Add (o, b) x = Add (e, ob)"
NORM = "h = LayerNormalization (x, g, bg)"
READ = "y = MatMul (h, wi)"


def graph(nodes, more="", outs="float[n,3,5] y"):
    return model_of(f"m ({INS}{more}) => ({outs}) {{ {nodes} }}").graph


def touched(stream):
    return {
        (touch.node.op_type, touch.value.name): (touch.axis, touch.writes, touch.norm is not None)
        for touch in stream.touches
    }


def test_a_stream_is_all_that_hangs_together():
    (stream,) = streams_of(graph(f"{STREAM} {NORM} {READ}"))
    # The embedding is read by a layer too, without a normalization between.
    assert stream.refusals == [("wo", "MatMul both reads the stream and writes into it")]
    (stream,) = streams_of(graph(f"{STREAM.replace('(e, wo)', '(f, wo)')} {NORM} {READ}".replace(
        "o = ", "f = Relu (p) o = "), ", float[n,3,4] p"))  # fmt: skip
    assert stream.refusals == []
    assert stream.width == 4
    assert touched(stream) == {
        ("Gather", "w"): (1, True, False),
        ("MatMul", "wo"): (1, True, False),
        ("Add", "b"): (0, True, False),
        ("MatMul", "wi"): (0, False, True),
    }
    assert {value.name for value in stream.changed} == {"e", "o", "ob", "x", "h"}
    assert stream.keeps_mean
    assert stream.centred
    assert list(stream.tied()) == []


def test_the_energy_of_what_comes_out():
    (norm,) = norms_of(graph(f"x = Gather (w, t) {NORM} {READ}"))
    gain, bias = (v.const_value.numpy().astype(np.float64) for v in (norm.gain, norm.bias))
    np.testing.assert_allclose(norm.energy, gain**2 + bias**2)
    np.testing.assert_array_equal(norm.gains, gain)


ROOT = "r = Sqrt (a)"
MEAN = "s = Pow (x, two) m = ReduceMean <keepdims = 1> (s, last) a = Add (m, tiny)"
FORMS = {
    "LayerNormalization": ("h = LayerNormalization <axis = 2> (x, g, bg)", True, True),
    "without a bias": ("h = LayerNormalization (x, g)", True, True),
    "RMSNormalization": ("h = RMSNormalization (x, g)", False, True),
    "of onnxruntime": ("h = com.microsoft.SimplifiedLayerNormalization (x, g)", False, True),
    "times a reciprocal": (f"{MEAN} {ROOT} i = Reciprocal (r) z = Mul (x, i) h = Mul (z, g)",
                           False, True),
    "times one over": (f"{MEAN} {ROOT} i = Div (one, r) z = Mul (i, x) h = Mul (g, z)",
                       False, True),
    "over the root": (f"{MEAN} {ROOT} z = Div (x, r) h = Mul (z, g)", False, True),
    "a product as square": (f"{MEAN.replace('Pow (x, two)', 'Mul (x, x)')} {ROOT} z = Div (x, r) "
                            "h = Mul (z, g)", False, True),
    "the other way around": (f"{MEAN.replace('(m, tiny)', '(tiny, m)')} {ROOT} z = Div (x, r) "
                             "h = Mul (z, g)", False, True),
    "without a gain": (f"{MEAN} {ROOT} h = Div (x, r)", False, False),
}  # fmt: skip
NUMBERS = ", float two, float one, float tiny, int64[1] last, int64[1] second, int64[1] first"


@pytest.mark.parametrize("form", FORMS)
def test_normalizations_are_known_in_their_forms(form):
    nodes, centres, scaled = FORMS[form]
    (norm,) = norms_of(graph(f"x = Gather (w, t) {nodes} {READ}", NUMBERS))
    assert (norm.source.name, norm.output.name) == ("x", "h")
    assert norm.centres == centres
    assert (norm.gain is not None) == scaled
    assert norm.folds == scaled
    assert norm.nodes[-1].outputs[0] is norm.output
    (stream,) = streams_of(norm.nodes[0].graph)
    assert stream.keeps_mean == centres
    assert stream.refusals == []


def test_the_reduce_mean_of_old_opsets_has_its_axes_as_an_attribute():
    text = f"m ({INS}{NUMBERS}) => (float[n,3,5] y) {{ x = Gather (w, t) {MEAN} {ROOT} h = Div "
    text = text.replace("<keepdims = 1> (s, last)", "<axes = [-1]> (s)") + f"(x, r) {READ} }}"
    model = model_of(text.replace("m (", "m (", 1))
    assert len(norms_of(model.graph)) == 1


OTHERS = {
    "over two axes": "h = LayerNormalization <axis = 1> (x, g)",
    "a gain for every token": "h = LayerNormalization (x, wide)",
    "its inverse deviation is read": "h, mean, v = LayerNormalization (x, g) z = Exp (v)",
    "the mean over another axis": f"{MEAN.replace('last', 'second')} {ROOT} h = Div (x, r)",
    "a cube": f"{MEAN.replace('two', 'one')} {ROOT} h = Div (x, r)",
    "the square is read": f"{MEAN} {ROOT} h = Div (x, r) z = Exp (s)",
    "of something else": f"{MEAN} {ROOT} q = Neg (x) h = Div (q, r)",
    "two over the root": f"{MEAN} {ROOT} i = Div (two, r) h = Mul (x, i)",
    "no root": f"{MEAN} r = Exp (a) h = Div (x, r)",
}


@pytest.mark.parametrize("form", OTHERS)
def test_what_is_no_such_normalization_is_left(form):
    more = f"{NUMBERS}, float[3,4] wide"
    outs = "float[n,3,5] y" + (", float[n,3,k] z" if "z =" in OTHERS[form] else "")
    assert norms_of(graph(f"x = Gather (w, t) {OTHERS[form]} {READ}", more, outs)) == []


# --- how channels pass through nodes


LINKS = [
    ("z = Identity (a)", "float[2,3,4] a", 0, -1, -1),
    ("z = Transpose <perm = [0,2,1]> (a)", "float[2,3,4] a", 0, -1, -2),
    ("z = Transpose (a)", "float[2,3,4] a", 0, -1, -3),
    ("z = Transpose <perm = [1,2,0]> (a)", "float[2,3,4] a", 0, -3, -1),
    ("z = Transpose <perm = [1,2,0]> (a)", "float[2,3,4] a", 0, -1, -2),
    ("z = Reshape (a, flat)", "float[2,3,4] a, int64[2] flat", 0, -1, -1),
    ("z = Reshape (a, deep)", "float[n,4] a, int64[3] deep", 0, -1, -1),
    ("z = Flatten <axis = 2> (a)", "float[2,4,3,1] a", 0, -3, None),
    ("z = Unsqueeze (a, last)", "float[2,3,4] a, int64[1] last", 0, -1, -2),
    ("z = Squeeze (a, first)", "float[1,3,4] a, int64[1] first", 0, -2, -2),
    ("z = Slice (a, first, most, second)", "float[2,3,4] a, int64[1] first, int64[1] most, "
     "int64[1] second", 0, -1, -1),
    ("z = Slice (a, first, most, last)", "float[2,3,4] a, int64[1] first, int64[1] most, "
     "int64[1] last", 0, -1, None),
    ("z = Gather <axis = 1> (a, number)", "float[2,3,4] a, int64 number", 0, -1, -1),
    ("z = Gather <axis = 2> (a, number)", "float[2,4,3] a, int64 number", 0, -2, -1),
    ("z = Gather <axis = 2> (a, i)", "float[2,4,3] a, int64[n,k] i", 0, -2, -3),
    ("z = Gather <axis = -1> (a, number)", "float[2,3,4] a, int64 number", 0, -1, None),
    ("z = ReduceMean <keepdims = 0> (a, last)", "float[2,4,3] a, int64[1] last", 0, -2, -1),
    ("z = ReduceMean (a, second)", "float[2,3,4] a, int64[1] second", 0, -1, -1),
    ("z = ReduceMean (a, last)", "float[2,3,4] a, int64[1] last", 0, -1, None),
    ("z = ReduceMean (a)", "float[2,3,4] a", 0, -1, None),
    ("z = Mul (a, two)", "float[2,3,4] a, float two", 0, -1, -1),
    ("z = Mul (two, a)", "float[2,3,4] a, float two", 1, -1, -1),
    ("z = Div (a, two)", "float[2,3,4] a, float two", 0, -1, -1),
    ("z = Div (two, a)", "float[2,3,4] a, float two", 1, -1, None),
    ("z = Mul (a, g)", "float[2,3,4] a, float[4] g", 0, -1, None),
    ("z = Mul (a, c)", "float[2,3,4] a, float[2,3,4] c", 0, -1, None),
    ("z = Concat <axis = 1> (a, c)", "float[2,3,4] a, float[2,5,4] c", 0, -1, -1),
    ("z = Concat <axis = -1> (a, c)", "float[2,3,4] a, float[2,3,4] c", 0, -1, None),
    ("z = Relu (a)", "float[2,3,4] a", 0, -1, None),
    ("z = Add (c, a)", "float[2,3,4] a, float[2,3,4] c", 1, -1, -1),
]  # fmt: skip


@pytest.mark.parametrize(("node", "ins", "at", "axis", "output"), LINKS)
def test_where_the_channels_come_out(node, ins, at, axis, output):
    model = model_of(f"m ({ins}) => (z) {{ {node} }}")
    (made,) = model.graph
    forward = linked(made, at, axis)
    if output is None:
        assert isinstance(forward, str)
        return
    assert isinstance(forward, Link)
    assert forward.output == output
    assert forward.inputs[at] == axis
    assert linked(made, None, output) == forward


def test_axes_of_unknown_length_are_told_apart_by_name():
    for lengths, there in (("p,4,q", -2), ("q,4,p", None), ("p,4,k", -2)):
        model = model_of(f"m (float[p,4,q] a, int64[3] s) => (float[{lengths}] z) "
                         "{ z = Reshape (a, s) }")  # fmt: skip
        link = linked(model.graph[0], 0, -2)
        assert (link.output if isinstance(link, Link) else None) == there


@given(
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=4),
    axis=st.integers(0, 3),
    cut=st.integers(0, 3),
    merge=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_reshape_moves_channels_as_it_is_told(shape, axis, cut, merge, seed):
    """Whatever is said to pass through must give the same whether turned before or behind."""
    axis %= len(shape)
    whole = int(np.prod(shape))
    cut %= len(shape)
    target = [int(np.prod(shape[: cut + 1])), *shape[cut + 1 :]] if merge else [*shape[:cut], -1]
    array = np.arange(whole, dtype=np.float64).reshape(shape)
    text = f"m (float[{','.join(map(str, shape))}] a, int64[{len(target)}] wt) => (z) "
    model = model_of(text + "{ z = Reshape (a, wt) }", wt=np.int64(target))
    (node,) = model.graph
    link = linked(node, 0, axis - len(shape))
    if isinstance(link, str):
        return
    turn = np.random.default_rng(seed).normal(size=(shape[axis],) * 2)

    def turned(values, place):
        return np.moveaxis(np.moveaxis(values, place, -1) @ turn, -1, place)

    before = turned(array, axis).reshape(target)
    np.testing.assert_allclose(before, turned(array.reshape(target), link.output), rtol=1e-12)


# --- what forbids to rotate


HEAD = "e = Gather (w, t)"
REFUSED = {
    "x: it is an input of the graph": (f"{NORM} {READ}", ", float[n,3,4] x", ""),
    "x: it is an output of the graph": (
        f"x = Gather (w, t) {NORM} {READ}", "", ", float[n,3,4] x"),
    "h: it is an output of the graph": (
        f"x = Gather (w, t) {NORM} {READ}", "", ", float[n,3,4] h"),
    "x: Relu makes it: no rotation passes through it": (f"{HEAD} x = Relu (e) {NORM} {READ}",
                                                        "", ""),
    "x: Exp reads it: no rotation passes through it": (
        f"x = Gather (w, t) {NORM} {READ} z = Exp (x)", "", ", float[n,3,4] z"),
    "h: Exp reads it: no rotation passes through it": (
        f"x = Gather (w, t) {NORM} {READ} z = Exp (h)", "", ", float[n,3,4] z"),
    "x: Mul makes it: it scales every channel differently": (
        f"{HEAD} x = Mul (e, b) {NORM} {READ}", "", ""),
    "x: Slice reads it: it works along the channels": (
        f"x = Gather (w, t) {NORM} {READ} z = Slice (x, first, most, last)",
        ", int64[1] first, int64[1] most, int64[1] last", ", float[n,3,4] z"),
    "x: MatMul makes it of a weight that is no constant matrix": (
        f"{HEAD} x = MatMul (e, q) {NORM} {READ}", ", float[4,4] q", ""),
    "h: MatMul reads it: no rotation passes through it": (
        f"x = Gather (w, t) {NORM} y = MatMul (h, q)", ", float[4,5] q", ""),
    "one: it has 1 channels there and the stream 4": (
        f"{HEAD} x = Add (e, one) {NORM} {READ}", ", float one", ""),
    "p: it has 1 channels there and the stream 4": (
        f"{HEAD} x = Add (e, p) {NORM} {READ}", ", float[n,3,1] p", ""),
    "p: its shape is not known; put tidy before": (
        f"{HEAD} x = Add (e, p) {NORM} {READ}", ", float[n,3,k] p", ""),
    "x: an If or Loop reads it": (
        f"x = Gather (w, t) {NORM} {READ} z = If (c) <then_branch = a () => (l) {{ l = Neg (x) }},"
        " else_branch = d () => (o) { o = Abs (x) }>", ", bool c", ", float[n,3,4] z"),
    "h: an If or Loop reads it": (
        f"x = Gather (w, t) {NORM} {READ} z = If (c) <then_branch = a () => (l) {{ l = Neg (h) }},"
        " else_branch = d () => (o) { o = Abs (h) }>", ", bool c", ", float[n,3,4] z"),
    "h: Gemm reads it: no rotation passes through it": (
        f"{HEAD} x = Reshape (e, flat) {NORM} z = Gemm <transA = 1> (h, ws) "
        "y = MatMul (e, wi)", ", int64[2] flat, float[6,5] ws", ", float[4,5] z"),
    "d: LayerNormalization reads it: no rotation passes through it": (
        f"{HEAD} f = Reshape (e, flat) x = Reshape (f, cube) {NORM} z = MatMul (h, wo) "
        "y = MatMul (e, wi) d = Transpose <perm = [0,2,1]> (x) q = LayerNormalization (d, g)",
        ", int64[2] flat, int64[3] cube", ", float[n,4,4] z, float[n,4,4] q"),
    "h: MatMul reads it: no rotation passes through it, turned twice": (
        f"x = Gather (w, t) {NORM} s = Transpose <perm = [0,1]> (wi) y = MatMul (h, s)", "", ""),
    "h: MatMul reads it: no rotation passes through it, read twice": (
        f"x = Gather (w, t) {NORM} s = Transpose <perm = [1,0]> (wh) y = MatMul (h, s) "
        "z = Exp (s)", ", float[5,4] wh", ", float[4,5] z"),
    "h: Mul scales it and its bias": (
        f"x = Gather (w, t) {NORM} k = Mul (h, two) y = MatMul (k, wi)", ", float two", ""),
    "h: a normalization makes it, and it is a part of the sums (post-norm)": (
        f"x = Gather (w, t) {NORM} q = MatMul (h, wo) s = Add (h, q) "
        "r = LayerNormalization (s, g) y = MatMul (r, wi)", "", ""),
    "c: Conv makes it in groups of channels, which a rotation mixes": (
        f"c = Conv <group = 2> (p, wc) d = Reshape (c, tall) x = Transpose <perm = [0,2,1]> (d) "
        f"{NORM} {READ}", ", float[n,4,3,1] p, float[4,2,1,1] wc, int64[3] tall", ""),
    "c: its channels are not those that Conv makes": (
        f"c = Conv (p, wc) x = Reshape (c, deep) {NORM} {READ}",
        ", float[n,5,3,4] p, float[1,5,1,1] wc, int64[3] deep", ""),
    "c: Gemm adds a bias that is no constant": (
        f"c = Gemm (p, wo, q) x = Reshape (c, deep) {NORM} {READ}",
        ", float[6,4] p, float[6,4] q, int64[3] deep", ""),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_forbids_to_rotate_is_told_with_the_name(reason):
    nodes, more, outs = REFUSED[reason]
    found = streams_of(graph(nodes, more, f"float[n,3,5] y{outs}"))
    reason = reason.partition(", ")[0] if "twice" in reason else reason
    assert reason in [": ".join(refusal) for refusal in found[0].refusals]
    assert len(found) == 1, "one stream, so that one remark tells of it"


def test_half_floats_are_not_rotated():
    text = f"m ({INS}) => (float[n,3,5] y) {{ x = Gather (w, t) {NORM} {READ} }}"
    (stream,) = streams_of(model_of(text.replace("float[", "float16[")).graph)
    assert ("x", "it is FLOAT16, in which a rotation would lose digits") in stream.refusals


def test_a_model_without_normalizations_has_no_stream():
    assert streams_of(graph("e = Gather (w, t) y = MatMul (e, wi)")) == []


def test_channels_are_followed_from_a_convolution_past_tokens_and_pooling():
    nodes = (
        "c = Conv (p, wc, b) f = Reshape (c, deep) s = Transpose <perm = [0,2,1]> (f) "
        f"k = Expand (wk, sizes) j = Concat <axis = 1> (k, s) x = Add (j, wp) {NORM} "
        "l = Gather <axis = 1> (h, number) y = Gemm <transB = 1> (l, wh, b5)"
    )
    more = (
        ", float[2,3,2,2] p, float[4,3,1,1] wc, int64[3] deep, float[1,1,4] wk, int64[3] sizes,"
        " float[1,5,4] wp, int64 number, float[5,4] wh, float[5] b5"
    )
    text = f"m ({INS}{more}) => (float[2,5] y) {{ {nodes} }}"
    model = model_of(text.replace("int64[3] deep", "int64[3] wd").replace("deep", "wd"),
                     wd=np.int64([2, 4, 4]))  # fmt: skip
    (stream,) = streams_of(model.graph)
    assert stream.refusals == []
    assert touched(stream) == {
        ("Conv", "wc"): (0, True, False),
        ("Conv", "b"): (0, True, False),
        ("Expand", "wk"): (2, True, False),
        ("Add", "wp"): (2, True, False),
        ("Gemm", "wh"): (1, False, True),
    }


# --- what is shared


TIED = "x = Gather (w, t) h = RMSNormalization (x, g) wt = Transpose (w) y = MatMul (h, wt)"


@pytest.mark.parametrize("gain", ["differs", "is one number"])
def test_a_table_that_is_the_head_too_is_tied_by_the_gain(gain):
    text = f"m ({INS}) => (float[n,3,9] y) {{ {TIED} }}"
    given = {"g": np.float32([3, 3, 3, 3])} if gain == "is one number" else {}
    (stream,) = streams_of(model_of(text, **given).graph)
    assert stream.refusals == []
    assert [value.name for value in stream.tied()] == (["w"] if gain == "differs" else [])
    assert "wt" in {value.name for value in stream.changed}


def test_a_table_that_others_read_is_tied():
    nodes = f"x = Gather (w, t) h = LayerNormalization (x, g) {READ} z = Exp (w)"
    (stream,) = streams_of(graph(nodes, "", "float[n,3,5] y, float[9,4] z"))
    assert [value.name for value in stream.tied()] == ["w"]


def test_the_mean_is_left_out_only_where_nobody_reads_it():
    plain = f"x = Gather (w, t) {NORM} {READ}"
    direct = f"{plain} z = MatMul (x, wo)"
    both = f"{plain} r = RMSNormalization (x, g) z = MatMul (r, wo)"
    found = [
        streams_of(graph(nodes, "", "float[n,3,5] y" + (", float[n,3,4] z" if more else "")))[0]
        for nodes, more in ((plain, False), (direct, True), (both, True))
    ]
    assert [stream.refusals for stream in found] == [[], [], []]
    assert [stream.centred for stream in found] == [True, False, False]
    assert all(stream.keeps_mean for stream in found)
