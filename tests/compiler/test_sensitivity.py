from dataclasses import replace

import joblib
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler import notes, sensitivity
from fourfold.compiler.choices import Choice, open_weights
from fourfold.compiler.feeds import Feeds, input_specs, made_up
from fourfold.compiler.formats import PerAxis, PerBlock
from fourfold.compiler.graph import readers_of, values
from fourfold.compiler.rounding import simulated
from fourfold.compiler.sensitivity import measured, spread
from fourfold.passes.calibrate import Calibrate

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "ai.onnx.ml" : 2]>'
WIDTHS = (8, 4, 2, 32)
WEIGHTS = """float[4,4] w = {0.6,-0.2,0.31,0.05,-0.27,0.18,0.65,0.47,-0.35,-0.6,-0.3,1.7,-1.1,-0.1,
-0.6,-0.36}, float[4,4] v = {-0.4,1.2,0.3,-0.8,0.2,0.1,-0.7,0.45,0.9,-0.3,0.6,0.2,-0.5,0.8,0.1,1.1}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FOURFOLD_CACHE", str(folder))
    return folder


@pytest.fixture
def ready(context):
    """`ready(model, count=6, batch=3, ranges=True)`: a context with feeds, and its ranges."""

    def fed(model, count=6, batch=3, ranges=True, seed=0):
        feeds = made_up(input_specs(model), seed, count, size_of_dynamic_axes=3, batch=batch)
        found = replace(context, feeds=feeds, remarks=[])
        if ranges:
            Calibrate().run(model, found)
        return found

    return fed


def parsed(text):
    model = ir.from_onnx_text(HEADER + text)
    ShapeInferencePass()(model)
    return model


def chain(body, inputs="float[n,4] x", output="float[n,4] y"):
    return parsed(f"g ({inputs}) => ({output}) <{WEIGHTS}> {{ {body} }}")


def every_choice(model, context, widths=WIDTHS):
    return open_weights(model, context.capability, widths, "any")


def run_all(model, context, kind="mse", samples=0, clip="auto", widths=WIDTHS):
    return measured(model, every_choice(model, context, widths), context, kind, samples, clip)


# A reference that knows nothing of cuts: the whole model runs once for each form.


def answers(proto, feeds, names=()):
    """Run a model without fusions; more values can be fetched by name."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    known = [output.name for output in proto.graph.output]
    known += [name for name in names if name not in known]
    del changed.graph.output[:]
    changed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        changed.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(known, session.run(known, feeds), strict=True))


def nearest(floats, format):
    """Round to nearest with one symmetric scale a group, range to the largest element."""
    wide, limit = floats.astype(np.float64), 2 ** (format.bits - 1) - 1
    least = -limit if format.bits >= 7 else -limit - 1
    match format.granularity:
        case PerAxis(axis):
            top = np.abs(floats).max(axis=tuple(a for a in range(wide.ndim) if a != axis))
            shape = [-1 if a == axis else 1 for a in range(wide.ndim)]
            scale = (top / np.float32(limit)).astype(np.float32).reshape(shape)
        case PerBlock(axis, size):
            assert axis == 0
            blocks = [floats[at : at + size] for at in range(0, len(floats), size)]
            rows = [np.abs(block).max(axis=0, keepdims=True) for block in blocks]
            scale = np.repeat(np.concatenate(rows) / np.float32(limit), size, axis=0)
            scale = scale[: len(floats)].astype(np.float32)
        case _:
            scale = np.float32(np.abs(floats).max() / np.float32(limit))
    codes = np.clip(np.rint(floats / scale), least, limit)
    return (codes * scale).astype(np.float32)


def quantized(proto, output, name, low, high):
    """Let one node read its activation in 256 steps, by plain arithmetic."""
    scale = np.float32((max(high, 0.0) - min(low, 0.0)) / 255) or np.float32(1)
    zero = np.float32(round(-min(low, 0.0) / float(scale)))
    constants = {"scale": scale, "zero": zero, "least": np.float32(0), "most": np.float32(255)}
    place = next(n for n, node in enumerate(proto.graph.node) if output in node.output)
    node = proto.graph.node[place]
    mark = f"{output}_{name}"
    for key, value in constants.items():
        tensor = onnx.numpy_helper.from_array(np.asarray(value), f"{mark}_{key}")
        proto.graph.initializer.append(tensor)
    steps = [
        ("Div", name, f"{mark}_scale"),
        ("Round", "Div"),
        ("Add", "Round", f"{mark}_zero"),
        ("Clip", "Add", f"{mark}_least", f"{mark}_most"),
        ("Sub", "Clip", f"{mark}_zero"),
        ("Mul", "Sub", f"{mark}_scale"),
    ]
    made = []
    for op, first, *rest in steps:
        source = first if op == "Div" else f"{mark}_{first}"
        made.append(onnx.helper.make_node(op, [source, *rest], [f"{mark}_{op}"]))
    node.input[list(node.input).index(name)] = f"{mark}_Mul"
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[:place], *made, *nodes[place:]])


def operands(model, weight):
    """The readers' activations, but for those that another reader of the weight has changed."""
    readers = [r.node for r in readers_of(weight) if r.node.graph is model.graph]
    behind, found = {id(weight)}, []
    for node in model.graph:
        if any(id(value) in behind for value in node.inputs):
            behind |= {id(value) for value in node.outputs}
        if node in readers and node.op_type != "Gather" and id(node.inputs[0]) not in behind:
            found.append((node.outputs[0].name, node.inputs[0]))
    return [(output, v) for output, v in found if v.name not in model.graph.initializers]


def brute(model, weight, choice, feeds, kind, clip):
    """The loss of one form of one weight, by running the whole model."""
    proto = ir.to_proto(model)
    floats = weight.const_value.numpy().astype(np.float32)
    noise = signal = 0.0
    for batch in feeds:
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        reads = operands(model, weight) if choice.activation != "float" else []
        names = [value.name for _, value in reads]
        expected = answers(proto, batch, [name for name in names if name not in batch])
        for output, value in reads:
            note, array = notes.read(value), (batch | expected)[value.name]
            low, high = note.low, note.high
            if low is None:
                low, high = float(array.min()), float(array.max())
            quantized(changed, output, value.name, low, high)
        if choice.format is not None:
            minmax = clip == "minmax" or (clip == "auto" and choice.bits >= 4)
            form = nearest if minmax else lambda w, f: simulated(w, f, clip)
            tensor = next(t for t in changed.graph.initializer if t.name == weight.name)
            array = form(floats, choice.format)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        got = answers(changed, batch)
        for output in proto.graph.output:
            if output.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
                continue
            first, second = expected[output.name], got[output.name]
            first, second = first.astype(np.float64), second.astype(np.float64)
            if kind == "mse":
                noise += float(((second - first) ** 2).sum())
                signal += float((first**2).sum())
            else:
                noise += float((first * np.log(first / second)).sum())
                signal += first[..., 0].size
    return noise / signal


def check(model, context, kind="mse", clip="auto"):
    """Hold everything that is measured against the reference; return it."""
    weights = every_choice(model, context)
    found = measured(model, weights, context, kind, 0, clip)
    assert list(found) == [one.name for one in weights]
    for one in weights:
        assert list(found[one.name]) == [str(choice) for choice in one.choices]
        for choice in one.choices:
            expected = brute(model, one.value, choice, context.feeds, kind, clip)
            got = found[one.name][str(choice)]
            where = f"{one.name} as {choice}: {got} against {expected}"
            assert got == pytest.approx(expected, rel=1e-3, abs=1e-12), where
            assert choice == Choice() or got > 1e-9, where
    return found


@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
def test_the_zoo_against_whole_runs(name, zoo, ready):
    model = zoo[name]()
    found = check(model, ready(model))
    forms = {form for by_choice in found.values() for form in by_choice}
    assert {form.split()[0] for form in forms} == {"int8", "int4", "int2", "float"}
    assert any(form.endswith("uint8") for form in forms)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("ranges", [True, False])
def test_clips_and_ranges_taken_at_run_time(clip, ranges, zoo, ready):
    model = zoo["mlp"]()
    check(model, ready(model, ranges=ranges), clip=clip)


BODIES = {
    "sequential": "a = MatMul (x, w) b = Tanh (a) y = MatMul (b, w)",
    "parallel": "a = MatMul (x, w) b = Tanh (x) c = Gemm <transB = 1> (b, w) y = Add (a, c)",
    "skip": "a = MatMul (x, w) b = Add (a, x) c = MatMul (b, v) y = Add (c, b)",
    "contrib": "a = com.microsoft.FastGelu (x) b = MatMul (a, w) y = Add (b, x)",
    "constant": """a = MatMul (v, w) b = ReduceMax <keepdims = 0> (a)
                   c = MatMul (x, w) y = Mul (b, c)""",
}


@pytest.mark.parametrize("name", BODIES)
def test_shared_weights_skips_and_constants(name, ready):
    model = chain(BODIES[name])
    check(model, ready(model))


def test_blocks_along_the_inner_axis(ready):
    numbers = np.random.default_rng(0).standard_t(3, 64 * 3).round(2)
    text = ", ".join(str(x) for x in numbers.tolist())
    model = parsed(
        f"g (float[n,64] x) => (float[n,3] y) <float[64,3] w = {{{text}}}> {{ y = MatMul (x, w) }}"
    )
    found = check(model, ready(model), clip="minmax")
    assert "int4 per_block(0,32) x float" in found["w"]


def test_what_a_branch_captures(ready):
    model = chain(
        """a = MatMul (x, w) b = MatMul (a, v) k = ReduceMax <keepdims = 0> (x) c = Greater (k, t)
           y = If (c) <then_branch = t () => (o) { h = Abs (b) o = MatMul (h, w) },
                       else_branch = e () => (p) { q = Sub (b, x) p = Add (q, a) }>""",
        inputs="float[n,4] x, float t",
    )
    context = ready(model, ranges=False)
    for threshold in (100.0, -100.0):
        batch = {"x": np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)}
        feeds = Feeds.read([batch | {"t": np.float32(threshold)}], input_specs(model))
        check(model, replace(context, feeds=feeds))


def test_a_table_and_its_transpose(ready):
    model = parsed(
        """g (int64[n,3] x) => (float[n,3,6] y)
        <float[6,4] table = {1,2,3.5,4,5,-6,7,8,9,10,11,12,13,1,15,16,17,-1,19,2,21,22.1,3,24}> {
            t = Transpose <perm = [1,0]> (table) a = Gather (table, x) y = MatMul (a, t) }"""
    )
    check(model, ready(model))


def test_classes_are_compared_as_probabilities(ready):
    model = chain("a = MatMul (x, w) b = Relu (a) c = MatMul (b, v) y = Softmax (c)")
    check(model, ready(model), kind="kl")


def test_outputs_that_do_not_depend_on_a_weight_count_as_signal(ready):
    model = chain("y = MatMul (x, w) z = MatMul (x, v)", output="float[n,4] y, float[n,4] z")
    check(model, ready(model))


def test_a_constant_output_is_signal_too(ready):
    both = chain("y = MatMul (x, w)", output="float[n,4] y, float[4,4] v")
    alone = chain("y = MatMul (x, w)")
    context = ready(both)
    w, v = (both.graph.initializers[name].const_value.numpy() for name in ("w", "v"))
    signal = sum(float(((batch["x"] @ w) ** 2).sum()) for batch in context.feeds)
    share = signal / (signal + len(context.feeds) * float((v**2).sum()))
    form = "int4 per_axis(1) x float"
    expected = run_all(alone, ready(alone))["w"][form] * share
    assert run_all(both, context)["w"][form] == pytest.approx(expected, rel=1e-3)


def test_an_lstm_without_its_first_output(ready):
    numbers = ", ".join(["0.5", "-0.25"] * 16)
    proto = onnx.parser.parse_model(
        f"""{HEADER} g (float[4,n,4] x) => (float[1,n,2] y)
    <{WEIGHTS}, float[1,8,4] wl = {{{numbers}}},
     float[1,8,2] rl = {{{", ".join(["0.5", "-0.5"] * 8)}}}> {{
        l1, h1 = LSTM <hidden_size = 2> (x, wl, rl)
        m = MatMul (x, w)
        l2, h2 = LSTM <hidden_size = 2> (m, wl, rl)
        y = Add (h1, h2) }}"""
    )
    for node in proto.graph.node:
        if node.op_type == "LSTM":
            node.output[0] = ""
    model = ir.from_proto(proto)
    ShapeInferencePass()(model)
    check(model, ready(model))


def test_feeds_that_numpy_has_no_type_for(ready):
    model = chain(
        "a = Cast <to = 1> (x) y = MatMul (a, w)", inputs="bfloat16[n,4] x", output="float[n,4] y"
    )
    halves = np.linspace(-2, 2, 24).reshape(6, 4).astype(ml_dtypes.bfloat16)
    context = ready(model, ranges=False)
    feeds = Feeds.read({"x": halves}, input_specs(model), 3)
    found = run_all(model, replace(context, feeds=feeds))
    wide = chain("y = MatMul (x, w)")
    feeds = Feeds.read({"x": halves.astype(np.float32)}, input_specs(wide), 3)
    assert found == run_all(wide, replace(context, feeds=feeds))


def test_words_as_feeds(ready):
    model = chain(
        """i = ai.onnx.ml.LabelEncoder <keys_strings = ["a", "bc"], values_int64s = [1, 3]> (x)
           a = Gather (w, i) y = MatMul (a, v)""",
        inputs="string[n] x",
    )
    words = np.array(["a", "bc", "bc", "a"], object)
    context = replace(
        ready(chain("y = MatMul (x, w)")), feeds=Feeds.read({"x": words}, input_specs(model), 2)
    )
    found = run_all(model, context)
    assert found["w"]["int4 per_axis(0) x float"] > 1e-6


def test_the_model_is_left_alone(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    before, plan = ir.to_proto(model).SerializeToString(deterministic=True), notes.plan(model)
    run_all(model, context)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert notes.plan(model) == plan


# Chunks, processes and the cache change nothing but the time.


@pytest.fixture
def counted(monkeypatch):
    """A list of the chunks that are measured in this process."""
    calls = []
    whole = sensitivity.measure

    def measure(task):
        calls.append(task)
        return whole(task)

    monkeypatch.setattr(sensitivity, "measure", measure)
    return calls


def fresh(monkeypatch, tmp_path, name):
    monkeypatch.setenv("FOURFOLD_CACHE", str(tmp_path / name))


def test_chunks_change_nothing(zoo, ready, monkeypatch, tmp_path, counted):
    model = zoo["attention"]()
    context = ready(model)
    expected = run_all(model, context)
    assert [len(task.choices) for task in counted] == [4, 2]
    for size in (1, 100):
        counted.clear()
        fresh(monkeypatch, tmp_path, f"chunk-{size}")
        monkeypatch.setattr(sensitivity, "CHUNK", size)
        assert run_all(model, context) == expected
        assert max(len(task.choices) for task in counted) == min(size, 6)


@pytest.mark.slow
def test_processes_change_nothing(zoo, ready, monkeypatch, tmp_path, counted):
    model = zoo["attention"]()
    context = ready(model)
    expected = run_all(model, context)
    monkeypatch.undo()  # a process is to measure with the real function
    started = []
    whole = joblib.Parallel

    def parallel(**options):
        started.append(options["n_jobs"])
        return whole(**options)

    fresh(monkeypatch, tmp_path, "shared")
    monkeypatch.setattr(sensitivity, "CHUNK", 1)
    monkeypatch.setattr(sensitivity, "WORTH", 0.0)
    monkeypatch.setattr(joblib, "Parallel", parallel)
    assert run_all(model, replace(context, jobs=2)) == expected
    assert started == [2]
    assert run_all(model, replace(context, jobs=2)) == expected
    assert started == [2]  # nothing was left to share out


def test_work_that_is_soon_done_starts_no_process(zoo, ready, monkeypatch):
    monkeypatch.setattr(sensitivity, "CHUNK", 1)
    monkeypatch.setattr(joblib, "Parallel", None)
    model = zoo["mlp"]()
    assert len(run_all(model, replace(ready(model), jobs=2))) == 3


def test_a_second_run_measures_nothing(zoo, ready, counted):
    model = zoo["mlp"]()
    context = ready(model)
    first = run_all(model, context)
    assert len(counted) == 1
    assert run_all(zoo["mlp"](), context) != first  # that one has no ranges
    assert len(counted) == 2
    assert run_all(model, context) == first
    assert len(counted) == 2


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_killed_run_goes_on_where_it_was(done, zoo, ready, monkeypatch, tmp_path, cache):
    model = zoo["attention"]()
    context = ready(model)
    expected = run_all(model, context)
    fresh(monkeypatch, tmp_path, "killed")
    monkeypatch.setattr(sensitivity, "CHUNK", 1)
    whole, calls = sensitivity.measure, []

    def dying(task):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(tuple(task.choices))
        return whole(task)

    monkeypatch.setattr(sensitivity, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        run_all(model, context)
    finished, calls = [name for (name,) in calls], []
    assert finished == list(expected)[:done]

    def measure(task):
        calls.append(tuple(task.choices))
        return whole(task)

    monkeypatch.setattr(sensitivity, "measure", measure)
    assert run_all(model, context) == expected
    assert [name for (name,) in calls] == list(expected)[done:]
    calls.clear()
    assert run_all(model, context) == expected
    assert calls == []


def nudged(model):
    value = model.graph.initializers["w1"]
    array = value.const_value.numpy().copy()
    array[0, 0] += 1
    value.const_value = ir.tensor(array, name="w1")


def widened(model):
    value = next(v for v in values(model) if v.name == "r1")
    notes.write(value, high=notes.read(value).high * 2)


def test_a_result_holds_for_what_it_was_measured_on(zoo, ready, counted):
    def run(change=None, kind="mse", clip="auto", samples=0, widths=WIDTHS, **feeding):
        model = zoo["mlp"]()
        context = ready(model, **feeding)
        if change is not None:
            change(model)
        counted.clear()
        run_all(model, context, kind, samples, clip, widths)
        return len(counted)

    assert run() == 1
    assert run() == 0
    cases = {
        "other feeds": {"seed": 1},
        "fewer feeds": {"count": 5},
        "other samples": {"samples": 3},
        "other batches": {"batch": 2},
        "no ranges": {"ranges": False},
        "another range": {"change": widened},
        "another weight": {"change": nudged},
        "another loss": {"kind": "kl"},
        "another clip": {"clip": "minmax"},
    }
    for told, options in cases.items():
        assert run(**options) == 1, told
        assert run(**options) == 0, told
    assert run() == 0


def test_a_weight_of_another_model_is_another_weight(ready, counted):
    for body in ("y = MatMul (x, w)", "a = MatMul (x, w) y = Relu (a)"):
        model = chain(body)
        run_all(model, ready(model, ranges=False))
    assert len(counted) == 2


def test_a_damaged_result_is_measured_again(zoo, ready, counted, cache):
    model = zoo["mlp"]()
    context = ready(model)
    expected = run_all(model, context)
    files = sorted(cache.rglob("*.json"))
    assert len(files) == sum(map(len, expected.values()))
    files[1].write_text("{")
    counted.clear()
    assert run_all(model, context) == expected
    assert [len(task.choices[name]) for task in counted for name in task.choices] == [1]


def test_only_forms_that_are_new_are_measured(zoo, ready, counted):
    model = zoo["mlp"]()
    context = ready(model)
    narrow = run_all(model, context, widths=(8,))
    counted.clear()
    every = run_all(model, context)
    assert all(every[name][form] == loss for name in every for form, loss in narrow[name].items())
    told = {name: set(texts) for task in counted for name, texts in task.choices.items()}
    assert told == {name: set(every[name]) - set(narrow[name]) for name in every}
    counted.clear()
    assert run_all(model, context, widths=(8,)) == narrow
    assert counted == []


def test_a_folder_serves_twice(zoo, ready):
    model = zoo["mlp"]()
    context = ready(model)
    nearest_codes = run_all(model, context, clip="minmax")
    best_codes = run_all(model, context, clip="mse")
    form = "int2 per_axis(1) x float"
    assert best_codes["w1"][form] != nearest_codes["w1"][form]


def test_progress_counts_chunks(zoo, ready, monkeypatch):
    monkeypatch.setattr(sensitivity, "CHUNK", 2)
    told = []

    def progress(steps, title, total=None):
        told.append((title, total))
        for step in steps:
            told.append(list(step))
            yield step

    model = zoo["attention"]()
    context = replace(ready(model), progress=progress)
    names = list(run_all(model, context))
    assert told == [("measure weights", 3), names[:2], names[2:4], names[4:]]
    told.clear()
    run_all(model, context)
    assert told == [("measure weights", 0)]


def test_only_some_samples_are_measured(zoo, ready, monkeypatch, tmp_path):
    model = zoo["mlp"]()
    context = ready(model, count=12)
    some = run_all(model, context, samples=4)
    fresh(monkeypatch, tmp_path, "others")
    every_third = replace(context, feeds=context.feeds.split(3)[1])
    assert run_all(model, every_third) == some
    assert run_all(model, context) != some


# How samples are picked.

LINE = parsed("g (float[n,1] x) => (float[n,1] y) { y = Neg (x) }")
PAIRS = parsed("g (float[2,1] x) => (float[2,1] y) { y = Neg (x) }")


def numbered(model, count):
    array = np.arange(count, dtype=np.float32)[:, None]
    return Feeds.read({"x": array}, input_specs(model), 7)


def picked(feeds):
    return [int(x) for batch in feeds for x in batch["x"].ravel()]


@given(st.integers(1, 200), st.integers(0, 250))
def test_samples_are_evenly_spread(count, samples):
    found = picked(spread(numbered(LINE, count), samples))
    if samples == 0 or count < 2 * samples:
        assert found == list(range(count))
        return
    assert samples <= len(found) < 2 * samples
    assert found[0] == 0
    assert set(np.diff(found)) == ({count // samples} if len(found) > 1 else set())


@given(st.integers(1, 100), st.integers(1, 60))
def test_fixed_batches_stay_together(pairs, samples):
    found = picked(spread(numbered(PAIRS, 2 * pairs), samples))
    step = max(1, 2 * pairs // samples)
    kept = range(0, pairs, step) if pairs > 1 else [0]
    assert found == [2 * pair + at for pair in kept for at in (0, 1)]


def test_a_lone_fixed_batch_is_kept_whole():
    text = "g (float[8,1] x) => (float[8,1] y) { y = Neg (x) }"
    assert picked(spread(numbered(parsed(text), 8), 2)) == list(range(8))
