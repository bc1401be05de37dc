"""Checks a model after every pass: what must hold whatever the pass was for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass

from . import notes
from .formats import PerAxis, PerBlock
from .graph import subgraphs, values


@dataclass(frozen=True)
class Interface:
    """What a caller of the model sees: names, element types and shapes, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: ir.Model) -> Interface:
        """Return the interface of a model; inputs that are initializers do not count."""
        graph = model.graph
        real = [v for v in graph.inputs if v.name not in graph.initializers]
        return cls(tuple(map(_signature, real)), tuple(map(_signature, graph.outputs)))


def _signature(value: ir.Value) -> str:
    """Print name, type and rank or shape of a value."""
    return f"{value.name}: {value.type}{value.shape if value.shape is not None else '[?]'}"


def faults_of(model: ir.Model, interface: Interface) -> Iterator[str]:
    """Yield a line for everything that is wrong with the model."""
    now = Interface.of(model)
    if now != interface:
        yield f"the interface changed from {interface} to {now}"
    yield from _order_faults(model.graph, set())
    yield from _name_faults(model)
    used = {_short(node.domain) for node in model.graph.all_nodes()}
    for domain in sorted(used - set(map(_short, model.graph.opset_imports))):
        yield f"domain {domain!r} is used and not imported"
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            yield f"initializer {name!r} has no data"
    for value in values(model):
        yield from _note_faults(value)


def _short(domain: str) -> str:
    """Return the domain; the standard one has two names."""
    return "" if domain == "ai.onnx" else domain


def checker_fault(model: ir.Model) -> str | None:
    """Return the first complaint of onnx.checker, or None; big weights stay out of it."""
    try:
        CheckerPass(full_check=False)(model)
    except Exception as error:  # onnx raises its own types, onnx_ir wraps them in PassError
        reason = error.__cause__ or error
        return " ".join(str(reason).split())[:400]
    return None


def _order_faults(graph: ir.Graph, outer: set[int]) -> Iterator[str]:
    """Yield values that are read before they are made, and outputs that nobody makes."""
    made = outer | {id(v) for v in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for value in node.inputs:
            if value is not None and id(value) not in made:
                yield f"node {node.name!r} ({node.op_type}) reads {value.name!r} before it is made"
        for inner in subgraphs(node):
            yield from _order_faults(inner, made)
        made |= {id(v) for v in node.outputs}
    for value in graph.outputs:
        if id(value) not in made:
            yield f"output {value.name!r} is made by no node"


def _name_faults(model: ir.Model) -> Iterator[str]:
    """Yield empty names and names that two values have."""
    seen: set[str] = set()
    for value in values(model):
        if not value.name:
            yield f"a value of {value.producer()} has no name"
        elif value.name in seen:
            yield f"two values are named {value.name!r}"
        seen.add(value.name or "")
    for node in model.graph.all_nodes():
        if any(value is not None and not value.name for value in node.inputs):
            yield f"node {node.name!r} ({node.op_type}) reads a value that has no name"


def _note_faults(value: ir.Value) -> Iterator[str]:
    """Yield what a note says that cannot be."""
    note = notes.read(value)
    if note == notes.EMPTY:
        return
    if note.mode in ("static", "dynamic") and note.format is None:
        yield f"note on {value.name!r}: {note.mode} without a format"
    if note.low is not None and note.high is not None and not note.low <= 0 <= note.high:
        yield f"note on {value.name!r}: the range [{note.low}, {note.high}] does not contain zero"
    if note.format is None or value.shape is None:
        return
    match note.format.granularity:
        case PerAxis(axis) | PerBlock(axis, _) if not 0 <= axis < len(value.shape):
            yield f"note on {value.name!r}: axis {axis} of a rank-{len(value.shape)} value"
