"""Errors, by whose fault they are.

    FourfoldError            exit code
    ├── ModelError             2   the model cannot be read or is not sound
    ├── RecipeError            2   an unknown pass, target or option
    ├── DataError              2   feeds, labels, metric or output folder
    ├── BudgetError            3   a budget is not met, or cannot be
    ├── UnsupportedError       4   the target cannot run this model
    └── BrokenPassError        1   a pass left an unsound model: our fault

A message says what, where, expected and got, and what to do; in lower case, without a full stop.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class FourfoldError(Exception):
    """Anything that ends a compile on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class ModelError(FourfoldError):
    """The model cannot be read, is not sound, or holds something no pass could make sense of."""

    exit_code = 2


class RecipeError(FourfoldError):
    """A pass, target or option that does not exist or does not fit."""

    exit_code = 2


class DataError(FourfoldError):
    """Calibration or check feeds, a metric, or an output folder that cannot be used."""

    exit_code = 2


class BudgetError(FourfoldError):
    """A budget cannot be kept by any legal choice, or the variant was measured and misses it.

    Args:
        message: Says by how much, and what came nearest.
        built: Whether an artifact was written all the same, so that it can be looked at.
    """

    exit_code = 3

    def __init__(self, message: str, *, built: bool = False) -> None:
        super().__init__(message)
        self.built = built


class UnsupportedError(FourfoldError):
    """The target cannot run this model, or its package is not installed."""

    exit_code = 4


class BrokenPassError(FourfoldError):
    """A pass raised or left an unsound model behind; names the pass and a reproducer on disk."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the list of what is known when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
