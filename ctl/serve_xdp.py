# SPDX-License-Identifier: Apache-2.0
"""Guests served by the data plane: frames by AF_XDP, virtqueues by vhost-user.

Opening goes strictly outside in, and each step registers how it is undone before the next begins: data plane, NIC,
switch, guests, their sockets. `close` undoes the same steps from the inside out, so the NIC is given back as it was.

A guest's endpoint runs as a task of its own. Whatever goes wrong in it ends that guest's session, never the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from . import assignment, placement, privileges
from .api import numbers_param
from .capture.ports import Captures
from .config import GuestSpec, UpConfig, change_guest, check_new_guest, format_guest, format_mac
from .datapath import DROP_NAMES, FAULT_CALL_BLOCKED, Datapath
from .describe import describe_learned, describe_port
from .errors import ConfigError, XdpvhostError
from .hostport import name_for, refuse_taken
from .learning import Learning
from .links.journal import Journal
from .links.nicprep import adoptable
from .load import Look, WorkerLoad, measure, worker_counts, worker_loads
from .metrics.samples import Counters
from .rebalance import plan, totals
from .rundir import interface_index
from .service import Leftover, no_such_guest
from .switch import MAX_PAIRS_WITH_CTRL, Switch
from .vhost.endpoint import Endpoint
from .virtio import feature_names
from .xdp.nic import Nic, NicOptions

if TYPE_CHECKING:
    from .api import Handler, Held, Params
    from .hostport import HostPort
    from .metrics.declared import Sample
    from .nicport import NicPort
    from .switch import GuestEntry

log = logging.getLogger(__name__)

WATCHDOG_PERIOD = 0.1
EVENT_PERIOD = 0.01  # seconds between two looks at what the data plane reports
WORKER_PERIOD = 1.0  # seconds that the workers' loads in `status` are of
MEASURE_PERIOD = 1.0  # seconds that `rebalance` looks before it moves anybody
DEVICE_PERIOD = 1.0  # seconds between looks at the interface's MTU
BLOCKED_HOLD_OFF = 10.0  # seconds that a front-end which made a worker block has to wait
RETRY_PERIOD = 1.0


class XdpService:
    """Implements `service.Service`."""

    def __init__(self, config: UpConfig) -> None:
        """Raises ConfigError for a guest on an interface that isn't among them."""
        for spec in config.guests:
            placement.check(spec, config.ifaces)
        self._config = config
        self._stack = contextlib.AsyncExitStack()
        self._serving: dict[str, tuple[Endpoint, asyncio.Task[None]]] = {}
        self._removing = asyncio.Lock()
        self._pause: asyncio.TimerHandle | None = None  # until the data plane's next event is looked at
        self._dp: Datapath
        self._switch: Switch
        self._captures: Captures
        self._learning: Learning
        self._learn_later: asyncio.TimerHandle | None = None
        self._requests_later: asyncio.TimerHandle | None = None
        self._counters: Counters | None = None
        self._coming: list[GuestSpec] = []  # configured, and not yet added
        self._rebalancing = asyncio.Lock()
        self._worker_loads: list[WorkerLoad] = []  # of the last DEVICE_PERIOD

    @property
    def needs(self) -> Sequence[Sequence[str]]:
        return privileges.UP

    def leftover(self, journal: Journal, ifindexes: Sequence[int]) -> Leftover:
        adopted = [entry for ifindex in ifindexes for entry in adoptable(journal, ifindex)]
        foreign = any(entry.kind == "xdp" for entry in journal.pending())
        return Leftover(adopted, privileges.LEFTOVER if foreign else ())

    async def open(self, journal: Journal) -> None:
        config, stack, loop = self._config, self._stack, asyncio.get_running_loop()
        self._dp = dp = Datapath(config.workers, config.poll)
        stack.callback(dp.close)
        self._switch = switch = Switch(dp)
        stack.callback(switch.close)
        for nic in self._open_nics(journal):
            index = switch.add_nic(nic)
            if config.host_port is not None:
                switch.add_host_port(index, name_for(config.host_port, nic.iface, nic.ifindex), journal)
        dp.start()
        self._learning = Learning(switch, config.mac_age)
        self._counters = Counters(dp, switch)
        stack.callback(self._counters.close)
        self._captures = Captures(switch, self._counters.lock)
        stack.callback(self._captures.close)

        stack.push_async_callback(self._end_sessions)
        self._coming = list(config.guests)
        for spec in config.guests:
            self._coming.remove(spec)
            self._add_guest(spec)
        self._watch_data_plane()
        stack.callback(self._ignore_data_plane)
        watchdog = loop.create_task(self._watchdog(), name="watchdog")
        stack.callback(watchdog.cancel)
        device = loop.create_task(self._watch_device(), name="device")
        stack.callback(device.cancel)
        self._worker_loads = [WorkerLoad(0.0, 0.0)] * config.workers
        workers = loop.create_task(self._watch_workers(), name="workers")
        stack.callback(workers.cancel)

    def _open_nics(self, journal: Journal) -> Iterator[NicPort]:
        """Where the guests' frames come from and go to, in the order of `UpConfig.ifaces`."""
        config = self._config
        wanted = [
            NicOptions(iface=iface, xdp_mode=config.xdp_mode, bind=config.bind, ntuple=config.ntuple)
            for iface in config.ifaces
        ]
        for options in wanted:
            Nic.refuse(options)
            if config.host_port is not None:
                index = interface_index(options.iface)
                refuse_taken(name_for(config.host_port, options.iface, index), options.iface)
        for options in wanted:
            yield Nic.open(options, self._dp, journal)

    async def close(self) -> None:
        await self._stack.aclose()

    def summary(self) -> str:
        nics = ", ".join(f"{nic.iface} with {nic.nr_queues} queues" for nic in self._switch.nics)
        return f"{nics}, {len(self._serving)} guests, {self._config.workers} workers"

    # ---- guests ----

    @property
    def guests(self) -> Sequence[GuestSpec]:
        return [entry.spec for entry in self._switch.guests.values()]

    def add_guest(self, spec: GuestSpec) -> Mapping[str, Any]:
        return describe_guest(self._add_guest(spec))

    def _add_guest(self, spec: GuestSpec) -> GuestEntry:
        assert self._counters is not None
        check_new_guest(spec, (entry.spec for entry in self._switch.guests.values()))
        index = self._choose_nic(spec)
        nic = self._switch.nics[index]
        with self._counters.lock:
            entry = self._switch.add_guest(spec, index)
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
        if len(self._switch.nics) > 1:
            log.info("guest %r: on interface %s, %s", spec.name, nic.iface, _why_there(spec))
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

    def _choose_nic(self, spec: GuestSpec) -> int:
        """Its index. Guests that are still to come and name an interface count as if they were there."""
        switch, ifaces = self._switch, self._config.ifaces
        guests = [
            sum(entry.nic is nic for entry in switch.guests.values()) + sum(s.iface == iface for s in self._coming)
            for nic, iface in zip(switch.nics, ifaces, strict=True)
        ]
        return placement.choose(spec, ifaces, guests, [not nic.gone for nic in switch.nics])

    def set_guest(self, name: str, changes: Mapping[str, str]) -> Mapping[str, Any]:
        entry = self._switch.guests.get(name)
        if entry is None:
            raise no_such_guest(name, self.guests)
        spec = change_guest(entry.spec, changes)
        check_new_guest(spec, (other.spec for other in self._switch.others(entry)))
        if spec != entry.spec:
            self._switch.change_guest(name, spec)
            log.info("guest %r: is now %s", name, format_guest(spec))
        return describe_guest(entry)

    async def remove_guest(self, name: str) -> Mapping[str, Any]:
        async with self._removing:
            entry = self._switch.guests.get(name)
            if entry is None:
                raise no_such_guest(name, self.guests)
            description = describe_guest(entry)
            await self._end_session(name)
            self._captures.end_guest(entry)
            assert self._counters is not None
            with self._counters.lock:
                self._switch.remove_guest(name)
        log.info("guest %r: removed", name)
        return description

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
        for timer in (self._pause, self._learn_later, self._requests_later):
            if timer is not None:
                timer.cancel()
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
        self._learn()

    def _serve_guest_requests(self) -> None:
        """Guests ask while others wait for their turn already: there is one timer, for all of them."""
        if self._requests_later is not None:
            self._requests_later.cancel()
            self._requests_later = None
        delay = self._switch.serve_requests()
        if delay is not None:
            self._requests_later = asyncio.get_running_loop().call_later(delay, self._serve_guest_requests)

    def _learn(self) -> None:
        """Whenever a guest has learned an address, and every second for those that have grown old."""
        delay = self._learning.look()
        if delay is not None and self._learn_later is None:
            self._learn_later = asyncio.get_running_loop().call_later(delay, self._learn_again)

    def _learn_again(self) -> None:
        self._learn_later = None
        self._learn()

    async def _watchdog(self) -> None:
        while True:
            self._dp.watchdog()
            await asyncio.sleep(WATCHDOG_PERIOD)

    async def _watch_workers(self) -> None:
        before, then = worker_counts(self._dp), time.monotonic()
        while True:
            await asyncio.sleep(WORKER_PERIOD)
            now, when = worker_counts(self._dp), time.monotonic()
            self._worker_loads = worker_loads(before, now, when - then, self._dp.cycles_per_second)
            before, then = now, when

    async def _watch_device(self) -> None:
        while True:
            await asyncio.sleep(DEVICE_PERIOD)
            try:
                self._switch.follow_mtus()
                self._switch.follow_links()
                self._learn()
            except (XdpvhostError, OSError) as exc:
                log.error("interface %s: %s", self._config.iface, exc)
            except Exception:
                log.exception("interface %s: its guests were told nothing; please report it", self._config.iface)

    # ---- what it tells ----

    def describe(self) -> dict[str, Any]:
        entries = list(self._switch.guests.values())
        return {
            "workers": self._config.workers,
            "poll": self._config.poll,
            "worker_loads": assignment.of_workers(self._worker_loads, entries),
            "nics": [
                describe_nic(nic, self._switch.hosts.get(nic))
                | {"assignment": assignment.of_queues(index, nic, entries, self._config.workers)}
                for index, nic in enumerate(self._switch.nics)
            ],
            "captures": self._captures.describe(),
        }

    def describe_guests(self) -> list[dict[str, Any]]:
        return [
            describe_guest(entry) | assignment.of_guest(entry, self._config.workers)
            for entry in self._switch.guests.values()
        ]

    def read(self) -> list[Sample]:
        return self._counters.read() if self._counters is not None else []

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "rebalance": self._api_rebalance,
            "capture-start": self._api_capture_start,
            "capture-stop": self._api_capture_stop,
        }

    async def _api_rebalance(self, params: Params) -> dict[str, Any]:
        wanted = numbers_param(params, "move")
        async with self._rebalancing:
            return self._move_as_told(wanted) if wanted else await self._rebalance()

    def _move_as_told(self, wanted: Mapping[str, int]) -> dict[str, Any]:
        """Raises ConfigError for a guest or a worker that there is not, and then nobody moves."""
        workers = self._config.workers
        for name, worker in wanted.items():
            if name not in self._switch.guests:
                raise no_such_guest(name, self.guests)
            if not 0 <= worker < workers:
                raise ConfigError(
                    f"guest {name!r}: there is no worker {worker}, but {workers}, from 0 on; `up --workers N` has more"
                )
        return {"moves": self._move(wanted)}

    async def _rebalance(self) -> dict[str, Any]:
        """Look at what everybody does for a while, and even it out."""
        before = Look.at(self._dp, self._switch)
        await asyncio.sleep(MEASURE_PERIOD)
        seen = measure(before, Look.at(self._dp, self._switch), self._dp.cycles_per_second)
        moves = plan(seen.guests, seen.fixed)
        bases = {load.name: moves.get(load.name, load.worker) for load in seen.guests}
        expected = totals(seen.guests, seen.fixed, bases)
        return {
            "seconds": round(seen.seconds, 3),
            "workers": [
                {
                    "worker": worker,
                    "busy_percent": round(100 * load.busy, 1),
                    "packets_per_second": round(load.packets),
                    "expected_percent": round(100 * expected[worker], 1),
                }
                for worker, load in enumerate(seen.workers)
            ],
            "guests": [
                {
                    "name": load.name,
                    "busy_percent": round(100 * load.total, 1),
                    **{key: round(value) for key, value in msgspec.to_builtins(seen.rates[load.name]).items()},
                }
                for load in seen.guests
            ],
            "moves": self._move(moves),
        }

    def _move(self, workers: Mapping[str, int]) -> list[dict[str, Any]]:
        """What was moved, for the answer."""
        entries = {self._switch.guests[name]: worker for name, worker in workers.items()}
        moves = {entry: (entry.worker, worker) for entry, worker in entries.items() if entry.worker != worker}
        if moves:
            self._switch.assign({entry: worker for entry, (_, worker) in moves.items()})
        for entry, (old, new) in moves.items():
            log.info("guest %r: from worker %d to %d", entry.name, old, new)
        return [{"guest": entry.name, "from": old, "to": new} for entry, (old, new) in moves.items()]

    async def _api_capture_start(self, params: Params) -> Held:
        return await self._captures.start(params)

    async def _api_capture_stop(self, params: Params) -> Mapping[str, Any]:
        return self._captures.stop(params)


def _spec_words(spec: GuestSpec) -> tuple[str, str, int, str, str]:
    return spec.name, format_mac(spec.mac), spec.queues, str(spec.socket), spec.socket_mode


def _why_there(spec: GuestSpec) -> str:
    return "which has the fewest guests" if spec.iface is None else "as its SPEC says"


def describe_nic(nic: NicPort, host: HostPort | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(nic.facts)
    return {
        "iface": nic.iface,
        "ifindex": nic.ifindex,
        "state": "gone" if nic.gone else "there",
        "mtu": nic.mtu,
        "queues": nic.nr_queues,
        "host_port": None if host is None else host.describe(),
        "facts": facts,
    }


def describe_guest(entry: GuestEntry) -> dict[str, Any]:
    spec, port = entry.spec, entry.port
    rx = [port.rx_counters(pair) for pair in range(port.max_pairs)]
    tx = [port.tx_counters(pair) for pair in range(port.max_pairs)]
    return {
        "name": spec.name,
        "iface": entry.nic.iface,
        "iface_asked": spec.iface,
        "slot": entry.slot,
        "mac": format_mac(spec.mac),
        "listens_to": sorted(map(format_mac, entry.listens_to)),
        **describe_port(spec),
        "learned": describe_learned(entry),
        "queues": spec.queues,
        "socket": str(spec.socket),
        "socket_mode": spec.socket_mode,
        "spec": format_guest(spec),
        "connected": entry.connected,
        "features": f"{entry.features:#x}",
        "feature_names": feature_names(entry.features),
        "pairs_in_use": port.ctrl.pairs,
        "memory": asdict(entry.memory_use),
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
