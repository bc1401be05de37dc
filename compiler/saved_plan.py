"""A plan on disk: what every value became, and the passes that make the graph it speaks of.

The names in a plan are those of the graph after the exact rewrites, so the plan says which these
were; and which passes carried it out, so that it replays to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .recipe import Recipe

LARGEST = 1 << 28  # bytes of a plan that are read


@dataclass(frozen=True)
class SavedPlan:
    """One target's plan.

    Attributes:
        before: The passes before the decisions.
        behind: The passes that obeyed.
        values: Value name -> fields of its note, in graph order.
    """

    before: Recipe
    behind: Recipe
    values: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, recipe: Recipe, values: dict[str, dict[str, Any]]) -> SavedPlan:
        """Return the plan that a recipe made."""
        first, _, behind = recipe.parts()
        return cls(Recipe(tuple(p for p in first.passes if not p.decides)), behind, values)

    def recipe(self, deciding: Recipe) -> Recipe:
        """Return the passes that replay it; of `deciding` only what decides is taken."""
        decide = tuple(one for one in deciding.passes if one.decides)
        return Recipe((*self.before.passes, *decide, *self.behind.passes))

    def as_json(self) -> dict[str, Any]:
        """Return plain data; `read` takes it back."""
        return {"before": str(self.before), "behind": str(self.behind), "values": self.values}

    @classmethod
    def read(cls, path: Path, target: str) -> SavedPlan:
        """Read one target's part of a plan.json.

        Raises:
            RecipeError: The file cannot be read, is no plan, or has none for this target.
        """
        try:
            if path.stat().st_size > LARGEST:
                raise RecipeError(f"{path} is larger than {LARGEST} bytes: no plan")
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"cannot read the plan {path}: {error}") from None
        if not isinstance(data, dict) or target not in data:
            known = sorted(data) if isinstance(data, dict) else []
            raise RecipeError(f"{path} has no plan for target {target!r}; it has {known}")
        return cls.from_json(data[target], f"{path}, target {target}")

    @classmethod
    def from_json(cls, data: Any, where: str) -> SavedPlan:
        """Read what `as_json` wrote, perhaps edited by hand.

        Raises:
            RecipeError: It is of another form; says where.
        """
        fields = {"before": str, "behind": str, "values": dict}
        if not isinstance(data, Mapping) or set(data) != set(fields):
            raise RecipeError(f"{where}: expected an object with {', '.join(fields)}")
        for name, kind in fields.items():
            if not isinstance(data[name], kind):
                raise RecipeError(f"{where}: {name} is no {kind.__name__}")
        for name, note in data["values"].items():
            if not isinstance(note, dict):
                raise RecipeError(f"{where}: the note of {name!r} is no object")
        try:
            return cls(_passes(data["before"]), _passes(data["behind"]), dict(data["values"]))
        except RecipeError as error:
            error.add_note(f"in {where}")
            raise


def _passes(text: str) -> Recipe:
    """Return a recipe; no text is no passes."""
    return Recipe.parse(text) if text else Recipe(())
