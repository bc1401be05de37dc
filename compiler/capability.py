"""What a target can run, as data. Passes ask a capability; they never ask for a target's name."""

from __future__ import annotations

from dataclasses import dataclass, field

from .formats import Format, PerAxis, PerBlock, PerTensor

GRANULARITIES = {PerTensor: "per_tensor", PerAxis: "per_axis", PerBlock: "per_block"}


@dataclass(frozen=True)
class Legality:
    """One row: a form of one op that the runtime computes in integers (or unpacks at load).

    Attributes:
        op_type: ONNX operator.
        weights: Legal containers of the constant operand; empty for ops without one.
        activations: Legal containers of the other operands; `float` means that they stay float.
        granularity: Legal granularities of the weight (`per_tensor`, `per_axis`, `per_block`).
        dynamic: Whether the activation's range may be taken at run time.
        float_output: Whether the kernel can write float; otherwise its output must be quantized.
        since: Version of the runtime that this row was measured on.
        blocks: Legal sizes of a block along the axis that the op sums over.
    """

    op_type: str
    weights: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("uint8",)
    granularity: tuple[str, ...] = ()
    dynamic: bool = False
    float_output: bool = False
    since: str = ""
    blocks: tuple[int, ...] = ()

    def takes(self, weight: Format | None, activation: str) -> bool:
        """Whether this row covers a weight format (None: no weight) and activation container."""
        if activation not in self.activations:
            return False
        if weight is None:
            return not self.weights
        kind = GRANULARITIES[type(weight.granularity)]
        if isinstance(weight.granularity, PerBlock) and weight.granularity.size not in self.blocks:
            return False
        return weight.dtype in self.weights and kind in self.granularity


@dataclass(frozen=True)
class Capability:
    """What one target can run.

    Attributes:
        name: The target and the class of machine, for reports only.
        opsets: Least and greatest ONNX opset that the target takes.
        rows: The legal integer forms.
        widened: Forms whose weight is stored in integers and widened to float before the kernel.
        carries: Ops that hand codes on unchanged, so that input and output share one scale.
        fuses: Ops that the runtime folds into the integer op before them.
        activation: Container of quantized activations.
        weight_bits: Used bits of an 8-bit weight (7 where pair sums would saturate).
        static_shapes: Whether every shape must be known.
        float_only: op type -> why the target computes it in float.
        packed: Container -> the least opset that stores it.
        ties_attention: Whether the runtime fuses q, k and v of one attention, so that all three
            must have one form.
        tables: Whether a Gather from a constant table is folded at load, so that a weight of few
            values costs nothing at run time.
    """

    name: str
    opsets: tuple[int, int]
    rows: tuple[Legality, ...]
    widened: tuple[Legality, ...] = ()
    carries: frozenset[str] = frozenset()
    fuses: frozenset[str] = frozenset()
    activation: str = "uint8"
    weight_bits: int = 8
    static_shapes: bool = False
    float_only: dict[str, str] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    ties_attention: bool = False
    tables: bool = False

    def legal(self, op_type: str, weight: Format | None, activation: str) -> Legality | None:
        """Return the row that covers this form, or None."""
        forms = self.widened if activation == "float" else self.rows
        return next(
            (r for r in forms if r.op_type == op_type and r.takes(weight, activation)), None
        )

    def rows_of(self, op_type: str) -> list[Legality]:
        """Return every row of one op."""
        return [row for row in self.rows if row.op_type == op_type]

    def knows(self, op_type: str) -> bool:
        """Whether any integer form of the op is legal, or the op carries codes."""
        return op_type in self.carries or bool(self.rows_of(op_type))

    def why_float(self, op_type: str) -> str:
        """Return the reason that an op has no integer form here."""
        return self.float_only.get(op_type, f"no integer {op_type} on {self.name}")
