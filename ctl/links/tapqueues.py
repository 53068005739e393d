# SPDX-License-Identifier: Apache-2.0
"""A multi-queue tap whose queues this process reads and writes itself (datapath/src/tap.c).

It is not persistent: the kernel takes it away with its last descriptor, whatever becomes of this process. So it is in
nobody's journal. Every frame has a virtio-net header; which offloads the kernel's side may leave to us is set once for
all queues (TUNSETOFFLOAD), and we take all that it knows: the data plane cuts and sums for guests that don't.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from typing import Self

from ..datapath import NICQ_GSO_ECN, NICQ_GSO_TCP4, NICQ_GSO_TCP6, NICQ_GSO_UDP
from ..errors import NicError, PrivilegeError

TUN = "/dev/net/tun"
MAX_QUEUES = 256  # drivers/net/tun.c: MAX_TAP_QUEUES
HEADER = 12  # bytes: struct virtio_net_hdr_v1

# linux/if_tun.h
TUNSETIFF, TUNSETOWNER, TUNSETOFFLOAD = 0x400454CA, 0x400454CC, 0x400454D0
TUNSETVNETHDRSZ, TUNSETVNETLE = 0x400454D8, 0x400454DC
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x0100, 0x8000

# TUN_F_* in sets that the kernel takes or refuses as a whole, the largest first; what they are called, and what the
# data plane may then write whole: the kernel understands in a frame from us what it may send to us.
_PLAIN = {"csum": 0x01, "tso4": 0x02, "tso6": 0x04, "ecn": 0x08}
_OFFLOADS = (_PLAIN | {"uso4": 0x20, "uso6": 0x40}, _PLAIN)  # USO: since Linux 6.2
_WHOLE = {"tso4": NICQ_GSO_TCP4, "tso6": NICQ_GSO_TCP6, "ecn": NICQ_GSO_ECN, "uso4": NICQ_GSO_UDP}


class TapQueues:
    """The descriptors, one a queue, none of which ever blocks. Owner of all."""

    def __init__(self, name: str, fds: list[int], offloads: tuple[str, ...]) -> None:
        self.name = name
        self.fds = fds
        self.offloads = offloads
        self.index = socket.if_nametoindex(name)

    @property
    def gso(self) -> int:
        """NICQ_GSO_*: frames that may be written whole."""
        return sum(bit for name, bit in _WHOLE.items() if name in self.offloads)

    @classmethod
    def open(cls, name: str, queues: int, what: str) -> Self:
        """Make the tap, down. Raises NicError (name taken, no tap driver) or PrivilegeError, and leaves nothing."""
        fds: list[int] = []
        try:
            for queue in range(queues):
                fds.append(_open_queue(name, first=queue == 0, what=what))
            return cls(name, fds, _set_offloads(fds[0], what))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def close(self) -> None:
        """The tap is gone with them. Idempotent."""
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)


def _open_queue(name: str, *, first: bool, what: str) -> int:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"{what}: {TUN} may not be opened; run as root") from exc
        raise NicError(f"{what}: {TUN}: {exc.strerror}; `modprobe tun` (CONFIG_TUN) makes it") from exc
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE | (IFF_TUN_EXCL if first else 0)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", os.fsencode(name), flags))
        if first:  # of no owner, everybody could open a queue of it
            fcntl.ioctl(fd, TUNSETOWNER, 0)
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", HEADER))
        fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("=i", 1))
    except OSError as exc:
        os.close(fd)
        if exc.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"{what}: no tap may be made; run as root, or with CAP_NET_ADMIN") from exc
        if first and exc.errno in (errno.EBUSY, errno.EINVAL, errno.EEXIST):
            raise NicError(
                f"{what}: there is an interface {name} already, which isn't ours; rename or delete it: "
                f"`ip link set {name} down name …`"
            ) from exc
        raise NicError(f"{what}: tap {name} can't be made: {exc.strerror}") from exc
    return fd


def _set_offloads(fd: int, what: str) -> tuple[str, ...]:
    for offloads in _OFFLOADS:
        with suppress(OSError):
            fcntl.ioctl(fd, TUNSETOFFLOAD, sum(offloads.values()))
            return tuple(offloads)
    raise NicError(f"{what}: the kernel's tap takes no offloads; Linux 3.8 or later does")
