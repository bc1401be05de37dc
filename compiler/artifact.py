"""The artifact: a folder with a manifest, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError

if TYPE_CHECKING:
    from .report import Report

MANIFEST = "manifest.json"
REPORT = "report.json"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """What one compile left in `folder`: manifest, report, plan, and a folder for each target."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest: versions, seed, hashes of the inputs and of every file.

        Raises:
            DataError: The folder holds none, or it is not JSON.
        """
        return self._json(MANIFEST)

    @property
    def report(self) -> Report:
        """The report of the compile.

        Raises:
            DataError: The folder holds none, or it does not fit the schema.
        """
        from pydantic import ValidationError

        from .report import Report

        try:
            return Report.model_validate(self._json(REPORT))
        except ValidationError as error:
            raise DataError(
                f"{self.folder / REPORT} does not fit the schema: {error.errors()[0]}"
            ) from None

    def entry(self, target: str) -> Path:
        """Return the model file of one target.

        Raises:
            DataError: The artifact holds no variant for it.
        """
        variants = self.manifest.get("variants", {})
        if target not in variants:
            raise DataError(
                f"{self.folder} has no variant for {target!r}; it has {sorted(variants)}"
            )
        path = (self.folder / str(variants[target])).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise DataError(f"the manifest's path {variants[target]!r} leaves the artifact")
        return path

    def plan(self, target: str) -> dict[str, dict[str, Any]]:
        """Return the plan of one target: value name -> decision."""
        plans = self._json("plan.json")
        found = plans.get(target, {})
        assert isinstance(found, dict)
        return found

    def _json(self, name: str) -> dict[str, Any]:
        """Read one of the artifact's JSON files."""
        path = self.folder / name
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder} is no artifact: {name}: {error}") from None
        if not isinstance(data, dict):
            raise DataError(f"{path} holds no JSON object")
        return data


@contextmanager
def fresh(out: Path, force: bool) -> Iterator[tuple[Path, Path]]:
    """Yield (build, work): two new folders beside `out`; `build` becomes `out` when all went well.

    Whatever happens, nothing but a finished artifact appears under `out`, and an older one stays
    until the new one is ready. A killed process leaves at most a hidden `.<name>.partial-*` folder
    behind.

    Raises:
        DataError: `out` exists (and `force` is off) or cannot be written.
    """
    out = out.absolute()
    if out.exists() and not force:
        raise DataError(f"the output folder {out} exists; choose another one or pass --force")
    if out.exists() and not (out / MANIFEST).is_file():
        raise DataError(f"{out} exists and is no artifact of this tool; it will not be replaced")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise DataError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        build, work = partial / "build", partial / "work"
        build.mkdir()
        work.mkdir()
        yield build, work
        if out.exists():
            out.rename(partial / "old")
        build.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def seal(build: Path, facts: dict[str, Any]) -> None:
    """Write the manifest over everything in the folder but the report, whose times differ."""
    files = {
        str(path.relative_to(build)): sha256(path)
        for path in sorted(build.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, REPORT)
    }
    write_json(build / MANIFEST, {**facts, "files": files})


def write_json(path: Path, data: Any, *, sort: bool = True) -> None:
    """Write JSON that is the same for the same data."""
    path.write_text(json.dumps(data, indent=2, sort_keys=sort, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Return the hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
