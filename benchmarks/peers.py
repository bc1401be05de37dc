"""onnxruntime's own quantizers on the same tasks, measured the same way.

    python benchmarks/peers.py [--task cifar-resnet20] [--config minmax] [--rounds 40]

Prints for each variant the task's metric, the SQNR of the outputs against the float model, the
size of the file and how many times faster than float it is at batch 1 and 8, one thread,
interleaved. Sentences are timed at 128 tokens each.

Each configuration is what a careful user would write, as far as the tool allows: see `CONFIGS`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
import numpy as np
from measure import Candidate, Feeds
from onnxruntime import quantization as q
from onnxruntime.quantization.shape_inference import quant_pre_process

CALIBRATION = 200  # samples; percentile keeps every activation of every sample in memory
BATCHES = (1, 8)


class SampleReader(q.CalibrationDataReader):  # type: ignore[misc]
    """Hands feeds to onnxruntime's calibrators one sample at a time."""

    def __init__(self, feeds: Feeds) -> None:
        count = len(next(iter(feeds.values())))
        self._samples: Iterator[Feeds] = (
            {name: value[i : i + 1] for name, value in feeds.items()} for i in range(count)
        )

    def get_next(self) -> Feeds | None:
        """Return the next sample's feeds, or None at the end."""
        return next(self._samples, None)


def _static(method: q.CalibrationMethod, **options: object) -> Callable[[Path, Feeds, Path], None]:
    """Return a maker: static QDQ, unsigned activations, signed per-channel weights."""

    def make_static(model: Path, calib: Feeds, out: Path) -> None:
        settings = {"per_channel": True, "weight_type": q.QuantType.QInt8} | options
        q.quantize_static(
            model,
            out,
            SampleReader(calib),
            quant_format=q.QuantFormat.QDQ,
            activation_type=q.QuantType.QUInt8,
            calibrate_method=method,
            **settings,
        )

    return make_static


def _defaults(model: Path, calib: Feeds, out: Path) -> None:
    """Quantize statically with every option at its default (signed activations, per tensor)."""
    q.quantize_static(model, out, SampleReader(calib))


def _dynamic(model: Path, calib: Feeds, out: Path) -> None:
    """Quantize weights per channel to int8; activations get their ranges at run time."""
    q.quantize_dynamic(model, out, per_channel=True, weight_type=q.QuantType.QInt8)


_MINMAX, _PERCENTILE = q.CalibrationMethod.MinMax, q.CalibrationMethod.Percentile
# Relu stays among the quantized operators: without it ResNet-20 with minmax loses 2.8 dB and runs
# more than a tenth slower.
_CNN = {
    "defaults": _defaults,
    "minmax": _static(_MINMAX),
    "percentile": _static(_PERCENTILE),
    "w4a8": _static(_MINMAX, weight_type=q.QuantType.QInt4),
}
_SENTENCES = {
    "dynamic": _dynamic,
    "static-matmul": _static(_MINMAX, op_types_to_quantize=["MatMul"]),
}

# task -> configuration -> what makes it
CONFIGS: dict[str, dict[str, Callable[[Path, Feeds, Path], None]]] = {
    "cifar-resnet20": _CNN,
    "cifar-resnet56": _CNN,
    "minilm-sts": _SENTENCES,
}


def make(
    task_name: str, config: str, model_path: Path, calib_feeds: Feeds, out_path: Path
) -> None:
    """Write the variant that onnxruntime's quantizer makes of a float model.

    Args:
        task_name: A key of `CONFIGS`.
        config: A key of `CONFIGS[task_name]`.
        model_path: The float .onnx file.
        calib_feeds: Arrays by input name, samples along axis 0.
        out_path: Where the quantized .onnx file goes; its folder must exist.

    Raises:
        KeyError: An unknown task or configuration.
    """
    if config not in CONFIGS.get(task_name, {}):
        raise KeyError(f"no configuration {config!r} of task {task_name!r}; known: {CONFIGS}")
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Symbolic shape inference gives up on the MiniLM export; the CNNs need none of it.
        quant_pre_process(model_path, prepared, skip_symbolic_shape=True)
        CONFIGS[task_name][config](prepared, calib_feeds, out_path)


def made(task_name: str, configs: list[str], folder: Path) -> list[Candidate]:
    """Return the float model of a task and its quantized variants, written to `folder`."""
    task, root = measure.task_named(task_name), measure.data_root()
    model = measure.tasks().model_path(task, root)
    calib, _ = task.feeds(root, "calib")
    chosen = {name: value[:CALIBRATION] for name, value in calib.items()}
    candidates = [Candidate("float", model)]
    for config in configs:
        out = folder / f"{task_name}.{config}.onnx"
        make(task_name, config, model, chosen, out)
        candidates.append(Candidate(config, out))
    return candidates


def compare(task_name: str, candidates: list[Candidate], rounds: int) -> Iterator[str]:
    """Yield a table's lines; the first candidate is the float reference."""
    task = measure.task_named(task_name)
    paths = {c.name: c.path for c in candidates}
    seconds = [
        measure.interleaved(paths, measure.latency_feeds(task, batch), rounds) for batch in BATCHES
    ]
    reference: list[np.ndarray] | None = None
    yield f"{task_name:24} {task.metric:>14} {'SQNR dB':>8} {'MB':>7} {'b1 x':>6} {'b8 x':>6}"
    for candidate in candidates:
        score, outputs = measure.accuracy(task, candidate.path)
        reference = outputs if reference is None else reference
        sqnr = measure.sqnr_db(reference, outputs)
        ratios = " ".join(f"{s[candidates[0].name] / s[candidate.name]:6.2f}" for s in seconds)
        yield f"{candidate.name:24} {score:14.3f} {sqnr:8.1f} {candidate.megabytes:7.2f} {ratios}"


def main() -> None:
    """Make and measure the chosen configurations, all of them by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=list(CONFIGS))
    parser.add_argument("--config", action="append", help="default: all of the task's")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    args = parser.parse_args()
    names = args.task or list(CONFIGS)
    known = {config for name in names for config in CONFIGS[name]}
    if unknown := set(args.config or ()) - known:
        parser.error(f"no configuration {sorted(unknown)} of {names}; known: {sorted(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        wanted = [c for c in CONFIGS[name] if not args.config or c in args.config]
        for line in compare(name, made(name, wanted, args.out), args.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
