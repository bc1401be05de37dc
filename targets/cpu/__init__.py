"""ONNX Runtime on CPU: QDQ models that its graph optimizer turns into integer kernels.

What is legal and what is fast was measured; docs/targets.md holds the figures and the commands.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

from ...compiler.capability import Capability
from ...compiler.choices import Choice
from ...compiler.contract import Emitted, Pass, Placement, Runner, Target
from ...compiler.costs import Cost, Workload, stored_bytes
from ...compiler.model import save
from ...compiler.precision import Precision
from ...compiler.recipe import Recipe
from ...compiler.session import open_runner, open_session, session_options
from .capability import Isa, capability_of, host_isa
from .placement import stayed_float

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
        return capability_of(isa)

    def recipe(self, precision: Precision) -> Recipe:
        """Return the default passes.

        Order: exact rewrites first, since ranges must be taken of the folded graph; then the two
        decisions; then the edits that obey them; last what only this runtime wants.
        """
        from ...passes.assign_bits import AssignBits
        from ...passes.calibrate import Calibrate
        from ...passes.fold_batchnorm import FoldBatchnorm
        from ...passes.fuse_matmul_bias import FuseMatmulBias
        from ...passes.insert_qdq import InsertQdq
        from ...passes.lower_embeddings import LowerEmbeddings
        from ...passes.pad_codes import PadCodes
        from ...passes.round_weights import RoundWeights
        from ...passes.split_skip_layernorm import SplitSkipLayernorm
        from ...passes.tidy import Tidy
        from ...passes.unpack_weights import UnpackWeights
        from ...passes.widen_floats import WidenFloats

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
        from ...passes.widen_floats import WidenFloats

        return (WidenFloats(),)

    def cost(self, workload: Workload, choice: Choice) -> Cost:
        """Return stored bytes; seconds come from a measured table."""
        return Cost(stored_bytes(workload, choice))

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
        return Placement(dict(sorted(kernels.items())), stayed_float(graph, model))

    def open(self, entry: Path, threads: int = 1) -> Runner:
        """Load a model file; see the contract."""
        return open_runner(entry, threads)


def _forget_shapes(model: ir.Model) -> None:
    """Drop declared types between nodes, which onnxruntime infers: a tenth of a small file."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type, value.shape = None, None
