"""Rotates a residual stream: multiplies every constant that holds its channels by one matrix.

What is written into a stream x becomes x R; what reads it through a normalization with gain g and
bias b reads weights R^T diag(g) W and adds b W. The stream's values get new names, since they are
other values now; those in front of and behind the stream stay what they are.
Source: S. Ashkboos et al., QuaRot (arXiv 2404.00456), section 4; SliceGPT (arXiv 2401.15024),
section 3, for what normalizations commute with.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import constants
from .graph import is_constant, is_standard, sole_consumer
from .norms import Norm
from .rotations import rotation
from .streams import Stream, Touch
from .weights import opened

ROWS = 4096  # of a constant that are multiplied at once

Doubles = npt.NDArray[np.float64]


def rotate(graph: ir.Graph, stream: Stream, seed: int) -> None:
    """Rotate a stream that has no refusals; tied weights are parted.

    Args:
        graph: The graph that the stream was found in; it has not changed since.
        stream: The stream; not to be used afterwards, but for its nodes and values.
        seed: Seed of the matrix, 0 or more.
    """
    read = rotation(stream.width, seed, stream.keeps_mean)
    written = read - read.mean(axis=0) if stream.centred else read
    for touch in stream.touches:
        if touch.norm is not None and touch.norm.folds and touch.norm.bias is not None:
            _move_bias(graph, touch, touch.norm.bias)
    keys = [(touch.value, *stream.matrix_key(touch)) for touch in stream.touches]
    made: dict[tuple[ir.Value, int, bool, int], ir.Value] = {}
    for touch, key in zip(stream.touches, keys, strict=True):
        if key not in made:
            matrix = written if touch.writes else read
            if touch.norm is not None and touch.norm.folds:
                matrix = touch.norm.gains[:, None] * matrix
            made[key] = _multiplied(graph, touch, matrix)
        touch.node.replace_input_with(touch.index, made[key])
    for norm in stream.norms:
        if norm.folds:
            _drop_gain(graph, norm)
    for value in dict.fromkeys(stream.changed):
        value.name = constants.free(graph, f"{value.name}_rotated")
    _drop_unread(graph, (value for value, *_ in keys))
    _drop_unread(graph, (value for norm in stream.norms for value in (norm.gain, norm.bias)))


def _multiplied(graph: ir.Graph, touch: Touch, matrix: Doubles) -> ir.Value:
    """Add a constant multiplied along the axis of the channels, in its own type."""
    with opened(touch.value) as array:
        rows = np.moveaxis(array, touch.axis, -1)
        flat = rows.reshape(-1, len(matrix))
        turned = np.empty(flat.shape, array.dtype)
        for start in range(0, len(flat), ROWS):
            turned[start : start + ROWS] = flat[start : start + ROWS].astype(np.float64) @ matrix
        turned = np.moveaxis(turned.reshape(rows.shape), -1, touch.axis)
    return constants.add(graph, f"{touch.value.name}_rotated", np.ascontiguousarray(turned))


def _drop_gain(graph: ir.Graph, norm: Norm) -> None:
    """Take the gain and the bias out of a normalization; the layers behind it have them now."""
    last = norm.nodes[-1]
    if is_standard(last, "Mul"):
        normalized = next(value for value in last.inputs if value is not norm.gain)
        assert normalized is not None
        ir.convenience.replace_all_uses_with(norm.output, normalized)
        graph.remove(last, safe=True)
        return
    assert norm.gain is not None
    with opened(norm.gain) as array:
        ones = np.ones_like(array)
    last.replace_input_with(1, constants.add(graph, f"ones_{norm.width}", ones))
    last.resize_inputs(2)


def _move_bias(graph: ir.Graph, touch: Touch, bias: ir.Value) -> None:
    """Add what a layer makes of a normalization's bias to what the layer itself adds."""
    with opened(bias) as array, opened(touch.value) as weight:
        offset = np.tensordot(array.astype(np.float64).ravel(), weight, axes=(0, touch.axis))
    layer = touch.layer
    if layer.op_type == "Gemm":
        _add_in_gemm(graph, layer, offset, touch.value)
        return
    output = layer.outputs[0]
    follower = sole_consumer(output)
    own = _added(follower, output) if follower is not None else None
    if follower is not None and own is not None:
        with opened(own) as array:
            total = (array + offset).astype(array.dtype)
        index = follower.inputs.index(own)
        follower.replace_input_with(index, constants.add(graph, f"{own.name}_moved", total))
        output.name = constants.free(graph, f"{output.name}_unbiased")
        _drop_unread(graph, [own])
    else:
        _add_behind(graph, layer, offset, touch.value)


def _added(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Return the constant that an Add adds to a value, if it is one."""
    if not is_standard(node, "Add"):
        return None
    other = node.inputs[1 - node.inputs.index(value)]
    return other if is_constant(other) else None


def _add_in_gemm(graph: ir.Graph, layer: ir.Node, offset: Doubles, weight: ir.Value) -> None:
    """Add a vector, before alpha, to a Gemm's output by way of its bias."""
    own = layer.inputs[2] if len(layer.inputs) > 2 else None
    total = layer.attributes.get_float("alpha", 1.0) * offset
    if own is not None and not is_constant(own):
        _add_behind(graph, layer, total, weight)
        return
    if own is not None:
        with opened(own) as array:
            total = total + layer.attributes.get_float("beta", 1.0) * array.astype(np.float64)
    layer.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    layer.resize_inputs(3)
    layer.replace_input_with(2, _bias(graph, layer, total, weight))
    _drop_unread(graph, [own])


def _add_behind(graph: ir.Graph, layer: ir.Node, offset: Doubles, weight: ir.Value) -> None:
    """Add a vector to a layer's output, whose name and readers go to the sum."""
    output = layer.outputs[0]
    name = str(output.name)
    total = constants.make_node(
        "Add",
        [output, _bias(graph, layer, offset, weight)],
        f"{layer.name or name}_bias",
        output,
        output=constants.free(graph, f"{name}_biased"),
    )
    graph.insert_after(layer, total)
    ir.convenience.replace_all_uses_with(output, total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    output.name = constants.free(graph, f"{name}_unbiased")
    total.outputs[0].name = name


def _bias(graph: ir.Graph, layer: ir.Node, offset: Doubles, weight: ir.Value) -> ir.Value:
    """Add a bias as an initializer, in the type of its layer's weight."""
    assert weight.dtype is not None
    name = f"{layer.name or layer.outputs[0].name}_bias"
    return constants.add(graph, name, offset.astype(weight.dtype.numpy()))


def _drop_unread(graph: ir.Graph, values: Iterable[ir.Value | None]) -> None:
    """Remove initializers that nobody reads any more."""
    for value in values:
        if value is not None and not (value.uses() or value.is_graph_output()):
            graph.initializers.pop(str(value.name), None)
