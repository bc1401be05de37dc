"""Results of one long run, layer by layer, so that a killed run goes on where it was."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from . import notes
from .artifact import sha256
from .cache import Cache
from .contract import Context
from .feeds import Feeds
from .model import save

Arrays = Mapping[str, npt.NDArray[Any]]

REVISION = 1  # of what layers are rounded by; part of the cache's key


@dataclass(frozen=True)
class Finished:
    """Layers that this very run has finished, now or before.

    Attributes:
        facts: Everything that a result depends on, beside the layer.
        cache: Where results lie.
    """

    facts: dict[str, Any]
    cache: Cache

    @classmethod
    def of(
        cls,
        model: ir.Model,
        floats: ir.Model,
        feeds: Feeds,
        options: Mapping[str, Any],
        context: Context,
    ) -> Finished:
        """Return what is known of a run: its models with their notes, feeds, options, versions."""
        facts = {
            "revision": REVISION,
            "models": [_digest(one, context.folder) for one in (model, floats)],
            "feeds": [feeds.sha256(), feeds.batch],
            "options": dict(options),
            "seed": context.seed,
            "runtime": [onnxruntime.__version__, np.__version__],
            "machine": [platform.machine(), platform.processor()],
        }
        return cls(facts, Cache("layers"))

    def get(self, layer: str) -> dict[str, npt.NDArray[Any]] | None:
        """Return a layer's arrays, or None."""
        return self.cache.get_arrays({**self.facts, "layer": layer})

    def put(self, layer: str, arrays: Arrays) -> None:
        """Keep a layer's arrays, where the cache folder can be written to."""
        self.cache.put_arrays({**self.facts, "layer": layer}, arrays)


def _digest(model: ir.Model, folder: Path) -> list[str]:
    """Return the hashes of a model's files, its notes within."""
    with tempfile.TemporaryDirectory(dir=folder) as where:
        path = Path(where) / "model.onnx"
        clone = model.clone()
        notes.to_metadata(clone)
        save(clone, path, external_above=0)
        return [sha256(file) for file in sorted(Path(where).iterdir())]
