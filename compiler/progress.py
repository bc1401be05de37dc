"""Shows long steps to a person: bars with the time left on a terminal, nothing in a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def shown(silent: bool) -> Iterator[Any]:
    """Yield a wrapper for long steps: bars on a terminal, nothing in a log."""
    console = Console(stderr=True)
    if silent or not console.is_terminal:
        from .contract import silent as nothing  # late: it loads onnx_ir, and --help needs none

        yield nothing
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:

        def watch(steps: Iterable[Any], title: str, total: int | None = None) -> Iterator[Any]:
            task = bars.add_task(title, total=total)
            try:
                for step in steps:
                    yield step
                    bars.advance(task)
            finally:
                bars.remove_task(task)

        yield watch
