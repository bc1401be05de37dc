"""How one weight is split: what was wished for, what its kernel takes, and what costs least."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.choices import Choice, legal_choices, open_weights
from fourfold.compiler.costs import Cost
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import FORMS, Format, PerAxis, PerBlock, PerTensor, Split
from fourfold.compiler.graph import readers_of
from fourfold.compiler.picks import Pick, obeyed, uniform, write
from fourfold.compiler.split_plan import SplitWish, offered, split_picks
from fourfold.targets.cpu import Cpu

CPU = Cpu(isa="vnni").capability
NARROW = Cpu(isa="avx2").capability
BARE = replace(CPU, tables=False)  # a runtime that looks a table up on every call
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

LAYERS = {
    "matmul": ("y = MatMul (x, w)", (64, 8), "float[n,64] x"),
    "stack": ("y = MatMul (x, w)", (3, 64, 8), "float[3,n,64] x"),
    "gemm": ("y = Gemm <transB = 1> (x, w)", (8, 64), "float[n,64] x"),
    "conv": ("y = Conv (x, w)", (8, 4, 3, 3), "float[n,4,9,9] x"),
    "depthwise": ("y = Conv <group = 8> (x, w)", (8, 1, 1, 2), "float[n,8,9,9] x"),
    "up": ("y = ConvTranspose (x, w)", (4, 8, 3, 3), "float[n,4,9,9] x"),
    "up in groups": ("y = ConvTranspose <group = 2> (x, w)", (4, 8, 3, 3), "float[n,4,9,9] x"),
    "table": ("y = Gather (w, x)", (50, 64), "int64[n] x"),
    "two axes": ("a = MatMul (x, w) y = Gemm <transB = 1> (a, w)", (64, 64), "float[n,64] x"),
    "one axis": ("a = MatMul (x, w) y = MatMul (a, w)", (64, 64), "float[n,64] x"),
    "tied": ("a = Gather (w, x) y = Gemm <transB = 1> (a, w)", (64, 64), "int64[n] x"),
    "odd": ("y = MatMul (x, w)", (48, 8), "float[n,48] x"),
}


def model_of(kind):
    """Return a model around one weight w of normal numbers."""
    body, shape, x = LAYERS[kind]
    sizes = ",".join(map(str, shape))
    model = ir.from_onnx_text(f"{HEADER} g ({x}, float[{sizes}] w) => (y) {{ {body} }}")
    value = model.graph.inputs[1]
    array = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    value.const_value = ir.tensor(array, name="w")
    model.graph.inputs.remove(value)
    model.graph.register_initializer(value)
    return model


def readers(kind):
    return readers_of(model_of(kind).graph.initializers["w"])


def choice_of(kind, bits=2, activation="uint8", capability=CPU):
    """Return the signed choice of a width that the weight has unsplit."""
    legal = legal_choices(readers(kind), capability)
    fitting = [c for c in legal if c.bits == bits and c.activation == activation]
    return next(c for c in fitting if c.format.signed)


def formats(wish, kind, bits=2, activation="uint8", capability=CPU):
    """Return the formats of a wish as texts, and the reason why others are none."""
    choice = choice_of(kind, bits, activation, capability)
    found, reason = SplitWish.parse(wish).formats(readers(kind), choice, capability)
    return [str(format) for format in found], reason


# Text


@pytest.mark.parametrize(
    ("text", "wish", "printed"),
    [
        ("branches", SplitWish(), "branches,3,tensor"),
        ("auto", SplitWish("auto"), "auto,3,tensor"),
        ("nearest,4", SplitWish("nearest", 4), "nearest,4,tensor"),
        ("codebook,channel", SplitWish("codebook", over="channel"), "codebook,3,channel"),
        ("codebook,3,block", SplitWish("codebook", over="block"), "codebook,3,block"),
        ("codebook,levels=5", SplitWish("codebook", levels=5), "codebook,3,tensor,levels=5"),
        (
            "int8-grid,16,channel,levels=1",
            SplitWish("int8-grid", 16, "channel", levels=1),
            "int8-grid,16,channel,levels=1",
        ),
        ("kmeans", SplitWish("auto", 16, "channel", levels=1), "auto,16,channel,levels=1"),
        (" kmeans ", SplitWish("auto", 16, "channel", levels=1), "auto,16,channel,levels=1"),
    ],
)
def test_text(text, wish, printed):
    assert SplitWish.parse(text) == wish
    assert str(wish) == printed
    assert SplitWish.parse(printed) == wish


@given(
    st.builds(
        SplitWish,
        st.sampled_from([*FORMS, "auto"]),
        st.integers(2, 255),
        st.sampled_from(["tensor", "channel", "block"]),
        levels=st.integers(0, 256),
    ).filter(lambda wish: wish.form != "branches" or not wish.levels)
)
def test_a_wish_prints_and_parses_back(wish):
    assert SplitWish.parse(str(wish)) == wish


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--split '': unknown ''"),
        ("coodbook", "--split 'coodbook': unknown 'coodbook'"),
        ("Codebook", "--split 'Codebook': unknown 'Codebook'"),
        ("codebook,3,row", "--split 'codebook,3,row': unknown 'row'"),
        ("codebook,3,", "--split 'codebook,3,': unknown 'codebook,3,'"),
        ("codebook, 3", "--split 'codebook, 3': unknown 'codebook, 3'"),
        ("codebook,3,channel,1", "--split 'codebook,3,channel,1': unknown 'codebook,3,channel,1'"),
        ("codebook,levels=2,3", "--split 'codebook,levels=2,3': unknown 'codebook,levels=2,3'"),
        (
            "codebook,3,tensor,zero",
            "--split 'codebook,3,tensor,zero': unknown 'codebook,3,tensor,zero'",
        ),
        ("codebook,1", "1 clusters: expected 2..255"),
        ("codebook,0", "0 clusters: expected 2..255"),
        ("codebook,256", "256 clusters: expected 2..255"),
        ("codebook,levels=257", "257 levels: expected 1..256"),
    ],
)
def test_what_is_no_split_is_named(text, message):
    with pytest.raises(RecipeError) as error:
        SplitWish.parse(text)
    assert str(error.value).startswith(message)
    if message.startswith("--"):
        assert "expected auto, kmeans, " in str(error.value)
        assert "codebook,3,channel or int8-grid,16,channel,levels=1" in str(error.value)


def test_what_a_weight_becomes_for_people():
    assert SplitWish().parts == "3 parts"
    assert SplitWish("codebook", 5, levels=4).parts == "5 parts"
    assert SplitWish.parse("kmeans").parts == "16 values"


# Formats


@pytest.mark.parametrize(
    ("wish", "kind", "activation", "expected"),
    [
        ("branches", "matmul", "uint8", "uint2 per_axis(1) split(branches,3,per_tensor,zero)"),
        ("branches", "matmul", "float", "uint2 per_axis(1) split(branches,3,per_tensor,zero)"),
        (
            "branches,5,channel",
            "conv",
            "uint8",
            "uint2 per_axis(0) split(branches,5,per_axis(0),zero)",
        ),
        ("branches", "up", "float", "uint2 per_axis(1) split(branches,3,per_tensor,zero)"),
        ("codebook", "gemm", "float", "uint2 per_axis(0) split(codebook,3,per_tensor)"),
        ("codebook", "table", "float", "uint2 per_axis(0) split(codebook,3,per_tensor)"),
        (
            "codebook,3,block",
            "matmul",
            "float",
            "uint2 per_axis(1) split(codebook,3,per_block(0,32))",
        ),
        (
            "codebook,200,tensor,levels=1",
            "matmul",
            "float",
            "uint2 per_axis(1) split(codebook,200,per_tensor,levels=1)",
        ),
        ("int8-grid", "matmul", "uint8", "uint2 per_axis(1) split(int8-grid,3,per_tensor)"),
        (
            "int8-grid,16,channel,levels=1",
            "gemm",
            "uint8",
            "uint2 per_axis(0) split(int8-grid,16,per_axis(0),levels=1)",
        ),
        ("int8-grid", "tied", "uint8", "uint2 per_axis(0) split(int8-grid,3,per_tensor)"),
        ("nearest", "matmul", "float", "uint2 per_axis(1) split(nearest,3,per_tensor)"),
    ],
)
def test_the_format_of_a_weights_parts(wish, kind, activation, expected):
    assert formats(wish, kind, activation=activation) == ([expected], "")


@pytest.mark.parametrize(("bits", "dtype"), [(4, "uint4"), (2, "uint2")])
@pytest.mark.parametrize("activation", ["uint8", "float"])
def test_parts_have_zero_points_wherever_the_kernel_takes_them(bits, dtype, activation):
    (text,), _ = formats("branches", "matmul", bits, activation)
    assert Format.parse(text).dtype == dtype


def test_eight_bits_beside_codes_stay_symmetric():
    """A code less its zero point must fit the int8 of the kernel."""
    (text,), _ = formats("branches", "matmul", 8)
    assert text == "int8 per_axis(1) split(branches,3,per_tensor,zero)"
    (text,), _ = formats("branches", "matmul", 8, "float")
    assert text == "uint8 per_axis(1) split(branches,3,per_tensor,zero)"


def test_used_bits_are_kept():
    three = Choice(Format("int4", PerAxis(1), 3), "uint8")
    found = SplitWish().of(readers("matmul"), three, CPU)
    assert found == Format("uint4", PerAxis(1), 3, Split("branches", zero=True))


def test_a_choice_that_is_split_already_is_split_anew():
    old = Choice(Format.parse("uint2 per_axis(1) split(branches,3,per_tensor,zero)"), "float")
    found = SplitWish("codebook", 2).of(readers("matmul"), old, CPU)
    assert str(found) == "uint2 per_axis(1) split(codebook,2,per_tensor)"


def test_the_grid_is_that_of_the_kernels_weights():
    for activation in ("uint8", "float"):
        (text,), _ = formats("int8-grid", "matmul", 2, activation, NARROW)
        assert text == "uint2 per_axis(1) split(int8-grid,3,per_tensor,grid=7)"
    (text,), _ = formats("branches", "matmul", 2, "uint8", NARROW)
    assert Format.parse(text).split.grid == 8  # there is none


def test_ranges_with_zero_are_as_asked_where_a_part_is_no_layer():
    choice = choice_of("matmul", activation="float")
    for form in FORMS:
        for zero in (False, True):
            found = SplitWish(form, zero=zero).of(readers("matmul"), choice, CPU)
            assert found.split.zero is (zero or form == "branches")
    block = SplitWish("codebook", over="block", block=16).of(readers("matmul"), choice, CPU)
    assert block.split.over == PerBlock(0, 16)


# The form that costs least


@pytest.mark.parametrize(
    ("kind", "activation", "capability", "expected"),
    [
        ("matmul", "uint8", CPU, ["int8-grid", "branches"]),
        ("matmul", "float", CPU, ["codebook", "branches"]),
        ("up", "float", CPU, ["codebook", "branches"]),
        ("table", "float", CPU, ["int8-grid"]),  # a lookup copies codes, and has no branches
        ("matmul", "uint8", BARE, ["branches"]),
        ("matmul", "float", BARE, ["branches"]),
    ],
)
def test_forms_that_keep_the_values_of_the_parts(kind, activation, capability, expected):
    found, _ = formats("auto", kind, 2, activation, capability)
    assert [Format.parse(text).split.form for text in found] == expected


def test_one_value_a_part_makes_no_branches():
    found, reason = formats("auto,16,channel,levels=1", "matmul", 2, "float")
    assert found == ["uint2 per_axis(1) split(codebook,16,per_axis(1),levels=1)"]
    assert reason == ""
    assert formats("kmeans", "matmul", 2, "float", BARE)[0] == []


def test_what_is_as_large_as_eight_bits_is_no_form_of_auto():
    found, reason = formats("auto", "matmul", 4, "float")
    assert found == []
    assert reason == "12 code bits a weight are no less than int8 has"
    found, reason = formats("auto,17,tensor,levels=1", "matmul", 4, "float")
    assert (found, reason) == ([], "8 code bits a weight are no less than int8 has")
    assert formats("auto,2", "matmul", 2, "float")[0] == [
        "uint2 per_axis(1) split(codebook,2,per_tensor)",
        "uint2 per_axis(1) split(branches,2,per_tensor,zero)",
    ]
    # Who asks for a form gets it.
    assert formats("branches", "matmul", 4, "float")[0]


# Refusals


@pytest.mark.parametrize(
    ("wish", "kind", "bits", "activation", "reason"),
    [
        ("branches", "table", 2, "float", "Gather reads it, and a lookup has no branches"),
        ("branches", "tied", 2, "float", "Gather reads it, and a lookup has no branches"),
        (
            "int8-grid",
            "matmul",
            4,
            "uint8",
            "48 values take an index of 8 bits, which is as much as int8 itself",
        ),
        (
            "int8-grid,17,channel,levels=1",
            "matmul",
            2,
            "uint8",
            "17 values take an index of 8 bits, which is as much as int8 itself",
        ),
        (
            "codebook",
            "matmul",
            2,
            "uint8",
            "its kernel reads uint8, and a table of floats makes it a float kernel; take "
            "int8-grid, or weights only",
        ),
        (
            "nearest",
            "matmul",
            2,
            "uint8",
            "its kernel reads uint8, and the block-wise one reads floats",
        ),
        (
            "nearest",
            "odd",
            2,
            "float",
            "int4 per_block(0,32) is not legal here for a weight of shape [48, 8]",
        ),
        (
            "nearest",
            "gemm",  # its kernel has no blocks
            2,
            "float",
            "int4 per_block(1,32) is not legal here for a weight of shape [8, 64]",
        ),
        (
            "nearest",
            "conv",
            2,
            "float",
            "int4 per_block(1,32) is not legal here for a weight of shape [8, 4, 3, 3]",
        ),
        (
            "nearest",
            "table",
            2,
            "float",
            "int4 per_block(1,32) is not legal here for a weight of shape [50, 64]",
        ),
    ],
)
def test_why_a_weight_is_not_split(wish, kind, bits, activation, reason):
    assert formats(wish, kind, bits, activation) == ([], reason)


def test_a_stack_of_matrices_has_no_blocks():
    _, reason = formats("nearest", "stack", 2, "float")
    assert reason.endswith("is not legal here for a weight of shape [3, 64, 8]")


def test_ranges_with_zero_need_fewer_values():
    """Five parts of four levels are 20 values, or 16 where they share the zero."""
    choice = choice_of("matmul")
    wish = SplitWish("int8-grid", 5)
    assert wish.of(readers("matmul"), choice, CPU).startswith("20 values")
    found = replace(wish, zero=True).of(readers("matmul"), choice, CPU)
    assert str(found) == "uint2 per_axis(1) split(int8-grid,5,per_tensor,zero)"


# Spans


@pytest.mark.parametrize(
    ("kind", "channel", "block"),
    [
        ("matmul", PerAxis(1), PerBlock(0, 32)),
        ("stack", PerAxis(2), PerBlock(0, 32)),
        ("gemm", PerAxis(0), PerBlock(1, 32)),
        ("conv", PerAxis(0), PerBlock(1, 32)),
        ("up", PerAxis(1), PerBlock(0, 32)),
        ("up in groups", PerAxis(1), PerBlock(0, 32)),
        ("table", PerAxis(0), PerBlock(1, 32)),
        ("one axis", PerAxis(1), PerBlock(0, 32)),
        ("tied", PerAxis(0), PerBlock(1, 32)),
        ("two axes", PerTensor(), PerTensor()),  # no channel is the same for both readers
        ("depthwise", PerTensor(), PerTensor()),  # two elements cannot make three clusters
    ],
)
def test_what_one_clustering_spans(kind, channel, block):
    for over, expected in (("tensor", PerTensor()), ("channel", channel), ("block", block)):
        assert SplitWish("codebook", over=over).span(readers(kind)) == expected


@pytest.mark.parametrize(
    ("kind", "most"),
    [("matmul", 64), ("stack", 192), ("conv", 36), ("depthwise", 2), ("up in groups", 18)],
)
def test_a_channel_has_an_element_for_each_cluster(kind, most):
    wish = SplitWish("codebook", most, "channel", levels=1)
    assert wish.span(readers(kind)) == PerAxis(readers(kind)[0].axis)
    assert replace(wish, clusters=most + 1).span(readers(kind)) == PerTensor()


# What is offered


def offers(kind, wish, widths, activations="float", affine=False):
    """Return the texts of a weight's choices."""
    parsed = SplitWish.parse(wish) if wish else None
    (one,) = offered(model_of(kind), CPU, widths, activations, affine, parsed)
    return [str(choice) for choice in one.choices]


def test_splits_are_offered_beside_the_narrowest_form():
    assert offers("matmul", "codebook", (8, 4, 2, 32)) == [
        "int8 per_axis(1) x float",
        "int4 per_axis(1) x float",
        "uint2 per_axis(1) split(codebook,3,per_tensor) x float",
        "int2 per_axis(1) x float",
        "float",
    ]
    assert offers("matmul", "int8-grid", (8, 2, 4), "auto") == [
        "int8 per_axis(1) x uint8",
        "int4 per_axis(1) x uint8",
        "uint2 per_axis(1) split(int8-grid,3,per_tensor) x uint8",
        "int2 per_axis(1) x uint8",
    ]


def test_splits_are_offered_where_their_stored_bits_are():
    with_six = offers("matmul", "branches", (8, 6, 2))
    assert "uint2 per_axis(1) split(branches,3,per_tensor,zero) x float" in with_six
    assert offers("matmul", "branches", (8, 4, 2)) == offers("matmul", None, (8, 4, 2))
    assert offers("matmul", "codebook", (8, 2)) == offers("matmul", None, (8, 2))


def test_both_kernels_have_splits():
    found = offers("matmul", "auto", (4, 2, 32), "any", affine=True)
    assert found[-1] == "float"
    splits = [text for text in found if "split" in text]
    assert splits == [
        "uint2 per_axis(1) split(codebook,3,per_tensor) x float",
        "uint2 per_axis(1) split(int8-grid,3,per_tensor) x uint8",
        "uint2 per_block(0,32) split(codebook,3,per_tensor) x float",
    ]
    bits = [Choice.parse(text).bits for text in found[:-1]]
    assert bits == sorted(bits, reverse=True)
    assert len(set(found)) == len(found)


def test_without_a_wish_nothing_is_added(zoo):
    for make in zoo.values():
        model = make()
        for affine in (False, True):
            args = (model, CPU, (8, 4, 2, 32), "any", affine)
            assert offered(*args) == open_weights(*args)


# Picks

TWO = """
g (int64[n] ids) => (float[n,8] y) {
    [look_up] e = Gather (table, ids)
    [first] a = MatMul (e, w)
    [second] y = MatMul (a, v)
}"""


@pytest.fixture
def model():
    """A table, then w [32,256] of short channels, then v [256,8] of long ones."""
    parsed = ir.from_onnx_text(
        HEADER + TWO.replace("ids)", "ids, float[9,32] table, float[32,256] w, float[256,8] v)", 1)
    )
    draw = np.random.default_rng(0)
    for value in list(parsed.graph.inputs)[1:]:
        array = draw.normal(0, 1, value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        parsed.graph.inputs.remove(value)
        parsed.graph.register_initializer(value)
    ShapeInferencePass()(parsed)
    return parsed


def split(model, context, wish, activations="float", kept=(), cost=None):
    """Return the picks of 2 bits for all, split, and what was remarked."""
    taken = uniform(model, CPU, 2, activations, frozenset(kept))
    told = {}
    made = split_picks(
        model, taken, SplitWish.parse(wish), replace(context, cost=cost), told.__setitem__
    )
    assert list(made) == list(taken)
    return made, told


def forms(picks):
    return {
        name: pick.choice.format.split and pick.choice.format.split.form
        for name, pick in picks.items()
        if pick.choice.format is not None
    }


def test_every_weight_is_split_or_told_why_not(model, context):
    made, told = split(model, context, "branches")
    assert forms(made) == {"table": None, "w": "branches", "v": "branches"}
    assert told == {"table": "not split: Gather reads it, and a lookup has no branches"}
    assert made["w"] == Pick(
        Choice(Format("uint2", PerAxis(1), split=Split("branches", zero=True))),
        "split: weights only: activations stay float",
        None,
        Cost(3 * 32 * 256 // 4 + 3 * 4 * 256),
    )


def test_float_weights_are_not_split(model, context):
    made, told = split(model, context, "codebook", kept=("first", "look_up"))
    assert forms(made) == {"v": "codebook"}
    assert made["w"].why == "MatMul: kept as asked"
    assert told == {}


def test_without_seconds_the_fewest_bytes_win(model, context):
    """Tables of 12 values a channel against three sets of codes and scales."""
    made, told = split(model, context, "auto")
    assert told == {}
    assert forms(made) == {"table": "int8-grid", "w": "branches", "v": "codebook"}
    for pick in made.values():
        assert pick.cost.seconds is None
        assert pick.why.startswith("split: ")


def timed(asked=None, **seconds):
    """Return a cost function: seconds by the container of the weight, `float` without one."""

    def cost(work, choice):
        name = "float" if choice.format is None else choice.format.dtype
        if asked is not None:
            asked.append((work.op_type, work.input, name, choice.activation))
        known = seconds.get(name)
        return Cost(0, known, None if known is None else "measured")

    return cost


@pytest.mark.parametrize(
    ("branch", "whole", "expected"),
    [(1.0, 2.9, "codebook"), (1.0, 3.1, "branches"), (0.5, 1.4, "codebook")],
)
def test_the_quickest_form_wins(model, context, branch, whole, expected):
    """Branches run three kernels one after the other; a table runs the float one."""
    cost = timed(uint2=branch, float=whole, int8=0.1)
    made, _ = split(model, context, "auto", cost=cost)
    assert forms(made) == {"table": "int8-grid", "w": expected, "v": expected}
    seconds = {"codebook": whole, "branches": 3 * branch}[expected]
    assert made["w"].cost.seconds == pytest.approx(seconds)
    assert made["w"].cost.source == "measured"


def test_of_equally_quick_forms_the_smaller(model, context):
    made, _ = split(model, context, "auto", cost=timed(uint2=1.0, float=3.0, int8=1.0))
    assert forms(made) == {"table": "int8-grid", "w": "branches", "v": "codebook"}
    assert made["w"].cost.seconds == made["v"].cost.seconds == 3.0


def test_integer_kernels_are_asked_with_what_they_read(model, context):
    asked = []
    cost = timed(asked, uint2=1.0, int8=2.0)
    made, _ = split(model, context, "auto", "auto", cost=cost)
    assert forms(made) == {"table": "int8-grid", "w": "int8-grid", "v": "int8-grid"}
    assert {one for one in asked if one[0] == "MatMul"} == {
        ("MatMul", (1, 32), "uint2", "uint8"),
        ("MatMul", (1, 256), "uint2", "uint8"),
        ("MatMul", (1, 32), "int8", "uint8"),
        ("MatMul", (1, 256), "int8", "uint8"),
    }


def test_nothing_is_timed_where_there_is_one_form_alone(model, context):
    asked = []
    made, _ = split(model, context, "branches", cost=timed(asked, uint2=1.0))
    assert asked == []
    assert made["w"].cost.seconds is None


@pytest.mark.parametrize("activations", ["float", "auto"])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    "wish", ["auto", "branches", "codebook,3,channel", "int8-grid,16,channel,levels=1", "nearest"]
)
def test_what_is_split_is_obeyed_when_it_is_read(model, context, wish, bits, activations):
    taken = uniform(model, CPU, bits, activations, frozenset({"look_up"}))
    made = split_picks(model, taken, SplitWish.parse(wish), context, lambda *told: None)
    for name, pick in made.items():
        write(model.graph.initializers[name], pick)
    again = obeyed(model, CPU)
    assert {name: pick.choice for name, pick in again.items()} == {
        name: pick.choice for name, pick in made.items()
    }
