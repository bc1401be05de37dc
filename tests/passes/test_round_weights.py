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
from fourfold.compiler.capability import Capability
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.formats import Format, PerAxis, PerBlock, PerTensor
from fourfold.compiler.quantizers import affine_parameters
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.round_weights import RoundWeights
from fourfold.targets.cpu import Cpu

ANY = Context(Capability("any", (21, 25), ()), Path())
HEADER = '<ir_version: 13, opset_import: ["" : 25]>'


def matmul(array, format="int8 per_axis(1)", node="[one] y = MatMul (x, w)", outs="y", b=None):
    """Return a model around one planned weight."""
    rows, columns = array.shape
    biased = "" if b is None else f", float[{b.size}] b"
    outputs = ", ".join(f"float[n,m] {name}" for name in outs)
    text = f"{HEADER} g (float[n,{rows}] x, float[{rows},{columns}] w{biased})"
    model = ir.from_onnx_text(f"{text} => ({outputs}) {{ {node} }}")
    for value, data in zip(list(model.graph.inputs)[1:], (array, b), strict=False):
        value.const_value = ir.tensor(data, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    notes.apply_plan(model, {"w": {"format": format, "mode": "static"}})
    return model


def stored(model, name="w"):
    """Return (codes, scale, what they stand for) of a rounded weight."""
    source = next(n for n in model.graph if n.name == f"{name}_DequantizeLinear")
    codes, scale, zero = (v.const_value.numpy() for v in source.inputs)
    assert not np.any(zero.astype(np.int32))
    shape = [-1 if i == source.attributes.get_int("axis", 1) else 1 for i in range(codes.ndim)]
    spread = scale.reshape(shape) if scale.ndim == 1 else scale
    return codes.astype(np.int32), scale, codes.astype(np.float32) * spread


def test_a_weight_becomes_codes_and_their_scale(becomes, context):
    model = matmul(np.float32([[127, -2], [-63.5, 1]]))
    after = becomes(
        RoundWeights(),
        model,
        f"""{HEADER} g (float[n,2] x) => (float[n,m] y)
        <int8[2,2] w = {{127, -127, -64, 64}}, float[2] s = {{1, 0.015748032}},
         int8[2] z = {{0, 0}}> {{
            d = DequantizeLinear <axis = 1> (w, s, z)
            y = MatMul (x, d)
        }}""",
    )
    assert [r.reason for r in context.remarks] == []
    assert RoundWeights().run(after, context) == 0


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2"])
def test_the_container_is_the_one_of_the_plan(dtype, context):
    model = matmul(np.float32([[1, -2], [-1, 2]]), f"{dtype} per_axis(1)")
    RoundWeights().run(model, context)
    value = model.graph.initializers["w_quantized"]
    assert value.dtype == Format(dtype).onnx_type
    codes, _, _ = stored(model)
    assert np.abs(codes).max() == Format(dtype).limit  # the restricted range: no -128


def test_per_tensor_and_a_group_of_zeros(context):
    model = matmul(np.float32([[4, 0], [-1, 0]]), "int4 per_tensor")
    RoundWeights().run(model, context)
    codes, scale, _ = stored(model)
    assert scale.shape == ()
    assert codes.tolist() == [[7, 0], [-2, 0]]
    model = matmul(np.float32([[4, 0], [-1, 0]]), "int4 per_axis(1)")
    RoundWeights().run(model, context)
    assert stored(model)[1][1] == 1.0


def test_a_weight_of_blocks_runs(context, outputs):
    array = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    model = matmul(array, "int4 per_block(0,4)")
    RoundWeights().run(model, context)
    scale = model.graph.initializers["w_scale"].const_value.numpy()
    assert scale.shape == (2, 3)
    image = outputs(model, plain=True, x=np.eye(8, dtype=np.float32))["y"]
    # Within half a step of each block: 1e-5 for the rounding of the product itself.
    assert np.all(np.abs(image - array) <= np.repeat(scale, 4, axis=0) / 2 + 1e-5)


def test_what_is_not_planned_stays(becomes, context):
    text = f"""{HEADER} g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {{
        y = MatMul (x, w)
    }}"""
    becomes(RoundWeights(), text, text)
    model = matmul(np.float32([[1, 2]]))
    notes.write(next(iter(model.graph.initializers.values())), mode="float")
    assert RoundWeights().run(model, context) == 0


def test_a_shared_weight_is_rounded_once(context, outputs):
    array = np.float32([[1, -2], [3, 4]])
    nodes = "[one] a = MatMul (x, w) [two] y = MatMul (a, w)"
    model = matmul(array, "int8 per_tensor", nodes)
    assert RoundWeights().run(model, context) == 1
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "MatMul", "MatMul"]
    assert set(model.graph.initializers) == {"w_quantized", "w_scale", "zero_point_int8_scalar"}
    assert RoundWeights().run(model, context) == 0
    _, _, image = stored(model)
    x = np.float32([[1, 2]])
    np.testing.assert_allclose(outputs(model, plain=True, x=x)["y"], x @ image @ image, rtol=1e-5)


def test_the_note_moves_to_the_codes(context):
    model = matmul(np.float32([[1, -2]]))
    after, rows = run(Recipe((RoundWeights(),)), model, context)
    assert (rows[0].changed, rows[0].lost_notes) == (1, ())
    assert list(notes.plan(after)) == ["w_quantized"]
    assert notes.plan(after)["w_quantized"] == notes.plan(model)["w"]


FLOATS = st.floats(-1e3, 1e3, width=32)
MATRICES = arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=FLOATS)
# Below this float32 has few digits left (the scale's floor is 2**-100); no weight is that small.
NORMAL = MATRICES.map(lambda a: np.where(np.abs(a) < 1e-12, np.float32(0), a))
WIDTHS = st.sampled_from(["int8", "int8:7", "int8:5", "int4", "int4:3", "int2"])
GROUPS = st.sampled_from([PerAxis(0), PerAxis(1), PerTensor(), PerBlock(0, 2)])


def rounded(array, format, clip):
    """Return (the weight after rounding, the scale spread over it, the codes)."""
    model = matmul(array, str(format))
    assert RoundWeights(clip=clip).run(model, ANY) == 1
    scale = model.graph.initializers["w_scale"].const_value.numpy()
    codes = model.graph.initializers["w_quantized"].const_value.numpy().astype(np.float32)
    match format.granularity:
        case PerBlock(axis, size):
            scale = np.repeat(scale, size, axis=axis)[: array.shape[0]]
        case PerAxis(0):
            scale = scale[:, None]
    return codes * scale, np.broadcast_to(scale, array.shape), codes


@settings(max_examples=60, deadline=None)
@given(array=NORMAL, dtype=WIDTHS, granularity=GROUPS)
def test_minmax_is_within_half_a_step_and_keeps_zero(array, dtype, granularity):
    name, _, bits = dtype.partition(":")
    format = Format(name, granularity, int(bits or 0))
    image, scale, codes = rounded(array, format, "minmax")
    assert np.all(np.abs(image - array) <= scale * 0.5 * (1 + 1e-5))
    assert np.all(codes[array == 0] == 0)
    assert np.abs(codes).max() <= format.limit


@settings(max_examples=40, deadline=None)
@given(array=NORMAL, dtype=WIDTHS, granularity=GROUPS)
def test_mse_is_never_worse_than_minmax_in_any_group(array, dtype, granularity):
    name, _, bits = dtype.partition(":")
    format = Format(name, granularity, int(bits or 0))
    errors = []
    for clip in ("mse", "minmax"):
        miss = np.square((rounded(array, format, clip)[0] - array).astype(np.float64))
        match granularity:
            case PerAxis(axis):
                errors.append(miss.sum(axis=1 - axis))
            case PerBlock(axis, size):
                errors.append(np.add.reduceat(miss, np.arange(0, len(miss), size), axis=axis))
            case _:
                errors.append(miss.sum())
    # 1e-5: the pass compares sums in float32.
    assert np.all(errors[0] <= errors[1] * (1 + 1e-5))


def test_auto_clips_only_below_four_bits(context):
    array = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)
    for dtype, clip in (("int4", "minmax"), ("int4:3", "mse"), ("int2", "mse")):
        found = {}
        for option in ("auto", "minmax", "mse"):
            model = matmul(array, f"{dtype} per_axis(1)")
            RoundWeights(clip=option).run(model, context)
            found[option] = stored(model)[1].tolist()
        assert found["minmax"] != found["mse"]
        assert found["auto"] == found[clip], dtype


def test_the_scale_of_a_tiny_channel_grows_until_its_bias_fits(context):
    array, bias = np.float32([[1e-12, 1], [1e-13, 1]]), np.float32([100, 1])
    model = matmul(array, "int8 per_axis(1)", "[one] y = Gemm (x, w, b)", b=bias)
    planned = {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 1.0}
    notes.apply_plan(model, {"x": planned})
    RoundWeights().run(model, context)
    scale = stored(model)[1]
    x_scale, _ = affine_parameters(-1, 1, Format("uint8"))
    assert np.all(np.abs(bias) / (x_scale * scale.astype(np.float64)) < 2**31 - 1)
    assert scale[1] == np.float32(1 / 127)  # the ordinary channel keeps its own


def test_the_bias_of_every_reader_of_a_shared_weight_fits(context):
    array = np.float32([[1e-12, 1], [1e-13, 1]])
    nodes = "[one] y = MatMul (x, w) [two] z = Gemm (x, w, b)"
    model = matmul(array, "int8 per_axis(1)", nodes, outs="yz", b=np.float32([100, 1]))
    planned = {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 1.0}
    notes.apply_plan(model, {"x": planned})
    RoundWeights().run(model, context)
    x_scale, _ = affine_parameters(-1, 1, Format("uint8"))
    assert 100 / (x_scale * float(stored(model)[1][0])) < 2**31 - 1


def test_a_gemm_whose_bias_is_a_matrix(context):
    text = f"""{HEADER} g (float[3,2] x) => (float[3,2] y)
    <float[2,2] w = {{1, 2, 3, 4}}, float[3,2] b = {{1, 2, 3, 4, 5, 6}}> {{
        [one] y = Gemm (x, w, b)
    }}"""
    model = ir.from_onnx_text(text)
    planned = {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 1.0}
    notes.apply_plan(model, {"x": planned, "w": {"format": "int8 per_axis(1)", "mode": "static"}})
    assert RoundWeights().run(model, context) == 1
    assert stored(model)[1].tolist() == [np.float32(3 / 127), np.float32(4 / 127)]


def test_a_weight_that_another_node_reads_first_is_made_before_that(context, outputs):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    tied (int64[2] x) => (float[2,3] y)
    <float[3,2] table = {1, 2, 3, 4, 5, 6}> {
        t = Transpose (table)
        e = Gather (table, x)
        y = MatMul (e, t)
    }"""
    model = ir.from_onnx_text(text)
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
    ShapeInferencePass()(model)
    table = model.graph.initializers["table"]
    notes.write(table, format=Format("int8", PerAxis(0)), mode="static")
    expected = outputs(model, x=np.array([0, 2]))
    after, _ = run(Recipe((RoundWeights(),)), model, context)
    got = outputs(after, x=np.array([0, 2]))
    np.testing.assert_allclose(got["y"], expected["y"], rtol=0.02)
    assert next(node.op_type for node in after.graph) == "DequantizeLinear"


# Unsigned formats: with zero points


def affine(model, name="w"):
    """Return (codes, scale, zero points) of a rounded weight, spread over it, as float32."""
    source = next(n for n in model.graph if n.name == f"{name}_DequantizeLinear")
    codes, scale, zero = (v.const_value.numpy().astype(np.float32) for v in source.inputs)
    assert source.inputs[2].dtype == source.inputs[0].dtype
    size = source.attributes.get_int("block_size", 0)
    if size:
        axis = source.attributes.get_int("axis", 1)
        some = [
            np.repeat(a, size, axis).take(range(codes.shape[axis]), axis) for a in (scale, zero)
        ]
        return codes, *some
    if scale.ndim:
        shape = [-1 if i == source.attributes.get_int("axis", 1) else 1 for i in range(codes.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return codes, *(np.broadcast_to(a, codes.shape) for a in (scale, zero))


def test_an_unsigned_weight_becomes_codes_a_scale_and_zero_points(becomes, context):
    model = matmul(np.float32([[0, -1], [255, 254], [2, 0]]), "uint8 per_axis(1)")
    after = becomes(
        RoundWeights(),
        model,
        f"""{HEADER} g (float[n,3] x) => (float[n,m] y)
        <uint8[3,2] w = {{0, 0, 255, 255, 2, 1}}, float[2] s = {{1, 1}},
         uint8[2] z = {{0, 1}}> {{
            d = DequantizeLinear <axis = 1> (w, s, z)
            y = MatMul (x, d)
        }}""",
    )
    assert RoundWeights().run(after, context) == 0


@pytest.mark.parametrize("dtype", ["uint4", "uint2"])
@pytest.mark.parametrize("granularity", ["per_axis(1)", "per_axis(0)", "per_tensor"])
def test_zero_points_are_stored_as_narrow_as_codes(dtype, granularity, context, outputs):
    array = np.random.default_rng(2).normal(1, 1, size=(8, 4)).astype(np.float32)
    model = matmul(array, f"{dtype} {granularity}")
    RoundWeights(clip="minmax").run(model, context)
    found = model.graph.initializers
    kind = Format(dtype).onnx_type
    assert {found["w_quantized"].dtype, found["w_zero_point"].dtype} == {kind}
    codes, scale, zero = affine(model)
    assert (codes.min(), codes.max()) == (0, 2**kind.bitwidth - 1)
    image = (codes - zero) * scale
    got = outputs(model, plain=True, x=np.eye(8, dtype=np.float32))["y"]
    np.testing.assert_allclose(got, image, rtol=1e-6, atol=1e-6)


def test_a_signed_weight_shares_its_zeros_and_an_unsigned_one_of_zeros_does_too(context):
    model = matmul(np.float32([[0, 0], [3, 1]]), "uint4 per_axis(1)")
    RoundWeights().run(model, context)
    assert "w_zero_point" not in model.graph.initializers
    assert model.graph.initializers["zero_point_uint4_2"].dtype == ir.DataType.UINT4


@pytest.mark.parametrize("dtype", ["uint4", "uint2"])
def test_unsigned_blocks_run_in_the_block_wise_kernel(dtype, context, outputs, kernels):
    array = np.random.default_rng(3).normal(0.5, 1, size=(64, 16)).astype(np.float32)
    model = matmul(array, f"{dtype} per_block(0,32)")
    RoundWeights().run(model, context)
    assert model.graph.initializers["w_zero_point"].const_value.numpy().shape == (2, 16)
    assert kernels(model) == {"MatMulNBits": 1}
    codes, scale, zero = affine(model)
    x = np.random.default_rng(4).normal(size=(32, 64)).astype(np.float32)
    expected = x @ ((codes - zero) * scale)
    exact, fused = (outputs(model, plain=plain, x=x)["y"] for plain in (True, False))
    most = np.abs(expected).max()
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-5 * most)
    # The kernel rounds its activations to eight bits.
    np.testing.assert_allclose(fused, expected, rtol=0, atol=1e-2 * most)


UNSIGNED = st.sampled_from(["uint8", "uint4", "uint4:3", "uint2"])


def affinely(array, format, clip):
    """Return (the weight after rounding, the scale spread over it, the codes)."""
    model = matmul(array, str(format))
    assert RoundWeights(clip=clip).run(model, ANY) == 1
    codes, scale, zero = affine(model)
    return (codes - zero) * scale, scale, codes


@settings(max_examples=60, deadline=None)
@given(array=NORMAL, dtype=UNSIGNED, granularity=GROUPS)
def test_an_unsigned_weight_is_within_a_step_and_keeps_zero(array, dtype, granularity):
    """Half a step of rounding, and at the ends half a step of the zero point's."""
    name, _, bits = dtype.partition(":")
    format = Format(name, granularity, int(bits or 0))
    image, scale, codes = affinely(array, format, "minmax")
    assert np.all(np.abs(image - array) <= scale * (1 + 1e-5))
    assert np.all(image[array == 0] == 0)
    assert codes.min() >= 0
    assert codes.max() <= 2**format.bits - 1


@settings(max_examples=40, deadline=None)
@given(array=NORMAL, dtype=UNSIGNED, granularity=GROUPS)
def test_clipping_an_unsigned_weight_costs_nothing(array, dtype, granularity):
    name, _, bits = dtype.partition(":")
    format = Format(name, granularity, int(bits or 0))
    errors = [
        np.square((affinely(array, format, clip)[0] - array).astype(np.float64)).sum()
        for clip in ("mse", "minmax")
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)


# Rounding that keeps the outputs


def fed(model, tmp_path, x, **capability):
    """Return a context with these feeds."""
    feeds = Feeds.read({"x": x}, input_specs(model))
    return Context(Capability("any", (21, 25), (), **capability), tmp_path, feeds=feeds)


def correlated(rng, *shape):
    """Return samples whose channels share a few directions; those of images are on axis 1."""
    images = len(shape) == 4
    last = (shape[0], *shape[2:], shape[1]) if images else shape
    rank = 2 if images else 5
    shared = rng.normal(size=(*last[:-1], rank)) @ rng.normal(size=(rank, last[-1]))
    whole = (shared + 0.2 * rng.normal(size=last)).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(whole, -1, 1)) if images else whole


def around(node, inputs, weight):
    """Return a model of one node and its weight `w`, with names and types."""
    shape = ",".join(map(str, weight.shape))
    head = f"{HEADER} g ({inputs}, float[{shape}] w) => (y)"
    model = ir.from_onnx_text(f"{head} {{ [one] y = {node} }}")
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(weight, name="w")
    model.graph.register_initializer(value)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ShapeInferencePass()(model)
    return model


@pytest.mark.parametrize(
    ("node", "inputs", "shape", "size", "format"),
    [
        ("MatMul (x, w)", "float[n,32] x", (32, 12), (400, 32), "int4:3 per_axis(1)"),
        ("MatMul (x, w)", "float[n,32] x", (32, 12), (400, 32), "uint4:3 per_axis(1)"),
        ("MatMul (x, w)", "float[n,32] x", (32, 12), (400, 32), "int4:3 per_tensor"),
        ("MatMul (x, w)", "float[n,32] x", (32, 12), (400, 32), "int4:3 per_block(0,16)"),
        ("Gemm <transB = 1> (x, w)", "float[n,32] x", (12, 32), (400, 32), "int4:3 per_axis(0)"),
        (
            "Conv <pads = [1,1,1,1]> (x, w)",
            "float[n,6,8,8] x",
            (12, 6, 3, 3),
            (20, 6, 8, 8),
            "int4:3 per_axis(0)",
        ),
        (
            "Conv <group = 2> (x, w)",
            "float[n,12,8,8] x",
            (8, 6, 3, 3),
            (20, 12, 8, 8),
            "uint4:3 per_axis(0)",
        ),
    ],
)
def test_gptq_keeps_outputs_on_the_grid_of_the_nearest(
    node, inputs, shape, size, format, tmp_path, outputs
):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    x = correlated(rng, *size)
    found = {}
    for method in ("nearest", "gptq"):
        model = around(node, inputs, weight)
        notes.apply_plan(model, {"w": {"format": format, "mode": "static"}})
        expected = outputs(model, plain=True, x=x)["y"]
        one = RoundWeights(method=method, samples=0, clip="minmax", rounds=0)
        assert one.run(model, fed(model, tmp_path, x)) == 1
        got = outputs(model, plain=True, x=x)["y"]
        stored = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
        found[method] = np.square(got - expected).sum(), stored
    (plain, first), (kept, second) = found.values()
    assert kept < 0.7 * plain
    assert first.keys() == second.keys() - {"y_bias_corrected"}
    for name in first.keys() - {"w_quantized", "y_bias_corrected"}:
        np.testing.assert_array_equal(first[name], second[name])  # the same scales
    assert not np.array_equal(first["w_quantized"], second["w_quantized"])
    least, greatest = (-4, 3) if format.startswith("i") else (0, 7)
    codes = second["w_quantized"].astype(np.int32)
    assert least <= codes.min()
    assert codes.max() <= greatest


@pytest.mark.parametrize("format", ["int8 per_axis(1)", "int4 per_axis(1)", "uint2 per_tensor"])
def test_gptq_of_inputs_that_do_not_correlate_is_the_nearest(format, tmp_path):
    array = np.random.default_rng(1).normal(size=(16, 5)).astype(np.float32)
    codes = []
    for method in ("nearest", "gptq"):
        model = matmul(array, format)
        context = fed(model, tmp_path, np.eye(16, dtype=np.float32))
        RoundWeights(method=method, samples=0, clip="minmax", rounds=0).run(model, context)
        codes.append(model.graph.initializers["w_quantized"].const_value.numpy())
    np.testing.assert_array_equal(*(one.astype(np.int32) for one in codes))


@pytest.mark.parametrize("over", ["channel", "tensor"])
def test_a_table_is_rounded_by_outputs_too(over, tmp_path, outputs):
    """Towards the weight before it was split, with codes that the table has."""
    draw = np.random.default_rng(5)
    array = draw.normal(size=(64, 12)).astype(np.float32)
    x = (draw.normal(size=(400, 8)) @ draw.normal(size=(8, 64))).astype(np.float32)
    asked = f'assign-bits{{weights=4 split="int8-grid" clusters=16 levels=1 over="{over}"}}'
    made = {}
    for method in ("nearest", "gptq"):
        model = matmul(array)
        model.graph.inputs[0].shape = ir.Shape(["n", 64])
        context = replace(fed(model, tmp_path, x), capability=Cpu().capability)
        model, _ = run(Recipe.parse(f"calibrate,{asked},split-layers"), model, context)
        expected = outputs(context.floats[0], x=x)["y"]
        recipe = Recipe.parse(f"insert-qdq,round-weights{{method={method}}}")
        model, _ = run(recipe, model, context)
        codes, _, floats = stored(model)
        entries = [len(np.unique(column)) for column in codes.T]
        assert max(entries) <= 16
        made[method] = np.square(x @ floats - expected).mean()
    assert made["gptq"] < 0.3 * made["nearest"]


@pytest.mark.parametrize(("bits", "below", "moved"), [(8, 7, False), (8, 9, True), (4, 7, True)])
def test_wide_weights_go_to_nearest(bits, below, moved, tmp_path):
    draw = np.random.default_rng(5)
    array = draw.normal(size=(16, 6)).astype(np.float32)
    x = (draw.normal(size=(90, 3)) @ draw.normal(size=(3, 16))).astype(np.float32)
    found = []
    for one in (RoundWeights(), RoundWeights(method="gptq", below=below)):
        model = matmul(array, f"int{bits} per_axis(1)")
        one.run(model, fed(model, tmp_path, x))
        found.append(stored(model)[0])
    assert np.array_equal(*found) is not moved


def test_gptq_asks_for_feeds():
    model = matmul(np.ones((4, 3), np.float32))
    assert list(RoundWeights(method="gptq").requires(model, ANY)) == [
        "method gptq needs calibration feeds; pass --data FILE"
    ]
    assert list(RoundWeights().requires(model, ANY)) == []


@pytest.mark.parametrize(
    ("body", "fields", "reason"),
    [
        ("[one] a = MatMul (x, w) [two] y = MatMul (a, w)", {}, "several layers read it"),
        ("[one] y = MatMul (x, w)", {"part": "v", "split": "s"}, "zeros of a part stay zeros"),
        (
            "[one] y = MatMul (x, w)",
            {"split": "uint2 per_axis(1) split(nearest,3,per_tensor)"},
            "its values are those of a split",
        ),
    ],
)
def test_what_gptq_does_not_take_is_rounded_to_nearest(body, fields, reason, tmp_path):
    array = np.random.default_rng(2).normal(size=(6, 6)).astype(np.float32)
    plain, model = (matmul(array, "int4 per_tensor", body) for _ in range(2))
    notes.write(model.graph.initializers["w"], **fields)
    x = correlated(np.random.default_rng(3), 50, 6)
    context = fed(model, tmp_path, x)
    assert RoundWeights(method="gptq").run(model, context) == 1
    assert [r.reason for r in context.remarks] == [f"rounded to nearest: {reason}"]
    RoundWeights().run(plain, context)
    first, second = (
        one.graph.initializers["w_quantized"].const_value.numpy() for one in (plain, model)
    )
    np.testing.assert_array_equal(first.astype(np.int32), second.astype(np.int32))
