"""Feeds: the samples that calibrate or check a model, as batches that can be walked repeatedly.

Samples lie along axis 0 of every input. Where the model leaves that axis open, samples are cut
anew into batches of one size, so that no result depends on how the caller had split them; where
the model fixes it at N, batches have N samples. A model without such an axis (a scalar input, say)
takes each given batch as one sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .batches import Run, add, cut, kept, length, shapes
from .errors import DataError
from .inputs import LABELS, Array, Batch, InputSpec, checked, input_specs
from .sources import Source, opened_source

__all__ = ["Feeds", "InputSpec", "input_specs", "made_up"]


@dataclass(frozen=True, eq=False)
class Feeds:
    """Samples for a model's inputs; iterating yields batches, a dict of arrays, each time anew.

    Make them with `Feeds.read` or `made_up`.

    Attributes:
        specs: The model's inputs.
        batch: Samples in a batch, where the model leaves that open.
        made_up: Whether the samples are random, because there were none.
    """

    specs: tuple[InputSpec, ...]
    batch: int
    made_up: bool = False
    _parts: Callable[[], Iterator[Batch]] = field(default=lambda: iter(()), repr=False)
    _runs: tuple[Run, ...] = field(default=(), repr=False)
    _labels: Array | None = field(default=None, repr=False)
    _keep: Any = field(default=None, repr=False)

    @classmethod
    def read(
        cls,
        source: Any,
        inputs: Sequence[InputSpec],
        batch: int = 8,
        folder: Path | None = None,
    ) -> Feeds:
        """Read and check feeds of any kind. All of them are walked over once, to check each batch.

        Kinds of `source`:
            a .npz: arrays by input name, and perhaps `labels`;
            a folder of .npz: each is read as above;
            a folder of .npy: a file for each input, or for one-input models a file for each batch,
                in the order of their names;
            a folder of `test_data_set_*`, each with a TensorProto in `input_N.pb`;
            `package.module:function`: called without arguments, returns any of these kinds; the
                current directory can be imported from;
            a dict of arrays; a list of such dicts; any other iterable of them, or an onnxruntime
                CalibrationDataReader: walked once, and written to files on the way.

        Args:
            source: The feeds.
            inputs: The model's inputs, from `input_specs`.
            batch: Samples in a batch, where the model leaves that open.
            folder: Where an iterable's batches are written; None makes a temporary folder that
                lives as long as the feeds.

        Raises:
            DataError: The feeds cannot be read or do not fit the model; names file and input.
        """
        specs = tuple(inputs)
        _refuse_size(batch, "batch")
        whole = _unit(specs) is None
        opened = opened_source(source, specs, 0 if whole else 1, folder)
        runs: list[Run] = []
        labels: list[Array | None] = []
        for where, part, mine in _walk(opened, specs, whole):
            add(runs, length(part), shapes(part))
            labels.append(_fitting_labels(mine, length(part), where, whole))
        if not runs:
            raise DataError("the feeds hold no samples; give at least one")
        _refuse_remainder(runs, _unit(specs) or 1)
        return cls(
            specs,
            batch,
            _parts=lambda: (part for _, part, _ in _walk(opened, specs, whole)),
            _runs=tuple(runs),
            _labels=_joined_labels(labels),
            _keep=opened.keep,
        )

    @property
    def rebatchable(self) -> bool:
        """Whether the model leaves the number of samples in a batch open."""
        return bool(self.specs) and all(
            spec.shape and not isinstance(spec.shape[0], int) for spec in self.specs
        )

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(number for number, _ in self._runs)

    @property
    def labels(self) -> Array | None:
        """Labels along axis 0, in the order of the samples; None if the feeds have none."""
        whole = _unit(self.specs) is None
        if self._labels is None or not whole or self._labels.ndim < 2:
            return self._labels
        return self._labels.reshape(-1, *self._labels.shape[2:])

    def __len__(self) -> int:
        return sum(-(-number // self._size) for number, _ in self._runs)

    def __iter__(self) -> Iterator[Batch]:
        whole = _unit(self.specs) is None
        for batch in cut(self._parts(), self._size):
            # The ellipsis keeps a scalar an array.
            yield {name: array[0, ...] for name, array in batch.items()} if whole else batch

    @property
    def _size(self) -> int:
        """Samples in a full batch."""
        return self.batch if self.rebatchable else _unit(self.specs) or 1

    def rebatched(self, batch: int) -> Feeds:
        """Return the samples in batches of `batch`; where the model fixes the size, that stays.

        Raises:
            DataError: `batch` is below 1.
        """
        _refuse_size(batch, "batch")
        return replace(self, batch=batch)

    def head(self, count: int) -> Feeds:
        """Return the first `count` samples (or all); a whole number of the model's fixed batches.

        Raises:
            DataError: `count` is below 1.
        """
        _refuse_size(count, "head")
        unit = _unit(self.specs) or 1
        until = -(-count // unit) * unit
        return self._selected(lambda index: index < until, until)

    def split(self, every: int) -> tuple[Feeds, Feeds]:
        """Return (the others, every n-th sample starting with the first); labels follow.

        Where the model fixes batches of N samples, N neighbours stay together.

        Raises:
            DataError: `every` is below 2, or there are fewer than two samples (or fixed batches).
        """
        unit = _unit(self.specs) or 1
        if every < 2:
            raise DataError(f"cannot hold out every {every}. sample: expected 2 or more")
        if self.count < 2 * unit:
            raise DataError(
                f"cannot hold out samples of {self.count}: expected at least {2 * unit}; "
                "give check feeds of their own"
            )
        others = self._selected(lambda index: (index // unit) % every != 0)
        held = self._selected(lambda index: (index // unit) % every == 0)
        return others, held

    def sha256(self) -> str:
        """Return the digest of names, types, shapes and bytes of all samples and labels, in hex.

        It does not depend on how the samples are batched.
        """
        digest = hashlib.sha256()
        for spec in self.specs:
            digest.update(f"{spec.name}\0{spec.dtype}\0".encode())
        for part in self._parts():
            for sample in zip(*part.values(), strict=True):
                for array in sample:
                    digest.update(_bytes(np.asarray(array)))
        if self._labels is not None:
            digest.update(LABELS.encode() + _bytes(self._labels))
        return digest.hexdigest()

    def _selected(self, keep: Callable[[Array], Array], until: int | None = None) -> Feeds:
        """Return the samples whose index `keep` says yes to; the walk ends at index `until`."""
        runs: list[Run] = []
        start = 0
        for number, shape in self._runs:
            add(runs, int(keep(np.arange(start, start + number)).sum()), shape)
            start += number
        labels = None if self._labels is None else self._labels[keep(np.arange(start))]
        parts = self._parts
        return replace(
            self, _parts=lambda: kept(parts(), keep, until), _runs=tuple(runs), _labels=labels
        )


def _unit(specs: Sequence[InputSpec]) -> int | None:
    """Return how many samples stay together: 1, the fixed N, or None without a sample axis."""
    first = [spec.shape[0] if spec.shape else 0 for spec in specs]
    fixed = {axis for axis in first if isinstance(axis, int)}
    if not first or 0 in fixed or (fixed and (len(fixed) > 1 or len(fixed) != len(set(first)))):
        return None
    return fixed.pop() if fixed else 1


def _walk(
    source: Source, specs: Sequence[InputSpec], whole: bool
) -> Iterator[tuple[str, Batch, Array | None]]:
    """Yield a part's origin, its checked arrays and its labels; `whole` adds a sample axis."""
    for where, given in source.parts():
        part = checked(given, specs, where, 0 if whole else 1)
        # An input of that name is an input, and then there are no labels.
        labels = None if any(spec.name == LABELS for spec in specs) else part.pop(LABELS, None)
        yield where, ({n: a[None] for n, a in part.items()} if whole else part), labels


def _fitting_labels(labels: Array | None, number: int, where: str, whole: bool) -> Array | None:
    """Return a part's labels, one for each of its samples."""
    if labels is None or whole:
        return labels if labels is None else labels[None]
    if not labels.ndim or len(labels) != number:
        raise DataError(f"{where}: labels of shape {list(labels.shape)} for {number} samples")
    return labels


def _joined_labels(labels: list[Array | None]) -> Array | None:
    """Return the labels of all parts; all have them or none."""
    given = [part for part in labels if part is not None]
    if given and len(given) < len(labels):
        raise DataError(f"{len(given)} of {len(labels)} batches have labels; give all or none")
    try:
        return np.concatenate(given) if given else None
    except ValueError as error:
        raise DataError(f"the labels of the batches do not fit together: {error}") from None


def _refuse_remainder(runs: list[Run], unit: int) -> None:
    """Raise unless the samples fill batches of the size that the model fixes."""
    for number, _ in runs:
        if number % unit:
            raise DataError(
                f"the model takes batches of exactly {unit} samples, which {number} samples do "
                f"not fill: {number % unit} are left over; give a multiple of {unit}"
            )


def _refuse_size(size: int, what: str) -> None:
    """Raise unless a number of samples is positive."""
    if size < 1:
        raise DataError(f"{what} of {size} samples: expected 1 or more")


def _bytes(array: Array) -> bytes:
    """Return an array's shape and content; strings by their characters, not their addresses."""
    content = repr(array.tolist()).encode() if array.dtype.kind in "OU" else array.tobytes()
    return f"{array.dtype}{array.shape}\0".encode() + content


def made_up(
    inputs: Sequence[InputSpec],
    seed: int,
    count: int,
    size_of_dynamic_axes: int | Mapping[str, int] = 32,
    batch: int = 8,
) -> Feeds:
    """Return random feeds of the declared shapes, for a model that came without data.

    Floats are normal with variance 1, integers 0 or 1, booleans either. Sample i depends on the
    seed and i alone; nothing is kept in memory.

    Args:
        inputs: The model's inputs.
        seed: Seed, 0 or more.
        count: Samples; rounded up to fill the batches that the model fixes.
        size_of_dynamic_axes: Length of the open axes that hold no samples; by axis name (32 for
            the names left out) or one for all.
        batch: Samples in a batch, where the model leaves that open.

    Raises:
        DataError: An input's type cannot be made up (strings), or `count` is below 1.
    """
    specs = tuple(inputs)
    _refuse_size(count, "made-up feeds")
    unit = _unit(specs)
    sizes = size_of_dynamic_axes
    by_name = sizes if isinstance(sizes, Mapping) else {}
    other = sizes if isinstance(sizes, int) else 32

    def shape(spec: InputSpec) -> tuple[int, ...]:
        full = [d if isinstance(d, int) else by_name.get(d or "", other) for d in spec.shape]
        return (1, *full) if unit is None else (unit, *full[1:])

    def parts() -> Iterator[Batch]:
        for index in range(-(-count // (unit or 1))):
            draw = np.random.default_rng((seed, index))
            yield {spec.name: _random(draw, spec, shape(spec)) for spec in specs}

    total = -(-count // (unit or 1)) * (unit or 1)
    runs = ((total, shapes(next(parts()))),)
    return Feeds(specs, batch, made_up=True, _parts=parts, _runs=runs)


def _random(draw: np.random.Generator, spec: InputSpec, shape: tuple[int, ...]) -> Array:
    """Return random numbers of the input's type."""
    if spec.dtype.kind in "OUSc":
        raise DataError(
            f"cannot make up feeds for input {spec.name!r} of {spec.dtype}; give feeds"
        )
    if ir.DataType.from_numpy(spec.dtype).is_floating_point():
        return draw.standard_normal(shape, np.float32).astype(spec.dtype)
    return draw.integers(0, 2, shape).astype(spec.dtype)
