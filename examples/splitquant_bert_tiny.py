"""SplitQuant's experiment: BERT-Tiny on two tasks, its layers in 8, 4 and 2 bits, whole and split.

    python examples/splitquant_bert_tiny.py [--data ../shared/data] [--out build/bert] [--seeds 3]

Weights of linear layers only, embeddings and biases left float, no calibration data (but for
GPTQ), as in the paper (J. Song and F. Lin, arXiv 2501.12428): affine, a range a row, from least to
greatest weight. Beside it, what else the same stored bits buy. Needs the `torch` extra; training
takes a minute or two a model, and models that are there already are used again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import bert_tiny
import numpy as np
import onnx_ir as ir
import onnxruntime

import fourfold

Arrays = dict[str, np.ndarray]

BESIDE = Path(__file__).resolve().parents[2] / "shared/data"
HEAD = "widen-floats,tidy{opset=25},fold-batchnorm"
BITS = 'assign-bits{{weights={} activations="float" embeddings=false affine=true{}}}'
LEAST, BEST = 'round-weights{clip="minmax"}', "round-weights"
GPTQ = 'round-weights{method="gptq" samples=256}'
BRANCHES = 'split-layers{form="branches" clip="minmax"}'


@dataclass(frozen=True)
class Layout:
    """One way to store the linear layers, as the passes that make it."""

    name: str
    bits: int
    split: str = ""
    options: str = ""
    rounding: str = LEAST
    calibrated: bool = False

    @property
    def recipe(self) -> str:
        """The passes as text."""
        steps = [HEAD, BITS.format(self.bits, self.options), self.split, self.rounding]
        return ",".join([step for step in steps if step] + ["unpack-weights", "pack-tables"])


def table(more: str) -> str:
    """Return the pass that stores parts as an index and a table."""
    return f'split-layers{{form="codebook" {more}}}'


def grid(more: str) -> str:
    """Return the pass that does so with a table of int8 a row."""
    return f'split-layers{{form="int8-grid" over="channel" {more}}}'


LAYOUTS = (
    Layout("8 bits", 8),
    Layout("8 bits, 3 branches", 8, BRANCHES),
    Layout("4 bits", 4),
    Layout("4 bits, 3 branches", 4, BRANCHES),
    Layout("2 bits", 2),
    Layout("2 bits, 3 branches", 2, BRANCHES),
    Layout("the same 3 parts, a table a row", 2, table('zero=true clip="minmax"')),
    Layout("3 parts in own ranges, a table a row", 2, table("")),
    Layout("3 parts a row in own ranges", 2, table('over="channel"')),
    Layout("3 parts a row on the grid of int8", 2, grid("")),
    Layout("k-means, 12 values a weight", 2, table("clusters=12 levels=1")),
    Layout("k-means, 16 values a weight", 2, table("clusters=16 levels=1")),
    Layout("k-means, 16 values a row", 2, grid("clusters=16 levels=1")),
    Layout("k-means, 4 values a row", 2, grid("clusters=4 levels=1")),
    Layout("2 bits, range by squared error", 2, rounding=BEST),
    Layout("2 bits, blocks of 32", 2, options=" block=32"),
    Layout("3 bits", 3),
    Layout("3 bits, blocks of 32", 3, options=" block=32"),
    Layout("4 bits, blocks of 32", 4, options=" block=32"),
    Layout("2 bits by GPTQ, 256 texts", 2, rounding=GPTQ, calibrated=True),
    Layout("4 bits by GPTQ, 256 texts", 4, rounding=GPTQ, calibrated=True),
)


@dataclass(frozen=True)
class Result:
    """What one layout of one model gave: bits a weight, accuracy in percent, SQNR, bytes."""

    bits: float
    accuracy: float
    sqnr_db: float
    bytes: int


def measured(
    model: Path, layout: Layout | None, feeds: Arrays, calibration: Arrays | None = None
) -> Result:
    """Compile one layout (None: the float model) and run the test texts through it."""
    source, labels = _logits(model, feeds), feeds["labels"]
    if layout is None:
        return Result(32, _accuracy(source, labels), np.inf, model.stat().st_size)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        data = calibration if layout.calibrated else None
        made = fourfold.compile(model, out, data, recipe=layout.recipe, check=False)
        entry, row = made.entry("cpu"), made.report.targets[0]
        logits = _logits(entry, feeds)
    noise = np.square(logits - source).sum()
    sqnr = 10 * np.log10(np.square(source).sum() / noise)
    return Result(row.stored_bits.total, _accuracy(logits, labels), sqnr, row.file_bytes)


def _logits(model: Path, feeds: Arrays) -> np.ndarray:
    """Run all texts on onnxruntime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = {one.name: feeds[one.name] for one in session.get_inputs()}
    return session.run(None, inputs)[0].astype(np.float64)


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the percentage of texts whose largest logit is at the label."""
    return float((logits.argmax(axis=1) == labels).mean() * 100)


def trained(task: bert_tiny.Task, vocabulary: int, seed: int, folder: Path) -> Path:
    """Return the float model of one seed, trained where it is not there yet."""
    path = folder / f"{task.name}-{task.epochs}-epochs-{seed}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        ir.save(bert_tiny.export(bert_tiny.train(task, vocabulary, seed)), unfinished)
        unfinished.rename(path)
    return path


def show(name: str, found: list[list[Result]], layouts: list[Layout]) -> None:
    """Print a task's table; rows are layouts, figures are means over the seeds."""
    float_row = np.array([one.accuracy for one in found[0]])
    count = f"{len(float_row)} model{'s' if len(float_row) > 1 else ''}"
    print(
        f"{name}, {count:<28} {'bits/weight':>11} {'accuracy':>9} {'drop':>14} {'dB':>6} {'MB':>6}"
    )
    for layout, row in zip([None, *layouts], found, strict=True):
        accuracy = np.array([one.accuracy for one in row])
        drop = mean(float_row - accuracy)
        sqnr, bits = (
            np.mean([getattr(one, field) for one in row]) for field in ("sqnr_db", "bits")
        )
        size = np.mean([one.bytes for one in row]) / 1e6
        label = "float" if layout is None else layout.name
        print(f"{label:40} {bits:9.2f} {accuracy.mean():9.2f} {drop:>14} {sqnr:6.1f} {size:6.2f}")
    scores = {
        layout.name: np.array([one.accuracy for one in row])
        for layout, row in zip(layouts, found[1:], strict=True)
    }
    for bits in (2, 4, 8):
        whole, split = f"{bits} bits", f"{bits} bits, 3 branches"
        if {whole, split} <= set(scores):
            gain = mean(scores[split] - scores[whole])
            print(f"gain of the paper's branches over the same {bits} bits whole: {gain} points")


def mean(values: np.ndarray) -> str:
    """Return a mean with its standard error, where there are several values."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    return f"{values.mean():+.2f} +- {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def main() -> None:
    """Train, compile and print a table a task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("FOURFOLD_DATA", BESIDE))
    parser.add_argument("--out", type=Path, default=Path("build/bert"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--task", choices=("sms_spam", "emotion"), action="append")
    parser.add_argument("--epochs", type=int, help="fewer, for a quick look")
    parser.add_argument("--layout", action="append", help="rows of the table; all by default")
    chosen = parser.parse_args()
    tasks, vocabulary = bert_tiny.read_tasks(chosen.data / "text")
    for name in chosen.task or list(tasks):
        task = tasks[name](chosen.epochs)
        feeds, texts = task.test.feeds(), task.train.feeds()
        models = [trained(task, vocabulary, seed, chosen.out) for seed in range(chosen.seeds)]
        layouts = [one for one in LAYOUTS if one.name in (chosen.layout or one.name)]
        rows = [
            [measured(model, layout, feeds, texts) for model in models]
            for layout in (None, *layouts)
        ]
        show(name, rows, layouts)


if __name__ == "__main__":
    main()
