import numpy as np
import onnx_ir as ir
import pytest

from fourfold.compiler import notes
from fourfold.compiler.errors import ModelError
from fourfold.compiler.formats import Format
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run
from fourfold.passes.tidy import Tidy

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
X = np.array([1.5, -2.0], np.float32)


def settled(model, context):
    """Return how much a second run changes."""
    return Tidy().run(model, context)


def test_constants_are_folded_and_identities_go(becomes, context):
    model = becomes(
        Tidy(),
        f"""{HEADER} g (float[2] x) => (float[2] y) {{
            c = Constant <value = float[2] {{1, 2}}> ()
            d = Constant <value_float = 2.0> ()
            e = Mul (c, d)
            i = Identity (x)
            a = Add (i, e)
            y = Identity (a)
        }}""",
        f"{HEADER} g (float[2] x) => (float[2] y) <float[2] e = {{2, 4}}> {{ y = Add (x, e) }}",
    )
    assert settled(model, context) == 0


def test_equal_weights_and_equal_nodes_become_one(becomes, context):
    model = becomes(
        Tidy(),
        f"""{HEADER} g (float[2] x) => (float[2] y, float[2] z)
        <float[2] a = {{1, 2}}, float[2] b = {{1, 2}}> {{
            p = Add (x, a)
            q = Add (x, b)
            y = Neg (p)
            z = Abs (q)
        }}""",
        f"""{HEADER} g (float[2] x) => (float[2] y, float[2] z) <float[2] a = {{1, 2}}> {{
            p = Add (x, a)
            y = Neg (p)
            z = Abs (p)
        }}""",
    )
    assert settled(model, context) == 0


def test_functions_are_inlined_and_dead_nodes_go(becomes):
    header = '<ir_version: 10, opset_import: ["" : 21, "mine" : 1]>'
    model = becomes(
        Tidy(),
        f"""{header} g (float[2] x) => (float[2] y) {{
            y = mine.twice (x)
            dead = Exp (x)
        }}
        <domain: "mine", opset_import: ["" : 21]> twice (a) => (b) {{ b = Add (a, a) }}""",
        f"{HEADER} g (float[2] x) => (float[2] y) {{ y = Add (x, x) }}",
    )
    assert not model.functions


def test_an_old_opset_is_converted_and_that_is_told(becomes, context, outputs, close):
    text = """<ir_version: 7, opset_import: ["" : 11]>
    g (float[2,3,1] x) => (float[2,3] y) { s = Squeeze <axes = [2]> (x) y = Softmax (s) }"""
    before = ir.from_onnx_text(text)
    after = becomes(
        Tidy(),
        text,
        f"""{HEADER} g (float[2,3,1] x) => (float[2,3] y) <int64[1] axes = {{2}}> {{
            s = Squeeze (x, axes)
            y = Softmax <axis = -1> (s)
        }}""",
    )
    assert after.graph.opset_imports[""] == 21
    assert [r.reason for r in context.remarks] == ["converted from opset 11 to 21"]
    x = np.random.default_rng(0).normal(size=(2, 3, 1)).astype(np.float32)
    close(outputs(before, x=x), outputs(after, x=x))
    assert settled(after, context) == 0


def test_the_opset_can_be_asked_for_and_is_never_lowered(context):
    model = ir.from_onnx_text(f"{HEADER} g (float[2] x) => (float[2] y) {{ y = Relu (x) }}")
    assert Tidy(opset=13).run(model, context) == 0
    assert model.graph.opset_imports[""] == 21
    assert Tidy(opset=23).run(model, context) == 1
    assert model.graph.opset_imports[""] == 23


def test_the_long_name_of_the_onnx_domain_becomes_the_short_one(context):
    text = """<ir_version: 10, opset_import: ["ai.onnx" : 21]>
    g (float[2] x) => (float[2] y) { y = Relu (x) }"""
    model = ir.from_onnx_text(text)
    Tidy().run(model, context)
    assert dict(model.graph.opset_imports) == {"": 21}


def test_what_cannot_be_converted_is_the_callers_to_export_anew(context):
    # A BatchNormalization that trains: its extra outputs are gone since opset 14.
    model = ir.from_onnx_text("""<ir_version: 7, opset_import: ["" : 12]>
    g (float[2,2] x) => (float[2,2] y) <float[2] s = {1, 2}, float[2] b = {1, 2}> {
        y, m, v, n, w = BatchNormalization (x, s, b, s, b)
    }""")
    with pytest.raises(ModelError, match=r"opset 12 .* 21 .*export it with opset 21$"):
        Tidy().run(model, context)


def test_weights_in_codes_and_random_numbers_are_left_alone(becomes, context):
    text = f"""{HEADER} g (float[2] x) => (float[2] y)
    <int8[2] codes = {{1, 2}}, float[2] scale = {{0.5, 0.25}}> {{
        w = DequantizeLinear <axis = 0> (codes, scale)
        r = RandomNormal <shape = [2]> ()
        s = Add (x, r)
        y = Mul (s, w)
    }}"""
    model = becomes(Tidy(), text, text)
    assert settled(model, context) == 0


def test_what_is_larger_than_the_limit_is_computed_at_run_time(becomes):
    text = f"""{HEADER} g (float[3] x) => (float[3] y) <float[3] k = {{1, 2, 3}}> {{
        e = Exp (k)
        y = Add (x, e)
    }}"""
    becomes(Tidy(fold_limit=2), text, text)
    folded = becomes(
        Tidy(fold_limit=3),
        text,
        f"""{HEADER} g (float[3] x) => (float[3] y)
        <float[3] e = {{2.7182817, 7.389056, 20.085537}}> {{ y = Add (x, e) }}""",
    )
    assert len(folded.graph) == 1


def test_numbers_notes_and_interface_stay(context, outputs, close):
    before = ir.from_onnx_text(f"""{HEADER} g (float[2] x) => (float[2] y) {{
        c = Constant <value = float[2] {{3, 4}}> ()
        i = Identity (x)
        a = Mul (i, c)
        y = Tanh (a)
    }}""")
    notes.apply_plan(before, {"a": {"format": "uint8 per_tensor", "mode": "static"}})
    after, rows = run(Recipe((Tidy(),)), before, context)
    assert rows[0].lost_notes == ()
    assert rows[0].changed == 2
    assert notes.plan(after) == notes.plan(before)
    assert notes.read(after.graph[0].outputs[0]).format == Format("uint8")
    close(outputs(before, x=X), outputs(after, x=X))


def test_a_note_on_what_is_folded_away_is_told(context):
    model = ir.from_onnx_text(f"""{HEADER} g (float[2] x) => (float[2] y) {{
        i = Identity (x)
        y = Tanh (i)
    }}""")
    notes.apply_plan(model, {"i": {"mode": "float"}})
    _, rows = run(Recipe((Tidy(),)), model, context)
    assert rows[0].lost_notes == ("i",)
    assert [r.subject for r in context.remarks] == ["i"]
