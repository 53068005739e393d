# SPDX-License-Identifier: Apache-2.0
"""Results for the terminal, and as Markdown: one table a kind of workload, one line a mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .model import Figure, ModeResult, Report
from .plan import HIGH, IDLE, IN, LOW, OUT, TCP, TITLES, latency, rate

NONE = "–"


@dataclass(frozen=True)
class Column:
    """One column: where its figures are, and by what they are divided."""

    title: str
    workload: str
    metric: str
    scale: float = 1.0
    digits: int = 2


@dataclass(frozen=True)
class Sheet:
    """One table."""

    title: str
    columns: Sequence[Column]


def sheets(report: Report) -> list[Sheet]:
    """The tables that this report has figures for."""
    sizes = [int(size) for size in report.options.get("sizes", [])]
    ways = [(way, size) for way in (IN, OUT) for size in sizes]

    def per_way(title: str, metric: str, scale: float = 1.0, digits: int = 2) -> Sheet:
        columns = [Column(f"{TITLES[w]} {s} B", rate(w, s), metric, scale, digits) for w, s in ways]
        return Sheet(title, columns)

    found = [
        per_way("million frames a second", "rate", 1e6, 3),
        per_way("cycles a frame, of all that serves the guest", "cycles", 1, 0),
        per_way("instructions a frame", "instructions", 1, 0),
    ]
    for load in (LOW, HIGH):
        per_second = report.options.get("loads", {}).get(load, 0)
        title = f"round trip in µs, {TITLES[load]} ({per_second} frames/s)"
        columns = [Column(p, latency(load), p, 1, 1) for p in ("p50", "p99", "p99.9")]
        found.append(Sheet(title, [*columns, Column("lost, %", latency(load), "lost", 1, 2)]))
    found += [
        per_way("context switches a frame", "switches", 1, 4),
        per_way("notifications by the guest a frame", "kicks", 1, 4),
        per_way("bytes copied by the data plane for each delivered", "copies by the data plane"),
        Sheet(
            "what a frame of a round trip costs",
            [
                Column(f"{what}, {TITLES[load]}", latency(load), metric, 1, 2)
                for load in (LOW, HIGH)
                for what, metric in (
                    ("CPU %", "cpu"),
                    ("context switches", "switches"),
                    ("notifications", "kicks"),
                    ("interrupts", "interrupts"),
                )
            ],
        ),
        Sheet(
            "idle guest", [Column("CPU, %", IDLE, "cpu", 1, 2), Column("context switches a second", IDLE, "switches")]
        ),
        Sheet("TCP of a User-Mode Linux guest, Gb/s", [Column(TITLES[w], TCP, w) for w in (OUT, IN)]),
    ]
    return [sheet for sheet in found if any(_has(report, column) for column in sheet.columns)]


def _has(report: Report, column: Column) -> bool:
    found = (mode.find(column.workload, column.metric) for mode in report.modes)
    return any(figure is not None and figure.samples for figure in found)


def cell(mode: ModeResult, column: Column) -> str:
    """Median (smallest–largest); the reason where there is none is the row's, or a footnote's."""
    figure = mode.find(column.workload, column.metric)
    return number(figure, column.scale, column.digits) if figure is not None else NONE


def number(figure: Figure, scale: float = 1.0, digits: int = 2) -> str:
    """Median (smallest–largest), or a dash."""
    if figure.median is None or figure.spread is None:
        return NONE
    median, low, high = (f"{value / scale:.{digits}f}" for value in (figure.median, *figure.spread))
    return f"{median} ({low}–{high})" if len(figure.samples) > 1 else median


def footnotes(report: Report) -> Iterator[str]:
    """Why figures are missing, each reason once."""
    reasons: dict[str, list[str]] = {}
    for mode in report.modes:
        for workload, metrics in mode.figures.items():
            for metric, figure in metrics.items():
                if figure.reason and not (metric == "instructions" and figure.reason in report.facts.values()):
                    reasons.setdefault(figure.reason, []).append(f"{mode.title}, {workload} ({metric})")
    for reason, where in reasons.items():
        yield f"{'; '.join(where)}: {reason}"


def missing(report: Report) -> Iterator[tuple[str, str]]:
    """Modes that can't run here, and why."""
    for mode in report.modes:
        if mode.reason:
            yield mode.title, mode.reason


def show(report: Report, console: Console) -> None:
    """Tables, then who isn't in them and why."""
    for sheet in sheets(report):
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        table.add_column("mode")
        for column in sheet.columns:
            table.add_column(column.title, justify="right")
        for mode in report.modes:
            if not mode.reason:
                table.add_row(Text(mode.title), *(cell(mode, column) for column in sheet.columns))
        console.print(table)
    for title, reason in missing(report):
        console.print(Text.assemble((f"{title}: ", "bold"), reason))
    for note in footnotes(report):
        console.print(Text(note))
    repeats = report.options.get("repeat")
    console.print(Text(f"Median of {repeats} repeats (smallest–largest). {report.facts.get('cycles', '')}."))


def markdown(report: Report) -> str:
    """The same, for docs/."""
    lines = [
        f"- {key}: {value}" if key != "command" else f"- command: `{value}`" for key, value in report.facts.items()
    ]
    lines.append(f"- each figure: median of {report.options.get('repeat')} repeats (smallest–largest)")
    for sheet in sheets(report):
        lines += ["", f"## {sheet.title[0].upper()}{sheet.title[1:]}", ""]
        lines.append("| mode | " + " | ".join(column.title for column in sheet.columns) + " |")
        lines.append("|---|" + "---|" * len(sheet.columns))
        for mode in report.modes:
            if not mode.reason:
                lines.append(f"| {mode.title} | " + " | ".join(cell(mode, c) for c in sheet.columns) + " |")
    rows = list(missing(report))
    if rows:
        lines += ["", "## Not here", "", *(f"- {title}: {reason}" for title, reason in rows)]
    notes = list(footnotes(report))
    if notes:
        lines += ["", "## Missing figures", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
