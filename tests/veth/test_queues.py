# SPDX-License-Identifier: Apache-2.0
"""n-tuple rules bring each guest's frames to its own queue. The data plane is a stand-in, and so is the card.

The card (tests/support/card.py) has the rules; the sending end of the veth does what they say (tests/support/wire.py).
The queues, the XDP program and the sockets are real.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

import pytest

from support.card import Card
from support.fake_datapath import FakeDatapath, FakeXsk
from support.frames import mac_bytes, udp_frame
from support.netns import Namespace, World
from support.process import wait_for
from support.wire import Q, Wire, tagged
from xdpvhost.links import ntuple
from xdpvhost.links.journal import Journal
from xdpvhost.links.nicprep import NicPrep
from xdpvhost.xdp.maps import VLAN_ANY
from xdpvhost.xdp.nic import Nic, NicOptions

NIC, PEER = "nic0", "net0"
QUEUES = 4
GUESTS = 6
COUNT = 23
SOURCE = "02:00:00:00:00:77"


def mac(number: int) -> str:
    return f"52:54:00:00:00:{number:02x}"


KILLED = """
import json, sys
from pathlib import Path
from support.card import Card
from support.fake_datapath import FakeDatapath
from xdpvhost.links import ntuple
from xdpvhost.links.journal import Journal
from xdpvhost.links.nicprep import NicPrep
from xdpvhost.xdp.nic import Nic, NicOptions
card, kept = Card(), Path(sys.argv[2])
card.changed = lambda card: kept.write_text(json.dumps({at: spec.hex() for at, spec in card.rules.items()}))
ntuple.ethtool_ioctl = card.ioctl
NicPrep.allow_ntuple = lambda _: None
nic = Nic.open(NicOptions(sys.argv[3], ntuple="auto"), FakeDatapath(), Journal(Path(sys.argv[1])))
for slot in range(6):
    keys = [(0, bytes((0x52, 0x54, 0, 0, 0, slot)))]
    nic.add_guest(slot, f"vm{slot}", keys)
    nic.steer(slot)
    nic.sort_by_rules(slot, keys)
print("open", flush=True)
sys.stdin.read()
"""


class Bench:
    def __init__(self, world: World, patch: pytest.MonkeyPatch) -> None:
        self.host, network = world.namespace("host"), world.namespace("net")
        for namespace in (self.host, network):  # nothing but the tests' own frames
            namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", "net.ipv6.conf.all.disable_ipv6=1")
        world.veth(self.host, NIC, network, PEER, queues=QUEUES)
        self.wire = Wire(world, network, PEER)
        self.card = Card(queues=QUEUES)
        self.wire.choose_by(self.card)
        patch.setattr(ntuple, "ethtool_ioctl", self.card.ioctl)
        patch.setattr(NicPrep, "allow_ntuple", lambda _: None)
        self.path = world.directory / "journal.jsonl"

    def open(self, ntuple: str = "auto") -> Nic:
        return Nic.open(NicOptions(NIC, ntuple=ntuple), cast(Any, FakeDatapath()), Journal(self.path))


@pytest.fixture
def bench(world: World, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(world, monkeypatch)


@pytest.fixture
def host(bench: Bench) -> Iterator[Namespace]:
    with bench.host.entered():
        yield bench.host


def add(nic: Nic, slot: int, *vlans: int) -> list[FakeXsk]:
    keys = [(vlan, mac_bytes(mac(slot))) for vlan in vlans or (0, VLAN_ANY)]
    xsks = nic.add_guest(slot, f"vm{slot}", keys)
    nic.steer(slot)
    nic.sort_by_rules(slot, keys)
    return cast(list[FakeXsk], xsks)


def arrived(xsks: list[FakeXsk], count: int = COUNT) -> dict[int, list[bytes]]:
    """By queue, when `count` have arrived on all of them together."""
    frames: dict[int, list[bytes]] = {}

    def enough() -> bool:
        for queue, xsk in enumerate(xsks):
            if new := xsk.receive():
                frames.setdefault(queue, []).extend(new)
        return sum(map(len, frames.values())) >= count

    wait_for(enough, 5, f"{count} frames")
    return frames


def numbered(slot: int) -> list[bytes]:
    return [udp_frame(mac(slot), SOURCE, number=number) for number in range(COUNT)]


@pytest.mark.usefixtures("host")
def test_each_guest_has_a_queue(bench: Bench) -> None:
    with bench.open() as nic:
        guests = {slot: add(nic, slot) for slot in range(GUESTS)}
        assert nic.facts.ntuple_rules == f"{GUESTS} in hardware"
        for slot, xsks in guests.items():
            bench.wire.send(numbered(slot))
            assert arrived(xsks) == {slot % QUEUES: numbered(slot)}
        for xsks in guests.values():
            assert not arrived(xsks, 0)
        counted = {(slot, queue): n for (slot, queue, verdict), n in nic.verdicts().items() if n and slot is not None}
        assert counted == {(slot, slot % QUEUES): COUNT for slot in guests}
    assert not bench.card.rules
    assert not bench.path.exists()


@pytest.mark.usefixtures("host")
def test_where_there_is_no_rule_xdp_does_it(bench: Bench) -> None:
    """A table that is too small, and a rule that is wrong: each frame reaches its guest all the same."""
    bench.card.size = 3
    with bench.open() as nic:
        guests = {slot: add(nic, slot) for slot in range(GUESTS)}
        assert nic.facts.ntuple_rules == "3 in hardware, 3 in software: the NIC's table of 3 rules is full"
        bench.card.rules[2] = ntuple.Rule(mac_bytes(mac(0)), 3).pack(2)
        bench.card.changed(bench.card)
        for slot, xsks in guests.items():
            bench.wire.send(numbered(slot))
            assert sorted(chain(*arrived(xsks).values())) == sorted(numbered(slot))
        bench.wire.send(numbered(0))
        assert arrived(guests[0]) == {3: numbered(0)}
    assert list(bench.card.rules) == [2]  # that one is not ours


@pytest.mark.usefixtures("host")
def test_rules_come_and_go_with_guests_and_addresses(bench: Bench) -> None:
    with bench.open() as nic:
        xsks = add(nic, 1)
        other = (0, mac_bytes(mac(9)))
        nic.set_keys(1, [other])
        nic.sort_by_rules(1, [other])
        assert bench.card.addresses() == {other[1]}
        bench.wire.send(numbered(9))
        assert arrived(xsks) == {1: numbered(9)}
        nic.unsteer(1)
        assert not bench.card.rules
        nic.remove_guest(1)
        assert nic.facts.ntuple_rules == "0 in hardware"


@pytest.mark.usefixtures("host")
def test_an_access_ports_rule_is_for_its_vlan(bench: Bench) -> None:
    with bench.open() as nic:
        xsks = add(nic, 2, 100)
        (spec,) = bench.card.rules.values()
        assert ntuple.Rule(mac_bytes(mac(2)), 2, 100).is_in(spec)
        sent = [tagged(frame, (Q, 100)) for frame in numbered(2)]
        bench.wire.send(sent)
        assert sorted(chain(*arrived(xsks).values())) == sorted(sent)


def test_after_kill_9(bench: Bench) -> None:
    """The card keeps the rules; whoever comes next takes them back, and no others."""
    kept = bench.path.with_name("card.json")
    argv = bench.host.argv([sys.executable, "-c", KILLED, bench.path, kept, NIC])
    child = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        child.kill()
    bench.card.rules = {int(at): bytes.fromhex(spec) for at, spec in json.loads(kept.read_text()).items()}
    theirs = ntuple.Rule(mac_bytes(mac(9)), 1).pack(0)
    bench.card.rules[0] = theirs
    assert len(bench.card.rules) == GUESTS + 1
    with bench.host.entered():
        assert all(item.ok for item in Journal(bench.path).replay_undo())
    assert bench.card.rules == {0: theirs}
    assert not bench.path.exists()


@pytest.mark.usefixtures("host")
def test_off(bench: Bench) -> None:
    with bench.open(ntuple="off") as nic:
        add(nic, 1)
        assert nic.facts.ntuple_rules == "off"
        assert not bench.card.heard


@pytest.mark.usefixtures("host")
def test_a_nic_without_rules(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the veth itself
    with bench.open() as nic:
        add(nic, 1)
        assert nic.facts.ntuple_rules == "none: the driver has none"
