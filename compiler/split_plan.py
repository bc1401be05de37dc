"""Decides how one weight is split: the format of its parts and how they are stored."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import onnx_ir as ir

from .capability import Capability
from .choices import Activations, Choice, Open, fineness, open_weights
from .contract import Context
from .costs import Workload, stored_bytes
from .errors import RecipeError, did_you_mean
from .formats import DTYPES, FORMS, Form, Format, Granularity, PerAxis, PerBlock, PerTensor, Split
from .graph import Weight, readers_of, weights_of
from .picks import Pick, Picks
from .selection import cost_of
from .shapes import operand_shapes
from .splitting import Channels, rounded_to

Over = Literal["tensor", "channel", "block"]

KMEANS = 16  # clusters: as many values as an index of four bits names

LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True)
class SplitWish:
    """How weights are to be split; prints as `int8-grid,16,channel,levels=1`.

    Attributes:
        form: How the parts are stored, see `formats.Split`; `auto` is what costs least of those
            that keep the parts' values.
        clusters: Parts of a weight at most.
        over: What one clustering spans: the whole weight, an output channel, or a block of one.
        block: Neighbours in a block.
        levels: Values of a part; 0 takes as many as the format's bits have codes.
        zero: Whether each part's range holds zero also where it need not.
    """

    form: Literal["auto"] | Form = "branches"
    clusters: int = 3
    over: Over = "tensor"
    block: int = 32
    levels: int = 0
    zero: bool = False

    def __str__(self) -> str:
        levels = f",levels={self.levels}" if self.levels else ""
        return f"{self.form},{self.clusters},{self.over}{levels}"

    @property
    def parts(self) -> str:
        """What a weight becomes, for people."""
        return f"{self.clusters} values" if self.levels == 1 else f"{self.clusters} parts"

    @classmethod
    def parse(cls, text: str) -> SplitWish:
        """Read a form, with clusters, span and levels where they are not the paper's.

        `int8-grid`, `codebook,3,channel`, `int8-grid,16,channel,levels=1`; `kmeans` is short for
        `auto,16,channel,levels=1`, a table of 16 values a channel.

        Raises:
            RecipeError: The text is not a split.
        """
        text = text.strip()
        if text == "kmeans":
            return cls("auto", KMEANS, "channel", levels=1)
        found = re.fullmatch(r"([a-z0-9-]+)(?:,(\d+))?(?:,([a-z]+))?(?:,levels=(\d+))?", text)
        form, clusters, over, levels = found.groups() if found else (text, None, None, None)
        for word, known in ((form, ("auto", *FORMS)), (over or "tensor", get_args(Over))):
            if word not in known:
                raise RecipeError(
                    f"--split {text!r}: unknown {word!r}{did_you_mean(word, known)}; expected "
                    "auto, kmeans, branches, codebook, int8-grid or nearest; clusters, span and "
                    "levels may follow, as in codebook,3,channel or int8-grid,16,channel,levels=1"
                )
        wish = cls(
            cast("Form", form),
            int(clusters or 3),
            cast("Over", over or "tensor"),
            levels=int(levels or 0),
        )
        # Refuses what is out of range, and branches with levels.
        Split(
            "branches" if wish.form == "branches" else "codebook",
            wish.clusters,
            levels=wish.levels,
            zero=wish.form == "branches",
        )
        return wish

    def formats(
        self, readers: Sequence[Weight], choice: Choice, capability: Capability
    ) -> tuple[list[Format], str]:
        """Return the formats to choose from, and why the others are none; see `of`."""
        found, reason = [], ""
        for form in self._forms(readers, choice, capability):
            one = replace(self, form=form).of(readers, choice, capability)
            if isinstance(one, Format) and self.form == "auto" and one.stored_bits >= 8:
                reason = f"{one.stored_bits} code bits a weight are no less than int8 has"
            elif isinstance(one, Format):
                found.append(one)
            else:
                reason = one
        if not found and not reason:
            reason = "no table is folded here, and branches have levels of their own"
        return found, reason

    def _forms(
        self, readers: Sequence[Weight], choice: Choice, capability: Capability
    ) -> list[Form]:
        """Return the forms that are open: those that keep the parts' values, or the one asked."""
        if self.form != "auto":
            return [self.form]
        # A lookup copies codes; so does an integer kernel take them.
        codes = choice.activation != "float" or readers[0].node.op_type == "Gather"
        tables: list[Form] = ["int8-grid" if codes else "codebook"]
        return (tables if capability.tables else []) + ([] if self.levels else ["branches"])

    def of(
        self, readers: Sequence[Weight], choice: Choice, capability: Capability
    ) -> Format | str:
        """Return the format of a weight's parts, with the split; or why it is not split.

        Args:
            readers: The weight as its readers see it, at least one.
            choice: What it would be unsplit: an integer format, and what its kernel reads.
            capability: The target's.
        """
        assert choice.format is not None
        assert self.form != "auto"
        plain = choice.format.plain
        refusal = self.refusal(readers) or self._form_refusal(readers, choice, capability)
        if refusal:
            return refusal
        zero = self.form == "branches" or self.zero
        grid = capability.weight_bits if self.form == "int8-grid" else 8
        split = Split(self.form, self.clusters, self.span(readers), self.levels, zero, grid)
        # The kernel takes the difference of code and zero point, which must fit 8 signed bits.
        fits = DTYPES[plain.dtype].bitwidth < 8 or choice.activation == "float"
        dtype = "u" + plain.dtype.removeprefix("u") if fits else plain.dtype
        return Format(dtype, plain.granularity, plain.bits, split)

    def refusal(self, readers: Sequence[Weight]) -> str:
        """Return why a weight of these readers is never split; empty where it may be."""
        others = {r.node.op_type for r in readers} - set(LAYERS)
        if not others:
            return ""
        if self.form != "branches":
            return ""
        return f"{', '.join(sorted(others))} reads it, and a lookup has no branches"

    def span(self, readers: Sequence[Weight]) -> Granularity:
        """Return what one clustering spans, in terms of the weight's axes.

        Readers that see the channels on different axes, and channels with fewer elements than
        clusters, leave the whole weight.
        """
        first = readers[0]
        tensor = first.value.const_value
        assert tensor is not None
        channels = Channels.of(first)
        count = tensor.shape.numpy()[first.axis] * channels.groups
        alike = len({Channels.of(reader) for reader in readers}) == 1
        if self.over == "tensor" or not alike or tensor.size // count < self.clusters:
            return PerTensor()
        if self.over == "channel":
            return PerAxis(first.axis)
        return PerBlock(0 if first.axis else 1, self.block)

    def _form_refusal(
        self, readers: Sequence[Weight], choice: Choice, capability: Capability
    ) -> str:
        """Return why the kernel of a choice cannot take the form; empty where it can."""
        integer = choice.activation != "float"
        if self.form in ("int8-grid", "codebook"):
            return self._table_refusal(readers, choice)
        if self.form == "branches":
            return ""
        if integer:
            return f"its kernel reads {choice.activation}, and the block-wise one reads floats"
        block = rounded_to(Format("uint2", split=Split("nearest")), readers[0])
        assert block is not None
        assert isinstance(block.granularity, PerBlock)
        tensor = readers[0].value.const_value
        assert tensor is not None
        shape = tensor.shape.numpy()
        legal = len(shape) == 2 and all(
            capability.legal(r.node.op_type, block, "float") for r in readers
        )
        if not legal or shape[block.granularity.axis] % block.granularity.size:
            return f"{block} is not legal here for a weight of shape {list(shape)}"
        return ""

    def _table_refusal(self, readers: Sequence[Weight], choice: Choice) -> str:
        """Return why a weight is not stored as a table; empty where it can be."""
        assert choice.format is not None
        split = Split("codebook", self.clusters, self.span(readers), self.levels, self.zero)
        entries = split.entries(choice.format.bits)
        if self.form == "int8-grid":
            much = f"{entries} values take an index of 8 bits, which is as much as int8 itself"
            return much if entries > 16 else ""
        if choice.activation != "float":
            return (
                f"its kernel reads {choice.activation}, and a table of floats makes it a float "
                "kernel; take int8-grid, or weights only"
            )
        if entries > 256:
            return f"{entries} values are no codebook: its index has 8 bits at most"
        work = Workload.of(readers[0], ())
        stored = stored_bytes(work, Choice(replace(choice.format, split=split)))
        floats = stored_bytes(work, Choice())
        too_big = f"indices and tables take {stored} bytes, and its floats {floats}"
        return too_big if stored >= floats else ""


def offered(
    model: ir.Model,
    capability: Capability,
    widths: Sequence[int],
    activations: Activations,
    affine: bool = False,
    wish: SplitWish | None = None,
) -> list[Open]:
    """Return every weight that has a choice, split forms among them where they are wished for.

    Args as for `open_weights`.
    """
    weights = open_weights(model, capability, widths, activations, affine)
    if wish is None:
        return weights
    return [replace(one, choices=_with_splits(one, wish, capability, widths)) for one in weights]


def _with_splits(
    one: Open, wish: SplitWish, capability: Capability, widths: Sequence[int]
) -> tuple[Choice, ...]:
    """Return a weight's choices, and beside each of the narrowest the split ones; float last."""
    whole = [c for c in one.choices if c.format is not None]
    least = min((c.bits for c in whole), default=0)
    more = [
        Choice(format, choice.activation)
        for choice in whole
        if choice.bits == least
        for format in wish.formats(one.readers, choice, capability)[0]
        if format.stored_bits in widths
    ]
    floats = [c for c in one.choices if c.format is None]
    return (*sorted({*whole, *more}, key=fineness), *floats)


def split_picks(
    model: ir.Model,
    taken: Picks,
    wish: SplitWish,
    context: Context,
    remark: Callable[[str, str], None],
) -> Picks:
    """Return the picks, split in the form that costs least, by seconds where they are known.

    Args:
        model: The model.
        taken: One form for each weight, unsplit.
        wish: How weights are to be split.
        context: Knows the target, and what a form costs.
        remark: Called with a weight's name and the reason where it cannot be split.
    """
    homes = {str(value.name): value for value in weights_of(model)}
    found: dict[str, tuple[Open, list[Choice]]] = {}
    for name, pick in taken.items():
        if pick.choice.format is None:
            continue
        readers = readers_of(homes[name])
        formats, reason = wish.formats(readers, pick.choice, context.capability)
        choices = [Choice(format, pick.choice.activation) for format in formats]
        if choices:
            found[name] = Open(homes[name], tuple(readers), tuple(choices)), choices
        else:
            remark(name, f"not split: {reason}")
    several = any(len(choices) > 1 for _, choices in found.values())
    weights = [one for one, _ in found.values()]
    known = several and context.cost is not None
    shapes = operand_shapes(model, weights, context) if known else {}
    made = dict(taken)
    for name, (one, choices) in found.items():
        costs = {choice: cost_of(one, choice, context, shapes) for choice in choices}
        best = min(choices, key=lambda c: (_known(costs[c].seconds), costs[c].bytes))
        made[name] = Pick(best, f"split: {taken[name].why}", None, costs[best])
    return made


def _known(seconds: float | None) -> float:
    """Return a time; one that is not known counts as the longest."""
    return math.inf if seconds is None else seconds
