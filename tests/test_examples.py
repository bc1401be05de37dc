"""Every example runs from one command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not (DATA / "tasks.py").is_file(),
    reason=f"no real models in {DATA}; set FOURFOLD_DATA to the folder that holds tasks.py",
)


def run(script: Path, *arguments: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_tested_here():
    scripts = {p.name for p in (ROOT / "examples").glob("*.py")} - {"__init__.py"}
    scripts -= {"bert_tiny.py"}  # the model of splitquant_bert_tiny.py
    assert scripts == {
        "resnet_cifar10.py", "minilm_sts.py", "splitquant_bert_tiny.py", "train_digits.py",
    }  # fmt: skip


@needs_data
@pytest.mark.slow
def test_resnet_cifar10(tmp_path):
    lines = run(ROOT / "examples/resnet_cifar10.py", "--data", str(DATA), cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == [
        "resnet20 w8a8", "resnet20 w4a8", "resnet56 w8a8", "resnet56 w4a8",
    ]  # fmt: skip
    eight = [float(line.split(" dB")[0].rsplit(" ", 1)[1]) for line in lines[::2]]
    assert eight[0] > 29.4
    assert eight[1] > 28.3


@needs_data
@pytest.mark.slow
def test_minilm_sts(tmp_path):
    arguments = ("--data", str(DATA), "--pairs", "200")
    lines = run(ROOT / "examples/minilm_sts.py", *arguments, cwd=tmp_path)
    sizes = [float(line.split(" MB")[0].rsplit(" ", 1)[1]) for line in lines]
    assert sizes[0] < 24
    assert sizes[1] < 12.5
    before, after = (
        float(text.split(",")[0]) for text in lines[0].split("spearman ")[1].split(" -> ")
    )
    assert before - after < 1.0


@pytest.mark.slow
@pytest.mark.torch
def test_train_digits_makes_the_shipped_model_again(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    run(tmp_path / "examples/train_digits.py", cwd=tmp_path)
    made, shipped = (home / "examples/digits/check.npz" for home in (tmp_path, ROOT))
    assert made.read_bytes() == shipped.read_bytes()
    assert (tmp_path / "examples/digits/digits.onnx").stat().st_size > 100_000


@needs_data
@pytest.mark.slow
@pytest.mark.torch
def test_splitquant_bert_tiny(tmp_path):
    """One epoch of spam, three rows; docs/splitting.md has the whole table, trained longer."""
    whole, split, same = "2 bits", "2 bits, 3 branches", "the same 3 parts, a table a row"
    rows = [text for name in (whole, split, same) for text in ("--layout", name)]
    arguments = ("--data", str(DATA), "--out", "models", "--task", "sms_spam", "--epochs", "1")
    lines = run(ROOT / "examples/splitquant_bert_tiny.py", *arguments, *rows, cwd=tmp_path)
    figures = {line[:38].strip(): line[38:].split() for line in lines[1:-1]}
    bits = {name: float(cells[0]) for name, cells in figures.items()}
    sqnr = {name: float(cells[3]) for name, cells in figures.items()}
    assert float(figures["float"][1]) > 90
    assert bits[whole] < 2.3
    assert bits[split] > 6
    assert sqnr[split] > sqnr[whole] + 3
    assert sqnr[same] == sqnr[split]
    assert lines[-1].startswith("gain of the paper's branches over the same 2 bits whole: ")
    assert (tmp_path / "models/sms_spam-1-epochs-0.onnx").is_file()
