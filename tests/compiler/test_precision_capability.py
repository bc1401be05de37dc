import pytest

from fourfold.compiler.capability import Capability, Legality
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import DTYPES, Format, PerAxis, PerBlock
from fourfold.compiler.precision import Precision
from fourfold.compiler.split_plan import SplitWish
from fourfold.targets.cpu import Cpu

CHANNELS = Format("int8", PerAxis(0))
CONV = Legality("Conv", ("int8",), ("uint8",), ("per_axis",))
MATMUL = Legality(
    "MatMul", ("int8", "int4"), ("uint8", "int8"), ("per_tensor", "per_block"), blocks=(32,)
)
ADD = Legality("Add", (), ("uint8",))
GATHER = Legality("Gather", ("int4",), ("float",), ("per_axis",))
CAPABILITY = Capability(
    "chip",
    (13, 21),
    (CONV, MATMUL, ADD),
    widened=(GATHER,),
    carries=frozenset({"Reshape"}),
    float_only={"Softmax": "small probabilities would be lost"},
)


@pytest.mark.parametrize(
    ("text", "weights", "activations", "calibrated"),
    [
        ("w8a8", 8, 8, True),
        ("w4a8", 4, 8, True),
        ("w2a8", 2, 8, True),
        ("w4", 4, None, False),
        (" W8A8 ", 8, 8, True),
    ],
)
def test_precision(text, weights, activations, calibrated):
    precision = Precision.parse(text)
    assert (precision.weights, precision.activations) == (weights, activations)
    assert precision.calibrated is calibrated
    assert str(precision) == text.strip().lower()


@pytest.mark.parametrize(
    ("ranges", "calibrated"), [("auto", True), ("static", True), ("dynamic", False)]
)
def test_feeds_are_needed_for_static_ranges(ranges, calibrated):
    assert Precision.parse("w8a8", ranges).calibrated is calibrated


@pytest.mark.parametrize(
    ("split", "text"),
    [
        (None, "w2a8"),
        (SplitWish(), "w2a8 in 3 parts"),
        (SplitWish("int8-grid", 5, "channel"), "w2a8 in 5 parts"),
        (SplitWish.parse("kmeans"), "w2a8 in 16 values"),
    ],
)
def test_the_name_tells_of_parts(split, text):
    assert str(Precision(weights=2, split=split)) == text
    assert str(Precision(weights=2, activations=None, split=split)) == text.replace("a8", "", 1)
    assert str(Precision(widths=(8, 4), split=split)) == text.replace("w2a8", "auto")
    assert str(Precision(weights=2, split=split, planned=True)) == "by plan"


@pytest.mark.parametrize(
    "text", ["", "w", "8", "a8", "w1a8", "w9a8", "w8a16", "w8a", "w16", "w8a8 x", "int8", "w8a08"]
)
def test_refuses_other_precisions(text):
    with pytest.raises(RecipeError, match="unknown precision"):
        Precision.parse(text)


@pytest.mark.parametrize(
    ("row", "weight", "activation", "taken"),
    [
        (CONV, CHANNELS, "uint8", True),
        (CONV, CHANNELS, "int8", False),
        (CONV, CHANNELS, "float", False),
        (CONV, Format("int8"), "uint8", False),  # per tensor
        (CONV, Format("int4", PerAxis(0)), "uint8", False),
        (CONV, None, "uint8", False),  # its weight must be constant
        (MATMUL, Format("int4", PerBlock(0, 32)), "int8", True),
        (MATMUL, Format("int4", PerBlock(0, 64)), "int8", False),
        (MATMUL, CHANNELS, "int8", False),
        (ADD, None, "uint8", True),
        (ADD, CHANNELS, "uint8", False),
    ],
)
def test_a_row_takes_a_form(row, weight, activation, taken):
    assert row.takes(weight, activation) is taken
    legal = CAPABILITY.legal(row.op_type, weight, activation)
    assert legal == (row if taken else None)


def test_weights_in_float_arithmetic_have_rows_of_their_own():
    packed = Format("int4", PerAxis(0))
    assert CAPABILITY.legal("Gather", packed, "float") is GATHER
    assert CAPABILITY.legal("Gather", packed, "uint8") is None


SHIFTED = Legality("Gemm", ("int8", "uint4"), ("uint8",), ("per_axis",))


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("uint4 per_axis(0)", True),
        ("uint4:3 per_axis(0)", True),
        ("uint8 per_axis(0)", False),
        ("int4 per_axis(0)", False),
        ("uint4 per_tensor", False),
        ("uint4 per_block(0,32)", False),
    ],
)
def test_containers_with_zero_points_have_their_own_name(text, taken):
    assert SHIFTED.takes(Format.parse(text), "uint8") is taken


def test_tables_are_what_a_runtime_folds():
    assert not CAPABILITY.tables  # a lookup on every call, unless the target says otherwise
    assert Cpu(isa="vnni").capability.tables


def test_every_container_of_a_target_has_an_opset_that_stores_it():
    for isa in ("vnni", "avx2", "arm64"):
        capability = Cpu(isa=isa).capability
        narrow = {
            dtype
            for row in (*capability.rows, *capability.widened)
            for dtype in row.weights
            if DTYPES[dtype].bitwidth < 8
        }
        assert narrow == set(capability.packed)
        assert all(version <= capability.opsets[1] for version in capability.packed.values())


def test_rows_of():
    assert CAPABILITY.rows_of("Conv") == [CONV]
    assert CAPABILITY.rows_of("Gather") == []


@pytest.mark.parametrize(
    ("op_type", "known"), [("Conv", True), ("Reshape", True), ("Softmax", False), ("Tan", False)]
)
def test_knows(op_type, known):
    assert CAPABILITY.knows(op_type) is known


def test_why_float():
    assert CAPABILITY.why_float("Softmax") == "small probabilities would be lost"
    assert CAPABILITY.why_float("Tan") == "no integer Tan on chip"
