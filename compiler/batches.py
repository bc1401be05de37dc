"""Cuts a stream of samples into batches and drops samples from it, a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from .inputs import Array, Batch

# The shape of one sample for each input.
Shapes = tuple[tuple[int, ...], ...]

# Number of neighbouring samples of one shape, and that shape.
Run = tuple[int, Shapes]


def length(part: Batch) -> int:
    """Return the number of samples."""
    return len(next(iter(part.values())))


def shapes(part: Batch) -> Shapes:
    """Return the shape of one sample for each input."""
    return tuple(array.shape[1:] for array in part.values())


def add(runs: list[Run], more: int, shape: Shapes) -> None:
    """Lengthen the last run, or start a new one where the shapes differ."""
    if more and runs and runs[-1][1] == shape:
        runs[-1] = (runs[-1][0] + more, shape)
    elif more:
        runs.append((more, shape))


def cut(parts: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Cut samples into batches of `size`; the last before a change of shape may be smaller."""
    held: list[Batch] = []
    count = 0
    for part in parts:
        if held and shapes(held[0]) != shapes(part):
            yield _joined(held)
            held, count = [], 0
        start, total = 0, length(part)
        while start < total:
            stop = min(total, start + size - count)
            held.append({name: array[start:stop] for name, array in part.items()})
            count += stop - start
            start = stop
            if count == size:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)


def _joined(parts: list[Batch]) -> Batch:
    """Return the parts as one batch."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def kept(
    parts: Iterable[Batch], keep: Callable[[Array], Array], until: int | None
) -> Iterator[Batch]:
    """Yield what `keep` selects by the samples' index."""
    start = 0
    for part in parts:
        if until is not None and start >= until:
            return
        mask = keep(np.arange(start, start + length(part)))
        start += len(mask)
        if mask.all():
            yield part
        elif mask.any():
            yield {name: array[mask] for name, array in part.items()}
