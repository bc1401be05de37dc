"""Which tokens count: padding gets no attention at all, and of the others some get more.

What a layer makes of padding is never read, so it must set neither ranges nor roundings; where
sequences are padded to one length it may be most of the data. Whatever way a model is told of
padding, attention weights are zero there.
Source of the weights: attention concentration of RSQ (arXiv 2503.01820), section 4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .contract import Context
from .feeds import Feeds
from .graph import is_constant, is_standard
from .observe import Observer

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tokens:
    """How much attention each token gets, by attention.

    Attributes:
        received: Name of the attention weights -> for every batch [samples, tokens], the mean over
            heads and queries.
    """

    received: dict[str, list[Floats]]

    @classmethod
    def of(cls, model: ir.Model, names: Sequence[str], feeds: Feeds, context: Context) -> Tokens:
        """Run the feeds and look at attention weights.

        Args:
            model: The float model.
            names: Names of attention weights, as `attentions` yields them.
            feeds: What to run.
            context: Its work folder, memory bound and progress.
        """
        received: dict[str, list[Floats]] = {name: [] for name in names}
        if names:
            observer = Observer(model, context.folder, context.memory)
            for name, array in observer.batches(list(names), feeds, context.progress):
                between = tuple(range(1, array.ndim - 1))
                received[name].append(np.asarray(array.mean(axis=between), np.float32))
        return cls(received)

    def kept(self, batch: int, array: Array) -> Array:
        """Return the elements of a value that do not belong to padding.

        Args:
            batch: Number of the batch.
            array: The value, any shape; one without an axis of tokens is kept whole.
        """
        for every in self.received.values():
            counts = every[batch] > 0
            axis = _axis(array.shape, counts.shape)
            if axis is not None and not counts.all():
                return np.moveaxis(array, axis, 1)[counts]
        return array

    def weights(self, batch: int, name: str, shape: Sequence[int], least: float) -> Floats | None:
        """Return how much each row of a value [samples, tokens, features] counts, [rows].

        Args:
            batch: Number of the batch.
            name: Name of the attention weights, or "" for the first.
            shape: Shape of the value.
            least: Weight of the token with the least attention, if the one with the most has 1;
                1 lets all tokens but padding count alike.

        Returns:
            None where the value has no such axes, or all rows count alike.
        """
        every = self.received.get(name) or next(iter(self.received.values()), None)
        if every is None or len(shape) != 3 or tuple(shape[:2]) != every[batch].shape:
            return None
        got = every[batch]
        if least >= 1 and (got > 0).all():
            return None
        low = np.where(got > 0, got, np.inf).min(axis=1, keepdims=True)
        high = got.max(axis=1, keepdims=True)
        share = (got - low) / np.maximum(high - low, np.finfo(np.float32).tiny)
        weights = np.where(got > 0, least + (1 - least) * share, 0)
        return np.asarray(weights, np.float32).ravel()


def _axis(shape: Sequence[int], counts: Sequence[int]) -> int | None:
    """Return the axis of tokens, 1 or 2; None where there is none or both could be."""
    samples, tokens = counts
    found = [axis for axis in (1, 2) if len(shape) > axis + 1 and shape[axis] == tokens]
    return found[0] if len(found) == 1 and shape[0] == samples else None


def attentions(model: ir.Model) -> list[str]:
    """Return the names of all attention weights: Softmaxes that meet an activation in a MatMul."""
    return [str(node.outputs[0].name) for node in model.graph if _is_attention(node)]


def _is_attention(node: ir.Node) -> bool:
    """Whether the node makes attention weights, along their last axis."""
    output = node.outputs[0]
    rank = len(output.shape) if output.shape is not None else None
    if not is_standard(node, "Softmax") or node.attributes.get_int("axis", -1) not in (
        -1,
        *(() if rank is None else (rank - 1,)),
    ):
        return False
    return any(
        is_standard(use.node, "MatMul") and use.idx == 0 and not is_constant(use.node.inputs[1])
        for use in output.uses()
    )


def attention_of(node: ir.Node, names: Iterable[str]) -> str:
    """Return the attention that a layer belongs to, or "".

    It is the one that the layer feeds as query, key or value, else the last one before it.
    """
    wanted = set(names)
    return _fed(node, wanted) or _behind(node, wanted)


def _fed(node: ir.Node, wanted: set[str]) -> str:
    """Return the attention that a layer feeds, no other layer between them, or ""."""
    for one in _reached(node, ahead=True):
        for value in one.outputs:
            if value.name in wanted:
                return str(value.name)
        # Values meet their attention weights in a MatMul.
        first = one.inputs[0] if is_standard(one, "MatMul") and one is not node else None
        if first is not None and first.name in wanted:
            return str(first.name)
    return ""


def _behind(node: ir.Node, wanted: set[str]) -> str:
    """Return the nearest attention before a layer, or ""."""
    made = (str(v.name) for one in _reached(node, ahead=False) for v in one.outputs)
    return next((name for name in made if name in wanted), "")


def _reached(node: ir.Node, ahead: bool) -> Iterator[ir.Node]:
    """Yield a node and what it reaches, nearest first; ahead not beyond the next layer."""
    seen, line = {node}, deque([node])
    while line:
        one = line.popleft()
        yield one
        if ahead and one is not node and _is_layer(one):
            continue
        near = (
            [use.node for value in one.outputs for use in value.uses()]
            if ahead
            else [v.producer() for v in one.inputs if v is not None]
        )
        for other in near:
            if other is not None and other not in seen:
                seen.add(other)
                line.append(other)


def _is_layer(node: ir.Node) -> bool:
    """Whether the node meets an activation with a weight."""
    meets = is_standard(node, "MatMul", "Gemm", "Conv")
    return meets and any(map(is_constant, node.inputs[:2]))
