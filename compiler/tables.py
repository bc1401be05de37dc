"""Prints reports, plans and catalogues as tables, and gathers the facts that they show."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .artifact import Artifact
from .contract import Option, Pass, Target
from .formats import Format
from .lookup import load, names
from .report import Report, TargetReport

if TYPE_CHECKING:
    from .sweep import Front


def print_report(console: Console, artifact: Artifact) -> None:
    """Print a column a target beside the source, and below it what a reader must not miss."""
    report = artifact.report
    source = report.source
    console.print(
        f"[bold]{escape(source.name)}[/bold]  opset {source.opset}, {source.nodes} nodes, "
        f"{_size(source.file_bytes)}; {_feeds(report)}"
    )
    table = Table(
        "",
        "source",
        *(f"{r.target} {r.precision}" for r in report.targets),
        box=None,
        pad_edge=False,
    )
    for line in _lines(report):
        table.add_row(*line)
    console.print(table)
    for row in report.targets:
        for sentence in row.verdict:
            console.print(f"[bold red]{escape(row.target)}: {escape(sentence)}[/bold red]")
        for name, why in row.stayed_float.items():
            console.print(f"{escape(row.target)}: {escape(name)} ran in float: {escape(why)}")
    remarks = sum(len(row.remarks) for row in report.targets)
    folder = artifact.folder
    console.print(
        f"{folder}: {remarks} remarks; see `fourfold explain {folder}`",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _feeds(report: Report) -> str:
    """Say what calibrated and what checked."""
    parts = []
    if report.calibration is not None:
        parts.append(f"calibrated on {report.calibration.samples} samples")
    if report.check is None:
        parts.append("NOT CHECKED")
    else:
        kind = "random (no data given)" if report.check.made_up else "held-out"
        kind = kind if report.check.held_out else "the calibration's own"
        parts.append(f"checked on {report.check.samples} {kind} samples")
    return ", ".join(parts)


def _lines(report: Report) -> list[list[str]]:
    """Return the lines of the table: a name, the source's figure, each target's."""
    rows = report.targets
    source = report.source.file_bytes
    lines = [
        [
            "size",
            _size(source),
            *(f"{_size(r.file_bytes)} ({r.file_bytes / source:.0%})" for r in rows),
        ],
        ["stored bits per weight", "", *(_stored(r) for r in rows)],
    ]
    if any(r.decision is not None and r.decision.method != "uniform" for r in rows):
        lines += _decision_lines(rows)
    checked = [r.accuracy for r in rows if r.accuracy is not None]
    if len(checked) < len(rows):
        return lines
    memory = [_size(r.weight_memory) if r.weight_memory is not None else "-" for r in rows]
    lines.append(["weights in memory", "", *memory])
    lines.append(["SQNR of the outputs", "", *(f"{a.sqnr_db:.1f} dB" for a in checked)])
    lines.append(["cosine", "", *(f"{a.cosine:.5f}" for a in checked)])
    if any(a.agreement is not None for a in checked):
        lines.append(["same largest class", "", *(_number(a.agreement, ".1%") for a in checked)])
    if checked[0].metric is not None:
        scores = [f"{a.variant_score:.2f} (drop {a.drop:+.2f})" for a in checked]
        lines.append([checked[0].metric, _number(checked[0].source_score, ".2f"), *scores])
    for index, latency in enumerate(rows[0].latency):
        times = (r.latency[index] for r in rows)
        shown = (f"{t.variant * 1e3:.2f} ms, {t.ratio:.2f}x" for t in times)
        threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
        lines.append(
            [f"batch {latency.batch}, {threads}", f"{latency.source * 1e3:.2f} ms", *shown]
        )
    return lines


def _stored(row: TargetReport) -> str:
    """Return the stored bits of a quantized weight, and of what they consist."""
    found = row.stored_bits
    if found is None:
        return "-"
    tables = f", tables {found.tables:.2f}" if found.tables else ""
    return f"{found.total:.2f} (codes {found.codes:.2f}{tables}, scales {found.scales:.2f})"


def _decision_lines(rows: tuple[TargetReport, ...]) -> list[list[str]]:
    """Return how bits were chosen: the average, the loss that was predicted and measured."""
    average: list[str] = []
    loss: list[str] = []
    time: list[str] = []
    for row in rows:
        decision = row.decision
        if decision is None:
            average, loss, time = [*average, "-"], [*loss, "-"], [*time, "-"]
            continue
        by = f", {decision.method} by {decision.signal}" if decision.signal else ""
        average.append(f"{decision.average_bits:.2f}{by}")
        loss.append(
            f"{_number(decision.predicted_loss, '.3g')} predicted, "
            f"{_number(decision.measured_loss, '.3g')} measured"
        )
        seconds = decision.predicted_seconds
        shown = "-" if seconds is None else f"{seconds * 1e3:.2f} ms ({decision.cost_source})"
        time.append(shown)
    return [
        ["average code bits", "", *average],
        ["calibration loss", "", *loss],
        ["weighted kernels", "", *time],
    ]


def print_front(console: Console, front: Front, out: Path) -> None:
    """Print the points of a sweep; those on the front are bold."""
    console.print(f"[bold]{escape(front.source)}[/bold] on {escape(front.target)}")
    metric = next((p.metric for p in front.points if p.metric is not None), None)
    scores = [metric, "drop"] if metric else []
    heads = ("asked", "got", "size", "ms", "faster", "SQNR", *scores, "front")
    table = Table(*heads, box=None, pad_edge=False)
    for point in front.points:
        scored = (_number(point.score, ".2f"), _number(point.drop, "+.2f")) if metric else ()
        decibels = "inf" if point.sqnr_db == float("inf") else f"{point.sqnr_db:.1f} dB"
        cells = (
            point.name,
            _number(point.average_bits, ".2f"),
            _size(point.bytes),
            f"{point.seconds * 1e3:.2f}",
            f"{point.ratio:.2f}x",
            decibels,
            *scored,
            "*" if point.front else "",
        )
        table.add_row(*map(escape, cells), style="bold" if point.front else None)
    console.print(table)
    console.print(
        f"{out}: front.json, front.svg, plans/; `fourfold compile MODEL --plan {out}/plans/...`",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def print_profile(console: Console, facts: dict[str, Any]) -> None:
    """Print the seconds of every workload's forms, as times faster than float."""
    console.print(
        f"[bold]{escape(facts['machine'])}[/bold] ({facts['isa']}), {escape(facts['runtime'])}, "
        "one thread; times faster than float"
    )
    forms = dict.fromkeys(form for row in facts["workloads"] for form in row["seconds"])
    others = [form for form in forms if form != "float"]
    heads = [re.sub(r" per_block\(\d+,(\d+)\)", r" /\1", form) for form in others]
    table = Table("op", "weight", "input", "float us", *heads, box=None, pad_edge=False)
    for row in facts["workloads"]:
        seconds = row["seconds"]
        ratios = (
            f"{seconds['float'] / seconds[form]:.2f}x" if form in seconds else ""
            for form in others
        )
        details = " ".join(f"{k}={v}" for k, v in row["attributes"].items())
        cells = (
            f"{row['op']} {details}".strip(),
            "x".join(map(str, row["weight"])),
            "x".join(map(str, row["input"])),
            f"{seconds['float'] * 1e6:.1f}",
            *ratios,
        )
        table.add_row(*map(escape, cells))
    console.print(table)


def _number(value: float | None, form: str) -> str:
    """Print a figure, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def _size(count: int) -> str:
    """Print bytes in the unit that suits them (1 kB = 1000 bytes)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def model_facts(path: Path) -> dict[str, Any]:
    """Return what a model file holds, as plain data.

    Raises:
        ModelError: It is no sound model.
    """
    from .graph import weight_of
    from .model import load as load_model

    model = load_model(path)
    graph = model.graph
    types: Counter[str] = Counter()
    for value in graph.initializers.values():
        if value.const_value is not None:
            types[value.const_value.dtype.name.lower()] += value.const_value.nbytes
    weights = sum(1 for node in graph if weight_of(node) is not None)
    return {
        "model": path.name,
        "ir_version": model.ir_version,
        "opsets": dict(graph.opset_imports),
        "inputs": [f"{v.name}: {v.type} {v.shape}" for v in graph.inputs],
        "outputs": [f"{v.name}: {v.type} {v.shape}" for v in graph.outputs],
        "operators": dict(Counter(node.op_type for node in graph.all_nodes()).most_common()),
        "weight_bytes": dict(types),
        "quantizable_layers": weights,
    }


def print_model(console: Console, facts: dict[str, Any]) -> None:
    """Print the facts of a model."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        if isinstance(value, dict):
            shown = ", ".join(
                f"{k or 'ai.onnx'} {_size(v) if key == 'weight_bytes' else v}"
                for k, v in value.items()
            )
        else:
            shown = "\n".join(value) if isinstance(value, list) else str(value)
        table.add_row(f"[bold]{key.replace('_', ' ')}[/bold]", escape(shown))
    console.print(table)


def explanation(
    plan: dict[str, dict[str, Any]], report: TargetReport, part: str
) -> dict[str, Any]:
    """Return the plan, the float kernels and the remarks whose name holds `part`."""
    return {
        "target": report.target,
        "capability": report.capability,
        "recipe": report.recipe,
        "plan": {name: note for name, note in plan.items() if part in name},
        "kernels": report.kernels,
        "stayed_float": report.stayed_float,
        "remarks": [dataclasses.asdict(r) for r in report.remarks if part in r.subject],
    }


def print_explanation(console: Console, facts: dict[str, Any]) -> None:
    """Print a plan and its remarks."""
    target, capability = escape(facts["target"]), escape(facts["capability"])
    console.print(f"[bold]{target}[/bold] on {capability}")
    console.print(f"recipe  {facts['recipe']}", highlight=False, markup=False)
    # With one signal the reason says it all; with several they are there to be compared.
    several = any(len(note.get("importance", {})) > 1 for note in facts["plan"].values())
    heads = ("value", "decision", "range", *(["importance"] if several else []), "why")
    table = Table(*heads, box=None, pad_edge=False)
    for name, note in facts["plan"].items():
        decision = _decided(note) if note.get("mode") != "float" else "float"
        decision += " dynamic" if note.get("mode") == "dynamic" else ""
        range_ = f"{note['low']:.4g} .. {note['high']:.4g}" if note.get("low") is not None else ""
        signals = "\n".join(f"{k} {v:.2g}" for k, v in note.get("importance", {}).items())
        cells = (name, decision, range_, *([signals] if several else []), note.get("why", ""))
        table.add_row(*map(escape, cells))
    console.print(table)
    console.print(
        "kernels " + ", ".join(f"{k} {v}" for k, v in facts["kernels"].items()), highlight=False
    )
    for name, why in facts["stayed_float"].items():
        console.print(f"ran in float: {escape(name)}: {escape(why)}", highlight=False)
    for remark in facts["remarks"]:
        console.print(
            f"{remark['source']}: {escape(remark['subject'])}: {escape(remark['reason'])}",
            highlight=False,
        )


def _decided(note: dict[str, Any]) -> str:
    """Return the format of a value; of a split weight the bits that are stored, not a part's."""
    format = Format.parse(note["format"]) if "format" in note else None
    if format is None or format.split is None:
        return str(format or "float")
    split = format.split
    return (
        f"{format.stored_bits} code bits: {split.form}, {split.parts(format.bits)}, clusters "
        f"{split.over}, ranges {format.granularity}"
    )


def catalogue(kind: Literal["passes", "targets"]) -> list[dict[str, Any]]:
    """Return name, summary and options of every pass or target."""
    contract: type[Option] = Pass if kind == "passes" else Target
    rows = []
    for name in names(kind):
        found = load(contract, name)
        missing = found().missing() if issubclass(found, Target) else None
        rows.append(
            {
                "name": name,
                "summary": inspect.cleandoc(found.__doc__ or "").partition("\n")[0],
                "options": {key: field.default for key, field in found.model_fields.items()},
                "install": f"pip install 'fourfold[{missing}]'" if missing else None,
            }
        )
    return rows


def print_catalogue(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print names, summaries and options with their defaults."""
    table = Table("name", "what it does", "options", box=None, pad_edge=False)
    for row in rows:
        options = " ".join(f"{key}={value!r}" for key, value in row["options"].items())
        summary = row["summary"] + (f" ({row['install']})" if row["install"] else "")
        table.add_row(*map(escape, (row["name"], summary, options)))
    console.print(table)
