# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for switch, NIC and data plane that only carry counters: for tests of text and metrics, nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdpvhost.capture.ports import PortCapture
from xdpvhost.config import GuestSpec
from xdpvhost.datapath import (
    Addresses,
    CtrlState,
    NicqCounters,
    PacketCounters,
    RxCounters,
    TapqCounters,
    TxCounters,
    WorkerCounters,
    XskCounters,
)
from xdpvhost.memoryuse import MemoryUse
from xdpvhost.metrics.declared import XSK_STATISTICS
from xdpvhost.pools import Place
from xdpvhost.xdp.maps import GUEST_VERDICTS, HOST_VERDICTS


@dataclass
class FakeCounted:
    """A Nicq, Xsk or PacketPort."""

    counters: Any


class FakePort:
    def __init__(self, name: str, max_pairs: int) -> None:
        self.name = name
        self.max_pairs = max_pairs
        self.ctrl = CtrlState(pairs=1)
        self._rx = [RxCounters() for _ in range(max_pairs)]
        self._tx = [TxCounters() for _ in range(max_pairs)]

    def rx_counters(self, pair: int) -> RxCounters:
        return self._rx[pair]

    def tx_counters(self, pair: int) -> TxCounters:
        return self._tx[pair]


@dataclass(eq=False)  # a key in FakeSwitch.hosts
class FakeNic:
    iface: str = "eth0"
    ifindex: int = 7
    gone: bool = False
    mtu: int = 1500
    nr_queues: int = 2
    umem_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queues = [FakeCounted(NicqCounters()) for _ in range(self.nr_queues)]
        self.taps = [FakeCounted(TapqCounters())]
        self.mcast = FakeCounted(PacketCounters())
        self.changed_verdicts: dict[tuple[int | None, int, str], int] = {}
        self.changed_statistics: dict[tuple[int | None, int], dict[str, int]] = {}

    def verdicts(self) -> dict[tuple[int | None, int, str], int]:
        zero = {
            (slot, queue, verdict): 0
            for slot in (None, *self.slots)
            for queue in range(self.nr_queues)
            for verdict in (HOST_VERDICTS if slot is None else GUEST_VERDICTS)
        }
        return zero | self.changed_verdicts

    def xsk_statistics(self) -> dict[tuple[int | None, int], dict[str, int]]:
        zero = {
            (slot, queue): dict.fromkeys(XSK_STATISTICS, 0)
            for slot in (None, *self.slots)
            for queue in range(self.nr_queues)
        }
        return zero | self.changed_statistics


@dataclass
class FakeEntry:
    spec: GuestSpec
    slot: int
    nic: FakeNic
    connected: bool = False
    reconnects: int = 0
    features: int = 0

    def __post_init__(self) -> None:
        self.name = self.spec.name
        self.port = FakePort(self.name, self.spec.queues)
        self.xsks = [FakeCounted(XskCounters()) for _ in range(self.nic.nr_queues)]
        self.memory_use = MemoryUse(4096, 32768, 0)
        self.protocol_errors: Counter[str] = Counter()
        self.place = Place(self.spec, Addresses(self.spec.mac))
        self.listens_to = self.place.macs
        self.learning: Counter[str] = Counter()
        self.messages: Counter[tuple[str, str]] = Counter()


class FakeDatapath:
    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._counters = [WorkerCounters() for _ in range(workers)]

    def worker_counters(self, worker: int) -> WorkerCounters:
        return self._counters[worker]


class FakeSwitch:
    def __init__(self, *names: str, queues: int = 2) -> None:
        nic = FakeNic(nr_queues=queues, slots=list(range(len(names))))
        self.nics = [nic]
        self.hosts: dict[FakeNic, Any] = {}
        self.captures: dict[int, PortCapture] = {}
        self.guests = {
            name: FakeEntry(
                GuestSpec(name, bytes([0x52, 0x54, 0, 0, 0, slot + 1]), queues, Path(f"/run/xdpvhost/{name}.sock")),
                slot,
                nic,
            )
            for slot, name in enumerate(names)
        }

    def captured(self, port: Any) -> PortCapture:
        return self.captures.setdefault(id(port), PortCapture())
