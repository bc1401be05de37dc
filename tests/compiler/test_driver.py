"""End to end: digits and small models go in, artifacts come out."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import fourfold
from fourfold.compiler.contract import Context, Decision
from fourfold.compiler.errors import BrokenPassError, BudgetError, RecipeError, UnsupportedError
from fourfold.compiler.graph import values, weights_of
from fourfold.compiler.model import load, save
from fourfold.compiler.notes import Note
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.compiler.saved_plan import SavedPlan
from fourfold.passes.tidy import Tidy
from fourfold.targets.cpu import Cpu

HOME = Path(fourfold.__path__[0])
DIGITS = HOME / "examples" / "digits"
MODEL, CALIB, CHECK = DIGITS / "digits.onnx", DIGITS / "calib.npz", DIGITS / "check.npz"

MLP = """<ir_version: 9, opset_import: ["" : {opset}]>
mlp ({kind}[n,16] x) => ({kind}[n,4] y) {{
    h = MatMul (x, w1)
    s = Add (h, b1)
    r = Relu (s)
    y = MatMul (r, w2)
}}"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """`digits(precision)`: the artifact of a compile with data and check data, made once."""
    made = {}

    def build(precision="w8a8"):
        if precision not in made:
            out = tmp_path_factory.mktemp("digits") / "build"
            made[precision] = fourfold.compile(MODEL, out, CALIB, CHECK, precision=precision)
        return made[precision]

    return build


@pytest.fixture
def out(tmp_path):
    return tmp_path / "build"


def row(artifact):
    (report,) = artifact.report.targets
    return report


def contents(artifact):
    """Every file of an artifact but the report, whose times differ."""
    files = [p for p in artifact.folder.rglob("*") if p.is_file() and p.name != "report.json"]
    assert len(files) == 4
    return {p.relative_to(artifact.folder).as_posix(): p.read_bytes() for p in files}


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def samples(count=40, width=16, seed=1):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def proto_of(kind="float", opset=21):
    """x -> MatMul -> Add -> Relu -> MatMul -> y, with weights of the same type as x."""
    proto = onnx.parser.parse_model(MLP.format(kind=kind, opset=opset))
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    for name, shape in (("w1", (16, 16)), ("b1", (16,)), ("w2", (16, 4))):
        array = np.random.default_rng(len(shape)).normal(size=shape) / 4
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(dtype), name))
    return proto


def interface(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [(v.name, v.type, v.shape) for v in (*session.get_inputs(), *session.get_outputs())]


@pytest.mark.parametrize(
    ("precision", "decibel", "bits"),
    [("w8a8", 35, 8), ("w4a8", 15, 4), ("w2a8", 0, 2), ("w8", 35, 8), ("w4", 15, 4)],
)
def test_figures_of_digits(digits, precision, decibel, bits):
    artifact = digits(precision)
    report, one = artifact.report, row(artifact)
    assert one.accuracy.sqnr_db > decibel
    assert bits < one.stored_bits.total < bits + 0.2
    assert one.stored_bits.codes == bits
    assert (one.weight_memory < 120_000) == ("a" in precision)  # 110,000 weights
    assert one.file_bytes == (artifact.entry("cpu")).stat().st_size < MODEL.stat().st_size
    assert (one.accuracy.metric, one.accuracy.source_score) == ("top1", 100)
    assert one.accuracy.drop == pytest.approx(100 - one.accuracy.variant_score)
    assert [latency.batch for latency in one.latency] == [1, 8]
    assert all(latency.ratio > 0 and latency.threads == 1 for latency in one.latency)
    if precision.endswith("a8"):
        assert one.kernels["QLinearConv"] == 6
        assert one.kernels["QGemm"] == 1
        assert one.stayed_float == {}
        assert report.calibration.samples == 300
    else:
        assert one.kernels["Conv"] == 6
        assert len(one.stayed_float) == 7
    assert (report.check.samples, report.check.held_out, report.check.made_up) == (
        450,
        True,
        False,
    )
    assert (report.source.nodes, report.source.opset) == (24, 20)
    assert one.precision == precision


def test_fewer_bits_are_further_from_the_source(digits):
    eight, four, two = (row(digits(p)).accuracy.sqnr_db for p in ("w8a8", "w4a8", "w2a8"))
    assert eight > 30 > four > two


def test_a_variant_far_from_its_source_is_called_so(digits, out):
    far = row(fourfold.compile(MODEL, out, CALIB, CHECK, precision="w2a8", effort=0))
    assert any("FAR from the source" in line for line in far.verdict)
    assert not any("FAR" in line for line in row(digits()).verdict)


def test_the_manifest(digits):
    artifact = digits()
    manifest = artifact.manifest
    assert set(manifest["files"]) == {"cpu/model.onnx", "cpu/recipe.toml", "plan.json"}
    for name, digest in manifest["files"].items():
        assert sha256(artifact.folder / name) == digest
    assert manifest["source"] == {"name": "digits.onnx", "sha256": sha256(MODEL)}
    assert manifest["calibration"] == artifact.report.calibration.sha256
    assert manifest["variants"] == {"cpu": "cpu/model.onnx"}
    names = {path.name for path in artifact.folder.iterdir()}
    assert names == {"cpu", "manifest.json", "plan.json", "report.json"}
    assert manifest["versions"]["onnxruntime"] == onnxruntime.__version__


def test_the_plan_is_in_graph_order(digits):
    artifact = digits()
    plan = artifact.plan("cpu")
    saved = SavedPlan.read(artifact.folder / "plan.json", "cpu")
    assert saved.values == plan
    # Weights have the names that they had when their form was decided: behind the exact rewrites.
    exact = Recipe.parse("widen-floats,tidy,fold-batchnorm")
    assert saved.before.passes[:3] == exact.passes
    model, _ = run(exact, load(MODEL), Context(Cpu().capability, artifact.folder))
    order = [v.name for v in values(model)]
    assert set(plan) <= set(order)
    assert list(plan) == sorted(plan, key=order.index)
    notes = {name: Note.from_json(fields) for name, fields in plan.items()}
    weights = {v.name for v in weights_of(model)}
    assert {n for n, note in notes.items() if str(note.format).startswith("int8 ")} == weights
    assert sum(str(n.format).startswith("int8 per_axis") for n in notes.values()) == 7
    assert {notes[name].activation for name in weights} == {notes["image"].format.dtype}
    image = notes["image"]
    assert (str(image.format), image.mode, image.low) == ("uint8 per_tensor", "static", 0)
    assert all(note.why for note in notes.values())


@pytest.mark.parametrize("precision", ["w8a8", "w2a8", "w4"])
def test_the_recipe_parses_back(digits, precision):
    artifact = digits(precision)
    written = Recipe.from_toml((artifact.folder / "cpu" / "recipe.toml").read_text())
    assert written == Recipe.parse(row(artifact).recipe)


def test_a_recipe_of_ones_own(out, tmp_path):
    feeds = {"x": samples()}
    usual = fourfold.compile(proto_of(), out, feeds, precision="w4a8", check=False)
    recipe = Recipe.parse(row(usual).recipe)
    (tmp_path / "own.toml").write_text(recipe.to_toml())
    forms = [str(recipe), str(tmp_path / "own.toml"), tmp_path / "own.toml", recipe]
    for number, form in enumerate(forms):
        made = fourfold.compile(proto_of(), f"{out}{number}", feeds, recipe=form, check=False)
        assert contents(made) == contents(usual)
        assert (row(usual).precision, row(made).precision) == ("w4a8", "by recipe")


def test_a_recipe_without_ranges_says_so(out):
    recipe = "widen-floats,tidy,fold-batchnorm,assign-bits,insert-qdq,round-weights"
    one = row(fourfold.compile(MODEL, out, CALIB, recipe=recipe))
    reasons = [(r.subject, r.reason) for r in one.remarks if r.source == "assign-bits"]
    assert ("image", "stays float: it has no calibrated range and no dynamic form") in reasons
    assert "QLinearConv" not in one.kernels


def test_dynamic_ranges_need_no_data(out):
    one = row(fourfold.compile(proto_of(), out, ranges="dynamic"))
    assert one.kernels["DynamicQuantizeMatMul"] == 2
    assert one.accuracy.sqnr_db > 25
    assert one.stayed_float == {}


def test_what_stays_float_at_run_time_is_told(out):
    proto = proto_of()
    del proto.graph.node[1]  # the Add
    proto.graph.node[1].input[0] = "h"
    one = row(fourfold.compile(proto, out, ranges="dynamic"))
    assert ("MatMul" in one.kernels) == bool(one.stayed_float)


def test_dynamic_ranges_of_digits_leave_convolutions_in_float(out):
    artifact = fourfold.compile(MODEL, out, ranges="dynamic")
    one = row(artifact)
    assert artifact.report.check.made_up
    assert "QLinearConv" not in one.kernels
    assert one.stayed_float
    assert any("no dynamic form" in remark.reason for remark in one.remarks)


# Forms of the model


def from_module():
    """What `module:function` finds."""
    return proto_of()


def test_forms_of_the_model(out, tmp_path, monkeypatch):
    proto = proto_of()
    onnx.save(proto, tmp_path / "own.onnx")
    (tmp_path / "my_models.py").write_text(
        "import onnx\ndef mlp():\n    return onnx.load('own.onnx')\n"
    )
    monkeypatch.chdir(tmp_path)
    forms = ["own.onnx", tmp_path / "own.onnx", proto, ir.from_proto(proto), "my_models:mlp"]
    made = [
        fourfold.compile(form, f"{out}{i}", {"x": samples()}, check=False)
        for i, form in enumerate(forms)
    ]
    names = [one.report.source.name for one in made]
    assert names == ["own.onnx", "own.onnx", "model", "model", "my_models:mlp"]
    assert len({one.entry("cpu").read_bytes() for one in made}) == 1


@pytest.mark.torch
def test_a_torch_module(out, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    (tmp_path / "my_torch.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    layers = torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)\n"
        "    n = torch.export.Dim('n')\n"
        "    return torch.nn.Sequential(*layers), (torch.zeros(2, 16),), ({0: n},)\n"
    )
    monkeypatch.chdir(tmp_path)
    artifact = fourfold.compile("my_torch:net", out, [{"input": samples()}])
    assert artifact.report.source.name == "my_torch:net"
    assert row(artifact).accuracy.sqnr_db > 25
    assert row(artifact).stayed_float == {}


def test_the_callers_model_is_not_touched(out):
    model = load(MODEL)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    metas = [dict(value.meta) for value in values(model)]
    fourfold.compile(model, out, CALIB, check=False)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert [dict(value.meta) for value in values(model)] == metas


def test_the_feeds_dict_is_not_touched(out):
    feeds = {"x": samples()}
    before = feeds["x"].copy()
    fourfold.compile(proto_of(), out, feeds)
    assert list(feeds) == ["x"]
    np.testing.assert_array_equal(feeds["x"], before)


# Feeds that check


def test_every_fifth_sample_is_held_out(out):
    report = fourfold.compile(MODEL, out, CALIB).report
    assert (report.calibration.samples, report.check.samples) == (240, 60)
    assert report.check.held_out
    assert report.calibration.sha256 != report.check.sha256


def test_too_few_samples_to_hold_some_out(out):
    report = fourfold.compile(proto_of(), out, {"x": samples(4)}).report
    assert (report.calibration.samples, report.check.samples) == (4, 4)
    assert not report.check.held_out
    assert report.calibration.sha256 == report.check.sha256


def test_without_data_the_check_is_made_up(out):
    report = fourfold.compile(proto_of(), out, precision="w8").report
    assert report.calibration is None
    assert (report.check.samples, report.check.made_up) == (8, True)


def test_without_a_check(out):
    report = fourfold.compile(proto_of(), out, {"x": samples()}, check=False).report
    assert report.check is None
    assert report.calibration.samples == 40  # none is held out
    assert report.targets[0].accuracy is None
    assert report.targets[0].latency == ()


def perplexity(outputs, feeds, labels):
    assert labels is None
    assert outputs["y"].shape == (10, 4)
    assert feeds["x"].shape == (10, 16)
    return float(np.exp(outputs["y"]).mean())


perplexity.lower_is_better = True


def higher(outputs, feeds, labels):
    return float(np.exp(outputs["y"]).mean())


def test_the_direction_of_a_metric(out):
    feeds = {"x": samples()}, {"x": samples(10, seed=2)}
    low = row(fourfold.compile(proto_of(), f"{out}1", *feeds, metric=perplexity)).accuracy
    high = row(fourfold.compile(proto_of(), f"{out}2", *feeds, metric=higher)).accuracy
    assert (low.metric, high.metric) == ("perplexity", "higher")
    assert low.drop == pytest.approx(low.variant_score - low.source_score)
    assert low.drop == -high.drop != 0


def test_a_budget_that_is_met(out):
    artifact = fourfold.compile(MODEL, out, CALIB, CHECK, precision="w8a8", max_drop=1.0)
    assert row(artifact).accuracy.drop <= 1.0
    assert row(artifact).decision == Decision("uniform", 8.0)


@pytest.mark.parametrize("asked", [{"precision": "w4"}, {"average_bits": 5.0, "widths": (8, 4)}])
def test_passes_get_the_options_that_were_set(asked, out):
    options = {"check": False, "jobs": 1, "set": "round-weights{clip=minmax}"}
    made = fourfold.compile(MODEL, out, CALIB, **asked, **options)
    assert 'round-weights{clip="minmax"}' in row(made).recipe


def test_a_budget_without_a_precision_opens_the_widths(digits, out, tmp_path, monkeypatch):
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    artifact = fourfold.compile(MODEL, out, CALIB, CHECK, max_drop=1.0)
    one = row(artifact)
    assert one.precision == "auto"
    assert one.accuracy.drop <= 1.0
    assert one.decision.method == "milp"
    assert 2 <= one.decision.average_bits < 8
    assert one.file_bytes < row(digits()).file_bytes


def test_a_budget_that_is_missed_leaves_the_artifact(out):
    with pytest.raises(
        BudgetError, match=r"top1 drops by \d+\.\d+, .* more than the budget of 1;"
    ):
        fourfold.compile(MODEL, out, CALIB, CHECK, precision="w2a8", effort=0, max_drop=1.0)
    artifact = fourfold.Artifact(out)
    assert row(artifact).accuracy.drop > 1
    assert artifact.entry("cpu").is_file()
    assert BudgetError.exit_code == 3


# The same input gives the same files


def test_two_compiles_are_alike(digits, out):
    again = fourfold.compile(MODEL, out, CALIB, CHECK)
    assert contents(again) == contents(digits())


def test_the_split_of_the_feeds_does_not_matter(out):
    x = samples()
    parts = [{"x": part} for part in np.split(x, [1, 7, 20, 39])]
    forms = [{"x": x}, parts, iter(parts)]
    made = [fourfold.compile(proto_of(), f"{out}{i}", form) for i, form in enumerate(forms)]
    first, *others = map(contents, made)
    assert others == [first, first]
    assert len({one.report.check.sha256 for one in made}) == 1


def test_the_memory_bound_does_not_matter(digits, out):
    made = fourfold.compile(MODEL, out, CALIB, CHECK, memory=100_000)
    assert contents(made) == contents(digits())


def test_the_check_does_not_matter(digits, out):
    made = fourfold.compile(MODEL, out, CALIB, check=False, threads=2)
    assert contents(made) == contents(digits())


def test_the_order_of_sets_does_not_matter(digits, out):
    """Sets of texts are walked in an order that differs from process to process."""
    code = "import sys, fourfold; fourfold.compile(*sys.argv[1:4], check=False)"
    environment = {**os.environ, "PYTHONPATH": str(HOME.parent), "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code, str(MODEL), str(out), str(CALIB)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert contents(fourfold.Artifact(out)) == contents(digits())


# What a caller of the model sees, and models of other kinds


@pytest.mark.parametrize("precision", ["w8a8", "w8"])
def test_the_interface_stays(digits, precision):
    before = interface(MODEL)
    assert interface(digits(precision).entry("cpu")) == before
    assert before[0] == ("image", "tensor(float)", ["n", 1, 8, 8])


def test_many_inputs_and_outputs_keep_their_order(out):
    text = """<ir_version: 9, opset_import: ["" : 21]>
    g (float[n,16] b, int64[n] ids, float[n,16] a) => (float[n,4] z, int64[n] same, float[n,16] c)
    <float[16,4] w> {
        c = Add (a, b)
        z = MatMul (c, w)
        one = Constant <value_int = 1> ()
        same = Mul (ids, one)
    }"""
    model = ir.from_onnx_text(text, initializers=[ir.tensor(samples(16, 4), name="w")])
    feeds = {"ids": np.arange(40), "a": samples(), "b": samples(seed=3)}
    artifact = fourfold.compile(model, out, feeds)
    shown = [(name, shape) for name, _, shape in interface(artifact.entry("cpu"))]
    assert shown == [
        ("b", ["n", 16]),
        ("ids", ["n"]),
        ("a", ["n", 16]),
        ("z", ["n", 4]),
        ("same", ["n"]),
        ("c", ["n", 16]),
    ]
    assert row(artifact).accuracy.sqnr_db > 25


def test_a_fixed_batch_stays(out):
    proto = proto_of()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    artifact = fourfold.compile(proto, out, {"x": samples()})
    assert [shape for _, _, shape in interface(artifact.entry("cpu"))] == [[4, 16], [4, 4]]
    assert [latency.batch for latency in row(artifact).latency] == [4]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_narrow_floats(kind, out):
    proto = proto_of(kind)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
    one = row(fourfold.compile(proto, out, {"x": samples().astype(dtype)}))
    assert one.kernels["MatMulIntegerToFloat"] == 2
    assert one.stayed_float == {}
    assert one.accuracy.sqnr_db > 25
    assert [v.dtype.name for v in load(out / "cpu" / "model.onnx").graph.inputs] == [kind.upper()]


def test_external_data(out, tmp_path):
    save(ir.from_proto(proto_of()), tmp_path / "big.onnx", external_above=0)
    artifact = fourfold.compile(tmp_path / "big.onnx", out, {"x": samples()})
    files = [tmp_path / "big.onnx", tmp_path / "big.onnx.data"]
    source = artifact.report.source
    assert source.sha256 == "+".join(map(sha256, files))
    assert source.file_bytes == sum(file.stat().st_size for file in files)
    assert row(artifact).accuracy.sqnr_db > 25


@pytest.mark.parametrize("name", ["model.onnx", "a [1] *.onnx"])
def test_a_linked_store(out, tmp_path, name):
    """The layout of a Hugging Face cache: snapshots are links to blobs named by hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save(ir.from_proto(proto_of()), tmp_path / name, external_above=0)
    for number, file in enumerate((name, f"{name}.data")):
        (tmp_path / file).rename(blobs / str(number))
        (snapshot / file).symlink_to(f"../../blobs/{number}")
    with pytest.raises(fourfold.compiler.errors.ModelError, match=r"--stage"):
        fourfold.compile(snapshot / name, out, {"x": samples()})
    artifact = fourfold.compile(snapshot / name, out, {"x": samples()}, stage=True)
    assert row(artifact).accuracy.sqnr_db > 25
    assert sorted(p.name for p in snapshot.iterdir()) == [name, f"{name}.data"]


def test_an_old_opset_is_converted(out):
    one = row(fourfold.compile(proto_of(opset=11), out, {"x": samples()}))
    assert "converted from opset 11 to 21" in [remark.reason for remark in one.remarks]
    assert one.accuracy.sqnr_db > 25


def test_functions_are_inlined(out):
    text = """<ir_version: 9, opset_import: ["" : 21, "my.own" : 1]>
    g (float[n,16] x) => (float[n,4] y) <float[16,4] w> {
        y = my.own.Dense (x, w)
    }
    <domain: "my.own", opset_import: ["" : 21]>
    Dense (a, b) => (c) {
        p = MatMul (a, b)
        c = Relu (p)
    }"""
    model = ir.from_onnx_text(text, initializers=[ir.tensor(samples(16, 4), name="w")])
    artifact = fourfold.compile(model, out, {"x": samples()})
    emitted = load(artifact.entry("cpu"))
    assert not emitted.functions
    assert {node.domain for node in emitted.graph} == {""}
    assert row(artifact).accuracy.sqnr_db > 25


def test_a_foreign_operator(out):
    proto = proto_of()
    proto.opset_import.append(onnx.helper.make_opsetid("my.own", 1))
    proto.graph.node[1].domain = "my.own"
    with pytest.raises(UnsupportedError, match=r"onnxruntime has no operator my\.own::Add"):
        fourfold.compile(proto, out, {"x": samples()})
    assert UnsupportedError.exit_code == 4
    assert not out.exists()


def test_a_pass_that_breaks_the_model(out, tmp_path, monkeypatch):
    def run(self, model, context):
        model.graph.outputs[0].name = "renamed"
        return 1

    monkeypatch.setattr(Tidy, "run", run)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BrokenPassError, match="pass tidy broke the model: the interface changed"):
        fourfold.compile(MODEL, out, CALIB)
    (reproducer,) = tmp_path.glob("fourfold-broken-pass-*")
    assert Recipe.from_toml((reproducer / "recipe.toml").read_text()).passes[0] == Tidy()
    assert not out.exists()
    assert BrokenPassError.exit_code == 1


def test_two_targets_need_two_names(out):
    with pytest.raises(RecipeError, match="name each target once"):
        fourfold.compile(MODEL, out, CALIB, targets=("cpu", 'cpu{isa="avx2"}'))


def test_a_targets_options(out):
    artifact = fourfold.compile(MODEL, out, CALIB, targets=('cpu{isa="avx2"}',), check=False)
    one = row(artifact)
    assert (one.target, one.capability) == ('cpu{isa="avx2"}', "onnxruntime cpu (avx2)")
    codes = [
        tensor.numpy()
        for value in load(artifact.entry("cpu")).graph.initializers.values()
        if (tensor := value.const_value) is not None and tensor.dtype == ir.DataType.INT8
    ]
    # Without VNNI, sums of two products saturate in 16 bits.
    assert max(int(np.abs(array.astype(int)).max(initial=0)) for array in codes) in (63, 64)


def test_weights_that_old_exporters_list_as_inputs_become_constants(out):
    proto = onnx.load(MODEL)
    for tensor in list(proto.graph.initializer):
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    made = fourfold.compile(proto, out, CALIB, CHECK)
    assert row(made).kernels["QLinearConv"] == 6
    assert [i.name for i in onnx.load(made.entry("cpu")).graph.input] == ["image"]
    assert any("inputs with a default" in r.reason for r in row(made).remarks)
