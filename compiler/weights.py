"""Looks at the data of an initializer and lets go of its memory afterwards.

An external tensor is memory-mapped on first use and would stay mapped: a walk over a model of
many gigabytes would end with all of it resident. `opened` hands the array out for the length of a
`with` block and gives the pages back at its end.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from .errors import ModelError


@contextmanager
def opened(source: ir.Value | ir.TensorProtocol) -> Iterator[npt.NDArray[Any]]:
    """Yield the data as a read-only array in its own dtype and shape.

    float16 stays float16, bfloat16 is `ml_dtypes.bfloat16`. For data on disk the pages are given
    back at the end of the block. A view that outlives the block stays readable (its pages come
    back from disk), but keeps the file mapped.

    Args:
        source: An initializer, or its tensor.

    Raises:
        ModelError: The value has no data, or its data file can no longer be read.
    """
    tensor = source.const_value if isinstance(source, ir.Value) else source
    if tensor is None:
        raise ModelError(f"value {source.name!r} has no data: expected an initializer")
    try:
        yield _read_only(tensor)
    finally:
        if isinstance(tensor, ir.ExternalTensor):
            _let_go(tensor)


def _read_only(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """Return a view of the tensor's array that cannot be written to."""
    try:
        array: npt.NDArray[Any] = tensor.numpy().view()
    except (OSError, ValueError) as error:
        raise ModelError(f"initializer {tensor.name!r} cannot be read: {error}") from error
    array.flags.writeable = False
    return array


def _let_go(tensor: ir.ExternalTensor) -> None:
    """Close the tensor's memory map; where a view still lives, drop the mapped pages instead.

    The name that the `with` statement binds is such a view: it lives until it is bound anew.
    """
    try:
        tensor.release()
    except BufferError:
        if tensor.raw is not None and hasattr(mmap, "MADV_DONTNEED"):
            tensor.raw.madvise(mmap.MADV_DONTNEED)
