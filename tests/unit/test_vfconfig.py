# SPDX-License-Identifier: Apache-2.0
"""A VF's settings as netlink carries them: messages as bytes."""

import errno
import os
import re
from dataclasses import replace

import pytest
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from xdpvhost.errors import NicError, PrivilegeError
from xdpvhost.links import vfconfig
from xdpvhost.links.vfconfig import VfCounters, VfSettings, VfState, decode, encode, requests

ALL = VfSettings(
    mac="52:54:00:00:00:01",
    vlan=100,
    qos=3,
    vlan_protocol="802.1Q",
    spoof_check=True,
    trust=False,
    min_rate=0,
    max_rate=500,
    link="auto",
)


def test_json() -> None:
    assert VfSettings.from_json(ALL.to_json()) == ALL
    assert VfSettings(vlan=0).to_json() == {"vlan": 0}
    assert VfSettings.from_json({"vlan": 1, "of_another_version": 2}) == VfSettings(vlan=1)


def test_only_what_differs() -> None:
    assert VfSettings().differing(ALL) == VfSettings()
    assert ALL.differing(ALL) == VfSettings()
    assert VfSettings(mac=ALL.mac, trust=True).differing(ALL) == VfSettings(trust=True)


def test_vlan_and_rates_go_together() -> None:
    assert VfSettings(qos=4).differing(ALL) == VfSettings(vlan=100, qos=4, vlan_protocol="802.1Q")
    assert VfSettings(min_rate=10).differing(ALL) == VfSettings(min_rate=10, max_rate=500)
    assert VfSettings(max_rate=10).differing(ALL) == VfSettings(min_rate=0, max_rate=10)


def test_one_setting_a_request() -> None:
    assert [words for _, words in requests(0, ALL)] == [
        "mac=52:54:00:00:00:01",
        "vlan=100, qos=3",
        "trust=off",
        "spoof-check=on",
        "min-rate=0, max-rate=500",
        "link=auto",
    ]


def test_encoded() -> None:
    """The bytes, by include/uapi/linux/if_link.h: little-endian, the protocol big-endian, two bytes of padding."""
    [(attribute, words)] = requests(2, VfSettings(vlan=5, qos=1, vlan_protocol="802.1ad"))
    assert words == "vlan=5, qos=1, vlan-protocol=802.1ad"
    message = encode(4, attribute)
    message.encode()
    assert bytes(message.data[20:]).hex(" ", 4) == (
        "04000000 00000000 00000000 "  # ifi_index, ifi_flags, ifi_change
        "20001600 1c000100 "  # IFLA_VFINFO_LIST, IFLA_VF_INFO
        "18000c00 14000100 "  # IFLA_VF_VLAN_LIST, IFLA_VF_VLAN_INFO
        "02000000 05000000 01000000 88a80000"
    )


def message(*attributes: bytes) -> ifinfmsg:
    """RTM_NEWLINK with one VF."""
    vf = nla(1, *attributes)
    data = bytes(16) + bytes.fromhex("00000000 04000000 00000000 00000000") + nla(22, vf)
    found = ifinfmsg(len(data).to_bytes(4, "little") + data[4:])
    found.decode()
    return found


def nla(kind: int, *payload: bytes) -> bytes:
    data = b"".join(payload)
    return (len(data) + 4).to_bytes(2, "little") + kind.to_bytes(2, "little") + data


def numbers(*values: int) -> bytes:
    return b"".join((value & 0xFFFFFFFF).to_bytes(4, "little") for value in values)


def longs(value: int) -> bytes:
    return value.to_bytes(8, "little")


MAC = nla(1, numbers(3), bytes.fromhex("525400000001"), bytes(26))


def test_decoded() -> None:
    """A driver that has everything, as Linux 6.12 sends it: other attributes are passed over."""
    found = message(
        MAC,
        nla(13, bytes(32)),  # IFLA_VF_BROADCAST
        nla(2, numbers(3, 100, 3)),
        nla(6, numbers(3, 10, 500)),
        nla(3, numbers(3, 500)),
        nla(4, numbers(3, 1)),
        nla(5, numbers(3, 2)),
        nla(7, numbers(3, 0)),
        nla(9, numbers(3, 1)),
        nla(12, nla(1, numbers(3, 100, 3), bytes.fromhex("88a80000"))),
        nla(8, nla(0, longs(23)), nla(1, longs(46)), nla(2, longs(1380)), nla(3, longs(2760)), nla(7, longs(2))),
    )
    assert decode(found) == {
        3: VfState(
            VfSettings(
                mac="52:54:00:00:00:01",
                vlan=100,
                qos=3,
                vlan_protocol="802.1ad",
                spoof_check=True,
                trust=True,
                min_rate=10,
                max_rate=500,
                link="disable",
            ),
            VfCounters(rx_packets=23, rx_bytes=1380, rx_dropped=2, tx_packets=46, tx_bytes=2760, tx_dropped=0),
        )
    }


def test_what_a_driver_does_not_tell() -> None:
    """The kernel fills spoof check and trust with -1, and counts with 0."""
    found = message(MAC, nla(4, numbers(3, -1)), nla(9, numbers(3, -1)), nla(8, nla(0, longs(0))))
    assert decode(found) == {3: VfState(VfSettings(mac="52:54:00:00:00:01"), None)}


def test_no_vfs() -> None:
    assert decode(message()) == {}


def test_what_is_sent_can_be_read_back() -> None:
    wanted = replace(ALL, vlan_protocol="802.1ad", min_rate=7, trust=True)
    attributes = b""
    for attribute, _ in requests(3, wanted):
        sent = encode(4, attribute)
        sent.encode()
        attributes += bytes(sent.data[16 + 16 + 8 :])
    vlan = nla(2, numbers(3, 100, 3))  # which the kernel sends beside the list
    assert decode(message(attributes, vlan))[3].settings == wanted


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EOPNOTSUPP, "VF 1: link=auto: driver unknown can't set that: leave it out"),
        (errno.EINVAL, "VF 1: link=auto: driver unknown refuses it (Invalid argument): the card can't have that value"),
        (errno.EPERM, "VF 1: link=auto is refused (Operation not permitted): run as root, or with CAP_NET_ADMIN"),
        (errno.ENODEV, "VF 1: link=auto: driver unknown refuses it (No such device)"),
    ],
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, code: int, text: str) -> None:
    def refuse(_index: int, _attribute: object) -> None:
        raise NetlinkError(code, os.strerror(code))

    monkeypatch.setattr(vfconfig, "_send", refuse)
    with pytest.raises((NicError, PrivilegeError), match=re.escape(text)):
        vfconfig.apply("lo", 1, 1, VfSettings(link="auto"), VfSettings())
