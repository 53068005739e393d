# SPDX-License-Identifier: Apache-2.0
"""A front-end that leaves the control virtqueue to the back-end, as User-Mode Linux does, and what it may say there."""

from __future__ import annotations

import struct
from types import TracebackType
from typing import Any, Self

from xdpvhost.vhost.wire import NET_CONFIG

from .frontend import F_CTRL_VQ, F_PROTOCOL, F_VERSION_1, P_CONFIG, P_MQ, P_REPLY_ACK, NetDevice
from .process import wait_for
from .virtqueue import Buffer, Queue

F_CTRL_GUEST_OFFLOADS, F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA = 1 << 2, 1 << 18, 1 << 19, 1 << 20
F_GUEST_ANNOUNCE, F_CTRL_MAC_ADDR, F_RSS = 1 << 21, 1 << 23, 1 << 60
BASE = F_PROTOCOL | F_VERSION_1
FILTERS = BASE | F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_VLAN | F_CTRL_MAC_ADDR
PROTOCOL = P_MQ | P_REPLY_ACK | P_CONFIG
RX, MAC, VLAN, ANNOUNCE, MQ, OFFLOADS = range(6)  # classes of commands, virtio 1.2, 5.1.6.5
OK, ERR = 0, 1


def tables(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    """The data of VIRTIO_NET_CTRL_MAC_TABLE_SET."""
    return b"".join(struct.pack("<I", len(macs)) + b"".join(macs) for macs in (unicast, multicast))


class ControlGuest(NetDevice):
    """A driver with a control virtqueue behind its pairs."""

    def up_with_control(self) -> Self:
        self.ctrl = Queue(self.memory, 16)
        self.up()
        index = len(self.queues)
        self.front.set_queue(index, self.ctrl)
        self.front.enable(index)
        self.front.sync()
        return self

    def command(self, kind: int, code: int, data: bytes = b"") -> int:
        """The answer to one command."""
        head, body, status = (self.memory.alloc(size) for size in (2, max(1, len(data)), 1))
        self.memory.write(head, bytes((kind, code)))
        self.memory.write(status, b"\xaa")
        self.memory.write(body, data)
        parts = [Buffer(head, 2), *([Buffer(body, len(data))] if data else []), Buffer(status, 1, True)]
        self.ctrl.add(parts)
        wait_for(lambda: list(self.ctrl.reap()), 5, "the control command's answer", interval=0.001)
        return self.memory.read(status, 1)[0]

    def config(self) -> tuple[Any, ...]:
        """struct virtio_net_config."""
        return NET_CONFIG.unpack(self.front.get_config(NET_CONFIG.size))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, value, tb)
        self.ctrl.close()
