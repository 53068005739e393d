# SPDX-License-Identifier: Apache-2.0
"""What a guest may do, through the real back-end and workers that sleep. Frames made by scapy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from support.frontend import F_EVENT_IDX, F_MRG_RXBUF, F_PACKED, F_PROTOCOL, F_VERSION_1, NetDevice
from support.plane import Plane
from support.process import wait_for
from xdpvhost.datapath import DROP_NAMES
from xdpvhost.switch import GuestEntry

FEATURES = F_PROTOCOL | F_VERSION_1 | F_MRG_RXBUF
SPLIT, PACKED = FEATURES | F_EVENT_IDX, FEATURES | F_PACKED
MACS = [bytes((0x52, 0x54, 0, 0, 0, number)) for number in range(1, 4)]
MINE, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02"
LINK_LOCAL = "fe80::5054:ff:fe00:1"
ADDRESSES = "192.0.2.1+2001:db8::1"
COUNT = 23
FRAME = 1000


def numbered(number: int, to: bytes = MACS[1], source: bytes = MACS[0], size: int = FRAME) -> bytes:
    return to + source + b"\x88\xb5" + number.to_bytes(8, "big") + bytes(size - 22)


class Pair:
    """Guest "vm1" with a policy, and "vm2" that hears it."""

    def __init__(self, directory: Path, features: int, workers: int = 1, **keys: str) -> None:
        self._stack = ExitStack()
        self.plane = self._stack.enter_context(Plane(directory, workers=workers, poll="interrupt"))
        self.entry, self.friend_entry = self.plane.guest(**keys), self.plane.guest()
        self.guest, self.friend = (
            self.device(directory / "vm1.sock", features),
            self.device(directory / "vm2.sock", SPLIT),
        )

    def device(self, path: Path, features: int) -> NetDevice:
        device = self._stack.enter_context(NetDevice(path, features=features, memory_size=16 << 20, queue_size=512))
        device.up()
        device.post(200)
        return device

    def send(self, *frames: bytes, device: NetDevice | None = None) -> None:
        """Returns when the back-end has taken them."""
        device = device or self.guest
        for frame in frames:
            device.send(frame)
        wait_for(lambda: device.sent() >= 0 and not device.tx().chains, 20, "the frames to be taken", interval=0.001)

    def drops(self, direction: str, reason: str, entry: GuestEntry | None = None) -> int:
        port = (entry or self.entry).port
        counters: Any = port.tx_counters(0) if direction == "tx" else port.rx_counters(0)
        return int(counters.drops[DROP_NAMES.index(reason)])

    def heard(self, device: NetDevice | None = None) -> list[bytes]:
        return [frame for _, frame in (device or self.friend).received()]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def make(features: int = SPLIT, workers: int = 1, **keys: str) -> Pair:
            pair = Pair(tmp_path, features, workers, **keys)
            stack.callback(pair.close)
            return pair

        yield make


@pytest.mark.parametrize("features", [SPLIT, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_guest_may_not_send_yet_waits(pairs: Any, features: int, workers: int) -> None:
    """2 MB/s, 40,000 bytes at once: 150 frames of 1,000 take 55 ms at least, and every one arrives, in order."""
    pair = pairs(features, workers, tx_rate="16M", tx_burst="40000")
    begun = time.monotonic()
    pair.send(*(numbered(number) for number in range(150)))
    took = time.monotonic() - begun
    assert pair.heard() == [numbered(number) for number in range(150)]
    assert took > (150_000 - 40_000 - FRAME) / 2_000_000
    assert sum(pair.entry.port.tx_counters(0).drops) == 0


def test_another_guest_is_not_slowed_down(pairs: Any) -> None:
    """While one waits for a limit of 2,000 bytes a second, the other one's frames come at once."""
    pair = pairs(tx_rate="16k", tx_burst="2000")
    for number in range(10):
        pair.guest.send(numbered(number))
    begun = time.monotonic()
    for _ in range(COUNT):
        pair.send(numbered(0, to=MACS[0], source=MACS[1]), device=pair.friend)
    assert time.monotonic() - begun < 2
    assert len(pair.heard(pair.guest)) == COUNT
    assert pair.guest.tx().chains, "it still waits"


def test_what_a_guest_may_not_be_sent_is_dropped(pairs: Any) -> None:
    """And costs the sender nothing. 2,000 bytes a second, 23,000 at once."""
    pair = pairs(rx_rate="16k", rx_burst="23000")
    flood = [numbered(number, to=MACS[0], source=MACS[1]) for number in range(100)]
    pair.send(*flood, device=pair.friend)
    got = pair.heard(pair.guest)
    assert got[:COUNT] == flood[:COUNT]
    assert set(got) <= set(flood)
    assert COUNT <= len(got) <= COUNT + 20  # two more a second, as long as it takes
    assert pair.drops("rx", "rate") == 100 - len(got)
    assert sum(pair.friend_entry.port.tx_counters(0).drops) == 0


def test_storm(pairs: Any) -> None:
    pair = pairs(storm="1", storm_burst=str(COUNT))
    flood = [numbered(number, to=b"\xff" * 6) for number in range(100)]
    pair.send(*flood, numbered(500))
    got = pair.heard()
    assert got[-1] == numbered(500), "what is for one guest is no storm"
    assert got[:COUNT] == flood[:COUNT]
    assert len(got) - 1 <= COUNT + 10  # one more a second
    assert pair.drops("tx", "storm") == 100 - (len(got) - 1)


def mine(to: str = OTHER) -> Ether:
    return Ether(src=MINE, dst=to)


def neighbour(source: str, message: Any, *options: Any) -> Any:
    packet = mine() / IPv6(src=source, dst="ff02::1", hlim=255) / message
    for option in options:
        packet /= option
    return packet


HONEST = {
    "ARP request": mine("ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=MINE, psrc="192.0.2.1", pdst="192.0.2.2"),
    "ARP probe": mine("ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=MINE, psrc="0.0.0.0", pdst="192.0.2.1"),
    "TCP": mine() / IP(src="192.0.2.1", dst="192.0.2.2") / TCP(),
    "DHCP discover": mine("ff:ff:ff:ff:ff:ff")
    / IP(src="0.0.0.0", dst="255.255.255.255")
    / UDP(sport=68, dport=67)
    / BOOTP()
    / DHCP(options=[("message-type", "discover"), "end"]),
    "TCP by IPv6": mine() / IPv6(src="2001:db8::1", dst="2001:db8::2") / TCP(),
    "echo, link-local": mine() / IPv6(src=LINK_LOCAL, dst="ff02::1") / ICMPv6EchoRequest(),
    "router solicitation": neighbour(LINK_LOCAL, ICMPv6ND_RS(), ICMPv6NDOptSrcLLAddr(lladdr=MINE)),
    "neighbour solicitation": neighbour(
        "2001:db8::1", ICMPv6ND_NS(tgt="2001:db8::2"), ICMPv6NDOptSrcLLAddr(lladdr=MINE)
    ),
    "duplicate address detection": neighbour("::", ICMPv6ND_NS(tgt="2001:db8::1")),
    "neighbour advertisement": neighbour("2001:db8::1", ICMPv6ND_NA(tgt=LINK_LOCAL), ICMPv6NDOptDstLLAddr(lladdr=MINE)),
    "no IP": mine() / Raw(b"hello" * 20),
}

DISHONEST = {
    "ARP for another": mine() / ARP(op=2, hwsrc=MINE, psrc="192.0.2.2", pdst="192.0.2.3"),
    "ARP with another's MAC": mine() / ARP(op=2, hwsrc=OTHER, psrc="192.0.2.1", pdst="192.0.2.3"),
    "another's IPv4": mine() / IP(src="192.0.2.2", dst="192.0.2.3") / TCP(),
    "another's IPv4 in a VLAN": mine() / Dot1Q(vlan=7) / IP(src="192.0.2.2", dst="192.0.2.3") / TCP(),
    "DHCP offer": mine()
    / IP(src="192.0.2.1", dst="192.0.2.2")
    / UDP(sport=67, dport=68)
    / BOOTP(op=2)
    / DHCP(options=[("message-type", "offer"), "end"]),
    "another's IPv6": mine() / IPv6(src="2001:db8::2", dst="2001:db8::3") / TCP(),
    "router": neighbour(LINK_LOCAL, ICMPv6ND_RA()),
    "router in two VLANs": mine() / Dot1Q(vlan=0) / Dot1Q(vlan=0) / IPv6(src=LINK_LOCAL, dst="ff02::1") / ICMPv6ND_RA(),
    "router behind options": mine()
    / IPv6(src=LINK_LOCAL, dst="ff02::1", hlim=255)
    / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(100))])
    / ICMPv6ND_RA(),
    "router in a fragment": mine() / IPv6(src=LINK_LOCAL, dst="ff02::1") / IPv6ExtHdrFragment(nh=58) / ICMPv6ND_RA(),
    "advertisement of another's": neighbour(
        LINK_LOCAL, ICMPv6ND_NA(tgt="2001:db8::2"), ICMPv6NDOptDstLLAddr(lladdr=MINE)
    ),
    "advertisement with another's MAC": neighbour(
        LINK_LOCAL, ICMPv6ND_NA(tgt="2001:db8::1"), ICMPv6NDOptDstLLAddr(lladdr=OTHER)
    ),
    "DHCPv6 advertise": mine() / IPv6(src=LINK_LOCAL, dst="ff02::1") / UDP(sport=547, dport=546) / Raw(b"\x02abc"),
}


def test_addresses(pairs: Any) -> None:
    """Every honest frame arrives as it was, and none of the others, however they are cut into descriptors."""
    pair = pairs(address=ADDRESSES)
    for name, packet in HONEST.items():
        frame = bytes(packet)
        for cuts in ((), (20,), (30, 40, 50)):
            pair.guest.send(frame, cuts=cuts)
            pair.send()
            assert pair.heard() == [frame], name
    for number, (name, packet) in enumerate(DISHONEST.items(), 1):
        pair.send(bytes(packet))
        assert pair.heard() == [], name
        assert pair.drops("tx", "ip_spoofed") == number, name


def test_without_addresses_nothing_is_asked(pairs: Any) -> None:
    pair = pairs()
    frames = [bytes(packet) for packet in DISHONEST.values()]
    pair.send(*frames)
    assert pair.heard() == frames


def test_learning(pairs: Any) -> None:
    """As many as it may; what it has is listed, with the time since it was used; what is forgotten makes room."""
    pair = pairs(learn="3")
    sources = [bytes((2, 0, 0, 0, 1, number)) for number in range(5)]
    pair.send(*(numbered(number, source=source) for number, source in enumerate(sources)))
    assert len(pair.heard()) == 3
    assert pair.drops("tx", "spoofed") == 2
    learned = pair.entry.port.learned()
    assert sorted((found.mac, found.vlan) for found in learned) == [(source, 0) for source in sources[:3]]
    assert all(0 <= found.idle < 60 and not found.denied for found in learned)
    pair.entry.port.forget(sources[0], 0)
    pair.entry.port.forget(sources[0], 0)
    pair.entry.port.forget(b"\x02" * 6, 9)
    pair.send(numbered(9, source=sources[4]))
    assert sorted(found.mac for found in pair.entry.port.learned()) == sorted(sources[n] for n in (1, 2, 4))
    pair.send(numbered(9, source=MACS[1]))
    assert pair.drops("tx", "spoofed") == 3, "another guest's address is never learned"
    pair.entry.port.deny(sources[1], 0)
    pair.entry.port.deny(sources[0], 0)
    assert [found.mac for found in pair.entry.port.learned() if found.denied] == [sources[1]]
    pair.send(*(numbered(number, source=sources[1]) for number in range(23)))
    assert pair.drops("tx", "spoofed") == 26, "what is denied is not learned again"


def test_a_guest_without_learning_learns_nothing(pairs: Any) -> None:
    pair = pairs()
    pair.send(numbered(1, source=b"\x02\x00\x00\x00\x01\x01"))
    assert pair.heard() == []
    assert pair.entry.port.learned() == []
