# SPDX-License-Identifier: Apache-2.0
"""The synthetic guest's memory: one memfd from guest physical address 0, with rings and buffers in it.

Buffer i of a ring belongs to its descriptor i for ever. The mapping stays until the process ends or `close`: the native
loop's addresses point into it, so close only when no loop runs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from . import native

RING = 256  # what QEMU gives a guest unless told otherwise
STRIDE = 2048
NET_HEADER = 12  # struct virtio_net_hdr_v1
MEMORY = 64 << 20
FIRST = 1 << 20  # below is what a PC has for itself (option ROMs, the BIOS)
DESC_WRITE = 2
NO_INTERRUPT = 1


class Memory:
    """`size` bytes, guest physical addresses 0 to size - 1."""

    def __init__(self, size: int = MEMORY) -> None:
        self.size = size
        self.fd = os.memfd_create("xdpvhost-compare", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.base = ctypes.addressof(self._anchor)
        self._next = FIRST

    def alloc(self, size: int, align: int = 4096) -> int:
        """Guest physical address of zeroed bytes."""
        start = -(-self._next // align) * align
        if start + size > self.size:
            raise MemoryError(f"the synthetic guest's {self.size >> 20} MiB are used up")
        self._next = start + size
        return start

    def write(self, gpa: int, data: bytes) -> None:
        self.map[gpa : gpa + len(data)] = data

    def close(self) -> None:
        del self._anchor
        self.map.close()
        os.close(self.fd)


class Queue:
    """A split virtqueue with its buffers, all descriptors prepared: to receive, or to send `frame` again and again."""

    def __init__(self, memory: Memory, transmit: bool, num: int = RING) -> None:
        self.memory = memory
        self.num = num
        self.transmit = transmit
        self.desc = memory.alloc(16 * num)
        self.avail = memory.alloc(4 + 2 * num + 2)
        self.used = memory.alloc(4 + 8 * num + 2)
        self.buffers = memory.alloc(STRIDE * num)
        for i in range(num):
            memory.write(self.avail + 4 + 2 * i, i.to_bytes(2, "little"))
        self.ring = native.Ring(
            desc=memory.base + self.desc,
            avail=memory.base + self.avail,
            used=memory.base + self.used,
            buffers=memory.base + self.buffers,
            num=num,
            stride=STRIDE,
            kind=native.SPLIT,
            header=NET_HEADER,
            transmit=transmit,
        )
        self.prepare(b"")
        self.interrupts(False)

    def prepare(self, frame: bytes) -> None:
        """What every buffer to send holds; only before anything is offered."""
        for i in range(self.num):
            gpa = self.buffers + i * STRIDE
            if self.transmit:
                self.memory.write(gpa, bytes(NET_HEADER) + frame)
            length = NET_HEADER + len(frame) if self.transmit else STRIDE
            entry = struct.pack("<QIHH", gpa, length, 0 if self.transmit else DESC_WRITE, 0)
            self.memory.write(self.desc + 16 * i, entry)

    def interrupts(self, wanted: bool) -> None:
        self.memory.write(self.avail, (0 if wanted else NO_INTERRUPT).to_bytes(2, "little"))

    @property
    def room(self) -> int:
        """How many buffers the device may have at a time."""
        return self.num
