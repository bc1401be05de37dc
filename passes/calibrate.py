"""Decides the range of every activation that may be quantized.

before:  values without notes
becomes: Note(low, high, sqnr_db) on every value that an integer form could read or write

The model runs once over the feeds; a `Histogram` a value is all that is kept (32 kB), so memory
does not grow with the number of samples. Padding sets no range; see `compiler/tokens.py`.
No edit is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import onnx_ir as ir
from pydantic import Field

from ..compiler import notes, regions
from ..compiler.contract import Context, Pass
from ..compiler.formats import Format
from ..compiler.histogram import Histogram, Method
from ..compiler.observe import Observer
from ..compiler.tokens import Tokens, attentions


class Calibrate(Pass):
    """Choose activation ranges from calibration feeds.

    Attributes:
        method: How a range is chosen from the histogram: minmax, percentile, entropy or mse.
        percentile: Share of elements kept by `percentile`, in percent.
        weights: Bits that weights will have; it decides which nodes can run in integers.
    """

    decides: ClassVar[bool] = True

    method: Method = "mse"
    percentile: float = Field(99.999, gt=50, le=100)
    weights: int = Field(8, ge=2, le=8)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for feeds."""
        if context.feeds is None:
            yield (
                "there are no calibration feeds; pass --data FILE, or --ranges dynamic to take "
                "ranges at run time"
            )

    def run(self, model: ir.Model, context: Context) -> int:
        """Observe and write ranges; return how many values got one."""
        found = regions.find(model, context.capability, self.weights)
        if not found.quantized:
            return 0
        histograms = self._observe(model, context, list(found.quantized))
        format = Format(context.capability.activation)
        changed = 0
        for name, value in found.quantized.items():
            histogram = histograms[name]
            low, high = histogram.range(self.method, format, self.percentile)
            if histogram.masked:
                context.remark(
                    self,
                    name,
                    f"{histogram.masked} elements beyond 3e4 were taken for an attention mask",
                )
            sqnr = histogram.sqnr_db(low, high, format)
            before = notes.read(value)
            notes.write(value, low=low, high=high, sqnr_db=round(min(sqnr, 999.0), 2))
            changed += notes.read(value) != before
        return changed

    def _observe(
        self, model: ir.Model, context: Context, names: list[str]
    ) -> dict[str, Histogram]:
        """Run the feeds and count every named value."""
        assert context.feeds is not None
        histograms = {name: Histogram() for name in names}
        observer = Observer(model, context.folder, context.memory)
        tokens = Tokens.of(model, attentions(model)[:1], context.feeds, context)
        counts = dict.fromkeys(names, 0)
        for name, array in observer.batches(names, context.feeds, context.progress):
            histograms[name].add(tokens.kept(counts[name], array), name)
            counts[name] += 1
        return histograms
