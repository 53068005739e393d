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
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from . import placement, privileges
from .config import GuestSpec, UpConfig, change_guest, check_new_guest, format_guest, format_mac
from .datapath import DROP_NAMES, FAULT_CALL_BLOCKED, Datapath
from .describe import describe_port
from .errors import XdpvhostError
from .hostport import name_for, refuse_taken
from .links.journal import Journal
from .links.nicprep import adoptable
from .metrics.samples import Counters
from .rundir import interface_index
from .service import Leftover, no_such_guest
from .switch import MAX_PAIRS_WITH_CTRL, Switch
from .vhost.endpoint import Endpoint
from .virtio import feature_names
from .xdp.nic import Nic, NicOptions

if TYPE_CHECKING:
    from .api import Handler
    from .hostport import HostPort
    from .metrics.declared import Sample
    from .nicport import NicPort
    from .switch import GuestEntry

log = logging.getLogger(__name__)

WATCHDOG_PERIOD = 0.1
EVENT_PERIOD = 0.01  # seconds between two looks at what the data plane reports
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
        self._counters: Counters | None = None
        self._coming: list[GuestSpec] = []  # configured, and not yet added

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
        self._counters = Counters(dp, switch)
        stack.callback(self._counters.close)

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
                log.exception("interface %s: its guests were told nothing; please report it", self._config.iface)

    # ---- what it tells ----

    def describe(self) -> dict[str, Any]:
        return {
            "workers": self._config.workers,
            "poll": self._config.poll,
            "nics": [describe_nic(nic, self._switch.hosts.get(nic)) for nic in self._switch.nics],
        }

    def describe_guests(self) -> list[dict[str, Any]]:
        return [describe_guest(entry) for entry in self._switch.guests.values()]

    def read(self) -> list[Sample]:
        return self._counters.read() if self._counters is not None else []

    def handlers(self) -> Mapping[str, Handler]:
        return {}


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
