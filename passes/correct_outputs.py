"""Makes up for how rounding moved the outputs of layers: means by biases, spreads by scales.

before:  Conv(x, dq(codes, s), b)
becomes: Conv(x, dq(codes, s a), b + d)       a, d: one a channel

For each output channel, with t the float model's output and z the rounded layer's before its bias:
d closes the gap between means, E[t] - a E[z] - b. `spread` says where a comes from: cov(t, z) /
var(z), which makes the error least, or std(t) / std(z) (para-normalization), which gives the
channel its old variance. Layers are corrected in the order of their data, behind corrected
layers, and only where samples that were held out gain. Codes stay. Sources: bias correction of
Nagel et al. (arXiv 1906.04721), section 4.2; para-normalization of Hubara et al. (arXiv
2006.10518), section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler.biases import Bias
from ..compiler.contract import Context, Pass
from ..compiler.corrections import Doubles, Outputs, Spread
from ..compiler.graph import weight_of
from ..compiler.layers import Layer, Layers, Met, View, read_layer
from ..compiler.sensitivity import in_batches
from ..compiler.splitting import Channels
from ..compiler.stored import Stored, stored_weights
from ..compiler.weights import opened

LEAST = 1e-3  # a correction that is smaller, beside the output's spread, is none


@dataclass(frozen=True)
class _Home:
    """A rounded layer that is looked at.

    Attributes:
        stored: Its weight.
        floats: The weight that it came from, [rows, columns].
        bias: Where its bias is, or None.
        shift: What the bias lacks already: that of the float model less its own, [rows].
    """

    stored: Stored
    floats: Doubles
    bias: Bias | None
    shift: Doubles


class CorrectOutputs(Pass):
    """Correct biases, and scales where they belong to one channel.

    Attributes:
        means: Whether biases are corrected.
        spread: How scales are: none, least-squares or variance.
        samples: Calibration samples that are used, evenly spread; 0 takes all.
    """

    means: bool = True
    spread: Spread = "least-squares"
    samples: int = Field(64, ge=0)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for feeds."""
        if context.feeds is None and any(True for _ in stored_weights(model)):
            yield "it compares with the float model on calibration feeds; pass --data FILE"

    def run(self, model: ir.Model, context: Context) -> int:
        """Correct every layer that gains; return how many did."""
        if not context.floats:
            return 0
        floats = context.float_model(model)
        homes = dict(self._homes(model, floats, context))
        if not homes:
            return 0
        assert context.feeds is not None
        feeds = in_batches(context.feeds, self.samples)
        wanted = self.spread == "variance"
        walk = Layers(model, floats, list(homes), feeds, context, View(spread=wanted))
        changed = 0
        for _ in context.progress(walk.waves, "correct outputs", len(walk.waves)):
            for met in walk.next():
                changed += self._correct(model.graph, homes[met.layer], met)
        return changed

    def _homes(
        self, model: ir.Model, floats: ir.Model, context: Context
    ) -> Iterator[tuple[Layer, _Home]]:
        """Yield what can be compared with the float model; remark on the others."""
        named = {str(node.name): node for node in floats.graph}
        for stored in stored_weights(model):
            origin = named.get(str(stored.reader.node.name))
            weight = weight_of(origin) if origin is not None else None
            layer = read_layer(stored.reader, floats)
            if weight is None or isinstance(layer, str):
                reason = layer if isinstance(layer, str) else "the float model has no such layer"
                context.remark(self, stored.name, f"not corrected: {reason}")
                continue
            with opened(weight.value) as array:
                rows = Channels.of(weight).rows(np.asarray(array, np.float64))
            bias, before = (Bias.of(one) for one in (stored.reader, weight))
            if bias is None or before is None or not self.means:
                yield layer, _Home(stored, rows, None, np.zeros(len(rows)))
            else:
                yield layer, _Home(stored, rows, bias, before.floats() - bias.floats())

    def _correct(self, graph: ir.Graph, home: _Home, met: Met) -> bool:
        """Correct one layer; return whether anything moved."""
        stored = Channels.of(home.stored.reader).rows(home.stored.floats())
        both, learn, held = (
            Outputs.of(home.floats, stored, sums)
            for sums in (met.learn.plus(met.held), met.learn, met.held)
        )
        judge = held if met.held.count else learn
        none = np.ones_like(home.shift), np.zeros_like(home.shift)
        before, after = (
            judge.error(factors, delta - home.shift)
            for factors, delta in (none, self._wanted(home, learn))
        )
        if not after < before:
            return False
        factors, delta = self._wanted(home, both)
        scaled = np.abs(factors - 1).max(initial=0) > LEAST
        if scaled:
            home.stored.scale_rows(graph, factors)
        size = float(np.sqrt(both.zz.mean()))
        moved = home.bias is not None and np.abs(delta).max(initial=0) > LEAST * size
        if home.bias is not None and moved:
            home.bias.add(graph, delta)
        return bool(scaled or moved)

    def _wanted(self, home: _Home, outputs: Outputs) -> tuple[Doubles, Doubles]:
        """Return the factors of the scales, and what the bias should gain."""
        spread: Spread = self.spread if home.stored.by_row else "none"
        factors = outputs.factors(spread)
        if home.bias is None:
            return factors, np.zeros_like(factors)
        return factors, outputs.gap(factors) + home.shift
