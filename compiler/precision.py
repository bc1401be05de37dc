"""How many bits a variant is asked to have: `w8a8`, `w4a8`, `w4` (weights only), or `auto`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .allocate import Goal, Limits
from .errors import RecipeError
from .signals import Signal
from .split_plan import SplitWish

Ranges = Literal["auto", "static", "dynamic"]


class Precision(BaseModel):
    """Widths asked for; a target's recipe turns them into passes.

    Attributes:
        weights: Bits of a weight, where all have one width.
        activations: Bits of an activation; None leaves activations float (weight-only).
        ranges: Where activation ranges come from: `static` (calibrated), `dynamic` (at run time),
            or `auto` (static where calibration says that it is accurate).
        widths: Stored bits that each weight may get, chosen by importance; 32 is float. Empty
            where all have one width.
        signals: What says how important a weight is.
        method: `milp` or `greedy`.
        goal: What is made small under the limits.
        limits: Budgets over all weights together.
        trials: Whole plans that may be measured for one choice.
        split: How narrow weights are split by value before they are rounded, or None.
        planned: Whether a plan that was read is obeyed instead.
        effort: What is done so that outputs stay: 0 nothing that needs data; 1 corrects biases and
            scales; 2 equalizes channels and rounds layers by what they meet (GPTQ); 3 learns
            roundings, then biases and scales, by gradient.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: int = Field(8, ge=2, le=8)
    activations: Literal[8] | None = 8
    ranges: Ranges = "auto"
    widths: tuple[int, ...] = ()
    signals: tuple[Signal, ...] = ("measured",)
    method: Literal["milp", "greedy"] = "milp"
    goal: Goal = "loss"
    limits: Limits = Limits()
    trials: int = Field(12, ge=0)
    split: SplitWish | None = None
    planned: bool = False
    effort: Literal[0, 1, 2, 3] = 0

    def __str__(self) -> str:
        if self.planned:
            return "by plan"
        # A split layout may store more bits than a part has, so the name tells of parts.
        split = f" in {self.split.parts}" if self.split is not None else ""
        if self.widths:
            return f"auto{split}"
        return f"w{self.weights}" + (f"a{self.activations}" if self.activations else "") + split

    @property
    def calibrated(self) -> bool:
        """Whether feeds are needed to set ranges."""
        return self.activations is not None and self.ranges != "dynamic" and not self.planned

    @property
    def narrowest(self) -> int:
        """The fewest stored bits that a weight may get."""
        return min(self.widths) if self.widths else self.weights

    @classmethod
    def parse(cls, text: str, ranges: Ranges = "auto") -> Precision:
        """Read `w8a8`, `w4a8`, `w2a8`, `w8` (weights only) or `auto` (8, 4 or 2 bits each).

        Raises:
            RecipeError: The text is not a precision, or its widths are not offered.
        """
        if text.strip().lower() == "auto":
            return cls(widths=(8, 4, 2), ranges=ranges)
        found = re.fullmatch(r"w([2-8])(?:a(\d+))?", text.strip().lower())
        if found is None or found[2] not in (None, "8"):
            raise RecipeError(
                f"unknown precision {text!r}: expected w2..w8 followed by a8, by nothing for "
                "weights only, e.g. w8a8, w4a8, w4, or auto"
            )
        return cls(weights=int(found[1]), activations=8 if found[2] else None, ranges=ranges)
