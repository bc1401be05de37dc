"""What each effort costs and brings: metric, SQNR, stored bits, speed, seconds of a compile.

    python benchmarks/calibration.py [--task cifar-resnet20] [--precision w4a8] [--effort 2]
                                     [--split kmeans] [--set 'assign-bits{affine=true}']
                                     [--rounds 30]

Every row takes the same calibration feeds and is measured on the whole eval split. `--set` gives
passes other options, as on the command line. Nothing is taken from the cache, so that seconds are
those of a first compile.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import cpu
import measure

import fourfold

TASKS = ("cifar-resnet20", "cifar-resnet56", "squeezenet", "vww", "kws", "kwt", "minilm-sts")
EFFORTS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Row:
    """One way to compile a task's model; the fields are options of `compile`."""

    precision: str
    effort: int
    split: str | None = None
    set: str | None = None

    @property
    def name(self) -> str:
        """Name of the row, unique in a table."""
        return f"{self.precision} {self.split or ''} effort {self.effort}".replace("  ", " ")


def table(task_name: str, rows: list[Row], rounds: int) -> Iterator[str]:
    """Yield a table's lines for one task, the float model first."""
    task = measure.task_named(task_name)
    source, feeds = measure.tasks().model_path(task), cpu.calibration(task)
    few = [feeds[0]] if isinstance(feeds, list) else {n: v[:8] for n, v in feeds.items()}
    score, reference = measure.accuracy(task, source)
    heads = f"{'SQNR dB':>8} {'bits':>6} {'MB':>7} {'x float':>8} {'s':>7}"
    yield f"{task_name:24} {task.metric:>14} {heads}"
    yield f"{'float':24} {score:14.3f} {'inf':>8} {32:6.2f} {source.stat().st_size / 1e6:7.2f}"
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FOURFOLD_CACHE"] = f"{folder}/cache"
            begin = time.perf_counter()
            made = fourfold.compile(source, f"{folder}/out", feeds, few, **asdict(row))
            took = time.perf_counter() - begin
            path = made.entry("cpu")
            score, outputs = measure.accuracy(task, path)
            pair = {"float": source, row.name: path}
            seconds = measure.interleaved(pair, measure.latency_feeds(task, 1), rounds)
            report = made.report.targets[0]
            bits = report.stored_bits.total if report.stored_bits else 32.0
            yield (
                f"{row.name:24} {score:14.3f} {measure.sqnr_db(reference, outputs):8.2f} "
                f"{bits:6.2f} {path.stat().st_size / 1e6:7.2f} "
                f"{seconds['float'] / seconds[row.name]:8.2f} {took:7.1f}"
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", choices=[*TASKS, "stories"], action="append")
    parser.add_argument("--precision", action="append", help="w4a8 by default")
    parser.add_argument("--effort", type=int, choices=EFFORTS, action="append")
    parser.add_argument("--split", help="as on the command line")
    parser.add_argument("--set", help="other options of passes")
    parser.add_argument("--rounds", type=int, default=30)
    asked = parser.parse_args()
    rows = [
        Row(precision, effort, asked.split, asked.set)
        for precision in asked.precision or ["w4a8"]
        for effort in asked.effort or EFFORTS
    ]
    for task in asked.task or TASKS:
        for line in table(task, rows, asked.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
