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

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler import constants, notes
from ..compiler.contract import Context, Pass
from ..compiler.covariance import Meeting
from ..compiler.equalizing import Balance, Gathering, Operand, decide
from ..compiler.gauges import Found, Gauge, Share, find
from ..compiler.graph import weight_of
from ..compiler.observe import Observer
from ..compiler.sensitivity import in_batches
from ..compiler.tokens import Tokens, attentions

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
    samples: int = Field(128, ge=1)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for values with nothing decided."""
        for gauge in self._gauges(find(model.graph), context):
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
        gauges = self._gauges(found, context)
        operands = self._observed(gauges, model, context)
        fixed = frozenset(n for n, gauge in enumerate(gauges) if _is_done(gauge))
        balance = Balance(gauges, operands, self.weights, self.alphas, fixed)
        chosen = decide(balance, self.gain / 100, self.insert_gain) if gauges else []
        changed, mended = 0, set()
        for number, gauge in enumerate(gauges):
            exponents = balance.exponents[number]
            subject = str(gauge.value.name)
            if exponents.any():
                _put_in(model.graph, gauge, exponents)
                changed += 1
                mended.add(subject)
            if number not in fixed:
                self._tell(context, gauge, subject, balance.sees(number), *chosen[number])
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

    def _gauges(self, found: Found, context: Context) -> list[Gauge]:
        """Return the gauges that may be used; whether a Mul pays takes feeds to know."""
        return [*found.exact, *(found.possible if self.insert and context.feeds else ())]

    def _observed(
        self, gauges: list[Gauge], model: ir.Model, context: Context
    ) -> dict[int, Operand]:
        """Run the feeds; return what each reader of a gauge reads, by the id of its node."""
        if context.feeds is None or not gauges:
            return {}
        feeds = in_batches(context.feeds, self.samples)
        meetings = _meetings(gauges)
        gatherings = _gatherings(meetings.values(), len(feeds), context)
        observer = Observer(model, context.folder, context.memory)
        tokens = Tokens.of(model, attentions(model)[:1], feeds, context)
        names = list(dict.fromkeys(meeting.operand for meeting in gatherings))
        counts = dict.fromkeys(names, 0)
        for name, array in observer.batches(names, feeds, context.progress):
            for meeting, gathering in gatherings.items():
                if meeting.operand == name:
                    conv = meeting.op_type == "Conv"
                    gathering.add(array if conv else tokens.kept(counts[name], array))
            counts[name] += 1
        operands = {meeting: one.operand() for meeting, one in gatherings.items()}
        return {layer: operands[meeting] for layer, meeting in meetings.items()}


def _meetings(gauges: list[Gauge]) -> dict[int, Meeting]:
    """Return how each reader of a gauge meets its weight, by the id of its node, where known."""
    found = {}
    for reader in (reader for gauge in gauges for reader in gauge.readers):
        weight = weight_of(reader.share.node)
        assert weight is not None
        meeting = Meeting.of(weight)
        if meeting is not None:
            found[id(reader.share.node)] = meeting
    return found


def _gatherings(
    meetings: Collection[Meeting], batches: int, context: Context
) -> dict[Meeting, Gathering]:
    """Return what gathers rows for each way in which a value is read, within the memory bound."""
    width = sum(meeting.columns * meeting.groups for meeting in set(meetings))
    rows = max(16, min(ROWS, context.memory // (8 * max(width, 1))))
    return {one: Gathering(one, -(-rows // batches), context.seed) for one in meetings}


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
