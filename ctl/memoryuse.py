# SPDX-License-Identifier: Apache-2.0
"""What a guest takes of the host's memory, computed from what is allocated for it. Its own memory is not in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .datapath import library
from .xdp.xsk import GUEST_RX_ENTRIES

if TYPE_CHECKING:
    from .switch import GuestEntry

RX_DESCRIPTOR = 16  # struct xdp_desc


@dataclass(frozen=True)
class MemoryUse:
    """Bytes.

    Not counted: what the kernel keeps besides for a socket (some KiB), the snapshot's entries, and Python's objects.
    """

    data_plane: int  # its structs: the guest, its rings and sockets, its packet socket with room for frames
    socket_rings: int  # receive rings of its AF_XDP sockets, the kernel's memory, mapped
    umem_share: int  # of the frames of its NIC's queues, which all guests there share; the packet socket has none


def compute_memory_use(entry: GuestEntry, guests: Iterable[GuestEntry]) -> MemoryUse:
    """`guests`: all of the switch, this one among them."""
    lib = library()
    packet = lib.xv_packet_bytes() if entry.packet is not None else 0
    there = sum(1 for guest in guests if guest.nic is entry.nic)
    return MemoryUse(
        entry.port.memory_bytes
        + len(entry.rings) * lib.xv_vring_bytes()
        + len(entry.xsks) * lib.xv_xsk_bytes()
        + packet,
        len(entry.xsks) * GUEST_RX_ENTRIES * RX_DESCRIPTOR,
        entry.nic.umem_bytes // max(there, 1),
    )
