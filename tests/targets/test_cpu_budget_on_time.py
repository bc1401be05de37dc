"""Under a budget on time no layer gets a kernel that is slower than float in its own shape."""

import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler import notes
from fourfold.compiler.allocate import Limits
from fourfold.compiler.choices import Choice, open_weights
from fourfold.compiler.contract import Context
from fourfold.compiler.costs import Workload
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.precision import Precision
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.compiler.shapes import operand_shapes
from fourfold.targets.cpu import Cpu, host_isa
from fourfold.targets.cpu.profile import measure

# 128 rows: block-wise 2 bits are slower than float, int8 is several times faster. The depthwise
# Conv is slower in integers. So each width alone would fall into a trap somewhere.
TEXT = """<ir_version: 10, opset_import: ["" : 21]>
traps (float[1,128,128] x, float[128,256] up, float[256,128] down, float[128,1,3] deep)
  => (float[1,128,128] y) {
    [up] h = MatMul (x, up)
    [relu] r = Relu (h)
    [down] d = MatMul (r, down)
    [deep] y = Conv <group = 128, pads = [1,1]> (d, deep)
}"""

pytestmark = pytest.mark.skipif(host_isa() != "vnni", reason="the traps are those of VNNI kernels")


def model():
    made = ir.from_onnx_text(TEXT)
    draw = np.random.default_rng(0)
    for value in list(made.graph.inputs)[1:]:
        shape = value.shape.numpy()
        array = draw.normal(0, 0.1, shape).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        made.graph.inputs.remove(value)
        made.graph.register_initializer(value)
    return made


@pytest.fixture
def around(tmp_path):
    source, target = model(), Cpu()
    draw = np.random.default_rng(1)
    feeds = Feeds.read(
        {"x": draw.normal(size=(8, 128, 128)).astype(np.float32)}, input_specs(source)
    )
    return source, target, Context(target.capability, tmp_path, feeds, cost=target.cost)


def prepared(source, target, context):
    """Return the model ranked with all kernels open, the pass that decides, and the workloads."""
    asked = Precision(widths=(32, 8, 4, 2), limits=Limits(seconds=1.0))
    first, decide, _ = target.recipe(asked).parts()
    ranked, _ = run(first, source, context)
    weights = open_weights(ranked, target.capability, (32, 8, 4, 2), "any")
    shapes = operand_shapes(ranked, weights, context)
    works = {
        one.name: Workload.of(one.readers[0], shapes[str(one.readers[0].node.name)])
        for one in weights
    }
    return ranked, decide.passes[0], works


def test_the_traps_are_there(around, tmp_path):
    target = around[1]
    _, _, works = prepared(*around)
    times = measure(list(works.values()), target.capability, tmp_path)
    slow = [form for (work, form), s in times.items() if s > times[work, "float"] * 1.2]
    fast = [form for (work, form), s in times.items() if s < times[work, "float"] * 0.6]
    assert "int2 per_block(0,32)" in slow
    assert "int8" in fast


@pytest.mark.parametrize("profiled", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.45])
def test_no_form_is_slower_than_float_in_its_own_shape(share, profiled, around, tmp_path):
    _, target, context = around
    ranked, assign, works = prepared(*around)
    if profiled:
        target.profile(list(works.values()), tmp_path)
    floats = {name: target.cost(work, Choice()).seconds for name, work in works.items()}
    limit = share * sum(floats.values())
    how = assign.model_copy(update={"max_seconds": limit, "trials": 0})
    decided, _ = run(Recipe((how,)), ranked, context)
    taken = {}
    for name, value in decided.graph.initializers.items():
        note = notes.read(value)
        if name in works:
            taken[name] = (
                Choice() if note.mode == "float" else Choice(note.format, note.activation)
            )
            assert note.seconds <= floats[name]
    spent = sum(target.cost(works[name], choice).seconds for name, choice in taken.items())
    assert spent <= limit * (1 + 1e-9)
    if profiled:  # and measured once more, apart from the table
        again = measure(list(works.values()), target.capability, tmp_path)
        from fourfold.targets.cpu.profile import form_of

        for name, choice in taken.items():
            work = works[name]
            assert again[work, form_of(choice)] <= again[work, "float"] * 1.1, (name, str(choice))


def test_the_tightest_time_takes_the_fast_kernels_and_says_what_it_dropped(around):
    context = around[2]
    ranked, assign, _ = prepared(*around)
    how = assign.model_copy(update={"max_seconds": None, "goal": "seconds", "trials": 0})
    decided, _ = run(Recipe((how,)), ranked, context)
    note = notes.read(decided.graph.initializers["up"])
    assert (note.format.dtype[:3], note.activation) == ("int", "uint8")
    dropped = {(r.subject, r.reason.split(" is slower")[0]) for r in context.remarks}
    assert ("up", "int2 per_block(0,32) x float") in dropped
