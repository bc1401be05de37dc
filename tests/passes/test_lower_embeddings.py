import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.lower_embeddings import LowerEmbeddings

HEADER = '<ir_version: 13, opset_import: ["" : 25]>'
TABLE = "int8[3,2] t = {1, 2, 3, 4, 5, 6}"
SCALE = "float[3] s = {0.5, 1, 2}"
ZERO = "int8[3] z = {0, 0, 0}"
BEFORE = f"""{HEADER} g (int64[n] ids) => (float[n,2] y) <{TABLE}, {SCALE}, {ZERO}> {{
    w = DequantizeLinear <axis = 0> (t, s, z)
    y = Gather (w, ids)
}}"""
AFTER = f"""{HEADER} g (int64[n] ids) => (float[n,2] y)
<{TABLE}, float[3,1] s = {{0.5, 1, 2}}> {{
    c = Gather (t, ids)
    f = Cast <to = 1> (c)
    r = Gather (s, ids)
    y = Mul (f, r)
}}"""
RECIPE = 'assign-bits{weights=%d activations="float"},round-weights,lower-embeddings'


def test_codes_are_gathered_and_only_the_found_rows_rescaled(becomes, context, parse, outputs):
    model = becomes(LowerEmbeddings(), BEFORE, AFTER)
    becomes(LowerEmbeddings(), BEFORE.replace(f", {ZERO}", "").replace(", z)", ")"), AFTER)
    assert LowerEmbeddings().run(model, context) == 0
    ids = np.array([2, 0, -1, 1])
    expected = outputs(parse(BEFORE), plain=True, ids=ids)["y"]
    assert outputs(model, ids=ids)["y"].tobytes() == expected.tobytes()


def test_ids_of_any_rank_and_tables_of_any_rank(context, parse, outputs):
    text = f"""{HEADER} g (int64[2,2] ids) => (float[2,2,2,1] y)
    <int8[3,2,1] t = {{1, 2, 3, 4, 5, 6}}, {SCALE}> {{
        w = DequantizeLinear <axis = 0> (t, s)
        y = Gather (w, ids)
    }}"""
    model = parse(text)
    assert LowerEmbeddings().run(model, context) == 1
    ids = np.array([[2, 0], [1, 1]])
    expected = outputs(parse(text), plain=True, ids=ids)["y"]
    np.testing.assert_array_equal(outputs(model, ids=ids)["y"], expected)


def test_a_table_that_is_also_a_weight_keeps_its_dequantizer(context, parse, outputs):
    text = f"""{HEADER} g (int64[n] ids, float[n,2] x) => (float[n,2] y, float[n,3] z)
    <{TABLE}, {SCALE}> {{
        w = DequantizeLinear <axis = 0> (t, s)
        y = Gather (w, ids)
        v = Transpose (w)
        z = MatMul (x, v)
    }}"""
    model = parse(text)
    assert LowerEmbeddings().run(model, context) == 1
    assert "DequantizeLinear" in [n.op_type for n in model.graph]
    feeds = {"ids": np.array([0, 2]), "x": np.ones((2, 2), np.float32)}
    expected, got = (outputs(m, **feeds) for m in (parse(text), model))
    for name in "yz":
        np.testing.assert_array_equal(got[name], expected[name])


ALONE = {
    "a float table": BEFORE.replace(f"{TABLE}, {SCALE}, {ZERO}", "float[3,2] w = {1,2,3,4,5,6}"
    ).replace("w = DequantizeLinear <axis = 0> (t, s, z)", ""),
    "scales of columns": BEFORE.replace("axis = 0", "axis = 1").replace(
        SCALE, "float[2] s = {0.5, 1}").replace(ZERO, "int8[2] z = {0, 0}"),
    "one scale": BEFORE.replace(SCALE, "float s = {0.5}").replace(ZERO, "int8 z = {0}").replace(
        "<axis = 0>", ""),
    "columns that are looked up": BEFORE.replace("Gather (", "Gather <axis = 1> (").replace(
        "float[n,2]", "float[3,n]"),
    "a table with a zero point": BEFORE.replace(ZERO, "int8[3] z = {0, 1, 0}"),
    "a table in blocks": BEFORE.replace("axis = 0", "axis = 0, block_size = 3").replace(
        SCALE, "float[1,2] s = {0.5, 1}").replace(ZERO, "int8[1,2] z = {0, 0}"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_it_leaves_alone(name, becomes):
    becomes(LowerEmbeddings(), ALONE[name], ALONE[name])


def embedding(rows=50, width=8):
    text = f"{HEADER} g (int64[n] ids, float[{rows},{width}] w) => (float[n,{width}] y)"
    model = ir.from_onnx_text(f"{text} {{ y = Gather (w, ids) }}")
    value = model.graph.inputs[1]
    array = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    value.const_value = ir.tensor(array, name="w")
    model.graph.inputs.remove(value)
    model.graph.register_initializer(value)
    return model, array


@pytest.mark.parametrize(("bits", "dtype"), [(8, "INT8"), (4, "INT4"), (2, "INT2")])
def test_a_table_of_any_width_is_looked_up_in_codes(bits, dtype, context, outputs, optimized):
    source, array = embedding()
    model, rows = run(Recipe.parse(RECIPE % bits), source, context)
    assert rows[-1].changed == 1
    assert rows[-1].lost_notes == ()
    assert model.graph.initializers["w_quantized"].dtype == ir.DataType[dtype]
    assert "w" not in model.graph.initializers
    ids = np.arange(len(array))
    got = outputs(model, ids=ids)["y"]
    step = np.abs(array).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    # Clipping below four bits may cost the largest elements more than half a step.
    assert np.mean(np.abs(got - array) <= step / 2 + 1e-6) > (0.99 if bits >= 4 else 0.5)
    graph = optimized(model)
    assert "DequantizeLinear" not in [n.op_type for n in graph.node]
    look_up = next(n for n in graph.node if n.op_type == "Gather")
    table = next(t for t in graph.initializer if t.name == look_up.input[0])
    assert table.data_type in (ir.DataType.INT8, ir.DataType.FLOAT)
    codes = [t for t in graph.initializer if list(t.dims) == list(array.shape)]
    assert [t.data_type for t in codes] == [ir.DataType.INT8]  # no table in float
