from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler import notes, signals
from fourfold.compiler.blocks import find_blocks
from fourfold.compiler.choices import Choice, open_weights
from fourfold.compiler.errors import RecipeError
from fourfold.compiler.feeds import Feeds, input_specs, made_up
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.compiler.sensitivity import measured
from fourfold.compiler.signals import kurtosis, zd
from fourfold.passes.calibrate import Calibrate
from fourfold.passes.rank_weights import RankWeights

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
QUICK = ("zd", "kurtosis", "quantization-error", "lim", "activation-weighted", "measured")
ORDER_ONLY = ("zd", "kurtosis", "lim")
NO_DATA = ("zd", "kurtosis", "quantization-error")
EVERY = pytest.mark.parametrize(
    "signal", [*QUICK, pytest.param("fisher", marks=pytest.mark.torch)]
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def ready(context):
    """`ready(model)`: a context with feeds; the model has ranges."""

    def with_feeds(model, count=6):
        feeds = made_up(input_specs(model), 0, count)
        found = replace(context, feeds=feeds, remarks=[])
        Calibrate().run(model, found)
        return found

    return with_feeds


def opened(model, context, widths=(8, 4, 2), activations="auto"):
    return open_weights(model, context.capability, widths, activations)


def noted(model, context, **options):
    """Run the pass; return weight -> note."""
    RankWeights(**options).run(model, context)
    return {one.name: notes.read(one.value) for one in opened(model, context)}


@EVERY
@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_every_weight_gets_a_note_and_nothing_else_changes(name, signal, zoo, ready):
    model = zoo[name]()
    context = ready(model)
    graph = ir.to_proto(model).SerializeToString(deterministic=True)
    before = notes.plan(model)
    weights = opened(model, context)
    assert RankWeights(signals=(signal,)).run(model, context) == len(weights)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == graph
    after = notes.plan(model)
    names = [one.name for one in weights]
    assert {key: note for key, note in after.items() if key not in names} == before
    homes = {n: block.index for block in find_blocks(model) for n in block.weights}
    for one in weights:
        note = after[one.name]
        ranked = signal != "lim" or one.name in homes
        fields = {
            "importance": True,
            "losses": signal not in ORDER_ONLY,
            "block": one.name in homes,
        }
        assert set(note) == {field for field, there in fields.items() if there}
        assert set(note["importance"]) == ({signal} if ranked else set())
        assert note.get("block") == homes.get(one.name)
        if "losses" in note:
            assert list(note["losses"]) == [str(choice) for choice in one.choices]
            four = next(t for t in note["losses"] if Choice.parse(t).bits == 4)
            assert note["importance"][signal] == note["losses"][four] > 0


@pytest.mark.parametrize("signal", QUICK)
@pytest.mark.parametrize("name", ["convnet", "attention"])
def test_figures_are_those_of_the_signals(name, signal, zoo, ready):
    model = zoo[name]()
    context = ready(model)
    weights, blocks = opened(model, context), find_blocks(model)
    found = noted(model, context, signals=(signal,))
    match signal:
        case "zd":
            expected = signals.by_zd(weights, blocks)
        case "kurtosis":
            expected = signals.by_kurtosis(weights)
        case "quantization-error":
            expected = signals.by_quantization_error(weights, "auto")
        case "lim":
            expected = signals.by_lim(model, blocks, context)
        case "activation-weighted":
            expected = signals.by_activation_weighted(model, weights, context, "auto")
        case "measured":
            losses = measured(model, weights, context, "mse", 128, "auto")
            expected = signals.Ranking.of_losses(losses)
    for weight, note in found.items():
        importance = (
            {} if weight not in expected.importance else {signal: expected.importance[weight]}
        )
        assert dict(note.importance) == importance
        assert note.losses == (None if expected.losses is None else expected.losses[weight])


LAYERS = f"""{HEADER} g (float[n,2] x) => (float[n,2] y)
<float[2,2] w0 = {{1,2,-3,4}}, float[2,2] w1 = {{1,0.5,1,-2}}, float[2,2] w2 = {{1,1,1,9}},
 float[2,2] w3 = {{0,0,0,0}}, float[2,2] head = {{0,0,5,0}}> {{
    a = MatMul (x, w0) b = Relu (a) c = MatMul (b, w1) h = Add (c, x)
    d = MatMul (h, w2) e = Relu (d) f = MatMul (e, w3) k = Add (f, h)
    y = MatMul (k, head)
}}"""


def test_before_and_after(parse, fed):
    model = parse(LAYERS)
    context = fed(model, x=np.array([[1, 2], [3, -1]], np.float32))
    RankWeights(signals=("lim", "zd", "kurtosis"), widths=(8, 4)).run(model, context)
    plan = notes.plan(model)
    assert list(plan) == ["w0", "w1", "w2", "w3", "head"]
    assert [plan[name].get("block") for name in plan] == [0, 0, 1, 1, None]
    arrays = {v.name: v.const_value.numpy() for v in model.graph.initializers.values()}
    first = -zd([arrays["w0"], arrays["w1"]])
    assert plan["w0"]["importance"]["zd"] == plan["w1"]["importance"]["zd"] == first
    assert plan["w2"]["importance"]["zd"] == -1 / 8  # the nine alone, among both weights
    assert plan["head"]["importance"] == {"zd": -0.25, "kurtosis": kurtosis(arrays["head"])}
    # The second layer adds nothing: its output is its input.
    assert plan["w3"]["importance"]["lim"] == pytest.approx(-1)
    x = np.array([[1, 2], [3, -1]], np.float64)
    h = np.maximum(x @ arrays["w0"], 0) @ arrays["w1"] + x
    cosine = (x * h).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(h, axis=1)
    assert plan["w0"]["importance"]["lim"] == pytest.approx(-cosine.mean(), abs=1e-6)
    assert all("losses" not in note for note in plan.values())
    assert context.remarks == []


@pytest.mark.parametrize(
    ("order", "leading"),
    [
        (("zd", "quantization-error"), "quantization-error"),
        (("quantization-error", "zd"), "quantization-error"),
        (("lim", "measured", "quantization-error"), "measured"),
        (("activation-weighted", "measured"), "activation-weighted"),
        (("measured", "activation-weighted"), "measured"),
        (("lim", "zd", "kurtosis"), None),
    ],
)
def test_the_first_signal_that_predicts_leads(order, leading, zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    together = noted(model, context, signals=order)
    alone = noted(model, context, signals=(leading or order[0],))
    for name, note in together.items():
        assert list(note.importance) == list(order)
        assert note.losses == (None if leading is None else alone[name].losses)
        if leading is not None:
            assert note.losses["int4 per_axis(1) x uint8"] == note.importance[leading]


@pytest.mark.parametrize("signal", [*QUICK, "fisher"])
def test_signals_that_run_the_model_ask_for_feeds(signal, zoo, context):
    lines = list(RankWeights(signals=(signal,)).requires(zoo["mlp"](), context))
    if signal in NO_DATA:
        assert lines == []
        return
    assert lines == [
        f"there are no calibration feeds, and the signal {signal} runs the model; "
        "pass --data FILE, or choose --signal quantization-error"
    ]


def test_the_runner_refuses_what_has_no_feeds(zoo, context):
    recipe = Recipe.parse('rank-weights{signals=["zd","measured"]}')
    with pytest.raises(RecipeError, match=r"rank-weights cannot run: .* the signal measured runs"):
        run(recipe, zoo["mlp"](), context)
    run(Recipe.parse('rank-weights{signals=["zd","kurtosis"]}'), zoo["mlp"](), context)


CLASSES = f"""{HEADER} g (float[n,2] x) => (int64[n,1] y) <float[2,2] w = {{1,2,-3,4}}> {{
    a = MatMul (x, w) y = ArgMax <axis = 1> (a)
}}"""


def test_losses_of_outputs_need_outputs_in_floats(parse, fed):
    model = parse(CLASSES)
    context = fed(model, x=np.ones((2, 2), np.float32))
    assert list(RankWeights().requires(model, context)) == [
        "the signal measured compares float outputs, and the model has none; choose --signal "
        "activation-weighted"
    ]
    for signal in ("activation-weighted", "quantization-error", "zd"):
        assert list(RankWeights(signals=(signal,)).requires(model, context)) == []
        assert RankWeights(signals=(signal,)).run(model, context) == 1


def test_lim_says_so_where_there_are_no_blocks(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    found = noted(model, context, signals=("lim", "zd"))
    reason = "lim ranks nothing here: no residual block has an input and output of one shape"
    assert [(r.source, r.subject, r.reason) for r in context.remarks] == [
        ("rank-weights", "mlp", reason)
    ]
    assert [list(note.importance) for note in found.values()] == [["zd"]] * 3


def test_lim_is_silent_where_there_are_blocks(zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    noted(model, context, signals=("lim",))
    assert context.remarks == []


@pytest.mark.parametrize(
    ("widths", "activations", "forms"),
    [
        ((8,), "auto", {"int8 per_axis(1) x uint8"}),
        ((8, 32), "static", {"int8 per_axis(1) x uint8", "float"}),
        ((4, 2), "float", {"int4 per_axis(1) x float", "int2 per_axis(1) x float"}),
        ((8,), "any", {"int8 per_axis(1) x uint8", "int8 per_axis(1) x float"}),
    ],
)
def test_what_is_offered(widths, activations, forms, zoo, context):
    model = zoo["attention"]()
    found = noted(
        model,
        context,
        signals=("quantization-error",),
        widths=widths,
        activations=activations,
    )
    assert {frozenset(note.losses) for note in found.values()} == {frozenset(forms)}


@pytest.mark.parametrize(
    ("options", "forms"),
    [
        (
            {"split": "auto"},
            {
                "int4 per_axis(1) x uint8",
                "int2 per_axis(1) x uint8",
                "uint2 per_axis(1) split(int8-grid,3,per_tensor) x uint8",
            },
        ),
        (
            {"split": "int8-grid", "clusters": 16, "over": "channel", "levels": 1},
            {
                "int4 per_axis(1) x uint8",
                "int2 per_axis(1) x uint8",
                "uint2 per_axis(1) split(int8-grid,16,per_axis(1),levels=1) x uint8",
            },
        ),
        ({"affine": True}, {"uint4 per_axis(1) x uint8", "uint2 per_axis(1) x uint8"}),
        ({"split": "branches"}, {"int4 per_axis(1) x uint8", "int2 per_axis(1) x uint8"}),
        (
            {"split": "codebook", "activations": "float"},
            {
                "int4 per_axis(1) x float",
                "int2 per_axis(1) x float",
                "uint2 per_axis(1) split(codebook,2,per_tensor) x float",
            },
        ),
    ],
)
def test_split_and_affine_forms_are_offered(options, forms, zoo, context):
    """Branches of six bits are of no width that was asked for."""
    clusters = {"clusters": 2} if options.get("split") == "codebook" else {}
    found = noted(
        zoo["attention"](),
        context,
        signals=("quantization-error",),
        widths=(4, 2),
        **options,
        **clusters,
    )
    assert {frozenset(note.losses) for note in found.values()} == {frozenset(forms)}


@pytest.mark.parametrize("signal", ["quantization-error", "activation-weighted", "measured"])
def test_a_split_form_is_predicted_better_than_the_width_of_its_parts(signal, zoo, ready):
    model = zoo["mlp"]()
    options = {"widths": (4, 2), "split": "auto", "over": "channel"}
    found = noted(model, ready(model), signals=(signal,), **options)
    for note in found.values():
        (split,) = (loss for form, loss in note.losses.items() if "split" in form)
        (plain,) = (loss for form, loss in note.losses.items() if form.startswith("int2"))
        assert 0 < split < plain


def test_the_loss_is_that_of_the_classes_where_a_softmax_makes_them(parse, fed):
    text = f"""{HEADER} g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {{1,2,-3,3.3}}> {{
        a = MatMul (x, w) y = Softmax (a) }}"""
    draw = np.random.default_rng(0)
    x = draw.normal(0, 1, (8, 2)).astype(np.float32)

    def found(loss):
        model = parse(text)
        return noted(model, fed(model, x=x), loss=loss)["w"].losses

    assert found("auto") == found("kl") != found("mse")


def test_clips_and_samples_are_obeyed(zoo, context):
    def found(**options):
        model = zoo["mlp"]()
        feeds = made_up(input_specs(model), 0, 12)
        given = replace(context, feeds=feeds, remarks=[])
        return noted(model, given, **options)["w1"].losses

    assert found(clip="mse") != found(clip="minmax")
    assert found(samples=3) != found()
    assert found(samples=0) == found()


def test_a_second_run_changes_nothing(zoo, ready):
    model = zoo["attention"]()
    context = ready(model)
    one = RankWeights(signals=QUICK)
    assert one.run(model, context) == 6
    first = notes.plan(model)
    assert one.run(model, context) == 0
    assert notes.plan(model) == first
    assert RankWeights(signals=("zd",)).run(model, context) == 6


def test_notes_live_through_the_runner_and_a_file(zoo, ready, tmp_path):
    model = zoo["attention"]()
    context = ready(model)
    after, rows = run(Recipe((RankWeights(signals=("lim", "measured")),)), model, context)
    assert rows[0].changed == 6
    assert rows[0].lost_notes == ()
    plan = notes.plan(after)
    assert plan["wq"]["importance"].keys() == {"lim", "measured"}
    copy = after.clone()
    notes.to_metadata(copy)
    ir.save(copy, tmp_path / "noted.onnx")
    back = ir.load(tmp_path / "noted.onnx")
    notes.from_metadata(back)
    assert notes.plan(back) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('rank-weights{signals=["lin"]}', "option signals.0 = 'lin'"),
        ("rank-weights{signals=[]}", "option signals ="),
        ("rank-weights{widths=[]}", "option widths ="),
        ("rank-weights{samples=-1}", "option samples = -1"),
        ("rank-weights{signal=zd}", "no option 'signal'; did you mean 'signals'"),
    ],
)
def test_options_are_checked(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)


def test_a_model_without_weights(parse, context):
    model = parse(f"{HEADER} g (float[n,2] x) => (float[n,2] y) {{ y = Relu (x) }}")
    feeds = Feeds.read({"x": np.ones((2, 2), np.float32)}, input_specs(model))
    given = replace(context, feeds=feeds, remarks=[])
    assert RankWeights(signals=QUICK).run(model, given) == 0
    assert notes.plan(model) == {}
