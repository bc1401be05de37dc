"""From notes and costs to one choice a weight: the items to allocate, and the repair of a plan.

Losses are predicted one weight at a time and added; where that fails, the whole plan is measured
and weights are raised one after the other, the others making room, as long as it helps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from . import notes
from .allocate import Chosen, Goal, Item, Limits, Option, solve, totals
from .choices import Choice, Open
from .contract import Context
from .costs import Cost, Source, Workload, kernels_of, stored_bytes
from .errors import BudgetError, RecipeError, UnsupportedError

WORTH = 0.98  # of the measured loss; what is gained above would not last on other samples
TRUSTED = 1.25  # measured over predicted loss up to which losses are taken to have added up

BY_BLOCK = ("lim", "zd")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """A plan that was chosen and measured.

    Attributes:
        chosen: Option of each item.
        predicted: Its quantities, by name.
        measured: Loss of the whole, or None.
        first: The same before repairs.
        repairs: One line an exchange that helped.
        trials: Plans that were measured.
    """

    chosen: Chosen
    predicted: Mapping[str, float]
    measured: float | None = None
    first: float | None = None
    repairs: tuple[str, ...] = ()
    trials: int = 0


def forms_of(
    weights: Sequence[Open], context: Context, shapes: Shapes
) -> dict[str, dict[str, Cost]]:
    """Return weight -> choice -> what it costs, the time of all readers of the weight together.

    Float is always among them.

    Args:
        weights: Weights with their legal choices.
        context: Knows what a form costs.
        shapes: Node name -> shape of what its weight meets in one call; empty where no time is
            known.
    """
    return {
        one.name: {
            str(choice): cost_of(one, choice, context, shapes)
            for choice in (*one.choices, Choice())
        }
        for one in weights
    }


def cost_of(one: Open, choice: Choice, context: Context, shapes: Shapes) -> Cost:
    """Return what a weight costs in one form; no seconds where no shape or no cost is known."""
    works = [Workload.of(r, shapes.get(str(r.node.name), ())) for r in one.readers]
    size = stored_bytes(works[0], choice)
    if not shapes or context.cost is None:
        return Cost(size)
    costs = [
        context.cost(work, kernel)
        for work, reader in zip(works, one.readers, strict=True)
        for kernel in kernels_of(choice, reader)
    ]
    if any(cost.seconds is None for cost in costs):
        return Cost(size)
    ranks: list[Source] = ["measured", "nearest", "shipped"]
    sources = [cost.source for cost in costs if cost.source is not None]
    weakest = max(sources, key=ranks.index, default=None)
    return Cost(size, sum(cost.seconds or 0.0 for cost in costs), weakest)


def items_of(
    weights: Sequence[Open],
    forms: Mapping[str, Mapping[str, Cost]],
    ties: Mapping[str, str],
    timed: bool,
    machine: str,
    predicted: bool = True,
) -> list[Item]:
    """Return an item for every weight.

    Args:
        weights: Weights with their legal choices and the predicted losses in their notes.
        forms: What they cost.
        ties: Weight -> name of the group that must have one form.
        timed: Whether time is asked for.
        machine: What to call the target in a message.
        predicted: Whether every form needs a predicted loss; else it is 0 where there is none.

    Raises:
        RecipeError: A weight has no predicted losses.
        UnsupportedError: Time is asked for, and nothing is known about a form's.
    """
    items = []
    for one in weights:
        losses = notes.read(one.value).losses or {}
        options = []
        for choice in one.choices:
            loss = 0.0 if choice.format is None else losses.get(str(choice))
            if loss is None and predicted:
                raise RecipeError(
                    f"assign-bits: no predicted loss for {one.name!r} as {choice}; run "
                    "rank-weights before, with the same widths and activations and a signal that "
                    "predicts losses (measured, fisher, activation-weighted, quantization-error)"
                )
            cost = forms[one.name][str(choice)]
            if timed and cost.seconds is None:
                raise UnsupportedError(
                    f"no time is known for {one.name!r} as {choice} on {machine}; run "
                    "`fourfold profile MODEL` on the machine that will run it"
                )
            seconds = cost.seconds if timed else None
            options.append(
                Option(str(choice), choice.bits, loss or 0.0, cost.bytes, seconds or 0.0)
            )
        items.append(Item(one.name, one.elements, tuple(options), ties.get(one.name)))
    return items


def order_of(weights: Sequence[Open], signal: str | None) -> list[list[str]]:
    """Return groups of weights, the least important first, as one signal ranked them.

    `lim` and `zd` rank whole blocks, which move together; ties go by graph order. A weight that
    the signal says nothing of never moves.

    Raises:
        RecipeError: The signal ranked no weight.
    """
    groups: dict[str, list[str]] = {}
    ranks: dict[str, float] = {}
    for one in weights:
        note = notes.read(one.value)
        found = dict(note.importance or {})
        name = signal or next(iter(found), "")
        if name not in found:
            continue
        whole = name in BY_BLOCK and note.block is not None
        group = f"block {note.block}" if whole else one.name
        groups.setdefault(group, []).append(one.name)
        ranks[group] = found[name]
    if not groups:
        raise RecipeError(
            f"assign-bits: no weight has an importance by {signal or 'any signal'}; run "
            "rank-weights with that signal before"
        )
    return [groups[name] for name in sorted(groups, key=ranks.__getitem__)]


def without_slow(
    items: Sequence[Item], floats: Mapping[str, float]
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Drop every form that is slower than float in its layer's own shape; tell which.

    Args:
        items: The weights with their forms' seconds.
        floats: Weight -> seconds of its float kernel; weights that are left out keep all forms.

    Returns:
        The items, and (weight, choice) of every form that was dropped.

    Raises:
        BudgetError: A weight has no form left.
    """
    kept, dropped = [], []
    for item in items:
        limit = floats.get(item.name, float("inf"))
        options = tuple(option for option in item.options if option.seconds <= limit)
        if not options:
            least = min(option.seconds for option in item.options)
            raise BudgetError(
                f"every offered form of {item.name!r} is slower than float: {least * 1e6:.3g} us "
                f"at best against {limit * 1e6:.3g} us; add 32 to the widths, so that it may stay "
                "float"
            )
        dropped += [(item.name, o.choice) for o in item.options if o not in options]
        kept.append(replace(item, options=options))
    return kept, dropped


def repaired(
    items: Sequence[Item],
    goal: Goal,
    limits: Limits,
    chosen: Chosen,
    measure: Callable[[Chosen], float],
    trials: int,
    comparable: bool = True,
) -> Found:
    """Measure a plan as a whole, and repair it greedily where its losses did not add up.

    An exchange raises one weight to its next better form and lets the integer program choose all
    others anew; it stays when the measured loss falls. Weights with the largest predicted loss
    are tried first. A limit on the loss is held to by what was measured. Where bytes or seconds
    are made small and the loss has no limit, nothing is repaired: it would cost what was asked.

    Args:
        items: The weights.
        goal: What is made small.
        limits: The budgets.
        chosen: The plan to begin with.
        measure: Loss of a whole plan on calibration feeds.
        trials: Plans that may be measured, at least 1.
        comparable: Whether predicted losses are of the outputs too; those of a layer's own error
            cannot tell whether they added up, so the plan is always tried to be repaired.
    """
    first = best = measure(chosen)
    used, repairs = 1, []
    if limits.loss is not None:
        chosen, best, used = _within_loss(items, goal, limits, chosen, best, measure, trials)
    elif goal == "loss" and not (comparable and best <= TRUSTED * totals(items, chosen)["loss"]):
        pinned: dict[str, int] = {}
        while used < trials and (step := _exchange(items, goal, limits, chosen, pinned)):
            name, index, trial = step
            used += 1
            loss = measure(trial)
            if loss < WORTH * best:
                repairs.append(f"{name} raised: loss {best:.4g} -> {loss:.4g}")
                chosen, best = trial, loss
                pinned[name] = index
            else:
                pinned[name] = chosen[_place(items, name)]
    return Found(chosen, totals(items, chosen), best, first, tuple(repairs), used)


def _exchange(
    items: Sequence[Item], goal: Goal, limits: Limits, chosen: Chosen, pinned: Mapping[str, int]
) -> tuple[str, int, Chosen] | None:
    """Return the next weight to raise, its new option, and the plan that makes room for it."""
    losses = [item.options[index].loss for item, index in zip(items, chosen, strict=True)]
    for number in sorted(range(len(items)), key=lambda n: -losses[n]):
        item = items[number]
        better = [n for n, option in enumerate(item.options) if option.loss < losses[number]]
        if item.name in pinned or not better:
            continue
        index = max(better, key=lambda n: item.options[n].loss)
        try:
            trial = solve(items, goal, limits, {**pinned, item.name: index})
        except BudgetError:
            continue
        if trial != chosen:
            return item.name, index, trial
    return None


def _within_loss(
    items: Sequence[Item],
    goal: Goal,
    limits: Limits,
    chosen: Chosen,
    loss: float,
    measure: Callable[[Chosen], float],
    trials: int,
) -> tuple[Chosen, float, int]:
    """Lower the limit on the predicted loss until the measured one keeps the budget."""
    assert limits.loss is not None
    allowed, used = limits.loss, 1
    while loss > limits.loss and used < trials:
        allowed *= 0.9 * limits.loss / loss
        try:
            trial = solve(items, goal, replace(limits, loss=allowed))
        except BudgetError:  # nothing is predicted to be so near: what comes nearest is the last
            trial = solve(items, "loss", replace(limits, loss=None))
            if trial == chosen:
                break
        chosen = trial
        loss = measure(chosen)
        used += 1
    if loss > limits.loss:
        raise BudgetError(
            f"the plan's measured loss is {loss:.4g}, {loss - limits.loss:.4g} more than the "
            f"budget of {limits.loss:.4g}, after {used} plans"
        )
    return chosen, loss, used


def _place(items: Sequence[Item], name: str) -> int:
    """Return the number of an item."""
    return next(number for number, item in enumerate(items) if item.name == name)
