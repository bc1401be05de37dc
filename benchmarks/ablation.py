"""What each lowering pass of the CPU recipe is worth: the recipe without it, beside the whole.

    python benchmarks/ablation.py [--task kwt] [--precision w4a8] [--rounds 20]

Also times calibration methods by their accuracy: the recipe with another `calibrate{method=...}`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cpu
import measure
import peers
from measure import Candidate

import fourfold
from fourfold.compiler.precision import Precision
from fourfold.targets.cpu import Cpu

LOWERING = (
    "pad-codes",
    "fuse-matmul-bias",
    "split-skip-layernorm",
    "lower-embeddings",
    "unpack-weights",
)
METHODS = ("minmax", "percentile", "entropy")


def recipes(precision: str) -> dict[str, str]:
    """Return the whole recipe, the recipe without each lowering pass, and other calibrations."""
    whole = Cpu().recipe(Precision.parse(precision))
    texts = {"whole recipe": str(whole)}
    for name in LOWERING:
        texts[f"no {name}"] = str(
            fourfold.Recipe(tuple(p for p in whole.passes if p.name != name))
        )
    for method in METHODS:
        changed = (
            p.model_copy(update={"method": method}) if p.name == "calibrate" else p
            for p in whole.passes
        )
        texts[method] = str(fourfold.Recipe(tuple(changed)))
    return texts


def main() -> None:
    """Compile every recipe, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=(*cpu.TASKS, "kwt"), default="kwt")
    parser.add_argument("--precision", default="w8a8")
    parser.add_argument("--rounds", type=int, default=20)
    chosen = parser.parse_args()
    task = measure.task_named(chosen.task)
    model, feeds = measure.tasks().model_path(task), cpu.calibration(task)
    candidates = [Candidate("float", model)]
    with tempfile.TemporaryDirectory() as folder:
        for name, text in recipes(chosen.precision).items():
            out = Path(folder) / str(len(candidates))
            artifact = fourfold.compile(model, out, feeds, recipe=text, check=False)
            candidates.append(Candidate(name[:24], artifact.entry("cpu")))
        for line in peers.compare(chosen.task, candidates, chosen.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
