# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end: the protocol, and a network device with one pair of queues on it.

Everything is synchronous with a deadline. The tests' front-end (tests/support/frontend.py) builds on `FrontEnd`.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from ..errors import DaemonError
from ..vhost.wire import Request
from . import native
from .memory import Memory, Queue

DEADLINE = 5.0
F_PROTOCOL = 1 << 30
F_VERSION_1 = 1 << 32
P_MQ = 1 << 0
P_REPLY_ACK = 1 << 3
NO_FD = 0x100
FLAGS = 1
REPLY = 4
NEED_REPLY = 8


class FrontEndError(DaemonError):
    """A back-end does not do what the protocol says."""


class Disconnected(FrontEndError):
    """The back-end closed the connection."""


class Slot(Protocol):
    """A memory region that describes itself as SET_MEM_TABLE wants it."""

    def pack(self) -> bytes: ...


class FrontEnd:
    """One connection to a back-end."""

    def __init__(self, sock: socket.socket, deadline: float = DEADLINE) -> None:
        sock.settimeout(deadline)
        self.sock = sock
        self.protocol_features = 0
        self.features = 0

    @classmethod
    def connect(cls, path: Path, deadline: float = DEADLINE) -> Self:
        """Connects to a back-end that listens, waiting for it to come up."""
        end = time.monotonic() + deadline
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.connect(str(path))
                return cls(sock, deadline)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    # ---- messages ----

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([data], control, socket.MSG_NOSIGNAL)
        if sent < len(data):
            self.sock.sendall(data[sent:])

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = FLAGS) -> None:
        self.send_raw(struct.pack("=III", request, flags, len(payload)) + payload, fds)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                raise Disconnected("the back-end closed the connection")
            data += more
        return data

    def receive(self) -> tuple[int, int, bytes]:
        """The next message: request, flags, payload. Raises Disconnected."""
        request, flags, size = struct.unpack("=III", self._exactly(12))
        return request, flags, self._exactly(size)

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = FLAGS) -> bytes:
        """Sends a request that has its own reply; the reply's payload."""
        self.send(request, payload, fds, flags)
        answered, reply_flags, body = self.receive()
        if (answered, reply_flags) != (request, FLAGS | REPLY):
            raise FrontEndError(f"request {request} was answered by {answered} with flags {reply_flags:#x}")
        return body

    def ask_u64(self, request: int) -> int:
        return int(struct.unpack("=Q", self.ask(request))[0])

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), expect: int = 0) -> None:
        """Sends a request without a reply of its own, and waits for its acknowledgement if that was negotiated."""
        if self.protocol_features & P_REPLY_ACK:
            answer = struct.unpack("=Q", self.ask(request, payload, fds, FLAGS | NEED_REPLY))[0]
            if answer != expect:
                raise FrontEndError(f"{Request(request).name} was answered {answer}")
        else:
            self.send(request, payload, fds)

    def sync(self) -> None:
        """Returns when every earlier message was served."""
        self.ask(Request.GET_FEATURES)

    # ---- requests ----

    def state(self, request: int, index: int, num: int) -> None:
        self.tell(request, struct.pack("=II", index, num))

    def file(self, request: int, index: int, fd: int | None) -> None:
        if fd is None:
            self.tell(request, struct.pack("=Q", index | NO_FD))
        else:
            self.tell(request, struct.pack("=Q", index), [fd])

    def enable(self, index: int, on: bool = True) -> None:
        self.state(Request.SET_VRING_ENABLE, index, int(on))

    def set_features(self, features: int) -> None:
        self.features = features
        self.tell(Request.SET_FEATURES, struct.pack("=Q", features))

    def set_protocol_features(self, features: int) -> None:
        self.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", features))
        self.protocol_features = features

    def set_mem_table(self, slots: Sequence[Slot], fds: Sequence[int], room_for: int = 0) -> None:
        body = struct.pack("=II", len(slots), 0) + b"".join(slot.pack() for slot in slots)
        self.tell(Request.SET_MEM_TABLE, body.ljust(8 + 32 * room_for, b"\0"), fds)

    def set_addr(self, index: int, desc: int, used: int, avail: int, flags: int = 0, log: int = 0) -> None:
        """The addresses are the front-end's own, as in its memory table."""
        self.tell(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", index, flags, desc, used, avail, log))


class Region:
    """All of a guest's memory; its addresses in this process are what the rings' addresses refer to."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def pack(self) -> bytes:
        return struct.pack("=QQQQ", 0, self.memory.size, self.memory.base, 0)


class VhostUser:
    """A network device behind a vhost-user back-end that listens at `path`. One pair of queues, checksums done."""

    def __init__(self, memory: Memory, path: Path) -> None:
        self.rx, self.tx = Queue(memory, False), Queue(memory, True)
        self.memory = memory
        self._path = path
        self._stack = contextlib.ExitStack()
        self._calls: list[int] = []

    def start(self) -> None:
        """In QEMU's order. Nothing is offered yet."""
        front = self._stack.enter_context(FrontEnd.connect(self._path))
        if missing := (F_VERSION_1 | F_PROTOCOL) & ~front.ask_u64(Request.GET_FEATURES):
            raise FrontEndError(f"the back-end at {self._path} does not offer features {missing:#x}")
        front.set_protocol_features((P_MQ | P_REPLY_ACK) & front.ask_u64(Request.GET_PROTOCOL_FEATURES))
        front.tell(Request.SET_OWNER)
        front.set_features(F_VERSION_1 | F_PROTOCOL)
        front.set_mem_table([Region(self.memory)], [self.memory.fd])
        for index, queue in enumerate((self.rx, self.tx)):
            kick, call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
            self._stack.callback(os.close, kick)
            self._stack.callback(os.close, call)
            self._calls.append(call)
            queue.ring.kick_fd, queue.ring.notifier = kick, native.EVENTFD
            front.state(Request.SET_VRING_NUM, index, queue.num)
            front.state(Request.SET_VRING_BASE, index, 0)
            front.set_addr(index, queue.ring.desc, queue.ring.used, queue.ring.avail)
            front.file(Request.SET_VRING_CALL, index, call)
            front.file(Request.SET_VRING_KICK, index, kick)
            front.enable(index)
        front.sync()
        self.calls()  # a back-end may send one to begin with

    def calls(self) -> int:
        """Interrupts since the last time: an eventfd adds up what nobody reads."""
        total = 0
        for call in self._calls:
            with contextlib.suppress(BlockingIOError):
                total += os.eventfd_read(call)
        return total

    def close(self) -> None:
        self._stack.close()
