# SPDX-License-Identifier: Apache-2.0
"""The real data plane and switch without a NIC: guests on vhost-user sockets, in this process and without root."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from xdpvhost.config import GuestSpec, change_guest
from xdpvhost.datapath import Datapath
from xdpvhost.links.ethtool import LinkState
from xdpvhost.nicport import NicPort
from xdpvhost.switch import GuestEntry, Switch
from xdpvhost.vhost.endpoint import Endpoint

from .endpoint import Loop


class NoNic:
    """A NIC without queues: what no guest owns is dropped as `no_uplink`."""

    mtu = 1500
    link = LinkState(speed=10000, full_duplex=True)
    queues: Sequence[Any] = ()
    taps: Sequence[Any] = ()
    mcast = None
    gone = False

    def add_guest(self, slot: int, name: str, keys: Collection[tuple[int, bytes]]) -> list[Any]:
        return []

    def packet_socket(self, slot: int) -> None:
        return None

    def set_keys(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        pass

    def steer(self, slot: int) -> None:
        pass

    def sort_by_rules(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        pass

    def unsteer(self, slot: int) -> None:
        pass

    def remove_guest(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


class Plane:
    """Workers, a switch, and endpoints in a loop of their own. Guests get MAC 52:54:00:00:00:NN in order."""

    def __init__(
        self,
        directory: Path,
        workers: int = 1,
        poll: str = "adaptive",
        nic: Callable[[Datapath], NicPort] | None = None,
    ) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self.loop = Loop()
        self._stack.callback(self.loop.close)
        self.dp = Datapath(workers, poll)
        self._stack.callback(self.dp.close)
        self.switch = Switch(self.dp)
        self.nic: NicPort = cast(Any, NoNic()) if nic is None else nic(self.dp)
        self.loop.call(lambda: self.switch.add_nic(self.nic))
        self._stack.callback(self.loop.call, self.switch.close)
        self.dp.start()
        self.loop.call(lambda: self.loop.loop.add_reader(self.dp.event_fd, self._event))
        self._stack.callback(self.loop.call, lambda: self.loop.loop.remove_reader(self.dp.event_fd))
        self.loop.call(self._watch)
        self._stack.callback(self.loop.call, self._unwatch)
        self.endpoints: dict[str, Endpoint] = {}
        self.faults: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self._stack.close()

    def path(self, name: str) -> Path:
        """A guest's socket."""
        return self._directory / f"{name}.sock"

    def guest(self, pairs: int = 1, timeout: float = 10.0, mac_change: str = "deny", **keys: str) -> GuestEntry:
        """Configures one more guest and serves its socket. `keys` are of its SPEC, with _ for -."""
        number = len(self.endpoints) + 1
        name = f"vm{number}"
        spec = GuestSpec(name, bytes((0x52, 0x54, 0, 0, 0, number)), pairs, self._directory / f"{name}.sock")
        if mac_change == "allow":
            spec = replace(spec, mac_change="allow")
        spec = change_guest(spec, {key.replace("_", "-"): value for key, value in keys.items()})
        entry = self.loop.call(lambda: self.switch.add_guest(spec))
        endpoint = Endpoint(spec, entry, timeout)
        entry.config_changed = endpoint.config_changed
        self.loop.call(endpoint.open)
        running: Future[None] = asyncio.run_coroutine_threadsafe(endpoint.run(), self.loop.loop)
        self.endpoints[name] = endpoint
        self._stack.callback(self._end, endpoint, running)
        return entry

    def _end(self, endpoint: Endpoint, running: Future[None]) -> None:
        asyncio.run_coroutine_threadsafe(endpoint.close(), self.loop.loop).result(10)
        running.result(10)

    def _watch(self) -> None:
        """As the daemon does it, ten times a second."""
        self.dp.watchdog()
        self._watchdog = self.loop.loop.call_later(0.1, self._watch)

    def _unwatch(self) -> None:
        self._watchdog.cancel()

    def _event(self) -> None:
        """As the daemon does it: a guest that the data plane gave up loses its connection."""
        os.read(self.dp.event_fd, 8)
        for entry, why in self.switch.faulted():
            self.faults.append((entry.name, why))
            self.endpoints[entry.name].disconnect(why)
        self._serve_requests()

    def _serve_requests(self) -> None:
        delay = self.switch.serve_requests()
        if delay is not None:
            self.loop.loop.call_later(delay, self._serve_requests)
