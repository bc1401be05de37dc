"""Whatever is wrong with the input, one line says so, and nothing is left or overwritten."""

import pickle
import re
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import fourfold
from fourfold.compiler.cli import main
from fourfold.compiler.errors import DataError, FourfoldError, ModelError, RecipeError

WEIGHT = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(12, 8)).astype(np.float32)


def proto(weight=WEIGHT, nodes=None, opset=21, inputs=(("x", TensorProto.FLOAT, ["n", 8]),)):
    """x -> MatMul -> y."""
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"], name="first")],
        "g",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current directory: model.onnx, and calib.npz that fits it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of the modules that rows import
    onnx.save(proto(), tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=X)
    return tmp_path


def listing(folder):
    """Return path -> content of everything in a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            str(path.readlink()) if path.is_symlink() else path.is_file() and path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
    }


def refused(capfd, monkeypatch, args):
    """Run the command line; return the exit code and the one line that it prints."""
    monkeypatch.setattr(sys, "argv", ["fourfold", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert not err.rstrip("\n").endswith(".")
    return stop.value.code, err


# A row: what it is called, what is written into the folder or given as arguments (model.onnx,
# --data calib.npz and -o build unless it says otherwise), and what the line must say.

MODELS = {
    "text": (b"hello, this is a text and no protobuf at all", "not an ONNX model"),
    "empty": (b"", "holds no graph"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "not an ONNX model"),
    "cut off": (proto().SerializeToString()[:-30], "not an ONNX model, or cut off"),
    "old opset": (proto(opset=7), r"opset 7: expected 11\.\..*version_converter"),
    "new opset": (proto(opset=99), "opset 99: .*install a newer onnx"),
    "cycle": (
        proto(
            nodes=[
                helper.make_node("Add", ["x", "b"], ["a"], name="one"),
                helper.make_node("Relu", ["a"], ["b"], name="two"),
                helper.make_node("MatMul", ["b", "w"], ["y"], name="three"),
            ]
        ),
        r"cycle through the nodes .*'one' \(Add\)",
    ),
    "nan": (
        proto(np.where(np.arange(32).reshape(8, 4) == 9, np.nan, WEIGHT)),
        r"initializer 'w' holds 1 NaN and 0 infinite of 32 elements, the first at \[2, 1\]",
    ),
    "inf": (proto(np.where(WEIGHT > 0, np.inf, WEIGHT)), r"'w' holds 0 NaN and \d+ infinite"),
    "no elements": (
        proto(np.zeros((0, 4), np.float32), inputs=(("x", TensorProto.FLOAT, ["n", 0]),)),
        "weights without elements: w",
    ),
    "types": (proto(WEIGHT.astype(np.int64)), "not a sound ONNX model"),
    "shapes": (proto(WEIGHT[:5]), "not a sound ONNX model"),
    "unknown operator": (
        proto(nodes=[helper.make_node("MatMull", ["x", "w"], ["y"])]),
        "not a sound ONNX model: .*MatMull",
    ),
    "read, never made": (
        proto(nodes=[helper.make_node("MatMul", ["z", "w"], ["y"])]),
        "not a sound ONNX model.*z",
    ),
    "made twice": (
        proto(nodes=[helper.make_node("MatMul", ["x", "w"], ["y"])] * 2),
        "not a sound ONNX model",
    ),
    "input of no rank": (
        proto(inputs=[("x", TensorProto.FLOAT, None)]),
        "field 'shape' of 'type' is required but missing",
    ),
}


@pytest.mark.parametrize("row", MODELS)
def test_models(row, home, capfd, monkeypatch):
    content, said = MODELS[row]
    if not isinstance(content, bytes):
        content = content.SerializeToString()
    (home / "model.onnx").write_bytes(content)
    before = listing(home)
    code, line = refused(
        capfd, monkeypatch, ["compile", "model.onnx", "-o", "build", "--data", "calib.npz"]
    )
    assert code == 2
    assert re.search(said, line, re.IGNORECASE), line
    assert listing(home) == before


EXTERNAL = {
    "missing": ("weights.bin", None, "cannot be opened: .*weights.bin: no such file"),
    "escaping": ("../../secret", None, "outside the model's folder"),
    "absolute": ("/etc/passwd", None, "outside the model's folder"),
    "short": ("weights.bin", b"\0" * 100, "cut off: expected 128 bytes .* got 100"),
    "linked": ("weights.bin", "../secret", "is a link to .*--stage"),
}


@pytest.mark.parametrize("row", EXTERNAL)
def test_external_data(row, home, capfd, monkeypatch):
    location, content, said = EXTERNAL[row]
    model = home / "inner" / "model.onnx"
    model.parent.mkdir()
    (home / "secret").write_bytes(WEIGHT.tobytes())
    big = proto()
    onnx.save(big, model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (model.parent / "weights.bin").unlink()
    entry = next(e for e in big.graph.initializer[0].external_data if e.key == "location")
    entry.value = location
    model.write_bytes(big.SerializeToString())
    if isinstance(content, str):
        (model.parent / "weights.bin").symlink_to(content)
    elif content is not None:
        (model.parent / "weights.bin").write_bytes(content)
    before = listing(home)
    code, line = refused(
        capfd, monkeypatch, ["compile", model, "-o", "build", "--data", "calib.npz"]
    )
    assert code == 2
    assert re.search(said, line), line
    assert listing(home) == before


FEEDS = {
    "names": ({"X": X}, "the model has no input 'X'; known: x"),
    "more names": ({"x": X, "mask": X}, "the model has no input 'mask'"),
    "no arrays": ({}, "no array for input 'x'"),
    "labels alone": ({"labels": np.zeros(12)}, "no array for input 'x'"),
    "shape": ({"x": X[:, :7]}, r"expects float32\[n,8\], got float32\[12, 7\]"),
    "rank": ({"x": X[0]}, r"expects float32\[n,8\], got float32\[8\]"),
    "dtype": (
        {"x": X.astype(np.float64)},
        r"expects float32\[n,8\], got float64\[12, 8\]; cast it",
    ),
    "no samples": ({"x": X[:0]}, "holds no samples"),
    "number of labels": ({"x": X, "labels": np.zeros(11)}, r"labels of shape \[11\] for 12"),
    "nan": ({"x": np.where(X > 1, np.nan, X)}, r"(?i)nan|not finite"),
    "pickled": (b"\x80" + pickle.dumps([X])[1:], "pickled objects, which are refused"),
    "text": (b"1,2,3\n", "calib.npz: .*(not a readable numpy file|refused)"),
    "empty file": (b"", "not a readable numpy file"),
}


@pytest.mark.parametrize("row", FEEDS)
@pytest.mark.parametrize("option", ["--data", "--check"])
def test_feeds(row, option, home, capfd, monkeypatch):
    content, said = FEEDS[row]
    if isinstance(content, bytes):
        (home / "bad.npz").write_bytes(content)
    else:
        np.savez(home / "bad.npz", **content)
    (home / "bad.npz").rename(home / "calib.npz")
    np.savez(home / "good.npz", x=X)
    before = listing(home)
    given = {"--data": "good.npz", "--check": "good.npz", option: "calib.npz"}
    extra = [text for pair in given.items() for text in pair]
    code, line = refused(capfd, monkeypatch, ["compile", "model.onnx", "-o", "build", *extra])
    assert code == 2
    assert re.search(said, line), line
    assert listing(home) == before


def in_use(home):
    (home / "build").mkdir()
    (home / "build" / "thesis.txt").write_text("years of work")


def in_use_with_a_manifest(home):
    in_use(home)
    (home / "build" / "manifest.json").write_text('{"name": "a web page", "icons": []}')


def used_artifact(home):
    fourfold.compile("model.onnx", "build", "calib.npz", check=False)
    (home / "build" / "results.csv").write_text("1,2,3")


def file_above(home):
    (home / "file").write_text("content")


def link(home):
    (home / "build").symlink_to("nowhere")


def module(home):
    (home / "bad_module.py").write_text(
        "def broken():\n    raise KeyError('a\\nb')\n"
        "def nothing():\n    return None\n"
        "def nan(outputs, feeds, labels):\n    return float('nan')\n"
        "number = 3\n"
    )


def recipes(home):
    (home / "syntax.toml").write_text("[[pass]\nname = 1")
    (home / "keys.toml").write_text("[passes]\n")
    (home / "nameless.toml").write_text("[[pass]]\nmethod = 'mse'\n")
    (home / "bytes.toml").write_bytes(b"\xff\xfe\x00")


def nothing(home):
    pass


# name: (what to prepare, options beside `compile model.onnx -o build --data calib.npz`, the line)
OPTIONS = {
    "missing data": (nothing, ["--data", "calibb.npz"], r"calibb.npz: no such file or folder"),
    "data of no kind": (nothing, ["--data", "model.onnx"], r"expected \.npz, \.npy or a folder"),
    "module raises": (module, ["--data", "bad_module:broken"], "broken raised KeyError"),
    "module of nothing": (module, ["--data", "bad_module:nothing"], "feeds from a NoneType"),
    "no module": (module, ["--data", "bad_modul:f"], "no module .*did you mean 'bad_module'"),
    "folder": (in_use, [], "the output folder .*build exists; .*--force"),
    "foreign folder": (in_use, ["--force"], "no artifact of this tool; it will not be replaced"),
    "foreign manifest": (in_use_with_a_manifest, ["--force"], "no artifact of this tool"),
    "own file": (used_artifact, ["--force"], "also holds 'results.csv'.*move it elsewhere"),
    "file above": (file_above, ["-o", "file/build"], "cannot write to .*file/build: not a dir"),
    "file as folder": (file_above, ["-o", "file", "--force"], "no artifact of this tool"),
    "link": (link, [], "exists"),
    "long name": (nothing, ["-o", "x" * 300], "cannot write to .*name too long"),
    "target": (nothing, ["-t", "cpuu"], "unknown target 'cpuu'; did you mean 'cpu'"),
    "target option": (nothing, ["-t", "cpu{isaa=avx2}"], "no option 'isaa'; did you mean 'isa'"),
    "target value": (nothing, ["-t", "cpu{isa=z80}"], "option isa = 'z80'"),
    "target syntax": (nothing, ["-t", "cpu{"], "character 5: expected 'key=value' or '}'"),
    "targets at once": (nothing, ["-t", "cpu,cpu"], "expected one target, .* repeat the option"),
    "target twice": (nothing, ["-t", "cpu", "-t", "cpu"], "name each target once"),
    "precision": (nothing, ["--precision", "int8"], "unknown precision 'int8': expected .*w8a8"),
    "wide precision": (nothing, ["--precision", "w16a16"], "unknown precision 'w16a16'"),
    "ranges": (nothing, ["--ranges", "sometimes"], "option ranges = 'sometimes': .*'auto'"),
    "pass": (nothing, ["--recipe", "tidy,calibrat"], "'calibrat'; did you mean 'calibrate'"),
    "pass option": (nothing, ["--recipe", "calibrate{methd=mse}"], "did you mean 'method'"),
    "pass value": (nothing, ["--recipe", "calibrate{method=best}"], "option method = 'best'"),
    "pass number": (nothing, ["--recipe", "assign-bits{weights=9}"], "less than or equal to 8"),
    "recipe syntax": (nothing, ["--recipe", "tidy,,tidy"], "character 6: expected a pass"),
    "option twice": (nothing, ["--recipe", "tidy{opset=21 opset=22}"], "'opset' is given twice"),
    "empty recipe": (nothing, ["--recipe", ""], "character 1: expected a pass"),
    "keep": (nothing, ["--recipe", 'assign-bits{keep=["conv9"]}'], "matches no node name, e.g."),
    "keep syntax": (nothing, ["--recipe", 'assign-bits{keep=["("]}'], "is no expression"),
    "toml": (recipes, ["--recipe", "syntax.toml"], "the recipe is not TOML"),
    "toml keys": (recipes, ["--recipe", "keys.toml"], r"holds \[\[pass\]\] tables"),
    "toml name": (recipes, ["--recipe", "nameless.toml"], "number 1 has no name"),
    "toml bytes": (recipes, ["--recipe", "bytes.toml"], "cannot read the recipe bytes.toml"),
    "no toml": (recipes, ["--recipe", "none.toml"], "cannot read the recipe none.toml.*No such"),
    "memory": (nothing, ["--memory", "lots"], "not an amount of bytes: 'lots'; expected e.g."),
    "no memory": (nothing, ["--memory", "0"], "not an amount of bytes"),
    "memory unit": (nothing, ["--memory", "5parsec"], "not an amount of bytes"),
    "negative memory": (nothing, ["--memory=-1GB"], "not an amount of bytes"),
    "infinite memory": (nothing, ["--memory", "inf"], "not an amount of bytes"),
    "memory of nan": (nothing, ["--memory", "nan"], "not an amount of bytes"),
    "metric": (nothing, ["--metric", "top5"], "unknown metric 'top5'; expected top1 or"),
    "metric's module": (module, ["--metric", "bad_module:accuracy"], "has no 'accuracy'"),
    "metric of no kind": (module, ["--metric", "bad_module:number"], "is a int; expected a func"),
    "metric raises": (module, ["--metric", "bad_module:broken"], "broken failed: TypeError"),
    "metric of nan": (module, ["--metric", "bad_module:nan"], "returned nan; expected a finite"),
    "top1 without labels": (nothing, ["--metric", "top1"], "top1 needs labels"),
    "budget without metric": (nothing, ["--max-drop", "1"], "--max-drop needs a metric"),
    "budget of nan": (nothing, ["--max-drop", "nan"], "option max_drop = nan"),
    "budget unchecked": (nothing, ["--max-drop", "1", "--no-check"], "leave out --no-check"),
}  # fmt: skip


@pytest.mark.parametrize("row", OPTIONS)
def test_options(row, home, capfd, monkeypatch):
    prepare, options, said = OPTIONS[row]
    prepare(home)
    before = listing(home)
    usual = ["compile", "model.onnx", "-o", "build", "--data", "calib.npz"]
    code, line = refused(capfd, monkeypatch, [*usual, *options])
    assert code == 2
    assert re.search(said, line), line
    assert listing(home) == before


# name: (what to prepare, all arguments, the line)
COMMANDS = {
    "no feeds": (nothing, ["compile", "model.onnx", "-o", "out"], "no calibration feeds; .*--d"),
    "no model": (nothing, ["compile", "modle.onnx", "-o", "out"], "modle.onnx: no such file"),
    "folder": (in_use, ["compile", "build", "-o", "out"], "build: is a folder"),
    "module": (module, ["compile", "bad_module:broken", "-o", "out"], "raised KeyError: 'a"),
    "module of nothing": (module, ["compile", "bad_module:nothing", "-o", "o"], "a NoneType: exp"),
    "no function": (module, ["compile", "bad_module:brokn", "-o", "o"], "did you mean 'broken'"),
    "inspect nothing": (nothing, ["inspect", "none.onnx"], "none.onnx: no such file"),
    "inspect a folder": (in_use, ["inspect", "build"], "build is no artifact: "),
    "inspect feeds": (nothing, ["inspect", "calib.npz"], "not an ONNX model"),
    "explain nothing": (nothing, ["explain", "none"], "none is no artifact"),
    "explain a target": (used_artifact, ["explain", "build", "-t", "dsp"], "no variant for 'dsp'"),
    "run nothing": (nothing, ["run", "none", "--data", "calib.npz"], "none is no artifact"),
    "run over a file": (
        used_artifact,
        ["run", "build", "--data", "calib.npz", "-o", "calib.npz"],
        "calib.npz exists; choose another file",
    ),
    "run into nowhere": (
        used_artifact,
        ["run", "build", "--data", "calib.npz", "-o", "none/out.npz"],
        "cannot write none/out.npz",
    ),
    "run on nothing": (used_artifact, ["run", "build", "--data", "none"], "no such file or"),
    "run elsewhere": (
        used_artifact,
        ["run", "build", "--data", "calib.npz", "-t", "cpuu"],
        "unknown target 'cpuu'",
    ),
    "demo over files": (in_use, ["demo", "-o", "build"], "no artifact of this tool"),
}  # fmt: skip


@pytest.mark.parametrize("row", COMMANDS)
def test_commands(row, home, capfd, monkeypatch):
    prepare, args, said = COMMANDS[row]
    prepare(home)
    before = listing(home)
    code, line = refused(capfd, monkeypatch, args)
    assert code == 2
    assert re.search(said, line), line
    assert listing(home) == before


def external_proto():
    """A proto whose weights lie in a file that it does not say where to find."""
    given = proto()
    tensor = given.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="calib.npz")
    return given


def failing(batches):
    yield from batches
    raise OSError("the disk went away")


# name: (what differs from compile(proto(), "build", {"x": X}), the error, what it says)
CALLS = {
    "a number": ({"model": 3}, ModelError, "cannot compile a int: expected a path"),
    "an empty proto": ({"model": onnx.ModelProto()}, ModelError, "sound|graph"),
    "a proto's files": ({"model": external_proto()}, ModelError, "keeps 'w' in the file"),
    "feeds of no kind": ({"data": 3}, DataError, "cannot read feeds from a int"),
    "feeds of lists": ({"data": [[1, 2]]}, DataError, "expected a dict of arrays, got a list"),
    "feeds of nothing": ({"data": []}, DataError, "hold no samples; give at least one"),
    "feeds that raise": (
        {"data": failing([{"x": X}])},
        DataError,
        "feeds raised OSError after batch 1: the disk went away",
    ),
    "check feeds": ({"check_data": {"x": X[:, :1]}}, DataError, r"expects float32\[n,8\]"),
    "option": ({"precison": "w8a8"}, RecipeError, "'precison'; did you mean 'precision'"),
    "targets": ({"targets": "cpu"}, RecipeError, "option targets = 'cpu': .* tuple"),
    "no targets": ({"targets": ()}, RecipeError, "name each target once, at least one"),
    "precision": ({"precision": 8}, RecipeError, "option precision = 8: .*string"),
    "recipe": ({"recipe": 8}, RecipeError, "option recipe = 8"),
    "memory": ({"memory": 0}, RecipeError, "option memory = 0: .*greater than or equal to 1"),
    "threads": ({"threads": 0}, RecipeError, "option threads = 0"),
    "seed": ({"seed": -1}, RecipeError, "option seed = -1"),
    "metric": ({"metric": 3}, RecipeError, "option metric = 3"),
    "labels": (
        {"check_data": {"x": X, "labels": np.zeros((12, 1))}},
        DataError,
        r"expects outputs .* and labels \[samples\], got \[12, 4\] and \[12, 1\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", CALLS)
def test_calls(row, home):
    changes, kind, said = CALLS[row]
    before = listing(home)
    arguments = {"model": proto(), "out": "build", "data": {"x": X}} | changes
    with pytest.raises(kind, match=said) as error:
        fourfold.compile(**arguments)
    assert error.value.exit_code == 2
    assert isinstance(error.value, FourfoldError)
    assert listing(home) == before


def test_feeds_that_only_the_runtime_can_refuse(home):
    """The shape fits what the input declares, and a Reshape inside refuses it."""
    text = """<ir_version: 9, opset_import: ["" : 21]>
    g (float[n,m] x) => (float[k,4] y) <int64[2] shape = {-1, 8}> {
        r = Reshape (x, shape)
        y = MatMul (r, w)
    }"""
    before = listing(home)
    for options in ({"precision": "w8"}, {"precision": "w8a8"}):
        model = ir.from_onnx_text(text, initializers=[ir.tensor(WEIGHT, name="w")])
        with pytest.raises(DataError, match=r"cannot run the model on these feeds: .*reshape"):
            fourfold.compile(model, "build", {"x": X[:3, :5]}, **options)
        assert listing(home) == before


@pytest.mark.parametrize(
    "args",
    [
        ["compile"],
        ["compile", "model.onnx"],
        ["compile", "model.onnx", "-o", "build", "--threads", "0"],
        ["compile", "model.onnx", "-o", "build", "--seed", "-1"],
        ["compile", "model.onnx", "-o", "build", "--max-drop", "much"],
        ["compile", "model.onnx", "-o", "build", "--bogus"],
        ["comple"],
        ["run", "build"],
    ],
)
def test_usage(args, home, capfd, monkeypatch):
    before = listing(home)
    monkeypatch.setattr(sys, "argv", ["fourfold", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    assert "Usage:" in err
    assert listing(home) == before


def test_the_parents_of_the_folder_are_not_left(home):
    before = listing(home)
    with pytest.raises(RecipeError, match="no calibration feeds"):
        fourfold.compile("model.onnx", "a/b/build")
    assert listing(home) == before
    fourfold.compile("model.onnx", "a/b/build", "calib.npz", check=False)
    assert sorted(path.name for path in home.iterdir()) == ["a", "calib.npz", "model.onnx"]
    assert [path.name for path in (home / "a" / "b").iterdir()] == ["build"]


def test_force_replaces_an_artifact(home):
    first = fourfold.compile("model.onnx", "build", "calib.npz", check=False).manifest
    again = fourfold.compile("model.onnx", "build", "calib.npz", precision="w4a8", check=False,
                             force=True)  # fmt: skip
    assert again.manifest["files"] != first["files"]
    assert sorted(path.name for path in home.iterdir()) == ["build", "calib.npz", "model.onnx"]


def test_an_older_artifact_stays_when_the_new_one_fails(home):
    fourfold.compile("model.onnx", "build", "calib.npz", check=False)
    before = listing(home)
    with pytest.raises(RecipeError):
        fourfold.compile("model.onnx", "build", force=True)
    assert listing(home) == before
