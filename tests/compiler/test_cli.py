"""The command line: every command, its JSON, its silence and its exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import fourfold
from fourfold.compiler import cli
from fourfold.compiler.lookup import names
from fourfold.passes.tidy import Tidy

HOME = Path(fourfold.__path__[0])
DIGITS = HOME / "examples" / "digits"
MODEL, CALIB, CHECK = (str(DIGITS / name) for name in ("digits.onnx", "calib.npz", "check.npz"))

MLP = """<ir_version: 10, opset_import: ["" : 21]>
mlp (float[n,16] x) => (float[n,4] y) {
    [first] h = MatMul (x, w1)
    [bias] s = Add (h, b1)
    [relu] r = Relu (s)
    [second] y = MatMul (r, w2)
}"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Digits, compiled with the defaults."""
    out = tmp_path_factory.mktemp("digits") / "build"
    fourfold.compile(MODEL, out, CALIB, CHECK)
    return str(out)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current directory, with mlp.onnx and feeds.npz."""
    draw = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MLP)
    for name, shape in (("w1", (16, 16)), ("b1", (16,)), ("w2", (16, 4))):
        array = draw.normal(size=shape).astype(np.float32) / 4
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "mlp.onnx")
    np.savez(tmp_path / "feeds.npz", x=draw.normal(size=(20, 16)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys, monkeypatch):
    """`call(*args)`: run the command line in this process; return exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fourfold", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def process(*args, cwd=None):
    """Run the command line in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(HOME.parent), "COLUMNS": "200"}
    command = [sys.executable, "-m", "fourfold.compiler.cli", *map(str, args)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=cwd, timeout=120
    )


def flat(text):
    """Undo the line breaks of a narrow console."""
    return " ".join(text.split())


# In processes of their own


def test_a_process_compiles(tmp_path):
    done = process("compile", MODEL, "-o", tmp_path / "build", "--data", CALIB, "--check", CHECK)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("digits.onnx", "SQNR", "top1", "cpu w8a8", "1 thread", "fourfold explain"):
        assert text in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_a_process_fails_in_one_line(tmp_path):
    done = process("compile", "digit.onnx", "-o", "build", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/digit.onnx: no such file; expected an ONNX model\n"
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['fourfold', '--help']\n"
        "from fourfold.compiler.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HOME.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


# compile


def test_compile_as_json(call, home):
    code, out, err = call("compile", "mlp.onnx", "-o", "build", "--data", "feeds.npz", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((home / "build" / "report.json").read_text())
    assert report["targets"][0]["accuracy"]["sqnr_db"] > 20
    assert report["schema_version"] == 1


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_compile_quietly(call, home, flag):
    shown = call("compile", "mlp.onnx", "-o", "build", "--data", "feeds.npz", flag)
    assert shown == (0, "", "")
    assert (home / "build" / "manifest.json").is_file()


def test_compile_with_every_option(call, home):
    (home / "my_score.py").write_text(
        "def score(outputs, feeds, labels):\n    return outputs['y'].mean()\n"
    )
    options = [
        *("--target", 'cpu{isa="vnni"}', "--data", "feeds.npz", "--check", "feeds.npz"),
        *("--precision", "w4a8", "--ranges", "static", "--metric", "my_score:score"),
        *("--set", "round-weights{clip=mse}"),
        *("--max-drop", "5", "--memory", "1MiB", "--threads", "2", "--seed", "7"),
        *("--stage", "--force", "--json"),
    ]
    code, out, _ = call("compile", "mlp.onnx", "-o", "build", *options)
    report = json.loads(out)
    (row,) = report["targets"]
    assert (code, report["seed"], row["target"]) == (0, 7, 'cpu{isa="vnni"}')
    assert (row["precision"], row["accuracy"]["metric"]) == ("w4a8", "score")
    assert row["latency"][0]["threads"] == 2
    assert "assign-bits{weights=4 activations=" in row["recipe"]
    assert 'round-weights{clip="mse"}' in row["recipe"]
    assert call("compile", "mlp.onnx", "-o", "build", *options)[0] == 0  # --force


def test_compile_with_a_recipe_and_no_check(call, home):
    recipe = "tidy,assign-bits{activations=float},round-weights"
    code, out, _ = call(
        "compile", "mlp.onnx", "-o", "build", "--recipe", recipe, "--no-check", "--json"
    )
    report = json.loads(out)
    assert (code, report["check"], report["targets"][0]["accuracy"]) == (0, None, None)
    code, out, _ = call("inspect", "build")
    assert "NOT CHECKED" in out
    assert "SQNR" not in out


def test_a_missed_budget_shows_the_report(call, home):
    (home / "my_sum.py").write_text("def total(o, f, l):\n    return abs(o['y']).sum()\n")
    args = "compile", "mlp.onnx", "--data", "feeds.npz", "--metric", "my_sum:total"
    budget = "--precision", "w2a8", "--max-drop", "-1e6"
    code, out, err = call(*args, *budget, "-o", "one")
    assert code == 3
    assert err.startswith("error: cpu: total drops by ")
    assert err.count("\n") == 1
    assert "SQNR" in out
    code, out, _ = call(*args, *budget, "-o", "two", "--json")
    assert (code, json.loads(out)["targets"][0]["accuracy"]["metric"]) == (3, "total")
    assert call(*args, *budget, "-o", "three", "--quiet")[:2] == (3, "")


def test_what_the_target_cannot_run(call, home):
    proto = onnx.load("mlp.onnx")
    proto.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    proto.graph.node[2].domain = "my.own"
    onnx.save(proto, "own.onnx")
    code, out, err = call("compile", "own.onnx", "-o", "build", "--data", "feeds.npz")
    assert (code, out) == (4, "")
    assert err == (
        "error: target cpu cannot run own.onnx: node 'relu': onnxruntime has no operator "
        "my.own::Relu\n"
    )
    assert not (home / "build").exists()


def test_a_pass_that_raises(call, home, monkeypatch):
    def run(self, model, context):
        raise ZeroDivisionError("of\ntwo lines")

    monkeypatch.setattr(Tidy, "run", run)
    monkeypatch.setattr("tempfile.tempdir", str(home))
    code, out, err = call("compile", "mlp.onnx", "-o", "build", "--data", "feeds.npz")
    assert (code, out) == (1, "")
    assert err.startswith("error: pass tidy broke the model: ZeroDivisionError: of two lines (rep")
    assert err.count("\n") == 1


def test_verdicts_are_shown(call, home):
    _, out, _ = call("compile", "mlp.onnx", "-o", "build", "--data", "feeds.npz")
    assert "NOT SMALLER than the source" in flat(out)


# run


def test_run(call, artifact, tmp_path):
    code, out, err = call("run", artifact, "--data", CHECK)
    assert (code, err) == (0, "")
    assert out.startswith("logits: float32 [450, 10], mean ")
    written = tmp_path / "outputs"  # numpy would add .npz to a path
    code, out, _ = call("run", artifact, "--data", CHECK, "-o", written, "--json")
    assert (code, json.loads(out)) == (0, {"logits": {"shape": [450, 10], "dtype": "float32"}})
    logits = np.load(written)["logits"]
    assert (logits.argmax(1) == np.load(CHECK)["labels"]).mean() > 0.99


def test_run_prints_types_without_a_mean(call, home):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n,16] x) => (float[n,4] y, bool[n,4] high, float total, string[1] name) {
        y = MatMul (x, w2)
        zero = Constant <value_float = 0.0> ()
        high = Greater (y, zero)
        total = ReduceSum <keepdims = 0> (y)
        name = Constant <value_strings = ["four"]> ()
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.load("mlp.onnx").graph.initializer[2])
    onnx.save(proto, "many.onnx")
    args = "compile", "many.onnx", "-o", "build", "--precision", "w8", "--no-check", "-q"
    assert call(*args)[0] == 0
    code, out, _ = call("run", "build", "--data", "feeds.npz")
    lines = out.splitlines()
    assert code == 0
    assert lines[1].startswith("high: bool [20, 4], mean 0.")
    assert lines[2].startswith("total: float32 [3], mean ")  # one for each batch of eight
    assert lines[3] == "name: object [3]"


# inspect, explain


def test_inspect_a_model(call):
    code, out, _ = call("inspect", MODEL)
    assert code == 0
    for text in ("image: FLOAT [n,1,8,8]", "Conv 6", "quantizable layers 7", "ai.onnx 20"):
        assert text in flat(out)
    code, out, _ = call("inspect", MODEL, "--json")
    facts = json.loads(out)
    assert facts["outputs"] == ["logits: FLOAT [n,10]"]
    assert facts["operators"]["BatchNormalization"] == 6
    assert facts["opsets"] == {"": 20}


def test_inspect_an_artifact(call, artifact):
    code, out, _ = call("inspect", artifact)
    assert code == 0
    assert "same largest class" in out
    code, out, _ = call("inspect", artifact, "--json")
    assert json.loads(out) == json.loads(Path(artifact, "report.json").read_text())


def test_explain(call, artifact):
    code, out, _ = call("explain", artifact)
    assert code == 0
    for text in ("QLinearConv 6", "uint8 per_tensor", "calibrated", "converted from opset"):
        assert text in flat(out)
    code, out, _ = call("explain", artifact, "-t", "cpu", "--json")
    facts = json.loads(out)
    assert facts["plan"] == fourfold.Artifact(Path(artifact)).plan("cpu")
    assert facts["kernels"]["QGemm"] == 1


def test_explain_one_value(call, artifact):
    code, out, _ = call("explain", artifact, "--name", "classify", "--json")
    facts = json.loads(out)
    assert code == 0
    assert list(facts["plan"]) == ["classify.weight"]
    assert facts["remarks"] == []
    _, out, _ = call("explain", artifact, "--name", "classify")
    assert "classify.weight" in flat(out)
    assert "image" not in out


# passes, targets, demo


def test_passes(call):
    code, out, _ = call("passes", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (code, list(rows)) == (0, names("passes"))
    assert rows["calibrate"]["options"]["method"] == "mse"
    assert all(row["summary"] for row in rows.values())
    _, out, _ = call("passes")
    assert "insert-qdq" in out


def test_targets(call):
    code, out, _ = call("targets", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (code, list(rows)) == (0, names("targets"))
    assert rows["cpu"]["options"] == {"isa": "auto"}
    assert rows["cpu"]["install"] is None
    _, out, _ = call("targets")
    assert "isa='auto'" in out


def test_demo(call, home):
    code, out, _ = call("demo")
    assert code == 0
    assert "digits.onnx" in out
    assert (home / "build" / "digits" / "cpu" / "model.onnx").is_file()
    code, out, _ = call("demo", "--precision", "w4a8", "--json")  # in the place of the first
    assert (code, json.loads(out)["targets"][0]["precision"]) == (0, "w4a8")
    assert call("demo", "--quiet", "-o", "other") == (0, "", "")


# What stands around the commands


def test_no_command_shows_the_help(call):
    code, out, err = call()
    assert code == 2
    assert all(name in out + err for name in ("compile", "explain", "demo"))


@pytest.mark.parametrize(
    "command", ["compile", "run", "inspect", "explain", "profile", "passes", "targets", "demo"]
)
def test_every_command_has_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "Usage:" in out


def test_budgets_signals_and_plans_reach_the_compiler(call, tmp_path):
    out = tmp_path / "out"
    code, text, _ = call(
        "compile", MODEL, "-o", out, "--data", CALIB, "--check", CHECK, "--avg-bits", "4.5",
        "--signal", "quantization-error", "--signal", "zd", "--widths", "8,4", "--json",
    )  # fmt: skip
    (row,) = json.loads(text)["targets"]
    assert code == 0
    assert row["precision"] == "auto"
    assert row["decision"]["average_bits"] <= 4.5
    assert row["decision"]["signal"] == "quantization-error"
    code, text, _ = call("explain", out, "--json", "--name", "classify")
    note = json.loads(text)["plan"]["classify.weight"]
    assert set(note["importance"]) == {"quantization-error", "zd"}
    assert {form.split()[0] for form in note["losses"]} == {"int8", "int4"}
    code, text, _ = call("explain", out)
    assert "importance" in text  # a column of its own, since there are two to compare
    again = tmp_path / "again"
    code, text, _ = call(
        "compile", MODEL, "-o", again, "--data", CALIB, "--check", CHECK,
        "--plan", out / "plan.json",
    )  # fmt: skip
    assert code == 0
    assert "average code bits" in text
    assert (again / "cpu/model.onnx").read_bytes() == (out / "cpu/model.onnx").read_bytes()


def shown(text):
    """Return the lines of a report, by the name that each begins with."""
    rows = (re.split(r" {2,}", line.strip()) for line in text.splitlines())
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize(("split", "least", "tables"), [("auto", 4, True), ("branches", 6, False)])
def test_a_split_is_called_by_what_it_stores(split, least, tables, call, tmp_path):
    out = tmp_path / "out"
    compile_ = ("compile", MODEL, "-o", out, "--data", CALIB, "--check", CHECK)
    code, text, error = call(*compile_, "--precision", "w2a8", "--split", split)
    assert (code, error) == (0, "")
    assert "w2a8 in 3 parts" in text
    assert "INT2" not in text.upper()
    lines = shown(text)
    (stored,) = lines["stored bits per weight"]
    total, codes = (float(n) for n in re.match(r"([\d.]+) \(codes ([\d.]+)", stored).groups())
    assert total > codes >= least
    assert ("tables" in stored) == tables
    assert lines["weights in memory"][0].endswith("kB")
    (row,) = json.loads(call("inspect", out, "--json")[1])["targets"]
    assert row["precision"] == "w2a8 in 3 parts"
    assert total == pytest.approx(sum(row["stored_bits"].values()), abs=0.005)
    assert row["weight_memory"] > row["file_bytes"]  # unpacked at load
    code, text, _ = call("explain", out, "--name", "fine")
    assert "dB of the weight" in flat(text)
    assert "INT2" not in text.split("recipe")[0].upper()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "w8a8"), "8-bit weights gain nothing by being split; ask for w2a8"),
        ((), "8-bit weights gain nothing by being split"),
        (("--recipe", "tidy"), "a recipe says all: leave out --split"),
        (("--plan", "plan.json"), "a plan says all: leave out"),
        (("--precision", "w4a8"), "12 code bits a weight are no less than int8 has"),
    ],
)
def test_a_split_beside_what_it_does_not_go_with(options, message, call, home):
    arguments = ("compile", "mlp.onnx", "-o", "build", "--data", "feeds.npz", "--split", "auto")
    code, out, error = call(*arguments, *options)
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (home / "build").exists()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("int8grid", "unknown 'int8grid'; did you mean 'int8-grid'?; expected auto, kmeans"),
        ("auto,3,chanel", "did you mean 'channel'"),
        ("codebook,1", "1 clusters: expected 2..255"),
        ("codebook,300", "300 clusters: expected 2..255"),
        ("codebook,3,channel,levels=999", "999 levels: expected 1..256"),
        ("branches,3,tensor,levels=2", "branches hold zeros"),
        ("codebook", "take int8-grid, or weights only"),
        ("nearest", "the block-wise one reads floats"),
        ("", "expected auto, kmeans, branches"),
    ],
)
def test_a_split_that_there_is_not(split, message, call, home):
    arguments = ("compile", "mlp.onnx", "-o", "build", "--data", "feeds.npz")
    code, out, error = call(*arguments, "--precision", "w2a8", "--split", split)
    assert (code, out) == (2, "")
    assert message in error.replace(" (did", "; did")
    assert error.count("\n") == 1


def test_importance_and_a_split(call, home):
    """Where a few weights lie far out, twelve values serve better than sixteen equal steps."""
    proto, draw = onnx.parser.parse_model(MLP.replace("n,16", "n,128")), np.random.default_rng(3)
    for name, shape in (("w1", (128, 16)), ("b1", (16,)), ("w2", (16, 4))):
        array = draw.normal(size=shape).astype(np.float32)
        array[draw.random(shape) < 0.03] *= 15
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, "wide.onnx")
    np.savez("wide.npz", x=draw.normal(size=(20, 128)).astype(np.float32))
    arguments = ("compile", "wide.onnx", "--data", "wide.npz", "--jobs", "1")
    code, text, error = call(
        *arguments, "-o", "build", "--precision", "auto", "--split", "auto", "--avg-bits", "5",
        "--signal", "quantization-error",
    )  # fmt: skip
    assert (code, error) == (0, "")
    assert "auto in 3 parts" in text
    values = json.loads((home / "build/plan.json").read_text())["cpu"]["values"]
    formats = {name: note.get("format") for name, note in values.items()}
    assert formats["w1"] == "uint2 per_axis(1) split(int8-grid,3,per_tensor)"
    code, _, error = call(*arguments[:4], "-o", "again", "--plan", "build/plan.json")
    assert (code, error) == (0, "")
    files = [home / name / "cpu/model.onnx" for name in ("build", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_missed_size_exits_with_3_and_shows_the_nearest(call, tmp_path):
    arguments = ("compile", MODEL, "-o", tmp_path / "out", "--data", CALIB, "--check", CHECK)
    arguments += ("--signal", "quantization-error", "--jobs", "1")
    code, text, error = call(*arguments, "--max-size", "35kB")
    assert code == 3
    assert "more than the budget of 35000" in error
    assert "average code bits" in text
    code, text, error = call(*arguments, "--max-size", "5kB", "--force")
    assert code == 3
    assert text == ""  # no variant was made, and the older artifact is not shown for it
    assert "5000" in error


def test_sweep_prints_the_front(call, tmp_path):
    out = tmp_path / "front"
    code, text, _ = call(
        "compile", MODEL, "-o", out, "--data", CALIB, "--check", CHECK, "--sweep", "2",
        "--signal", "quantization-error", "--jobs", "1",
    )  # fmt: skip
    assert code == 0
    assert "8.00 bits" in text
    assert "2.00 bits" in text
    assert "front.svg" in text
    assert json.loads((out / "front.json").read_text())["points"][0]["name"] == "source"


def test_profile_prints_ratios(call):
    code, text, _ = call("profile", MODEL)
    assert code == 0
    assert "Gemm" in text
    assert "int8" in text
    code, text, _ = call("profile", MODEL, "--json")
    assert code == 0
    assert json.loads(text)["runtime"].startswith("onnxruntime ")
    code, _, error = call("profile", "no.onnx")
    assert code == 2
    assert "no.onnx" in error
