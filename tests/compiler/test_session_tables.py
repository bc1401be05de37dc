"""Sessions, options, the report's rows, and the tables that show them."""

import io
import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from rich.console import Console

from fourfold.compiler import tables
from fourfold.compiler.artifact import MANIFEST, REPORT, Artifact, write_json
from fourfold.compiler.compare import Comparison, Latency
from fourfold.compiler.contract import Decision, Remark
from fourfold.compiler.errors import DataError, ModelError, RecipeError, UnsupportedError
from fourfold.compiler.intake import Options, read_options
from fourfold.compiler.report import (
    FeedsRow,
    Report,
    SourceRow,
    TargetReport,
    verdict,
)
from fourfold.compiler.runner import PassRow
from fourfold.compiler.session import open_runner, open_session, session_options
from fourfold.compiler.storage import Stored

TWO_INPUTS = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,2] a, float[n,2] b) => (float[n,2] less, float[n,2] more) {
    less = Sub (a, b)
    more = Add (a, b)
}"""


@pytest.fixture
def written(tmp_path):
    """`written(text)`: the path of the model that the text describes."""

    def write(text, name="model.onnx"):
        onnx.save(onnx.parser.parse_model(text), tmp_path / name)
        return tmp_path / name

    return write


# Sessions


def test_a_runner_maps_names_to_names(written):
    run = open_runner(written(TWO_INPUTS), threads=2)
    a, b = np.float32([[1, 2]]), np.float32([[3, 5]])
    for feeds in ({"a": a, "b": b}, {"b": b, "a": a}):
        got = run(feeds)
        assert list(got) == ["less", "more"]
        np.testing.assert_array_equal(got["less"], a - b)
        np.testing.assert_array_equal(got["more"], a + b)


def test_a_session_fetches_what_is_named(written):
    session = open_session(written(TWO_INPUTS), session_options())
    one = np.ones((3, 2), np.float32)
    (more,) = session.run(["more"], {"a": one, "b": one})
    np.testing.assert_array_equal(more, one + one)


@pytest.mark.parametrize("shape", [(3, 2), (0, 2)])
def test_bfloat16_goes_in_and_comes_out(written, shape):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (bfloat16[n,2] x, float[n,2] y) => (bfloat16[n,2] back, float[n,2] wide) {
        wide = Cast <to = 1> (x)
        sum = Add (wide, y)
        back = Cast <to = 16> (sum)
    }"""
    run = open_runner(written(text))
    x = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
    got = run({"x": x[::-1], "y": np.ones(shape, np.float32)[:, ::-1]})  # not contiguous either
    assert got["back"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got["wide"], x[::-1].astype(np.float32))
    expected = (x[::-1].astype(np.float32) + 1).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got["back"], expected)


def test_bfloat16_outlives_its_session(written):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (bfloat16[n] x) => (bfloat16[n] y) { y = Identity (x) }"""
    x = np.arange(100).astype(ml_dtypes.bfloat16)
    got = open_runner(written(text))({"x": x})["y"]
    np.testing.assert_array_equal(got, x)


def test_the_number_of_threads():
    assert session_options(threads=3).intra_op_num_threads == 3
    assert session_options().inter_op_num_threads == 1


def test_what_onnxruntime_refuses_to_open(tmp_path, written):
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    foreign = TWO_INPUTS.replace("Sub", "my.own.Sub").replace("21]", '21, "my.own" : 1]')
    for path in (tmp_path / "junk.onnx", tmp_path / "none.onnx", written(foreign)):
        with pytest.raises(
            UnsupportedError, match=f"onnxruntime .* refuses {path.name}: "
        ) as error:
            open_session(path, session_options())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"a": np.ones((1, 2), np.float32)},
        {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 3), np.float32)},
        {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 2), np.float64)},
        {"a": np.ones((1, 2), np.float32), "c": np.ones((1, 2), np.float32)},
    ],
)
def test_what_onnxruntime_refuses_to_run(written, feeds, capfd):
    run = open_runner(written(TWO_INPUTS))
    with pytest.raises(DataError, match="cannot run the model on these feeds: ") as error:
        run(feeds)
    assert "\n" not in str(error.value)


# Options


def test_options():
    assert read_options({}) == Options()
    given = read_options({"targets": ["cpu"], "max_drop": 1, "metric": max})
    assert (given.targets, given.max_drop, given.metric) == (("cpu",), 1.0, max)
    with pytest.raises(RecipeError, match="no option 'thread'; did you mean 'threads'"):
        read_options({"thread": 1})
    with pytest.raises(RecipeError, match=r"option stage = 'perhaps': .*bool"):
        read_options({"stage": "perhaps"})


# The report

FAR = Comparison(3.0, 0.5, None, 1.0)
WORSE = Comparison(3.0, 0.5, 0.5, 1.0, 0, "top1", 90.0, 50.0, 40.0)
NEAR = Comparison(30.0, 0.999, 0.99, 0.1, 0, "top1", 90.0, 89.5, 0.5)


def timed(ratio, batch=1):
    return Latency(batch, 1e-3 * ratio, 1e-3, ratio, 5, 1)


@pytest.mark.parametrize(
    ("accuracy", "rows", "after", "said"),
    [
        (NEAR, (timed(2.0), timed(1.0)), 10, []),
        (None, (), 10, []),
        (NEAR, (timed(0.5, batch=8),), 10, ["SLOWER than the source at batch 8: 1.00 ms against"]),
        (NEAR, (), 20, ["NOT SMALLER than the source: 20 bytes against 20"]),
        (FAR, (), 10, ["FAR from the source: the outputs' SQNR is 3.0 dB"]),
        (
            Comparison(30.0, 1.0, None, 0.0, 7),
            (),
            10,
            ["NOT FINITE: 7 elements of the outputs are NaN or inf"],
        ),
    ],
)
def test_verdict(accuracy, rows, after, said):
    lines = verdict(accuracy, rows, 20, after)
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))


CHOSEN = Decision(
    method="milp",
    average_bits=3.375,
    signal="measured",
    loss_kind="mse",
    predicted_loss=0.0125,
    measured_loss=0.02,
    first_loss=0.03,
    repairs=("w raised: loss 0.03 -> 0.02",),
    trials=2,
    predicted_seconds=1.5e-3,
    cost_source="shipped",
)


def target_report(**changes):
    fields = {
        "target": 'cpu{isa="avx2"}',
        "capability": "a runtime [v2]",
        "precision": "w8a8",
        "recipe": 'tidy,assign-bits{keep=["[a]"]}',
        "file_bytes": 500_000,
        "stored_bits": Stored(8.0, 0.0, 0.125),
        "weight_memory": 400_000,
        "decision": Decision("uniform", 8.0),
        "kernels": {"QGemm": 2, "Relu": 1},
        "stayed_float": {"conv[1]": "no integer [form]"},
        "accuracy": NEAR,
        "latency": (timed(1.5), timed(2.5, batch=8)),
        "verdict": ("FAR [away]",),
        "passes": (PassRow("tidy", 1, 0.5, 3, 100, ("gone",)),),
        "remarks": (Remark("tidy", "conv[1]", "because [b]"),),
        "seconds": 1.5,
    }
    return TargetReport(**(fields | changes))


def report(*rows, **changes):
    fields = {
        "fourfold": "1",
        "versions": {"onnx": "1"},
        "machine": "x86_64",
        "seed": 0,
        "source": SourceRow(
            name="net[1].onnx",
            sha256="0",
            opset=21,
            nodes=9,
            weight_bytes=10,
            file_bytes=2_000_000,
        ),
        "calibration": FeedsRow(samples=240, sha256="1"),
        "check": FeedsRow(samples=60, sha256="2"),
        "targets": rows or (target_report(),),
    }
    return Report(**(fields | changes))


def test_a_report_reads_back():
    same = Comparison(float("inf"), 1.0, None, 0.0)
    given = report(
        target_report(accuracy=same, decision=CHOSEN),
        target_report(target="dsp", accuracy=None),
        target_report(target="npu", decision=None),
    )
    text = json.dumps(given.to_json(), allow_nan=False)
    assert '"sqnr_db": "inf"' in text
    assert Report.model_validate(json.loads(text)) == given


def test_a_report_of_another_schema(tmp_path):
    facts = report().to_json()
    del facts["source"]["opset"]
    write_json(tmp_path / REPORT, facts)
    with pytest.raises(
        DataError, match=r"does not fit the schema at source\.opset: field required"
    ):
        _ = Artifact(tmp_path).report


# Tables


@pytest.fixture
def shown(tmp_path):
    """`shown(print_, *args)`: what a function prints on a wide console."""

    def show(print_, *args, width=200):
        file = io.StringIO()
        print_(Console(file=file, width=width), *args)
        return file.getvalue()

    return show


@pytest.fixture
def filed(tmp_path):
    """`filed(report)`: an artifact with this report."""

    def file(given):
        folder = tmp_path / "build [1]"
        folder.mkdir(exist_ok=True)
        write_json(folder / REPORT, given.to_json())
        write_json(folder / MANIFEST, {"files": {}, "variants": {}})
        return Artifact(folder)

    return file


def test_the_report_on_a_console(shown, filed):
    artifact = filed(report())
    lines = [" ".join(line.split()) for line in shown(tables.print_report, artifact).splitlines()]
    assert lines == [
        "net[1].onnx opset 21, 9 nodes, 2.00 MB; calibrated on 240 samples, "
        "checked on 60 held-out samples",
        'source cpu{isa="avx2"} w8a8',
        "size 2.00 MB 500.00 kB (25%)",
        "stored bits per weight 8.12 (codes 8.00, scales 0.12)",
        "weights in memory 400.00 kB",
        "SQNR of the outputs 30.0 dB",
        "cosine 0.99900",
        "same largest class 99.0%",
        "top1 90.00 89.50 (drop +0.50)",
        "batch 1, 1 thread 1.50 ms 1.00 ms, 1.50x",
        "batch 8, 1 thread 2.50 ms 1.00 ms, 2.50x",
        'cpu{isa="avx2"}: FAR [away]',
        'cpu{isa="avx2"}: conv[1] ran in float: no integer [form]',
        f"{artifact.folder}: 1 remarks; see `fourfold explain {artifact.folder}`",
    ]


def test_how_bits_were_chosen_on_a_console(shown, filed):
    plain = target_report(target="dsp", decision=None)
    greedy = target_report(target="npu", decision=Decision("greedy", 4.0, signal="lim"))
    rows = target_report(decision=CHOSEN), plain, greedy, target_report(target="gpu")
    text = shown(tables.print_report, filed(report(*rows)))
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in text.splitlines()}
    assert lines["average code bits"] == (
        "average code bits 3.38, milp by measured - 4.00, greedy by lim 8.00"
    )
    assert lines["calibration loss"] == (
        "calibration loss 0.0125 predicted, 0.02 measured - - predicted, - measured "
        "- predicted, - measured"
    )
    assert lines["weighted kernels"] == "weighted kernels 1.50 ms (shipped) - - -"


def test_a_folders_name_is_in_one_piece(shown, filed):
    artifact = filed(report())
    assert f"see `fourfold explain {artifact.folder}`\n" in shown(
        tables.print_report, artifact, width=40
    )


def test_two_targets_side_by_side(shown, filed):
    other = target_report(target="dsp", stored_bits=Stored(4.0, 0.5, 0.25), accuracy=WORSE)
    text = shown(tables.print_report, filed(report(target_report(), other)))
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert "8.12 (codes 8.00, scales 0.12)" in text
    assert "4.75 (codes 4.00, tables 0.50, scales 0.25)" in text
    assert lines["weights in memory"][-4:] == ["400.00", "kB", "400.00", "kB"]
    assert lines["SQNR of the outputs"][-4:] == ["30.0", "dB", "3.0", "dB"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"check": None}, "calibrated on 240 samples, NOT CHECKED"),
        (
            {"calibration": None, "check": FeedsRow(samples=8, sha256="", made_up=True)},
            "checked on 8 random (no data given) samples",
        ),
        (
            {"check": FeedsRow(samples=8, sha256="", held_out=False)},
            "checked on 8 the calibration's own samples",
        ),
    ],
)
def test_what_the_feeds_were(shown, filed, changes, said):
    assert said in shown(tables.print_report, filed(report(**changes)))


def test_without_a_check_there_are_no_figures(shown, filed):
    text = shown(tables.print_report, filed(report(target_report(accuracy=None, latency=()))))
    assert "stored bits per weight" in text
    assert "SQNR" not in text
    assert "thread" not in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (45_670_000, "45.67 MB"), (2e9, "2.00 GB")],
)
def test_sizes(count, text):
    assert tables._size(count) == text


PLAN = {
    "x": {
        "format": "uint8 per_tensor",
        "mode": "static",
        "low": -1.0,
        "high": 2.5,
        "why": "a [b]",
    },
    "conv.w": {
        "format": "int4 per_axis(0)",
        "mode": "static",
        "importance": {"lim": -0.5, "measured": 0.01234},
    },
    "hidden": {"format": "uint8 per_tensor", "mode": "dynamic"},
    "conv.y": {"mode": "float", "why": "kept as asked"},
}


def test_an_explanation_of_a_part():
    everything = tables.explanation(PLAN, target_report(), "")
    assert list(everything["plan"]) == list(PLAN)
    part = tables.explanation(PLAN, target_report(), "conv")
    assert list(part["plan"]) == ["conv.w", "conv.y"]
    assert [remark["subject"] for remark in part["remarks"]] == ["conv[1]"]
    assert tables.explanation(PLAN, target_report(), "none")["remarks"] == []


def test_an_explanation_on_a_console(shown):
    facts = tables.explanation(PLAN, target_report(), "")
    text = shown(tables.print_explanation, facts)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == [
        'cpu{isa="avx2"} on a runtime [v2]',
        'recipe tidy,assign-bits{keep=["[a]"]}',
        "value decision range importance why",
        "x uint8 per_tensor -1 .. 2.5 a [b]",
        "conv.w int4 per_axis(0) lim -0.5",
        "measured 0.012",
        "hidden uint8 per_tensor dynamic",
        "conv.y float kept as asked",
        "kernels QGemm 2, Relu 1",
        "ran in float: conv[1]: no integer [form]",
        "tidy: conv[1]: because [b]",
    ]


def test_one_signal_needs_no_column_of_its_own(shown):
    plan = {**PLAN, "conv.w": {**PLAN["conv.w"], "importance": {"measured": 0.5}}}
    text = shown(tables.print_explanation, tables.explanation(plan, target_report(), ""))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[2] == "value decision range why"
    assert lines[4] == "conv.w int4 per_axis(0)"


def test_facts_of_a_model(written, shown):
    facts = tables.model_facts(written(TWO_INPUTS))
    assert facts["inputs"] == ["a: FLOAT [n,2]", "b: FLOAT [n,2]"]
    assert facts["operators"] == {"Sub": 1, "Add": 1}
    assert (facts["weight_bytes"], facts["quantizable_layers"]) == ({}, 0)
    text = shown(tables.print_model, facts)
    assert "b: FLOAT [n,2]" in text
    assert "ai.onnx 21" in text


def test_facts_of_a_model_with_weights(written):
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 2, 3, 4}> { y = MatMul (x, w) }"""
    facts = tables.model_facts(written(text))
    assert (facts["weight_bytes"], facts["quantizable_layers"]) == ({"float": 16}, 1)


def test_facts_of_no_model(tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"junk!")
    with pytest.raises(ModelError):
        tables.model_facts(tmp_path / "junk.onnx")


@pytest.mark.parametrize("kind", ["passes", "targets"])
def test_the_catalogue(kind, shown):
    rows = tables.catalogue(kind)
    json.dumps(rows)
    assert all(row["summary"].endswith(".") for row in rows)
    text = shown(tables.print_catalogue, rows)
    assert all(row["name"] in text for row in rows)


def test_a_target_that_is_not_installed(shown):
    row = {
        "name": "dsp",
        "summary": "A chip.",
        "options": {"v": 1},
        "install": "pip install 'a[b]'",
    }
    assert "A chip. (pip install 'a[b]')" in shown(tables.print_catalogue, [row])


def test_the_number_of_bfloat16():
    from fourfold.compiler.session import BFLOAT16

    assert BFLOAT16 == TensorProto.BFLOAT16
