"""What holds for every target; a new file in targets/ is tested by being there."""

import inspect

import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler import lookup
from fourfold.compiler.choices import Choice
from fourfold.compiler.contract import Target
from fourfold.compiler.costs import Workload
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.formats import Format, PerAxis
from fourfold.compiler.graph import weight_of
from fourfold.compiler.precision import Precision
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.verifier import Interface

EVERY = pytest.mark.parametrize("name", lookup.names("targets"))
PRECISIONS = pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w2a8", "w8", "w4"])


def made(name):
    """Return the target, or skip where its runtime is an extra that is not installed."""
    target = lookup.make_target(name)
    missing = target.missing()
    if missing:
        pytest.skip(f"{name} needs {missing}")
    return target


@EVERY
def test_the_file_defines_one_target_of_its_name(name):
    assert lookup.load(Target, name)().name == name


@EVERY
@PRECISIONS
def test_its_recipe_is_made_of_known_passes_and_round_trips(name, precision):
    recipe = lookup.make_target(name).recipe(Precision.parse(precision))
    assert recipe.passes
    assert {one.name for one in recipe.passes} <= set(lookup.names("passes"))
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@EVERY
@PRECISIONS
def test_what_it_emits_runs_and_keeps_the_interface(name, precision, zoo, compiled):
    target = made(name)
    for make in zoo.values():
        source = make()
        variant = compiled(target, source, precision)
        assert variant.emitted.entry in variant.emitted.files
        assert all(file.is_file() for file in variant.emitted.files)
        assert Interface.of(variant.model) == Interface.of(source)
        batch = next(iter(variant.context.feeds))
        outputs = variant.runner(batch)
        assert list(outputs) == [v.name for v in source.graph.outputs]
        for array in outputs.values():
            assert array.dtype == np.float32
            assert array.shape[0] == len(batch["x"])
            assert np.isfinite(array).all()
        assert sum(variant.placement.kernels.values()) > 0


@EVERY
def test_an_operator_that_it_cannot_run_is_named(name):
    text = """<ir_version: 10, opset_import: ["" : 21, "made.up" : 1]>
    g (float[2] x) => (float[2] y) { [odd] a = made.up.Fancy (x) [plain] y = Relu (a) }"""
    model = ir.from_onnx_text(text)
    lines = lookup.make_target(name).unsupported(model)
    assert len(lines) == 1
    assert "'odd'" in lines[0]
    assert "made.up::Fancy" in lines[0]


@EVERY
def test_nothing_in_the_zoo_is_unsupported(name, zoo):
    for make in zoo.values():
        assert lookup.make_target(name).unsupported(make()) == []


@EVERY
def test_options_print_and_parse_back(name):
    kind = lookup.load(Target, name)
    assert lookup.make_target(str(kind())) == kind()
    for option, field in kind.model_fields.items():
        for value in getattr(field.annotation, "__args__", ()):
            one = kind(**{option: value})
            assert lookup.make_target(str(one)) == one
    with pytest.raises(RecipeError, match=rf"{name} has no option 'nonsense'"):
        lookup.make_target(f"{name}{{nonsense=1}}")
    assert inspect.getdoc(kind)


@EVERY
def test_narrow_weights_cost_fewer_bytes(name, zoo):
    target = lookup.make_target(name)
    weighted = [w for node in zoo["convnet"]().graph if (w := weight_of(node)) is not None]
    assert len(weighted) == 3
    for weight in weighted:
        work = Workload.of(weight, (1, 8, 8, 8))
        axis = PerAxis(weight.axis)
        four, eight = (target.cost(work, Choice(Format(f"int{n}", axis))).bytes for n in (4, 8))
        floats = target.cost(work, Choice()).bytes
        assert 0 < four < eight < floats
        assert floats == weight.value.const_value.nbytes


@EVERY
def test_every_row_of_its_table_says_which_version_it_holds_for(name):
    capability = lookup.make_target(name).capability
    assert capability.rows
    for row in (*capability.rows, *capability.widened):
        assert any(c.isdigit() for c in row.since), row
    assert capability.opsets[0] <= capability.opsets[1]
    assert set(capability.packed.values()) <= set(range(capability.opsets[1] + 1))
