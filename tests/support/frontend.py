# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end in Python: real socket, real shared memory, a driver that tells the truth.

`FrontEnd` speaks the protocol, also wrongly when asked to: `send_raw` sends any bytes with any descriptors. The queues
are in virtqueue.py. `NetDevice` puts both together: it brings a device up in QEMU's order, posts buffers, sends and
receives, over split or packed queues as its features say.
Everything is synchronous with a deadline, so it works against an endpoint in another thread and against a daemon.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xdpvhost.compare.frontend import FLAGS as FLAGS
from xdpvhost.compare.frontend import NEED_REPLY as NEED_REPLY
from xdpvhost.compare.frontend import NO_FD as NO_FD
from xdpvhost.compare.frontend import REPLY as REPLY
from xdpvhost.compare.frontend import Disconnected as Disconnected
from xdpvhost.compare.frontend import FrontEnd as ProductFrontEnd
from xdpvhost.vhost.wire import Request

from .virtqueue import Buffer, GuestMemory, PackedQueue, Queue, Slot, VirtQueue

DEADLINE = 5.0

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_MRG_RXBUF = 1 << 15
F_CTRL_VQ = 1 << 17
F_MQ = 1 << 22
F_LOG_ALL = 1 << 26
F_INDIRECT = 1 << 28
F_EVENT_IDX = 1 << 29
F_PROTOCOL = 1 << 30
F_VERSION_1 = 1 << 32
F_HASH_REPORT = 1 << 57
F_PACKED = 1 << 34
F_IN_ORDER = 1 << 35

P_MQ = 1 << 0
P_LOG_SHMFD = 1 << 1
P_REPLY_ACK = 1 << 3
P_BACKEND_REQ = 1 << 5
P_CONFIG = 1 << 9
P_INFLIGHT = 1 << 12
P_MEM_SLOTS = 1 << 15
P_STATUS = 1 << 16
P_DEVICE_STATE = 1 << 19


class FrontEnd(ProductFrontEnd):
    """One connection to a back-end: the product's own, and what only hostile and thorough tests need."""

    def ask_fd(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> tuple[bytes, int | None]:
        """Sends a request whose reply may bring a descriptor; payload and descriptor, which the caller closes."""
        self.send(request, payload, fds)
        header, came, _flags, _address = socket.recv_fds(self.sock, 12, 8)
        answered, reply_flags, size = struct.unpack("=III", header)
        assert (answered, reply_flags) == (request, FLAGS | REPLY), f"reply {answered}, flags {reply_flags:#x}"
        assert len(came) <= 1
        return self._exactly(size), came[0] if came else None

    def disconnected(self, timeout: float = DEADLINE) -> bool:
        """Whether the back-end closes the connection; pending replies are thrown away."""
        self.sock.settimeout(timeout)
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        return True

    def get_base(self, index: int) -> int:
        answered, base = struct.unpack("=II", self.ask(Request.GET_VRING_BASE, struct.pack("=II", index, 0)))
        assert answered == index
        return int(base)

    def add_mem_reg(self, slot: Slot, fd: int) -> None:
        self.tell(Request.ADD_MEM_REG, bytes(8) + slot.pack(), [fd])

    def rem_mem_reg(self, slot: Slot) -> None:
        self.tell(Request.REM_MEM_REG, bytes(8) + slot.pack())

    def set_queue(self, index: int, queue: VirtQueue, base: int | None = None, call_fd: int | None = None) -> None:
        """Size, base (or the queue's own), address, call and kick of one ring; the kick comes last and starts it."""
        user = queue.memory.user
        self.file(Request.SET_VRING_CALL, index, queue.call_fd if call_fd is None else call_fd)
        self.state(Request.SET_VRING_NUM, index, queue.size)
        self.state(Request.SET_VRING_BASE, index, queue.base if base is None else base)
        self.set_addr(index, user(queue.desc), user(queue.used), user(queue.avail))
        self.file(Request.SET_VRING_KICK, index, queue.kick_fd)

    def set_log(self, fd: int, size: int, offset: int = 0) -> None:
        """SET_LOG_BASE, answered without payload."""
        assert self.ask(Request.SET_LOG_BASE, struct.pack("=QQ", size, offset), [fd]) == b""

    def get_inflight(self, queues: int, queue_size: int) -> tuple[bytes, int | None]:
        """GET_INFLIGHT_FD: the description that SET_INFLIGHT_FD takes, and the descriptor."""
        return self.ask_fd(Request.GET_INFLIGHT_FD, struct.pack("=QQHHI", 0, 0, queues, queue_size, 0))

    def set_inflight(self, description: bytes, fd: int) -> None:
        self.tell(Request.SET_INFLIGHT_FD, description, [fd])

    def save_state(self) -> bytes | None:
        """SET_DEVICE_STATE_FD, reading, CHECK_DEVICE_STATE; None when the back-end refused."""
        fd = self._state_channel(0)
        if fd is None:
            return None
        with open(fd, "rb") as channel:
            state = channel.read()
        return state if self.ask_u64(Request.CHECK_DEVICE_STATE) == 0 else None

    def load_state(self, state: bytes) -> bool:
        """SET_DEVICE_STATE_FD, writing, CHECK_DEVICE_STATE; whether the back-end took it."""
        fd = self._state_channel(1)
        if fd is None:
            return False
        with open(fd, "wb", buffering=0) as channel:
            while state:
                state = state[channel.write(state) :]
        return self.ask_u64(Request.CHECK_DEVICE_STATE) == 0

    def _state_channel(self, direction: int) -> int | None:
        ours, theirs = os.pipe()
        try:
            fds = [theirs if direction == 0 else ours]
            answer, fd = self.ask_fd(Request.SET_DEVICE_STATE_FD, struct.pack("=II", direction, 0), fds)
        finally:
            os.close(ours)
            os.close(theirs)
        result = struct.unpack("=Q", answer)[0]
        assert (fd is None) == bool(result & NO_FD)
        assert (fd is None) == bool(result & 0xFF)
        return fd

    def get_config(self, size: int, offset: int = 0) -> bytes:
        answer = self.ask(Request.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))
        assert struct.unpack_from("=III", answer) == (offset, size, 0)
        return answer[12:]


HEADER_SIZE_WITH_HASH = 20
HEADER_SIZE = {True: 12, False: 10}  # with num_buffers (VERSION_1 or MRG_RXBUF), without


@dataclass
class NetDevice:
    """A virtio-net driver over a front-end: pairs of queues, buffers, frames."""

    path: Path
    features: int = F_VERSION_1 | F_MRG_RXBUF | F_PROTOCOL
    protocol_features: int = P_MQ | P_REPLY_ACK
    pairs: int = 1
    queue_size: int = 256
    memory_size: int = 8 << 20
    memory: GuestMemory = field(init=False)
    queues: list[Any] = field(init=False)
    front: FrontEnd = field(init=False)
    rx_size: int = 2048

    def __post_init__(self) -> None:
        self.memory = GuestMemory(self.memory_size)
        self.queues = [self.new_queue() for _ in range(2 * self.pairs)]
        self._tx_buffers: list[int] = []
        self._tx_ring = 0
        self._rx_parts: dict[int, list[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self, "front"):
            self.front.close()
        for queue in self.queues:
            queue.close()
        with contextlib.suppress(ValueError):
            self.memory.close()

    def new_queue(self, size: int | None = None) -> VirtQueue:
        kind = PackedQueue if self.features & F_PACKED else Queue
        event_idx, in_order = bool(self.features & F_EVENT_IDX), bool(self.features & F_IN_ORDER)
        return kind(self.memory, size or self.queue_size, event_idx, in_order)

    @property
    def header_size(self) -> int:
        if self.features & F_HASH_REPORT:
            return HEADER_SIZE_WITH_HASH
        return HEADER_SIZE[bool(self.features & (F_VERSION_1 | F_MRG_RXBUF))]

    # ---- bringing it up ----

    def connect(self) -> FrontEnd:
        self.front = FrontEnd.connect(self.path)
        return self.front

    def up(self, bases: Sequence[int] | None = None) -> None:
        """QEMU's order: ENABLE before everything, then the driver's part."""
        front = self.connect()
        offered = front.ask_u64(Request.GET_FEATURES)
        assert not self.features & ~offered, f"not offered: {self.features & ~offered:#x}"
        if self.features & F_PROTOCOL:
            front.set_protocol_features(self.protocol_features & front.ask_u64(Request.GET_PROTOCOL_FEATURES))
        front.tell(Request.SET_OWNER)
        for index in range(len(self.queues)):
            front.enable(index)
        front.set_features(self.features)
        front.set_mem_table(self.memory.slots, [self.memory.fd])
        for index, queue in enumerate(self.queues):
            front.set_queue(index, queue, bases[index] if bases else None)
        front.sync()

    def down(self) -> list[int]:
        """Stops all rings; their bases."""
        return [self.front.get_base(index) for index in range(len(self.queues))]

    # ---- frames ----

    def rx(self, pair: int = 0) -> Any:
        return self.queues[2 * pair]

    def tx(self, pair: int = 0) -> Any:
        return self.queues[2 * pair + 1]

    def post(self, count: int, size: int | None = None, pair: int = 0, indirect: bool = False) -> None:
        """Makes receive buffers available."""
        for _ in range(count):
            chain = [Buffer(self.memory.alloc(size or self.rx_size), size or self.rx_size, True)]
            self.rx(pair).add(chain, indirect, publish=False)
        self.rx(pair).publish()

    def send(
        self, frame: bytes, header: bytes = b"", pair: int = 0, indirect: bool = False, cuts: Iterable[int] = ()
    ) -> None:
        """Sends one frame, its header in a descriptor of its own; `cuts`: where else to cut header plus frame."""
        data = header.ljust(self.header_size, b"\0") + frame
        edges = sorted({0, self.header_size, len(data), *cuts} - ({self.header_size} if cuts else set()))
        gpa = self.memory.alloc(len(data))
        self.memory.write(gpa, data)
        chain = [Buffer(gpa + a, b - a) for a, b in pairwise(edges)]
        self.tx(pair).add(chain, indirect)

    def sent(self, pair: int = 0) -> int:
        """How many transmissions the device has finished since the last time."""
        return sum(1 for _ in self.tx(pair).reap())

    def received(self, pair: int = 0, recycle: bool = True) -> list[tuple[bytes, bytes]]:
        """(header, frame) of what has arrived; merged buffers are put together. Buffers are posted again."""
        frames: list[tuple[bytes, bytes]] = []
        pending = self._rx_parts.setdefault(pair, [])
        again: list[list[Buffer]] = []
        for buffers, written in self.rx(pair).reap():
            data = b"".join(self.memory.read(buffer.gpa, buffer.size) for buffer in buffers)[:written]
            pending.append(data)
            again.append(buffers)
            first = pending[0]
            wanted = struct.unpack_from("<H", first, 10)[0] if self.features & F_MRG_RXBUF else 1
            if len(pending) == wanted:
                whole = b"".join(pending)
                frames.append((whole[: self.header_size], whole[self.header_size :]))
                pending.clear()
        if recycle and again:
            for buffers in again:
                self.rx(pair).add(buffers, publish=False)
            self.rx(pair).publish()
        return frames

    def receive(self, count: int, pair: int = 0, deadline: float = DEADLINE) -> list[tuple[bytes, bytes]]:
        """At least `count` frames, waiting for the device's interrupts."""
        frames: list[tuple[bytes, bytes]] = []
        end = time.monotonic() + deadline
        while len(frames) < count:
            frames += self.received(pair)
            if len(frames) < count:
                left = end - time.monotonic()
                assert left > 0, f"{len(frames)} of {count} frames came in {deadline:g} s"
                self.rx(pair).interrupts(min(left, 0.05))
        return frames
