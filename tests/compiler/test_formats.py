import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import DTYPES, Format, PerAxis, PerBlock, PerTensor

GRANULARITIES = st.one_of(
    st.just(PerTensor()),
    st.builds(PerAxis, st.integers(-4, 7)),
    st.builds(PerBlock, st.integers(-4, 7), st.integers(1, 512)),
)


@st.composite
def formats(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    bits = draw(st.integers(2, DTYPES[dtype].bitwidth))
    return Format(dtype, draw(GRANULARITIES), bits)


@given(formats())
def test_text_round_trip(format):
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (Format("uint8"), "uint8 per_tensor"),
        (Format("int4", PerAxis(0)), "int4 per_axis(0)"),
        (Format("int8", PerAxis(1), 7), "int8:7 per_axis(1)"),
        (Format("int4", PerBlock(0, 32)), "int4 per_block(0,32)"),
        (Format("int8", PerAxis(-1)), "int8 per_axis(-1)"),
    ],
)
def test_text(format, text):
    assert str(format) == text
    assert Format.parse(f"  {text} ") == format


def test_bits_default_to_the_container():
    assert Format("int4").bits == 4
    assert Format("int8", bits=8) == Format("int8")


@pytest.mark.parametrize(
    ("format", "codes", "limit"),
    [
        (Format("int8"), (-128, 127), 127),
        (Format("uint8"), (0, 255), 127),
        (Format("int8", bits=7), (-64, 63), 63),
        (Format("int4"), (-8, 7), 7),
        (Format("int2"), (-2, 1), 1),
        (Format("uint4"), (0, 15), 7),
        (Format("int16"), (-32768, 32767), 32767),
        (Format("uint16", bits=12), (0, 4095), 2047),
    ],
)
def test_codes(format, codes, limit):
    assert format.codes == codes
    assert format.limit == limit


@given(formats())
def test_numpy_type_holds_every_code(format):
    least, greatest = format.codes
    info = np.iinfo(format.numpy_type)
    assert info.min <= least < greatest <= info.max
    assert format.signed == (least < 0)


def test_onnx_type():
    assert Format("int2", bits=2).onnx_type == ir.DataType.INT2
    assert Format("uint16").onnx_type == ir.DataType.UINT16


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int8",
        "per_tensor",
        "int8 per_axis",
        "int8 per_tensor(0)",
        "int8 per_axis(0,32)",
        "int8 per_block(0)",
        "int8 per_row(0)",
        "int8 per_axis(0) x",
        "int8: per_tensor",
        "int8 per_axis(one)",
    ],
)
def test_refuses_what_is_no_format(text):
    with pytest.raises(RecipeError, match=r"not a (format|granularity)"):
        Format.parse(text)


def test_unknown_container_gets_a_suggestion():
    with pytest.raises(RecipeError, match="unknown format 'itn8'; did you mean 'int8'"):
        Format.parse("itn8 per_tensor")


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 9), ("int4", 8), ("int8", 1), ("int8", -3)])
def test_bits_must_fit(dtype, bits):
    with pytest.raises(RecipeError, match=f"{bits} bits do not fit {dtype}: expected 2.."):
        Format(dtype, bits=bits)


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_has_elements(size):
    with pytest.raises(RecipeError, match="block"):
        Format("int4", PerBlock(0, size))


def test_formats_are_values():
    assert len({Format("int8"), Format("int8", PerTensor(), 8), Format("int8", PerAxis(0))}) == 2
