"""Goes through a model's layers in the order of their data, with what each of them meets.

A wave is all layers whose operands depend on the same number of layers before: they do not depend
on one another, so what they meet is looked at together, and their weights may change before the
next wave. Beside the model at hand the float model walks along, which tells what was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from .contract import Context
from .covariance import Meeting, Sums
from .feeds import Feeds
from .graph import Weight, is_constant, operand_of, readers_of, undequantized, values
from .suffix import reads
from .tokens import Tokens, attention_of, attentions
from .walk import Walk

Array = npt.NDArray[Any]

HOLD = 4  # every 4th batch is held out
SHARE = 4  # of the memory bound: what sums take, what each of the walks keeps


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight with the one node that reads it.

    Attributes:
        reader: The weight as the node sees it.
        meeting: How it meets its operand.
        source: The operand's name in the float model.
        attention: The attention that it belongs to, or "".
    """

    reader: Weight
    meeting: Meeting
    source: str
    attention: str

    @property
    def name(self) -> str:
        """Name of the weight."""
        return str(self.reader.value.name)

    @property
    def operand(self) -> str:
        """Name of what the node reads beside the weight."""
        return str(operand_of(self.reader).name)


@dataclass(frozen=True)
class Met:
    """What a layer met.

    Attributes:
        layer: The layer.
        learn: Sums over the samples to learn from.
        held: Sums over those held out; none where there are too few batches.
        arrays: Operands of every batch (own, float model's), where they were asked for.
    """

    layer: Layer
    learn: Sums
    held: Sums
    arrays: Sequence[tuple[Array, Array]] = ()


def layer_of(value: ir.Value, floats: ir.Model) -> Layer | str:
    """Return a weight's layer, or why it has none that can be looked at."""
    readers = readers_of(value)
    if len(readers) != 1 or len(tuple(value.uses())) != 1:
        return "several layers read it"
    meeting = Meeting.of(readers[0])
    if meeting is None:
        return f"{readers[0].node.op_type} reads it"
    operand = operand_of(readers[0])
    if is_constant(operand):
        return "its operand is a constant"
    known = {str(v.name) for v in values(floats)}
    for name in (str(operand.name), str(undequantized(operand).name)):
        if name in known:
            return Layer(readers[0], meeting, name, "")
    return "the float model has no value like its operand"


class Layers:
    """Layers wave by wave.

    Args:
        model: The model at hand; weights of waves that were yielded may change.
        floats: The model before anything was lost.
        layers: What to look at.
        feeds: What to run.
        context: Its work folder, memory bound and progress.
        own: Whether layers meet what the model at hand makes of the feeds, not the float model.
        least: Weight of the token with the least attention; 1 lets all count alike.
        keep: Whether the operands themselves are wanted.
    """

    def __init__(
        self,
        model: ir.Model,
        floats: ir.Model,
        layers: Sequence[Layer],
        feeds: Feeds,
        context: Context,
        own: bool,
        least: float = 1.0,
        keep: bool = False,
    ) -> None:
        share = context.memory // SHARE
        self._feeds, self._own, self._least, self._keep = feeds, own, least, keep
        names = attentions(floats)
        homes = {str(node.name): node for node in floats.graph}
        self._attention = {
            one.name: attention_of(homes[str(one.reader.node.name)], names)
            for one in layers
            if str(one.reader.node.name) in homes
        }
        self.waves = [part for wave in _waves(model, layers) for part in _fitting(wave, share)]
        self._tokens = Tokens.of(floats, names if least < 1 else names[:1], feeds, context)
        there = [[one.operand for one in wave] for wave in self.waves]
        self._here = Walk(model, there, feeds, context.folder, share) if own else None
        sources = [[one.source for one in wave] for wave in self.waves]
        self._floats = Walk(floats, sources, feeds, context.folder, share)
        self._skipped = 0

    def skip(self) -> None:
        """Pass by the next wave."""
        self._skipped += 1

    def next(self) -> list[Met]:
        """Return what the next wave's layers meet."""
        index = self._floats.at + self._skipped
        wave = self.waves[index]
        kinds = {one: (one.meeting, self._attention.get(one.name, "")) for one in wave}
        sums = {kind: (self._empty(kind[0]), self._empty(kind[0])) for kind in kinds.values()}
        kept: dict[str, list[tuple[Array, Array]]] = {}
        for number, (x, y) in enumerate(self._both()):
            place = 1 if number % HOLD == HOLD - 1 else 0
            for one in {kinds[o]: o for o in wave}.values():
                own = x[one.operand] if self._own else y[one.source]
                weights = self._tokens.weights(number, kinds[one][1], own.shape, self._least)
                sums[kinds[one]][place].add(own, y[one.source] if self._own else None, weights)
                if self._keep:
                    kept.setdefault(one.operand, []).append((own, y[one.source]))
        self._skipped = 0
        return [Met(one, *sums[kinds[one]], kept.get(one.operand, ())) for one in wave]

    def _both(self) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        """Yield the operands of every batch, of the model at hand and of the float model."""
        floats = self._floats.next(self._skipped)
        if self._here is None:
            yield from (({}, one) for one in floats)
            return
        yield from zip(self._here.next(self._skipped), floats, strict=True)

    def _empty(self, meeting: Meeting) -> Sums:
        """Return sums of nothing."""
        return Sums.empty(meeting, apart=self._own)


def _waves(model: ir.Model, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return the layers by how many layers lie before them."""
    weighted = {one.reader.node for one in layers}
    depth: dict[ir.Node, int] = {}
    for node in model.graph:
        before = [v.producer() for _, v in reads(node)]
        depth[node] = max(
            (depth[p] + (p in weighted) for p in before if p is not None and p in depth),
            default=0,
        )
    waves: dict[int, list[Layer]] = {}
    for one in layers:
        waves.setdefault(depth[one.reader.node], []).append(one)
    return [waves[number] for number in sorted(waves)]


def _fitting(wave: list[Layer], memory: int) -> Iterator[list[Layer]]:
    """Cut a wave into runs whose sums fit the memory bound together; one layer always does."""
    part: list[Layer] = []
    seen: set[Meeting] = set()
    used = 0
    for one in wave:
        size = 0 if one.meeting in seen else 32 * one.meeting.groups * one.meeting.columns**2
        if part and used + size > memory:
            yield part
            part, used, seen = [], 0, set()
        part.append(one)
        seen.add(one.meeting)
        used += size
    yield part
