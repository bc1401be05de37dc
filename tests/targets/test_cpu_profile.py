import math
import subprocess
import sys
from dataclasses import replace

import pytest

import fourfold.targets.cpu as module
from fourfold.compiler.choices import Choice, legal_choices
from fourfold.compiler.cost_table import CostTable
from fourfold.compiler.costs import Workload, fits
from fourfold.compiler.errors import DataError, UnsupportedError
from fourfold.compiler.graph import weight_of
from fourfold.targets.cpu import Cpu, host_isa, profile
from fourfold.targets.cpu.capability import WEIGHT_ONLY, capability_of
from fourfold.targets.cpu.kernels import feed_of, kernels_of
from fourfold.targets.cpu.profile import GRID, form_of, forms_of

VNNI = Cpu(isa="vnni")
OTHER = "arm64" if host_isa() != "arm64" else "vnni"

MATMUL = Workload("MatMul", (128, 48), (1, 5, 128))
GEMM = Workload("Gemm", (24, 32), (4, 32), (("transB", 1),))
CONV = Workload("Conv", (32, 32, 3, 3), (1, 32, 9, 9), (("pads", (1, 1, 1, 1)),))
GATHER = Workload("Gather", (50, 16), (1, 7))
UP = Workload("ConvTranspose", (8, 4, 2, 2), (1, 8, 5, 5), (("strides", (2, 2)),))

BLOCKS = [f"int{bits} per_block(0,{size})" for bits in (4, 2) for size in (32, 128)]
KERNELS = {
    MATMUL: {
        "float": {"MatMul": 1},
        "int8": {"MatMulIntegerToFloat": 1},
        **{block: {"MatMulNBits": 1} for block in BLOCKS},
    },
    GEMM: {"float": {"Gemm": 1}, "int8": {"QGemm": 1}},
    CONV: {"float": {"Conv": 1}, "int8": {"QLinearConv": 1}},
    GATHER: {"float": {"Gather": 1}, "int8": {"Gather": 2, "Cast": 1, "Mul": 1}},
    UP: {"float": {"ConvTranspose": 1}},
}
# What the test of a whole profile measures: every operator, and one with blocks.
FEW = (MATMUL, GEMM, CONV, GATHER)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache folder, and less time than a real profile takes."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile, "BUDGET", 0.02)
    return tmp_path / "cache"


@pytest.fixture
def refuse(monkeypatch):
    """Measuring is an error from now on."""

    def measure(*args):
        raise AssertionError("nothing should be measured")

    return lambda: monkeypatch.setattr(module, "measure", measure)


@pytest.fixture
def table():
    """A table of this machine with a made-up time for every workload of KERNELS."""
    entries = {(work, form): 1e-3 for work, forms in KERNELS.items() for form in forms}
    return module._here().with_entries(entries)


def choice(text):
    return Choice.parse(text)


@pytest.mark.parametrize("work", KERNELS, ids=lambda work: work.op_type)
def test_each_form_runs_the_kernel_that_it_is_named_for(work, tmp_path):
    capability = capability_of("vnni")
    assert forms_of(work, capability) == list(KERNELS[work])
    for form, names in KERNELS[work].items():
        kernels = kernels_of(work, form, capability, tmp_path)
        assert kernels.names == names
        assert {node.op_type for node in kernels.shared} <= {
            "QuantizeLinear",
            "ReorderInput",
            "Transpose",
        }
    assert not list(tmp_path.glob("*.onnx"))


def test_a_float_conv_is_timed_in_the_layout_that_onnxruntime_gives_it(tmp_path):
    kernels = kernels_of(CONV, "float", capability_of("vnni"), tmp_path)
    if host_isa() != "arm64":
        assert [node.domain for node in kernels.repeated] == ["com.microsoft.nchwc"]


@pytest.mark.parametrize("isa", ["vnni", "avx2", "arm64"])
def test_each_class_of_cpu_has_its_integer_kernels(isa, tmp_path):
    for work, kernel in ((CONV, "QLinearConv"), (MATMUL, "MatMulIntegerToFloat"), (GEMM, "QGemm")):
        assert kernels_of(work, "int8", capability_of(isa), tmp_path).names == {kernel: 1}


@pytest.mark.parametrize(
    ("work", "form"),
    [(CONV, "float"), (CONV, "int8"), (MATMUL, BLOCKS[0]), (GATHER, "int8"), (GEMM, "int8")],
    ids=str,
)
def test_copies_have_their_own_weights_and_read_one_input(work, form, tmp_path):
    kernels = kernels_of(work, form, capability_of("vnni"), tmp_path)
    one, three = kernels.copies(1).graph, kernels.copies(3).graph
    assert len(three.output) == 3
    extra = len(three.node) - len(one.node)
    assert extra == 2 * sum(kernels.names.values())
    assert [v.name for v in three.input] == ["x"]
    sizes = [sum(len(t.raw_data) for t in graph.initializer) for graph in (one, three)]
    assert sizes[1] - sizes[0] == 2 * kernels.bytes
    assert (kernels.bytes > 0) == (work is not GATHER)
    assert profile._loaded(kernels.copies(3), work, tmp_path)() > 0


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("float", "float"),
        ("int8 per_axis(1) x float", "float"),
        ("int4 per_axis(1) x float", "float"),
        ("int8 per_axis(1) x uint8", "int8"),
        ("int2 per_tensor x int8", "int8"),
        ("int4 per_axis(0) x uint8", "int8"),
        ("int8:7 per_axis(0) x uint8", "int8"),
        ("int2 per_block(0,32) x float", "int2 per_block(0,32)"),
    ],
)
def test_a_choice_runs_as_a_form(text, form):
    assert form_of(choice(text)) == form
    assert form_of(choice(text), "Conv") == form


def test_an_embedding_stays_in_codes_beside_a_float():
    assert form_of(choice("int4 per_axis(0) x float"), "Gather") == "int8"
    assert form_of(choice("float"), "Gather") == "float"


def test_every_legal_choice_has_a_form_that_is_measured(zoo):
    for make in zoo.values():
        for node in make().graph:
            weight = weight_of(node)
            if weight is None:
                continue
            forms = forms_of(Workload.of(weight, (1, 8)), VNNI.capability)
            for one in legal_choices([weight], VNNI.capability):
                assert form_of(one, node.op_type) in forms


def test_a_profile_measures_once_and_is_found_again(home, tmp_path, refuse):
    target = Cpu()
    table = target.profile(FEW, tmp_path)
    assert set(table.entries) == {(work, form) for work in FEW for form in KERNELS[work]}
    assert all(0 < seconds < 1 for seconds in table.entries.values())
    (path,) = home.glob("costs/*.json")
    assert path.name.endswith(f"-{host_isa()}-{table.runtime.replace(' ', '-')}.json")
    assert CostTable.read(path) == table
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]

    refuse()
    assert target.profile(FEW[:2], tmp_path) == table
    for work, form in table.entries:
        text = {"float": "float", "int8": f"int8 per_axis(0) x {target.capability.activation}"}
        one = choice(text.get(form, f"{form} x float"))
        if work.op_type != "Gather":
            assert target.cost(work, one).seconds == table.entries[work, form]
            assert target.cost(work, one).source == "measured"


def test_only_what_is_missing_is_measured(tmp_path, monkeypatch):
    asked = []

    def measure(works, capability, folder, progress):
        asked.append(list(works))
        return {(work, form): 1e-3 for work in works for form in forms_of(work, capability)}

    monkeypatch.setattr(module, "measure", measure)
    target = Cpu()
    target.profile([MATMUL], tmp_path)
    assert set(target.profile([CONV, MATMUL, CONV], tmp_path).entries) == {
        (work, form) for work in (CONV, MATMUL) for form in KERNELS[work]
    }
    assert asked == [[MATMUL], [CONV]]
    target.profile([], tmp_path)
    assert asked[2] == list(GRID)


def test_what_another_process_wrote_meanwhile_is_kept(home, tmp_path, monkeypatch, table):
    path = home / "costs" / module._file_name()

    def measure(works, capability, folder, progress):
        table.write(path)
        return {(replace(GEMM, input=(9, 32)), "float"): 2.0}

    monkeypatch.setattr(module, "measure", measure)
    both = Cpu().profile([GEMM], tmp_path)
    assert both.entries == {**table.entries, (replace(GEMM, input=(9, 32)), "float"): 2.0}
    assert CostTable.read(path) == both


SCRIPT = """
import sys
from pathlib import Path
import fourfold.targets.cpu as module
from fourfold.compiler.costs import Workload
def measure(works, capability, folder, progress):
    return {(work, "float"): 1e-3 for work in works}
module.measure = measure
for rows in range(20):
    module.Cpu().profile([Workload("MatMul", (4, 4), (rows, int(sys.argv[1])))], Path("."))
"""


def test_two_processes_at_once_leave_a_table_that_can_be_read(home):
    script = [sys.executable, "-c", SCRIPT]
    both = [subprocess.Popen([*script, size]) for size in ("4", "5")]
    assert [process.wait() for process in both] == [0, 0]
    (path,) = home.glob("costs/*")
    # Whoever wrote last has its last entry there.
    last = {Workload("MatMul", (4, 4), (19, size)) for size in (4, 5)}
    assert last & {work for work, _ in CostTable.read(path).entries}


def test_costs_come_from_this_machine_then_from_the_shipped_table(home, table):
    target = Cpu(isa=host_isa())
    one = choice(f"int8 per_axis(1) x {target.capability.activation}")
    shipped = "shipped" if host_isa() == "vnni" else None
    assert target.cost(MATMUL, one).source == shipped
    partial = {key: s for key, s in table.entries.items() if key[0].op_type == "MatMul"}
    replace(table, entries=partial).write(home / "costs" / module._file_name())
    assert target.cost(MATMUL, one).source == "measured"
    assert target.cost(replace(MATMUL, input=(1, 6, 128)), one).source == "nearest"
    assert Cpu().cost(MATMUL, one) == target.cost(MATMUL, one)
    # The machine's own table holds no convolution.
    assert target.cost(CONV, one).source == shipped
    # An older table must not be remembered.
    faster = {key: seconds / 2 for key, seconds in partial.items()}
    replace(table, entries=faster).write(home / "costs" / module._file_name())
    assert target.cost(MATMUL, one).seconds == pytest.approx(0.5e-3)


def test_the_tables_of_another_class_of_cpu_do_not_apply(home, table, monkeypatch, tmp_path):
    table.write(home / "costs" / module._file_name())
    for isa in {"avx2", "arm64", "vnni"} - {host_isa()}:
        target = Cpu(isa=isa)
        cost = target.cost(MATMUL, choice("float"))
        assert cost.bytes == 4 * math.prod(MATMUL.weight)
        assert cost.source == ("shipped" if isa == "vnni" else None)
        assert (cost.seconds is None) == (isa != "vnni")
        with pytest.raises(UnsupportedError, match=rf"{isa}.*cannot be timed .*{host_isa()}"):
            target.profile([MATMUL], tmp_path)


def test_what_nothing_is_known_of_has_bytes_alone():
    volume = Workload("Conv", (8, 8, 3, 3, 3), (1, 8, 5, 5, 5))
    cost = VNNI.cost(volume, choice("int8 per_axis(0) x uint8"))
    assert (cost.bytes, cost.seconds, cost.source) == (8 * 8 * 27 + 4 * 8, None, None)


@pytest.mark.parametrize("damage", ["", "{", '{"isa": 1}'])
def test_a_damaged_table_is_named(damage, home, tmp_path):
    path = home / "costs" / module._file_name()
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    for call in (
        lambda: Cpu().cost(MATMUL, choice("float")),
        lambda: Cpu().profile([], tmp_path),
    ):
        with pytest.raises(DataError, match=rf"{path.name}.*delete the file"):
            call()


def test_a_table_of_another_runtime_under_this_name_is_refused(home, table):
    replace(table, runtime="onnxruntime 0.1").write(home / "costs" / module._file_name())
    with pytest.raises(DataError, match=r"costs of onnxruntime 0\.1 on .*delete the file"):
        Cpu().cost(MATMUL, choice("float"))


def test_a_weight_that_is_too_big_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "LARGEST", 4 * 16 * 16)
    small, big = (Workload("Gemm", (n, 16), (1, 16), (("transB", 1),)) for n in (16, 17))
    found = profile.measure([big, small, small], VNNI.capability, tmp_path)
    assert {work for work, _ in found} == {small}


def test_a_weight_without_room_for_copies_is_timed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "MOST_BYTES", 100)
    found = profile.measure([GEMM], VNNI.capability, tmp_path)
    assert all(0 < seconds < 1 for seconds in found.values())


def test_no_time_is_better_than_a_time_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "clock", lambda: 1.0)  # as if nothing took any time
    with pytest.raises(UnsupportedError, match=r"cannot time Workload.*profile again"):
        profile.measure([GEMM], VNNI.capability, tmp_path)


def test_an_input_is_made_for_its_node():
    assert feed_of(CONV).dtype == "float32"
    ids = feed_of(GATHER)
    assert ids.dtype == "int64"
    assert ids.shape == (1, 7)
    assert 0 <= ids.min() <= ids.max() < 50


def test_the_shipped_table_knows_every_form_of_every_operator():
    shipped = module._shipped()
    assert shipped.isa == "vnni"
    assert {work for work, _ in shipped.entries} == set(GRID)
    assert {work.op_type for work in GRID} == set(WEIGHT_ONLY)
    for work in GRID:
        assert fits(work)
        forms = forms_of(work, VNNI.capability)
        assert {form for one, form in shipped.entries if one == work} == set(forms)
    for work, forms in KERNELS.items():
        for form in forms:
            seconds, exact = shipped.seconds(work, form)
            assert seconds > 0
            assert not exact


def test_the_shipped_table_warns_of_two_bits_in_small_blocks():
    entries = module._shipped().entries
    trap = "int2 per_block(0,32)"
    many = [w for w, form in entries if form == trap and w.input[-2] == 128]
    assert len(many) > 3
    for work in many:
        assert entries[work, trap] > entries[work, "int8"]


def test_a_profile_imports_no_torch():
    code = "import sys, fourfold.targets.cpu as c; c._shipped(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
