"""How numbers are stored: granularity and integer formats as small values.

A `Format` says everything a quantizer must know besides the scale itself. It prints as text
(`int4 per_axis(0)`, `uint8 per_tensor`, `int8:7 per_axis(1)`) and `Format.parse` reads it back.
A weight that is split by value before it is rounded says so in its format:
`int2 per_axis(1) split(int8-grid,3,per_tensor)`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import numpy as np
import onnx_ir as ir

from .errors import RecipeError, did_you_mean

DTYPES: dict[str, ir.DataType] = {
    "int2": ir.DataType.INT2,
    "uint2": ir.DataType.UINT2,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int16": ir.DataType.INT16,
    "uint16": ir.DataType.UINT16,
}


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per_tensor"


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index of `axis` (per channel)."""

    axis: int

    def __str__(self) -> str:
        return f"per_axis({self.axis})"


@dataclass(frozen=True)
class PerBlock:
    """One scale for every `size` neighbours along `axis`."""

    axis: int
    size: int

    def __str__(self) -> str:
        return f"per_block({self.axis},{self.size})"


Granularity = PerTensor | PerAxis | PerBlock

Form = Literal["branches", "codebook", "int8-grid", "nearest"]
NEAREST_BITS = 4  # of the block-wise format that `nearest` rounds to
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Split:
    """How a weight is parted by value before its parts are rounded, each in a range of its own.

    Source: J. Song and F. Lin, SplitQuant (arXiv 2501.12428); docs/splitting.md.

    Attributes:
        form: How the parts are stored: `branches` (a layer a part, outputs added), `codebook` (an
            index a weight and a table of floats), `int8-grid` (the same with a table on the grid
            of an 8-bit weight), `nearest` (their sum, rounded to the runtime's block-wise format).
        clusters: Parts at most, 2..255.
        over: What one clustering spans.
        levels: Values that a part may take; 0 takes as many as the format's bits have codes.
        zero: Whether the range of each part holds zero, as it must where a part is a layer.
        grid: Bits of the grid of `int8-grid`: 8, or 7 where pair sums of 8-bit kernels saturate.
    """

    form: Form = "codebook"
    clusters: int = 3
    over: Granularity = PerTensor()
    levels: int = 0
    zero: bool = False
    grid: int = 8

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise RecipeError(f"unknown form {self.form!r}{did_you_mean(self.form, FORMS)}")
        if not 2 <= self.clusters <= 255:
            raise RecipeError(f"{self.clusters} clusters: expected 2..255")
        if self.grid not in (7, 8):
            raise RecipeError(f"a grid of {self.grid} bits: expected 7 or 8")
        if not 0 <= self.levels <= 256:
            raise RecipeError(f"{self.levels} levels: expected 1..256, or 0 for the format's own")
        if self.form == "branches" and (self.levels or not self.zero):
            raise RecipeError(
                "branches hold zeros where other parts have their weights, so their ranges hold "
                "zero and their levels are the format's: expected zero, and no levels"
            )
        if self.zero and self.levels:
            raise RecipeError("ranges that hold zero take the format's levels; leave one out")

    def parts(self, bits: int) -> str:
        """Return what a weight becomes, for people, with parts of so many bits."""
        if self.levels == 1:
            return f"{self.clusters} values"
        return f"{self.clusters} parts of {self.levels or 2**bits} levels"

    def entries(self, bits: int) -> int:
        """Return how many values the whole takes at most, with parts of so many bits."""
        if self.zero:  # the parts share the value zero
            return self.clusters * (int(2**bits) - 1) + 1
        return self.clusters * (self.levels or int(2**bits))

    def __str__(self) -> str:
        levels = f",levels={self.levels}" if self.levels else ""
        zero = ",zero" if self.zero else ""
        grid = f",grid={self.grid}" if self.grid != 8 else ""
        return f"split({self.form},{self.clusters},{self.over}{levels}{zero}{grid})"


SPLIT = re.compile(
    r"split\(([a-z0-9-]+),(\d+),(per_\w+(?:\([\d,-]+\))?)(?:,levels=(\d+))?"
    r"(,zero)?(?:,grid=(\d+))?\)"
)


def index_bits(entries: int) -> int:
    """Return the width of the narrowest container of indices into a table."""
    return next(bits for bits in (2, 4, 8, 16) if entries <= 2**bits)


@dataclass(frozen=True)
class Format:
    """An integer format.

    Attributes:
        dtype: The container, a key of `DTYPES`.
        granularity: Which elements share a scale.
        bits: How many bits of the container are used; 0 means all of them. Seven bits in an int8
            keep the pair sums of u8 x s8 kernels inside 16 bits on x86 without VNNI.
        split: How the weight is parted before it is rounded, or None. Container, granularity and
            bits are then those of a part.
    """

    dtype: str
    granularity: Granularity = PerTensor()
    bits: int = 0
    split: Split | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"unknown format {self.dtype!r}{did_you_mean(self.dtype, DTYPES)}")
        if isinstance(self.granularity, PerBlock) and self.granularity.size < 1:
            raise RecipeError(f"{self.granularity}: a block has at least one element")
        container = DTYPES[self.dtype].bitwidth
        if not self.bits:
            object.__setattr__(self, "bits", container)
        if not 2 <= self.bits <= container:
            raise RecipeError(f"{self.bits} bits do not fit {self.dtype}: expected 2..{container}")
        if self.split is not None and self.split.entries(self.bits) > 2**16:
            raise RecipeError(f"{self.split} of {self.bits} bits: more than 65536 values")

    @property
    def signed(self) -> bool:
        """Whether the container is signed."""
        return not self.dtype.startswith("u")

    @property
    def stored_bits(self) -> int:
        """Stored bits of one weight's codes or indices; scales and tables are not counted."""
        container = DTYPES[self.dtype].bitwidth
        if self.split is None:
            return container
        match self.split.form:
            case "branches":
                return container * self.split.clusters
            case "nearest":
                return NEAREST_BITS
            case _:
                return index_bits(self.split.entries(self.bits))

    @property
    def container(self) -> str:
        """The type that is stored: of codes, or of indices into a table."""
        if self.split is None or self.split.form == "branches":
            return self.dtype
        return "int4" if self.split.form == "nearest" else f"uint{self.stored_bits}"

    @property
    def plain(self) -> Format:
        """This format without a split."""
        return replace(self, split=None)

    @property
    def onnx_type(self) -> ir.DataType:
        """The container as ONNX element type."""
        return DTYPES[self.dtype]

    @property
    def numpy_type(self) -> np.dtype[np.generic]:
        """The narrowest numpy type that holds every code (int8 for int4 and int2)."""
        wide = 8 if self.bits <= 8 else 16
        return np.dtype(f"{'int' if self.signed else 'uint'}{wide}")

    @property
    def codes(self) -> tuple[int, int]:
        """Least and greatest code of an affine quantizer."""
        if self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def limit(self) -> int:
        """Greatest magnitude of a symmetric code in the restricted range (127 for int8)."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def symmetric_codes(self) -> tuple[int, int]:
        """Least and greatest code of a symmetric quantizer.

        Eight- and seven-bit codes keep to +-limit, so that integer kernels can add two products in
        16 bits; narrower ones cannot spare a level and use -8 or -2 as well.
        """
        return -self.limit - (self.bits < 7), self.limit

    def __str__(self) -> str:
        used = "" if self.bits == DTYPES[self.dtype].bitwidth else f":{self.bits}"
        split = f" {self.split}" if self.split is not None else ""
        return f"{self.dtype}{used} {self.granularity}{split}"

    @classmethod
    def parse(cls, text: str) -> Format:
        """Read what `str` wrote.

        Raises:
            RecipeError: The text is not a format.
        """
        plain, between, rest = text.strip().partition(" split(")
        found = re.fullmatch(r"(\w+?)(?::(\d+))? (per_\w+(?:\([^)]*\))?)", plain)
        if found is None:
            raise RecipeError(f"not a format: {text!r}; expected e.g. 'int8 per_axis(0)'")
        dtype, bits, granularity = found.groups()
        split = _split(f"split({rest}") if between else None
        return cls(dtype, parse_granularity(granularity), int(bits or 0), split)


def parse_granularity(text: str) -> Granularity:
    """Read `per_tensor`, `per_axis(0)` or `per_block(0,32)`.

    Raises:
        RecipeError: The text is none of these.
    """
    if text == "per_tensor":
        return PerTensor()
    if found := re.fullmatch(r"per_axis\((-?\d+)\)", text):
        return PerAxis(int(found[1]))
    if found := re.fullmatch(r"per_block\((-?\d+),(\d+)\)", text):
        return PerBlock(int(found[1]), int(found[2]))
    raise RecipeError(
        f"not a granularity: {text!r}; expected per_tensor, per_axis(0) or per_block(0,32)"
    )


def _split(text: str) -> Split:
    """Read what `str` wrote of a split."""
    found = SPLIT.fullmatch(text)
    if found is None:
        raise RecipeError(f"not a split: {text!r}; expected e.g. 'split(codebook,3,per_tensor)'")
    form, clusters, over, levels, zero, grid = found.groups()
    return Split(
        cast("Form", form),  # an unknown one is refused by Split itself
        int(clusters),
        parse_granularity(over),
        int(levels or 0),
        zero is not None,
        int(grid or 8),
    )
