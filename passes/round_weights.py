"""Rounds every planned weight to its codes and stores codes, scale and a DequantizeLinear.

before:  MatMul(x, w)                    note on w: int4 per_axis(1)
becomes: MatMul(x, DequantizeLinear(w_quantized: int4, w_scale, axis=1))

A signed format has zero points of zero, an unsigned one those of its ranges. The codes themselves
are chosen in `compiler/rounding.py`; a format with a split is `split-layers`' to obey first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler import constants, notes
from ..compiler.contract import Context, Pass
from ..compiler.covariance import Meeting, covariances
from ..compiler.errors import RecipeError
from ..compiler.formats import PerAxis, PerBlock
from ..compiler.gptq import Curvature, Doubles, gptq
from ..compiler.graph import first_reader, readers_of, weights_of
from ..compiler.quantizers import spread
from ..compiler.rounding import Clip, Rounded, rounded
from ..compiler.splitting import Channels
from ..compiler.weights import opened


class RoundWeights(Pass):
    """Round weights to nearest, or so that their layers' outputs stay.

    Attributes:
        clip: How each group's range is chosen: minmax, mse, or auto; see `compiler/rounding.py`.
        method: `nearest`, or `gptq`: with calibration feeds, column by column, each error made up
            for by the columns to come. Weights with one reader that is a MatMul, Gemm or Conv; a
            remark names the others, which are rounded to nearest.
        samples: Calibration samples that `gptq` uses, evenly spread; 0 takes all.
    """

    clip: Clip = "auto"
    method: Literal["nearest", "gptq"] = "nearest"
    samples: int = Field(128, ge=0)

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for feeds where the method looks at activations."""
        if self.method != "nearest" and context.feeds is None:
            yield f"method {self.method} needs calibration feeds; pass --data FILE"

    def run(self, model: ir.Model, context: Context) -> int:
        """Round every planned weight once; return how many."""
        planned = [value for value in weights_of(model) if _is_planned(value)]
        waiting = self._meetings(planned, context) if self.method == "gptq" else {}
        shown = context.progress(planned, "round weights", len(planned))
        by_meeting: dict[Meeting, list[ir.Value]] = {}
        for value in shown:
            if value in waiting:
                by_meeting.setdefault(waiting[value], []).append(value)
            else:
                _store(value, _nearest(value, self.clip), model.graph)
        if by_meeting:
            # The observer keeps a copy of the model, which is edited meanwhile.
            for meeting, covariance in covariances(model, list(by_meeting), context, self.samples):
                curvatures = [Curvature.of(one) for one in covariance]
                for value in by_meeting[meeting]:
                    found = _by_gptq(_nearest(value, self.clip), value, curvatures)
                    _store(value, found, model.graph)
        return len(planned)

    def _meetings(self, planned: Sequence[ir.Value], context: Context) -> dict[ir.Value, Meeting]:
        """Return how the weights that can be rounded so meet their activations."""
        found = {}
        for value in planned:
            readers, note = readers_of(value), notes.read(value)
            meeting = Meeting.of(readers[0]) if len(readers) == 1 else None
            if note.split is not None and note.part is None:
                reason = "its values are those of a table"
            elif note.part is not None:
                reason = "zeros of a part stay zeros"
            elif len(readers) > 1:
                reason = "several layers read it"
            elif meeting is None:
                reason = f"{readers[0].node.op_type} reads it"
            else:
                found[value] = meeting
                continue
            context.remark(self, value.name, f"rounded to nearest: {reason}")
        return found


def _is_planned(value: ir.Value) -> bool:
    """Whether a weight is to be rounded.

    Raises:
        RecipeError: It is to be split before.
    """
    note = notes.read(value)
    if note.mode != "static" or note.format is None:
        return False
    if note.format.split is not None:
        raise RecipeError(
            f"round-weights: {value.name!r} is planned as {note.format}; put split-layers before"
        )
    return True


def _nearest(value: ir.Value, clip: Clip) -> Rounded:
    """Return a weight rounded to nearest."""
    format = notes.read(value).format
    assert format is not None
    with opened(value) as array:
        return rounded(np.asarray(array, np.float32), format, clip, readers_of(value))


def _by_gptq(nearest: Rounded, value: ir.Value, curvatures: Sequence[Curvature]) -> Rounded:
    """Return codes on the same grid that keep the layer's outputs."""
    channels = Channels.of(readers_of(value)[0])
    with opened(value) as array:
        weights = channels.rows(np.asarray(array, np.float32))
    shape, format = nearest.codes.shape, nearest.format
    scale, zero = (
        channels.rows(np.broadcast_to(spread(one, shape, format), shape)).astype(np.float64)
        for one in (nearest.scale, nearest.zero_point)
    )
    limits = format.symmetric_codes if format.signed else format.codes
    each = len(weights) // len(curvatures)  # rows of a group
    codes = np.empty(weights.shape, nearest.codes.dtype)
    for number, curvature in enumerate(curvatures):
        rows = slice(number * each, (number + 1) * each)
        step, shift = scale[rows], zero[rows]

        def on_grid(
            values: Doubles, column: int, step: Doubles = step, shift: Doubles = shift
        ) -> Doubles:
            found = np.clip(np.rint(values / step[:, column]) + shift[:, column], *limits)
            return np.asarray((found - shift[:, column]) * step[:, column])

        floats = gptq(weights[rows], curvature, on_grid)
        codes[rows] = np.rint(floats / step) + shift
    return replace(nearest, codes=channels.back(codes, shape))


def _store(old: ir.Value, found: Rounded, graph: ir.Graph) -> None:
    """Write initializers and the DequantizeLinear node, and rewire every reader."""
    name, element = str(old.name), found.format.onnx_type
    stored = constants.add(graph, f"{name}_quantized", found.codes, element)
    scales = constants.add(graph, f"{name}_scale", found.scale)
    if np.any(found.zero_point):
        zero = constants.add(graph, f"{name}_zero_point", found.zero_point, element)
    else:
        zero = constants.zero_points(graph, found.scale, element)
    attributes: dict[str, int] = {}
    match found.format.granularity:
        case PerAxis(axis):
            attributes = {"axis": axis}
        case PerBlock(axis, size):
            attributes = {"axis": axis, "block_size": size}
    node = constants.make_node(
        "DequantizeLinear",
        [stored, scales, zero],
        f"{name}_DequantizeLinear",
        like=old,
        attributes=attributes,
    )
    output = node.outputs[0]
    notes.move(old, stored)
    graph.insert_before(first_reader(old, graph), node)
    ir.convenience.replace_all_uses_with(old, output)
    graph.initializers.pop(name)
