"""Measured seconds of weighted nodes by workload and kernel form, and estimates from the nearest.

A form names a kernel of the runtime: `float`, or a text that the target gives it. What a table
does not hold it takes from the nearest workload of the same kind, and says so. A target measures
its own table (`Target.profile`) and may ship one. Tables are JSON files, a workload a line.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import dist, log2, prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .costs import Workload, fits, multiply_adds, output_positions
from .errors import DataError

FLOAT = "float"

LARGEST = 1 << 24  # bytes of a file that is read

Key = tuple[Workload, str]
Place = tuple[float, ...]


@dataclass(frozen=True)
class CostTable:
    """What was measured on one machine.

    Attributes:
        machine: Model name of its CPU.
        runtime: Name and version, e.g. `onnxruntime 1.32.0`.
        isa: Class of the CPU, as the target calls it.
        entries: (workload, form) -> seconds of one call on one thread; not to be changed.
    """

    machine: str
    runtime: str
    isa: str
    entries: Mapping[Key, float] = field(default_factory=dict)
    _estimates: dict[Key, float | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def seconds(self, workload: Workload, form: str) -> tuple[float, bool] | None:
        """Return (seconds, whether this very workload was measured); None where no kind of it was.

        An estimate is the workload's float time times the ratio of form to float at the nearest
        workload that has both. Unknown float time is that of the nearest, by multiply-adds.
        """
        key = (workload, form)
        measured = self.entries.get(key)
        if measured is not None:
            return measured, True
        if key not in self._estimates:
            self._estimates[key] = self._estimate(workload, form)
        estimate = self._estimates[key]
        return None if estimate is None else (estimate, False)

    def with_entries(self, more: Mapping[Key, float]) -> CostTable:
        """Return a table with these entries too; they replace older ones."""
        return replace(self, entries={**self.entries, **more})

    def _estimate(self, workload: Workload, form: str) -> float | None:
        """Return seconds from the nearest workload, or None."""
        near = self._nearest(workload, form)
        base = self._nearest(workload, FLOAT)
        if near is None or base is None:
            return None
        floats = self.entries.get((workload, FLOAT))
        if floats is None:
            share = max(multiply_adds(workload), 1) / max(multiply_adds(base), 1)
            floats = self.entries[base, FLOAT] * share
        return floats * (self.entries[near, form] / self.entries[near, FLOAT])

    def _nearest(self, workload: Workload, form: str) -> Workload | None:
        """Return the nearest workload of the same kind with both this form and float."""
        if not fits(workload):
            return None
        kind, place = _place(workload)
        points = self._points.get((kind, form), [])
        return min(points, key=lambda point: dist(place, point[0]), default=(None, None))[1]

    @cached_property
    def _points(self) -> dict[tuple[str, str], list[tuple[Place, Workload]]]:
        """The workloads by kind and form, in one order whatever order they were measured in."""
        found: dict[tuple[str, str], list[tuple[Place, Workload]]] = {}
        for workload, form in sorted(self.entries, key=_order):
            if (workload, FLOAT) in self.entries and fits(workload):
                kind, place = _place(workload)
                found.setdefault((kind, form), []).append((place, workload))
        return found

    def to_json(self) -> str:
        """Return JSON text with a workload a line, the same for the same table."""
        head = {"machine": self.machine, "runtime": self.runtime, "isa": self.isa}
        rows: dict[str, dict[str, float]] = {}
        for workload, form in sorted(self.entries, key=_order):
            plain = {
                "op": workload.op_type,
                "weight": workload.weight,
                "input": workload.input,
                "attributes": dict(workload.attributes),
            }
            rows.setdefault(json.dumps(plain), {})[form] = self.entries[workload, form]
        lines = (
            f'    {row[:-1]}, "seconds": {json.dumps(seconds, allow_nan=False)}}}'
            for row, seconds in rows.items()
        )
        start = json.dumps(head, indent=2).removesuffix("\n}")
        body = ",\n".join(lines)
        return f'{start},\n  "entries": [\n{body}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> CostTable:
        """Read what `to_json` wrote.

        Args:
            text: The content, which is not trusted.
            where: What to call it in a message, e.g. the file.

        Raises:
            DataError: It is no such table: not JSON, a field too many or too few or of the wrong
                type, seconds that are not positive and finite, a shape that does not fit its
                operator, or a workload twice.
        """
        try:
            file = _File.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, first["loc"])) or "its start"
            raise _unusable(where, f"at {at}: {first['msg'].lower()}") from None
        rows: dict[Workload, dict[str, float]] = {}
        for row in file.entries:
            workload = row.workload()
            if not fits(workload) or workload in rows:
                problem = "is there twice" if workload in rows else "has shapes that do not fit"
                raise _unusable(where, f"{workload} {problem}")
            rows[workload] = row.seconds
        entries = {(work, form): one for work, row in rows.items() for form, one in row.items()}
        return cls(file.machine, file.runtime, file.isa, entries)

    @classmethod
    def read(cls, path: Path) -> CostTable:
        """Read a file.

        Raises:
            DataError: It cannot be read, exceeds 16 MB, or `from_json` refuses its content.
        """
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
        except OSError as error:
            raise DataError(f"{path}: cannot read the table of costs: {_reason(error)}") from None
        if len(content) > LARGEST:
            raise _unusable(str(path), f"it exceeds {LARGEST} bytes")
        return cls.from_json(content, str(path))

    def write(self, path: Path) -> None:
        """Write a file whole or not at all; its folder is made, an older file is replaced.

        Raises:
            DataError: The file cannot be written.
        """
        partial: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            partial = Path(name)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            partial.replace(path)
        except OSError as error:
            if partial is not None:
                partial.unlink(missing_ok=True)
            raise DataError(
                f"{path}: cannot write the table of costs: {_reason(error)}; "
                "set FOURFOLD_CACHE to a folder that can be written to"
            ) from None


def _order(key: Key) -> tuple[Any, ...]:
    """Return what entries are sorted by; attributes are of several types, and compared as text."""
    workload, form = key
    return workload.op_type, workload.weight, workload.input, str(workload.attributes), form


def _place(workload: Workload) -> tuple[str, Place]:
    """Return the kind of a workload, and where it lies in log2 of what its time depends on.

    Convolutions of another rank or grouping are of another kind, since they run other kernels.
    """
    return _kind(workload), tuple(log2(max(size, 1)) for size in _sizes(workload))


def _kind(workload: Workload) -> str:
    """Return the name of those workloads whose times can be compared."""
    if workload.op_type not in ("Conv", "ConvTranspose"):
        return workload.op_type
    group = workload.attribute("group", 1)
    grouping = "dense" if group == 1 else "depthwise" if group == workload.input[1] else "grouped"
    return f"{workload.op_type} {len(workload.input) - 2}d {grouping}"


def _sizes(workload: Workload) -> Iterator[int]:
    """Yield the sizes that the time of a workload depends on."""
    weight, given = workload.weight, workload.input
    match workload.op_type:
        case "MatMul":
            yield from (prod(given[:-1]), *weight[-2:])
        case "Gemm":
            swap = workload.attribute("transB", 0)
            yield given[1] if workload.attribute("transA", 0) else given[0]
            yield from weight[::-1] if swap else weight
        case "Gather":
            yield from (prod(given), prod(weight[1:]))
        case "Conv":
            positions = given[0] * prod(output_positions(workload))
            yield from (positions, weight[1], weight[0], prod(weight[2:]))
        case _:  # ConvTranspose reads each position of its input once
            yield from (prod(given[:1] + given[2:]), *weight[:2], prod(weight[2:]))


def _reason(error: OSError) -> str:
    """Return what the system says, in lower case."""
    return (error.strerror or str(error)).lower()


def _unusable(where: str, problem: str) -> DataError:
    """Return the error for a file that is no table."""
    return DataError(
        f"{where}: not a table of costs: {problem}; delete the file and run `fourfold profile`"
    )


_Text = Annotated[str, Field(min_length=1, max_length=200)]
_Size = Annotated[int, Field(ge=0, le=2**31)]
_Sizes = Annotated[list[_Size], Field(max_length=8)]
_Steps = Annotated[list[Annotated[int, Field(ge=1, le=2**31)]], Field(max_length=8)]
_Pads = Annotated[list[Annotated[int, Field(ge=-(2**31), le=2**31)]], Field(max_length=16)]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Attributes(BaseModel):
    """The attributes of a workload, as they stand in a file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    auto_pad: Literal["SAME_UPPER", "SAME_LOWER", "VALID"] | None = None
    dilations: _Steps | None = None
    group: Annotated[int, Field(ge=1, le=2**31)] | None = None
    output_padding: _Sizes | None = None
    pads: _Pads | None = None
    strides: _Steps | None = None
    transA: Annotated[int, Field(ge=0, le=1)] | None = None  # noqa: N815 - ONNX calls it so
    transB: Annotated[int, Field(ge=0, le=1)] | None = None  # noqa: N815


class _Row(BaseModel):
    """A workload and its seconds, as they stand in a file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    op: _Text
    weight: _Sizes
    input: _Sizes
    attributes: _Attributes
    seconds: Annotated[dict[_Text, _Seconds], Field(min_length=1, max_length=100)]

    def workload(self) -> Workload:
        """Return the workload."""
        attributes: list[tuple[str, Any]] = [
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in sorted(self.attributes.model_dump(exclude_none=True).items())
        ]
        return Workload(self.op, tuple(self.weight), tuple(self.input), tuple(attributes))


class _File(BaseModel):
    """A whole file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    machine: _Text
    runtime: _Text
    isa: _Text
    entries: list[_Row]
