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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .channels import Channels
from .covariance import Meeting
from .formats import Format
from .gauges import LAYERS, Gauge, Reader, Share
from .graph import is_standard, weight_of
from .layer_noise import nearest
from .quantizers import Floats, affine_parameters, dequantize_affine, quantize_affine
from .weights import opened

Array = npt.NDArray[Any]
Exponents = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

DEAD = 1e-6  # a channel whose range is less than this part of the greatest is left alone
ALIKE = 0.02  # of the noise without factors: what two candidates may differ by
SWEEPS = 20  # over all gauges; a few are enough for choices to settle
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # parts of the range that are kept
CODES = Format.parse("uint8 per_tensor")
PROBE = 1 << 18  # elements that the part is chosen by


@dataclass(frozen=True, eq=False)
class Operand:
    """What was seen of an activation before a layer.

    Attributes:
        rows: What rows of the weight meet, [groups, rows, columns].
        low: Least element at each place along the axis that is summed over, and at most zero.
        high: Greatest element likewise.
        half: Greatest magnitude likewise, in every second batch.
    """

    rows: Floats
    low: Doubles
    high: Doubles
    half: Doubles


@dataclass
class Gathering:
    """Gathers an `Operand` from batches.

    Attributes:
        meeting: How the layer lays the activation out.
        quota: Rows to keep of each batch.
        seed: Seed of the draw; the same rows are drawn of every value of the same length.
    """

    meeting: Meeting
    quota: int
    seed: int
    _rows: list[Floats] = field(default_factory=list)
    _ends: list[tuple[Doubles, Doubles]] = field(default_factory=list)

    def add(self, array: Array) -> None:
        """Take one batch of the activation."""
        array = np.asarray(array, np.float32)
        axis = -1 - len(self.meeting.kernel)
        by_place = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        ends = (by_place.min(1, initial=0.0), by_place.max(1, initial=0.0))
        self._ends.append((ends[0].astype(np.float64), ends[1].astype(np.float64)))
        draw = np.random.default_rng([self.seed, len(self._ends)])
        parts, each = [array], self.quota
        if self.meeting.op_type == "Conv":  # whose windows overlap: one sample at a time
            chosen = np.sort(draw.permutation(len(array))[: self.quota])
            parts, each = [array[n : n + 1] for n in chosen], -(-self.quota // len(chosen))
        for part in parts:
            groups = list(self.meeting.rows(part))
            rows = np.sort(draw.permutation(len(groups[0]))[:each])
            self._rows.append(np.stack([group[rows] for group in groups]))

    def operand(self) -> Operand:
        """Return what was seen."""
        low, high = (np.array(ends) for ends in zip(*self._ends, strict=True))
        half = np.maximum(-low, high)[::2].max(0)
        return Operand(np.concatenate(self._rows, axis=1), low.min(0), high.max(0), half)


@dataclass
class Balance:
    """The exponents of all gauges of a model while they are chosen.

    Attributes:
        gauges: The gauges.
        operands: Id of a layer's node -> what was seen before it. Where one of a gauge's layers
            is missing, the gauge is chosen by its weights alone.
        bits: Bits that weights will have.
        alphas: How much of a range goes from activations into weights, 0 to 1.
        fixed: Numbers of gauges that keep what they have.
        exponents: For each gauge an exponent a channel.
    """

    gauges: Sequence[Gauge]
    operands: Mapping[int, Operand]
    bits: int
    alphas: tuple[float, ...]
    fixed: frozenset[int] = frozenset()
    exponents: list[Exponents] = field(init=False)
    _touching: dict[int, list[tuple[int, Share]]] = field(init=False)
    _reading: dict[int, list[tuple[int, Reader]]] = field(init=False)
    _exact: dict[int, Floats] = field(default_factory=dict)
    _noise: dict[tuple[int, bytes], Doubles] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exponents = [np.zeros(gauge.count, np.int64) for gauge in self.gauges]
        self._touching, self._reading = defaultdict(list), defaultdict(list)
        for number, gauge in enumerate(self.gauges):
            for share in _weights(gauge):
                self._touching[id(share.node)].append((number, share))
            for reader in gauge.readers:
                self._reading[id(reader.share.node)].append((number, reader))

    def sees(self, number: int) -> bool:
        """Whether it was seen what all readers of a gauge read."""
        return all(id(one.share.node) in self.operands for one in self.gauges[number].readers)

    def candidates(self, number: int, balanced: Exponents) -> dict[str, Exponents]:
        """Return what one gauge may take instead of what it has, by name."""
        found, gauge = {}, self.gauges[number]
        if any(not share.inverse for share in _weights(gauge)):
            found["weight ranges"] = balanced
        if not self.sees(number):
            return found
        kept, self.exponents[number] = self.exponents[number], np.zeros(gauge.count, np.int64)
        weight, seen = self.ranges(number, inverse=True), self._seen(number)
        self.exponents[number] = kept
        for alpha in self.alphas:
            for name, beta in (("", 1 - alpha), (", weights aside", 0.0)):
                wanted = _smoothing(seen, weight, alpha, beta)
                found[f"alpha {alpha:g}{name}"] = np.where(gauge.free, wanted, 0)
        return found

    def _seen(self, number: int) -> Doubles:
        """Return max|x| of each channel over what the readers read in every second batch.

        Factors that follow a range too closely fail where the next sample exceeds it. The other
        batches, which count when candidates are compared, show that.
        """
        greatest = np.zeros(self.gauges[number].count)
        for reader in self.gauges[number].readers:
            half = self.operands[id(reader.share.node)].half
            np.maximum.at(greatest, reader.channels, np.ldexp(half, self._before(reader)))
        return greatest

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
            np.maximum.at(greatest, share.channels, _kept(scaled, share.channels))
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
                alive = _alive(first, second) & gauge.free
                step = np.where(alive, _rounded(first, second), 0)
                self.exponents[number] = self.exponents[number] + step
                moved = moved or bool(step.any())
            if not moved:
                break
        after, self.exponents = self.exponents, before
        return after

    def loss(self, number: int, exponents: Exponents | None = None) -> float:
        """Return what a gauge tries to make small: the readers' noise, or the weights' criterion.

        Args:
            number: Number of the gauge.
            exponents: What it would have; None asks for what it has.
        """
        kept = self.exponents[number]
        if exponents is not None:
            self.exponents[number] = exponents
        loss = self._all_noise(number) if self.sees(number) else self._criterion(number)
        self.exponents[number] = kept
        return loss

    def _all_noise(self, number: int) -> float:
        """Return noise over signal of the readers' outputs, added up over the readers."""
        total = 0.0
        for reader in self.gauges[number].readers:
            noise, power = self._measured(reader)
            weights = np.ldexp(1.0, 2 * self._behind(reader))
            total += float((noise * weights).sum() / max((power * weights).sum(), 1e-30))
        return total

    def _before(self, reader: Reader) -> Exponents:
        """Return the exponents that all gauges put on the places that a reader sums over."""
        found = np.zeros(reader.channels.size, np.int64)
        for number, one in self._reading[id(reader.share.node)]:
            found += self.exponents[number][one.channels]
        return found

    def _behind(self, reader: Reader) -> Exponents:
        """Return the exponents that gauges put on a reader's output channels."""
        weight = weight_of(reader.share.node)
        assert weight is not None and weight.value.const_value is not None
        found = np.zeros(weight.value.const_value.shape.numpy()[weight.axis], np.int64)
        for number, share in self._touching[id(reader.share.node)]:
            if not share.inverse:
                found += self.exponents[number][share.channels.ravel()]
        return found

    def _measured(self, reader: Reader) -> tuple[Doubles, Doubles]:
        """Return (noise, power) of each output channel of one reader."""
        exponents, name = self._before(reader), id(reader.share.node)
        key = name, exponents.tobytes()
        if key not in self._noise:
            operand = self.operands[name]
            weight, places = as_rows(reader, len(operand.rows))
            if name not in self._exact:
                self._exact[name] = operand.rows @ weight.swapaxes(1, 2)
            factors = np.ldexp(np.float32(1), exponents)
            low, high = (operand.low * factors).min(), (operand.high * factors).max()
            rows = rounded_rows(operand.rows * factors[places], low, high)
            rounded = rounded_weight(np.asarray(weight / factors[places], np.float32), self.bits)
            outputs = rows @ rounded.swapaxes(1, 2)
            self._noise[key] = _power(outputs - self._exact[name], self._exact[name])
        return self._noise[key], _power(self._exact[name], self._exact[name])

    def _criterion(self, number: int) -> float:
        """Return how far weights are from filling their range: 1 - mean of p1 p2, at most 1.

        p1 and p2 are the ranges of a channel in the writer's and the readers' weights, over the
        greatest of all channels.
        """
        first, second = (self.ranges(number, inverse) for inverse in (False, True))
        product = first * second / max(float(first.max() * second.max()), 1e-300)
        return 1 - float(product[self.gauges[number].free].mean())


def _kept(array: Array, channels: Channels) -> Array:
    """Take the greatest over the axes along which the channel numbers do not change."""
    axes = tuple(axis for axis, length in enumerate(channels.shape) if length == 1)
    return np.broadcast_to(array.max(axis=axes, keepdims=True), channels.shape)


def _weights(gauge: Gauge) -> Iterable[Share]:
    """Yield the layers' weights of a gauge: the writer's, and those of its readers."""
    yield from (
        share for share in gauge.written if share.index == 1 and is_standard(share.node, *LAYERS)
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


def as_rows(reader: Reader, groups: int) -> tuple[Floats, Channels]:
    """Return (weight [groups, outputs, columns], places of its columns [groups, 1, columns])."""
    weight = weight_of(reader.share.node)
    assert weight is not None
    with opened(weight.value) as array:
        by_output = np.moveaxis(array.astype(np.float32), weight.axis, 0)
        places = np.moveaxis(np.broadcast_to(reader.places, array.shape), weight.axis, 0)
        shape = (groups, len(by_output) // groups, -1)
        return np.ascontiguousarray(by_output.reshape(shape)), places.reshape(shape)[:, :1]


def rounded_rows(rows: Floats, low: float, high: float) -> Floats:
    """Return rows rounded to 256 codes, with the part of [low, high] that errs least."""
    flat = rows.reshape(-1)
    probe = flat[:: max(1, flat.size // PROBE)]
    errors = [np.square(_affine(probe, low * c, high * c) - probe).sum() for c in CLIPS]
    part = CLIPS[int(np.argmin(errors))]
    return _affine(rows, low * part, high * part)


def _affine(values: Floats, low: float, high: float) -> Floats:
    """Round to uint8 codes of a range, and back."""
    scale, zero_point = affine_parameters(low, high, CODES)
    return dequantize_affine(quantize_affine(values, scale, zero_point, CODES), scale, zero_point)


def rounded_weight(weight: Floats, bits: int) -> Floats:
    """Return a weight [groups, outputs, columns] rounded with a scale for each output."""
    return nearest(weight.reshape(-1, weight.shape[-1]), bits).reshape(weight.shape)


def _power(values: Floats, exact: Floats) -> Doubles:
    """Return the summed squares of each output of [groups, rows, outputs].

    A row counts by what it makes exactly, so that a few great ones do not hide the others.
    """
    own = np.square(exact, dtype=np.float64).sum(axis=(0, 2))
    share = 1 / np.maximum(own + np.median(own), 1e-30)
    power: Doubles = np.einsum("gro,r->go", np.square(values, dtype=np.float64), share).ravel()
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
    names, first = [""] * len(numbers), [balance.loss(n) for n in numbers]
    for _ in range(SWEEPS):
        moved = False
        balanced = balance.balanced()
        mean = float(np.mean([balance.loss(n) for n in numbers]))
        for number in (n for n in numbers if n not in balance.fixed):
            tried = balance.candidates(number, balanced[number])
            if not tried:
                continue
            best, left = _mildest(balance, number, tried)
            now = balance.loss(number)
            fresh = balance.gauges[number].needs_mul and not balance.exponents[number].any()
            needed = max(gain * now, insert_gain * mean if fresh else 0.0)
            if left < now and now - left >= needed:
                balance.exponents[number] = tried[best]
                names[number], moved = best, True
        if not moved:
            break
    return [(names[n], balance.loss(n) / first[n] if first[n] > 0 else 1.0) for n in numbers]


def _mildest(balance: Balance, number: int, tried: Mapping[str, Exponents]) -> tuple[str, float]:
    """Return (name, loss) of the candidate with the closest factors of those about as good.

    The wider the factors, the more channels there are that can leave their range on other feeds.
    """
    losses = {name: balance.loss(number, one) for name, one in tried.items()}
    limit = min(losses.values()) + ALIKE * balance.loss(number, 0 * balance.exponents[number])
    best = min(losses, key=lambda name: (losses[name] > limit, np.ptp(tried[name]), losses[name]))
    return best, losses[best]
