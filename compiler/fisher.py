"""Says how much a change of each weight element costs the model's outputs: a diagonal curvature.

A change dW of a weight costs about sum(F * dW**2), where F is the diagonal of the Gauss-Newton
matrix, which for outputs read as probabilities is the Fisher matrix. It is estimated from
gradients along random directions of the outputs: directions with mean zero, independent between
elements (or positions), so that the square of a whole batch's gradient is unbiased.

For probabilities p the textbook's direction is the gradient of log p at a label drawn from p. Its
second moment is right, but a confident p draws its likeliest label nearly always, and most of the
moment lies in the others: a few draws see almost nothing of it. Random signs have the same moment
and show every class in every draw; see `_scores`.

Source: Fisher information; Martens, New insights and perspectives on the natural gradient method
(arXiv 1412.1193); Hutchinson, A stochastic estimator of the trace of the influence matrix (1990).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .contract import Progress, silent
from .errors import DataError, RecipeError, UnsupportedError
from .feeds import Feeds
from .graph import is_standard
from .inputs import Batch

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from .torch_graph import TorchGraph

Form = Literal["logits", "Softmax", "LogSoftmax"]


def fisher(
    model: ir.Model,
    names: Sequence[str],
    feeds: Feeds,
    loss: Literal["mse", "kl"],
    seed: int = 0,
    probes: int = 4,
    progress: Progress = silent,
) -> dict[str, npt.NDArray[np.float32]]:
    """Return F for each weight, float32 in the weight's shape.

    The loss of changed outputs y' is, by `loss`:
        mse: the sum of (y' - y)^2 over all float outputs and samples, over that of y^2;
        kl: the mean over positions of KL(softmax(y) || softmax(y')), for the first float output
            along its last axis. What a Softmax or LogSoftmax made is probabilities as it is.

    The same seed and feeds in the same batches give the same numbers.

    Args:
        model: A float model; left as it is.
        names: Names of float initializers.
        feeds: Samples to average over; labels are not read.
        loss: The loss.
        seed: Seed of the random directions, 0 or more.
        probes: Directions a batch; each is one pass backward.
        progress: Shows the batches.

    Raises:
        ModelError: A name is that of no float initializer.
        RecipeError: `probes` is below 1.
        DataError: The outputs are not finite, zero throughout, or not float.
        UnsupportedError: torch is not installed, a node has no gradient here, or a gradient is
            not finite.
    """
    if probes < 1:
        raise RecipeError(f"probes is {probes}: expected 1 or more")
    graph = _graph(model, names)
    import torch

    draw = torch.Generator().manual_seed(seed)
    sums = {name: torch.zeros_like(weight) for name, weight in graph.weights.items()}
    divisor = 0.0
    for batch in progress(feeds, "fisher", len(feeds)):
        # A function of its own, so that one batch's activations are gone before the next one's.
        divisor += _add_batch(sums, _source(model, graph, batch, loss, draw), graph, probes)
    if divisor == 0:
        raise DataError(
            "the outputs are zero on all samples, so no loss is relative to them; use kl"
        )
    return {name: _finite(name, total / (divisor * probes)) for name, total in sums.items()}


def _graph(model: ir.Model, names: Sequence[str]) -> TorchGraph:
    """Return the model with gradients for these weights."""
    try:
        from .torch_graph import TorchGraph
    except ImportError:
        raise UnsupportedError(
            "gradients need torch: pip install 'fourfold[torch]', or choose another signal"
        ) from None
    return TorchGraph(model, names)


@dataclass(frozen=True)
class _Source:
    """What one batch gives: outputs, a source of directions for each, and a share of the scale.

    Attributes:
        outputs: Float outputs, as torch has computed them.
        directions: Draws anew at each call: a tensor in the shape of each output.
        divisor: What the squared gradients of all batches are divided by, this batch's share.
    """

    outputs: list[Tensor]
    directions: Callable[[], list[Tensor]] = field(repr=False)
    divisor: float


def _source(
    model: ir.Model, graph: TorchGraph, batch: Batch, loss: str, draw: Generator
) -> _Source:
    """Run one batch and say how directions for its outputs are drawn."""
    import torch

    with torch.enable_grad():
        outputs = {name: y for name, y in graph(batch).items() if y.is_floating_point()}
    if not outputs:
        raise DataError("no float outputs to take gradients of; give a model that has one")
    return _noise(outputs, draw) if loss == "mse" else _scores(model, outputs, draw)


def _noise(outputs: dict[str, Tensor], draw: Generator) -> _Source:
    """Return random signs for every element; the divisor is the outputs' power."""
    power = 0.0
    for name, y in outputs.items():
        _refuse_non_finite(name, y)
        power += float(y.detach().double().square().sum())

    ys = list(outputs.values())
    return _Source(ys, lambda: [_signs(y, draw).to(y.dtype) for y in ys], power)


def _signs(like: Tensor, draw: Generator) -> Tensor:
    """Return 1 or -1 for every element, by chance, as int8."""
    import torch

    return 2 * torch.randint(0, 2, like.shape, generator=draw, dtype=torch.int8) - 1


def _scores(model: ir.Model, outputs: dict[str, Tensor], draw: Generator) -> _Source:
    """Return directions with the Fisher matrix as second moment; the divisor is 2 a position.

    A small change d of the output diverges by half of d^T M d, with M the Fisher matrix.
    Let s be independent signs, so that E[s s^T] = I, and u = sqrt(p) s, so E[u u^T] = diag(p).

    Logits: M = diag(p) - p p^T. The direction is u - p sum(u) = A s, with
    A = diag(sqrt p) - p sqrt(p)^T, and its moment is A A^T = diag(p) - 2 p p^T + p sum(p) p^T,
    which is M because sum(p) = 1.

    Probabilities: the divergence is half of sum(d^2 / p), so M = diag(1 / p), which u / p has.
    Where p is zero the direction is zero: nothing would pass back through the softmax there.

    Log-probabilities: the divergence is half of sum(p d^2), because the changed probabilities sum
    up to 1 too, so M = diag(p), which u has.

    Passed back through the softmax by diag(p) - p p^T, or through its logarithm by I - p 1^T, the
    latter two become u - p sum(u) as well.
    """
    import torch

    name, y = next(iter(outputs.items()))
    if not y.dim():
        raise DataError(f"output {name!r} is one number: kl expects classes along its last axis")
    form = _form(model, name, y.dim())
    fixed = y.detach().float()
    if form == "logits":
        p = torch.softmax(fixed, -1)
    else:
        p = fixed if form == "Softmax" else fixed.exp()
    _refuse_non_finite(name, p)

    def scores() -> list[Tensor]:
        score = _signs(p, draw) * p.sqrt()
        if form == "logits":
            score -= p * score.sum(-1, keepdim=True)
        elif form == "Softmax":
            score = torch.where(p > 0, score / p, 0)
        return [score.to(y.dtype)]

    return _Source([y], scores, 2.0 * (p.numel() // p.shape[-1]))


def _form(model: ir.Model, name: str, rank: int) -> Form:
    """Return what makes an output: a softmax along the last axis, its logarithm, or neither."""
    node = next(v for v in model.graph.outputs if v.name == name).producer()
    if node is None or not is_standard(node, "Softmax", "LogSoftmax"):
        return "logits"
    if node.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return "logits"
    return "Softmax" if node.op_type == "Softmax" else "LogSoftmax"


def _add_batch(sums: dict[str, Tensor], source: _Source, graph: TorchGraph, probes: int) -> float:
    """Add a batch's squared gradients to each weight's sum; return its share of the divisor."""
    import torch

    weights = list(graph.weights.values())
    for _ in range(probes):
        drawn = zip(source.outputs, source.directions(), strict=True)
        reached = [(y, direction) for y, direction in drawn if y.requires_grad]
        if not reached:
            break
        gradients = torch.autograd.grad(
            [y for y, _ in reached],
            weights,
            [direction for _, direction in reached],
            retain_graph=True,  # the next probe goes the same way back
            allow_unused=True,
        )
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)
    return source.divisor


def _refuse_non_finite(name: str, y: Tensor) -> None:
    """Raise where an output holds NaN or infinity."""
    if not bool(y.isfinite().all()):
        raise DataError(f"output {name!r} is not finite on the feeds; give other feeds")


def _finite(name: str, diagonal: Tensor) -> npt.NDArray[np.float32]:
    """Return one weight's diagonal as an array, or raise where it is not finite."""
    if not bool(diagonal.isfinite().all()):
        raise UnsupportedError(
            f"weight {name!r} has gradients that are not finite; choose another signal"
        )
    array: npt.NDArray[np.float32] = diagonal.numpy()
    return array
