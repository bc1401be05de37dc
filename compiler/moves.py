"""How far biases, scales and codes are from where they started, as what gradients move.

Importing this module imports torch. A scale is its start times exp(p), so it stays positive; a
bias is its start plus p times the root mean square of its channel. So one size of step fits all.
A code is the nearest to its start plus p, where p begins inside the code's cell on the side that
the float weight lies on: those near an edge are the first to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from .inputs import Batch
from .torch_codes import dequantize_linear, straight
from .torch_graph import TorchGraph
from .tunables import Tunables

Arrays = dict[str, npt.NDArray[np.generic]]
Tensors = dict[str, Tensor]

LARGEST = 2.0**30  # of a bias in int32 codes
CELL = 0.45  # how far from its code a weight may start; half a step is the edge
LEAST_UNIT = 0.01  # of the layer's root mean square; a dead channel has a unit too


@dataclass(frozen=True)
class Moves:
    """How far each initializer is from its start.

    Attributes:
        start: Name -> float32 data before.
        unit: Bias -> what one is, in a shape that broadcasts.
        moved: Name -> leaf tensor; units of a bias, logarithm of a scale's factor, steps of codes.
        tunables: What may move, and what limits it.
        fixed: Name -> data of what only limits others.
    """

    start: Tensors
    unit: Tensors
    moved: Tensors
    tunables: Tunables
    fixed: Tensors

    @classmethod
    def of(
        cls,
        model: ir.Model,
        teacher: ir.Model,
        graph: TorchGraph,
        tunables: Tunables,
        batch: Batch,
    ) -> Moves:
        """Return moves that change nothing; the batch shows how large the layers' outputs are."""
        start = {name: leaf.detach() for name, leaf in graph.weights.items()}
        limits = {n for fit in tunables.fits for n in (fit.bias, fit.operand, fit.weight)}
        fixed = {
            name: torch.from_numpy(np.array(_data(model, name), np.float32))
            for name in sorted(limits - set(start))
        }
        moved = {name: torch.zeros_like(data) for name, data in start.items()}
        moved |= _cells(model, teacher, tunables)
        for leaf in moved.values():
            leaf.requires_grad_()
        return cls(start, _units(model, tunables, batch), moved, tunables, fixed)

    def of_group(self, group: str) -> list[Tensor]:
        """Return the leaves of a group of `Tunables`."""
        return [self.moved[name] for name in getattr(self.tunables, group)]

    def copy(self) -> Moves:
        """Return these moves, to be kept."""
        kept = {name: leaf.detach().clone() for name, leaf in self.moved.items()}
        return Moves(self.start, self.unit, kept, self.tunables, self.fixed)

    def values(self) -> Tensors:
        """Return each initializer's data, differentiable in the moves."""
        found = {}
        for name, start in self.start.items():
            if name in self.tunables.codes:
                least, most = self.tunables.codes[name].limits
                found[name] = straight(torch.clamp(start + self.moved[name], least, most))
            elif name in self.unit:
                found[name] = start + self.unit[name] * self.moved[name]
            else:
                found[name] = start * torch.exp(self.moved[name])
        self._fit(found)
        return found

    def _fit(self, found: Tensors) -> None:
        """Raise a scale, or limit a bias where no scale may move, so that biases fit int32."""
        for fit in self.tunables.fits:
            bias, operand, weight = (
                found[name].detach() if name in found else self.fixed[name]
                for name in (fit.bias, fit.operand, fit.weight)
            )
            flat = bias.abs().reshape(-1) / LARGEST
            if flat.numel() != bias.shape[-1:].numel() or weight.numel() not in (1, flat.numel()):
                continue  # such a bias stays float
            if fit.weight in found:
                least = flat / operand
                least = least.max() if weight.numel() == 1 else least.reshape(weight.shape)
                found[fit.weight] = torch.maximum(found[fit.weight], least)
            elif fit.operand in found:
                least = (flat / weight.reshape(-1)).max()
                found[fit.operand] = torch.maximum(found[fit.operand], least)
            elif fit.bias in found:
                most = (LARGEST * operand * weight.reshape(-1)).expand_as(flat).view_as(bias)
                found[fit.bias] = torch.clamp(found[fit.bias], -most, most)

    def arrays(self, model: ir.Model) -> Arrays:
        """Return the data of what has moved, as the model stores it."""
        with torch.no_grad():
            found = self.values()
        old = {name: _data(model, name) for name in found}
        new = {name: value.numpy().astype(old[name].dtype) for name, value in found.items()}
        return {name: data for name, data in new.items() if not np.array_equal(data, old[name])}


def _data(model: ir.Model, name: str) -> npt.NDArray[np.generic]:
    """Return an initializer's data."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    found: npt.NDArray[np.generic] = tensor.numpy()
    return found


def _cells(model: ir.Model, teacher: ir.Model, tunables: Tunables) -> Tensors:
    """Return where in the cell of its code each float weight lies, or nearest to."""
    found = {}
    for name, codes in tunables.codes.items():
        weight = teacher.graph.initializers[codes.weight].const_value
        assert weight is not None
        (use,) = model.graph.initializers[name].uses()
        node = use.node
        start = torch.from_numpy(np.array(_data(model, name), np.float32))
        spread = partial(
            dequantize_linear,
            axis=node.attributes.get_int("axis", 1),
            block_size=node.attributes.get_int("block_size", 0),
        )
        scale, *zero = (
            torch.from_numpy(np.array(_data(model, str(value.name)), np.float32))
            for value in node.inputs[1:]
            if value is not None
        )
        floats = torch.from_numpy(np.array(weight.numpy(), np.float32))
        step, origin = spread(torch.ones_like(start), scale), spread(0 * start, scale, *zero)
        place = (floats - origin) / step
        found[name] = (place - start).clamp(-CELL, CELL)
    return found


def _units(model: ir.Model, tunables: Tunables, batch: Batch) -> Tensors:
    """Return the root mean square of the channels that each bias is in, in the bias' shape."""
    if not tunables.biases:
        return {}
    probe = model.clone()  # weights are shared
    made = {str(v.name): v for node in probe.graph for v in node.outputs}
    probe.graph.outputs[:] = [
        made[name] for name in dict.fromkeys(name for name, _ in tunables.biases.values())
    ]
    with torch.no_grad():
        seen = TorchGraph(probe, [])(batch)
    found = {}
    for bias, (name, axis) in tunables.biases.items():
        shape = _data(model, bias).shape
        channels = seen[name].float().movedim(axis, -1).reshape(-1, seen[name].shape[axis])
        whole = channels.square().mean().sqrt()
        each = torch.maximum(channels.square().mean(0).sqrt(), LEAST_UNIT * whole)
        found[bias] = each if shape[-1:] == each.shape else whole
    return found
