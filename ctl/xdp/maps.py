# SPDX-License-Identifier: Apache-2.0
"""The kernel plane's maps: the mirror of bpf/steer.h, and what control does with them.

A guest has a slot, a small number that names its sockets and its counters. The host, which has none, counts in a row of
its own before all slots.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from .libbpf import BpfObject

VLAN_NONE = 0
VLAN_ANY = 0xFFFF
VERDICTS = ("redirect", "no_socket", "pass_unicast", "pass_multicast", "short")
HOST_VERDICTS = ("pass_unicast", "pass_multicast", "short")  # the others are a guest's
GUEST_VERDICTS = ("redirect", "no_socket")

MAX_SLOTS = 512
MAX_QUEUES = 64
MAX_MACS = 2 * MAX_SLOTS * 18  # with and without a tag: of the SPEC, of the guest, and 16 others

MAC = struct.Struct("=H6s")  # struct steer_mac
GUEST = struct.Struct("=I")  # struct steer_guest
CONFIG = struct.Struct("=I")  # struct steer_config
COUNTS = struct.Struct(f"={len(VERDICTS)}Q")  # struct steer_counts
INDEX = struct.Struct("=I")


def row(nr_queues: int, slot: int | None, queue: int) -> int:
    """STEER_ROW: where (slot, queue) counts; no slot is the host."""
    return ((-1 if slot is None else slot) + 1) * nr_queues + queue


def xsk_index(nr_queues: int, slot: int, queue: int) -> int:
    """STEER_XSK: where the socket of (slot, queue) is."""
    return slot * nr_queues + queue


def size_maps(obj: BpfObject, nr_queues: int) -> None:
    """Before loading: room for MAX_SLOTS guests on `nr_queues` receive queues."""
    obj.map("guests").set_max_entries(MAX_MACS)
    obj.map("xsks").set_max_entries(MAX_SLOTS * nr_queues)
    obj.map("verdicts").set_max_entries((MAX_SLOTS + 1) * nr_queues)


class SteerMaps:
    """The maps of a loaded object, as one table of who gets what. Every method may raise OSError."""

    def __init__(self, obj: BpfObject, nr_queues: int) -> None:
        self.nr_queues = nr_queues
        self._guests = obj.map("guests")
        self._xsks = obj.map("xsks")
        self._verdicts = obj.map("verdicts")
        self._config = obj.map("config")

    def activate(self) -> None:
        """Tell the program the number of queues: until then it passes everything."""
        self._config.update(INDEX.pack(0), CONFIG.pack(self.nr_queues))

    def set_mac(self, vlan: int, mac: bytes, slot: int) -> None:
        self._guests.update(MAC.pack(vlan, mac), GUEST.pack(slot))

    def clear_mac(self, vlan: int, mac: bytes) -> bool:
        return self._guests.delete(MAC.pack(vlan, mac))

    def owner(self, vlan: int, mac: bytes) -> int | None:
        """The slot that has an address."""
        value = self._guests.lookup(MAC.pack(vlan, mac))
        return None if value is None else int(GUEST.unpack(value)[0])

    def macs(self) -> dict[tuple[int, bytes], int]:
        """(VLAN, MAC) -> slot, as the kernel has it."""
        found: dict[tuple[int, bytes], int] = {}
        for key in list(self._guests.keys()):
            value = self._guests.lookup(key)
            if value is not None:
                vlan, mac = MAC.unpack(key)
                found[vlan, mac] = GUEST.unpack(value)[0]
        return found

    def set_socket(self, slot: int, queue: int, fd: int) -> None:
        self._xsks.update(INDEX.pack(xsk_index(self.nr_queues, slot, queue)), INDEX.pack(fd))

    def clear_socket(self, slot: int, queue: int) -> bool:
        return self._xsks.delete(INDEX.pack(xsk_index(self.nr_queues, slot, queue)))

    def zero(self, slot: int) -> None:
        """A slot's new owner counts from zero."""
        for queue in range(self.nr_queues):
            self._verdicts.clear_percpu(INDEX.pack(row(self.nr_queues, slot, queue)))

    def counts(self, slot: int | None, queue: int) -> dict[str, int]:
        """Frames by verdict, summed over the CPUs."""
        values = self._verdicts.lookup_percpu(INDEX.pack(row(self.nr_queues, slot, queue)))
        sums = [sum(column) for column in zip(*(COUNTS.unpack(value) for value in values), strict=True)]
        names = HOST_VERDICTS if slot is None else GUEST_VERDICTS
        return {name: count for name, count in zip(VERDICTS, sums, strict=True) if name in names}

    def verdicts(self, slots: Iterable[int]) -> dict[tuple[int | None, int, str], int]:
        """(slot or None for the host, queue, verdict) -> frames, for the host and these slots."""
        return {
            (slot, queue, verdict): count
            for slot in (None, *slots)
            for queue in range(self.nr_queues)
            for verdict, count in self.counts(slot, queue).items()
        }
