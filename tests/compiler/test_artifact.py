import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fourfold
from fourfold.compiler.artifact import MANIFEST, REPORT, Artifact, fresh, seal, sha256, write_json
from fourfold.compiler.errors import DataError

PACKAGE_HOME = Path(fourfold.__path__[0]).parent


def fill(build, text="weights"):
    (build / "cpu").mkdir()
    (build / "cpu" / "model.onnx").write_text(text)
    write_json(build / REPORT, {"seconds": 1.5})
    seal(build, {"seed": 0, "variants": {"cpu": "cpu/model.onnx"}})


@pytest.fixture
def artifact(tmp_path):
    with fresh(tmp_path / "build", force=False) as (build, _):
        fill(build)
    return Artifact(tmp_path / "build")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_artifact(artifact):
    assert names(artifact.folder.parent) == ["build"]  # no work folder is left
    assert names(artifact.folder) == ["cpu", MANIFEST, REPORT]
    assert artifact.entry("cpu").read_text() == "weights"


def test_the_manifest_has_a_digest_of_every_file(artifact):
    manifest = artifact.manifest
    model = artifact.folder / "cpu" / "model.onnx"
    # The report holds times, so it is left out.
    assert manifest["files"] == {"cpu/model.onnx": sha256(model)}
    assert manifest["seed"] == 0


def test_folders_are_made(tmp_path):
    with fresh(tmp_path / "a" / "b" / "build", force=False) as (build, work):
        assert build.is_dir()
        assert work.is_dir()
        assert not (tmp_path / "a" / "b" / "build").exists()
        fill(build)
    assert names(tmp_path / "a" / "b") == ["build"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), fresh(tmp_path / "build", force=False) as (build, _):
        fill(build)
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_nothing(tmp_path, stop):
    with pytest.raises(stop), fresh(tmp_path / "build", force=False):
        raise stop
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused(artifact):
    with (
        pytest.raises(DataError, match="exists; choose another one or pass --force"),
        fresh(artifact.folder, force=False),
    ):
        raise AssertionError("must not get here")
    assert artifact.entry("cpu").read_text() == "weights"


def test_force_replaces_an_artifact(artifact):
    with fresh(artifact.folder, force=True) as (build, _):
        assert artifact.entry("cpu").read_text() == "weights"  # until the new one is ready
        fill(build, "new")
    assert artifact.entry("cpu").read_text() == "new"
    assert names(artifact.folder.parent) == ["build"]


def test_force_keeps_the_old_artifact_when_the_new_one_fails(artifact):
    with pytest.raises(ZeroDivisionError), fresh(artifact.folder, force=True) as (build, _):
        fill(build, "new")
        raise ZeroDivisionError
    assert artifact.entry("cpu").read_text() == "weights"
    assert names(artifact.folder.parent) == ["build"]


def test_force_replaces_nothing_but_artifacts(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("three years of work")
    file = tmp_path / "file"
    file.write_text("not a folder")
    for out in (home, file):
        with pytest.raises(DataError, match="will not be replaced"), fresh(out, force=True):
            raise AssertionError("must not get here")
    assert (home / "thesis.tex").read_text() == "three years of work"
    assert file.read_text() == "not a folder"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match="cannot write to"),
        fresh(tmp_path / "file" / "build", force=False),
    ):
        raise AssertionError("must not get here")


KILLED = """
import os, signal, sys
from pathlib import Path
from fourfold.compiler.artifact import fresh
with fresh(Path(sys.argv[1]), force=sys.argv[2] == "force") as (build, work):
    (build / "manifest.json").write_text("half a mani")
    (work / "scratch").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(out, force=""):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_HOME)}
    command = [sys.executable, "-c", KILLED, str(out), force]
    done = subprocess.run(command, env=environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_nothing_under_the_name(tmp_path):
    killed(tmp_path / "build")
    (left,) = names(tmp_path)
    assert left.startswith(".build.partial-")
    with fresh(tmp_path / "build", force=False) as (build, _):  # and is not in the way
        fill(build)
    assert Artifact(tmp_path / "build").entry("cpu").is_file()


def test_a_killed_run_leaves_the_old_artifact(artifact):
    killed(artifact.folder, "force")
    assert artifact.entry("cpu").read_text() == "weights"


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "cpu/../../secret", "link/secret"])
def test_paths_that_leave_the_artifact_are_refused(artifact, path):
    (artifact.folder.parent / "secret").write_text("secret")
    (artifact.folder / "link").symlink_to(artifact.folder.parent)
    seal(artifact.folder, {"variants": {"cpu": path}})
    with pytest.raises(DataError, match="leaves the artifact"):
        artifact.entry("cpu")


def test_a_target_that_is_not_there(artifact):
    with pytest.raises(DataError, match=r"no variant for 'dsp'; it has \['cpu'\]"):
        artifact.entry("dsp")


@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff\xfe"])
def test_a_broken_manifest_is_a_data_error(artifact, content):
    path = artifact.folder / MANIFEST
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"is no artifact|holds no JSON object"):
        _ = artifact.manifest


@pytest.mark.parametrize("variants", [["cpu"], "cpu"])
def test_a_manifest_of_another_shape(artifact, variants):
    write_json(artifact.folder / MANIFEST, {"variants": variants})
    with pytest.raises(DataError):
        artifact.entry("cpu")


def test_plan(artifact):
    values = {"w": {"mode": "static"}}
    plans = {
        "cpu": {"before": "tidy", "behind": "", "values": values},
        "dsp": 3,
        "npu": {"before": "", "behind": "", "values": ["w"]},
    }
    write_json(artifact.folder / "plan.json", plans)
    assert artifact.plan("cpu") == values
    assert artifact.plan("mobile") == {}
    for name in ("dsp", "npu"):
        with pytest.raises(DataError, match=rf"plan\.json: '{name}' is no JSON object"):
            artifact.plan(name)


def test_a_report_that_does_not_fit_the_schema(artifact):
    with pytest.raises(DataError, match="does not fit the schema"):
        _ = artifact.report


def test_json_is_deterministic(tmp_path):
    write_json(tmp_path / "a", {"b": 1, "a": [0.1, {"d": None, "c": "\u00e9"}]})
    write_json(tmp_path / "b", {"a": [0.1, {"c": "\u00e9", "d": None}], "b": 1})
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes()
    assert first.endswith(b"}\n")
    assert json.loads(first) == {"a": [0.1, {"c": "\u00e9", "d": None}], "b": 1}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_infinity(tmp_path, number):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a", {"a": number})


def test_sha256_reads_in_pieces(tmp_path, monkeypatch):
    import hashlib

    from fourfold.compiler import artifact

    content = bytes(range(256)) * 5
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(artifact, "CHUNK", 100)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_force_keeps_what_a_user_put_into_an_artifact(artifact):
    (artifact.folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"also holds 'notes\.txt'"), fresh(artifact.folder, True):
        raise AssertionError("must not get here")
    assert (artifact.folder / "notes.txt").read_text() == "mine"


def test_the_old_artifact_comes_back_when_the_last_step_fails(artifact, monkeypatch):
    rename = Path.rename

    def failing(path, target):
        if path.name == "build" and path != artifact.folder:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(DataError, match=r"cannot move .* no space"),
        fresh(artifact.folder, force=True) as (build, _),
    ):
        fill(build, "new")
    assert artifact.entry("cpu").read_text() == "weights"
    assert names(artifact.folder.parent) == ["build"]


def test_a_dangling_link_is_in_the_way(tmp_path):
    (tmp_path / "build").symlink_to(tmp_path / "nowhere")
    for force in (False, True):
        with pytest.raises(DataError), fresh(tmp_path / "build", force):
            raise AssertionError("must not get here")
    assert (tmp_path / "build").is_symlink()
