from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.graph import values
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.assign_bits import AssignBits
from fourfold.targets.cpu import Cpu

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
LAYERS = f"""{HEADER} g (float[1,2,1,1] x) => (float[1,2] y)
<float[2,2,1,1] wc = {{1, 2, 3, 4}}, float[2,2] wt = {{1, 2, 3, 4}},
 float[2,2] wg = {{1, 2, 3, 4}}, float[2,2] wm = {{1, 2, 3, 4}}, int64[2] flat = {{1, 2}}> {{
    [conv] c = Conv (x, wc)
    [relu] r = Relu (c)
    [flatten] f = Reshape (r, flat)
    [gemm] t = Gemm <transB = 1> (f, wt)
    [plain] g = Gemm (t, wg)
    [matmul] y = MatMul (g, wm)
}}"""
EVERYTHING = ("x", "r", "f", "t", "g", "y")


def parsed(text):
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


def planned(text, pass_, context, ranges=(), sqnr=40.0):
    """Run the pass on values that are calibrated to [-1, 3], or to [0, 3] behind Relu."""
    model = parsed(text)
    by_name = {value.name: value for value in values(model)}
    for name in ranges:
        low = 0.0 if name in ("r", "f") else -1.0
        notes.write(by_name[name], low=low, high=3.0, sqnr_db=sqnr)
    changed = pass_.run(model, context)
    return model, notes.plan(model), changed


def formats(plan):
    return {name: fields.get("format") for name, fields in plan.items() if "format" in fields}


def modes(plan):
    return {name: fields["mode"] for name, fields in plan.items() if "mode" in fields}


def test_weights_get_a_scale_for_each_output_channel(context):
    before = str(parsed(LAYERS).graph)
    model, plan, _ = planned(LAYERS, AssignBits(), context, EVERYTHING)
    assert str(model.graph) == before
    got = formats(plan)
    assert got["wc"] == "int8 per_axis(0)"
    assert got["wt"] == "int8 per_axis(0)"
    assert got["wg"] == "int8 per_axis(1)"
    assert got["wm"] == "int8 per_axis(1)"
    assert plan["wc"]["why"] == "finest legal form of Conv"
    assert {plan[name]["activation"] for name in ("wc", "wt", "wg", "wm")} == {"uint8"}


@pytest.mark.parametrize(
    ("bits", "format"),
    [
        (8, "int8"), (7, "int8:7"), (6, "int8:6"), (5, "int8:5"),
        (4, "int4"), (3, "int4:3"), (2, "int2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("activations", ["static", "float"])
def test_a_width_gets_the_narrowest_container(bits, format, activations, context):
    pass_ = AssignBits(weights=bits, activations=activations)
    _, plan, _ = planned(LAYERS, pass_, context, EVERYTHING)
    assert formats(plan)["wc"] == f"{format} per_axis(0)"


def test_a_cpu_without_vnni_gets_seven_bits(context):
    seven = replace(context, capability=Cpu(isa="avx2").capability)
    for bits, format in ((8, "int8:7"), (7, "int8:7"), (6, "int8:6"), (4, "int4")):
        _, plan, _ = planned(LAYERS, AssignBits(weights=bits), seven, EVERYTHING)
        assert formats(plan)["wc"] == f"{format} per_axis(0)"


def test_activations_are_in_the_container_of_the_target(context):
    _, plan, _ = planned(LAYERS, AssignBits(activations="static"), context, EVERYTHING)
    assert {formats(plan)[name] for name in ("x", "r", "f", "t", "g")} == {"uint8 per_tensor"}
    arm = replace(context, capability=Cpu(isa="arm64").capability)
    _, plan, _ = planned(LAYERS, AssignBits(activations="static"), arm, EVERYTHING)
    assert {formats(plan)[name] for name in ("x", "r", "f", "t", "g")} == {"int8 per_tensor"}


def test_what_carries_codes_shares_their_scale(context):
    _, plan, _ = planned(LAYERS, AssignBits(activations="static"), context, EVERYTHING)
    assert plan["f"]["shares"] == "r"
    assert plan["f"]["why"] == "takes the scale of r"
    assert "shares" not in plan["r"]


MATMUL = f"""{HEADER} g (float[3,2] x) => (float[3,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {{
    [matmul] y = MatMul (x, w)
}}"""


@pytest.mark.parametrize(
    ("asked", "sqnr", "mode", "why"),
    [
        ("auto", 40.0, "static", "calibrated, 40.0 dB expected"),
        ("auto", 14.9, "dynamic", "range at run time: static range gives 14.9 dB"),
        ("auto", None, "dynamic", "range at run time: static range gives None dB"),
        ("static", 14.9, "static", "calibrated, 14.9 dB expected"),
        ("dynamic", 40.0, "dynamic", "range at run time: asked for"),
    ],
)
def test_where_a_range_comes_from(asked, sqnr, mode, why, context):
    ranges = () if sqnr is None else ("x",)
    _, plan, _ = planned(MATMUL, AssignBits(activations=asked), context, ranges, sqnr)
    assert (plan["x"]["mode"], plan["x"]["why"]) == (mode, why)


def test_the_floor_of_auto_is_an_option(context):
    _, plan, _ = planned(MATMUL, AssignBits(floor_db=50), context, ("x",))
    assert plan["x"]["mode"] == "dynamic"


def test_a_conv_has_no_dynamic_form_so_without_a_range_it_stays_float(context):
    _, plan, _ = planned(LAYERS, AssignBits(), context)
    assert plan["x"]["mode"] == "float"
    assert plan["x"]["why"] == "no range: not calibrated, and no dynamic form"
    told = {r.subject: r.reason for r in context.remarks}
    assert told["x"] == "stays float: it has no calibrated range and no dynamic form"


def test_weight_only_leaves_activations_alone(context):
    _, plan, _ = planned(LAYERS, AssignBits(activations="float"), context)
    assert set(plan) == {"wc", "wt", "wg", "wm"}
    assert set(modes(plan).values()) == {"static"}
    assert plan["wc"]["why"] == "weights only: activations stay float"


def test_nodes_are_kept_float_by_name(context):
    pass_ = AssignBits(activations="static", keep=("conv", "pl.*n"))
    _, plan, _ = planned(LAYERS, pass_, context, EVERYTHING)
    kept = {"mode": "float", "why": "Conv: kept as asked"}
    assert plan["c"] == kept
    assert plan["wc"] == {**kept, "activation": "float"}
    assert plan["wg"] == {"mode": "float", "activation": "float", "why": "Gemm: kept as asked"}
    assert formats(plan)["wt"] == "int8 per_axis(0)"
    told = {r.subject: r.reason for r in context.remarks}
    assert told["conv"] == "Conv stays float: kept as asked"
    assert told["plain"] == "Gemm stays float: kept as asked"
    assert plan["g"]["mode"] == "static"  # the integer MatMul behind it reads it


def test_weight_only_keeps_by_name_too(context):
    pass_ = AssignBits(activations="float", keep=("conv",))
    _, plan, _ = planned(LAYERS, pass_, context)
    assert plan["wc"] == {"mode": "float", "activation": "float", "why": "Conv: kept as asked"}
    assert set(plan) == {"wc", "wt", "wg", "wm"}
    assert {plan[name]["activation"] for name in plan} == {"float"}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("cnov", r"keep='cnov' matches no node name, e.g. \['conv', 'relu', 'flatten'\]"),
        ("con", "keep='con' matches no node name"),
        ("*", r"keep='\*' is no expression: nothing to repeat"),
    ],
)
def test_an_expression_that_matches_nothing_is_refused(expression, message, context):
    with pytest.raises(RecipeError, match=message):
        planned(LAYERS, AssignBits(keep=(expression,)), context)


def test_two_readers_along_two_axes_get_one_scale(context):
    text = f"""{HEADER} g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}> {{
        [first] a = Gemm <transB = 1> (x, w)
        [second] y = Gemm (a, w)
    }}"""
    _, plan, _ = planned(text, AssignBits(), context, ("x", "a", "y"))
    assert plan["w"]["format"] == "int8 per_tensor"
    why = "read along two different axes, so one scale serves the whole tensor"
    assert plan["w"]["why"] == why
    assert ("w", why) in [(r.subject, r.reason) for r in context.remarks]


EMBEDDING = f"""{HEADER} g (int64[3] ids) => (float[3,2] y)
<float[4,2] table = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ [look_up] y = Gather (table, ids) }}"""


@pytest.mark.parametrize("activations", ["auto", "float"])
def test_embeddings_get_a_scale_for_each_row(activations, context):
    _, plan, _ = planned(EMBEDDING, AssignBits(activations=activations, weights=4), context)
    assert plan["table"]["format"] == "int4 per_axis(0)"
    assert plan["table"]["why"] == "embedding: one scale a row"
    kept = {"mode": "float", "activation": "float", "why": "Gather: kept as asked"}
    for options in ({"embeddings": False}, {"keep": ("look_up",)}):
        pass_ = AssignBits(activations=activations, **options)
        plan = planned(EMBEDDING, pass_, context)[1]
        assert plan["table"] == kept
        assert formats(plan) == {}


CONCAT = f"""{HEADER} g (float[1,1,2,2] x) => (float[1,2,2,2] y)
<float[1,1,1,1] w = {{1}}, float[1,1,1,1] v = {{2}}> {{
    [left] a = Conv (x, w)
    [right] b = Conv (x, v)
    [join] y = Concat <axis = 1> (a, b)
}}"""


def test_what_concat_joins_shares_the_union_of_the_ranges(context):
    model = parsed(CONCAT)
    by_name = {value.name: value for value in values(model)}
    for name, low, high in (("x", -1, 1), ("a", -2, 0.5), ("b", -0.5, 7), ("y", -1, 5)):
        notes.write(by_name[name], low=float(low), high=float(high), sqnr_db=40.0)
    AssignBits().run(model, context)
    plan = notes.plan(model)
    assert (plan["a"]["shares"], plan["b"]["shares"]) == ("y", "y")
    assert (plan["y"]["low"], plan["y"]["high"]) == (-2.0, 7.0)


BRANCHES = f"""{HEADER} g (float[1,1,2,2] x) => (float[1,2,2,2] y)
<float[1,1,1,1] w = {{1}}, float[1,1,1,1] v = {{2}}> {{
    [left] a = Conv (x, w)
    [relu] r = Relu (a)
    [pool] m = MaxPool <kernel_shape = [1,1]> (r)
    [right] b = Conv (x, v)
    [join] y = Concat <axis = 1> (m, b)
}}"""


def test_a_relu_shares_no_scale_with_negative_numbers(context):
    # With a zero point above the least code the runtime keeps the Relu, and its Conv in float.
    model = parsed(BRANCHES)
    by_name = {value.name: value for value in values(model)}
    for name, low in (("x", -1), ("r", 0), ("m", 0), ("b", -5), ("y", -5)):
        notes.write(by_name[name], low=float(low), high=4.0, sqnr_db=40.0)
    AssignBits().run(model, context)
    plan = notes.plan(model)
    assert {name: plan[name].get("shares") for name in "rmby"} == {
        "r": None, "m": "r", "b": "y", "y": None,
    }  # fmt: skip
    assert [plan[name]["low"] for name in "ry"] == [0.0, -5.0]


def test_a_relu_behind_concat_leaves_its_operands_their_own_scales(context):
    text = CONCAT.replace("y = Concat", "j = Concat").removesuffix("}")
    model = parsed(f"{text} [relu] y = Relu (j) }}")
    by_name = {value.name: value for value in values(model)}
    for name, low in (("x", -1), ("a", -2), ("b", 0), ("y", 0)):
        notes.write(by_name[name], low=float(low), high=4.0, sqnr_db=40.0)
    AssignBits().run(model, context)
    plan = notes.plan(model)
    assert {name: plan[name].get("shares") for name in "aby"} == {"a": None, "b": "y", "y": None}
    assert plan["y"]["low"] == 0.0


def test_a_float_island_is_told_with_its_reason(context):
    text = f"""{HEADER} g (float[1,1,2,2] x) => (float[1,1,2,2] y)
    <float[1,1,1,1] w = {{1}}> {{
        [conv] a = Conv (x, w)
        [soft] b = Softmax (a)
        [add] y = Add (a, b)
    }}"""
    _, plan, _ = planned(text, AssignBits(), context, ("x", "a"))
    softmax = "Softmax: float: an 8-bit softmax loses small probabilities, and costs as much"
    assert plan["b"] == {"mode": "float", "why": softmax}
    add = "Add: its input b is float, and converting it would cost more than it saves"
    assert plan["y"] == {"mode": "float", "why": add}


@pytest.mark.parametrize("activations", ["auto", "static", "dynamic", "float"])
def test_a_second_run_changes_nothing(activations, zoo, context):
    for make in zoo.values():
        model = make()
        for value in values(model):
            notes.write(value, low=-1.0, high=3.0, sqnr_db=40.0)
        pass_ = AssignBits(activations=activations)
        assert pass_.run(model, context) > 0
        assert pass_.run(model, context) == 0


def test_the_plan_survives_the_runner(context):
    model = parsed(MATMUL)
    after, rows = run(Recipe((AssignBits(activations="dynamic"),)), model, context)
    assert rows[0].changed == 2
    assert modes(notes.plan(after)) == {"x": "dynamic", "w": "static"}
    assert notes.plan(model) == {}


# Zero points, blocks, and weights that are to be split

WIDE = """<ir_version: 13, opset_import: ["" : 25]>
g (float[2,64] x, float[64,64] wm, float[64,8] wg, float[48,8] wo) => (float[2,8] y)
<int64[1] from = {0}, int64[1] to = {48}, int64[1] axes = {1}> {
    [matmul] m = MatMul (x, wm)
    [gemm] g = Gemm (m, wg)
    [slice] s = Slice (m, from, to, axes)
    [odd] o = MatMul (s, wo)
    [sum] y = Add (g, o)
}"""


def wide():
    """Return a model of a MatMul and a Gemm over 64 inputs, and a MatMul over 48."""
    model, draw = ir.from_onnx_text(WIDE), np.random.default_rng(0)
    for value in list(model.graph.inputs)[1:]:
        array = draw.normal(size=value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


def decided(model, context, **options):
    """Return weight -> format."""
    AssignBits(**options).run(model, context)
    return formats({n: f for n, f in notes.plan(model).items() if n.startswith("w")})


@pytest.mark.parametrize(
    ("bits", "dtype"), [(8, "int8"), (7, "int8:7"), (4, "uint4"), (3, "uint4:3"), (2, "uint2")]
)
@pytest.mark.parametrize("activations", ["static", "float"])
def test_narrow_weights_have_zero_points_where_they_are_wanted(bits, dtype, activations, context):
    pass_ = AssignBits(weights=bits, activations=activations, affine=True)
    _, plan, _ = planned(LAYERS, pass_, context, EVERYTHING)
    got = formats(plan)
    assert [got[name] for name in ("wc", "wm")] == [f"{dtype} per_axis(0)", f"{dtype} per_axis(1)"]
    beside = "uint8" if activations == "static" else "float"
    assert plan["wc"]["activation"] == beside


def test_an_embedding_has_no_zero_points(context):
    text = f"""{HEADER} g (int64[3] x) => (float[3,2] y) <float[4,2] w = {{1,2,3,4,5,6,7,8}}> {{
        y = Gather (w, x)
    }}"""
    got = formats(planned(text, AssignBits(weights=4, affine=True), context)[1])
    assert got["w"] == "int4 per_axis(0)"


@pytest.mark.parametrize("affine", [False, True])
def test_blocks_where_they_are_legal(affine, context):
    got = decided(wide(), context, weights=4, activations="float", block=32, affine=affine)
    dtype = "uint4" if affine else "int4"
    assert got == {
        "wm": f"{dtype} per_block(0,32)",
        "wg": f"{dtype} per_axis(1)",  # no block-wise Gemm
        "wo": f"{dtype} per_axis(1)",  # 48 is no multiple of 32
    }


@pytest.mark.parametrize(
    ("options", "split"),
    [
        ({"split": "branches"}, "split(branches,3,per_tensor,zero)"),
        ({"split": "codebook"}, "split(codebook,3,per_tensor)"),
        ({"split": "codebook", "over": "channel"}, "split(codebook,3,per_axis(1))"),
        ({"split": "codebook", "over": "block"}, "split(codebook,3,per_block(0,32))"),
        ({"split": "int8-grid", "clusters": 2}, "split(int8-grid,2,per_tensor)"),
        (
            {"split": "int8-grid", "clusters": 16, "over": "channel", "levels": 1},
            "split(int8-grid,16,per_axis(1),levels=1)",
        ),
    ],
)
def test_weights_are_to_be_split_as_asked(options, split, context):
    got = decided(wide(), context, weights=2, activations="float", **options)
    assert got == dict.fromkeys(("wm", "wg", "wo"), f"uint2 per_axis(1) {split}")
    assert context.remarks == []


def test_what_cannot_be_split_stays_whole_and_is_told(context):
    got = decided(wide(), context, weights=2, activations="float", split="nearest")
    assert got == {
        "wm": "uint2 per_axis(1) split(nearest,3,per_tensor)",
        "wg": "int2 per_axis(1)",
        "wo": "int2 per_axis(1)",
    }
    told = {remark.subject: remark.reason for remark in context.remarks}
    assert set(told) == {"wg", "wo"}
    assert all("int4 per_block(0,32) is not legal here" in reason for reason in told.values())


def test_a_split_that_no_weight_can_have_is_refused(context):
    for one in (
        AssignBits(weights=2, activations="dynamic", split="nearest"),
        AssignBits(weights=4, split="int8-grid"),
        AssignBits(weights=8, split="auto"),
    ):
        with pytest.raises(RecipeError, match=f"assign-bits: split={one.split}: not split: "):
            one.run(wide(), context)
    # Without a weight, or with all of them kept, there is nothing to refuse.
    AssignBits(weights=2, split="nearest", keep=("matmul", "gemm", "odd")).run(wide(), context)


def test_auto_takes_what_the_kernel_reads(context):
    around = replace(context, cost=Cpu(isa="vnni").cost)  # three branches take longer than one
    for activations, form in (("dynamic", "int8-grid"), ("float", "codebook")):
        model = wide()
        got = decided(model, around, weights=2, activations=activations, split="auto")
        assert got["wm"] == f"uint2 per_axis(1) split({form},3,per_tensor)"
        note = notes.read(model.graph.initializers["wm"])
        assert note.why.startswith("split: ")
        # Four bits an index, and a table of twelve entries a channel.
        assert note.bytes == 64 * 64 / 2 + 64 * (12 + 4 if form == "int8-grid" else 12 * 4)


@pytest.mark.parametrize("isa", ["vnni", "avx2", "arm64"])
def test_the_grid_is_as_fine_as_the_kernel_of_the_cpu(isa, context):
    around = replace(context, capability=Cpu(isa=isa).capability)
    recipe = Recipe.parse('assign-bits{weights=2 activations="static" split="int8-grid"}')
    model = wide()
    for value in values(model):
        if value.dtype == ir.DataType.FLOAT:
            notes.write(value, low=-1.0, high=3.0, sqnr_db=40.0)
    after, _ = run(recipe, model, around)
    grid = ",grid=7" if isa == "avx2" else ""
    format = notes.read(after.graph.initializers["wm"]).format
    assert str(format) == f"uint2 per_axis(1) split(int8-grid,3,per_tensor{grid})"
