"""External data of a model on disk: is every file there, inside the folder, and long enough.

onnx_ir maps a data file only when its bytes are asked for, and refuses links out of the model's
folder and files with several hard links then: deep inside a compile. Here everything is checked
first, from file sizes alone; nothing is read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from .errors import DataError, ModelError
from .weights import opened

logger = logging.getLogger(__name__)


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the tensors with data beside the model: initializers and attributes, at any depth."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    for node in nodes_of(model):
        for attribute in node.attributes.values():
            for tensor in tensors_of(attribute):
                if isinstance(tensor, ir.ExternalTensor):
                    yield tensor


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node: of the graph, its subgraphs and the model's functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def tensors_of(attribute: ir.Attr) -> Iterable[ir.TensorProtocol]:
    """Return the tensors in an attribute; nothing for other kinds and for references."""
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.TENSOR:
        return (attribute.as_tensor(),)
    return attribute.as_tensors() if attribute.type == ir.AttributeType.TENSORS else ()


def attach(model: ir.Model, folder: Path) -> list[str]:
    """Tell every external tensor its folder and check it; return what only staging can cure.

    Args:
        model: The model as deserialized.
        folder: Absolute path of the folder that holds the model file.

    Returns:
        A clause for each data file that is a link out of `folder` or has several hard links.

    Raises:
        ModelError: A location is absolute or leaves the folder, or a file is missing, is not a
            regular file, or is too short.
    """
    linked: dict[str, str] = {}
    for tensor in external_tensors(model):
        tensor.base_dir = folder
        location = os.fspath(tensor.location)
        _refuse_outside(tensor, location)
        _refuse_short(tensor, folder / location)
        if (why := _why_linked(folder, location)) is not None:
            linked[location] = why
    return list(linked.values())


def bring_in_small(model: ir.Model, limit: int) -> None:
    """Read the tensors into memory that onnx's C++ code would look for on disk.

    onnx_ir keeps only initializers of the main graph with more than `limit` bytes away from it.
    """
    kept = {
        id(value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > limit
    }
    _replace(model, lambda tensor: tensor if id(tensor) in kept else _in_memory(tensor))


def inline(model: ir.Model, *, keep_initializers: bool) -> None:
    """Make a model independent of its data files, reading each tensor when it is written.

    Args:
        model: The model, edited in place.
        keep_initializers: Leave those to a caller who writes them to a new data file.
    """

    def later(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
        shape = ir.Shape(tensor.shape.numpy())
        return ir.LazyTensor(
            lambda: _in_memory(tensor), tensor.dtype, shape, cache=False, name=tensor.name
        )

    _replace(model, later, initializers=not keep_initializers)


def _replace(
    model: ir.Model,
    change: Callable[[ir.ExternalTensor], ir.TensorProtocol],
    *,
    initializers: bool = True,
) -> None:
    """Put `change(tensor)` in the place of every external tensor."""
    for graph in model.graphs() if initializers else ():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = change(value.const_value)
    for node in nodes_of(model):
        for name, attribute in list(node.attributes.items()):
            tensors = list(tensors_of(attribute))
            if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
                new = [change(t) if isinstance(t, ir.ExternalTensor) else t for t in tensors]
                single = attribute.type == ir.AttributeType.TENSOR
                node.attributes[name] = (
                    ir.AttrTensor(name, new[0]) if single else ir.AttrTensors(name, new)
                )


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """Return a copy of the tensor that needs no file."""
    with opened(tensor) as array:
        return ir.Tensor(array.copy(), dtype=tensor.dtype, name=tensor.name)


def _refuse_outside(tensor: ir.ExternalTensor, location: str) -> None:
    """Raise unless the location, as text, stays inside the model's folder."""
    if Path(location).is_absolute() or Path(os.path.normpath(location)).parts[:1] == ("..",):
        raise ModelError(
            f"initializer {tensor.name!r} keeps its data at {location!r}, outside the "
            "model's folder; expected a relative path inside it"
        )


def _refuse_short(tensor: ir.ExternalTensor, path: Path) -> None:
    """Raise unless the file exists and is long enough for the tensor."""
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(
            f"external data of initializer {tensor.name!r} cannot be opened: {path}: "
            f"{(error.strerror or str(error)).lower()}; put the data file beside the model"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"external data of initializer {tensor.name!r} is not a file: {path}")
    offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if offset < 0 or length != tensor.nbytes:
        raise ModelError(
            f"initializer {tensor.name!r} needs {tensor.nbytes} bytes, but its external data is "
            f"declared as {length} bytes at offset {offset}"
        )
    if offset + length > found.st_size:
        raise ModelError(
            f"external data of initializer {tensor.name!r} is cut off: expected {offset + length} "
            f"bytes in {path}, got {found.st_size}; fetch the file again"
        )


def _why_linked(folder: Path, location: str) -> str | None:
    """Return why onnx_ir would refuse to map this file, or None."""
    real, home = (folder / location).resolve(), folder.resolve()
    if not real.is_relative_to(home):
        return f"{location!r} is a link to {real}"
    links = real.stat().st_nlink
    return f"{location!r} has {links} hard links" if links > 1 else None


def data_files(path: Path) -> list[Path]:
    """Return the data files that a checked model file names, sorted."""
    model = ir.serde.deserialize_model(onnx.load(path, load_external_data=False))
    locations = {os.path.normpath(tensor.location) for tensor in external_tensors(model)}
    return sorted(path.parent / location for location in locations)


def staged(model: ir.Model, path: Path, stage: Path) -> Path:
    """Copy a model file and its data files into a folder under `stage`, without links.

    The folder's name is made from the files' real paths, sizes and times, so that a second run
    finds the copies of the first. Links are followed once, when a file is opened; what was opened
    must be a regular file, and where each link led is logged.

    Args:
        model: The model, for the locations that it names; all of them passed `attach`.
        path: The model file.
        stage: A folder of ours; made when it is missing.

    Returns:
        The model file's copy.

    Raises:
        DataError: The copies cannot be written.
        ModelError: A file is not a regular file.
    """
    locations = sorted({os.path.normpath(tensor.location) for tensor in external_tensors(model)})
    target = stage / f"{path.stem}-{_identity(path, locations)}"
    if target.exists():
        return target / path.name
    try:
        stage.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=stage) as scratch:
            half = Path(scratch, "copies")
            half.mkdir()
            _copy(path, half / path.name)
            for location in locations:
                _copy(path.parent / location, half / location)
            half.rename(target)
    except OSError as error:
        raise DataError(f"cannot stage {path.name} in {stage}: {error}") from error
    return target / path.name


def _identity(path: Path, locations: list[str]) -> str:
    """Return 16 hex digits that change when a file changes its place, size or time."""
    digest = hashlib.sha256()
    for file in (path, *(path.parent / location for location in locations)):
        found = file.stat()
        digest.update(f"{file.resolve()}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _copy(source: Path, target: Path) -> None:
    """Copy one file through the descriptor that was checked, in the kernel where it can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("staging %s from %s", target.name, source.resolve())
    with source.open("rb") as reader, target.open("xb") as writer:
        found = os.fstat(reader.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ModelError(f"cannot stage {source}: not a regular file")
        try:
            while os.copy_file_range(reader.fileno(), writer.fileno(), 1 << 30):
                pass
        except (OSError, AttributeError):  # another filesystem, or not Linux
            reader.seek(0)
            writer.seek(0)
            writer.truncate()
            shutil.copyfileobj(reader, writer, 1 << 24)
