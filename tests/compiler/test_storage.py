"""Stored bits of a weight are those of the file: codes, tables, scales, and nothing twice."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler import notes
from fourfold.compiler.constants import add
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.formats import Format, PerAxis
from fourfold.compiler.model import load
from fourfold.compiler.precision import Precision
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.compiler.split_plan import SplitWish
from fourfold.compiler.storage import Stored, stored_bits
from fourfold.targets.cpu import Cpu

CPU = Cpu(isa="vnni")
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
BEHIND = (
    "insert-qdq,round-weights,quantize-biases,pad-codes,lower-embeddings,"
    "unpack-weights,pack-tables"
)


def layers(*shapes):
    """Return a model of MatMuls one behind the other, w0, w1, ..., of normal numbers."""
    sizes = [",".join(map(str, shape)) for shape in shapes]
    weights = ", ".join(f"float[{size}] w{n}" for n, size in enumerate(sizes))
    nodes = [
        f"[n{n}] h{n + 1} = MatMul ({f'h{n}' if n else 'x'}, w{n})" for n in range(len(shapes))
    ]
    x, y = f"float[n,{shapes[0][0]}] x", f"float[n,{shapes[-1][1]}] h{len(shapes)}"
    text = f"{HEADER} g ({x}, {weights}) => ({y})"
    return filled(ir.from_onnx_text(f"{text} {{ {' '.join(nodes)} }}"))


def filled(model):
    """Make normal numbers of every graph input but the first."""
    draw = np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        array = draw.normal(0, 1, value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def compiled(model, context, first, behind=BEHIND, opset=25):
    """Return what a recipe makes of a model."""
    text = f"tidy{{opset={opset}}},{first},{behind}".rstrip(",")
    return run(Recipe.parse(text), model, context)[0]


def in_bits(model, *names):
    """Return the bits of initializers as the file has them."""
    sizes = {t.name: 8 * len(t.raw_data) for t in ir.to_proto(model).graph.initializer}
    return sum(sizes[name] for name in names)


# One form at a time, by hand


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("inner", [16, 64])
def test_codes_and_a_scale_a_channel(bits, inner, context):
    options = f'assign-bits{{weights={bits} activations="float"}}'
    found = stored_bits(compiled(layers((inner, 8)), context, options))
    assert found == Stored(bits, 0, 32 / inner)
    assert found.total == bits + 32 / inner


def test_seven_bits_take_eight(context):
    made = compiled(layers((16, 8)), context, 'assign-bits{weights=7 activations="float"}')
    assert stored_bits(made).codes == 8


def test_zero_points_are_scales_too(context):
    """They are stored in the type of the codes, one a channel."""
    options = 'assign-bits{weights=4 activations="float" affine=true}'
    made = compiled(layers((32, 8)), context, options)
    assert stored_bits(made) == Stored(4, 0, (32 + 4) / 32)
    options = 'assign-bits{weights=4 activations="float" affine=true block=32}'
    blocked = compiled(layers((64, 8)), context, options)
    assert stored_bits(blocked) == Stored(4, 0, (32 + 4) / 32)


def test_zero_points_that_weights_share_are_counted_once(context):
    """Of two weights of one shape; each has scales of its own."""
    first = 'assign-bits{weights=8 activations="float"}'
    made = compiled(layers((8, 8), (8, 8)), context, first, "round-weights")
    assert "zero_point_int8_8" in made.graph.initializers
    assert stored_bits(made) == Stored(8, 0, (2 * 32 * 8 + 8 * 8) / 128)
    alone = compiled(layers((8, 8)), context, first, "round-weights")
    assert stored_bits(alone) == Stored(8, 0, (32 * 8 + 8 * 8) / 64)


def test_weights_of_different_widths_are_averaged_by_their_elements(context):
    model = layers((16, 8), (8, 32))
    notes.apply_plan(
        model,
        {
            "w0": {"format": "int8 per_tensor", "mode": "static"},
            "w1": {"format": "int2 per_tensor", "mode": "static"},
        },
    )
    made = compiled(model, context, "tidy", "round-weights,unpack-weights")
    assert stored_bits(made) == Stored((8 * 128 + 2 * 256) / 384, 0, 64 / 384)


def test_float_weights_do_not_count(context):
    first = 'assign-bits{weights=4 activations="float" keep=["n0"]}'
    assert stored_bits(compiled(layers((64, 64), (64, 8)), context, first)) == Stored(4, 0, 0.5)


def test_branches_count_over_the_elements_of_their_weight(context):
    """Three sets of codes, of scales, and of zero points where they are not zero."""
    first = 'assign-bits{weights=2 activations="float" split="branches"},split-layers'
    made = compiled(layers((64, 8)), context, first)
    assert len([n for n in made.graph if n.op_type == "MatMul"]) == 3
    found = stored_bits(made)
    shifted = [name for name in made.graph.initializers if "zero_point" in name]
    assert 1 <= len(shifted) <= 3
    assert found == Stored(6, 0, (3 * 32 + len(shifted) * 2) / 64)


def test_a_table_of_each_channel(context):
    first = 'assign-bits{weights=2 activations="float" split="codebook" over="channel"}'
    made = compiled(layers((128, 8)), context, first + ",split-layers")
    (table,) = [v for name, v in made.graph.initializers.items() if name.endswith("_table")]
    channels, entries = table.const_value.shape.numpy()
    assert channels == 8
    assert 9 <= entries <= 12
    # What brings [channels, n] into the weight's shape is two whole numbers.
    assert stored_bits(made) == Stored(4, 32 * entries / 128, 2 * 64 / 1024)


def test_a_table_for_all(context):
    first = 'assign-bits{weights=4 activations="float" split="codebook" clusters=16 levels=1}'
    made = compiled(layers((128, 8)), context, first + ",split-layers")
    assert stored_bits(made) == Stored(4, 16 * 32 / 1024, 0)


def test_a_table_on_the_grid_has_scales_too(context):
    first = 'assign-bits{weights=4 activations="float" split="int8-grid" clusters=16 levels=1}'
    model = layers((128, 8))
    model.graph.initializers["w0"].const_value = ir.tensor(
        np.random.default_rng(0).choice([-1, -0.5, 0.25, 1], (128, 8)).astype(np.float32)
    )
    made = compiled(model, context, first + ",split-layers")
    index, table = (made.graph.initializers[f"w0_quantized_{n}"] for n in ("index", "table"))
    assert (index.dtype, table.const_value.size) == (ir.DataType.UINT2, 4)
    assert stored_bits(made) == Stored(2, 4 * 8 / 1024, 32 / 128)


def test_blocks_of_the_nearest_form(context):
    first = 'assign-bits{weights=2 activations="float" split="nearest"},split-layers'
    made = compiled(layers((64, 8)), context, first)
    scales = in_bits(made, "w0_scale", "zero_point_int4_2x8")
    assert stored_bits(made) == Stored(4, 0, scales / 512)


def test_a_weight_that_no_table_makes_smaller_is_what_it_is(context):
    first = 'assign-bits{weights=2 activations="float" split="int8-grid" over="channel"}'
    made = compiled(layers((4, 8)), context, first + ",split-layers")
    assert stored_bits(made) == Stored(8, 0, 32 / 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_an_embedding_have_scales(bits, context):
    """They are looked up beside the codes, not folded into them."""
    text = f"{HEADER} g (int64[n] x, float[50,16] table) => (float[n,16] y)"
    model = filled(ir.from_onnx_text(f"{text} {{ y = Gather (table, x) }}"))
    made = compiled(model, context, f'assign-bits{{weights={bits} activations="float"}}')
    assert [n.op_type for n in made.graph].count("Gather") == 2
    assert stored_bits(made) == Stored(bits, 0, 32 / 16)


def test_an_embedding_of_indices_has_tables_and_scales(context):
    text = f"{HEADER} g (int64[n] x, float[50,64] table) => (float[n,64] y)"
    model = filled(ir.from_onnx_text(f"{text} {{ y = Gather (table, x) }}"))
    first = 'assign-bits{weights=2 activations="float" split="int8-grid" over="channel"}'
    made = compiled(model, context, first + ",split-layers")
    assert "table_quantized_index" in made.graph.initializers
    entries = made.graph.initializers["table_quantized_table"].const_value.shape[1]
    # A scale a row, and two whole numbers for the shape.
    scales = (50 * 32 + 2 * 64) / (50 * 64)
    assert stored_bits(made) == Stored(4, 8 * entries / 64, scales)


def test_a_table_that_is_the_last_layer_too_counts_once(context):
    text = f"{HEADER} g (int64[n] x, float[50,16] table) => (float[n,50] y)"
    body = "{ e = Gather (table, x) y = Gemm <transB = 1> (e, table) }"
    model = filled(ir.from_onnx_text(f"{text} {body}"))
    made = compiled(model, context, 'assign-bits{weights=8 activations="float"}')
    # One set of scales spread for the layer, and one for the rows.
    assert stored_bits(made) == Stored(8, 0, 2 * 32 / 16)


def test_a_model_without_quantized_weights(zoo, context):
    for make in zoo.values():
        assert stored_bits(make()) is None
    made = compiled(layers((16, 8)), context, 'split-layers{form="branches"}', "")
    assert len([n for n in made.graph if n.op_type == "MatMul"]) == 3
    assert stored_bits(made) is None  # branches of floats


def test_the_model_is_not_touched(context):
    made = compiled(layers((64, 8)), context, 'assign-bits{weights=4 activations="float"}')
    before = str(made.graph)
    assert stored_bits(made) == stored_bits(made)
    assert str(made.graph) == before


def test_a_very_deep_model():
    """Three thousand nodes, each behind the other, and all behind one weight."""
    x = ir.val("x", ir.DataType.FLOAT, [2, 2])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="deep")
    codes = add(graph, "codes", np.ones((2, 2), np.int8))
    notes.write(codes, format=Format("int8"), mode="static")
    stored = ir.node("DequantizeLinear", [codes, add(graph, "scale", np.float32(1))])
    graph.append(stored)
    last = x
    for _ in range(3000):
        graph.append(ir.node("MatMul", [last, stored.outputs[0]]))
        last = graph[-1].outputs[0]
    graph.outputs.append(last)
    assert stored_bits(ir.Model(graph, ir_version=10)) == Stored(8, 0, 8)


def test_what_computes_on_activations_is_not_counted():
    """A constant that meets the layer's output is no part of the weight."""
    text = f"""{HEADER} g (float[n,4] x) => (float[n,2] y)
    <int8[4,2] codes = {{1,2,3,4,5,6,7,8}}, float scale = {{0.5}}, float[2] bias = {{1,2}},
     float[2] other = {{1,2}}, float low = {{0}}> {{
        w = DequantizeLinear (codes, scale)
        h = MatMul (x, w)
        b = Add (bias, other)
        s = Add (h, b)
        y = Max (s, low)
    }}"""
    model = ir.from_onnx_text(text)
    assert stored_bits(model) is None
    codes = model.graph.initializers["codes"]
    notes.write(codes, format=Format("int8", PerAxis(1)), mode="static")
    assert stored_bits(model) == Stored(8, 0, 32 / 8)


# Whole models against the file

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"


@cache
def digits():
    return load(DIGITS / "digits.onnx")


WANTED = [
    ("w8a8", None),
    ("w4a8", None),
    ("w4", None),
    ("w2", "branches"),
    ("w2a8", "branches"),
    ("w2a8", "auto"),
    ("w2", "codebook,3,channel"),
    ("w4a8", "int8-grid,16,channel,levels=1"),
]


@pytest.mark.parametrize(("precision", "split"), WANTED)
def test_digits_against_the_file(precision, split, context):
    """All that belongs to a weight by its name, and nothing of biases and activations."""
    model = digits()
    feeds = Feeds.read(dict(np.load(DIGITS / "calib.npz")), input_specs(model))
    wish = SplitWish.parse(split) if split else None
    wanted = Precision.parse(precision).model_copy(update={"split": wish})
    made, _ = run(CPU.recipe(wanted), model, replace(context, feeds=feeds))
    names = [str(name) for name in made.graph.initializers]
    shared = {f"zero_point_{t}" for t in ("int8", "int4", "int2", "uint4", "uint2")}
    own = [
        name
        for name in names
        if (".weight" in name and "bias" not in name) or name.rpartition("_")[0] in shared
    ]
    weights = [v for v in model.graph.initializers.values() if len(v.shape) > 1]
    elements = sum(math.prod(v.shape.numpy()) for v in weights)
    found = stored_bits(made)
    assert found.total * elements == pytest.approx(in_bits(made, *own))
    tables = [name for name in names if name.endswith("_table")]
    assert found.tables * elements == pytest.approx(in_bits(made, *tables))
    codes = [
        n for n in names if n.endswith(("_quantized", "_index", "_folded")) and "bias" not in n
    ]
    assert found.codes * elements == pytest.approx(in_bits(made, *codes))
