"""Rounds every planned weight to its codes and stores codes, scale and a DequantizeLinear.

before:  MatMul(x, w)                    note on w: int4 per_axis(1)
becomes: MatMul(x, DequantizeLinear(w_quantized: int4, w_scale, axis=1))

A signed format has zero points of zero, an unsigned one those of its ranges. The codes themselves
are chosen in `compiler/rounding.py` (nearest) and `compiler/layer_rounding.py` (so that outputs
stay); a format with a split is `split-layers`' to obey first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ..compiler import constants, notes
from ..compiler.biases import Bias
from ..compiler.contract import Context, Pass
from ..compiler.errors import RecipeError
from ..compiler.finished import Finished
from ..compiler.formats import Format, PerAxis, PerBlock
from ..compiler.gptq import Doubles
from ..compiler.graph import (
    Weight,
    first_reader,
    is_standard,
    readers_of,
    sole_consumer,
    weights_of,
)
from ..compiler.grids import Grid
from ..compiler.layer_rounding import rounded_layer
from ..compiler.layer_sample import Sample
from ..compiler.layers import Layer, Layers, Met, View, layer_of
from ..compiler.rounding import Clip, Rounded, floor_of, rounded
from ..compiler.sensitivity import in_batches
from ..compiler.splitting import Channels
from ..compiler.stored import SUFFIX
from ..compiler.weights import opened

Method = Literal["nearest", "gptq", "adaround", "adaquant"]
LEARNED = ("adaround", "adaquant")


class RoundWeights(Pass):
    """Round weights to nearest, or so that their layers' outputs stay.

    Attributes:
        clip: How each group's range is chosen: minmax, mse, or auto; see `compiler/rounding.py`.
            `auto` with another method than nearest searches for what the outputs do best with.
        method: `nearest`, or with calibration feeds: `gptq`, column by column, each error made up
            for by the columns to come, and by the bias where there is one; `adaround` and
            `adaquant` go on from there by gradient (extra torch), and see the ReLU behind a layer.
            They take weights with one reader that is a MatMul, Gemm or Conv; a remark names the
            others, which are rounded to nearest.
        inputs: What layers are taken to read: `quantized`, what the layers before make of the
            feeds after rounding; or `float`, what they make of them in the float model.
        target: What layers should make: `float`, what they make in the float model; or `own`, what
            the unrounded weight makes of the same inputs.
        least_attention: Weight of the token that gets least attention, if the one that gets most
            has 1 (RSQ). Padding never counts.
        rounds: How often scales and codes are fitted to each other in turn.
        steps: Steps of gradient that a layer takes.
        below: Weights of fewer bits go by `method`, wider ones to nearest: they lose less than a
            layer that is fitted to samples loses on others.
        samples: Calibration samples that are used, evenly spread; 0 takes all.
        resume: Whether finished layers are kept in the cache, so that a killed run goes on there.
    """

    clip: Clip = "auto"
    method: Method = "nearest"
    inputs: Literal["quantized", "float"] = "quantized"
    target: Literal["float", "own"] = "float"
    least_attention: float = Field(1.0, ge=0, le=1)
    rounds: int = Field(1, ge=0)
    steps: int = Field(1000, ge=1)
    below: int = Field(7, ge=2)
    samples: int = Field(256, ge=0)
    resume: bool = True

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Ask for feeds where the method looks at activations."""
        if self.method != "nearest" and context.feeds is None:
            yield f"method {self.method} needs calibration feeds; pass --data FILE"
        if self.method in LEARNED and importlib.util.find_spec("torch") is None:
            yield f"method {self.method} needs torch: pip install 'fourfold[torch]', or take gptq"

    def run(self, model: ir.Model, context: Context) -> int:
        """Round every planned weight once; return how many."""
        floats = context.float_model(model)
        planned = [value for value in weights_of(model) if _is_planned(value)]
        narrow = [value for value in planned if self._is_narrow(value)]
        layers = self._layers(narrow, floats, context) if self.method != "nearest" else []
        waiting = {one.reader.value for one in layers}
        for value in planned:
            if value not in waiting:
                _store(value, _nearest(value, self.clip), model.graph)
        if layers:
            self._by_layer(model, floats, layers, context)
        return len(planned)

    def _is_narrow(self, value: ir.Value) -> bool:
        """Whether a planned weight, or what its split says, has fewer bits than `below`."""
        note = notes.read(value)
        assert note.format is not None
        if note.split is None or note.part is not None:
            return note.format.bits < self.below
        return Format.parse(note.split).stored_bits < self.below

    def _layers(
        self, planned: Sequence[ir.Value], floats: ir.Model, context: Context
    ) -> list[Layer]:
        """Return what can be rounded by its layer; remark on the others."""
        found = []
        for value in planned:
            note = notes.read(value)
            one: Layer | str = layer_of(value, floats)
            if note.part is not None:
                one = "zeros of a part stay zeros"
            elif note.split is not None and not _has_table(value):
                one = "its values are those of a split"
            if isinstance(one, Layer):
                found.append(one)
            else:
                context.remark(self, value.name, f"rounded to nearest: {one}")
        return found

    def _by_layer(
        self, model: ir.Model, floats: ir.Model, layers: Sequence[Layer], context: Context
    ) -> None:
        """Round layers wave by wave; those that are in the cache are taken from there."""
        assert context.feeds is not None
        feeds = in_batches(context.feeds, self.samples)
        options = self.model_dump(mode="json", exclude={"resume"})
        finished = Finished.of(model, floats, feeds, options, context) if self.resume else None
        learns = self.method in LEARNED
        own = self.inputs == "quantized"
        view = View(own, self.least_attention, sample=learns, follow=self._follows)
        walk = Layers(model, floats, layers, feeds, context, view)
        for wave in context.progress(walk.waves, "round weights", len(walk.waves)):
            kept = [finished.get(one.name) if finished is not None else None for one in wave]
            if all(kept):
                walk.skip()
                made = [(one, *_read(one, arrays)) for one, arrays in zip(wave, kept, strict=True)]
            else:
                made = [(met.layer, *self._rounded(met)) for met in walk.next()]
            for one, found, delta in made:
                if finished is not None:
                    finished.put(one.name, _arrays(found, delta))
                self._write(model, one, found, delta)

    def _rounded(self, met: Met) -> tuple[Rounded, Doubles]:
        """Return a layer's weight in codes, and what its bias should gain, [rows] or nothing."""
        reader = met.layer.reader
        start = _nearest(reader.value, "minmax" if self._searches else self.clip)
        channels = Channels.of(reader)
        split = _has_table(reader.value)
        floor = floor_of([reader], start.format)
        whole = Grid.of(start, channels.rows, floor, table=split)
        codes, grid, delta = rounded_layer(met, whole, self._follows, self.rounds, self._searches)
        if (
            met.sample is not None
            and not split
            and (learned := self._learned(met, met.sample, whole))
        ):
            codes, grid, delta = learned
        found = channels.back(codes.astype(start.codes.dtype), start.codes.shape)
        scale, zero = (
            grid.stored(one, like)
            for one, like in ((grid.scale, start.scale), (grid.shift, start.zero_point))
        )
        return Rounded(found, scale, zero, start.format), delta

    def _learned(
        self, met: Met, sample: Sample, grid: Grid
    ) -> tuple[Doubles, Grid, Doubles] | None:
        """Return what gradients make of a layer, or None where held-out rows gain nothing.

        The codes to start from have not seen the samples that judge.
        """
        from ..compiler.learned_rounding import learn

        assert self.method in ("adaround", "adaquant")
        codes, grid, _ = rounded_layer(
            met, grid, self._follows, self.rounds, self._searches, blind=True
        )
        relu = _has_relu(met.layer.reader)
        made = learn(grid, sample, self.method, relu=relu, codes=codes, steps=self.steps)
        if made.after >= made.before:
            return None
        if sample.bias is None or made.bias is None:
            return made.codes, made.grid, np.zeros(0)
        return made.codes, made.grid, made.bias.astype(np.float64) - sample.bias

    @property
    def _searches(self) -> bool:
        """Whether scales are searched for by what the outputs do best with."""
        return self.clip == "auto"

    @property
    def _follows(self) -> bool:
        """Whether layers should make what they make in the float model."""
        return self.target == "float" and self.inputs == "quantized"

    def _write(self, model: ir.Model, layer: Layer, found: Rounded, delta: Doubles) -> None:
        """Store a layer's weight and correct its bias."""
        bias = Bias.of(layer.reader)
        if bias is not None and delta.size:
            bias.add(model.graph, delta)
        _store(layer.reader.value, found, model.graph)


def _has_relu(reader: Weight) -> bool:
    """Whether a ReLU reads the layer's output, and nothing else does."""
    bias = Bias.of(reader)
    output = reader.node.outputs[0] if bias is None else bias.output
    after = sole_consumer(output)
    return after is not None and is_standard(after, "Relu")


def _arrays(found: Rounded, delta: Doubles) -> dict[str, np.ndarray[Any, Any]]:
    """Return what a finished layer is kept as."""
    return {"codes": found.codes, "scale": found.scale, "zero": found.zero_point, "delta": delta}


def _read(
    layer: Layer, arrays: Mapping[str, np.ndarray[Any, Any]] | None
) -> tuple[Rounded, Doubles]:
    """Return a finished layer from what it was kept as."""
    format = notes.read(layer.reader.value).format
    assert arrays is not None
    assert format is not None
    codes, scale, zero = (arrays[name] for name in ("codes", "scale", "zero"))
    return Rounded(codes, scale, zero, format), arrays["delta"]


def _has_table(value: ir.Value) -> bool:
    """Whether each output channel takes the few values of a table."""
    note = notes.read(value)
    if note.split is None or note.part is not None:
        return False
    split = Format.parse(note.split).split
    if split is None or split.form != "int8-grid":
        return False
    return not isinstance(split.over, PerBlock)


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


def _store(old: ir.Value, found: Rounded, graph: ir.Graph) -> None:
    """Write initializers and the DequantizeLinear node, and rewire every reader."""
    name, element = str(old.name), found.format.onnx_type
    stored = constants.add(graph, f"{name}{SUFFIX}", found.codes, element)
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
