"""Reads and writes models; refuses unsound ones at the door, in one line.

A model on disk is read lazily: its graph is parsed, its external data stays on disk until a weight
is looked at through `weights.opened`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes.common import CheckerPass

from . import external
from .errors import DataError, ModelError
from .graph import WEIGHTED, is_constant, is_standard, weight_of
from .weights import opened

OLDEST_OPSET = 11

# protobuf ends at 2 GiB; the rest of the graph and the copies that readers make need room too.
# One file serializes in memory, several times over; external data streams.
EXTERNAL_ABOVE = 200_000_000

# onnx_ir leaves bigger initializers of the main graph out of what it hands to onnx's C++ code.
SMALL = 1000


def load(path: Path, stage: Path | None = None) -> ir.Model:
    """Read a .onnx file and check it; big external data is not read.

    External tensors of at most 1000 bytes, and those in subgraphs and attributes, are brought into
    memory. An unsorted graph is sorted.

    Args:
        path: The model file.
        stage: A folder of ours, given on purpose by a caller who trusts the model: where the data
            files are links out of the model's folder or have several hard links (as in a Hugging
            Face cache), the model and its data are copied there and loaded from the copies. Links
            are followed wherever they lead.

    Raises:
        ModelError: There is no such file, it is not an ONNX model, or the model is not sound (see
            `refuse_unsound`); or external data is missing, too short, outside the model's folder,
            or linked while `stage` is not given.
        DataError: The copies cannot be written to `stage`.
    """
    path = Path(path).absolute()
    model = _parsed(path)
    linked = external.attach(model, path.parent)
    if linked and stage is None:
        raise ModelError(
            f"{path}: external data {'; '.join(linked)}, which is not followed unasked; "
            "pass stage (--stage) to compile from copies of the model and its data"
        )
    if linked and stage is not None:
        return load(external.staged(model, path, Path(stage).absolute()))
    external.bring_in_small(model, SMALL)
    refuse_unsound(model, str(path))
    return model


def _parsed(path: Path) -> ir.Model:
    """Read and parse a model file, without external data."""
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; expected an ONNX model") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder; expected an ONNX model file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX model, or cut off: {_one_line(error)}") from None
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{path}: holds no graph; expected an ONNX model, is the file complete?")
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises whatever a malformed field leads to
        raise ModelError(f"{path}: not a sound ONNX model: {_one_line(_root(error))}") from error


def refuse_unsound(model: ir.Model, where: str) -> None:
    """Raise unless the model can be compiled; sort its graph if it is not in order.

    Args:
        model: The model.
        where: What to call it in a message, e.g. its path.

    Raises:
        ModelError: An opset that is too old or too new, a cycle, whatever onnx.checker and shape
            inference complain of, or a weight without elements.
    """
    _refuse_opset(model, where)
    try:
        model.graph.sort()
    except ValueError:
        names = ", ".join(_cycle(model.graph))
        raise ModelError(f"{where}: the graph has a cycle through the nodes {names}") from None
    try:
        CheckerPass(full_check=True).call(model)
    except Exception as error:  # onnx raises its own types from C++
        raise ModelError(f"{where}: not a sound ONNX model: {_one_line(_root(error))}") from error
    empty = sorted({str(value.name) for value in _empty_weights(model)})
    if empty:
        raise ModelError(
            f"{where}: weights without elements: {', '.join(empty)}; export the model anew"
        )


def _refuse_opset(model: ir.Model, where: str) -> None:
    """Raise unless the default domain's opset is one that is supported."""
    newest = onnx.defs.onnx_opset_version()
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        advice = (
            "install a newer onnx" if opset > newest else "convert it with onnx.version_converter"
        )
        raise ModelError(f"{where}: opset {opset}: expected {OLDEST_OPSET}..{newest}; {advice}")


def _cycle(graph: ir.Graph) -> list[str]:
    """Return the names of nodes around one cycle; the graph has one."""
    left = set(graph)
    while True:
        # What feeds nothing that is left, or is fed by nothing that is left, is on no cycle.
        kept = {
            node
            for node in left
            if any(p in left for p in node.predecessors())
            and any(s in left for s in node.successors())
        }
        if kept == left:
            break
        left = kept
    node = next((node for node in graph if node in left), None)
    around: list[ir.Node] = []
    while node is not None and node not in around:
        around.append(node)
        node = next(p for p in node.predecessors() if p in left)
    found = around[around.index(node) :] if node is not None else []
    return [f"{node.name!r} ({node.op_type})" for node in reversed(found)] or ["of a subgraph"]


def _empty_weights(model: ir.Model) -> Iterator[ir.Value]:
    """Yield constant weights of Conv, Gemm and the like that have no elements."""
    for node in model.graph.all_nodes():
        if is_standard(node, *WEIGHTED):
            value = node.inputs[WEIGHTED[node.op_type][0]]
            if value is not None and is_constant(value):
                assert value.const_value is not None  # what is_constant says
                if value.const_value.size == 0:
                    yield value


def refuse_non_finite(model: ir.Model) -> None:
    """Raise if a weight or bias of a quantizable node holds NaN or infinity.

    Each initializer is read once, a few million elements at a time.

    Raises:
        ModelError: Names the initializer, how many NaN and infinite elements, and the first one.
    """
    seen: set[int] = set()
    for node in model.graph.all_nodes():
        weight = weight_of(node)
        for value in (weight.value, weight.bias) if weight is not None else ():
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            with opened(value) as array:
                _refuse_non_finite(array, str(value.name))


def _refuse_non_finite(array: npt.NDArray[Any], name: str, step: int = 1 << 22) -> None:
    """Raise if the array holds NaN or infinity; looks at `step` elements at a time."""
    flat = array.reshape(-1)
    nan = infinite = 0
    first: int | None = None
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        bad = np.flatnonzero(~np.isfinite(piece))
        if bad.size:
            first = start + int(bad[0]) if first is None else first
            nan += int(np.isnan(piece[bad]).sum())
            infinite += int(np.isinf(piece[bad]).sum())
    if first is not None:
        index = [int(i) for i in np.unravel_index(first, array.shape)]
        raise ModelError(
            f"initializer {name!r} holds {nan} NaN and {infinite} infinite of {flat.size} "
            f"elements, the first at {index}; train or export the model anew"
        )


def save(model: ir.Model, path: Path, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a model; the same model gives the same bytes.

    Args:
        model: The model; left as it is.
        path: The file to write, in a folder that exists.
        external_above: Where the initializers exceed this many bytes together, those of more than
            1000 bytes go to `<path>.data` beside the file.

    Raises:
        DataError: A file of that name exists, or the folder cannot be written to.
    """
    path = Path(path).absolute()
    data = path.with_name(f"{path.name}.data")
    for file in (path, data):
        if file.exists() or file.is_symlink():
            raise DataError(
                f"{file} exists and is not overwritten; give another path or remove it"
            )
    copy = model.clone()
    tensors = [v.const_value for g in copy.graphs() for v in g.initializers.values()]
    large = sum(t.nbytes for t in tensors if t is not None) > external_above
    external.inline(copy, keep_initializers=large)
    try:
        if large:
            ir.external_data.unload_from_model(
                copy, path.parent, data.name, size_threshold_bytes=SMALL
            )
        content = ir.to_proto(copy).SerializeToString(deterministic=True)
        with path.open("xb") as writer:
            writer.write(content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@functools.cache
def newest_opset() -> int:
    """Return the newest opset of the default domain that both onnx and onnxruntime take."""
    import onnxruntime

    newest = int(onnx.defs.onnx_opset_version())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a refusal is an answer here, not an error
    for opset in range(newest, OLDEST_OPSET, -1):
        try:
            onnxruntime.InferenceSession(
                _one_node(opset), options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # onnxruntime raises its own types from C++
            continue
        return opset
    return OLDEST_OPSET


def _one_node(opset: int) -> bytes:
    """Return a serialized model of one Relu on a float of shape [1]."""
    x, y = (ir.val(name, ir.DataType.FLOAT, [1]) for name in "xy")
    node = ir.Node("", "Relu", [x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": opset}, name="probe")
    # The oldest IR version that both take: the opset alone decides.
    return bytes(ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString())


def _root(error: BaseException) -> BaseException:
    """Return the error that started it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _one_line(error: BaseException) -> str:
    """Return the error's message in one line of at most 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:400].rstrip(".")
