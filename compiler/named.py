"""Finds a Python object by its name, `package.module:function`, as a user wrote it."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FourfoldError, did_you_mean

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_name(text: str) -> bool:
    """Whether the text has the form `package.module:function`."""
    return _NAME.fullmatch(text) is not None


@contextmanager
def importable_cwd() -> Iterator[None]:
    """Put the current directory first on the import path for the length of the block."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def find(text: str, error: type[FourfoldError]) -> Any:
    """Import `package.module:function` and return the function; call it inside `importable_cwd`.

    Args:
        text: The name.
        error: The error class to raise: ModelError for a model, DataError for feeds.

    Raises:
        FourfoldError: Of the class `error`: the text is no such name, there is no such module or
            attribute, or the module raises while it is imported.
    """
    if not is_name(text):
        raise error(f"{text!r} is not a name; expected package.module:function")
    module_name, _, path = text.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise error(f"{text}: importing {module_name} raised: {missing}") from missing
        nearby = [file.stem for file in Path.cwd().glob("*.py")]
        raise error(
            f"{text}: no module {missing.name!r}{did_you_mean(missing.name, nearby)}"
        ) from None
    except Exception as raised:  # whatever the user's module raises
        kind = type(raised).__name__
        raise error(f"{text}: importing {module_name} raised {kind}: {raised}") from raised
    for part in path.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_")]
            raise error(f"{text}: {module_name} has no {part!r}{did_you_mean(part, public)}")
        found = getattr(found, part)
    return found


def call(text: str, error: type[FourfoldError]) -> Any:
    """Import `package.module:function`, call it without arguments and return what it returns.

    Raises:
        FourfoldError: As `find`; or the function is not callable, or raises (its own FourfoldError
            passes unchanged).
    """
    function = find(text, error)
    if not callable(function):
        raise error(
            f"{text} is a {type(function).__name__}; expected a function without arguments"
        )
    try:
        return function()
    except FourfoldError:
        raise
    except Exception as raised:  # whatever the user's function raises
        raise error(f"{text} raised {type(raised).__name__}: {raised}") from raised
