# SPDX-License-Identifier: Apache-2.0
"""A NIC whose guests have taps: what the modes tap, vhost-net and emulated have in common.

Bridged (the default): NIC and taps are ports of one bridge. `--bridge NAME` takes an existing one, or names ours. The
NIC's addresses and routes move to the bridge, which breaks nothing but those who know the NIC by name, so it is only
done with `--force`.

Routed: no bridge. The host has a route to each guest's address through its tap, answers for it on the NIC, and for
everybody else on the tap; frames in between are the host's IP packets. Addresses and routes of the NIC stay.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .. import privileges
from ..config import GuestSpec, UpConfig
from ..errors import ConfigError, NicError
from ..feature import Feature
from ..links import addresses, bridge, opened, proxy, rtnl, sysctl, tap
from ..links.changes import Changes
from ..links.netlink import Link, get_link
from ..service import Needs
from ..spec_policy import PORT_KEYS
from ..spec_values import Ip
from . import keys
from .base import LinkCounters

log = logging.getLogger(__name__)

NET_ADMIN: Needs = (("CAP_NET_ADMIN",),)


class TapUplink:
    """Implements `Uplink`."""

    def __init__(self, config: UpConfig, changes: Changes) -> None:
        self.config = config
        self.changes = changes
        self._bridge: int | None = None  # its index
        self._mtu = 0
        self.warnings: list[str] = []

    # ---- the NIC

    def open(self) -> None:
        nic = self.changes.nic
        nic.expect_side_effects()  # a bridge, or forwarding, switches large receive offload off
        nic.bring_up()
        self._mtu = nic.link.mtu
        if self.config.routed:
            self._open_routed()
        else:
            self._open_bridge(get_link(self.config.iface))
        nic.note_side_effects()

    def _open_bridge(self, link: Link) -> None:
        name = self.config.bridge or default_bridge(link.name)
        known = rtnl.index_of(name)
        ours = known is not None and self._made_by_us(known)
        found = bridge.existing(name) if self.config.bridge and not ours else None
        if found is not None:
            target = found.index
            if found.mtu != link.mtu:
                self.warnings.append(f"bridge {name} has MTU {found.mtu}, interface {link.name} {link.mtu}")
        else:
            self._refuse_busy(link)
            target = bridge.make(self.changes, name, link, f"bridge {name}")
        theirs = link.master == target and not self.changes.has("port", device=link.index)
        if not theirs:  # else it was in there before us, and stays
            self._refuse_busy(link)
            bridge.put_in(self.changes, link.index, link.name, target)
        if found is None:
            rtnl.change(target, f"bridge {name}: cannot be set up", state="up")
        if not theirs:
            addresses.move(self.changes, link.index, target, link.name)
        self._bridge = target

    def _made_by_us(self, index: int) -> bool:
        """Whether a killed daemon announced this very bridge."""
        pending = (entry for entry in self.changes.journal.pending() if entry.kind == "bridge")
        return any(rtnl.find(rtnl.Identity.of(entry.args)) == index for entry in pending)

    def _refuse_busy(self, link: Link) -> None:
        """Raise NicError for a NIC that somebody uses in a way that we would break; `--force` allows what can move."""
        if self.changes.has("addresses") or self.changes.has("port", device=link.index):
            return  # a killed daemon was allowed to
        master = None if link.master is None else rtnl.link_message(link.master)
        if master is not None:
            info = master.get_attr("IFLA_LINKINFO")
            kind = info.get_attr("IFLA_INFO_KIND") if info else "unknown"
            owner = master.get_attr("IFLA_IFNAME")
            if kind != "bridge":
                raise NicError(f"interface {link.name}: belongs to {kind} {owner}; use {owner}, or another interface")
            if not self.config.force:
                raise NicError(
                    f"interface {link.name}: is in bridge {owner} already; `--bridge {owner}` uses that one, `--force` "
                    "takes it out and puts it back at the end"
                )
        use = addresses.in_use(link.index, link.name)
        if self.config.force:
            return
        reasons = ([f"has {', '.join(use.addresses)}"] if use.addresses else []) + (
            ["carries the default route"] if use.default_route else []
        )
        if reasons:
            raise NicError(
                f"interface {link.name}: {' and '.join(reasons)}, which would stop working in a bridge; `--force` "
                "moves addresses and routes to the bridge and back at the end, `--routed` needs no bridge"
            )

    def _open_routed(self) -> None:
        link = self.changes.nic.link
        if link.master is not None:
            raise NicError(
                f"interface {link.name}: is a port of another interface, so it routes nothing; name that one"
            )
        sysctl.put(self.changes, f"ipv4/conf/{link.name}/forwarding", "1")
        if (sysctl.ROOT / f"ipv6/conf/{link.name}").exists():
            sysctl.put(self.changes, f"ipv6/conf/{link.name}/proxy_ndp", "1")

    def close(self) -> None:
        pass

    # ---- guests

    def add_guest(self, spec: GuestSpec) -> None:
        what, name = f"guest {spec.name!r}", keys.device_name(spec)
        check_routed(spec, self.config.routed)
        who = keys.owner_of(spec)
        index = tap.make(self.changes, name, spec.queues, who, what)
        mac = bytes([0xFE, *spec.mac[1:]])  # the highest, so that no bridge takes it for its own
        rtnl.change(index, f"{what}: tap {name} cannot be set", address=mac.hex(":"), mtu=self._mtu)
        if self._bridge is not None:
            rtnl.no_ipv6(name)
            bridge.put_in(self.changes, index, name, self._bridge)
        rtnl.change(index, f"{what}: tap {name} cannot be set up", state="up")
        if self._bridge is None:
            self._route(spec, name, index)

    def _route(self, spec: GuestSpec, name: str, index: int) -> None:
        what = f"guest {spec.name!r}"
        for address in keys.addresses_of(spec):
            if address.version == 6:
                if (sysctl.ROOT / "ipv6/conf/all/forwarding").read_text().strip() != "1":
                    raise NicError(
                        f"{what}: this host routes no IPv6; `sysctl net.ipv6.conf.all.forwarding=1` (which makes it "
                        "deaf to router advertisements), or leave its IPv6 address out"
                    )
                (sysctl.ROOT / f"ipv6/conf/{name}/proxy_ndp").write_text("1")
            else:  # the tap's own settings die with it
                (sysctl.ROOT / f"ipv4/conf/{name}/forwarding").write_text("1")
                (sysctl.ROOT / f"ipv4/conf/{name}/proxy_arp").write_text("1")
                with suppress(OSError):
                    (sysctl.ROOT / f"ipv4/neigh/{name}/proxy_delay").write_text("0")
            proxy.route(address, index, what)
            proxy.answer(self.changes, address, what)

    def remove_guest(self, spec: GuestSpec) -> None:
        pass

    # ---- while it runs

    def follow(self) -> None:
        """A NIC whose MTU was changed takes its taps along; a bridge of ours follows its ports by itself."""
        message = rtnl.link_message(self.changes.ifindex)
        mtu = self._mtu if message is None else int(message.get_attr("IFLA_MTU"))
        if mtu == self._mtu:
            return
        self._mtu = mtu
        for entry in self.changes.journal.pending():
            if entry.kind in ("tap", "bridge"):
                index = rtnl.find(rtnl.Identity.of(entry.args))
                if index is not None:
                    rtnl.change(index, f"{entry.args['name']}: MTU {mtu} is refused", mtu=mtu)
        log.info("interface %s: MTU %d now, and so have its taps", self.config.iface, mtu)

    # ---- what it tells

    def facts(self) -> dict[str, Any]:
        message = rtnl.link_message(self.changes.ifindex)
        master = None if message is None else message.get_attr("IFLA_MASTER")
        found = None if master is None else rtnl.link_message(master)
        in_use = "none" if found is None else str(found.get_attr("IFLA_IFNAME"))
        asked = "routed" if self.config.routed else self.config.bridge or "one of our own"
        return {
            "bridge_asked": asked,
            "bridge_in_use": in_use,
            "mtu": self._mtu,
            "warnings": self.warnings,
        }

    def guest_facts(self, spec: GuestSpec) -> dict[str, Any]:
        name = keys.device_name(spec)
        index = rtnl.index_of(name)
        message = None if index is None else rtnl.link_message(index)
        facts: dict[str, Any] = {"device": name, "connected": bool(message and message.get_attr("IFLA_CARRIER"))}
        if index is None:
            return facts | {"device_state": "is gone"}
        known = tap.facts(index)
        facts |= {
            "queues_asked": spec.queues,
            "queues_in_use": known.get("queues_in_use") or int(facts["connected"]),
            "owner_asked": spec.key("owner"),
            "owner_in_use": known.get("owner"),
            "group_asked": spec.key("group"),
            "group_in_use": known.get("group"),
            "vnet_header": known.get("vnet_header"),
            "addresses": [str(address) for address in keys.addresses_of(spec)],
            "opened_by": [f"{o.name} (pid {o.pid})" for o in opened.openers([name])[name]],
        }
        return facts

    def counters(self, spec: GuestSpec) -> LinkCounters | None:
        return device_counters(keys.device_name(spec))


def device_counters(name: str) -> LinkCounters | None:
    """Of a tap or macvtap. What the device transmits, the guest receives."""
    index = rtnl.index_of(name)
    message = None if index is None else rtnl.link_message(index)
    stats = None if message is None else message.get_attr("IFLA_STATS64")
    if stats is None:
        return None
    return LinkCounters(
        rx_packets=stats["tx_packets"],
        rx_bytes=stats["tx_bytes"],
        rx_drops=stats["tx_dropped"],
        tx_packets=stats["rx_packets"],
        tx_bytes=stats["rx_bytes"],
        tx_drops=stats["rx_dropped"],
    )


def default_bridge(iface: str) -> str:
    """The name of a bridge of ours."""
    return f"xvbr-{iface}"[: rtnl.MAX_NAME]


def check_tap_config(config: UpConfig) -> None:
    """Raises ConfigError for options that contradict each other, and for guests that can't be routed to."""
    if config.routed and config.bridge:
        raise ConfigError("--routed and --bridge exclude each other; leave one out")
    if config.bridge and len(config.bridge.encode()) > rtnl.MAX_NAME:
        raise ConfigError(f"--bridge {config.bridge}: an interface's name has at most {rtnl.MAX_NAME} bytes")
    for spec in config.guests:
        check_routed(spec, config.routed)


def check_routed(spec: GuestSpec, routed: bool) -> None:
    """Raises ConfigError when a guest's addresses are missing, or good for nothing, or a key is for other guests."""
    for key, _ in spec.keys:
        if key in PORT_KEYS and key != "address":
            raise ConfigError(
                f"guest {spec.name!r}: {key}= is for guests that the data plane serves; leave it out, or use "
                "--serve vhost-user"
            )
    given = keys.addresses_of(spec)
    if routed and not given:
        raise ConfigError(f"guest {spec.name!r}: --routed needs its address; add address=IP to its SPEC")
    if given and not routed:
        raise ConfigError(f"guest {spec.name!r}: address= is for --routed; a bridge needs none, leave it out")


def check_tap_spec(spec: GuestSpec) -> None:
    """Raises ConfigError."""
    keys.check_device_name(spec)
    keys.addresses_of(spec)


def tap_wishes(config: UpConfig) -> dict[str, Any]:
    """What shapes the NIC's side."""
    return {"bridge": config.bridge, "routed": config.routed}


def missing_privileges() -> list[str]:
    """What this process lacks to make links."""
    return privileges.missing(NET_ADMIN)


def tap_feature(name: str, link: Link, detail: str) -> Feature:
    """What all tap modes need: CAP_NET_ADMIN, and the modules tun and bridge."""
    lacking = missing_privileges()
    if lacking:
        return Feature(name, False, f"missing {', '.join(lacking)}", "run as root")
    why = tap.missing()
    if why:
        return Feature(name, False, why, "`modprobe tun` (CONFIG_TUN)")
    if link.master is not None:
        detail += "; it is a port of another interface already: see --bridge"
    else:
        use = addresses.in_use(link.index, link.name)
        if use.addresses or use.default_route:
            detail += "; it has addresses or the default route: --force or --routed"
    return Feature(name, True, detail)


def _addresses(specs: Sequence[GuestSpec]) -> set[Ip]:
    """All addresses that these guests have."""
    return {address for spec in specs for address in keys.addresses_of(spec)}


def check_new_tap(spec: GuestSpec, others: Sequence[GuestSpec]) -> None:
    """Raises ConfigError when another guest has its device's name or one of its addresses."""
    keys.check_new_device(spec, list(others))
    taken = _addresses(others).intersection(keys.addresses_of(spec))
    if taken:
        raise ConfigError(f"guest {spec.name!r}: address {min(map(str, taken))} is another guest's; give each its own")
