import json

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler import notes
from fourfold.compiler.errors import ModelError, RecipeError
from fourfold.compiler.formats import Format, PerAxis, Split
from fourfold.compiler.model import load, save
from fourfold.compiler.notes import EMPTY, KEY, Note

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> {
    h = MatMul(x, w)
    y = Relu(h)
}"""
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.none() | FLOATS
FIGURES = st.none() | st.dictionaries(st.text(max_size=5), FLOATS, max_size=3)
COUNTS = st.none() | st.integers(0, 1 << 50)
NOTES = st.builds(
    Note,
    format=st.sampled_from(
        [
            None,
            Format("uint8"),
            Format("int8", PerAxis(1), 7),
            Format("uint2", PerAxis(1), split=Split("int8-grid", 16, PerAxis(1), 1, grid=7)),
        ]
    ),
    mode=st.sampled_from([None, "static", "dynamic", "float"]),
    low=NUMBERS,
    high=NUMBERS,
    sqnr_db=NUMBERS,
    shares=st.none() | st.text(max_size=5),
    activation=st.sampled_from([None, "float", "uint8"]),
    block=COUNTS,
    importance=FIGURES,
    losses=FIGURES,
    loss=NUMBERS,
    bytes=COUNTS,
    seconds=NUMBERS,
    cost_source=st.sampled_from([None, "measured", "nearest", "shipped"]),
    split=st.none() | st.text(max_size=5),
    part=st.none() | st.text(max_size=5),
    why=st.none() | st.text(max_size=20),
)


@pytest.fixture
def model():
    return ir.from_onnx_text(TEXT)


def value(model, name):
    return next(v for v in notes.values(model) if v.name == name)


def replaced(model, name):
    """Put a fresh node and value of the same name in the place of one, as rewriters do."""
    old = value(model, name)
    new = ir.node("MatMul", old.producer().inputs, name="fresh")
    new.outputs[0].name = name
    ir.convenience.replace_nodes_and_values(
        model.graph, old.producer(), [old.producer()], [new], [old], new.outputs
    )
    new.outputs[0].meta.clear()
    return new.outputs[0]


def test_write_keeps_the_other_fields(model):
    h = value(model, "h")
    assert notes.read(h) == EMPTY
    notes.write(h, low=-1.0)
    notes.write(h, high=2.0, why="seen")
    assert notes.read(h) == Note(low=-1.0, high=2.0, why="seen")


@given(NOTES)
def test_json_round_trip(note):
    assert Note.from_json(note.as_json()) == note
    assert Note.from_json(json.loads(json.dumps(note.as_json(), allow_nan=False))) == note
    assert None not in note.as_json().values()


def test_json_of_a_note():
    note = Note(format=Format("int8", PerAxis(0)), mode="static", low=-1.0)
    assert note.as_json() == {"format": "int8 per_axis(0)", "mode": "static", "low": -1.0}


def test_json_of_a_part():
    whole = Format("uint2", PerAxis(1), split=Split("branches", zero=True))
    note = Note(format=whole.plain, split=str(whole), part="w")
    assert note.as_json() == {
        "format": "uint2 per_axis(1)",
        "split": "uint2 per_axis(1) split(branches,3,per_tensor,zero)",
        "part": "w",
    }
    assert Note(format=whole).as_json() == {"format": note.split}


def test_json_of_a_hand_edited_plan_is_checked():
    with pytest.raises(RecipeError, match="'hihg'; did you mean 'high'"):
        Note.from_json({"low": 0.0, "hihg": 1.0})
    with pytest.raises(RecipeError, match="not a format: 'int8'"):
        Note.from_json({"format": "int8"})
    with pytest.raises(RecipeError, match=r"not a split: 'split\(codebook\)'"):
        Note.from_json({"format": "uint2 per_tensor split(codebook)"})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 8),
        ("mode", "statik"),
        ("mode", None),
        ("activation", 8),
        ("low", "1"),
        ("low", NAN),
        ("high", INF),
        ("high", True),
        ("block", 1.5),
        ("bytes", "12"),
        ("importance", 3.0),
        ("importance", {"lim": "high"}),
        ("losses", {"float": NAN}),
        ("losses", {8: 0.0}),
        ("split", 3),
        ("part", 0),
        ("why", ["because"]),
    ],
)
def test_json_of_the_wrong_type_is_refused(field, value):
    with pytest.raises(RecipeError, match=f"plan field {field} = "):
        Note.from_json({field: value})


def test_merge_joins_what_does_not_contradict():
    merged = notes.merge(Note(low=0.0, why="a"), Note(high=1.0, why="a"), "h")
    assert merged == Note(low=0.0, high=1.0, why="a")
    assert notes.merge(EMPTY, merged, "h") == merged == notes.merge(merged, EMPTY, "h")


def test_two_different_notes_do_not_merge():
    with pytest.raises(ModelError, match=r"two plans meet at 'h': low is 0.0 and -1.0"):
        notes.merge(Note(low=0.0), Note(low=-1.0), "h")


def test_move(model):
    w, h = value(model, "w"), value(model, "h")
    notes.write(w, low=-1.0)
    notes.write(h, high=1.0)
    notes.move(w, h)
    assert (notes.read(w), notes.read(h)) == (EMPTY, Note(low=-1.0, high=1.0))
    notes.write(w, low=-3.0)
    with pytest.raises(ModelError, match="'h'"):
        notes.move(w, h)


def test_kept_follows_the_name_of_a_new_value(model):
    notes.write(value(model, "h"), low=-1.0)
    with notes.kept(model) as lost:
        fresh = replaced(model, "h")
        assert notes.read(fresh) == EMPTY
    assert lost == []
    assert notes.read(value(model, "h")) == Note(low=-1.0)


def test_kept_follows_a_moved_note_and_a_renamed_value(model):
    w, h = value(model, "w"), value(model, "h")
    notes.write(w, low=-1.0)
    notes.write(h, high=4.0)
    with notes.kept(model) as lost:
        notes.move(w, value(model, "x"))
        h.name = "hidden"
    assert lost == []
    assert notes.read(value(model, "x")) == Note(low=-1.0)
    assert notes.read(w) == EMPTY
    assert notes.read(value(model, "hidden")) == Note(high=4.0)


def test_kept_does_not_overwrite_what_the_pass_decided(model):
    notes.write(value(model, "h"), low=-1.0)
    with notes.kept(model):
        notes.write(replaced(model, "h"), low=-2.0)
    assert notes.read(value(model, "h")) == Note(low=-2.0)


def test_kept_tells_what_was_lost(model):
    notes.write(value(model, "h"), low=-1.0)
    notes.write(value(model, "w"), why="stays")
    with notes.kept(model) as lost:
        y = model.graph.outputs[0].producer()
        y.replace_input_with(0, model.graph.inputs[0])
        model.graph.remove(next(n for n in model.graph if n.op_type == "MatMul"), safe=True)
    assert lost == ["h"]


def test_plan_and_back(model):
    notes.write(value(model, "h"), low=-1.0, high=1.0)
    notes.write(value(model, "w"), format=Format("int4", PerAxis(1)), mode="static")
    plan = notes.plan(model)
    assert list(plan) == ["w", "h"]  # in graph order
    again = ir.from_onnx_text(TEXT)
    notes.apply_plan(again, plan)
    assert notes.plan(again) == plan


def test_a_plan_of_another_model_is_refused(model):
    with pytest.raises(RecipeError, match="plan: the model has no value 'hh'; did you mean 'h'"):
        notes.apply_plan(model, {"h": {"low": -1.0}, "hh": {}})
    assert notes.plan(model) == {}
    with pytest.raises(RecipeError, match="plan field low = 'deep'") as error:
        notes.apply_plan(model, {"w": {"high": 1.0}, "h": {"low": "deep"}})
    assert error.value.__notes__ == ["in the plan of 'h'"]
    assert notes.plan(model) == {}


def test_notes_survive_a_clone_and_a_file(model, tmp_path):
    notes.write(value(model, "h"), low=-1.0)
    notes.write(value(model, "w"), format=Format("int4", PerAxis(1)))
    expected = notes.plan(model)
    assert notes.plan(model.clone()) == expected
    notes.to_metadata(model)
    save(model, tmp_path / "model.onnx")
    again = load(tmp_path / "model.onnx")
    assert notes.plan(again) == {}
    notes.from_metadata(again)
    assert notes.plan(again) == expected
    assert all(KEY not in v.metadata_props for v in notes.values(again))
