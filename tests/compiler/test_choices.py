"""Forms of a weight: their text, which ones are legal, and which ones are open."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler.capability import Capability, Legality
from fourfold.compiler.choices import (
    Choice,
    allowed,
    legal_choices,
    open_weights,
    with_zero_points,
)
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import DTYPES, Format, PerAxis, PerBlock, PerTensor, Split
from fourfold.compiler.graph import readers_of, weights_of
from fourfold.targets.cpu import Cpu

CPU = Cpu(isa="vnni").capability
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

GRANULARITIES = st.one_of(
    st.just(PerTensor()),
    st.builds(PerAxis, st.integers(-4, 7)),
    st.builds(PerBlock, st.integers(-4, 7), st.integers(1, 1 << 20)),
)


@st.composite
def choices(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    bits = draw(st.integers(2, DTYPES[dtype].bitwidth))
    splits = [None, Split(), Split("branches", 5, PerAxis(1), zero=True)]
    few = [one for one in splits if one is None or one.entries(bits) <= 2**16]
    split = draw(st.sampled_from(few))
    format = draw(st.none() | st.just(Format(dtype, draw(GRANULARITIES), bits, split)))
    beside = "float" if format is None else draw(st.sampled_from(["float", *sorted(DTYPES)]))
    return Choice(format, beside)


def model_of(body, *weights, x="float[n,k] x"):
    """Return a model whose weights, (name, shape), hold zeros."""
    inputs = [x, *(f"float[{','.join(map(str, shape))}] {name}" for name, shape in weights)]
    model = ir.from_onnx_text(f"{HEADER} g ({', '.join(inputs)}) => (y) {{ {body} }}")
    for value in [v for v in model.graph.inputs if v.name in dict(weights)]:
        value.const_value = ir.tensor(np.zeros(value.shape.numpy(), np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def legal(model, capability=CPU, name="w"):
    value = model.graph.initializers[name]
    return [str(choice) for choice in legal_choices(readers_of(value), capability)]


# Text


@given(choices())
def test_a_choice_prints_and_parses_back(choice):
    assert Choice.parse(str(choice)) == choice


def test_the_text_of_a_choice():
    assert str(Choice()) == "float"
    assert str(Choice(Format("int8", PerAxis(0), 7), "uint8")) == "int8:7 per_axis(0) x uint8"
    blocked = Choice(Format("int4", PerBlock(0, 32)), "float")
    assert str(blocked) == "int4 per_block(0,32) x float"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "floaty",
        "float x float",
        "float x uint8",
        "int8 per_axis(0)",
        "int8 per_axis(0) x",
        "int8 per_axis(0) x int9",
        "int8 per_axis(0) x float32",
        "int8 x uint8",
        "int7 per_axis(0) x uint8",
        "int4:5 per_axis(0) x uint8",
        "int8 per_axis(0) xuint8",
        "int8 per_block(0,0) x float",
        "int8 per_axis(0) split(codebook,3,per_tensor)",
        "int8 per_axis(0) x float split(codebook,3,per_tensor)",
        "x uint8",
    ],
)
def test_what_is_no_choice(text):
    with pytest.raises(RecipeError):
        Choice.parse(text)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("float", 32),
        ("int8 per_axis(0) x uint8", 8),
        ("int8:7 per_axis(0) x uint8", 8),  # seven are used, eight are stored
        ("int4:3 per_tensor x float", 4),
        ("int2 per_block(0,32) x float", 2),
        ("uint2 per_axis(1) split(branches,3,per_tensor,zero) x uint8", 6),
        ("uint2 per_axis(1) split(codebook,3,per_tensor) x float", 4),
    ],
)
def test_bits_are_those_that_are_stored(text, bits):
    assert Choice.parse(text).bits == bits


# Legal forms on the CPU


def both(granularity, *widths):
    """Return the integer forms of a kernel, weight-only before integer ones."""
    return [f"int{b} {granularity} x {other}" for b in widths for other in ("float", "uint8")]


def every(granularity, *widths):
    """Return those forms with the ones that have zero points; an integer kernel takes 8 bits."""
    found = []
    for bits in widths:
        found += both(granularity, bits)
        found += [f"u{form}" for form in both(granularity, bits) if bits < 8 or "float" in form]
    return found


@pytest.mark.parametrize(
    ("body", "shape", "x", "granularity"),
    [
        ("y = Conv (x, w)", (8, 4, 3, 3), "float[n,4,h,h] x", "per_axis(0)"),
        ("y = Gemm (x, w)", (64, 8), "float[n,64] x", "per_axis(1)"),
        ("y = Gemm <transB = 1> (x, w)", (8, 64), "float[n,64] x", "per_axis(0)"),
        ("y = MatMul (x, w)", (48, 8), "float[n,48] x", "per_axis(1)"),
        ("y = MatMul (x, w)", (3, 64, 8), "float[3,n,64] x", "per_tensor"),
    ],
)
def test_forms_of_one_reader(body, shape, x, granularity):
    model = model_of(body, ("w", shape), x=x)
    assert legal(model) == [*every(granularity, 8, 4, 2), "float"]


@pytest.mark.parametrize(
    ("body", "shape", "x", "dtypes"),
    [
        ("y = Gather (w, i)", (8, 64), "int64[n] i", ("int",)),
        ("y = ConvTranspose (x, w)", (4, 8, 3, 3), "float[n,4,h,h] x", ("int", "uint")),
    ],
)
def test_ops_without_an_integer_kernel_have_weight_only_forms(body, shape, x, dtypes):
    axis = 0 if "Gather" in body else 1
    expected = [f"{d}{bits} per_axis({axis}) x float" for bits in (8, 4, 2) for d in dtypes]
    assert legal(model_of(body, ("w", shape), x=x)) == [*expected, "float"]


@pytest.mark.parametrize(
    ("inner", "blocks"), [(256, (128, 32)), (128, (128, 32)), (96, (32,)), (33, ()), (16, ())]
)
def test_blocks_are_for_matrices_whose_inner_axis_divides(inner, blocks):
    found = legal(model_of("y = MatMul (x, w)", ("w", (inner, 8))))
    expected = every("per_axis(1)", 8)
    for form in ("int4", "uint4", "int2", "uint2"):
        expected += [f"{form} per_axis(1) x {other}" for other in ("float", "uint8")]
        expected += [f"{form} per_block(0,{size}) x float" for size in blocks]
    expected.append("float")
    assert found == expected


def test_a_cpu_of_seven_bits():
    model = model_of("y = MatMul (x, w)", ("w", (16, 8)))
    found = legal(model, Cpu(isa="avx2").capability)
    assert found[:2] == ["int8:7 per_axis(1) x float", "int8:7 per_axis(1) x uint8"]
    assert found[2:] == ["uint8:7 per_axis(1) x float", *every("per_axis(1)", 4, 2), "float"]
    assert "int8 per_axis(1) x int8" in legal(model, Cpu(isa="arm64").capability)


@pytest.mark.parametrize("other", ["MatMul", "Gemm"])
def test_readers_along_two_axes_share_one_scale(other):
    body = f"a = {other} (x, w) y = Gemm <transB = 1> (a, w)"
    found = legal(model_of(body, ("w", (64, 64))))
    assert found == [*every("per_tensor", 8, 4, 2), "float"]


def test_readers_along_one_axis_keep_its_scales_and_blocks():
    found = legal(model_of("a = MatMul (x, w) y = MatMul (a, w)", ("w", (64, 64))))
    assert found == legal(model_of("y = MatMul (x, w)", ("w", (64, 64))))
    assert "int4 per_block(0,32) x float" in found
    # A Gemm has no blocks, so there are none in common.
    mixed = legal(model_of("a = MatMul (x, w) y = Gemm (a, w)", ("w", (64, 64))))
    assert mixed == [*every("per_axis(1)", 8, 4, 2), "float"]


def test_a_table_that_is_the_last_layer_too():
    """Rows of the table are channels of the layer: one scale a row serves both."""
    body = "e = Gather (w, i) y = Gemm <transB = 1> (e, w)"
    model = model_of(body, ("w", (100, 16)), x="int64[n] i")
    assert legal(model) == [*both("per_axis(0)", 8, 4, 2), "float"]
    turned = model_of("e = Gather (w, i) y = MatMul (e, w)", ("w", (16, 16)), x="int64[n] i")
    assert legal(turned) == [*both("per_tensor", 8, 4, 2), "float"]


def test_an_op_that_the_target_does_not_know_stays_float():
    conv = Capability("chip", (21, 21), (Legality("Conv", ("int8",), granularity=("per_axis",)),))
    model = model_of("y = MatMul (x, w)", ("w", (16, 8)))
    assert legal(model, conv) == ["float"]
    shared = model_of(
        "a = Conv (x, w) y = ConvTranspose (a, w)", ("w", (4, 4, 1, 1)), x="float[n,4,h,h] x"
    )
    assert legal(shared, conv) == ["float"]


def test_a_target_without_scales_for_channels():
    rows = (Legality("MatMul", ("int8", "int4"), granularity=("per_tensor",)),)
    chip = Capability("chip", (21, 21), rows)
    model = model_of("y = MatMul (x, w)", ("w", (16, 8)))
    assert legal(model, chip) == [
        "int8 per_tensor x uint8",
        "int4 per_tensor x uint8",
        "float",
    ]
    fine = Capability("chip", (21, 21), (replace(rows[0], granularity=("per_axis",)),))
    assert legal(model, fine)[0] == "int8 per_axis(1) x uint8"
    # Two readers along two axes need one scale, and this one has no form with one.
    two = model_of("a = MatMul (x, w) y = Gemm <transB = 1> (a, w)", ("w", (16, 16)))
    assert legal(two, fine) == ["float"]


def test_two_rows_that_give_the_same_form_give_it_once():
    rows = tuple(Legality("MatMul", ("int8",), granularity=("per_axis",)) for _ in range(2))
    model = model_of("y = MatMul (x, w)", ("w", (16, 8)))
    assert legal(model, Capability("chip", (21, 21), rows)) == [
        "int8 per_axis(1) x uint8",
        "float",
    ]


def test_every_legal_choice_is_one_that_the_capability_takes(zoo):
    for make in zoo.values():
        for value in weights_of(make()):
            readers = readers_of(value)
            *forms, last = legal_choices(readers, CPU)
            assert last == Choice()
            assert [c.bits for c in forms] == sorted((c.bits for c in forms), reverse=True)
            assert len(set(forms)) == len(forms) > 0
            for choice in forms:
                assert Choice.parse(str(choice)) == choice
                for reader in readers:
                    op_type = reader.node.op_type
                    assert CPU.legal(op_type, choice.format, choice.activation), str(choice)


# Open weights

TABLE = model_of(
    """e = Gather (table, i) a = MatMul (e, w) b = Gemm <transB = 1> (a, v) y = Mul (b, k)""",
    ("table", (50, 64)),
    ("w", (64, 32)),
    ("v", (16, 32)),
    ("k", (4, 16)),
    x="int64[n] i",
)


def opened(widths, activations, capability=CPU, affine=False):
    return {
        one.name: [str(choice) for choice in one.choices]
        for one in open_weights(TABLE, capability, widths, activations, affine)
    }


@pytest.mark.parametrize("activations", ["auto", "static", "dynamic"])
def test_integer_kernels_are_open_where_there_are_any(activations):
    assert opened((8, 4, 2), activations) == {
        "table": [f"int{bits} per_axis(0) x float" for bits in (8, 4, 2)],
        "w": [f"int{bits} per_axis(1) x uint8" for bits in (8, 4, 2)],
        "v": [f"int{bits} per_axis(0) x uint8" for bits in (8, 4, 2)],
    }


def test_weights_only_has_no_blocks():
    assert opened((4, 32), "float") == {
        "table": ["int4 per_axis(0) x float", "float"],
        "w": ["int4 per_axis(1) x float", "float"],
        "v": ["int4 per_axis(0) x float", "float"],
    }


def test_any_kernel():
    found = opened((8, 4, 32), "any")
    assert found["table"] == ["int8 per_axis(0) x float", "int4 per_axis(0) x float", "float"]
    assert found["w"][-1] == "float"
    assert set(found["w"]) == {
        "float",
        *both("per_axis(1)", 8, 4),
        "int4 per_block(0,32) x float",
    }


def test_zero_points_where_they_are_asked_for_and_there_are_any():
    """Eight bits have none, and an embedding has none."""
    assert opened((8, 4, 2), "auto", affine=True) == {
        "table": [f"int{bits} per_axis(0) x float" for bits in (8, 4, 2)],
        "w": [f"{form} per_axis(1) x uint8" for form in ("int8", "uint4", "uint2")],
        "v": [f"{form} per_axis(0) x uint8" for form in ("int8", "uint4", "uint2")],
    }
    assert opened((8, 4, 32), "float", affine=True)["w"] == [
        "int8 per_axis(1) x float",
        "uint4 per_axis(1) x float",
        "float",
    ]
    assert set(opened((4, 32), "any", affine=True)["w"]) == {
        "float",
        "uint4 per_axis(1) x float",
        "uint4 per_axis(1) x uint8",
        "uint4 per_block(0,32) x float",
    }


def test_a_width_has_zero_points_or_none():
    choices = [
        Choice.parse(text)
        for text in (
            "int8 per_axis(1) x uint8",
            "uint8 per_axis(1) x float",
            "int4 per_axis(1) x float",
            "int4 per_axis(1) x uint8",
            "uint4 per_axis(1) x float",
            "int2 per_axis(1) x float",
            "float",
        )
    ]
    signed = [c for c in choices if not str(c).startswith("u")]
    assert with_zero_points(choices, affine=False) == signed
    found = [str(c) for c in with_zero_points(choices, affine=True)]
    assert found == [  # no form with zero points: the signed one stays
        "int8 per_axis(1) x uint8",
        "int4 per_axis(1) x uint8",
        "uint4 per_axis(1) x float",
        "int2 per_axis(1) x float",
        "float",
    ]
    assert with_zero_points([Choice()], affine=True) == [Choice()]


def test_the_widths_that_are_asked_for():
    assert opened((4,), "auto")["w"] == ["int4 per_axis(1) x uint8"]
    assert opened((8, 32), "auto")["w"] == ["int8 per_axis(1) x uint8", "float"]
    assert opened((2, 8), "auto")["w"] == opened((8, 2), "auto")["w"]  # the widest first, always
    assert opened((), "auto") == {}
    assert opened((32,), "auto") == {}  # float alone is no choice
    assert opened((16,), "any") == {}


def test_open_weights_are_in_graph_order_and_know_themselves():
    found = open_weights(TABLE, CPU, (8,), "auto")
    assert [one.name for one in found] == ["table", "w", "v"]
    assert [one.elements for one in found] == [50 * 64, 64 * 32, 16 * 32]
    assert [one.readers[0].node.op_type for one in found] == ["Gather", "MatMul", "Gemm"]
    assert all(one.value is TABLE.graph.initializers[one.name] for one in found)


def test_a_shared_weight_is_open_once():
    model = model_of("a = MatMul (x, w) y = Gemm <transB = 1> (a, w)", ("w", (64, 64)))
    (one,) = open_weights(model, CPU, (8, 4), "auto")
    assert [str(choice) for choice in one.choices] == [
        "int8 per_tensor x uint8",
        "int4 per_tensor x uint8",
    ]
    assert [reader.axis for reader in one.readers] == [1, 0]


def test_allowed_keeps_the_order():
    every = legal_choices(
        readers_of(model_of("y = MatMul (x, w)", ("w", (64, 8))).graph.initializers["w"]), CPU
    )
    for activations in ("auto", "static", "dynamic", "float", "any"):
        kept = allowed(every, activations)
        assert kept == [choice for choice in every if choice in kept]
        assert Choice() in kept
    assert allowed(every, "any") == list(every)
