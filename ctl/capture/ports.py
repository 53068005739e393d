# SPDX-License-Identifier: Apache-2.0
"""The daemon's side of captures: whose frames are copied, for whom, and how many were.

One capture a port at a time: each would cost its port another copy of every frame, and whoever wants two can split the
one (`tee`). A capture ends when its command says so or its connection ends, or with its guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..api import Held, Params
from ..datapath import CAPTURE_LEAST, Capture
from ..errors import ConfigError, XdpvhostError
from .memory import CaptureMemory

if TYPE_CHECKING:
    from ..nicport import NicPort
    from ..switch import GuestEntry, Switch

log = logging.getLogger(__name__)

MOST = 1 << 30  # bytes of all rings together
SNAPLEN_MOST = 262144  # what libpcap has for a maximum; no frame is longer


@dataclass
class PortCapture:
    """What is known of a port's captures, the one that runs included."""

    frames: int = 0  # of captures that have ended
    lost: int = 0
    running: Running | None = None

    @property
    def native(self) -> Capture | None:
        """What workers copy its frames to."""
        return self.running.native if self.running else None

    @property
    def total_frames(self) -> int:
        return self.frames + (self.running.native.counters.frames if self.running else 0)

    @property
    def total_lost(self) -> int:
        return self.lost + (self.running.native.counters.lost if self.running else 0)


@dataclass
class Running:
    """A capture that runs; `since` by the monotonic clock."""

    native: Capture
    memory: CaptureMemory
    pid: int
    snaplen: int
    since: float


class Captures:
    """All captures of one daemon. For the control thread only; `lock` is held while what others read changes."""

    def __init__(self, switch: Switch, lock: threading.Lock) -> None:
        self._switch = switch
        self._lock = lock
        self._coming: dict[object, tuple[str, int]] = {}  # captures whose memory is being made: whose, bytes

    async def start(self, params: Params) -> Held:
        """API method capture-start.

        `port`: guest:NAME, iface:NAME, or a name that only one of them has; `buffer`: bytes of the ring, a power of
        two; `snaplen`: bytes that are kept of a frame; `pid`: the command's.
        """
        kind, port = self._find(_text(params, "port"))
        size, snaplen = _number(params, "buffer", CAPTURE_LEAST, MOST), _number(params, "snaplen", 1, SNAPLEN_MOST)
        pid = _number(params, "pid", 0, 1 << 31)
        if size & (size - 1):
            raise ConfigError(f"api request: buffer={size} is no power of two")
        what = f"{kind} {self._name(port)!r}"
        self._check_free(port, what)
        self._check_room(what, size)
        this = object()
        self._coming[this] = f"{what} (about to begin)", size
        try:
            memory, fd = await asyncio.to_thread(CaptureMemory.make, size)  # a GiB takes some tenths of a second
        finally:
            del self._coming[this]
        try:
            kind, port = self._find(_text(params, "port"))  # it may have gone meanwhile
            self._check_free(port, what)
            native = Capture(memory.address, memory.size, snaplen)
        except BaseException:
            memory.close()
            os.close(fd)
            raise
        known = self._switch.captured(port)
        running = Running(native, memory, pid, snaplen, time.monotonic())
        try:
            with self._lock:
                known.running = running
                try:
                    self._switch.publish()
                except BaseException:
                    known.running = None
                    raise
        except BaseException:
            native.close()
            memory.close()
            os.close(fd)
            raise
        log.info("%s: captured by process %d", what, pid)

        def end() -> None:
            if known.running is running:
                try:
                    self._end(port)
                except XdpvhostError as exc:
                    log.error("%s: its capture could not be ended: %s", what, exc)

        facts = {"port": self._name(port), "kind": kind, "worker_cpus": self._switch.dp.cpus, **self._facts_of(port)}
        return Held(facts, fd, end)

    def _check_free(self, port: GuestEntry | NicPort, what: str) -> None:
        running = self._switch.captured(port).running
        if running is not None:
            raise ConfigError(
                f"{what} is being captured already, by process {running.pid}; end that, or read its output twice (tee)"
            )

    def _check_room(self, what: str, size: int) -> None:
        """Raises ConfigError when the rings of all captures would be too much memory."""
        holding = list(self._coming.values())
        for port in self._ports():
            if running := self._switch.captured(port).running:
                holding.append(
                    (f"{self._kind(port)} {self._name(port)!r} (process {running.pid})", running.memory.ring)
                )
        if size + sum(held for _, held in holding) <= MOST:
            return
        holders = ", ".join(f"{who} with {_mib(held)}" for who, held in holding)
        raise ConfigError(
            f"{what}: no {_mib(size)} for its capture: all of them may have {_mib(MOST)}, and there are {holders}; "
            "give a smaller --buffer, or end one"
        )

    def stop(self, params: Params) -> dict[str, Any]:
        """API method capture-stop: when it is answered, all that was captured is in the ring. The numbers of it."""
        kind, port = self._find(_text(params, "port"))
        running = self._switch.captured(port).running
        if running is None:
            raise ConfigError(f"{kind} {self._name(port)!r} is not being captured")
        return self._end(port)

    def end_guest(self, entry: GuestEntry) -> None:
        """The guest is about to go; its capture ends."""
        if self._switch.captured(entry).running is not None:
            self._end(entry)

    def _end(self, port: GuestEntry | NicPort) -> dict[str, Any]:
        known = self._switch.captured(port)
        running = known.running
        assert running is not None
        with self._lock:
            known.running = None
            try:
                self._switch.publish()
            except BaseException:
                known.running = running
                raise
            counters = running.native.counters
            facts = {"captured": counters.frames, "lost": counters.lost}
            known.frames += counters.frames
            known.lost += counters.lost
            running.native.end()
            running.native.close()
        running.memory.close()
        log.info("%s: captured no longer, %d frames, %d lost", self._name(port), facts["captured"], facts["lost"])
        return facts

    def close(self) -> None:
        """End all of them. Logs, never raises: the data plane is about to go."""
        for port in self._ports():
            if self._switch.captured(port).running is not None:
                with contextlib.suppress(XdpvhostError):
                    self._end(port)

    def describe(self) -> list[dict[str, Any]]:
        """What `status` shows: captures that run."""
        return [
            {"kind": self._kind(port), "port": self._name(port), **self._facts_of(port)}
            for port in self._ports()
            if self._switch.captured(port).running is not None
        ]

    def _facts_of(self, port: GuestEntry | NicPort) -> dict[str, Any]:
        running = self._switch.captured(port).running
        assert running is not None
        counters = running.native.counters
        return {
            "pid": running.pid,
            "seconds": round(time.monotonic() - running.since, 1),
            "snaplen": running.snaplen,
            "buffer": running.memory.size,
            "captured": counters.frames,
            "lost": counters.lost,
        }

    def _kind(self, port: GuestEntry | NicPort) -> str:
        return "interface" if port in self._switch.nics else "guest"

    def _name(self, port: GuestEntry | NicPort) -> str:
        return next((nic.iface for nic in self._switch.nics if nic is port), None) or cast("GuestEntry", port).name

    def _ports(self) -> list[GuestEntry | NicPort]:
        return [*self._switch.guests.values(), *self._switch.nics]

    def _find(self, name: str) -> tuple[str, GuestEntry | NicPort]:
        """By `guest:NAME` or `iface:NAME`, or a plain name."""
        kind, _, rest = name.rpartition(":")
        guest = self._switch.guests.get(rest if kind == "guest" else name)
        nics = [nic for nic in self._switch.nics if nic.iface == (rest if kind == "iface" else name)]
        if kind in ("guest", "iface"):
            found: list[GuestEntry | NicPort] = [guest] if kind == "guest" and guest else []
            found += nics if kind == "iface" else []
        else:
            found = [guest] if guest else []
            found += nics
        if len(found) > 1:
            raise ConfigError(f"{name!r} is a guest and an interface; say guest:{name} or iface:{name}")
        if not found:
            names = ", ".join(self._name(port) for port in self._ports())
            raise ConfigError(f"there is no guest and no interface {name!r} here; there are: {names}")
        return self._kind(found[0]), found[0]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):g} MiB"


def _text(params: Params, key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"api request: parameter {key!r} must be a string")
    return value


def _number(params: Params, key: str, least: int, most: int) -> int:
    value = params.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"api request: parameter {key!r} must be a number from {least} to {most}")
    return value
