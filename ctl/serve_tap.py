# SPDX-License-Identifier: Apache-2.0
"""Mode `tap` with `--serve vhost-user`: guests of the data plane, over one tap of its own in a bridge with the NIC.

The same vhost-user back-end as in mode xdp, and the same bridge as in mode tap: what differs is only the way between.
The bridge, and what moves there from the NIC, are in the journal and taken over after kill -9; the tap ends with us.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .config import GuestSpec, UpConfig
from .errors import ConfigError, NicError
from .links import nicprep, rtnl
from .links.changes import Changes, adoptable
from .links.netlink import get_link
from .modes import tapped
from .rundir import interface_index
from .serve_links import leftover_needs
from .serve_xdp import XdpService
from .service import Leftover, Needs
from .spec_policy import PORT_KEYS
from .tapnic import TapNic, random_port_mac, tap_name

if TYPE_CHECKING:
    from .links.journal import Entry, Journal
    from .nicport import NicPort


class Bridged:
    """A `tapnic.Network`: a bridge with the NIC in it."""

    def __init__(self, config: UpConfig, changes: Changes) -> None:
        self.iface = config.iface
        self.ifindex = changes.ifindex
        self.mac = get_link(config.iface).mac
        self._changes = changes
        self._uplink = tapped.TapUplink(config, changes)

    def open(self, wishes: dict[str, Any]) -> None:
        """Raises XdpvhostError, and then everything is as it was."""
        try:
            self._changes.note_wishes(wishes)
            self._uplink.open()
            self._changes.undo_unclaimed()
        except BaseException:
            self.close()
            raise

    def attach(self, index: int, name: str, mtu: int) -> None:
        bridge = get_link(self.iface).master
        if bridge is None:
            raise NicError(f"interface {self.iface}: somebody took it out of its bridge; try again")
        what = f"interface {self.iface}: tap {name} can't be"
        rtnl.no_ipv6(name)
        rtnl.change(index, f"{what} set", address=random_port_mac().hex(":"), mtu=mtu)
        rtnl.change(index, f"{what} put into the bridge", master=bridge)
        rtnl.change(index, f"{what} set up", state="up")

    def set_mtu(self, index: int, mtu: int) -> None:
        rtnl.change(index, f"interface {self.iface}: MTU {mtu} is refused by its tap", mtu=mtu)
        self._uplink.follow()

    def facts(self) -> dict[str, Any]:
        return self._uplink.facts()

    def close(self) -> None:
        self._uplink.close()
        self._changes.undo(None)


class TapService(XdpService):
    """Implements `service.Service`."""

    def __init__(self, config: UpConfig) -> None:
        super().__init__(config)
        if config.routed:
            raise ConfigError("--routed: a tap that all guests share is in a bridge; leave it out, or use --serve qemu")
        tapped.check_tap_config(replace(config, guests=()))
        for spec in config.guests:
            check_spec(spec)
        self._wishes = {"mode": config.mode, "serve": config.serve, **tapped.tap_wishes(config)}
        self._leftover: Sequence[Entry] = ()

    @property
    def needs(self) -> Needs:
        return tapped.NET_ADMIN

    def leftover(self, journal: Journal, ifindexes: Sequence[int]) -> Leftover:
        (ifindex,) = ifindexes
        self._leftover = adoptable(journal, ifindex, self._wishes, ())
        known = [entry for entry in nicprep.adoptable(journal, ifindex) if entry not in self._leftover]
        return Leftover([*self._leftover, *known], leftover_needs(journal))

    def _open_nics(self, journal: Journal) -> Iterator[NicPort]:
        config = self._config
        changes = Changes(journal, config.iface, interface_index(config.iface), self._leftover)
        network = Bridged(config, changes)
        network.open(self._wishes)
        yield TapNic.open(network, tap_name(config.iface), config.workers, self._dp)

    def add_guest(self, spec: GuestSpec) -> Mapping[str, Any]:
        check_spec(spec)
        return super().add_guest(spec)


def check_spec(spec: GuestSpec) -> None:
    """Raises ConfigError for keys that are about a tap of the guest's own."""
    for key, _ in spec.keys:
        if key not in PORT_KEYS:
            raise ConfigError(
                f"guest {spec.name!r}: {key}= is for a tap that QEMU opens; leave it out, or use --serve qemu"
            )
