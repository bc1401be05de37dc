"""What a weight may become: every form of it that the target runs, finest first, float last.

A `Choice` says how the weight is stored and what its kernel reads beside it. It prints as text
(`int4 per_axis(0) x uint8`, `int4 per_block(0,32) x float`, `float`), and `Choice.parse` reads it
back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .capability import Capability, Legality
from .errors import RecipeError
from .formats import DTYPES, Format, Granularity, PerAxis, PerBlock, PerTensor
from .graph import Weight

FLOAT_BITS = 32


@dataclass(frozen=True)
class Choice:
    """One form of a weighted node.

    Attributes:
        format: How the weight is stored; None is float32.
        activation: Container of the other operand, or `float`.
    """

    format: Format | None = None
    activation: str = "float"

    @property
    def bits(self) -> int:
        """Stored bits of one code; scales are not counted."""
        return FLOAT_BITS if self.format is None else DTYPES[self.format.dtype].bitwidth

    def __str__(self) -> str:
        return "float" if self.format is None else f"{self.format} x {self.activation}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read what `str` wrote.

        Raises:
            RecipeError: The text is not a choice.
        """
        if text.strip() == "float":
            return cls()
        format, between, activation = text.rpartition(" x ")
        if not between or activation not in {"float", *DTYPES}:
            raise RecipeError(
                f"not a choice: {text!r}; expected e.g. 'int8 per_axis(0) x uint8' or 'float'"
            )
        return cls(Format.parse(format), activation)


def legal_choices(readers: Sequence[Weight], capability: Capability) -> tuple[Choice, ...]:
    """Return the choices that every reader of one weight can take; float is always the last.

    Args:
        readers: The weight as each of its readers sees it, at least one.
        capability: The target's.
    """
    common = list(_choices_of(readers[0], capability))
    for reader in readers[1:]:
        others = set(_choices_of(reader, capability))
        common = [choice for choice in common if choice in others]
    return (*sorted(common, key=_fineness), Choice())


def _fineness(choice: Choice) -> tuple[int, str]:
    """Order by width, the widest first, then by text, so that the order is the same always."""
    return -choice.bits, str(choice)


def _choices_of(reader: Weight, capability: Capability) -> Iterator[Choice]:
    """Yield what one reader can take, in the finest legal granularity and in every block size."""
    op_type = reader.node.op_type
    for rows, activation in (
        (capability.rows, capability.activation),
        (capability.widened, "float"),
    ):
        seen: set[Format] = set()
        for row in rows:
            if row.op_type != op_type or activation not in row.activations:
                continue
            for dtype in row.weights:
                for granularity in _granularities(reader, row):
                    used = min(DTYPES[dtype].bitwidth, capability.weight_bits)
                    format = Format(dtype, granularity, used)
                    if format not in seen:
                        seen.add(format)
                        yield Choice(format, activation)


def _granularities(reader: Weight, row: Legality) -> Iterator[Granularity]:
    """Yield the finest granularity along channels that the row takes, and every legal block."""
    if "per_axis" in row.granularity:
        yield PerAxis(reader.axis)
    elif "per_tensor" in row.granularity:
        yield PerTensor()
    assert reader.value.const_value is not None
    shape = reader.value.const_value.shape.numpy()
    if "per_block" in row.granularity and len(shape) == 2:
        inner = 1 - reader.axis
        yield from (PerBlock(inner, size) for size in row.blocks if shape[inner] % size == 0)
