"""What every benchmark measures alike: metric, SQNR against the float model, size, latency.

The models, data and metrics come from a folder with a `tasks.py` (`FOURFOLD_DATA`, default
`../shared/data` seen from the repository's root); nothing of it is copied. onnxruntime on CPU runs
every candidate.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

Feeds = dict[str, np.ndarray]

SEQUENCE = 128  # tokens a sentence in latency runs
TOKENS = (1000, 30000)  # plain words of the BERT vocabulary, special tokens left out
WARM_UP = 3


@dataclass(frozen=True)
class Candidate:
    """A model file under the name that tables show.

    Attributes:
        name: Unique within one comparison.
        path: The .onnx file.
    """

    name: str
    path: Path

    @property
    def megabytes(self) -> float:
        """Size of the file and of external data named `<file>.data`, in 10^6 bytes."""
        data = self.path.with_name(self.path.name + ".data")
        return sum(p.stat().st_size for p in (self.path, data) if p.exists()) / 1e6


def data_root() -> Path:
    """Return the data folder.

    Raises:
        FileNotFoundError: It holds no `tasks.py`.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("FOURFOLD_DATA", beside)).resolve()
    if not (root / "tasks.py").is_file():
        raise FileNotFoundError(f"{root} holds no tasks.py; set FOURFOLD_DATA to the data folder")
    return root


@functools.cache
def tasks() -> ModuleType:
    """Import the data folder's `tasks.py` by its path, once."""
    spec = importlib.util.spec_from_file_location("fourfold_tasks", data_root() / "tasks.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"python cannot import {data_root() / 'tasks.py'}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is imported
    spec.loader.exec_module(module)
    return module


def task_named(name: str) -> Any:
    """Return the task of that name.

    Raises:
        KeyError: No such task; the message lists those there are.
    """
    known: dict[str, Any] = tasks().TASKS
    if name not in known:
        raise KeyError(f"unknown task {name!r}; known: {', '.join(known)}")
    return known[name]


def session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """Open a CPU session with `threads` threads within an operator and one between operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=1)
def evaluation(name: str) -> tuple[Feeds, np.ndarray]:
    """Return the feeds and labels of a task's eval split; the last one asked for is kept."""
    feeds, labels = task_named(name).feeds(data_root(), "eval")
    return feeds, labels


def accuracy(task: Any, path: Path) -> tuple[float, list[np.ndarray]]:
    """Run a model file on a task's whole eval split with two threads.

    Returns:
        The task's metric, and each output with all samples along axis 0.
    """
    feeds, labels = evaluation(task.name)
    running = session(path, threads=2)
    first = running.get_inputs()[0].shape[0]
    size = first if isinstance(first, int) else task.batch
    parts = [running.run(None, batch) for batch in tasks().batches(feeds, size)]
    outputs = [np.concatenate(part) for part in zip(*parts, strict=True)]
    return float(task.score(outputs, labels, feeds)), outputs


def sqnr_db(ref: list[np.ndarray], got: list[np.ndarray]) -> float:
    """Return 10 log10(sum ref^2 / sum (got - ref)^2) in dB over all outputs; inf where they agree.

    Raises:
        ValueError: The outputs differ in number or shape.
    """
    if [r.shape for r in ref] != [g.shape for g in got]:
        raise ValueError(
            f"outputs differ in shape: expected {[r.shape for r in ref]}, "
            f"got {[g.shape for g in got]}"
        )
    pairs = [(r.astype(np.float64), g.astype(np.float64)) for r, g in zip(ref, got, strict=True)]
    signal = sum(float(np.sum(r**2)) for r, _ in pairs)
    noise = sum(float(np.sum((g - r) ** 2)) for r, g in pairs)
    return float("inf") if noise == 0 else 10 * float(np.log10(signal / noise))


def latency_feeds(task: Any, batch: int, seed: int = 0) -> Feeds:
    """Return feeds of `batch` samples for timing.

    Token models get seeded random words, 128 to a sentence, and a full attention mask, so that no
    time depends on padding; the others get the first samples of the eval split.
    """
    if "input_ids" in (feeds := evaluation(task.name)[0]):
        words = np.random.default_rng(seed).integers(*TOKENS, (batch, SEQUENCE), dtype=np.int64)
        return {"input_ids": words, "attention_mask": np.ones_like(words)}
    return {name: value[:batch] for name, value in feeds.items()}


def interleaved(
    candidates: Mapping[str, Path], feeds: Feeds, rounds: int, threads: int = 1
) -> dict[str, float]:
    """Time models side by side in this process, so that a slow moment of the machine hits all.

    Each round times every candidate once, in an order drawn anew (seeded), and runs it untimed
    just
    before: else a small model is charged for the caches that its larger neighbour emptied.

    Returns:
        Median seconds of one run for each name, over `rounds` runs after the warm-up.
    """
    sessions = {name: session(path, threads) for name, path in candidates.items()}
    for running in sessions.values():
        for _ in range(WARM_UP):
            running.run(None, feeds)
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    names, draw = list(sessions), np.random.default_rng(0)
    for _ in range(rounds):
        for name in draw.permutation(names):
            sessions[name].run(None, feeds)
            begin = time.perf_counter()
            sessions[name].run(None, feeds)
            taken[name].append(time.perf_counter() - begin)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}
