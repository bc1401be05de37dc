"""A content-addressed store of small results, shared between runs and safe under parallel ones.

A key is plain data that says everything a result depends on; its hash names the file. Files are
written beside their place and moved there, so that a killed run leaves no half result.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

LARGEST = 1 << 24  # bytes of one result that are read back


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
        path = self._path(key)
        text = json.dumps({"key": key, "result": result}, sort_keys=True, allow_nan=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        except OSError:
            return False
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(partial).replace(path)
        except OSError:
            Path(partial).unlink(missing_ok=True)
            return False
        return True

    def _path(self, key: Any) -> Path:
        """Return the file of a key."""
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.json"
