"""What quantized weights take in a file: codes or indices, tables, scales and zero points.

Counted in the finished graph, from what lies between a stored weight and the node that reads it,
so that no layout can claim fewer bits than it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from . import notes
from .graph import is_constant


@dataclass(frozen=True)
class Stored:
    """Stored bits of all quantized weights of a model, per weight.

    Attributes:
        codes: Bits of codes or indices; of several where a weight is split into branches.
        tables: Bits of the tables that indices point into.
        scales: Bits of scales, zero points, and shapes that unpacking needs.
    """

    codes: float
    tables: float
    scales: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.codes + self.tables + self.scales


def stored_bits(model: ir.Model) -> Stored | None:
    """Return the stored bits per weight over all quantized weights; None where there is none."""
    folded = _folded(model)
    elements: dict[str, int] = {}
    bits = {"codes": 0, "tables": 0, "scales": 0}
    counted: set[int] = set()
    for value in model.graph.initializers.values():
        note, tensor = notes.read(value), value.const_value
        if tensor is None:
            continue
        if note.format is not None:
            elements[note.part or str(value.name)] = tensor.size
        elif note.part is None or note.split is not None:
            continue  # neither codes nor the scales of rows: a float, perhaps a part
        kind = "codes" if note.format is not None else "scales"
        for what, one in ((kind, value), *_beside(value, folded)):
            if id(one) not in counted and one.const_value is not None:
                counted.add(id(one))
                bits[what] += 8 * one.const_value.nbytes
    total = sum(elements.values())
    return Stored(*(bits[kind] / total for kind in bits)) if total else None


def _folded(model: ir.Model) -> set[int]:
    """Return the nodes of the main graph that compute from constants alone, by identity."""
    known: set[int] = set()
    nodes: set[int] = set()
    for node in model.graph:
        inputs = [one for one in node.inputs if one is not None]
        if inputs and all(is_constant(one) or id(one) in known for one in inputs):
            nodes.add(id(node))
            known |= {id(output) for output in node.outputs}
    return nodes


def _beside(value: ir.Value, folded: set[int]) -> Iterator[tuple[str, ir.Value]]:
    """Yield (kind, initializer) of what is read on the way from a stored weight to its reader."""
    ahead, seen = [value], set()
    while ahead:
        for node in (use.node for use in ahead.pop().uses()):
            if id(node) not in folded or id(node) in seen:
                continue
            seen.add(id(node))
            ahead += node.outputs
            looks_up = node.op_type in ("Gather", "GatherElements")
            for number, one in enumerate(node.inputs):
                kind = "tables" if looks_up and number == 0 else "scales"
                yield from ((kind, source) for source in _sources(one) if source is not value)


def _sources(value: ir.Value | None) -> Iterator[ir.Value]:
    """Yield the initializers that a folded value is computed from."""
    producer = value.producer() if value is not None else None
    if producer is not None:
        for one in producer.inputs:
            yield from _sources(one)
    elif value is not None:
        yield value
