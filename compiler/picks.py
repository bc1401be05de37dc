"""The form that each weight was given: picked for all alike, or read from a plan; and its note."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from . import notes
from .capability import Capability
from .choices import Activations, Choice, allowed, legal_choices, with_zero_points
from .contract import Decision
from .costs import Cost, Workload, stored_bytes
from .errors import RecipeError
from .formats import PerBlock
from .graph import Weight, readers_of, weights_of
from .regions import container


@dataclass(frozen=True)
class Pick:
    """The form of one weight, what it costs, and why."""

    choice: Choice
    why: str
    loss: float | None = None
    cost: Cost | None = None


Picks = dict[str, Pick]


def uniform(
    model: ir.Model,
    capability: Capability,
    bits: int,
    activations: Activations,
    kept: frozenset[str],
    affine: bool = False,
    block: int = 0,
) -> Picks:
    """Return one width for all weights, but for those whose nodes are all kept by name.

    Args:
        model: The model.
        capability: The target's.
        bits: The width.
        activations: Which kernels are wanted; see `open_weights`.
        kept: Names of nodes that stay float.
        affine: Whether weights have zero points where they may.
        block: Neighbours that share a scale where a block-wise form of that size is legal; 0 takes
            one scale a channel.
    """
    dtype, used = container(bits, capability.weight_bits)
    picks: Picks = {}
    for value in weights_of(model):
        readers = readers_of(value)
        if all(str(reader.node.name) in kept for reader in readers):
            op_type = readers[0].node.op_type
            picks[str(value.name)] = Pick(Choice(), f"{op_type}: kept as asked")
            continue
        every = with_zero_points(legal_choices(readers, capability), affine)
        legal = [
            choice
            for choice in (*_blocks(every, block), *allowed(every, activations))
            if choice.format is not None and choice.format.dtype.removeprefix("u") == dtype
        ]
        if legal:
            form = legal[0].format
            assert form is not None
            choice = Choice(replace(form, bits=used), legal[0].activation)
            picks[str(value.name)] = Pick(choice, _why(readers, choice))
        elif activations == "float":
            picks[str(value.name)] = Pick(Choice(), "no legal weight-only form")
    return picks


def _blocks(legal: Sequence[Choice], size: int) -> list[Choice]:
    """Return the choices with a scale for every `size` neighbours."""
    return [
        choice
        for choice in legal
        if choice.format is not None
        and isinstance(choice.format.granularity, PerBlock)
        and choice.format.granularity.size == size
    ]


def _why(readers: Sequence[Weight], choice: Choice) -> str:
    """Say why a weight has the form that all have."""
    if len({reader.axis for reader in readers}) > 1:
        return "read along two different axes, so one scale serves the whole tensor"
    if readers[0].node.op_type == "Gather":
        return "embedding: one scale a row"
    if choice.activation == "float":
        return "weights only: activations stay float"
    return f"finest legal form of {readers[0].node.op_type}"


def obeyed(model: ir.Model, capability: Capability) -> Picks:
    """Return what the notes say, as a plan that was read has them.

    Raises:
        RecipeError: A weight has no note, or one that is not legal here.
    """
    picks: Picks = {}
    for value in weights_of(model):
        note = notes.read(value)
        legal = legal_choices(readers_of(value), capability)
        if note.mode is None:
            if len(legal) > 1:
                raise RecipeError(
                    f"plan: weight {value.name!r} has no mode; give it static with a format, "
                    "or float"
                )
            continue
        if note.mode == "dynamic" or (note.mode == "static" and note.format is None):
            raise RecipeError(
                f"plan: weight {value.name!r} is {note.mode} with format {note.format}; give it "
                "static with a format, or float"
            )
        choice = Choice() if note.mode == "float" else Choice(note.format, _beside(note, legal))
        if not any(_same_form(choice, other) for other in legal):
            raise RecipeError(
                f"plan: weight {value.name!r} cannot be {choice} on "
                f"{capability.name}; legal: {', '.join(map(str, legal))}"
            )
        picks[str(value.name)] = _from_note(value, note, choice)
    return picks


def _from_note(value: ir.Value, note: notes.Note, choice: Choice) -> Pick:
    """Return the pick with its figures; those of another form than the note's are worked out."""
    losses = note.losses or {}
    loss = 0.0 if choice.format is None else losses.get(str(choice))
    if note.loss is None or loss is None or loss == note.loss:
        # A plan made by hand may name any source; it is only shown.
        cost = Cost(note.bytes or 0, note.seconds, note.cost_source)  # type: ignore[arg-type]
        return Pick(choice, note.why or "by the plan", note.loss, cost)
    work = Workload.of(readers_of(value)[0], ())
    return Pick(choice, "edited in the plan", loss, Cost(stored_bytes(work, choice)))


def stored(model: ir.Model, capability: Capability) -> Picks:
    """Return what a plan says of the weights.

    Raises:
        RecipeError: A weight's form is not legal, or the model's opset cannot store it.
    """
    taken = obeyed(model, capability)
    opset = int(model.graph.opset_imports.get("", 0))
    for name, pick in taken.items():
        dtype = pick.choice.format.container if pick.choice.format is not None else ""
        least = capability.packed.get(dtype, 0)
        if opset < least:
            raise RecipeError(
                f"plan: weight {name!r} cannot be stored in {dtype}: it takes opset {least}, and "
                f"the plan's passes lead to {opset}; write tidy{{opset={least}}} where the plan "
                "says `before`"
            )
    return taken


def closed(readers: Sequence[Weight], kept: frozenset[str]) -> Pick:
    """Return the float form of a weight that is not open, with the reason."""
    node = readers[0].node
    if all(str(reader.node.name) in kept for reader in readers):
        return Pick(Choice(), f"{node.op_type}: kept as asked")
    return Pick(Choice(), f"{node.op_type}: no legal form of the widths asked for")


def write(value: ir.Value, pick: Pick) -> None:
    """Write one weight's note."""
    cost = pick.cost or Cost(0)
    notes.write(
        value,
        format=pick.choice.format,
        activation=pick.choice.activation,
        mode="float" if pick.choice.format is None else "static",
        loss=pick.loss,
        bytes=cost.bytes or None,
        seconds=cost.seconds,
        cost_source=cost.source,
        why=pick.why,
    )


def _beside(note: notes.Note, legal: Sequence[Choice]) -> str:
    """Return what the kernel reads beside a weight: what the note says, or what fits its form."""
    if note.activation is not None:
        return note.activation
    fitting = [c for c in legal if _same_form(Choice(note.format, c.activation), c)]
    return fitting[0].activation if fitting else "float"


def _same_form(asked: Choice, legal: Choice) -> bool:
    """Whether a choice is a legal one, or uses fewer bits of its container at most."""
    if asked.format is None or legal.format is None:
        return asked.format is legal.format
    used = min(asked.format.bits, legal.format.bits)
    fewer = replace(legal.format, bits=used)
    # How the parts are stored is not the kernel's matter, but for tables of floats.
    split = asked.format.split
    if split is not None and split.form in ("codebook", "nearest") and asked.activation != "float":
        return False
    if split is not None and split.form == "int8-grid" and asked.format.stored_bits > 4:
        return False  # int8 itself takes no more
    plain = asked.format.plain
    if split is not None and split.form != "branches":
        # A table holds values: whether they came of codes with a zero point is no longer seen.
        plain = replace(plain, dtype=plain.dtype.removeprefix("u"))
        fewer = replace(fewer, dtype=fewer.dtype.removeprefix("u"))
    return plain == fewer and asked.activation == legal.activation


def told(model: ir.Model, picks: Picks, decision: Decision) -> Decision:
    """Return the decision with the average bits of what was picked."""
    elements = bits = 0
    for value in weights_of(model):
        pick = picks.get(str(value.name))
        if pick is not None and value.const_value is not None:
            elements += value.const_value.size
            bits += value.const_value.size * pick.choice.bits
    known = [pick.cost for pick in picks.values() if pick.cost and pick.cost.seconds is not None]
    sources = sorted({str(cost.source) for cost in known})
    seconds = sum(cost.seconds or 0.0 for cost in known)
    return replace(
        decision,
        average_bits=bits / elements if elements else 0.0,
        predicted_seconds=seconds if len(known) == len(picks) and known else None,
        cost_source=" and ".join(sources) or None,
    )
