"""Budgets: which ones there are, and what is said of one that is missed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.compiler.budgets import Budgets, hold
from fourfold.compiler.compare import Comparison, Latency
from fourfold.compiler.contract import Decision
from fourfold.compiler.errors import BudgetError
from fourfold.compiler.report import TargetReport

FOLDER = Path("build")


def report(target="cpu", drop=0.5, size=1000, seconds=2e-3, bits=4.0, **changes):
    """Return a report with these figures; the second latency is of a larger batch."""
    fields = {
        "target": target,
        "capability": "a runtime",
        "precision": "auto",
        "recipe": "tidy",
        "file_bytes": size,
        "stored_bits": None,
        "weight_memory": None,
        "decision": Decision("milp", bits),
        "kernels": {},
        "stayed_float": {},
        "accuracy": Comparison(30.0, 1.0, 1.0, 0.1, 0, "top1", 90.0, 90.0 - drop, drop),
        "latency": (Latency(1, 1.0, seconds, 1.0, 5, 1), Latency(8, 1.0, 50.0, 1.0, 5, 1)),
        "verdict": (),
        "passes": (),
        "remarks": (),
        "seconds": 1.0,
    }
    return TargetReport(**(fields | changes))


def missed(budgets, *reports):
    """Return the message of the budget that is missed."""
    with pytest.raises(BudgetError) as error:
        hold(reports, budgets, FOLDER)
    assert error.value.built
    assert BudgetError.exit_code == 3
    return str(error.value)


@pytest.mark.parametrize(
    ("budgets", "any_", "bounds"),
    [
        (Budgets(), False, False),
        (Budgets(drop=0.0), True, False),
        (Budgets(size=1), True, True),
        (Budgets(latency=0.1), True, True),
        (Budgets(average_bits=4.0), True, True),
        (Budgets(drop=1.0, size=1), True, True),
    ],
)
def test_which_budgets_there_are(budgets, any_, bounds):
    assert (budgets.any, budgets.bounds) == (any_, bounds)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (Budgets(drop=0.2), "top1 drops by 0.500, 0.300 more than the budget of 0.2"),
        (Budgets(drop=-1), "top1 drops by 0.500, 1.500 more than the budget of -1"),
        (Budgets(size=999), "1000 bytes, 1 more than the budget of 999"),
        (Budgets(latency=5e-4), "2.000 ms a call, 1.500 ms more than the budget of 0.5 ms"),
        (
            Budgets(average_bits=3.4),
            "4.000 bits a weight on average, 0.600 more than the budget of 3.4",
        ),
    ],
)
def test_a_budget_that_is_missed(budgets, message):
    assert missed(budgets, report()) == f"cpu: {message}; the artifact is in build"


def test_all_that_are_missed_are_told():
    budgets = Budgets(drop=0.2, size=999, latency=1e-3, average_bits=3.0)
    text = missed(budgets, report())
    parts = text.removeprefix("cpu: ").split("; ")
    assert [part.split(",")[0] for part in parts] == [
        "top1 drops by 0.500",
        "1000 bytes",
        "2.000 ms a call",
        "4.000 bits a weight on average",
        "the artifact is in build",
    ]


@pytest.mark.parametrize(
    "budgets",
    [
        Budgets(),
        Budgets(drop=0.5),
        Budgets(size=1000),
        Budgets(latency=2e-3),
        Budgets(average_bits=4.0),
        Budgets(0.5, 1000, 2e-3, 4.0),
    ],
)
def test_a_budget_that_is_just_kept(budgets):
    hold([report()], budgets, FOLDER)


def test_a_variant_that_is_better_than_its_source():
    hold([report(drop=-2.0)], Budgets(drop=-1.0), FOLDER)


def test_rounding_of_the_average_is_no_miss():
    hold([report(bits=4.0 + 1e-9)], Budgets(average_bits=4.0), FOLDER)
    assert "0.010 more" in missed(Budgets(average_bits=4.0), report(bits=4.01))


def test_latency_is_that_of_a_batch_of_one():
    hold([report(seconds=1e-3)], Budgets(latency=1e-3), FOLDER)  # the batch of 8 takes 50 s


def test_the_first_target_that_misses_is_named():
    fine, slow, large = report("a"), report("b", seconds=1.0), report("c", size=10**6)
    assert missed(Budgets(size=5000, latency=0.5), fine, slow, large).startswith("b: ")
    assert missed(Budgets(size=5000), fine, slow, large).startswith("c: ")
    hold([fine, slow, large], Budgets(drop=0.5), FOLDER)
    hold([], Budgets(drop=0.0), FOLDER)


def test_what_was_not_measured_is_not_held():
    blind = report(accuracy=None, latency=(), decision=None)
    hold([blind], Budgets(drop=0.0, latency=1e-9, average_bits=2.0), FOLDER)
    assert "1000 bytes" in missed(Budgets(size=1), blind)
    plain = report(accuracy=Comparison(30.0, 1.0, None, 0.1))  # no metric, so no drop
    hold([plain], Budgets(drop=0.0), FOLDER)


@given(st.floats(-50, 50), st.floats(-50, 50))
def test_a_drop_is_held_to_its_budget(drop, budget):
    if drop <= budget:
        hold([report(drop=drop)], Budgets(drop=budget), FOLDER)
    else:
        missed(Budgets(drop=budget), report(drop=drop))
