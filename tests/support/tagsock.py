# SPDX-License-Identifier: Apache-2.0
"""A packet socket that shows VLAN tags: the kernel takes the first one out of a frame, and tells it beside."""

from __future__ import annotations

import socket
import struct

from xdpvhost.links.nicprep import SOL_PACKET
from xdpvhost.xdp.packet import PACKET_AUXDATA

from .frames import PACKET_OUTGOING, PacketSocket
from .netns import Namespace
from .wire import tagged

TP_STATUS_VLAN_VALID, TP_STATUS_VLAN_TPID_VALID = 1 << 4, 1 << 6
_AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata


class TagSocket(PacketSocket):
    """Frames are collected with their tags in them again."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        super().__init__(namespace, device)
        self.socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)

    def collect(self) -> list[bytes]:
        while True:
            try:
                frame, beside, _, address = self.socket.recvmsg(1 << 17, socket.CMSG_SPACE(_AUXDATA.size))
            except BlockingIOError:
                return self.frames
            if address[2] == PACKET_OUTGOING:
                continue
            for _, _, data in beside:
                status, _, _, _, _, tci, protocol = _AUXDATA.unpack(data[: _AUXDATA.size])
                if status & TP_STATUS_VLAN_VALID:
                    frame = tagged(frame, (protocol if status & TP_STATUS_VLAN_TPID_VALID else 0x8100, tci))
            self.frames.append(frame)
