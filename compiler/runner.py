"""Runs a recipe: each pass on one clone, verified, timed, with its notes carried over."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from . import notes
from .contract import Context, Pass
from .errors import BrokenPassError, FourfoldError, RecipeError
from .recipe import Recipe
from .verifier import Interface, checker_fault, faults_of


@dataclass(frozen=True)
class PassRow:
    """What one pass did: a row of the report."""

    name: str
    changed: int
    seconds: float
    nodes: int
    weight_bytes: int
    lost_notes: tuple[str, ...]


def run(recipe: Recipe, model: ir.Model, context: Context) -> tuple[ir.Model, list[PassRow]]:
    """Return a rewritten clone of the model and a row for every pass; the model is not touched.

    Raises:
        RecipeError: A pass needs something that is not there.
        BrokenPassError: A pass raised, or left an unsound model; a reproducer lies in
            a fresh temporary folder.
    """
    model = model.clone()  # weights are shared: milliseconds for a GiB
    interface = Interface.of(model)
    rows = []
    for index, one in enumerate(context.progress(recipe.passes, "passes", len(recipe.passes))):
        unmet = list(one.requires(model, context))
        if unmet:
            raise RecipeError(f"{one.name} cannot run: {'; '.join(unmet)}")
        rows.append(_step(one, recipe.passes[index:], model, interface, context))
    return model, rows


def _step(
    one: Pass, rest: Sequence[Pass], model: ir.Model, interface: Interface, context: Context
) -> PassRow:
    """Run one pass and verify what it left."""
    before = model.clone()
    start = time.perf_counter()
    try:
        with notes.kept(model) as lost:
            changed = one.run(model, context)
    except FourfoldError as error:
        error.add_note(f"in pass {one}")
        raise
    except Exception as error:
        raise _broken(one, rest, before, [f"{type(error).__name__}: {error}"]) from error
    seconds = time.perf_counter() - start
    faults = list(faults_of(model, interface))
    if not faults and (complaint := checker_fault(model)):
        faults = [complaint]
    if faults:
        raise _broken(one, rest, before, faults)
    for name in lost:
        context.remark(one, name, "its note lost its home: the value is gone")
    return PassRow(
        one.name,
        changed,
        seconds,
        sum(1 for _ in model.graph.all_nodes()),
        weight_bytes(model),
        tuple(lost),
    )


def weight_bytes(model: ir.Model) -> int:
    """Return the stored bytes of all initializers of the main graph."""
    return sum(
        v.const_value.nbytes
        for v in model.graph.initializers.values()
        if v.const_value is not None
    )


def _broken(
    one: Pass, rest: Sequence[Pass], before: ir.Model, faults: list[str]
) -> BrokenPassError:
    """Write a reproducer (the graph before the pass, the recipe's rest); return the error."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="fourfold-broken-pass-"))
        notes.to_metadata(before)
        (folder / "before.txt").write_text(_without_weights(before))
        (folder / "recipe.toml").write_text(Recipe(tuple(rest)).to_toml())
        where = f"reproducer in {folder}"
    except OSError as error:
        where = f"no reproducer could be written: {error}"
    listed = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
    return BrokenPassError(f"pass {one} broke the model: {listed} ({where})")


def _without_weights(model: ir.Model) -> str:
    """Print a graph with the shapes of its weights and no data."""
    lines = [f"opsets {dict(model.graph.opset_imports)}"]
    lines += [f"input {v}" for v in model.graph.inputs]
    for name, value in model.graph.initializers.items():
        lines.append(f"initializer {name} {value.dtype} {value.shape} {value.metadata_props}")
    lines += [str(node) for node in model.graph.all_nodes()]
    lines += [f"output {v}" for v in model.graph.outputs]
    return "\n".join(lines) + "\n"
