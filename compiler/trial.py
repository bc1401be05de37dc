"""Measures a whole rewritten model against the float one on calibration feeds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import losses
from .feeds import Feeds
from .model import save
from .sensitivity import spread
from .session import open_runner


class Reference:
    """The float model's outputs on some feeds, which every trial is held against.

    Args:
        model: The float model.
        feeds: Calibration feeds.
        samples: How many of them are used, evenly spread; 0 takes all.
        kind: How outputs are compared.
        folder: An existing work folder.
        threads: Threads of the runtime; its results do not depend on them.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Feeds,
        samples: int,
        kind: losses.Kind,
        folder: Path,
        threads: int = 1,
    ) -> None:
        self._feeds = spread(feeds, samples)
        self._kind, self._scale = kind, losses.scale_of(model)
        self._names = losses.float_outputs(model)
        self._folder, self._threads = folder, threads
        self._expected = list(self._outputs(model))

    def loss(self, model: ir.Model) -> float:
        """Return the loss of a rewritten model, in the real runtime."""
        total = losses.OutputLoss(self._kind, self._scale)
        for expected, got in zip(self._expected, self._outputs(model), strict=True):
            total.add(expected, got)
        return total.value

    def _outputs(self, model: ir.Model) -> list[dict[str, npt.NDArray[Any]]]:
        """Return the float outputs of every batch."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = Path(folder) / "trial.onnx"
            save(model, path)
            runner = open_runner(path, self._threads)
            found = []
            for batch in self._feeds:
                outputs = runner(batch)
                found.append({name: np.asarray(outputs[name]) for name in self._names})
            return found
