"""Plans on disk: what is written is read, and what is no plan is refused in one line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler import saved_plan
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.saved_plan import SavedPlan

VALUES = {
    "x": {"format": "uint8 per_tensor", "mode": "static", "low": -1.0, "high": 2.5, "why": "seen"},
    "b": {"format": "int8 per_axis(0)", "mode": "static", "losses": {"float": 0.0}},
    "a": {"mode": "float"},
}
RECIPE = Recipe.parse(
    'tidy{opset=25},fold-batchnorm,calibrate,rank-weights{signals=["kurtosis"]},'
    "assign-bits{widths=[8,4] average_bits=5.0},"
    'insert-qdq,round-weights{clip="mse"},quantize-biases'
)
DECIDING = Recipe.parse('tidy,read-plan,assign-bits{method="plan"},insert-qdq')


@pytest.fixture
def written(tmp_path):
    """`written(data)`: the path of a plan.json with this data, or these bytes."""

    def write(data):
        path = tmp_path / "plan.json"
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        path.write_bytes(content)
        return path

    return write


def plan():
    return SavedPlan.of(RECIPE, VALUES)


def test_a_plan_holds_what_does_not_decide():
    one = plan()
    before = [p.name for p in one.before.passes]
    assert before[:2] == ["tidy", "fold-batchnorm"]
    assert not any(p.decides for p in one.before.passes)
    assert one.before.passes[0] == RECIPE.passes[0]  # with its options
    assert one.behind == Recipe.parse('insert-qdq,round-weights{clip="mse"},quantize-biases')
    assert one.values == VALUES


def test_a_plan_replays_with_the_decisions_of_another_recipe():
    replay = plan().recipe(DECIDING)
    names = [p.name for p in replay.passes]
    at = names.index("read-plan")
    assert replay.passes[:at] == plan().before.passes
    assert names[at:] == [
        "read-plan",
        "assign-bits",
        "insert-qdq",
        "round-weights",
        "quantize-biases",
    ]
    assert replay.passes[at + 1].method == "plan"
    # What replays leaves the plan that it was made by.
    assert SavedPlan.of(replay, VALUES) == plan()


def test_a_recipe_without_a_decision():
    recipe = Recipe.parse("tidy,insert-qdq")
    one = SavedPlan.of(recipe, {})
    assert (one.before, one.behind) == (recipe, Recipe(()))
    assert SavedPlan.from_json(one.as_json(), "here") == one


@pytest.mark.parametrize("text", ["assign-bits", "assign-bits,insert-qdq", "tidy,assign-bits"])
def test_a_recipe_with_nothing_before_or_behind(text, written):
    one = SavedPlan.of(Recipe.parse(text), VALUES)
    assert SavedPlan.read(written({"cpu": one.as_json()}), "cpu") == one


def test_a_plan_reads_back_in_its_order(written):
    path = written({"npu": {"before": "", "behind": "", "values": {}}, "cpu": plan().as_json()})
    found = SavedPlan.read(path, "cpu")
    assert found == plan()
    assert list(found.values) == ["x", "b", "a"]  # graph order, not the alphabet's
    assert SavedPlan.read(path, "npu") == SavedPlan(Recipe(()), Recipe(()), {})


NAMES = st.text(min_size=1, max_size=8)
NOTES = st.dictionaries(
    st.sampled_from(["low", "why", "mode"]), st.text(max_size=5) | st.floats(-1e3, 1e3)
)


@given(st.dictionaries(NAMES, NOTES, max_size=5))
def test_any_names_and_notes_read_back(values):
    one = SavedPlan.of(RECIPE, values)
    again = SavedPlan.from_json(json.loads(json.dumps(one.as_json())), "here")
    assert again == one
    assert list(again.values) == list(values)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b'{"cpu": ',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"cpu": {"before": "", "behind": "", "values": {"w": {"bytes": ' + b"9" * 5000 + b"}}}}",
    ],
)
def test_a_file_that_is_no_json(written, content):
    with pytest.raises(RecipeError, match=r"cannot read the plan .*plan\.json: ") as error:
        SavedPlan.read(written(content), "cpu")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecipeError, match="cannot read the plan"):
            SavedPlan.read(path, "cpu")


def test_a_file_that_is_too_large(written, monkeypatch):
    path = written({"cpu": plan().as_json()})
    size = path.stat().st_size
    monkeypatch.setattr(saved_plan, "LARGEST", size)
    assert SavedPlan.read(path, "cpu") == plan()
    monkeypatch.setattr(saved_plan, "LARGEST", size - 1)
    with pytest.raises(RecipeError, match=rf"is larger than {size - 1} bytes: no plan"):
        SavedPlan.read(path, "cpu")


@pytest.mark.parametrize(
    ("data", "known"),
    [({"npu": {}, "dsp": {}}, "'dsp', 'npu'"), ({}, ""), ([], ""), ("cpu", ""), (None, "")],
)
def test_a_plan_of_other_targets(written, data, known):
    with pytest.raises(RecipeError, match=rf"has no plan for target 'cpu'; it has \[{known}\]"):
        SavedPlan.read(written(data), "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [d], "expected an object with before, behind, values"),
        (lambda d: None, "expected an object with before, behind, values"),
        (lambda d: {**d, "more": 1}, "expected an object with before, behind, values"),
        (lambda d: {"values": d["values"]}, "expected an object with before, behind, values"),
        (lambda d: {**d, "before": 3}, "before is no str"),
        (lambda d: {**d, "behind": None}, "behind is no str"),
        (lambda d: {**d, "behind": ["tidy"]}, "behind is no str"),
        (lambda d: {**d, "values": []}, "values is no dict"),
        (lambda d: {**d, "values": {"w": "float"}}, "the note of 'w' is no object"),
        (lambda d: {**d, "values": {"w": {}, "v": None}}, "the note of 'v' is no object"),
    ],
)
def test_a_plan_of_another_form(written, change, message):
    path = written({"cpu": change(plan().as_json())})
    with pytest.raises(RecipeError) as error:
        SavedPlan.read(path, "cpu")
    assert str(error.value) == f"{path}, target cpu: {message}"


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("before", "tydi", "unknown pass 'tydi'; did you mean 'tidy'"),
        ("behind", "insert-qdq{depth=3}", "insert-qdq has no option 'depth'"),
        ("behind", "round-weights{clip=3}", "round-weights: option clip = 3"),
        ("before", "tidy,,insert-qdq", "expected a pass or target name"),
        ("behind", " ", "expected a pass or target name"),
    ],
)
def test_passes_that_there_are_not(written, field, text, message):
    path = written({"cpu": {**plan().as_json(), field: text}})
    with pytest.raises(RecipeError, match=message) as error:
        SavedPlan.read(path, "cpu")
    assert error.value.__notes__ == [f"in {path}, target cpu"]
