"""Runs a model over feeds one stretch after another, so that what lies ahead may change meanwhile.

What crosses from one stretch to the next is kept for every batch, in memory up to a bound and on
disk beyond it. So every node runs once however many stops there are, and a layer can be looked at
behind layers that have just been rounded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from .feeds import Feeds
from .model import save
from .session import Session, open_session, session_options
from .suffix import reads

Array = npt.NDArray[Any]


class Walk:
    """A model on its way through feeds.

    Args:
        model: The model; nodes that have not been run yet may change between two stops, as long as
            the values that are named stay.
        stops: Names of the values to look at, stop by stop. A value may be named at later stops
            than where it is made, never before.
        feeds: The feeds.
        folder: An existing work folder.
        memory: Bound in bytes on what is kept in memory between stops; the rest goes to disk.

    Attributes:
        at: Number of the next stop.
    """

    def __init__(
        self,
        model: ir.Model,
        stops: Sequence[Sequence[str]],
        feeds: Feeds,
        folder: Path,
        memory: int,
    ) -> None:
        self._model, self._feeds = model, feeds
        self._stops = [list(dict.fromkeys(names)) for names in stops]
        self.at = 0
        self._folder = Path(tempfile.mkdtemp(prefix="walk-", dir=folder))
        self._kept = Shelf(self._folder, memory)

    def next(self, skip: int = 0) -> Iterator[dict[str, Array]]:
        """Go on to the next stop; yield its values for every batch.

        Args:
            skip: Stops to pass by on the way.
        """
        wanted = self._stops[self.at + skip]
        self.at += skip + 1
        made = set(self._kept.names)
        later = [name for names in self._stops[self.at :] for name in names]
        carried = self._crossing(made, wanted, later)
        fetched = list(dict.fromkeys((*wanted, *carried)))
        given = {str(v.name) for v in self._model.graph.inputs}
        new = [name for name in fetched if name not in made and name not in given]
        session: Session | None = None
        shelf = self._kept.successor()
        for number, batch in enumerate(self._feeds):
            known = {**batch, **self._kept.get(number)}
            if new:
                session = session or self._session([*made], new, known)
                taken = {i.name: known[i.name] for i in session.get_inputs()}
                known |= zip(new, session.run(new, taken), strict=True)
            shelf.put(number, {name: known[name] for name in carried if name not in given})
            yield {name: known[name] for name in wanted}
        self._kept.clear()
        self._kept = shelf

    def _crossing(self, made: set[str], wanted: list[str], later: list[str]) -> list[str]:
        """Return what is known at this stop and read on the way to later ones."""
        done = made | {str(v.name) for v in self._model.graph.inputs}
        ran = self._needed(wanted, done)
        known = done | {str(v.name) for node in ran for v in node.outputs}
        ahead = self._needed([name for name in later if name not in known], known)
        found = {str(v.name): None for node in ahead for _, v in reads(node)}
        found |= dict.fromkeys(later)
        return [name for name in found if name in known]

    def _needed(self, names: Sequence[str], known: set[str]) -> list[ir.Node]:
        """Return the nodes that make these values from known ones, in graph order."""
        wanted, found = set(names) - known, []
        for node in reversed(self._model.graph):
            if any(str(value.name) in wanted for value in node.outputs):
                found.append(node)
                wanted |= {str(v.name) for _, v in reads(node)} - known
        return found[::-1]

    def _session(
        self, inputs: list[str], outputs: list[str], known: Mapping[str, Array]
    ) -> Session:
        """Open the stretch that makes the outputs; fed are known values and graph inputs."""
        stretch = _stretch(self._model, inputs, outputs)
        for value in stretch.graph.inputs:
            value.shape = None
            value.type = ir.TensorType(ir.DataType.from_numpy(known[str(value.name)].dtype))
        path = Path(tempfile.mkdtemp(dir=self._folder)) / "stretch.onnx"
        save(stretch, path, external_above=0)
        options = session_options(threads=0)
        options.enable_cpu_mem_arena = False  # an arena keeps the largest batch ever seen
        # What is fused would depend on where the stops are.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return open_session(path, options)


def _stretch(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """Return the part of a model between values as a model; what it does not read is left out."""
    graph = model.graph
    given = [str(v.name) for v in graph.inputs]
    known = [*inputs, *(name for name in given if name not in inputs)]
    part = ir.convenience.extract(graph, known, outputs)
    used = {str(v.name) for node in part for _, v in reads(node)}
    for value in list(part.inputs):
        if value.name not in used:
            part.inputs.remove(value)
    return ir.Model(part, ir_version=model.ir_version, functions=tuple(model.functions.values()))


class Shelf:
    """Arrays by batch and name, in memory up to a bound and on disk beyond it."""

    def __init__(self, folder: Path, memory: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="shelf-", dir=folder))
        self._memory, self._used = memory, 0
        self._arrays: dict[tuple[int, str], Array | Path] = {}
        self.names: dict[str, None] = {}

    def successor(self) -> Shelf:
        """Return an empty one that shares the bound with this one while both are there."""
        return Shelf(self._folder.parent, max(self._memory // 2, 0))

    def put(self, number: int, arrays: dict[str, Array]) -> None:
        """Keep the arrays of one batch."""
        for name, array in arrays.items():
            self.names[name] = None
            if self._used + array.nbytes <= self._memory:
                self._used += array.nbytes
                self._arrays[number, name] = array
                continue
            path = self._folder / f"{number}-{list(self.names).index(name)}.npy"
            np.save(path, array, allow_pickle=False)
            self._arrays[number, name] = path

    def get(self, number: int) -> dict[str, Array]:
        """Return the arrays of one batch; those on disk are mapped."""
        found = {name: self._arrays[number, name] for name in self.names}
        return {
            name: np.load(one, mmap_mode="r", allow_pickle=False) if isinstance(one, Path) else one
            for name, one in found.items()
        }

    def clear(self) -> None:
        """Let go of everything, files too."""
        for one in self._arrays.values():
            if isinstance(one, Path):
                one.unlink(missing_ok=True)
        self._arrays.clear()
