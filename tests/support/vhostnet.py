# SPDX-License-Identifier: Apache-2.0
"""A virtio-net driver on the kernel's own back-end: /dev/vhost-net, by its ioctls, over a tap or a macvtap.

The rings and buffers are those of the vhost-user front-end (frontend.py); only how the back-end hears of them differs:
ioctls instead of messages, this process's addresses instead of a shared descriptor, and a network that is the file
descriptor of a tap queue. Linux: include/uapi/linux/vhost.h, if_tun.h.
"""

import contextlib
import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from .frontend import F_MRG_RXBUF, F_VERSION_1, NetDevice

DEVICE = Path("/dev/vhost-net")

TUNSETIFF = 0x400454CA
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100

GET_FEATURES = 0x8008AF00
SET_FEATURES = 0x4008AF00
SET_OWNER = 0xAF01
SET_MEM_TABLE = 0x4008AF03
SET_VRING_NUM = 0x4008AF10
SET_VRING_ADDR = 0x4028AF11
SET_VRING_BASE = 0x4008AF12
SET_VRING_KICK = 0x4008AF20
SET_VRING_CALL = 0x4008AF21
NET_SET_BACKEND = 0x4008AF30


def open_tap(name: str, flags: int = 0) -> int:
    """A queue of tap `name`, which is made if it is not there: its descriptor. Frames have a 12-byte virtio-net header.

    `flags` must be those that the tap has, where it is there: IFF_MULTI_QUEUE.
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("=16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", 12))
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_macvtap(name: str) -> int:
    """A queue of macvtap `name`, which must be there: its descriptor. Frames have a 12-byte virtio-net header."""
    index = Path(f"/sys/class/net/{name}/ifindex").read_text().strip()
    fd = os.open(f"/dev/tap{index}", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("=16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", 12))
    except BaseException:
        os.close(fd)
        raise
    return fd


@dataclass
class VhostNet(NetDevice):
    """One queue pair. `path` is /dev/vhost-net, `tap` the descriptor of a tap's queue, which the caller closes."""

    path: Path = DEVICE
    features: int = F_VERSION_1 | F_MRG_RXBUF
    tap: int = -1
    fd: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.memory.user_base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory.map))

    def up(self, bases: object = None) -> None:
        """What QEMU does: owner, features, memory, rings, and last of all the tap, which starts each ring."""
        self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self._tell(SET_OWNER, b"")
        (offered,) = struct.unpack("=Q", fcntl.ioctl(self.fd, GET_FEATURES, bytes(8)))
        assert not self.features & ~offered, f"not offered: {self.features & ~offered:#x}"
        self._tell(SET_FEATURES, struct.pack("=Q", self.features))
        memory = self.memory
        self._tell(SET_MEM_TABLE, struct.pack("=II4Q", 1, 0, memory.gpa, memory.size, memory.user_base, 0))
        for index, queue in enumerate(self.queues):
            desc, used, avail = (memory.user(part) for part in (queue.desc, queue.used, queue.avail))
            self._tell(SET_VRING_NUM, struct.pack("=II", index, queue.size))
            self._tell(SET_VRING_BASE, struct.pack("=II", index, queue.base))
            self._tell(SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, desc, used, avail, 0))
            self._tell(SET_VRING_KICK, struct.pack("=Ii", index, queue.kick_fd))
            self._tell(SET_VRING_CALL, struct.pack("=Ii", index, queue.call_fd))
        for index in range(len(self.queues)):
            self._tell(NET_SET_BACKEND, struct.pack("=Ii", index, self.tap))

    def _tell(self, request: int, argument: bytes) -> None:
        fcntl.ioctl(self.fd, request, argument)

    def close(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                for index in range(len(self.queues)):
                    self._tell(NET_SET_BACKEND, struct.pack("=Ii", index, -1))
            os.close(self.fd)
            self.fd = -1
        super().close()
