# SPDX-License-Identifier: Apache-2.0
"""The synthetic guest on /dev/vhost-net (linux/vhost.h): the kernel's worker serves its virtqueues over a tap."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from contextlib import ExitStack
from pathlib import Path

from ..errors import DaemonError, PrivilegeError
from . import native
from .frontend import F_VERSION_1
from .memory import NET_HEADER, Memory, Queue

VHOST_NET = Path("/dev/vhost-net")
TUN = "/dev/net/tun"
TUNSETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x100, 0x1000, 0x4000
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 0x8008AF00, 0x4008AF00, 0xAF01, 0x4008AF03
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE = 0x4008AF10, 0x4028AF11, 0x4008AF12
SET_VRING_KICK, SET_VRING_CALL, SET_BACKEND = 0x4008AF20, 0x4008AF21, 0x4008AF30


def open_tap(name: str) -> int:
    """A queue of a tap that exists, with virtio-net headers. Raises DaemonError. The caller is in its namespace."""
    last: OSError | None = None
    for extra in (IFF_MULTI_QUEUE, 0):  # as it was made
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(
                fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | extra)
            )
            fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", NET_HEADER))
            return fd
        except OSError as exc:
            os.close(fd)
            last = exc
    raise DaemonError(f"tap {name}: cannot be opened: {last}")


class VhostNet:
    """One pair of queues on one worker, which is pinned to `cpus`."""

    def __init__(self, memory: Memory, tap: int, cpus: set[int]) -> None:
        """Owns `tap` from now on. Raises DaemonError or PrivilegeError."""
        self._stack = ExitStack()
        self._stack.callback(os.close, tap)
        self.rx, self.tx = Queue(memory, False), Queue(memory, True)
        self.memory = memory
        self._tap = tap
        self._cpus = cpus
        self._calls: list[int] = []
        self.threads: list[int] = []

    def start(self) -> None:
        """Raises DaemonError or PrivilegeError."""
        before = _workers()
        try:
            fd = os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as exc:
            raise PrivilegeError(f"{VHOST_NET}: no permission; run as root") from exc
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                raise DaemonError(f"{VHOST_NET}: {exc.strerror}; load the module: modprobe vhost_net") from exc
            raise
        self._stack.callback(os.close, fd)
        offered = struct.unpack("=Q", fcntl.ioctl(fd, GET_FEATURES, bytes(8)))[0]
        if not offered & F_VERSION_1:
            raise DaemonError(f"{VHOST_NET} does not offer VERSION_1")
        fcntl.ioctl(fd, SET_OWNER)
        fcntl.ioctl(fd, SET_FEATURES, struct.pack("=Q", F_VERSION_1))
        region = struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 0, self.memory.size, self.memory.base, 0)
        fcntl.ioctl(fd, SET_MEM_TABLE, region)
        for index, queue in enumerate((self.rx, self.tx)):
            kick, call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
            self._stack.callback(os.close, kick)
            self._stack.callback(os.close, call)
            self._calls.append(call)
            ring = queue.ring
            ring.kick_fd, ring.notifier = kick, native.EVENTFD
            fcntl.ioctl(fd, SET_VRING_NUM, struct.pack("=II", index, queue.num))
            fcntl.ioctl(fd, SET_VRING_BASE, struct.pack("=II", index, 0))
            addresses = struct.pack("=IIQQQQ", index, 0, ring.desc, ring.used, ring.avail, 0)
            fcntl.ioctl(fd, SET_VRING_ADDR, addresses)
            fcntl.ioctl(fd, SET_VRING_CALL, struct.pack("=Ii", index, call))
            fcntl.ioctl(fd, SET_VRING_KICK, struct.pack("=Ii", index, kick))
        for index in range(2):
            fcntl.ioctl(fd, SET_BACKEND, struct.pack("=Ii", index, self._tap))
        self.threads = sorted(_workers() - before)
        for thread in self.threads:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, self._cpus)

    def calls(self) -> int:
        """Interrupts since the last time."""
        total = 0
        for call in self._calls:
            with contextlib.suppress(BlockingIOError):
                total += os.eventfd_read(call)
        return total

    def close(self) -> None:
        self._stack.close()


def _workers() -> set[int]:
    """The kernel's worker threads of ours: named vhost-PID; threads of ours from Linux 6.4 on, the kernel's before."""
    name = f"vhost-{os.getpid()}"
    found = set()
    for entry in [*Path("/proc/self/task").iterdir(), *Path("/proc").glob("[0-9]*")]:
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() == name:
                found.add(int(entry.name))
    return found
