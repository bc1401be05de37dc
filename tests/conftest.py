"""Small models, a context, and a comparison of graphs that is blind to names and node order."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, settings
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.contract import Context
from fourfold.compiler.graph import subgraphs
from fourfold.compiler.verifier import Interface, faults_of
from fourfold.targets.cpu import Cpu

# A busy machine is no reason to fail.
settings.register_profile("fourfold", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fourfold")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests keep their results to themselves: what a machine measured before changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOURFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

# In these texts every graph input but x is a weight; `_filled` gives it seeded data.
CONVNET = """
convnet (float[n,3,8,8] x, float[8,3,3,3] w1, float[8] b1, float[8] gamma, float[8] beta,
         float[8] mean, float[8] variance, float[8,8,3,3] w2, float[8] b2,
         float[4,8] w3, float[4] b3) => (float[n,4] y) {
    [conv1] c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
    [norm1] n1 = BatchNormalization (c1, gamma, beta, mean, variance)
    [relu1] r1 = Relu (n1)
    [conv2] c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
    [add2] a2 = Add (c2, r1)
    [relu2] r2 = Relu (a2)
    [pool] p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (r2)
    [mean] g = GlobalAveragePool (p)
    [flatten] f = Flatten (g)
    [head] y = Gemm <transB = 1> (f, w3, b3)
}"""

MLP = """
mlp (float[n,16] x, float[16,32] w1, float[32] b1, float[32,24] w2, float[24] b2,
     float[10,24] w3, float[10] b3) => (float[n,10] y) {
    [fc1] h1 = Gemm (x, w1, b1)
    [relu1] r1 = Relu (h1)
    [fc2] h2 = MatMul (r1, w2)
    [bias2] s2 = Add (h2, b2)
    [relu2] r2 = Relu (s2)
    [fc3] y = Gemm <transB = 1> (r2, w3, b3)
}"""

ATTENTION = """
attention (float[n,6,16] x, float[16,16] wq, float[16,16] wk, float[16,16] wv, float[16,16] wo,
           float[16] bo, float[16] gamma1, float[16] beta1, float[16,32] w1, float[32] b1,
           float[32,16] w2, float[16] b2, float[16] gamma2, float[16] beta2) => (float[n,6,16] y) {
    [query] q = MatMul (x, wq)
    [key] k = MatMul (x, wk)
    [value] v = MatMul (x, wv)
    [turn] kt = Transpose <perm = [0,2,1]> (k)
    [scores] s = MatMul (q, kt)
    [soft] p = Softmax <axis = -1> (s)
    [mix] m = MatMul (p, v)
    [out] o = MatMul (m, wo)
    [out_bias] ob = Add (o, bo)
    [skip1] s1 = Add (ob, x)
    [norm1] n1 = LayerNormalization <axis = -1> (s1, gamma1, beta1)
    [up] u = MatMul (n1, w1)
    [up_bias] ub = Add (u, b1)
    [gelu] g = Gelu (ub)
    [down] d = MatMul (g, w2)
    [down_bias] db = Add (d, b2)
    [skip2] s2 = Add (db, n1)
    [norm2] y = LayerNormalization <axis = -1> (s2, gamma2, beta2)
}"""


def convnet():
    """float[n,3,8,8] -> [n,4]: Conv, BatchNormalization, a residual Add, pooling, Gemm."""
    return _filled(CONVNET)


def mlp():
    """float[n,16] -> [n,10]: Gemm both ways around, and a MatMul with its bias in an Add."""
    return _filled(MLP)


def attention():
    """float[n,6,16] -> [n,6,16]: one head, residual sums, LayerNormalization, Gelu."""
    return _filled(ATTENTION)


def _filled(text, seed=0):
    """Parse a model whose weights are graph inputs, and make them initializers."""
    model = ir.from_onnx_text(HEADER + text)
    draw = np.random.default_rng(seed)
    graph = model.graph
    for value in list(graph.inputs)[1:]:
        shape = value.shape.numpy()
        fan_in = max(int(np.prod(shape)) // max(shape), 1)
        array = draw.normal(0, 1 / np.sqrt(fan_in) if len(shape) > 1 else 0.1, shape)
        if value.name.startswith(("gamma", "variance")):
            array = 1 + 0.3 * np.abs(array)
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)
    ShapeInferencePass()(model)
    return model


@pytest.fixture
def zoo():
    """Name -> function that makes the model anew; all have opset 21 and typed values."""
    return {"convnet": convnet, "mlp": mlp, "attention": attention}


@pytest.fixture
def context(tmp_path):
    """A context with the CPU target's capability (a fixed class of CPU) and no feeds."""
    return Context(Cpu(isa="vnni").capability, tmp_path)


@pytest.fixture
def becomes(context):
    """`becomes(pass_, before, after, context=None)`: run the pass and compare; return the model.

    `before` is ONNX text (or a model, which is edited), `after` is ONNX text. Weights stand in the
    text's header. Names of values between the graph's inputs and outputs do not matter, nor does
    the order of nodes, but initializers that nobody reads do.
    """

    def check(pass_, before, after, context=context):
        model = ir.from_onnx_text(before) if isinstance(before, str) else before
        ShapeInferencePass()(model)
        interface = Interface.of(model)
        assert list(pass_.requires(model, context)) == []
        pass_.run(model, context)
        assert canonical(model.graph) == canonical(ir.from_onnx_text(after).graph)
        assert list(faults_of(model, interface)) == []
        return model

    return check


def canonical(graph, names=None):
    """Return a line for every node: op, attributes and inputs, renamed in topological order."""
    # Keys are ids: inputs keep their names, constants are called by content, the rest by number.
    names = dict(names or {})
    names |= {id(value): value.name for value in graph.inputs}
    constants = {id(v): _constant(v.const_value) for v in graph.initializers.values()}
    names |= constants
    read, lines = set(), []

    def visit(node):
        # The bodies of If and Loop read values of this graph too.
        captured = [v for body in subgraphs(node) for n in body.all_nodes() for v in n.inputs]
        for value in (*node.inputs, *captured):
            producer = value.producer() if value is not None and id(value) not in names else None
            if producer is not None and producer.graph is graph:
                visit(producer)
        if node.outputs and id(node.outputs[0]) in names:
            return
        read.update(map(id, (*node.inputs, *captured)))
        inputs = [names.get(id(v), str(v)) if v is not None else "-" for v in node.inputs]
        inner = [line for body in subgraphs(node) for line in canonical(body, names)]
        plain = [f"{key}={_attribute(a)}" for key, a in sorted(node.attributes.items())]
        outputs = []
        for value in node.outputs:
            names[id(value)] = f"v{len(names) - len(constants)}"
            outputs.append(names[id(value)])
        op = f"{node.domain}::{node.op_type}".removeprefix("::")
        lines.append(f"{','.join(outputs)} = {op}<{' '.join(plain)}>({', '.join(inputs)})")
        lines.extend(f"    {line}" for line in inner)

    # From the outputs backwards, so that the order in which nodes stand does not matter.
    for value in graph.outputs:
        if value.producer() is not None:
            visit(value.producer())
    for node in graph:
        visit(node)
    outputs = {id(value) for value in graph.outputs}
    unread = sorted(text for key, text in constants.items() if key not in read | outputs)
    lines += [f"output {v.name} = {names.get(id(v))}" for v in graph.outputs]
    return lines + [f"unread {text}" for text in unread]


def _constant(tensor):
    """Print an initializer by type, shape and its elements to five digits."""
    array = tensor.numpy()
    elements = " ".join(f"{x:.5g}" for x in array.astype(np.float64).ravel().tolist())
    return f"{tensor.dtype}{list(array.shape)}{{{elements}}}"


def _attribute(attribute):
    """Print an attribute's value; a graph's nodes are printed on lines of their own."""
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    if attribute.type == ir.AttributeType.TENSOR:
        return _constant(attribute.as_tensor())
    return f"{attribute.value:.5g}" if isinstance(attribute.value, float) else attribute.value
