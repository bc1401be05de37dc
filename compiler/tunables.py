"""What can still be moved in a rounded model: biases, scales, and codes within their limits.

The graph stays as it is, so neither size nor speed changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from . import notes
from .graph import is_constant, is_float, is_standard, undequantized
from .stored import SUFFIX


@dataclass(frozen=True)
class Fit:
    """An int32 bias to be: |bias| / (operand scale * weight scale) has to fit.

    Attributes:
        bias: Name of the bias.
        operand: Name of the operand's scale.
        weight: Name of the weight's scale.
    """

    bias: str
    operand: str
    weight: str


@dataclass(frozen=True)
class Codes:
    """Codes with one reader, a DequantizeLinear, that any other may replace.

    Attributes:
        limits: The least and the greatest.
        weight: Name of the weight that they were made from.
        shape: Theirs, and the weight's.
    """

    limits: tuple[int, int]
    weight: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tunables:
    """Names of float initializers, in graph order, each in one of the groups.

    Attributes:
        biases: Bias -> (the value that it is added to or that holds it, its channel axis there).
        scales: Scales of weights in codes.
        ranges: Scales of activations in codes.
        codes: Codes of weights -> what they are.
        fits: What limits biases and scales together.
    """

    biases: dict[str, tuple[str, int]]
    scales: tuple[str, ...]
    ranges: tuple[str, ...]
    codes: dict[str, Codes]
    fits: tuple[Fit, ...]

    @classmethod
    def of(
        cls,
        model: ir.Model,
        biases: bool = True,
        scales: bool = True,
        ranges: bool = True,
        codes: bool = True,
    ) -> Tunables:
        """Return what the model has of each group; the flags leave groups out.

        What is a graph output stays out, and so does what belongs to two groups.
        """
        layers = dict(_biases(model))
        groups = [
            list(dict.fromkeys(group)) for group in (layers, _weight_scales(model), _ranges(model))
        ]
        seen = Counter(name for group in groups for name in group)
        added, of_weights, of_values = (
            [name for name in group if wanted and seen[name] == 1]
            for group, wanted in zip(groups, (biases, scales, ranges), strict=True)
        )
        found = {name: layers[name] for name in added}
        open_ = dict(_codes(model)) if codes else {}
        return cls(found, tuple(of_weights), tuple(of_values), open_, tuple(_fits(model)))

    def without_codes(self) -> Tunables:
        """Return the rest."""
        return replace(self, codes={})

    def known_to(self, floats: ir.Model) -> Tunables:
        """Return those whose codes have their weight in the float model; others cannot start."""
        known = {str(v.name): v.const_value for v in floats.graph.initializers.values()}
        kept = {
            name: codes
            for name, codes in self.codes.items()
            if (weight := known.get(codes.weight)) is not None
            and tuple(weight.shape.numpy()) == codes.shape
        }
        return replace(self, codes=kept)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.biases, *self.scales, *self.ranges, *self.codes)


def is_rounded(model: ir.Model) -> bool:
    """Whether the main graph has weights or activations in codes."""
    return any(
        is_standard(node, "QuantizeLinear", "DynamicQuantizeLinear")
        or (is_standard(node, "DequantizeLinear") and is_constant(node.inputs[0]))
        for node in model.graph
    )


def _is_free(value: ir.Value | None) -> bool:
    """Whether the value is a float initializer that nobody outside the graph sees."""
    if value is None or value.is_graph_output():
        return False
    return is_constant(value) and is_float(value)


def _ranges(model: ir.Model) -> Iterator[str]:
    """Yield the scales of all quantizers."""
    for node in model.graph:
        if is_standard(node, "QuantizeLinear") and _is_free(node.inputs[1]):
            yield _name(node.inputs[1])


def _weight_scales(model: ir.Model) -> Iterator[str]:
    """Yield the scales of all weights in codes."""
    for node in model.graph:
        if _holds_weight(node) and _is_free(node.inputs[1]):
            yield _name(node.inputs[1])


def _codes(model: ir.Model) -> Iterator[tuple[str, Codes]]:
    """Yield the codes of weights that are no entries of a table and no part of a weight."""
    for node in model.graph:
        value = node.inputs[0] if _holds_weight(node) else None
        if value is None or value.is_graph_output() or len(tuple(value.uses())) > 1:
            continue
        note = notes.read(value)
        if note.format is None or note.split is not None or note.part is not None:
            continue
        limits = note.format.symmetric_codes if note.format.signed else note.format.codes
        assert value.const_value is not None
        weight, shape = _name(value).removesuffix(SUFFIX), tuple(value.const_value.shape.numpy())
        yield _name(value), Codes(limits, weight, shape)


def _name(value: ir.Value | None) -> str:
    """Return the name of a value that is there."""
    assert value is not None
    return str(value.name)


def _holds_weight(node: ir.Node) -> bool:
    """Whether the node dequantizes a constant that is no bias: others dictate a bias' scale."""
    if not is_standard(node, "DequantizeLinear") or not is_constant(node.inputs[0]):
        return False
    codes = node.inputs[0]
    assert codes is not None
    assert codes.const_value is not None
    return codes.const_value.dtype != ir.DataType.INT32


def _biases(model: ir.Model) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield each bias of a layer, and where its channels can be seen."""
    for node in model.graph:
        if is_standard(node, "Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2:
            axis = -1 if node.op_type == "Gemm" else 1
            if _is_free(node.inputs[2]):
                yield _name(node.inputs[2]), (_name(node.outputs[0]), axis)
        elif is_standard(node, "Add"):
            yield from _added(node)


def _added(node: ir.Node) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the constant vector that an Add puts behind a MatMul."""
    for product, bias in (node.inputs, node.inputs[::-1]):
        if product is None or bias is None or not _is_free(bias):
            continue
        maker = undequantized(product).producer()
        assert bias.const_value is not None
        shape = bias.const_value.shape.numpy()
        if maker is None or not is_standard(maker, "MatMul") or not shape:
            continue
        if bias.const_value.size == shape[-1]:
            yield str(bias.name), (str(node.outputs[0].name), -1)


def _fits(model: ir.Model) -> Iterator[Fit]:
    """Yield a fit for each Conv and Gemm whose operand and weight have constant scales."""
    for node in model.graph:
        if not is_standard(node, "Conv", "Gemm") or len(node.inputs) < 3:
            continue
        bias, scales = node.inputs[2], [_scale_of(value) for value in node.inputs[:2]]
        if bias is None or not is_constant(bias) or not is_float(bias) or None in scales:
            continue
        operand, weight = scales
        assert operand is not None
        assert weight is not None
        yield Fit(str(bias.name), str(operand.name), str(weight.name))


def _scale_of(value: ir.Value | None) -> ir.Value | None:
    """Return the constant scale behind a dequantized operand, or None."""
    node = value.producer() if value is not None else None
    if node is None or not is_standard(node, "DequantizeLinear"):
        return None
    return node.inputs[1] if is_constant(node.inputs[1]) else None
