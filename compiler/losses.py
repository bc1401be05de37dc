"""How far a model's outputs are from the float ones, as one number that adds up over layers.

`mse`: noise power over signal power of all float outputs, the inverse of the SQNR.
`kl`: mean Kullback-Leibler divergence in nats of the first float output's classes, float from
variant; its last axis holds logits, or probabilities where a Softmax makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.special import log_softmax

from .graph import is_float, is_standard

Kind = Literal["mse", "kl"]
Scale = Literal["logits", "probabilities", "log-probabilities"]
Array = npt.NDArray[Any]

TINY = 1e-30
WORST = 1e30  # of outputs that are not finite; JSON knows no infinity


def float_outputs(model: ir.Model) -> list[str]:
    """Return the names of the graph's float outputs."""
    return [str(value.name) for value in model.graph.outputs if is_float(value)]


def scale_of(model: ir.Model) -> Scale:
    """Say what the first float output holds, by the op that makes it."""
    first = next((value for value in model.graph.outputs if is_float(value)), None)
    producer = first.producer() if first is not None else None
    if producer is not None and is_standard(producer, "Softmax"):
        return "probabilities"
    if producer is not None and is_standard(producer, "LogSoftmax"):
        return "log-probabilities"
    return "logits"


def kind_of(model: ir.Model) -> Kind:
    """Return `kl` where the model ends in Softmax, else `mse`.

    On logits both were tried, and neither led to better scores; `mse` adds up better over layers.
    """
    return "mse" if scale_of(model) == "logits" else "kl"


class OutputLoss:
    """Adds up the loss over batches, in float64.

    Args:
        kind: `mse` or `kl`.
        scale: What the first output holds; only `kl` asks.
    """

    def __init__(self, kind: Kind, scale: Scale = "logits") -> None:
        self._kind = kind
        self._scale = scale
        self._sum = self._weight = 0.0

    def add(self, expected: Mapping[str, Array], got: Mapping[str, Array]) -> None:
        """Add one batch; both map the float outputs' names to arrays of the same shapes."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self._kind == "kl":
                name = next(iter(expected))
                self._add_kl(expected[name], got[name])
                return
            for name, reference in expected.items():
                self._add_mse(reference, got[name])

    def _add_mse(self, expected: Array, got: Array) -> None:
        """Add noise power and signal power."""
        wide = expected.astype(np.float64)
        # A float32 that overflowed is as far as can be: the loss becomes inf, not nan.
        miss = np.nan_to_num(got.astype(np.float64) - wide, nan=np.inf)
        self._sum += float(np.square(miss).sum())
        self._weight += float(np.square(wide).sum())

    def _add_kl(self, expected: Array, got: Array) -> None:
        """Add sum p (log p - log q) over the last axis."""
        p, q = self._logs(expected), self._logs(got)
        divergence = (np.exp(p) * (p - q)).sum(axis=-1)
        self._sum += float(np.nan_to_num(divergence, nan=np.inf).sum())
        self._weight += divergence.size

    def _logs(self, array: Array) -> Array:
        """Return log-probabilities."""
        wide = np.atleast_2d(array.astype(np.float64))
        if self._scale == "logits":
            found: Array = log_softmax(wide, axis=-1)
            return found
        return wide if self._scale == "log-probabilities" else np.log(np.maximum(wide, TINY))

    @property
    def value(self) -> float:
        """The loss of everything added, from 0 to `WORST`."""
        found = self._sum / max(self._weight, TINY)
        return WORST if math.isnan(found) else min(max(found, 0.0), WORST)
