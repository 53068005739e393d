# SPDX-License-Identifier: Apache-2.0
"""Results as one page of HTML: plots, tables, reasons. It refers to nothing outside itself."""

from __future__ import annotations

from html import escape

from . import chart, table
from .model import Figure, ModeResult, Report
from .plan import HIGH, LOW, latency

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --panel: #f6f8fa; --line: #d1d9e0; --ours: #0b6bcb;
  --peer: #8c959f; --mark: #1f2328; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --panel: #151b23;
  --line: #3d444d; --ours: #4493f8; --peer: #7d8590; --mark: #f0f6fc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1420px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 4px; }
p, li { max-width: 90ch; } .soft { color: var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 14px; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  max-width: 560px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: 12px 0; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: 4px 10px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.why { white-space: normal; text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: 14px; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; } code { font-size: 13px; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; margin-top: 8px; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11.5px system-ui, sans-serif; fill: var(--ink); }
svg .label { text-anchor: end; } svg .tick { text-anchor: middle; fill: var(--soft); font-size: 10.5px; }
svg .value { font-weight: 600; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .ours { fill: var(--ours); } svg .peer { fill: var(--peer); }
svg .spread { stroke: var(--mark); stroke-width: 1.4; } svg .range { stroke: var(--line); stroke-width: 4; }
svg .sample { fill: var(--mark); opacity: .55; } svg .p1 { opacity: .75; } svg .p2 { opacity: .5; }
"""


def render(report: Report) -> str:
    """The whole page."""
    running = [mode for mode in report.modes if not mode.reason]
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>xdpvhost compare, {escape(report.facts.get('date', ''))}</title><style>{STYLE}</style></head><body>",
        "<h1>Ways to give a guest a network, on one machine</h1>",
        f'<p class="soft">Each figure: median of {report.options.get("repeat")} repeats; the line goes from the '
        "smallest to the largest, the dots are the repeats. Blue: xdpvhost's data plane; grey: the others. "
        "Only ratios within one run mean anything.</p>",
        _facts(report.facts),
        _modes(report),
    ]
    for sheet in table.sheets(report):
        parts.append(f"<h2>{escape(_capital(sheet.title))}</h2>")
        loads = [load for load in (LOW, HIGH) if sheet.columns[0].workload == latency(load)]
        if loads and sheet.columns[0].metric == "p50":
            parts.append(f'<div class="panels">{_latency(sheet, running)}</div>')
        else:
            panels = [_panel(column, running) for column in sheet.columns]
            parts.append(f'<div class="panels">{"".join(panels)}</div>')
        parts.append(f"<details><summary>as a table</summary>{_table(sheet, running)}</details>")
    notes = list(table.footnotes(report))
    if notes:
        parts.append("<h2>Missing figures</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _ours(mode: ModeResult) -> bool:
    return mode.mode.startswith("xdp") or mode.mode == "tap-vhost-user"


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f"<dl>{rows}</dl>"


def _modes(report: Report) -> str:
    rows = []
    for mode in report.modes:
        if mode.reason:
            what = f"not here: {mode.reason}"
        else:
            what = "; ".join(f"{key}: {value}" for key, value in mode.facts.items())
        rows.append(
            f"<tr><td>{escape(mode.title)}</td><td class='why'>{escape(mode.path)}</td>"
            f"<td class='why'>{escape(what)}</td></tr>"
        )
    head = (
        "<tr><th>mode</th><th style='text-align:left'>path of a frame</th><th style='text-align:left'>facts</th></tr>"
    )
    return f'<h2>The modes</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _figure(mode: ModeResult, column: table.Column) -> Figure:
    return mode.find(column.workload, column.metric) or Figure(unit="")


def _panel(column: table.Column, running: list[ModeResult]) -> str:
    lines = [chart.Line(mode.title, _figure(mode, column), _ours(mode)) for mode in running]
    plot = chart.bars(column.title, lines, column.scale)
    return f'<div class="panel"><h3>{escape(column.title)}</h3>{plot}</div>'


def _latency(sheet: table.Sheet, running: list[ModeResult]) -> str:
    percentiles = [column for column in sheet.columns if column.metric.startswith("p")]
    rows = [(mode.title, [_figure(mode, column) for column in percentiles], _ours(mode)) for mode in running]
    title = "p50, p99, p99.9 from left to right, µs, logarithmic"
    plots = [f'<div class="panel"><h3>{escape(title)}</h3>{chart.dots(title, rows)}</div>']
    plots += [_panel(column, running) for column in sheet.columns if column not in percentiles]
    return "".join(plots)


def _table(sheet: table.Sheet, running: list[ModeResult]) -> str:
    head = "".join(f"<th>{escape(column.title)}</th>" for column in sheet.columns)
    rows = []
    for mode in running:
        cells = "".join(f"<td>{escape(table.cell(mode, column))}</td>" for column in sheet.columns)
        rows.append(f"<tr><td>{escape(mode.title)}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr><th>mode</th>{head}</tr>{"".join(rows)}</table></div>'
