"""Evens out the channels of a value, by factors that the constants around it take in turn.

before:  MatMul(LayerNormalization(x, g, b), w)
becomes: MatMul(LayerNormalization(x, g f, b f), w / f)     f: one power of two a channel

A channel that is far greater than the others spends the codes of all of them, in the value or in
the weight. Three known rewrites are one here: cross-layer equalization (Conv, Gemm or MatMul,
Relu and what else passes factors on, then the next layer), SmoothQuant (a normalization or a gain
before layers), and the same from a value projection through attention to the output projection.
What each would leave of the readers' noise is measured on calibration feeds, and the least is
taken. Multiplying by powers of two is exact: a chain computes the same bits as before, unless a
number leaves the range of its type. It stands after fold-batchnorm and before anything that takes
ranges. Values whose content changes get new names.
Sources: Nagel et al., arXiv 1906.04721; Xiao et al., arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler import constants, equalizing, notes
from ..compiler.contract import Context, Pass
from ..compiler.covariance import Meeting
from ..compiler.gauges import Gauge, Share, find
from ..compiler.graph import weight_of
from ..compiler.observe import Observer

ENDING = "_equalized"
ROWS = 256  # rows of a value that are kept for the comparison


class Equalize(Pass):
    """Scale channels so that quantization loses less; the float model stays what it was.

    Attributes:
        weights: Bits that weights will have, for the prediction.
        alphas: SmoothQuant's migration strengths to try: the part of a channel's range that moves
            from the activation into the weights. Each is tried with and without a look at the
            ranges of the weights.
        gain: Least part of its readers' noise that a value has to lose to be changed, in percent.
        insert: Whether a Mul by a constant vector may be put in front of MatMul and Gemm layers
            where nothing before them can take the factors. It is a small op more at run time:
            it reads and writes the value once.
        insert_gain: Least noise that such a Mul has to take away, as a part of the mean over all
            values that could be scaled.
        samples: Calibration samples to look at.
    """

    weights: int = Field(8, ge=2, le=8)
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    gain: float = Field(2.0, ge=0, lt=100)
    insert: bool = True
    insert_gain: float = Field(0.5, ge=0)
    samples: int = Field(32, ge=1)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for values with nothing decided."""
        for gauge in find(model.graph).exact:
            values = [*gauge.scaled, *(share.value for share in _shares(gauge))]
            planned = next((v.name for v in values if notes.read(v) != notes.EMPTY), None)
            if planned is not None:
                yield (
                    f"{planned} is planned already, and its note would not fit what it becomes; "
                    f"put {self.name} before calibrate and assign-bits"
                )
                return

    def run(self, model: ir.Model, context: Context) -> int:
        """Choose factors for all gauges and put them in; return how many gauges changed."""
        found = find(model.graph)
        gauges = [*found.exact, *(found.possible if self.insert and context.feeds else ())]
        operands = self._observed(gauges, model, context)
        fixed = frozenset(n for n, gauge in enumerate(gauges) if _is_done(gauge))
        balance = equalizing.Balance(gauges, operands, self.weights, self.alphas, fixed)
        chosen = equalizing.decide(balance, self.gain / 100, self.insert_gain) if gauges else []
        changed, mended = 0, set()
        for number, gauge in enumerate(gauges):
            exponents = balance.exponents[number]
            subject = str(gauge.value.name)
            if exponents.any():
                _put_in(model.graph, gauge, exponents)
                changed += 1
                mended.add(subject)
            if number not in fixed:
                self._tell(context, gauge, subject, operands[number] is not None, *chosen[number])
        for name, reason in found.refused.items():
            if name not in mended:
                context.remark(self, name, f"left: {reason}")
        return changed

    def _tell(
        self, context: Context, gauge: Gauge, name: str, seen: bool, choice: str, left: float
    ) -> None:
        """Remark what became of one gauge."""
        mul = "a Mul before its layers scales it" if gauge.needs_mul else "scaled"
        what = "predicted noise behind it" if seen else "room that its weights leave"
        if choice:
            reason = f"{mul} by {choice}: {100 * (left - 1):+.0f} % of the {what}"
            context.remark(self, name, reason)
        elif not gauge.needs_mul:
            context.remark(self, name, f"left: no factors take {self.gain:g} % of the {what}")

    def _observed(
        self, gauges: list[Gauge], model: ir.Model, context: Context
    ) -> list[list[equalizing.Operand] | None]:
        """Run the feeds; return what each reader of each gauge reads."""
        if context.feeds is None or not gauges:
            return [None] * len(gauges)
        feeds = context.feeds.head(self.samples)
        gatherings = _gatherings(gauges, len(feeds), context)
        names = list(dict.fromkeys(meeting.operand for meeting in gatherings))
        observer = Observer(model, context.folder, context.memory)
        for name, array in observer.batches(names, feeds, context.progress):
            for meeting, gathering in gatherings.items():
                if meeting.operand == name:
                    gathering.add(array)
        operands = {meeting: one.operand() for meeting, one in gatherings.items()}
        read = [[_meeting(reader.share) for reader in gauge.readers] for gauge in gauges]
        return [
            [operands[one] for one in some if one is not None] if all(some) else None
            for some in read
        ]


def _gatherings(
    gauges: list[Gauge], batches: int, context: Context
) -> dict[Meeting, equalizing.Gathering]:
    """Return what gathers rows for each way in which a value is read, within the memory bound."""
    readers = {
        meeting: (gauge, reader)
        for gauge in gauges
        for reader in gauge.readers
        if (meeting := _meeting(reader.share)) is not None
    }
    width = sum(meeting.columns * meeting.groups for meeting in readers)
    rows = max(16, min(ROWS, context.memory // (4 * max(width, 1))))
    quota = -(-rows // batches)
    return {
        meeting: equalizing.Gathering(meeting, reader.channels, gauge.count, quota, context.seed)
        for meeting, (gauge, reader) in readers.items()
    }


def _meeting(share: Share) -> Meeting | None:
    """Return how a reader meets its weight; None where that is not known."""
    weight = weight_of(share.node)
    assert weight is not None
    return Meeting.of(weight)


def _is_done(gauge: Gauge) -> bool:
    """Whether all readers of a gauge have been scaled before."""
    return all(ENDING in str(reader.share.value.name) for reader in gauge.readers)


def _shares(gauge: Gauge) -> Iterable[Share]:
    """Yield every constant that a gauge's factors go into."""
    yield from gauge.written
    yield from (reader.share for reader in gauge.readers)


def _put_in(
    graph: ir.Graph, gauge: Gauge, exponents: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> None:
    """Replace the constants of a gauge by scaled copies, and name what they change anew."""
    if gauge.needs_mul:
        _insert(graph, gauge, exponents)
    for share in _shares(gauge):
        old = share.value
        name = f"{str(old.name).removesuffix(ENDING)}{ENDING}"
        share.node.replace_input_with(
            share.index, constants.add(graph, name, share.scaled(exponents))
        )
        if not old.uses() and not old.is_graph_output():
            del graph.initializers[str(old.name)]
    for value in gauge.scaled:
        value.name = constants.free(graph, f"{str(value.name).removesuffix(ENDING)}{ENDING}")


def _insert(
    graph: ir.Graph, gauge: Gauge, exponents: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> None:
    """Put one Mul between a value and those of its readers that can take the inverse."""
    value, nodes = gauge.value, [reader.share.node for reader in gauge.readers]
    name = f"{value.name}{ENDING}"
    assert value.dtype is not None
    factors = np.ldexp(1.0, exponents).astype(value.dtype.numpy())
    vector = constants.add(graph, f"{name}_factors", factors)
    label = constants.free(graph, name)
    mul = constants.make_node("Mul", [value, vector], name, value, output=label)
    graph.insert_before(next(node for node in graph if node in nodes), mul)
    for node in nodes:
        node.replace_input_with(0, mul.outputs[0])
