"""Goes through a model's layers in the order of their data, with what each of them meets.

A wave is all layers whose operands depend on the same number of layers before: they do not depend
on one another, so what they meet is looked at together, and their weights may change before the
next wave. Beside the model at hand the float model walks along, which tells what was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import notes
from .biases import Bias
from .contract import Context
from .covariance import Doubles, Meeting, Sums
from .feeds import Feeds
from .graph import Weight, is_constant, operand_of, readers_of, undequantized, values
from .layer_sample import HELD_OUT, Sample
from .splitting import Channels
from .suffix import reads
from .tokens import Tokens, attention_of, attentions
from .walk import Walk
from .weights import opened

Array = npt.NDArray[Any]

SHARE = 4  # of the memory bound: what sums take, what each of the walks keeps


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight with the one node that reads it.

    Attributes:
        reader: The weight as the node sees it.
        meeting: How it meets its operand.
        source: The operand's name in the float model.
        whole: The weight in the float model, where it has been split by value since.
    """

    reader: Weight
    meeting: Meeting
    source: str
    whole: ir.Value | None = None

    def rows(self) -> Doubles:
        """Return the float weight by output channels, [rows, columns]."""
        value = self.reader.value if self.whole is None else self.whole
        with opened(value) as array:
            return Channels.of(self.reader).rows(np.asarray(array, np.float64))

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
        sample: Rows of what it met, where they were asked for.
    """

    layer: Layer
    learn: Sums
    held: Sums
    sample: Sample | None = None


def layer_of(value: ir.Value, floats: ir.Model) -> Layer | str:
    """Return a float weight's layer, or why it has none that can be looked at."""
    readers = readers_of(value)
    if len(readers) != 1 or len(tuple(value.uses())) != 1:
        return "several layers read it"
    return read_layer(readers[0], floats)


def read_layer(reader: Weight, floats: ir.Model) -> Layer | str:
    """Return the layer of a weight that one node reads, or why it cannot be looked at."""
    meeting = Meeting.of(reader)
    if meeting is None:
        return f"{reader.node.op_type} reads it"
    operand = operand_of(reader)
    if is_constant(operand):
        return "its operand is a constant"
    known = {str(v.name) for v in values(floats)}
    for name in (str(operand.name), str(undequantized(operand).name)):
        if name in known:
            return Layer(reader, meeting, name, _whole(reader.value, floats))
    return "the float model has no value like its operand"


def _whole(value: ir.Value, floats: ir.Model) -> ir.Value | None:
    """Return the float model's weight where this one is made of a split of it."""
    found = floats.graph.initializers.get(str(value.name))
    if notes.read(value).split is None or found is None or found.shape != value.shape:
        return None
    return found


@dataclass(frozen=True)
class View:
    """What is wanted of what layers meet.

    Attributes:
        own: Whether they meet what the model at hand makes of the feeds, not the float model.
        least: Weight of the token with the least attention; 1 lets all count alike.
        sample: Whether rows of it are wanted.
        follow: Whether these rows should make what the float model makes of its own.
        spread: Whether second moments of the float model's operands are wanted too.
    """

    own: bool = True
    least: float = 1.0
    sample: bool = False
    follow: bool = True
    spread: bool = False


class Layers:
    """Layers wave by wave.

    Args:
        model: The model at hand; weights of waves that were yielded may change.
        floats: The model before anything was lost.
        layers: What to look at.
        feeds: What to run.
        context: Its work folder, memory bound and progress.
        view: What of it is wanted.
    """

    def __init__(
        self,
        model: ir.Model,
        floats: ir.Model,
        layers: Sequence[Layer],
        feeds: Feeds,
        context: Context,
        view: View,
    ) -> None:
        share = self._memory = context.memory // SHARE
        self._seed = context.seed
        self._feeds, self._view = feeds, view
        names = attentions(floats)
        homes = {str(node.name): node for node in floats.graph}
        self._attention = {
            one.name: attention_of(homes[str(one.reader.node.name)], names)
            for one in layers
            if str(one.reader.node.name) in homes
        }
        self.waves = [part for wave in _waves(model, layers) for part in _fitting(wave, share)]
        self._tokens = Tokens.of(floats, names if view.least < 1 else names[:1], feeds, context)
        there = [[one.operand for one in wave] for wave in self.waves]
        self._here = Walk(model, there, feeds, context.folder, share) if view.own else None
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
        samples = {one: self._sample(one) for one in wave} if self._view.sample else {}
        for number, (x, y) in enumerate(self._both()):
            for kind, one in {kinds[one]: one for one in wave}.items():
                own = x[one.operand] if self._view.own else y[one.source]
                right = y[one.source] if self._view.own else None
                weights = self._tokens.weights(number, kind[1], own.shape, self._view.least)
                _share_out(*sums[kind], own, right, weights)
                for other in (other for other in samples if kinds[other] == kind):
                    samples[other].add(own, right if self._view.follow else None, weights)
        self._skipped = 0
        return [Met(one, *sums[kinds[one]], samples.get(one)) for one in wave]

    def _sample(self, layer: Layer) -> Sample:
        """Return what draws rows of what a layer meets."""
        bias = Bias.of(layer.reader)
        return Sample(
            layer.meeting,
            layer.rows().astype(np.float32),
            None if bias is None else bias.floats().astype(np.float32),
            self._feeds.count,
            self._memory,
            self._seed,
        )

    def _both(self) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
        """Yield the operands of every batch, of the model at hand and of the float model."""
        floats = self._floats.next(self._skipped)
        if self._here is None:
            yield from (({}, one) for one in floats)
            return
        yield from zip(self._here.next(self._skipped), floats, strict=True)

    def _empty(self, meeting: Meeting) -> Sums:
        """Return sums of nothing."""
        return Sums.empty(meeting, self._view.own, self._view.spread)


def _share_out(learn: Sums, held: Sums, x: Array, y: Array | None, weights: Array | None) -> None:
    """Add a batch; every so many of its samples to those held out."""
    if learn.meeting.turned:
        learn.add(x, y, weights)
        return
    numbers = learn.samples + held.samples + np.arange(len(x))
    apart = numbers % HELD_OUT == HELD_OUT - 1
    for sums, taken in ((learn, ~apart), (held, apart)):
        if taken.any():
            each = None if weights is None else weights.reshape(len(x), -1)[taken].ravel()
            sums.add(x[taken], None if y is None else y[taken], each)


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
        whole = 32 * one.meeting.groups * one.meeting.columns**2
        size = 0 if one.meeting in seen else whole
        if part and size and used + size > memory:
            yield part
            part, used, seen = [], 0, set()
        part.append(one)
        seen.add(one.meeting)
        used += size
    yield part
