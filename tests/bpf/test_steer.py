# SPDX-License-Identifier: Apache-2.0
"""The XDP program as tables: a frame at a receive queue, the verdict, and who counted it."""

import itertools
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from support.netns import World
from xdpvhost.xdp import maps
from xdpvhost.xdp.libbpf import BpfObject, XdpMd, run_once
from xdpvhost.xdp.maps import VLAN_ANY, SteerMaps
from xdpvhost.xdp.program import OBJECT, PROGRAM, TAGS_OBJECT, SteerProgram
from xdpvhost.xdp.xsk import AF_XDP, SOL_XDP

HEADER = Path(__file__).parents[2] / "bpf" / "steer.h"
XDP_DROP, XDP_PASS, XDP_REDIRECT = 1, 2, 4
XDP_RX_RING = 2
QUEUES = 4

UNTAGGED = bytes.fromhex("525400000001")  # guest 0, untagged only
IN_VLAN = bytes.fromhex("525400000002")  # guest 1, VLAN 100 only
DEFAULT = bytes.fromhex("525400000003")  # guest 2, untagged and any tag
SPLIT = bytes.fromhex("525400000004")  # guest 0 in VLAN 100, guest 2 in every other
DEAF = bytes.fromhex("525400000005")  # guest 3: its sockets are gone
TWIN = bytes.fromhex("525400000006")  # guest 0 in VLAN 10, guest 1 in VLAN 20, nobody's without a tag
TRUNK = bytes.fromhex("525400000007")  # guest 2 in VLANs 1, 10 and 4094
STRANGER = bytes.fromhex("5254000000ff")
SOURCE = bytes.fromhex("020000000099")
BROADCAST = b"\xff" * 6
MULTICAST4 = bytes.fromhex("01005e0000fb")
MULTICAST6 = bytes.fromhex("333300000001")

MACS = (
    (0, UNTAGGED, 0),
    (100, IN_VLAN, 1),
    (0, DEFAULT, 2),
    (VLAN_ANY, DEFAULT, 2),
    (100, SPLIT, 0),
    (VLAN_ANY, SPLIT, 2),
    (0, DEAF, 3),
    (10, TWIN, 0),
    (20, TWIN, 1),
    (1, TRUNK, 2),
    (10, TRUNK, 2),
    (4094, TRUNK, 2),
)
LISTENING = (0, 1, 2)  # on queues 0 to 2: nobody has a socket at queue 3


def frame(destination: bytes, *tags: tuple[int, int], size: int = 60) -> bytes:
    """`tags` are (protocol, tag control information)."""
    head = destination + SOURCE
    for protocol, tci in tags:
        head += struct.pack("!HH", protocol, tci)
    return (head + b"\x08\x00").ljust(size, b"\xaa")[:size]


@dataclass(frozen=True)
class Case:
    name: str
    frame: bytes
    action: int
    slot: int | None
    verdict: str
    queue: int = 0


Q, AD = 0x8100, 0x88A8
CASES = (
    Case("known MAC", frame(UNTAGGED), XDP_REDIRECT, 0, "redirect"),
    Case("known MAC at another queue", frame(UNTAGGED), XDP_REDIRECT, 0, "redirect", queue=2),
    Case("a header and nothing else", frame(UNTAGGED, size=14), XDP_REDIRECT, 0, "redirect"),
    Case("known MAC at a queue without its socket", frame(UNTAGGED), XDP_DROP, 0, "no_socket", queue=3),
    Case("known MAC of a guest without sockets", frame(DEAF), XDP_DROP, 3, "no_socket"),
    Case("unknown unicast", frame(STRANGER), XDP_PASS, None, "pass_unicast"),
    Case("unknown unicast at another queue", frame(STRANGER), XDP_PASS, None, "pass_unicast", queue=3),
    Case("broadcast", frame(BROADCAST), XDP_PASS, None, "pass_multicast"),
    Case("broadcast in a VLAN", frame(BROADCAST, (Q, 100)), XDP_PASS, None, "pass_multicast", queue=1),
    Case("IPv4 multicast", frame(MULTICAST4), XDP_PASS, None, "pass_multicast"),
    Case("IPv6 multicast", frame(MULTICAST6), XDP_PASS, None, "pass_multicast"),
    Case("group bit on a known address", frame(bytes([0x53]) + UNTAGGED[1:]), XDP_PASS, None, "pass_multicast"),
    Case("802.1Q, its VLAN", frame(IN_VLAN, (Q, 100)), XDP_REDIRECT, 1, "redirect"),
    Case("802.1Q, its VLAN with a priority", frame(IN_VLAN, (Q, 0xE000 | 100)), XDP_REDIRECT, 1, "redirect"),
    Case("802.1Q, its VLAN, drop eligible", frame(IN_VLAN, (Q, 0x1000 | 100)), XDP_REDIRECT, 1, "redirect"),
    Case("802.1Q, another VLAN", frame(IN_VLAN, (Q, 101)), XDP_PASS, None, "pass_unicast"),
    Case("untagged for a guest in a VLAN", frame(IN_VLAN), XDP_PASS, None, "pass_unicast"),
    Case("802.1Q for an untagged guest", frame(UNTAGGED, (Q, 100)), XDP_PASS, None, "pass_unicast"),
    Case("priority tag for an untagged guest", frame(UNTAGGED, (Q, 5 << 13)), XDP_REDIRECT, 0, "redirect"),
    Case("priority tag for a guest in a VLAN", frame(IN_VLAN, (Q, 5 << 13)), XDP_PASS, None, "pass_unicast"),
    Case("untagged for a default guest", frame(DEFAULT), XDP_REDIRECT, 2, "redirect"),
    Case("any tag for a default guest", frame(DEFAULT, (Q, 4094)), XDP_REDIRECT, 2, "redirect"),
    Case("own VLAN goes before any", frame(SPLIT, (Q, 100)), XDP_REDIRECT, 0, "redirect"),
    Case("any other VLAN", frame(SPLIT, (Q, 101)), XDP_REDIRECT, 2, "redirect"),
    Case("802.1ad for a default guest", frame(DEFAULT, (AD, 7), (Q, 100)), XDP_REDIRECT, 2, "redirect"),
    Case("802.1ad is no 802.1Q VLAN", frame(IN_VLAN, (AD, 100)), XDP_PASS, None, "pass_unicast"),
    Case("802.1ad with the number of a VLAN", frame(SPLIT, (AD, 100)), XDP_REDIRECT, 2, "redirect"),
    Case("802.1ad for an untagged guest", frame(UNTAGGED, (AD, 0)), XDP_PASS, None, "pass_unicast"),
    Case("two 802.1Q tags: the outer one counts", frame(IN_VLAN, (Q, 100), (Q, 5)), XDP_REDIRECT, 1, "redirect"),
    Case("two guests with one MAC: the first one's VLAN", frame(TWIN, (Q, 10)), XDP_REDIRECT, 0, "redirect"),
    Case("two guests with one MAC: the second one's", frame(TWIN, (Q, 20)), XDP_REDIRECT, 1, "redirect"),
    Case("two guests with one MAC: neither's VLAN", frame(TWIN, (Q, 30)), XDP_PASS, None, "pass_unicast"),
    Case("two guests with one MAC: untagged", frame(TWIN), XDP_PASS, None, "pass_unicast"),
    Case("two guests with one MAC: a priority", frame(TWIN, (Q, 7 << 13)), XDP_PASS, None, "pass_unicast"),
    Case("two guests with one MAC: 802.1ad", frame(TWIN, (AD, 10)), XDP_PASS, None, "pass_unicast"),
    Case("two guests with one MAC: the inner tag", frame(TWIN, (Q, 30), (Q, 10)), XDP_PASS, None, "pass_unicast"),
    Case("two guests with one MAC: behind 802.1ad", frame(TWIN, (AD, 30), (Q, 10)), XDP_PASS, None, "pass_unicast"),
    Case("a trunk's first VLAN", frame(TRUNK, (Q, 1)), XDP_REDIRECT, 2, "redirect"),
    Case("a trunk's last VLAN", frame(TRUNK, (Q, 0xF000 | 4094)), XDP_REDIRECT, 2, "redirect"),
    Case("a VLAN that a trunk has not", frame(TRUNK, (Q, 2)), XDP_PASS, None, "pass_unicast"),
    Case("untagged for a trunk", frame(TRUNK), XDP_PASS, None, "pass_unicast"),
    Case("a priority before a VLAN: no VLAN", frame(DEFAULT, (Q, 7 << 13), (Q, 10)), XDP_REDIRECT, 2, "redirect"),
    Case("VLAN 4095, which is reserved, is no key", frame(DEFAULT, (Q, 0xFFFF)), XDP_REDIRECT, 2, "redirect"),
    Case("VLAN 4095 is not any tag", frame(TWIN, (Q, 0xFFFF)), XDP_PASS, None, "pass_unicast"),
    Case("tag cut off", frame(UNTAGGED, (Q, 0), size=14), XDP_PASS, None, "short"),
    Case("half a tag", frame(IN_VLAN, (Q, 100), size=17), XDP_PASS, None, "short"),
    Case("a tag and nothing else", frame(IN_VLAN, (Q, 100), size=18), XDP_REDIRECT, 1, "redirect"),
)


@dataclass
class Bench:
    """The program loaded with three guests' sockets, and a veth with running receive queues to pretend to come from."""

    fd: int
    maps: SteerMaps
    ifindex: int

    def run(self, data: bytes, queue: int = 0) -> int:
        context = XdpMd(data_end=len(data), ingress_ifindex=self.ifindex, rx_queue_index=queue)
        action, after = run_once(self.fd, data, context)
        assert after == data, "the program changes no frame"
        return action

    def counted(self) -> dict[tuple[int | None, int, str], int]:
        return {key: count for key, count in self.maps.verdicts(range(4)).items() if count}


def receiving_socket() -> socket.socket:
    """An AF_XDP socket with a receive ring, bound to nothing: enough for an XSKMAP."""
    sock = socket.socket(AF_XDP, socket.SOCK_RAW, 0)
    sock.setsockopt(SOL_XDP, XDP_RX_RING, struct.pack("=I", 64))
    return sock


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with World() as world:
        a, b = world.namespace("a"), world.namespace("b")
        world.veth(a, "nic0", b, "net0", queues=QUEUES)
        with a.entered():
            ifindex = socket.if_nametoindex("nic0")
            attached = SteerProgram.attach(ifindex, "nic0", "native", QUEUES)
            world.stack.callback(attached.close)
            obj = world.stack.enter_context(BpfObject(OBJECT))
            maps.size_maps(obj, QUEUES)
            obj.load()
            steering = SteerMaps(obj, QUEUES)
            world.stack.callback(steering.close)
            for vlan, mac, slot in MACS:
                steering.set_mac(vlan, mac, slot)
            for slot in LISTENING:
                for queue in range(QUEUES - 1):
                    sock = world.stack.enter_context(receiving_socket())
                    steering.set_socket(slot, queue, sock.fileno())
            yield Bench(obj.program_fd(PROGRAM), steering, ifindex)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(bench: Bench, case: Case) -> None:
    before = bench.counted()
    assert bench.run(case.frame, case.queue) == case.action
    after = bench.counted()
    changed = {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key, 0)}
    assert changed == {(case.slot, case.queue, case.verdict): 1}


def test_every_cpu_counts(bench: Bench) -> None:
    cpus = os.sched_getaffinity(0)
    key = (0, 1, "redirect")
    before = bench.counted().get(key, 0)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            for _ in range(23):
                bench.run(frame(UNTAGGED), queue=1)
    finally:
        os.sched_setaffinity(0, cpus)
    assert bench.counted()[key] == before + 23 * len(cpus)


def test_a_new_owner_of_a_slot_counts_from_zero(bench: Bench) -> None:
    bench.run(frame(DEAF))
    others = {key: count for key, count in bench.counted().items() if key[0] != 3}
    bench.maps.zero(3)
    assert bench.counted() == others


def test_a_mac_that_is_taken_out_passes(bench: Bench) -> None:
    assert bench.maps.clear_mac(0, DEFAULT)
    assert not bench.maps.clear_mac(0, DEFAULT)
    try:
        assert bench.run(frame(DEFAULT)) == XDP_PASS
    finally:
        bench.maps.set_mac(0, DEFAULT, 2)
    assert bench.maps.macs() == {(vlan, mac): slot for vlan, mac, slot in MACS}


def test_a_closed_socket_leaves_the_map(bench: Bench) -> None:
    with receiving_socket() as sock:
        bench.maps.set_socket(3, 0, sock.fileno())
        assert bench.run(frame(DEAF)) == XDP_REDIRECT
        bench.maps.clear_socket(3, 0)
        assert bench.run(frame(DEAF)) == XDP_DROP
        bench.maps.set_socket(3, 0, sock.fileno())
    assert bench.run(frame(DEAF)) == XDP_DROP


def test_a_queue_that_control_does_not_know(bench: Bench) -> None:
    """It must not reach the next slot's socket or counters."""
    with BpfObject(OBJECT) as obj, receiving_socket() as sock:
        maps.size_maps(obj, 2)
        obj.load()
        steering = SteerMaps(obj, 2)
        steering.set_mac(0, UNTAGGED, 0)
        steering.set_socket(1, 0, sock.fileno())  # at index 2, as (slot 0, queue 2) would be
        few = Bench(obj.program_fd(PROGRAM), steering, bench.ifindex)
        assert few.run(frame(UNTAGGED), queue=2) == XDP_DROP
        assert few.run(frame(STRANGER), queue=3) == XDP_PASS
        assert few.counted() == {(0, 0, "no_socket"): 1, (None, 0, "pass_unicast"): 1}
        steering.close()


def test_unconfigured_passes_everything(bench: Bench) -> None:
    with BpfObject(OBJECT) as obj:
        obj.load()
        steering = SteerMaps(obj, 1)
        steering.set_mac(0, UNTAGGED, 0)
        idle = Bench(obj.program_fd(PROGRAM), steering, bench.ifindex)
        assert idle.run(frame(UNTAGGED)) == XDP_PASS
        assert not idle.counted()
        steering.close()


def colliding(count: int) -> list[bytes]:
    """Addresses whose search begins at the same entry of the table."""
    found: list[bytes] = []
    wanted = None
    for number in itertools.count():
        mac = b"\x52" + number.to_bytes(5, "big")
        at = maps.hash_of(int.from_bytes(maps.MAC.pack(0, mac), sys.byteorder))
        wanted = at if wanted is None else wanted
        if at == wanted:
            found.append(mac)
            if len(found) == count:
                return found
    raise AssertionError


def test_addresses_that_collide(bench: Bench) -> None:
    """As many as the program looks at are found, one more is refused, and taking some out hides none."""
    macs = colliding(maps.PROBES + 1)
    for mac in macs[:-1]:
        bench.maps.set_mac(0, mac, 0)
    with pytest.raises(OSError, match="full"):
        bench.maps.set_mac(0, macs[-1], 0)
    assert all(bench.run(frame(mac)) == XDP_REDIRECT for mac in macs[:-1])
    gone, left = macs[:-1:2], macs[1:-1:2]
    assert all(bench.maps.clear_mac(0, mac) for mac in gone)
    assert all(bench.run(frame(mac)) == XDP_PASS for mac in gone)
    assert all(bench.run(frame(mac)) == XDP_REDIRECT for mac in left)
    bench.maps.set_mac(0, macs[-1], 2)
    assert bench.maps.owner(0, macs[-1]) == 2
    assert bench.run(frame(macs[-1])) == XDP_REDIRECT
    for mac in (*left, macs[-1]):
        assert bench.maps.clear_mac(0, mac)
    assert bench.maps.macs() == {(vlan, mac): slot for vlan, mac, slot in MACS}


def test_the_table_holds_all_addresses_there_can_be(bench: Bench) -> None:
    random = Random(7)
    macs = {b"\x52" + random.randbytes(5): n % 512 for n in range(maps.MAX_MACS - len(MACS))}
    for mac, slot in macs.items():
        bench.maps.set_mac(0, mac, slot)
    assert all(bench.maps.owner(0, mac) == slot for mac, slot in macs.items())
    assert len(bench.maps.macs()) == maps.MAX_MACS
    for mac in macs:
        assert bench.maps.clear_mac(0, mac)
    assert bench.maps.macs() == {(vlan, mac): slot for vlan, mac, slot in MACS}


def test_an_address_changes_hands_under_traffic(bench: Bench) -> None:
    """What is for one guest never reaches another, while others come and go in the same entries."""
    first, second = colliding(2)
    before = bench.counted()
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            bench.maps.set_mac(0, first, 0)
            bench.maps.clear_mac(0, first)
            bench.maps.set_mac(0, second, 1)
            bench.maps.clear_mac(0, second)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20000):
            bench.run(frame(first))
    finally:
        stop.set()
        thread.join()
    after = bench.counted()
    changed = {key for key, count in after.items() if count != before.get(key, 0)}
    assert changed <= {(0, 0, "redirect"), (None, 0, "pass_unicast")}


def test_a_program_that_asks_the_driver_is_bound_to_its_device(bench: Bench) -> None:
    """And can be tried on frames there alone: tests/veth/test_tags.py."""
    with BpfObject(TAGS_OBJECT) as obj, pytest.raises(OSError, match="cannot load"):
        obj.load()
    with BpfObject(TAGS_OBJECT) as obj:
        obj.bind_to_device(PROGRAM, bench.ifindex)
        obj.load()
        with pytest.raises(OSError, match="Invalid argument"):
            run_once(obj.program_fd(PROGRAM), frame(UNTAGGED))


def test_mirror() -> None:
    """ctl/xdp/maps.py says the same as bpf/steer.h."""
    text = HEADER.read_text()
    enum = re.search(r"enum steer_verdict \{(.*?)\}", text, re.S)
    assert enum is not None
    names = re.findall(r"^\s*STEER_(\w+)", enum.group(1), re.M)
    assert tuple(name.lower() for name in names) == (*maps.VERDICTS, "nr_verdicts")
    defines = {name: int(value, 0) for name, value in re.findall(r"#define STEER_(\w+) (0x[0-9a-f]+|\d+)\b", text)}
    assert defines["VLAN_NONE"] == maps.VLAN_NONE
    assert defines["VLAN_ANY"] == maps.VLAN_ANY
    assert defines["MAX_SLOTS"] == maps.MAX_SLOTS
    assert defines["MAX_QUEUES"] == maps.MAX_QUEUES
    assert 1 << defines["BITS"] == maps.ENTRIES
    assert defines["PROBES"] == maps.PROBES
    assert defines["EMPTY"] == maps.EMPTY
    assert maps.MAC.unpack(maps.GONE.to_bytes(8, sys.byteorder))[1][0] == defines["GONE_MAC"]
    for path in (OBJECT, TAGS_OBJECT):
        check_maps(path)


def check_maps(path: Path) -> None:
    with BpfObject(path) as obj:
        sizes = {name: obj.map(name).value_size for name in (".bss", ".rodata", "verdicts")}
        assert sizes == {
            ".bss": maps.ENTRIES * maps.ENTRY.size,
            ".rodata": maps.CONFIG.size,
            "verdicts": maps.COUNTS.size,
        }
        maps.size_maps(obj, 3)
        assert obj.map("xsks").max_entries == maps.xsk_index(3, maps.MAX_SLOTS - 1, 2) + 1
        assert obj.map("verdicts").max_entries == maps.row(3, maps.MAX_SLOTS - 1, 2) + 1
