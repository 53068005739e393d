# SPDX-License-Identifier: Apache-2.0
"""Mode `macvtap`: a tap right on the NIC, without a bridge. QEMU gets it by an open /dev/tapN.

| --macvtap-mode | a guest reaches |
|---|---|
| bridge | the network, and the other guests, by a switch in the kernel |
| private | the network only; not even by way of the switch outside |
| vepa | the network; the other guests if the switch outside sends frames back where they came from |
| passthru | one guest, which has the NIC for itself: its MAC becomes the NIC's |

In none of them does a guest reach the host: macvtap sits beneath the host's own stack.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from typing import Any, ClassVar

from ..config import GuestSpec, Mode, UpConfig, format_mac
from ..errors import ConfigError, NicError
from ..feature import Feature
from ..libvirt import element_text
from ..links import addresses, macvtap, opened, rtnl
from ..links.changes import Changes
from ..links.netlink import Link, get_link, outside_loop
from ..qemu import Device
from ..service import Needs
from . import keys, tapped
from .base import Facts, LinkCounters, QemuNet

log = logging.getLogger(__name__)

FIRST_FD = 3  # of those that the shell opens for QEMU


class MacvtapUplink:
    """Implements `Uplink`."""

    def __init__(self, config: UpConfig, changes: Changes) -> None:
        self.config = config
        self.changes = changes
        self._passthru = config.macvtap_mode == "passthru"
        self._has_it: str | None = None  # the guest that has the NIC for itself

    def open(self) -> None:
        link = get_link(self.config.iface)
        _refuse_busy(link, self._passthru and not self.config.force)
        nic = self.changes.nic
        nic.expect_side_effects()  # macvtap switches large receive offload off
        nic.bring_up()

    def add_guest(self, spec: GuestSpec) -> None:
        what, name = f"guest {spec.name!r}", keys.device_name(spec)
        who = keys.owner_of(spec)
        if self._passthru:
            if self._has_it is not None:
                raise ConfigError(
                    f"{what}: guest {self._has_it!r} has interface {self.config.iface} for itself (passthru); remove "
                    "it first, or use another --macvtap-mode"
                )
            link = get_link(self.config.iface)
            macvtap.keep_address(self.changes, link.mac)
        mac = None if self._passthru else spec.mac
        index = macvtap.make(self.changes, name, mac, self.config.macvtap_mode, spec.queues, what)
        if self._passthru:
            rtnl.change(index, f"{what}: macvtap {name} cannot have its address", address=spec.mac.hex(":"))
        rtnl.no_ipv6(name)
        rtnl.change(index, f"{what}: macvtap {name} cannot be set up", state="up")
        macvtap.prepare_node(self.changes, index, who, what)
        self.changes.nic.note_side_effects()
        self._has_it = spec.name if self._passthru else None

    def remove_guest(self, spec: GuestSpec) -> None:
        self._has_it = None

    def follow(self) -> None:
        pass  # the kernel keeps a macvtap's MTU within the NIC's

    def close(self) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        message = rtnl.link_message(self.changes.ifindex)
        return {
            "mac": None if message is None else message.get_attr("IFLA_ADDRESS"),
            "mtu": None if message is None else message.get_attr("IFLA_MTU"),
            "macvtap_mode": self.config.macvtap_mode,
        }

    def guest_facts(self, spec: GuestSpec) -> dict[str, Any]:
        name = keys.device_name(spec)
        index = rtnl.index_of(name)
        if index is None:
            return {"device": name, "connected": False, "device_state": "is gone"}
        node = macvtap.node(index)
        holders = opened.openers([str(node)])[str(node)]
        found = node.stat() if node.exists() else None
        return {
            "device": name,
            "node": str(node),
            "connected": bool(holders),
            "macvtap_mode_asked": self.config.macvtap_mode,
            "macvtap_mode_in_use": macvtap.mode_in_use(index),
            "owner_asked": spec.key("owner"),
            "owner_in_use": None if found is None else found.st_uid,
            "group_asked": spec.key("group"),
            "group_in_use": None if found is None else found.st_gid,
            "opened_by": [f"{o.name} (pid {o.pid})" for o in holders],
        }

    def counters(self, spec: GuestSpec) -> LinkCounters | None:
        return tapped.device_counters(keys.device_name(spec))


def _refuse_busy(link: Link, addresses_matter: bool) -> None:
    """Raises NicError for a NIC that can't have a macvtap, or that would be lost for the host."""
    if link.master is not None:
        raise NicError(
            f"interface {link.name}: is a port of another interface, which takes its frames; use a macvtap on that one"
        )
    if not addresses_matter:
        return
    use = addresses.in_use(link.index, link.name)
    if use.addresses or use.default_route:
        words = f"has {', '.join(use.addresses)}" if use.addresses else "carries the default route"
        raise NicError(
            f"interface {link.name}: {words}, which would stop working: in mode passthru the guest has the interface "
            "for itself; `--force` means it, or use another --macvtap-mode"
        )


class MacvtapMode:
    """Implements `LinkMode`."""

    name: ClassVar[Mode] = "macvtap"

    def needs(self, _config: UpConfig) -> Needs:
        return tapped.NET_ADMIN

    def uplink_wishes(self, config: UpConfig) -> dict[str, Any]:
        return {"macvtap_mode": config.macvtap_mode}

    def check_config(self, config: UpConfig) -> None:
        if config.macvtap_mode == "passthru" and len(config.guests) > 1:
            raise ConfigError(
                f"--macvtap-mode passthru gives the interface to one guest, and {len(config.guests)} are asked for"
            )

    def check_spec(self, spec: GuestSpec) -> None:
        keys.check_device_name(spec)

    def check_new_guest(self, spec: GuestSpec, others: Sequence[GuestSpec]) -> None:
        keys.check_new_device(spec, list(others))

    def uplink(self, config: UpConfig, changes: Changes) -> MacvtapUplink:
        return MacvtapUplink(config, changes)

    def feature(self, link: Link) -> Feature:
        name = "mode-macvtap"
        lacking = [*tapped.missing_privileges()]
        if lacking:
            return Feature(name, False, f"missing {', '.join(lacking)}", "run as root")
        if link.master is not None:
            return Feature(name, False, "it is a port of another interface, which takes its frames", "use that one")
        why = outside_loop(macvtap.missing)
        if why:
            return Feature(name, False, why, "`modprobe macvtap` (CONFIG_MACVTAP)")
        return Feature(name, True, "the kernel has macvtaps; the host itself is not reached through them")

    def qemu(self, spec: GuestSpec, device: Device, facts: Facts | None) -> QemuNet:
        known = facts.get("node") if facts else None
        path = str(known) if known else f"/dev/tap$(cat /sys/class/net/{shlex.quote(keys.device_name(spec))}/ifindex)"
        fds = range(FIRST_FD, FIRST_FD + spec.queues)
        word = f"fd={fds[0]}" if spec.queues == 1 else f"fds={':'.join(map(str, fds))}"
        nic = keys.virtio_device(spec.name, format_mac(spec.mac), spec.queues, device.queue_size, device.packed)
        return QemuNet(
            ["-netdev", f"tap,id=net-{spec.name},{word},vhost=off", "-device", nic], dict.fromkeys(fds, path)
        )

    def libvirt(self, spec: GuestSpec, device: Device, _facts: Facts | None) -> str:
        from .tap import virtio_ethernet

        return element_text(virtio_ethernet(spec, device, "qemu"))


MODE = MacvtapMode()
