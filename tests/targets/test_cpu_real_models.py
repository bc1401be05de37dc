"""The CPU target on trained models; where they are not, these tests are skipped.

FOURFOLD_DATA names the folder with `tasks.py`; by default ../shared/data beside the repository.
"""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import fourfold
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.model import load
from fourfold.targets.cpu import Cpu

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "tasks.py").is_file(),
        reason=f"no tasks.py in {DATA}; set FOURFOLD_DATA to the folder with trained models",
    ),
]


@functools.cache
def tasks():
    """Import tasks.py by its path."""
    spec = importlib.util.spec_from_file_location("fourfold_test_tasks", DATA / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def opened(name):
    """Return (task, path of the float model, the model)."""
    task = tasks().TASKS[name]
    path = tasks().model_path(task, DATA)
    return task, path, load(path)


def spread(arrays, count):
    """Return `count` samples, evenly spread: the files are sorted by class."""
    total = len(next(iter(arrays.values())))
    chosen = np.linspace(0, total - 1, min(count, total)).astype(int)
    return {name: array[chosen] for name, array in arrays.items()}


def feeds_of(task, model, split, count):
    arrays, _ = task.feeds(DATA, split)
    return Feeds.read(spread(arrays, count), input_specs(model), batch=8)


def answers(runner, feeds):
    """Return the first output of every sample."""
    return np.concatenate([next(iter(runner(batch).values())) for batch in feeds])


def compiled_and_measured(name, compiled, sqnr, calibration, evaluation, precision="w8a8"):
    """Compile a task's model; return (variant, SQNR in dB on held-out samples)."""
    task, path, model = opened(name)
    target = Cpu()
    feeds = feeds_of(task, model, "calib", calibration)
    variant = compiled(target, model, precision, feeds=feeds)
    held = feeds_of(task, model, "eval", evaluation)
    return variant, sqnr(answers(target.open(path), held), answers(variant.runner, held))


def test_resnet20_runs_in_integers_at_28_db(compiled, sqnr):
    variant, decibels = compiled_and_measured("cifar-resnet20", compiled, sqnr, 128, 128)
    assert decibels >= 28
    kernels = variant.placement.kernels
    assert kernels["QLinearConv"] == 19
    assert kernels["QGemm"] == 1
    assert not kernels.keys() & {"Conv", "FusedConv", "Add", "Relu", "BatchNormalization"}
    assert variant.placement.stayed_float == {}


# Two bits without training leave no answers to keep: only the kernels and the size are held.
@pytest.mark.parametrize(("precision", "floor"), [("w4a8", 10), ("w2a8", -np.inf)])
def test_resnet20_with_narrow_weights_has_the_kernels_of_int8(precision, floor, compiled, sqnr):
    wide, _ = compiled_and_measured("cifar-resnet20", compiled, sqnr, 16, 8)
    narrow, decibels = compiled_and_measured("cifar-resnet20", compiled, sqnr, 16, 64, precision)
    assert narrow.placement == wide.placement
    assert decibels > floor
    sizes = [variant.emitted.entry.stat().st_size for variant in (narrow, wide)]
    bits = int(precision[1])
    assert sizes[0] < sizes[1] * (0.75 if bits == 4 else 0.55)


def cosine(first, second):
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms


def test_minilm_keeps_its_sentences_and_runs_every_weight_in_integers(compiled):
    task, path, model = opened("minilm-sts")
    target = Cpu()
    variant = compiled(target, model, feeds=feeds_of(task, model, "calib", 16))
    held = feeds_of(task, model, "eval", 16)
    expected, got = answers(target.open(path), held), answers(variant.runner, held)
    assert expected.shape == (16, 384)
    assert cosine(expected, got).min() > 0.98
    kernels = variant.placement.kernels
    assert kernels["MatMulIntegerToFloat"] == 36
    assert "SkipLayerNormalization" not in kernels
    assert not variant.placement.stayed_float
    assert variant.emitted.entry.stat().st_size < 0.3 * path.stat().st_size


@pytest.mark.parametrize(
    ("name", "floor"), [("kws", 15), ("vww", 15), ("kwt", 15), ("squeezenet", 15)]
)
def test_other_models_compile_and_keep_their_answers(name, floor, compiled, sqnr):
    """Depthwise convolutions; an old opset; a small transformer; Concat."""
    count = 16 if name == "squeezenet" else 64
    variant, decibels = compiled_and_measured(name, compiled, sqnr, count, count)
    assert decibels >= floor
    assert variant.placement.stayed_float == {}
    if name == "squeezenet":
        assert variant.placement.kernels["QLinearConcat"] == 8
        assert not variant.placement.kernels.keys() & {"Concat", "Conv", "FusedConv"}


@pytest.mark.slow
def test_chosen_bits_beat_one_width_and_greedy_orders(tmp_path):
    """ResNet-20 at 4.5 bits on average, against four bits for all, on held-out samples."""
    task, path, _ = opened("cifar-resnet20")
    data, check = (spread(task.feeds(DATA, split)[0], 128) for split in ("calib", "eval"))

    def decibels(name, **options):
        artifact = fourfold.compile(path, tmp_path / name, data, check, **options)
        (report,) = artifact.report.targets
        assert report.stayed_float == {}
        return report.accuracy.sqnr_db, artifact.plan("cpu")

    uniform, _ = decibels("uniform", precision="w4a8")
    chosen, plan = decibels("milp", average_bits=4.5)
    assert chosen > uniform + 2
    assert {note["block"] for note in plan.values() if "block" in note} == set(range(9))
    signals = ("measured", "quantization-error", "kurtosis", "zd")
    for signal in signals:
        order = (signal, *(other for other in signals if other != signal))
        options = {"average_bits": 4.5, "method": "greedy", "widths": (8, 4), "signals": order}
        assert decibels(signal, **options)[0] < chosen, signal
