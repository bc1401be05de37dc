"""Draws a sweep: accuracy against size and against time, a mark for every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .sweep import Front, Point

ON, OFF = "#1f77b4", "#a0a0a0"


def draw(front: Front, path: Path) -> None:
    """Write an SVG; the same front gives the same bytes.

    Args:
        front: The sweep.
        path: Where the .svg goes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with mpl.rc_context({"svg.hashsalt": "fourfold", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.0, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, front, lambda point: point.bytes / 1e6, lambda point: True)
        left.set_xscale("log")
        left.xaxis.set_major_formatter("{x:g}")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_minor_formatter(NullFormatter())
        left.set_xlabel("MB of all files")
        left.set_ylabel(_accuracy(front))
        # Variants of one model take nearly the same time, so their labels would lie on another.
        _panel(right, front, lambda point: point.seconds * 1e3, lambda p: p.name == "source")
        right.set_xlabel("ms a call, batch 1")
        figure.suptitle(
            f"{front.source} on {front.target}: average bits beside each mark, the front in blue"
        )
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "fourfold"})


def _accuracy(front: Front) -> str:
    """Return what the upright axis shows."""
    return next((p.metric for p in front.points if p.metric), "SQNR of the outputs in dB")


def _panel(
    axes: Any,
    front: Front,
    along: Callable[[Point], float],
    labelled: Callable[[Point], bool],
) -> None:
    """Draw accuracy over one quantity; without a metric the source has no height."""
    for number, point in enumerate(front.points):
        height = point.score if point.score is not None else point.sqnr_db
        if height == float("inf"):
            continue
        color = ON if point.front else OFF
        axes.plot(along(point), height, "o", color=color, markersize=6)
        if not labelled(point):
            continue
        label = point.name.removesuffix(" bits")
        # Labels alternate in height, since neighbours may have nearly the same figures.
        place = (0, 8 if number % 2 else 18)
        axes.annotate(
            label, (along(point), height), textcoords="offset points", xytext=place, ha="center"
        )
    axes.margins(x=0.08, y=0.15)
    axes.grid(visible=True, which="both", alpha=0.25)
