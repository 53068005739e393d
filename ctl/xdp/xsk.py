# SPDX-License-Identifier: Apache-2.0
"""AF_XDP sockets of one NIC queue.

A `QueueSockets` owns the queue's frames (UMEM), the fill and completion rings, and the base socket, which sends. A
guest's `GuestSocket` shares all that and has a receive ring of its own. libxdp keeps pointers to the ring structs, so
they live here, as long as the sockets.

Closing goes guests' sockets, base socket, UMEM, memory. The kernel lets go of a queue only a moment later, from a work
queue; until then a bind there says EBUSY, and `open` tries again for a while.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ..datapath import TX_METADATA, Ring
from ..errors import NicError, PrivilegeError
from . import libxdp
from .umem import RX_FRAMES, TX_FRAMES, FrameMemory, Framing

log = logging.getLogger(__name__)

AF_XDP, SOL_XDP = 44, 283
XDP_STATISTICS, XDP_OPTIONS = 7, 8
XDP_COPY, XDP_ZEROCOPY, XDP_USE_NEED_WAKEUP, XDP_USE_SG = 1 << 1, 1 << 2, 1 << 3, 1 << 4
XDP_OPTIONS_ZEROCOPY = 1

BIND_MODES = {"auto": 0, "copy": XDP_COPY, "zerocopy": XDP_ZEROCOPY}
STATISTICS = (
    "rx_dropped",
    "rx_invalid_descs",
    "tx_invalid_descs",
    "rx_ring_full",
    "rx_fill_ring_empty_descs",
    "tx_ring_empty_descs",
)

FILL_ENTRIES = 2048
COMPLETION_ENTRIES = 2048
TX_ENTRIES = 2048
GUEST_RX_ENTRIES = 1024
BUSY_DEADLINE = 2.0  # seconds that a closed socket's queue may take to become free


def to_ring(ring: libxdp.XskRing) -> Ring:
    """The data plane's form of a mapped ring."""
    return Ring(ring.producer, ring.consumer, ring.flags, ring.ring, ring.mask, ring.size)


def _option(fd: int, option: int, size: int) -> bytes:
    view = socket.socket(AF_XDP, socket.SOCK_RAW, fileno=fd)
    try:
        return view.getsockopt(SOL_XDP, option, size)
    finally:
        view.detach()


def statistics(fd: int) -> dict[str, int]:
    """XDP_STATISTICS: the kernel's six counters of a socket (three before 5.9)."""
    data = _option(fd, XDP_STATISTICS, 8 * len(STATISTICS))
    values = struct.unpack(f"={len(data) // 8}Q", data)
    return dict.fromkeys(STATISTICS, 0) | dict(zip(STATISTICS, values, strict=False))


class GuestSocket:
    """A guest's socket on one queue: receives only. Its XSKMAP entry goes with it, if it is still there."""

    def __init__(self, owner: QueueSockets) -> None:
        self._rx = libxdp.XskRing()
        self._handle: int | None = owner.bind(self._rx, None, GUEST_RX_ENTRIES)
        self.fd = libxdp.socket_fd(self._handle)

    @property
    def closed(self) -> bool:
        return self._handle is None

    @property
    def ring(self) -> Ring:
        return to_ring(self._rx)

    def statistics(self) -> dict[str, int]:
        return statistics(self.fd)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            libxdp.delete_socket(handle)


def close_together(sockets: Sequence[GuestSocket]) -> None:
    """Close many sockets in the time that one takes.

    The kernel waits for a grace period in the last close of each, some 15 ms. libxdp can only delete one after the
    other, so it is not given the last descriptor.
    """
    last = [os.dup(sock.fd) for sock in sockets if not sock.closed]
    for sock in sockets:
        sock.close()
    with ThreadPoolExecutor(max_workers=32, thread_name_prefix="xsk-close") as pool:
        list(pool.map(os.close, last))


_REFUSED = (errno.EOPNOTSUPP, errno.EINVAL, errno.EPROTONOSUPPORT)


class SeveralPiecesRefused(Exception):
    """The kernel does not bind a socket to this queue with XDP_USE_SG."""

    def __init__(self, zerocopy: bool) -> None:
        super().__init__(
            "the driver has no zero-copy AF_XDP for those (or with --bind copy or auto)"
            if zerocopy
            else "this kernel has no AF_XDP for those (6.6 and later do)"
        )


class QueueSockets:
    """Frames, rings and base socket of one NIC queue."""

    def __init__(self, iface: str, queue: int, framing: Framing, bind: str) -> None:
        """Raises NicError, PrivilegeError or SeveralPiecesRefused; nothing is left then."""
        self.iface, self.queue, self.framing = iface, queue, framing
        self._bind_flags = BIND_MODES[bind] | XDP_USE_NEED_WAKEUP | (XDP_USE_SG if framing.several else 0)
        self._fill, self._comp, self._tx = libxdp.XskRing(), libxdp.XskRing(), libxdp.XskRing()
        self.tx_metadata = False
        self._memory: FrameMemory | None = None
        self._umem: int | None = None
        self._base: int | None = None
        try:
            self._open(bind)
        except OSError as exc:
            self.close()
            if framing.several and exc.errno in _REFUSED:
                raise SeveralPiecesRefused(bind == "zerocopy") from exc
            raise _explain(exc, iface, queue, bind) from exc
        except BaseException:
            self.close()
            raise

    def _open(self, bind: str) -> None:
        self._memory = FrameMemory.allocate((RX_FRAMES + TX_FRAMES) * self.framing.chunk)
        config = libxdp.UmemConfig(FILL_ENTRIES, COMPLETION_ENTRIES, self.framing.chunk, 0, 0)
        memory = self._memory
        if self.framing.tx_metadata:
            try:
                self._umem = libxdp.make_umem_with_metadata(
                    memory.address, memory.size, config, TX_METADATA, self._fill, self._comp
                )
                self.tx_metadata = True
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                log.debug("interface %s: the kernel refuses metadata before frames", self.iface)
        if self._umem is None:
            self._umem = libxdp.make_umem(memory.address, memory.size, config, self._fill, self._comp)
        deadline = time.monotonic() + BUSY_DEADLINE
        while True:
            try:
                self._base = self.bind(None, self._tx, TX_ENTRIES)
                break
            except OSError as exc:
                if exc.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(0.01)
        self.fd = libxdp.socket_fd(self._base)
        self.zerocopy = bool(struct.unpack("=I", _option(self.fd, XDP_OPTIONS, 4))[0] & XDP_OPTIONS_ZEROCOPY)

    def bind(self, rx: libxdp.XskRing | None, tx: libxdp.XskRing | None, entries: int) -> int:
        """A socket on this queue's UMEM; the first one, the base, brings the fill and completion rings. OSError."""
        assert self._umem is not None
        config = libxdp.SocketConfig(entries, entries, libxdp.INHIBIT_PROG_LOAD, 0, self._bind_flags)
        shared = self._base is not None
        fill, comp = (None, None) if shared else (self._fill, self._comp)
        return libxdp.make_socket(self.iface, self.queue, self._umem, (rx, tx, fill, comp), config)

    @property
    def memory(self) -> FrameMemory:
        assert self._memory is not None
        return self._memory

    @property
    def fill(self) -> Ring:
        return to_ring(self._fill)

    @property
    def completion(self) -> Ring:
        return to_ring(self._comp)

    @property
    def tx(self) -> Ring:
        return to_ring(self._tx)

    def guest(self) -> GuestSocket:
        """Raises NicError."""
        try:
            return GuestSocket(self)
        except OSError as exc:
            raise _explain(exc, self.iface, self.queue, "shared") from exc

    def statistics(self) -> dict[str, int]:
        return statistics(self.fd)

    def close(self) -> None:
        """After every guest's socket. Idempotent."""
        base, self._base = self._base, None
        if base is not None:
            libxdp.delete_socket(base)
        umem, self._umem = self._umem, None
        if umem is not None:
            libxdp.delete_umem(umem)
        if self._memory is not None:
            self._memory.close()


def _explain(error: OSError, iface: str, queue: int, bind: str) -> NicError | PrivilegeError:
    what = f"interface {iface}, queue {queue}"
    if error.errno == errno.EPERM:
        return PrivilegeError(f"{what}: AF_XDP sockets need CAP_NET_RAW: run as root, or with that capability")
    if error.errno == errno.EBUSY:
        return NicError(f"{what}: another AF_XDP socket has it (`ss --xdp` or `xdp-loader status {iface}` tell which)")
    if error.errno in _REFUSED and bind == "zerocopy":
        return NicError(f"{what}: its driver has no zero-copy AF_XDP here: use --bind auto or --bind copy")
    if error.errno == errno.EAFNOSUPPORT:
        return NicError(f"{what}: this kernel has no AF_XDP: it needs CONFIG_XDP_SOCKETS")
    if error.errno in (errno.ENOBUFS, errno.ENOMEM):
        return NicError(f"{what}: no memory for its frames ({error.strerror}): raise `ulimit -l`, or use fewer queues")
    return NicError(f"{what}: cannot open an AF_XDP socket: {error.strerror}")
