# SPDX-License-Identifier: Apache-2.0
"""What the workers do, and for which guest: two looks at the counters, and what happened in between.

A worker's busy cycles are measured; whose they were is not. They are shared out by frames and bytes of what the worker
had from each guest's rings and sockets: a frame counts 1, and its bytes as much again when it is a full one. That is
near enough to choose who moves, and no figure to charge anybody with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .rebalance import Load

if TYPE_CHECKING:
    from .datapath import Datapath
    from .hostport import HostPort
    from .nicport import NicPort
    from .switch import GuestEntry, Switch

FULL_FRAME = 1500.0  # bytes


@dataclass(frozen=True)
class Rates:
    """Of one guest, a second. As the guest sees it: rx is towards it."""

    rx_packets: float
    rx_bytes: float
    tx_packets: float
    tx_bytes: float


@dataclass(frozen=True)
class WorkerLoad:
    """`busy`: the share of the time that went into turns which moved frames. `packets`: frames read, a second."""

    busy: float
    packets: float


WorkerCounts = Sequence[tuple[int, int]]  # busy cycles and frames of each


def worker_counts(dp: Datapath) -> WorkerCounts:
    counters = [dp.worker_counters(worker) for worker in range(dp.workers)]
    return [(worker.cycles_busy, worker.packets) for worker in counters]


def worker_loads(before: WorkerCounts, after: WorkerCounts, seconds: float, cycles_per_second: int) -> list[WorkerLoad]:
    """What the workers did in these seconds."""
    return [
        WorkerLoad((cycles - was[0]) / seconds / cycles_per_second, (packets - was[1]) / seconds)
        for (cycles, packets), was in zip(after, before, strict=True)
    ]


@dataclass(frozen=True)
class Look:
    """The counters at one moment."""

    when: float  # seconds
    workers: WorkerCounts
    guests: Mapping[GuestEntry, tuple[tuple[float, ...], tuple[int, ...]]]  # weights by part; sums as in Rates
    fixed: Mapping[tuple[int, object], float]  # by worker and object: weights of what is nobody's

    @classmethod
    def at(cls, dp: Datapath, switch: Switch) -> Look:
        fixed: dict[tuple[int, object], float] = {}
        for index, nic in enumerate(switch.nics):
            fixed |= _of_nic(index, nic, switch.hosts.get(nic), dp.workers)
        return cls(
            time.monotonic(),
            worker_counts(dp),
            {entry: (_parts(entry), _sums(entry)) for entry in switch.guests.values()},
            fixed,
        )


def _weight(packets: int, size: int) -> float:
    return packets + size / FULL_FRAME


def _of_nic(index: int, nic: NicPort, host: HostPort | None, workers: int) -> dict[tuple[int, object], float]:
    """Sources that stay where they are (datapath/src/snapshot.c says where)."""
    found: dict[tuple[int, object], float] = {}
    if nic.mcast is not None:
        found[index % workers, nic.mcast] = _weight(nic.mcast.counters.packets, nic.mcast.counters.bytes)
    for queue, tap in enumerate([*nic.taps, *([host.tapq] if host else [])]):
        worker = index if host and tap is host.tapq else index + queue
        found[worker % workers, tap] = _weight(tap.counters.rx_packets, tap.counters.rx_bytes)
    for queue, xsk in enumerate(host.xsks if host else ()):
        found[(index + queue) % workers, xsk] = _weight(xsk.counters.packets, xsk.counters.bytes)
    return found


def _parts(entry: GuestEntry) -> tuple[float, ...]:
    """What came out of its socket and its transmit ring of each number."""
    parts = [0.0] * max(entry.max_pairs, len(entry.xsks), 1)
    for pair in range(entry.max_pairs):
        sent = entry.port.tx_counters(pair)
        parts[pair] += _weight(sent.packets, sent.bytes)
    for queue, xsk in enumerate(entry.xsks):
        parts[queue] += _weight(xsk.counters.packets, xsk.counters.bytes)
    if entry.packet is not None:
        parts[0] += _weight(entry.packet.counters.packets, entry.packet.counters.bytes)
    return tuple(parts)


def _sums(entry: GuestEntry) -> tuple[int, ...]:
    rx = [entry.port.rx_counters(pair) for pair in range(entry.max_pairs)]
    tx = [entry.port.tx_counters(pair) for pair in range(entry.max_pairs)]
    return (
        sum(counters.packets for counters in rx),
        sum(counters.bytes for counters in rx),
        sum(counters.packets for counters in tx),
        sum(counters.bytes for counters in tx),
    )


def _rates(before: Sequence[int], after: Sequence[int], seconds: float) -> Rates:
    return Rates(*((now - then) / seconds for now, then in zip(after, before, strict=True)))


@dataclass(frozen=True)
class Measured:
    """What happened between two looks. Guests that were there both times."""

    seconds: float
    workers: list[WorkerLoad]
    guests: list[Load]
    rates: Mapping[str, Rates]
    fixed: list[float]  # share of each worker's time that no guest's move changes


def measure(before: Look, after: Look, cycles_per_second: int) -> Measured:
    """`before` is the earlier look, by some time."""
    seconds = after.when - before.when
    workers = worker_loads(before.workers, after.workers, seconds, cycles_per_second)
    there = [entry for entry in after.guests if entry in before.guests]
    weights = {
        entry: [now - then for now, then in zip(after.guests[entry][0], before.guests[entry][0], strict=True)]
        for entry in there
    }
    of_nobody = [0.0] * len(workers)
    for key, now in after.fixed.items():
        of_nobody[key[0]] += max(0.0, now - before.fixed.get(key, now))
    shared = list(of_nobody)
    for entry in there:
        for i, weight in enumerate(weights[entry]):
            shared[(entry.worker + i) % len(workers)] += weight
    price = [worker.busy / whole if whole else 0.0 for worker, whole in zip(workers, shared, strict=True)]
    guests = [
        Load(
            entry.name,
            entry.worker,
            tuple(weight * price[(entry.worker + i) % len(workers)] for i, weight in enumerate(weights[entry])),
        )
        for entry in there
    ]
    rates = {entry.name: _rates(before.guests[entry][1], after.guests[entry][1], seconds) for entry in there}
    fixed = [
        nobodys * each if whole else worker.busy
        for nobodys, each, whole, worker in zip(of_nobody, price, shared, workers, strict=True)
    ]
    return Measured(seconds, workers, guests, rates, fixed)
