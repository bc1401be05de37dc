"""Compares a variant with its source on the same feeds: SQNR, agreement, metric, latency."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, PlainSerializer

from .contract import Progress, Runner, silent
from .errors import DataError
from .feeds import Feeds
from .named import find, importable_cwd, is_name

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


def _to_json(value: float) -> float | str:
    """JSON knows no infinity; identical outputs have an infinite SQNR."""
    return value if math.isfinite(value) else str(value)


Decibel = Annotated[float, PlainSerializer(_to_json), BeforeValidator(float)]


class Metric(Protocol):
    """Scores outputs; an attribute `lower_is_better = True` turns the direction of a drop."""

    def __call__(
        self, outputs: dict[str, Array], feeds: dict[str, Array], labels: Array | None
    ) -> float:
        """Return the score of all check samples; arrays have the samples along axis 0."""
        ...


@dataclass(frozen=True)
class Comparison:
    """How far a variant is from its source on the check feeds.

    Attributes:
        sqnr_db: 10 log10(sum source^2 / sum (source - variant)^2), all float outputs together.
        cosine: Mean cosine of each sample's outputs (all float outputs, flattened).
        agreement: Share of positions whose largest class is the same; None where the first output
            is no classifier's.
        max_error: Greatest absolute difference.
        non_finite: Elements of the variant's outputs that are NaN or infinite; they count as 0.
        metric: Name of the task metric, or None.
        source_score: The source's score.
        variant_score: The variant's score.
        drop: How much worse the variant is, in the metric's unit (negative: better).
    """

    sqnr_db: Decibel
    cosine: float
    agreement: float | None
    max_error: float
    non_finite: int = 0
    metric: str | None = None
    source_score: float | None = None
    variant_score: float | None = None
    drop: float | None = None


@dataclass(frozen=True)
class Latency:
    """Median seconds of one call, both measured in turns in one process.

    Attributes:
        batch: Samples in one call.
        source: Median seconds of the source.
        variant: Median seconds of the variant.
        ratio: Median over the rounds of source / variant; above 1 the variant is faster.
        rounds: How many pairs were measured.
        threads: Threads that each may use.
    """

    batch: int
    source: float
    variant: float
    ratio: float
    rounds: int
    threads: int


def top1(outputs: dict[str, Array], feeds: dict[str, Array], labels: Array | None) -> float:
    """Return the percentage of samples whose largest logit is at the label.

    Raises:
        DataError: There are no labels, or they are not one number a sample.
    """
    if labels is None:
        raise DataError("the metric top1 needs labels: put an array `labels` into the check file")
    logits = next(iter(outputs.values()))
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"the metric top1 expects outputs [samples, classes] and labels [samples], got "
            f"{list(logits.shape)} and {list(labels.shape)}; give a metric of your own"
        )
    return float((logits.argmax(axis=1) == labels).mean() * 100)


def find_metric(text: str) -> Metric:
    """Return `top1`, or the function that `package.module:function` names.

    Raises:
        DataError: It cannot be imported, or is no function.
    """
    if text == "top1":
        return top1
    if not is_name(text):
        raise DataError(f"unknown metric {text!r}; expected top1 or package.module:function")
    with importable_cwd():
        found: Metric = find(text, DataError)
    if not callable(found):
        raise DataError(f"the metric {text} is a {type(found).__name__}; expected a function")
    return found


def compare(
    source: Runner,
    variant: Runner,
    feeds: Feeds,
    metric: Metric | None,
    progress: Progress = silent,
) -> Comparison:
    """Run both over the feeds and measure the difference.

    Raises:
        DataError: The source's outputs are not finite, or the metric fails.
    """
    tally = _Tally()
    ours: list[dict[str, Array]] = []
    theirs: list[dict[str, Array]] = []
    for batch in progress(feeds, "check", len(feeds)):
        expected, got = source(batch), variant(batch)
        tally.add(expected, got)
        if metric is not None:
            ours.append(expected)
            theirs.append(got)
    result = tally.result()
    if metric is None:
        return result
    everything = _joined(list(feeds))
    before = _score(metric, _joined(ours), everything, feeds.labels)
    after = _score(metric, _joined(theirs), everything, feeds.labels)
    sign = -1.0 if getattr(metric, "lower_is_better", False) else 1.0
    name = getattr(metric, "__name__", "metric")
    drop = sign * (before - after)
    return replace(result, metric=name, source_score=before, variant_score=after, drop=drop)


class _Tally:
    """Sums over batches, in float64."""

    def __init__(self) -> None:
        self.power = self.noise = self.cosines = self.max_error = 0.0
        self.samples = self.positions = self.same = self.non_finite = 0

    def add(self, expected: dict[str, Array], got: dict[str, Array]) -> None:
        """Add one batch."""
        names = [name for name, array in expected.items() if _is_float(array)]
        if not names:
            raise DataError(
                f"no float outputs to compare, only {sorted(expected)}; pass --no-check"
            )
        count = _samples([expected[name] for name in names])
        flat = [
            np.concatenate([_rows(side[n], count) for n in names], axis=1)
            for side in (expected, got)
        ]
        reference, actual = flat
        if not np.isfinite(reference).all():
            raise DataError("the source model's outputs are not finite on the check feeds")
        finite = np.isfinite(actual)
        self.non_finite += int(finite.size - finite.sum())
        actual = np.where(finite, actual, 0.0)
        miss = actual - reference
        self.power += float(np.square(reference).sum())
        self.noise += float(np.square(miss).sum())
        self.max_error = max(self.max_error, float(np.abs(miss).max(initial=0.0)))
        self.cosines += float(_cosines(reference, actual).sum())
        self.samples += len(reference)
        first = expected[names[0]]
        if first.ndim >= 2 and first.shape[-1] > 1:
            chosen = first.argmax(-1) == got[names[0]].argmax(-1)
            self.positions += chosen.size
            self.same += int(chosen.sum())

    def result(self) -> Comparison:
        """Return the figures of everything added."""
        sqnr = (
            float("inf")
            if self.noise == 0
            else 10 * np.log10(max(self.power, 1e-300) / self.noise)
        )
        agreement = self.same / self.positions if self.positions else None
        cosine = self.cosines / max(self.samples, 1)
        return Comparison(float(sqnr), cosine, agreement, self.max_error, self.non_finite)


def _is_float(array: Array) -> bool:
    """Whether an output holds floats."""
    dtype = getattr(array, "dtype", None)  # sequences and maps have none
    return dtype is not None and (dtype.kind == "f" or dtype.name == "bfloat16")


def _samples(arrays: list[Array]) -> int:
    """Return the length of axis 0 where all outputs agree on it; else they are one sample."""
    lengths = {len(array) if array.ndim else 0 for array in arrays}
    return (lengths.pop() or 1) if len(lengths) == 1 else 1


def _rows(array: Array, count: int) -> Doubles:
    """Return an output as [samples, elements] in float64."""
    return np.asarray(array, np.float64).reshape(count, -1)


def _cosines(reference: Doubles, actual: Doubles) -> Doubles:
    """Return the cosine of each row; 1 where both rows are zero, 0 where one is."""
    lengths = np.linalg.norm(reference, axis=1), np.linalg.norm(actual, axis=1)
    product = lengths[0] * lengths[1]
    alike = np.where(lengths[0] == lengths[1], 1.0, 0.0)  # used where the product is zero
    same = np.einsum("ij,ij->i", reference, actual)
    return np.where(product > 0, same / np.where(product > 0, product, 1.0), alike)


def _joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """Concatenate batches along axis 0.

    Raises:
        DataError: Shapes differ between batches, so a metric cannot see them as one array.
    """
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as error:
        raise DataError(
            f"a metric needs samples of one shape; pad the check feeds: {error}"
        ) from None


def _score(
    metric: Metric, outputs: dict[str, Array], feeds: dict[str, Array], labels: Array | None
) -> float:
    """Call the user's metric."""
    name = getattr(metric, "__name__", repr(metric))
    try:
        score = float(metric(outputs, feeds, labels))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the metric {name} failed: {type(error).__name__}: {error}") from error
    if not np.isfinite(score):
        raise DataError(f"the metric {name} returned {score}; expected a finite number")
    return score


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time callables in turns (A B A B ...), after one warm-up each; return seconds per round."""
    for call in runs.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def latency(
    source: Runner, variant: Runner, batch: Mapping[str, Array], threads: int, budget: float = 2.0
) -> Latency:
    """Measure one batch on both, in turns, for about `budget` seconds."""
    start = time.perf_counter()
    source(batch)
    variant(batch)
    pair = max(time.perf_counter() - start, 1e-6)
    rounds = int(np.clip(budget / pair, 5, 200))
    seconds = interleaved(
        {"source": lambda: source(batch), "variant": lambda: variant(batch)}, rounds
    )
    ratios = np.divide(seconds["source"], seconds["variant"])
    first = next(iter(batch.values()))
    samples = len(first) if np.ndim(first) else 1
    before, after = (float(np.median(seconds[name])) for name in ("source", "variant"))
    return Latency(samples, before, after, float(np.median(ratios)), rounds, threads)
