"""Opens models in onnxruntime on the CPU: the reference that every variant is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from .contract import Arrays, Runner
from .errors import UnsupportedError


def session_options(threads: int = 1) -> onnxruntime.SessionOptions:
    """Return options with a fixed number of threads that log errors only."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def open_session(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a model file on the CPU.

    Raises:
        UnsupportedError: onnxruntime refuses the model.
    """
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(
            f"onnxruntime {onnxruntime.__version__} refuses {path.name}: {reason}"
        ) from None


def open_runner(path: Path, threads: int = 1) -> Runner:
    """Return a callable from feeds to outputs by name; raises as `open_session`."""
    session = open_session(path, session_options(threads))
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        return dict(zip(names, session.run(None, dict(feeds)), strict=True))

    return run
