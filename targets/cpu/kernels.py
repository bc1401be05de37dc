"""What onnxruntime runs for one weighted node in one form, ready to be timed by itself.

The node goes through the passes that this compiler emits it with, and through onnxruntime's own
optimizer; what that leaves is cut free of the conversions at the model's borders and repeated:

Conv, int8: QuantizeLinear, Transpose, QLinearConv, Transpose, DequantizeLinear
becomes:    QuantizeLinear, Transpose, then n times QLinearConv, each with weights of its own
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...compiler import notes
from ...compiler.capability import Capability
from ...compiler.contract import Context, Pass
from ...compiler.cost_table import FLOAT
from ...compiler.costs import Workload, output_channels
from ...compiler.formats import Format, PerAxis
from ...compiler.graph import weight_of
from ...compiler.session import open_session, session_options

INT8 = "int8"

# Conversions between layouts, and between floats and codes. Inside a model they stand at the
# borders of a region, not at each of its nodes.
BEFORE = frozenset({"QuantizeLinear", "Transpose", "ReorderInput"})
BEHIND = frozenset({"DequantizeLinear", "Transpose", "ReorderOutput"})

WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Kernels:
    """The nodes that onnxruntime runs for one weighted node.

    Attributes:
        model: An onnx.ModelProto as onnxruntime optimized it.
        shared: Its nodes that convert the input, as onnx.NodeProto.
        repeated: Its nodes that do the work.
        output: The value that they make.
        one_table: Whether copies read the same weights: a big table is looked up in, not read.
    """

    model: Any
    shared: tuple[Any, ...]
    repeated: tuple[Any, ...]
    output: str
    one_table: bool = False

    @property
    def names(self) -> dict[str, int]:
        """Kernel (op type) -> how many nodes of it do the work."""
        return dict(Counter(node.op_type for node in self.repeated))

    @property
    def bytes(self) -> int:
        """Bytes of weights, scales and biases that one more copy takes."""
        once = {tensor.name for tensor in self._once}
        tensors = self.model.graph.initializer
        return sum(len(tensor.raw_data) for tensor in tensors if tensor.name not in once)

    @property
    def _once(self) -> list[Any]:
        """The initializers that all copies share, as onnx.TensorProto."""
        read = {name for node in self.shared for name in node.input}
        tensors = self.model.graph.initializer
        return [tensor for tensor in tensors if self.one_table or tensor.name in read]

    def copies(self, count: int) -> Any:
        """Return an onnx.ModelProto of so many copies that read one input."""
        import onnx

        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        graph = copy.graph
        for part in (graph.node, graph.initializer, graph.output, graph.value_info):
            del part[:]
        graph.node.extend(self.shared)
        graph.initializer.extend(self._once)
        common = {value.name for value in (*graph.input, *graph.initializer)}
        common |= {name for node in self.shared for name in node.output}
        for index in range(count):
            for tensor in self.model.graph.initializer:
                if tensor.name not in common:
                    graph.initializer.append(tensor)
                    graph.initializer[-1].name = f"{tensor.name}.{index}"
            for node in self.repeated:
                graph.node.append(node)
                _rename(graph.node[-1], common, index)
            graph.output.append(onnx.ValueInfoProto(name=f"{self.output}.{index}"))
        return copy


def _rename(node: Any, common: set[str], index: int) -> None:
    """Give every value of one copy a name of its own, but for what the copies share."""
    node.name = f"{node.name}.{index}"
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            if name and name not in common:
                names[i] = f"{name}.{index}"


def kernels_of(workload: Workload, form: str, capability: Capability, folder: Path) -> Kernels:
    """Return what onnxruntime runs for a workload in one form.

    Args:
        workload: The shape of the node's work.
        form: `float`, `int8`, or a block-wise format of the weight such as
            `int4 per_block(0,32)`.
        capability: This target's.
        folder: An existing folder; nothing stays in it.

    Raises:
        UnsupportedError: onnxruntime refuses the node.
    """
    import onnx

    path, optimized = folder / "node.onnx", folder / "optimized.onnx"
    model = _lowered(workload, form, capability, folder)
    options = session_options()
    options.optimized_model_filepath = str(optimized)
    try:
        path.write_bytes(ir.to_proto(model).SerializeToString())
        open_session(path, options)
        return _cut(onnx.load(optimized), workload.op_type == "Gather")
    finally:
        path.unlink(missing_ok=True)
        optimized.unlink(missing_ok=True)


def _cut(model: Any, one_table: bool) -> Kernels:
    """Part the conversions at the borders from the nodes that do the work."""
    graph = model.graph
    given = {value.name for value in graph.input}
    shared: list[Any] = []
    rest: list[Any] = []
    for node in graph.node:  # in the order in which they run
        before = node.op_type in BEFORE and node.input[0] in given
        (shared if before else rest).append(node)
        given |= set(node.output) if before else set()
    output = graph.output[0].name
    while rest[-1].op_type in BEHIND and rest[-1].output[0] == output and len(rest) > 1:
        output = rest.pop().input[0]
    return Kernels(model, tuple(shared), tuple(rest), output, one_table)


def _lowered(workload: Workload, form: str, capability: Capability, folder: Path) -> ir.Model:
    """Return a model of the one node, planned in that form, after the passes that obey a plan."""
    from ...passes.insert_qdq import InsertQdq
    from ...passes.lower_embeddings import LowerEmbeddings
    from ...passes.quantize_biases import QuantizeBiases
    from ...passes.round_weights import RoundWeights
    from ...passes.unpack_weights import UnpackWeights

    opset = max(capability.opsets[0], capability.packed.get(form.partition(" ")[0], 0))
    model = _float_model(workload, opset)
    if form == FLOAT:
        return model
    _plan(model.graph[0], form, capability)
    context = Context(capability, folder)
    steps: tuple[Pass, ...] = (
        InsertQdq(),
        RoundWeights(clip="minmax"),
        QuantizeBiases(),
        LowerEmbeddings(),
        UnpackWeights(),
    )
    for step in steps:
        step.run(model, context)
    return model


def _plan(node: ir.Node, form: str, capability: Capability) -> None:
    """Write the notes of a node in an integer form."""
    weight = weight_of(node)
    assert weight is not None
    whole = form == INT8
    format = Format(INT8, PerAxis(weight.axis), capability.weight_bits) if whole else None
    format = format or Format.parse(form)
    activation = capability.activation if whole and node.op_type != "Gather" else FLOAT
    notes.write(weight.value, format=format, mode="static", activation=activation)
    if activation == FLOAT:
        return
    row = capability.legal(node.op_type, format, activation)
    writes_float = row is not None and row.float_output
    for value in (node.inputs[0], *(() if writes_float else node.outputs)):
        assert value is not None
        notes.write(value, format=Format(activation), mode="static", low=-4.0, high=4.0)


def _float_model(workload: Workload, opset: int) -> ir.Model:
    """Return a model `y = op(x, w)` in float32 with seeded weights, and a bias where it may be."""
    lookup = workload.op_type == "Gather"
    element = ir.DataType.INT64 if lookup else ir.DataType.FLOAT
    x = ir.val("x", element, workload.input)
    operands = [x, _initializer("w", workload.weight)]
    if lookup:
        operands.reverse()
    if workload.op_type in WITH_BIAS:
        operands.append(_initializer("b", (output_channels(workload),)))
    node = ir.node(workload.op_type, operands, attributes=dict(workload.attributes), name="node")
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape([None] * _output_rank(workload))
    graph = ir.Graph(
        [x],
        [y],
        nodes=[node],
        initializers=[v for v in operands if v is not x],
        opset_imports={"": opset},
        name="node",
    )
    return ir.Model(graph, ir_version=10 if opset < 25 else 13)


def _output_rank(workload: Workload) -> int:
    """Return the rank of the output."""
    if workload.op_type == "Gather":
        return len(workload.input) + len(workload.weight) - 1
    if workload.op_type == "MatMul":
        one = len(workload.input) == 1
        return len(workload.weight) - 1 if one else max(len(workload.input), len(workload.weight))
    return len(workload.input)


def _initializer(name: str, shape: tuple[int, ...]) -> ir.Value:
    """Return a float32 initializer of seeded noise; time does not depend on the numbers."""
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    value.const_value = ir.tensor(array, name=name)
    return value


def feed_of(workload: Workload) -> npt.NDArray[Any]:
    """Return a seeded input: float32, or int64 rows of the table for a Gather."""
    draw = np.random.default_rng(1)
    if workload.op_type == "Gather":
        return draw.integers(0, workload.weight[0], workload.input)
    return draw.standard_normal(workload.input, np.float32)
