"""Inserts QuantizeLinear and DequantizeLinear where the plan says, so that the runtime fuses them.

before:  Conv(x, w, b) -> Relu -> y                      notes: w int8; x, y uint8 static
becomes: Conv(dq(q(x)), w, b) -> Relu -> q -> dq -> readers of y

A static value gets a fixed scale and zero point, a dynamic one a DynamicQuantizeLinear. Readers
that run in float read the float value itself when there is one: a residual must not lose precision
for the sake of a MatMul beside it. Weights may be stored already or only planned; their codes can
then be chosen for what their layers really read. Biases are left to `quantize-biases`.
Source: Krishnamoorthi, arXiv 1806.08342, section 3; placement rules in docs/design.md.
"""

from __future__ import annotations

import onnx_ir as ir

from ..compiler import constants, notes, regions
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_constant, is_standard, values
from ..compiler.quantizers import affine_parameters


class InsertQdq(Pass):
    """Obey the plan for activations."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Insert one quantizer a planned value; return how many were inserted."""
        context.float_model(model)
        graph = model.graph
        planned = [
            value
            for value in values(model)
            if notes.read(value).mode in ("static", "dynamic")
            and not is_constant(value)
            and not _is_quantized(value)
        ]
        homes = {str(value.name): value for value in planned}
        readers = {str(v.name): _integer_readers(v, context) for v in planned}
        for value in planned:
            _insert(graph, value, homes, readers[str(value.name)])
        return len(planned)


def _is_quantized(value: ir.Value) -> bool:
    """Whether a quantizer already stands at the value (or it is one's output)."""
    readers = {use.node.op_type for use in value.uses()}
    producer = value.producer()
    made_by = producer.op_type if producer is not None else ""
    return (
        bool(readers & {"QuantizeLinear", "DynamicQuantizeLinear"})
        or made_by == "DequantizeLinear"
    )


def _integer_readers(value: ir.Value, context: Context) -> list[tuple[ir.Node, int]]:
    """Return (node, input index) of every reader that gets the dequantized value."""
    uses = [(use.node, use.idx) for use in value.uses()]
    producer = value.producer()
    if producer is not None and _leaves_codes(producer, context):
        return uses  # the float value does not exist at run time
    return [(node, index) for node, index in uses if _reads_codes(node, context)]


def _leaves_codes(node: ir.Node, context: Context) -> bool:
    """Whether the node's kernel writes codes: its inputs are codes and it cannot write float."""
    if node.op_type in context.capability.fuses and node.inputs[0] is not None:
        before = node.inputs[0].producer()
        if before is not None and regions.fused_activation(before, context.capability) is node:
            node = before
    rows = context.capability.rows_of(node.op_type)
    carried = node.op_type in context.capability.carries
    writes = carried or (bool(rows) and not all(row.float_output for row in rows))
    return writes and _reads_codes(node, context)


def _reads_codes(node: ir.Node, context: Context) -> bool:
    """Whether every float operand of the node is planned to be in codes."""
    capability = context.capability
    if not capability.knows(node.op_type) or not is_standard(node, node.op_type):
        return False
    if any(_is_widened(value) for value in node.inputs[:2]):
        return False
    weighted = any(_is_stored(value) for value in node.inputs[:2])
    carried = node.op_type in capability.carries
    if (
        not weighted
        and not carried
        and not capability.legal(node.op_type, None, capability.activation)
    ):
        return False
    operands = [v for v in node.inputs[:2] if v is not None and v.dtype == ir.DataType.FLOAT]
    if node.op_type == "Concat":
        operands = [v for v in node.inputs if v is not None]
    if carried:
        operands = operands[:1]
    return bool(operands) and all(map(_planned, operands))


def _is_stored(value: ir.Value | None) -> bool:
    """Whether the value is a weight in codes: stored, or planned to be."""
    if is_constant(value):
        return value is not None and notes.read(value).mode == "static"
    producer = value.producer() if value is not None else None
    return (
        producer is not None
        and is_standard(producer, "DequantizeLinear")
        and is_constant(producer.inputs[0])
    )


def _is_widened(value: ir.Value | None) -> bool:
    """Whether the value is a weight whose kernel was chosen to read float activations."""
    if is_constant(value):
        return value is not None and notes.read(value).activation == "float"
    producer = value.producer() if value is not None else None
    stored = producer is not None and is_standard(producer, "DequantizeLinear")
    codes = producer.inputs[0] if producer is not None and stored else None
    return codes is not None and is_constant(codes) and notes.read(codes).activation == "float"


def _planned(value: ir.Value) -> bool:
    """Whether the value is in codes: by its note, or as the output of a DequantizeLinear."""
    producer = value.producer()
    dequantized = producer is not None and is_standard(producer, "DequantizeLinear")
    return dequantized or notes.read(value).mode in ("static", "dynamic")


def _insert(
    graph: ir.Graph,
    value: ir.Value,
    homes: dict[str, ir.Value],
    readers: list[tuple[ir.Node, int]],
) -> None:
    """Put a quantizer and a DequantizeLinear behind one value."""
    name, producer = str(value.name), value.producer()
    note = notes.read(value)
    is_output = value.is_graph_output() and len(readers) == len(tuple(value.uses()))
    nodes = _dynamic(value) if note.mode == "dynamic" else _static(graph, value, homes)
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    dequantized = nodes[-1].outputs[0]
    for node, index in readers:
        node.replace_input_with(index, dequantized)
    if is_output and producer is not None and note.mode == "static":
        _become_output(graph, value, dequantized, name)


def _become_output(graph: ir.Graph, value: ir.Value, dequantized: ir.Value, name: str) -> None:
    """Let the dequantized value be the graph output under the old name."""
    position = next(i for i, v in enumerate(graph.outputs) if v is value)
    dequantized.type, dequantized.shape = value.type, value.shape
    graph.outputs[position] = dequantized
    value.name = f"{name}_QuantizeLinear_Input"
    dequantized.name = name


def _static(graph: ir.Graph, value: ir.Value, homes: dict[str, ir.Value]) -> list[ir.Node]:
    """Return QuantizeLinear and DequantizeLinear with the scale of the value's range."""
    note = notes.read(value)
    root = note.shares or str(value.name)
    source = notes.read(homes[root]) if root in homes else note
    format = note.format
    assert format is not None
    scale, zero_point = affine_parameters(source.low or 0.0, source.high or 0.0, format)
    scale_value = constants.add(graph, f"{root}_scale", scale)
    zero = constants.add(graph, f"{root}_zero_point", zero_point, format.onnx_type)
    name = str(value.name)
    quantize = constants.make_node(
        "QuantizeLinear",
        [value, scale_value, zero],
        f"{name}_QuantizeLinear",
        value,
        dtype=format.onnx_type,
    )
    dequantize = constants.make_node(
        "DequantizeLinear",
        [quantize.outputs[0], scale_value, zero],
        f"{name}_DequantizeLinear",
        value,
    )
    return [quantize, dequantize]


def _dynamic(value: ir.Value) -> list[ir.Node]:
    """Return DynamicQuantizeLinear and DequantizeLinear."""
    name = str(value.name)
    quantize = ir.node(
        "DynamicQuantizeLinear", [value], num_outputs=3, name=f"{name}_DynamicQuantizeLinear"
    )
    parts = (
        ("_codes", ir.DataType.UINT8),
        ("_scale", ir.DataType.FLOAT),
        ("_zero_point", ir.DataType.UINT8),
    )
    for output, (suffix, dtype) in zip(quantize.outputs, parts, strict=True):
        output.name = f"{name}_dynamic{suffix}"
        output.type, output.shape = ir.TensorType(dtype), ir.Shape(())
    quantize.outputs[0].shape = value.shape.copy() if value.shape is not None else None
    dequantize = constants.make_node(
        "DequantizeLinear", list(quantize.outputs), f"{name}_DequantizeLinear", value
    )
    return [quantize, dequantize]
