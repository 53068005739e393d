# SPDX-License-Identifier: Apache-2.0
"""The synthetic guest's driver of a virtio-net-pci device in QEMU (virtio 1.2, 4.1)."""

from __future__ import annotations

from ..errors import DaemonError
from . import native
from .frontend import F_VERSION_1
from .memory import RING, Memory, Queue
from .qtest import Machine

VENDOR, DEVICE = 0x1AF4, 0x1041
CAP_VENDOR = 0x09
COMMON, NOTIFY = 1, 2  # VIRTIO_PCI_CAP_*
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
NO_VECTOR = 0xFFFF


class VirtioPci:
    """One pair of queues; the guest polls."""

    def __init__(self, memory: Memory, machine: Machine) -> None:
        self.rx, self.tx = Queue(memory, False, RING), Queue(memory, True, RING)
        self._machine = machine

    def start(self) -> None:
        """Raises DaemonError where the device isn't what it should be."""
        pci = self._machine
        found = pci.config_read(0)
        if found != DEVICE << 16 | VENDOR:
            raise DaemonError(f"QEMU's PCI slot holds {found:#010x}, not a modern virtio-net device")
        bars: dict[int, int] = {}
        places: dict[int, int] = {}
        multiplier = 0
        for capability in pci.capabilities():
            if capability.id != CAP_VENDOR:
                continue
            kind, bar = (pci.config_read(capability.offset + at, 1) for at in (3, 4))
            if kind in (COMMON, NOTIFY):
                if bar not in bars:
                    bars[bar] = pci.map_bar(bar)
                places[kind] = bars[bar] + pci.config_read(capability.offset + 8)
            if kind == NOTIFY:
                multiplier = pci.config_read(capability.offset + 16)
        pci.enable()
        common = places[COMMON]

        def status(value: int) -> None:
            pci.write(common + 0x14, value, 1)

        status(0)
        status(ACKNOWLEDGE | DRIVER)
        for half in (0, 1):
            pci.write(common + 0x08, half, 4)
            pci.write(common + 0x0C, F_VERSION_1 >> 32 * half & 0xFFFFFFFF, 4)
        status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        if not pci.read(common + 0x14, 1) & FEATURES_OK:
            raise DaemonError("QEMU's virtio-net device refuses a driver with VERSION_1 alone")
        for index, queue in enumerate((self.rx, self.tx)):
            pci.write(common + 0x16, index, 2)
            pci.write(common + 0x18, queue.num, 2)
            pci.write(common + 0x1A, NO_VECTOR, 2)
            for register, address in ((0x20, queue.desc), (0x28, queue.avail), (0x30, queue.used)):
                pci.write(common + register, address & 0xFFFFFFFF, 4)
                pci.write(common + register + 4, address >> 32, 4)
            queue.ring.kick_addr = places[NOTIFY] + pci.read(common + 0x1E, 2) * multiplier
            queue.ring.kick_value = index
            queue.ring.kick_fd = pci.socket.fileno()
            queue.ring.notifier = native.QTEST16
            pci.write(common + 0x1C, 1, 2)
        status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def calls(self) -> int | None:
        """Not known: without a processor, interrupts go nowhere."""
        return None

    def close(self) -> None:
        """The machine is its owner's."""
