"""How numbers are stored: granularity and integer formats as small values.

A `Format` says everything a quantizer must know besides the scale itself. It prints as text
(`int4 per_axis(0)`, `uint8 per_tensor`, `int8:7 per_axis(1)`) and `Format.parse` reads it back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Format:
    """An integer format.

    Attributes:
        dtype: The container, a key of `DTYPES`.
        granularity: Which elements share a scale.
        bits: How many bits of the container are used; 0 means all of them. Seven bits in an int8
            keep the pair sums of u8 x s8 kernels inside 16 bits on x86 without VNNI.
    """

    dtype: str
    granularity: Granularity = PerTensor()
    bits: int = 0

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

    @property
    def signed(self) -> bool:
        """Whether the container is signed."""
        return not self.dtype.startswith("u")

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
        return f"{self.dtype}{used} {self.granularity}"

    @classmethod
    def parse(cls, text: str) -> Format:
        """Read what `str` wrote.

        Raises:
            RecipeError: The text is not a format.
        """
        found = re.fullmatch(
            r"(\w+?)(?::(\d+))? (per_\w+)(?:\((-?\d+)(?:,(\d+))?\))?", text.strip()
        )
        if found is None:
            raise RecipeError(f"not a format: {text!r}; expected e.g. 'int8 per_axis(0)'")
        dtype, bits, kind, axis, size = found.groups()
        granularity: Granularity
        if kind == "per_tensor" and axis is None:
            granularity = PerTensor()
        elif kind == "per_axis" and axis is not None and size is None:
            granularity = PerAxis(int(axis))
        elif kind == "per_block" and axis is not None and size is not None:
            granularity = PerBlock(int(axis), int(size))
        else:
            raise RecipeError(
                f"not a granularity: {text!r}; expected per_tensor, per_axis(0) or per_block(0,32)"
            )
        return cls(dtype, granularity, int(bits or 0))
