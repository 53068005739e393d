# SPDX-License-Identifier: Apache-2.0
"""n-tuple rules against cards that behave, are too small, have other rules, or lie (tests/support/card.py)."""

import errno
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.card import Card
from support.process import run
from xdpvhost.config import parse_guest
from xdpvhost.datapath import Addresses
from xdpvhost.links import ethtool, ntuple
from xdpvhost.links.ethtool import Feature
from xdpvhost.links.journal import Journal
from xdpvhost.links.netlink import Link
from xdpvhost.links.nicprep import NTUPLE, NicPrep
from xdpvhost.links.ntuple import FLOW_SPEC, LOC_ANY, RXNFC, RXNFC_SIZE, SRXCLSRLDEL, SRXCLSRLINS, OwnRules, Rule
from xdpvhost.links.undo import handlers
from xdpvhost.pools import Place
from xdpvhost.switch import Switch
from xdpvhost.xdp.maps import VLAN_ANY
from xdpvhost.xdp.rules import GuestRules, rules_for

LOOPBACK = Link("lo", 1, 65536, True, bytes(6), None, None, 1, 1)
MACS = [bytes((0x52, 0x54, 0, 0, 0, number)) for number in range(1, 40)]
QUEUES = 4


class Host:
    """A card in the place of the loopback device's, which has none, and a journal."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self._path, self._patch = path, patch
        self.prep = NicPrep(LOOPBACK, self.journal())
        self.own = OwnRules(self.prep)
        self.card = Card()
        self.insert_card(self.card)

    def journal(self) -> Journal:
        return Journal(self._path, handlers([LOOPBACK.index]))

    def insert_card(self, card: Card) -> None:
        self.card = card
        self._patch.setattr(ntuple, "ethtool_ioctl", card.ioctl)

    def guests(self) -> GuestRules:
        return GuestRules("lo", self.own, "", QUEUES)

    def kill(self) -> list[str]:
        """What a new daemon does about what is left."""
        return [item.detail for item in self.journal().replay_undo()]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path / "journal.jsonl", monkeypatch)


def transparent(*macs: bytes) -> list[tuple[int, bytes]]:
    return [(vlan, mac) for mac in macs for vlan in (0, VLAN_ANY)]


# ---- bytes


def test_requests_are_what_ethtool_says() -> None:
    """Recorded from `ethtool -N` 6.1, by a library that stood before ioctl(): `flow-type ether dst … action 3`."""
    plain = "3200000000000000000000000000000012000000525400000001" + "00" * 66 + "ffffffffffff" + "00" * 66
    in_vlan = (
        "3200000000000000000000000000000012000080525400000001" + "00" * 56 + "0064" + "00" * 8 + "ffffffffffff"
        + "00" * 56 + "0fff" + "00" * 8
    )  # fmt: skip
    for recorded, vlan in ((plain, None), (in_vlan, 100)):
        for location, where in (("0f000000", 15), ("ffffffff", LOC_ANY)):
            whole = bytes.fromhex(recorded) + bytes(4) + struct.pack("=Q", 3) + bytes.fromhex(location) + bytes(12)
            request = bytearray(RXNFC_SIZE)
            RXNFC.pack_into(request, 0, SRXCLSRLINS, 0, 0, Rule(MACS[0], 3, vlan).pack(where), 0)
            assert request == whole


def test_layout(tmp_path: Path) -> None:
    """The structs are the kernel's header's."""
    source = tmp_path / "layout.c"
    source.write_text("""
        #include <stddef.h>
        #include <stdio.h>
        #include <linux/ethtool.h>
        int main(void)
        {
            printf("%zu %zu %zu %zu %u %u %u\\n", sizeof(struct ethtool_rx_flow_spec), sizeof(struct ethtool_rxnfc),
                   offsetof(struct ethtool_rxnfc, fs), offsetof(struct ethtool_rxnfc, rule_locs),
                   ETHTOOL_SRXCLSRLINS, ETHTOOL_SRXCLSRLDEL, ETHER_FLOW);
        }
    """)
    run(["cc", "-o", tmp_path / "layout", source])
    said = run([tmp_path / "layout"]).stdout.split()
    ours = FLOW_SPEC.size, RXNFC_SIZE, 16, RXNFC.size, SRXCLSRLINS, SRXCLSRLDEL, ntuple.ETHER_FLOW
    assert [int(word) for word in said] == list(ours)


@pytest.mark.parametrize("rule", [Rule(MACS[0], 3), Rule(MACS[0], 3, 100)], ids=str)
def test_a_rule_knows_itself(rule: Rule) -> None:
    spec = rule.pack(7)
    assert rule.is_in(spec)
    assert Rule.from_args(rule.args) == rule
    for other in (Rule(MACS[1], 3, rule.vlan), Rule(MACS[0], 3, 101), Rule(MACS[0], 3, None if rule.vlan else 100)):
        assert not other.is_for_the_frames_of(spec)
    another_queue = Rule(MACS[0], 2, rule.vlan)
    assert another_queue.is_for_the_frames_of(spec)
    assert not another_queue.is_in(spec)
    for at in (4, 76 + 5, 76 + 12):  # the address, the masks of it and of the rest
        assert not rule.is_in(spec[:at] + bytes([spec[at] ^ 1]) + spec[at + 1 :])
    assert not rule.is_in(struct.pack("=I", struct.unpack_from("=I", spec)[0] | 1 << 29) + spec[4:])  # FLOW_RSS


def test_a_device_without_rules() -> None:
    """The real ioctl, on a device that has none."""
    with pytest.raises(OSError, match="not supported") as caught:
        ntuple.RuleTable("lo").locations()
    assert caught.value.errno == errno.EOPNOTSUPP
    assert ntuple.undo("lo", {"location": 3, **Rule(MACS[0], 1).args}) == "interface lo: no n-tuple rules"


# ---- one rule


@pytest.mark.parametrize("card", [Card(), Card(empty=errno.ENOENT), Card(chooses=True)], ids=["igb", "mlx5", "sfc"])
def test_a_rule_is_made_and_taken_back(host: Host, card: Card) -> None:
    host.insert_card(card)
    rule = Rule(MACS[0], 3)
    host.own.add(rule)
    where = 0 if card.chooses else card.size - 1
    assert card.queue_of(MACS[0]) == 3
    assert card.heard == [f"insert at {where}"]
    (entry,) = host.journal().pending()
    assert (entry.kind, entry.args["location"], entry.args["mac"]) == ("ntuple", where, "52:54:00:00:00:01")
    host.own.remove(rule)
    assert not card.rules
    assert not host.journal().pending()


def test_the_journal_knows_before_the_card(host: Host) -> None:
    known: list[object] = []
    host.card.changed = lambda card: known.append([e.args["location"] for e in host.journal().pending()])
    host.own.add(Rule(MACS[0], 3))
    inserted = known[-2]  # then it is read back
    assert inserted == [15]


@pytest.mark.parametrize("chooses", [False, True])
def test_after_kill_9(host: Host, chooses: bool) -> None:
    host.insert_card(Card(chooses=chooses))
    for number, mac in enumerate(MACS[:3]):
        host.own.add(Rule(mac, number))
    host.card.rules[9] = Rule(MACS[9], 1).pack(9)  # the administrator's
    assert len(host.kill()) == 3
    assert list(host.card.rules) == [9]
    assert not host.journal().pending()


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("chooses", [False, True])
def test_killed_in_the_middle(host: Host, chooses: bool, made: bool) -> None:
    """Before the rule was made, or before its location could be noted."""
    host.insert_card(Card(chooses=chooses))
    rule = Rule(MACS[0], 3)
    host.prep.record("ntuple", location=None if chooses else 15, **rule.args)
    if made:
        host.card.rules[5 if chooses else 15] = rule.pack(5 if chooses else 15)
    host.card.rules[9] = Rule(MACS[9], 1).pack(9)
    (said,) = host.kill()
    assert ("deleted" if made else "is gone") in said
    assert list(host.card.rules) == [9]


@pytest.mark.parametrize("theirs", [Rule(MACS[0], 2), Rule(MACS[1], 3), Rule(MACS[0], 3, 100)], ids=str)
def test_what_is_another_rule_by_now_stays(host: Host, theirs: Rule) -> None:
    host.own.add(Rule(MACS[0], 3))
    host.card.rules[15] = theirs.pack(15)
    assert host.kill() == ["interface lo: n-tuple rule 15 is another one by now"]
    assert host.card.rules == {15: theirs.pack(15)}


def test_the_administrators_rules_are_not_touched(host: Host) -> None:
    """Nor overtaken: who has a rule for the same frames means it."""
    theirs = {15: Rule(MACS[0], 1).pack(15), 14: Rule(MACS[5], 1).pack(14)}
    host.card.rules.update(theirs)
    with pytest.raises(FileExistsError, match="rule 15 is for the same frames, and not ours"):
        host.own.add(Rule(MACS[0], 3))
    host.own.add(Rule(MACS[0], 3, 100))  # these are others
    host.own.add(Rule(MACS[1], 3))
    assert host.card.heard == ["insert at 13", "insert at 12"]
    host.prep.undo()
    assert host.card.rules == theirs


# ---- refusals and lies


@pytest.mark.parametrize("chooses", [False, True])
def test_a_full_table(host: Host, chooses: bool) -> None:
    host.insert_card(Card(size=2, chooses=chooses))
    for mac in MACS[:2]:
        host.own.add(Rule(mac, 1))
    with pytest.raises(OSError, match=r"full|No space") as caught:
        host.own.add(Rule(MACS[2], 1))
    assert caught.value.errno == errno.ENOSPC
    assert len(host.journal().pending()) == 2
    assert len(host.card.rules) == 2


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC, errno.EPERM, errno.EBUSY])
def test_a_refused_rule_leaves_nothing(host: Host, code: int) -> None:
    host.insert_card(Card(refuses=code))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        host.own.add(Rule(MACS[0], 1))
    assert caught.value.errno == code
    assert not host.journal().pending()


def forgets(_spec: bytes) -> None:
    return None


def to_queue_0(spec: bytes) -> bytes:
    return spec[:152] + bytes(8) + spec[160:]


def every_frame(spec: bytes) -> bytes:
    return spec[:76] + bytes(76) + spec[152:]


@pytest.mark.parametrize("lie", [forgets, to_queue_0, every_frame])
@pytest.mark.parametrize("chooses", [False, True])
def test_a_driver_that_takes_what_it_does_not_do(
    host: Host, lie: Callable[[bytes], bytes | None], chooses: bool
) -> None:
    """What it has made of the rule goes, too."""
    host.insert_card(Card(stores=lie, chooses=chooses))
    theirs = Rule(MACS[9], 1).pack(3)
    host.card.rules[3] = theirs
    with pytest.raises(OSError, match="the driver takes such rules, and has others then"):
        host.own.add(Rule(MACS[0], 1))
    assert host.card.rules == {3: theirs}
    assert not host.journal().pending()


def test_a_driver_that_does_not_delete(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """It is said, and what to do, and the next daemon tries again."""
    host.own.add(Rule(MACS[0], 1))
    host.card.deletes = False
    host.own.remove(Rule(MACS[0], 1))
    assert "the driver does not delete n-tuple rule 15" in caplog.text
    assert "`ethtool -N lo delete 15`" in caplog.text
    host.card.deletes = True
    assert host.kill() == ["interface lo: n-tuple rule 15 deleted"]


# ---- guests


def test_rules_for_keys() -> None:
    assert rules_for(transparent(MACS[0], MACS[1]), 2) == {Rule(MACS[0], 2), Rule(MACS[1], 2)}
    assert rules_for([(100, MACS[0])], 2) == {Rule(MACS[0], 2, 100)}
    assert rules_for([(100, MACS[0]), (200, MACS[0])], 2) == {Rule(MACS[0], 2)}
    assert rules_for([(0, MACS[0])], 2) == {Rule(MACS[0], 2)}
    assert rules_for([(VLAN_ANY, MACS[0])], 2) == {Rule(MACS[0], 2)}


def test_guests_get_queues_round_robin(host: Host) -> None:
    guests = host.guests()
    for slot in range(6):
        guests.set(slot, transparent(MACS[slot]))
    assert [host.card.queue_of(MACS[slot]) for slot in range(6)] == [0, 1, 2, 3, 0, 1]
    assert str(guests) == "6 in hardware"


def test_what_a_guest_has_is_kept(host: Host) -> None:
    """Only what changes is changed."""
    guests = host.guests()
    guests.set(1, transparent(*MACS[:3]))
    host.card.heard.clear()
    guests.set(1, transparent(*MACS[1:4]))
    assert host.card.heard == ["delete 15", "insert at 15"]
    guests.set(1, transparent(*MACS[1:4]))
    assert host.card.heard == ["delete 15", "insert at 15"]
    guests.drop(1)
    assert not host.card.rules
    assert str(guests) == "0 in hardware"


def test_more_rules_than_the_nic_takes(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The rest is done in software, which is said once; and gets its rules when there is room again."""
    caplog.set_level(logging.INFO)
    host.insert_card(Card(size=12))
    guests = host.guests()
    for slot in range(4):
        guests.set(slot, transparent(*MACS[4 * slot : 4 * slot + 4]))
    assert str(guests) == "12 in hardware, 4 in software: the NIC's table of 12 rules is full"
    assert caplog.text.count("XDP does it alone") == 1
    guests.drop(0)
    assert str(guests) == "12 in hardware"
    assert all(host.card.queue_of(mac) == 3 for mac in MACS[12:16])
    assert len(host.journal().pending()) == 12


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (Card(refuses=errno.EINVAL), "the driver has no such rules"),
        (Card(refuses=errno.EOPNOTSUPP), "the driver has no rules for addresses"),
        (Card(stores=forgets), "the driver takes such rules, and has others then"),
        (Card(queues=1), "the driver has no such rules"),
        (Card(size=1, chooses=True, rules={0: Rule(MACS[9], 0).pack(0)}), "the NIC's table of rules is full"),
    ],
)
def test_a_nic_that_takes_none(host: Host, card: Card, why: str) -> None:
    host.insert_card(card)
    before = dict(card.rules)
    guests = host.guests()
    guests.set(1, transparent(MACS[0], MACS[1]))
    assert str(guests) == f"0 in hardware, 2 in software: {why}"
    guests.drop(1)
    assert str(guests) == "0 in hardware"
    assert card.rules == before
    assert not host.journal().pending()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_driver_without_rules_is_asked_once(host: Host, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whatever guests come and change after that: nothing goes to the NIC, and nothing into the journal."""
    host.insert_card(Card(refuses=code))
    guests = host.guests()
    guests.set(1, [(100, MACS[0]), (100, MACS[1])])
    said = str(guests)
    assert said.startswith("0 in hardware, 2 in software: the driver has no ")

    def spoil(*_: object) -> None:
        pytest.fail("asked again")

    monkeypatch.setattr(ntuple, "ethtool_ioctl", spoil)
    monkeypatch.setattr(Journal, "record", spoil)
    guests.set(2, transparent(*MACS[2:9]))
    guests.set(1, transparent(*MACS[9:]))
    guests.drop(2)
    guests.set(1, [(100, MACS[0]), (100, MACS[1])])
    assert str(guests) == said


def test_a_nic_without_rules_for_vlans_is_asked_once(host: Host) -> None:
    host.insert_card(Card(vlans=False))
    asked: list[str] = []
    add = host.own.add
    host.own.add = lambda rule: asked.append(str(rule)) or add(rule)  # type: ignore[method-assign, func-returns-value]
    guests = host.guests()
    for slot in range(1, 4):
        guests.set(slot, [(100, MACS[slot])])
    assert ["vlan" in text for text in asked] == [True, False, False, False]
    assert str(guests) == "3 in hardware"


def test_rules_are_for_what_the_spec_says() -> None:
    """And not for what a guest asks for by its control virtqueue, as fast as it can, or uses."""
    spec = parse_guest(f"name=vm1,mac={MACS[0].hex(':')},macs={MACS[1].hex(':')},vlan=7,mac-change=allow,learn=4")
    place = Place(spec, Addresses(MACS[2], (MACS[3], MACS[4])), frozenset({(7, MACS[5])}))
    assert {mac for _, mac in place.keys} == set(MACS[:6])
    told: list[object] = []
    nic = SimpleNamespace(sort_by_rules=lambda *got: told.append(got))
    entry = SimpleNamespace(place=place, slot=5, max_pairs=1, nic=nic)
    Switch._sort_by_rules(entry)  # type: ignore[arg-type]
    assert told == [(5, {(7, MACS[0]), (7, MACS[1])})]


def test_vlans(host: Host) -> None:
    """Two guests with one address in two VLANs."""
    guests = host.guests()
    guests.set(1, [(100, MACS[0])])
    guests.set(2, [(200, MACS[0])])
    specs = [host.card.rules[at] for at in (15, 14)]
    assert Rule(MACS[0], 1, 100).is_in(specs[0])
    assert Rule(MACS[0], 2, 200).is_in(specs[1])
    assert str(guests) == "2 in hardware"


def test_a_nic_without_rules_for_vlans(host: Host) -> None:
    """The address alone has to do, and can be one guest's only."""
    host.insert_card(Card(vlans=False))
    guests = host.guests()
    guests.set(1, [(100, MACS[0])])
    guests.set(2, [(200, MACS[0])])
    assert host.card.queue_of(MACS[0]) == 1
    assert str(guests) == "1 in hardware, 1 in software: another guest has the same address in another VLAN"
    guests.drop(1)
    assert host.card.queue_of(MACS[0]) == 2
    assert str(guests) == "1 in hardware"


def test_none_wanted() -> None:
    guests = GuestRules("lo", None, "none: there is one queue", 1)
    guests.set(0, transparent(MACS[0]))
    guests.drop(0)
    assert str(guests) == "none: there is one queue"


# ---- the feature


def test_rules_are_switched_on_and_off_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, Any] = {NTUPLE: Feature(False, True)}
    monkeypatch.setattr(ethtool, "features", lambda _: dict(state))
    monkeypatch.setattr(ethtool, "set_features", lambda _, wanted: state.update(switched(wanted)))
    journal = Journal(tmp_path / "journal.jsonl", handlers([LOOPBACK.index]))
    prep = NicPrep(LOOPBACK, journal)
    assert prep.allow_ntuple() is None
    assert state[NTUPLE].active
    assert [e.args["before"] for e in Journal(journal.path).pending()] == [{NTUPLE: False}]
    prep.undo()
    assert not state[NTUPLE].active
    state[NTUPLE] = Feature(False, False)
    assert NicPrep(LOOPBACK, journal).allow_ntuple() == "the driver has none"
    del state[NTUPLE]
    assert NicPrep(LOOPBACK, journal).allow_ntuple() == "the driver has none"


def switched(wanted: dict[str, bool]) -> dict[str, Feature]:
    return {name: Feature(value, True) for name, value in wanted.items()}
