"""fourfold compiles a trained model once and deploys it to several targets.

The face is lazy (PEP 562): `import fourfold` imports nothing heavy until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compiler.artifact import Artifact as Artifact
    from .compiler.contract import Context as Context
    from .compiler.contract import Pass as Pass
    from .compiler.contract import Target as Target
    from .compiler.driver import compile as compile
    from .compiler.export import export as export
    from .compiler.feeds import Feeds as Feeds
    from .compiler.formats import Format as Format
    from .compiler.formats import PerAxis as PerAxis
    from .compiler.formats import PerBlock as PerBlock
    from .compiler.formats import PerTensor as PerTensor
    from .compiler.notes import Note as Note
    from .compiler.profiling import profile as profile
    from .compiler.recipe import Recipe as Recipe
    from .compiler.report import Report as Report
    from .compiler.sweep import sweep as sweep

_HOMES = {
    "Artifact": "artifact",
    "Context": "contract",
    "Feeds": "feeds",
    "Format": "formats",
    "Note": "notes",
    "Pass": "contract",
    "PerAxis": "formats",
    "PerBlock": "formats",
    "PerTensor": "formats",
    "Recipe": "recipe",
    "Report": "report",
    "Target": "contract",
    "compile": "driver",
    "export": "export",
    "profile": "profiling",
    "sweep": "sweep",
}

__all__ = [*_HOMES]  # noqa: PLE0604 - one list is kept, above


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fourfold' has no attribute {name!r}")
    return getattr(importlib.import_module(f".compiler.{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
