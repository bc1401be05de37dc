"""Draws a sweep: accuracy against size, a mark for every variant, the front as a line."""

from __future__ import annotations

from pathlib import Path

from .sweep import Front


def draw(front: Front, path: Path) -> None:
    """Write an SVG; the same front gives the same bytes.

    Args:
        front: The sweep.
        path: Where the .svg goes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    first = front.points[0]
    accuracy = "SQNR of the outputs in dB" if first.score is None else first.metric
    with mpl.rc_context({"svg.hashsalt": "fourfold", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        points = [p for p in front.points if first.score is not None or p.name != "source"]
        heights = [p.score if p.score is not None else p.sqnr_db for p in points]
        sizes = [p.bytes / 1e6 for p in points]
        axes.plot(
            [x for x, p in zip(sizes, points, strict=True) if p.front],
            [y for y, p in zip(heights, points, strict=True) if p.front],
            color="#1f77b4",
            linewidth=1,
        )
        for x, y, point in zip(sizes, heights, points, strict=True):
            axes.plot(x, y, "o", color="#1f77b4" if point.front else "#b0b0b0", markersize=5)
            label = f"{point.name}, {point.ratio:.2f}x"
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("MB of all files")
        axes.set_ylabel(str(accuracy))
        axes.set_title(f"{front.source} on {front.target}; times faster at batch 1 beside each")
        axes.grid(visible=True, alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "fourfold"})
