# SPDX-License-Identifier: Apache-2.0
"""Which learned addresses join a pool, and moves of keys between guests. The switch is real; its data plane records."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from xdpvhost import addresses, learning
from xdpvhost.config import change_guest, parse_guest
from xdpvhost.datapath import VLAN_ANY, Addresses, Datapath, Learned, Tapq
from xdpvhost.errors import ConfigError, DatapathError, NicError
from xdpvhost.hostport import HostPort
from xdpvhost.learning import DENIED_FOR, Learning
from xdpvhost.links.ethtool import LinkState
from xdpvhost.nicport import NicPort
from xdpvhost.pools import Key
from xdpvhost.switch import GuestEntry, Switch

NEW, NEWER, HERE = (bytes((2, 0, 0, 0, 0, last)) for last in (1, 2, 3))
AGE = 300


@dataclass
class Port:
    table: dict[Key, float] = field(default_factory=dict)
    denied: set[Key] = field(default_factory=set)
    closed: bool = False

    def learned(self) -> list[Learned]:
        return [Learned(mac, vlan, idle, (vlan, mac) in self.denied) for (vlan, mac), idle in self.table.items()]

    def forget(self, mac: bytes, vlan: int) -> None:
        self.table.pop((vlan, mac), None)
        self.denied.discard((vlan, mac))

    def deny(self, mac: bytes, vlan: int) -> None:
        if (vlan, mac) in self.table:
            self.table[vlan, mac] = 0.0
            self.denied.add((vlan, mac))

    def close(self) -> None:
        self.closed = True


@dataclass
class Plane:
    """Publishes nothing: `seen` are the keys of each publication."""

    workers: int = 1
    seen: list[bytes] = field(default_factory=list)
    failing: bool = False

    def guest(self, _name: str, _pairs: int, _mac: bytes) -> Port:
        return Port()

    def publish(self, _guests: object, _nics: object, macs: bytes) -> None:
        if self.failing:
            raise DatapathError("no memory")
        self.seen.append(macs)


@dataclass
class Nic:
    """Refuses what ctl/xdp/nic.py does: a key that another guest has, and more keys than there is room for."""

    owners: dict[Key, int] = field(default_factory=dict)
    most: int = 100000
    gone: bool = False
    mtu: int = 1500
    link: LinkState = field(default_factory=LinkState)
    queues: tuple[()] = ()
    taps: tuple[()] = ()
    mcast: None = None
    changes: int = 0

    def __hash__(self) -> int:
        return id(self)

    def add_guest(self, slot: int, _name: str, keys: Collection[Key]) -> list[Any]:
        self.waiting = slot, keys
        return []

    def packet_socket(self, _slot: int) -> None:
        return None

    def steer(self, _slot: int) -> None:
        self.set_keys(*self.waiting)

    def set_keys(self, slot: int, keys: Collection[Key]) -> None:
        self.changes += 1
        taken = [key for key in keys if self.owners.get(key, slot) != slot]
        others = {key: owner for key, owner in self.owners.items() if owner != slot}
        if taken or len(others) + len(keys) > self.most:
            raise NicError(f"another guest's, or too many: {taken}")
        self.owners = others | dict.fromkeys(keys, slot)

    def sort_by_rules(self, slot: int, keys: Collection[Key]) -> None:
        self.rules = slot, keys

    def unsteer(self, slot: int) -> None:
        self.set_keys(slot, [])

    def remove_guest(self, _slot: int) -> None:
        pass


class Scene:
    def __init__(self) -> None:
        self.plane, self.nic = Plane(), Nic()
        self.switch = Switch(cast(Datapath, self.plane))
        self.switch.add_nic(cast(NicPort, self.nic))
        self.learning = Learning(self.switch, AGE)

    def guest(self, number: int, keys: str = "") -> GuestEntry:
        return self.switch.add_guest(parse_guest(f"name=vm{number},mac=52:54:00:00:00:{number:02x}{keys}"))

    def look(self) -> float | None:
        """Whatever the time since the last one."""
        self.learning._next = 0.0
        return self.learning.look()


def table(entry: GuestEntry) -> dict[Key, float]:
    return cast(Port, entry.port).table


def denied(entry: GuestEntry) -> set[Key]:
    return cast(Port, entry.port).denied


def host_port(scene: Scene, mac: bytes, nic: Nic | None = None) -> None:
    """Only what the switch asks it for."""
    host = HostPort(cast(NicPort, nic or scene.nic), "xvh-nic0", mac, 511)
    scene.switch.hosts[host.nic] = host
    host.tapq = cast(Tapq, None)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(learning, "addresses_here", lambda: {HERE})
    monkeypatch.setattr(addresses, "addresses_here", lambda: {HERE})
    return Scene()


def test_an_address_joins_the_pool_and_grows_old(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4")
    table(vm1)[0, NEW] = 0.1
    published = len(scene.plane.seen)
    assert scene.look() is None
    assert vm1.place.learned == {(0, NEW)}
    assert scene.nic.owners[0, NEW] == vm1.slot
    assert len(scene.plane.seen) == published + 1
    assert NEW in scene.plane.seen[-1]
    scene.look()
    assert len(scene.plane.seen) == published + 1, "nothing new, nothing published"
    table(vm1)[0, NEW] = AGE
    scene.look()
    assert table(vm1) == {}
    assert vm1.place.learned == set()
    assert (0, NEW) not in scene.nic.owners
    assert vm1.learning == {"learned": 1, "refused": 0, "aged": 1, "taken": 0}


def test_looks_are_rare(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4")
    assert scene.learning.look() is None
    table(vm1)[0, NEW] = 0.1
    delay = scene.learning.look()
    assert delay is not None
    assert 0 < delay <= learning.PERIOD
    assert vm1.place.learned == set()


def test_several_guests_share_one_publication(scene: Scene) -> None:
    vm1, vm2 = scene.guest(1, ",learn=4"), scene.guest(2, ",learn=4,vlan=10")
    table(vm1)[5, NEW] = 0.1
    table(vm2)[10, NEWER] = 0.1
    published = len(scene.plane.seen)
    scene.look()
    assert (vm1.place.learned, vm2.place.learned) == ({(5, NEW)}, {(10, NEWER)})
    assert len(scene.plane.seen) == published + 1


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ("", (0, bytes.fromhex("525400000002"))),
        ("", (7, bytes.fromhex("525400000002"))),
        ("", (VLAN_ANY, bytes.fromhex("525400000002"))),
        (",vlan=7", (7, bytes.fromhex("525400000002"))),
        (",macs=02:00:00:00:00:01", (0, NEW)),
        ("", (0, HERE)),
    ],
)
def test_what_somebody_has_is_refused(scene: Scene, other: str, key: Key) -> None:
    vm1, _ = scene.guest(1, ",learn=4"), scene.guest(2, other)
    table(vm1)[key] = 0.1
    scene.look()
    assert vm1.place.learned == set()
    assert denied(vm1) == {key}
    assert vm1.learning["refused"] == 1


def test_what_is_denied_is_forgotten_after_a_while(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4")
    table(vm1)[0, HERE] = 0.1
    scene.look()
    table(vm1)[0, HERE] = DENIED_FOR - 1
    scene.look()
    assert denied(vm1) == {(0, HERE)}
    assert vm1.learning["refused"] == 1, "counted once"
    table(vm1)[0, HERE] = DENIED_FOR
    scene.look()
    assert table(vm1) == {}
    assert vm1.learning == {"learned": 0, "refused": 1, "aged": 0, "taken": 0}


def test_the_same_address_in_another_vlan_is_nobodys(scene: Scene) -> None:
    vm1, _ = scene.guest(1, ",learn=4,vlan=8"), scene.guest(2, ",vlan=7")
    table(vm1)[8, bytes.fromhex("525400000002")] = 0.1
    scene.look()
    assert len(vm1.place.learned) == 1


def test_the_first_has_it_until_it_is_old(scene: Scene) -> None:
    vm1, vm2 = scene.guest(1, ",learn=4"), scene.guest(2, ",learn=4")
    table(vm1)[0, NEW] = table(vm2)[0, NEW] = 0.1
    scene.look()
    assert (vm1.place.learned, vm2.place.learned) == ({(0, NEW)}, set())
    assert vm2.learning["refused"] == 1
    table(vm1)[0, NEW], table(vm2)[0, NEW] = AGE, 0.1
    scene.look()
    assert denied(vm2) == {(0, NEW)}, "for a while"
    table(vm2)[0, NEW] = DENIED_FOR
    scene.look()
    table(vm2)[0, NEW] = 0.1  # it sends on
    scene.look()
    assert (vm1.place.learned, vm2.place.learned) == (set(), {(0, NEW)})


@pytest.mark.parametrize("keys", ["", ",vlan=10", ",trunk=9-11"])
@pytest.mark.parametrize("how", ["add", "set"])
def test_what_is_configured_later_takes_it(scene: Scene, how: str, keys: str) -> None:
    vm1 = scene.guest(1, ",learn=4,trunk=10+20")
    table(vm1).update({(10, NEW): 0.1, (20, NEW): 0.1})
    scene.look()
    assert len(vm1.place.learned) == 2
    if how == "add":
        vm2 = scene.guest(2, f",macs={NEW.hex(':')}{keys}")
    else:
        vm2 = scene.guest(2)
        changes = dict(part.split("=") for part in f"macs={NEW.hex(':')}{keys}".split(","))
        scene.switch.change_guest("vm2", change_guest(vm2.spec, changes))
    left = set() if not keys else {(20, NEW)}
    assert vm1.place.learned == left
    assert set(table(vm1)) == left
    assert vm1.learning["taken"] == 2 - len(left)
    assert scene.nic.owners[(10 if keys else 0), NEW] == vm2.slot
    scene.switch.remove_guest("vm2")
    assert scene.nic.owners.get((10, NEW)) is None


def test_what_a_guest_gets_itself_is_no_longer_learned(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4")
    table(vm1).update({(0, NEW): 0.1, (0, NEWER): 0.1})
    scene.look()
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"macs": NEW.hex(":")}))
    assert vm1.place.learned == {(0, NEWER)}
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"vlan": "10"}))
    assert vm1.place.learned == set()
    assert table(vm1) == {}


def test_no_more_learning(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4")
    table(vm1)[0, NEW] = 0.1
    scene.look()
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"learn": ""}))
    assert vm1.place.learned == set()
    assert (0, NEW) not in scene.nic.owners


def test_a_full_table_refuses_learned_addresses(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    vm1 = scene.guest(1, ",learn=4")
    scene.nic.most = 3
    table(vm1).update({(0, NEW): 0.1, (0, NEWER): 0.1})
    scene.look()
    assert vm1.place.learned == set()
    assert denied(vm1) == {(0, NEW), (0, NEWER)}
    assert vm1.learning["refused"] == 2
    assert len(scene.nic.owners) == 2
    table(vm1)[1, NEW] = table(vm1)[2, NEW] = 0.1
    scene.look()
    errors = [record.levelname for record in caplog.records if "what it has learned is refused" in record.message]
    assert errors == ["ERROR"], "once a minute"


def test_one_guests_keys_are_refused_and_the_others_are_not(scene: Scene) -> None:
    """The NIC refuses one of vm1's; at the same time vm2 learns, and what vm3 has learned is old."""
    vm1, vm2, vm3 = (scene.guest(number, ",learn=4") for number in (1, 2, 3))
    table(vm3)[0, NEW] = 0.1
    scene.look()
    scene.nic.owners[0, NEWER] = 99
    table(vm1)[0, NEWER] = table(vm2)[5, NEWER] = 0.1
    table(vm3)[0, NEW] = AGE
    scene.look()
    assert [entry.place.learned for entry in (vm1, vm2, vm3)] == [set(), {(5, NEWER)}, set()]
    assert (denied(vm1), denied(vm2)) == ({(0, NEWER)}, set())
    assert (0, NEW) not in scene.nic.owners
    assert vm3.learning["aged"] == 1


def test_guests_of_a_nic_that_is_gone_learn_nothing_and_forget(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4")
    table(vm1)[0, NEW] = 0.1
    scene.look()
    scene.nic.gone = True
    table(vm1).update({(0, NEW): AGE, (0, NEWER): 0.1})
    scene.look()
    assert vm1.place.learned == set()
    assert vm1.learning == {"learned": 1, "refused": 0, "aged": 1, "taken": 0}
    assert set(table(vm1)) == {(0, NEWER)}


def test_a_look_grants_no_more_than_there_is_room_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    vm1, vm2 = scene.guest(1, ",learn=4"), scene.guest(2, ",learn=4")
    host_port(scene, bytes((2, 0, 0, 0, 0, 0x99)))
    monkeypatch.setattr("xdpvhost.switch.MAX_MACS", 9)
    table(vm1).update({(0, NEW): 0.1, (1, NEW): 0.2})
    table(vm2).update({(2, NEW): 0.1, (3, NEW): 0.2})
    assert scene.switch.room(vm1.nic) == 3, "two guests and the host port have two keys each"
    scene.look()
    assert (vm1.place.learned, vm2.place.learned) == ({(0, NEW), (1, NEW)}, {(2, NEW)})
    assert denied(vm2) == {(3, NEW)}


def test_a_host_ports_address_is_nobody_elses(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4,mac-change=allow")
    host_port(scene, NEW, Nic())
    table(vm1).update({(0, NEW): 0.1, (7, NEW): 0.1})
    scene.look()
    assert vm1.place.learned == set()
    assert denied(vm1) == {(0, NEW), (7, NEW)}
    with pytest.raises(ConfigError, match="host port xvh-nic0 has it"):
        scene.switch.check_addresses(vm1, Addresses(NEW))


def test_an_address_that_a_device_of_this_machine_gets_later(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    vm1 = scene.guest(1, ",learn=4")
    table(vm1).update({(0, NEW): 0.1, (0, NEWER): 0.1})
    scene.look()
    monkeypatch.setattr(learning, "addresses_here", lambda: {NEW})
    scene.look()
    assert vm1.place.learned == {(0, NEWER)}
    assert denied(vm1) == {(0, NEW)}
    assert (0, NEW) not in scene.nic.owners


def test_a_long_look_is_followed_by_a_longer_rest(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    vm1 = scene.guest(1, ",learn=4")
    now = [1000.0]

    def slow() -> set[bytes]:
        now[0] += 0.3
        return set()

    monkeypatch.setattr("xdpvhost.learning.time.monotonic", lambda: now[0])
    monkeypatch.setattr(learning, "addresses_here", slow)
    table(vm1)[0, NEW] = 0.1
    assert scene.look() is None
    assert scene.learning.look() == pytest.approx(3.0)
    now[0] += 3.001
    assert scene.learning.look() is None


def test_a_guest_that_fails_to_come_takes_nothing(scene: Scene) -> None:
    vm1 = scene.guest(1, ",learn=4")
    table(vm1)[0, NEW] = 0.1
    scene.look()

    def fail(_slot: int) -> None:
        raise NicError("no more sockets")

    scene.nic.packet_socket = fail  # type: ignore[method-assign]
    with pytest.raises(NicError):
        scene.guest(2, f",macs={NEW.hex(':')}")
    assert vm1.place.learned == {(0, NEW)}
    assert scene.nic.owners[0, NEW] == vm1.slot
    assert (0, NEW) in table(vm1)
    assert vm1.learning["taken"] == 0


def test_what_was_granted_goes_with_mac_change_deny(scene: Scene) -> None:
    vm1 = scene.guest(1, ",mac-change=allow")
    scene.switch.listen_to(vm1, Addresses(NEW, (NEWER,)))
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"isolated": "on"}))
    assert vm1.addresses == Addresses(NEW, (NEWER,))
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"mac-change": "deny"}))
    assert vm1.listens_to == {vm1.spec.mac}
    assert {mac for _, mac in scene.nic.owners} == {vm1.spec.mac}


# ---- moves


def test_a_publication_that_fails_changes_nothing(scene: Scene) -> None:
    vm1, _ = scene.guest(1, ",vlan=10"), scene.guest(2)
    before, place = dict(scene.nic.owners), vm1.place
    scene.plane.failing = True
    with pytest.raises(DatapathError):
        scene.switch.change_guest("vm1", change_guest(vm1.spec, {"vlan": "20"}))
    assert scene.nic.owners == before
    assert vm1.place is place


def test_a_nic_that_refuses_changes_nothing(scene: Scene) -> None:
    vm1 = scene.guest(1, ",vlan=10")
    before, published = dict(scene.nic.owners), len(scene.plane.seen)
    scene.nic.most = 2
    with pytest.raises(NicError):
        scene.switch.change_guest("vm1", change_guest(vm1.spec, {"vlan": "", "trunk": "20-22"}))
    assert scene.nic.owners == before
    assert len(scene.plane.seen) == published


def test_new_keys_come_before_the_publication_and_old_ones_go_after_it(scene: Scene) -> None:
    vm1 = scene.guest(1, ",vlan=10")
    during: list[set[int]] = []
    publish = scene.plane.publish

    def watch(*args: Any) -> None:
        during.append({vlan for vlan, _ in scene.nic.owners})
        publish(*args)

    scene.plane.publish = watch  # type: ignore[method-assign]
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"vlan": "20"}))
    assert during == [{10, 20}]
    assert {vlan for vlan, _ in scene.nic.owners} == {20}


def test_only_the_policy_changes_nothing_on_the_nic(scene: Scene) -> None:
    vm1 = scene.guest(1, ",vlan=10")
    changes = scene.nic.changes
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"tx-rate": "100M"}))
    assert scene.nic.changes == changes
    assert vm1.place.policy.tx.rate == 12_500_000


def test_a_guest_can_be_unplugged_though_the_mtu_has_outgrown_its_limits(scene: Scene) -> None:
    vm1 = scene.guest(1, ",tx-rate=1M,tx-burst=2000")
    scene.nic.mtu = 9000
    scene.switch.change_guest("vm1", change_guest(vm1.spec, {"link": "off"}))
    assert vm1.place.policy.link_down
    with pytest.raises(ConfigError, match="9018"):
        scene.switch.change_guest("vm1", change_guest(vm1.spec, {"tx-burst": "3000"}))
