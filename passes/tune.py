"""Tunes a rounded model by gradient, so that its outputs come back to the float ones.

before:  Conv(dq(q(x, s_x)), dq(codes, s_w), b)
becomes: Conv(dq(q(x, s_x')), dq(codes', s_w'), b')

The graph stays, so neither size nor speed changes. Codes stay too, unless the samples' outputs
outnumber them, as those of a language model do. The teacher is the model as it was before
anything was lost. Steps and what they minimize are in `compiler/tuning.py`; part of the
calibration samples is held out and judges them. It comes before `quantize-biases`.
Sources: CalibTIP's bias tuning (arXiv 2006.10518); scales as in LSQ (arXiv 1902.08153).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir
from pydantic import Field

from ..compiler import losses
from ..compiler.contract import Context, Pass
from ..compiler.errors import DataError, UnsupportedError
from ..compiler.feeds import Feeds
from ..compiler.sensitivity import spread
from ..compiler.tunables import Tunables, is_rounded

if TYPE_CHECKING:
    from ..compiler.tuning import Tuned

DONE = "fourfold.tuned"  # the graph's meta: which passes of this kind are behind it
HELD = 5  # every so many samples is held out
BATCH = 8  # samples that run together, and a step
LEAST_GAIN = 0.01  # share of the loss; less may be chance


class Tune(Pass):
    """Move biases, scales and codes to where the outputs are closest to the float ones.

    A model is tuned once: with the same options it is left as it is.

    Attributes:
        biases: Whether biases of Conv, ConvTranspose, Gemm and MatMul move.
        scales: Whether scales of weights move.
        ranges: Whether scales of static activations move.
        codes: Whether codes of weights may move, where outputs outnumber them.
        steps: Most steps; few samples are not learned from more than 60 times.
        samples: Calibration samples that are used, evenly spread, a fifth of them held out;
            0 takes all.
        loss: `mse` on the outputs, `kl` on their classes; `auto` is kl where a Softmax makes them.
        rate: Size of the steps; 1 fits most models.
    """

    biases: bool = True
    scales: bool = True
    ranges: bool = True
    codes: bool = True
    steps: int = Field(300, ge=1)
    samples: int = Field(256, ge=0)
    loss: Literal["auto", "kl", "mse"] = "auto"
    rate: float = Field(1.0, gt=0)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for feeds and torch where there is something to tune."""
        if not is_rounded(model):
            return
        if context.feeds is None:
            yield "it runs the model, and there are no calibration feeds; pass --data FILE"
        if importlib.util.find_spec("torch") is None:
            yield "gradients need torch: pip install 'fourfold[torch]', or leave tune out"

    def run(self, model: ir.Model, context: Context) -> int:
        """Write tuned values; return how many initializers changed."""
        if not is_rounded(model) or str(self) in model.graph.meta.get(DONE, ()):
            return 0
        if not context.floats:
            context.remark(self, model.graph.name, "no pass has kept the float model: not tuned")
            return 0
        found = self._tuned(model, context)
        if found is None:
            return 0
        figures = f"loss {found.before:.4g} before, {found.after:.4g} after {found.steps} steps"
        figures += "" if found.codes else "; codes stayed"
        if not found.values or found.after > (1 - LEAST_GAIN) * found.before:
            context.remark(self, model.graph.name, f"nothing gained, left as it was: {figures}")
            return 0
        for name, array in found.values.items():
            model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        model.graph.meta[DONE] = (*model.graph.meta.get(DONE, ()), str(self))
        context.remark(self, model.graph.name, f"tuned {len(found.values)} tensors: {figures}")
        return len(found.values)

    def _tuned(self, model: ir.Model, context: Context) -> Tuned | None:
        """Return what came of it, or None and say why it could not be tried."""
        from ..compiler.tuning import Schedule, tuned

        teacher, tunables = context.float_model(model), self._tunables(model)
        if not tunables.names:
            return None
        kind = losses.kind_of(teacher) if self.loss == "auto" else self.loss
        schedule = Schedule(kind, self.steps, batch=BATCH, seed=context.seed).faster(self.rate)
        try:
            feeds = self._feeds(context)
            return tuned(model, teacher, tunables, feeds, schedule, context.progress)
        except (DataError, UnsupportedError) as error:
            reason, _, _ = str(error).partition("; ")  # what follows is advice for others
            context.remark(self, model.graph.name, f"not tuned: {reason}")
            return None

    def _tunables(self, model: ir.Model) -> Tunables:
        """Return what may move."""
        return Tunables.of(model, self.biases, self.scales, self.ranges, self.codes)

    def _feeds(self, context: Context) -> tuple[Feeds, Feeds]:
        """Return samples to learn from, and samples held out."""
        assert context.feeds is not None
        return spread(context.feeds, self.samples).rebatched(BATCH).split(HELD)
