"""Where feeds come from: files, folders, Python objects; all become parts, read anew each time.

A part is a few samples with a clause that says where they came from. Files are read again for
every walk; what can be walked only once is written to files first. Memory holds one part.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx

from .errors import DataError, FourfoldError, did_you_mean
from .inputs import LABELS, Array, Batch, InputSpec, checked
from .named import call, importable_cwd, is_name

Part = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """Parts that can be read again and again.

    Attributes:
        parts: Starts a walk over the parts.
        keep: Whatever must live as long as the parts can be read, e.g. a folder of spooled files.
    """

    parts: Callable[[], Iterable[Part]]
    keep: Any = field(default=None, repr=False)


def opened_source(
    source: Any, specs: Sequence[InputSpec], skip: int, folder: Path | None
) -> Source:
    """Return the parts of any kind of feeds; see `Feeds.read` for the kinds.

    Args:
        source: The feeds.
        specs: The model's inputs.
        skip: As in `inputs.checked`; feeds that can be walked only once are checked on the way.
        folder: Where to write those; None: a temporary folder that lives as long as the source.

    Raises:
        DataError: It is no such kind, or cannot be read.
    """
    if source == "":
        raise DataError("the feeds have an empty name; expected a file, folder or module:function")
    if isinstance(source, str) and is_name(source) and not Path(source).exists():
        with importable_cwd():  # a generator's body runs, and imports, while it is spooled
            returned = call(source, DataError)
            if isinstance(returned, str) and is_name(returned):
                raise DataError(f"{source} returned {returned!r}; expected feeds or a path")
            return opened_source(returned, specs, skip, folder)
    if isinstance(source, str | Path):
        return _of_path(Path(source), specs)
    if isinstance(source, Mapping):
        return Source(lambda: [("the arrays", source)])
    if callable(getattr(source, "get_next", None)):
        return _spooled(iter(source.get_next, None), specs, skip, folder)
    if isinstance(source, list | tuple):
        return Source(lambda: ((f"batch {i}", batch) for i, batch in enumerate(source)))
    if isinstance(source, Iterable) and not isinstance(source, np.ndarray | bytes):
        return _spooled(source, specs, skip, folder)
    raise DataError(
        f"cannot read feeds from a {type(source).__name__}; expected a path, module:function, "
        "a dict of arrays, an iterable of dicts or a CalibrationDataReader"
    )


def _spooled(
    batches: Iterable[Any], specs: Sequence[InputSpec], skip: int, folder: Path | None
) -> Source:
    """Write batches to files as they come, so that memory holds one of them."""
    spool = _Spool(folder)
    files: list[tuple[str, Path]] = []
    walk = enumerate(batches)
    while True:
        try:
            index, batch = next(walk)
        except StopIteration:
            break
        except FourfoldError:
            raise
        except Exception as error:  # whatever the user's iterable raises
            raise DataError(
                f"feeds raised {type(error).__name__} after batch {len(files)}: {error}"
            ) from error
        where = f"batch {index}"
        file = spool.path / f"{index:06}.npz"
        _write(file, checked(batch, specs, where, skip), specs)
        files.append((where, file))
    return Source(lambda: ((where, _read(file, specs)) for where, file in files), spool)


class _Spool:
    """A temporary folder that goes when nothing refers to this object any more."""

    def __init__(self, folder: Path | None) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="feeds-", dir=folder))
        except OSError as error:
            raise DataError(f"cannot write feeds to {folder}: {error.strerror}") from error
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _write(file: Path, batch: Batch, specs: Sequence[InputSpec]) -> None:
    """Write a checked batch; arrays by number, since a name can be any text."""
    arrays = {f"input_{i}": _storable(batch[spec.name]) for i, spec in enumerate(specs)}
    if LABELS in batch:
        arrays[LABELS] = batch[LABELS]
    if LABELS in arrays and arrays[LABELS].dtype.kind == "O":
        raise DataError("labels are Python objects; expected an array of numbers or strings")
    try:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # for its keyword allow_pickle
    except OSError as error:
        raise DataError(f"cannot write feeds to {file}: {error}") from error


def _read(file: Path, specs: Sequence[InputSpec]) -> Batch:
    """Read what `_write` wrote."""
    arrays = _npz(file)
    batch = {spec.name: arrays[f"input_{i}"] for i, spec in enumerate(specs)}
    if LABELS in arrays:
        batch[LABELS] = arrays[LABELS]
    return batch


def _storable(array: Array) -> Array:
    """Return the array as numpy can store it without pickle: strings as `<U`."""
    return array.astype(str) if array.dtype.kind == "O" else array


def _of_path(path: Path, specs: Sequence[InputSpec]) -> Source:
    """Return the parts of a file or folder."""
    path = path.absolute()  # a later walk may start from another current directory
    if path.is_file() and path.suffix == ".npz":
        return Source(lambda: [(path.name, _npz(path))])
    if path.is_file() and path.suffix == ".npy":
        return _of_npy([path], specs)
    if path.is_file():
        raise DataError(f"cannot read feeds from {path}: expected .npz, .npy or a folder")
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder (nor a name of the form module:function)")
    return _of_folder(path, specs)


def _of_folder(path: Path, specs: Sequence[InputSpec]) -> Source:
    """Return the parts of a folder: ONNX test data, .npz files or .npy files."""
    sets = sorted((p for p in path.glob("test_data_set_*") if p.is_dir()), key=_number)
    if not sets and any(path.glob("input_*.pb")):
        sets = [path]
    batches, arrays = sorted(path.glob("*.npz")), sorted(path.glob("*.npy"))
    kinds = [k for k, v in (("test_data_set_*", sets), (".npz", batches), (".npy", arrays)) if v]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise DataError(f"{path}: expected test_data_set_* or .npz or .npy, got {found}")
    if sets:
        return Source(lambda: ((one.name, _test_data(one, specs)) for one in sets))
    if batches:
        return Source(lambda: ((file.name, _npz(file)) for file in batches))
    return _of_npy(arrays, specs)


def _of_npy(files: list[Path], specs: Sequence[InputSpec]) -> Source:
    """Return the parts of .npy files: one an input, or, for one-input models, one a batch."""
    names = [spec.name for spec in specs]
    by_name = {file.stem: file for file in files}
    if set(names) & set(by_name) or len(names) != 1:
        for name in sorted(set(by_name) - {*names, LABELS}):
            raise DataError(
                f"{by_name[name]}: the model has no input {name!r}{did_you_mean(name, names)}"
            )
        where = files[0].parent.name
        return Source(lambda: [(where, {name: _npy(file) for name, file in by_name.items()})])
    labels = by_name.get(LABELS)
    batches = [file for file in files if file != labels]
    return Source(lambda: _unnamed(batches, names[0], labels))


def _unnamed(files: list[Path], name: str, labels: Path | None) -> Iterator[Part]:
    """Yield files as batches of the one input; labels of all of them lie in one file."""
    left = _npy(labels) if labels is not None else None
    for index, file in enumerate(files):
        array = _npy(file)
        if left is None:
            yield file.name, {name: array}
            continue
        # The last batch takes what is left, so that a wrong number of labels is noticed.
        count = len(array) if array.ndim and index < len(files) - 1 else len(left)
        yield file.name, {name: array, LABELS: left[:count]}
        left = left[count:]


def _number(path: Path) -> tuple[int, str]:
    """Return the number at the end of a name, so that 10 comes after 2."""
    found = re.search(r"(\d+)$", path.stem)
    return (int(found[1]) if found else -1, path.name)


def _npz(file: Path) -> Batch:
    """Read all arrays of a .npz file."""
    loaded = _load(file)
    if isinstance(loaded, np.ndarray):
        raise DataError(f"{file}: is a .npy file; expected .npz")
    return loaded


def _npy(file: Path) -> Array:
    """Read a .npy file."""
    loaded = _load(file)
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{file}: is a .npz file; expected .npy")
    return loaded


def _load(file: Path) -> Array | Batch:
    """Read a numpy file; pickled data is refused, since reading it could run anything."""
    try:
        with file.open("rb") as reader:
            loaded = np.load(reader, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                return {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, BadZipFile, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    """Return the error for a file that numpy refused."""
    if "allow_pickle" in str(error):
        return DataError(f"{file}: holds pickled objects, which are refused; store plain arrays")
    return DataError(f"{file}: not a readable numpy file: {error}")


def _test_data(folder: Path, specs: Sequence[InputSpec]) -> Batch:
    """Read the input_N.pb of one ONNX test data set, N being the input's place in the model."""
    batch = {}
    names = [spec.name for spec in specs]
    for file in sorted(folder.glob("input_*.pb"), key=_number):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(file.read_bytes())
            array = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # protobuf's and onnx's own types
            raise DataError(f"{file}: not a TensorProto: {error}") from error
        place = _number(file)[0]
        if tensor.name not in names and not 0 <= place < len(names):
            raise DataError(f"{file}: the model has {len(names)} inputs, none of number {place}")
        batch[tensor.name if tensor.name in names else names[place]] = array
    return batch
