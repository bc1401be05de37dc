"""Split weights on onnxruntime CPU, from the command line's options to the kernels that run."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest

import fourfold
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import Format
from fourfold.compiler.model import load
from fourfold.compiler.session import open_runner

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples/digits"
MODEL, CALIB, CHECK = (DIGITS / name for name in ("digits.onnx", "calib.npz", "check.npz"))
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))

real = pytest.mark.skipif(
    not (DATA / "tasks.py").is_file(), reason=f"no real models in {DATA}; set FOURFOLD_DATA"
)


def compiled(out, **options):
    return fourfold.compile(MODEL, out, CALIB, CHECK, **options)


def row(artifact):
    return artifact.report.targets[0]


def plan(artifact):
    """Return the formats of the weights, by name."""
    values = json.loads((artifact.folder / "plan.json").read_text())["cpu"]["values"]
    return {n: note["format"] for n, note in values.items() if "weight" in n and "format" in note}


def entry(artifact):
    return artifact.entry("cpu").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Digits in each of some layouts, each compiled once."""
    known = {}

    def make(precision, split=None):
        if (precision, split) not in known:
            out = tmp_path_factory.mktemp("split") / "out"
            known[precision, split] = compiled(out, precision=precision, split=split)
        return known[precision, split]

    return make


def test_auto_takes_the_table_that_the_integer_kernels_read(made):
    plain, split, eight = made("w2a8"), made("w2a8", "auto"), made("w8a8")
    formats = [Format.parse(text) for text in plan(split).values()]
    assert {format.split.form for format in formats} == {"int8-grid"}
    assert row(split).kernels == row(eight).kernels
    assert row(split).weight_memory == row(eight).weight_memory
    assert row(split).accuracy.sqnr_db > row(plain).accuracy.sqnr_db + 2
    assert row(split).file_bytes < 0.8 * row(eight).file_bytes


def test_a_layout_is_called_by_what_it_stores(made):
    """Three parts of two bits are six bits, and are not called two."""
    branches, grid = row(made("w2a8", "branches")), row(made("w2a8", "auto"))
    assert branches.precision == grid.precision == "w2a8 in 3 parts"
    assert branches.stored_bits.codes == 6
    assert branches.stored_bits.total > 6
    assert 4 <= grid.stored_bits.codes < 4.1  # one layer is too small for a table
    assert grid.stored_bits.total > 4.1


def test_branches_take_three_times_the_kernels(made):
    branches, eight = row(made("w2a8", "branches")), row(made("w8a8"))
    assert branches.kernels["QLinearConv"] == 3 * eight.kernels["QLinearConv"]
    assert branches.weight_memory > 2.8 * eight.weight_memory
    assert branches.accuracy.sqnr_db > row(made("w2a8")).accuracy.sqnr_db + 10


def test_sixteen_values_a_channel_beat_sixteen_steps(made):
    steps, means = row(made("w4a8")), row(made("w4a8", "kmeans"))
    assert means.precision == "w4a8 in 16 values"
    assert means.accuracy.sqnr_db > steps.accuracy.sqnr_db
    assert means.file_bytes < 1.3 * steps.file_bytes
    assert means.kernels == steps.kernels


@pytest.mark.parametrize("split", ["auto", "branches", "kmeans"])
def test_a_plan_replays_to_the_same_bytes(split, made, tmp_path):
    first = made("w2a8" if split != "kmeans" else "w4a8", split)
    second = compiled(tmp_path / "again", plan=first.folder / "plan.json")
    assert entry(second) == entry(first)


def edited(artifact, folder, change):
    """Write a plan whose first Conv weight is changed; return its path."""
    data = json.loads((artifact.folder / "plan.json").read_text())
    note = next(n for name, n in data["cpu"]["values"].items() if name.startswith("fine"))
    note.update(change(note))
    path = folder / "plan.json"
    path.write_text(json.dumps(data))
    return path


def test_a_split_that_was_edited_is_obeyed(made, tmp_path):
    text = "uint2 per_axis(0) split(int8-grid,4,per_axis(0))"
    path = edited(made("w2a8", "auto"), tmp_path, lambda _: {"format": text})
    again = compiled(tmp_path / "again", plan=path)
    assert text in plan(again).values()
    assert entry(again) != entry(made("w2a8", "auto"))


def test_a_split_that_no_kernel_takes_is_refused(made, tmp_path):
    text = "uint2 per_axis(0) split(codebook,3,per_tensor)"
    path = edited(made("w2a8", "auto"), tmp_path, lambda _: {"format": text})
    with pytest.raises(RecipeError, match=r"cannot be .*codebook.* x uint8"):
        compiled(tmp_path / "again", plan=path)


def test_importance_mixes_split_forms_with_whole_ones(tmp_path):
    options = {"precision": "auto", "split": "kmeans", "average_bits": 3.5}
    artifact = compiled(tmp_path / "out", signals=("quantization-error",), **options)
    formats = [Format.parse(text) for text in plan(artifact).values()]
    stored = [format.stored_bits for format in formats]
    assert {format.split is None for format in formats} == {True, False}
    assert len(set(stored)) > 1
    assert row(artifact).decision.average_bits <= 3.5
    assert row(artifact).precision == "auto in 16 values"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "w8a8", "split": "auto"}, "gain nothing by being split"),
        ({"split": "auto"}, "gain nothing by being split"),  # w8a8 by default
        ({"recipe": "tidy", "split": "auto"}, "write split-layers into it"),
        ({"plan": "plan.json", "split": "auto"}, "a plan says all"),
        ({"precision": "w2a8", "split": "codebok"}, "did you mean 'codebook'"),
        ({"precision": "w2a8", "split": "codebook"}, "take int8-grid, or weights only"),
        ({"precision": "w4a8", "split": "auto"}, "12 code bits a weight are no less than int8"),
        ({"precision": "w2", "split": "nearest"}, "is not legal here for a weight of shape"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(options, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        compiled(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tasks():
    """The tasks of the folder with real models."""
    return runpy.run_path(str(DATA / "tasks.py"), run_name="tasks")


@real
@pytest.mark.slow
def test_resnet20(tasks, tmp_path):
    task = tasks["TASKS"]["cifar-resnet20"]
    calib, check = (
        {name: array[:: len(array) // 128] for name, array in task.feeds(DATA, part)[0].items()}
        for part in ("calib", "eval")
    )
    found = {}
    for name, options in {
        "4": {"precision": "w4a8"},
        "split": {"precision": "w2a8", "split": "auto"},
        "kmeans": {"precision": "w4a8", "split": "kmeans"},
    }.items():
        model = tasks["model_path"](task, DATA)
        found[name] = row(fourfold.compile(model, tmp_path / name, calib, check, **options))
    sqnr = {name: one.accuracy.sqnr_db for name, one in found.items()}
    assert sqnr["split"] > 7  # two bits whole are below zero
    assert sqnr["kmeans"] > sqnr["4"] + 2
    assert found["kmeans"].file_bytes < 1.15 * found["4"].file_bytes
    assert found["split"].kernels == found["kmeans"].kernels == found["4"].kernels


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm-sts", "kwt", "stories", "kws", "squeezenet"])
def test_branches_of_floats_compute_what_the_model_does(name, tasks, tmp_path):
    task = tasks["TASKS"][name]
    path = tasks["model_path"](task, DATA)
    feeds, _ = task.feeds(DATA, "eval")
    batch = {value.name: feeds[value.name][:1] for value in load(path).graph.inputs}
    recipe = "widen-floats,tidy,fold-batchnorm,split-layers"
    made = fourfold.compile(path, tmp_path / "out", recipe=recipe, check=False)
    before, after = (open_runner(one)(batch) for one in (path, made.entry("cpu")))
    parts = [n for n in load(made.entry("cpu")).graph.initializers if "_part_" in n]
    assert len(parts) >= 3 * 7
    for output, expected in before.items():
        if expected.dtype.kind == "f":
            miss = np.abs(after[output] - expected).max()
            assert miss <= 1e-5 * np.abs(expected).max(), output
