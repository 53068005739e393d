# SPDX-License-Identifier: Apache-2.0
"""vhost-user on the wire: request numbers, bits and payloads, each validated by its own type.

A payload's `parse` checks everything that needs no state: exact size, reserved bits, alignment and every address plus
size for overflow. What depends on the session (ring numbers, order, memory) is the handler's business in backend.py.
All numbers are in native byte order (vhost-user.rst, "Message Specification").
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

from .errors import ProtocolError, Violation

VERSION = 0x1
VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8
KNOWN_FLAGS = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY

HEADER = struct.Struct("=III")
MAX_FDS = 8  # per message: a memory table of eight regions
MAX_PAYLOAD = 512  # the largest legal one is GET_CONFIG of the whole space, 268 bytes
MAX_TABLE_REGIONS = 8
MAX_MEM_SLOTS = 509
MAX_RING_SIZE = 32768  # virtio 1.2, 2.7
MAX_CONFIG = 256  # VHOST_USER_MAX_CONFIG_SIZE
RING_INDEX_MASK = 0xFF
RING_NO_FD = 0x100
U64_END = 1 << 64


class Request(IntEnum):
    """Front-end message types."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """Back-end message types, sent over the SET_BACKEND_REQ_FD channel."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(IntFlag):
    """VHOST_USER_PROTOCOL_F_*."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22


VIRTIO_NET_F_CTRL_VQ = 1 << 17
VIRTIO_NET_F_MQ = 1 << 22
VIRTIO_NET_F_HASH_REPORT = 1 << 57
VIRTIO_NET_F_RSS = 1 << 60
F_LOG_ALL = 1 << 26
F_PROTOCOL_FEATURES = 1 << 30
VIRTIO_F_RING_PACKED = 1 << 34

NET_S_LINK_UP, NET_S_ANNOUNCE = 1, 2
SPEED_UNKNOWN = 0xFFFFFFFF
DUPLEX_UNKNOWN = 0xFF
NET_CONFIG = struct.Struct("=6sHHHIBBHI")  # struct virtio_net_config, virtio 1.2, 5.1.4
RSS_KEY_SIZE, RSS_TABLE_LENGTH, RSS_HASH_TYPES = 40, 128, 0x1FF  # datapath/src/rss.h


@dataclass(frozen=True, slots=True)
class NetState:
    """What of the configuration space may change while the device is in use."""

    link_up: bool = True
    announce: bool = False
    speed: int = SPEED_UNKNOWN  # Mb/s
    duplex: int = DUPLEX_UNKNOWN  # 0 half, 1 full


def request_name(number: int) -> str:
    """A request's name for messages, also for numbers that nobody defined."""
    try:
        return Request(number).name
    except ValueError:
        return f"request {number}"


def _exact(data: bytes, size: int) -> None:
    if len(data) != size:
        raise ProtocolError(Violation.SIZE, f"payload has {len(data)} bytes where {size} are needed")


def _value(condition: bool, message: str) -> None:
    if not condition:
        raise ProtocolError(Violation.VALUE, message)


def _area(what: str, size: int, offset: int) -> None:
    _value(size > 0, f"{what} is empty")
    _value(offset + size < U64_END, f"{what}: offset {offset:#x} plus size {size:#x} overflows")


@dataclass(frozen=True, slots=True)
class Header:
    """The twelve bytes before every payload."""

    request: int
    flags: int
    size: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        header = cls(*HEADER.unpack(data))
        name = request_name(header.request)
        if header.flags & VERSION_MASK != VERSION:
            raise ProtocolError(
                Violation.HEADER, f"{name} has protocol version {header.flags & VERSION_MASK}, only {VERSION} exists"
            )
        if header.flags & FLAG_REPLY:
            raise ProtocolError(Violation.HEADER, f"{name} has the reply flag, but nothing was asked of the front-end")
        if header.flags & ~KNOWN_FLAGS:
            raise ProtocolError(Violation.HEADER, f"{name} has unknown flags {header.flags:#x}")
        if header.size > MAX_PAYLOAD:
            raise ProtocolError(
                Violation.SIZE, f"{name} announces {header.size} bytes of payload, more than any message has"
            )
        return header

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & FLAG_NEED_REPLY)


class Payload:
    """What all payloads share: `fds` is the exact number of descriptors, None where the request's table decides."""

    __slots__ = ()

    @property
    def fds(self) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    NAME: ClassVar[str] = "none"

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _exact(data, 0)
        return cls()

    def pack(self) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class U64(Payload):
    NAME: ClassVar[str] = "u64"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=Q")
    value: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _exact(data, cls.LAYOUT.size)
        return cls(*cls.LAYOUT.unpack(data))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.value)


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    NAME: ClassVar[str] = "vring state"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    index: int
    num: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _exact(data, cls.LAYOUT.size)
        return cls(*cls.LAYOUT.unpack(data))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.index, self.num)


@dataclass(frozen=True, slots=True)
class VringAddr(Payload):
    """Front-end virtual addresses of a ring's three parts.

    A packed ring has its descriptor ring, its device area and its driver area in their places. What a split ring needs
    of alignment (16, 4 and 2 bytes) is right for both but for the driver area, which the data plane checks.
    """

    NAME: ClassVar[str] = "vring address"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")
    F_LOG: ClassVar[int] = 1
    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _exact(data, cls.LAYOUT.size)
        address = cls(*cls.LAYOUT.unpack(data))
        _value(not address.flags & ~cls.F_LOG, f"vring {address.index} has unknown address flags {address.flags:#x}")
        for part, alignment in (("desc", 16), ("avail", 2), ("used", 4)):
            where = getattr(address, part)
            _value(
                where % alignment == 0,
                f"vring {address.index}: {part} at {where:#x} is not aligned to {alignment} bytes (virtio 1.2, 2.7)",
            )
        return address

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    def same_ring(self, other: VringAddr | None) -> bool:
        """Whether only logging differs, as when QEMU sends the address again during a migration."""
        return other is not None and (self.desc, self.used, self.avail) == (other.desc, other.used, other.avail)


@dataclass(frozen=True, slots=True)
class VringFile(Payload):
    """Ring number of a kick, call or error descriptor; bit 8 says that there is none and the ring is polled."""

    NAME: ClassVar[str] = "u64: ring, no-fd bit"
    index: int
    has_fd: bool

    @classmethod
    def parse(cls, data: bytes) -> Self:
        value = U64.parse(data).value
        _value(not value & ~(RING_INDEX_MASK | RING_NO_FD), f"{value:#x} is neither a ring number nor the no-fd bit")
        return cls(value & RING_INDEX_MASK, not value & RING_NO_FD)

    def pack(self) -> bytes:
        return U64(self.index | (0 if self.has_fd else RING_NO_FD)).pack()

    @property
    def fds(self) -> int | None:
        return 1 if self.has_fd else 0


@dataclass(frozen=True, slots=True)
class MemRegion:
    """One region of guest memory: `size` bytes at guest physical `gpa`, at `user_addr` in the front-end."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQQQ")
    gpa: int
    size: int
    user_addr: int
    offset: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        region = cls(*cls.LAYOUT.unpack(data))
        _value(region.size > 0, f"memory region at {region.gpa:#x} is empty")
        for name, start in (("guest", region.gpa), ("front-end", region.user_addr), ("file", region.offset)):
            _value(
                start + region.size < U64_END,
                f"memory region at {region.gpa:#x}: {name} address {start:#x} plus size {region.size:#x} overflows",
            )
        return region

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.gpa, self.size, self.user_addr, self.offset)

    @property
    def place(self) -> tuple[int, int, int]:
        """How REM_MEM_REG identifies a region; the mmap offset is ignored."""
        return self.gpa, self.size, self.user_addr


@dataclass(frozen=True, slots=True)
class MemTable(Payload):
    """The whole memory. User-Mode Linux always sends room for two regions, so trailing whole regions are allowed."""

    NAME: ClassVar[str] = "memory regions"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    regions: Sequence[MemRegion]

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) < cls.LAYOUT.size:
            raise ProtocolError(Violation.SIZE, f"payload has {len(data)} bytes, not even a region count")
        count, _padding = cls.LAYOUT.unpack_from(data)
        _value(
            count > 0,
            "the memory table is empty; share the guest's memory with back-ends (QEMU: memory-backend with share=on)",
        )
        _value(count <= MAX_TABLE_REGIONS, f"the memory table has {count} regions, {MAX_TABLE_REGIONS} are allowed")
        each = MemRegion.LAYOUT.size
        body = data[cls.LAYOUT.size :]
        if len(body) < count * each or len(body) > MAX_TABLE_REGIONS * each or len(body) % each:
            raise ProtocolError(Violation.SIZE, f"payload has {len(data)} bytes, which do not fit {count} regions")
        return cls(tuple(MemRegion.parse(body[at : at + each]) for at in range(0, count * each, each)))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)

    @property
    def fds(self) -> int | None:
        return len(self.regions)


@dataclass(frozen=True, slots=True)
class SingleRegion(Payload):
    NAME: ClassVar[str] = "one memory region"
    PADDING: ClassVar[int] = 8
    region: MemRegion

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _exact(data, cls.PADDING + MemRegion.LAYOUT.size)
        return cls(MemRegion.parse(data[cls.PADDING :]))

    def pack(self) -> bytes:
        return bytes(self.PADDING) + self.region.pack()


@dataclass(frozen=True, slots=True)
class Log(Payload):
    """Where in the file that comes along the dirty bitmap is: bytes."""

    NAME: ClassVar[str] = "log description"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQ")
    size: int
    offset: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _exact(data, cls.LAYOUT.size)
        log = cls(*cls.LAYOUT.unpack(data))
        _area("dirty log", log.size, log.offset)
        return log

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.size, self.offset)


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """In-flight region: bytes, place in its file, and for how many rings of what size it is.

    In a C compiler's eyes the struct ends with four bytes of padding. QEMU sends them, and compares the size of an
    answer with that; a front-end that packs the struct does not.
    """

    NAME: ClassVar[str] = "in-flight description"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=QQHH")
    PADDING: ClassVar[int] = 4
    size: int
    offset: int
    queues: int
    queue_size: int
    padded: bool = True

    @classmethod
    def parse(cls, data: bytes) -> Self:
        padded = len(data) != cls.LAYOUT.size
        _exact(data, cls.LAYOUT.size + (cls.PADDING if padded else 0))
        size, offset, queues, queue_size = cls.LAYOUT.unpack_from(data)
        return cls(size, offset, queues, queue_size, padded)

    def pack(self) -> bytes:
        plain = self.LAYOUT.pack(self.size, self.offset, self.queues, self.queue_size)
        return plain + bytes(self.PADDING if self.padded else 0)

    def check_area(self) -> None:
        """What a request to use a region must fulfil; one to make a region leaves size and offset open."""
        _area("in-flight region", self.size, self.offset)
        _value(self.offset % 8 == 0, f"in-flight region: offset {self.offset:#x} is not a multiple of 8")


@dataclass(frozen=True, slots=True)
class DeviceState(Payload):
    """Which way the device's state goes, and in which phase of a migration."""

    NAME: ClassVar[str] = "device state transfer"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=II")
    SAVE: ClassVar[int] = 0
    LOAD: ClassVar[int] = 1
    STOPPED: ClassVar[int] = 0
    direction: int
    phase: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        _exact(data, cls.LAYOUT.size)
        transfer = cls(*cls.LAYOUT.unpack(data))
        _value(transfer.direction in (cls.SAVE, cls.LOAD), f"transfer direction {transfer.direction} does not exist")
        return transfer

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.direction, self.phase)


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """A window of the device's configuration space; a reply has exactly the size of its request."""

    NAME: ClassVar[str] = "config space"
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=III")
    offset: int
    flags: int
    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        if len(data) < cls.LAYOUT.size:
            raise ProtocolError(Violation.SIZE, f"payload has {len(data)} bytes, {cls.LAYOUT.size} at least are needed")
        offset, size, flags = cls.LAYOUT.unpack_from(data)
        _value(size <= MAX_CONFIG, f"configuration access of {size} bytes, {MAX_CONFIG} are allowed")
        _exact(data, cls.LAYOUT.size + size)
        return cls(offset, flags, data[cls.LAYOUT.size :])

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.offset, len(self.data), self.flags) + self.data


def message(request: int, payload: bytes = b"", flags: int = VERSION) -> bytes:
    """A whole message, header and payload."""
    return HEADER.pack(request, flags, len(payload)) + payload


def reply(request: int, payload: bytes) -> bytes:
    """An answer. Its flags are exactly version and reply: User-Mode Linux and DPDK compare for equality."""
    return message(request, payload, VERSION | FLAG_REPLY)


def net_config(mac: bytes, max_pairs: int, mtu: int, state: NetState, rss: bool = False) -> bytes:
    """struct virtio_net_config; `rss`: VIRTIO_NET_F_RSS or _HASH_REPORT is offered."""
    status = (NET_S_LINK_UP if state.link_up else 0) | (NET_S_ANNOUNCE if state.announce else 0)
    limits = (RSS_KEY_SIZE, RSS_TABLE_LENGTH, RSS_HASH_TYPES) if rss else (0, 0, 0)
    return NET_CONFIG.pack(mac, status, max_pairs, mtu, state.speed, state.duplex, *limits)
