# SPDX-License-Identifier: Apache-2.0
"""The sending end of a veth plays the NIC that its other end is not: it strips VLAN tags, and chooses queues by MAC.

A tag is "stripped" when it travels beside the frame, in the socket buffer: there it is when a NIC took it out, and
there a bridge or a stack on this machine puts it. It gets there by a program at tc's egress hook (wire.bpf.c).
"""

from __future__ import annotations

import platform
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from pyroute2 import IPRoute

from xdpvhost.xdp.libbpf import BpfObject

from .card import Card
from .frames import PacketSocket
from .netns import Namespace, World
from .process import run

Q, AD = 0x8100, 0x88A8
SO_MARK = 36
CLSACT_EGRESS = 0xFFFFFFF3  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)


class Wire:
    """The program at the egress hook of `device`. Its namespace's end takes it away."""

    def __init__(self, world: World, namespace: Namespace, device: str) -> None:
        self._namespace, self._device = namespace, device
        built = world.directory / "wire.bpf.o"
        include = f"/usr/include/{platform.machine()}-linux-gnu"
        source = Path(__file__).with_name("wire.bpf.c")
        run(["clang", "-target", "bpf", "-O2", "-g", "-Wall", "-Werror", f"-I{include}", "-c", source, "-o", built])
        self._object = world.stack.enter_context(BpfObject(built))
        self._object.load()
        with namespace.entered(), IPRoute() as ip:
            index = socket.if_nametoindex(device)
            ip.tc("add", "clsact", index)
            program = self._object.program_fd("wire")
            ip.tc("add-filter", "bpf", index, parent=CLSACT_EGRESS, fd=program, name="wire", direct_action=True)

    def choose_by(self, card: Card) -> None:
        """As this card's rules say, from now on."""
        chosen: set[bytes] = set()

        def changed(_card: Card) -> None:
            queues = self._object.map("queues")
            now = {mac: queue for mac in card.addresses() if (queue := card.queue_of(mac)) is not None}
            for mac in chosen - now.keys():
                queues.delete(mac)
            for mac, queue in now.items():
                queues.update(mac, struct.pack("=I", queue))
            chosen.clear()
            chosen.update(now)

        card.changed = changed

    def send(self, frames: Iterable[bytes], tag: tuple[int, int] | None = None) -> None:
        """`tag`: protocol and tag control information, beside the frames."""
        with PacketSocket(self._namespace, self._device) as sender:
            if tag is not None:
                sender.socket.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", tag[0] << 16 | tag[1]))
            sender.send(frames)


def tagged(frame: bytes, *tags: tuple[int, int]) -> bytes:
    """The frame with these tags in it, the outermost first."""
    return frame[:12] + b"".join(struct.pack("!HH", *tag) for tag in tags) + frame[12:]
