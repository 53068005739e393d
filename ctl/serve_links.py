# SPDX-License-Identifier: Apache-2.0
"""Guests whose virtual machines open a device by themselves: what the modes in ctl/modes/ have in common.

Theory of operation. Frames never pass through this process: it makes devices, watches them, and takes them away. A
guest comes and goes by its own changes (ctl/links/changes.py), so that a failure half-way undoes exactly those. Neither
the data plane's library nor libxdp is loaded.

What is made while a virtual machine runs on it stays as long as `up` does: kill -9 leaves the devices, the next `up`
takes them over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .config import GuestSpec, UpConfig, check_new_guest, format_guest, format_mac
from .errors import ConfigError, DaemonError, XdpvhostError
from .links import nicprep, rtnl
from .links.changes import Changes, adoptable
from .metrics import declared as m
from .metrics.declared import Sample
from .modes import mode_for
from .rundir import interface_index
from .service import Leftover, Needs, no_such_guest

if TYPE_CHECKING:
    from .api import Handler, Params
    from .links.journal import Entry, Journal
    from .modes.base import LinkCounters, Uplink

log = logging.getLogger(__name__)

FOLLOW_PERIOD = 1.0  # seconds between looks at the NIC


class LinkService:
    """Implements `service.Service`."""

    def __init__(self, config: UpConfig) -> None:
        self._config = config
        self._mode = mode_for(config.mode)
        self._mode.check_config(config)
        self._wishes = {"mode": config.mode, **self._mode.uplink_wishes(config)}
        self._stack = AsyncExitStack()
        self._leftover: Sequence[Entry] = ()
        self._guests: dict[str, GuestSpec] = {}
        self._changes: Changes
        self._uplink: Uplink | None = None  # None: closed

    @property
    def needs(self) -> Needs:
        return self._mode.needs(self._config)

    def leftover(self, journal: Journal, ifindexes: Sequence[int]) -> Leftover:
        (ifindex,) = ifindexes
        guests = [format_guest(spec) for spec in self._config.guests]
        self._leftover = adoptable(journal, ifindex, self._wishes, guests)
        known = [entry for entry in nicprep.adoptable(journal, ifindex) if entry not in self._leftover]
        return Leftover([*self._leftover, *known], leftover_needs(journal))

    async def open(self, journal: Journal) -> None:
        config, stack = self._config, self._stack
        self._changes = changes = Changes(journal, config.iface, interface_index(config.iface), self._leftover)
        uplink = self._mode.uplink(config, changes)
        stack.callback(changes.undo, None)
        stack.callback(uplink.close)
        changes.note_wishes(self._wishes)
        uplink.open()
        self._uplink = uplink
        stack.callback(self._close_guests)
        for spec in config.guests:
            self.add_guest(spec)
        changes.undo_unclaimed()
        follow = asyncio.get_running_loop().create_task(self._follow(), name="links")
        stack.callback(follow.cancel)

    async def close(self) -> None:
        await self._stack.aclose()

    def _close_guests(self) -> None:
        for spec in reversed(list(self._guests.values())):
            self._forget(spec)
        self._uplink = None

    def _forget(self, spec: GuestSpec) -> bool:
        del self._guests[spec.name]
        return self._changes.undo(format_guest(spec))

    async def _follow(self) -> None:
        assert self._uplink is not None
        while True:
            await asyncio.sleep(FOLLOW_PERIOD)
            try:
                self._uplink.follow()
            except (XdpvhostError, OSError) as exc:
                log.error("interface %s: %s", self._config.iface, exc)
            except Exception:
                log.exception("interface %s: cannot be followed; please report it", self._config.iface)

    # ---- guests ----

    @property
    def guests(self) -> Sequence[GuestSpec]:
        return list(self._guests.values())

    def add_guest(self, spec: GuestSpec) -> Mapping[str, Any]:
        uplink, changes = self._open_uplink(), self._changes
        check_new_guest(spec, self.guests)
        self._mode.check_new_guest(spec, self.guests)
        changes.owner = format_guest(spec)
        try:
            uplink.add_guest(spec)
        except BaseException:
            changes.undo(changes.owner)
            raise
        finally:
            changes.owner = None
        self._guests[spec.name] = spec
        facts = self._describe_guest(spec)
        log.info("guest %r: %s, queue pairs %d, device %s", spec.name, facts["mac"], spec.queues, facts["device"])
        return facts

    def set_guest(self, name: str, changes: Mapping[str, str]) -> Mapping[str, Any]:
        raise ConfigError(
            f"guest {name!r}: in mode {self._config.mode} nothing can be changed while it is there; "
            f"`xdpvhost guest rm {name}`, then `guest add`"
        )

    async def remove_guest(self, name: str) -> Mapping[str, Any]:
        uplink = self._open_uplink()
        spec = self._guests.get(name)
        if spec is None:
            raise no_such_guest(name, self.guests)
        description = self._describe_guest(spec)
        uplink.remove_guest(spec)
        if not self._forget(spec):
            raise DaemonError(f"guest {name!r}: not everything of it could be undone; the daemon's log says what")
        log.info("guest %r: removed", name)
        return description

    def _open_uplink(self) -> Uplink:
        if self._uplink is None:
            raise DaemonError(f"interface {self._config.iface}: the daemon is going down")
        return self._uplink

    # ---- what it tells ----

    def summary(self) -> str:
        return f"{self._config.iface} in mode {self._config.mode}, {len(self._guests)} guests"

    def describe(self) -> dict[str, Any]:
        facts = self._open_uplink().facts()
        return {"nics": [{"iface": self._config.iface, "ifindex": self._changes.ifindex, "facts": facts}]}

    def describe_guests(self) -> list[dict[str, Any]]:
        with rtnl.one_look():
            return [self._describe_guest(spec) for spec in self._guests.values()]

    def _describe_guest(self, spec: GuestSpec) -> dict[str, Any]:
        uplink = self._open_uplink()
        counted = uplink.counters(spec)
        return {
            "name": spec.name,
            "mac": format_mac(spec.mac),
            "queues": spec.queues,
            "spec": format_guest(spec),
            **uplink.guest_facts(spec),
            **({} if counted is None else describe_counters(counted)),
        }

    def read(self) -> list[Sample]:
        samples = [Sample(m.BUILD_INFO, (__version__, "none"), 1)]
        uplink = self._uplink
        if uplink is None:
            return samples
        with rtnl.one_look():
            for spec in list(self._guests.values()):
                counted = uplink.counters(spec)
                if counted is not None:
                    samples += link_samples(self._config.mode, spec.name, counted)
        return samples

    def handlers(self) -> Mapping[str, Handler]:
        return {"rebalance": self._no_workers, "capture-start": self._no_capture}

    async def _no_workers(self, _: Params) -> NoReturn:
        raise ConfigError(f"the daemon is in mode {self._config.mode}: it has no workers, the kernel moves the frames")

    async def _no_capture(self, _: Params) -> NoReturn:
        raise ConfigError(
            f"capture: in mode {self._config.mode} frames don't pass the data plane; `tcpdump -i DEVICE` shows them, "
            "and `xdpvhost guest list` has the devices"
        )


def leftover_needs(journal: Journal) -> Needs:
    """What undoing a killed daemon's changes takes, which may have run in another mode."""
    from . import privileges

    return privileges.LEFTOVER if any(entry.kind == "xdp" for entry in journal.pending()) else ()


def describe_counters(counted: LinkCounters) -> dict[str, Any]:
    """As they are in the description of a guest in any mode."""
    return {
        "rx": {"packets": counted.rx_packets, "bytes": counted.rx_bytes, "drops": {"host": counted.rx_drops}},
        "tx": {"packets": counted.tx_packets, "bytes": counted.tx_bytes, "drops": {"host": counted.tx_drops}},
    }


def link_samples(mode: str, guest: str, counted: LinkCounters) -> list[Sample]:
    """What /metrics and `stats` show of a guest's device."""
    return [
        Sample(metric, (mode, guest, direction), value)
        for direction, values in (
            ("rx", (counted.rx_packets, counted.rx_bytes, counted.rx_drops)),
            ("tx", (counted.tx_packets, counted.tx_bytes, counted.tx_drops)),
        )
        for metric, value in zip((m.LINK_PACKETS, m.LINK_BYTES, m.LINK_DROPS), values, strict=True)
    ]
