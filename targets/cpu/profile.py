"""Measures what weighted nodes cost on this machine, by shape and by the kernel that runs them.

One node is timed as it runs inside a model: without the session's overhead and without the
conversions at a model's borders. Time of n + 1 copies less the time of one, divided by n; all
forms of a shape take turns in one process, on one thread, and the least time of each counts, so
that a busy machine disturbs them little and all alike. An integer kernel's time leaves out the
quantizing of its input, which several nodes may share; a block-wise one does that by itself.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...compiler.capability import Capability
from ...compiler.choices import Choice
from ...compiler.contract import Progress, silent
from ...compiler.cost_table import FLOAT, Key
from ...compiler.costs import Workload
from ...compiler.errors import UnsupportedError
from ...compiler.formats import Format, PerBlock
from .kernels import INT8, Kernels, feed_of, kernels_of

# Above this many float32 bytes a weight is not timed: its copies would take too much memory.
LARGEST = 3 << 26

# Copies of a kernel beside the first one: enough to take so many seconds, and not more bytes.
SPAN = 4e-3
MOST_COPIES = 15
MOST_BYTES = 1 << 26

# Turns go on for so many seconds a workload, and again while a form's time has not settled.
BUDGET = 0.4
LEAST_TURNS = 6
MOST_TURNS = 100
ATTEMPTS = 5
TOLERANCE = 0.05

# A kernel on one thread runs in the thread that calls it. What the thread waits for a busy CPU is
# no cost of the kernel; elsewhere than on Linux that clock is too coarse.
clock = time.thread_time if sys.platform == "linux" else time.perf_counter


def form_of(choice: Choice, op_type: str = "MatMul") -> str:
    """Return the form of the kernel that runs a choice: `float`, `int8` or a block-wise format.

    A weight of one scale a channel is cast to the kernel's type at load, however narrow it is
    stored. Beside float activations that type is float; only an embedding stays in codes.
    """
    if choice.format is None:
        return FLOAT
    if choice.activation != FLOAT:
        return INT8
    if isinstance(choice.format.granularity, PerBlock):
        return str(choice.format).removeprefix("u")  # zero points take no time of their own
    return INT8 if op_type == "Gather" else FLOAT


def forms_of(workload: Workload, capability: Capability) -> list[str]:
    """Return the forms that the workload can run in, `float` first."""
    op_type = workload.op_type
    rows = capability.rows_of(op_type)
    embedding = [r for r in capability.widened if r.op_type == op_type == "Gather"]
    integer = [INT8] if any(INT8 in row.weights for row in (*rows, *embedding)) else []
    inner = len(workload.weight) - 2
    blocked = [
        str(Format(dtype, PerBlock(inner, size)))
        for row in capability.widened
        if row.op_type == op_type and "per_block" in row.granularity and inner == 0
        for dtype in row.weights
        if not dtype.startswith("u")
        for size in row.blocks
        if workload.weight[inner] % size == 0
    ]
    return [FLOAT, *integer, *blocked]


def measure(
    workloads: Sequence[Workload],
    capability: Capability,
    folder: Path,
    progress: Progress = silent,
) -> dict[Key, float]:
    """Return the seconds of one call on one thread for every form of every workload.

    Args:
        workloads: What to time. One whose float weight exceeds 192 MiB is left out: the nearest
            tell of it.
        capability: This target's, for this machine.
        folder: An existing folder for the models; nothing stays in it.
        progress: Shows the steps.

    Raises:
        UnsupportedError: onnxruntime refuses a workload, or no time could be told from noise.
    """
    small = [w for w in dict.fromkeys(workloads) if 4 * math.prod(w.weight) <= LARGEST]
    found: dict[Key, float] = {}
    for workload in progress(small, "profile", len(small)):
        timed = [
            (form, _Timed(kernels_of(workload, form, capability, folder), workload, folder))
            for form in forms_of(workload, capability)
        ]
        _take_turns([one for _, one in timed], workload)
        # Four digits are more than the clock is good for.
        found |= {(workload, form): float(f"{one.seconds:.4g}") for form, one in timed}
    return found


class _Timed:
    """One form of a workload, loaded with one copy of its kernel and with several.

    Args:
        kernels: What to time.
        workload: What its input is made for.
        folder: Where models lie while they are loaded.
    """

    def __init__(self, kernels: Kernels, workload: Workload, folder: Path) -> None:
        self._kernels, self._workload, self._folder = kernels, workload, folder
        self._one = self._load(1)
        self._most = MOST_BYTES // max(kernels.bytes, 1)
        alone = max(min(self._one() for _ in range(3)), 1e-7)
        self._resize(min(math.ceil(SPAN / alone), MOST_COPIES))

    def _load(self, count: int) -> Callable[[], float]:
        """Open a model of so many copies; the callable runs it once and returns the seconds."""
        return _loaded(self._kernels.copies(count), self._workload, self._folder)

    def _resize(self, more: int) -> None:
        """Load so many copies beside the first, as far as memory allows; forget all times."""
        # One big weight takes so long that the session's overhead does not count.
        self.more = min(more, self._most)
        self._many = self._load(self.more + 1) if self.more else None
        self._least = [[math.inf, math.inf], [math.inf, math.inf]]

    def add_copies(self) -> None:
        """Double the copies."""
        self._resize(2 * self.more)

    def turn(self, half: int) -> None:
        """Run both models; the times count for one half of the turns, 0 or 1."""
        least = self._least[half]
        for _ in range(2):
            least[0] = min(least[0], self._one())
            least[1] = min(least[1], self._many()) if self._many is not None else 0.0

    def _time_of_copy(self, one: float, many: float) -> float:
        """Return the time of one copy from that of one and that of one and some more."""
        return (many - one) / self.more if self.more else one

    @property
    def seconds(self) -> float:
        """Time of one copy so far; not positive where noise exceeds it."""
        return self._time_of_copy(*(min(pair) for pair in zip(*self._least, strict=True)))

    @property
    def settled(self) -> bool:
        """Whether both halves of the turns say the same, and that it takes time."""
        first, second = (self._time_of_copy(*least) for least in self._least)
        return self.seconds > 0 and abs(first - second) <= TOLERANCE * self.seconds


def _take_turns(timed: Sequence[_Timed], workload: Workload) -> None:
    """Run all forms in turns until each has settled, or for as long as is reasonable.

    Raises:
        UnsupportedError: A form has no positive time.
    """
    for attempt in range(ATTEMPTS):
        for one in timed:
            if attempt and one.seconds <= 0:
                one.add_copies()
        end = time.perf_counter() + BUDGET
        for turn in range(MOST_TURNS):
            for one in timed:
                one.turn(turn % 2)
            if turn + 1 >= LEAST_TURNS and time.perf_counter() >= end:
                break
        if all(one.settled for one in timed):
            return
    if any(one.seconds <= 0 for one in timed):
        raise UnsupportedError(
            f"cannot time {workload} on this machine: its time stayed below the noise of "
            f"{ATTEMPTS} measurements; stop other programs and profile again"
        )


def _loaded(model: Any, workload: Workload, folder: Path) -> Callable[[], float]:
    """Open an onnx.ModelProto as it is; the callable runs it once and returns the seconds."""
    import onnxruntime

    from ...compiler.session import open_session, session_options

    path = folder / "timed.onnx"
    options = session_options()
    # It has been optimized already, and is to run as it is.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        path.write_bytes(model.SerializeToString())
        session = open_session(path, options)
    finally:
        path.unlink(missing_ok=True)
    binding = session.io_binding()
    binding.bind_cpu_input("x", feed_of(workload))
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    # From here on all copies write to one place, as layer after layer of a model does.
    place = binding.get_outputs()[0]
    for name in names:
        binding.bind_ortvalue_output(name, place)

    def run() -> float:
        start = clock()
        session.run_with_iobinding(binding)
        return clock() - start

    return run


def _grid() -> Iterator[Workload]:
    """Yield common workloads, with the shapes that integer kernels are bad at among them."""
    square = [(size, size) for size in (128, 384, 768, 1536)]
    for inner, outer in (
        *square,
        (384, 1536),
        (1536, 384),
        (768, 3072),
        (3072, 768),
        (3072, 3072),
    ):
        yield from (Workload("MatMul", (inner, outer), (rows, inner)) for rows in (1, 16, 128))
    for outer, inner in ((10, 64), (384, 384), (1000, 512), (768, 3072)):
        for rows in (1, 16, 128):
            yield Workload("Gemm", (outer, inner), (rows, inner), (("transB", 1),))
    # channels in, channels out, size of the image, kernel, stride, channels of a group
    for shape in (
        *((3, 16, 32, 3, 1, 3), (3, 32, 112, 3, 2, 3), (3, 64, 112, 7, 2, 3)),
        *((16, 16, 32, 3, 1, 16), (32, 32, 16, 3, 1, 32), (64, 64, 8, 3, 1, 64)),
        *((16, 32, 32, 3, 2, 16), (32, 64, 16, 3, 2, 32), (64, 128, 56, 3, 2, 64)),
        *((64, 64, 56, 3, 1, 64), (128, 128, 28, 3, 1, 128), (256, 256, 14, 3, 1, 256)),
        *((128, 256, 28, 3, 2, 128), (256, 256, 7, 3, 1, 256)),
        *((16, 64, 56, 1, 1, 16), (64, 64, 56, 1, 1, 64), (64, 256, 56, 1, 1, 64)),
        *((256, 64, 56, 1, 1, 256), (128, 128, 28, 1, 1, 128), (256, 256, 14, 1, 1, 256)),
        *((256, 256, 7, 1, 1, 256), (32, 16, 56, 1, 1, 32), (64, 128, 56, 1, 2, 64)),
        *((16, 32, 32, 1, 2, 16), (96, 24, 28, 1, 1, 96), (24, 144, 28, 1, 1, 24)),
        *((16, 16, 56, 3, 1, 1), (64, 64, 56, 3, 2, 1), (64, 64, 28, 3, 1, 1)),
        *((128, 128, 28, 3, 2, 1), (144, 144, 28, 3, 1, 1), (256, 256, 14, 3, 1, 1)),
        *((256, 256, 7, 3, 1, 1), (64, 64, 14, 5, 1, 1)),
        *((64, 64, 28, 3, 1, 16), (128, 128, 28, 3, 1, 4), (256, 256, 14, 3, 1, 8)),
    ):
        yield _conv(*shape, rank=2)
    for shape in ((40, 64, 98, 3, 1, 40), (64, 64, 98, 9, 1, 64), (256, 256, 98, 1, 1, 256)):
        yield _conv(*shape, rank=1)
    yield _conv(64, 64, 98, 9, 1, 1, rank=1)
    for inner, outer, size in ((64, 32, 28), (128, 64, 14), (32, 16, 56)):
        yield Workload(
            "ConvTranspose", (inner, outer, 2, 2), (1, inner, size, size), (("strides", (2, 2)),)
        )
    for rows, width, count in (
        (1024, 64, 16),
        (8192, 384, 16),
        (8192, 384, 128),
        (8192, 768, 128),
    ):
        yield Workload("Gather", (rows, width), (1, count))


def _conv(
    inner: int, outer: int, size: int, kernel: int, stride: int, width: int, *, rank: int
) -> Workload:
    """Return a Conv of batch 1 with an odd kernel that keeps the size, but for the stride."""
    attributes: dict[str, Any] = {
        "group": inner // width,
        "pads": (kernel // 2,) * 2 * rank,
        "strides": (stride,) * rank,
    }
    if inner == width:
        del attributes["group"]
    if kernel == 1:
        del attributes["pads"]
    if stride == 1:
        del attributes["strides"]
    return Workload(
        "Conv",
        (outer, width, *(kernel,) * rank),
        (1, inner, *(size,) * rank),
        tuple(attributes.items()),
    )


GRID = tuple(_grid())
