# SPDX-License-Identifier: Apache-2.0
"""The synthetic guest's driver of an emulated e1000e in QEMU (Intel's 82574 manual, legacy descriptors)."""

from __future__ import annotations

import struct

from ..errors import DaemonError
from . import native
from .memory import RING, STRIDE, Memory
from .qtest import Machine

VENDOR, DEVICE = 0x8086, 0x10D3
CTRL, STATUS, CTRL_EXT, IMC, RCTL, TCTL, RFCTL = 0x0, 0x8, 0x18, 0xD8, 0x100, 0x400, 0x5008
RX, TX = 0x2800, 0x3800  # base low and high, length, (4 more) head, (4 more) tail
LENGTH, HEAD, TAIL = 0x8, 0x10, 0x18
SET_LINK_UP, LINK_UP, DRIVER_LOADED = 1 << 6, 1 << 1, 1 << 28
RECEIVE = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 15 | 1 << 26  # enable, any address, any group, broadcast, no FCS; 2 KiB
TRANSMIT = 1 << 1 | 1 << 3  # enable, pad
WHOLE_FRAME = 0x0B  # end of packet, add the FCS, report status


class DescriptorRing:
    """What memory.Queue is for virtio: descriptors and their buffers."""

    def __init__(self, memory: Memory, transmit: bool, num: int = RING) -> None:
        self.memory = memory
        self.num = num
        self.transmit = transmit
        self.desc = memory.alloc(16 * num)
        self.buffers = memory.alloc(STRIDE * num)
        self.ring = native.Ring(
            desc=memory.base + self.desc,
            buffers=memory.base + self.buffers,
            num=num,
            stride=STRIDE,
            kind=native.E1000,
            notifier=native.QTEST32,
            transmit=transmit,
        )
        self.prepare(b"")

    @property
    def room(self) -> int:
        """A full ring would look like an empty one."""
        return self.num - 1

    def prepare(self, frame: bytes) -> None:
        """What every buffer to send holds; only before anything is offered."""
        for i in range(self.num):
            gpa = self.buffers + i * STRIDE
            if self.transmit:
                self.memory.write(gpa, frame)
            entry = struct.pack("<QHBBBBH", gpa, len(frame), 0, WHOLE_FRAME if self.transmit else 0, 0, 0, 0)
            self.memory.write(self.desc + 16 * i, entry)

    def interrupts(self, wanted: bool) -> None:
        """They are masked in the device."""


class E1000e:
    """One ring each way; the guest polls."""

    def __init__(self, memory: Memory, machine: Machine) -> None:
        self.rx, self.tx = DescriptorRing(memory, False), DescriptorRing(memory, True)
        self._machine = machine

    def start(self) -> None:
        """Raises DaemonError where the device isn't what it should be."""
        pci = self._machine
        found = pci.config_read(0)
        if found != DEVICE << 16 | VENDOR:
            raise DaemonError(f"QEMU's PCI slot holds {found:#010x}, not an e1000e")
        base = pci.map_bar(0)
        pci.enable()

        def put(register: int, value: int) -> None:
            pci.write(base + register, value, 4)

        put(IMC, 0xFFFFFFFF)
        put(CTRL, pci.read(base + CTRL, 4) | SET_LINK_UP)
        put(CTRL_EXT, pci.read(base + CTRL_EXT, 4) | DRIVER_LOADED)
        put(RFCTL, 0)
        for registers, ring in ((RX, self.rx), (TX, self.tx)):
            put(registers, ring.desc & 0xFFFFFFFF)
            put(registers + 4, ring.desc >> 32)
            put(registers + LENGTH, 16 * ring.num)
            put(registers + HEAD, 0)
            put(registers + TAIL, 0)
            ring.ring.kick_addr = base + registers + TAIL
            ring.ring.kick_fd = pci.socket.fileno()
        put(TCTL, TRANSMIT)
        put(RCTL, RECEIVE)
        if not pci.read(base + STATUS, 4) & LINK_UP:
            raise DaemonError("QEMU's e1000e has no link")

    def calls(self) -> int | None:
        """Not known: they are masked."""
        return None

    def close(self) -> None:
        """The machine is its owner's."""
