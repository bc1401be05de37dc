"""Compile ResNet-20 and ResNet-56 (CIFAR-10) to W8A8 and W4A8, within an accuracy budget.

    python examples/resnet_cifar10.py [--data ../shared/data] [--out build/resnets]

The data folder holds `tasks.py`, the models and 932 + 932 images. Each variant is calibrated on
the training images and checked on the test images; a drop of more than two points ends with exit
code 3, as it would in a pipeline.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

import numpy as np

import fourfold
from fourfold.compiler.errors import BudgetError

MODELS = {"resnet20": "cifar-resnet20", "resnet56": "cifar-resnet56"}
BUDGET = 2.0  # points of top-1
BESIDE = Path(__file__).resolve().parents[2] / "shared/data"


def accuracy(
    outputs: dict[str, np.ndarray], feeds: dict[str, np.ndarray], labels: np.ndarray | None
) -> float:
    """Return the percentage of images whose largest logit is at the label."""
    assert labels is not None
    return float((outputs["logits"].argmax(axis=1) == labels).mean() * 100)


def main() -> None:
    """Compile every variant and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("FOURFOLD_DATA", BESIDE))
    parser.add_argument("--out", type=Path, default=Path("build/resnets"))
    chosen = parser.parse_args()
    tasks = runpy.run_path(str(chosen.data / "tasks.py"), run_name="tasks")
    for name, task_name in MODELS.items():
        task = tasks["TASKS"][task_name]
        calibration, _ = task.feeds(chosen.data, "calib")
        images, labels = task.feeds(chosen.data, "eval")
        for precision in ("w8a8", "w4a8"):
            try:
                artifact = fourfold.compile(
                    tasks["model_path"](task, chosen.data),
                    chosen.out / name / precision,
                    data=calibration,
                    check_data={**images, "labels": labels},
                    metric=accuracy,
                    precision=precision,
                    max_drop=BUDGET,
                    force=True,
                )
            except BudgetError as error:
                print(f"{name} {precision}: {error}")
                sys.exit(error.exit_code)
            row = artifact.report.targets[0]
            speed = ", ".join(f"{r.ratio:.2f}x at batch {r.batch}" for r in row.latency)
            scores = f"{row.accuracy.source_score:.2f} -> {row.accuracy.variant_score:.2f}"
            print(
                f"{name} {precision}: top-1 {scores}, {row.accuracy.sqnr_db:.1f} dB, "
                f"{row.file_bytes / 1e6:.2f} MB, {speed}"
            )


if __name__ == "__main__":
    main()
