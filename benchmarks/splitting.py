"""What splitting weights by value costs and brings, in every form, beside plain rounding.

    python benchmarks/splitting.py models [--task cifar-resnet20] [--rounds 30]
    python benchmarks/splitting.py layers [--rounds 60]
    python benchmarks/splitting.py activations [--task minilm-sts] [--rounds 30]

`models` compiles whole models. `layers` times four layers in a row with 8-bit activations: the
paper's three branches against the same values in a table, which the integer kernel reads.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu
import measure
import numpy as np
import onnx_ir as ir
import peers

import fourfold

TASKS = ("cifar-resnet20", "cifar-resnet56", "kwt", "minilm-sts")
TABLE = "int8-grid,16,channel,levels=1"


@dataclass(frozen=True)
class Layout:
    """One way to store the weights: a precision with a split, or other options of assign-bits."""

    name: str
    precision: str
    split: str | None = None
    affine: bool = False
    rounding: str = "nearest"


LAYOUTS = (
    Layout("w8a8", "w8a8"),
    Layout("w4a8", "w4a8"),
    Layout("w4a8 zero points", "w4a8", affine=True),
    Layout("w4a8 k-means table", "w4a8", TABLE),
    Layout("w4a8 one table a weight", "w4a8", "int8-grid,16,tensor,levels=1"),
    Layout("w2a8", "w2a8"),
    Layout("w2a8 zero points", "w2a8", affine=True),
    Layout("w2a8 split, branches", "w2a8", "branches"),
    Layout("w2a8 split, int8-grid", "w2a8", "int8-grid"),
    Layout("w2a8 split a channel", "w2a8", "int8-grid,3,channel"),
    Layout("w4a8 GPTQ", "w4a8", rounding="gptq"),
    Layout("w4a8 zero points, GPTQ", "w4a8", affine=True, rounding="gptq"),
)


def compiled(model: Any, layout: Layout, out: Path, feeds: Any) -> fourfold.Artifact:
    """Compile a model in one layout; eight samples check, so that memory is known."""
    few = [feeds[0]] if isinstance(feeds, list) else {n: v[:8] for n, v in feeds.items()}
    return fourfold.compile(model, out, feeds, few, recipe=recipe_of(layout))


def recipe_of(layout: Layout) -> fourfold.Recipe:
    """Return the CPU recipe of a layout; nothing is corrected behind the rounding."""
    from fourfold.compiler.precision import Precision
    from fourfold.compiler.split_plan import SplitWish
    from fourfold.targets.cpu import Cpu

    changes = {
        "assign-bits": {"affine": layout.affine},
        "round-weights": {"method": layout.rounding},
    }
    split = SplitWish.parse(layout.split) if layout.split else None
    asked = Precision.parse(layout.precision).model_copy(update={"split": split})
    passes = Cpu().recipe(asked).passes
    return fourfold.Recipe(tuple(p.model_copy(update=changes.get(p.name, {})) for p in passes))


def models(task_name: str, rounds: int, names: list[str] | None = None) -> Iterator[str]:
    """Yield a table's lines for one task: all layouts, or these beside w8a8."""
    task = measure.task_named(task_name)
    source, feeds = measure.tasks().model_path(task), cpu.calibration(task)
    with tempfile.TemporaryDirectory() as folder:
        made = {
            one.name: compiled(source, one, Path(folder) / str(n), feeds)
            for n, one in enumerate(LAYOUTS)
            if names is None or one.name in ("w8a8", *names)
        }
        paths = {"float": source} | {name: a.entry("cpu") for name, a in made.items()}
        seconds = measure.interleaved(paths, measure.latency_feeds(task, 8), rounds)
        heads = ("SQNR dB", "bits", "MB", "MB RAM", "x float", "x int8")
        widths = (8, 6, 7, 7, 8, 7)
        columns = " ".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))
        yield f"{task_name:24} {task.metric:>14} {columns}"
        reference: list[np.ndarray] | None = None
        for name, path in paths.items():
            score, outputs = measure.accuracy(task, path)
            reference = outputs if reference is None else reference
            row = made[name].report.targets[0] if name in made else None
            bits = row.stored_bits.total if row is not None and row.stored_bits else 32.0
            size = path.stat().st_size / 1e6
            memory = (row.weight_memory or 0) / 1e6 if row is not None else size
            yield (
                f"{name:24} {score:14.3f} {measure.sqnr_db(reference, outputs):8.1f} {bits:6.2f} "
                f"{size:7.2f} {memory:7.2f} {seconds['float'] / seconds[name]:8.2f} "
                f"{seconds['w8a8'] / seconds[name]:7.2f}"
            )


def activations(task_name: str, rounds: int) -> Iterator[str]:
    """Yield a table of one task with its activations whole, and cut into parts."""
    from fourfold.compiler.precision import Precision
    from fourfold.passes.split_activations import SplitActivations
    from fourfold.targets.cpu import Cpu

    task = measure.task_named(task_name)
    source, feeds = measure.tasks().model_path(task), cpu.calibration(task)
    whole = Cpu().recipe(Precision()).passes
    place = next(n for n, one in enumerate(whole) if one.name == "calibrate")
    with tempfile.TemporaryDirectory() as folder:
        candidates = [measure.Candidate("float", source)]
        for parts in (1, 3, 6):
            cut = (SplitActivations(parts=parts),) if parts > 1 else ()
            recipe = fourfold.Recipe((*whole[:place], *cut, *whole[place:]))
            out = Path(folder) / str(parts)
            made = fourfold.compile(source, out, feeds, recipe=recipe, check=False)
            rows = made.report.targets[0].passes
            changed = sum(r.changed for r in rows if r.name.startswith("split-activations"))
            name = f"{parts} parts, {changed} layers" if cut else "whole"
            candidates.append(measure.Candidate(name, made.entry("cpu")))
        yield from peers.compare(task_name, candidates, rounds)


def layers(rounds: int) -> Iterator[str]:
    """Yield the times of single layers in every form."""
    names = ("float", "int8", "int8-grid", "branches", "float branches")
    yield (
        f"{'four layers, us':30} "
        + " ".join(f"{n:>14}" for n in names)
        + "  int8/grid branches/grid"
    )
    for label, model, shape in chains():
        feeds = {"x": np.random.default_rng(1).standard_normal((8, *shape), np.float32)}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source = folder / "float.onnx"
            ir.save(model, source)
            paths = {"float": source}
            wanted = {
                "int8": {"precision": "w8a8"},
                "int8-grid": {"precision": "w2a8", "split": "int8-grid"},
                "branches": {"precision": "w2a8", "split": "branches"},
                "float branches": {"recipe": "widen-floats,tidy,split-layers"},
            }
            for form, options in wanted.items():
                out = folder / form
                made = fourfold.compile(source, out, feeds, check=False, **options)
                paths[form] = made.entry("cpu")
            one = {"x": feeds["x"][:1]}
            seconds = measure.interleaved(paths, one, rounds)
        times = " ".join(f"{seconds[n] * 1e6:14.1f}" for n in names)
        grid = seconds["int8-grid"]
        ratios = f"{seconds['int8'] / grid:14.2f} {seconds['branches'] / grid:14.2f}"
        yield f"{label:24} {times} {ratios}"


def chains() -> Iterator[tuple[str, ir.Model, tuple[int, ...]]]:
    """Yield (name, four layers in a row with a Relu between, shape of one sample)."""
    for rows, width in ((1, 1024), (128, 384), (128, 1024)):
        made = chain("MatMul", (width, width), width, (rows, width), {})
        yield f"MatMul {rows}x{width}x{width}", made, (rows, width)
    for channels, size, kernel in ((16, 32, 3), (64, 56, 3), (128, 28, 1)):
        shape, weight = (channels, size, size), (channels, channels, kernel, kernel)
        inner = channels * kernel * kernel
        made = chain("Conv", weight, inner, shape, {"pads": [kernel // 2] * 4})
        yield f"Conv {channels} {kernel}x{kernel} {size}x{size}", made, shape


def chain(
    op_type: str,
    weight: tuple[int, ...],
    inner: int,
    shape: tuple[int, ...],
    attributes: dict[str, Any],
) -> ir.Model:
    """Return four layers with seeded normal weights that keep the scale, each before a Relu."""
    draw = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, ("n", *shape))
    nodes, weights, value = [], [], x
    for number in range(4):
        array = (draw.standard_normal(weight) * (2 / inner) ** 0.5).astype(np.float32)
        home = ir.val(f"w{number}", ir.DataType.FLOAT, weight)
        home.const_value = ir.tensor(array, name=home.name)
        weights.append(home)
        layer = ir.node(op_type, [value, home], attributes=attributes, name=f"layer{number}")
        relu = ir.node("Relu", layer.outputs, name=f"relu{number}")
        layer.outputs[0].name, relu.outputs[0].name = f"sum{number}", f"y{number}"
        nodes += [layer, relu]
        value = relu.outputs[0]
    value.type, value.shape = x.type, ir.Shape(("n", *shape))
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="chain"
    )
    return ir.Model(graph, ir_version=10)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("models", "layers", "activations"))
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layout", action="append", help="rows of models; all by default")
    chosen = parser.parse_args()
    if chosen.what == "layers":
        lines = layers(chosen.rounds)
    else:
        tasks = chosen.task or TASKS
        whole = chosen.what == "models"
        lines = (
            line
            for task in tasks
            for line in (
                models(task, chosen.rounds, chosen.layout)
                if whole
                else activations(task, chosen.rounds)
            )
        )
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
