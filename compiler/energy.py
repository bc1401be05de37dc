"""How strongly each part of a weight is met by its input: mean x^2 over calibration samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .choices import Open
from .contract import Context
from .graph import Weight, is_standard, operand_of
from .observe import Observer

Doubles = npt.NDArray[np.float64]


def energies(model: ir.Model, weights: Sequence[Open], context: Context) -> dict[str, Doubles]:
    """Return weight -> sum of x^2 in a shape that broadcasts against the weight.

    x is the operand that the weight meets: one figure an input channel, or for an embedding how
    often each row is looked up. What the bodies of If and Loop read does not count.
    """
    assert context.feeds is not None
    sums: dict[str, Doubles] = {}
    readers = [r for one in weights for r in one.readers if r.node.graph is model.graph]
    names = list(dict.fromkeys(str(operand_of(reader).name) for reader in readers))
    by_name: dict[str, list[Weight]] = {name: [] for name in names}
    for reader in readers:
        by_name[str(operand_of(reader).name)].append(reader)
    observer = Observer(model, context.folder, context.memory)
    for name, array in observer.batches(names, context.feeds, context.progress):
        for reader in by_name[name]:
            weight = str(reader.value.name)
            sums[weight] = sums.get(weight, np.zeros(1)) + _energy(reader, array)
    return sums


def _energy(reader: Weight, array: npt.NDArray[Any]) -> Doubles:
    """Return the sum of squares along the weight's inner axis, shaped for the weight."""
    assert reader.value.const_value is not None
    shape = reader.value.const_value.shape.numpy()
    node = reader.node
    if is_standard(node, "Gather"):
        rows = np.bincount(array.astype(np.int64).ravel() % shape[0], minlength=shape[0])
        counts: Doubles = rows.astype(np.float64)
        return counts.reshape(-1, *[1] * (len(shape) - 1))
    square: Doubles = np.square(array.astype(np.float64))
    if is_standard(node, "Conv", "ConvTranspose"):
        channels = square.sum(axis=(0, *range(2, square.ndim)))
        return _conv_energy(node, channels, shape)
    gemm = is_standard(node, "Gemm")
    square = square.T if gemm and _flag(node, "transA") else square
    inner: Doubles = square.sum(axis=tuple(range(square.ndim - 1)))
    return inner.reshape(1, -1) if gemm and _flag(node, "transB") else inner.reshape(-1, 1)


def _flag(node: ir.Node, name: str) -> int:
    """Return an integer attribute that is 0 where it is missing."""
    return node.attributes.get_int(name, 0)


def _conv_energy(node: ir.Node, channels: Doubles, shape: Sequence[int]) -> Doubles:
    """Return a convolution's input energy for [out, in / group, ...] or [in, out / group, ...]."""
    ones = [1] * (len(shape) - 2)
    if node.op_type == "ConvTranspose":
        return channels.reshape(-1, 1, *ones)
    groups = node.attributes.get_int("group", 1)
    wide = np.repeat(channels.reshape(groups, -1), shape[0] // groups, axis=0)
    return wide.reshape(shape[0], -1, *ones)
