"""Measures what each form of each weight costs at the model's outputs, one weight at a time.

Everything else stays float. A chunk of neighbouring weights is one task: the model runs once a
batch for all of them, then only what lies behind a weight runs again for each of its forms. Tasks
are shared out over processes; what is finished is cached, so that a killed run goes on from there.
Source: the one-at-a-time measure of Hubara et al., "Accurate post training quantization with
small calibration sets" (ICML 2021), section 4, on outputs instead of the task's loss.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from . import losses, notes
from .artifact import sha256
from .cache import Cache
from .choices import Choice, Open
from .contract import Context
from .feeds import Feeds, InputSpec, input_specs
from .formats import Format
from .graph import Weight, readers_of
from .model import save
from .observe import with_outputs
from .quantizers import Floats, affine_parameters, dequantize_affine, quantize_affine
from .rounding import Clip, rounded, simulated
from .session import Session, open_session, session_options
from .suffix import Cut, cut, suffix
from .weights import opened

Array = npt.NDArray[Any]
Losses = dict[str, dict[str, float]]

CHUNK = 4  # weights of one task
BATCHES = 8  # that samples are cut into at least, where some are held out
WORTH = 10.0  # seconds of work that are worth starting processes for
REVISION = 1  # of this measure; part of the cache's key


@dataclass(frozen=True)
class Task:
    """A chunk of weights to measure, as plain data that another process can take.

    Attributes:
        model: The float model, its notes in its metadata, its weights beside it.
        feeds: Files of one batch each.
        choices: Weight -> the texts of its choices.
        kind: How outputs are compared.
        scale: What the first output holds.
        clip: How weights are rounded.
        container: Container of quantized activations.
    """

    model: Path
    feeds: tuple[Path, ...]
    choices: Mapping[str, tuple[str, ...]]
    kind: losses.Kind
    scale: losses.Scale
    clip: Clip
    container: str


def measured(
    model: ir.Model,
    weights: Sequence[Open],
    context: Context,
    kind: losses.Kind,
    samples: int,
    clip: Clip,
) -> Losses:
    """Return weight -> choice -> loss of the outputs when that weight alone has that form.

    Args:
        model: The float model, with calibrated ranges in its notes.
        weights: What to measure.
        context: Gives feeds, folder, processes and progress.
        kind: `mse` or `kl`.
        samples: How many calibration samples are used, evenly spread; 0 takes all.
        clip: How weights are rounded.
    """
    assert context.feeds is not None
    folder = Path(tempfile.mkdtemp(prefix="sensitivity-", dir=context.folder))
    path = folder / "sensitivity.onnx"
    clone = model.clone()
    notes.to_metadata(clone)
    save(clone, path, external_above=0)
    feeds = spread(context.feeds, samples)
    facts = _facts(path, feeds, kind, clip)
    cache, found = Cache("sensitivity"), Losses()
    missing: dict[str, tuple[str, ...]] = {}
    for one in weights:
        kept = {text: cache.get(_key(facts, one.name, text)) for text in map(str, one.choices)}
        found[one.name] = {text: loss for text, loss in kept.items() if loss is not None}
        if texts := tuple(text for text, loss in kept.items() if loss is None):
            missing[one.name] = texts
    tasks = _tasks(path, missing, feeds, context, clip, kind)
    for result in context.progress(_shared(tasks, context.jobs), "measure weights", len(tasks)):
        for name, by_choice in result.items():
            for text, loss in by_choice.items():
                cache.put(_key(facts, name, text), loss)
            found[name] |= by_choice
    return {one.name: {str(c): found[one.name][str(c)] for c in one.choices} for one in weights}


def _key(facts: dict[str, Any], weight: str, choice: str) -> dict[str, Any]:
    """Return the cache's key for one form of one weight."""
    return {**facts, "weight": weight, "choice": choice}


def spread(feeds: Feeds, samples: int) -> Feeds:
    """Return about so many samples, evenly spread, since files are often sorted by class."""
    every = feeds.count // samples if samples else 1
    # A lone batch of a model that fixes its size cannot be cut.
    return feeds.split(every)[1] if every > 1 and len(feeds.rebatched(1)) > 1 else feeds


def in_batches(feeds: Feeds, samples: int) -> Feeds:
    """Return about so many samples, in enough batches that some can be held out."""
    found = spread(feeds, samples)
    if found.rebatchable and len(found) < BATCHES:
        return found.rebatched(max(1, found.count // BATCHES))
    return found


def _facts(path: Path, feeds: Feeds, kind: losses.Kind, clip: Clip) -> dict[str, Any]:
    """Return everything that a result depends on, beside the weight and its choices."""
    return {
        "revision": REVISION,
        "model": [sha256(file) for file in sorted(path.parent.glob(f"{path.name}*"))],
        "feeds": [feeds.sha256(), feeds.batch],
        "loss": kind,
        "clip": clip,
        "runtime": [onnxruntime.__version__, np.__version__],
        "machine": [platform.machine(), platform.processor()],
    }


def _tasks(
    path: Path,
    missing: Mapping[str, tuple[str, ...]],
    feeds: Feeds,
    context: Context,
    clip: Clip,
    kind: losses.Kind,
) -> list[Task]:
    """Cut the work into chunks, and write the batches that all of them read."""
    if not missing:
        return []
    files = []
    for number, batch in enumerate(feeds):
        files.append(path.with_name(f"sensitivity-{number}.npz"))
        np.savez(files[-1], *map(_plain, batch.values()), allow_pickle=False)
    scale = losses.scale_of(ir.load(path))
    container = context.capability.activation
    names = list(missing)
    chunks = (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
    return [
        Task(path, tuple(files), {n: missing[n] for n in chunk}, kind, scale, clip, container)
        for chunk in chunks
    ]


def _shared(tasks: Sequence[Task], jobs: int) -> Iterator[Losses]:
    """Yield the results as they come; processes are started when the first one says it pays."""
    start = time.perf_counter()
    for number, task in enumerate(tasks):
        left = len(tasks) - number
        spent = time.perf_counter() - start
        if jobs > 1 and number and spent / number * left > WORTH:
            from joblib import Parallel, delayed

            work = Parallel(n_jobs=jobs, return_as="generator_unordered")
            yield from work(delayed(measure)(rest) for rest in tasks[number:])
            return
        yield measure(task)


def measure(task: Task) -> Losses:
    """Measure one chunk; every process runs onnxruntime on one thread."""
    model = ir.load(task.model)
    notes.from_metadata(model)
    by_name = {str(v.name): v for v in model.graph.initializers.values()}
    probes = [
        _Probe(model, readers_of(by_name[name]), texts, task)
        for name, texts in task.choices.items()
    ]
    proto = onnx.load(task.model, load_external_data=False)
    outputs = losses.float_outputs(model)
    wanted = list(dict.fromkeys([*outputs, *(n for p in probes for n in p.reads)]))
    fed = input_specs(model)
    given = {n: _array(by_name[n]) for n in wanted if n in by_name}
    fetched = [n for n in wanted if n not in given and n not in {spec.name for spec in fed}]
    session = _session(with_outputs(proto, model, fetched), task.model, plain=True)
    for file in task.feeds:
        batch = _read(file, fed)
        values = batch | given | dict(zip(fetched, session.run(fetched, batch), strict=True))
        expected = {name: values[name] for name in outputs}
        for probe in probes:
            probe.add(proto, values, expected)
    return {probe.name: probe.losses() for probe in probes}


def _array(value: ir.Value) -> Array:
    """Return an initializer's own array."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _plain(array: Array) -> Array:
    """Return an array as a .npz can hold it: that knows no bfloat16, and would pickle strings."""
    if array.dtype.kind == "V":
        return array.view(f"u{array.dtype.itemsize}")
    return array.astype(str) if array.dtype.kind == "O" else array


def _read(file: Path, fed: Sequence[InputSpec]) -> dict[str, Array]:
    """Return a batch that `_tasks` wrote."""
    with np.load(file, allow_pickle=False) as stored:
        arrays = [stored[f"arr_{number}"] for number in range(len(fed))]
    return {
        spec.name: array.view(spec.dtype) if spec.dtype.kind == "V" else array.astype(spec.dtype)
        for spec, array in zip(fed, arrays, strict=True)
    }


class _Probe:
    """One weight's forms, tried on one batch after the other."""

    def __init__(
        self, model: ir.Model, readers: list[Weight], texts: Sequence[str], task: Task
    ) -> None:
        self.name = str(readers[0].value.name)
        self._task = task
        self._readers = readers
        self._cut: Cut = cut(model, readers)
        self.reads = [
            *self._cut.crossing,
            *(source for source in self._cut.sources.values() if source != self.name),
        ]
        operands = [v for reader in readers for v in reader.node.inputs[:1] if v is not None]
        self._ranges = {str(value.name): notes.read(value) for value in operands}
        with opened(readers[0].value) as array:
            self._float = np.array(array, np.float32)
        self._choices = {text: Choice.parse(text) for text in texts}
        self._stored = {
            text: _kept(self._float, choice.format, task.clip, readers)
            for text, choice in self._choices.items()
            if choice.format is not None
        }
        self._sums = {text: losses.OutputLoss(task.kind, task.scale) for text in texts}
        self._session: Session | None = None

    def add(
        self, proto: onnx.ModelProto, values: Mapping[str, Array], expected: Mapping[str, Array]
    ) -> None:
        """Run what lies behind the weight in each of its forms."""
        arrays = {name: values[name] for name in self.reads} | {self.name: self._float}
        if self._session is None:
            part = suffix(proto, self._cut, arrays)
            self._session = _session(part, self._task.model, plain=False)
        names = [output.name for output in self._session.get_outputs()]
        crossing = {name: arrays[name] for name in self._cut.crossing}
        for text, choice in self._choices.items():
            probes = {
                name: self._form(text, choice, source, arrays[source])
                for name, source in self._cut.sources.items()
            }
            got = dict(zip(names, self._session.run(names, crossing | probes), strict=True))
            # An output that does not depend on the weight is what it was.
            self._sums[text].add(expected, {n: got.get(n, expected[n]) for n in expected})

    def _form(self, text: str, choice: Choice, source: str, array: Array) -> Array:
        """Return the weight in this form, or an activation as its kernel reads it."""
        if source == self.name:
            if choice.format is None:
                return self._float
            return self._stored[text]()
        if choice.activation == "float":
            return array
        return _as_read(array, self._ranges[source], Format(self._task.container))

    def losses(self) -> dict[str, float]:
        """Return choice -> loss over all batches."""
        return {text: one.value for text, one in self._sums.items()}


def _kept(
    values: Floats, format: Format, clip: Clip, readers: Sequence[Weight]
) -> Callable[[], Floats]:
    """Return what gives the rounded weight; codes are kept where they tell it, being smaller."""
    if format.split is None:
        return rounded(values, format, clip, readers).floats
    floats = simulated(values, format, clip, readers)
    return lambda: floats


def _as_read(array: Array, note: notes.Note, format: Format) -> Array:
    """Return an activation after its quantizer; without a range the batch's own is taken."""
    low, high = note.low, note.high
    if low is None or high is None:
        low, high = float(array.min(initial=0)), float(array.max(initial=0))
    scale, zero_point = affine_parameters(low, high, format)
    return dequantize_affine(quantize_affine(array, scale, zero_point, format), scale, zero_point)


def _session(proto: onnx.ModelProto, beside: Path, *, plain: bool) -> Session:
    """Open a model whose weights lie where `beside` has them.

    `plain` switches fusions off: which ones are possible depends on the values that are fetched,
    and no value may depend on which other weights are in the chunk.
    """
    options = session_options()
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.NamedTemporaryFile(dir=beside.parent, suffix=".onnx") as file:
        file.write(proto.SerializeToString())
        file.flush()
        return open_session(Path(file.name), options)
