import math

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler import notes
from fourfold.compiler.choices import Choice, legal_choices
from fourfold.compiler.costs import (
    Workload,
    fits,
    groups,
    kernels_of,
    multiply_adds,
    stored_bytes,
)
from fourfold.compiler.formats import Format, PerAxis, PerBlock, PerTensor
from fourfold.compiler.graph import weight_of, weights_of
from fourfold.compiler.quantizers import symmetric_scale
from fourfold.passes.pack_tables import PackTables
from fourfold.passes.round_weights import RoundWeights
from fourfold.passes.split_layers import SplitLayers
from fourfold.targets.cpu import Cpu

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def zeros(model):
    """Make float zeros of every graph input but the first."""
    for value in list(model.graph.inputs)[1:]:
        array = np.zeros(value.shape.numpy(), np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def node_of(text):
    """Return the weight of the only node in `g (x, w) => (y) { ... }`."""
    model = zeros(ir.from_onnx_text(f"{HEADER} g {text}"))
    return weight_of(model.graph[0])


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("(float[1,4,8,8] x, float[4,4,3,3] w) => (float[1,4,a,b] y) { y = Conv (x, w) }", ()),
        (
            """(float[1,4,8,8] x, float[4,1,3,3] w) => (float[1,4,a,b] y) {
                y = Conv <group = 4, pads = [0,0,0,0], strides = [2,1], dilations = [1,1],
                          kernel_shape = [3,3], auto_pad = "NOTSET"> (x, w) }""",
            (("group", 4), ("strides", (2, 1))),
        ),
        (
            """(float[1,4,8,8] x, float[4,4,3,3] w) => (float[1,4,a,b] y) {
                y = Conv <auto_pad = "SAME_UPPER", dilations = [1,2], group = 1> (x, w) }""",
            (("auto_pad", "SAME_UPPER"), ("dilations", (1, 2))),
        ),
        (
            """(float[2,4] x, float[8,4] w) => (float[2,8] y) {
                y = Gemm <transA = 0, transB = 1, alpha = 2.0> (x, w) }""",
            (("transB", 1),),
        ),
        (
            """(float[1,4,8,8] x, float[4,4,2,2] w) => (float[1,4,a,b] y) {
                y = ConvTranspose <strides = [2,2], output_padding = [0,1]> (x, w) }""",
            (("output_padding", (0, 1)), ("strides", (2, 2))),
        ),
    ],
)
def test_a_workload_leaves_defaults_out(text, attributes):
    reader = node_of(text)
    work = Workload.of(reader, (1, 4, 8, 8))
    shape = tuple(reader.value.const_value.shape.numpy())
    assert work == Workload(reader.node.op_type, shape, (1, 4, 8, 8), attributes)
    assert hash(work) == hash(Workload.of(reader, (1, 4, 8, 8)))
    assert work.attribute("strides", "none") == dict(attributes).get("strides", "none")


def output_shape(work):
    """Return the shape that onnxruntime makes of a workload."""
    x = ir.val("x", ir.DataType.FLOAT, work.input)
    w = ir.val("w", ir.DataType.FLOAT, work.weight)
    node = ir.node(work.op_type, [x, w], attributes=dict(work.attributes))
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x, w], [y], nodes=[node], opset_imports={"": 21}, name="g")
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    feeds = {v.name: np.zeros(v.shape.numpy(), np.float32) for v in (x, w)}
    return session.run(None, feeds)[0].shape


@st.composite
def convolutions(draw):
    rank = draw(st.integers(1, 2))
    small = st.integers(1, 3)
    kernel, strides, dilations = (
        draw(st.lists(small, min_size=rank, max_size=rank)) for _ in range(3)
    )
    group, inner, outer = (draw(small) for _ in range(3))
    attributes = {"strides": tuple(strides), "group": group}
    padding = draw(st.sampled_from(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding == "pads":
        limits = [min(size, 2) for size in kernel] * 2
        attributes["pads"] = tuple(draw(st.integers(0, limit)) for limit in limits)
    elif padding != "none":
        attributes["auto_pad"] = padding
    if not padding.startswith("SAME"):  # onnxruntime refuses both together
        attributes["dilations"] = tuple(dilations)
    sizes = draw(st.lists(st.integers(7, 9), min_size=rank, max_size=rank))
    return Workload(
        "Conv",
        (outer * group, inner, *kernel),
        (draw(small), inner * group, *sizes),
        tuple(sorted(attributes.items())),
    )


@given(convolutions())
def test_multiply_adds_of_a_conv_are_those_of_every_output_element(work):
    assert fits(work)
    assert multiply_adds(work) == math.prod(output_shape(work)) * math.prod(work.weight[1:])


@pytest.mark.parametrize(
    ("work", "inner"),
    [
        (Workload("MatMul", (5, 7), (5,)), 5),
        (Workload("MatMul", (5, 7), (3, 5)), 5),
        (Workload("MatMul", (5, 7), (2, 1, 3, 5)), 5),
        (Workload("MatMul", (4, 5, 7), (2, 1, 3, 5)), 5),
        (Workload("MatMul", (4, 5, 7), (3, 5)), 5),
        (Workload("Gemm", (5, 7), (3, 5)), 5),
        (Workload("Gemm", (7, 5), (3, 5), (("transB", 1),)), 5),
        (Workload("Gemm", (7, 5), (5, 3), (("transA", 1), ("transB", 1))), 5),
    ],
)
def test_multiply_adds_of_a_product(work, inner):
    assert multiply_adds(work) == math.prod(output_shape(work)) * inner


def test_multiply_adds_of_the_other_operators():
    assert multiply_adds(Workload("Gather", (100, 16), (2, 5))) == 2 * 5 * 16
    # Every input element meets every tap of its filters.
    up = Workload("ConvTranspose", (4, 3, 2, 2), (2, 8, 5, 6), (("group", 2), ("strides", (2, 2))))
    assert multiply_adds(up) == 2 * 5 * 6 * 4 * 3 * 2 * 2


@pytest.mark.parametrize(
    "work",
    [
        Workload("Gemm", (4, 8), (1, 2, 8)),
        Workload("Gemm", (4, 8, 1), (2, 8)),
        Workload("MatMul", (8,), (2, 8)),
        Workload("MatMul", (8, 8), ()),
        Workload("Conv", (4, 4, 3, 3), (1, 4, 8)),
        Workload("Conv", (4, 4, 3), (1, 4, 8), (("strides", (1, 1)),)),
        Workload("Conv", (4, 4, 3), (1, 4, 8), (("pads", (1,)),)),
        Workload("Softmax", (4, 4), (1, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_told(work):
    assert not fits(work)


def test_stored_bytes_are_those_of_the_tensors(zoo, context):
    for make in zoo.values():
        names = [w.value.name for node in make().graph if (w := weight_of(node)) is not None]
        for name in names:
            weight = weight_named(make(), name)
            for choice in legal_choices([weight], context.capability):
                model = make()
                reader = weight_named(model, name)
                work = Workload.of(reader, (1, 8, 8, 8))
                if choice.format is not None:
                    notes.write(reader.value, format=choice.format, mode="static")
                    RoundWeights(clip="minmax").run(model, context)
                kept = model.graph.initializers
                stored = (name, f"{name}_quantized", f"{name}_scale")
                tensors = [kept[part].const_value.nbytes for part in stored if part in kept]
                assert stored_bytes(work, choice) == sum(tensors), (name, str(choice))


def weight_named(model, name):
    weights = [w for node in model.graph if (w := weight_of(node)) is not None]
    return next(w for w in weights if w.value.name == name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("float", 4 * 96 * 10),
        ("int8 per_tensor x uint8", 96 * 10 + 4),
        ("int4 per_axis(1) x uint8", 96 * 10 // 2 + 4 * 10),
        ("int2 per_block(0,32) x float", 96 * 10 // 4 + 4 * 3 * 10),
        ("int4 per_block(0,128) x float", 96 * 10 // 2 + 4 * 10),
        # Branches: codes and scales of each.
        ("uint2 per_axis(1) split(branches,3,per_tensor,zero) x uint8", 3 * (240 + 4 * 10)),
        ("uint4 per_tensor split(branches,2,per_axis(1),zero) x float", 2 * (480 + 4)),
        # Tables of floats: 12 values, or 10 that share the zero, where scales or clusters differ.
        ("uint2 per_tensor split(codebook,3,per_tensor) x float", 480 + 4 * 12),
        ("uint2 per_axis(1) split(codebook,3,per_tensor) x float", 480 + 4 * 12 * 10),
        ("uint2 per_tensor split(codebook,3,per_axis(1)) x float", 480 + 4 * 12 * 10),
        ("uint2 per_axis(1) split(codebook,3,per_tensor,zero) x float", 480 + 4 * 10 * 10),
        ("uint2 per_axis(1) split(codebook,3,per_block(0,32)) x float", 480 + 4 * 12 * 30),
        ("uint2 per_block(0,32) split(codebook,3,per_tensor) x float", 480 + 4 * 12 * 30),
        ("uint4 per_tensor split(codebook,3,per_tensor) x float", 960 + 4 * 48),
        # Means have no scale: the clusters alone count.
        ("uint4 per_axis(1) split(codebook,16,per_tensor,levels=1) x float", 480 + 4 * 16),
        ("uint2 per_tensor split(codebook,4,per_axis(1),levels=1) x float", 240 + 4 * 4 * 10),
        # Tables of codes, and the scales of the grid.
        ("uint2 per_axis(1) split(int8-grid,3,per_tensor) x uint8", 480 + 12 * 10 + 4 * 10),
        ("uint2 per_tensor split(int8-grid,16,per_tensor,levels=1) x uint8", 480 + 16 + 4),
        # The runtime's own block-wise form.
        ("uint2 per_axis(1) split(nearest,3,per_tensor) x float", 480 + 4 * 30),
    ],
)
def test_stored_bytes_of_codes_and_scales(text, expected):
    assert stored_bytes(Workload("MatMul", (96, 10), (1, 96)), Choice.parse(text)) == expected


FORMS = [
    "uint2 per_axis({0}) split(branches,3,per_tensor,zero) x float",
    "uint4 per_tensor split(branches,2,per_axis({0}),zero) x float",
    "uint2 per_axis({0}) split(codebook,3,per_axis({0})) x float",
    "uint2 per_tensor split(codebook,3,per_tensor,zero) x float",
    "uint2 per_tensor split(codebook,16,per_tensor,levels=1) x float",
    "uint2 per_tensor split(int8-grid,16,per_tensor,levels=1) x uint8",
    "uint2 per_axis({0}) split(int8-grid,3,per_axis({0})) x uint8",
]


@pytest.mark.parametrize("form", FORMS)
def test_stored_bytes_of_a_split_weight_are_those_of_the_tensors(zoo, context, form):
    """A table may have a value less than was reckoned with, where two of them are one."""
    for make in zoo.values():
        for name in [str(value.name) for value in weights_of(make())]:
            model = make()
            reader = weight_named(model, name)
            choice = Choice.parse(form.format(reader.axis))
            notes.write(reader.value, format=choice.format, mode="static", activation="float")
            for one in (SplitLayers(), RoundWeights(), PackTables()):
                one.run(model, context)
            sizes = {
                label: tensor.const_value.nbytes
                for label, tensor in model.graph.initializers.items()
                if label.startswith(f"{name}_")
                and not label.endswith(("zero_point", "bias"))
                and tensor.dtype != ir.DataType.INT64
            }
            if choice.format.split.form != "branches" and not any("index" in n for n in sizes):
                continue  # no table would be smaller
            assert sizes
            reckoned = stored_bytes(Workload.of(reader, (1, 8, 8, 8)), choice)
            exact = "branches" in form or "codebook,16" in form
            assert sum(sizes.values()) == reckoned if exact else sum(sizes.values()) <= reckoned
            assert reckoned <= 1.25 * sum(sizes.values())


@pytest.mark.parametrize(
    ("granularity", "shape", "count"),
    [
        (PerTensor(), (4, 6), 1),
        (PerAxis(1), (4, 6), 6),
        (PerAxis(0), (4, 6, 3, 3), 4),
        (PerBlock(0, 2), (4, 6), 12),
        (PerBlock(1, 4), (4, 6), 8),  # the second of a row is shorter
        (PerBlock(1, 32), (4, 6), 4),
    ],
)
def test_groups_are_as_many_as_scales(granularity, shape, count):
    assert groups(shape, granularity) == count
    scale = symmetric_scale(np.ones(shape, np.float32), Format("int8", granularity))
    assert scale.size == count


@pytest.mark.parametrize(
    ("text", "kernels"),
    [
        ("float", ["float"]),
        ("int4 per_axis(1) x uint8", ["int4 per_axis(1) x uint8"]),
        (
            "uint2 per_axis(1) split(branches,3,per_tensor,zero) x uint8",
            ["uint2 per_axis(1) x uint8"] * 3,
        ),
        (
            "uint2 per_axis(1) split(branches,5,per_axis(1),zero) x float",
            ["uint2 per_axis(1) x float"] * 5,
        ),
        ("uint2 per_axis(1) split(codebook,3,per_tensor) x float", ["float"]),
        ("uint2 per_axis(1) split(int8-grid,3,per_tensor) x uint8", ["int8 per_axis(1) x uint8"]),
        (
            "uint2 per_axis(1) split(int8-grid,3,per_tensor,grid=7) x uint8",
            ["int8:7 per_axis(1) x uint8"],
        ),
        (
            "uint2 per_axis(1) split(nearest,3,per_tensor) x float",
            ["int4 per_block(0,32) x float"],
        ),
    ],
)
def test_kernels_of_a_choice(text, kernels):
    """Tables are folded at load: what runs is the kernel of the weight that comes out."""
    reader = node_of("(float[1,64] x, float[64,8] w) => (float[1,8] y) { y = MatMul (x, w) }")
    assert [str(kernel) for kernel in kernels_of(Choice.parse(text), reader)] == kernels


def test_every_choice_of_the_cpu_has_a_size():
    weight = node_of("(float[1,64] x, float[64,8] w) => (float[1,8] y) { y = MatMul (x, w) }")
    work = Workload.of(weight, (1, 64))
    choices = legal_choices([weight], Cpu(isa="vnni").capability)
    sizes = {str(choice): stored_bytes(work, choice) for choice in choices}
    assert sizes["int4 per_block(0,32) x float"] == 64 * 8 // 2 + 4 * 2 * 8
    assert max(sizes.values()) == sizes["float"] == 4 * 64 * 8
