"""Pads codes instead of dequantizing, padding and quantizing again.

before:  QuantizeLinear(Pad(DequantizeLinear(xq, s, z), pads, 0.0), s, z)
becomes: Pad(xq, pads, z)

Exact: the code of zero is the zero point. onnxruntime hands codes through Reshape, Transpose,
MaxPool and Slice by itself, but not through Pad.
"""

from __future__ import annotations

import onnx_ir as ir

from ..compiler import constants
from ..compiler.contract import Context, Pass
from ..compiler.graph import is_constant, is_standard, sole_consumer


class PadCodes(Pass):
    """Let a zero padding between two quantizers of one scale work on codes."""

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite every such Pad; return how many."""
        changed = 0
        for node in list(model.graph):
            if not is_standard(node, "Pad"):
                continue
            quantize = _quantizer_behind(node)
            if quantize is not None:
                _rewrite(node, quantize, model.graph)
                changed += 1
        return changed


def _quantizer_behind(pad: ir.Node) -> ir.Node | None:
    """Return the QuantizeLinear behind a zero Pad of codes with the same scale, or None."""
    if pad.attributes.get_string("mode", "constant") != "constant" or not _pads_zero(pad):
        return None
    before = pad.inputs[0].producer() if pad.inputs[0] is not None else None
    behind = sole_consumer(pad.outputs[0])
    if before is None or behind is None:
        return None
    if not is_standard(before, "DequantizeLinear") or not is_standard(behind, "QuantizeLinear"):
        return None
    same = len(before.inputs) == 3 and tuple(before.inputs[1:]) == tuple(behind.inputs[1:])
    return behind if same else None


def _pads_zero(pad: ir.Node) -> bool:
    """Whether the padding value is zero, which it is by default."""
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    if value is None:
        return True
    tensor = value.const_value if is_constant(value) else None
    return tensor is not None and float(tensor.numpy().item()) == 0.0


def _rewrite(pad: ir.Node, quantize: ir.Node, graph: ir.Graph) -> None:
    """Pad the codes with their zero point, and let the readers of the new codes read that."""
    assert pad.inputs[0] is not None
    source = pad.inputs[0].producer()
    assert source is not None
    codes, zero_point, output = source.inputs[0], source.inputs[2], quantize.outputs[0]
    assert codes is not None
    padded = constants.make_node(
        "Pad",
        [codes, pad.inputs[1], zero_point, *pad.inputs[3:]],
        str(pad.name),
        output,
        output=f"{output.name}_padded",
    )
    graph.insert_before(quantize, padded)
    name = output.name
    ir.convenience.replace_all_uses_with(output, padded.outputs[0], replace_graph_outputs=True)
    graph.remove([quantize, pad], safe=True)
    output.name = f"{name}_floats"
    padded.outputs[0].name = name
    if not tuple(source.outputs[0].uses()) and not source.outputs[0].is_graph_output():
        graph.remove(source, safe=True)
