"""Does the order matter? The metric against the share of layers that moved to the lower width.

    python benchmarks/importance.py [--task cifar-resnet56] [--out build/importance]

For each pair of widths (8 to 4, 4 to 2) layers move from the higher width to the lower one, the
least important first, ordered by each signal and by ten random orders. Twice: tensor by tensor,
and by whole blocks, as the layer-wise paper (arXiv 2406.17415) does it. Weights alone are rounded
(to nearest, one scale a channel) and activations stay float: nothing differs but the order.
Writes a JSON file and a plot a task, and prints a table: the metric's mean over the shares.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import feeds as own_feeds
import measure
import numpy as np
import onnx
import onnxruntime as ort

from fourfold.compiler import notes, runner
from fourfold.compiler.choices import Open, open_weights
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.model import load, save
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.rounding import simulated
from fourfold.compiler.weights import opened
from fourfold.targets.cpu import Cpu

TASKS = ("stories", "minilm-sts", "cifar-resnet56")
SIGNALS = (
    "measured",
    "fisher",
    "activation-weighted",
    "quantization-error",
    "kurtosis",
    "zd",
    "lim",
)
PAIRS = ((8, 4), (4, 2))
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
RANDOM = 10
KEYS = ("metric", "sqnr_db")

Group = tuple[str, ...]


@dataclass(frozen=True)
class Ranked:
    """A model after the exact rewrites, its open weights and what each signal says of them."""

    path: Path
    weights: list[Open]
    importance: dict[str, dict[str, float]]
    losses: dict[str, dict[str, dict[int, float]]]
    blocks: dict[str, int]


def ranked(task_name: str, folder: Path) -> Ranked:
    """Rewrite, calibrate and rank by every signal."""
    task, root = measure.task_named(task_name), measure.data_root()
    model = load(measure.tasks().model_path(task, root))
    calibration = Feeds.read(own_feeds.calibration(task_name), input_specs(model), 8)
    target = Cpu()
    context = Context(target.capability, folder, calibration, cost=target.cost, jobs=2)
    exact = Recipe.parse("widen-floats,tidy{opset=25},fold-batchnorm")
    plain, _ = runner.run(exact, model, context)
    weights = open_weights(plain, target.capability, (8, 4, 2), "float")
    found: dict[str, dict[str, float]] = {}
    losses: dict[str, dict[str, dict[int, float]]] = {}
    blocks: dict[str, int] = {}
    for signal in SIGNALS:
        text = f'rank-weights{{signals=["{signal}"] widths=[8,4,2] activations="float"}}'
        after, _ = runner.run(Recipe.parse(text), plain, context)
        homes = {v.name: notes.read(v) for v in after.graph.initializers.values()}
        found[signal] = {
            w.name: homes[w.name].importance[signal]
            for w in weights
            if signal in (homes[w.name].importance or {})
        }
        losses[signal] = {
            w.name: {c.bits: homes[w.name].losses[str(c)] for c in w.choices}
            for w in weights
            if homes[w.name].losses is not None
        }
        blocks |= {w.name: homes[w.name].block for w in weights if homes[w.name].block is not None}
    path = folder / "float.onnx"
    save(plain, path)
    return Ranked(path, weights, found, losses, blocks)


def order(
    one: Ranked, signal: str, groups: Sequence[Group], pair: tuple[int, int]
) -> list[Group] | None:
    """Return the groups by one signal, the least important first; None where it orders none.

    A group that the signal says nothing of (LIM, where a block changes its shape) goes last.
    """

    def score(group: Group) -> float:
        predicted = one.losses[signal]
        if predicted:
            return sum(predicted[name][pair[1]] - predicted[name][pair[0]] for name in group)
        found = [one.importance[signal].get(name, np.inf) for name in group]
        return float(np.mean(found))

    ordered = sorted(groups, key=score)
    known = sum(np.isfinite(score(group)) for group in groups)
    return ordered if known > len(groups) / 2 else None


def scorer(task_name: str, one: Ranked) -> Callable[[dict[str, np.ndarray]], tuple[float, float]]:
    """Return a function from weights to (metric, SQNR in dB) on a part of the eval split."""
    proto = onnx.load(one.path)
    names = [w.name for w in one.weights]
    kept = [t for t in proto.graph.initializer if t.name not in names]
    shapes = {t.name: list(t.dims) for t in proto.graph.initializer}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name in names:
        kind = onnx.TensorProto.FLOAT
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shapes[name]))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(proto.SerializeToString(), options)
    batches, score = own_feeds.evaluation(task_name)
    floats = {}
    for w in one.weights:
        with opened(w.value) as array:
            floats[w.name] = np.array(array, np.float32)

    def outputs(weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [session.run(None, {**batch, **weights})[0] for batch in batches]

    reference = outputs(floats)
    power = sum(float(np.square(r.astype(np.float64)).sum()) for r in reference)

    def measured(weights: dict[str, np.ndarray]) -> tuple[float, float]:
        got = outputs(weights)
        pairs = zip(got, reference, strict=True)
        noise = sum(float(np.square(g.astype(np.float64) - r).sum()) for g, r in pairs)
        decibels = 10 * np.log10(power / noise) if noise else float("inf")
        return score(got), float(decibels)

    return measured


def curves(task_name: str, one: Ranked) -> Iterator[dict[str, object]]:
    """Yield a record for every granularity, pair, order and share."""
    score = scorer(task_name, one)
    rounded: dict[tuple[str, int], np.ndarray] = {}
    for w in one.weights:
        with opened(w.value) as array:
            values = np.array(array, np.float32)
        for choice in w.choices:
            rounded[w.name, choice.bits] = simulated(values, choice.format, readers=w.readers)
    names = [w.name for w in one.weights]
    tensors = [(name,) for name in names]
    inside: dict[int, list[str]] = {}
    for name, block in one.blocks.items():
        inside.setdefault(block, []).append(name)
    whole = [tuple(group) for _, group in sorted(inside.items())]
    draw = np.random.default_rng(0)
    for unit, groups in (("tensor", tensors), ("block", whole)):
        if len(groups) < 3:
            continue
        shares = sorted({max(round(s * len(groups)), 1) for s in SHARES} - {len(groups)})
        for high, low in PAIRS:
            # LIM is a block's own: tensors of one block have the same.
            able = [signal for signal in SIGNALS if unit == "block" or signal != "lim"]
            orders = {signal: order(one, signal, groups, (high, low)) for signal in able}
            for number in range(RANDOM):
                orders[f"random {number}"] = [groups[i] for i in draw.permutation(len(groups))]
            ends = {0: ("all", groups), len(groups): ("all", groups)}
            runs = [(n, o, k) for n, o in orders.items() if o is not None for k in shares]
            runs += [(name, listed, k) for k, (name, listed) in ends.items()]
            for name, listed, moved in runs:
                lower = {member for group in listed[:moved] for member in group}
                weights = {n: rounded[n, low if n in lower else high] for n in names}
                metric, decibels = score(weights)
                yield {
                    "unit": unit, "pair": [high, low], "order": name,
                    "share": moved / len(groups), "metric": metric, "sqnr_db": decibels,
                }  # fmt: skip


def table(task_name: str, records: list[dict[str, object]]) -> Iterator[str]:
    """Yield the lines of the printed table: means over the shares, random orders summed up."""
    metric = measure.task_named(task_name).metric
    for unit in ("tensor", "block"):
        for pair in PAIRS:
            part = [r for r in records if r["unit"] == unit and r["pair"] == list(pair)]
            if not part:
                continue
            means: dict[str, tuple[float, float]] = {}
            for name in dict.fromkeys(str(r["order"]) for r in part):
                mine = [r for r in part if r["order"] == name]
                means[name] = tuple(
                    float(np.mean([r[key] for r in mine])) for key in ("metric", "sqnr_db")
                )
            ends = sorted((r["share"], r["metric"]) for r in part if r["order"] == "all")
            randoms = np.array([v for n, v in means.items() if n.startswith("random")])
            yield (
                f"{task_name}, {pair[0]} to {pair[1]} bits by {unit}: {metric} {ends[0][1]:.2f} "
                f"with none moved, {ends[-1][1]:.2f} with all"
            )
            spread, middle = randoms.std(0), randoms.mean(0)
            yield (
                f"  {'random (10)':20} {middle[0]:9.2f} +- {spread[0]:5.2f} {middle[1]:7.2f} "
                f"+- {spread[1]:.2f} dB"
            )
            for name, (mine, decibels) in means.items():
                if name == "all" or name.startswith("random"):
                    continue
                beaten = int((decibels > randoms[:, 1]).sum())
                yield f"  {name:20} {mine:9.2f} {'':8} {decibels:7.2f} dB  better than {beaten}/10"


def summary(out: Path, unit: str) -> Iterator[str]:
    """Yield a Markdown table over all tasks: means of metric and SQNR, random orders beaten."""
    found = {t: json.loads(p.read_text()) for t in TASKS if (p := out / f"{t}.json").is_file()}
    heads = [(t, pair) for t in found for pair in PAIRS]
    yield "| order | " + " | ".join(f"{t} {a} to {b}" for t, (a, b) in heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    cells: dict[str, list[str]] = {name: [] for name in ("random", *SIGNALS)}
    for task_name, pair in heads:
        part = [r for r in found[task_name] if r["unit"] == unit and r["pair"] == list(pair)]
        means = {
            name: [float(np.mean([r[k] for r in part if r["order"] == name])) for k in KEYS]
            for name in dict.fromkeys(r["order"] for r in part)
        }
        randoms = np.array([v for n, v in means.items() if n.startswith("random")])
        (metric, decibels), (off, away) = randoms.mean(0), randoms.std(0)
        cells["random"].append(f"{metric:.2f} +- {off:.2f}, {decibels:.1f} +- {away:.1f} dB")
        for name in SIGNALS:
            if name not in means:
                cells[name].append("")
                continue
            metric, decibels = means[name]
            beaten = int((decibels > randoms[:, 1]).sum())
            cells[name].append(f"{metric:.2f}, {decibels:.1f} dB, {beaten}/10")
    for name, row in cells.items():
        if any(row):
            yield f"| {name} | " + " | ".join(row) + " |"


def plot(task_name: str, records: list[dict[str, object]], path: Path) -> None:
    """Draw the metric over the share, one panel for each granularity and pair."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    units = [u for u in ("tensor", "block") if any(r["unit"] == u for r in records)]
    with mpl.rc_context({"svg.hashsalt": "fourfold", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(9, 3.2 * len(units)), layout="constrained")
        grid = figure.subplots(len(units), len(PAIRS), squeeze=False)
        for row, unit in zip(grid, units, strict=True):
            for axes, pair in zip(row, PAIRS, strict=True):
                part = [r for r in records if r["unit"] == unit and r["pair"] == list(pair)]
                ends = [r for r in part if r["order"] == "all"]
                for name in dict.fromkeys(str(r["order"]) for r in part):
                    if name == "all":
                        continue
                    mine = [r for r in part if r["order"] == name] + ends
                    mine.sort(key=lambda r: r["share"])
                    x, y = [r["share"] for r in mine], [r["metric"] for r in mine]
                    if name.startswith("random"):
                        axes.plot(x, y, color="#cccccc", linewidth=0.8, zorder=1)
                    else:
                        axes.plot(x, y, label=name, linewidth=1.3, zorder=2)
                axes.set_title(f"{pair[0]} to {pair[1]} bits, by {unit} (grey: random)")
                axes.set_xlabel("share moved")
                axes.set_ylabel(measure.task_named(task_name).metric)
                axes.grid(visible=True, alpha=0.3)
        grid[-1][0].legend(fontsize=6)
        figure.suptitle(task_name)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Measure the chosen tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--out", type=Path, default=Path("build/importance"))
    parser.add_argument(
        "--summary", action="store_true", help="print what --out holds, run nothing"
    )
    chosen = parser.parse_args()
    if chosen.summary:
        for unit in ("tensor", "block"):
            print(f"\nby {unit}\n")
            print("\n".join(summary(chosen.out, unit)))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.task or TASKS:
        with tempfile.TemporaryDirectory() as folder:
            one = ranked(name, Path(folder))
            records = list(curves(name, one))
        (chosen.out / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
        plot(name, records, chosen.out / f"{name}.svg")
        for line in table(name, records):
            print(line, flush=True)


if __name__ == "__main__":
    main()
