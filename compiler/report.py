"""What was done and measured: report.json is this model; docs/report.md explains it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from .compare import Comparison, Latency
from .contract import Decision, Remark
from .runner import PassRow
from .storage import Stored


class _Row(BaseModel):
    """Frozen, strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRow(_Row):
    """The model that came in."""

    name: str
    sha256: str
    opset: int
    nodes: int
    weight_bytes: int
    file_bytes: int


class FeedsRow(_Row):
    """Feeds that were used.

    `held_out` is False where check and calibration feeds are the same samples, `made_up` is True
    where they were drawn at random because none were given.
    """

    samples: int
    sha256: str
    held_out: bool = True
    made_up: bool = False


class TargetReport(_Row):
    """One variant.

    Attributes:
        target: The target with its options, as text.
        capability: What it was compiled for.
        precision: Widths asked for.
        recipe: The passes, as text.
        file_bytes: Bytes of all files that the runtime needs.
        stored_bits: Stored bits of codes, tables and scales per quantized weight; None where none
            is quantized.
        weight_memory: Bytes of all weights as the runtime holds them, after folding; None when not
            checked.
        decision: How the bits were chosen; None for a recipe that decides nothing.
        kernels: Kernel -> nodes, of the graph as the runtime executes it; empty when not checked.
        stayed_float: Weighted node that ran in float -> why.
        accuracy: None when the check was switched off.
        latency: A row for each measured batch.
        verdict: Sentences that follow from the figures.
        seconds: Duration of the compile without the check.
    """

    target: str
    capability: str
    precision: str
    recipe: str
    file_bytes: int
    stored_bits: Stored | None
    weight_memory: int | None
    decision: Decision | None
    kernels: dict[str, int]
    stayed_float: dict[str, str]
    accuracy: Comparison | None
    latency: tuple[Latency, ...]
    verdict: tuple[str, ...]
    passes: tuple[PassRow, ...]
    remarks: tuple[Remark, ...]
    seconds: float


class Report(_Row):
    """Everything that one compile did and measured."""

    schema_version: int = 1
    fourfold: str
    versions: dict[str, str]
    machine: str
    seed: int
    source: SourceRow
    calibration: FeedsRow | None
    check: FeedsRow | None
    targets: tuple[TargetReport, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return self.model_dump(mode="json")


def verdict(
    accuracy: Comparison | None, rows: tuple[Latency, ...], bytes_before: int, bytes_after: int
) -> list[str]:
    """Say in words what the figures say: slower, larger, or far from its source."""
    lines = [
        f"SLOWER than the source at batch {row.batch}: {row.variant * 1e3:.2f} ms against "
        f"{row.source * 1e3:.2f} ms ({row.ratio:.2f}x)"
        for row in rows
        if row.ratio < 1
    ]
    if bytes_after >= bytes_before:
        lines.append(f"NOT SMALLER than the source: {bytes_after} bytes against {bytes_before}")
    if accuracy is not None and accuracy.non_finite:
        lines.append(f"NOT FINITE: {accuracy.non_finite} elements of the outputs are NaN or inf")
    if accuracy is not None and accuracy.sqnr_db < 10:
        lines.append(f"FAR from the source: the outputs' SQNR is {accuracy.sqnr_db:.1f} dB")
    return lines
