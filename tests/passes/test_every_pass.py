"""What holds for every pass, whatever it does; a new file in passes/ is tested by being there."""

import importlib
import inspect
import re
import types
import typing
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import lookup, notes
from fourfold.compiler.contract import Pass
from fourfold.compiler.feeds import input_specs, made_up
from fourfold.compiler.graph import values
from fourfold.compiler.precision import Precision
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.compiler.split_plan import SplitWish
from fourfold.compiler.verifier import Interface
from fourfold.targets.cpu import Cpu

NAMES = lookup.names("passes")
EVERY = pytest.mark.parametrize("name", NAMES)
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

# Beside the zoo: integers as inputs, a Concat, a subgraph, and names that passes might want.
EMBEDDING = f"""{HEADER} embedding (int64[n,4] x) => (float[n,4,3] y)
<float[6,3] table = {{1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18}},
 float[3,3] w = {{1,2,3,4,5,6,7,8,9}}, float[3] w_scale = {{1,2,3}}> {{
    e = Gather (table, x)
    m = MatMul (e, w)
    y = Add (m, w_scale)
}}"""
BRANCHES = f"""{HEADER} branches (float[n,2,4,4] x, bool c) => (float[n,4,4,4] y)
<float[2,2,1,1] w = {{1,-2,3,4}}, float[2] b = {{1,2}}> {{
    a = Conv (x, w, b)
    r = Relu (a)
    s = Conv (r, w)
    j = Concat <axis = 1> (r, s)
    y = If (c) <then_branch = t () => (o) {{ o = Neg (j) }},
                else_branch = e () => (p) {{ p = Abs (j) }}>
}}"""


@pytest.fixture
def models(zoo):
    """Name -> function that makes a model: the zoo and the two above."""
    texts = {"embedding": EMBEDDING, "branches": BRANCHES}
    return {**zoo, **{name: lambda text=text: _parsed(text) for name, text in texts.items()}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is taken from what an earlier run measured."""
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


def _parsed(text):
    model = ir.from_onnx_text(text)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"node_{number}"
    ShapeInferencePass()(model)
    return model


def before(name, model, context, bits=8):
    """Return the model as the pass finds it in one of the CPU target's recipes."""
    for precision in (
        Precision(weights=bits),
        Precision(widths=(bits, 2)),
        Precision(weights=bits, planned=True),
        Precision(weights=2, split=SplitWish("auto")),
        Precision(weights=2, activations=None, split=SplitWish("codebook")),
    ):
        recipe = Cpu(isa="vnni").recipe(precision).passes
        names = [one.name for one in recipe]
        if name in names:
            return run(Recipe(recipe[: names.index(name)]), model, context)[0]
    return model.clone()


def fed(context, model, bits=8):
    """Return a context with feeds, and with the plan that the CPU target's recipe makes."""
    feeds = made_up(input_specs(model), seed=0, count=8)
    around = replace(context, feeds=feeds, remarks=[])
    first, decide, _ = Cpu(isa="vnni").recipe(Precision(weights=bits)).parts()
    planned, _ = run(Recipe((*first.passes, *decide.passes)), model, around)
    return replace(around, plan=notes.plan(planned), remarks=[], decisions=[])


def look(model):
    """Print all that a pass could change: nodes, weights, notes."""
    weights = {
        name: (str(v.dtype), v.const_value.numpy().tobytes())
        for name, v in model.graph.initializers.items()
    }
    nodes = [
        (
            *(node.name, node.domain, node.op_type),
            [v and v.name for v in node.inputs],
            [(v.name, str(v.type), str(v.shape)) for v in node.outputs],
            [str(a) for a in node.attributes.values() if a.type != ir.AttributeType.GRAPH],
        )
        for node in model.graph.all_nodes()
    ]
    return nodes, weights, notes.plan(model), dict(model.graph.opset_imports)


@EVERY
def test_the_file_defines_exactly_one_pass_of_its_name(name):
    module = importlib.import_module(f"fourfold.passes.{name.replace('-', '_')}")
    own = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, Pass)
        and member.__module__ == module.__name__
    ]
    assert len(own) == 1
    assert own[0]().name == name
    assert own[0] is lookup.load(Pass, name)


@EVERY
def test_the_docstring_shows_what_becomes_what(name):
    doc = importlib.import_module(f"fourfold.passes.{name.replace('-', '_')}").__doc__
    assert re.search(r"^before: +\S", doc, re.MULTILINE), "the docstring shows no 'before:'"
    assert re.search(r"^becomes: +\S", doc, re.MULTILINE), "the docstring shows no 'becomes:'"
    assert doc.splitlines()[0].endswith((".", ":"))


@EVERY
def test_every_option_is_told_and_has_a_default(name):
    kind = lookup.load(Pass, name)
    for option, field in kind.model_fields.items():
        assert not field.is_required(), option
        assert re.search(rf"^ +{option}: \S", kind.__doc__, re.MULTILINE), option


def candidates(kind):
    """Yield values of an option's type, plain ones first."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        yield from (True, False)
    elif kind in (int, float):
        yield from (kind(3.5), kind(51.5), kind(0.5))
    elif kind is str:
        yield from ("first", "a.*b{2}", 'with "quotes" and \\ ')
    elif origin is typing.Literal:
        yield from inner
    elif origin in (typing.Union, types.UnionType):
        for one in inner:
            yield from candidates(one)
    elif origin is tuple:
        yield tuple(candidates(inner[0]))


def other_than_default(kind):
    """Return an instance whose options all differ from their defaults."""
    options = {}
    for option, field in kind.model_fields.items():
        for value in candidates(field.annotation):
            try:
                kind(**{option: value})
            except ValueError:
                continue
            if value != field.default:
                options[option] = value
                break
    return kind(**options)


@EVERY
def test_it_prints_and_parses_back(name):
    kind = lookup.load(Pass, name)
    for one in (kind(), other_than_default(kind)):
        recipe = Recipe((one, one))
        assert Recipe.parse(str(recipe)) == recipe
        assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert set(other_than_default(kind).changed()) == set(kind.model_fields)


@EVERY
@pytest.mark.parametrize("bits", [8, 4])
def test_it_keeps_the_interface_and_passes_the_verifier(name, bits, models, context):
    """The runner verifies after every pass; it raises BrokenPassError."""
    for make in models.values():
        source = make()
        given = look(source)
        around = fed(context, source, bits)
        model = before(name, source, around, bits)
        after, rows = run(Recipe((lookup.make_pass(name, {}),)), model, around)
        assert Interface.of(after) == Interface.of(source)
        assert set(rows[0].lost_notes) <= {r.subject for r in around.remarks}
        assert look(source) == given, "the caller's model was touched"
        names = [v.name for v in values(after)]
        assert len(names) == len(set(names))


@EVERY
def test_it_settles(name, models, context):
    for which, make in models.items():
        source = make()
        around = fed(context, source)
        model = before(name, source, around)
        one = lookup.make_pass(name, {})
        once, first = run(Recipe((one,)), model, around)
        twice, second = run(Recipe((one,)), once, around)
        assert second[0].changed == 0, which
        assert look(once) == look(twice), which
        if first[0].changed == 0 and name != "tidy":  # tidy counts nodes that went, nothing else
            assert look(once) == look(model), f"{which}: changed without counting it"


@EVERY
def test_it_says_nothing_and_changes_nothing_on_a_model_without_weights(name, context):
    text = f"{HEADER} g (float[2] x) => (float[2] y) {{ [only] y = Tanh (x) }}"
    model = _parsed(text)
    around = fed(context, model)
    after, rows = run(Recipe((lookup.make_pass(name, {}),)), model, around)
    assert rows[0].changed == 0
    assert around.remarks == []
    assert look(after) == look(model)


def test_all_of_them_together_keep_the_numbers(models, context, outputs):
    """Every model through the whole recipe, with eight bits: within 20 dB of its source."""
    for which, make in models.items():
        source = make()
        around = fed(context, source)
        model, _ = run(Cpu(isa="vnni").recipe(Precision()), source, around)
        batch = next(iter(around.feeds))
        expected, got = (outputs(m, **batch)["y"] for m in (source, model))
        noise = np.square(expected - got).sum()
        assert 10 * np.log10(np.square(expected).sum() / noise) > 20, which
