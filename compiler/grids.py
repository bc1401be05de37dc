"""The values that a weight may take, laid out by rows of output channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .quantizers import Floats, spread
from .rounding import Rounded

Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
Rows = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Grid:
    """Codes [rows, columns] stand for (code - shift) * scale.

    Attributes:
        scale: Positive, [rows, columns].
        shift: Zero points, [rows, columns].
        owner: Number of the stored scale that each element has, [rows, columns].
        limits: The least and the greatest code.
        least: What the scales may not fall below, [rows, columns].
        table: The codes that a row may take, rising, [rows, entries]; None where all within the
            limits are free.
    """

    scale: Doubles
    shift: Doubles
    owner: Indices
    limits: tuple[int, int]
    least: Doubles
    table: Doubles | None = None

    @classmethod
    def of(cls, start: Rounded, rows: Rows, floor: Floats, table: bool = False) -> Grid:
        """Return the grid of a rounded weight.

        Args:
            start: The weight.
            rows: Lays an array of its shape out by rows.
            floor: What its scales may not fall below, of a shape that fits them.
            table: Whether a row may only take the codes that it has.
        """
        shape, format = start.codes.shape, start.format
        numbers = np.arange(start.scale.size).reshape(start.scale.shape)
        least = np.broadcast_to(floor, start.scale.shape)

        def laid_out(one: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return rows(np.broadcast_to(spread(one, shape, format), shape))

        return cls(
            laid_out(start.scale).astype(np.float64),
            laid_out(start.zero_point).astype(np.float64),
            laid_out(numbers).astype(np.intp),
            format.symmetric_codes if format.signed else format.codes,
            laid_out(least).astype(np.float64),
            _entries(rows(start.codes), start.scale.size == 1) if table else None,
        )

    def part(self, rows: slice) -> Grid:
        """Return the grid of some rows."""
        scale, shift = self.scale[rows], self.shift[rows]
        table = None if self.table is None else self.table[rows]
        return Grid(scale, shift, self.owner[rows], self.limits, self.least[rows], table)

    def scaled(self, scale: Doubles) -> Grid:
        """Return the grid with other scales, which stay above what they may not fall below."""
        return replace(self, scale=np.maximum(scale, self.least))

    def codes(self, values: Doubles) -> Doubles:
        """Return the nearest codes, [rows, columns]."""
        if self.table is not None:
            return _nearest(values / self.scale + self.shift, self.table)
        return np.asarray(np.clip(np.rint(values / self.scale) + self.shift, *self.limits))

    def floats(self, codes: Doubles) -> Doubles:
        """Return what codes stand for, [rows, columns]."""
        return (codes - self.shift) * self.scale

    def nearest(self, values: Doubles, column: int) -> Doubles:
        """Return the nearest codes of one column, [rows]."""
        if self.table is not None:
            share = values / self.scale[:, column] + self.shift[:, column]
            return _nearest(share[:, None], self.table)[:, 0]
        codes = np.rint(values / self.scale[:, column]) + self.shift[:, column]
        return np.asarray(np.clip(codes, *self.limits))

    def column(self, values: Doubles, column: int) -> Doubles:
        """Return the nearest values of one column that can be stored, [rows]."""
        codes = self.nearest(values, column)
        return np.asarray((codes - self.shift[:, column]) * self.scale[:, column])

    @cached_property
    def local(self) -> Indices:
        """The owners, numbered from zero."""
        _, found = np.unique(self.owner, return_inverse=True)
        return found.reshape(self.owner.shape)

    def blocks(self) -> Iterator[Indices]:
        """Yield the columns that share a scale within a row; they are the same in every row."""
        first = self.owner[0]
        yield from (np.flatnonzero(first == owner) for owner in dict.fromkeys(first.tolist()))

    @property
    def by_row(self) -> bool:
        """Whether no two rows share a scale."""
        return len(set(self.owner[:, 0].tolist())) == len(self.owner)

    def stored(self, values: Doubles, like: Floats) -> Floats:
        """Return scales or shifts [rows, columns] as they are stored, in the shape of `like`."""
        found = np.empty(like.size, np.float64)
        found[self.owner.ravel()] = values.ravel()
        return found.reshape(like.shape).astype(np.float32)


def _entries(codes: npt.NDArray[Any], alike: bool) -> Doubles:
    """Return the codes of each row, or of all rows alike, rising, the greatest repeated."""
    if alike:
        return np.tile(np.unique(codes).astype(np.float64), (len(codes), 1))
    found = [np.unique(row).astype(np.float64) for row in codes]
    most = max(map(len, found))
    return np.stack([np.pad(one, (0, most - len(one)), mode="edge") for one in found])


def _nearest(values: Doubles, table: Doubles) -> Doubles:
    """Return the entry of its row that each value is nearest to, [rows, columns]."""
    place = np.zeros(values.shape, np.intp)
    for edge in ((table[:, 1:] + table[:, :-1]) / 2).T:  # a value's place: the edges below it
        place += values > edge[:, None]
    return np.take_along_axis(table, place, axis=1)
