# SPDX-License-Identifier: Apache-2.0
"""The memory of a NIC queue's frames: in hugepages when there are any, in transparent ones or plain pages else."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from ctypes import c_int, c_long, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import NicError
from ..links.netdev import DeviceFeatures, XskFeatures
from . import libxdp

PROT_READ_WRITE = 0x1 | 0x2
MAP_PRIVATE, MAP_ANONYMOUS, MAP_HUGETLB = 0x02, 0x20, 0x40000
MADV_DONTFORK, MADV_HUGEPAGE = 10, 14
MAP_FAILED = (1 << ctypes.sizeof(c_void_p) * 8) - 1

MAX_MTU = 65535  # what an IP packet can have; 17 chunks of 4096 bytes hold it, as many as the kernel sends as one frame
RX_FRAMES = 2048  # a queue's frames that wait for the NIC or lie in guests' rings; more would not fit the caches
TX_FRAMES = 2048

_XDP_HEADROOM = 256  # that the kernel keeps before every received frame
_ETH_HEADER = 14
_FRAME_OVERHEAD = 26  # Ethernet header, two VLAN tags, checksum: what zero-copy drivers must have room for


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = c_void_p, (c_void_p, c_size_t, c_int, c_int, c_int, c_long)
    libc.munmap.argtypes = (c_void_p, c_size_t)
    libc.madvise.argtypes = (c_void_p, c_size_t, c_int)
    return libc


def largest_mtu(chunk: int) -> int:
    """The MTU that fits frames of `chunk` bytes."""
    return (chunk - _XDP_HEADROOM) // 128 * 128 - _FRAME_OVERHEAD


@dataclass(frozen=True)
class Framing:
    """How a queue's frames lie in UMEM: in one chunk each, or in several where they need it (XDP_USE_SG)."""

    chunk: int  # bytes
    several: bool
    tx_metadata: bool = False  # chunks that are sent begin with room for struct xsk_tx_metadata

    @property
    def largest_mtu(self) -> int:
        return MAX_MTU if self.several else largest_mtu(self.chunk)


def framing_for(mtu: int) -> Framing:
    """The smallest chunks that hold a frame; AF_XDP has none above a page (4096), so larger frames take several."""
    for chunk in (2048, 4096):
        if mtu <= largest_mtu(chunk):
            return Framing(chunk, several=False)
    return Framing(4096, several=True)


def checksums_here(device: DeviceFeatures | None) -> str | None:
    """Why the device can't be asked to finish checksums (XDP_TXMD_FLAGS_CHECKSUM); None: it can."""
    if device is None or XskFeatures.TX_CHECKSUM not in device.xsk:
        return "the driver has no checksum offload for AF_XDP"
    if not libxdp.has_tx_metadata():
        return "libxdp is too old for it (1.5 or later)"
    return None


def too_large(iface: str, mtu: int, why: str) -> NicError:
    most = largest_mtu(4096)
    return NicError(
        f"interface {iface}: its MTU of {mtu} is too large: frames over {most + _ETH_HEADER} bytes need several "
        f"pieces, and {why}: `ip link set {iface} mtu {most}` or less"
    )


@dataclass
class FrameMemory:
    """An anonymous mapping, never inherited by a child. The sockets that use it must be closed before it is."""

    address: int
    size: int
    mapped: int
    pages: str  # hugetlb, transparent or normal

    @classmethod
    def allocate(cls, size: int) -> FrameMemory:
        """Raises OSError."""
        huge = _huge_page_size()
        rounded = -(-size // huge) * huge if huge else size
        flags = MAP_PRIVATE | MAP_ANONYMOUS
        pages = "hugetlb"
        address = _libc().mmap(None, rounded, PROT_READ_WRITE, flags | MAP_HUGETLB, -1, 0) if huge else MAP_FAILED
        if address == MAP_FAILED:
            rounded = size
            address = _libc().mmap(None, rounded, PROT_READ_WRITE, flags, -1, 0)
            if address == MAP_FAILED:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot map {size} bytes for frames: {os.strerror(code)}")
            pages = "transparent" if _libc().madvise(address, rounded, MADV_HUGEPAGE) == 0 else "normal"
        _libc().madvise(address, rounded, MADV_DONTFORK)
        return cls(address, size, rounded, pages)

    def close(self) -> None:
        address, self.address = self.address, 0
        if address:
            _libc().munmap(address, self.mapped)


def lift_memlock_limit() -> None:
    """Old kernels charge maps and frames to RLIMIT_MEMLOCK; later ones don't look at it for us."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _huge_page_size() -> int:
    """Bytes of a default hugepage; 0 where the kernel has none."""
    with open("/proc/meminfo", encoding="ascii") as info:
        for line in info:
            if line.startswith("Hugepagesize:"):
                return int(line.split()[1]) * 1024
    return 0
