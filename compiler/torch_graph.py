"""Runs a float model with torch operations, so that gradients of its weights can be had.

Importing this module imports torch (the extra `torch`), so the package does so only where
gradients are asked for. Numbers are those of onnxruntime up to rounding.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from .errors import DataError, ModelError, UnsupportedError, did_you_mean
from .graph import FLOATS, is_standard
from .torch_ops import DTYPES, OPERATORS, Operator
from .weights import opened

OLDEST_OPSET = 13  # before it, Softmax and others meant something else
ADVICE = "choose another signal, one without gradients"
# Whose outputs are all covered; others have theirs for training and indices.
MANY_OUTPUTS = ("Split", "DynamicQuantizeLinear")
CODES = tuple(ir.DataType[name] for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2"))
# Codes of less than a byte -> what holds one each; torch has no such types.
NARROW = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8}


@dataclass(frozen=True)
class _Step:
    """One node: what it runs, and which values nobody reads afterwards."""

    node: ir.Node
    run: Operator
    attributes: dict[str, Any]
    last: tuple[ir.Value, ...]


class TorchGraph:
    """A model as a differentiable function of its feeds and of some of its weights.

    Args:
        model: A float model of opset 13 or newer; it is left as it is, and must stay so.
        weights: Names of initializers of floats, or of codes of at most 8 bits.

    Attributes:
        weights: Weight name -> float32 leaf tensor that requires a gradient; codes are whole
            numbers in it. float32 data is shared with the model: put another tensor into the
            dict instead of writing to one.

    Raises:
        ModelError: A name in `weights` is no such initializer.
        UnsupportedError: A node has an operator, attribute or output that is not covered.
    """

    def __init__(self, model: ir.Model, weights: Sequence[str]) -> None:
        graph = model.graph
        _refuse_opset(model)
        self._inputs = {str(value.name): value for value in graph.inputs}
        self._outputs = tuple(graph.outputs)
        self._steps = _steps(graph)
        self.weights = {name: _leaf(graph, name) for name in weights}
        read = {value for node in graph for value in node.inputs} | set(self._outputs)
        self._named = {name: graph.initializers[name] for name in self.weights}
        self._constants = {
            value: _constant(value)
            for value in graph.initializers.values()
            if value in read and value.name not in self.weights
        }

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        """Return the graph's outputs by name, differentiable where they depend on the weights.

        Args:
            feeds: Input name -> array of the input's element type; nothing is cast.

        Raises:
            DataError: An input is missing, or a name is not that of an input.
            UnsupportedError: torch cannot run a node on these feeds.
        """
        values = self._fed(feeds)
        for step in self._steps:
            results = _results(step, [None if v is None else values[v] for v in step.node.inputs])
            values.update(zip(step.node.outputs, results, strict=False))
            for value in step.last:
                values.pop(value, None)
        return {str(value.name): values[value] for value in self._outputs}

    def _fed(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[ir.Value, Tensor]:
        """Return constants, weights and feeds by value; a weight in its own element type."""
        values = dict(self._constants)
        for name, value in self._named.items():
            assert value.const_value is not None  # what _leaf has read
            floats = value.const_value.dtype in FLOATS  # codes are whole numbers in float32
            leaf = self.weights[name]
            values[value] = leaf.to(DTYPES[value.const_value.dtype]) if floats else leaf
        for name, array in feeds.items():
            if name not in self._inputs:
                raise DataError(f"no input is called {name!r}{did_you_mean(name, self._inputs)}")
            values[self._inputs[name]] = _tensor(array)
        missing = [name for name, value in self._inputs.items() if value not in values]
        if missing:
            raise DataError(f"no feeds for the inputs {missing}; give an array for each")
        return values


def _refuse_opset(model: ir.Model) -> None:
    """Raise unless the operators mean what the table says."""
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", OLDEST_OPSET))
    if opset < OLDEST_OPSET:
        raise UnsupportedError(
            f"the model has opset {opset}: expected {OLDEST_OPSET} or newer for gradients; "
            "convert it first"
        )


def _steps(graph: ir.Graph) -> tuple[_Step, ...]:
    """Return the nodes in order, each with what becomes free after it."""
    kept = set(graph.outputs)
    last: dict[ir.Value, ir.Node] = {}
    for node in graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value not in kept and value.producer() is not None:
                last[value] = node
    free: dict[ir.Node, list[ir.Value]] = {}
    for value, node in last.items():
        free.setdefault(node, []).append(value)
    return tuple(_step(node, tuple(free.get(node, ()))) for node in graph)


def _step(node: ir.Node, last: tuple[ir.Value, ...]) -> _Step:
    """Return one node ready to run, or raise where it asks for what is not covered."""
    if not is_standard(node, *OPERATORS):
        raise _refusal(node, "gradients do not cover this operator")
    run = OPERATORS[node.op_type]
    signature = inspect.signature(run, eval_str=True)
    try:
        attributes = {name: _attribute(a) for name, a in node.attributes.items()}
        attributes |= _code_type(node)
        signature.bind(*node.inputs, **attributes)
    except TypeError as error:
        raise _refusal(node, f"gradients do not cover its form: {error}") from None
    _refuse_attributes(node, attributes, _hints(signature))
    for value in node.outputs[1:] if node.op_type not in MANY_OUTPUTS else ():
        if value.uses() or value.is_graph_output():
            raise _refusal(
                node, f"gradients cover its first output only, and {value.name!r} is read"
            )
    return _Step(node, run, attributes, last)


def _code_type(node: ir.Node) -> dict[str, int]:
    """Return a quantizer's element type as the attribute, where its zero point tells it."""
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 3 or node.inputs[2] is None:
        return {}
    zero = node.inputs[2]
    dtype = zero.const_value.dtype if zero.const_value is not None else zero.dtype
    if dtype is None:
        raise _refusal(node, f"the element type of its zero point {zero.name!r} is not known")
    return {"output_dtype": dtype.value}


def _hints(signature: inspect.Signature) -> dict[str, Any]:
    """Return the annotations of an operator's parameters, those in a TypedDict included."""
    hints: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            (window,) = get_args(parameter.annotation)
            hints |= get_type_hints(window)
        else:
            hints[name] = parameter.annotation
    return hints


def _refuse_attributes(
    node: ir.Node, attributes: Mapping[str, Any], hints: Mapping[str, Any]
) -> None:
    """Raise where an attribute is unknown, or its value is outside the Literal that it has."""
    for name, value in attributes.items():
        if name not in hints:
            raise _refusal(node, f"gradients do not cover the attribute {name!r}")
        if get_origin(hints[name]) is Literal and value not in get_args(hints[name]):
            covered = ", ".join(map(repr, get_args(hints[name])))
            raise _refusal(node, f"{name} is {value!r}: expected {covered} for gradients")


def _attribute(attribute: ir.Attr) -> Any:
    """Return an attribute's value as the operators take it: a tensor becomes torch's."""
    if attribute.type == ir.AttributeType.TENSOR:
        return _tensor(attribute.as_tensor().numpy())
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _results(step: _Step, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Run one node.

    Raises:
        UnsupportedError: torch refuses, or the number of outputs is another than the node's.
    """
    try:
        result = step.run(*inputs, **step.attributes)
    except Exception as error:  # torch and Python raise half a dozen unrelated types
        lines = str(error).splitlines() or [type(error).__name__]
        raise _refusal(step.node, f"torch cannot run it: {lines[0]}") from error
    results = result if isinstance(result, tuple) else (result,)
    if len(results) < len(step.node.outputs) and step.node.op_type == "Split":
        wanted = f"it makes {len(results)} parts: expected {len(step.node.outputs)}"
        raise _refusal(step.node, wanted)
    return results


def _refusal(node: ir.Node, reason: str) -> UnsupportedError:
    """Return the error for a node that cannot be run."""
    name = node.name or (node.outputs[0].name if node.outputs else "")
    operator = f"{node.domain}::{node.op_type}".removeprefix("::")
    return UnsupportedError(f"node {name!r} ({operator}): {reason}; {ADVICE}")


def _leaf(graph: ir.Graph, name: str) -> Tensor:
    """Return a weight as a float32 tensor that requires a gradient.

    Raises:
        ModelError: There is no such initializer, or it holds neither floats nor codes.
    """
    value = graph.initializers.get(name)
    if value is None:
        raise ModelError(
            f"no initializer is called {name!r}{did_you_mean(name, graph.initializers)}"
        )
    if value.const_value is None or value.const_value.dtype not in (*FLOATS, *CODES):
        raise ModelError(
            f"initializer {name!r} is {value.dtype}: expected floats or codes for a gradient"
        )
    return _constant(value).float().requires_grad_()


def _constant(value: ir.Value) -> Tensor:
    """Return an initializer's data, shared with the model; data on disk stays mapped.

    Raises:
        ModelError: It has no data.
        UnsupportedError: torch has no such element type.
    """
    with opened(value) as array:
        try:
            return _tensor(array)
        except TypeError as error:
            raise UnsupportedError(f"initializer {value.name!r}: {error}; {ADVICE}") from None


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return an array as a tensor on the same memory, where torch can read it in place."""
    array = np.asarray(array, order="C")
    with warnings.catch_warnings():
        # torch warns that it could write to what is read-only; nothing here writes.
        warnings.simplefilter("ignore", UserWarning)
        if array.dtype.name == "bfloat16":  # numpy has no type of its own for it
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        if array.dtype.name in NARROW:
            return torch.from_numpy(array.astype(NARROW[array.dtype.name]))
        return torch.from_numpy(array)
