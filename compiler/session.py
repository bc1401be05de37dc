"""Opens models in onnxruntime on the CPU: the reference that every variant is held against."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime

from .contract import Arrays, Runner
from .errors import DataError, UnsupportedError

Array = npt.NDArray[Any]

BFLOAT16 = 16  # TensorProto.BFLOAT16


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]  # it ships no types
    """An InferenceSession that takes and returns bfloat16, which numpy has no type of its own for.

    Such arrays are of `ml_dtypes.bfloat16`.
    """

    def run(
        self, output_names: list[str] | None, input_feed: Arrays, run_options: Any = None
    ) -> list[Array]:
        """Return the named outputs (None: all of them).

        Raises:
            DataError: onnxruntime cannot run the model on these feeds.
        """
        types = {v.name: v.type for v in (*self.get_inputs(), *self.get_outputs())}
        names = output_names or [output.name for output in self.get_outputs()]
        try:
            if "tensor(bfloat16)" not in {types.get(name) for name in (*names, *input_feed)}:
                found: list[Array] = super().run(names, dict(input_feed), run_options)
                return found
            values = {name: _to_value(array) for name, array in input_feed.items()}
            return [_to_array(v) for v in self.run_with_ort_values(names, values, run_options)]
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise DataError(
                f"onnxruntime cannot run the model on these feeds: {_one_line(error)}"
            ) from error


def _to_value(array: Array) -> onnxruntime.OrtValue:
    """Return the array as onnxruntime's own kind of tensor."""
    if array.dtype != ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    bits = np.ascontiguousarray(array).view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)


def _to_array(value: onnxruntime.OrtValue) -> Array:
    """Return a tensor of onnxruntime as an array."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(content, ml_dtypes.bfloat16).reshape(value.shape())


def session_options(threads: int = 1) -> onnxruntime.SessionOptions:
    """Return options with a fixed number of threads that log errors only."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def open_session(path: Path, options: onnxruntime.SessionOptions) -> Session:
    """Open a model file on the CPU.

    Raises:
        UnsupportedError: onnxruntime refuses the model.
    """
    try:
        return Session(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        raise UnsupportedError(
            f"onnxruntime {onnxruntime.__version__} refuses {path.name}: {_one_line(error)}"
        ) from None


def open_runner(path: Path, threads: int = 1) -> Runner:
    """Return a callable from feeds to outputs by name; raises as `open_session` and `run`."""
    session = open_session(path, session_options(threads))
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        return dict(zip(names, session.run(None, feeds), strict=True))

    return run


def _one_line(error: Exception) -> str:
    """Return the error's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
