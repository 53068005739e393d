# SPDX-License-Identifier: Apache-2.0
"""VLAN tags as the kernel itself leaves them beside frames: VLAN devices, bridges with VLAN filtering; and on a card.

The data plane is a stand-in. tests/veth/test_tags.py has what needs no modules.
"""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from support.fake_datapath import FakeDatapath, FakeXsk
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.machine_net import COUNT, DEADLINE, GUEST, NIC, WIRE, Root, cable_up, wait_carrier
from support.netns import Namespace, World
from support.process import run, wait_for
from support.wire import Q, tagged
from xdpvhost.links.journal import Journal
from xdpvhost.links.ntuple import LOC_ANY, Rule, RuleTable
from xdpvhost.xdp.nic import Nic, NicOptions

RED, BLUE = 100, 200
SOURCE = "02:00:00:00:00:77"
FRAMES = [udp_frame(GUEST, SOURCE, number=number) for number in range(COUNT)]


@dataclass
class Ends:
    host: Namespace
    network: Namespace
    journal: Path

    def open(self) -> Nic:
        return Nic.open(NicOptions("veth0"), cast(Any, FakeDatapath()), Journal(self.journal))


@pytest.fixture
def ends(world: World) -> Iterator[Ends]:
    host, network = world.namespace("host"), world.namespace("net")
    for namespace in (host, network):  # nothing but the tests' own frames
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", "net.ipv6.conf.all.disable_ipv6=1")
    world.veth(host, "veth0", network, "net0", queues=2)
    with host.entered():
        yield Ends(host, network, world.directory / "journal.jsonl")


def add(nic: Nic, slot: int, vlan: int) -> list[FakeXsk]:
    xsks = nic.add_guest(slot, f"vm{slot}", [(vlan, mac_bytes(GUEST))])
    nic.steer(slot)
    return cast(list[FakeXsk], xsks)


def collect(xsks: Sequence[FakeXsk], count: int = COUNT) -> list[bytes]:
    frames: list[bytes] = []

    def enough() -> bool:
        frames.extend(frame for xsk in xsks for frame in xsk.receive())
        return len(frames) >= count

    wait_for(enough, DEADLINE, f"{count} frames")
    return sorted(frames)


def in_vlan(vlan: int) -> list[bytes]:
    return sorted(tagged(frame, (Q, vlan)) for frame in FRAMES)


def test_from_a_vlan_device(ends: Ends) -> None:
    for vlan in (RED, BLUE):
        ends.network.ip("link", "add", "link", "net0", "name", f"vlan{vlan}", "type", "vlan", "id", str(vlan))
        ends.network.ip("link", "set", f"vlan{vlan}", "up")
    with ends.open() as nic:
        assert (nic.facts.vlan_tags, nic.facts.dispatcher) == ("in frames and beside them", False)
        guests = {vlan: add(nic, slot, vlan) for slot, vlan in enumerate((0, RED, BLUE))}
        for vlan in (RED, BLUE):
            with PacketSocket(ends.network, f"vlan{vlan}") as sender:
                sender.send(FRAMES)
            assert collect(guests[vlan]) == in_vlan(vlan)
        assert not any(collect(xsks, 0) for xsks in guests.values())


def test_from_a_bridge_with_vlan_filtering(world: World, ends: Ends) -> None:
    network = ends.network
    world.veth(network, "port0", network, "sender0", queues=1)
    network.ip("link", "add", "br0", "type", "bridge", "vlan_filtering", "1", "mcast_snooping", "0")
    network.ip("link", "set", "br0", "up")
    for port, words in (("net0", ()), ("port0", ("pvid", "untagged"))):
        network.ip("link", "set", port, "master", "br0")
        network.run("bridge", "vlan", "del", "dev", port, "vid", "1")
        network.run("bridge", "vlan", "add", "dev", port, "vid", str(RED), *words)
    wait_for(
        lambda: "forwarding" in network.run("bridge", "link", "show", "dev", "net0").stdout, DEADLINE, "the bridge"
    )
    with ends.open() as nic:
        untagged, red = add(nic, 0, 0), add(nic, 1, RED)
        with PacketSocket(network, "sender0") as sender:
            sender.send(FRAMES)
        assert collect(red) == in_vlan(RED)
        assert not collect(untagged, 0)


def test_beside_another_program(ends: Ends) -> None:
    """Ours joins it in libxdp's dispatcher, which is bound to no device; that is said."""
    run(["xdp-filter", "load", "--mode", "native", "--policy", "allow", "--features", "ethernet", "veth0"])
    try:
        with ends.open() as nic:
            assert (nic.facts.vlan_tags, nic.facts.dispatcher) == ("in frames; beside them they are not seen", True)
            (warning,) = nic.facts.warnings
            assert "other XDP programs are on the interface" in warning
    finally:
        run(["xdp-filter", "unload", "veth0"])


@pytest.fixture
def card(tmp_path: Path) -> Iterator[Nic]:
    with cable_up():
        options = NicOptions(NIC, bind="copy", ntuple="auto")
        with Nic.open(options, cast(Any, FakeDatapath()), Journal(tmp_path / "journal.jsonl")) as nic:
            wait_carrier(NIC)  # the driver resets the card
            yield nic


def test_a_card_leaves_them_in_frames(card: Nic, tmp_path: Path) -> None:
    assert (card.facts.vlan_tags, card.facts.warnings) == ("in frames", ())
    guests = {vlan: add(card, slot, vlan) for slot, vlan in enumerate((0, RED, BLUE))}
    with PacketSocket(Root("root", tmp_path), WIRE) as wire:
        for vlan in (RED, BLUE):
            wire.send(in_vlan(vlan))
            assert collect(guests[vlan]) == in_vlan(vlan)
        wire.send(FRAMES)
        assert collect(guests[0]) == sorted(FRAMES)
    assert not any(collect(xsks, 0) for xsks in guests.values())


def test_a_card_without_rules_for_addresses(card: Nic) -> None:
    """An 82576 has a table, in which nothing can be: the real ioctls."""
    assert card.facts.ntuple_rules == "none: the driver has none"
    table = RuleTable(NIC)
    assert table.locations()[0] == set()
    assert not table.chooses_locations()
    assert table.get(3) is None
    with pytest.raises(OSError, match="not supported") as caught:
        table.insert(Rule(mac_bytes(GUEST), 1), LOC_ANY)
    assert caught.value.errno == errno.EOPNOTSUPP
