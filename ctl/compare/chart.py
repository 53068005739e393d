# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG elements, made by hand: nothing to load, and colours that follow the page's light or dark mode.

`bars`: one bar a mode, its length the median; the line over it goes from the smallest to the largest sample, and each
sample is a dot. `dots`: percentiles of latencies on a logarithmic axis, each with its own line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .model import Figure

WIDTH, LEFT, RIGHT, ROW, TOP, BOTTOM = 450, 144, 62, 24, 6, 22


@dataclass(frozen=True)
class Line:
    """One mode in a plot. `ours`: drawn in the accent colour."""

    label: str
    figure: Figure
    ours: bool


def _text(x: float, y: float, kind: str, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'


def _nice(limit: float) -> float:
    """The smallest of 1, 2, 4, 6, 8 times a power of ten that is not below: a quarter of it is a round number."""
    power = 10.0 ** math.floor(math.log10(limit))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= limit * (1 - 1e-9))


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    if value >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _open(rows: int, title: str) -> str:
    height = TOP + ROW * rows + BOTTOM
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'


def bars(title: str, lines: Sequence[Line], scale: float = 1.0) -> str:
    """Lines without samples have a dash. Values are divided by `scale`."""
    room = WIDTH - LEFT - RIGHT
    largest = max((max(line.figure.samples) for line in lines if line.figure.samples), default=0.0) / scale
    end = _nice(largest) if largest > 0 else 1.0
    base = TOP + ROW * len(lines)
    parts = [_open(len(lines), title)]
    for step in range(5):
        x, value = LEFT + room * step / 4, end * step / 4
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{base}" class="grid"/>')
        parts.append(_text(x, base + 14, "tick", _short(value)))
    for index, line in enumerate(lines):
        y = TOP + ROW * index + ROW / 2
        parts.append(_text(LEFT - 6, y + 4, "label", line.label))
        median, spread = line.figure.median, line.figure.spread
        if median is None or spread is None:
            parts.append(_text(LEFT + 4, y + 4, "value", "–"))
            continue
        at = [LEFT + room * value / scale / end for value in (median, *spread)]
        kind = "ours" if line.ours else "peer"
        parts.append(
            f'<rect x="{LEFT}" y="{y - 7}" width="{max(at[0] - LEFT, 0.5):.1f}" height="14" rx="2" class="{kind}"/>'
        )
        parts.append(f'<line x1="{at[1]:.1f}" y1="{y}" x2="{at[2]:.1f}" y2="{y}" class="spread"/>')
        for sample in line.figure.samples:
            x = LEFT + room * sample / scale / end
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="1.8" class="sample"/>')
        parts.append(_text(max(at[0], at[2]) + 6, y + 4, "value", _short(median / scale)))
    return "".join([*parts, "</svg>"])


def dots(title: str, rows: Sequence[tuple[str, Sequence[Figure], bool]]) -> str:
    """Each row: label, figures in rising order (p50, p99, p99.9), and whether it is ours."""
    room = WIDTH - LEFT - RIGHT
    values = [value for _, figures, _ in rows for figure in figures for value in figure.samples if value > 0]
    low = math.floor(math.log10(min(values))) if values else 0
    high = max(math.ceil(math.log10(max(values))), low + 1) if values else 1

    def at(value: float) -> float:
        return LEFT + room * (math.log10(max(value, 10.0**low)) - low) / (high - low)

    base = TOP + ROW * len(rows)
    parts = [_open(len(rows), title)]
    for power in range(low, high + 1):
        x = at(10.0**power)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{base}" class="grid"/>')
        parts.append(_text(x, base + 14, "tick", _short(10.0**power)))
    for index, (label, figures, ours) in enumerate(rows):
        y = TOP + ROW * index + ROW / 2
        parts.append(_text(LEFT - 6, y + 4, "label", label))
        medians = [figure.median for figure in figures if figure.median is not None]
        if not medians:
            parts.append(_text(LEFT + 4, y + 4, "value", "–"))
            continue
        parts.append(f'<line x1="{at(medians[0]):.1f}" y1="{y}" x2="{at(medians[-1]):.1f}" y2="{y}" class="range"/>')
        for place, figure in enumerate(figures):
            if figure.median is None or figure.spread is None:
                continue
            first, last = (at(value) for value in figure.spread)
            parts.append(f'<line x1="{first:.1f}" y1="{y}" x2="{last:.1f}" y2="{y}" class="spread"/>')
            kind = "ours" if ours else "peer"
            parts.append(f'<circle cx="{at(figure.median):.1f}" cy="{y}" r="5" class="{kind} p{place}"/>')
        parts.append(
            _text(max(at(value) for f in figures for value in f.samples) + 9, y + 4, "value", _short(medians[-1]))
        )
    return "".join([*parts, "</svg>"])
