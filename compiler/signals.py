"""Signals that say how important a weight is, without running it through the whole model.

Each returns a `Ranking`: greater is more important. Those that know the quantizer's error also
predict a loss for every form, so that an allocator can weigh them; the others only order.

lim, zd: R.-G. Dumitru et al., "Layer-wise quantization" (arXiv 2406.17415), by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .blocks import Block
from .choices import Choice, Open
from .contract import Context
from .energy import energies
from .formats import Format
from .observe import Observer
from .quantizers import Floats
from .rounding import Clip, simulated
from .weights import opened

Signal = Literal[
    "lim",
    "zd",
    "kurtosis",
    "quantization-error",
    "activation-weighted",
    "fisher",
    "measured",
]
Doubles = npt.NDArray[np.float64]
Errors = dict[str, dict[str, float]]

REFERENCE_BITS = 4  # the width whose loss stands for a weight's importance
MASK = "mask"  # part of the name of an input that says which tokens are real


@dataclass(frozen=True)
class Ranking:
    """What one signal says.

    Attributes:
        importance: Weight -> importance; weights that the signal says nothing of are missing.
        losses: Weight -> choice -> predicted loss; None where the signal only orders.
    """

    importance: Mapping[str, float]
    losses: Mapping[str, Mapping[str, float]] | None = None

    @classmethod
    def of_losses(cls, losses: Mapping[str, Mapping[str, float]]) -> Ranking:
        """Return the ranking by the predicted loss at four bits (else the narrowest form)."""
        return cls({name: _at_reference(found) for name, found in losses.items()}, losses)


def _at_reference(losses: Mapping[str, float]) -> float:
    """Return the loss of the four-bit form, or of the narrowest one."""
    forms = {text: Choice.parse(text) for text in losses}
    narrow = [text for text, one in forms.items() if one.bits == REFERENCE_BITS]
    return losses[narrow[0] if narrow else min(losses, key=lambda text: forms[text].bits)]


def zd(values: Sequence[Floats]) -> float:
    """Return the share of a block's weights with (w - mean) / std > 1; signed, as published.

    Weights that are all equal have no spread and a share of 0.
    """
    count = sum(array.size for array in values)
    mean = sum(float(array.sum(dtype=np.float64)) for array in values) / count
    square = sum(float(np.square(array.astype(np.float64) - mean).sum()) for array in values)
    std = float(np.sqrt(square / count))
    if std == 0:
        return 0.0
    return sum(int((array.astype(np.float64) - mean > std).sum()) for array in values) / count


def kurtosis(values: Floats) -> float:
    """Return the excess kurtosis: 0 for a Gaussian, large for few far outliers, 0 if constant."""
    wide = values.astype(np.float64).ravel()
    wide -= wide.mean()
    variance = float(np.square(wide).mean())
    return float((wide**4).mean()) / variance**2 - 3.0 if variance > 0 else 0.0


def lim(first: Doubles, second: Doubles) -> Doubles:
    """Return -cosine of each row of two [tokens, width] arrays; -1 where a row is zero."""
    product = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    same = np.einsum("ij,ij->i", first, second)
    return np.asarray(-np.where(product > 0, same / np.where(product > 0, product, 1.0), 1.0))


def by_zd(weights: Sequence[Open], blocks: Sequence[Block]) -> Ranking:
    """Rank by minus ZD, one figure a block; a weight outside of blocks is a block of its own."""
    homes = {one.name: one for one in weights}
    groups = [[n for n in block.weights if n in homes] for block in blocks]
    inside = {name for group in groups for name in group}
    groups += [[one.name] for one in weights if one.name not in inside]
    found: dict[str, float] = {}
    for group in filter(None, groups):
        share = zd([_floats(homes[name].value) for name in group])
        found |= dict.fromkeys(group, -share)
    return Ranking(found)


def by_kurtosis(weights: Sequence[Open]) -> Ranking:
    """Rank by the excess kurtosis of each weight."""
    return Ranking({one.name: kurtosis(_floats(one.value)) for one in weights})


def by_lim(model: ir.Model, blocks: Sequence[Block], context: Context) -> Ranking:
    """Rank blocks by the mean of -cosine(input, output) over tokens; other weights have no rank.

    A block whose input and output differ in shape has no rank either. Tokens are the rows along
    the last axis (channels, axis 1, of images); padding is left out where an input that is called
    a mask says so.
    """
    assert context.feeds is not None
    alike = [block for block in blocks if _alike(block.entry, block.exit)]
    names = list(dict.fromkeys(str(v.name) for b in alike for v in (b.entry, b.exit)))
    sums = dict.fromkeys([block.index for block in alike], 0.0)
    counts = dict(sums)
    observer = Observer(model, context.folder, context.memory)
    for batch, values in observer.together(names, context.feeds, context.progress):
        for block in alike:
            first, second = (values[str(v.name)] for v in (block.entry, block.exit))
            if first.shape != second.shape:
                continue
            real = _real_tokens(batch, first)
            scores = lim(_tokens(first), _tokens(second))[real]
            sums[block.index] += float(scores.sum())
            counts[block.index] += len(scores)
    return Ranking(
        {
            name: sums[block.index] / counts[block.index]
            for block in alike
            if counts[block.index]
            for name in block.weights
        }
    )


def _width(value: ir.Value) -> int | str | None:
    """Return the length of the axis that one token's vector lies along."""
    if value.shape is None or len(value.shape) < 2:
        return None
    axis = value.shape[1 if len(value.shape) == 4 else -1]
    return axis if isinstance(axis, int) else str(axis)


def _alike(first: ir.Value, second: ir.Value) -> bool:
    """Whether two hidden states have tokens of one width."""
    return _width(first) is not None and _width(first) == _width(second)


def _tokens(array: Doubles) -> Doubles:
    """Return [tokens, width] in float64; images have their channels on axis 1."""
    wide = array.astype(np.float64)
    if wide.ndim == 4:
        wide = np.moveaxis(wide, 1, -1)
    return wide.reshape(-1, wide.shape[-1])


def _real_tokens(batch: Mapping[str, npt.NDArray[np.generic]], array: Doubles) -> slice | Doubles:
    """Return which rows are no padding."""
    for name, mask in batch.items():
        if MASK in name.lower() and mask.dtype.kind in "iub" and mask.shape == array.shape[:-1]:
            return np.asarray(mask.ravel() != 0)
    return slice(None)


def by_quantization_error(weights: Sequence[Open], clip: Clip) -> Ranking:
    """Rank by the weight's own noise power over its signal power; needs no data."""

    def error(one: Open, floats: Floats) -> Callable[[Floats], float]:
        power = float(np.square(floats, dtype=np.float64).sum()) or 1.0
        return lambda miss: float(np.square(miss, dtype=np.float64).sum()) / power

    return Ranking.of_losses(dict(_errors(weights, clip, error)))


def by_activation_weighted(
    model: ir.Model, weights: Sequence[Open], context: Context, clip: Clip
) -> Ranking:
    """Rank by mean(x^2) times the weight's squared error, over the same sum for the weight itself.

    x is the operand that the weight meets: one figure an input channel, or for an embedding how
    often each row is looked up.
    """
    energy = energies(model, weights, context)

    def error(one: Open, floats: Floats) -> Callable[[Floats], float]:
        scale = energy[one.name]
        power = float((np.square(floats, dtype=np.float64) * scale).sum()) or 1.0
        return lambda miss: float((np.square(miss, dtype=np.float64) * scale).sum()) / power

    return Ranking.of_losses(dict(_errors(weights, clip, error)))


def by_fisher(
    model: ir.Model,
    weights: Sequence[Open],
    context: Context,
    kind: Literal["mse", "kl"],
    clip: Clip,
) -> Ranking:
    """Rank by the second-order loss, sum of F dw^2 with F the diagonal of the Fisher matrix."""
    from .fisher import fisher

    assert context.feeds is not None
    names = [one.name for one in weights]
    diagonal = fisher(model, names, context.feeds, kind, context.seed, progress=context.progress)

    def error(one: Open, floats: Floats) -> Callable[[Floats], float]:
        curvature = diagonal[one.name]
        return lambda miss: float((np.square(miss, dtype=np.float64) * curvature).sum())

    return Ranking.of_losses(dict(_errors(weights, clip, error)))


def _errors(
    weights: Sequence[Open], clip: Clip, error: Callable[[Open, Floats], Callable[[Floats], float]]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield each weight with the loss of each of its choices; one rounding a format."""
    for one in weights:
        floats = _floats(one.value)
        measure = error(one, floats)
        by_format: dict[Format | None, float] = {None: 0.0}
        for format in dict.fromkeys(choice.format for choice in one.choices):
            if format is not None:
                by_format[format] = measure(simulated(floats, format, clip, one.readers) - floats)
        yield one.name, {str(choice): by_format[choice.format] for choice in one.choices}


def _floats(value: ir.Value) -> Floats:
    """Return an initializer as float32."""
    with opened(value) as array:
        return np.array(array, np.float32)


def predicts(signal: str) -> bool:
    """Whether a signal predicts losses; the others only order."""
    return signal not in ("lim", "zd", "kurtosis")


def of_outputs(signal: str | None) -> bool:
    """Whether a signal's losses are those of the model's outputs, not of the layer alone."""
    return signal in ("measured", "fisher")


def needs_data(signal: Signal) -> bool:
    """Whether a signal runs the model over feeds."""
    return signal in ("lim", "activation-weighted", "fisher", "measured")
