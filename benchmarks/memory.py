"""Peak memory of a weight-only compile of a 1 GiB model.

    python benchmarks/memory.py [--gib 1] [--precision w8]

Writes a chain of MatMul layers with random weights as external data, then compiles it in a fresh
process and prints that process's peak resident memory above a process that only imports fourfold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

SIDE = 2048

COMPILE = """
import resource, sys, fourfold
from fourfold.compiler import driver
from fourfold.targets.cpu import Cpu
from fourfold.compiler.precision import Precision
Cpu().recipe(Precision())
import onnxscript.optimizer, onnxscript.version_converter
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
if len(sys.argv) > 1:
    fourfold.compile(sys.argv[1], sys.argv[2], precision=sys.argv[3], check=False)
print(before, peak())
"""


def write_model(path: Path, gib: float) -> None:
    """Write a chain of square MatMuls, the weights as external data, one layer at a time."""
    layers = round(gib * 2**30 / (SIDE * SIDE * 4))
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    with path.with_suffix(".data").open("wb") as file:
        for layer in range(layers):
            offset = file.tell()
            (rng.standard_normal((SIDE, SIDE), np.float32) * np.float32(SIDE**-0.5)).tofile(file)
            tensor = TensorProto(
                name=f"w{layer}",
                data_type=TensorProto.FLOAT,
                dims=[SIDE, SIDE],
                data_location=TensorProto.EXTERNAL,
            )
            length = file.tell() - offset
            for key, value in (
                ("location", path.with_suffix(".data").name),
                ("offset", offset),
                ("length", length),
            ):
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            output = "y" if layer == layers - 1 else f"x{layer + 1}"
            nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [output]))
    shape = ["n", SIDE]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def main() -> None:
    """Write, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--precision", default="w8")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder) / "model.onnx", Path(folder) / "out"
        write_model(model, chosen.gib)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, str(model), str(out), chosen.precision],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        seconds = time.perf_counter() - start
        before, after = map(int, done.stdout.split())
        written = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
        print(
            f"{chosen.gib:g} GiB, {chosen.precision}: peak {(after - before) / 1e6:.0f} MB above "
            f"the interpreter's {before / 1e6:.0f} MB with its imports, {seconds:.1f} s, "
            f"{written / 1e6:.0f} MB written"
        )


if __name__ == "__main__":
    main()
