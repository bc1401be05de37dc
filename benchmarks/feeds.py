"""Calibration and evaluation feeds of the tasks; sentences come without their padding."""

from __future__ import annotations

from collections.abc import Callable

import measure
import numpy as np

Arrays = dict[str, np.ndarray]

PART = {"minilm-sts": 200, "cifar-resnet56": 466, "cifar-resnet20": 932}


def calibration(task_name: str) -> Arrays | list[Arrays]:
    """Return the calibration feeds; sentences come one by one, cut to their length."""
    arrays, _ = measure.task_named(task_name).feeds(measure.data_root(), "calib")
    return _without_padding(arrays)[0] if "attention_mask" in arrays else arrays


def evaluation(task_name: str) -> tuple[list[Arrays], Callable[[list[np.ndarray]], float]]:
    """Return batches of a part of the eval split, and the metric of their first outputs.

    The part is evenly spread; sentences of one length run together.
    """
    task = measure.task_named(task_name)
    arrays, labels = task.feeds(measure.data_root(), "eval")
    total = len(labels)
    chosen = np.linspace(0, total - 1, min(PART.get(task_name, total), total)).astype(int)
    if "attention_mask" not in arrays:
        part = {name: value[chosen] for name, value in arrays.items()}
        batches = list(measure.tasks().batches(part, task.batch))
        return batches, lambda got: float(task.score([np.concatenate(got)], labels[chosen], part))
    both = np.r_[chosen, chosen + total]
    part = {name: value[both] for name, value in arrays.items()}
    batches, place = _without_padding(part)

    def score(got: list[np.ndarray]) -> float:
        rows = np.concatenate(got)
        sorted_back = np.empty_like(rows)
        sorted_back[place] = rows
        return float(task.score([sorted_back], labels[chosen], part))

    return batches, score


def _without_padding(arrays: Arrays) -> tuple[list[Arrays], np.ndarray]:
    """Return batches of sentences of one length, and where each row stood before."""
    lengths = arrays["attention_mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(lengths[order])) + 1
    parts = np.split(order, cuts)
    batches = [{n: v[p, : lengths[p[0]]] for n, v in arrays.items()} for p in parts]
    return batches, order
