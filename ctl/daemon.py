# SPDX-License-Identifier: Apache-2.0
"""The life of `xdpvhost up`.

Theory of operation. Everything that control does happens on one asyncio loop in one thread: the vhost-user sessions,
the API, the data plane's faults and its watchdog. Two kinds of other threads exist: the workers (ctl/datapath.py) and
the metrics server, which only reads counters (ctl/metrics/samples.py has the lock that keeps them alive).

Coming up goes strictly outside in, and each step registers how it is undone before the next begins: run directory,
interface, what a killed predecessor left, data plane, NIC, switch, guests, sockets, API, metrics. Only then READY=1.
Going down (SIGTERM, SIGINT, the API's `down`, or a failure while coming up) undoes the same steps from the inside out,
so the NIC is given back exactly as it was. SIGKILL skips all that; the journal in the run directory remembers what
changed on the NIC, and the next `up` or `clean` undoes it first.

A guest's endpoint runs as a task of its own. Whatever goes wrong in it ends that guest's session, never the daemon.
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

import msgspec

from . import __version__, privileges
from .api import ApiServer, Handler, Params, text_param
from .config import (
    GuestSpec,
    UpConfig,
    check_new_guest,
    format_guest,
    format_mac,
    parse_guest,
)
from .datapath import DROP_NAMES, FAULT_CALL_BLOCKED, Datapath
from .errors import ConfigError, NicError, XdpvhostError
from .links.journal import Entry, Journal
from .links.nicprep import adoptable
from .links.undo import handlers
from .metrics.endpoint import Endpoint as MetricsEndpoint
from .metrics.samples import Counters, Sample
from .notify import notify
from .rundir import InterfaceLock, RunDir, remove_stale_sockets
from .switch import MAX_PAIRS_WITH_CTRL, Switch
from .vhost.endpoint import Endpoint
from .virtio import feature_names
from .xdp.nic import Nic, NicOptions

if TYPE_CHECKING:
    from .switch import GuestEntry

log = logging.getLogger(__name__)

WATCHDOG_PERIOD = 0.1
EVENT_PERIOD = 0.01  # seconds between two looks at what the data plane reports
DEVICE_PERIOD = 1.0  # seconds between looks at the interface's MTU
BLOCKED_HOLD_OFF = 10.0  # seconds that a front-end which made a worker block has to wait
RETRY_PERIOD = 1.0


class Daemon:
    """One interface, its guests, and everything that serves them. `run()` is its whole life."""

    def __init__(self, config: UpConfig) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()
        self._serving: dict[str, tuple[Endpoint, asyncio.Task[None]]] = {}
        self._removing = asyncio.Lock()
        self._started = time.monotonic()
        self._metrics: MetricsEndpoint | None = None
        self._journal: Journal | None = None
        self._pause: asyncio.TimerHandle | None = None  # until the data plane's next event is looked at
        self._not_ours: frozenset[int] = frozenset()  # the journal's entries that could not be undone at the start

    async def run(self) -> None:
        """Come up, stay until told to stop, go down. Raises what kept it from coming up."""
        privileges.require("up", privileges.UP)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        left: list[Entry] = []
        try:
            async with self._stack:
                await self._come_up(loop)
                log.info("%s", self._ready_line())
                notify(f"READY=1\nSTATUS={len(self._serving)} guests on {self._config.iface}")
                await self._stop.wait()
                notify("STOPPING=1")
                log.info("stopping: giving %s back", self._config.iface)
        finally:
            if self._journal is not None:
                left = [entry for entry in self._journal.pending() if entry.id not in self._not_ours]
            if left:
                log.error("stopped: %s is NOT as it was", self._config.iface)
        if left:
            raise NicError(
                f"interface {self._config.iface}: not undone: {', '.join(entry.kind for entry in left)} (the log says "
                f"why); run `xdpvhost clean --run-dir {self._config.run_dir}` to try again"
            )
        log.info("stopped: %s is as it was", self._config.iface)

    def _signalled(self, number: signal.Signals) -> None:
        log.info("received %s", number.name)
        self._stop.set()

    async def _come_up(self, loop: asyncio.AbstractEventLoop) -> None:
        config, stack = self._config, self._stack
        lock_dir = RunDir(config.run_dir)
        stack.callback(lock_dir.close)
        lock_iface = InterfaceLock(config.iface)
        stack.callback(lock_iface.close)
        journal = self._undo_leftovers(lock_dir, lock_iface)
        theirs = [spec.socket for spec in config.guests if spec.socket_mode == "client"]
        for path in remove_stale_sockets(config.run_dir, keep=theirs):
            log.warning("removed, left by a killed daemon: socket %s", path)

        raise_open_files()
        self._dp = dp = Datapath(config.workers, config.poll)
        stack.callback(dp.close)
        self._switch = switch = Switch(dp)
        stack.callback(switch.close)
        options = NicOptions(iface=config.iface, xdp_mode=config.xdp_mode, bind=config.bind)
        switch.add_nic(Nic.open(options, dp, journal))
        dp.start()
        self._counters = Counters(dp, switch)
        stack.callback(self._counters.close)

        stack.push_async_callback(self._end_sessions)
        for spec in config.guests:
            self._add_guest(spec)
        self._watch_data_plane()
        stack.callback(self._ignore_data_plane)
        watchdog = loop.create_task(self._watchdog(), name="watchdog")
        stack.callback(watchdog.cancel)
        device = loop.create_task(self._watch_device(), name="device")
        stack.callback(device.cancel)

        api = ApiServer(config.run_dir, self._handlers())
        await api.start()
        stack.push_async_callback(api.close)
        if config.metrics is not None:
            self._metrics = MetricsEndpoint(config.metrics, self._counters)
            stack.push_async_callback(asyncio.to_thread, self._metrics.close)

    def _undo_leftovers(self, lock_dir: RunDir, lock_iface: InterfaceLock) -> Journal:
        journal = Journal(lock_dir.journal, handlers(held=lock_iface.index))
        left = journal.pending()
        if any(entry.kind == "xdp" for entry in left):
            privileges.require("up", privileges.LEFTOVER)
        adopted = adoptable(journal, lock_iface.index)
        for undone in journal.replay_undo([entry for entry in left if entry not in adopted]):
            if undone.ok:
                log.warning("undone, left by a killed daemon: %s", undone.detail)
        self._journal = journal
        self._not_ours = frozenset(entry.id for entry in journal.pending() if entry not in adopted)
        self._stack.callback(journal.replay_undo, adopted)  # in case the NIC isn't even opened
        return journal

    def _ready_line(self) -> str:
        nic = self._switch.nics[0]
        metrics = f"http://{self._metrics.address}/metrics" if self._metrics else "none"
        return (
            f"ready: {nic.iface} with {nic.nr_queues} queues, {len(self._serving)} guests, "
            f"{self._config.workers} workers, run directory {self._config.run_dir}, metrics {metrics}"
        )

    # ---- guests ----

    def _add_guest(self, spec: GuestSpec) -> GuestEntry:
        nic = self._switch.nics[0]
        check_new_guest(spec, (entry.spec for entry in self._switch.guests.values()))
        with self._counters.lock:
            entry = self._switch.add_guest(spec)
        endpoint = Endpoint(spec, entry)
        try:
            endpoint.open()
        except BaseException:
            with self._counters.lock:
                self._switch.remove_guest(spec.name)
            raise
        entry.config_changed = endpoint.config_changed
        task = asyncio.get_running_loop().create_task(self._serve(spec.name, endpoint), name=f"guest {spec.name}")
        self._serving[spec.name] = endpoint, task
        log.info("guest %r: %s, queue pairs %d, socket %s (%s)", *_spec_words(spec))
        if spec.queues > nic.nr_queues:
            log.info(
                "guest %r: frames from %s, which has %d queues, arrive in its first %d pairs, unless it sets up RSS",
                spec.name, nic.iface, nic.nr_queues, nic.nr_queues,
            )  # fmt: skip
        if spec.queues > MAX_PAIRS_WITH_CTRL:
            log.warning(
                "guest %r: with %d queue pairs its front-end must serve the control virtqueue itself, as QEMU does; "
                "for one that leaves it to xdpvhost, as User-Mode Linux does, give it %d at most",
                spec.name, spec.queues, MAX_PAIRS_WITH_CTRL,
            )  # fmt: skip
        return entry

    async def _serve(self, name: str, endpoint: Endpoint) -> None:
        """Run one guest's endpoint; its failure is that guest's alone, and is tried again."""
        while True:
            try:
                await endpoint.run()
                return
            except XdpvhostError as exc:
                log.error("guest %r: %s", name, exc)
            except Exception:
                log.exception("guest %r: its endpoint failed; please report it", name)
            await asyncio.sleep(RETRY_PERIOD)

    async def _end_session(self, name: str) -> None:
        """When it returns, no ring of the guest is left in the data plane. May be called again."""
        serving = self._serving.get(name)
        if serving is not None:
            endpoint, task = serving
            await endpoint.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._serving.pop(name, None)

    async def _end_sessions(self) -> None:
        names = list(self._serving)
        results = await asyncio.gather(*map(self._end_session, names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, BaseException):
                log.error("guest %r: its connection could not be ended: %s", name, result, exc_info=result)

    # ---- data plane ----

    def _watch_data_plane(self) -> None:
        asyncio.get_running_loop().add_reader(self._dp.event_fd, self._data_plane_event)

    def _ignore_data_plane(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        asyncio.get_running_loop().remove_reader(self._dp.event_fd)

    def _data_plane_event(self) -> None:
        """Looks at all guests. A guest can cause events as fast as it likes, so it rests for a moment afterwards."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._dp.event_fd)
        self._pause = loop.call_later(EVENT_PERIOD, self._watch_data_plane)
        with contextlib.suppress(BlockingIOError):
            os.read(self._dp.event_fd, 8)
        for entry, why in self._switch.faulted():
            serving = self._serving.get(entry.name)
            if serving is not None:
                blocked = entry.port.fault.code == FAULT_CALL_BLOCKED
                serving[0].disconnect(why, BLOCKED_HOLD_OFF if blocked else 0.0)
        self._serve_guest_requests()

    def _serve_guest_requests(self) -> None:
        delay = self._switch.serve_requests()
        if delay is not None:
            asyncio.get_running_loop().call_later(delay, self._serve_guest_requests)

    async def _watchdog(self) -> None:
        while True:
            self._dp.watchdog()
            await asyncio.sleep(WATCHDOG_PERIOD)

    async def _watch_device(self) -> None:
        while True:
            await asyncio.sleep(DEVICE_PERIOD)
            try:
                self._switch.follow_mtus()
                self._switch.follow_links()
            except (XdpvhostError, OSError) as exc:
                log.error("interface %s: %s", self._config.iface, exc)
            except Exception:
                log.exception("interface %s: its MTU or link is not known; please report it", self._config.iface)

    # ---- API ----

    def _handlers(self) -> Mapping[str, Handler]:
        return {
            "status": self._api_status,
            "stats": self._api_stats,
            "guest-add": self._api_guest_add,
            "guest-rm": self._api_guest_rm,
            "guest-list": self._api_guest_list,
            "down": self._api_down,
        }

    async def _api_status(self, _: Params) -> dict[str, Any]:
        config = self._config
        return {
            "version": __version__,
            "pid": os.getpid(),
            "run_dir": str(config.run_dir),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "metrics": f"http://{self._metrics.address}/metrics" if self._metrics else None,
            "workers": config.workers,
            "poll": config.poll,
            "nics": [describe_nic(nic) for nic in self._switch.nics],
            "guests": [describe_guest(entry) for entry in self._switch.guests.values()],
        }

    async def _api_stats(self, _: Params) -> dict[str, Any]:
        return describe_stats(await asyncio.to_thread(self._counters.read), time.time())

    async def _api_guest_add(self, params: Params) -> dict[str, Any]:
        return describe_guest(self._add_guest(parse_guest(text_param(params, "spec"), self._config.run_dir)))

    async def _api_guest_rm(self, params: Params) -> dict[str, Any]:
        name = text_param(params, "name")
        async with self._removing:
            entry = self._switch.guests.get(name)
            if entry is None:
                known = ", ".join(self._switch.guests) or "none"
                raise ConfigError(f"guest {name!r} does not exist; guests here: {known}")
            description = describe_guest(entry)
            await self._end_session(name)
            with self._counters.lock:
                self._switch.remove_guest(name)
        log.info("guest %r: removed", name)
        return description

    async def _api_guest_list(self, _: Params) -> list[dict[str, Any]]:
        return [describe_guest(entry) for entry in self._switch.guests.values()]

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


def _spec_words(spec: GuestSpec) -> tuple[str, str, int, str, str]:
    return spec.name, format_mac(spec.mac), spec.queues, str(spec.socket), spec.socket_mode


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


def describe_nic(nic: Nic) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(nic.facts)
    return {"iface": nic.iface, "ifindex": nic.ifindex, "mtu": nic.mtu, "queues": nic.nr_queues, "facts": facts}


def describe_guest(entry: GuestEntry) -> dict[str, Any]:
    spec, port = entry.spec, entry.port
    rx = [port.rx_counters(pair) for pair in range(port.max_pairs)]
    tx = [port.tx_counters(pair) for pair in range(port.max_pairs)]
    return {
        "name": spec.name,
        "slot": entry.slot,
        "mac": format_mac(spec.mac),
        "listens_to": sorted(map(format_mac, entry.listens_to)),
        "queues": spec.queues,
        "socket": str(spec.socket),
        "socket_mode": spec.socket_mode,
        "spec": format_guest(spec),
        "connected": entry.connected,
        "features": f"{entry.features:#x}",
        "feature_names": feature_names(entry.features),
        "pairs_in_use": port.ctrl.pairs,
        "reconnects": entry.reconnects,
        "protocol_errors": {str(reason): count for reason, count in entry.protocol_errors.items() if count},
        "rx": {
            "packets": sum(c.packets for c in rx),
            "bytes": sum(c.bytes for c in rx),
            "copied_bytes": sum(c.copied_bytes for c in rx),
            "drops": {name: sum(c.drops[i] for c in rx) for i, name in enumerate(DROP_NAMES)},
        },
        "tx": {
            "packets": sum(c.packets for c in tx),
            "bytes": sum(c.bytes for c in tx),
            "drops": {name: sum(c.drops[i] for c in tx) for i, name in enumerate(DROP_NAMES)},
        },
    }


def run(config: UpConfig) -> None:
    """Run the daemon in the foreground until it is told to stop."""

    async def life() -> None:
        await Daemon(config).run()

    asyncio.run(life())
