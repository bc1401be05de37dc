"""What the tests of passes share: onnxruntime's answers, and the graph that it really runs."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.feeds import Feeds, input_specs


@pytest.fixture
def parse():
    """`parse(text)`: the model, with the types and shapes that the passes rely on."""

    def parsed(text):
        model = ir.from_onnx_text(text)
        ShapeInferencePass()(model)
        return model

    return parsed


@pytest.fixture
def outputs():
    """`outputs(model, plain=False, **feeds)`: output name -> array; plain switches fusions off."""

    def run(model, plain=False, **feeds):
        session = _session(model, _options(plain))
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, feeds), strict=True))

    return run


@pytest.fixture
def optimized(tmp_path):
    """`optimized(model)`: the graph that onnxruntime makes of a model before it runs it."""

    def graph(model):
        path = tmp_path / "optimized.onnx"
        options = _options(plain=False)
        options.optimized_model_filepath = str(path)
        _session(model, options)
        return onnx.load(path).graph

    return graph


@pytest.fixture
def kernels(optimized):
    """`kernels(model)`: op type -> number of nodes in the graph that onnxruntime runs."""
    return lambda model: Counter(node.op_type for node in optimized(model).node)


@pytest.fixture
def fed(context):
    """`fed(model, **arrays)`: the context with these calibration feeds."""

    def with_feeds(model, **arrays):
        return replace(context, feeds=Feeds.read(arrays, input_specs(model)), remarks=[])

    return with_feeds


@pytest.fixture
def close():
    """`close(first, second)`: assert that two runs agree to 1e-5 of the largest number."""

    def check(first, second):
        assert first.keys() == second.keys()
        for name, array in first.items():
            scale = max(float(np.abs(array).max(initial=0)), 1e-6)
            np.testing.assert_allclose(second[name], array, rtol=0, atol=1e-5 * scale)

    return check


def _options(plain):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if plain:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    return options


def _session(model, options):
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
