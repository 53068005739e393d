# SPDX-License-Identifier: Apache-2.0
"""VLAN tags arrive whether they are in the frame or beside it. The data plane is a stand-in.

A veth hands over the tags that its other end left to "the device" beside the frames, as a NIC does that strips them.
"""

import os
import socket
import struct
from dataclasses import dataclass
from typing import Any, cast

import pytest

from support.fake_datapath import FakeDatapath, FakeXsk
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.frontend import F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_MRG_RXBUF, F_PROTOCOL, F_VERSION_1, NetDevice
from support.lab import Lab, guest_ip, guest_mac, spec
from support.netns import Namespace, World
from support.process import wait_for
from support.wire import AD, SO_MARK, Q, Wire, tagged
from xdpvhost.links.journal import Journal
from xdpvhost.links.nicprep import SOL_PACKET
from xdpvhost.xdp import nic as nic_module
from xdpvhost.xdp import program
from xdpvhost.xdp.maps import VLAN_ANY
from xdpvhost.xdp.nic import Nic, NicOptions
from xdpvhost.xdp.packet import PACKET_AUXDATA

NIC, PEER = "nic0", "net0"
QUEUES = 4
MAC, OTHER, SOURCE = "52:54:00:00:00:01", "52:54:00:00:00:02", "02:00:00:00:00:77"
COUNT = 23
RED, BLUE = 100, 200
TP_STATUS_VLAN_VALID = 1 << 4
UDP_SEGMENT = 103
NEEDS_CSUM, UDP_L4 = 1, 5
F_GUEST_USO4, F_GUEST_USO6 = 1 << 54, 1 << 55
FEATURES = F_VERSION_1 | F_PROTOCOL | F_MRG_RXBUF


@dataclass
class Bench:
    world: World
    host: Namespace
    network: Namespace
    wire: Wire

    def open(self, **options: object) -> Nic:
        journal = Journal(self.world.directory / "journal.jsonl")
        return Nic.open(NicOptions(NIC, **options), cast(Any, FakeDatapath()), journal)  # type: ignore[arg-type]


@pytest.fixture
def bench(world: World) -> Bench:
    host, network = world.namespace("host"), world.namespace("net")
    for namespace in (host, network):  # nothing but the tests' own frames
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1", "net.ipv6.conf.all.disable_ipv6=1")
    world.veth(host, NIC, network, PEER, queues=QUEUES)
    return Bench(world, host, network, Wire(world, network, PEER))


def add(nic: Nic, slot: int, *keys: tuple[int, str]) -> list[FakeXsk]:
    xsks = nic.add_guest(slot, f"vm{slot}", [(vlan, mac_bytes(mac)) for vlan, mac in keys])
    nic.steer(slot)
    return cast(list[FakeXsk], xsks)


def collect(xsks: list[FakeXsk], count: int = COUNT) -> list[bytes]:
    frames: list[bytes] = []

    def enough() -> bool:
        frames.extend(frame for xsk in xsks for frame in xsk.receive())
        return len(frames) >= count

    wait_for(enough, 5, f"{count} frames, of which there are {len(frames)}")
    return sorted(frames)


def numbered(mac: str = MAC, size: int = 64, count: int = COUNT) -> list[bytes]:
    return [udp_frame(mac, SOURCE, number=number, size=size) for number in range(count)]


def in_them(frames: list[bytes], *tags: tuple[int, int]) -> list[bytes]:
    return sorted(tagged(frame, *tags) for frame in frames)


def test_a_tag_beside_the_frame_finds_its_guest(bench: Bench) -> None:
    """Two guests with one address in two VLANs, and one without any: each gets its own, with the tag in the frame."""
    with bench.host.entered(), bench.open() as nic:
        untagged, red, blue = add(nic, 0, (0, MAC)), add(nic, 1, (RED, MAC)), add(nic, 2, (BLUE, MAC))
        sent = numbered()
        for tag in ((Q, BLUE), (Q, 0x6000 | BLUE), (Q, 0x1000 | BLUE)):
            bench.wire.send(sent, tag)
            assert collect(blue) == in_them(sent, tag)
        bench.wire.send(sent, (Q, RED))
        assert collect(red) == in_them(sent, (Q, RED))
        bench.wire.send(sent)
        assert collect(untagged) == sorted(sent)
        assert not any(collect(guest, 0) for guest in (untagged, red, blue))
        assert (nic.facts.xdp_in_use, nic.facts.vlan_tags) == ("native", "in frames and beside them")
        assert (nic.facts.dispatcher, nic.facts.warnings) == (False, ())
        assert "bound to the interface" in nic.facts.dispatcher_detail


@pytest.mark.parametrize(
    ("tag", "key"),
    [
        pytest.param((Q, 5 << 13), 0, id="a priority is no VLAN"),
        pytest.param((Q, 4094), VLAN_ANY, id="any tag"),
        pytest.param((AD, RED), VLAN_ANY, id="a service tag is no VLAN of 802.1Q"),
    ],
)
def test_keys(bench: Bench, tag: tuple[int, int], key: int) -> None:
    with bench.host.entered(), bench.open() as nic:
        owner, others = add(nic, 0, (key, MAC)), add(nic, 1, (VLAN_ANY - key, MAC), (RED, MAC))
        sent = numbered()
        bench.wire.send(sent, tag)
        assert collect(owner) == in_them(sent, tag)
        assert not collect(others, 0)


def test_of_two_tags_the_outer_one_counts(bench: Bench) -> None:
    """It is beside the frame, the other one in it; or both are in it."""
    with bench.host.entered(), bench.open() as nic:
        red, blue = add(nic, 0, (RED, MAC)), add(nic, 1, (BLUE, MAC))
        both = in_them(numbered(), (Q, RED), (Q, BLUE))
        bench.wire.send((frame[:12] + frame[16:] for frame in both), (Q, RED))
        assert collect(red) == both
        bench.wire.send(both)
        assert collect(red) == both
        assert not collect(blue, 0)


def test_what_is_passed_stays_as_it_came(bench: Bench) -> None:
    """To the kernel the tag is still beside the frame: nobody's unicast, a guest's in another VLAN, and groups."""
    with bench.host.entered(), bench.open() as nic, PacketSocket(bench.host, NIC) as kernel:
        kernel.socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        red = add(nic, 0, (RED, MAC))
        for mac in (OTHER, MAC, "ff:ff:ff:ff:ff:ff"):
            sent = numbered(mac)
            bench.wire.send(sent, (Q, BLUE))
            seen: list[tuple[bytes, int]] = []
            wait_for(lambda seen=seen: tags_of(kernel, seen) >= COUNT, 5, "the kernel's frames")
            assert sorted(seen) == [(frame, BLUE) for frame in sorted(sent)]
        assert not collect(red, 0)
        assert {verdict: n for (slot, _, verdict), n in nic.verdicts().items() if n and slot is None} == {
            "pass_unicast": 2 * COUNT,
            "pass_multicast": COUNT,
        }


def tags_of(sock: PacketSocket, seen: list[tuple[bytes, int]]) -> int:
    """Frames with the tag that the kernel has beside them."""
    while True:
        try:
            frame, control, _, _ = sock.socket.recvmsg(1 << 16, 64)
        except BlockingIOError:
            return len(seen)
        (aux,) = [data for level, kind, data in control if (level, kind) == (SOL_PACKET, PACKET_AUXDATA)]
        status, *_, tci, _ = struct.unpack("=IIIHHHH", aux)  # struct tpacket_auxdata
        seen.append((frame, tci if status & TP_STATUS_VLAN_VALID else 0))


@pytest.mark.parametrize("mtu", [1500, 1766, 3498, 3814])
def test_frames_are_four_bytes_longer(bench: Bench, mtu: int) -> None:
    """The largest that the interface's MTU allows are not too large with one more tag, or two."""
    for namespace, device in ((bench.host, NIC), (bench.network, PEER)):
        namespace.ip("link", "set", device, "mtu", str(mtu))
    with bench.host.entered(), bench.open() as nic:
        assert (nic.facts.vlan_tags, nic.facts.several_pieces) == ("in frames and beside them", False)
        red = add(nic, 0, (RED, MAC))
        for tags in (((Q, RED),), ((Q, RED), (Q, BLUE))):
            sent = numbered(size=14 + mtu)
            bench.wire.send(in_them(sent, *tags[1:]), (Q, RED))
            assert collect(red) == in_them(sent, *tags)


@pytest.mark.parametrize("why", ["generic", "driver", "kernel"])
def test_where_they_are_not_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """It is said, it is true, and what is said to help does."""
    if why == "driver":  # before 6.8, say
        monkeypatch.setattr(nic_module, "device_features", lambda _: None)
    elif why == "kernel":
        monkeypatch.setattr(program, "TAGS_OBJECT", program.OBJECT.with_name("none.bpf.o"))
    mode = "generic" if why == "generic" else "auto"
    with bench.host.entered(), bench.open(xdp_mode=mode) as nic:
        assert nic.facts.xdp_in_use == ("generic" if why == "generic" else "native")
        assert nic.facts.vlan_tags == "in frames; beside them they are not seen"
        (warning,) = [w for w in nic.facts.warnings if "taken for untagged" in w]
        assert "`ethtool -K PEER txvlan off`" in warning
        assert "--xdp-mode none" in warning
        untagged, red = add(nic, 0, (0, MAC)), add(nic, 1, (RED, MAC))
        sent = numbered()
        bench.wire.send(sent, (Q, RED))
        assert collect(untagged) == sorted(sent)
        bench.network.run("ethtool", "-K", PEER, "txvlan", "off")
        bench.wire.send(sent, (Q, RED))
        assert collect(red) == in_them(sent, (Q, RED))
        assert not collect(untagged, 0)


# ---- with the data plane


@pytest.mark.parametrize("mtu", [1500, 9000], ids=["frames of one piece", "of several"])
@pytest.mark.parametrize("mode", ["native", "none"])
def test_guests_see_them(mode: str, mtu: int) -> None:
    """Unicast by AF_XDP or a packet socket, groups by the packet socket: always with the tag in the frame."""
    with Lab(quiet=True, mtu=mtu) as lab:
        wire = Wire(lab.world, lab.net, "eth0")
        daemon = lab.up([spec(1)], ["--xdp-mode", mode])
        with NetDevice(daemon.socket("vm1"), features=FEATURES, memory_size=16 << 20) as device:
            device.up()
            device.post(128, 2048)
            for mac in (guest_mac(1), "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01"):
                for size in (64, 14 + mtu):
                    sent = [udp_frame(mac, SOURCE, number=number, size=size) for number in range(COUNT)]
                    for tag in ((Q, 0x2000 | RED), (AD, BLUE)):
                        wire.send(sent, tag)
                        got = [frame for _, frame in device.receive(COUNT)]
                        assert sorted(got) == in_them(sent, tag)


@pytest.mark.parametrize("mode", ["native", "none"])
def test_frames_of_a_local_stack(mode: str) -> None:
    """A large datagram that is to be cut: what says where its checksum is counts the tag."""
    size, segments, payload = 1000, 20, os.urandom(20 * 1000)
    with Lab(quiet=True) as lab:
        Wire(lab.world, lab.net, "eth0")
        lab.net.ip("neigh", "add", guest_ip(1), "lladdr", guest_mac(1), "dev", "eth0")
        daemon = lab.up([spec(1)], ["--xdp-mode", mode])
        features = FEATURES | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6
        with NetDevice(daemon.socket("vm1"), features=features, memory_size=16 << 20) as device:
            device.up()
            device.post(128, 2048)
            with lab.net.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", Q << 16 | RED))
                sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
                sender.sendto(payload, (guest_ip(1), 9))
            got: list[tuple[bytes, bytes]] = []
            wait_for(lambda: got.extend(device.received()) or sum(len(f) - 46 for _, f in got) >= len(payload), 5, "it")
        assert b"".join(frame[46:] for _, frame in got) == payload
        for header, frame in got:
            flags, kind, _, gso_size, start, offset = struct.unpack_from("<BBHHHH", header)
            assert (flags, start, offset) == (NEEDS_CSUM, 14 + 4 + 20, 6)
            assert frame[12:18] == struct.pack("!HHH", Q, RED, 0x0800)
            assert (kind, gso_size) == ((UDP_L4, size) if len(frame) > 46 + size else (0, 0))
        if mode == "none":
            assert len(got) < segments  # whole
