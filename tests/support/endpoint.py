# SPDX-License-Identifier: Apache-2.0
"""An endpoint in a thread of its own, and a data plane that only takes notes: what protocol tests need."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from xdpvhost.datapath import Memory, Region, Vring
from xdpvhost.errors import DatapathError
from xdpvhost.vhost.endpoint import Endpoint
from xdpvhost.vhost.errors import ProtocolError, RequestRefused
from xdpvhost.vhost.wire import NetState

from .process import wait_for

T = TypeVar("T")

MAC = bytes.fromhex("525400000001")
FAKE_FEATURES = (
    1 << 26 | 1 << 30 | 1 << 32 | 1 << 34 | 1 << 15 | 1 << 5 | 1 << 17 | 1 << 22 | 1 << 28 | 1 << 29 | 1 << 3
)


@dataclass
class Spec:
    name: str
    socket: Path
    socket_mode: str = "server"


@dataclass(eq=False)
class FakeMemory:
    regions: list[Region]
    closed: bool = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True

    def holds(self, user_addr: int, size: int) -> bool:
        return any(r.user_addr <= user_addr and user_addr + size <= r.user_addr + r.size for r in self.regions)


@dataclass(eq=False)
class FakeShared:
    address: int
    size: int
    closed: bool = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass(eq=False)
class FakeVring:
    memory: FakeMemory
    desc: int
    avail: int
    used: int
    features: int
    num: int
    base: int
    kick_fd: int
    call_fd: int
    enabled: bool
    log: FakeShared | None = None
    inflight: FakeShared | None = None
    inflight_offset: int = 0
    log_used: bool = False
    closed: bool = False
    followed: FakeVring | None = None

    def __post_init__(self) -> None:
        self.call()

    def follow(self, old: FakeVring) -> None:
        assert not old.closed
        self.followed = old

    @property
    def shared(self) -> list[FakeShared]:
        return [area for area in (self.log, self.inflight) if area is not None]

    def set_call(self, fd: int) -> None:
        self.call_fd = fd
        self.call()

    def call(self) -> None:
        """What a worker does with a new descriptor."""
        if self.call_fd >= 0:
            os.write(self.call_fd, (1).to_bytes(8, "little"))

    def set_enabled(self, enabled: bool) -> None:
        self.enabled = enabled

    def close(self) -> None:
        assert not self.closed
        self.closed = True


@dataclass
class Applied:
    features: int
    rings: dict[int, FakeVring]
    ctrl: int | None


class FakePort:
    """A DevicePort without a data plane. It checks the order of things: nothing is freed while it is published."""

    def __init__(self, max_pairs: int = 1, features: int = FAKE_FEATURES) -> None:
        self.name = "vm1"
        self.max_pairs = max_pairs
        self.mac = MAC
        self.mtu = 1500
        self.device_features = features
        self.applied: list[Applied] = []
        self.vrings: list[FakeVring] = []
        self.memories: list[FakeMemory] = []
        self.announced: list[bytes] = []
        self.ups: list[bool] = []
        self.errors: list[ProtocolError] = []
        self.areas: list[FakeShared] = []
        self.messages: Counter[tuple[str, str]] = Counter()
        self.net_state = NetState()
        self.state = b""
        self.states_reset = 0
        self.quiesced = 0

    @property
    def now(self) -> Applied:
        return self.applied[-1] if self.applied else Applied(0, {}, None)

    def memory(self, regions: Sequence[Region]) -> Memory:
        memory = FakeMemory(list(regions))
        self.memories.append(memory)
        return cast(Memory, memory)

    def shared(self, address: int, size: int) -> Memory:
        area = FakeShared(address, size)
        self.areas.append(area)
        return cast(Memory, area)

    def inflight_size(self, num: int, packed: bool) -> int:
        return 64 + 32 * num if packed else 64 + 16 * num

    def vring(self, mem: Memory, **conf: Any) -> Vring:
        memory = cast(FakeMemory, mem)
        assert not memory.closed
        vring = FakeVring(memory=memory, **conf)
        num = vring.num
        parts = ((vring.desc, 16 * num), (vring.avail, 6 + 2 * num), (vring.used, 6 + 8 * num))
        if not all(memory.holds(at, size) for at, size in parts):
            raise DatapathError("ring outside memory", errno.EFAULT)
        for fd in (vring.kick_fd, vring.call_fd):
            if fd >= 0:
                os.fstat(fd)
        self.vrings.append(vring)
        return cast(Vring, vring)

    def apply(self, features: int, rings: Mapping[int, Vring], ctrl: int | None) -> None:
        fakes = cast(Mapping[int, FakeVring], rings)
        for vring in (*fakes.values(), *self.now.rings.values()):
            assert not vring.closed, "a published ring was freed"
            assert not vring.memory.closed, "memory of a published ring was freed"
            assert not any(area.closed for area in vring.shared), (
                "log or in-flight region of a published ring was freed"
            )
        for vring in fakes.values():
            if vring.followed is not None:
                assert vring.followed in self.now.rings.values(), "what it follows has left"
                vring.base, vring.followed = vring.followed.base, None
        self.applied.append(Applied(features, dict(fakes), ctrl))

    def quiesce(self) -> None:
        for vring in self.now.rings.values():
            if vring.call_fd >= 0:
                os.fstat(vring.call_fd)
        self.quiesced += 1

    def save_state(self) -> bytes:
        assert not self.now.rings
        return self.state

    def load_state(self, state: bytes) -> None:
        assert not self.now.rings
        if state == b"nonsense":
            raise RequestRefused("nonsense")
        self.state = state

    def reset_state(self) -> None:
        assert not self.now.rings
        self.states_reset += 1

    def announce(self, mac: bytes) -> None:
        self.announced.append(mac)

    def message(self, request: str, result: str) -> None:
        self.messages[request, result] += 1

    def attached(self, up: bool) -> None:
        self.ups.append(up)

    def protocol_error(self, error: ProtocolError) -> None:
        self.errors.append(error)

    def settled(self) -> None:
        """Asserts that nothing of any session is left."""
        assert not self.now.rings
        assert all(vring.closed for vring in self.vrings)
        assert all(memory.closed for memory in self.memories)
        assert all(area.closed for area in self.areas)
        assert self.ups == [True, False] * (len(self.ups) // 2)


class Loop:
    """An asyncio loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def longest(self, seconds: float) -> float:
        """The longest time that a call took to get its turn, while they were made for `seconds`."""
        begun = now = time.monotonic()
        longest = 0.0
        while now - begun < seconds:
            asked = now
            self.call(lambda: None)
            now = time.monotonic()
            longest = max(longest, now - asked)
        return longest

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextmanager
def serving(port: Any, path: Path, mode: str = "server", timeout: float = 5.0) -> Iterator[tuple[Endpoint, Loop]]:
    """Runs an endpoint for `port` until the block ends."""
    loop = Loop()
    endpoint = Endpoint(Spec(port.name, path, mode), port, timeout)
    loop.call(endpoint.open)
    running = asyncio.run_coroutine_threadsafe(endpoint.run(), loop.loop)
    try:
        yield endpoint, loop
    finally:
        asyncio.run_coroutine_threadsafe(endpoint.close(), loop.loop).result(10)
        running.result(10)
        loop.close()


def idle(endpoint: Endpoint) -> None:
    wait_for(lambda: not endpoint.connected, 5, "the session to end", interval=0.001)


def closing() -> bool:
    """Whether descriptors are being closed beside the event loop (ctl/vhost/closer.py)."""
    return any(thread.name.startswith("xdpvhost-close-") for thread in threading.enumerate())


def fd_count() -> int:
    """This process's descriptors, when none is about to be closed."""
    wait_for(lambda: not closing(), 10, "descriptors to be closed", interval=0.001)
    return len(os.listdir("/proc/self/fd"))


def map_count() -> int:
    """Mappings of guest memory (memfds called `guest`) in this process."""
    return Path("/proc/self/maps").read_text().count("/memfd:guest")


def listener(path: Path) -> socket.socket:
    """A front-end's listening socket, for endpoints in client mode."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.bind(str(path))
    sock.listen(1)
    sock.settimeout(5)
    return sock
