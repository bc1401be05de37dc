"""Chooses the factors of gauges: candidates from ranges, compared by the noise that they leave.

The noise of a layer's output is measured on a sample of the rows that its weight meets: the value
is rounded to 8 bits with one scale, the weight to its bits with a scale for each output channel,
and the product is compared with the exact one. What rounding does to the writer's own weight is
not part of it: its output channels have scales of their own, so a factor on them changes nothing.
All factors are powers of two, 2**exponent; rounding commutes with them.
Sources: Nagel et al., arXiv 1906.04721, section 4.1; Xiao et al., arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .covariance import Meeting
from .gauges import Channels, Gauge, Share
from .graph import is_standard, weight_of
from .weights import opened

Exponents = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

DEAD = 1e-6  # a channel whose range is less than this part of the greatest is left alone
SWEEPS = 20  # over all gauges; a few are enough for choices to settle
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # parts of the range that are kept
PROBE = 1 << 18  # elements that the part is chosen by


@dataclass(frozen=True, eq=False)
class Operand:
    """What was seen of an activation before a layer.

    Attributes:
        rows: What rows of the weight meet, [groups, rows, columns].
        low: Least element of each channel of the gauge, over all samples.
        high: Greatest element likewise.
    """

    rows: Floats
    low: Doubles
    high: Doubles


@dataclass
class Gathering:
    """Gathers an `Operand` from batches.

    Attributes:
        meeting: How the layer lays the activation out.
        channels: Channel numbers that broadcast against the activation.
        count: Number of channels.
        quota: Rows to keep of each batch.
        seed: Seed of the draw; the same rows are drawn of every value of the same length.
    """

    meeting: Meeting
    channels: Channels
    count: int
    quota: int
    seed: int
    low: Doubles = field(init=False)
    high: Doubles = field(init=False)
    _rows: list[Floats] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.low, self.high = np.zeros(self.count), np.zeros(self.count)

    def add(self, array: npt.NDArray[np.generic]) -> None:
        """Take one batch of the activation."""
        array = np.asarray(array, np.float32)
        np.minimum.at(self.low, self.channels, _kept(array, self.channels, np.min))
        np.maximum.at(self.high, self.channels, _kept(array, self.channels, np.max))
        chosen: npt.NDArray[np.intp] | None = None
        groups = []
        for rows in self.meeting.rows(array):
            if chosen is None:
                draw = np.random.default_rng([self.seed, len(self._rows)])
                chosen = draw.choice(len(rows), min(self.quota, len(rows)), replace=False)
            groups.append(rows[np.sort(chosen)])
        self._rows.append(np.stack(groups))

    def operand(self) -> Operand:
        """Return what was seen."""
        return Operand(np.concatenate(self._rows, axis=1), self.low, self.high)


def _kept(
    array: npt.NDArray[np.generic], channels: Channels, reduce: Callable[..., Doubles]
) -> Doubles:
    """Reduce an array to the shape of the channel numbers that broadcast against it."""
    axes = tuple(axis for axis, length in enumerate(channels.shape) if length == 1)
    return np.broadcast_to(reduce(array, axis=axes, keepdims=True), channels.shape)


@dataclass
class Balance:
    """The exponents of all gauges of a model while they are chosen.

    Attributes:
        gauges: The gauges.
        operands: For each gauge what was seen before each of its readers; None where nothing was.
        bits: Bits that weights will have.
        alphas: How much of a range goes from activations into weights, 0 to 1.
        fixed: Numbers of gauges that keep what they have.
        exponents: For each gauge an exponent a channel.
    """

    gauges: Sequence[Gauge]
    operands: Sequence[Sequence[Operand] | None]
    bits: int
    alphas: tuple[float, ...]
    fixed: frozenset[int] = frozenset()
    exponents: list[Exponents] = field(init=False)
    _touching: dict[int, list[tuple[int, Share]]] = field(init=False)
    _noise: dict[tuple[int, int, bytes], tuple[Doubles, Doubles]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exponents = [np.zeros(gauge.count, np.int64) for gauge in self.gauges]
        self._touching = defaultdict(list)
        for number, gauge in enumerate(self.gauges):
            for share in _weights(gauge):
                self._touching[id(share.node)].append((number, share))

    def candidates(self, number: int, balanced: Exponents) -> dict[str, Exponents]:
        """Return what one gauge may take instead of what it has, by name."""
        found = {}
        if any(not share.inverse for share in _weights(self.gauges[number])):
            found["weight ranges"] = balanced
        operands = self.operands[number]
        if operands:
            weight = self.ranges(number, inverse=True)
            weight *= np.ldexp(1.0, self.exponents[number])  # as it was, like the rows
            seen = np.max([np.maximum(-o.low, o.high) for o in operands], axis=0)
            for alpha in self.alphas:
                found[f"alpha {alpha:g}"] = _smoothing(seen, weight, alpha, 1 - alpha)
                aside = _smoothing(seen, weight, alpha, 0.0)
                found[f"alpha {alpha:g}, weights aside"] = aside
        return found

    def ranges(self, number: int, inverse: bool) -> Doubles:
        """Return max|w| of each channel over the readers' weights, or over the writer's."""
        greatest = np.zeros(self.gauges[number].count)
        for share in _weights(self.gauges[number]):
            if share.inverse != inverse:
                continue
            with opened(share.value) as array:
                scaled = np.abs(array.astype(np.float32))
            for other, touching in self._touching[id(share.node)]:
                signed = self.exponents[other] * (-1 if touching.inverse else 1)
                scaled = np.ldexp(scaled, signed[touching.channels])
            np.maximum.at(greatest, share.channels, _kept(scaled, share.channels, np.max))
        return greatest

    def balanced(self) -> list[Exponents]:
        """Return what cross-layer equalization makes of all gauges from here, until it settles."""
        before = list(self.exponents)
        for _ in range(SWEEPS):
            moved = False
            for number, gauge in enumerate(self.gauges):
                if all(share.inverse for share in _weights(gauge)):
                    continue
                first, second = (self.ranges(number, inverse) for inverse in (False, True))
                step = np.where(_alive(first, second), _rounded(first, second), 0)
                self.exponents[number] = self.exponents[number] + step
                moved = moved or bool(step.any())
            if not moved:
                break
        after, self.exponents = self.exponents, before
        return after

    def noise(self, number: int, exponents: Exponents) -> float:
        """Return noise over signal of the readers' outputs, added up over the readers."""
        total = 0.0
        for position in range(len(self.gauges[number].readers)):
            key = (number, position, exponents.tobytes())
            if key not in self._noise:
                self._noise[key] = self._measured(number, position, exponents)
            noise, power = self._noise[key]
            weights = np.ldexp(1.0, 2 * self._behind(number, position))
            total += float((noise * weights).sum() / max((power * weights).sum(), 1e-30))
        return total

    def _behind(self, number: int, position: int) -> Exponents:
        """Return the exponents that other gauges put on a reader's output channels."""
        node = self.gauges[number].readers[position].share.node
        weight = weight_of(node)
        assert weight is not None and weight.value.const_value is not None
        outputs = weight.value.const_value.shape.numpy()[weight.axis]
        found = np.zeros(outputs, np.int64)
        for other, share in self._touching[id(node)]:
            if not share.inverse:
                found += self.exponents[other][share.channels.ravel()]
        return found

    def _measured(
        self, number: int, position: int, exponents: Exponents
    ) -> tuple[Doubles, Doubles]:
        """Return (noise, power) of each output channel of one reader."""
        operands = self.operands[number]
        assert operands is not None
        reader, operand = self.gauges[number].readers[position], operands[position]
        weight, channels = as_rows(reader.share, len(operand.rows))
        factors = np.ldexp(np.float32(1), exponents)
        low, high = (operand.low * factors).min(), (operand.high * factors).max()
        rows = rounded_rows(operand.rows * factors[channels][:, None, :], low, high)
        divided = np.asarray(weight / factors[channels][:, :, None], np.float32)
        exact = operand.rows @ weight
        error = rows @ rounded_weight(divided, self.bits) - exact
        return _power(error), _power(exact)

    def criterion(self, number: int, exponents: Exponents) -> float:
        """Return how far weights are from filling their range: 1 - mean of p1 p2, at most 1.

        p1 and p2 are the ranges of a channel in the writer's and the readers' weights, over the
        greatest of all channels.
        """
        kept, self.exponents[number] = self.exponents[number], exponents
        first, second = (self.ranges(number, inverse) for inverse in (False, True))
        self.exponents[number] = kept
        product = first * second / max(float(first.max() * second.max()), 1e-300)
        return 1 - float(product.mean())


def _weights(gauge: Gauge) -> Iterable[Share]:
    """Yield the layers' weights of a gauge: the writer's, and those of its readers."""
    yield from (
        share
        for share in gauge.written
        if share.index == 1 and is_standard(share.node, "Conv", "Gemm", "MatMul")
    )
    yield from (reader.share for reader in gauge.readers)


def _alive(*ranges: Doubles) -> npt.NDArray[np.bool_]:
    """Whether a channel has a range that can be told from zero, in all of these."""
    told: npt.NDArray[np.bool_] = np.all(
        [r > DEAD * max(float(r.max()), 1e-30) for r in ranges], axis=0
    )
    return told


def _rounded(first: Doubles, second: Doubles) -> Exponents:
    """Return the exponents of sqrt(second / first), rounded."""
    logs = [np.log2(np.maximum(r, 1e-300)) for r in (first, second)]
    return np.rint((logs[1] - logs[0]) / 2).astype(np.int64)


def _smoothing(seen: Doubles, weight: Doubles, alpha: float, beta: float) -> Exponents:
    """Return the exponents of weight**beta / seen**alpha, about their median."""
    alive = _alive(seen, weight)
    if not alive.any():
        return np.zeros(len(seen), np.int64)
    logs = [np.log2(np.where(alive, r, 1.0)) for r in (seen, weight)]
    wanted = beta * logs[1] - alpha * logs[0]
    middle = np.rint(np.median(wanted[alive]))
    return np.where(alive, np.rint(wanted) - middle, 0).astype(np.int64)


def as_rows(share: Share, groups: int) -> tuple[Floats, Channels]:
    """Return (weight [groups, columns, outputs], channel numbers [groups, columns])."""
    weight = weight_of(share.node)
    assert weight is not None
    with opened(weight.value) as array:
        by_output = np.moveaxis(array.astype(np.float32), weight.axis, 0)
        numbers = np.moveaxis(np.broadcast_to(share.channels, array.shape), weight.axis, 0)
        shape = (groups, len(by_output) // groups, -1)
        return (
            np.ascontiguousarray(by_output.reshape(shape).transpose(0, 2, 1)),
            numbers.reshape(shape)[:, 0],
        )


def rounded_rows(rows: Floats, low: float, high: float) -> Floats:
    """Return rows rounded to 256 codes, with the part of [low, high] that errs least."""
    flat = rows.reshape(-1)
    probe = flat[:: max(1, flat.size // PROBE)]
    errors = [np.square(_affine(probe, low * c, high * c) - probe).sum() for c in CLIPS]
    part = CLIPS[int(np.argmin(errors))]
    return _affine(rows, low * part, high * part)


def _affine(values: Floats, low: float, high: float) -> Floats:
    """Round to uint8 codes of a range that contains zero, and back."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(values / scale) + np.float32(zero), 0, 255)
    return np.asarray((codes - np.float32(zero)) * scale, np.float32)


def rounded_weight(weight: Floats, bits: int) -> Floats:
    """Return a weight [groups, columns, outputs] rounded with a scale for each output."""
    limit = np.float32(2 ** (bits - 1) - 1)
    scale = np.abs(weight).max(axis=1, keepdims=True) / limit
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.asarray(np.rint(weight / scale) * scale, np.float32)


def _power(values: Floats) -> Doubles:
    """Return the summed squares of each output of [groups, rows, outputs]."""
    power: Doubles = np.square(values, dtype=np.float64).sum(axis=1).ravel()
    return power


def decide(balance: Balance, gain: float, insert_gain: float) -> list[tuple[str, float]]:
    """Choose exponents for all gauges in rounds, until no gauge gains.

    Args:
        balance: Its exponents are set.
        gain: Least part of its noise that a gauge has to lose in order to be changed.
        insert_gain: Least noise that one with a Mul has to lose beside, as a part of the mean
            over all gauges.

    Returns:
        For each gauge (name of its last choice or "", part of the noise that is left).
    """
    numbers = range(len(balance.gauges))
    names, first = [""] * len(numbers), [_loss(balance, n) for n in numbers]
    for _ in range(SWEEPS):
        moved = False
        balanced = balance.balanced()
        mean = float(np.mean([_loss(balance, n) for n in numbers]))
        for number in (n for n in numbers if n not in balance.fixed):
            now = _loss(balance, number)
            tried = balance.candidates(number, balanced[number])
            losses = {name: _loss(balance, number, one) for name, one in tried.items()}
            best = min(losses, key=lambda name: losses[name], default=None)
            fresh = balance.gauges[number].needs_mul and not balance.exponents[number].any()
            needed = max(gain * now, insert_gain * mean if fresh else 0.0)
            if best is None or now <= 0 or now - losses[best] < needed:
                continue
            balance.exponents[number] = tried[best]
            names[number], moved = best, True
        if not moved:
            break
    return [(names[n], _loss(balance, n) / first[n] if first[n] > 0 else 1.0) for n in numbers]


def _loss(balance: Balance, number: int, exponents: Exponents | None = None) -> float:
    """Return what a gauge tries to make small: the readers' noise, or the weights' criterion."""
    exponents = balance.exponents[number] if exponents is None else exponents
    if balance.operands[number] is not None:
        return balance.noise(number, exponents)
    return balance.criterion(number, exponents)
