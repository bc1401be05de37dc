"""How many bits a variant is asked to have: `w8a8`, `w4a8`, `w4` (weights only)."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import RecipeError


class Precision(BaseModel):
    """Widths asked for; a target's recipe turns them into passes.

    Attributes:
        weights: Bits of a weight.
        activations: Bits of an activation; None leaves activations float (weight-only).
        ranges: Where activation ranges come from: `static` (calibrated), `dynamic` (at run time),
            or `auto` (static where calibration says that it is accurate).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: int = Field(8, ge=2, le=8)
    activations: Literal[8] | None = 8
    ranges: Literal["auto", "static", "dynamic"] = "auto"

    def __str__(self) -> str:
        return f"w{self.weights}" + (f"a{self.activations}" if self.activations else "")

    @property
    def calibrated(self) -> bool:
        """Whether feeds are needed to set ranges."""
        return self.activations is not None and self.ranges != "dynamic"

    @classmethod
    def parse(cls, text: str, ranges: Literal["auto", "static", "dynamic"] = "auto") -> Precision:
        """Read `w8a8`, `w4a8`, `w2a8` or `w8` (weights only).

        Raises:
            RecipeError: The text is not a precision, or its widths are not offered.
        """
        found = re.fullmatch(r"w([2-8])(?:a(\d+))?", text.strip().lower())
        if found is None or found[2] not in (None, "8"):
            raise RecipeError(
                f"unknown precision {text!r}: expected w2..w8 followed by a8, "
                "or by nothing for weights only, e.g. w8a8, w4a8, w4"
            )
        return cls(weights=int(found[1]), activations=8 if found[2] else None, ranges=ranges)
