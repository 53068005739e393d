# SPDX-License-Identifier: Apache-2.0
"""How `up` ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from xdpvhost import daemon, privileges, serve_xdp
from xdpvhost.config import UpConfig
from xdpvhost.datapath import Datapath
from xdpvhost.errors import DatapathError, NicError
from xdpvhost.links.journal import Journal
from xdpvhost.switch import Switch


def test_it_does_not_claim_that_the_nic_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Something stays in the journal: that is an error, not a success."""

    async def come_up(self: daemon.Daemon, _: asyncio.AbstractEventLoop) -> None:
        self._journal = journal = Journal(tmp_path / "journal.jsonl")
        self._not_ours = frozenset({journal.record("link_up").id})
        journal.record("xdp")
        self._stop.set()

    monkeypatch.setattr(privileges, "effective", lambda: frozenset(privileges.CAPABILITIES))
    monkeypatch.setattr(daemon.Daemon, "_come_up", come_up)
    monkeypatch.setattr(daemon.Daemon, "_ready_line", lambda _: "")
    monkeypatch.setattr(serve_xdp.XdpService, "guests", ())
    with caplog.at_level("INFO"), pytest.raises(NicError, match=r"nic0: not undone: xdp .*xdpvhost clean --run-dir"):
        daemon.run(UpConfig(ifaces=("nic0",), guests=(), run_dir=tmp_path))
    assert "nic0 is NOT as it was" in caplog.text
    assert "is as it was" not in caplog.text


class Scripted:
    """A switch whose device fails in as many ways as there are, one after the other."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.followed = asyncio.Event()
        self.visits = 0

    def follow_mtus(self) -> None:
        if self.failures:
            raise self.failures.pop()
        self.followed.set()

    def follow_links(self) -> None:
        pass

    def faulted(self) -> list[Any]:
        self.visits += 1
        return []

    def serve_requests(self) -> None:
        pass


def test_device_is_watched_after_any_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_xdp, "DEVICE_PERIOD", 0)

    async def watch() -> None:
        up = serve_xdp.XdpService(UpConfig(ifaces=("nic0",), guests=(), run_dir=tmp_path))
        switch = Scripted(OSError(errno.EMFILE, "many"), NicError("gone"), KeyError("a bug"))
        up._switch = cast(Switch, switch)
        task = asyncio.create_task(up._watch_device())
        await asyncio.wait_for(switch.followed.wait(), 5)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(watch())


def test_events_of_the_data_plane_are_looked_at_now_and_then(tmp_path: Path) -> None:
    """A guest causes one with each control command, and each look visits all guests."""

    class Events:
        event_fd = os.eventfd(1)

    async def storm() -> tuple[int, float]:
        loop = asyncio.get_running_loop()
        up = serve_xdp.XdpService(UpConfig(ifaces=("nic0",), guests=(), run_dir=tmp_path))
        switch = Scripted()
        up._switch, up._dp = cast(Switch, switch), cast(Any, Events)
        up._watch_data_plane()
        begun = loop.time()
        while switch.visits < 3:
            os.eventfd_write(Events.event_fd, 1)
            await asyncio.sleep(0)
        took = loop.time() - begun
        up._ignore_data_plane()
        return switch.visits, took

    visits, took = asyncio.run(storm())
    os.close(Events.event_fd)
    assert took >= (visits - 1) * serve_xdp.EVENT_PERIOD * 0.9


def test_mtu_that_could_not_be_told_is_told_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        changes = 1

        def follow_mtu(self) -> bool:
            self.changes, changed = 0, self.changes
            return bool(changed)

    switch, device, told = Switch(cast(Any, None)), Device(), list[str]()
    switch.nics.append(cast(Any, device))
    guest = SimpleNamespace(nic=device, config_changed=lambda: told.append("guest"))
    switch.guests["vm1"] = cast(Any, guest)

    def fails() -> None:
        raise DatapathError("no memory", errno.ENOMEM)

    monkeypatch.setattr(switch, "publish", fails)
    with pytest.raises(DatapathError):
        switch.follow_mtus()
    assert not told
    monkeypatch.setattr(switch, "publish", lambda: told.append("workers"))
    switch.follow_mtus()
    switch.follow_mtus()
    assert told == ["workers", "guest"]


def test_guests_that_ask_share_one_timer(tmp_path: Path) -> None:
    """Events come while guests wait for their turn: each would leave a timer that makes itself anew for ever."""

    async def ask() -> None:
        up = serve_xdp.XdpService(UpConfig(ifaces=("nic0",), guests=(), run_dir=tmp_path))
        loop, timers = asyncio.get_running_loop(), []
        up._switch = cast(Switch, SimpleNamespace(serve_requests=lambda: 10.0))
        up._dp = cast(Datapath, SimpleNamespace(event_fd=os.eventfd(0)))
        for _ in range(23):
            up._serve_guest_requests()
            assert up._requests_later is not None
            timers.append(up._requests_later)
        assert [timer.cancelled() for timer in timers] == [True] * 22 + [False]
        up._ignore_data_plane()
        assert timers[-1].cancelled()
        assert not loop.remove_reader(up._dp.event_fd)
        os.close(up._dp.event_fd)

    asyncio.run(ask())
