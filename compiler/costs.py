"""What a weighted node costs on a machine: seconds of its real kernel by shape and form.

A `Workload` is the shape of one node's work. A `CostTable` holds measured seconds by workload and
form; what it does not hold it takes from the nearest workload of the same kind, and it says which.
A target measures its own table (`Target.profile`) and may ship one. Tables are JSON files.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from .choices import Choice
from .formats import PerAxis, PerBlock
from .graph import Weight

Source = Literal["measured", "nearest", "shipped"]


@dataclass(frozen=True)
class Cost:
    """What one node costs in one form.

    Attributes:
        bytes: Stored bytes of codes and scales.
        seconds: Time of one call on one thread; None where nothing like it was measured.
        source: `measured` (this shape, on this machine), `nearest` (another shape of the same
            kind, on this machine), `shipped` (the table that came with the target).
    """

    bytes: int
    seconds: float | None = None
    source: Source | None = None


@dataclass(frozen=True)
class Workload:
    """The shape of one weighted node's work.

    Attributes:
        op_type: MatMul, Gemm, Conv, ConvTranspose or Gather.
        weight: Shape of the weight.
        input: Shape of the other operand in one call.
        attributes: (name, value) of strides, pads, dilations, group, transB; sorted; defaults
            are left out.
    """

    op_type: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    attributes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, reader: Weight, shape: tuple[int, ...]) -> Workload:
        """Return the workload of a node whose other operand has this shape."""
        assert reader.value.const_value is not None
        plain = []
        for name, attribute in sorted(reader.node.attributes.items()):
            if name in ("strides", "pads", "dilations", "output_padding"):
                value: Any = tuple(attribute.as_ints())
                if set(value) == {0 if "pad" in name else 1}:
                    continue
            elif name in ("group", "transA", "transB"):
                value = attribute.as_int()
                if value == (1 if name == "group" else 0):
                    continue
            elif name == "auto_pad" and attribute.as_string() != "NOTSET":
                value = attribute.as_string()
            else:
                continue
            plain.append((name, value))
        weight = tuple(int(d) for d in reader.value.const_value.shape.numpy())
        return cls(reader.node.op_type, weight, tuple(shape), tuple(plain))


def stored_bytes(workload: Workload, choice: Choice) -> int:
    """Return the bytes of a weight's codes and float32 scales; 4 an element where it is float."""
    count = prod(workload.weight)
    if choice.format is None:
        return 4 * count
    codes = (count * choice.bits + 7) // 8
    match choice.format.granularity:
        case PerAxis(axis):
            scales = workload.weight[axis]
        case PerBlock(axis, size):
            scales = count // workload.weight[axis] * -(-workload.weight[axis] // size)
        case _:
            scales = 1
    return codes + 4 * scales


@dataclass(frozen=True)
class CostTable:
    """Measured seconds by workload and form (to be filled)."""
