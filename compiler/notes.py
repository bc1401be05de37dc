"""Notes: facts about a value that ONNX has no field for. Together they are the plan.

A note rides on `ir.Value.meta` under one key that only this module touches. Deciding passes write
notes; editing passes obey them. onnxscript's rewriter makes new values and drops their meta, so
the runner wraps every pass in `kept`, which puts notes back by value name and tells which were
lost.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from .errors import ModelError, RecipeError, did_you_mean
from .formats import Format
from .graph import values

KEY = "fourfold.note"

Mode = Literal["static", "dynamic", "float"]


@dataclass(frozen=True)
class Note:
    """What is known or decided about one value; a field left at None is not known yet.

    Attributes:
        format: The integer format it is stored or computed in.
        mode: `static` (scale fixed at compile time), `dynamic` (range taken at run time) or
        `float`.
        low: Least value that the range keeps, in the value's own unit.
        high: Greatest value that the range keeps.
        sqnr_db: Expected SQNR of static quantization with that range, in dB.
        shares: Name of the value whose range this one takes, so that both have one scale.
        importance: What quantizing this value costs, in the unit of the signal that measured it.
        why: The reason for the decision, one clause.
    """

    format: Format | None = None
    mode: Mode | None = None
    low: float | None = None
    high: float | None = None
    sqnr_db: float | None = None
    shares: str | None = None
    importance: float | None = None
    why: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the known fields with the format as text; `from_json` reads it back."""
        known = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if self.format is not None:
            known["format"] = str(self.format)
        return known

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Note:
        """Read what `as_json` wrote.

        Raises:
            RecipeError: A field is unknown, or the format is not one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise RecipeError(f"a plan has no field {name!r}{did_you_mean(name, known)}")
        text = fields.get("format")
        return cls(**{**fields, "format": Format.parse(text) if text else None})


EMPTY = Note()


def read(value: ir.Value) -> Note:
    """Return the value's note, or an empty one."""
    note = value.meta.get(KEY, EMPTY)
    assert isinstance(note, Note)
    return note


def write(value: ir.Value, **fields: Any) -> None:
    """Set fields of the value's note; the other fields stay."""
    value.meta[KEY] = dataclasses.replace(read(value), **fields)


def move(source: ir.Value, target: ir.Value) -> None:
    """Take the note from one value to another that now means the same.

    Raises:
        ModelError: Both have a note and they differ.
    """
    note = read(source)
    if read(target) != EMPTY:
        note = merge(note, read(target), where=target.name or "?")
    source.meta.pop(KEY, None)
    target.meta[KEY] = note  # the same object where it can be: `kept` follows it by identity


def merge(first: Note, second: Note, where: str) -> Note:
    """Return one note that says what both say.

    Raises:
        ModelError: The notes contradict each other.
    """
    merged = {}
    for field in dataclasses.fields(Note):
        mine, other = getattr(first, field.name), getattr(second, field.name)
        if mine is not None and other is not None and mine != other:
            raise ModelError(
                f"two plans meet at {where!r}: {field.name} is {mine} and {other}; "
                "give both values one decision"
            )
        merged[field.name] = mine if mine is not None else other
    return Note(**merged)


@contextmanager
def kept(model: ir.Model) -> Iterator[list[str]]:
    """Carry notes across a rewrite by value name; the list receives the names that got lost."""
    before = {value.name: note for value in values(model) if (note := read(value)) != EMPTY}
    lost: list[str] = []
    yield lost
    homes = {value.name: value for value in values(model)}
    held = {id(read(value)) for value in homes.values()}
    for name, note in before.items():
        if id(note) in held:  # still there, or moved to a value of another name
            continue
        if name not in homes:
            lost.append(str(name))
        elif read(homes[name]) == EMPTY:
            homes[name].meta[KEY] = note


def plan(model: ir.Model) -> dict[str, dict[str, Any]]:
    """Return every note by value name, in graph order: what plan.json holds."""
    return {
        str(value.name): note.as_json()
        for value in values(model)
        if (note := read(value)) != EMPTY
    }


def apply_plan(model: ir.Model, notes: dict[str, dict[str, Any]]) -> None:
    """Write the notes of a plan onto the model's values.

    Raises:
        ModelError: The plan names a value that the model does not have.
    """
    homes = {value.name: value for value in values(model)}
    unknown = sorted(set(notes) - set(homes))
    if unknown:
        raise ModelError(f"the plan names values that the model does not have: {unknown[:5]}")
    for name, fields in notes.items():
        homes[name].meta[KEY] = Note.from_json(fields)


def to_metadata(model: ir.Model) -> None:
    """Copy notes into `metadata_props`, so that a saved model carries them."""
    for value in values(model):
        if (note := read(value)) != EMPTY:
            value.metadata_props[KEY] = json.dumps(note.as_json(), sort_keys=True)


def from_metadata(model: ir.Model) -> None:
    """Turn saved notes back into notes."""
    for value in values(model):
        text = value.metadata_props.pop(KEY, None)
        if text is not None:
            value.meta[KEY] = Note.from_json(json.loads(text))
