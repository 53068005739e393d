# SPDX-License-Identifier: Apache-2.0
"""The driver's side of virtqueues, split and packed (virtio 1.2, 2.7 and 2.8), in shared memory that it allocates.

Written from the specification alone, so that it agrees with the data plane only where both agree with that. A queue
tells the truth, and has the raw pokes that hostile tests need.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4
NO_INTERRUPT = 1  # avail.flags
NO_NOTIFY = 1  # used.flags
PACKED_AVAIL, PACKED_USED = 1 << 7, 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2  # event suppression of packed queues


@dataclass(frozen=True)
class Slot:
    """A memory region as the front-end announces it."""

    gpa: int
    size: int
    user_addr: int
    offset: int

    def pack(self) -> bytes:
        return struct.pack("=QQQQ", self.gpa, self.size, self.user_addr, self.offset)


class GuestMemory:
    """Shared memory in a memfd, as one region or more, with a bump allocator. Addresses are guest physical."""

    def __init__(self, size: int = 4 << 20, gpa: int = 0x4000_0000, user_addr: int = 0x7E00_0000_0000) -> None:
        self.size = size
        self.gpa = gpa
        self.user_base = user_addr
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self._words = memoryview(self.map).cast("H")  # 16 bits in one store, which struct.pack_into does not promise
        self._next = 0

    @property
    def slots(self) -> list[Slot]:
        return [Slot(self.gpa, self.size, self.user_base, 0)]

    def split(self, *cuts: int) -> list[Slot]:
        """The same memory as several adjacent regions, cut at these offsets."""
        edges = [0, *cuts, self.size]
        return [Slot(self.gpa + start, end - start, self.user_base + start, start) for start, end in pairwise(edges)]

    def alloc(self, size: int, align: int = 16) -> int:
        start = -(-self._next // align) * align
        if start + size > self.size:
            raise MemoryError("guest memory is used up")
        self._next = start + size
        return self.gpa + start

    def mark(self) -> int:
        """What `release` takes to forget everything that is allocated from now on."""
        return self._next

    def release(self, mark: int) -> None:
        self._next = mark

    def user(self, gpa: int) -> int:
        return self.user_base + gpa - self.gpa

    def write(self, gpa: int, data: bytes) -> None:
        at = gpa - self.gpa
        self.map[at : at + len(data)] = data

    def read(self, gpa: int, size: int) -> bytes:
        at = gpa - self.gpa
        return self.map[at : at + size]

    def u16(self, gpa: int) -> int:
        return self._words[(gpa - self.gpa) // 2]

    def set_u16(self, gpa: int, value: int) -> None:
        self._words[(gpa - self.gpa) // 2] = value & 0xFFFF

    def close(self) -> None:
        self._words.release()
        self.map.close()
        os.close(self.fd)


@dataclass(frozen=True)
class Buffer:
    """One element of a descriptor chain."""

    gpa: int
    size: int
    writable: bool = False


class VirtQueue(ABC):
    """What both kinds share: memory for three parts, two notifiers, and the chains that the device has.

    `base` is what SET_VRING_BASE takes. `returned` counts the chains that have come back.
    """

    def __init__(self, memory: GuestMemory, size: int, event_idx: bool, in_order: bool, parts: Sequence[int]) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.in_order = in_order
        self.desc, self.avail, self.used = (memory.alloc(part, 4096 if part > 4 else 4) for part in parts)
        for at, part in zip((self.desc, self.avail, self.used), parts, strict=True):
            memory.write(at, bytes(part))
        self.used_bytes = parts[2]
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.chains: dict[int, tuple[list[int], list[Buffer]]] = {}  # by id, oldest first: slots in the table, buffers
        self.returned = 0
        self._fence = threading.Lock()

    @property
    @abstractmethod
    def base(self) -> int: ...

    @property
    @abstractmethod
    def free(self) -> int:
        """Descriptors that are not in use."""

    @abstractmethod
    def add(self, chain: Sequence[Buffer], indirect: bool = False, publish: bool = True) -> int:
        """Makes a chain available; its id."""

    @abstractmethod
    def publish(self, kick: bool = True) -> None:
        """Shows the device what was added since, and kicks if it wants that."""

    @abstractmethod
    def reap(self) -> Iterator[tuple[list[Buffer], int]]:
        """Used chains, oldest first: their buffers and the bytes that the device wrote."""

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def barrier(self) -> None:
        with self._fence:
            pass

    def interrupts(self, timeout: float = 0) -> int:
        """How often the device called since the last time, after waiting up to `timeout` seconds for the first."""
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        return os.eventfd_read(self.call_fd) if poll.poll(timeout * 1000) else 0

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)

    def _come_back(self, last: int, written: int) -> Iterator[tuple[int, list[Buffer], int]]:
        """Id, buffers and bytes written of chain `last`, and of all before it that an in-order device leaves out."""
        if self.in_order:
            for oldest in list(self.chains):
                if oldest == last:
                    break
                buffers = self.chains[oldest][1]
                yield oldest, buffers, sum(buffer.size for buffer in buffers if buffer.writable)
        yield last, self.chains[last][1], written


class Queue(VirtQueue):
    """Split (2.7)."""

    def __init__(self, memory: GuestMemory, size: int = 256, event_idx: bool = False, in_order: bool = False) -> None:
        super().__init__(memory, size, event_idx, in_order, (16 * size, 6 + 2 * size, 6 + 8 * size))
        self.avail_idx = 0
        self.used_idx = 0
        self._free = list(range(size))

    @property
    def base(self) -> int:
        return self.used_idx

    @property
    def free(self) -> int:
        return len(self._free)

    def write_desc(self, index: int, addr: int, length: int, flags: int, following: int, table: int = 0) -> None:
        self.memory.write((table or self.desc) + 16 * index, struct.pack("<QIHH", addr, length, flags, following))

    def push(self, head: int) -> None:
        """Puts a head into the avail ring, without publishing it."""
        self.memory.set_u16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def publish(self, kick: bool = True) -> None:
        old = self.memory.u16(self.avail + 2)
        self.memory.set_u16(self.avail + 2, self.avail_idx)
        if kick and self.wants_kick(old):
            self.kick()

    def wants_kick(self, old: int) -> bool:
        self.barrier()  # between writing avail.idx and reading the device's wish
        if self.event_idx:
            event = self.memory.u16(self.used + 4 + 8 * self.size)
            return (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - old) & 0xFFFF
        return not self.memory.u16(self.used) & NO_NOTIFY

    def add(self, chain: Sequence[Buffer], indirect: bool = False, publish: bool = True) -> int:
        needed = 1 if indirect else len(chain)
        taken = [self._free.pop(0) for _ in range(needed)]
        if indirect:
            table = self.memory.alloc(16 * len(chain))
            self._link(chain, list(range(len(chain))), table)
            self.write_desc(taken[0], table, 16 * len(chain), DESC_INDIRECT, 0)
        else:
            self._link(chain, taken, 0)
        self.chains[taken[0]] = taken, list(chain)
        self.push(taken[0])
        if publish:
            self.publish()
        return taken[0]

    def _link(self, chain: Sequence[Buffer], slots: Sequence[int], table: int) -> None:
        for at, (slot, buffer) in enumerate(zip(slots, chain, strict=True)):
            last = at == len(chain) - 1
            flags = (DESC_WRITE if buffer.writable else 0) | (0 if last else DESC_NEXT)
            self.write_desc(slot, buffer.gpa, buffer.size, flags, 0 if last else slots[at + 1], table)

    def reap(self) -> Iterator[tuple[list[Buffer], int]]:
        while self.used_idx != self.memory.u16(self.used + 2):
            at = self.used + 4 + 8 * (self.used_idx % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            for ident, buffers, bytes_written in self._come_back(head, written):
                self.used_idx = (self.used_idx + 1) & 0xFFFF
                self._free.extend(self.chains.pop(ident)[0])
                self.returned += 1
                yield buffers, bytes_written
            if self.event_idx:
                self.memory.set_u16(self.avail + 4 + 2 * self.size, self.used_idx)

    def skip_to(self, index: int) -> None:
        """Begins at another index than 0; before the device knows the queue."""
        self.avail_idx = self.used_idx = index
        self.memory.set_u16(self.avail + 2, index)
        self.memory.set_u16(self.used + 2, index)


class PackedQueue(VirtQueue):
    """Packed (2.8): one ring of descriptors, which driver and device both write, each with a wrap counter.

    Only a chain's last descriptor has its id (2.8.6); the others get nonsense, which a device must not mind.
    """

    def __init__(self, memory: GuestMemory, size: int = 256, event_idx: bool = False, in_order: bool = False) -> None:
        super().__init__(memory, size, event_idx, in_order, (16 * size, 4, 4))
        self.at, self.wrap = 0, 1  # where the next descriptor is made available
        self.used_at, self.used_wrap = 0, 1  # where the next used one is expected
        self._ids = list(range(size))
        self._taken = 0
        self._hidden: list[tuple[int, int]] = []  # slots and flags of heads that publish() is to show
        self._shown = 0, 1  # the place up to which the device was told
        self._ask()

    @property
    def base(self) -> int:
        place = self.used_at | self.used_wrap << 15
        return place | place << 16

    @property
    def free(self) -> int:
        return self.size - self._taken

    def flags(self, wrap: int) -> int:
        """What says "available" in a lap with this wrap counter (2.8.1)."""
        return PACKED_AVAIL if wrap else PACKED_USED

    def write_desc(self, slot: int, addr: int, length: int, ident: int, table: int = 0) -> None:
        """All of a descriptor but its flags."""
        self.memory.write((table or self.desc) + 16 * slot, struct.pack("<QIH", addr, length, ident & 0xFFFF))

    def write_flags(self, slot: int, flags: int, table: int = 0) -> None:
        self.memory.set_u16((table or self.desc) + 16 * slot + 14, flags)

    def read_flags(self, slot: int) -> int:
        return self.memory.u16(self.desc + 16 * slot + 14)

    def advance(self) -> None:
        self.at += 1
        if self.at == self.size:
            self.at, self.wrap = 0, self.wrap ^ 1

    def add(self, chain: Sequence[Buffer], indirect: bool = False, publish: bool = True) -> int:
        needed = 1 if indirect else len(chain)
        assert needed <= self.free, "the ring is full"
        ident = self._ids.pop(0)
        slots = []
        if indirect:
            table = self.memory.alloc(16 * len(chain))
            for index, buffer in enumerate(chain):
                self.write_desc(index, buffer.gpa, buffer.size, 0, table)
                self.write_flags(index, DESC_WRITE if buffer.writable else 0, table)
            entries = [(table, 16 * len(chain), DESC_INDIRECT)]
        else:
            entries = [(buffer.gpa, buffer.size, DESC_WRITE if buffer.writable else 0) for buffer in chain]
        for index, (addr, length, kind) in enumerate(entries):
            last = index == len(entries) - 1
            self.write_desc(self.at, addr, length, ident if last else 0xDEAD)
            flags = self.flags(self.wrap) | kind | (0 if last else DESC_NEXT)
            if index:
                self.write_flags(self.at, flags)
            else:
                self._hidden.append((self.at, flags))
            slots.append(self.at)
            self.advance()
        self._taken += needed
        self.chains[ident] = slots, list(chain)
        if publish:
            self.publish()
        return ident

    def publish(self, kick: bool = True) -> None:
        # A chain's first flags are written when all else is there (2.8.14); and the first chain's last of all.
        for slot, flags in reversed(self._hidden):
            self.write_flags(slot, flags)
        self._hidden.clear()
        old, self._shown = self._shown, (self.at, self.wrap)
        if kick and self.wants_kick(old):
            self.kick()

    def wants_kick(self, old: tuple[int, int]) -> bool:
        """Whether the device asked to be told of one of the descriptors from `old` on (2.8.10.1)."""
        self.barrier()  # between writing the flags and reading the device's wish
        off_wrap, wish = struct.unpack("<HH", self.memory.read(self.used, 4))
        wish &= 3
        if wish != EVENT_DESC:
            return bool(wish == EVENT_ENABLE)
        place = self._distance(old, (off_wrap & 0x7FFF, off_wrap >> 15))
        return place < self._distance(old, self._shown)

    def _distance(self, start: tuple[int, int], end: tuple[int, int]) -> int:
        """Descriptors from one place to a later one, less than two laps away."""
        laps = 0 if start[1] == end[1] else 1
        return (end[0] - start[0] + laps * self.size) % (2 * self.size)

    def _ask(self) -> None:
        """Asks for an interrupt: always, or at the next used descriptor."""
        if self.event_idx:
            self.memory.set_u16(self.avail, self.used_at | self.used_wrap << 15)
            self.memory.set_u16(self.avail + 2, EVENT_DESC)
        else:
            self.memory.set_u16(self.avail + 2, EVENT_ENABLE)

    def reap(self) -> Iterator[tuple[list[Buffer], int]]:
        while self._is_used():
            _addr, written, ident, _flags = struct.unpack("<QIHH", self.memory.read(self.desc + 16 * self.used_at, 16))
            for back, buffers, bytes_written in self._come_back(ident, written):
                slots = len(self.chains.pop(back)[0])
                self._ids.append(back)
                self._taken -= slots
                self.used_at += slots
                if self.used_at >= self.size:
                    self.used_at, self.used_wrap = self.used_at - self.size, self.used_wrap ^ 1
                self.returned += 1
                yield buffers, bytes_written
            self._ask()

    def _is_used(self) -> bool:
        flags = self.read_flags(self.used_at)
        return bool(flags & PACKED_AVAIL) == bool(flags & PACKED_USED) == bool(self.used_wrap) and bool(self.chains)

    def skip_to(self, slot: int, wrap: int) -> None:
        """Begins at another place than slot 0 of the first lap; before the device knows the queue."""
        for index in range(self.size):
            lap = wrap if index < slot else wrap ^ 1
            self.write_flags(index, PACKED_AVAIL | PACKED_USED if lap else 0)
        self.at = self.used_at = slot
        self.wrap = self.used_wrap = wrap
        self._shown = slot, wrap
        self._ask()
