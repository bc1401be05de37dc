"""A content-addressed store of small results, shared between runs and safe under parallel ones.

A key is plain data that says everything a result depends on; its hash names the file. Files are
written beside their place and moved there, so that a killed run leaves no half result.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST = 1 << 24  # bytes of one result that are read back
KEY = "__key__"  # the array that holds the key's text


def home() -> Path:
    """Return the cache folder: FOURFOLD_CACHE, or ~/.cache/fourfold."""
    return Path(os.environ.get("FOURFOLD_CACHE") or Path.home() / ".cache" / "fourfold")


class Cache:
    """Results of one kind, in a folder of their own under the cache folder.

    Args:
        kind: Name of the folder.
        root: Another cache folder than `home()`.
    """

    def __init__(self, kind: str, root: Path | None = None) -> None:
        self._folder = (root or home()) / kind

    def get(self, key: Any) -> Any | None:
        """Return the result of that key; None where there is none, or where it cannot be read."""
        path = self._path(key)
        try:
            if path.stat().st_size > LARGEST:
                return None
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        # A damaged file, or another key of the same hash, is as good as none.
        return kept.get("result") if isinstance(kept, dict) and kept.get("key") == key else None

    def put(self, key: Any, result: Any) -> bool:
        """Keep a result; return whether the cache folder could be written to.

        Args:
            key: Plain JSON data.
            result: Plain JSON data.
        """
        text = json.dumps({"key": key, "result": result}, sort_keys=True, allow_nan=False)
        return self._write(self._path(key), text.encode())

    def get_arrays(self, key: Any) -> dict[str, npt.NDArray[Any]] | None:
        """Return the arrays of that key; None where there are none, or they cannot be read."""
        path = self._path(key, "npz")
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                arrays = {name: kept[name] for name in kept.files}
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
            return None
        named = arrays.pop(KEY, None)
        return arrays if named is not None and named.tobytes().decode() == _text(key) else None

    def put_arrays(self, key: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Keep arrays of numbers; return whether the cache folder could be written to."""
        buffer = io.BytesIO()
        named = np.frombuffer(_text(key).encode(), np.uint8)
        np.savez(buffer, allow_pickle=False, **{**arrays, KEY: named})
        return self._write(self._path(key, "npz"), buffer.getvalue())

    def _write(self, path: Path, content: bytes) -> bool:
        """Write a file beside its place and move it there."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        except OSError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(partial).replace(path)
        except OSError:
            Path(partial).unlink(missing_ok=True)
            return False
        return True

    def _path(self, key: Any, kind: str = "json") -> Path:
        """Return the file of a key."""
        digest = hashlib.sha256(_text(key).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.{kind}"


def _text(key: Any) -> str:
    """Return a key as text."""
    return json.dumps(key, sort_keys=True, allow_nan=False)
