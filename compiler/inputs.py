"""What a model takes, and whether a batch is that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .errors import DataError, ModelError, did_you_mean

Array = npt.NDArray[Any]
Batch = dict[str, Array]

# An array of this name goes along with the samples, unless the model has an input of that name.
LABELS = "labels"


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Its name.
        dtype: Its element type; bfloat16 is `ml_dtypes.bfloat16`, strings are `object`.
        shape: A number where the model fixes an axis, else the axis' name, or None without one.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join('?' if d is None else str(d) for d in self.shape)}]"


def input_specs(model: ir.Model) -> list[InputSpec]:
    """Return the inputs that a caller must feed; those with a default (initializers) are left out.

    Raises:
        ModelError: An input is not a tensor, or declares no element type or rank.
    """
    return [
        _spec(value) for value in model.graph.inputs if value.name not in model.graph.initializers
    ]


def _spec(value: ir.Value) -> InputSpec:
    """Return one input's spec."""
    if not isinstance(value.type, ir.TensorType) or value.dtype is None or value.shape is None:
        raise ModelError(
            f"input {value.name!r} has type {value.type} and shape {value.shape}; "
            "expected a tensor with an element type and a rank"
        )
    shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return InputSpec(str(value.name), np.dtype(value.dtype.numpy()), shape)


def checked(given: Any, specs: Sequence[InputSpec], where: str, skip: int) -> Batch:
    """Return the arrays in the order of the specs, then the labels if there are any.

    Args:
        given: A dict of arrays by input name; nothing is cast.
        specs: The model's inputs.
        where: What to call the batch in a message.
        skip: How many leading axes hold samples: 1, and their lengths are not compared with the
            specs; or 0 where the model has no axis of samples.

    Raises:
        DataError: `given` is no dict; a name is missing or unknown; an array has another element
            type, rank or fixed axis than the model; no samples, or arrays of different length.
    """
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: expected a dict of arrays, got a {type(given).__name__}")
    names = [spec.name for spec in specs]
    _refuse_names(given, names, where)
    batch = {spec.name: _array(given[spec.name], spec, where, skip) for spec in specs}
    if skip:
        lengths = {name: len(array) for name, array in batch.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{where}: inputs hold different numbers of samples: {lengths}")
        if 0 in lengths.values():
            raise DataError(f"{where}: holds no samples")
    if LABELS in given and LABELS not in names:
        batch[LABELS] = np.asarray(given[LABELS])
    return batch


def _refuse_names(given: Iterable[str], names: list[str], where: str) -> None:
    """Raise unless exactly the model's inputs are given, labels aside."""
    present = set(given)
    for name in sorted(present - {*names, LABELS}, key=str):
        raise DataError(
            f"{where}: the model has no input {name!r}{did_you_mean(str(name), names)}"
        )
    missing = [name for name in names if name not in present]
    if missing:
        raise DataError(f"{where}: no array for input {', '.join(map(repr, missing))}")


def _array(given: Any, spec: InputSpec, where: str, skip: int) -> Array:
    """Return one input's array, checked against its spec."""
    what = f"{where}: input {spec.name!r} expects {spec}"
    array = _as_stored(np.asarray(given), spec.dtype)
    if array.dtype != spec.dtype:
        raise DataError(
            f"{what}, got {array.dtype}{list(array.shape)}; "
            f"cast it with array.astype({str(spec.dtype)!r})"
        )
    fits = array.ndim == len(spec.shape) and all(
        got == expected or not isinstance(expected, int)
        for got, expected in zip(array.shape[skip:], spec.shape[skip:], strict=True)
    )
    if not fits:
        raise DataError(f"{what}, got {array.dtype}{list(array.shape)}")
    return array


def _as_stored(array: Array, dtype: np.dtype[Any]) -> Array:
    """Undo how numpy stores what it does not know: bfloat16 as raw bytes, strings as `<U`."""
    if dtype.kind == "V" and array.dtype.kind == "V" and array.dtype.names is None:
        return array.view(dtype) if array.dtype.itemsize == dtype.itemsize else array
    return array.astype(object) if dtype.kind == "O" and array.dtype.kind == "U" else array
