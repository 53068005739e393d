# SPDX-License-Identifier: Apache-2.0
"""Packet sockets that hear what a NIC receives: its broadcast and multicast, or without XDP the frames for one guest.

A socket has no protocol, and so hears nothing, until it is bound to the interface. Filters are classic BPF.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from ctypes import addressof, create_string_buffer

from ..links.nicprep import SOL_PACKET

ETH_P_ALL = 3
PACKET_AUXDATA, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 8, 15, 23
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
RCVBUF = 8 << 20

Program = Sequence[tuple[int, int, int, int]]  # struct sock_filter: code, jump if true, jump if false, operand

_LOAD_WORD, _LOAD_HALF, _JUMP_EQUAL, _RETURN = 0x20, 0x28, 0x15, 0x06
_ACCEPT, _REJECT = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)
_SKF_AD_PKTTYPE = 0xFFFFF000 + 4

# What the NIC's own address did not call for: PACKET_BROADCAST and PACKET_MULTICAST.
GROUPS: Program = (
    (_LOAD_HALF, 0, 0, _SKF_AD_PKTTYPE),
    (_JUMP_EQUAL, 1, 0, 1),
    (_JUMP_EQUAL, 0, 1, 2),
    _ACCEPT,
    _REJECT,
)


def addressed_to(macs: Iterable[bytes]) -> Program:
    """Frames for one of these addresses, whatever their VLAN."""
    program: list[tuple[int, int, int, int]] = []
    for mac in macs:
        program += [
            (_LOAD_HALF, 0, 0, 0),
            (_JUMP_EQUAL, 0, 3, int.from_bytes(mac[:2], "big")),
            (_LOAD_WORD, 0, 0, 2),
            (_JUMP_EQUAL, 0, 1, int.from_bytes(mac[2:], "big")),
            _ACCEPT,
        ]
    return (*program, _REJECT)


class PacketSocket:
    """Hears what arrives and passes a filter, with virtio-net headers, once it listens."""

    def __init__(self, iface: str) -> None:
        self._iface = iface
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
        try:
            for option in (PACKET_VNET_HDR, PACKET_AUXDATA, PACKET_IGNORE_OUTGOING):
                self.socket.setsockopt(SOL_PACKET, option, 1)
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RCVBUF)
        except BaseException:
            self.socket.close()
            raise

    def listen(self, program: Program) -> None:
        """Hear what passes this filter, from now on."""
        self._filter(program)
        self.socket.bind((self._iface, ETH_P_ALL))

    def silence(self) -> None:
        """Hear no more; what has come can still be read."""
        self._filter((_REJECT,))

    def close(self) -> None:
        self.socket.close()

    def _filter(self, program: Program) -> None:
        code = create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in program))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), addressof(code)))
