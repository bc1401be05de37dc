"""ONNX Runtime on CPU: QDQ models that its graph optimizer turns into integer kernels.

What is legal and what is fast was measured; docs/targets.md holds the figures and the commands.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...compiler.cache import home
from ...compiler.capability import Capability
from ...compiler.choices import Choice
from ...compiler.contract import Emitted, Pass, Placement, Progress, Runner, Target, silent
from ...compiler.cost_table import CostTable
from ...compiler.costs import Cost, Workload, stored_bytes
from ...compiler.errors import DataError, UnsupportedError
from ...compiler.model import save
from ...compiler.precision import Precision
from ...compiler.recipe import Recipe
from ...compiler.session import open_runner, open_session, session_options
from .capability import Isa, capability_of, host_isa
from .placement import stayed_float
from .profile import GRID, form_of, forms_of, measure

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
        return capability_of(self._class)

    def recipe(self, precision: Precision) -> Recipe:
        """Return the default passes; see `recipe.py`."""
        from .recipe import recipe_of

        return recipe_of(precision, self.capability)

    def reference(self) -> tuple[Pass, ...]:
        """Return the pass that runs bfloat16 models, for which onnxruntime has no CPU kernels."""
        from ...passes.widen_floats import WidenFloats

        return (WidenFloats(),)

    def cost(self, workload: Workload, choice: Choice) -> Cost:
        """Return stored bytes and seconds.

        Seconds come from this machine's own table (see `profile`) where it was made and `isa` is
        this machine's class; else from the table that is shipped, for the class that it is for.

        Raises:
            DataError: This machine's table is damaged.
        """
        size = stored_bytes(workload, choice)
        form = form_of(choice, workload.op_type)
        isa = self._class
        own = _kept() if isa == _here().isa else None
        found = own.seconds(workload, form) if own is not None else None
        if found is not None:
            return Cost(size, found[0], "measured" if found[1] else "nearest")
        found = _shipped().seconds(workload, form) if isa == _shipped().isa else None
        return Cost(size) if found is None else Cost(size, found[0], "shipped")

    def profile(
        self, workloads: Sequence[Workload], folder: Path, progress: Progress = silent
    ) -> CostTable:
        """Measure what this machine's own table lacks of the workloads; see the contract.

        A workload with a float weight above 192 MiB is left out; its cost is taken from the
        nearest.

        Raises:
            UnsupportedError: `isa` is not this machine's, or a workload cannot be timed.
            DataError: The table is damaged or cannot be written.
        """
        if self._class != _here().isa:
            raise UnsupportedError(
                f"{self} cannot be timed on this machine, whose class is {_here().isa}; "
                "profile on the machine that will run the model"
            )
        have = _kept() or _here()
        wanted = [
            workload
            for workload in dict.fromkeys(workloads or GRID)
            if any((workload, f) not in have.entries for f in forms_of(workload, self.capability))
        ]
        if not wanted:
            return have
        found = measure(wanted, self.capability, folder, progress)
        # Another process may have written meanwhile.
        table = (_kept() or _here()).with_entries(found)
        table.write(_path())
        return table

    @property
    def _class(self) -> str:
        """The class of CPU that the options name or that this machine has."""
        return _here().isa if self.isa == "auto" else self.isa

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
        floats = stayed_float(graph, model)
        return Placement(dict(sorted(kernels.items())), floats, _bytes(graph))

    def open(self, entry: Path, threads: int = 1) -> Runner:
        """Load a model file; see the contract."""
        return open_runner(entry, threads)


def _bytes(graph: Any) -> int:
    """Return the bytes of all initializers of an onnx.GraphProto."""
    return sum(
        -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
        for tensor in graph.initializer
    )


def _forget_shapes(model: ir.Model) -> None:
    """Drop declared types between nodes, which onnxruntime infers: a tenth of a small file."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type, value.shape = None, None


@cache
def _here() -> CostTable:
    """Return a table of this machine without entries."""
    import onnxruntime

    runtime = f"onnxruntime {onnxruntime.__version__}"
    return CostTable(_cpu_model(), runtime, host_isa())


def _cpu_model() -> str:
    """Return the CPU's model name, or what the platform tells of it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    name = found.group(1) if found else platform.processor() or platform.machine()
    return name.strip()[:100] or "unknown"


@cache
def _file_name() -> str:
    """Return the name of this machine's own table."""
    here = _here()
    model = re.sub(r"[^a-z0-9]+", "-", here.machine.lower()).strip("-")
    return f"{model}-{here.isa}-{here.runtime.replace(' ', '-')}.json"


def _path() -> Path:
    """Return where this machine's own table lies, or would."""
    return home() / "costs" / _file_name()


# Path -> (what the file system says of the file, what was read from it).
_READ: dict[Path, tuple[tuple[int, ...], CostTable]] = {}


def _kept() -> CostTable | None:
    """Return this machine's own table, or None; a file that did not change is read once.

    Raises:
        DataError: It is damaged, or of another runtime or class of CPU than its name says.
    """
    path = _path()
    try:
        found = os.stat(path)  # noqa: PTH116 - this is called for every cost, and Path is slower
    except OSError:
        return None
    stamp = (found.st_mtime_ns, found.st_ino, found.st_size)
    if path not in _READ or _READ[path][0] != stamp:
        table, here = CostTable.read(path), _here()
        if (table.runtime, table.isa) != (here.runtime, here.isa):
            raise DataError(
                f"{path} holds costs of {table.runtime} on {table.isa}, expected {here.runtime} "
                f"on {here.isa}; delete the file and run `fourfold profile`"
            )
        _READ[path] = stamp, table
    return _READ[path][1]


@cache
def _shipped() -> CostTable:
    """Return the table that comes with this target."""
    return CostTable.read(Path(__file__).with_name("costs.json"))
