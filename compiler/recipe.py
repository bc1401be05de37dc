"""A recipe: the passes of one compile, in order. Prints as text and as TOML; both parse back.

Text:  tidy,fold-batchnorm,calibrate{method="mse"},assign-bits{weights=4 keep=["conv1"]}
TOML:  [[pass]]
       name = "calibrate"
       method = "mse"

Option values are JSON; a bare word is a string.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from .contract import Pass
from .errors import RecipeError, did_you_mean
from .lookup import make_pass
from .text import parse_items


@dataclass(frozen=True)
class Recipe:
    """A tuple of passes."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def parts(self) -> tuple[Recipe, Recipe, Recipe]:
        """Return the passes before the last one that decides, that one, and those behind it.

        The first part does not depend on what is decided, and the notes after the second are the
        plan. A recipe without a decision is all first part.
        """
        last = max((n for n, one in enumerate(self.passes) if one.decides), default=None)
        if last is None:
            return self, Recipe(()), Recipe(())
        before, behind = self.passes[:last], self.passes[last + 1 :]
        return Recipe(before), Recipe((self.passes[last],)), Recipe(behind)

    def with_options(self, text: str) -> Recipe:
        """Return the recipe with other options of some passes, e.g. `assign-bits{block=32}`.

        Raises:
            RecipeError: A syntax error, an unknown option, or a pass that is not in the recipe.
        """
        changes: dict[str, dict[str, Any]] = {}
        known = {one.name for one in self.passes}
        for name, options in parse_items(text):
            if name not in known:
                near = did_you_mean(name, known)
                raise RecipeError(f"no pass {name!r} in the recipe {self}{near}")
            changes.setdefault(name, {}).update(options)
        return Recipe(
            tuple(
                make_pass(one.name, one.changed() | changes[one.name])
                if one.name in changes
                else one
                for one in self.passes
            )
        )

    def to_toml(self) -> str:
        """Return the recipe as TOML."""
        import tomli_w

        tables = [tomli_w.dumps({"name": p.name, **p.changed()}) for p in self.passes]
        return "\n".join(f"[[pass]]\n{table}" for table in tables) or "pass = []\n"

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe from its text.

        Raises:
            RecipeError: A syntax error, or an unknown pass or option.
        """
        return cls(tuple(make_pass(name, options) for name, options in parse_items(text)))

    @classmethod
    def from_toml(cls, text: str) -> Recipe:
        """Read a recipe from TOML.

        Raises:
            RecipeError: Not TOML, an unknown key, pass or option.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not TOML: {error}") from None
        unknown = sorted(set(data) - {"pass"})
        entries = data.get("pass")
        if unknown or not isinstance(entries, list):
            raise RecipeError(
                f"a recipe holds [[pass]] tables and nothing else; got {unknown or data}"
            )
        passes = []
        for number, entry in enumerate(entries, 1):
            options = dict(entry) if isinstance(entry, dict) else {}
            name = options.pop("name", None)
            if not isinstance(name, str):
                raise RecipeError(f"[[pass]] number {number} has no name")
            passes.append(make_pass(name, options))
        return cls(tuple(passes))
