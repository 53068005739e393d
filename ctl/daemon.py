# SPDX-License-Identifier: Apache-2.0
"""The life of `xdpvhost up`.

Theory of operation. Everything that control does happens on one asyncio loop in one thread: the service that the mode
asks for (ctl/service.py), the API, the data plane's faults and its watchdog. Two kinds of other threads exist: the
workers (ctl/datapath.py) and the metrics server, which only reads counters (ctl/metrics/samples.py has the lock that
keeps them alive).

Coming up goes strictly outside in, and each step registers how it is undone before the next begins: run directory,
interfaces, what a killed predecessor left, the service with its guests, API, metrics. Only then READY=1.
Going down (SIGTERM, SIGINT, the API's `down`, or a failure while coming up) undoes the same steps from the inside out,
so the NIC is given back exactly as it was. SIGKILL skips all that; the journal in the run directory remembers what
changed on the host, and the next `up` or `clean` undoes it first, or the next `up` takes it over.

A second `up` with the same wishes changes nothing and succeeds; one with others is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import __version__, api, privileges
from .api import ApiServer, Handler, Params, text_param, texts_param
from .config import UpConfig, differing, parse_guest, wishes
from .errors import NicError, XdpvhostError
from .links.journal import Entry, Journal
from .links.undo import handlers
from .notify import notify
from .rundir import InterfaceLocks, RunDir, RunDirTaken, remove_stale_sockets
from .service import Service, service_for

if TYPE_CHECKING:
    from .metrics.declared import Sample
    from .metrics.endpoint import Endpoint as MetricsEndpoint

log = logging.getLogger(__name__)

ASK_TIMEOUT = 5.0  # seconds for a daemon that is up already to say what it was asked for


class Daemon:
    """Its interfaces, their guests, and everything that serves them. `run()` is its whole life."""

    def __init__(self, config: UpConfig, service: Service | None = None) -> None:
        """`service` defaults to the one for `config`."""
        self._config = config
        self._service = service or service_for(config)
        self._stop = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()
        self._started = time.monotonic()
        self._metrics: MetricsEndpoint | None = None
        self._journal: Journal | None = None
        self._not_ours: frozenset[int] = frozenset()  # the journal's entries that could not be undone at the start

    async def run(self) -> None:
        """Come up, stay until told to stop, go down. Raises what kept it from coming up."""
        privileges.require("up", self._service.needs)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        left: list[Entry] = []
        try:
            async with self._stack:
                await self._come_up(loop)
                log.info("%s", self._ready_line())
                notify(f"READY=1\nSTATUS={len(self._service.guests)} guests on {self._config.iface}")
                await self._stop.wait()
                notify("STOPPING=1")
                log.info("stopping: giving %s back", self._config.iface)
        finally:
            if self._journal is not None:
                left = [entry for entry in self._journal.pending() if entry.id not in self._not_ours]
            if left:
                log.error("stopped: %s", self._config.words("is NOT as it was", "are NOT as they were"))
        if left:
            theirs = ", ".join(dict.fromkeys(entry.args.get("iface", self._config.iface) for entry in left))
            raise NicError(
                f"interface {theirs}: not undone: {', '.join(entry.kind for entry in left)} (the log says "
                f"why); run `xdpvhost clean --run-dir {self._config.run_dir}` to try again"
            )
        log.info("stopped: %s", self._config.words("is as it was", "are as they were"))

    def _signalled(self, number: signal.Signals) -> None:
        log.info("received %s", number.name)
        self._stop.set()

    async def _come_up(self, loop: asyncio.AbstractEventLoop) -> None:
        config, stack = self._config, self._stack
        lock_dir = RunDir(config.run_dir)
        stack.callback(lock_dir.close)
        locks = InterfaceLocks(config.ifaces)
        stack.callback(locks.close)
        journal = self._undo_leftovers(lock_dir, locks)
        theirs = [spec.socket for spec in config.guests if spec.socket_mode == "client"]
        for path in remove_stale_sockets(config.run_dir, keep=theirs):
            log.warning("removed, left by a killed daemon: socket %s", path)

        raise_open_files()
        stack.push_async_callback(self._service.close)
        await self._service.open(journal)

        server = ApiServer(config.run_dir, self._handlers())
        await server.start()
        stack.push_async_callback(server.close)
        if config.metrics is not None:
            from .metrics.endpoint import Endpoint as MetricsEndpoint

            self._metrics = MetricsEndpoint(config.metrics, self._service)
            stack.push_async_callback(asyncio.to_thread, self._metrics.close)

    def _undo_leftovers(self, lock_dir: RunDir, locks: InterfaceLocks) -> Journal:
        journal = Journal(lock_dir.journal, handlers(held=locks.indices))
        leftover = self._service.leftover(journal, locks.indices)
        privileges.require("up", leftover.needs)
        adopted = leftover.adopted
        for undone in journal.replay_undo([entry for entry in journal.pending() if entry not in adopted]):
            if undone.ok:
                log.warning("undone, left by a killed daemon: %s", undone.detail)
        self._journal = journal
        self._not_ours = frozenset(entry.id for entry in journal.pending() if entry not in adopted)
        self._stack.callback(journal.replay_undo, adopted)  # in case the NIC isn't even opened
        return journal

    def _ready_line(self) -> str:
        metrics = f"http://{self._metrics.address}/metrics" if self._metrics else "none"
        return f"ready: {self._service.summary()}, run directory {self._config.run_dir}, metrics {metrics}"

    # ---- API ----

    def _handlers(self) -> Mapping[str, Handler]:
        return {
            "status": self._api_status,
            "stats": self._api_stats,
            "wishes": self._api_wishes,
            "guest-add": self._api_guest_add,
            "guest-set": self._api_guest_set,
            "guest-rm": self._api_guest_rm,
            "guest-list": self._api_guest_list,
            "down": self._api_down,
            **self._service.handlers(),
        }

    async def _api_status(self, _: Params) -> dict[str, Any]:
        config = self._config
        return {
            "version": __version__,
            "pid": os.getpid(),
            "run_dir": str(config.run_dir),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "metrics": f"http://{self._metrics.address}/metrics" if self._metrics else None,
            "mode": config.mode,
            **self._service.describe(),
            "guests": self._service.describe_guests(),
        }

    async def _api_stats(self, _: Params) -> dict[str, Any]:
        return describe_stats(await asyncio.to_thread(self._service.read), time.time())

    async def _api_wishes(self, _: Params) -> dict[str, Any]:
        return wishes(self._config, self._service.guests)

    async def _api_guest_add(self, params: Params) -> Mapping[str, Any]:
        spec = parse_guest(text_param(params, "spec"), self._config.run_dir, self._config.mode)
        return self._service.add_guest(spec)

    async def _api_guest_set(self, params: Params) -> Mapping[str, Any]:
        name, changes = texts_param(params, "name", "set")
        return self._service.set_guest(name, changes)

    async def _api_guest_rm(self, params: Params) -> Mapping[str, Any]:
        return await self._service.remove_guest(text_param(params, "name"))

    async def _api_guest_list(self, _: Params) -> list[dict[str, Any]]:
        return self._service.describe_guests()

    async def _api_down(self, _: Params) -> dict[str, Any]:
        log.info("asked to go down")
        self._stop.set()
        return {"pid": os.getpid()}


def raise_open_files() -> None:
    """Allow as many descriptors as the hard limit does: every guest has dozens."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as exc:
            log.warning("cannot raise the limit of open files from %d to %d: %s", soft, hard, exc)


def describe_stats(samples: Sequence[Sample], when: float) -> dict[str, Any]:
    """Every counter under its metric's name; `when` in seconds since the epoch."""
    counters = [
        {
            "name": sample.metric.name,
            "labels": dict(zip(sample.metric.labels, sample.labels, strict=True)),
            "value": sample.value,
        }
        for sample in samples
    ]
    return {"time": when, "counters": counters}


def run(config: UpConfig) -> None:
    """Run the daemon in the foreground until it is told to stop. Returns at once when it is up already."""

    async def life() -> None:
        await Daemon(config).run()

    try:
        asyncio.run(life())
    except RunDirTaken as taken:
        found = _differences(config, taken)
        if found:
            raise RunDirTaken(f"{taken}; what it was asked for differs: {'; '.join(found)}") from None
        log.info("already up: %s, in run directory %s, as asked for; nothing is changed", config.iface, config.run_dir)


def _differences(config: UpConfig, taken: RunDirTaken) -> list[str]:
    """What the daemon that has the run directory was asked for, other than `config`. Raises `taken` if it can't say."""
    try:
        theirs = api.call(config.run_dir, "wishes", timeout=ASK_TIMEOUT)
    except XdpvhostError:
        raise taken from None
    return differing(wishes(config, config.guests), theirs)
