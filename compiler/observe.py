"""Runs a model over feeds in onnxruntime and hands out intermediate values, in bounded memory.

All values at once would need the sum of all activations, so they are gathered in slices: each run
fetches as many values as fit the bound, and the model runs once per slice over all feeds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from .contract import Progress, silent
from .feeds import Feeds
from .model import save
from .session import open_session, session_options
from .weights import opened

Batch = dict[str, np.ndarray[Any, Any]]

PROBE = 48  # values fetched at once while their sizes are still unknown


class Observer:
    """Fetches named values of one model, batch by batch.

    Args:
        model: The model; written once into `folder`, its weights are shared by every slice.
        folder: An existing work folder.
        memory: Bound in bytes on the activations held at once.

    Raises:
        UnsupportedError: onnxruntime cannot run the model.
    """

    def __init__(self, model: ir.Model, folder: Path, memory: int) -> None:
        self._memory = memory
        self._path = Path(tempfile.mkdtemp(prefix="observe-", dir=folder)) / "observed.onnx"
        save(model, self._path, external_above=0)
        self._proto = onnx.load(self._path, load_external_data=False)
        self._model = model
        self._given = {v.name for v in model.graph.inputs} | set(model.graph.initializers)

    def sizes(self, names: list[str], feeds: Feeds) -> dict[str, int]:
        """Return bytes of each value for the largest batch, measured on a single sample."""
        first = next(iter(feeds.rebatched(1) if feeds.rebatchable else feeds))
        scale = 1
        if feeds.rebatchable:
            scale = max(len(next(iter(batch.values()))) for batch in feeds)
        return {name: value.nbytes * scale for name, value in self.once(names, first)}

    def once(self, names: list[str], batch: Batch) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Yield (name, value) for one batch, a few at a time; inputs and initializers too."""
        yield from ((name, self._known(name, batch)) for name in names if name in self._given)
        inner = [name for name in names if name not in self._given]
        for start in range(0, len(inner), PROBE):
            part = inner[start : start + PROBE]
            yield from zip(part, self._session(part).run(part, batch), strict=True)

    def slices(self, names: list[str], feeds: Feeds) -> list[list[str]]:
        """Cut the names into runs of neighbours whose values fit the memory bound together."""
        sizes = self.sizes(names, feeds)
        cut: list[list[str]] = []
        used = self._memory + 1
        for name in names:
            if used + sizes[name] > self._memory:
                cut.append([])
                used = 0
            cut[-1].append(name)
            used += sizes[name]
        return cut

    def batches(
        self, names: list[str], feeds: Feeds, progress: Progress = silent
    ) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Yield (name, value) for every batch and every name; inputs and initializers too."""
        for batch in feeds:
            yield from ((name, self._known(name, batch)) for name in names if name in self._given)
        wanted = [name for name in names if name not in self._given]
        if not wanted:
            return
        parts = self.slices(wanted, feeds)
        runs = ((part, batch) for part in parts for batch in feeds)
        session, held = None, None
        for part, batch in progress(runs, "calibrate", len(parts) * len(feeds)):
            if part is not held:
                session, held = self._session(part), part
            assert session is not None
            yield from zip(part, session.run(part, batch), strict=True)

    def together(
        self, names: list[str], feeds: Feeds, progress: Progress = silent
    ) -> Iterator[tuple[Batch, Batch]]:
        """Yield (batch, values by name) with all named values of a batch at once."""
        inner = [name for name in names if name not in self._given]
        session = self._session(inner) if inner else None
        for batch in progress(feeds, "observe", len(feeds)):
            got = session.run(inner, batch) if session is not None else []
            values = dict(zip(inner, got, strict=True))
            values |= {name: self._known(name, batch) for name in names if name in self._given}
            yield batch, {name: values[name] for name in names}

    def _known(self, name: str, batch: Batch) -> np.ndarray[Any, Any]:
        """Return what needs no run: what the batch feeds, or the data of an initializer."""
        if name in batch:
            return batch[name]
        with opened(self._model.graph.initializers[name]) as array:
            return array

    def _session(self, names: list[str]) -> onnxruntime.InferenceSession:
        """Open the model with these values as its outputs; nodes they do not need are not run."""
        proto = with_outputs(self._proto, self._model, names)
        path = self._path.with_name("observed-slice.onnx")
        onnx.save(proto, path)
        options = session_options(threads=0)
        options.enable_cpu_mem_arena = False  # an arena keeps the largest batch ever seen
        # Which fusions are possible depends on the values fetched; none keeps a value the same
        # bits whichever slice it is in.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return open_session(path, options)


def with_outputs(proto: onnx.ModelProto, model: ir.Model, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of the proto with these values as its outputs; `model` knows their types."""
    types = {v.name: v.dtype for node in model.graph for v in node.outputs}
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    del changed.graph.output[:]
    for name in names:
        element = types[name]
        if element is None:  # of an operator that is not ONNX's own; the runtime knows it
            changed.graph.output.append(onnx.ValueInfoProto(name=name))
            continue
        changed.graph.output.append(onnx.helper.make_tensor_value_info(name, element.value, None))
    return changed
