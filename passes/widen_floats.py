"""Computes float16 and bfloat16 graphs in float32; callers notice nothing.

before:  x: f16 -> MatMul(x, w: f16) -> y: f16
becomes: x: f16 -> Cast(to f32) -> MatMul(., w: f32) -> y_float32: f32 -> Cast(to f16) -> y: f16

Inputs and outputs keep their types, with a Cast at each border; all between becomes float32:
initializers (exactly, since float32 holds every number of both), constants, the types of values,
and the attributes that name a type. Intermediate results are no longer rounded to the narrow type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from ..compiler.contract import Context, Pass
from ..compiler.graph import is_standard, values
from ..compiler.weights import opened

NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

# Integer attributes that hold an element type.
TYPE_ATTRIBUTES = (
    "to",
    "dtype",
    "output_datatype",
    "output_dtype",
    "stash_type",
    "softmax_precision",
    "precision",
)

# Domains whose ops compute in float32 wherever they compute in a narrow type.
KNOWN_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})

# Tensors above this many bytes are widened each time they are read, and never kept.
LARGE = 1 << 20


class WidenFloats(Pass):
    """Computes float16 and bfloat16 graphs in float32, with a Cast at each border."""

    def requires(self, model: ir.Model, context: Context) -> Iterable[str]:
        """Yield the narrow nodes and inputs that have no float32 form."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if _is_narrow(value) and not isinstance(value.type, ir.TensorType):
                yield f"{value.name!r} is a {value.type}, which no Cast widens"
        for node in model.graph.all_nodes():
            known = node.domain in KNOWN_DOMAINS and node.op_type != "BitCast"
            if not known and any(map(_is_narrow, (*node.inputs, *node.outputs))):
                kind = f"{node.domain}.{node.op_type}".lstrip(".")
                yield f"node {node.name!r} ({kind}) has no known float32 form"

    def run(self, model: ir.Model, context: Context) -> int:
        """Return how many initializers, attributes, types and borders changed."""
        borders = _Borders(model)
        changed = sum(_widen_attributes(node) for node in borders.inner_nodes())
        for value in values(model):
            if _is_narrow(value) and id(value) not in borders.values:
                _widen_value(value)
                changed += 1
        return changed + borders.cast(model)


class _Borders:
    """The values of the interface that stay narrow, and the Casts that are there already."""

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        constants = [v for v in graph.outputs if v.is_initializer()]
        produced = [v for v in graph.outputs if v.producer() is not None]
        finished = [v for v in produced if _is_narrow(v) and _is_output_cast(v)]
        self.graph = graph
        self.sources = _once(v for v in (*graph.inputs, *constants) if _is_narrow(v))
        self.casts = {id(v.producer()) for v in finished}
        self.values = {id(v) for v in (*self.sources, *finished)}
        # The types are noted now: the values themselves are about to be widened.
        self.results = [
            (v, v.dtype)
            for v in _once(produced)
            if v.dtype is not None and _is_narrow(v) and id(v) not in self.values
        ]

    def inner_nodes(self) -> Iterator[ir.Node]:
        """Yield all nodes but the Casts to a narrow output."""
        for node in self.graph.all_nodes():
            if id(node) not in self.casts:
                yield node

    def cast(self, model: ir.Model) -> int:
        """Insert the Casts that are missing; return their number."""
        taken = {str(value.name) for value in values(model)}
        taken |= {str(node.name) for node in model.graph.all_nodes()}
        inserted = sum(_cast_source(self.graph, value, taken) for value in self.sources)
        for value, dtype in self.results:
            _cast_result(self.graph, value, dtype, taken)
        return inserted + len(self.results)


def _is_narrow(value: ir.Value | None) -> bool:
    """Whether the value is known to be float16 or bfloat16, or a sequence of such."""
    return value is not None and value.dtype in NARROW


def _is_output_cast(value: ir.Value) -> bool:
    """Whether a Cast makes this output, and nothing else reads it."""
    node = value.producer()
    return node is not None and is_standard(node, "Cast") and not tuple(value.uses())


def _once(found: Iterable[ir.Value]) -> list[ir.Value]:
    """Return each value once, in order."""
    return list({id(value): value for value in found}.values())


def _widen_attributes(node: ir.Node) -> int:
    """Widen a node's constant tensors and the types that its attributes name."""
    if node.domain not in KNOWN_DOMAINS or node.op_type == "BitCast":
        return 0
    changed = 0
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in NARROW:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))
            changed += 1
        elif _names_narrow(attribute):
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            changed += 1
    return changed


def _names_narrow(attribute: ir.Attr) -> bool:
    """Whether the attribute is a number that stands for float16 or bfloat16."""
    return (
        attribute.name in TYPE_ATTRIBUTES
        and attribute.type == ir.AttributeType.INT
        and attribute.as_int() in NARROW
    )


def _widen_value(value: ir.Value) -> None:
    """Give a value type float32, and its data too where it is a constant."""
    if value.const_value is not None:
        value.const_value = _widened(value.const_value)
    value.type = _widened_type(value.type)


def _widened_type(narrow: ir.TypeProtocol | None) -> ir.TypeProtocol:
    """Return the type with float32 in it; a new one, since values may share a type."""
    match narrow:
        case ir.SequenceType() | ir.OptionalType():
            return type(narrow)(_widened_type(narrow.elem_type))
        case ir.SparseTensorType():
            return ir.SparseTensorType(ir.DataType.FLOAT)
    return ir.TensorType(ir.DataType.FLOAT)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return the tensor in float32; a large one is read and widened whenever it is asked for."""

    def widen() -> ir.TensorProtocol:
        with opened(tensor) as array:
            return ir.Tensor(array.astype(np.float32), name=tensor.name)

    if tensor.nbytes <= LARGE:
        return widen()
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(widen, ir.DataType.FLOAT, shape, cache=False, name=tensor.name)


def _cast_source(graph: ir.Graph, value: ir.Value, taken: set[str]) -> bool:
    """Let readers of a narrow input read a Cast of it; Casts among them stay as they are."""
    uses = [use for use in value.uses() if not is_standard(use.node, "Cast")]
    if not uses:
        return False
    wide = _value_like(value, ir.DataType.FLOAT, _new_name(f"{value.name}_float32", taken))
    node = _cast(value, wide, ir.DataType.FLOAT, taken)
    graph.insert_before(graph[0], node)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)
    return True


def _cast_result(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, taken: set[str]) -> None:
    """Make a narrow output from a widened value by a Cast; the output keeps its name."""
    narrow = _value_like(value, dtype, value.name)
    value.name = _new_name(f"{value.name}_float32", taken)
    graph.append(_cast(value, narrow, dtype, taken))
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = narrow


def _cast(source: ir.Value, result: ir.Value, dtype: ir.DataType, taken: set[str]) -> ir.Node:
    """Return a Cast between two values."""
    name = _new_name(f"cast_{result.name}", taken)
    return ir.node("Cast", [source], {"to": int(dtype)}, outputs=[result], name=name)


def _value_like(value: ir.Value, dtype: ir.DataType, name: str | None) -> ir.Value:
    """Return a new value of the same shape."""
    shape = None if value.shape is None else value.shape.copy()
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)


def _new_name(wanted: str, taken: set[str]) -> str:
    """Return the name, with a number where it is taken, and take it."""
    name, number = wanted, 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name
