# SPDX-License-Identifier: Apache-2.0
"""The kernel plane's maps: the mirror of bpf/steer.h, and what control does with them.

A guest has a slot, a small number that names its sockets and its counters. The host, which has none, counts in a row of
its own before all slots.
"""

from __future__ import annotations

import errno
import mmap
import secrets
import struct
import sys
from collections.abc import Iterable, Iterator

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
ENTRY = struct.Struct("=QI4x")  # struct steer_entry
ENTRIES, PROBES = 1 << 16, 32
EMPTY = 0
GONE = int.from_bytes(MAC.pack(0, b"\x01\0\0\0\0\0"), sys.byteorder)
CONFIG = struct.Struct("=I4xQ")  # struct steer_config
COUNTS = struct.Struct(f"={len(VERDICTS)}Q")  # struct steer_counts
INDEX = struct.Struct("=I")
WORD = (1 << 64) - 1
FACTOR = secrets.randbits(64) | 1  # of this process's programs


def row(nr_queues: int, slot: int | None, queue: int) -> int:
    """STEER_ROW: where (slot, queue) counts; no slot is the host."""
    return ((-1 if slot is None else slot) + 1) * nr_queues + queue


def xsk_index(nr_queues: int, slot: int, queue: int) -> int:
    """STEER_XSK: where the socket of (slot, queue) is."""
    return slot * nr_queues + queue


def size_maps(obj: BpfObject, nr_queues: int) -> None:
    """Before loading: `nr_queues` receive queues, and room for MAX_SLOTS guests on each."""
    obj.map("xsks").set_max_entries(MAX_SLOTS * nr_queues)
    obj.map("verdicts").set_max_entries((MAX_SLOTS + 1) * nr_queues)
    obj.map(".rodata").set_initial(CONFIG.pack(nr_queues, FACTOR))


def hash_of(key: int) -> int:
    """steer_hash."""
    mixed = key * FACTOR & WORD
    return ((mixed ^ mixed >> 32) * 0x9E3779B97F4A7C15 & WORD) >> 48


class AddressTable:
    """The table of addresses, written in place while the program reads it: see bpf/steer.h for the order."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, ENTRIES * ENTRY.size)
        self._keys = memoryview(self._map).cast("Q")  # 64 bits in one store; entry `at` has its key at 2 * at
        self._slots = memoryview(self._map).cast("I")

    def close(self) -> None:
        self._keys.release()
        self._slots.release()
        self._map.close()

    def _window(self, key: int) -> Iterator[int]:
        at = hash_of(key)
        return (at + i & ENTRIES - 1 for i in range(PROBES))

    def _find(self, key: int) -> int | None:
        for at in self._window(key):
            found = self._keys[2 * at]
            if found == EMPTY:
                return None
            if found == key:
                return at
        return None

    def get(self, key: int) -> int | None:
        at = self._find(key)
        return None if at is None else self._slots[4 * at + 2]

    def put(self, key: int, slot: int) -> None:
        """Raises OSError (E2BIG) when the address's part of the table is full."""
        at = self._find(key)
        if at is None:
            at = next((at for at in self._window(key) if self._keys[2 * at] in (EMPTY, GONE)), None)
        if at is None:
            raise OSError(errno.E2BIG, "the XDP program's table of addresses is full")
        self._slots[4 * at + 2] = slot
        self._keys[2 * at] = key

    def drop(self, key: int) -> bool:
        at = self._find(key)
        if at is None:
            return False
        last = self._keys[2 * (at + 1 & ENTRIES - 1)] == EMPTY
        self._keys[2 * at] = EMPTY if last else GONE
        while last and self._keys[2 * (at := at - 1 & ENTRIES - 1)] == GONE:  # nothing follows these now
            self._keys[2 * at] = EMPTY
        return True

    def items(self) -> Iterator[tuple[int, int]]:
        for at in range(ENTRIES):
            key = self._keys[2 * at]
            if key not in (EMPTY, GONE):
                yield key, self._slots[4 * at + 2]


def _key(vlan: int, mac: bytes) -> int:
    return int.from_bytes(MAC.pack(vlan, mac), sys.byteorder)


class SteerMaps:
    """The maps of a loaded object, as one table of who gets what. Every method may raise OSError."""

    def __init__(self, obj: BpfObject, nr_queues: int) -> None:
        self.nr_queues = nr_queues
        self._table = AddressTable(obj.map(".bss").fd)
        self._xsks = obj.map("xsks")
        self._verdicts = obj.map("verdicts")

    def close(self) -> None:
        """Lets go of the mapping; the table stays as long as the program."""
        self._table.close()

    def set_mac(self, vlan: int, mac: bytes, slot: int) -> None:
        self._table.put(_key(vlan, mac), slot)

    def clear_mac(self, vlan: int, mac: bytes) -> bool:
        return self._table.drop(_key(vlan, mac))

    def owner(self, vlan: int, mac: bytes) -> int | None:
        """The slot that has an address."""
        return self._table.get(_key(vlan, mac))

    def macs(self) -> dict[tuple[int, bytes], int]:
        """(VLAN, MAC) -> slot, as the program has it."""
        found: dict[tuple[int, bytes], int] = {}
        for key, slot in self._table.items():
            vlan, mac = MAC.unpack(key.to_bytes(MAC.size, sys.byteorder))
            found[vlan, mac] = slot
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
