import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.contract import Context
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import Format
from fourfold.compiler.graph import readers_of
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.rounding import rounded, simulated
from fourfold.compiler.runner import run
from fourfold.compiler.splitting import sqnr_db
from fourfold.passes.pack_tables import PackTables
from fourfold.passes.round_weights import RoundWeights
from fourfold.passes.split_layers import SplitLayers
from fourfold.passes.unpack_weights import UnpackWeights
from fourfold.targets.cpu import Cpu

HEADER = '<ir_version: 13, opset_import: ["" : 25]>'

ANY = Context(Cpu(isa="vnni").capability, Path())

# Cycled through a weight, they make three clusters that anyone can see.
CYCLE = (-2, 0.25, 3, -1.75, 0.5, 2.5)
CLUSTERS = ((-2, -1.75), (0.25, 0.5), (3, 2.5))

# name -> shape of x, of the weight, of the bias, of y; the node
LAYERS = {
    "MatMul": ("n,4", "4,3", "", "n,3", "MatMul (x, w)"),
    "MatMul of a stack": ("2,n,4", "2,4,3", "", "2,n,3", "MatMul (x, w)"),
    "Gemm": ("n,4", "4,3", "3", "n,3", "Gemm (x, w, b)"),
    "Gemm, transposed": ("4,5", "3,4", "", "5,3", "Gemm <transA = 1, transB = 1> (x, w)"),
    "Gemm, scaled": ("n,4", "3,4", "3", "n,3",
        "Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b)"),
    "Gemm with a matrix of biases": ("5,4", "4,3", "5,3", "5,3", "Gemm (x, w, b)"),
    "Conv, 1-d": ("n,2,9", "3,2,4", "3", "n,3,m", "Conv (x, w, b)"),
    "Conv, 2-d": ("n,2,6,7", "3,2,2,3", "3", "n,3,m,k", "Conv (x, w, b)"),
    "Conv, 3-d": ("n,2,4,5,6", "3,2,2,2,3", "", "n,3,m,k,j", "Conv (x, w)"),
    "Conv, grouped": ("n,4,5,5", "6,2,3,3", "6", "n,6,m,k", "Conv <group = 2> (x, w, b)"),
    "Conv, depthwise": ("n,4,6,6", "4,1,3,3", "4", "n,4,m,k", "Conv <group = 4> (x, w, b)"),
    "Conv, strided": ("n,2,9,9", "3,2,3,3", "3", "n,3,m,k",
        "Conv <strides = [2, 1], pads = [1, 0, 2, 1], dilations = [2, 1]> (x, w, b)"),
    "Conv, padded by itself": ("n,2,5,5", "3,2,3,3", "", "n,3,5,5",
        'Conv <auto_pad = "SAME_UPPER"> (x, w)'),
    "ConvTranspose": ("n,4,4,4", "4,3,2,2", "3", "n,3,m,k",
        "ConvTranspose <strides = [2, 2], output_padding = [1, 0]> (x, w, b)"),
    "ConvTranspose, grouped": ("n,4,4,4", "4,3,2,2", "6", "n,6,m,k",
        "ConvTranspose <strides = [2, 2], group = 2> (x, w, b)"),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", LAYERS)


def elements(shape):
    return int(np.prod([int(size) for size in shape.split(",")]))


def listed(numbers):
    return ", ".join(f"{number:g}" for number in numbers)


def cycled(shape):
    """Return the elements of a weight: the cycle, over and over."""
    return [CYCLE[i % len(CYCLE)] for i in range(elements(shape))]


def initializers(name):
    """Return the text of a layer's weight and bias, and of the three parts of the weight."""
    _, weight, bias, _, _ = LAYERS[name]
    biases = f", float[{bias}] b = {{{listed(range(1, elements(bias) + 1))}}}" if bias else ""
    parts = []
    for number, cluster in enumerate(CLUSTERS):
        masked = [value if value in cluster else 0 for value in cycled(weight)]
        parts.append(f"float[{weight}] w{number} = {{{listed(masked)}}}")
    return f"float[{weight}] w = {{{listed(cycled(weight))}}}{biases}", ", ".join(parts) + biases


def signature(name):
    x, _, _, y, _ = LAYERS[name]
    return f"{HEADER} g (float[{x}] x) => (float[{y}] y)"


@EVERY
def test_a_layer_becomes_three_of_its_kind_and_two_sums(name, becomes):
    node = LAYERS[name][-1]
    before, after = initializers(name)
    first = node.replace("w", "w0")
    second, third = (first.replace("w0", one).replace(", b)", ")") for one in ("w1", "w2"))
    becomes(
        SplitLayers(),
        f"{signature(name)} <{before}> {{ y = {node} }}",
        f"""{signature(name)} <{after}> {{
            p0 = {first}
            p1 = {second}
            p2 = {third}
            s = Add (p0, p1)
            y = Add (s, p2)
        }}""",
    )


def layer(name, layers=LAYERS, seed=0, dtype="float", **given):
    """Return (a model of one layer with random weights, its feeds)."""
    x, weight, bias, y, node = layers[name]
    sizes = {"w": weight, **({"b": bias} if bias else {})}
    inputs = "".join(f", {dtype}[{shape}] {key}" for key, shape in sizes.items())
    model = filled(f"{HEADER} g ({dtype}[{x}] x{inputs}) => ({dtype}[{y}] y) {{ y = {node} }}",
                   seed, **given)  # fmt: skip
    draw = np.random.default_rng(seed + 1)
    shape = [3 if size == "n" else int(size) for size in x.split(",")]
    return model, {"x": draw.normal(size=shape).astype(model.graph.inputs[0].dtype.numpy())}


def filled(text, seed=0, inputs=1, **given):
    """Parse a model and make all graph inputs but the first ones weights, random or as given."""
    model = ir.from_onnx_text(text)
    draw = np.random.default_rng(seed)
    for value in list(model.graph.inputs)[inputs:]:
        array = given.get(value.name, draw.normal(size=value.shape.numpy()))
        array = np.asarray(array).astype(value.dtype.numpy())
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"node_{number}"
    ShapeInferencePass()(model)
    return model


def contents(model):
    """Return initializer name -> array."""
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}


def reasons(context):
    return [remark.reason for remark in context.remarks]


@EVERY
@pytest.mark.parametrize("biases", ["first", "split"])
@pytest.mark.parametrize("over", ["tensor", "channel", "block"])
def test_the_branches_compute_what_the_layer_did(name, over, biases, context, outputs, close):
    model, feeds = layer(name)
    expected = outputs(model, **feeds)
    one = SplitLayers(over=over, block=4, biases=biases)
    assert one.run(model, context) == 1
    op = LAYERS[name][-1].split()[0]
    assert [n.op_type for n in model.graph] == [op] * 3 + ["Add"] * 2
    for plain in (True, False):
        close(expected, outputs(model, plain=plain, **feeds))
    assert one.run(model, context) == 0


def test_outputs_keep_their_names_types_and_notes(context):
    model, _ = layer("Conv, 2-d")
    notes.write(model.graph.outputs[0], low=-1.0, high=2.0)
    SplitLayers().run(model, context)
    (y,) = model.graph.outputs
    assert (y.name, y.dtype, y.shape.rank()) == ("y", ir.DataType.FLOAT, 4)
    assert y.producer().op_type == "Add"
    assert (notes.read(y).low, notes.read(y).high) == (-1.0, 2.0)
    for node in model.graph:
        assert node.name
        assert node.outputs[0].shape == y.shape
        assert node.outputs[0] is y or notes.read(node.outputs[0]) == notes.EMPTY
    for name in ("w_part_0", "w_part_1", "w_part_2"):
        note = notes.read(model.graph.initializers[name])
        assert (note.part, note.split) == ("w", "split(branches,3,per_tensor,zero)")


def test_a_bias_is_left_to_the_first_branch_or_split_too(becomes):
    weight, parts = (text.split(", float[2] b")[0] for text in initializers("Gemm"))
    bias = "float[3] b = {5, -3, 0.5}"
    head = f"{HEADER} g (float[n,4] x) => (float[n,3] y)"
    before = f"{head} <{weight}, {bias}> {{ y = Gemm <beta = 2.0> (x, w, b) }}"
    before = before.replace(", float[3] b = {1, 2, 3}", "")
    parts = parts.replace(", float[3] b = {1, 2, 3}", "")
    after = f"""{head} <{parts}, {bias}> {{
        p0 = Gemm <beta = 2.0> (x, w0, b)
        p1 = Gemm <beta = 2.0> (x, w1)
        p2 = Gemm <beta = 2.0> (x, w2)
        s = Add (p0, p1)
        y = Add (s, p2)
    }}"""
    becomes(SplitLayers(), before, after)
    after = (
        after.replace("w1)", "w1, b1)")
        .replace("w2)", "w2, b2)")
        .replace(
            bias, "float[3] b = {0, -3, 0}, float[3] b1 = {0, 0, 0.5}, float[3] b2 = {5, 0, 0}"
        )
    )
    becomes(SplitLayers(biases="split"), before, after)


def test_a_bias_in_an_add_stays_one_add(becomes):
    before, parts = initializers("MatMul")
    bias = "float[3] b = {1, 2, 3}"
    becomes(
        SplitLayers(),
        f"""{signature("MatMul")} <{before}, {bias}> {{
            m = MatMul (x, w)
            y = Add (m, b)
        }}""",
        f"""{signature("MatMul")} <{parts}, {bias}> {{
            p0 = MatMul (x, w0)
            p1 = MatMul (x, w1)
            p2 = MatMul (x, w2)
            s = Add (p0, p1)
            m = Add (s, p2)
            y = Add (m, b)
        }}""",
    )


def test_a_bias_that_is_computed_goes_to_the_first_branch(becomes):
    before, parts = initializers("MatMul")
    for biases in ("first", "split"):
        becomes(
            SplitLayers(biases=biases),
            f"""{signature("MatMul")} <{before}> {{
                b = ReduceSum (x)
                y = Gemm (x, w, b)
            }}""",
            f"""{signature("MatMul")} <{parts}> {{
                b = ReduceSum (x)
                p0 = Gemm (x, w0, b)
                p1 = Gemm (x, w1)
                p2 = Gemm (x, w2)
                s = Add (p0, p1)
                y = Add (s, p2)
            }}""",
        )


# Weights with several readers

SQUARE = f"float[3,3] w = {{{listed(cycled('3,3'))}}}"
PARTS = ", ".join(
    f"float[3,3] w{i} = {{{listed(v if v in cluster else 0 for v in cycled('3,3'))}}}"
    for i, cluster in enumerate(CLUSTERS)
)


def branches(y, x, op="MatMul", tag=""):
    """Return the text of what one layer becomes."""
    p = f"p{y}{tag}"
    return f"""{p}0 = {op} ({x}, w0) {p}1 = {op} ({x}, w1) {p}2 = {op} ({x}, w2)
    {p}s = Add ({p}0, {p}1) {y} = Add ({p}s, {p}2)"""


@pytest.mark.parametrize("over", ["tensor", "channel"])
def test_a_shared_weight_is_split_once(over, becomes):
    """Of the channels on two axes, none is the whole's: it is clustered as a whole then."""
    head = f"{HEADER} g (float[n,3] x) => (float[n,3] y)"
    becomes(
        SplitLayers(over=over),
        f"{head} <{SQUARE}> {{ a = MatMul (x, w) y = Gemm <transB = 1> (a, w) }}",
        f"{head} <{PARTS}> {{ {branches('a', 'x')} {branches('y', 'a', 'Gemm <transB = 1>')} }}",
    )


@pytest.mark.parametrize(
    ("other", "node"),
    [("float[3,3] z", "z = Transpose (w)"), ("float[3,2] z", "z = Gather <axis = 1> (w, i)")],
)
def test_a_weight_that_another_node_reads_is_still_there(other, node, becomes):
    head = f"{HEADER} g (float[n,3] x) => (float[n,3] y, {other})"
    index = "int64[2] i = {2, 0}"
    unread = "" if "i)" in node else "unread = Identity (i)"
    becomes(
        SplitLayers(),
        f"{head} <{SQUARE}, {index}> {{ y = MatMul (x, w) {node} {unread} }}",
        f"{head} <{SQUARE}, {PARTS}, {index}> {{ {branches('y', 'x')} {node} {unread} }}",
    )


def test_a_weight_that_is_an_output_is_still_there(context, outputs, close):
    text = f"{HEADER} g (float[n,3] x, float[3,3] w) => (float[n,3] y, float[3,3] w)"
    model = filled(f"{text} {{ y = MatMul (x, w) }}")
    x = np.ones((2, 3), np.float32)
    expected = outputs(model, x=x)
    assert SplitLayers().run(model, context) == 1
    close(expected, outputs(model, x=x))


IF = """{header} g (float[n,3] x, bool c) => (float[n,3] y) <{weights}> {{
    {first}
    y = If (c) <then_branch = t () => (float[n,3] o) {{ {then} }},
                else_branch = e () => (float[n,3] p) {{ {other} p = Abs (q) }}>
}}"""


def test_a_weight_that_is_read_in_the_bodies_of_an_if(becomes, context, parse, outputs, close):
    before = IF.format(
        header=HEADER,
        weights=SQUARE,
        first="a = MatMul (x, w)",
        then="o = MatMul (a, w)",
        other="q = MatMul (a, w)",
    )
    after = IF.format(
        header=HEADER,
        weights=PARTS,
        first=branches("a", "x"),
        then=branches("o", "a"),
        other=branches("q", "a"),
    )
    model = becomes(SplitLayers(), before, after)
    assert SplitLayers().run(model, context) == 0
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    for c in (True, False):
        feeds = {"x": x, "c": np.array(c)}
        close(outputs(parse(before), **feeds), outputs(model, **feeds))


def test_a_weight_of_a_body_alone_is_left_to_it(becomes):
    text = IF.format(header=HEADER, weights=SQUARE, first="a = Relu (x)",
                     then="o = MatMul (a, w)", other="q = MatMul (a, w)")  # fmt: skip
    becomes(SplitLayers(), text, text)


def test_a_table_of_embeddings_has_no_branches(context):
    text = f"{HEADER} g (int64[n] x, float[6,3] w) => (float[n,3] y) {{ y = Gather (w, x) }}"
    assert SplitLayers().run(filled(text), context) == 0
    both = f"""{HEADER} g (int64[n] x, float[n,4] z, float[4,4] w) => (float[n,4] y, float[n,4] v)
    {{ y = Gather (w, x) v = MatMul (z, w) }}"""
    assert SplitLayers().run(filled(both, inputs=2), context) == 0
    assert reasons(context) == ["not split: Gather reads it, and a lookup has no branches"] * 2


def test_names_that_are_taken(context, outputs, close):
    text = f"""{HEADER} g (float[n,3] x, float[3,3] w, float[3,3] w_part_0)
    => (float[n,3] y, float[n,3] y_part_1) {{
        y_part_1 = MatMul (x, w_part_0)
        y = MatMul (x, w)
    }}"""
    model = filled(text)
    x = np.ones((2, 3), np.float32)
    expected = outputs(model, x=x)
    assert SplitLayers().run(model, context) == 2
    close(expected, outputs(model, x=x))


@pytest.mark.parametrize("dtype", ["float16", "double", "bfloat16"])
def test_parts_keep_the_type_of_the_weight(dtype, context, outputs):
    model, feeds = layer("Gemm", dtype=dtype)
    kind = model.graph.initializers["w"].dtype
    whole = contents(model)["w"]
    expected = outputs(model, **feeds)["y"] if dtype != "bfloat16" else None
    assert SplitLayers(biases="split").run(model, context) == 1
    parts = [v for n, v in model.graph.initializers.items() if n.startswith("w")]
    assert {part.dtype for part in parts} == {kind}
    assert all(n.outputs[0].dtype == kind for n in model.graph)
    total = sum(part.const_value.numpy().astype(np.float64) for part in parts)
    np.testing.assert_array_equal(total, whole.astype(np.float64))
    if expected is not None:  # onnxruntime has no bfloat16 on CPU
        got = outputs(model, **feeds)["y"]
        digits = 2e-3 if dtype == "float16" else 1e-12
        np.testing.assert_allclose(got, expected, rtol=0, atol=digits * np.abs(expected).max())


# Weights that are hard to part


def split(context, array, form="planned", **options):
    """Return (the model, changes, the last remark) of a MatMul whose weight is given."""
    rows, columns = np.shape(array)
    text = f"{HEADER} g (float[n,{rows}] x, float[{rows},{columns}] w) => (float[n,{columns}] y)"
    model = filled(f"{text} {{ y = MatMul (x, w) }}", w=array)
    changed = SplitLayers(form=form, **options).run(model, context)
    return model, changed, reasons(context)[-1]


ONE = "not split: it has one part only"


def test_a_constant_weight_is_not_doubled(context, outputs):
    for value in (0.5, -3.0, 0.0, 1e-30):
        model, changed, why = split(context, np.full((4, 3), value))
        assert (changed, why) == (0, ONE)
        eye = np.eye(4, dtype=np.float32)
        assert np.all(outputs(model, x=eye)["y"] == np.float32(value))


def test_two_values_make_two_branches(context):
    model, changed, why = split(context, [[0.5, 1], [1, 0.5], [1, 1]])
    assert (changed, why) == (1, "into 2 branches of floats")
    assert {name: array.tolist() for name, array in contents(model).items()} == {
        "w_part_0": [[0.5, 0], [0, 0.5], [0, 0]],
        "w_part_1": [[0, 1], [1, 0], [1, 1]],
    }
    assert [n.op_type for n in model.graph] == ["MatMul", "MatMul", "Add"]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_part_of_zeros_is_left_out(zero, context):
    model, changed, _ = split(context, [[-1, zero], [2, zero]])
    assert changed == 1
    assert sorted(a.ravel().tolist() for a in contents(model).values()) == [
        [-1, 0, 0, 0],
        [0, 0, 2, 0],
    ]
    _, changed, why = split(context, [[1, zero], [zero, 1]])
    assert (changed, why) == (0, ONE)


@pytest.mark.parametrize("over", ["channel", "block"])
def test_a_kernel_with_fewer_elements_than_parts_is_clustered_with_the_others(over, context):
    shape = "Conv <group = 4> (x, w)"
    text = (
        f"{HEADER} g (float[n,4,5,5] x, float[4,1,1,1] w) => (float[n,4,5,5] y) {{ y = {shape} }}"
    )
    model = filled(text, w=np.reshape([-2, 0.25, 3, 0.5], (4, 1, 1, 1)))
    assert SplitLayers(over=over).run(model, context) == 1
    parts = [a.ravel().tolist() for a in contents(model).values()]
    assert parts == [[-2, 0, 0, 0], [0, 0.25, 0, 0.5], [0, 0, 3, 0]]
    note = notes.read(model.graph.initializers["w_part_0"])
    assert note.split == "split(branches,3,per_tensor,zero)"


@pytest.mark.parametrize("biases", ["first", "split"])
def test_a_bias_of_zeros_does_not_keep_a_layer_whole(biases, context, outputs, close):
    model, feeds = layer("Gemm", b=np.zeros(3))
    expected = outputs(model, **feeds)
    assert SplitLayers(biases=biases).run(model, context) == 1
    assert len([n for n in model.graph if n.op_type == "Gemm"]) == 3
    close(expected, outputs(model, **feeds))
    if biases == "split":
        assert all(len(n.inputs) == 2 for n in model.graph)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bias_that_is_not_finite_stays_with_the_first_branch(bad, context):
    bias = np.float32([1, bad, 2])
    model, _ = layer("Gemm", b=bias)
    assert SplitLayers(biases="split").run(model, context) == 1
    first, *others = (n for n in model.graph if n.op_type == "Gemm")
    np.testing.assert_array_equal(first.inputs[2].const_value.numpy(), bias)
    assert all(len(node.inputs) == 2 for node in others)


@pytest.mark.parametrize("form", ["branches", "int8-grid"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_left_whole(bad, form, context):
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    array[1, 2] = array[3, 0] = bad
    model = (
        planned(array, "uint2 per_axis(1)") if form == "int8-grid" else split(context, array)[0]
    )
    assert SplitLayers(form=form).run(model, context) == 0
    assert reasons(context)[-1] == "not split: 2 of its 12 values are not finite"
    np.testing.assert_array_equal(contents(model)["w"], array)


def test_a_classifier_of_two_classes_is_split(context, outputs, close):
    text = f"{HEADER} g (float[n,8] x, float[2,8] w, float[2] b) => (float[n,2] y)"
    model = filled(f"{text} {{ y = Gemm <transB = 1> (x, w, b) }}")
    x = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32)
    expected = outputs(model, x=x)
    assert SplitLayers().run(model, context) == 1
    close(expected, outputs(model, x=x))
    assert len([n for n in model.graph if n.op_type == "Gemm"]) == 3


def test_more_or_fewer_clusters(context):
    for clusters, count in ((2, 2), (5, 5), (255, 12)):
        model, _, why = split(context, np.arange(1, 13).reshape(4, 3), clusters=clusters)
        assert why == f"into {count} branches of floats"
        assert [n.op_type for n in model.graph] == ["MatMul"] * count + ["Add"] * (count - 1)


def test_models_without_weights_and_empty_weights(becomes):
    for text in (
        f"{HEADER} g (float[n] x) => (float[n] y) {{ y = Relu (x) }}",
        f"{HEADER} g (float[n,0] x) => (float[n,m] y) <float[0,2] w = {{}}> "
        "{ y = MatMul (x, w) }",
        f"{HEADER} g (float[n,2] x, float[2,2] w) => (float[n,2] y) {{ y = MatMul (x, w) }}",
    ):
        becomes(SplitLayers(), text, text)


NUMBERS = st.floats(-1e3, 1e3, width=32)
MATRICES = arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=NUMBERS)
# Few values, many of them equal: what rounding and clustering find hard.
COARSE = arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(1, 5)),
    elements=st.sampled_from([-3, -1.5, -1, -0.5, 0, 0.25, 0.5, 1, 2, 3, 100]),
)
OVER = st.sampled_from(["tensor", "channel", "block"])


@settings(max_examples=80)
@given(array=MATRICES | COARSE, clusters=st.integers(2, 6), over=OVER)
def test_parts_are_disjoint_none_is_empty_and_their_sum_is_the_weight(array, clusters, over):
    around = replace(ANY, remarks=[])
    model, changed, why = split(around, array, clusters=clusters, over=over, block=3)
    found = contents(model)
    if not changed:
        assert why == ONE
        assert found["w"].tobytes() == array.tobytes()
        return
    parts = list(found.values())
    assert 2 <= len(parts) <= clusters
    assert all(np.any(part) for part in parts)
    assert np.all(sum((part != 0).astype(int) for part in parts) == (array != 0))
    np.testing.assert_array_equal(sum(parts), array)
    assert SplitLayers().run(model, around) == 0


# Weights with a plan

# As above, and large enough that a split is worth it.
WIDE = {
    "MatMul": ("1,5,64", "64,6", "", "1,5,6", "MatMul (x, w)"),
    "Gemm": ("5,64", "6,64", "6", "5,6", "Gemm <transB = 1> (x, w, b)"),
    "Conv": ("2,8,9,9", "6,8,3,3", "6", "2,6,m,k", "Conv <strides = [2, 1]> (x, w, b)"),
    "Conv, depthwise": ("2,4,9,9", "4,1,5,5", "4", "2,4,m,k", "Conv <group = 4> (x, w, b)"),
    "ConvTranspose": ("2,8,5,5", "8,3,3,3", "6", "2,6,m,k", "ConvTranspose <group = 2> (x, w, b)"),
}
PLANNED = pytest.mark.parametrize("name", WIDE)


def plan(model, format, activation="float"):
    """Give the weight w a format."""
    fields = {"format": str(format), "mode": "static", "activation": activation}
    notes.apply_plan(model, {"w": fields})
    return model


def planned(array, format="uint2 per_axis(1)", activation="float"):
    """Return a MatMul whose weight has a plan."""
    rows, columns = np.shape(array)
    text = f"{HEADER} g (float[n,{rows}] x, float[{rows},{columns}] w) => (float[n,{columns}] y)"
    return plan(filled(f"{text} {{ y = MatMul (x, w) }}", w=array), format, activation)


def axis_of(model):
    """Return the axis of the weight's channels."""
    return readers_of(model.graph.initializers["w"])[0].axis


def stored(model, context, **options):
    """Return the model after the passes that carry a split out, and store it."""
    recipe = Recipe((SplitLayers(**options), RoundWeights(), UnpackWeights(), PackTables()))
    return run(recipe, model, context)[0]


def image(model, outputs):
    """Return the weight that a MatMul's graph really multiplies with, from the runtime."""
    eye = np.eye(model.graph.inputs[0].shape[-1], dtype=np.float32)
    return outputs(model, plain=True, x=eye)["y"]


def with_weight(model, array):
    """Return a clone with another weight."""
    clone = model.clone()
    clone.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    return clone


@PLANNED
@pytest.mark.parametrize("over", ["tensor", "channel", "block"])
def test_every_form_holds_the_same_weight(name, over, context, outputs):
    """Branches, a table of floats and a table of codes: of parts whose ranges hold zero."""
    model, feeds = layer(name, WIDE)
    axis, given = axis_of(model), contents(model)["w"]
    plan(model, f"uint2 per_axis({axis})")
    options = {"over": over, "block": 16, "zero": True}
    results = {}
    for form in ("branches", "codebook", "int8-grid"):
        around = replace(context, remarks=[])
        after = stored(model, around, form=form, **options)
        assert reasons(around)[0].startswith("into 3 parts of 4 levels: "), form
        results[form] = outputs(after, plain=True, **feeds)["y"]
        again = outputs(after, **feeds)["y"]
        np.testing.assert_allclose(again, results[form], rtol=0, atol=1e-5 * np.abs(again).max())
    scale = np.abs(results["branches"]).max()
    np.testing.assert_allclose(results["codebook"], results["branches"], rtol=0, atol=2e-6 * scale)

    # The grid's step is a 127th of the greatest weight of a channel.
    step = np.abs(given).max(axis=tuple(i for i in range(given.ndim) if i != axis)) / 127
    spread = np.broadcast_to(
        step.reshape([-1 if i == axis else 1 for i in range(given.ndim)]), given.shape
    )
    most = outputs(with_weight(model, spread / 2), x=np.abs(feeds["x"]))["y"]
    bias = contents(model).get("b")
    if bias is not None:
        most = most - bias.reshape([-1] + [1] * (most.ndim - 2))
    assert np.all(
        np.abs(results["int8-grid"] - results["codebook"]) <= most * 1.001 + 1e-6 * scale
    )
    assert np.any(results["int8-grid"] != results["codebook"])


@PLANNED
@pytest.mark.parametrize(
    ("bits", "form", "options"),
    [
        (2, "branches", ",zero"),
        (4, "branches", ",zero"),
        (2, "codebook", ""),
        (4, "codebook", ""),
        (2, "codebook", ",zero"),
        (4, "codebook", ",zero"),
        (2, "codebook", ",levels=2"),
        (2, "int8-grid", ""),
        (2, "int8-grid", ",grid=7"),
    ],
)
def test_the_file_holds_what_was_predicted(name, bits, form, options, context, outputs):
    """What `simulated` says of a format, which is what weights are chosen by."""
    model, feeds = layer(name, WIDE)
    axis = axis_of(model)
    clusters = 8 if "levels" in options else 3
    asked = f"uint{bits} per_axis({axis}) split({form},{clusters},per_axis({axis}){options})"
    plan(model, asked)
    weight = contents(model)["w"]
    readers = readers_of(model.graph.initializers["w"])
    floats = simulated(weight, Format.parse(asked), readers=readers)
    plain = simulated(weight, Format.parse(asked).plain, readers=readers)
    if sqnr_db(weight, floats) < sqnr_db(weight, plain):
        floats = plain
    expected = outputs(with_weight(model, floats), plain=True, **feeds)["y"]
    got = outputs(stored(model, context), plain=True, **feeds)["y"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


FIGURES = re.compile(r"into 3 parts of 4 levels: (.*) dB of the weight, (.*) dB unsplit")


@pytest.mark.parametrize("form", ["branches", "codebook", "int8-grid", "nearest"])
def test_the_remark_tells_how_close_the_weight_is(form, context, outputs):
    array = np.random.default_rng(3).normal(size=(64, 6)).astype(np.float32)
    model = planned(array)
    after = stored(model, context, form=form)
    (told, *_) = reasons(context)
    ours, unsplit = (float(number) for number in FIGURES.match(told).groups())
    assert ours == pytest.approx(sqnr_db(array, image(after, outputs)), abs=0.051)
    plain = stored(model, context, form="planned")
    assert unsplit == pytest.approx(sqnr_db(array, image(plain, outputs)), abs=0.051)
    assert ours > unsplit + 5
    bits = {"branches": 6}.get(form, 4)
    assert told.endswith(f"({form}, {bits} code bits a weight)")
    if form in ("int8-grid", "nearest"):
        between = float(re.search(r"stored as \S+ \S+, (.*) dB from the parts", told)[1])
        # Errors add up: those of the parts, and those of the grid.
        assert between > ours - 0.1


def test_a_weight_that_the_unsplit_quantizer_holds_exactly_is_left_whole(context, outputs):
    array = np.float32([[-1, 4], [0, -8], [1, 0], [2, -4], [1, -8]])
    for form in ("branches", "planned"):
        asked = "uint2 per_axis(1)"
        if form == "planned":
            asked += " split(branches,3,per_tensor,zero)"
        model = planned(array, asked)
        around = replace(context, remarks=[])
        assert SplitLayers(form=form).run(model, around) == 0
        (why,) = reasons(around)
        assert re.fullmatch(
            r"not split: it would lose: [\d.]+ dB of the weight, inf dB unsplit", why
        )
        assert str(notes.read(model.graph.initializers["w"]).format) == "uint2 per_axis(1)"
        np.testing.assert_array_equal(image(stored(model, around), outputs), array)
        assert SplitLayers().run(model, around) == 0


@pytest.mark.parametrize("form", ["branches", "codebook", "int8-grid", "nearest"])
@settings(max_examples=25)
@given(
    array=st.one_of(
        *(
            arrays(np.float32, shape, elements=numbers)
            for numbers in (NUMBERS, st.sampled_from([-3, -1.5, -1, 0, 0.25, 1, 2, 100]))
            for shape in (st.just((32, 2)), st.just((64, 1)))
        )
    ),
    over=OVER,
    axis=st.sampled_from(["per_axis(1)", "per_tensor"]),
    zero=st.booleans(),
)
def test_it_is_never_worse_than_the_unsplit_quantizer(form, array, over, axis, zero):
    array = np.where(np.abs(array) < 1e-12, np.float32(0), array)
    model = planned(array, f"uint2 {axis}")
    around = replace(ANY, remarks=[])
    SplitLayers(form=form, over=over, zero=zero and form != "branches").run(model, around)
    RoundWeights().run(model, around)
    unsplit = rounded(array, Format.parse(f"uint2 {axis}")).floats()
    got = weight_in(model)
    assert got.shape == array.shape
    noise, most = (np.square(np.float64(a) - array).sum() for a in (got, unsplit))
    assert noise <= most * (1 + 1e-6)


def weight_in(model):
    """Return the weight of a rounded MatMul, computed from its codes with numpy."""
    total = 0
    for node in model.graph:
        if node.op_type == "MatMul":
            value = node.inputs[1]
            source = value.producer()
            if source is None:
                total = total + value.const_value.numpy()
                continue
            codes, scale, zero = (v.const_value.numpy().astype(np.float32) for v in source.inputs)
            size = source.attributes.get_int("block_size", 0)
            if size:
                scale, zero = (np.repeat(a, size, axis=0) for a in (scale, zero))
            total = total + (codes - zero) * scale
    return total


def test_a_plan_says_how(context, outputs):
    array = np.random.default_rng(4).normal(size=(64, 6)).astype(np.float32)
    model = planned(array, "uint2 per_axis(1) split(codebook,2,per_axis(1))")
    after = stored(model, context)
    assert reasons(context)[0].startswith("into 2 parts of 4 levels: ")
    got = image(after, outputs)
    assert all(len(np.unique(column)) == 8 for column in got.T)
    # Each part's range ends at its own least and greatest weight.
    assert np.array_equal(got.max(axis=0), array.max(axis=0))
    assert np.array_equal(got.min(axis=0), array.min(axis=0))


def test_a_table_of_means(context, outputs):
    array = np.random.default_rng(5).normal(size=(64, 6)).astype(np.float32)
    model = planned(array, "uint4 per_axis(1) split(codebook,16,per_axis(1),levels=1)")
    got = image(stored(model, context), outputs)
    for column, whole in zip(got.T, array.T, strict=True):
        for value in np.unique(column):
            assert value == pytest.approx(whole[column == value].mean(), rel=1e-6)
        assert len(np.unique(column)) == 16
    assert (
        sqnr_db(array, got)
        > sqnr_db(array, rounded(array, Format.parse("uint4 per_axis(1)")).floats()) + 2
    )


def test_what_is_planned_float_stays(context):
    text = f"""{HEADER} g (float[n,8] x, float[8,8] w, float[8,8] v) => (float[n,8] y) {{
        h = MatMul (x, w)
        y = MatMul (h, v)
    }}"""
    model = filled(text)
    notes.apply_plan(model, {"v": {"mode": "float"}})
    for form in ("planned", "branches"):
        assert SplitLayers(form=form).run(model, context) == 0
    model = plan(filled(text), "uint2 per_axis(1)")
    assert SplitLayers().run(model, context) == 0  # it has a plan, which says nothing of a split
    assert SplitLayers(form="branches").run(model, context) == 1
    assert set(contents(model)) == {"w_part_0", "w_part_1", "w_part_2", "v"}


@pytest.mark.parametrize("form", ["codebook", "int8-grid", "nearest"])
def test_a_form_that_rounds_wants_a_plan(form, context):
    model, _ = layer("MatMul")
    (asked,) = SplitLayers(form=form).requires(model, context)
    assert asked == f"form {form} rounds weights, and none is planned; put assign-bits before"
    assert list(SplitLayers(form=form).requires(plan(model, "uint2 per_axis(1)"), context)) == []
    for free in ("planned", "branches"):
        assert list(SplitLayers(form=free).requires(layer("MatMul")[0], context)) == []


ARRAY = np.random.default_rng(6).normal(size=(64, 6)).astype(np.float32)


@pytest.mark.parametrize(
    ("form", "options", "activation", "why"),
    [
        ("codebook", {}, "uint8", "its kernel reads uint8, and a table of floats makes it a"),
        ("nearest", {}, "uint8", "its kernel reads uint8, and the block-wise one reads floats"),
        ("int8-grid", {"clusters": 5}, "uint8", "20 values take an index of 8 bits, which is as"),
        ("int8-grid", {"clusters": 5}, "float", "20 values take an index of 8 bits, which is as"),
        ("int8-grid", {"clusters": 17, "levels": 1}, "float", "17 values take an index of 8 bits"),
    ],
)  # fmt: skip
def test_a_form_that_the_kernel_does_not_take_is_refused(form, options, activation, why, context):
    model = planned(ARRAY, activation=activation)
    assert SplitLayers(form=form, **options).run(model, context) == 0
    assert reasons(context)[0].startswith(f"not split: {why}")
    assert contents(model)["w"].tobytes() == ARRAY.tobytes()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("Gemm", "[6, 64]"), ("Conv", "[6, 8, 3, 3]"), ("ConvTranspose", "[8, 3, 3, 3]")],
)
def test_blocks_are_refused_where_they_are_not_legal(name, shape, context):
    model, _ = layer(name, WIDE)
    plan(model, f"uint2 per_axis({axis_of(model)})")
    assert SplitLayers(form="nearest").run(model, context) == 0
    (why,) = reasons(context)
    assert re.fullmatch(rf"not split: int4 \S+ is not legal here for .*{re.escape(shape)}", why)
    odd = planned(ARRAY[:48])  # the axis is no multiple of a block
    assert SplitLayers(form="nearest").run(odd, context) == 0
    assert reasons(context)[-1].endswith("is not legal here for a weight of shape [48, 6]")


def test_the_nearest_blocks_run_in_the_block_wise_kernel(context, kernels, outputs, optimized):
    model = planned(ARRAY)
    after = stored(model, context, form="nearest")
    assert kernels(after) == {"MatMulNBits": 1}
    note = notes.read(after.graph.initializers["w_quantized"])
    assert str(note.format) == "int4 per_block(0,32)"
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    expected, got = (outputs(after, plain=plain, x=x)["y"] for plain in (True, False))
    # The kernel rounds its activations to eight bits.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-2 * np.abs(expected).max())


def test_a_split_that_nobody_carried_out_is_refused(context):
    model = planned(ARRAY, "uint2 per_axis(1) split(codebook,3,per_tensor)")
    with pytest.raises(RecipeError, match="put split-layers before"):
        RoundWeights().run(model, context)


# Branches in integers

CONV = """g (float[n,4,8,8] x, float[6,4,3,3] w, float[6] b) => (float[n,6,6,6] y) {
    [conv] c = Conv (x, w, b)
    [relu] y = Relu (c)
}"""
BRANCHES = 'calibrate,assign-bits{weights=2 split="branches"},split-layers'
CARRIED = "insert-qdq,round-weights,quantize-biases,unpack-weights"


def images(count=16):
    return np.random.default_rng(8).normal(size=(count, 4, 8, 8)).astype(np.float32)


def test_branches_of_a_convolution_in_integers_take_ranges_from_feeds(fed, outputs, kernels):
    source = filled(f"{HEADER} {CONV}")
    x = images()
    around = fed(source, x=x)
    split, _ = run(Recipe.parse(BRANCHES), source, around)
    adds = [n for n in split.graph if n.op_type == "Add"]
    between = [n.outputs[0] for n in split.graph if n.op_type == "Conv"] + [adds[0].outputs[0]]
    floats = split.clone()
    floats.graph.outputs.extend(v for v in values_named(floats, between))
    seen = outputs(floats, x=x)
    for value in between:
        note = notes.read(value)
        assert (str(note.format), note.mode) == ("uint8 per_tensor", "static")
        array = seen[value.name]
        assert array.min() - 1e-5 <= note.low <= 0 <= note.high <= array.max() + 1e-5
        kept = np.clip(array, note.low, note.high)
        assert sqnr_db(array, kept) > 30
    assert notes.read(adds[1].outputs[0]).format is None  # the quantizer is behind the Relu

    after, _ = run(Recipe.parse(CARRIED), split, around)
    found = kernels(after)
    assert (found["QLinearConv"], found["QLinearAdd"]) == (3, 2)
    assert not found.keys() & {"Conv", "FusedConv", "Add", "Relu", "Cast"}
    expected, got = (outputs(m, x=x)["y"] for m in (split, after))
    plain = outputs(
        run(
            Recipe.parse(
                'assign-bits{weights=2 split="branches" activations="float"},'
                "split-layers,round-weights"
            ),
            source,
            around,
        )[0],
        x=x,
    )["y"]
    assert sqnr_db(plain, got) > 25
    assert sqnr_db(expected, got) > 12


def values_named(model, values):
    names = {value.name for value in values}
    return [v for n in model.graph for v in n.outputs if v.name in names]


def test_without_feeds_a_convolution_in_integers_is_left_whole(fed, context, kernels):
    source = filled(f"{HEADER} {CONV}")
    decide, split = Recipe.parse(BRANCHES).passes[:2], Recipe.parse(f"split-layers,{CARRIED}")
    model, _ = run(Recipe(decide), source, fed(source, x=images()))
    after, _ = run(split, model, context)
    why = "not split: its branches' outputs need ranges, and there are no feeds to take them from"
    assert why in reasons(context)
    found = kernels(after)
    assert (found["QLinearConv"], found.get("QLinearAdd", 0)) == (1, 0)
    stored = after.graph.initializers["w_quantized"]
    assert stored.dtype == ir.DataType.UINT2
    assert str(notes.read(stored).format) == "uint2 per_axis(0)"


def test_a_body_that_reads_an_integer_kernels_weight_stays_float(fed, outputs, kernels):
    text = f"""{HEADER} g (float[2,4,8,8] x, float[4,4,3,3] w) => (float[2,4,4,4] y)
    <bool c = {{1}}> {{
        [conv] a = Conv (x, w)
        [if] y = If (c) <then_branch = t () => (float[2,4,4,4] o) {{ o = Conv (a, w) }},
                         else_branch = e () => (float[2,4,4,4] p) {{ p = Conv (a, w) }}>
    }}"""
    source = filled(text)
    x = images(2)
    around = fed(source, x=x)
    model, _ = run(Recipe.parse(f"{BRANCHES},{CARRIED}"), source, around)
    floats, _ = run(Recipe.parse('assign-bits{weights=2 split="branches" activations="float"},'
                                 "split-layers,round-weights"), source, around)  # fmt: skip
    expected, got = (outputs(m, plain=True, x=x)["y"] for m in (floats, model))
    assert sqnr_db(expected, got) > 25
    found = kernels(model)
    assert (found["QLinearConv"], found["QLinearAdd"]) == (3, 2)


def test_a_reader_that_was_kept_float_has_float_branches(fed, kernels):
    text = f"""{HEADER} g (float[2,4,8,8] x, float[4,4,3,3] w) => (float[2,4,4,4] y) {{
        [one] a = Conv (x, w)
        [tanh] t = Tanh (a)
        [two] y = Conv (t, w)
    }}"""
    source = filled(text)
    recipe = BRANCHES.replace("split=", 'keep=["two"] split=')
    model, _ = run(Recipe.parse(f"{recipe},{CARRIED}"), source, fed(source, x=images(2)))
    found = kernels(model)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QuantizeLinear"]) == (3, 2, 1)
    assert found["Conv"] + found.get("FusedConv", 0) == 3


def test_a_gemm_in_integers_writes_floats_and_needs_no_ranges(context, kernels, fed, outputs):
    model, feeds = layer("Gemm", WIDE)
    decide = Recipe.parse('calibrate,assign-bits{weights=2 split="branches"}')
    model, _ = run(decide, model, fed(model, **feeds))
    after, _ = run(Recipe.parse(f"split-layers,{CARRIED}"), model, context)
    assert kernels(after) == {"QuantizeLinear": 1, "QGemm": 3, "Add": 2}
    expected = outputs(stored(model, context), plain=True, **feeds)["y"]
    assert sqnr_db(expected, outputs(after, **feeds)["y"]) > 25


# Embeddings

LOOKUP = f"{HEADER} g (int64[n] x, float[40,96] w) => (float[n,96] y) {{ y = Gather (w, x) }}"


@pytest.mark.parametrize("form", ["codebook", "int8-grid", "auto"])
def test_a_table_of_embeddings_is_looked_up_in_tables(form, context, outputs, kernels):
    source = filled(LOOKUP)
    table = contents(source)["w"]
    recipe = (
        f'assign-bits{{weights=2 activations="float" split="{form}" over="channel"}},split-layers'
    )
    behind = "round-weights,lower-embeddings,unpack-weights,pack-tables"
    model, _ = run(Recipe.parse(f"{recipe},{behind}"), source, context)
    (index,) = [v for n, v in model.graph.initializers.items() if n.endswith("_index")]
    assert index.dtype == ir.DataType.UINT4
    split = "codebook" if form == "codebook" else "int8-grid"
    asked = Format.parse(f"uint2 per_axis(0) split({split},3,per_axis(0))")
    expected = simulated(table, asked, readers=readers_of(source.graph.initializers["w"]))
    assert (
        sqnr_db(table, expected)
        > sqnr_db(table, simulated(table, Format.parse("uint2 per_axis(0)"))) + 5
    )
    ids = np.arange(40)[::-1].copy()
    for plain in (True, False):
        got = outputs(model, plain=plain, x=ids)["y"]
        np.testing.assert_allclose(got, expected[ids], rtol=0, atol=1e-6 * np.abs(expected).max())
    found = kernels(model)
    assert not found.keys() & {"GatherElements", "DequantizeLinear"}  # unpacked at load
    assert found["Gather"] == (1 if split == "codebook" else 2)


def test_branches_of_embeddings_are_refused(context):
    with pytest.raises(RecipeError, match="Gather reads it, and a lookup has no branches"):
        run(Recipe.parse('assign-bits{weights=2 split="branches"}'), filled(LOOKUP), context)
    model = plan(filled(LOOKUP), "int2 per_axis(0)")
    assert SplitLayers(form="branches").run(model, context) == 0
    assert reasons(context)[-1] == "not split: Gather reads it, and a lookup has no branches"
