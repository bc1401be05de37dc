"""Finds what repeats in a model from its graph alone: residual blocks, and q, k, v of attentions.

A unit is h -> h + f(h), where f has a weight and the skip beside it is h itself or a short branch
(the 1x1 Conv of a ResNet where it halves its images). Where the same few units repeat, as
attention and MLP in a transformer, each repetition is one block. A unit asks no more than that
both its branches come from h: masks, tables of positions, an encoder's output may enter anywhere.

The blocks are those of Layer-Wise Quantization (arXiv 2406.17415), which ranks them by how far
they turn the hidden state. Names play no part. The model is to be tidy (constants folded, types
inferred, operators standard); only its main graph is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import onnx_ir as ir

from .graph import FLOATS, Weight, is_constant, is_standard, weight_of

LONGEST_PERIOD = 8


@dataclass(frozen=True)
class Block:
    """One repetition of a model's structure, or a residual unit that does not repeat.

    Attributes:
        index: Place in the result of `find_blocks`, from 0.
        entry: The hidden state that comes in.
        exit: The hidden state that goes out; its shape may differ from the entry's.
        weights: Names of the weights of Conv, ConvTranspose, Gemm and MatMul, in graph order.
    """

    index: int
    entry: ir.Value
    exit: ir.Value
    weights: tuple[str, ...]


@dataclass(frozen=True)
class _Unit:
    """A residual sum, the value its branches come from, the bits of both and of all between."""

    entry: ir.Value
    join: ir.Value
    ends: int
    span: int


class _Flow:
    """The float activations of a graph, and which depend on which.

    A set of them is an integer: bit i stands for the i-th in graph order. By the id of a value,
    `above` gives it and what it depends on, `below` it and what depends on it, `weights` the
    weight of the node that makes it; a table is none: a Gather does not transform.
    """

    def __init__(self, graph: ir.Graph) -> None:
        every = (*graph.inputs, *(value for node in graph for value in node.outputs))
        floats = (*FLOATS, None)  # what a foreign operator makes may be of unknown type
        self.values = [v for v in every if v.dtype in floats and not is_constant(v)]
        self.bit = {id(value): 1 << i for i, value in enumerate(self.values)}
        self.above, self.below = dict(self.bit), dict(self.bit)
        for value in self.values:
            for v in self.reads(value.producer()):
                self.above[id(value)] |= self.above[id(v)]
        for value in reversed(self.values):
            for v in self.reads(value.producer()):
                self.below[id(v)] |= self.below[id(value)]
        made = ((v, node) for v in self.values if (node := v.producer()) is not None)
        found = ((v, weight_of(node)) for v, node in made if not is_standard(node, "Gather"))
        self.weights = {id(v): weight for v, weight in found if weight is not None}
        self.weighted = reduce(or_, (self.bit[key] for key in self.weights), 0)

    def reads(self, node: ir.Node | None) -> list[ir.Value]:
        """Return the activations that the node reads, each once."""
        inputs = {id(v): v for v in node.inputs if v is not None} if node else {}
        return [value for key, value in inputs.items() if key in self.bit]

    def members(self, bits: int) -> list[ir.Value]:
        """Return the values of a set in graph order."""
        digits = reversed(f"{bits:b}")
        return [v for v, digit in zip(self.values, digits, strict=False) if digit == "1"]

    def span(self, first: ir.Value, last: ir.Value) -> int:
        """Return the values on the ways from `first` to `last`, with both; 0 without a way."""
        return self.below[id(first)] & self.above[id(last)]

    def looks(self, bits: int) -> list[tuple[str, tuple[int, ...]]]:
        """Return operator and shape of the weights that make these values, sorted."""
        weights = [w for key, w in self.weights.items() if self.bit[key] & bits]
        return sorted((weight.node.op_type, _shape(weight)) for weight in weights)


def find_blocks(model: ir.Model) -> list[Block]:
    """Return the model's blocks in graph order; streams that run side by side come one by one.

    Neither names nor the order of independent nodes change the blocks, but for the order of
    `weights` and of streams of equal depth. A weight beside the stream, as that of the keys in a
    cross-attention, belongs to the first block that needs it.
    """
    flow = _Flow(model.graph)
    units = _top_level(flow, _units(flow, model.graph))
    taken = reduce(or_, (unit.span for unit in units), 0)
    blocks: list[Block] = []
    tail: list[str] = []
    for groups in (_repetitions(flow, chain) for chain in _chains(flow, units)):
        ends: list[ir.Value] = [group[0].entry for group in groups[1:]]
        tail = _operators(flow, flow.span(groups[-2][-1].join, ends[-1])) if ends else tail
        ends.append(_end_like(flow, groups[-1][-1].join, tail))
        for entry, end in zip((group[0].entry for group in groups), ends, strict=True):
            blocks.append(Block(len(blocks), entry, end, _names(flow, entry, end, taken)))
    return blocks


def attention_groups(model: ir.Model) -> list[tuple[str, ...]]:
    """Return the names of the weights of q, k and v of each attention, in graph order.

    Only those that read one same value are listed, in this order: k and v where the queries
    come from elsewhere, and nothing where one weight makes all three.
    """
    flow = _Flow(model.graph)
    found: dict[tuple[str, ...], None] = {}
    for node in model.graph:
        for operands in _attentions(flow, node):
            weights = [weight for value in operands if (weight := _projection(flow, value))]
            for source in (weight.node.inputs[0] for weight in weights):
                same = [str(w.value.name) for w in weights if w.node.inputs[0] is source]
                found[tuple(dict.fromkeys(same))] = None
    return [group for group in found if len(group) > 1]


def _shape(weight: Weight) -> tuple[int, ...]:
    """Return the shape of the weight."""
    assert weight.value.const_value is not None
    return tuple(int(size) for size in weight.value.const_value.shape.numpy())


def _units(flow: _Flow, graph: ir.Graph) -> list[_Unit]:
    """Return all residual units in graph order, nested ones too."""
    found: list[_Unit] = []
    for node in graph:
        is_sum = is_standard(node, "Add", "Sum") and id(node.outputs[0]) in flow.bit
        entry = _entry(flow, node) if is_sum else None
        if entry is None:
            continue
        join, start = node.outputs[0], flow.bit[id(entry)]
        span = flow.span(entry, join)
        # From the second layer on, attention scores depend on the mask that is added to them.
        # What gives that away: another unit ends inside but starts outside.
        ending = [u for u in found if flow.bit[id(u.join)] & span & ~start]
        if all(flow.bit[id(unit.entry)] & span for unit in ending):
            found.append(_Unit(entry, join, start | flow.bit[id(join)], span))
    return found


def _entry(flow: _Flow, node: ir.Node) -> ir.Value | None:
    """Return the value that the branches of a sum come from, if it is a residual one."""
    operands = flow.reads(node)
    for skip in operands if not _broadcasts(operands) else []:
        others = reduce(or_, (flow.above[id(v)] for v in operands if v is not skip), 0)
        for value, passed in _back(flow, skip):
            if flow.bit[id(value)] & others:
                body = flow.looks(others & flow.below[id(value)] & ~flow.bit[id(value)])
                if passed < sum(math.prod(shape) for _, shape in body):
                    return value
                break
    return None


def _broadcasts(operands: Sequence[ir.Value]) -> bool:
    """Whether the operands are known to differ in shape, as scores and a mask do."""
    shapes = [value.shape for value in operands if value.shape is not None]
    if len({len(shape) for shape in shapes}) > 1:
        return True
    return any(len({d for d in c if isinstance(d, int)}) > 1 for c in zip(*shapes, strict=True))


def _back(flow: _Flow, value: ir.Value) -> Iterator[tuple[ir.Value, int]]:
    """Yield the values along a possible skip, backwards, with the weight elements passed so far.

    A skip reads one activation at a time and passes one weight at most.
    """
    passed = 0
    while True:
        yield value, passed
        inputs, weight = flow.reads(value.producer()), flow.weights.get(id(value))
        if len(inputs) != 1 or (weight and passed):
            return
        passed += math.prod(_shape(weight)) if weight else 0
        value = inputs[0]


def _top_level(flow: _Flow, units: list[_Unit]) -> list[_Unit]:
    """Drop the long skips around rows of units, then the units inside other units."""
    held = {id(o): [u for u in units if u is not o and not u.ends & ~o.span] for o in units}
    rows = {o for o, us in held.items() if any(flow.span(a.join, b.entry) for a in us for b in us)}
    nested = {id(u) for o, us in held.items() if o not in rows for u in us}
    return [unit for unit in units if id(unit) not in rows | nested]


def _chains(flow: _Flow, units: list[_Unit]) -> list[list[_Unit]]:
    """Return rows of units in which each directly follows the one before: no weight between."""
    chains: list[list[_Unit]] = []
    # The count of what a value depends on grows along every way, however the nodes are ordered.
    for unit in sorted(units, key=lambda u: flow.above[id(u.join)].bit_count()):
        for chain in chains:
            span = flow.span(chain[-1].join, unit.entry)
            if span and not span & flow.weighted:
                chain.append(unit)
                break
        else:
            chains.append([unit])
    return chains


def _repetitions(flow: _Flow, chain: list[_Unit]) -> list[list[_Unit]]:
    """Cut a chain into repetitions; a unit that is in none stands alone."""
    looks = [flow.looks(unit.span & ~flow.bit[id(unit.entry)]) for unit in chain]
    groups: list[list[_Unit]] = []
    while chain:
        # The most units wins: a decoder's layers repeat, though in each two attentions look alike.
        best = max(range(1, LONGEST_PERIOD + 1), key=lambda p: (_covered(looks, p), -p))
        end = _covered(looks, best)
        groups += [chain[at : at + best] for at in range(0, end, best)]
        chain, looks = chain[end:], looks[end:]
    return groups


def _covered(looks: Sequence[object], period: int) -> int:
    """Return how many units at the start are whole repetitions of the first `period` ones."""
    count = 1
    while looks[count * period : (count + 1) * period] == looks[:period]:
        count += 1
    return count * period if count > 1 or period == 1 else 0


def _operators(flow: _Flow, span: int) -> list[str]:
    """Return the operators that make the values of a span, but for its first value, sorted."""
    return sorted(node.op_type for v in flow.members(span)[1:] if (node := v.producer()))


def _end_like(flow: _Flow, join: ir.Value, tail: list[str]) -> ir.Value:
    """Return what these operators (a LayerNormalization, a Relu) make of the join, or the join."""
    for value in flow.members(flow.below[id(join)]):
        span = flow.span(join, value)
        if span.bit_count() == len(tail) + 1 and _operators(flow, span) == tail:
            return value
    return join


def _names(flow: _Flow, entry: ir.Value, end: ir.Value, taken: int) -> tuple[str, ...]:
    """Return the names of the weights between two values, and of weights beside that lead in."""
    found = flow.span(entry, end) & ~flow.bit[id(entry)] & flow.weighted
    beside = flow.above[id(end)] & ~flow.above[id(entry)] & ~found & ~taken & flow.weighted
    for value in flow.members(beside):  # nearest only: an encoder's own weights lie further back
        if flow.span(value, end) & beside == flow.bit[id(value)]:
            found |= flow.bit[id(value)]
    return tuple(dict.fromkeys(str(flow.weights[id(v)].value.name) for v in flow.members(found)))


def _attentions(flow: _Flow, node: ir.Node) -> Iterator[Sequence[ir.Value]]:
    """Yield (queries, keys, values) of an attention that ends in this node."""
    for softmax in _sources(flow, flow.reads(node)[0]) if _is_product(flow, node) else []:
        for read in flow.reads(softmax) if is_standard(softmax, "Softmax") else []:
            for scores in _sources(flow, read):
                if _is_product(flow, scores):
                    yield (*flow.reads(scores), flow.reads(node)[1])


def _is_product(flow: _Flow, node: ir.Node) -> bool:
    """Whether the node multiplies two activations as matrices."""
    return is_standard(node, "MatMul") and len(flow.reads(node)) == 2


def _projection(flow: _Flow, value: ir.Value) -> Weight | None:
    """Return the one weight of a MatMul or Gemm that the value comes from, or None."""
    sources = [n for n in _sources(flow, value) if is_standard(n, "MatMul", "Gemm")]
    return weight_of(sources[0]) if len(sources) == 1 else None


def _sources(flow: _Flow, value: ir.Value) -> list[ir.Node]:
    """Return the nodes where the ways back from a value end: a weight, a product, a Softmax."""
    todo, seen, found = [value], 0, []
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None or flow.bit[id(value)] & seen:
            continue
        seen |= flow.bit[id(value)]
        if id(value) in flow.weights or _is_product(flow, node) or is_standard(node, "Softmax"):
            found.append(node)
        else:
            todo += flow.reads(node)
    return found
