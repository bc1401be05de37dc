"""pad-codes: the code of zero is the zero point."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from fourfold.passes.pad_codes import PadCodes

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
BODY = """agraph (float[1,3] x) => (float[1,n] y)
<float s = {0.1}, uint8 z = {7}, float other = {0.2},
 int64[4] pads = {0, 1, 0, 2}, float v = {VALUE}> {
    q = QuantizeLinear (x, s, z)
    d = DequantizeLinear (q, s, z)
    p = Pad <mode = "MODE"> (d, pads, v)
    q2 = QuantizeLinear (p, SCALE, z)
    y = DequantizeLinear (q2, SCALE, z)
}"""


def text(value: str = "0.0", mode: str = "constant", scale: str = "s") -> str:
    return HEADER + BODY.replace("VALUE", value).replace("MODE", mode).replace("SCALE", scale)


def outputs(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {"x": np.array([[-0.5, 0.04, 3.3]], np.float32)})[0]


def test_codes_are_padded_with_the_zero_point(context):
    model = ir.from_onnx_text(text())
    before = outputs(model)
    assert PadCodes().run(model, context) == 1
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "Pad", "DequantizeLinear"]
    assert model.graph.node(1).inputs[2].name == "z"
    np.testing.assert_array_equal(outputs(model), before)
    assert PadCodes().run(model, context) == 0


@pytest.mark.parametrize(
    "source",
    [text(value="1.0"), text(mode="edge"), text(scale="other")],
    ids=["one", "edge", "scale"],
)
def test_what_is_no_zero_padding_of_one_scale_stays(context, source):
    assert PadCodes().run(ir.from_onnx_text(source), context) == 0
