"""fourfold's CPU variants beside onnxruntime's own quantizers, in one run.

    python benchmarks/cpu.py [--task cifar-resnet20] [--rounds 40]

Prints the table of `peers.py` with the variants of fourfold added: same data, same measure, timed
in turns in one process. Also says how many seconds each compile took.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import numpy as np
import peers
from measure import Candidate

import fourfold

TASKS = ("cifar-resnet20", "cifar-resnet56", "minilm-sts")
PRECISIONS = ("w8a8", "w4a8", "w2a8")
PEERS = {
    "cifar-resnet20": ["minmax", "percentile", "w4a8"],
    "cifar-resnet56": ["minmax", "percentile", "w4a8"],
    "minilm-sts": ["dynamic", "static-matmul"],
}


def calibration(task: Any) -> Any:
    """Return the task's calibration feeds; sentences without their padding, one by one."""
    feeds, _ = task.feeds(measure.data_root(), "calib")
    if "attention_mask" not in feeds:
        return {name: value[: peers.CALIBRATION] for name, value in feeds.items()}
    lengths = feeds["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")  # sentences of one length run as one batch
    return [{n: v[i : i + 1, : lengths[i]] for n, v in feeds.items()} for i in order]


def variant(task: Any, precision: str, folder: Path) -> Candidate:
    """Compile one variant and return its file."""
    start = time.perf_counter()
    artifact = fourfold.compile(
        measure.tasks().model_path(task),
        folder / precision,
        calibration(task),
        precision=precision,
        check=False,
    )
    print(f"fourfold {precision}: compiled in {time.perf_counter() - start:.1f} s", flush=True)
    return Candidate(f"fourfold {precision}", artifact.entry("cpu"))


def main() -> None:
    """Compile, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--rounds", type=int, default=40)
    chosen = parser.parse_args()
    for name in chosen.task or TASKS:
        task = measure.task_named(name)
        with tempfile.TemporaryDirectory() as folder:
            ours = [variant(task, precision, Path(folder)) for precision in PRECISIONS]
            theirs = peers.made(name, PEERS[name], Path(folder))
            for line in peers.compare(name, [*theirs, *ours], chosen.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
