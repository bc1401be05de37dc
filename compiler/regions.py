"""Which nodes can run in integers on a target, and which values that quantizes.

Anchors are nodes with a weight that have a legal integer form. Integers spread forward from them:
another op runs in integers when its kernel can, and when every input already is in codes for
another reason, so that joining costs no conversion. What stays float between two integer regions
is thereby a decision with a reason, not an accident.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from .capability import Capability
from .formats import Format, PerAxis, PerTensor
from .graph import activations_of, is_constant, is_float, is_standard, sole_consumer, weight_of


@dataclass
class Regions:
    """The integer part of a graph.

    Attributes:
        integer: Nodes that run in integers, by identity, in graph order.
        codes: Names of values that leave their producer in codes, whoever reads them.
        quantized: Values that have a quantizer, by name, in graph order.
        shares: Value name -> name of the value whose scale it takes.
        why_float: Output name of a node that stays float -> the reason.
    """

    integer: dict[int, ir.Node] = field(default_factory=dict)
    codes: set[str] = field(default_factory=set)
    quantized: dict[str, ir.Value] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    why_float: dict[str, str] = field(default_factory=dict)

    def runs(self, node: ir.Node | None) -> bool:
        """Whether the node runs in integers."""
        return node is not None and id(node) in self.integer

    def root(self, name: str) -> str:
        """Return the value that sets the scale for this one."""
        while name in self.shares:
            name = self.shares[name]
        return name


def container(bits: int, weight_bits: int = 8) -> tuple[str, int]:
    """Return (dtype, used bits) that store a weight of so many bits."""
    if bits > 4:
        return "int8", min(bits, weight_bits)
    return ("int2", 2) if bits == 2 else ("int4", bits)


def weight_format(
    node: ir.Node, bits: int, capability: Capability, activation: str
) -> Format | None:
    """Return the finest legal format for the node's weight at that width, or None."""
    weight = weight_of(node)
    if weight is None:
        return None
    dtype, used = container(bits, capability.weight_bits)
    for granularity in (PerAxis(weight.axis), PerTensor()):
        format = Format(dtype, granularity, used)
        if capability.legal(node.op_type, format, activation):
            return format
    return None


def find(
    model: ir.Model,
    capability: Capability,
    bits: int | Mapping[str, int],
    keep: Mapping[str, str] | None = None,
) -> Regions:
    """Return the integer regions; only the main graph: the bodies of If and Loop stay float.

    Args:
        model: The model.
        capability: The target's.
        bits: Width of all weights, or of each weight by name (8 where it has none).
        keep: Name of a node that stays float -> the reason.
    """
    regions = Regions()
    keep = keep or {}
    for node in model.graph:
        if regions.runs(node):  # the activation function of a node that joined
            continue
        reason = keep.get(str(node.name)) or _refusal(node, capability, bits, regions)
        if reason is None:
            _join(node, capability, regions)
        elif reason and node.outputs:
            regions.why_float[str(node.outputs[0].name)] = reason
    names = [
        *(v.name for v in model.graph.inputs),
        *(v.name for n in model.graph for v in n.outputs),
    ]
    found = regions.quantized
    regions.quantized = {str(name): found[str(name)] for name in names if name in found}
    return regions


def _refusal(  # noqa: PLR0911 - one return a reason reads best
    node: ir.Node, capability: Capability, bits: int | Mapping[str, int], regions: Regions
) -> str | None:
    """Return why the node stays float (empty: not worth a word), or None when it joins."""
    embedding = is_standard(node, "Gather") and weight_of(node) is not None
    if not node.outputs or not is_float(node.outputs[0]) or embedding:
        return ""
    weight = weight_of(node)
    if weight is not None and any(r.weights for r in capability.rows_of(node.op_type)):
        width = bits if isinstance(bits, int) else bits.get(str(weight.value.name), 8)
        if weight_format(node, width, capability, capability.activation) is None:
            return (
                f"no legal form with {width}-bit weights and {capability.activation} activations"
            )
        return None
    inputs = activations_of(node)
    ready = [v for v in inputs if v.name in regions.codes]
    form = capability.legal(node.op_type, None, capability.activation)
    known = is_standard(node, node.op_type) and (form or node.op_type in capability.carries)
    if not ready:
        return "its inputs are float" if known and inputs else ""
    if not known:
        return capability.why_float(node.op_type)
    if len(ready) < len(inputs):
        rest = next(v.name for v in inputs if v not in ready)
        return f"its input {rest} is float, and converting it would cost more than it saves"
    if node.op_type in ("Add", "Mul", "Concat") and any(
        is_constant(v) and is_float(v) for v in node.inputs
    ):
        return "one operand is a float constant"
    return None


def _join(node: ir.Node, capability: Capability, regions: Regions) -> None:
    """Let a node run in integers; say which of its values are in codes and share a scale."""
    tail = fused_activation(node, capability) or node
    for member in (node, tail):
        regions.integer[id(member)] = member
    output = tail.outputs[0]
    inputs = activations_of(node)
    for value in inputs:
        regions.quantized[str(value.name)] = value
    carried = node.op_type in capability.carries
    if carried or not all(row.float_output for row in capability.rows_of(node.op_type)):
        regions.codes.add(str(output.name))
        regions.quantized[str(output.name)] = output
    if carried:
        _share(regions, str(inputs[0].name), str(output.name))
    if node.op_type == "Concat":
        for value in inputs:
            _share(regions, str(output.name), str(value.name))


def fused_activation(node: ir.Node, capability: Capability) -> ir.Node | None:
    """Return the Relu or Clip that the runtime folds into this node's quantizer, or None.

    With the zero point at the least code, clipping to codes clips at zero; no quantizer may stand
    between the two, since a range taken before the activation wastes its negative half.
    """
    if node.op_type in capability.carries or node.op_type in capability.fuses:
        return None
    reader = sole_consumer(node.outputs[0])
    if (
        reader is None
        or reader.op_type not in capability.fuses
        or not is_standard(reader, reader.op_type)
    ):
        return None
    if reader.op_type == "Relu":
        return reader
    floor = reader.inputs[1] if len(reader.inputs) > 1 else None
    if floor is None or not is_constant(floor) or floor.const_value is None:
        return None
    return reader if float(floor.const_value.numpy()) == 0.0 else None


def _share(regions: Regions, root: str, name: str) -> None:
    """Make two values take one scale."""
    root, name = regions.root(root), regions.root(name)
    if root != name:
        regions.shares[name] = root
