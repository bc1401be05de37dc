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
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"{self.folder / REPORT} does not fit the schema at {where}: "
                f"{first['msg'].lower()}"
            ) from None

    def entry(self, target: str) -> Path:
        """Return the model file of one target.

        Raises:
            DataError: The artifact holds no variant for it.
        """
        variants = self.manifest.get("variants", {})
        if not isinstance(variants, dict):
            raise DataError(f"{self.folder / MANIFEST}: variants is no JSON object")
        if target not in variants:
            raise DataError(
                f"{self.folder} has no variant for {target!r}; it has {sorted(variants)}"
            )
        path = (self.folder / str(variants[target])).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise DataError(f"the manifest's path {variants[target]!r} leaves the artifact")
        return path

    def plan(self, target: str) -> dict[str, dict[str, Any]]:
        """Return the plan of one target: value name -> decision.

        Raises:
            DataError: The folder holds no plan, or one of another form.
        """
        found = self._json("plan.json").get(target, {})
        values = found.get("values", {}) if isinstance(found, dict) else None
        if not isinstance(values, dict):
            raise DataError(f"{self.folder / 'plan.json'}: {target!r} is no JSON object")
        return values

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
    behind, in the nearest folder above `out` that was there already.

    Raises:
        DataError: `out` exists (and `force` is off, or it holds anything but an artifact), or it
            cannot be written.
    """
    out = out.absolute()
    try:
        _refuse_taken(out, force)
        home = next(folder for folder in out.parents if folder.exists())
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=home))
    except OSError as error:
        raise DataError(
            f"cannot write to {out}: {(error.strerror or str(error)).lower()}"
        ) from None
    try:
        build, work = partial / "build", partial / "work"
        build.mkdir()
        work.mkdir()
        yield build, work
        _put(build, out, partial / "old" if force else None)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_taken(out: Path, force: bool) -> None:
    """Raise when something is in the way that may not be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise DataError(f"the output folder {out} exists; choose another one or pass --force")
    ours = _files_of(out)
    if ours is None:
        raise DataError(f"{out} exists and is no artifact of this tool; it will not be replaced")
    found = (p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir())
    foreign = sorted(set(found) - ours)
    if foreign:
        raise DataError(
            f"{out} also holds {foreign[0]!r}, which is not of the artifact; move it elsewhere"
        )


def _files_of(out: Path) -> set[str] | None:
    """Return the files of an artifact by its manifest; None where there is no such manifest."""
    try:
        manifest = Artifact(out).manifest
    except DataError:
        return None
    files, variants = manifest.get("files"), manifest.get("variants")
    if not isinstance(files, dict) or not isinstance(variants, dict):
        return None  # many tools call a file manifest.json
    return {MANIFEST, REPORT, *files}


def _put(build: Path, out: Path, old: Path | None) -> None:
    """Move the finished folder to its place; an older artifact goes to `old`, or comes back."""
    moved = False
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if old is not None and out.exists():
            out.rename(old)
            moved = True
        build.rename(out)
    except OSError as error:
        if old is not None and moved:
            old.rename(out)
        reason = (error.strerror or str(error)).lower()
        raise DataError(f"cannot move the artifact to {out}: {reason}") from None


def seal(build: Path, facts: dict[str, Any]) -> None:
    """Write the manifest over everything in the folder but the report, whose times differ."""
    files = {
        path.relative_to(build).as_posix(): sha256(path)
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
