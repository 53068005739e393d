# SPDX-License-Identifier: Apache-2.0
"""Which guest goes to which worker so that all have as much to do: a plan, made of loads alone.

A guest's queue pairs and sockets are spread from its base worker on: number i is on worker (base + i) % workers. So a
load is a list of parts, by i, and only the base is chosen.

The plan is longest processing time first: the largest guest goes where the busiest worker stays least busy, then the
next. With guests of one part that is never more than a third above the best there is (Graham 1969). But from scratch
it would move everybody for a hair's breadth, so it only says how even it can get. Where it is nearly that even already,
nothing moves; else guests stay where they are as far as that allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEARLY = 1.1  # times the best: even enough
IDLE = 0.01  # of a worker's time: below that there is nothing to even out


@dataclass(frozen=True)
class Load:
    """A guest's: `parts[i]` is what its pair and socket number i cost, as a share of a worker's time."""

    name: str
    worker: int
    parts: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.parts)


def totals(loads: Sequence[Load], fixed: Sequence[float], bases: Mapping[str, int]) -> list[float]:
    """What each worker has to do: `fixed`, which nobody can move, and the guests with these base workers."""
    found = list(fixed)
    for load in loads:
        _add(found, load, bases[load.name])
    return found


def plan(loads: Sequence[Load], fixed: Sequence[float]) -> dict[str, int]:
    """New base workers of the guests that should move; empty when nothing is gained."""
    now = {load.name: load.worker for load in loads}
    peak = max(totals(loads, fixed, now))
    best = _spread(loads, fixed, 0.0)
    limit = max(totals(loads, fixed, best)) * NEARLY
    if peak <= max(limit, IDLE):
        return {}
    gentle = _spread(loads, fixed, limit)
    chosen = gentle if max(totals(loads, fixed, gentle)) <= limit else best
    return {name: worker for name, worker in chosen.items() if worker != now[name]}


def _spread(loads: Sequence[Load], fixed: Sequence[float], limit: float) -> dict[str, int]:
    """The base worker of each guest. Where it is now is good enough up to `limit`, and always good for an idle one."""
    found = list(fixed)
    bases: dict[str, int] = {}
    for load in sorted(loads, key=lambda load: -load.total):
        here = _peak(found, load, load.worker)
        if not load.total or here <= limit:
            bases[load.name] = load.worker
        else:
            bases[load.name] = min(
                range(len(found)), key=lambda worker: (_peak(found, load, worker), worker != load.worker, worker)
            )
        _add(found, load, bases[load.name])
    return bases


def _add(found: list[float], load: Load, base: int) -> None:
    for i, part in enumerate(load.parts):
        found[(base + i) % len(found)] += part


def _peak(found: Sequence[float], load: Load, base: int) -> float:
    """How busy the busiest of the load's workers would be."""
    with_it = list(found)
    _add(with_it, load, base)
    return max(with_it[(base + i) % len(found)] for i in range(max(1, len(load.parts))))
