from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.choices import open_weights
from fourfold.compiler.feeds import Feeds, input_specs, made_up
from fourfold.compiler.graph import weight_of
from fourfold.compiler.shapes import operand_shapes, typical

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
SEQUENCES = """g (int64[n,t] x) => (float[n,t,3] y)
<float[5,2] table = {1,2,3,4,5,6,7,8,9,1}, float[2,3] w = {1,2,3,4,5,6}> {
    [look] a = Gather (table, x) [head] y = MatMul (a, w) }"""


def parsed(text):
    model = ir.from_onnx_text(HEADER + text)
    ShapeInferencePass()(model)
    return model


def shapes_of(model, context):
    weights = open_weights(model, context.capability, (8, 4, 2), "any")
    return operand_shapes(model, weights, context)


def seen(model, batch):
    """The shape of what each weighted node reads beside its weight, as onnxruntime has it."""
    proto = ir.to_proto(model)
    inner = {}
    for node in model.graph:
        if weight_of(node) is not None:
            inner[node.name] = node.inputs[1 if node.op_type == "Gather" else 0].name
    names = sorted(set(inner.values()) - set(batch))
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.add().name = name
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = dict(zip(names, session.run(names, batch), strict=True)) | batch
    return {node: found[name].shape for node, name in inner.items()}


@pytest.mark.parametrize("name", ["convnet", "mlp", "attention"])
@pytest.mark.parametrize("fed", [True, False])
def test_shapes_are_what_the_runtime_sees(name, fed, zoo, context):
    model = zoo[name]()
    feeds = made_up(input_specs(model), 5, 7)
    found = shapes_of(model, replace(context, feeds=feeds if fed else None))
    batch = next(iter(made_up(input_specs(model), 0, 1)))
    assert found == seen(model, batch)
    assert len(found) >= 3
    assert {shape[0] for shape in found.values()} == {1}


def test_every_reader_of_a_weight_has_its_shape(context):
    model = parsed(
        """g (float[n,4,4] x) => (float[n,2,4] y)
        <float[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, int64[2] rows = {0,1}> {
            [first] a = MatMul (x, w) b = Gather <axis = 1> (a, rows)
            [second] y = MatMul (b, w) }"""
    )
    assert shapes_of(model, context) == {"first": (1, 4, 4), "second": (1, 2, 4)}


def test_a_fixed_batch_is_not_cut(context):
    model = parsed(
        "g (float[8,2] x) => (float[8,2] y) <float[2,2] w = {1,2,3,4}> {"
        " [only] y = MatMul (x, w) }"
    )
    feeds = made_up(input_specs(model), 0, 32)
    assert shapes_of(model, replace(context, feeds=feeds)) == {"only": (8, 2)}


def test_a_model_without_samples(context):
    model = parsed(
        """g (float s, float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> {
            a = Mul (x, s) [only] y = MatMul (a, w) }"""
    )
    feeds = Feeds.read(
        [{"s": np.float32(1), "x": np.ones((2, 2), np.float32)}], input_specs(model)
    )
    assert shapes_of(model, replace(context, feeds=feeds)) == {"only": (2, 2)}


def test_what_is_constant_and_what_lies_in_a_branch(context):
    model = parsed(
        """g (float[n,2] x, bool c) => (float[n,2] y)
        <float[5,2] table = {1,2,3,4,5,6,7,8,9,1}, int64[3] ids = {0,1,1},
         float[2,2] w = {1,2,3,4}> {
            [look] a = Gather (table, ids) b = ReduceSum <keepdims = 0> (a) d = Add (x, b)
            [head] e = MatMul (d, w)
            y = If (c) <then_branch = t () => (o) { [inner] o = MatMul (e, w) },
                        else_branch = e () => (p) { p = Neg (e) }> }"""
    )
    batch = {"x": np.ones((1, 2), np.float32), "c": np.bool_(True)}
    feeds = Feeds.read([batch], input_specs(model))
    assert shapes_of(model, replace(context, feeds=feeds)) == {"look": (3,), "head": (1, 2)}


def lengths(model, sizes, batch=4):
    """Sequences of these lengths; each holds its own number."""
    parts = [{"x": np.full((1, size), n % 5, np.int64)} for n, size in enumerate(sizes)]
    return Feeds.read(parts, input_specs(model), batch)


def test_the_typical_sample_is_the_median_one(context):
    model = parsed(SEQUENCES)
    feeds = lengths(model, [9, 2, 5, 30, 4])
    assert typical(feeds)["x"].shape == (1, 5)
    found = shapes_of(model, replace(context, feeds=feeds))
    assert found == {"look": (1, 5), "head": (1, 5, 2)}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=100))
def test_the_first_sample_of_median_size(sizes):
    model = parsed(SEQUENCES)
    found = typical(lengths(model, sizes))["x"]
    first = sizes[:64]  # more are not looked at
    median = sorted(first)[(len(first) - 1) // 2]
    assert found.shape == (1, median)
    assert found[0, 0] == first.index(median) % 5


def test_sizes_are_of_all_inputs_together():
    model = parsed("g (float[n,a] x, float[n,b] z) => (float[n,a] y) { y = Neg (x) }")
    parts = [(1, 9), (8, 1), (5, 9), (1, 1)]  # 10, 9, 14 and 2 elements
    given = [
        {"x": np.ones((1, a), np.float32), "z": np.ones((1, b), np.float32)} for a, b in parts
    ]
    found = typical(Feeds.read(given, input_specs(model)))
    assert (found["x"].shape, found["z"].shape) == ((1, 8), (1, 1))
