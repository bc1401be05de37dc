"""What becomes of channel numbers in an operator: followed on numbers, and where they end."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from fourfold.compiler.channels import passed

LISTS = {
    "pads": [0, 0, 1, 1, 0, 0, 1, 1],
    "wide": [0, 1, 0, 0, 0, 0, 0, 0],
    "zero": [0],
    "one": [1],
    "three": [3],
    "minus": [-1],
    "spatial": [2, 3],
    "pair": [2, 0],
    "sizes": [1, 3],
    "none": [],
}
UNKNOWN = "Reshape cuts its channels, or changes a shape that is not known"
ALONG = (1, 4, 1, 1)


def node_of(op, inputs="float[2,4,6,6] x, float[2,4,6,6] z", outputs="m", fixed=True):
    """Parse a graph of one node, with lists of integers as constants (or not)."""
    listed = {n: f"int64[{len(v)}] {n}" for n, v in LISTS.items() if f",{n}" in op}
    header = ", ".join(f"{v} = {{{str(LISTS[n])[1:-1]}}}" for n, v in listed.items())
    if not fixed:
        inputs, header = ", ".join([inputs, *listed.values()]), ""
    made = ", ".join(f"float[{','.join('abcd')}] {n}" for n in outputs.split())
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({inputs}) => ({made}) <{header or "float unread = {0}"}> {{ {op} }}"""
    )
    for output in model.graph.outputs:
        output.shape = None
    ShapeInferencePass()(model)
    return next(iter(model.graph))


def numbers(shape):
    return np.arange(int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize(
    ("op", "index", "shape", "expected"),
    [
        ("m = Relu(x)", 0, ALONG, [[[[n]] for n in range(4)]]),
        ("m = AveragePool<kernel_shape=[2,2]>(x)", 0, ALONG, [[[[n]] for n in range(4)]]),
        ("m = Transpose<perm=[0,2,3,1]>(x)", 0, ALONG, [[[[0, 1, 2, 3]]]]),
        ("m = ReduceMean<keepdims=0>(x,spatial)", 0, ALONG, [[0, 1, 2, 3]]),
        ("m = ReduceMax(x,spatial)", 0, ALONG, [[[[n]] for n in range(4)]]),
        ("m = MatMul(z,x)", 1, (1, 1, 1, 6), [[[[0, 1, 2, 3, 4, 5]]]]),
        ("m = MatMul(x,z)", 0, (1, 1, 6, 1), [[[[n] for n in range(6)]]]),
        ("m = Div(x,z)", 0, ALONG, [[[[n]] for n in range(4)]]),
        ("m = Gather<axis=1>(x,pair)", 0, ALONG, [[[[2]], [[0]]]]),
        ("m = Gather<axis=2>(x,pair)", 0, ALONG, [[[[n]] for n in range(4)]]),
        ("m = Slice(x,minus,zero,one,minus)", 0, ALONG, [[[[3]], [[2]], [[1]]]]),
        ("m = Slice(x,one,three,one)", 0, (1, 1, 6, 1), [[[[n] for n in range(6)]]]),
        ("m = Concat<axis=-3>(z,x)", 1, ALONG, [[[[n]] for n in (10, 11, 12, 13, 0, 1, 2, 3)]]),
        ("m = Pad(x,pads)", 0, ALONG, [[[[n]] for n in range(4)]]),
    ],
)
def test_channels_go_where_their_elements_go(op, index, shape, expected):
    node = node_of(op)
    ((value, at),) = passed(node, index, numbers(shape), 10)
    assert value is node.outputs[0]
    assert at.tolist() == expected


def test_a_split_gives_each_output_its_own():
    node = node_of("m, n = Split<axis=1>(x,sizes)", outputs="m n")
    first, second = passed(node, 0, numbers(ALONG), 4)
    assert first[0] is node.outputs[0]
    assert first[1].ravel().tolist() == [0]
    assert second[1].ravel().tolist() == [1, 2, 3]
    whole = passed(node, 0, numbers((1, 1, 1, 6)), 6)
    assert [at.ravel().tolist() for _, at in whole] == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize(
    ("op", "index", "shape", "why"),
    [
        ("m = MatMul(x,z)", 0, (1, 4, 1, 6), "MatMul passes no factors through"),
        ("m = MatMul(z,x)", 1, (1, 4, 6, 1), "MatMul passes no factors through"),
        ("m = MatMul(x,v)", 0, (1, 4, 1, 1), "MatMul passes no factors through"),
        ("m = Div(z,x)", 1, ALONG, "Div passes no factors through"),
        ("m = Pad(x,wide)", 0, ALONG, "Pad adds channels"),
        ("m = Pad(x,pads,filler)", 0, ALONG, "Pad adds channels"),
        ("m = ReduceMean(x,one)", 0, ALONG, "ReduceMean reduces its channels"),
        ("m = ReduceMean(x,none)", 0, ALONG, "ReduceMean reduces its channels"),
        ("m = Softmax(x)", 0, ALONG, "Softmax passes no factors through"),
        ("m = MaxPool<kernel_shape=[2,2]>(x)", 0, (1, 1, 1, 6), "MaxPool mixes its channels"),
        ("m = GlobalAveragePool(x)", 0, (1, 4, 6, 1), "GlobalAveragePool mixes its channels"),
        ("m = PRelu(z,x)", 1, ALONG, "PRelu passes no factors through"),
        ("m = Concat<axis=2>(x,z)", 0, ALONG, "Concat joins it to others"),
        ("m = Concat<axis=2>(x,z)", 0, (1, 1, 1, 6), "Concat joins it to others"),
        ("m = Slice(x,zero,zero,one)", 0, ALONG, "Slice cuts its channels"),
    ],
)
def test_what_ends_factors(op, index, shape, why):
    inputs = "float[2,4,6,6] x, float[2,4,6,6] z, float[6] v, float filler"
    went = passed(node_of(op, inputs), index, numbers(shape), 99)
    assert isinstance(went, str)
    assert why in went


@pytest.mark.parametrize(
    ("op", "outputs"),
    [
        ("m = Slice(x,zero,one,one)", "m"),
        ("m = Gather<axis=1>(x,pair)", "m"),
        ("m = ReduceSum(x,one)", "m"),
        ("m = Pad(x,pads)", "m"),
        ("m, n = Split<axis=1>(x,sizes)", "m n"),
        ("m, n = MaxPool<kernel_shape=[2,2]>(x)", "m n"),
    ],
)
def test_what_is_not_known_before_a_run_ends_factors(op, outputs):
    node = node_of(op, outputs=outputs, fixed=False)
    assert isinstance(passed(node, 0, numbers(ALONG), 99), str)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    other=st.permutations(range(4)),
    axes=st.sets(st.integers(0, 3)),
)
def test_a_reshape_carries_numbers_as_it_carries_elements(shape, other, axes):
    at_shape = [n if axis in axes else 1 for axis, n in enumerate(shape)]
    flat = [*shape, *[1] * (4 - len(shape))]
    target = [flat[axis] for axis in other]
    graph = f"float[{','.join(map(str, shape))}] x, int64[4] s"
    node = node_of("m = Reshape(x,s)", graph)
    node.outputs[0].shape = ir.Shape(target)
    at = numbers(at_shape)
    went = passed(node, 0, at, 0)
    event("followed" if isinstance(went, list) else "given up")
    if isinstance(went, list):
        expected = np.broadcast_to(at, shape).reshape(target)
        np.testing.assert_array_equal(np.broadcast_to(went[0][1], target), expected)
    else:
        assert target != flat


def test_a_reshape_of_a_batch_that_is_not_known_goes_behind_it():
    node = node_of("m = Reshape(x,s)", "float[n,4,6] x, int64[3] s")
    node.outputs[0].shape = ir.Shape(["k", 2, 2, 6])
    ((_, at),) = passed(node, 0, numbers((1, 4, 1)), 0)
    assert at.tolist() == [[[[0], [1]], [[2], [3]]]]
    node.outputs[0].shape = ir.Shape([2, "k", 6])
    assert passed(node, 0, numbers((1, 4, 1)), 0) == UNKNOWN
    assert [at.shape for _, at in passed(node, 0, numbers((1, 1, 1)), 0)] == [(1, 1, 1)]
