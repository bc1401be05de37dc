"""Finds passes and targets by file name: no registry, nothing imported before it is asked for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.util import find_spec
from typing import Any, TypeVar

from pydantic import ValidationError

from .contract import Option, Pass, Target
from .errors import RecipeError, did_you_mean
from .text import parse_items

ROOT = (__package__ or "fourfold.compiler").rpartition(".")[0]

T = TypeVar("T", bound=Option)


def names(kind: str) -> list[str]:
    """Return the names of all `passes` or `targets`, sorted, without importing them."""
    spec = find_spec(f"{ROOT}.{kind}")
    assert spec is not None
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(module.name.replace("_", "-") for module in found)


def load(contract: type[T], name: str) -> type[T]:
    """Return the one class of that contract which the file of that name defines.

    Raises:
        RecipeError: There is no such file.
    """
    plain = name.replace("_", "-")
    if plain not in names(contract.kind):
        what = contract.kind.removesuffix("es" if contract is Pass else "s")
        raise RecipeError(f"unknown {what} {name!r}{did_you_mean(plain, names(contract.kind))}")
    module = importlib.import_module(f"{ROOT}.{contract.kind}.{plain.replace('-', '_')}")
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, contract)
        and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(
            f"{module.__name__} defines {len(found)} classes of {contract.__name__}; expected one"
        )
    return found[0]


def make(contract: type[T], name: str, options: dict[str, Any]) -> T:
    """Return a pass or target with its options checked.

    Raises:
        RecipeError: Unknown name or option, or an option of the wrong type.
    """
    kind = load(contract, name)
    unknown = sorted(set(options) - set(kind.model_fields))
    if unknown:
        hint = did_you_mean(unknown[0], kind.model_fields)
        raise RecipeError(f"{name} has no option {unknown[0]!r}{hint}")
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            f"{name}: option {where} = {first['input']!r}: {first['msg'].lower()}"
        ) from None


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """Return a pass; see `make`."""
    return make(Pass, name, options)  # type: ignore[type-abstract]


def make_target(text: str) -> Target:
    """Return a target from its text, e.g. `cpu` or `cpu{isa="avx2"}`.

    Raises:
        RecipeError: As `make`, or the text does not parse.
    """
    items = parse_items(text)
    if len(items) != 1:
        raise RecipeError(f"expected one target, got {text!r}; repeat the option for several")
    return make(Target, *items[0])  # type: ignore[type-abstract]
