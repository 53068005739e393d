# SPDX-License-Identifier: Apache-2.0
"""Mode `vf`: each guest has a virtual function (VF) of the NIC, by SR-IOV.

The card sorts frames by MAC and VLAN in hardware. A guest's VF goes to

    to=vfio          a virtual machine: bound to vfio-pci, behind the IOMMU (the default)
    to=netdev        whoever uses its network device, here
    to=netns:NAME    a container: its network device is moved into that network namespace

What the card shall enforce is set through the physical function before the VF's driver starts, because a driver reads
its address only then: so a VF that has a driver loses it first.

How each change is undone: `sriov_numvfs`, `vf_settings`, `vf_driver` and `vf_netns` in ctl/links/undo.py.
"""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ..config import GuestSpec, Mode, UpConfig, format_mac
from ..errors import ConfigError, NicError
from ..feature import Feature
from ..links import sriov, vfconfig, vfio, vfnetdev
from ..links.netlink import Link, get_link
from ..links.pci import Function, Lacking
from ..links.vfconfig import VfSettings
from ..qemu import DEFAULT_DEVICE
from ..spec_values import whole_number
from .base import Facts, LinkCounters, QemuNet

if TYPE_CHECKING:
    from ..links.changes import Changes
    from ..links.journal import Entry
    from ..qemu import Device
    from ..service import Needs

log = logging.getLogger(__name__)

Target = Literal["vfio", "netdev", "netns"]

MAX_RATE = 10**9  # Mb/s; the card's own limit is told by its driver
SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class Wish:
    """A SPEC's own keys, understood. `vf` None: any that is free. `netns` names the namespace of target netns."""

    settings: VfSettings
    vf: int | None
    to: Target
    netns: str | None


def parse(spec: GuestSpec) -> Wish:
    """Raises ConfigError for a value that no card can have."""
    what = f"guest {spec.name!r}"
    if spec.queues != 1:
        raise ConfigError(f"{what}: queues={spec.queues}: a VF has the queues that its card gives it; leave it out")
    settings = VfSettings(
        mac=format_mac(spec.mac),
        vlan=_number(spec, "vlan", vfconfig.MAX_VLAN),
        qos=_number(spec, "qos", vfconfig.MAX_QOS),
        vlan_protocol=_choice(spec, "vlan-protocol", {name: name for name in vfconfig.VLAN_PROTOCOLS}),
        spoof_check=_choice(spec, "spoof-check", SWITCH),
        trust=_choice(spec, "trust", SWITCH),
        min_rate=_number(spec, "min-rate", MAX_RATE),
        max_rate=_number(spec, "max-rate", MAX_RATE),
        link=_choice(spec, "link", {name: name for name in vfconfig.LINK_MODES}),
    )
    if settings.vlan is None and (settings.qos is not None or settings.vlan_protocol is not None):
        key = "qos" if settings.qos is not None else "vlan-protocol"
        raise ConfigError(f"{what}: {key} without vlan; add vlan=N (0 to {vfconfig.MAX_VLAN})")
    if settings.max_rate and (settings.min_rate or 0) > settings.max_rate:
        raise ConfigError(
            f"{what}: min-rate={settings.min_rate} is above max-rate={settings.max_rate}; "
            f"give it {settings.max_rate} or less"
        )
    to = spec.key("to") or "vfio"
    kind, colon, name = to.partition(":")
    if to in ("vfio", "netdev"):
        return Wish(settings, _number(spec, "vf", 65535), "vfio" if to == "vfio" else "netdev", None)
    if kind != "netns" or not colon or not name or "/" in name or name in (".", ".."):
        raise ConfigError(f"{what}: to={to} is unknown; use vfio, netdev or netns:NAME")
    return Wish(settings, _number(spec, "vf", 65535), "netns", name)


def _number(spec: GuestSpec, key: str, most: int) -> int | None:
    text = spec.key(key)
    if text is None:
        return None
    value = whole_number(text)
    if value is None or value > most:
        raise ConfigError(f"guest {spec.name!r}: {key}={text} is not a number from 0 to {most}")
    return value


def _choice(spec: GuestSpec, key: str, choices: dict[str, Any]) -> Any:
    text = spec.key(key)
    if text is None:
        return None
    if text not in choices:
        raise ConfigError(f"guest {spec.name!r}: {key}={text} is unknown; use {' or '.join(choices)}")
    return choices[text]


@dataclass(frozen=True)
class Assigned:
    """The VF that a guest has."""

    wish: Wish
    number: int
    function: Function


class VfUplink:
    """Implements `base.Uplink`."""

    def __init__(self, config: UpConfig, changes: Changes) -> None:
        self._config = config
        self._changes = changes
        self._assigned: dict[str, Assigned] = {}
        self._card: sriov.Card
        self._ours = False  # whether the VFs are there for us, and go at the end

    def open(self) -> None:
        config = self._config
        self._card = card = sriov.card_of(get_link(config.iface))
        wishes = [parse(spec) for spec in config.guests]
        if any(wish.to == "vfio" for wish in wishes):  # before the card is changed for nothing
            vfio.check_iommu()
            vfio.check_driver()
        for wish in wishes:
            if wish.netns is not None:
                vfnetdev.named(wish.netns)
        least = max([1, len(wishes), *(wish.vf + 1 for wish in wishes if wish.vf is not None)])
        self._have(card, sriov.number_wanted(card, config.vfs, least))
        self._changes.nic.bring_up()

    def _have(self, card: sriov.Card, count: int) -> None:
        entry = self._changes.claim("sriov_numvfs", count=count)
        self._ours = entry is not None
        if card.count == count:
            return
        sriov.check_count(card, count, force=self._config.force)
        if entry is None:
            states = vfconfig.read_vfs(self._changes.ifindex) if card.count else {}
            settings = {str(number): state.settings.to_json() for number, state in states.items()}
            pci = card.function.address
            self._changes.record("sriov_numvfs", pci=pci, count=count, before=card.count, settings=settings)
        if card.count:
            card.set_count(0)
        card.set_count(count)
        self._ours = True

    # ---- guests ----

    def add_guest(self, spec: GuestSpec) -> None:
        wish = parse(spec)
        place = None if wish.netns is None else vfnetdev.named(wish.netns)
        entry = self._changes.claim("vf_driver")
        taken_over = sriov.same_vf(entry.args) if entry is not None else None
        if entry is not None and taken_over is None:
            self._changes.forget(entry)
            entry = None
        if entry is not None and taken_over is not None:
            number, function = int(entry.args["vf"]), taken_over
        else:
            number, function = self._choose(wish)
        if wish.to == "vfio":
            vfio.check(function)
        which: dict[str, Any] = {"pci": self._card.function.address, "vf": number, "vf_pci": function.address}
        if entry is None:
            before = {"driver": function.driver, "override": function.override}
            ours = vfio.DRIVER if wish.to == "vfio" else None
            entry = self._changes.record("vf_driver", **which, driver=ours, override=ours, before=before)
        assigned = Assigned(wish, number, function)
        self._set_up(assigned, which, entry)
        if place is not None:
            self._send(assigned, which, place)
        self._assigned[spec.name] = assigned

    def _choose(self, wish: Wish) -> tuple[int, Function]:
        card = self._card
        # Those of guests that are still to be taken over are in the journal only.
        taken = [int(entry.args["vf"]) for entry in self._changes.journal.pending() if entry.kind == "vf_driver"]
        number = wish.vf if wish.vf is not None else sriov.free_vf(card, taken)
        what = f"interface {card.iface}, VF {number}"
        function = card.vf(number)
        if function is None:
            raise NicError(
                f"{what}: there are VFs 0 to {card.count - 1} only; `xdpvhost down`, then `up` with --vfs {number + 1}"
            )
        used = sriov.use_of(function)
        if number in taken:
            used = "another guest has it"
        elif not used and wish.to != "vfio" and function.driver == vfio.DRIVER:
            used = f"somebody bound it to {vfio.DRIVER}"
        if used:
            raise NicError(f"{what} ({function}): {used}; end that, or use another VF")
        return number, function

    def _set_up(self, assigned: Assigned, which: dict[str, Any], driver_entry: Entry) -> None:
        """Card's settings and VF's driver."""
        wish, number, function = assigned.wish, assigned.number, assigned.function
        changes, iface, ifindex = self._changes, self._card.iface, self._changes.ifindex
        now = self._settings(number)
        difference = wish.settings.differing(now)
        entry = changes.claim("vf_settings", **which)
        if difference != VfSettings():
            asked = difference.to_json()
            before = {key: value for key, value in now.to_json().items() if key in asked}
            if entry is None:
                changes.record("vf_settings", **which, asked=asked, before=before, ours=self._ours)
            else:
                changes.amend(entry, asked=entry.args["asked"] | asked, before=before | entry.args["before"])
            if not vfio.holders(function):
                function.unbind()
            vfconfig.apply(iface, ifindex, number, wish.settings, now)
            self._verify(assigned)
        if wish.to == "vfio":
            vfio.bind(function)
            vfio.check_node(function)
            return
        if function.driver in (None, vfio.DRIVER):
            vfio.bind_default(function)
        if function.driver is None:
            raise NicError(
                f"interface {iface}, VF {number} ({function}): no driver takes it; load the card's VF driver, with "
                f"`modprobe $(cat {function.directory}/modalias)`"
            )
        changes.amend(driver_entry, driver=function.driver)

    def _settings(self, number: int) -> VfSettings:
        state = vfconfig.read_vfs(self._changes.ifindex).get(number)
        if state is None:
            raise NicError(
                f"interface {self._card.iface}, VF {number}: driver {self._card.function.driver} tells nothing of it "
                "by netlink, so it can't be given a MAC; use a driver with SR-IOV settings (ndo_set_vf_mac)"
            )
        return state.settings

    def _verify(self, assigned: Assigned) -> None:
        """What the card made of it. An address that it doesn't have is an error, everything else a warning."""
        now = self._settings(assigned.number)
        wrong = assigned.wish.settings.differing(now)
        what = f"interface {self._card.iface}, VF {assigned.number}"
        if wrong.mac is not None:
            raise NicError(f"{what}: asked for mac={wrong.mac}, its driver made it {now.mac}; choose another address")
        for _, words in vfconfig.requests(assigned.number, wrong):
            log.warning("%s: asked for %s, which is not in use; `xdpvhost status` shows what is", what, words)

    def _send(self, assigned: Assigned, which: dict[str, Any], place: vfnetdev.Place) -> None:
        function = assigned.function
        what = f"interface {self._card.iface}, VF {assigned.number} ({function})"
        entry = self._changes.claim("vf_netns", **which)
        found = vfnetdev.find(function)
        if found is None:
            raise NicError(f"{what}: driver {function.driver} made no network device; `dmesg` may say why")
        where, device = found
        if where is not None and where.inode == place.inode:
            return
        if where is not None:
            raise NicError(f"{what}: its device {device.name} is in {where}; run xdpvhost there")
        target = {"name": device.name, "netns": place.path.name, "inode": place.inode}
        if entry is None:
            self._changes.record("vf_netns", **which, **target)
        else:
            self._changes.amend(entry, **target)
        vfnetdev.send(device, place)

    def remove_guest(self, spec: GuestSpec) -> None:
        assigned = self._assigned[spec.name]
        held = vfio.holders(assigned.function)
        if held:
            raise NicError(
                f"guest {spec.name!r}: a virtual machine has its VF {assigned.number} ({', '.join(held)}); end it, or "
                "unplug the device, first"
            )
        del self._assigned[spec.name]

    def follow(self) -> None:
        pass

    def close(self) -> None:
        self._assigned.clear()

    # ---- what it tells ----

    def facts(self) -> dict[str, Any]:
        card = self._card
        return {
            "pci": card.function.address,
            "driver": card.function.driver,
            "vfs_asked": self._config.vfs,
            "vfs_in_use": card.count,
            "vfs_most": card.total,
        }

    def guest_facts(self, spec: GuestSpec) -> dict[str, Any]:
        assigned = self._assigned[spec.name]
        function = assigned.function
        facts: dict[str, Any] = {
            "device": function.address,
            "vf": assigned.number,
            "pci": function.address,
            "to": spec.key("to") or "vfio",
            "driver": function.driver,
        }
        facts |= _vfio_facts(function) if assigned.wish.to == "vfio" else _netdev_facts(assigned)
        state = vfconfig.read_vfs(self._changes.ifindex).get(assigned.number)
        now = VfSettings() if state is None else state.settings
        for field in fields(VfSettings):
            facts[f"{field.name}_asked"] = getattr(assigned.wish.settings, field.name)
            facts[f"{field.name}_in_use"] = getattr(now, field.name)
        return facts

    def counters(self, spec: GuestSpec) -> LinkCounters | None:
        assigned = self._assigned.get(spec.name)
        state = None if assigned is None else vfconfig.read_vfs(self._changes.ifindex).get(assigned.number)
        if state is None or state.counters is None:
            return None
        c = state.counters
        return LinkCounters(c.rx_packets, c.rx_bytes, c.rx_dropped, c.tx_packets, c.tx_bytes, c.tx_dropped)


def _vfio_facts(function: Function) -> dict[str, Any]:
    node = vfio.node(function)
    held = vfio.holders(function)
    return {
        "iommu_group": function.group,
        "node": str(node),
        "node_owner": vfio.who_may_open(node),
        "held_by": held,
        "connected": bool(held),
    }


def _netdev_facts(assigned: Assigned) -> dict[str, Any]:
    found = vfnetdev.find(assigned.function)
    if found is None:
        return {"device": None, "netns": None, "connected": False}
    place, device = found
    return {"device": device.name, "netns": None if place is None else place.path.name, "connected": device.up}


class VfMode:
    """Implements `base.LinkMode`."""

    name: Mode = "vf"

    def needs(self, config: UpConfig) -> Needs:
        return (("CAP_NET_ADMIN",), ("CAP_SYS_ADMIN",))  # the latter to look into network namespaces

    def uplink_wishes(self, config: UpConfig) -> dict[str, Any]:
        return {"vfs": config.vfs}

    def check_config(self, config: UpConfig) -> None:
        for spec in config.guests:
            vf = parse(spec).vf
            if config.vfs is not None and vf is not None and vf >= config.vfs:
                raise ConfigError(
                    f"guest {spec.name!r}: vf={vf} with --vfs {config.vfs}: VFs are counted from 0; "
                    f"use 0 to {config.vfs - 1}"
                )
        if config.vfs is not None and len(config.guests) > config.vfs:
            raise ConfigError(
                f"{len(config.guests)} guests with --vfs {config.vfs}: each needs one; give --vfs {len(config.guests)}"
            )

    def check_spec(self, spec: GuestSpec) -> None:
        parse(spec)

    def check_new_guest(self, spec: GuestSpec, others: Sequence[GuestSpec]) -> None:
        vf = parse(spec).vf
        for other in others:
            if vf is not None and parse(other).vf == vf:
                raise ConfigError(
                    f"guest {spec.name!r}: vf={vf} is taken by guest {other.name!r}; use another, or leave it out"
                )

    def uplink(self, config: UpConfig, changes: Changes) -> VfUplink:
        return VfUplink(config, changes)

    def feature(self, link: Link) -> Feature:
        name = "mode-vf"
        try:
            card = sriov.card_of(link)
        except Lacking as exc:
            return Feature(name, False, exc.detail, exc.remedy)
        return passthrough_feature(name, card)

    def qemu(self, spec: GuestSpec, device: Device, facts: Facts | None) -> QemuNet:
        pci = _passed_through(spec, device, facts)
        return QemuNet(["-device", f"vfio-pci,id=nic-{spec.name},host={pci}"])

    def libvirt(self, spec: GuestSpec, device: Device, facts: Facts | None) -> str:
        """`<interface type='hostdev'>`, for which libvirt sets MAC and VLAN again by itself.

        It knows no priority and no protocol, and would take them away: then `<hostdev>`, which leaves the card alone.
        """
        pci = _passed_through(spec, device, facts)
        settings = parse(spec).settings
        if settings.qos or settings.vlan_protocol == "802.1ad":
            root = ET.Element("hostdev", mode="subsystem", type="pci", managed="no")
            ET.SubElement(root, "driver", name="vfio")
            _address(ET.SubElement(root, "source"), pci)
        else:
            root = ET.Element("interface", type="hostdev", managed="no")
            ET.SubElement(root, "mac", address=format_mac(spec.mac))
            ET.SubElement(root, "driver", name="vfio")
            _address(ET.SubElement(root, "source"), pci, type="pci")
            if settings.vlan:
                ET.SubElement(ET.SubElement(root, "vlan"), "tag", id=str(settings.vlan))
        ET.indent(root)
        return ET.tostring(root, encoding="unicode")


def passthrough_feature(name: str, card: sriov.Card) -> Feature:
    """For a card that has VFs: can virtual machines have them? Everything that is missing is named at once."""
    sys = card.function.sys
    missing: list[Lacking] = []
    for check in (vfio.check_iommu, vfio.check_driver):
        try:
            check(sys)
        except Lacking as exc:
            missing.append(exc)
    if not missing:
        for function in card.vfs().values():
            try:
                vfio.check_group(function)
            except Lacking as exc:
                missing.append(exc)
                break
    detail = f"up to {card.total} VFs, {card.count} now"
    if not missing:
        return Feature(name, True, f"{detail}; the IOMMU is on, {vfio.DRIVER} is loaded")
    lacks = "; ".join(exc.detail for exc in missing)
    remedies = "; ".join(exc.remedy for exc in missing)
    return Feature(name, False, f"{detail}, for to=netdev and to=netns:NAME only: {lacks}", remedies)


def _passed_through(spec: GuestSpec, device: Device, facts: Facts | None) -> str:
    """The PCI address of a guest's VF that a virtual machine may have. Raises ConfigError when there is none."""
    what = f"guest {spec.name!r}"
    if parse(spec).to != "vfio":
        raise ConfigError(f"{what}: to={spec.key('to')} keeps its VF on the host; a virtual machine wants to=vfio")
    if device != DEFAULT_DEVICE:
        raise ConfigError(f"{what}: a VF brings its own queues; leave out --queue-size and --packed")
    if facts is None:
        raise ConfigError(
            f"{what}: which VF it has is known to the daemon only; `up --mode vf` first, then give its name"
        )
    return str(facts["pci"])


def _address(parent: ET.Element, pci: str, **extra: str) -> None:
    domain, bus, slot, function = pci.replace(".", ":").split(":")
    values = {"domain": domain, "bus": bus, "slot": slot, "function": function}
    ET.SubElement(parent, "address", {**extra, **{key: f"0x{value}" for key, value in values.items()}})


MODE = VfMode()
