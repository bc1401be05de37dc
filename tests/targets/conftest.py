"""What the tests of targets share: a whole compile, without the driver."""

from collections import namedtuple

import numpy as np
import pytest

from fourfold.compiler.contract import Context
from fourfold.compiler.feeds import input_specs, made_up
from fourfold.compiler.precision import Precision
from fourfold.compiler.recipe import Recipe
from fourfold.compiler.runner import run

Variant = namedtuple("Variant", "model emitted placement runner context rows")


@pytest.fixture
def compiled(tmp_path):
    """`compiled(target, model, "w8a8", feeds=None, passes=None, **options)`: a `Variant`.

    Feeds are made up where none are given; `options` go to assign-bits, `ranges` to the precision.
    """
    count = iter(range(1000))

    def compile_(target, model, precision="w8a8", feeds=None, ranges="auto", **options):
        folder = tmp_path / f"variant-{next(count)}"
        work = tmp_path / f"{folder.name}-work"
        folder.mkdir()
        work.mkdir()
        feeds = feeds or made_up(input_specs(model), seed=0, count=16)
        context = Context(target.capability, work, feeds)
        passes = target.recipe(Precision.parse(precision, ranges)).passes
        if options:
            passes = tuple(
                p.model_copy(update=options) if p.name == "assign-bits" else p for p in passes
            )
        after, rows = run(Recipe(passes), model, context)
        emitted = target.emit(after, folder)
        placement = target.placement(after, emitted.entry)
        return Variant(after, emitted, placement, target.open(emitted.entry), context, rows)

    return compile_


@pytest.fixture
def sqnr():
    """`sqnr(reference, got)`: signal to noise in dB, over all elements."""

    def measure(reference, got):
        noise = np.square(np.float64(reference) - got).sum()
        return float("inf") if noise == 0 else 10 * np.log10(np.square(reference).sum() / noise)

    return measure
