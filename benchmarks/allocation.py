"""Bits by importance against one width for all and against greedy orders, at the same average.

    python benchmarks/allocation.py [--task minilm-sts] [--average-bits 4.5]

Every variant is compiled for onnxruntime CPU and scored on the whole eval split. `uniform` is one
width, `milp` the integer program over the losses that a signal predicts, and its plan measured and
repaired; `greedy` moves the least important layers first, from 8 to 4 bits, by a signal's order;
random orders stand beside them. All use the same quantizer and the same calibration samples.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import feeds as own_feeds
import measure
import numpy as np
import onnx_ir as ir

from fourfold.compiler import notes, runner
from fourfold.compiler.contract import Context, Decision
from fourfold.compiler.errors import BudgetError
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.graph import weights_of
from fourfold.compiler.model import load
from fourfold.compiler.precision import Precision
from fourfold.compiler.recipe import Recipe
from fourfold.passes.assign_bits import AssignBits
from fourfold.targets.cpu import Cpu

TASKS = ("minilm-sts", "cifar-resnet56")
PREDICT = ("measured", "fisher", "activation-weighted", "quantization-error")
ORDER = (*PREDICT, "kurtosis", "zd", "lim")
RANDOM = 5


@dataclass(frozen=True)
class Made:
    """One variant: its name, what was decided, and its figures."""

    name: str
    decision: Decision
    megabytes: float
    metric: float
    sqnr_db: float

    def line(self) -> str:
        """Return a row of the table, and below it the repairs."""
        row = (
            f"{self.name:32} {self.decision.average_bits:6.2f} {self.megabytes:7.2f} "
            f"{self.metric:9.2f} {self.sqnr_db:7.1f}"
        )
        return "\n    ".join((row, *self.decision.repairs))


class Bench:
    """One task's model, rewritten, calibrated and ranked by one signal after the other."""

    def __init__(self, task_name: str, folder: Path) -> None:
        self._task, root = measure.task_named(task_name), measure.data_root()
        path = measure.tasks().model_path(self._task, root)
        model = load(path)
        _, self._reference = measure.accuracy(self._task, path)
        self._target, self._folder = Cpu(), folder
        feeds = Feeds.read(own_feeds.calibration(task_name), input_specs(model), 8)
        self._context = Context(
            self._target.capability, folder, feeds, cost=self._target.cost, jobs=2
        )
        first, _, self._behind = self._target.recipe(Precision(widths=(8, 4, 2))).parts()
        exact = Recipe(tuple(p for p in first.passes if p.name != "rank-weights"))
        self._calibrated, _ = runner.run(exact, model, self._context)

    def ranked(self, signal: str) -> ir.Model:
        """Return the model with one signal's notes."""
        text = f'rank-weights{{signals=["{signal}"]}}'
        after, _ = runner.run(Recipe.parse(text), self._calibrated, self._context)
        return after

    def shuffled(self, model: ir.Model, seed: int) -> ir.Model:
        """Return the model with random importances."""
        clone, draw = model.clone(), np.random.default_rng(seed)
        for value in weights_of(clone):
            if notes.read(value).importance is not None:
                notes.write(value, importance={"measured": float(draw.random())})
        return clone

    def line(self, name: str, model: ir.Model, how: AssignBits) -> str:
        """Return the row of one variant, or why it cannot be made."""
        try:
            return self._made(name, model, how).line()
        except BudgetError as error:
            return f"{name:32} {error}"

    def _made(self, name: str, model: ir.Model, how: AssignBits) -> Made:
        """Compile and score one variant."""
        context = replace(self._context, decisions=[])
        after, _ = runner.run(Recipe((how, *self._behind.passes)), model, context)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            entry = self._target.emit(after, Path(folder)).entry
            size = entry.stat().st_size / 1e6
            metric, outputs = measure.accuracy(self._task, entry)
        decibels = measure.sqnr_db(self._reference, outputs)
        return Made(name, context.decisions[-1], size, metric, decibels)


def variants(bench: Bench, average: float) -> Iterator[str]:
    """Yield the row of every variant."""
    plain = bench.ranked("quantization-error")
    for bits in (8, 4):
        yield bench.line(f"uniform {bits} bits", plain, AssignBits(weights=bits))
    for signal in ORDER:
        model = bench.ranked(signal)
        if signal in PREDICT:
            exact = AssignBits(widths=(8, 4, 2), average_bits=average)
            yield bench.line(f"milp by {signal}", model, exact)
        order = AssignBits(
            widths=(8, 4), method="greedy", signal=signal, average_bits=average, trials=0
        )
        yield bench.line(f"greedy by {signal}", _losses(model, plain), order)
        if signal == "measured":
            for seed in range(RANDOM):
                yield bench.line(f"greedy, random {seed}", bench.shuffled(model, seed), order)


def _losses(model: ir.Model, other: ir.Model) -> ir.Model:
    """Return the model with losses of another ranking where it has none: greedy reads no loss."""
    clone = model.clone()
    homes = {value.name: notes.read(value).losses for value in weights_of(other)}
    for value in weights_of(clone):
        if notes.read(value).losses is None and homes.get(value.name) is not None:
            notes.write(value, losses=homes[value.name])
    return clone


def main() -> None:
    """Compile, score, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--average-bits", type=float, default=4.5)
    chosen = parser.parse_args()
    for name in chosen.task or TASKS:
        metric = measure.task_named(name).metric
        print(f"{name:32} {'bits':>6} {'MB':>7} {metric:>9} {'SQNR dB':>7}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for line in variants(Bench(name, Path(folder)), chosen.average_bits):
                print(line, flush=True)


if __name__ == "__main__":
    main()
