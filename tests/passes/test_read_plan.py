import copy
import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes
from fourfold.compiler.allocate import Limits
from fourfold.compiler.contract import silent
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.feeds import input_specs, made_up
from fourfold.compiler.intake import Data, Options, Source
from fourfold.compiler.precision import Precision
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.compiler.saved_plan import SavedPlan
from fourfold.compiler.session import open_runner
from fourfold.compiler.split_plan import SplitWish
from fourfold.compiler.workbench import Workbench
from fourfold.passes.assign_bits import AssignBits
from fourfold.passes.calibrate import Calibrate
from fourfold.passes.rank_weights import RankWeights
from fourfold.passes.read_plan import ReadPlan
from fourfold.targets.cpu import Cpu

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
TARGET = Cpu(isa="vnni")
AUTO = Precision.parse("auto")


def auto(widths=(8, 4, 2), **changed):
    return AUTO.model_copy(update={"widths": widths, "trials": 2, **changed})


def limited(widths=(8, 4, 2), **limits):
    return auto(widths, limits=Limits(**limits))


PRECISIONS = {
    "w8a8": Precision(),
    "w4a8": Precision(weights=4),
    "w3a8": Precision(weights=3),
    "w2a8": Precision(weights=2),
    "w8": Precision(activations=None),
    "w4": Precision(weights=4, activations=None),
    "static": Precision(ranges="static"),
    "dynamic": Precision(ranges="dynamic"),
    "mixed": auto(),
    "five bits": limited(average_bits=5),
    "two bits": limited(average_bits=2),
    "bytes": limited(bytes=2000),
    "loss": limited(loss=0.01),
    "with float": limited((8, 4, 2, 32), average_bits=12),
    "any kernel": limited((8, 4, 2, 32), average_bits=6, seconds=1.0),
    "greedy": auto(method="greedy", limits=Limits(average_bits=5)),
    "dynamic mixed": auto(ranges="dynamic", limits=Limits(average_bits=5)),
    "by error": auto(signals=("quantization-error",), limits=Limits(average_bits=4)),
    "split": Precision(weights=2, split=SplitWish("auto")),
    "split by channel": Precision(weights=2, split=SplitWish("int8-grid", 2, "channel")),
    "means": Precision(weights=4, split=SplitWish.parse("kmeans")),
    "means alone": Precision(weights=4, activations=None, split=SplitWish.parse("kmeans")),
    "codebook": Precision(weights=2, activations=None, split=SplitWish("codebook")),
    "branches alone": Precision(weights=2, activations=None, split=SplitWish("branches")),
    "mixed split": auto(split=SplitWish("auto"), limits=Limits(average_bits=4)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bench(tmp_path):
    """`bench(model, feeds, plan=None)`: what makes variants for the CPU, as the driver has it."""
    folders = []

    def opened(model, feeds=None, plan=None):
        folders.append(tmp_path / f"bench-{len(folders)}")
        folders[-1].mkdir()
        source = Source("model", model, folders[-1] / "none.onnx", "", 0)
        data, wanted = Data(feeds, None, False), Options(jobs=1)
        return Workbench(TARGET, source, data, wanted, folders[-1], silent, plan)

    return opened


@pytest.fixture
def made(bench):
    """`made(model, precision or recipe)`: the attempt and its plan as it lies on the disk."""

    def attempt(model, wanted):
        feeds = made_up(input_specs(model), 0, 12)
        recipe = TARGET.recipe(wanted) if isinstance(wanted, Precision) else wanted
        found = bench(model, feeds).attempt(recipe)
        return found, json.loads(json.dumps(SavedPlan.of(found.recipe, found.plan).as_json()))

    return attempt


@pytest.fixture
def replayed(bench):
    """`replayed(model, saved, ranges="auto")`: the attempt that a plan makes, without feeds."""

    def attempt(model, saved, ranges="auto"):
        plan = SavedPlan.from_json(saved, "plan.json")
        deciding = TARGET.recipe(Precision(ranges=ranges, planned=True))
        return bench(model, plan=plan.values).attempt(plan.recipe(deciding))

    return attempt


def content(attempt):
    return attempt.emitted.entry.read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_a_plan_makes_the_same_model_again(name, precision, zoo, made, replayed):
    first, saved = made(zoo[name](), PRECISIONS[precision])
    second = replayed(zoo[name](), saved, PRECISIONS[precision].ranges)
    assert second.plan == first.plan
    assert list(second.plan) == list(first.plan)
    assert SavedPlan.of(second.recipe, second.plan).as_json() == saved
    assert content(second) == content(first)
    assert second.decision.method == "plan"
    assert second.decision.average_bits == first.decision.average_bits
    assert second.decision.trials == 0


@pytest.mark.parametrize("ranges", ["auto", "static", "dynamic"])
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_the_ranges_asked_for_do_not_touch_a_plan(name, ranges, zoo, made, replayed):
    first, saved = made(zoo[name](), Precision(ranges="dynamic"))
    second = replayed(zoo[name](), saved, ranges)
    assert second.plan == first.plan
    assert content(second) == content(first)


def custom(text):
    """The passes of a compile with other decisions."""
    before, _, behind = TARGET.recipe(Precision()).parts()
    exact = [one for one in before.passes if not one.decides]
    return Recipe((*exact, *Recipe.parse(text).passes, *behind.passes))


@pytest.mark.parametrize(
    "text",
    [
        "calibrate,assign-bits{floor_db=99}",
        'calibrate,assign-bits{keep=["up","down"]}',
        'calibrate,assign-bits{activations="float" keep=["up"]}',
        'calibrate,rank-weights{signals=["quantization-error"]},'
        'assign-bits{widths=[8,4] average_bits=5 keep=["up","query"] trials=0}',
        'rank-weights{signals=["quantization-error"] activations="float"},'
        'assign-bits{widths=[8,4] average_bits=5 keep=["up"] activations="float" trials=0}',
        'calibrate{method="minmax"},assign-bits{floor_db=31 weights=4}',
    ],
)
def test_what_another_recipe_decided(text, zoo, made, replayed):
    first, saved = made(zoo["attention"](), custom(text))
    second = replayed(zoo["attention"](), saved)
    assert second.plan == first.plan
    assert content(second) == content(first)


def test_a_recipe_of_other_edits_is_replayed(zoo, made, replayed):
    recipe = Recipe.parse('tidy,calibrate,assign-bits{weights=4},round-weights{clip="minmax"}')
    first, saved = made(zoo["mlp"](), recipe)
    assert (saved["before"], saved["behind"]) == ("tidy", 'round-weights{clip="minmax"}')
    second = replayed(zoo["mlp"](), saved)
    assert str(second.recipe) == (
        'tidy,read-plan,assign-bits{method="plan"},round-weights{clip="minmax"}'
    )
    assert content(second) == content(first)


# Plans that were edited by hand.


@pytest.fixture
def edited(zoo, made, replayed):
    """`edited(name, precision, value, **fields)`: (what was, what became) of one edit."""

    def attempt(name, precision, value, gone=(), **fields):
        first, saved = made(zoo[name](), PRECISIONS[precision])
        changed = copy.deepcopy(saved)
        note = changed["values"].setdefault(value, {})
        note.update(fields)
        for field in gone:
            del note[field]
        return first, replayed(zoo[name](), changed)

    return attempt


def differing(first, second):
    """The names of values whose form, mode or scale differs between two plans."""
    fields = ("format", "mode", "activation", "shares")

    def form(plan, name):
        return [plan.get(name, {}).get(field) for field in fields]

    names = {**first.plan, **second.plan}
    return {name for name in names if form(first.plan, name) != form(second.plan, name)}


def told(attempt):
    """What the passes remarked, by what it is about."""
    return {remark.subject: remark.reason for remark in attempt.remarks}


def stored(attempt, name):
    return attempt.model.graph.initializers[f"{name}_quantized"].dtype.name


def runs(attempt):
    """Run a variant on the samples that it was calibrated on."""
    runner = open_runner(attempt.emitted.entry)
    return [runner(batch) for batch in made_up(input_specs(attempt.model), 0, 12)]


def agrees(attempt, model, floor):
    """Assert that a variant runs and that its outputs are near the model's, in dB."""
    path = attempt.emitted.entry.with_name("float.onnx")
    ir.save(model, path)
    runner = open_runner(path)
    noise = signal = 0.0
    feeds = made_up(input_specs(model), 0, 12)
    for batch, outputs in zip(feeds, runs(attempt), strict=True):
        for name, array in runner(batch).items():
            noise += np.square(outputs[name] - array).sum()
            signal += np.square(array).sum()
    assert 10 * np.log10(signal / noise) > floor


@pytest.mark.parametrize(
    ("format", "container"), [("int4 per_axis(1)", "INT4"), ("int4:3 per_axis(1)", "INT4")]
)
def test_a_weight_gets_another_width(format, container, edited, zoo):
    first, second = edited("mlp", "w8a8", "w1", format=format)
    assert differing(first, second) == {"w1"}
    assert second.plan["w1"]["format"] == format
    assert (stored(first, "w1"), stored(second, "w1")) == ("INT8", container)
    assert second.bytes < first.bytes
    assert second.decision.average_bits < first.decision.average_bits == 8
    agrees(second, zoo["mlp"](), 10)


def test_two_bits_ask_for_an_opset_that_stores_them(zoo, made, replayed):
    first, saved = made(zoo["mlp"](), Precision(weights=4))
    saved["values"]["w1"]["format"] = "int2 per_axis(1)"
    with pytest.raises(
        RecipeError,
        match="weight 'w1' cannot be stored in int2: it takes opset 25, and the plan's passes "
        r"lead to 21; write tidy\{opset=25\} where the plan says `before`",
    ):
        replayed(zoo["mlp"](), saved)
    saved["before"] = saved["before"].replace("opset=21", "opset=25")
    second = replayed(zoo["mlp"](), saved)
    assert (stored(first, "w1"), stored(second, "w1")) == ("INT4", "INT2")
    runs(second)


LOOKUP = f"""{HEADER} lookup (int64[n] x) => (float[n,8] y) {{
    [table] e = Gather (t, x)
    [sum] s = Add (e, e)
    [matmul] y = MatMul (s, w)
}}"""


def lookup():
    """Return a model of an embedding and a MatMul behind it."""
    model = ir.from_onnx_text(LOOKUP.replace("n] x", "n] x, float[40,96] t, float[96,8] w"))
    for value in list(model.graph.inputs)[1:]:
        array = np.random.default_rng(1).normal(size=value.shape.numpy()).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


@pytest.mark.parametrize("precision", ["split", "means", "means alone", "codebook"])
def test_a_plan_of_a_split_embedding_makes_the_same_model_again(precision, made, replayed):
    first, saved = made(lookup(), PRECISIONS[precision])
    assert " split(" in saved["values"]["t"]["format"]
    second = replayed(lookup(), saved)
    assert second.plan == first.plan
    assert content(second) == content(first)


@pytest.mark.parametrize(
    ("precision", "format"),
    [
        ("split", "uint2 per_axis(1) split(int8-grid,3,per_tensor)"),
        ("split by channel", "uint2 per_axis(1) split(int8-grid,2,per_axis(1))"),
        ("means", "uint4 per_axis(1) split(int8-grid,16,per_axis(1),levels=1)"),
        ("codebook", "uint2 per_axis(1) split(codebook,3,per_tensor)"),
        ("branches alone", "uint2 per_axis(1) split(branches,3,per_tensor,zero)"),
    ],
)
def test_how_a_split_is_written(precision, format, zoo, made):
    _, saved = made(zoo["mlp"](), PRECISIONS[precision])
    assert saved["values"]["w1"]["format"] == format


@pytest.mark.parametrize(
    "format",
    [
        "uint2 per_axis(1) split(int8-grid,4,per_axis(1))",
        "uint4 per_axis(1) split(int8-grid,16,per_axis(1),levels=1)",
        "uint2 per_axis(1) split(branches,2,per_tensor,zero)",
        "uint4 per_axis(1)",
        "int8 per_axis(1)",
    ],
)
def test_a_split_that_is_written_by_hand_is_obeyed(format, zoo, made, replayed):
    first, saved = made(zoo["mlp"](), PRECISIONS["split"])
    saved["values"]["w1"]["format"] = format
    second = replayed(zoo["mlp"](), saved)
    assert differing(first, second) == {"w1"}
    assert second.plan["w1"]["format"] == format
    agrees(second, zoo["mlp"](), 8)
    told = [r.reason for r in second.remarks if (r.source, r.subject) == ("split-layers", "w1")]
    assert [reason.partition(" ")[0] for reason in told] == ["into"] * ("split" in format)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("uint2 per_axis(1) split(codebook,3,per_tensor)", "cannot be uint2 .* x uint8"),
        ("uint2 per_axis(1) split(nearest,3,per_tensor)", "cannot be uint2 .* x uint8"),
        ("uint2 per_axis(1) split(branches,3,per_tensor)", "expected zero, and no levels"),
        ("uint2 per_axis(1) split(codebok,3,per_tensor)", "did you mean 'codebook'"),
        ("uint2 per_axis(1) split(int8-grid,1,per_tensor)", "1 clusters: expected 2..255"),
        ("uint2 per_axis(1) split(int8-grid,3)", "not a split"),
        ("uint8 per_axis(1) split(branches,3,per_tensor,zero)", "cannot be uint8 .* x uint8"),
    ],
)
def test_a_split_that_cannot_be_is_refused(format, message, zoo, made, replayed):
    _, saved = made(zoo["mlp"](), PRECISIONS["split"])
    saved["values"]["w1"]["format"] = format
    with pytest.raises(RecipeError, match=message):
        replayed(zoo["mlp"](), saved)


def test_a_split_asks_for_the_pass_that_carries_it_out(zoo, made, replayed):
    _, saved = made(zoo["mlp"](), Precision(weights=2))
    saved["values"]["w1"]["format"] = "uint2 per_axis(1) split(int8-grid,3,per_tensor)"
    with pytest.raises(RecipeError, match=r"'w1' is planned as uint2 .*; put split-layers before"):
        replayed(zoo["mlp"](), saved)


def test_a_weight_gets_eight_bits_where_two_were(edited):
    first, second = edited("mlp", "w2a8", "w1", format="int8 per_axis(1)")
    assert (stored(first, "w1"), stored(second, "w1")) == ("INT2", "INT8")
    runs(second)


def test_a_weight_stays_float(edited, zoo):
    first, second = edited("mlp", "w8a8", "w2", mode="float")
    assert differing(first, second) == {"r1", "h2", "w2"}
    assert second.plan["w2"]["mode"] == "float"
    assert "format" not in second.plan["w2"]
    assert second.plan["h2"] == {"mode": "float", "why": "MatMul: chosen"}
    assert "w2" in second.model.graph.initializers
    assert second.bytes > first.bytes
    agrees(second, zoo["mlp"](), 20)


def test_a_weight_is_stored_in_integers_for_a_float_kernel(edited, zoo):
    first, second = edited("mlp", "w8a8", "w2", activation="float")
    assert {"w2", "h2"} <= differing(first, second)
    assert second.plan["w2"]["format"] == "int8 per_axis(1)"
    assert "r1_QuantizeLinear" not in {node.name for node in second.model.graph}
    agrees(second, zoo["mlp"](), 20)


def test_a_float_weight_gets_an_integer_kernel(zoo, made, replayed):
    text = 'calibrate,assign-bits{keep=["fc2"]}'
    first, saved = made(zoo["mlp"](), custom(text))
    assert saved["values"]["w2"]["mode"] == "float"
    form = {"mode": "static", "format": "int8 per_axis(1)", "activation": "uint8"}
    saved["values"]["w2"].update(form)
    second = replayed(zoo["mlp"](), saved)
    quantizers = [{node.name for node in one.model.graph} for one in (first, second)]
    assert ["r1_QuantizeLinear" in names for names in quantizers] == [False, True]
    assert stored(second, "w2") == "INT8"
    agrees(second, zoo["mlp"](), 15)


def test_a_plan_of_weights_alone_gets_an_integer_kernel(edited):
    # Nothing was calibrated, so the range is taken at run time.
    first, second = edited("mlp", "w8", "w2", activation="uint8")
    assert differing(first, second) >= {"w2", "r1"}
    assert second.plan["r1"]["mode"] == "dynamic"
    assert "DynamicQuantizeLinear" in {node.op_type for node in second.model.graph}


def test_a_range_is_taken_at_run_time(edited, zoo):
    first, second = edited("attention", "w8a8", "x", mode="dynamic")
    assert differing(first, second) == {"x"}
    assert second.plan["x"]["why"] == "range at run time: asked for"
    ops = [[node.op_type for node in one.model.graph] for one in (first, second)]
    assert [one.count("DynamicQuantizeLinear") for one in ops] == [0, 1]
    agrees(second, zoo["attention"](), 20)


def test_a_range_is_fixed_again(zoo, made, replayed):
    first, saved = made(zoo["attention"](), custom("calibrate,assign-bits{floor_db=99}"))
    assert saved["values"]["x"]["mode"] == "dynamic"
    saved["values"]["x"]["mode"] = "static"
    second = replayed(zoo["attention"](), saved)
    assert differing(first, second) == {"x"}
    assert second.plan["x"]["why"].startswith("calibrated, ")


def test_another_range(zoo, edited):
    first, second = edited("attention", "w8a8", "x", low=-1.0, high=1.0)
    assert differing(first, second) == set()
    scale = second.model.graph.initializers["x_scale"].const_value.numpy()
    assert scale == np.float32(2 / 255)
    assert content(second) != content(first)


def test_notes_for_a_reader_are_no_orders(edited):
    first, second = edited("mlp", "mixed", "w1", why="since I say so", importance={"me": 7.0})
    assert second.plan["w1"]["why"] == "since I say so"
    assert second.plan["w1"]["importance"] == {"me": 7.0}
    assert content(second) == content(first)


def test_an_activation_that_no_integer_kernel_reads_is_told(edited):
    _, second = edited("mlp", "w8a8", "w2", mode="float")
    assert told(second)["r1"] == "the plan's static has no integer kernel beside it"
    assert told(second)["fc2"] == "MatMul stays float: chosen"
    assert "r1_QuantizeLinear" not in {node.name for node in second.model.graph}
    assert "mode" not in second.plan["r1"]
    _, second = edited("attention", "dynamic", "w2", mode="float")
    assert told(second)["g"] == "the plan's dynamic has no integer kernel beside it"


def test_a_plan_that_was_not_edited_leaves_no_remark_of_its_own(zoo, made, replayed):
    for name in ("convnet", "mlp", "attention"):
        first, saved = made(zoo[name](), Precision())
        assert [r.reason for r in replayed(zoo[name](), saved).remarks] == [
            r.reason for r in first.remarks
        ]


@pytest.mark.parametrize(
    ("value", "fields", "message"),
    [
        ("w1", {"format": "int16 per_axis(1)"}, r"weight 'w1' cannot be int16 per_axis\(1\) x "
         r"uint8 on onnxruntime cpu \(vnni\); legal: int8 per_axis\(1\) x float, int8"),
        ("w1", {"format": "int8 per_tensor"}, "weight 'w1' cannot be int8 per_tensor x uint8"),
        ("w1", {"format": "int8 per_axis(0)"}, r"weight 'w1' cannot be int8 per_axis\(0\)"),
        ("w1", {"format": "int4 per_block(0,16)"}, "weight 'w1' cannot be int4 per_block"),
        ("w1", {"format": "uint8 per_axis(1)"}, "weight 'w1' cannot be uint8 per_axis"),
        ("w1", {"activation": "int8"}, r"weight 'w1' cannot be int8 per_axis\(1\) x int8"),
        ("w1", {"mode": "dynamic", "format": None}, "plan field format = None"),
        ("w1", {"format": "int9 per_axis(1)"}, "unknown format 'int9'; did you mean 'int"),
        ("w1", {"format": "int8"}, "not a format: 'int8'; expected e.g."),
        ("w1", {"format": 8}, "plan field format = 8: input should be a valid string"),
        ("w1", {"mode": "statik"}, "plan field mode = 'statik': input should be 'static'"),
        ("w1", {"fromat": "int8 per_axis(1)"}, "no field 'fromat'; did you mean 'format'"),
        ("w1", {"bytes": "many"}, "plan field bytes = 'many': input should be a valid integer"),
        ("w1", {"losses": {"float": None}}, "plan field losses = .*valid number"),
        ("r1", {"low": "0"}, "plan field low = '0': input should be a valid number"),
        ("r1", {"low": float("nan")}, "plan field low = nan: input should be a finite number"),
        ("w4", {"mode": "float"}, "plan: the model has no value 'w4'; did you mean 'w"),
        ("nowhere", {}, "plan: the model has no value 'nowhere'; "),
        ("r1", {"mode": "float"}, "activation 'r1' is read by an integer kernel and cannot be "
         "float; set the mode of that kernel's weight to float"),
        ("x", {"mode": "dynamic"}, "activation 'x' cannot be dynamic: one of its kernels needs a "
         "fixed scale; set its mode to static"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(value, fields, message, edited):
    with pytest.raises(RecipeError, match=message):
        edited("mlp", "w8a8", value, **fields)


def test_a_float_wish_is_refused_where_a_range_could_be_taken(edited):
    with pytest.raises(RecipeError, match="activation 'x' is read by an integer kernel"):
        edited("attention", "dynamic", "x", mode="float")


def test_a_weight_without_a_note_is_refused(zoo, made, replayed):
    _, saved = made(zoo["mlp"](), Precision())
    del saved["values"]["w2"]
    with pytest.raises(RecipeError, match="weight 'w2' has no mode; give it static with a format"):
        replayed(zoo["mlp"](), saved)


def test_a_refused_note_says_whose_it_is(edited):
    with pytest.raises(RecipeError) as caught:
        edited("mlp", "w8a8", "w1", format="int8")
    assert "in the plan of 'w1'" in caught.value.__notes__


# The pass by itself.


def test_it_writes_the_notes_and_nothing_else(zoo, context):
    model = zoo["mlp"]()
    feeds = made_up(input_specs(model), 0, 8)
    around = replace(context, feeds=feeds, remarks=[])
    decided, _ = run(
        Recipe((Calibrate(), RankWeights(), AssignBits(widths=(8, 4), average_bits=6))),
        model,
        around,
    )
    plan = json.loads(json.dumps(notes.plan(decided)))
    after, rows = run(Recipe((ReadPlan(),)), model, replace(context, plan=plan))
    assert notes.plan(after) == plan
    assert list(notes.plan(after)) == list(plan)
    assert rows[0].changed == len(plan)
    assert str(after.graph) == str(zoo["mlp"]().graph)
    again, rows = run(Recipe((ReadPlan(),)), after, replace(context, plan=plan))
    assert (notes.plan(again), rows[0].changed) == (plan, 0)


def test_it_asks_for_a_plan(zoo, context):
    assert list(ReadPlan().requires(zoo["mlp"](), context)) == [
        "there is no plan; pass --plan plan.json"
    ]
    with pytest.raises(RecipeError, match="read-plan cannot run: there is no plan"):
        run(Recipe((ReadPlan(),)), zoo["mlp"](), context)


def test_an_empty_plan_says_nothing(zoo, context):
    model = zoo["mlp"]()
    assert ReadPlan().run(model, replace(context, plan={})) == 0
    assert notes.plan(model) == {}


def test_a_value_inside_a_branch_can_be_named(parse, context):
    model = parse(
        f"""{HEADER} g (float[n,2] x, bool c) => (float[n,2] y) {{
            y = If (c) <then_branch = t () => (o) {{ o = Neg (x) }},
                        else_branch = e () => (p) {{ p = Abs (x) }}> }}"""
    )
    assert ReadPlan().run(model, replace(context, plan={"o": {"why": "inside"}})) == 1
    assert notes.plan(model) == {"o": {"why": "inside"}}
