"""Second moments of what weights meet: the rows are what the operators really multiply."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.capability import Capability
from fourfold.compiler.contract import Context
from fourfold.compiler.covariance import Meeting, covariances
from fourfold.compiler.feeds import Feeds, input_specs
from fourfold.compiler.graph import readers_of, weights_of
from fourfold.compiler.splitting import Channels

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

LAYERS = {
    "matmul": ("float[n,3,4] x", "MatMul (x, w)", (4, 6), (5, 3, 4)),
    "gemm": ("float[n,4] x", "Gemm (x, w)", (4, 6), (5, 4)),
    "gemm, weight turned": ("float[n,4] x", "Gemm <transB = 1> (x, w)", (6, 4), (5, 4)),
    "gemm, input turned": ("float[4,n] x", "Gemm <transA = 1> (x, w)", (4, 6), (4, 5)),
    "conv": ("float[n,4,7,6] x", "Conv <pads = [1,0,2,1]> (x, w)", (6, 4, 3, 2), (5, 4, 7, 6)),
    "conv, strided": (
        "float[n,4,9,8] x",
        "Conv <strides = [2,3], dilations = [2,1]> (x, w)",
        (6, 4, 3, 2),
        (5, 4, 9, 8),
    ),
    "conv, grouped": ("float[n,4,6,6] x", "Conv <group = 2> (x, w)", (6, 2, 3, 3), (5, 4, 6, 6)),
    "conv, depthwise": ("float[n,4,9] x", "Conv <group = 4> (x, w)", (8, 1, 3), (5, 4, 9)),
}


def model_of(inputs, node, shape):
    weight = f"float[{','.join(map(str, shape))}] w"
    model = ir.from_onnx_text(f"{HEADER} g ({inputs}, {weight}) => (y) {{ [one] y = {node} }}")
    value = model.graph.inputs.pop()
    array = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    value.const_value = ir.tensor(array, name="w")
    model.graph.register_initializer(value)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    ShapeInferencePass()(model)
    return model


def met(name, tmp_path, batch=2, **changes):
    """Return (weight as rows, meeting, covariances, x, model)."""
    inputs, node, shape, size = LAYERS[name]
    model = model_of(inputs, node, shape)
    (reader,) = readers_of(weights_of(model)[0])
    x = np.random.default_rng(2).normal(size=size).astype(np.float32)
    whole = "turned" in name and "input" in name  # its samples lie along another axis
    data = [{"x": x}] if whole else {"x": x}
    feeds = Feeds.read(data, input_specs(model), batch=batch)
    context = Context(Capability("any", (21, 25), ()), tmp_path, feeds=feeds)
    meeting = Meeting.of(reader)
    ((found, moments),) = covariances(model, [meeting], replace(context, **changes))
    assert found == meeting
    rows = Channels.of(reader).rows(reader.value.const_value.numpy())
    return rows, meeting, moments, x, model


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_output(name, tmp_path):
    rows, meeting, _, x, model = met(name, tmp_path)
    got = [part @ one.T for part, one in zip(
        meeting.rows(x), np.split(rows, meeting.groups), strict=True
    )]  # fmt: skip
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    channels = -1 if name[0] in "mg" else 1
    flat = np.moveaxis(y, channels, -1).reshape(-1, len(rows))
    np.testing.assert_allclose(np.hstack(got), flat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_means_over_all_positions(name, tmp_path):
    _, meeting, moments, x, _ = met(name, tmp_path)
    for part, found in zip(meeting.rows(x), moments, strict=True):
        expected = part.T.astype(np.float64) @ part / len(part)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_batches_and_memory_change_nothing(tmp_path):
    _, _, first, _, _ = met("conv", tmp_path)
    _, _, second, _, _ = met("conv", tmp_path, batch=5, memory=1)
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_covariances_that_do_not_fit_together_come_one_after_the_other(tmp_path):
    text = f"""{HEADER} g (float[n,4] x, float[4,8] a, float[8,3] b) => (float[n,3] y) {{
        h = MatMul (x, a)  y = MatMul (h, b)
    }}"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        array = np.ones(value.shape.numpy(), np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    ShapeInferencePass()(model)
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    feeds = Feeds.read({"x": x}, input_specs(model))
    context = Context(Capability("any", (21, 25), ()), tmp_path, feeds=feeds, memory=1000)
    meetings = [Meeting.of(readers_of(value)[0]) for value in weights_of(model)]
    found = dict(covariances(model, meetings, context))
    assert [found[one].shape for one in meetings] == [(1, 4, 4), (1, 8, 8)]
    h = x @ np.ones((4, 8), np.float32)
    np.testing.assert_allclose(found[meetings[1]][0], h.T @ h / 6, rtol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "node", "shape"),
    [
        ("float[n,4,5,5] x", "ConvTranspose (x, w)", (4, 6, 2, 2)),
        ("float[2,n,4] x", "MatMul (x, w)", (2, 4, 6)),
        ('float[n,4,5,5] x', 'Conv <auto_pad = "SAME_UPPER"> (x, w)', (6, 4, 3, 3)),
    ],
)  # fmt: skip
def test_layers_that_are_not_known_how(inputs, node, shape):
    model = model_of(inputs, node, shape)
    assert Meeting.of(readers_of(weights_of(model)[0])[0]) is None
