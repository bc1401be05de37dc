import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

import fourfold
from fourfold.compiler.precision import Precision
from fourfold.targets.cpu import METADATA, Cpu, host_isa

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
VNNI = Cpu(isa="vnni")


def source_of(text):
    model = ir.from_onnx_text(f"{HEADER} {text}")
    ShapeInferencePass()(model)
    return model


def codes(model, name):
    """Return a rounded weight's codes as int32."""
    return model.graph.initializers[f"{name}_quantized"].const_value.numpy().astype(np.int32)


def test_a_cpu_without_vnni_gets_weights_of_seven_bits(zoo, compiled):
    greatest = {}
    for isa in ("vnni", "avx2"):
        model = compiled(Cpu(isa=isa), zoo["convnet"]()).model
        weights = ("w1_folded", "w2", "w3")
        greatest[isa] = {int(np.abs(codes(model, name)).max()) for name in weights}
    assert greatest == {"vnni": {127}, "avx2": {63}}


def test_arm_gets_signed_activations(zoo, compiled):
    for isa, dtype in (("vnni", ir.DataType.UINT8), ("arm64", ir.DataType.INT8)):
        model = compiled(Cpu(isa=isa), zoo["mlp"]()).model
        quantizers = [n for n in model.graph if n.op_type == "QuantizeLinear"]
        assert quantizers
        assert {n.inputs[2].dtype for n in quantizers} == {dtype}


def test_arm_takes_no_range_at_run_time(zoo, compiled):
    for ranges in ("auto", "static"):
        model = compiled(Cpu(isa="arm64"), zoo["attention"](), ranges=ranges).model
        assert "DynamicQuantizeLinear" not in [n.op_type for n in model.graph]
    model = compiled(VNNI, zoo["attention"](), ranges="dynamic").model
    assert "DynamicQuantizeLinear" in [n.op_type for n in model.graph]


def test_auto_is_the_class_of_this_machine():
    assert host_isa() in ("vnni", "avx2", "arm64")
    assert Cpu().capability == Cpu(isa=host_isa()).capability


@pytest.mark.parametrize(
    ("machine", "flags", "isa"),
    [
        ("arm64", None, "arm64"),
        ("aarch64", None, "arm64"),
        ("x86_64", "flags : fpu avx2 avx512_vnni", "vnni"),
        ("AMD64", "flags : fpu avx2 avx_vnni", "vnni"),
        ("x86_64", "flags : fpu avx2", "avx2"),
        ("x86_64", None, "avx2"),
    ],
)
def test_the_class_is_read_from_the_flags(machine, flags, isa, monkeypatch):
    def read_text(path):
        if flags is None:
            raise OSError("no such file")
        return flags

    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    assert host_isa() == isa


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w2a8"])
def test_the_convnet_runs_in_integers_from_end_to_end(precision, zoo, compiled):
    placement = compiled(VNNI, zoo["convnet"](), precision).placement
    assert placement.stayed_float == {}
    kernels = placement.kernels
    assert (kernels["QLinearConv"], kernels["QLinearAdd"], kernels["QGemm"]) == (2, 1, 1)
    assert not kernels.keys() & {"Conv", "FusedConv", "Gemm", "Add", "Relu", "BatchNormalization"}
    assert kernels["QuantizeLinear"] == 1
    assert kernels.get("DequantizeLinear", 0) == 0


def test_the_attention_block_keeps_in_float_what_must_be(zoo, compiled):
    variant = compiled(VNNI, zoo["attention"]())
    kernels = variant.placement.kernels
    assert variant.placement.stayed_float == {}
    assert kernels["MatMulIntegerToFloat"] + kernels.get("DynamicQuantizeMatMul", 0) == 6
    assert kernels["LayerNormalization"] == 2
    assert kernels["Softmax"] == 1
    # Each of these would take longer than the two kernels that it replaces; biases are in MatMul.
    assert not kernels.keys() & {"SkipLayerNormalization", "BiasGelu", "Add"}


def test_numbers_stay_close_to_the_source(zoo, compiled, sqnr, tmp_path):
    target = Cpu()  # this machine's: another class of CPU may saturate here
    for name, make in zoo.items():
        source = make()
        variant = compiled(target, source)
        batch = next(iter(variant.context.feeds))
        expected = target.open(written(source, tmp_path / f"{name}.onnx"))(batch)["y"]
        assert sqnr(expected, variant.runner(batch)["y"]) > 25, name


def written(model, path):
    onnx.save(ir.to_proto(model), path)
    return path


def test_what_stayed_float_is_told_with_the_reason(zoo, compiled):
    placement = compiled(VNNI, zoo["convnet"](), keep=("conv2",)).placement
    assert placement.stayed_float == {"conv2": "Conv: kept as asked"}
    assert placement.kernels["QLinearConv"] == 1
    placement = compiled(VNNI, zoo["convnet"](), keep=("conv.", "head")).placement
    assert set(placement.stayed_float) == {"conv1", "conv2", "head"}
    assert set(placement.stayed_float.values()) == {"Conv: kept as asked", "Gemm: kept as asked"}


def test_a_kept_node_whose_output_is_quantized_is_told_too(zoo, compiled):
    placement = compiled(VNNI, zoo["mlp"](), keep=("fc1",)).placement
    assert placement.stayed_float == {"fc1": "Gemm: kept as asked"}


def test_weights_only_leaves_every_kernel_float_and_says_so(zoo, compiled):
    why = "weights only: activations stay float"
    nodes = {
        "convnet": ("conv1", "conv2", "head"),
        "mlp": ("fc1", "fc2", "fc3"),
        "attention": ("query", "key", "value", "out", "up", "down"),
    }
    for name, weighted in nodes.items():
        placement = compiled(VNNI, zoo[name](), "w4").placement
        assert placement.stayed_float == dict.fromkeys(weighted, why)
        assert not [kernel for kernel in placement.kernels if kernel.startswith("Q")]


def test_a_kernel_that_the_runtime_did_not_fuse_is_told(compiled):
    """A matrix of biases has no integer form: the weight is dequantized on every call."""
    source = source_of("""g (float[2,4] x) => (float[2,2] y)
    <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2,2] b = {1, 2, 3, 4}> {
        [odd] y = Gemm (x, w, b)
    }""")
    placement = compiled(VNNI, source).placement
    assert placement.stayed_float == {"odd": "onnxruntime did not fuse it"}
    assert "QGemm" not in placement.kernels


def test_the_file_says_that_it_is_quantized(zoo, compiled):
    proto = onnx.load(compiled(VNNI, zoo["mlp"]()).emitted.entry)
    told = {p.key: p.value for p in proto.metadata_props}
    assert METADATA.keys() == {"onnx.infer", "onnx.quant.pre_process"}
    assert METADATA.items() <= told.items()
    assert proto.producer_name == "fourfold"


def test_names_and_types_of_inputs_and_outputs_stay(zoo, compiled):
    for make in zoo.values():
        source = ir.to_proto(make()).graph
        emitted = onnx.load(compiled(VNNI, make()).emitted.entry).graph
        assert emitted.input == source.input
        assert emitted.output == source.output


@pytest.mark.parametrize("precision", ["w8a8", "w4"])
def test_the_same_model_gives_the_same_bytes(precision, zoo, compiled):
    for name, make in zoo.items():
        first, second = (compiled(VNNI, make(), precision).emitted.entry for _ in range(2))
        assert first.read_bytes() == second.read_bytes(), name


SCRIPT = """
import sys, hashlib, json
from pathlib import Path
from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import input_specs, made_up
from fourfold.compiler.model import load
from fourfold.compiler.precision import Precision
from fourfold.compiler.runner import run
from fourfold.targets.cpu import Cpu
target, folder = Cpu(isa="vnni"), Path(sys.argv[2])
model = load(Path(sys.argv[1]))
(folder / "out").mkdir(parents=True)
context = Context(target.capability, folder, made_up(input_specs(model), 0, 16))
after, _ = run(target.recipe(Precision()), model, context)
entry = target.emit(after, folder / "out").entry
print(json.dumps(hashlib.sha256(entry.read_bytes()).hexdigest()))
"""


def test_another_process_writes_the_same_bytes(zoo, tmp_path):
    path = written(zoo["convnet"](), tmp_path / "convnet.onnx")
    digests = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(json.loads(done.stdout))
    assert len(digests) == 1


def test_emit_leaves_nothing_beside_its_folder(zoo, compiled):
    entry = compiled(VNNI, zoo["mlp"]()).emitted.entry
    assert [p.name for p in entry.parent.iterdir()] == ["model.onnx"]
    assert not [p.name for p in entry.parent.parent.iterdir() if "optimized" in p.name]


@pytest.mark.parametrize(("precision", "bits"), [("w8a8", 8), ("w4a8", 4), ("w2a8", 2)])
def test_the_file_holds_the_bits_that_were_asked_for(precision, bits, zoo, compiled):
    variant = compiled(VNNI, zoo["mlp"](), precision)
    weights = [
        v.const_value
        for name, v in variant.model.graph.initializers.items()
        if name.endswith("_quantized") and name.startswith("w")
    ]
    assert len(weights) == 3
    assert {w.dtype.bitwidth for w in weights} == {bits}
    emitted = {t.name: t for t in onnx.load(variant.emitted.entry).graph.initializer}
    stored = sum(len(emitted[w.name].raw_data) for w in weights)
    assert stored == sum(-(-w.size * bits // 8) for w in weights)


def test_each_width_of_weights_has_the_same_kernels(zoo, compiled):
    for make in zoo.values():
        found = [
            compiled(VNNI, make(), precision).placement for precision in ("w8a8", "w4a8", "w2a8")
        ]
        assert found[0] == found[1] == found[2]


def test_a_function_of_the_model_is_no_unsupported_operator():
    model = source_of("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    text = """<ir_version: 10, opset_import: ["" : 21, "mine" : 1]>
    g (float[2] x) => (float[2] y) { y = mine.twice (x) }
    <domain: "mine", opset_import: ["" : 21]> twice (a) => (b) { b = Add (a, a) }"""
    assert VNNI.unsupported(model) == VNNI.unsupported(ir.from_onnx_text(text)) == []


def test_narrow_weights_raise_the_opset_to_one_that_stores_them(zoo):
    tidy = {p: str(VNNI.recipe(Precision.parse(p)).passes[1]) for p in ("w8a8", "w4a8", "w2a8")}
    assert tidy == {"w8a8": "tidy", "w4a8": "tidy{opset=21}", "w2a8": "tidy{opset=25}"}


def test_a_stack_of_matrices_runs_in_integers(tmp_path):
    """Its kernel takes one scale: with a scale a column onnxruntime fails when it runs."""
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n,2,5,16] x) => (float[n,2,5,8] y)'
    draw = np.random.default_rng(0)
    numbers = ", ".join(f"{v:.4f}" for v in draw.normal(size=256))
    model = ir.from_onnx_text(
        f"{text} <float[2,16,8] w = {{{numbers}}}> {{ [one] y = MatMul (x, w) }}"
    )
    feeds = {"x": draw.normal(size=(40, 2, 5, 16)).astype(np.float32)}
    row = fourfold.compile(model, tmp_path / "out", feeds).report.targets[0]
    assert row.kernels["MatMulIntegerToFloat"] == 1
    assert row.accuracy.sqnr_db > 30
