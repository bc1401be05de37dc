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
    """

    scale: Doubles
    shift: Doubles
    owner: Indices
    limits: tuple[int, int]
    least: Doubles

    @classmethod
    def of(cls, start: Rounded, rows: Rows, floor: Floats) -> Grid:
        """Return the grid of a rounded weight.

        Args:
            start: The weight.
            rows: Lays an array of its shape out by rows.
            floor: What its scales may not fall below, of a shape that fits them.
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
        )

    def part(self, rows: slice) -> Grid:
        """Return the grid of some rows."""
        scale, shift = self.scale[rows], self.shift[rows]
        return Grid(scale, shift, self.owner[rows], self.limits, self.least[rows])

    def scaled(self, scale: Doubles) -> Grid:
        """Return the grid with other scales, which stay above what they may not fall below."""
        return replace(self, scale=np.maximum(scale, self.least))

    def codes(self, values: Doubles) -> Doubles:
        """Return the nearest codes, [rows, columns]."""
        return np.asarray(np.clip(np.rint(values / self.scale) + self.shift, *self.limits))

    def floats(self, codes: Doubles) -> Doubles:
        """Return what codes stand for, [rows, columns]."""
        return (codes - self.shift) * self.scale

    def nearest(self, values: Doubles, column: int) -> Doubles:
        """Return the nearest codes of one column, [rows]."""
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
