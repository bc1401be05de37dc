"""Which weighted kernels of the graph that onnxruntime runs stayed float, and why."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ...compiler import notes

WEIGHTED_KERNELS = frozenset(
    {"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
)

NOT_FUSED = "onnxruntime did not fuse it"


def stayed_float(graph: Any, model: ir.Model) -> dict[str, str]:
    """Return the weighted kernels that stayed float, with the plan's reason where it has one."""
    # A weight that is dequantized on every call feeds a float kernel just as a float one does.
    weights = {t.name for t in graph.initializer}
    weights |= {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in weights
    }
    sources = {str(v.name): node for node in model.graph for v in node.outputs}
    sources |= {str(node.name): node for node in model.graph if node.name}
    kept = {}
    for kernel in graph.node:
        if kernel.op_type in WEIGHTED_KERNELS and kernel.input[1] in weights:
            node = _source(kernel.name, sources)
            name = kernel.name or kernel.output[0]
            kept[str(node.name) if node else name] = _why_float(node)
    return kept


def _source(kernel: str, sources: dict[str, ir.Node]) -> ir.Node | None:
    """Return the weighted node that a kernel came from.

    onnxruntime calls its kernels `fused fc1`, `fc2/MatMulAddFusion`, or for blocked layouts after
    the output of the last node in it: `r1_nchwc`.
    """
    name = kernel.removesuffix("_nchwc")
    name = name if name in sources else name.removeprefix("fused ").partition("/")[0]
    node = sources.get(name)
    while node is not None and node.op_type not in WEIGHTED_KERNELS:
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return node


def _why_float(node: ir.Node | None) -> str:
    """Return the plan's reason, or that onnxruntime left an integer form as it was."""
    if node is None or node.inputs[1] is None:
        return NOT_FUSED
    codes = node.inputs[1]
    while (maker := codes.producer()) is not None:
        before = maker.inputs[1 if maker.op_type in ("Gather", "GatherElements") else 0]
        if before is None:
            break
        codes = before
    planned = [notes.read(value) for value in (codes, node.outputs[0])]
    why = next((note.why for note in planned if note.mode == "float"), None)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if why is None and (source is None or source.op_type != "DequantizeLinear"):
        why = planned[0].why
    return why or NOT_FUSED
