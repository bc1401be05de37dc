"""Profiles of a model's own shapes, measured for real, into a table of the test's own."""

import os
from pathlib import Path

import pytest

import fourfold
from fourfold.compiler.errors import ModelError, UnsupportedError
from fourfold.compiler.profiling import profile, workloads_of
from fourfold.targets.cpu import Cpu, host_isa

DIGITS = Path(fourfold.__path__[0]) / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib.npz"


@pytest.fixture(scope="module")
def measured():
    return profile("cpu", MODEL, CALIB)


def test_every_shape_of_the_model_is_measured_once(measured, tmp_path):
    wanted = workloads_of(Cpu(), MODEL, CALIB, tmp_path)
    assert measured.workloads == wanted
    assert len(set(wanted)) == len(wanted) >= 5
    assert {w.op_type for w in wanted} == {"Conv", "Gemm"}
    assert all(w.input[0] == 1 for w in wanted)
    facts = measured.to_json()
    assert facts["isa"] == host_isa()
    for row in facts["workloads"]:
        assert next(iter(row["seconds"])) == "float"
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert "int8" in row["seconds"]


def test_compiles_find_what_was_measured(measured):
    from fourfold.compiler.choices import Choice

    for workload in measured.workloads:
        assert Cpu().cost(workload, Choice()).source == "measured"
    files = list((Path(os.environ["FOURFOLD_CACHE"]) / "costs").glob("*.json"))
    assert len(files) == 1


def test_nothing_is_measured_twice(measured, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("fourfold.targets.cpu.measure", fail)
    assert profile("cpu", MODEL, CALIB).to_json() == measured.to_json()


def test_another_class_of_cpu_cannot_be_timed_here():
    other = "avx2" if host_isa() != "avx2" else "vnni"
    with pytest.raises(UnsupportedError, match="profile on the machine that will run"):
        profile(f'cpu{{isa="{other}"}}', MODEL)


def test_a_model_that_is_not_there():
    with pytest.raises(ModelError):
        profile("cpu", "no.onnx")
