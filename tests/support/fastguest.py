# SPDX-License-Identifier: Apache-2.0
"""A front-end as fast as a real one: its rings are turned by the synthetic guest (datapath/synthetic/guest.c)."""

from __future__ import annotations

import ctypes
from pathlib import Path

from xdpvhost.compare import native

from .frontend import F_PROTOCOL, F_VERSION_1, NetDevice
from .virtqueue import DESC_WRITE, NO_INTERRUPT

HEADER = 12
RING = 1024
BUFFER = 2048


class FastGuest(NetDevice):
    """A front-end whose rings the native driver turns."""

    def __init__(self, path: Path, entries: int = RING) -> None:
        super().__init__(
            path,
            features=F_VERSION_1 | F_PROTOCOL,
            queue_size=entries,
            memory_size=(entries // RING) * (8 << 20),
        )
        self.buffers: dict[int, int] = {}  # where those of each queue begin, as the guest sees it

    def ring(self, index: int) -> native.Ring:
        queue = self.queues[index]
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory.map))
        return native.Ring(
            avail=base + queue.avail - self.memory.gpa,
            used=base + queue.used - self.memory.gpa,
            num=self.queue_size,
            kick_fd=queue.kick_fd,
            kind=native.SPLIT,
            notifier=native.EVENTFD,
            offered=queue.avail_idx,
        )

    def fill(self, index: int, frame: bytes | None) -> None:
        """Every descriptor with its buffer (of one frame to send, or empty to receive), all of them offered."""
        queue = self.queues[index]
        self.memory.set_u16(queue.avail, NO_INTERRUPT)  # it polls
        start = self.buffers[index] = self.memory.alloc(self.queue_size * BUFFER, 4096)
        for i in range(self.queue_size):
            gpa = start + i * BUFFER
            if frame is None:
                queue.write_desc(i, gpa, BUFFER, DESC_WRITE, 0)
            else:
                self.memory.write(gpa, bytes(HEADER) + frame)
                queue.write_desc(i, gpa, HEADER + len(frame), 0, 0)
            queue.push(i)

    def close(self) -> None:
        """The mapping stays: the driver's addresses point into it."""
        self.front.close()
