import re
import tempfile
from pathlib import Path

import onnx_ir as ir
import pytest

from fourfold.compiler import notes, runner
from fourfold.compiler.contract import Pass
from fourfold.compiler.errors import BrokenPassError, RecipeError, UnsupportedError
from fourfold.compiler.formats import Format, PerAxis
from fourfold.compiler.notes import Note
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.verifier import Interface, checker_fault, faults_of
from fourfold.passes.tidy import Tidy

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
TEXT = f"""{HEADER}
g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1,2,3,4}}> {{
    [mul] h = MatMul(x, w)
    [act] y = Relu(h)
}}"""


@pytest.fixture
def model():
    return ir.from_onnx_text(TEXT)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """Reproducers go to a folder that the test run cleans up."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def one_pass(function, **options):
    """Return a pass that runs a function of (model, context)."""

    class Custom(Pass):
        label: str = ""

        @property
        def name(self):
            return "custom"

        def run(self, model, context):
            return function(model, context) or 0

    return Custom(**options)


def run(function, model, context, *more):
    return runner.run(Recipe((one_pass(function), *more)), model, context)


def proto(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def drop_relu(model, context):
    graph = model.graph
    relu = next(n for n in graph if n.op_type == "Relu")
    source = relu.inputs[0]
    ir.convenience.replace_nodes_and_values(graph, relu, [relu], [], [relu.outputs[0]], [source])
    source.name = "y"
    return 1


def fuse(model, context):
    """Replace both nodes by new ones, as onnxscript's rewriter does: no meta carries over."""
    graph = model.graph
    mul, relu = list(graph)
    new = [ir.node("Gemm", mul.inputs, name="gemm")]
    new[0].outputs[0].name = "z"
    new.append(ir.node("Relu", new[0].outputs, name="act2"))
    new[1].outputs[0].name = "y"
    new[1].outputs[0].dtype = ir.DataType.FLOAT
    new[1].outputs[0].shape = relu.outputs[0].shape
    ir.convenience.replace_nodes_and_values(
        graph, relu, [mul, relu], new, relu.outputs, new[1].outputs
    )
    new[1].outputs[0].meta.clear()
    return 1


def test_the_callers_model_is_untouched(model, context):
    before = proto(model)
    rewritten, rows = run(drop_relu, model, context)
    assert [n.op_type for n in rewritten.graph] == ["MatMul"]
    assert [n.op_type for n in model.graph] == ["MatMul", "Relu"]
    assert proto(model) == before
    assert notes.plan(model) == {}
    assert [(row.name, row.changed, row.nodes, row.weight_bytes) for row in rows] == [
        ("custom", 1, 1, 16)
    ]
    assert rows[0].seconds >= 0


def test_notes_of_the_copy_are_its_own(model, context):
    def annotate(model, context):
        notes.write(model.graph.initializers["w"], why="decided")

    rewritten, _ = run(annotate, model, context)
    assert notes.plan(rewritten) == {"w": {"why": "decided"}}
    assert notes.plan(model) == {}


def test_a_recipe_of_real_passes(model, context):
    rewritten, rows = runner.run(Recipe((Tidy(), Tidy())), model, context)
    assert [row.name for row in rows] == ["tidy", "tidy"]
    assert list(faults_of(rewritten, Interface.of(model))) == []


def test_notes_survive_a_rewrite_that_makes_new_values(model, context):
    nodes = list(model.graph)
    notes.write(nodes[1].outputs[0], low=0.0, high=9.0)
    notes.write(model.graph.initializers["w"], why="weight")
    rewritten, rows = run(fuse, model, context)
    assert [n.op_type for n in rewritten.graph] == ["Gemm", "Relu"]
    assert notes.read(rewritten.graph.outputs[0]) == Note(low=0.0, high=9.0)
    assert notes.read(rewritten.graph.initializers["w"]) == Note(why="weight")
    assert rows[0].lost_notes == ()


def test_lost_notes_are_reported(model, context):
    notes.write(next(iter(model.graph)).outputs[0], low=-1.0, high=9.0)
    _, rows = run(fuse, model, context)
    assert rows[0].lost_notes == ("h",)
    remark = context.remarks[-1]
    assert (remark.source, remark.subject) == ("custom", "h")
    assert "lost" in remark.reason


def test_unmet_needs_stop_the_recipe(model, context):
    class Needy(Pass):
        def requires(self, model, context):
            yield "there are no feeds"
            yield "there is no coffee"

        def run(self, model, context):
            raise AssertionError("must not run")

    with pytest.raises(RecipeError, match="cannot run: there are no feeds; there is no coffee"):
        runner.run(Recipe((Needy(),)), model, context)


def test_errors_of_ours_pass_through_unchanged(model, context):
    error = UnsupportedError("the target cannot do it")

    def refuse(model, context):
        raise error

    with pytest.raises(UnsupportedError) as raised:
        run(refuse, model, context)
    assert raised.value is error
    assert str(raised.value) == "the target cannot do it"
    assert raised.value.__notes__ == ["in pass custom"]


def rename_output(model, context):
    model.graph.outputs[0].name = "z"


def retype_input(model, context):
    model.graph.inputs[0].dtype = ir.DataType.DOUBLE


def swap_nodes(model, context):
    first, second = model.graph
    model.graph.remove(first)
    model.graph.insert_after(second, first)


def foreign_node(model, context):
    next(iter(model.graph)).domain = "com.acme"


def no_data(model, context):
    model.graph.initializers["w"].const_value = None


def same_names(model, context):
    next(iter(model.graph)).outputs[0].name = "x"


def bad_attribute(model, context):
    list(model.graph)[1].attributes["slope"] = ir.AttrFloat32("slope", 0.1)


def impossible_note(model, context):
    notes.write(model.graph.initializers["w"], mode="static")


def crash(model, context):
    raise ZeroDivisionError("no such thing")


BROKEN = [
    (rename_output, "the interface changed"),
    (retype_input, "the interface changed"),
    (swap_nodes, "reads 'h' before it is made"),
    (foreign_node, "domain 'com.acme' is used and not imported"),
    (no_data, "initializer 'w' has no data"),
    (same_names, "two values are named 'x'"),
    (bad_attribute, "slope"),  # onnx.checker's words
    (impossible_note, "note on 'w': static without a format"),
    (crash, "ZeroDivisionError: no such thing"),
]


@pytest.mark.parametrize(("function", "fault"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_pass_is_named_with_a_reproducer(function, fault, model, context):
    notes.write(model.graph.initializers["w"], why="kept in the reproducer")
    broken = one_pass(function, label='tricky "label"')
    with pytest.raises(BrokenPassError) as raised:
        runner.run(Recipe((Tidy(), broken, Tidy(opset=22))), model, context)
    message = str(raised.value)
    assert message.startswith('pass custom{label="tricky \\"label\\""} broke the model: ')
    assert fault in message
    assert "\n" not in message
    folder = Path(re.search(r"reproducer in ([^)]*)\)", message)[1])
    before = (folder / "before.txt").read_text()
    assert "MatMul" in before
    assert "Relu" in before  # the graph before the pass, not after
    assert "initializer w FLOAT [2,2]" in before
    assert "kept in the reproducer" in before
    rest = (folder / "recipe.toml").read_text()
    assert rest.count("[[pass]]") == 2  # this pass and what would follow
    assert 'name = "custom"' in rest
    assert "opset = 22" in rest


def test_a_crash_keeps_its_cause(model, context):
    with pytest.raises(BrokenPassError) as raised:
        run(crash, model, context)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_no_reproducer_is_no_reason_to_hide_the_fault(model, context, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(BrokenPassError, match=r"ZeroDivisionError.*no reproducer could"):
        run(crash, model, context)


def test_many_faults_are_cut_short(model, context):
    def spoil(model, context):
        for number in range(9):
            spare = ir.Value(name=f"spare{number}")
            model.graph.initializers[spare.name] = spare

    with pytest.raises(BrokenPassError, match="and 4 more"):
        run(spoil, model, context)


# The verifier alone.


def faults(model, change):
    interface = Interface.of(model)
    change(model, None)
    return list(faults_of(model, interface))


def test_a_sound_model_has_no_faults(zoo):
    for make in zoo.values():
        model = make()
        assert list(faults_of(model, Interface.of(model))) == []
        assert checker_fault(model) is None


@pytest.mark.parametrize(
    ("function", "fault"),
    [(f, text) for f, text in BROKEN if f not in (crash, bad_attribute)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_each_fault_is_found(function, fault, model):
    assert any(fault in line for line in faults(model, function))


def test_an_output_that_nobody_makes(model):
    def orphan(model, context):
        list(model.graph)[1].outputs[0].name = "old"
        y = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2]))
        model.graph.outputs[0] = y

    assert "output 'y' is made by no node" in faults(model, orphan)


def test_a_value_of_another_graph(model):
    def borrow(model, context):
        stranger = ir.from_onnx_text(TEXT).graph.inputs[0]
        next(iter(model.graph)).replace_input_with(0, stranger)

    assert faults(model, borrow) == ["node 'mul' (MatMul) reads 'x' before it is made"]


@pytest.mark.parametrize("name", ["", None])
def test_a_value_without_a_name_that_is_read(model, name):
    def unname(model, context):
        next(iter(model.graph)).outputs[0].name = name

    assert any("has no name" in line for line in faults(model, unname))


def test_reordered_outputs_change_the_interface():
    text = TEXT.replace("(float[2,2] y)", "(float[2,2] y, float[2,2] h)")
    found = faults(ir.from_onnx_text(text), lambda m, _: m.graph.outputs.reverse())
    assert any("the interface changed" in line for line in found)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"mode": "dynamic"}, "dynamic without a format"),
        ({"low": 0.5, "high": 1.0}, "the range [0.5, 1.0] does not contain zero"),
        ({"format": Format("int8", PerAxis(2))}, "axis 2 of a rank-2 value"),
        ({"format": Format("int8", PerAxis(-1))}, "axis -1 of a rank-2 value"),
    ],
)
def test_impossible_notes(model, fields, fault):
    found = faults(model, lambda m, _: notes.write(m.graph.initializers["w"], **fields))
    assert found == [f"note on 'w': {fault}"]


def test_legal_notes(model):
    def annotate(model, context):
        w = model.graph.initializers["w"]
        notes.write(w, format=Format("int8", PerAxis(1)), mode="static", low=-1.0, high=0.0)

    assert faults(model, annotate) == []


BRANCHES = f"""{HEADER}
g (bool c, float[2] x) => (float[2] y) {{
    h = Relu(x)
    y = If (c) <then_branch = a () => (float[2] t) {{ t = Neg(h) }},
                else_branch = b () => (float[2] e) {{ e = Abs(h) }}>
}}"""


def test_faults_inside_branches():
    model = ir.from_onnx_text(BRANCHES)
    assert list(faults_of(model, Interface.of(model))) == []

    def hide(model, context):
        relu, branch = model.graph
        model.graph.remove(relu)
        model.graph.insert_after(branch, relu)

    found = faults(model, hide)
    assert [line.split(" reads ")[1] for line in found] == ["'h' before it is made"] * 2


def test_names_are_unique_across_branches():
    def clash(model, context):
        inner = model.graph[1].attributes["then_branch"].as_graph()
        inner[0].outputs[0].name = "h"

    assert "two values are named 'h'" in faults(ir.from_onnx_text(BRANCHES), clash)


def test_the_long_name_of_the_standard_domain_counts():
    model = ir.from_onnx_text(TEXT.replace('"" : 21', '"ai.onnx" : 21'))
    assert list(faults_of(model, Interface.of(model))) == []


def test_an_initializer_that_is_an_input_too_is_no_interface(model):
    w = model.graph.initializers["w"]
    interface = Interface.of(model)
    model.graph.inputs.append(w)
    assert Interface.of(model) == interface
