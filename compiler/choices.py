"""What a weight may become: every form of it that the target runs, finest first, float last.

A `Choice` says how the weight is stored and what its kernel reads beside it. It prints as text
(`int4 per_axis(0) x uint8`, `int4 per_block(0,32) x float`, `float`), and `Choice.parse` reads it
back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from .capability import Capability, Legality
from .errors import RecipeError
from .formats import DTYPES, Format, Granularity, PerAxis, PerBlock, PerTensor
from .graph import Weight, readers_of, weights_of

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
        """Stored bits of one code; scales and tables are not counted."""
        return FLOAT_BITS if self.format is None else self.format.stored_bits

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
    # Readers that see the channels on different axes share one scale for the whole tensor, and so
    # do the matrices of a stack: integer kernels take a scale a column of one matrix only.
    whole = len({reader.axis for reader in readers}) > 1 or any(map(_is_stack, readers))
    each = [list(_choices_of(reader, capability, whole)) for reader in readers]
    found = dict.fromkeys(choice for choices in each for choice in choices)
    pairs = list(zip(readers, each, strict=True))
    common = [choice for choice in found if all(_takes(*pair, choice) for pair in pairs)]
    return (*sorted(common, key=fineness), Choice())


def _is_stack(reader: Weight) -> bool:
    """Whether a MatMul's weight is several matrices."""
    assert reader.value.const_value is not None
    return reader.node.op_type == "MatMul" and len(reader.value.const_value.shape) > 2


def _takes(reader: Weight, own: list[Choice], choice: Choice) -> bool:
    """Whether a reader can live with a choice; a lookup meets no activation."""
    if reader.node.op_type == "Gather":
        return Choice(choice.format) in own
    return choice in own


Activations = Literal["auto", "static", "dynamic", "float", "any"]


@dataclass(frozen=True)
class Open:
    """A weight whose form is open.

    Attributes:
        value: The float initializer.
        readers: The weight as each of its readers sees it.
        choices: What it may become: the widest integers first, float last.
    """

    value: ir.Value
    readers: tuple[Weight, ...]
    choices: tuple[Choice, ...]

    @property
    def name(self) -> str:
        """The initializer's name."""
        return str(self.value.name)

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        assert self.value.const_value is not None
        return int(self.value.const_value.size)


def open_weights(
    model: ir.Model,
    capability: Capability,
    widths: Sequence[int],
    activations: Activations,
    affine: bool = False,
) -> list[Open]:
    """Return every weight that has a choice of these widths, in graph order.

    Args:
        model: The model; only the main graph is looked at.
        capability: The target's.
        widths: Stored bits of a code that are offered; 32 lets a weight stay float.
        activations: `float` offers weight-only forms, `any` all forms; the others offer integer
            kernels, and weight-only forms where a node has no integer kernel (embeddings).
        affine: Whether weights of fewer than 8 bits have zero points where they may.
    """
    found = []
    for value in weights_of(model):
        readers = tuple(readers_of(value))
        legal = [c for c in legal_choices(readers, capability) if c.bits in widths]
        choices = tuple(allowed(with_zero_points(legal, affine), activations))
        if any(choice.format is not None for choice in choices):
            found.append(Open(value, readers, choices))
    return found


def allowed(legal: Sequence[Choice], activations: Activations) -> list[Choice]:
    """Return the choices of the kernels that are wanted; see `open_weights`."""
    if activations == "any":
        return list(legal)
    integer = [c for c in legal if c.activation != "float"]
    if activations == "float" or not integer:
        # Block-wise forms round their activations, so weights only means one scale a channel.
        return [c for c in legal if c.format is None or _whole(c)]
    return [c for c in legal if c.format is None or c.activation != "float"]


def with_zero_points(legal: Sequence[Choice], affine: bool) -> list[Choice]:
    """Return the choices whose weights have zero points, where there are any; or none of them."""
    signed = [c for c in legal if c.format is None or c.format.signed]
    if not affine:
        return signed
    shifted = [c for c in legal if c not in signed and c.bits < 8]
    kept = {(c.bits, c.activation) for c in shifted}
    return sorted(
        [*shifted, *(c for c in signed if (c.bits, c.activation) not in kept)],
        key=lambda c: (c.format is None, fineness(c)),
    )


def _whole(choice: Choice) -> bool:
    """Whether the weight is widened at load, so that the kernel is the float one."""
    format = choice.format
    blocked = format is not None and isinstance(format.granularity, PerBlock)
    return choice.activation == "float" and not blocked


def fineness(choice: Choice) -> tuple[int, str]:
    """Order by width, the widest first, then by text: the order is always the same."""
    return -choice.bits, str(choice)


def _choices_of(reader: Weight, capability: Capability, whole: bool) -> Iterator[Choice]:
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
                for granularity in _granularities(reader, row, whole):
                    used = min(DTYPES[dtype].bitwidth, capability.weight_bits)
                    format = Format(dtype, granularity, used)
                    if format not in seen:
                        seen.add(format)
                        yield Choice(format, activation)


def _granularities(reader: Weight, row: Legality, whole: bool) -> Iterator[Granularity]:
    """Yield the finest granularity along channels that the row takes, and every legal block."""
    if "per_axis" in row.granularity and not whole:
        yield PerAxis(reader.axis)
    elif "per_tensor" in row.granularity:
        yield PerTensor()
    assert reader.value.const_value is not None
    shape = reader.value.const_value.shape.numpy()
    if "per_block" in row.granularity and len(shape) == 2 and not whole:
        inner = 1 - reader.axis
        yield from (PerBlock(inner, size) for size in row.blocks if shape[inner] % size == 0)
