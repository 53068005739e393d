# SPDX-License-Identifier: Apache-2.0
"""What a comparison finds: figures with their spread, or the reason why there is none. This is the JSON, too.

A `Figure` has the samples of all repeats and no statistics of its own: median, smallest and largest are made from them
when asked, and written to JSON for readers that don't want to. A figure without samples has a reason. NaN and infinity
are refused where they would come in, so that no output ever has them.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import msgspec

from ..errors import ConfigError

SCHEMA = 1


class Figure(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One quantity of one mode under one workload, measured `len(samples)` times; or why not."""

    unit: str
    samples: list[float] = []
    reason: str = ""
    note: str = ""  # how it was found, where that is not the same for all

    def add(self, value: float) -> None:
        """Raises ValueError for what is no number."""
        if not math.isfinite(value):
            raise ValueError(f"{value} is no measurement")
        self.samples.append(float(value))

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> tuple[float, float] | None:
        return (min(self.samples), max(self.samples)) if self.samples else None


class ModeResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One row. `figures[workload][metric]`; `reason`: why this mode can't run here (then there are no figures)."""

    mode: str
    title: str
    path: str  # what is between NIC and guest
    reason: str = ""
    facts: dict[str, str] = {}
    figures: dict[str, dict[str, Figure]] = {}

    def figure(self, workload: str, metric: str, unit: str) -> Figure:
        """The one there is, or a new one."""
        return self.figures.setdefault(workload, {}).setdefault(metric, Figure(unit=unit))

    def find(self, workload: str, metric: str) -> Figure | None:
        return self.figures.get(workload, {}).get(metric)


class Report(msgspec.Struct, kw_only=True):
    """One run of `xdpvhost compare`."""

    schema: int = SCHEMA
    facts: dict[str, str] = {}  # command, date, machine
    options: dict[str, Any] = {}
    modes: list[ModeResult] = []


def to_json(report: Report) -> bytes:
    """With median, min, max and the number of repeats beside each figure's samples."""
    tree = msgspec.to_builtins(report)
    for mode in tree["modes"]:
        for metrics in mode.get("figures", {}).values():
            for figure in metrics.values():
                samples = figure.get("samples")
                if samples:
                    figure |= {
                        "repeats": len(samples),
                        "median": statistics.median(samples),
                        "min": min(samples),
                        "max": max(samples),
                    }
    return msgspec.json.format(msgspec.json.encode(tree), indent=1) + b"\n"


def from_json(text: bytes) -> Report:
    """Raises ConfigError when it is not such a file."""
    try:
        report = msgspec.json.decode(text, type=Report)
    except msgspec.MsgspecError as exc:
        raise ConfigError(f"this is no result of `xdpvhost compare --json`: {exc}") from exc
    if report.schema != SCHEMA:
        raise ConfigError(f"this result has schema {report.schema}; this version reads {SCHEMA}")
    return report
