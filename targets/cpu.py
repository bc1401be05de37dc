"""ONNX Runtime on CPU: QDQ models that its graph optimizer turns into integer kernels.

What is legal and what is fast was measured; docs/targets.md holds the figures and the commands.
"""

from __future__ import annotations

import platform
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from ..compiler import notes
from ..compiler.capability import Capability, Legality
from ..compiler.contract import Cost, Emitted, Pass, Placement, Runner, Target
from ..compiler.formats import Format
from ..compiler.graph import weight_of
from ..compiler.model import newest_opset, save
from ..compiler.precision import Precision
from ..compiler.recipe import Recipe
from ..compiler.session import open_runner, open_session, session_options

Isa = Literal["auto", "vnni", "avx2", "arm64"]

NARROW = ("int8", "int4", "int2")
MEASURED = "onnxruntime 1.32"

CARRIES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad"}
)
WEIGHT_ONLY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")

FLOAT_ONLY = {
    "LayerNormalization": "no integer LayerNormalization; its float kernel is exact and quick",
    "Gelu": "no integer Gelu",
    "Erf": "no integer Erf",
    "Softmax": "float: an 8-bit softmax loses small probabilities, and costs as much",
    "MatMul": "two activations: converting them costs more than the integer kernel saves",
}

WEIGHTED_KERNELS = frozenset(
    {"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
)

NOT_FUSED = "onnxruntime did not fuse it"

# Tells onnxruntime's own tools that the model is quantized, so that they do not warn about it.
METADATA = {"onnx.infer": "onnxruntime.quant", "onnx.quant.pre_process": "onnxruntime.quant"}


class Cpu(Target):
    """ONNX Runtime CPU.

    Attributes:
        isa: Class of the CPU that will run the model; `auto` is this machine's.
    """

    isa: Isa = "auto"

    @property
    def capability(self) -> Capability:
        """Integer forms that onnxruntime fuses on this class of CPU."""
        isa = host_isa() if self.isa == "auto" else self.isa
        return _capability(isa)

    def recipe(self, precision: Precision) -> Recipe:
        """Return the default passes.

        Order: exact rewrites first, since ranges must be taken of the folded graph; then the two
        decisions; then the edits that obey them; last what only this runtime wants.
        """
        from ..passes.assign_bits import AssignBits
        from ..passes.calibrate import Calibrate
        from ..passes.fold_batchnorm import FoldBatchnorm
        from ..passes.fuse_matmul_bias import FuseMatmulBias
        from ..passes.insert_qdq import InsertQdq
        from ..passes.lower_embeddings import LowerEmbeddings
        from ..passes.pad_codes import PadCodes
        from ..passes.round_weights import RoundWeights
        from ..passes.split_skip_layernorm import SplitSkipLayernorm
        from ..passes.tidy import Tidy
        from ..passes.unpack_weights import UnpackWeights
        from ..passes.widen_floats import WidenFloats

        bits = precision.weights
        narrow = "int2" if bits == 2 else "int4" if bits <= 4 else ""
        mode = precision.ranges if precision.activations else "float"
        calibrate = (Calibrate(weights=bits),) if precision.calibrated else ()
        return Recipe(
            (
                WidenFloats(),
                Tidy(opset=self.capability.packed.get(narrow, 0)),
                FoldBatchnorm(),
                *calibrate,
                AssignBits(weights=bits, activations=mode),
                RoundWeights(),
                InsertQdq(),
                PadCodes(),
                LowerEmbeddings(),
                UnpackWeights(),
                FuseMatmulBias(),
                SplitSkipLayernorm(),
            )
        )

    def reference(self) -> tuple[Pass, ...]:
        """Return the pass that runs bfloat16 models, for which onnxruntime has no CPU kernels."""
        from ..passes.widen_floats import WidenFloats

        return (WidenFloats(),)

    def cost(self, node: ir.Node, format: Format | None) -> Cost:
        """Return the stored bytes of the node's weight and scales; no seconds are measured."""
        weight = weight_of(node)
        if weight is None or weight.value.const_value is None:
            return Cost(0)
        tensor = weight.value.const_value
        if format is None:
            return Cost(tensor.size * 4)
        channels = tensor.shape.numpy()[weight.axis]
        return Cost((tensor.size * format.onnx_type.bitwidth + 7) // 8 + 4 * int(channels))

    def unsupported(self, model: ir.Model) -> list[str]:
        """Return operators of domains that onnxruntime does not bring."""
        known = {
            "",
            "ai.onnx",
            "com.microsoft",
            "ai.onnx.ml",
            "com.microsoft.nchwc",
            "ai.onnx.preview.training",
        }
        return [
            f"node {node.name!r}: onnxruntime has no operator {node.domain}::{node.op_type}"
            for node in model.graph.all_nodes()
            if node.domain not in known and (node.domain, node.op_type, "") not in model.functions
        ]

    def emit(self, model: ir.Model, folder: Path) -> Emitted:
        """Write model.onnx."""
        model = model.clone()
        _forget_shapes(model)
        model.producer_name = "fourfold"
        model.metadata_props.update(METADATA)
        entry = folder / "model.onnx"
        save(model, entry)
        files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
        return Emitted(entry, files)

    def placement(self, model: ir.Model, entry: Path) -> Placement:
        """Read the graph that onnxruntime would run."""
        import onnx

        optimized = entry.parent / f".{entry.name}-optimized.onnx"
        options = session_options()
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", optimized.name + ".data"
        )
        try:
            open_session(entry, options)
            graph = onnx.load(optimized, load_external_data=False).graph
        finally:
            optimized.unlink(missing_ok=True)
            optimized.with_name(optimized.name + ".data").unlink(missing_ok=True)
        kernels = Counter(node.op_type for node in graph.node)
        return Placement(dict(sorted(kernels.items())), _stayed_float(graph, model))

    def open(self, entry: Path, threads: int = 1) -> Runner:
        """Load a model file; see the contract."""
        return open_runner(entry, threads)


def _forget_shapes(model: ir.Model) -> None:
    """Drop declared types between nodes, which onnxruntime infers: a tenth of a small file."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type, value.shape = None, None


def _stayed_float(graph: Any, model: ir.Model) -> dict[str, str]:
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
    while (maker := codes.producer()) is not None and maker.inputs[0] is not None:
        codes = maker.inputs[0]
    planned = [notes.read(value) for value in (codes, node.outputs[0])]
    why = next((note.why for note in planned if note.mode == "float"), None)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if why is None and (source is None or source.op_type != "DequantizeLinear"):
        why = planned[0].why
    return why or NOT_FUSED


def _capability(isa: str) -> Capability:
    """Return the legality table of one class of CPU.

    Without VNNI, u8 x s8 kernels add pairs of products in 16 bits and saturate: weights keep to 7
    bits.
    """
    activation = "int8" if isa == "arm64" else "uint8"
    acts = (activation,)
    both = ("per_tensor", "per_axis")
    since = MEASURED

    def weighted(
        op: str, acts: tuple[str, ...], *, dynamic: bool = False, output: bool = False
    ) -> Legality:
        return Legality(op, NARROW, acts, both, dynamic, output, since)

    return Capability(
        name=f"onnxruntime cpu ({isa})",
        opsets=(21, newest_opset()),
        rows=(
            weighted("Conv", acts),
            weighted("Gemm", acts, output=True),
            weighted("MatMul", acts, dynamic=activation == "uint8", output=True),
            *(
                Legality(op, (), acts, since=since)
                for op in ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu")
            ),
            *(Legality(op, (), acts, since=since) for op in ("AveragePool", "GlobalAveragePool")),
        ),
        widened=tuple(Legality(op, NARROW, ("float",), both, since=since) for op in WEIGHT_ONLY),
        carries=CARRIES,
        fuses=frozenset({"Relu", "Clip"}),
        activation=activation,
        weight_bits=7 if isa == "avx2" else 8,
        float_only=FLOAT_ONLY,
        packed={"int4": 21, "int2": 25},
    )


def host_isa() -> Literal["vnni", "avx2", "arm64"]:
    """Return the class of this machine's CPU; where flags cannot be read, one without VNNI."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "avx2"
    return "vnni" if "avx512_vnni" in flags or "avx_vnni" in flags else "avx2"
