"""A layer that becomes several whose outputs are added: what it keeps, and what it computes."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import constants, notes
from fourfold.compiler.branches import branch
from fourfold.compiler.formats import Format, Split
from fourfold.compiler.graph import WEIGHTED, values, weight_of
from fourfold.compiler.splitting import Channels, masked, parts_of
from fourfold.compiler.verifier import Interface, checker_fault, faults_of

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def model_of(body, x="float[n,4] x", y="float[n,m] y", **shapes):
    """Return a model around nodes with these weights, normal numbers."""
    inputs = ", ".join([x, *(f"float[{','.join(map(str, s))}] {n}" for n, s in shapes.items())])
    model = ir.from_onnx_text(f"{HEADER} g ({inputs}) => ({y}) {{ {body} }}")
    draw = np.random.default_rng(0)
    for value in [v for v in model.graph.inputs if v.name in shapes]:
        array = draw.normal(0, 1, shapes[value.name]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


def parts_for(graph, value, count):
    """Return the weight in parts, as initializers."""
    array = value.const_value.numpy()
    ids = parts_of(array, Split(clusters=count), Channels())
    parts = masked(array, ids)
    return [constants.add(graph, f"{value.name}_part_{n}", p) for n, p in enumerate(parts)]


def branched(model, name="layer", count=3, biases=None):
    """Branch one node of the model; return the nodes that came of it and the values returned."""
    node = next(one for one in model.graph.all_nodes() if one.name == name)
    before = {id(one) for one in model.graph.all_nodes()}
    index, bias = WEIGHTED[node.op_type]
    if biases is None:
        own = node.inputs[bias] if bias is not None and len(node.inputs) > bias else None
        biases = [own, *[None] * (count - 1)]
    parts = parts_for(model.graph, node.inputs[index], count)
    found = branch(model.graph, node, parts, biases)
    return [n for n in model.graph.all_nodes() if id(n) not in before], found


def outputs(model, **feeds):
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def attributes(node):
    return {name: one.value for name, one in node.attributes.items()}


LAYERS = {
    "matmul": ("MatMul (x, w)", {"w": (4, 6)}, (3, 4)),
    "matmul of a stack": ("MatMul (x, w)", {"w": (4, 6)}, (2, 3, 4)),
    "matmul with a stack": ("MatMul (x, w)", {"w": (2, 4, 6)}, (2, 3, 4)),
    "gemm": ("Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", {"w": (4, 6), "b": (6,)}, (3, 4)),
    "gemm with a matrix": ("Gemm (x, w, b)", {"w": (4, 6), "b": (3, 6)}, (3, 4)),
    "gemm turned": ("Gemm <transA = 1, transB = 1> (x, w)", {"w": (6, 4)}, (4, 3)),
    "conv": (
        """Conv <pads = [1,0,2,1], strides = [2,1], dilations = [1,2], group = 2,
                 kernel_shape = [3,3]> (x, w, b)""",
        {"w": (6, 2, 3, 3), "b": (6,)},
        (2, 4, 9, 9),
    ),
    "conv of one axis": ("Conv <auto_pad = \"SAME_UPPER\"> (x, w)", {"w": (6, 4, 3)}, (2, 4, 9)),
    "depthwise": ("Conv <group = 4> (x, w, b)", {"w": (8, 1, 2, 2), "b": (8,)}, (1, 4, 5, 5)),
    "upwards": (
        """ConvTranspose <strides = [2,2], pads = [1,0,1,0], output_padding = [0,1], group = 2>
           (x, w, b)""",
        {"w": (4, 3, 3, 3), "b": (6,)},
        (2, 4, 5, 5),
    ),
}  # fmt: skip


def layer(kind):
    """Return a model of one layer with a Relu behind it, and what to feed it."""
    node, shapes, x = LAYERS[kind]
    sizes, out = ",".join(map(str, x)), ",".join("abcd"[: len(x)])
    model = model_of(
        f"[layer] h = {node} [last] y = Relu (h)", f"float[{sizes}] x", f"float[{out}] y", **shapes
    )
    return model, np.random.default_rng(1).normal(0, 1, x).astype(np.float32)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_branches_compute_what_the_layer_does(kind, count):
    model, x = layer(kind)
    interface = Interface.of(model)
    (before,) = outputs(model, x=x)
    branched(model, count=count)
    assert list(faults_of(model, interface)) == []
    assert checker_fault(model) is None
    (after,) = outputs(model, x=x)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("kind", LAYERS)
def test_every_branch_is_a_layer_of_the_kind(kind):
    model, _ = layer(kind)
    node = model.graph[0]
    old, op_type, kept = node.outputs[0], node.op_type, attributes(node)
    x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    type_, shape = old.type, old.shape
    made, _ = branched(model)
    assert [n.op_type for n in made] == [op_type] * 3 + ["Add"] * 2
    assert [n.name for n in made] == [
        *(f"layer_part_{n}" for n in range(3)),
        *(f"layer_sum_{n}" for n in (1, 2)),
    ]
    for number, one in enumerate(made[:3]):
        assert attributes(one) == kept
        assert [one.inputs[0], one.inputs[1].name] == [x, f"w_part_{number}"]
        assert list(one.inputs[2:]) == ([bias] if number == 0 and bias is not None else [])
    for one in made:
        assert (one.outputs[0].type, one.outputs[0].shape) == (type_, shape)
    assert node.graph is None
    assert weight_of(made[0]).value.name == "w_part_0"


def test_the_outputs_are_added_from_left_to_right():
    model, _ = layer("matmul")
    made, found = branched(model, count=4)
    parts, sums = made[:4], made[4:]
    names = ["h_part_0", "h_part_1", "h_part_2", "h_part_3", "h_sum_1", "h_sum_2"]
    assert [v.name for v in found] == names
    total = parts[0].outputs[0]
    for part, one in zip(parts[1:], sums, strict=True):
        assert list(one.inputs) == [total, part.outputs[0]]
        total = one.outputs[0]
    assert total.name == "h"
    assert [n.name for n in model.graph][-1] == "last"
    assert model.graph[-1].inputs[0] is total
    assert found == [n.outputs[0] for n in made[:-1]]  # all that is new but for the sum itself


def test_two_branches_have_one_sum():
    model, _ = layer("matmul")
    _, found = branched(model, count=2)
    assert [v.name for v in found] == ["h_part_0", "h_part_1"]
    assert [n.op_type for n in model.graph] == ["MatMul", "MatMul", "Add", "Relu"]


def test_a_bias_of_each_branch():
    model, x = layer("conv")
    (before,) = outputs(model, x=x)
    whole = model.graph.initializers["b"].const_value.numpy()
    parts = np.where(np.arange(6) < 2, whole, 0), np.where(np.arange(6) < 2, 0, whole)
    biases = [constants.add(model.graph, f"b_{n}", p) for n, p in enumerate(parts)]
    made, _ = branched(model, biases=[None, *biases])
    assert [len(n.inputs) for n in made] == [2, 3, 3, 2, 2]
    (after,) = outputs(model, x=x)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_every_part_has_a_bias_or_none():
    model, _ = layer("matmul")
    node = model.graph[0]
    with pytest.raises(ValueError, match="zip"):
        branch(model.graph, node, parts_for(model.graph, node.inputs[1], 3), [None])


def test_an_empty_bias_is_left_out():
    model = model_of("[layer] y = Gemm <transB = 1> (x, w)", w=(6, 4))
    model.graph[0].resize_inputs(3)
    assert model.graph[0].inputs[2:] == (None,)
    made, _ = branched(model)
    assert [len(n.inputs) for n in made] == [2] * 5


def test_a_graph_output_keeps_its_name_and_its_readers():
    model = model_of(
        "[layer] y = MatMul (x, w) [next] z = Relu (y)", y="float[n,6] y, float[n,6] z", w=(4, 6)
    )
    interface = Interface.of(model)
    x = np.float32([[1, -2, 3, -4]])
    before = outputs(model, x=x)
    made, _ = branched(model)
    assert list(faults_of(model, interface)) == []
    assert model.graph.outputs[0] is made[-1].outputs[0]
    assert model.graph[-1].inputs[0] is made[-1].outputs[0]
    for one, other in zip(outputs(model, x=x), before, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_note_moves_to_the_sum():
    model, _ = layer("gemm")
    h = model.graph[0].outputs[0]
    note = {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 1.0}
    notes.apply_plan(model, {"h": note, "x": note})
    made, found = branched(model)
    assert notes.read(made[-1].outputs[0]) == notes.Note(
        Format("uint8"), "static", None, -1.0, 1.0
    )
    assert notes.read(h) == notes.EMPTY
    assert all(notes.read(value) == notes.EMPTY for value in found)
    assert list(notes.plan(model)) == ["x", "h"]


def test_names_that_are_taken_get_a_number():
    model = model_of(
        "[one] h_part_0 = Relu (x) [two] h_sum_1 = Relu (h_part_0) "
        "[three] h_whole = Relu (h_sum_1) [layer] h = MatMul (h_whole, w) [last] y = Relu (h)",
        w=(4, 6),
    )
    interface = Interface.of(model)
    _, found = branched(model)
    assert [v.name for v in found] == ["h_part_0_1", "h_part_1", "h_part_2", "h_sum_1_1"]
    names = [str(v.name) for v in values(model)]
    assert len(set(names)) == len(names)
    assert list(faults_of(model, interface)) == []


def test_layers_one_behind_the_other():
    """The parts of a weight that two layers read are shared."""
    model = model_of("[layer] h = MatMul (x, w) [other] y = MatMul (h, w)", w=(4, 4))
    x = np.float32([[1, -2, 3, -4]])
    (before,) = outputs(model, x=x)
    branched(model)
    branched(model, "other")
    assert [n.op_type for n in model.graph] == [*["MatMul"] * 3, *["Add"] * 2] * 2
    assert list(model.graph.initializers) == ["w", "w_part_0", "w_part_1", "w_part_2"]
    (after,) = outputs(model, x=x)
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_a_layer_in_the_body_of_another():
    text = f"""{HEADER} g (float[n,4] x, bool c) => (float[n,6] y)
    <float[4,6] w = {{{",".join(str(n % 7 - 3) for n in range(24))}}}> {{
        [choice] y = If (c) <
            then_branch = yes () => (float[n,6] a) {{ [layer] a = MatMul (x, w) }},
            else_branch = no () => (float[n,6] b) {{ [other] d = MatMul (x, w) b = Neg (d) }}
        >
    }}"""
    model = ir.from_onnx_text(text)
    interface = Interface.of(model)
    x = np.float32([[1, -2, 3, -4]])
    before = [outputs(model, x=x, c=np.array(c))[0] for c in (True, False)]
    made, _ = branched(model)
    branched(model, "other")
    assert list(faults_of(model, interface)) == []
    assert made[-1].graph is not model.graph
    assert made[-1].graph.outputs[0] is made[-1].outputs[0]
    assert made[-1].outputs[0].name == "a"
    assert [n.op_type for n in model.graph] == ["If"]
    after = [outputs(model, x=x, c=np.array(c))[0] for c in (True, False)]
    np.testing.assert_array_equal(after, before)
