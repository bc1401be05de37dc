import functools
import importlib.util
import os
import random
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.blocks import attention_groups, find_blocks
from fourfold.compiler.graph import weight_of
from fourfold.compiler.model import load
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("FOURFOLD_DATA", ROOT.parent / "shared" / "data"))
HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.acme" : 1]>'
TOKENS = "float[n,6,16] x"
IMAGE = "float[n,8,8,8] x"
CONSTANTS = """float half = {0.5}, float tiny = {0.00001}, int64[4] heads = {0,0,4,4},
    int64[4] pair = {0,0,2,4}, int64[3] flat = {0,0,16}, int64[1] last = {-1},
    int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}"""


class Net:
    """Writes a model node by node; its methods take and return names of values."""

    def __init__(self, *inputs):
        self.inputs, self.weights, self.lines = inputs, {}, []

    def op(self, op, *inputs, **attributes):
        name = f"v{len(self.lines)}"
        options = ", ".join(f"{key} = {value}" for key, value in attributes.items())
        self.lines.append(f"{name} = {op} <{options}> ({', '.join(inputs)})")
        return name

    def weight(self, *shape):
        name = f"w{len(self.weights)}"
        self.weights[name] = shape
        return name

    def linear(self, x, rows=16, columns=16):
        return self.op("MatMul", x, self.weight(rows, columns))

    def biased(self, x, rows=16, columns=16):
        return self.op("Add", self.linear(x, rows, columns), self.weight(columns))

    def norm(self, x):
        return self.op("LayerNormalization", x, self.weight(16), self.weight(16), axis=-1)

    def long_norm(self, x):
        """An RMS norm as exporters write it, with an Add of its own."""
        mean = self.op("ReduceMean", self.op("Mul", x, x), "last")
        root = self.op("Sqrt", self.op("Add", mean, "tiny"))
        return self.op("Mul", self.op("Div", x, root), self.weight(16))

    def mlp(self, x):
        return self.biased(self.gelu(self.biased(x, 16, 32)), 32, 16)

    def gelu(self, x):
        """Its cubic approximation: an Add that is no residual."""
        cube = self.op("Mul", self.op("Mul", x, x), x)
        return self.op("Mul", x, self.op("Tanh", self.op("Add", x, self.op("Mul", cube, "half"))))

    def gated(self, x):
        gate = self.linear(x, 16, 24)
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(self.op("Mul", gate, self.linear(x, 16, 24)), 24, 16)

    def attention(self, x, source=None, mask=None):
        """One head; keys and values from `source`."""
        q, k, v = self.biased(x), self.biased(source or x), self.biased(source or x)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 1]))
        scores = self.op("Mul", scores, "half")
        scores = self.op("Add", scores, mask) if mask else scores
        return self.biased(self.op("MatMul", self.op("Softmax", scores), v))

    def llama_attention(self, x, cos, sin):
        """Four heads of queries, two of keys and values, rotary positions, no bias."""
        q, k, v = self.linear(x), self.linear(x, 16, 8), self.linear(x, 16, 8)
        q = self.turned(self.split(q, "heads"), cos, sin)
        k = self.turned(self.split(k, "pair"), cos, sin)
        k, v = (self.op("Concat", y, y, axis=1) for y in (k, self.split(v, "pair")))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        weights = self.op("Softmax", self.op("Div", scores, "half"))
        mixed = self.op("Transpose", self.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        return self.linear(self.op("Reshape", mixed, "flat"))

    def split(self, x, shape):
        return self.op("Transpose", self.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def turned(self, x, cos, sin):
        left = self.op("Slice", x, "zero", "two", "last")
        right = self.op("Slice", x, "two", "four", "last")
        rotated = self.op("Concat", self.op("Neg", right), left, axis=-1)
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", rotated, sin))

    def conv(self, x, before=8, after=8, size=3, stride=1):
        weight, edge = self.weight(after, before, size, size), size // 2
        pads = [edge, edge, edge, edge]
        return self.op("Conv", x, weight, pads=pads, strides=[stride, stride])

    def residual(self, x, before=8, after=8):
        """A ResNet's block; where the channels change, it halves the image."""
        stride = 1 if before == after else 2
        inner = self.op("Relu", self.conv(x, before, after, 3, stride))
        skip = x if before == after else self.conv(x, before, after, 1, stride)
        return self.op("Relu", self.op("Add", self.conv(inner, after, after), skip))

    def model(self, *outputs):
        weights = [f"float{list(shape)} {name}" for name, shape in self.weights.items()]
        model = ir.from_onnx_text(
            f"{HEADER} net ({', '.join([*self.inputs, *weights])}) => ({', '.join(outputs)})"
            f"<{CONSTANTS}> {{ {' '.join(self.lines).replace('<>', '')} }}"
        )
        for value in list(model.graph.inputs)[len(self.inputs) :]:
            zeros = np.zeros(value.shape.numpy(), np.float32)
            value.const_value = ir.tensor(zeros, name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
        ShapeInferencePass()(model)
        return model


def ends(model):
    return [(block.entry.name, block.exit.name) for block in find_blocks(model)]


def weights(model):
    return [set(block.weights) for block in find_blocks(model)]


def matrices(model):
    """Return the names of all weights but tables, in graph order."""
    found = (weight_of(node) for node in model.graph if node.op_type != "Gather")
    return [weight.value.name for weight in found if weight]


# One layer of each kind of model, h -> h.


def pre_norm(net, h):
    h = net.op("Add", h, net.attention(net.norm(h)))
    return net.op("Add", net.mlp(net.norm(h)), h)


def post_norm(net, h):
    h = net.norm(net.op("Add", h, net.attention(h, mask="mask")))
    return net.norm(net.op("Add", net.mlp(h), h))


def long_post_norm(net, h):
    h = net.long_norm(net.op("Add", h, net.attention(h)))
    return net.long_norm(net.op("Add", net.gated(h), h))


def llama(net, h):
    h = net.op("Add", h, net.llama_attention(net.long_norm(h), "cos", "sin"))
    return net.op("Add", h, net.gated(net.long_norm(h)))


def parallel(net, h):
    h1 = net.norm(h)
    return net.op("Add", net.op("Add", net.attention(h1), net.mlp(h1)), h)


def parallel_one_by_one(net, h):
    h1 = net.norm(h)
    return net.op("Add", net.op("Add", net.attention(h1), h), net.mlp(h1))


def parallel_sum(net, h):
    h1 = net.norm(h)
    return net.op("Sum", net.attention(h1), h, net.mlp(h1))


def axial(net, h):
    """Attention along rows, then along columns: the first two units of three look alike."""
    h = net.op("Add", h, net.attention(net.norm(h)))
    return pre_norm(net, h)


def experts(net, h):
    """A layer twice as long: its second MLP differs from its first."""
    h = net.op("Add", h, net.mlp(net.norm(net.op("Add", h, net.attention(net.norm(h))))))
    return net.op("Add", h, net.gated(net.norm(net.op("Add", h, net.attention(net.norm(h))))))


def low_rank(net, h):
    """Adapters that were not merged: W(x) + B(A(x)) has no skip."""

    def adapted(x):
        return net.op("Add", net.linear(x), net.linear(net.linear(x, 16, 2), 2, 16))

    return net.op("Add", h, adapted(net.op("Relu", adapted(net.norm(h)))))


def skip_inside(net, h):
    """A state space model adds its input to its output, inside of the residual."""
    x = net.linear(net.norm(h))
    inner = net.op("Add", net.op("Mul", x, "half"), net.linear(net.op("Tanh", net.linear(x))))
    return net.op("Add", net.linear(net.op("Mul", inner, net.op("Sigmoid", x))), h)


def image(net, h):
    return net.residual(h)


LAYERS = (
    pre_norm,
    post_norm,
    long_post_norm,
    llama,
    parallel,
    parallel_one_by_one,
    parallel_sum,
    axial,
    skip_inside,
    low_rank,
    image,
)


def stack(layer, count, start="Tanh"):
    """A model of `count` layers and a head, and the names of the values between layers."""
    tables = ("float[6,4] cos", "float[6,4] sin", "float[n,1,6] mask")
    net = Net(IMAGE) if layer is image else Net(TOKENS, *tables)
    between = [net.op(start, "x") if start else "x"]
    for _ in range(count):
        between.append(layer(net, between[-1]))
    head = net.conv(between[-1]) if layer is image else net.linear(between[-1], 16, 3)
    return net.model(head), between


def check_stack(model, between):
    """Assert that the blocks are the layers, and hold all weights but the head's."""
    assert ends(model) == list(pairwise(between))
    found = [name for block in find_blocks(model) for name in block.weights]
    assert sorted(found) == sorted(matrices(model)[:-1])
    sizes = {len(block.weights) for block in find_blocks(model)}
    assert len(sizes) == 1


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("count", [2, 5])
def test_each_layer_is_a_block(layer, count):
    check_stack(*stack(layer, count))


def test_a_layer_of_four_units_is_one_block():
    check_stack(*stack(experts, 3))


def test_the_first_hidden_state_may_be_the_input_of_the_model():
    check_stack(*stack(pre_norm, 3, start=None))


def renamed(model):
    """Give all values and nodes names without meaning; return a new name -> the old one."""
    old = {}
    values = [v for node in model.graph for v in node.outputs]
    values += [*model.graph.inputs, *list(model.graph.initializers.values())]
    for number, value in enumerate(values):
        new = f"name{(number * 7919) % 100003}"
        old[new] = value.name
        value.name = new
    for number, node in enumerate(model.graph):
        node.name = f"node{-number}"
    return old


def shuffle(model, seed):
    """Put the nodes into another order that runs."""
    draw, graph = random.Random(seed), model.graph
    waiting, ready = list(graph), []
    done = {id(v) for v in (*graph.inputs, *graph.initializers.values())}
    graph.remove(waiting)
    while waiting:
        free = [n for n in waiting if all(v is None or id(v) in done for v in n.inputs)]
        ready.append(draw.choice(free))
        waiting.remove(ready[-1])
        done.update(id(v) for v in ready[-1].outputs)
    graph.extend(ready)


@settings(max_examples=50)
@given(st.sampled_from(LAYERS), st.integers(2, 4), st.integers(0, 1 << 16))
def test_neither_names_nor_the_order_of_nodes_matter(layer, count, seed):
    model, between = stack(layer, count)
    before, groups = weights(model), attention_groups(model)
    shuffle(model, seed)
    check_stack(model, between)
    assert weights(model) == before
    assert attention_groups(model) == groups
    blocks, old = find_blocks(model), renamed(model)
    after = find_blocks(model)
    assert [(b.entry, b.exit) for b in after] == [(b.entry, b.exit) for b in blocks]
    assert [tuple(old[name] for name in b.weights) for b in after] == [b.weights for b in blocks]
    assert [tuple(old[name] for name in group) for group in attention_groups(model)] == groups


def test_a_model_without_residuals_has_no_blocks(zoo):
    assert find_blocks(zoo["mlp"]()) == []


def test_what_does_not_repeat_stands_alone(zoo):
    convnet, attention = zoo["convnet"](), zoo["attention"]()
    assert ends(convnet) == [("r1", "a2")]
    assert weights(convnet) == [{"w2"}]
    assert ends(attention) == [("x", "n1"), ("n1", "y")]
    assert weights(attention) == [{"wq", "wk", "wv", "wo"}, {"w1", "w2"}]


def test_blocks_that_halve_the_image():
    net = Net(IMAGE)
    between = [net.op("Relu", net.conv("x"))]
    for before, after in ((8, 8), (8, 16), (16, 16), (16, 32)):
        between.append(net.residual(between[-1], before, after))
    model = net.model(net.op("GlobalAveragePool", between[-1]))
    blocks = find_blocks(model)
    assert ends(model) == list(pairwise(between))
    assert [len(block.weights) for block in blocks] == [2, 3, 2, 3]
    assert [b.entry.shape == b.exit.shape for b in blocks] == [True, False, True, False]


def test_a_stage_without_skip_ends_a_row():
    net = Net(IMAGE)
    x = net.conv("x")
    first = net.op("Add", x, net.conv(net.op("Relu", x)))
    second = net.conv(net.op("Relu", first), 8, 16, 3, 2)
    third = net.op("Add", second, net.conv(net.op("Relu", second), 16, 16))
    model = net.model(third)
    assert ends(model) == [(x, first), (second, third)]
    assert [len(block.weights) for block in find_blocks(model)] == [1, 1]


def test_a_long_skip_hides_no_blocks():
    net = Net(IMAGE)
    start = net.conv("x")
    between = [start]
    for _ in range(3):
        between.append(net.residual(between[-1]))
    model = net.model(net.op("Add", start, net.conv(between[-1])))
    assert ends(model) == list(pairwise(between))


def test_sums_of_embeddings_are_no_block():
    net = Net("int64[n,6] ids", "int64[n,6] kinds")
    words = net.op("Gather", net.weight(50, 16), "ids")
    kinds = net.op("Gather", net.weight(2, 16), "kinds")
    x = net.norm(net.op("Add", net.op("Add", words, kinds), net.weight(6, 16)))
    model = net.model(net.linear(x))
    assert find_blocks(model) == []


@pytest.mark.parametrize("source", ["table", "input", "embedding"])
def test_what_is_added_to_the_scores_of_all_layers_is_no_skip(source):
    """A table of relative positions, a mask, and a mask that also gates the embedding."""
    net = Net("float[6,16] x", "int64[6,6] buckets", "float[6] keep")
    h = "x"
    if source == "table":
        table = net.op("Gather", net.weight(32, 1), "buckets")
        bias = net.op("Squeeze", table, "last")
    else:
        bias = net.op("Unsqueeze", net.op("Mul", "keep", "half"), "zero")
    if source == "embedding":
        h = net.op("Mul", "x", net.op("Unsqueeze", "keep", "last"))
    between = [h]
    for _ in range(4):
        x = between[-1]
        q, k, v = net.linear(x), net.linear(x), net.linear(x)
        scores = net.op("Add", net.op("MatMul", q, net.op("Transpose", k)), bias)
        x = net.op("Add", x, net.linear(net.op("MatMul", net.op("Softmax", scores), v)))
        between.append(net.op("Add", x, net.mlp(x)))
    model = net.model(net.linear(between[-1]))
    check_stack(model, between)
    assert len(attention_groups(model)) == 4


def test_scores_that_add_up_from_layer_to_layer_are_no_stream():
    net = Net(TOKENS)
    between, scores = [net.op("Tanh", "x")], None
    for _ in range(3):
        x = between[-1]
        q, k, v = net.linear(x), net.linear(x), net.linear(x)
        product = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
        scores = net.op("Add", product, scores) if scores else product
        mixed = net.op("MatMul", net.op("Softmax", scores), v)
        x = net.op("Add", x, net.linear(mixed))
        between.append(net.op("Add", x, net.mlp(x)))
    check_stack(net.model(net.linear(between[-1])), between)


def decoder(net, h, memory):
    h = net.op("Add", h, net.attention(net.norm(h)))
    h = net.op("Add", h, net.attention(net.norm(h), source=memory))
    return net.op("Add", h, net.mlp(net.norm(h)))


def test_encoder_and_decoder_are_two_rows():
    net = Net(TOKENS, "float[n,6,16] y")
    encoder, decoded = [net.op("Tanh", "x")], [net.op("Tanh", "y")]
    for _ in range(3):
        encoder.append(long_post_norm(net, encoder[-1]))
    memory = net.norm(encoder[-1])
    for _ in range(2):
        decoded.append(decoder(net, decoded[-1], memory))
    model = net.model(net.linear(decoded[-1]))
    rows = [*pairwise(encoder), *pairwise(decoded)]
    assert ends(model) == rows
    # The weights of the cross-attention's keys and values lie beside the decoder's stream.
    assert [len(block.weights) for block in find_blocks(model)] == [7, 7, 7, 10, 10]
    assert set().union(*weights(model)) == set(matrices(model)[:-1])
    assert [len(group) for group in attention_groups(model)] == [3, 3, 3, 3, 2, 3, 2]


def test_two_towers_are_two_rows():
    net = Net(TOKENS, "float[n,6,16] y")
    first, second = [net.op("Tanh", "x")], [net.op("Sigmoid", net.op("Tanh", "y"))]
    for _ in range(3):
        first.append(pre_norm(net, first[-1]))
        second.append(pre_norm(net, second[-1]))
    model = net.model(net.op("Mul", net.linear(first[-1]), net.linear(second[-1])))
    rows = [*pairwise(first), *pairwise(second)]
    assert ends(model) == rows
    assert [block.index for block in find_blocks(model)] == list(range(6))
    assert {len(block.weights) for block in find_blocks(model)} == {6}
    for seed in range(5):
        shuffle(model, seed)
        assert ends(model) == rows


def test_weights_beside_the_stream_go_no_further_back_than_the_nearest():
    net = Net(TOKENS, "float[n,6,16] y")
    memory = net.mlp("y")
    h = net.op("Tanh", "x")
    model = net.model(decoder(net, decoder(net, h, memory), memory))
    stem = set(matrices(model)[:2])
    assert weights(model)[0].isdisjoint(stem)
    assert [len(names) for names in weights(model)] == [10, 10]


def test_a_block_that_reads_another_row_leaves_its_weights_alone():
    net = Net(TOKENS, "float[n,6,16] y")
    h, other = net.op("Tanh", "x"), net.op("Tanh", "y")
    other = pre_norm(net, other)
    mixed = net.linear(net.op("Concat", h, other, axis=-1), 32, 16)
    model = net.model(net.op("Add", h, mixed))
    assert [len(names) for names in weights(model)] == [4, 2, 1]


def test_shared_weights_are_named_in_every_block():
    net = Net(TOKENS)
    shared, h = [net.weight(16, 16), net.weight(16, 16)], net.op("Tanh", "x")
    for _ in range(3):
        inner = net.op("MatMul", net.op("Relu", net.op("MatMul", h, shared[0])), shared[1])
        h = net.norm(net.op("Add", inner, h))
    assert [block.weights for block in find_blocks(net.model(h))] == [tuple(shared)] * 3


def test_operators_of_unknown_type_may_carry_the_stream():
    net = Net(TOKENS)
    x = net.op("Tanh", "x")
    y = net.op("Add", x, net.linear(net.op("com.acme.Norm", x)))
    z = net.op("Add", y, net.linear(net.op("com.acme.Norm", y)))
    assert ends(net.model(z)) == [(x, y), (y, z)]


# attention_groups


def test_attention_reads_one_value_three_times(zoo):
    assert attention_groups(zoo["attention"]()) == [("wq", "wk", "wv")]
    assert attention_groups(zoo["convnet"]()) == attention_groups(zoo["mlp"]()) == []


def test_groups_of_a_llama_are_in_the_order_q_k_v():
    net = Net(TOKENS, "float[6,4] cos", "float[6,4] sin")
    model = net.model(net.llama_attention("x", "cos", "sin"))
    assert attention_groups(model) == [("w0", "w1", "w2")]


def test_cross_attention_shares_an_input_between_k_and_v():
    net = Net(TOKENS, "float[n,6,16] memory")
    model = net.model(net.attention("x", source="memory"))
    assert attention_groups(model) == [("w2", "w4")]


def test_q_and_k_alone_may_share_an_input():
    net = Net(TOKENS, "float[n,6,16] values")
    q, k, v = net.linear("x"), net.linear("x"), net.linear("values")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
    model = net.model(net.op("MatMul", net.op("Softmax", scores), v))
    assert attention_groups(model) == [("w0", "w1")]


def test_one_weight_for_q_k_and_v_is_no_group():
    net = Net(TOKENS)
    together = net.biased("x", 16, 48)
    parts = [net.op("Slice", together, "zero", "two", "last") for _ in "qkv"]
    scores = net.op("MatMul", parts[0], net.op("Transpose", parts[1], perm=[0, 2, 1]))
    model = net.model(net.op("MatMul", net.op("Softmax", scores), parts[2]))
    assert attention_groups(model) == []


def test_projections_by_gemm():
    net = Net("float[6,16] x")
    q, k, v = (net.op("Gemm", "x", net.weight(16, 16), net.weight(16)) for _ in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k))
    model = net.model(net.op("MatMul", net.op("Softmax", scores), v))
    assert attention_groups(model) == [("w0", "w2", "w4")]


@pytest.mark.parametrize("between", [None, "linear"])
def test_products_without_softmax_are_no_attention(between):
    net = Net("float[6,16] x")
    q, k, v = net.linear("x"), net.linear("x"), net.linear("x")
    scores = net.op("MatMul", q, net.op("Transpose", k))
    scores = net.linear(scores, 6, 6) if between else scores
    assert attention_groups(net.model(net.op("MatMul", scores, v))) == []


def test_keys_of_two_weights_are_left_out():
    net = Net("float[6,16] x")
    q, v = net.linear("x"), net.linear("x")
    k = net.op("Transpose", net.op("Add", net.linear("x"), net.linear("x")))
    scores = net.op("Softmax", net.op("MatMul", q, k))
    assert attention_groups(net.model(net.op("MatMul", scores, v))) == [("w0", "w1")]


# Trained models; where they are not, these tests are skipped.

real = pytest.mark.skipif(
    not (DATA / "tasks.py").is_file(),
    reason=f"no tasks.py in {DATA}; set FOURFOLD_DATA to the folder with trained models",
)


@functools.cache
def tasks():
    """Import tasks.py by its path."""
    spec = importlib.util.spec_from_file_location("fourfold_test_tasks", DATA / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def tidied(name, context):
    model = load(tasks().model_path(tasks().TASKS[name], DATA))
    return run(Recipe.parse("tidy,fold-batchnorm"), model, context)[0]


def shapes(model, names):
    return [tuple(model.graph.initializers[name].const_value.shape.numpy()) for name in names]


@real
@pytest.mark.parametrize(
    ("name", "layers", "block"),
    [
        ("minilm-sts", 6, [(384, 384)] * 4 + [(384, 1536), (1536, 384)]),
        ("kwt", 12, [(64, 64)] * 4 + [(64, 256), (256, 64)]),
        (
            "stories",
            5,
            [(64, 64), (64, 32), (64, 32), (64, 64), (64, 172), (64, 172), (172, 64)],
        ),
    ],
)
def test_layers_of_trained_transformers(name, layers, block, context):
    model = tidied(name, context)
    blocks = find_blocks(model)
    assert [shapes(model, b.weights) for b in blocks] == [block] * layers
    assert [b.exit for b in blocks[:-1]] == [b.entry for b in blocks[1:]]
    assert len({b.exit.producer().op_type for b in blocks}) == 1
    assert [b.weights[:3] for b in blocks] == attention_groups(model)
    before = [[b.entry, b.exit, shapes(model, b.weights)] for b in blocks]
    renamed(model)
    after = [[b.entry, b.exit, shapes(model, b.weights)] for b in find_blocks(model)]
    assert after == before


@real
@pytest.mark.parametrize(("name", "depth"), [("cifar-resnet20", 3), ("cifar-resnet56", 9)])
def test_blocks_of_trained_resnets(name, depth, context):
    model = tidied(name, context)
    blocks = find_blocks(model)
    assert [b.exit for b in blocks[:-1]] == [b.entry for b in blocks[1:]]
    assert {b.exit.producer().op_type for b in blocks} == {"Relu"}
    channels = [shape[:2] for b in blocks for shape in shapes(model, b.weights)]
    stages = [(16, 16)] * 2 * depth
    for wide in (32, 64):
        stages += [(wide, wide // 2)] + [(wide, wide)] * (2 * depth - 1)
    assert channels == stages
    assert attention_groups(model) == []


@real
@pytest.mark.parametrize("name", ["vww", "kws", "squeezenet"])
def test_trained_models_without_residuals(name, context):
    model = tidied(name, context)
    assert find_blocks(model) == []
    assert attention_groups(model) == []
