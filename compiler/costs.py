"""What a weighted node costs: the shape of its work, its multiply-adds, and its stored bytes.

A `Workload` is the shape of one node's work, a `Cost` what that work costs in one form. Measured
seconds are in `cost_table.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from .choices import Choice
from .formats import Granularity, PerAxis, PerBlock, PerTensor
from .graph import Weight
from .splitting import NEAREST_BLOCK, rounded_to

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

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute, or the default where it was left out."""
        return next((value for key, value in self.attributes if key == name), default)

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
    """Return the bytes of a weight's codes and float32 scales; 4 an element where it is float.

    Of a split weight: codes or indices, tables, and the scales that are left.
    """
    count, format = prod(workload.weight), choice.format
    if format is None:
        return 4 * count
    codes = (count * choice.bits + 7) // 8
    scales = groups(workload.weight, format.granularity)
    if format.split is None:
        return codes + 4 * scales
    split = format.split
    if split.form == "branches":
        return split.clusters * stored_bytes(workload, Choice(format.plain))
    if split.form == "nearest":
        return codes + 4 * (count // NEAREST_BLOCK)
    spans = _spans(workload, split.over)
    tables = spans if split.levels == 1 else max(spans, scales)
    entries = split.entries(format.bits) * tables
    if split.form == "codebook":
        return codes + 4 * entries
    blocked = isinstance(format.granularity, PerBlock)
    return codes + entries + 4 * (output_channels(workload) if blocked else scales)


def groups(shape: tuple[int, ...], granularity: Granularity) -> int:
    """Return how many groups of a weight's elements have a scale of their own."""
    match granularity:
        case PerAxis(axis):
            return shape[axis]
        case PerBlock(axis, size):
            return prod(shape) // shape[axis] * -(-shape[axis] // size)
    return 1


def output_channels(workload: Workload) -> int:
    """Return the output channels of a weight, or the rows of an embedding."""
    shape = workload.weight
    match workload.op_type:
        case "ConvTranspose":
            return shape[1] * int(workload.attribute("group", 1))
        case "Gemm":
            return shape[0 if workload.attribute("transB", 0) else 1]
        case "MatMul":
            return shape[-1]
    return shape[0]


def _spans(workload: Workload, over: Granularity) -> int:
    """Return how many clusterings a weight takes; blocks lie along its flattened channels."""
    if isinstance(over, PerTensor):
        return 1
    channels = output_channels(workload)
    if isinstance(over, PerAxis):
        return channels
    return channels * -(-prod(workload.weight) // channels // over.size)


def kernels_of(choice: Choice, reader: Weight) -> list[Choice]:
    """Return the unsplit choices whose kernels run a choice, one after the other."""
    format = choice.format
    if format is None or format.split is None:
        return [choice]
    behind = rounded_to(format, reader)
    match format.split.form:
        case "branches":
            return [Choice(format.plain, choice.activation)] * format.split.clusters
        case "codebook":
            return [Choice()]
    return [Choice(behind, choice.activation)]


def fits(workload: Workload) -> bool:
    """Whether the ranks of weight and input are those that the operator takes."""
    weight, rank = len(workload.weight), len(workload.input)
    match workload.op_type:
        case "MatMul":
            return weight >= 2 and rank >= 1
        case "Gemm":
            return weight == 2 and rank == 2
        case "Gather":
            return weight >= 1
        case "Conv" | "ConvTranspose":
            return weight == rank >= 3 and all(
                len(workload.attribute(name, ())) in (0, size * (rank - 2))
                for name, size in (("strides", 1), ("dilations", 1), ("pads", 2))
            )
    return False


def multiply_adds(workload: Workload) -> int:
    """Return the multiply-adds of one call; of a Gather, the elements that it copies.

    Padding counts as work. The workload must fit (see `fits`).
    """
    weight, given = workload.weight, workload.input
    match workload.op_type:
        case "Gather":
            return prod(given) * prod(weight[1:])
        case "Gemm":
            return given[1 if workload.attribute("transA", 0) else 0] * prod(weight)
        case "Conv":
            return given[0] * prod(output_positions(workload)) * prod(weight)
        case "ConvTranspose":
            return prod(given[:1] + given[2:]) * prod(weight)
    return prod(given[-2:-1]) * _batches(given[:-2], weight[:-2]) * prod(weight[-2:])


def _batches(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Return the number of matrices that two broadcast stacks of them make."""
    size = max(len(first), len(second))
    pairs = ((1,) * (size - len(one)) + one for one in (first, second))
    return prod(max(a, b) for a, b in zip(*pairs, strict=True))


def output_positions(workload: Workload) -> tuple[int, ...]:
    """Return the spatial sizes of a Conv's output; the workload must fit (see `fits`)."""
    sizes, kernel = workload.input[2:], workload.weight[2:]
    count = len(sizes)
    strides = workload.attribute("strides", (1,) * count)
    dilations = workload.attribute("dilations", (1,) * count)
    auto_pad = workload.attribute("auto_pad", "NOTSET")
    if auto_pad.startswith("SAME"):
        return tuple(-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
    pads = workload.attribute("pads", (0,) * 2 * count)
    if auto_pad == "VALID":
        pads = (0,) * 2 * count
    return tuple(
        max((sizes[i] + pads[i] + pads[count + i] - reach) // strides[i] + 1, 0)
        for i in range(count)
        for reach in [dilations[i] * (kernel[i] - 1) + 1]
    )
