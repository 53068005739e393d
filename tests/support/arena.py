# SPDX-License-Identifier: Apache-2.0
"""Where hostile front-ends meet the real back-end: two guests exchange frames all the time, a third one attacks.

A fourth, an honest one, is there for the third to send to, and to receive from.

The third may lose its own connection, and nothing else may happen: not one frame of the other two is lost or changed,
and descriptors, mappings and rings are as before when it is gone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from xdpvhost.datapath import DROP_NAMES
from xdpvhost.switch import GuestEntry
from xdpvhost.vhost.endpoint import Endpoint
from xdpvhost.vhost.errors import ProtocolError, Violation
from xdpvhost.vhost.wire import Request

from .endpoint import fd_count
from .frontend import F_EVENT_IDX, F_MRG_RXBUF, F_PACKED, F_PROTOCOL, F_VERSION_1, FrontEnd, NetDevice
from .plane import Plane
from .process import wait_for
from .virtqueue import Buffer

Attack = Callable[[FrontEnd], None]

MACS = [bytes((0x52, 0x54, 0, 0, 0, number)) for number in range(1, 6)]
BURST = 8
ETHERTYPE = b"\x88\xb5"
FEATURES = F_PROTOCOL | F_VERSION_1 | F_MRG_RXBUF


def mapped_files() -> int:
    """Mappings of memfds in this process: guest memory, logs, in-flight regions."""
    return Path("/proc/self/maps").read_text().count("/memfd:")


def numbered(number: int, to: bytes, source: bytes) -> bytes:
    return to + source + ETHERTYPE + number.to_bytes(8, "big") + bytes((number + at) & 0xFF for at in range(38))


class SteadyStream:
    """Frames from one guest to another, in both directions and in bursts, each checked when it arrives."""

    def __init__(self, directory: Path) -> None:
        self._ends = (
            NetDevice(directory / "vm1.sock", features=FEATURES | F_EVENT_IDX, queue_size=64),
            NetDevice(directory / "vm2.sock", features=FEATURES | F_PACKED, queue_size=64),
        )
        self._buffers = []
        for end in self._ends:
            end.up()
            end.post(64)
            self._buffers.append([end.memory.alloc(128) for _ in range(BURST)])
        self.delivered = 0
        self.strangers = 0  # frames of others that came in between
        self.slowest = 0.0
        self.wrong: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steady stream")
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set() and self.wrong is None:
            for sender, receiver in ((0, 1), (1, 0)):
                frames = [numbered(number + n, MACS[receiver], MACS[sender]) for n in range(BURST)]
                begun = time.monotonic()
                self._send(sender, frames)
                try:
                    got = self._receive(receiver, MACS[sender])
                except AssertionError as error:
                    self.wrong = f"after {number} frames: {error}"
                    return
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if got != frames:
                    self.wrong = f"burst {number} came as {[frame.hex() for frame in got]}"
                    return
                number += BURST
                self.delivered = number
            self._stop.wait(0.001)

    def _send(self, index: int, frames: list[bytes]) -> None:
        end = self._ends[index]
        end.sent()
        for gpa, frame in zip(self._buffers[index], frames, strict=True):
            end.memory.write(gpa, bytes(12) + frame)
            end.tx().add([Buffer(gpa, 12 + len(frame))], publish=False)
        end.tx().publish()

    def _receive(self, index: int, source: bytes) -> list[bytes]:
        """A burst of the other end's. What a third guest sends to everybody is no part of it."""
        frames: list[bytes] = []
        while len(frames) < BURST:
            for _, frame in self._ends[index].receive(1, deadline=20):
                if frame[6:14] == source + ETHERTYPE:
                    frames.append(frame)
                else:
                    self.strangers += 1
        return frames

    def moved(self) -> None:
        """Returns when a burst has come through in each direction since the call."""
        goal = self.delivered + 3 * BURST
        wait_for(lambda: self.delivered >= goal or self.wrong, 20, f"frame {goal} of the steady stream", 0.001)
        assert self.wrong is None, self.wrong

    def close(self) -> None:
        """Afterwards the back-end's counters say what was sent, and not a frame more or less."""
        self._stop.set()
        self._thread.join()
        for end in self._ends:
            end.close()


class Arena:
    """The steady stream, and a guest "vm3" for the attacker."""

    def __init__(self, directory: Path, pairs: int = 1, timeout: float = 5.0) -> None:
        self._stack = ExitStack()
        self.plane = self._stack.enter_context(Plane(directory))
        self.one, self.two = self.plane.guest(), self.plane.guest()
        self.entry: GuestEntry = self.plane.guest(pairs, timeout)
        self.path = directory / "vm3.sock"
        self.errors: list[ProtocolError] = []
        self._listen_to(self.entry)
        self.friend_entry = self.plane.guest()
        self.friend = NetDevice(directory / "vm4.sock", features=FEATURES, memory_size=16 << 20)
        self.friend.up()
        self.friend.post(128)
        self._friend_mark = self.friend.memory.mark()
        self.stream = SteadyStream(directory)
        self.stream.moved()

    def _listen_to(self, entry: GuestEntry) -> None:
        counts = entry.protocol_error

        def protocol_error(error: ProtocolError) -> None:
            self.errors.append(error)
            counts(error)

        entry.protocol_error = protocol_error  # type: ignore[method-assign]

    def send_to_guest(self, *frames: bytes) -> None:
        """From the honest fourth guest; returns when the back-end has taken them."""
        self.friend.memory.release(self._friend_mark)
        for frame in frames:
            self.friend.send(frame)
        wait_for(lambda: self.friend.sent() >= 0 and not self.friend.tx().chains, 10, "the frames to be taken", 0.001)

    def heard(self) -> list[bytes]:
        """What the fourth guest has received since the last time."""
        return [frame for _, frame in self.friend.received()]

    def drops(self, direction: str, reason: str) -> int:
        """Frames of the attacker that were dropped."""
        port = self.entry.port
        counters = port.tx_counters(0) if direction == "tx" else port.rx_counters(0)
        return int(counters.drops[DROP_NAMES.index(reason)])

    @property
    def endpoint(self) -> Endpoint:
        return self.plane.endpoints["vm3"]

    @property
    def faults(self) -> list[str]:
        """Why the data plane gave the attacker up, each time."""
        assert all(name == "vm3" for name, _ in self.plane.faults), self.plane.faults
        return [why for _, why in self.plane.faults]

    def connect(self) -> FrontEnd:
        return FrontEnd.connect(self.path)

    def device(self, features: int = FEATURES, **options: Any) -> NetDevice:
        return NetDevice(self.path, features=features, **options)

    def idle(self) -> None:
        wait_for(lambda: not self.endpoint.connected, 10, "the session to end", interval=0.001)

    @contextlib.contextmanager
    def nothing_left(self) -> Iterator[None]:
        """Asserts that the block costs its session, and nothing else: no descriptor, mapping or ring stays."""
        self.idle()
        fds, maps = fd_count(), mapped_files()
        yield
        self.idle()
        assert not self.entry.rings
        wait_for(lambda: fd_count() == fds, 10, f"{fds} descriptors, as before", interval=0.001)
        assert mapped_files() == maps
        self.stream.moved()
        with self.connect() as front:
            assert front.ask_u64(Request.GET_FEATURES), "the next front-end is served"
        self.idle()

    @contextlib.contextmanager
    def faulted(self, features: int, **options: Any) -> Iterator[NetDevice]:
        """A device that loses its connection by what the block does in its rings or memory."""
        known = len(self.faults)
        with self.nothing_left():
            with self.device(features, **options) as device:
                device.up()
                yield device
                assert device.front.disconnected(), "the data plane did not mind"
            self.idle()
        assert len(self.faults) == known + 1

    def refused(self, attack: Attack, *violations: Violation) -> str:
        """The attack ends the session with an error of one of these classes; its message."""
        known = len(self.errors)
        with self.nothing_left():
            with self.connect() as front:
                attack(front)
                assert front.disconnected()
            self.idle()
            assert len(self.errors) == known + 1
            error = self.errors[-1]
            assert error.violation in violations, str(error)
        return str(error)

    def survives(self, *attacks: Attack) -> None:
        """Each attack ends its session or not; the daemon is as before."""
        with self.nothing_left():
            for attack in attacks:
                with self.connect() as front, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    attack(front)
                self.idle()

    def close(self) -> None:
        """Checks that not a frame of the steady stream was lost or made up, by the back-end's own counters, too."""
        try:
            self.stream.moved()
        finally:
            self.stream.close()
            self.friend.close()
            sent = [entry.port.tx_counters(0).packets for entry in (self.one, self.two)]
            got = [entry.port.rx_counters(0).packets for entry in (self.two, self.one)]
            drops = [
                sum(counters.drops)
                for entry in (self.one, self.two)
                for counters in (entry.port.rx_counters(0), entry.port.tx_counters(0))
            ]
            self._stack.close()
        assert self.stream.wrong is None, self.stream.wrong
        assert sum(sent) == self.stream.delivered
        assert drops == [0] * 4
        assert sum(got) == sum(sent) + self.stream.strangers
