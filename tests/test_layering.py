import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {"compiler": {"passes", "targets"}, "passes": {"targets"}, "targets": set()}
MODULES = [path for layer in ABOVE for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(source, package):
    """Yield the dotted name of everything imported anywhere in the source of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, node.module or "", a.name]) for a in node.names)


def layers(names):
    """Return the folders of fourfold that the names belong to."""
    parts = [[part for part in name.split(".") if part] for name in names]
    return {p[1] for p in parts if p[:1] == ["fourfold"] and len(p) > 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    package = ["fourfold", *path.relative_to(ROOT).parts[:-1]]
    allowed = set(ABOVE) - ABOVE[package[1]]
    assert layers(imports(path.read_text(), package)) <= allowed


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import fourfold.passes.tidy", {"passes"}),
        ("from fourfold.targets.cpu import Cpu", {"targets"}),
        ("from fourfold import targets", {"targets"}),
        ("from .notes import Note", {"compiler"}),
        ("from . import notes", {"compiler"}),
        ("from .. import passes", {"passes"}),
        ("from ..passes.tidy import Tidy", {"passes"}),
        ("def f():\n    if f:\n        from ..passes import tidy", {"passes"}),
        ("import numpy, onnx_ir.passes", set()),
        ("from onnx_ir.passes.common import CheckerPass", set()),
    ],
)
def test_every_kind_of_import_is_seen(source, found):
    assert layers(imports(source, ["fourfold", "compiler"])) == found
