"""Compile all-MiniLM-L6-v2 (sentence embeddings) to W8A8 and W4A8 and score it on STS-B.

    python examples/minilm_sts.py [--data ../shared/data] [--out build/minilm] [--pairs 1400]

The data folder holds `tasks.py`, the model and the sentence pairs. Sentences calibrate without
their
padding: what a padded position computes is never read, and would only widen the ranges.
"""

from __future__ import annotations

import argparse
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fourfold

BESIDE = Path(__file__).resolve().parents[2] / "shared/data"
Arrays = dict[str, np.ndarray]


def without_padding(feeds: Arrays) -> list[Arrays]:
    """Return one feed a sentence, as long as the sentence is, shortest first."""
    lengths = feeds["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")  # equal lengths meet and run as one batch
    return [{n: v[i : i + 1, : lengths[i]] for n, v in feeds.items()} for i in order]


def spearman(score: Callable[..., float]) -> Callable[..., float]:
    """Return the task's rank correlation as a metric of fourfold."""

    def metric(outputs: Arrays, feeds: Arrays, labels: np.ndarray | None) -> float:
        # Labels arrive one a sentence; the score wants one a pair, and the two halves side by
        # side.
        assert labels is not None
        return score([outputs["embedding"]], labels[: len(labels) // 2], feeds)

    return metric


def main() -> None:
    """Compile both variants and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("FOURFOLD_DATA", BESIDE))
    parser.add_argument("--out", type=Path, default=Path("build/minilm"))
    parser.add_argument("--pairs", type=int, default=1400)
    chosen = parser.parse_args()
    tasks = runpy.run_path(str(chosen.data / "tasks.py"), run_name="tasks")
    task = tasks["TASKS"]["minilm-sts"]
    calibration, _ = task.feeds(chosen.data, "calib")
    sentences, scores = task.feeds(chosen.data, "eval")
    pairs = np.r_[: chosen.pairs, len(scores) : len(scores) + chosen.pairs]
    check = {name: array[pairs] for name, array in sentences.items()}
    labels = np.tile(scores[: chosen.pairs], 2)
    for precision in ("w8a8", "w4a8"):
        artifact = fourfold.compile(
            tasks["model_path"](task, chosen.data),
            chosen.out / precision,
            data=without_padding(calibration),
            check_data={**check, "labels": labels},
            metric=spearman(task.score),
            precision=precision,
            force=True,
        )
        row = artifact.report.targets[0]
        speed = ", ".join(f"{r.ratio:.2f}x at batch {r.batch}" for r in row.latency)
        change = f"{row.accuracy.source_score:.2f} -> {row.accuracy.variant_score:.2f}"
        print(
            f"minilm {precision}: spearman {change}, {row.accuracy.sqnr_db:.1f} dB, "
            f"{row.file_bytes / 1e6:.2f} MB, {speed}"
        )


if __name__ == "__main__":
    main()
