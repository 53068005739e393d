# SPDX-License-Identifier: Apache-2.0
"""Who does what, for `status`: guests' pairs and sockets, NIC queues, workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import WorkerLoad
    from .nicport import NicPort
    from .switch import GuestEntry


def of_guest(entry: GuestEntry, workers: int) -> dict[str, Any]:
    """`worker` is what `rebalance` changes; the others follow from it (docs/switch.md)."""
    return {
        "worker": entry.worker,
        "pair_workers": [(entry.worker + pair) % workers for pair in range(entry.max_pairs)],
        "socket_workers": [(entry.worker + queue) % workers for queue in range(len(entry.xsks))],
    }


def of_queues(index: int, nic: NicPort, entries: Iterable[GuestEntry], workers: int) -> list[dict[str, Any]]:
    """Of each queue of a NIC, or of the tap in its place: which workers read it, and how many pairs send on it.

    `readers`: worker to sockets that it reads there, which are as many guests'. A tap's queue has one reader.
    """
    mine = [entry for entry in entries if entry.nic is nic]
    nr_queues = max(1, nic.nr_queues)
    senders = Counter((entry.uplink + pair) % nr_queues for entry in mine for pair in range(entry.max_pairs))
    found = []
    for queue in range(nic.nr_queues):
        readers = Counter((entry.worker + queue) % workers for entry in mine if queue < len(entry.xsks))
        if nic.taps:
            readers = Counter([(index + queue) % workers])
        found.append(
            {
                "queue": queue,
                "readers": {str(worker): readers[worker] for worker in sorted(readers)},
                "sending_pairs": senders[queue],
            }
        )
    return found


def of_workers(loads: Sequence[WorkerLoad], entries: Sequence[GuestEntry]) -> list[dict[str, Any]]:
    """What each did in the last second, and which guests begin with it."""
    return [
        {
            "worker": worker,
            "busy_percent": round(100 * load.busy, 1),
            "packets_per_second": round(load.packets),
            "guests": [entry.name for entry in entries if entry.worker == worker],
        }
        for worker, load in enumerate(loads)
    ]
