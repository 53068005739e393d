# SPDX-License-Identifier: Apache-2.0
"""A NIC is opened, steers frames by MAC, and is given back byte for byte. The data plane is a stand-in."""

import asyncio
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from support.fake_datapath import FakeDatapath, FakeNicq, FakePacketPort, FakeXsk
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.netns import Namespace, World
from support.process import run, wait_for
from xdpvhost import privileges
from xdpvhost.datapath import NICQ_TX_CSUM
from xdpvhost.errors import NicError, PrivilegeError
from xdpvhost.links.ethtool import features
from xdpvhost.links.journal import Journal
from xdpvhost.links.netdev import DeviceFeatures, XdpFeatures, XskFeatures
from xdpvhost.links.nicprep import ADOPTED, AddressFilter, NicPrep, adoptable, prepare
from xdpvhost.links.undo import handlers
from xdpvhost.rundir import InterfaceLock
from xdpvhost.xdp import libxdp, program, xsk
from xdpvhost.xdp import nic as nic_module
from xdpvhost.xdp.features import probe
from xdpvhost.xdp.libbpf import BpfObject, xdp_state
from xdpvhost.xdp.maps import MAX_SLOTS, VLAN_ANY
from xdpvhost.xdp.nic import Nic, NicOptions
from xdpvhost.xdp.program import SteerProgram, attached
from xdpvhost.xdp.xsk import STATISTICS

NIC, PEER = "nic0", "net0"
QUEUES = 4
MAC1, MAC2, STRANGER = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:99"
COUNT = 23

SECOND_PROGRAM = """
import sys, time
from pathlib import Path
from support.fake_datapath import FakeDatapath
from xdpvhost.links.ethtool import features
from xdpvhost.links.journal import Journal
from xdpvhost.links.netdev import DeviceFeatures, XdpFeatures, XskFeatures
from xdpvhost.xdp.nic import Nic, NicOptions
nic = Nic.open(NicOptions(sys.argv[1]), FakeDatapath(), Journal(Path(sys.argv[2])))
nic.add_guest(0, "vm1", [(0, bytes.fromhex("525400000001"))])
nic.steer(0)
print("open", flush=True)
sys.stdin.read()
"""


@dataclass
class Pair:
    """A veth pair across two namespaces: the NIC's and the network's."""

    world: World
    host: Namespace
    network: Namespace
    dp: FakeDatapath = field(default_factory=FakeDatapath)

    @property
    def journal(self) -> Journal:
        return Journal(self.world.directory / "journal.jsonl")

    def open(self, **options: object) -> Nic:
        return Nic.open(NicOptions(NIC, **options), cast(Any, self.dp), self.journal)  # type: ignore[arg-type]

    def snapshot(self) -> dict[str, str]:
        """All that an administrator can see of both ends."""
        commands: dict[str, Sequence[str]] = {
            "link": ("ip", "-d", "link", "show"),
            "features": ("ethtool", "-k"),
            "channels": ("ethtool", "-l"),
        }
        ends = ((self.host, NIC), (self.network, PEER))
        seen = {f"{dev} {what}": ns.run(*argv, dev).stdout for ns, dev in ends for what, argv in commands.items()}
        seen["fdb"] = self.host.run("bridge", "fdb", "show", "dev", NIC).stdout
        return seen

    def send(self, destination: str, count: int = COUNT, source: str = "02:00:00:00:00:77", size: int = 64) -> None:
        with PacketSocket(self.network, PEER) as sender:
            sender.send(udp_frame(destination, source, number=number, size=size) for number in range(count))


@pytest.fixture
def pair(world: World) -> Pair:
    host, network = world.namespace("host"), world.namespace("net")
    for namespace in (host, network):  # nothing but the tests' own frames
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", "net.ipv6.conf.all.disable_ipv6=1")
    world.veth(host, NIC, network, PEER, queues=QUEUES)
    return Pair(world, host, network)


def add(nic: Nic, slot: int, mac: str, *vlans: int) -> list[FakeXsk]:
    """A guest that is steered at once."""
    xsks = nic.add_guest(slot, f"vm{slot}", [(vlan, mac_bytes(mac)) for vlan in vlans or (0, VLAN_ANY)])
    nic.steer(slot)
    return xsks  # type: ignore[return-value]


def collect(xsks: Sequence[FakeXsk], count: int) -> list[bytes]:
    """Waits for `count` frames on a guest's sockets."""
    frames: list[bytes] = []

    def enough() -> bool:
        frames.extend(frame for xsk in xsks for frame in xsk.receive())
        return len(frames) >= count

    wait_for(enough, 5, f"{count} frames")
    return frames


def verdicts(nic: Nic, slot: int | None) -> dict[str, int]:
    """Summed over the queues, without zeros."""
    sums: dict[str, int] = {}
    for (who, _, verdict), count in nic.verdicts().items():
        if who == slot and count:
            sums[verdict] = sums.get(verdict, 0) + count
    return sums


# ---- open and close


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_close_gives_the_nic_back(pair: Pair, mode: str) -> None:
    """A generic program would see what GRO has joined, and whole what a local sender leaves to be cut."""
    pair.host.run("ethtool", "-K", NIC, "gro", "on")
    before = pair.snapshot()
    with pair.host.entered():
        assert features(NIC)["rx-gro"].active
        nic = pair.open(xdp_mode=mode)
        add(nic, 0, MAC1)
        add(nic, 1, MAC2)
        assert pair.snapshot() != before
        assert nic.facts.xdp_in_use == mode
        assert features(NIC)["rx-gro"].active == (mode == "native")
        about = [("(TSO) are lost" in warning, "VLAN tag" in warning) for warning in nic.facts.warnings]
        assert about == ([] if mode == "native" else [(True, False), (False, True)])
        nic.close()
        nic.close()
        assert features(NIC)["rx-gro"].active
    assert pair.snapshot() == before
    assert all(thing.closed for thing in pair.dp.made)
    assert not pair.journal.path.exists()


def test_facts(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        facts = nic.facts
        assert (facts.iface, facts.driver, facts.mtu, facts.queues) == (NIC, "veth", 1500, QUEUES)
        assert (facts.xdp_asked, facts.xdp_in_use) == ("auto", "native")
        assert (facts.bind_asked, facts.bind_in_use) == ("auto", "copy")
        assert (facts.dispatcher, facts.chunk, facts.partial_checksums) == (False, 2048, True)
        assert facts.vlan_tags == "in frames and beside them"
        assert "single program" in facts.dispatcher_detail
        assert facts.mac == pair.host.mac(NIC)
        assert (nic.ifindex, nic.nr_queues, len(nic.queues)) == (facts.ifindex, QUEUES, QUEUES)
        assert nic.mcast is not None


def test_who_finishes_checksums(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device only where its driver says so and libxdp can register room for the request."""
    with pair.host.entered(), pair.open() as nic:
        assert nic.facts.tx_checksums == "copy: the driver has no checksum offload for AF_XDP"
    said = DeviceFeatures(XdpFeatures.BASIC, XskFeatures.TX_CHECKSUM)
    monkeypatch.setattr(nic_module, "device_features", lambda _: said)
    monkeypatch.setattr(libxdp, "has_tx_metadata", lambda: False)
    with pair.host.entered(), pair.open() as nic:
        assert nic.facts.tx_checksums == "copy: libxdp is too old for it (1.5 or later)"

    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "as a kernel before 6.8")

    monkeypatch.setattr(libxdp, "has_tx_metadata", lambda: True)
    monkeypatch.setattr(libxdp, "make_umem_with_metadata", refuse)
    with pair.host.entered(), pair.open() as nic:
        assert nic.facts.tx_checksums == "copy: the kernel refuses metadata before frames"
        assert all(not cast(FakeNicq, queue).conf.flags & NICQ_TX_CSUM for queue in nic.queues)


def test_open_again_at_once(pair: Pair) -> None:
    """The kernel lets go of a queue late."""
    with pair.host.entered():
        for _ in range(3):
            with pair.open() as nic:
                add(nic, 0, MAC1)


def test_inside_a_running_event_loop(pair: Pair) -> None:
    async def up() -> None:
        with pair.open() as nic:
            assert nic.nr_queues == QUEUES

    with pair.host.entered():
        asyncio.run(up())


def test_a_nic_that_is_down_is_up_meanwhile(pair: Pair) -> None:
    pair.host.ip("link", "set", NIC, "down")
    before = pair.snapshot()
    with pair.host.entered(), pair.open():
        assert ",UP" in pair.host.run("ip", "link", "show", NIC).stdout
    assert pair.snapshot() == before


def test_fewer_queues(pair: Pair) -> None:
    before = pair.snapshot()
    pair.network.run("ethtool", "-L", PEER, "tx", "1")
    with pair.host.entered(), pair.open(queues=2) as nic:
        assert nic.nr_queues == 2
        xsks = add(nic, 0, MAC1)
        pair.send(MAC1)
        assert len(collect(xsks, COUNT)) == COUNT
    pair.network.run("ethtool", "-L", PEER, "tx", str(QUEUES))
    assert pair.snapshot() == before


@pytest.mark.parametrize("made", range(1, QUEUES + 2))
def test_a_failure_half_way_leaves_nothing(pair: Pair, made: int) -> None:
    """The data plane refuses one object after the other."""
    before = pair.snapshot()
    pair.dp.fail_at = made
    with pair.host.entered(), pytest.raises(RuntimeError, match="asked to fail"):
        pair.open()
    assert pair.snapshot() == before
    assert all(thing.closed for thing in pair.dp.made)
    assert not pair.journal.path.exists()


def test_descriptors_do_not_leak(pair: Pair) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with pair.host.entered():
        pair.open().close()
        before = descriptors()
        for _ in range(2):
            with pair.open() as nic:
                add(nic, 0, MAC1)
        assert descriptors() == before


# ---- steering


def test_frames_go_by_mac(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        first, second = add(nic, 0, MAC1), add(nic, 1, MAC2)
        with PacketSocket(pair.host, NIC) as kernel:
            pair.send(MAC1)
            pair.send(MAC2, 29)
            pair.send(STRANGER, 31, source="02:00:00:00:00:31")
            to_first, to_second = collect(first, COUNT), collect(second, 29)
            kernel.wait_received("02:00:00:00:00:31", 31)
            passed = kernel.collect()
        expected = [udp_frame(MAC1, "02:00:00:00:00:77", number=number) for number in range(COUNT)]
        assert sorted(to_first) == sorted(expected), "every byte arrives"
        assert {frame[:6] for frame in to_second} == {mac_bytes(MAC2)}
        assert {frame[:6] for frame in passed} == {mac_bytes(STRANGER)}, "the kernel sees only its own"
        assert verdicts(nic, 0) == {"redirect": COUNT}
        assert verdicts(nic, 1) == {"redirect": 29}
        assert verdicts(nic, None) == {"pass_unicast": 31}
        statistics = nic.xsk_statistics()
        assert set(statistics) == {(slot, queue) for slot in (None, 0, 1) for queue in range(QUEUES)}
        assert all(tuple(counters) == STATISTICS for counters in statistics.values())
        assert not any(count for counters in statistics.values() for count in counters.values())


def test_a_guest_can_come_and_go(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        with PacketSocket(pair.host, NIC) as kernel:
            xsks: list[FakeXsk] = nic.add_guest(0, "vm1", [(0, mac_bytes(MAC1))])  # type: ignore[assignment]
            pair.send(MAC1, source="02:00:00:00:00:01")
            assert len(kernel.wait_received("02:00:00:00:00:01", COUNT)) == COUNT, "not steered yet"
            nic.steer(0)
            nic.steer(0)
            pair.send(MAC1, source="02:00:00:00:00:02")
            collect(xsks, COUNT)
            nic.unsteer(0)
            pair.send(MAC1, source="02:00:00:00:00:03")
            assert len(kernel.wait_received("02:00:00:00:00:03", COUNT)) == COUNT, "not steered any more"
            nic.remove_guest(0)
            nic.remove_guest(0)
            assert not kernel.received_from("02:00:00:00:00:02")
        again = add(nic, 0, MAC2)
        assert verdicts(nic, 0) == {}, "the slot's new owner counts from zero"
        pair.send(MAC2)
        collect(again, COUNT)
        assert verdicts(nic, 0) == {"redirect": COUNT}


def test_a_full_ring_is_its_owners_alone(pair: Pair) -> None:
    """One guest isn't read: the other still gets everything, and the kernel says who lost what."""
    with pair.host.entered(), pair.open() as nic:
        stopped, running = add(nic, 0, MAC1), add(nic, 1, MAC2)
        sent = 5 * 1031
        with PacketSocket(pair.network, PEER) as sender:
            for number in range(sent):
                sender.send([udp_frame(MAC1, "02:00:00:00:00:77", number=number)])
        wait_for(lambda: verdicts(nic, 0).get("redirect") == sent, 5, "all frames at the program")
        lost = sum(nic.xsk_statistics()[0, queue]["rx_ring_full"] for queue in range(QUEUES))
        assert sent - lost == len(collect(stopped, sent - lost))
        assert lost > 0
        pair.send(MAC2)
        assert len(collect(running, COUNT)) == COUNT
        assert not any(nic.xsk_statistics()[1, queue]["rx_ring_full"] for queue in range(QUEUES))


def test_base_sockets_send(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        with PacketSocket(pair.network, PEER) as wire:
            for queue, nicq in enumerate(cast(list[FakeNicq], nic.queues)):
                for number in range(COUNT):
                    nicq.send(udp_frame(STRANGER, f"02:00:00:00:01:{queue:02x}", number=number))
            for queue in range(QUEUES):
                assert len(wire.wait_received(f"02:00:00:00:01:{queue:02x}", COUNT)) == COUNT


def test_packet_socket_hears_groups_that_arrive(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        view = socket.socket(fileno=os.dup(cast(FakePacketPort, nic.mcast).fd))
        groups = ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:fb", "33:33:00:00:00:01")
        with view, PacketSocket(pair.host, NIC) as local, PacketSocket(pair.host, NIC) as kernel:
            for group in (*groups, STRANGER, pair.host.mac(NIC)):
                pair.send(group, 1)
            local.send([udp_frame("ff:ff:ff:ff:ff:ff", "02:00:00:00:00:55")])  # ours, outgoing
            pair.send(STRANGER, 1, source="02:00:00:00:00:44")
            kernel.wait_received("02:00:00:00:00:44", 1)
            heard = []
            while True:
                try:
                    heard.append(view.recvmsg(2048, 256))
                except BlockingIOError:
                    break
        assert [data[10:16] for data, *_ in heard] == [mac_bytes(group) for group in groups], "behind a vnet header"
        assert all(level == 263 and kind == 8 for _, ancillary, *_ in heard for level, kind, _ in ancillary)
        assert verdicts(nic, None)["pass_multicast"] == len(groups)


def test_addresses_are_in_the_nics_filter(pair: Pair) -> None:
    def listed() -> set[str]:
        return {line.split()[0] for line in pair.host.run("bridge", "fdb", "show", "dev", NIC).stdout.splitlines()}

    pair.host.run("bridge", "fdb", "add", MAC2, "dev", NIC, "self")  # the administrator's own
    before = listed()
    with pair.host.entered(), pair.open() as nic:
        add(nic, 0, MAC1)
        add(nic, 1, MAC2)
        assert {MAC1, MAC2} <= listed()
        assert not nic.promiscuous
        nic.unsteer(0)
        nic.unsteer(1)
        assert MAC1 not in listed()
    assert listed() == before
    assert MAC2 in before


def test_promiscuous_only_when_an_address_is_refused() -> None:
    class Picky(socket.socket):
        def __init__(self) -> None:
            super().__init__(socket.AF_INET, socket.SOCK_DGRAM)
            self.calls: list[tuple[int, int]] = []

        def setsockopt(self, level: int, option: int, value: object) -> None:  # type: ignore[override]
            assert isinstance(value, bytes)
            kind, address = struct.unpack("=4xH2x8s", value)
            if kind == 3 and address[0] == 0x66:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.calls.append((option, kind))

    fine, refused = (bytes([first, 0, 0, 0, 0, 1]) for first in (0x52, 0x66))
    with Picky() as sock:
        addresses = AddressFilter(sock, 1)
        seen = []
        for change, mac in (
            (addresses.add, fine),
            (addresses.add, refused),
            (addresses.remove, fine),
            (addresses.remove, refused),
        ):
            change(mac)
            seen.append(addresses.promiscuous)
        assert seen == [False, True, True, False]
        assert sock.calls == [(1, 3), (1, 1), (2, 3), (2, 1)]


def test_promiscuous_where_vlans_are_filtered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """For good, as igb does; while there are guests in VLANs."""

    def promiscuous() -> bool:
        """A veth has no filter for addresses: that counts as one."""
        (link,) = pair.host.json("ip", "-d", "-j", "link", "show", "dev", NIC)
        return bool(link["promiscuity"] > 1)

    keep = NicPrep.keep_vlan_tags

    def filters(prep: NicPrep) -> bool:
        beside = keep(prep)
        prep.filters_vlans = True
        return beside

    monkeypatch.setattr(NicPrep, "keep_vlan_tags", filters)
    with pair.host.entered(), pair.open() as nic:
        add(nic, 0, MAC1)
        assert not promiscuous()
        add(nic, 1, MAC2, 100)
        add(nic, 2, STRANGER, 100, 200)
        assert promiscuous()
        assert nic.promiscuous
        nic.unsteer(1)
        assert promiscuous()
        nic.set_keys(2, [(0, mac_bytes(STRANGER))])
        assert not promiscuous()
        nic.set_keys(2, [(300, mac_bytes(STRANGER))])
        assert promiscuous()
        nic.remove_guest(2)
        assert not promiscuous()


# ---- a killed daemon


def killed(pair: Pair) -> None:
    """A process opens the NIC and is killed."""
    argv = [sys.executable, "-c", SECOND_PROGRAM, NIC, str(pair.journal.path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        pair.host.argv(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        other.send_signal(signal.SIGKILL)


def test_leftovers_of_a_killed_daemon(pair: Pair) -> None:
    pair.host.ip("link", "set", NIC, "down")
    before = pair.snapshot()
    killed(pair)
    assert pair.snapshot() != before
    with pair.host.entered():
        with pytest.raises(NicError, match=r"another xdpvhost is on it.*xdpvhost clean"):
            pair.open()
        undone = pair.journal.replay_undo()
        assert {item.kind for item in undone} == {"xdp", "features", "link_up"}
        assert all(item.ok for item in undone)
        wait_for(lambda: pair.snapshot() == before, 5, "the NIC as it was")
        assert not pair.journal.path.exists()
        with pair.open() as nic:
            xsks = add(nic, 0, MAC1)
            pair.send(MAC1)
            collect(xsks, COUNT)
    assert pair.snapshot() == before


def test_leftovers_can_go_with_the_interface(pair: Pair) -> None:
    killed(pair)
    pair.host.ip("link", "del", NIC)
    with pair.host.entered():
        assert all(item.ok for item in pair.journal.replay_undo())
    assert not pair.journal.path.exists()


def test_leftovers_in_another_namespace_stay(pair: Pair) -> None:
    killed(pair)
    with pair.network.entered():
        undone = pair.journal.replay_undo()
    assert not any(item.ok for item in undone)
    assert all("another network namespace" in item.detail for item in undone)
    assert pair.journal.pending()
    with pair.host.entered():
        assert all(item.ok for item in pair.journal.replay_undo())


def test_killed_before_the_program_was_attached(pair: Pair) -> None:
    """The journal announces it, and there is none."""
    with pair.host.entered():
        prepare(NIC, pair.journal).record("xdp", name="xdpvhost_steer")
        assert [item.ok for item in pair.journal.replay_undo()] == [True]


def test_leftovers_on_a_nic_that_another_serves_stay(pair: Pair) -> None:
    killed(pair)
    with pair.host.entered():
        lock = InterfaceLock(NIC)
        undone = pair.journal.replay_undo()
        assert not any(item.ok for item in undone)
        assert f"another xdpvhost (pid {os.getpid()}) has interface {NIC}" in undone[0].detail
        assert xdp_state(lock.index).mode == "native"
        assert all(item.ok for item in Journal(pair.journal.path, handlers(held=[lock.index])).replay_undo())
        assert not xdp_state(lock.index).programs
        lock.close()


def test_adopted_not_undone_and_done_again(pair: Pair) -> None:
    """The link of a NIC that a killed daemon set up stays up, and is down in the end."""
    pair.host.ip("link", "set", NIC, "down")
    before = pair.snapshot()
    killed(pair)
    with pair.host.entered():
        index = socket.if_nametoindex(NIC)
        journal = pair.journal
        adopted = adoptable(journal, index)
        assert "link_up" in {entry.kind for entry in adopted}
        assert {entry.kind for entry in adopted} <= ADOPTED
        assert all(item.ok for item in journal.replay_undo([e for e in journal.pending() if e not in adopted]))
        flags = pair.host.json("ip", "-j", "link", "show", NIC)[0]["flags"]
        assert "UP" in flags
        with Nic.open(NicOptions(NIC), cast(Any, pair.dp), journal):
            kinds = [entry.kind for entry in journal.pending()]
            assert len(set(kinds)) == len(kinds)
    assert pair.snapshot() == before
    assert not journal.path.exists()


def test_a_program_that_cannot_be_detached_stays_in_the_journal(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    before = pair.snapshot()

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "not now")

    with pair.host.entered():
        journal = pair.journal
        with monkeypatch.context() as patch:
            nic = Nic.open(NicOptions(NIC), cast(Any, pair.dp), journal)
            patch.setattr(program, "detach", busy)
            nic.close()
        assert [entry.kind for entry in journal.pending()] == ["xdp"]
        assert xdp_state(nic.ifindex).programs
        assert [item.ok for item in pair.journal.replay_undo()] == [True]
    assert pair.snapshot() == before


def test_side_effects_are_in_the_journal_before_they_happen(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def attach(*_: object, **__: object) -> None:
        seen.extend(pair.journal.path.read_text().splitlines())
        raise NicError("seen")

    monkeypatch.setattr(SteerProgram, "attach", attach)
    refused(pair, "seen")
    assert any('"kind":"features"' in line and '"rx-gro":' in line for line in seen)


def test_a_foreign_program_is_not_taken_off(pair: Pair) -> None:
    foreign = foreign_object(pair.world.directory)
    with pair.host.entered():
        prepare(NIC, pair.journal).record("xdp", name="xdpvhost_steer")
        pair.host.ip("link", "set", NIC, "xdp", "obj", str(foreign), "sec", "xdp")
        pair.journal.replay_undo()
        assert [found.name for found in attached(socket.if_nametoindex(NIC))] == ["stranger"]


# ---- errors


def foreign_object(directory: Path) -> Path:
    source = directory / "stranger.c"
    source.write_text(
        '__attribute__((section("xdp"), used)) int stranger(void *ctx) { return 2; }\n'
        'char _license[] __attribute__((section("license"), used)) = "GPL";\n'
    )
    run(["clang", "-target", "bpf", "-O2", "-g", "-c", str(source), "-o", str(directory / "stranger.o")])
    return directory / "stranger.o"


def refused(pair: Pair, message: str, kind: type[Exception] = NicError, **options: object) -> None:
    """`open` says so, and nothing has changed."""
    before = pair.snapshot()
    descriptors = os.listdir("/proc/self/fd")
    with pair.host.entered(), pytest.raises(kind, match=message):
        pair.open(**options)
    assert pair.snapshot() == before
    assert os.listdir("/proc/self/fd") == descriptors
    assert not pair.journal.path.exists()


@pytest.mark.parametrize("name", ["nosuch0", "", "a" * 16])
def test_no_such_interface(pair: Pair, name: str) -> None:
    with pair.host.entered(), pytest.raises(NicError, match=r"no interface|1 to 15 bytes"):
        Nic.open(NicOptions(name), cast(Any, pair.dp), pair.journal)


def test_another_xdp_program(pair: Pair) -> None:
    foreign = foreign_object(pair.world.directory)
    pair.host.ip("link", "set", NIC, "xdpgeneric", "obj", str(foreign), "sec", "xdp")
    refused(pair, r"XDP program stranger \(id \d+\) is attached in generic mode: detach it with")


def test_another_xdpvhost(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        assert xdp_state(nic.ifindex).mode == "native"
        with pytest.raises(NicError, match=r"another xdpvhost is on it \(XDP program xdpvhost_steer .*xdpvhost down"):
            Nic.open(NicOptions(NIC), cast(Any, FakeDatapath()), Journal(pair.world.directory / "other.jsonl"))


def test_mtu_that_needs_several_pieces(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for namespace, device in ((pair.host, NIC), (pair.network, PEER)):
        namespace.ip("link", "set", device, "mtu", "9000")
    with pair.host.entered(), pair.open() as nic:
        assert (nic.facts.several_pieces, nic.facts.chunk, nic.facts.xdp_in_use) == (True, 4096, "native")
    refused(pair, r"queue 0: its driver has no zero-copy|no zero-copy AF_XDP for those.*mtu 3814", bind="zerocopy")
    monkeypatch.setattr(xsk, "XDP_USE_SG", 1 << 14)  # as a kernel before 6.6 takes it: an unknown flag
    refused(pair, r"its MTU of 9000 is too large.*kernel has no AF_XDP for those.*ip link set nic0 mtu 3814")


def test_mtu_of_a_larger_frame(pair: Pair) -> None:
    for namespace, device in ((pair.host, NIC), (pair.network, PEER)):
        namespace.ip("link", "set", device, "mtu", "3498")
    with pair.host.entered(), pair.open() as nic:
        assert nic.facts.chunk == 4096
        xsks = add(nic, 0, MAC1)
        pair.send(MAC1, size=3498 + 14)
        assert {len(frame) for frame in collect(xsks, COUNT)} == {3498 + 14}


def test_peers_mtu_is_larger(pair: Pair) -> None:
    pair.network.ip("link", "set", PEER, "mtu", "9000")
    with pair.host.entered(), pair.open() as nic:
        assert (nic.facts.xdp_in_use, nic.facts.several_pieces, nic.facts.warnings) == ("native", False, ())
        xsks = add(nic, 0, MAC1)
        pair.send(MAC1)
        assert len(collect(xsks, COUNT)) == COUNT


def test_fewer_receive_queues_than_the_peer_sends_on(pair: Pair) -> None:
    pair.host.run("ethtool", "-L", NIC, "rx", "2")
    refused(pair, r"native mode: .*queues.*ethtool -L PEER tx 1", xdp_mode="native")


def test_more_receive_queues_than_it_sends_on(pair: Pair) -> None:
    pair.host.run("ethtool", "-L", NIC, "tx", "2")
    refused(pair, r"receives on 4 queues and sends on 2 only.*ethtool -L nic0 rx 2")


@pytest.mark.parametrize("queues", [0, QUEUES + 1])
def test_queues_that_it_cannot_have(pair: Pair, queues: int) -> None:
    refused(pair, rf"{queues} queues asked for, and it can have 1 to {QUEUES}", queues=queues)


def test_no_zero_copy(pair: Pair) -> None:
    refused(pair, r"no zero-copy AF_XDP here: use --bind auto or --bind copy", bind="zerocopy")


def test_a_queue_that_is_taken(pair: Pair) -> None:
    other = Pair(pair.world, pair.host, pair.network)
    with pair.host.entered(), pair.open() as nic:
        run(pair.host.argv(["ip", "link", "set", NIC, "xdp", "off"]))
        with pytest.raises(NicError, match=r"queue 0: another AF_XDP socket has it"):
            Nic.open(NicOptions(NIC), cast(Any, other.dp), Journal(pair.world.directory / "other.jsonl"))
        assert nic.nr_queues == QUEUES


def test_missing_capabilities(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "effective", lambda: frozenset({"CAP_NET_ADMIN", "CAP_SYS_ADMIN"}))
    refused(pair, "lacks CAP_NET_RAW; run it as root", PrivilegeError)
    monkeypatch.setattr(privileges, "effective", lambda: frozenset({"CAP_NET_RAW"}))
    refused(pair, "lacks CAP_NET_ADMIN, CAP_BPF or CAP_SYS_ADMIN", PrivilegeError)


def test_slots(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        nic.add_guest(0, "vm1", [(0, mac_bytes(MAC1))])
        for slot in (0, -1, MAX_SLOTS):
            with pytest.raises(NicError, match=f"slot {slot}"):
                nic.add_guest(slot, "vm2", [(0, mac_bytes(MAC2))])
        last = MAX_SLOTS - 1
        xsks = add(nic, last, MAC2)
        pair.send(MAC2)
        collect(xsks, COUNT)
        assert verdicts(nic, last) == {"redirect": COUNT}


def test_a_guest_that_fails_half_way_leaves_nothing(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        before = len(pair.dp.made)
        pair.dp.fail_at = before + QUEUES
        with pytest.raises(RuntimeError, match="asked to fail"):
            nic.add_guest(0, "vm1", [(0, mac_bytes(MAC1))])
        assert all(thing.closed for thing in pair.dp.made[before:])
        pair.dp.fail_at = None
        pair.send(MAC1, 1)
        xsks = add(nic, 0, MAC1)
        pair.send(MAC1)
        collect(xsks, COUNT)


def test_the_nics_own_address(pair: Pair) -> None:
    own = pair.host.mac(NIC)
    with (
        pair.host.entered(),
        pair.open() as nic,
        pytest.raises(NicError, match=rf"{own} is the address of nic0 itself"),
    ):
        nic.add_guest(0, "vm1", [(0, mac_bytes(own))])


def test_two_guests_with_one_address(pair: Pair) -> None:
    with pair.host.entered(), pair.open() as nic:
        xsks = add(nic, 0, MAC1)
        nic.add_guest(1, "vm2", [(5, mac_bytes(MAC2)), (0, mac_bytes(MAC1))])
        with pytest.raises(NicError, match=r"vm2.*52:54:00:00:00:01 is another guest"):
            nic.steer(1)
        pair.send(MAC1)
        collect(xsks, COUNT)
        assert verdicts(nic, 1) == {}


def test_many_guests(pair: Pair) -> None:
    """256 sockets, and closing them doesn't take 256 grace periods."""
    with pair.host.entered(), pair.open() as nic:
        guests = [add(nic, slot, f"52:54:00:00:01:{slot:02x}") for slot in range(64)]
        for slot in (0, 31, 63):
            pair.send(f"52:54:00:00:01:{slot:02x}")
            assert len(collect(guests[slot], COUNT)) == COUNT
        start = time.monotonic()
        nic.close()
        assert time.monotonic() - start < 2


def test_interface_that_disappears(pair: Pair) -> None:
    """Closing is quiet about it, and the journal is empty."""
    with pair.host.entered():
        nic = pair.open()
        add(nic, 0, MAC1)
        pair.host.ip("link", "del", NIC)
        nic.close()
    assert not pair.journal.path.exists()
    assert all(thing.closed for thing in pair.dp.made)


# ---- features


def test_features(pair: Pair) -> None:
    before = pair.snapshot()
    with pair.host.entered():
        found = {feature.name: feature for feature in probe(NIC)}
        assert all(feature.supported for feature in found.values() if feature.required)
        assert found["native-xdp"].supported
        assert found["zero-copy"].supported is False
        assert found["queues"].detail == "4 receive, 4 transmit"
        assert found["vlan-tags"].supported
        assert "or beside it" in found["vlan-tags"].detail
        assert pair.snapshot() == before
        with pair.open():
            occupied = next(feature for feature in probe(NIC) if feature.name == "xdp-free")
            assert not occupied.supported
            assert "xdpvhost is on it" in occupied.detail
        with pytest.raises(NicError, match="no interface"):
            probe("nosuch0")


def test_missing_object(world: World) -> None:
    with pytest.raises(OSError, match=r"cannot open the BPF object .*none\.o.*make -C bpf"):
        BpfObject(world.directory / "none.o")
