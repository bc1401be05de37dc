"""Notes: facts about a value that ONNX has no field for. Together they are the plan.

A note rides on `ir.Value.meta` under one key that only this module touches. Deciding passes write
notes; editing passes obey them. onnxscript's rewriter makes new values and drops their meta, so
the runner wraps every pass in `kept`, which puts notes back by value name and tells which were
lost.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import onnx_ir as ir
from pydantic import Field, TypeAdapter, ValidationError

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
        activation: Of a weight: container of the other operand in its kernel, or `float`.
        low: Least value that the range keeps, in the value's own unit.
        high: Greatest value that the range keeps.
        sqnr_db: Expected SQNR of static quantization with that range, in dB.
        shares: Name of the value whose range this one takes, so that both have one scale.
        block: Of a weight: index of the repeated block that it is part of.
        importance: Signal -> how important it found the weight; greater is more important.
        losses: Choice -> predicted loss of the model's outputs, by the leading signal.
        loss: Predicted loss of the choice that was made.
        bytes: Stored bytes of the choice that was made.
        seconds: Predicted seconds of one call in the choice that was made.
        cost_source: Where the seconds come from: measured, nearest or shipped.
        split: Of a weight that has been split: the format that its parts were given.
        part: Of a part: the weight that it is a part of.
        why: The reason for the decision, one clause.
    """

    format: Format | None = None
    mode: Mode | None = None
    activation: str | None = None
    low: float | None = None
    high: float | None = None
    sqnr_db: float | None = None
    shares: str | None = None
    block: int | None = None
    importance: Mapping[str, float] | None = None
    losses: Mapping[str, float] | None = None
    loss: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    cost_source: str | None = None
    split: str | None = None
    part: str | None = None
    why: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the known fields with the format as text; `from_json` reads it back."""
        known = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        if self.format is not None:
            known["format"] = str(self.format)
        return known

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Note:
        """Read what `as_json` wrote, perhaps edited by hand.

        Raises:
            RecipeError: A field is unknown or of the wrong type, or the format is not one.
        """
        known = _checkers()
        for name, value in fields.items():
            if name not in known:
                raise RecipeError(f"a plan has no field {name!r}{did_you_mean(name, known)}")
            try:
                known[name].validate_python(value, strict=True)
            except ValidationError as error:
                problem = error.errors()[0]["msg"].lower()
                raise RecipeError(f"plan field {name} = {value!r}: {problem}") from None
        text = fields.get("format")
        return cls(**{**fields, "format": Format.parse(text) if text else None})


@cache
def _checkers() -> dict[str, TypeAdapter[Any]]:
    """Return what checks each field of a note as plain data."""
    number = Annotated[float, Field(allow_inf_nan=False)]
    kinds: dict[str, Any] = {
        "format": str,
        "mode": Mode,
        "activation": str,
        "shares": str,
        "split": str,
        "part": str,
        "cost_source": str,
        "why": str,
        "block": int,
        "bytes": int,
        "importance": dict[str, number],
        "losses": dict[str, number],
    }
    return {
        field.name: TypeAdapter(kinds.get(field.name, number))
        for field in dataclasses.fields(Note)
    }


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
    parted = {read(value).part for value in homes.values()}
    for name, note in before.items():
        if id(note) in held:  # still there, or moved to a value of another name
            continue
        if name not in homes and name not in parted:
            lost.append(str(name))
        elif name in homes and read(homes[name]) == EMPTY:
            homes[name].meta[KEY] = note


def plan(model: ir.Model) -> dict[str, dict[str, Any]]:
    """Return every note by value name, in graph order: what plan.json holds."""
    return {
        str(value.name): note.as_json()
        for value in values(model)
        if (note := read(value)) != EMPTY
    }


def apply_plan(model: ir.Model, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the notes of a plan onto the model's values; all of them, or none.

    Raises:
        RecipeError: The plan names a value that the model does not have, or a note is malformed.
    """
    homes = {str(value.name): value for value in values(model)}
    found = {}
    for name, fields in notes.items():
        if name not in homes:
            raise RecipeError(f"plan: the model has no value {name!r}{did_you_mean(name, homes)}")
        try:
            found[name] = Note.from_json(fields)
        except RecipeError as error:
            error.add_note(f"in the plan of {name!r}")
            raise
    for name, note in found.items():
        homes[name].meta[KEY] = note


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
