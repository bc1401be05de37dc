import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import constants, graph, regions
from fourfold.compiler.capability import Capability, Legality
from fourfold.compiler.formats import Format, PerAxis, PerTensor

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.acme" : 1]>'
BOTH = ("per_tensor", "per_axis")
# As onnxruntime has it: a Conv writes codes, a Gemm or MatMul may write floats.
CAPABILITY = Capability(
    "chip",
    (21, 21),
    (
        Legality("Conv", ("int8",), ("uint8",), BOTH),
        Legality("Gemm", ("int8", "int4"), ("uint8",), ("per_tensor",), float_output=True),
        Legality("MatMul", ("int8",), ("uint8",), BOTH, float_output=True),
        Legality("Add"),
        Legality("Concat"),
    ),
    carries=frozenset({"MaxPool", "Reshape", "Transpose"}),
    fuses=frozenset({"Relu", "Clip"}),
    float_only={"Softmax": "small probabilities would be lost"},
)
IMAGE = "float[1,2,4,4]"
KERNEL = "float[2,2,1,1] w = {1,2,3,4}"


def parse(text):
    model = ir.from_onnx_text(f"{HEADER} {text}")
    ShapeInferencePass()(model)
    return model


def image(body, weights="", outputs=f"{IMAGE} y"):
    """A model of one image x; `body` may read the kernel w of a 1x1 Conv."""
    header = f"{KERNEL}{', ' if weights else ''}{weights}"
    return parse(f"g ({IMAGE} x) => ({outputs}) <{header}> {{ {body} }}")


def find(model, bits=8, keep=None):
    return regions.find(model, CAPABILITY, bits, keep)


def running(model, **options):
    found = find(model, **options)
    return [node.op_type for node in model.graph if found.runs(node)]


# graph.py


def test_values_once_and_in_branches():
    model = parse("""g (bool c, float[2] x) => (float[2] y) <float[2] w = {1,2}> {
        h = Mul(x, w)
        y = If (c) <then_branch = a () => (float[2] t) { t = Neg(h) },
                    else_branch = b () => (float[2] e) { e0 = Abs(h) e = Relu(e0) }>
    }""")
    model.graph.inputs.append(model.graph.initializers["w"])  # an input with a default
    names = [v.name for v in graph.values(model)]
    assert sorted(names) == sorted(["c", "x", "w", "h", "y", "t", "e0", "e"])
    assert len(list(graph.subgraphs(model.graph[1]))) == 2


def test_constants_cannot_be_overridden_by_a_caller():
    model = image("y = Conv(x, w)")
    w = model.graph.initializers["w"]
    assert graph.is_constant(w)
    assert not graph.is_constant(model.graph.inputs[0])
    assert not graph.is_constant(None)
    model.graph.inputs.append(w)
    assert not graph.is_constant(w)
    assert graph.weight_of(model.graph[0]) is None


def test_sole_consumer():
    model = image(
        "a = Relu(x) b = Neg(a) y = Add(b, b) z = Abs(y)", outputs=f"{IMAGE} y, {IMAGE} z"
    )
    relu, neg, add, _ = model.graph
    assert graph.sole_consumer(relu.outputs[0]) is neg
    assert graph.sole_consumer(neg.outputs[0]) is None  # read twice by one node
    assert graph.sole_consumer(add.outputs[0]) is None  # the caller reads it too


@pytest.mark.parametrize(
    ("node", "shape", "axis"),
    [
        ("Conv(x, w)", "2,2,1,1", 0),
        ("ConvTranspose(x, w)", "2,2,1,1", 1),
        ("Gemm(x, w)", "2,2", 1),
        ("Gemm <transB = 1> (x, w)", "2,2", 0),
        ("MatMul(x, w)", "2,2", 1),
        ("MatMul(x, w)", "1,2,2", 2),
        ("Gather(w, i)", "2,2", 0),
    ],
)
def test_weight_of(node, shape, axis):
    model = ir.from_onnx_text(
        f"{HEADER} g (float[a,b] x, int64[n] i) => (y) <float[{shape}] w = {{1,2,3,4}}> "
        f"{{ y = {node} }}"
    )
    weight = graph.weight_of(model.graph[0])
    assert weight.axis == axis
    assert weight.value is model.graph.initializers["w"]
    assert weight.node is model.graph[0]
    assert weight.bias is None


@pytest.mark.parametrize(
    "node",
    [
        "MatMul(w, x)",  # the constant is on the left
        "MatMul(x, x)",
        "MatMul(x, v)",  # a vector
        "MatMul(x, k)",  # integers
        "MatMul(x, o)",  # without elements
        "Gather <axis = 1> (w, i)",
        "com.acme.MatMul(x, w)",
        "Add(x, w)",
    ],
)
def test_no_weight(node):
    model = ir.from_onnx_text(
        f"{HEADER} g (float[2,2] x, int64[n] i) => (y) <float[2,2] w = {{1,2,3,4}}, "
        f"float[2] v = {{1,2}}, int64[2,2] k = {{1,2,3,4}}, float[2,0] o = {{}}> {{ y = {node} }}"
    )
    assert graph.weight_of(model.graph[0]) is None


def test_bias_is_the_operators_own():
    text = """g (float[1,2] x, float[2] c) => (y, z) <float[2,2] w = {1,2,3,4}, float[2] b = {1,2}>
        { y = Gemm(x, w, b) z = Gemm(x, w, c) }"""
    model = ir.from_onnx_text(f"{HEADER} {text}")
    with_bias, with_input = map(graph.weight_of, model.graph)
    assert with_bias.bias is model.graph.initializers["b"]
    assert with_input.bias is None


def test_activations_of():
    model = parse("g (float[2] x, int64[1] i) => (float[2] y) <float[2] w = {1,2}> "
                  "{ h = Sum(x, w, x) y = Add(h, x) k = Gather(h, i) }")  # fmt: skip
    total, add, gather = model.graph
    assert [v.name for v in graph.activations_of(total)] == ["x"]
    assert [v.name for v in graph.activations_of(add)] == ["h", "x"]
    assert [v.name for v in graph.activations_of(gather)] == ["h"]


# regions.py


@pytest.mark.parametrize(
    ("bits", "weight_bits", "expected"),
    [
        (8, 8, ("int8", 8)),
        (8, 7, ("int8", 7)),
        (5, 8, ("int8", 5)),
        (4, 7, ("int4", 4)),
        (3, 8, ("int4", 3)),
        (2, 8, ("int2", 2)),
    ],
)
def test_container(bits, weight_bits, expected):
    assert regions.container(bits, weight_bits) == expected


def test_the_finest_legal_weight_format():
    conv = image("y = Conv(x, w)").graph[0]
    assert regions.weight_format(conv, 8, CAPABILITY, "uint8") == Format("int8", PerAxis(0))
    assert regions.weight_format(conv, 4, CAPABILITY, "uint8") is None
    assert regions.weight_format(conv, 8, CAPABILITY, "int8") is None
    gemm = parse("g (float[1,2] x) => (y) <float[2,2] w = {1,2,3,4}> { y = Gemm(x, w) }").graph[0]
    assert regions.weight_format(gemm, 8, CAPABILITY, "uint8") == Format("int8", PerTensor())
    assert regions.weight_format(gemm, 4, CAPABILITY, "uint8") == Format("int4", PerTensor())


def test_integers_spread_forward_from_anchors():
    model = image("r = Relu(x) a = Conv(r, w) b = MaxPool <kernel_shape=[1,1]> (a) y = Neg(b)")
    found = find(model)
    assert running(model) == ["Conv", "MaxPool"]
    assert list(found.quantized) == ["r", "a", "b"]
    assert found.codes == {"a", "b"}
    assert found.shares == {"b": "a"}  # one scale: it hands codes on
    assert found.why_float == {"y": "no integer Neg on chip"}


def test_an_activation_function_belongs_to_the_node_before():
    model = image("a = Conv(x, w) b = Relu(a) y = Neg(b)")
    found = find(model)
    assert running(model) == ["Conv", "Relu"]
    assert list(found.quantized) == ["x", "b"]  # no quantizer between the two


def test_an_activation_function_that_two_readers_share_does_not_fuse():
    model = image("a = Conv(x, w) b = Relu(a) y = Add(a, b)")
    assert list(find(model).quantized) == ["x", "a"]
    assert running(model) == ["Conv"]


@pytest.mark.parametrize(("low", "fused"), [("zero", True), ("one", False), ("x0", False)])
def test_a_clip_fuses_when_it_clips_at_zero(low, fused):
    model = parse(
        f"g ({IMAGE} x, float x0) => ({IMAGE} y) "
        f"<{KERNEL}, float zero = {{0}}, float one = {{1}}, float six = {{6}}> "
        f"{{ a = Conv(x, w) y = Clip(a, {low}, six) }}"
    )
    conv, clip = model.graph
    assert regions.fused_activation(conv, CAPABILITY) is (clip if fused else None)
    assert find(model).runs(clip) is fused


def test_a_clip_without_a_floor_does_not_fuse():
    model = image("a = Conv(x, w) y = Clip(a)")
    assert regions.fused_activation(model.graph[0], CAPABILITY) is None


def test_an_op_joins_only_when_all_its_inputs_are_codes():
    both = image("a = Conv(x, w) b = Conv(x, w) c = Add(a, b) y = Neg(c)")
    assert running(both) == ["Conv", "Conv", "Add"]
    one = image("a = Conv(x, w) b = Neg(x) y = Add(a, b)")
    assert running(one) == ["Conv"]
    assert find(one).why_float["y"].startswith("its input b is float")


def test_no_conversion_for_its_own_sake():
    model = image("y = Add(x, x)")
    assert running(model) == []
    assert find(model).why_float == {"y": "its inputs are float"}


def test_a_constant_operand_keeps_an_add_float():
    model = image("a = Conv(x, w) y = Add(a, k)", weights="float[1] k = {2}")
    assert running(model) == ["Conv"]
    assert find(model).why_float == {"y": "one operand is a float constant"}


def test_the_targets_own_reason():
    model = image("a = Conv(x, w) y = Softmax(a)")
    assert find(model).why_float == {"y": "small probabilities would be lost"}


def test_a_node_that_may_write_floats_leaves_no_codes():
    model = parse(
        "g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {1,2,3,4}> "
        "{ a = MatMul(x, w) b = Reshape(a, s) y = MatMul(b, w) s = Shape(x) }"
    )
    model.graph.sort()
    found = find(model)
    assert running(model) == ["MatMul", "MatMul"]
    assert found.codes == set()
    assert list(found.quantized) == ["x", "b"]


def test_concat_gives_its_inputs_one_scale():
    model = image(
        "a = Conv(x, w) b = Conv(a, w) d = MaxPool <kernel_shape=[1,1]> (b) "
        "y = Concat <axis = 1> (a, d)",
        outputs="float[1,4,4,4] y",
    )
    found = find(model)
    assert running(model) == ["Conv", "Conv", "MaxPool", "Concat"]
    assert {found.root(name) for name in ("a", "b", "d", "y")} == {"y"}
    assert found.root("x") == "x"


def test_kept_nodes_stay_float():
    model = image("[first] a = Conv(x, w) [second] y = Conv(a, w)")
    found = find(model, keep={"first": "kept as asked"})
    assert [node.name for node in found.integer.values()] == ["second"]
    assert found.why_float == {"a": "kept as asked"}
    both = find(model, keep={"second": "one reason", "first": "another", "third": "none"})
    assert both.integer == {}
    assert both.why_float == {"a": "another", "y": "one reason"}


def test_widths_that_are_not_legal_have_a_reason():
    assert find(image("y = Conv(x, w)"), bits=4).why_float == {
        "y": "no legal form with 4-bit weights and uint8 activations"
    }


def test_each_weight_has_a_width_of_its_own():
    text = """g (float[1,2] x) => (float[1,2] y)
        <float[2,2] w = {1,2,3,4}, float[2,2] v = {1,2,3,4}, float[2,2] u = {1,2,3,4}>
        { a = MatMul(x, w) b = MatMul(a, v) y = MatMul(b, u) }"""
    found = find(parse(text), bits={"w": 8, "v": 4})  # a MatMul of the chip takes int8 alone
    assert [node.outputs[0].name for node in found.integer.values()] == ["a", "y"]
    reason = "no legal form with 4-bit weights and uint8 activations"
    assert found.why_float == {"b": reason}


def test_embeddings_and_integers_are_not_worth_a_word():
    model = parse(
        "g (int64[n] i) => (float[n,2] y, int64[n] j) <float[2,2] w = {1,2,3,4}> "
        "{ y = Gather(w, i) j = Neg(i) }"
    )
    found = find(model)
    assert (found.integer, found.quantized, found.why_float) == ({}, {}, {})


def test_the_zoo_has_regions_on_the_cpu(zoo, context):
    found = {
        name: [node.name for node in regions.find(make(), context.capability, 8).integer.values()]
        for name, make in zoo.items()
    }
    assert found == {
        # Before folding: the normalization and what follows it stay float.
        "convnet": ["conv1", "conv2", "head"],
        # The second bias is an Add of a constant.
        "mlp": ["fc1", "relu1", "fc2", "fc3"],
        # Products with a weight, not those of two activations.
        "attention": ["query", "key", "value", "out", "up", "down"],
    }


# constants.py


@pytest.fixture
def empty():
    return parse("g (float[2] x) => (float[2] y) { h = Neg(x) y = Relu(h) }").graph


def test_add(empty):
    value = constants.add(empty, "k", np.array([[1.5, 2]], np.float32))
    assert empty.initializers["k"] is value
    assert (value.dtype, list(value.shape)) == (ir.DataType.FLOAT, [1, 2])
    assert value.const_value.numpy().tolist() == [[1.5, 2.0]]


@pytest.mark.parametrize(
    ("dtype", "numpy"),
    [
        (ir.DataType.INT4, ml_dtypes.int4),
        (ir.DataType.UINT2, ml_dtypes.uint2),
        (ir.DataType.INT8, np.int8),
        (ir.DataType.INT32, np.int32),
    ],
)
def test_add_in_a_narrower_container(empty, dtype, numpy):
    value = constants.add(empty, "codes", np.array([0, 1, 1], np.int64), dtype)
    assert value.dtype == dtype
    assert value.const_value.numpy().dtype == numpy
    assert value.const_value.numpy().astype(int).tolist() == [0, 1, 1]
    assert value.const_value.nbytes == -(-3 * dtype.bitwidth // 8)  # packed


def test_add_shares_what_is_the_same(empty):
    first = constants.add(empty, "k", np.float32(1))
    assert constants.add(empty, "k", np.float32(1)) is first
    other = constants.add(empty, "k", np.float32(2))
    typed = constants.add(empty, "k", np.int32(1))
    assert [first.name, other.name, typed.name] == ["k", "k_1", "k_2"]


@pytest.mark.parametrize("name", ["x", "h", "y"])
def test_names_are_free(empty, name):
    assert constants.free(empty, name) == f"{name}_1"
    assert constants.free(empty, "unheard") == "unheard"
    assert constants.add(empty, name, np.float32(1)).name == f"{name}_1"


def test_zero_points(empty):
    scalar = constants.zero_points(empty, np.float32(1), ir.DataType.INT8)
    vector = constants.zero_points(empty, np.ones(3, np.float32), ir.DataType.INT4)
    assert (list(scalar.shape), scalar.dtype) == ([], ir.DataType.INT8)
    assert (list(vector.shape), vector.dtype) == ([3], ir.DataType.INT4)
    assert not vector.const_value.numpy().astype(int).any()
    again = constants.zero_points(empty, np.full(3, 2, np.float32), ir.DataType.INT4)
    assert again is vector


def test_make_node(empty):
    x = empty.inputs[0]
    half = ir.DataType.FLOAT16
    node = constants.make_node("Cast", [x], "c", like=x, attributes={"to": 10}, dtype=half)
    assert (node.name, node.outputs[0].name) == ("c", "c_Output")
    assert node.outputs[0].dtype == half
    assert node.outputs[0].shape == x.shape
    assert node.outputs[0].shape is not x.shape
    plain = constants.make_node("Neg", [x], "n", like=x, output="named")
    assert (plain.outputs[0].name, plain.outputs[0].dtype) == ("named", ir.DataType.FLOAT)
