"""Reads the text of passes and targets: `name{key=value key=value},name`; values are JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from .errors import RecipeError

_NAME = re.compile(r"\s*([A-Za-z][\w-]*)\s*")
_KEY = re.compile(r"\s*(\w+)\s*=\s*")
_WORD = re.compile(r"[^\s{},=\"\[\]]+")
_JSON = json.JSONDecoder()


def parse_items(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Split `name{key=value key=value},name,...` into names and options.

    Raises:
        RecipeError: The text is not of that form; says at which character.
    """
    items: list[tuple[str, dict[str, Any]]] = []
    at = 0
    while True:
        name = _NAME.match(text, at)
        if name is None:
            raise _syntax(text, at, "a pass or target name")
        options, at = _options(text, name.end())
        items.append((name[1], options))
        if not text[at:].strip():
            return items
        if text[at] != ",":
            raise _syntax(text, at, "','")
        at += 1


def _options(text: str, at: int) -> tuple[dict[str, Any], int]:
    """Parse `{...}` at a position, if there is one; return the options and where they end."""
    options: dict[str, Any] = {}
    if at >= len(text) or text[at] != "{":
        return options, at
    at += 1
    while key := _KEY.match(text, at):
        if key[1] in options:
            raise RecipeError(f"option {key[1]!r} is given twice in {text!r}")
        options[key[1]], at = _value(text, key.end())
    end = re.compile(r"\s*\}\s*").match(text, at)
    if end is None:
        raise _syntax(text, at, "'key=value' or '}'")
    return options, end.end()


def _value(text: str, at: int) -> tuple[Any, int]:
    """Parse one JSON value or bare word."""
    word = _WORD.match(text, at)
    if word is not None:
        try:
            return json.loads(word[0]), word.end()
        except json.JSONDecodeError:
            return word[0], word.end()
    try:
        return _JSON.raw_decode(text, at)
    except json.JSONDecodeError:
        raise _syntax(text, at, "a value") from None


def _syntax(text: str, at: int, expected: str) -> RecipeError:
    """Return the error that points at one character."""
    got = text[at : at + 10] or "the end"
    return RecipeError(f"recipe, character {at + 1}: expected {expected}, got {got!r} in {text!r}")
