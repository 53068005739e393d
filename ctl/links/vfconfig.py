# SPDX-License-Identifier: Apache-2.0
"""What a physical function enforces on each of its VFs: address, VLAN, spoof check, trust, rates, link state.

They are set and read back over rtnetlink on the physical function's device: IFLA_VFINFO_LIST, one IFLA_VF_INFO a VF
(include/uapi/linux/if_link.h). A driver may have only some of them. One that it hasn't reads as None, and asking for it
is an error that names it.

pyroute2 leaves the last two bytes out of struct ifla_vf_vlan_info, which newer kernels refuse; so the requests' classes
are here.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from pyroute2 import AsyncIPRoute, IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, nla, nlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nlsocket import NetlinkRequest
from pyroute2.netlink.rtnl import RTM_SETLINK

from ..errors import NicError, PrivilegeError
from . import ethtool
from .netlink import outside_loop

VlanProtocol = Literal["802.1Q", "802.1ad"]
LinkMode = Literal["auto", "enable", "disable"]

VLAN_PROTOCOLS: tuple[VlanProtocol, ...] = get_args(VlanProtocol)
LINK_MODES: tuple[LinkMode, ...] = get_args(LinkMode)  # in the order of IFLA_VF_LINK_STATE_*
MAX_VLAN = 4094
MAX_QOS = 7
NO_MAC = "00:00:00:00:00:00"

_ETHERTYPES: dict[int, VlanProtocol] = {0x8100: "802.1Q", 0x88A8: "802.1ad"}
_UNKNOWN = 0xFFFFFFFF  # what the kernel says for a driver that doesn't
RTEXT_FILTER_VF = 1


@dataclass(frozen=True)
class VfSettings:
    """As a request, None leaves a setting alone; as an answer, None is one that the driver doesn't tell.

    `mac` is lower case with colons. `vlan` 0 is none. Rates are in Mb/s, 0 is no limit.
    """

    mac: str | None = None
    vlan: int | None = None
    qos: int | None = None
    vlan_protocol: VlanProtocol | None = None
    spoof_check: bool | None = None
    trust: bool | None = None
    min_rate: int | None = None
    max_rate: int | None = None
    link: LinkMode | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VfSettings:
        """The opposite of `to_json`; keys of another version are ignored."""
        return cls(**{field.name: values.get(field.name) for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """What is not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def differing(self, now: VfSettings) -> VfSettings:
        """What of this request `now` has otherwise. VLAN, priority and protocol count as one, and so do the rates."""
        changed = {name: value for name, value in self.to_json().items() if getattr(now, name) != value}
        for together in (("vlan", "qos", "vlan_protocol"), ("min_rate", "max_rate")):
            if changed.keys() & set(together):
                for name in together:
                    changed[name] = getattr(self, name) if getattr(self, name) is not None else getattr(now, name)
        return VfSettings.from_json(changed)


@dataclass(frozen=True)
class VfCounters:
    """Frames that the physical function saw of a VF; rx is towards the VF."""

    rx_packets: int
    rx_bytes: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_dropped: int


@dataclass(frozen=True)
class VfState:
    """`counters` is None for a driver that counts nothing, and before the first frame."""

    settings: VfSettings
    counters: VfCounters | None


class _Request(nlmsg):  # type: ignore[misc]
    """struct ifinfomsg and one VF's attributes."""

    prefix = "IFLA_"
    fields = (("family", "B"), ("align", "B"), ("ifi_type", "H"), ("index", "i"), ("flags", "I"), ("change", "I"))
    nla_map = ((22, "IFLA_VFINFO_LIST", "vfs"),)

    class vfs(nla):  # type: ignore[misc]
        nla_map = ((1, "IFLA_VF_INFO", "vf"),)

        class vf(nla):  # type: ignore[misc]
            nla_map = (
                (1, "IFLA_VF_MAC", "address"),
                (2, "IFLA_VF_VLAN", "vlan"),
                (4, "IFLA_VF_SPOOFCHK", "setting"),
                (5, "IFLA_VF_LINK_STATE", "setting"),
                (6, "IFLA_VF_RATE", "rate"),
                (9, "IFLA_VF_TRUST", "setting"),
                (12, "IFLA_VF_VLAN_LIST", "vlans"),
            )

            class address(nla):  # type: ignore[misc]
                fields = (("vf", "I"), ("mac", "32s"))

            class vlan(nla):  # type: ignore[misc]
                fields = (("vf", "I"), ("vlan", "I"), ("qos", "I"))

            class setting(nla):  # type: ignore[misc]
                fields = (("vf", "I"), ("value", "I"))

            class rate(nla):  # type: ignore[misc]
                fields = (("vf", "I"), ("min_tx_rate", "I"), ("max_tx_rate", "I"))

            class vlans(nla):  # type: ignore[misc]
                nla_map = ((1, "IFLA_VF_VLAN_INFO", "entry"),)

                class entry(nla):  # type: ignore[misc]
                    fields = (("vf", "I"), ("vlan", "I"), ("qos", "I"), ("proto", ">H"), ("pad", "H"))


def read_vfs(ifindex: int) -> dict[int, VfState]:
    """By VF number; empty when the device has none, or is gone."""

    def ask() -> Any:
        with IPRoute() as ip:
            return ip.link("get", index=ifindex, ext_mask=RTEXT_FILTER_VF)[0]

    try:
        return decode(outside_loop(ask))
    except NetlinkError:
        return {}


def decode(message: Any) -> dict[int, VfState]:
    """What an ifinfmsg says of the VFs."""
    found = {}
    vfs = message.get_attr("IFLA_VFINFO_LIST")
    for vf in vfs.get_attrs("IFLA_VF_INFO") if vfs else ():
        address = vf.get_attr("IFLA_VF_MAC")
        if address is not None:
            found[int(address["vf"])] = VfState(_settings(vf, address["mac"]), _counters(vf))
    return found


def _settings(vf: Any, mac: str) -> VfSettings:
    link = _value(vf, "IFLA_VF_LINK_STATE", "link_state")
    spoof_check = _value(vf, "IFLA_VF_SPOOFCHK", "spoofchk")
    trust = _value(vf, "IFLA_VF_TRUST", "trust")
    return VfSettings(
        mac=mac,
        vlan=_value(vf, "IFLA_VF_VLAN", "vlan"),
        qos=_value(vf, "IFLA_VF_VLAN", "qos"),
        vlan_protocol=_protocol(vf),
        spoof_check=None if spoof_check is None else bool(spoof_check),
        trust=None if trust is None else bool(trust),
        min_rate=_value(vf, "IFLA_VF_RATE", "min_tx_rate"),
        max_rate=_value(vf, "IFLA_VF_RATE", "max_tx_rate"),
        link=LINK_MODES[link] if link is not None and link < len(LINK_MODES) else None,
    )


def _value(vf: Any, attribute: str, field: str) -> int | None:
    found = vf.get_attr(attribute)
    return None if found is None or found[field] == _UNKNOWN else int(found[field])


def _protocol(vf: Any) -> VlanProtocol | None:
    vlans = vf.get_attr("IFLA_VF_VLAN_LIST")
    first = vlans.get_attr("IFLA_VF_VLAN_INFO") if vlans else None
    return _ETHERTYPES.get(first["proto"]) if first else None


def _counters(vf: Any) -> VfCounters | None:
    """All zero is what the kernel says for a driver that doesn't count."""
    stats = vf.get_attr("IFLA_VF_STATS")
    if stats is None:
        return None
    names = ("RX_PACKETS", "RX_BYTES", "RX_DROPPED", "TX_PACKETS", "TX_BYTES", "TX_DROPPED")
    values = [int(stats.get_attr(f"IFLA_VF_STATS_{name}") or 0) for name in names]
    return VfCounters(*values) if any(values) else None


def apply(iface: str, ifindex: int, vf: int, wanted: VfSettings, now: VfSettings) -> None:
    """Change what differs, one setting a request, so that an error can name it. Raises NicError or PrivilegeError."""
    for attribute, words in requests(vf, wanted.differing(now)):
        try:
            outside_loop(lambda attribute=attribute: _send(ifindex, attribute))  # type: ignore[misc]
        except NetlinkError as exc:
            raise _refusal(f"interface {iface}, VF {vf}: {words}", iface, exc) from exc


def requests(vf: int, wanted: VfSettings) -> Iterator[tuple[tuple[str, Any], str]]:
    """For each setting to change its attribute of IFLA_VF_INFO, and what it is in words."""
    if wanted.mac is not None:
        yield ("IFLA_VF_MAC", {"vf": vf, "mac": bytes.fromhex(wanted.mac.replace(":", ""))}), f"mac={wanted.mac}"
    if wanted.vlan is not None:
        vlan = {"vf": vf, "vlan": wanted.vlan, "qos": wanted.qos or 0}
        words = f"vlan={wanted.vlan}, qos={vlan['qos']}"
        if wanted.vlan_protocol in (None, "802.1Q"):
            yield ("IFLA_VF_VLAN", vlan), words
        else:
            number = next(key for key, name in _ETHERTYPES.items() if name == wanted.vlan_protocol)
            entry = ("IFLA_VF_VLAN_INFO", {**vlan, "proto": number, "pad": 0})
            yield ("IFLA_VF_VLAN_LIST", {"attrs": [entry]}), f"{words}, vlan-protocol={wanted.vlan_protocol}"
    if wanted.trust is not None:  # before the spoof check, which some drivers let only a trusted VF be without
        yield ("IFLA_VF_TRUST", {"vf": vf, "value": int(wanted.trust)}), f"trust={_switch(wanted.trust)}"
    if wanted.spoof_check is not None:
        words = f"spoof-check={_switch(wanted.spoof_check)}"
        yield ("IFLA_VF_SPOOFCHK", {"vf": vf, "value": int(wanted.spoof_check)}), words
    if wanted.min_rate is not None or wanted.max_rate is not None:
        low, high = wanted.min_rate or 0, wanted.max_rate or 0
        words = f"min-rate={low}, max-rate={high}"
        yield ("IFLA_VF_RATE", {"vf": vf, "min_tx_rate": low, "max_tx_rate": high}), words
    if wanted.link is not None:
        state = LINK_MODES.index(wanted.link)
        yield ("IFLA_VF_LINK_STATE", {"vf": vf, "value": state}), f"link={wanted.link}"


def encode(ifindex: int, attribute: tuple[str, Any]) -> Any:
    """The request that sets one attribute of a VF."""
    message = _Request()
    message["index"] = ifindex
    message["attrs"] = [("IFLA_VFINFO_LIST", {"attrs": [("IFLA_VF_INFO", {"attrs": [attribute]})]})]
    return message


def _send(ifindex: int, attribute: tuple[str, Any]) -> None:
    async def send() -> None:
        async with AsyncIPRoute() as ip:
            flags = NLM_F_REQUEST | NLM_F_ACK
            request = NetlinkRequest(ip, encode(ifindex, attribute), msg_type=RTM_SETLINK, msg_flags=flags)
            await request.send()
            async for _ in request.response():
                pass

    asyncio.run(send())


def _switch(value: bool) -> str:
    return "on" if value else "off"


def _refusal(what: str, iface: str, exc: NetlinkError) -> NicError | PrivilegeError:
    driver = ethtool.driver(iface) or "unknown"
    if exc.code in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"{what} is refused ({os.strerror(exc.code)}): run as root, or with CAP_NET_ADMIN")
    if exc.code == errno.EOPNOTSUPP:
        return NicError(f"{what}: driver {driver} can't set that: leave it out")
    if exc.code == errno.EINVAL:
        return NicError(
            f"{what}: driver {driver} refuses it ({os.strerror(exc.code)}): the card can't have that value, or "
            "not while its link is down; `dmesg` may say more"
        )
    return NicError(f"{what}: driver {driver} refuses it ({os.strerror(exc.code)})")


def undo_settings(iface: str, ifindex: int, vf: int, asked: VfSettings, before: VfSettings) -> str:
    """Put back what is still as it was asked for, and was known before. Raises NicError or PrivilegeError."""
    what = f"interface {iface}, VF {vf}"
    state = read_vfs(ifindex).get(vf)
    if state is None:
        return f"{what}: is gone"
    now = state.settings
    ours = {name: getattr(before, name) for name, value in asked.to_json().items() if getattr(now, name) == value}
    wanted = VfSettings.from_json(ours).differing(now)
    if wanted == VfSettings():
        return f"{what}: settings as before"
    apply(iface, ifindex, vf, wanted, now)
    return f"{what}: " + ", ".join(words for _, words in requests(vf, wanted))
