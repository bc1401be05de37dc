from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_ir.passes.common import CheckerPass

from fourfold.compiler.capability import Capability
from fourfold.compiler.contract import Context
from fourfold.passes.widen_floats import LARGE, WidenFloats

CONTEXT = Context(Capability("any", (13, 23), ()), Path())
NUMPY = {
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
BOTH = pytest.mark.parametrize("narrow", NUMPY)


def widened(model):
    """Run the pass as the runner does, twice; return the model and the number of changes."""
    assert list(WidenFloats().requires(model, CONTEXT)) == []
    changed = WidenFloats().run(model, CONTEXT)
    assert WidenFloats().run(model, CONTEXT) == 0
    CheckerPass(full_check=True)(model)
    return model, changed


def made(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def tensor(name, array, narrow):
    return helper.make_tensor(
        name, narrow, array.shape, array.astype(NUMPY[narrow]).tobytes(), raw=True
    )


def mlp(narrow):
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(4, 8)), draw.normal(size=(8, 3))
    model = made(
        [
            helper.make_node("MatMul", ["x", "w1"], ["a"]),
            helper.make_node("Constant", [], ["half"], value=tensor("", np.array(0.5), narrow)),
            helper.make_node("Add", ["a", "half"], ["b"]),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("MatMul", ["c", "w2"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", narrow, ["n", 4])],
        [helper.make_tensor_value_info("y", narrow, ["n", 3])],
        [tensor("w1", first, narrow), tensor("w2", second, narrow)],
    )
    return model, first.astype(NUMPY[narrow]), second.astype(NUMPY[narrow])


def convnet(narrow):
    weight = np.random.default_rng(1).normal(size=(2, 1, 3, 3))
    return made(
        [
            helper.make_node("Conv", ["x", "w"], ["a"]),
            helper.make_node("Cast", ["a"], ["b"], to=narrow),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("GlobalAveragePool", ["c"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", narrow, [1, 1, 5, 5])],
        [helper.make_tensor_value_info("y", narrow, [1, 2, 1, 1])],
        [tensor("w", weight, narrow)],
    )


@BOTH
def test_mlp_gives_the_numbers_of_float32(narrow):
    model, first, second = mlp(narrow)
    model, changed = widened(model)
    assert changed > 0
    assert [(v.name, v.dtype) for v in model.graph.inputs] == [("x", ir.DataType(narrow))]
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("y", ir.DataType(narrow))]
    assert [n.op_type for n in model.graph] == [
        *("Cast", "MatMul", "Constant", "Add", "Relu", "MatMul", "Cast")
    ]
    x = np.random.default_rng(2).normal(size=(5, 4)).astype(NUMPY[narrow])
    wide = [array.astype(np.float32) for array in (x, first, second)]
    expected = (np.maximum(wide[0] @ wide[1] + 0.5, 0) @ wide[2]).astype(NUMPY[narrow])
    # onnxruntime's Python arrays know no bfloat16: the Casts are moved out of the run.
    inner = between_the_casts(model)
    got = inner(wide[0]).astype(NUMPY[narrow])
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=1e-2
    )


def between_the_casts(model):
    """Return a function that runs what lies between the two border Casts."""
    copy = model.clone()
    first, last = copy.graph[0], copy.graph[-1]
    assert first.op_type == last.op_type == "Cast"
    wide = ir.val("x_wide", ir.DataType.FLOAT, first.outputs[0].shape)
    first.outputs[0].replace_all_uses_with(wide)
    copy.graph.inputs[0] = wide
    copy.graph.outputs[0] = last.inputs[0]
    copy.graph.remove([first, last], safe=True)
    session = onnxruntime.InferenceSession(
        ir.to_proto(copy).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x_wide": x})[0]


def test_float16_model_keeps_its_numbers_in_onnxruntime():
    for model in (mlp(TensorProto.FLOAT16)[0], convnet(TensorProto.FLOAT16)):
        shape = [d if isinstance(d, int) else 5 for d in model.graph.inputs[0].shape]
        x = np.random.default_rng(3).normal(size=shape).astype(np.float16)
        before = run(model, x)
        after = run(widened(model)[0], x)
        assert after.dtype == np.float16
        np.testing.assert_allclose(before, after, rtol=2e-2, atol=2e-2)


def run(model, x):
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def test_bfloat16_conv_runs_after_widening():
    model, _ = widened(convnet(TensorProto.BFLOAT16))
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT
    y = between_the_casts(model)(np.ones((1, 1, 5, 5), np.float32))
    weight = np.random.default_rng(1).normal(size=(2, 1, 3, 3)).astype(ml_dtypes.bfloat16)
    sums = weight.astype(np.float32).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(y.reshape(-1), np.maximum(sums, 0), rtol=1e-5, atol=1e-5)


def test_float32_model_is_left_alone():
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[2] x) => (float[2] y) { y = Relu(x) }"""
    )
    assert widened(model)[1] == 0


@BOTH
def test_casts_that_are_borders_already_stay(narrow):
    model = made(
        [
            helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Cast", ["b"], ["y"], to=narrow),
        ],
        [helper.make_tensor_value_info("x", narrow, [2])],
        [helper.make_tensor_value_info("y", narrow, [2])],
    )
    assert widened(model)[1] == 0


@BOTH
def test_attributes_that_name_a_type(narrow):
    model = made(
        [
            helper.make_node("Shape", ["x"], ["s"]),
            helper.make_node(
                "ConstantOfShape", ["s"], ["a"], value=tensor("", np.array([2.0]), narrow)
            ),
            helper.make_node("RandomNormal", [], ["r"], dtype=narrow, shape=[2]),
            helper.make_node("Cast", ["x"], ["c"], to=narrow),
            helper.make_node("CastLike", ["x", "c"], ["d"]),
            helper.make_node("Sum", ["a", "r", "c", "d"], ["e"]),
            helper.make_node("Cast", ["e"], ["y"], to=TensorProto.FLOAT),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    widened(model)
    assert {v.dtype for n in model.graph for v in n.outputs} == {
        ir.DataType.FLOAT,
        ir.DataType.INT64,
    }


@BOTH
def test_output_that_is_read_again_and_an_input_that_is_also_an_output(narrow):
    model = made(
        [
            helper.make_node("Cast", ["x"], ["y"], to=narrow),
            helper.make_node("Neg", ["y"], ["z"]),
            helper.make_node("Neg", ["x"], ["u"]),
        ],
        [helper.make_tensor_value_info("x", narrow, [2])],
        [helper.make_tensor_value_info(name, narrow, [2]) for name in ("y", "z", "u", "x")],
    )
    model, _ = widened(model)
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [
        (name, ir.DataType(narrow)) for name in ("y", "z", "u", "x")
    ]
    negs = [n for n in model.graph if n.op_type == "Neg"]
    assert {n.inputs[0].dtype for n in negs} == {ir.DataType.FLOAT}


@BOTH
def test_subgraphs_are_widened(narrow):
    branch = helper.make_graph(
        [helper.make_node("Add", ["x", "k"], ["o"])],
        "branch",
        [],
        [helper.make_tensor_value_info("o", narrow, [2])],
        [tensor("k", np.ones(2), narrow)],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["p"])],
        "other",
        [],
        [helper.make_tensor_value_info("p", narrow, [2])],
    )
    model = made(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)],
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", narrow, [2]),
        ],
        [helper.make_tensor_value_info("y", narrow, [2])],
    )
    model, _ = widened(model)
    inner = [
        v.dtype for n in model.graph.all_nodes() if n.op_type in ("Add", "Neg") for v in n.inputs
    ]
    assert set(inner) == {ir.DataType.FLOAT}


def test_a_large_weight_is_widened_only_when_read():
    weight = np.ones((LARGE // 2 + 1, 1), np.float16)
    model = made(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, 1])],
        [tensor("w", weight, TensorProto.FLOAT16)],
    )
    wide = widened(model)[0].graph.initializers["w"].const_value
    assert isinstance(wide, ir.LazyTensor)
    assert not wide.cache
    assert wide.numpy().dtype == np.float32
    assert wide.numpy().sum() == len(weight)


def test_an_unknown_narrow_op_is_refused():
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20, "my.chip" : 1]>
        g (float16[2] x) => (float16[2] y) { y = my.chip.Magic(x) }"""
    )
    (line,) = WidenFloats().requires(model, CONTEXT)
    assert "my.chip.Magic" in line
