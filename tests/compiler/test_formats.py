from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import (
    DTYPES,
    FORMS,
    Format,
    PerAxis,
    PerBlock,
    PerTensor,
    Split,
    index_bits,
    parse_granularity,
)

GRANULARITIES = st.one_of(
    st.just(PerTensor()),
    st.builds(PerAxis, st.integers(-4, 7)),
    st.builds(PerBlock, st.integers(-4, 7), st.integers(1, 512)),
)


@st.composite
def splits(draw):
    form = draw(st.sampled_from(FORMS))
    levels = draw(st.integers(0, 256)) if form != "branches" else 0
    zero = form == "branches" or (not levels and draw(st.booleans()))
    grid = draw(st.sampled_from([7, 8]))
    return Split(form, draw(st.integers(2, 255)), draw(GRANULARITIES), levels, zero, grid)


@st.composite
def formats(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    bits = draw(st.integers(2, DTYPES[dtype].bitwidth))
    split = draw(st.none() | splits().filter(lambda split: split.entries(bits) <= 2**16))
    return Format(dtype, draw(GRANULARITIES), bits, split)


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
        (Format("uint2", split=Split()), "uint2 per_tensor split(codebook,3,per_tensor)"),
        (
            Format("uint2", PerAxis(1), split=Split("branches", zero=True)),
            "uint2 per_axis(1) split(branches,3,per_tensor,zero)",
        ),
        (
            Format("uint4", PerAxis(0), 3, Split("int8-grid", 16, PerAxis(0), 1, grid=7)),
            "uint4:3 per_axis(0) split(int8-grid,16,per_axis(0),levels=1,grid=7)",
        ),
        (
            Format("int2", PerBlock(0, 32), 0, Split("nearest", 2, PerBlock(-1, 64), zero=True)),
            "int2 per_block(0,32) split(nearest,2,per_block(-1,64),zero)",
        ),
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
        "split(codebook,3,per_tensor)",
        "int8 split(codebook,3,per_tensor)",
        "int8 per_tensor, split(codebook,3,per_tensor)",
        "int8 per_tensor  split(codebook,3,per_tensor)",
        "int8 per_tensor split (codebook,3,per_tensor)",
    ],
)
def test_refuses_what_is_no_format(text):
    with pytest.raises(RecipeError, match=r"not a (format|granularity)"):
        Format.parse(text)


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "codebook",
        "codebook,3",
        "codebook,per_tensor",
        "codebook,3,per_tensor,",
        "codebook,-3,per_tensor",
        "codebook,3,tensor",
        "codebook,3,per_tensor,levels",
        "codebook,3,per_tensor,levels=",
        "codebook,3,per_tensor,zero,levels=2",
        "codebook,3,per_tensor,grid=7,zero",
        "codebook,3,per_tensor,grid",
        "codebook,3,per_tensor, zero",
        "codebook,3,per_tensor)(",
        "Codebook,3,per_tensor",
    ],
)
def test_refuses_what_is_no_split(inner):
    with pytest.raises(RecipeError, match=r"not a split: 'split\(.*'; expected e\.g\. 'split\("):
        Format.parse(f"uint2 per_tensor split({inner})")


@pytest.mark.parametrize("end", [" x", ")", " split(codebook,3,per_tensor)"])
def test_nothing_follows_a_split(end):
    with pytest.raises(RecipeError, match="not a split"):
        Format.parse("uint2 per_tensor split(codebook,3,per_tensor)" + end)


@pytest.mark.parametrize("over", ["per_axis", "per_row", "per_axis(1,2)", "per_block(1)"])
def test_refuses_a_split_over_what_is_no_granularity(over):
    with pytest.raises(RecipeError, match="not a granularity: 'per_"):
        Format.parse(f"uint2 per_tensor split(codebook,3,{over})")


@given(GRANULARITIES)
def test_the_text_of_a_granularity(granularity):
    assert parse_granularity(str(granularity)) == granularity


# Splits


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "coodbook"}, "unknown form 'coodbook'; did you mean 'codebook'"),
        ({"form": "auto"}, "unknown form 'auto'"),
        ({"clusters": 1}, "1 clusters: expected 2..255"),
        ({"clusters": 256}, "256 clusters: expected 2..255"),
        ({"grid": 6}, "a grid of 6 bits: expected 7 or 8"),
        ({"grid": 9}, "a grid of 9 bits: expected 7 or 8"),
        ({"levels": -1}, "-1 levels: expected 1..256"),
        ({"levels": 257}, "257 levels: expected 1..256"),
        ({"form": "branches"}, "branches hold zeros .* expected zero, and no levels"),
        ({"form": "branches", "zero": True, "levels": 2}, "expected zero, and no levels"),
        ({"levels": 1, "zero": True}, "ranges that hold zero take the format's levels"),
    ],
)
def test_refuses_what_no_split_can_be(fields, message):
    with pytest.raises(RecipeError, match=message):
        Split(**fields)


def test_a_text_cannot_ask_for_what_no_split_can_be():
    with pytest.raises(RecipeError, match="take the format's levels; leave one out"):
        Format.parse("uint2 per_axis(1) split(int8-grid,3,per_tensor,levels=1,zero,grid=7)")
    with pytest.raises(RecipeError, match="unknown form 'table'"):
        Format.parse("uint2 per_axis(1) split(table,3,per_tensor)")


@pytest.mark.parametrize(
    ("split", "bits", "entries", "index"),
    [
        (Split(), 2, 12, 4),
        (Split(), 4, 48, 8),
        (Split(), 8, 768, 16),
        (Split(zero=True), 2, 10, 4),  # the parts share the value zero
        (Split(zero=True), 4, 46, 8),
        (Split("branches", zero=True), 2, 10, None),
        (Split(clusters=2, zero=True), 2, 7, 4),
        (Split(clusters=16, levels=1), 2, 16, 4),
        (Split(clusters=17, levels=1), 2, 17, 8),
        (Split(clusters=4, levels=1), 8, 4, 2),
        (Split(clusters=5, levels=1), 8, 5, 4),
        (Split(clusters=3, levels=5), 4, 15, 4),
        (Split("int8-grid", 255, levels=1), 8, 255, 8),
    ],
)
def test_the_values_of_the_whole(split, bits, entries, index):
    assert split.entries(bits) == entries
    if index is not None:
        assert index_bits(entries) == index
        found = Format("uint8", PerAxis(0), bits, split)
        assert (found.stored_bits, found.container) == (index, f"uint{index}")


@given(st.integers(1, 2**16))
def test_the_narrowest_index(entries):
    bits = index_bits(entries)
    assert entries <= 2**bits
    assert bits == 2 or entries > 2 ** (bits // 2)


@pytest.mark.parametrize(
    ("text", "bits", "container"),
    [
        ("int2 per_axis(0)", 2, "int2"),
        ("uint4:3 per_axis(0)", 4, "uint4"),
        ("int8:7 per_tensor", 8, "int8"),
        ("uint2 per_axis(0) split(branches,3,per_tensor,zero)", 6, "uint2"),
        ("int4:3 per_axis(0) split(branches,2,per_tensor,zero)", 8, "int4"),
        ("uint2 per_axis(0) split(nearest,3,per_tensor)", 4, "int4"),
        ("uint2 per_axis(0) split(codebook,3,per_tensor)", 4, "uint4"),
        ("uint2 per_axis(0) split(int8-grid,4,per_axis(0),levels=1)", 2, "uint2"),
    ],
)
def test_stored_bits_and_what_stores_them(text, bits, container):
    format = Format.parse(text)
    assert (format.stored_bits, format.container) == (bits, container)


@given(formats())
def test_the_plain_format_differs_in_its_split_alone(format):
    assert format.plain.split is None
    assert format.plain.plain == format.plain
    assert replace(format.plain, split=format.split) == format
    assert str(format).startswith(str(format.plain))
    assert format.plain.stored_bits == DTYPES[format.dtype].bitwidth
    assert format.plain.container == format.dtype
    assert (format.codes, format.numpy_type) == (format.plain.codes, format.plain.numpy_type)


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
    assert len({Format("int8"), Format("int8", split=Split()), Format("int8", split=Split())}) == 2


def test_more_values_than_any_index_names_are_no_format():
    with pytest.raises(RecipeError, match="more than 65536 values"):
        Format.parse("uint16 per_tensor split(codebook,255,per_tensor)")
