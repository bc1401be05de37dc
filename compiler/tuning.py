"""Moves biases, scales and codes of a rounded model by gradient towards the float outputs.

Importing this module imports torch (the extra `torch`). Steps are Adam's, on what `moves` makes of
them. Codes move only where the samples' outputs outnumber them: fewer tell nothing but the samples
themselves. Sources: bias tuning of CalibTIP (arXiv 2006.10518); scales as in LSQ (arXiv
1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from .contract import Progress, silent
from .errors import DataError
from .feeds import Feeds
from .inputs import Batch
from .losses import TINY, WORST, Kind, OutputLoss, Scale, float_outputs, scale_of
from .moves import Arrays, Moves, Tensors
from .torch_graph import TorchGraph
from .tunables import Tunables

CHECKS = 20  # times that held-out samples are looked at
PATIENCE = 10  # checks without gain before it ends
BESIDE_CODES = 0.2  # of the rates of biases and scales, where codes move too
DECAY = (0.9, 0.99)  # of Adam's moments; the runs are short


@dataclass(frozen=True)
class Schedule:
    """How it is tuned.

    Attributes:
        kind: The loss.
        steps: Most steps.
        epochs: Most times that a sample is learned from.
        batch: Samples a step; whole batches of the feeds, so it may be a few more.
        biases: Rate of biases at the start, in root mean squares of their channels a step.
        scales: Rate of the scales of weights at the start, as a share of them a step.
        ranges: The same of activations.
        codes: Rate of codes at the start, in steps between codes.
        seed: Seed of the order of the samples.
    """

    kind: Kind = "mse"
    steps: int = 300
    epochs: int = 60
    batch: int = 8
    biases: float = 5e-3
    scales: float = 5e-3
    ranges: float = 5e-3
    codes: float = 2e-3
    seed: int = 0

    def faster(self, times: float) -> Schedule:
        """Return the schedule with all rates times a factor."""
        return replace(
            self,
            biases=times * self.biases,
            scales=times * self.scales,
            ranges=times * self.ranges,
            codes=times * self.codes,
        )

    def with_codes(self) -> Schedule:
        """Return the schedule with the lower rates that others have beside codes."""
        return replace(self.faster(BESIDE_CODES), codes=self.codes)

    @property
    def rates(self) -> dict[str, float]:
        """Group of `Tunables` -> its rate."""
        return {
            "biases": self.biases,
            "scales": self.scales,
            "ranges": self.ranges,
            "codes": self.codes,
        }


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        values: Name of an initializer -> its new data, in its element type and shape.
        before: Loss on held-out samples before.
        after: The same with the new data; not above `before`.
        steps: Steps that were taken.
        codes: Whether codes could move.
    """

    values: Arrays
    before: float
    after: float
    steps: int
    codes: bool = False


def tuned(
    model: ir.Model,
    teacher: ir.Model,
    tunables: Tunables,
    feeds: tuple[Feeds, Feeds],
    schedule: Schedule,
    progress: Progress = silent,
) -> Tuned:
    """Return values for biases, scales and codes that bring the outputs closest to the float ones.

    The values are those of the best check on held-out samples, the start included. Samples and
    the float outputs are held in memory.

    Args:
        model: The rounded model; left as it is.
        teacher: The float model, with the same inputs and outputs.
        tunables: What may move.
        feeds: Samples to learn from, and samples held out.
        schedule: How.
        progress: Shows the steps.

    Raises:
        DataError: The outputs are not finite before anything has moved.
        UnsupportedError: A node has no gradient here.
    """
    names, form = float_outputs(model), scale_of(teacher)
    float_graph = TorchGraph(teacher, [])
    learn, held = (_Samples.of(float_graph, part, names) for part in feeds)
    tunables, patience = tunables.known_to(teacher), PATIENCE
    if learn.outputs < sum(math.prod(codes.shape) for codes in tunables.codes.values()):
        tunables = tunables.without_codes()
    if tunables.codes:  # the rates fall, and what they make of codes is best at the end
        schedule, patience = schedule.with_codes(), CHECKS
    graph = TorchGraph(model, tunables.names)
    moves = Moves.of(model, teacher, graph, tunables, learn.batches[0])
    judge = _Judge(graph, held, schedule.kind, form)
    before = judge.loss(moves)
    if not before < WORST:
        raise DataError("the outputs are not finite on the calibration feeds")
    best, least, taken = moves.copy(), before, 0
    learner = _Learner(graph, moves, learn, form, schedule, max(before, TINY))
    stale, every = 0, max(learner.total // CHECKS, 1)
    for taken in progress(range(1, learner.total + 1), "tune", learner.total):
        learner.step(taken - 1)
        if taken % every and taken != learner.total:
            continue
        loss = judge.loss(moves)
        stale = 0 if loss < least else stale + 1
        if loss < least:
            best, least = moves.copy(), loss
        if stale == patience:
            break
    return Tuned(best.arrays(model), before, least, taken, bool(tunables.codes))


@dataclass(frozen=True)
class _Samples:
    """Batches and the float model's outputs for them."""

    batches: list[Batch]
    expected: list[Tensors]

    @property
    def outputs(self) -> int:
        """How many numbers the float model makes."""
        return sum(y.numel() for each in self.expected for y in each.values())

    @classmethod
    def of(cls, teacher: TorchGraph, feeds: Feeds, names: Sequence[str]) -> _Samples:
        """Run the float model."""
        batches = list(feeds)
        with torch.no_grad():
            outputs = [teacher(batch) for batch in batches]
        return cls(batches, [{name: got[name] for name in names} for got in outputs])


@dataclass(frozen=True)
class _Judge:
    """Measures the loss on samples that are not learned from."""

    graph: TorchGraph
    held: _Samples
    kind: Kind
    form: Scale

    def loss(self, moves: Moves) -> float:
        """Return the loss with these moves."""
        total = OutputLoss(self.kind, self.form)
        with torch.no_grad():
            self.graph.weights.update(moves.values())
            for batch, expected in zip(self.held.batches, self.held.expected, strict=True):
                got = self.graph(batch)
                total.add(
                    {name: y.double().numpy() for name, y in expected.items()},
                    {name: got[name].double().numpy() for name in expected},
                )
        return total.value


class _Learner:
    """Takes steps.

    Args:
        graph: The rounded model.
        moves: What is moved.
        learn: What it learns from.
        form: What the first output holds.
        schedule: How.
        start: The loss before, which the gradients are made relative to.

    Attributes:
        total: Steps that there are to take.
    """

    def __init__(
        self,
        graph: TorchGraph,
        moves: Moves,
        learn: _Samples,
        form: Scale,
        schedule: Schedule,
        start: float,
    ) -> None:
        self._graph, self._moves, self._learn, self._form = graph, moves, learn, form
        self._kind = schedule.kind
        count, samples = len(learn.batches), sum(map(_length, learn.batches))
        each = min(max(math.ceil(schedule.batch * count / samples), 1), count)
        self._order = _orders(count, each, schedule.seed)
        self.total = min(schedule.steps, schedule.epochs * (count // each))
        weight = sum(_weight(self._kind, expected) for expected in learn.expected) / count
        self._divisor = max(weight, TINY) * start * each
        groups = [(moves.of_group(name), rate) for name, rate in schedule.rates.items()]
        self._rates = [rate for leaves, rate in groups if leaves]
        self._adam = torch.optim.Adam(
            [{"params": leaves} for leaves, _ in groups if leaves], betas=DECAY
        )

    def step(self, number: int) -> None:
        """Take one step; the rates fall as half a cosine."""
        share = 0.5 + 0.5 * math.cos(math.pi * number / self.total)
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._adam.zero_grad()
        for index in next(self._order):
            with torch.enable_grad():
                self._graph.weights.update(self._moves.values())
                got = self._graph(self._learn.batches[index])
                loss = _loss(self._kind, self._form, self._learn.expected[index], got)
            if loss.requires_grad:
                (loss / self._divisor).backward()
        self._adam.step()


def _length(batch: Batch) -> int:
    """Return the samples of a batch."""
    return max((len(array) for array in batch.values() if array.ndim), default=1)


def _orders(count: int, each: int, seed: int) -> Iterator[list[int]]:
    """Yield which batches a step learns from: all of them in an order by chance, then again."""
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(count).tolist()
        yield from (order[at : at + each] for at in range(0, count - each + 1, each))


def _weight(kind: Kind, expected: Tensors) -> float:
    """Return what the sum of `_loss` is divided by, as in `losses.OutputLoss`."""
    if kind == "mse":
        return sum(float(y.double().square().sum()) for y in expected.values())
    first = next(iter(expected.values()))
    return float(first.numel() / max(first.shape[-1] if first.dim() else 1, 1))


def _loss(kind: Kind, form: Scale, expected: Tensors, got: Mapping[str, Tensor]) -> Tensor:
    """Return a batch's noise power, or its divergences in nats, summed up."""
    if kind == "mse":
        parts = [(got[name] - y).float().square().sum() for name, y in expected.items()]
        return torch.stack(parts).sum()
    name, y = next(iter(expected.items()))
    p, q = (_logs(form, each.float()) for each in (y, got[name]))
    return (p.exp() * (p - q)).sum()


def _logs(form: Scale, y: Tensor) -> Tensor:
    """Return log-probabilities."""
    if form == "logits":
        return torch.log_softmax(y, -1)
    return y if form == "log-probabilities" else torch.log(y.clamp(min=TINY))
