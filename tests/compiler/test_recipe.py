import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler import lookup
from fourfold.compiler.contract import Pass, Target
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.lookup import load, make, make_pass, make_target, names
from fourfold.compiler.recipe import Recipe, parse_items
from fourfold.passes.assign_bits import AssignBits
from fourfold.passes.calibrate import Calibrate
from fourfold.passes.tidy import Tidy
from fourfold.targets.cpu import Cpu

EVERY_PASS = names("passes")
TRICKY = st.text(st.sampled_from("\"{}[],=\\ \n\t'a#") | st.characters(exclude_categories=["Cs"]))


def both_ways(recipe):
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", EVERY_PASS)
def test_every_pass_round_trips(name):
    one = make_pass(name, {})
    assert one.name == name
    assert str(one) == name  # defaults are not printed
    both_ways(Recipe((one,)))


@given(
    st.lists(TRICKY, max_size=4),
    st.floats(allow_nan=False),
    st.booleans(),
    st.integers(2, 8),
    st.floats(50, 100, exclude_min=True),
)
def test_options_round_trip(keep, floor, embeddings, weights, percentile):
    one = AssignBits(weights=weights, floor_db=floor, keep=tuple(keep), embeddings=embeddings)
    two = Calibrate(method="percentile", percentile=percentile, weights=weights)
    both_ways(Recipe((one, two, Tidy(opset=weights))))


def test_the_order_and_repeats_stay():
    recipe = Recipe((Tidy(), Calibrate(), Tidy(opset=23)))
    assert str(recipe) == "tidy,calibrate,tidy{opset=23}"
    both_ways(recipe)


def test_cpu_recipes_round_trip():
    from fourfold.compiler.precision import Precision

    for text in ("w8a8", "w4a8", "w2a8", "w4"):
        for ranges in ("auto", "static", "dynamic"):
            both_ways(Cpu().recipe(Precision.parse(text, ranges)))


def test_written_by_hand():
    text = ' tidy , calibrate{ method=minmax  weights = 4 } ,\nassign_bits{keep=["a{,}=\\"b"]} '
    expected = (Tidy(), Calibrate(method="minmax", weights=4), AssignBits(keep=('a{,}="b',)))
    assert Recipe.parse(text).passes == expected
    assert Recipe.parse("tidy{}") == Recipe((Tidy(),))


def test_toml_written_by_hand():
    text = '[[pass]]\nname = "calibrate"\nmethod = "minmax"\n[[pass]]\nname = "tidy"\n'
    assert Recipe.from_toml(text).passes == (Calibrate(method="minmax"), Tidy())


@pytest.mark.parametrize(
    ("text", "character", "expected"),
    [
        ("", 1, "a pass or target name"),
        ("tidy,", 6, "a pass or target name"),
        ("tidy,,tidy", 6, "a pass or target name"),
        ("tidy;calibrate", 5, "','"),
        ("tidy calibrate", 6, "','"),
        ("tidy{opset}", 6, "'key=value' or '}'"),
        ("tidy{opset=3", 13, "'key=value' or '}'"),
        ("tidy{opset=3,fold_limit=4}", 13, "'key=value' or '}'"),
        ("tidy{opset=}", 12, "a value"),
        ('tidy{opset="3}', 12, "a value"),
        ("assign-bits{keep=[}", 18, "a value"),
        ("tidy}", 5, "','"),
    ],
)
def test_syntax_errors_point_at_the_character(text, character, expected):
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(text)
    got = repr(text[character - 1 : character + 9] or "the end")
    message = f"recipe, character {character}: expected {expected}, got {got} in {text!r}"
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tydi", "unknown pass 'tydi'; did you mean 'tidy'"),
        ("quite-another-thing", "unknown pass 'quite-another-thing'; known: assign-bits, "),
        ("calibrate{methd=mse}", "calibrate has no option 'methd'; did you mean 'method'"),
        ("calibrate{method=msse}", "calibrate: option method = 'msse': "),
        ("calibrate{weights=9}", "calibrate: option weights = 9: "),
        ("tidy{opset=new}", "tidy: option opset = 'new': "),
        ("assign-bits{keep=[1]}", "assign-bits: option keep.0 = 1: "),
        ("tidy{opset=1 opset=2}", "option 'opset' is given twice"),
    ],
)
def test_errors_of_content(text, message):
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[pass", "not TOML"),
        ("", "holds [[pass]] tables and nothing else"),
        ("pass = 3", "holds [[pass]] tables and nothing else"),
        ("seed = 1\n[[pass]]\nname = 'tidy'", "got ['seed']"),
        ("[[pass]]\nopset = 3", "[[pass]] number 1 has no name"),
        ("pass = [1]", "[[pass]] number 1"),
        ("pass = ['tidy']", "[[pass]] number 1"),
        ("[[pass]]\nname = 'tidy'\nopste = 3", "did you mean 'opset'"),
        ("[[pass]]\nname = 'tydi'", "did you mean 'tidy'"),
    ],
)
def test_errors_of_toml(text, message):
    with pytest.raises(RecipeError) as raised:
        Recipe.from_toml(text)
    assert message in str(raised.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.from_regex(r"[a-z]\w{0,5}", fullmatch=True), JSON, max_size=3))
def test_any_json_is_an_option(options):
    from fourfold.compiler.contract import _text

    text = "x{" + " ".join(f"{key}={_text(value)}" for key, value in options.items()) + "},y"
    assert parse_items(text) == [("x", options), ("y", {})]


def test_names_are_file_names():
    assert "round-weights" in EVERY_PASS
    assert "cpu" in names("targets")
    assert sorted(EVERY_PASS) == EVERY_PASS


def test_load():
    assert load(Pass, "assign-bits") is AssignBits is load(Pass, "assign_bits")
    assert load(Target, "cpu") is Cpu
    with pytest.raises(RecipeError, match="unknown target 'cup'; did you mean 'cpu'"):
        load(Target, "cup")


def test_load_wants_one_class_in_a_file(monkeypatch):
    import types

    module = types.ModuleType("fourfold.passes.tidy")
    monkeypatch.setattr(lookup.importlib, "import_module", lambda name: module)
    with pytest.raises(TypeError, match="defines 0 classes of Pass"):
        load(Pass, "tidy")


def test_make_target():
    assert make_target("cpu") == Cpu()
    assert make_target('cpu{isa="avx2"}') == Cpu(isa="avx2") == make_target("cpu{isa=avx2}")
    assert str(make_target("cpu{isa=avx2}")) == 'cpu{isa="avx2"}'
    with pytest.raises(RecipeError, match="option isa = 'mips'"):
        make_target("cpu{isa=mips}")
    with pytest.raises(RecipeError, match="expected one target"):
        make_target("cpu,cpu")


def test_options_are_frozen():
    from pydantic import ValidationError

    one = make(Pass, "tidy", {"opset": 23})
    with pytest.raises(ValidationError):
        one.opset = 21


def test_passes_take_other_options():
    recipe = Recipe.parse("tidy,calibrate{method=mse},assign-bits{weights=4 affine=true}")
    changed = recipe.with_options("assign-bits{weights=2 block=32},tidy{opset=25}")
    expected = "tidy{opset=25},calibrate{method=mse},assign-bits{weights=2 affine=true block=32}"
    assert changed == Recipe.parse(expected)
    assert recipe.with_options("tidy{opset=21},tidy{opset=25}").passes[0] == Tidy(opset=25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tidi{opset=25}", "no pass 'tidi' in the recipe tidy,calibrate; did you mean 'tidy'"),
        ("tidy{opsets=25}", "opsets"),
        ("tidy{opset=25", "expected"),
    ],
)
def test_other_options_that_are_none(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse("tidy,calibrate").with_options(text)
