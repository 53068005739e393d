# SPDX-License-Identifier: Apache-2.0
"""The data plane's own tap: guests of a Python front-end on one side, this kernel's stack on the other."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.frames import PacketSocket, internet_checksum, mac_bytes, udp_frame
from support.frontend import F_GUEST_CSUM, F_MRG_RXBUF, F_PROTOCOL, F_VERSION_1, NetDevice
from support.netns import Namespace, World
from support.plane import Plane
from support.process import wait_for
from xdpvhost.datapath import DROP_NAMES, TapqCounters
from xdpvhost.errors import NicError
from xdpvhost.tapnic import TapNic

TAP = "xvt0"
COUNT = 23
HOST, GUEST = "192.0.2.1", "192.0.2.11"
BASE = F_PROTOCOL | F_VERSION_1
F_CSUM, F_HOST_TSO4, F_HOST_USO = 1 << 0, 1 << 11, 1 << 56
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_USO4, F_GUEST_USO6 = 1 << 7, 1 << 8, 1 << 54, 1 << 55
TAKES_ALL = F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6
UDP_SEGMENT, UDP_L4, NEEDS_CSUM = 103, 5, 1


@dataclass
class Alone:
    """A Network with nothing behind the tap but this kernel's stack. `lo` stands for the NIC."""

    namespace: Namespace
    iface: str = "lo"
    ifindex: int = 1
    mac: bytes = bytes(6)
    closed: bool = False

    def attach(self, index: int, name: str, mtu: int) -> None:
        self.namespace.ip("link", "set", name, "mtu", "1500", "up")

    def set_mtu(self, index: int, mtu: int) -> None:
        self.namespace.ip("link", "set", TAP, "mtu", str(mtu))

    def facts(self) -> dict[str, Any]:
        return {"behind": "a stack"}

    def close(self) -> None:
        self.closed = True


class Scene:
    def __init__(self, world: World, directory: Path) -> None:
        self.host = world.namespace("host")
        self.host.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
        self.host.ip("link", "set", "lo", "mtu", "1500", "up")
        self.directory = directory
        self.stack = ExitStack()
        self.plane: Plane
        self.nic: TapNic

    def up(self, guests: int = 2, workers: int = 1, poll: str = "adaptive") -> None:
        def nic(dp: Any) -> TapNic:
            with self.host.entered():
                self.nic = TapNic.open(Alone(self.host), TAP, workers, dp)
            return self.nic

        self.plane = self.stack.enter_context(Plane(self.directory, workers, poll, nic))
        self.host.ip("address", "add", f"{HOST}/24", "dev", TAP)
        for _ in range(guests):
            self.plane.guest()
        self.host.ip("neigh", "add", GUEST, "lladdr", mac(1), "dev", TAP, "nud", "permanent")
        self.mac = self.host.mac(TAP)

    def device(self, number: int, features: int = 0, **more: Any) -> NetDevice:
        device = NetDevice(self.plane.path(f"vm{number}"), features=BASE | features, memory_size=16 << 20, **more)
        self.stack.enter_context(device)
        device.up()
        device.post(128)
        return device

    def wire(self) -> PacketSocket:
        """The kernel's end of the tap."""
        return self.stack.enter_context(PacketSocket(self.host, TAP))

    def socket(self) -> socket.socket:
        """A UDP socket of the host's, for port 9 of the guest."""
        with self.host.entered():
            sock = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((HOST, 9))
        sock.settimeout(10)
        return sock

    def counted(self, field: str) -> int:
        return sum(getattr(tap.counters, field) for tap in self.nic.taps)

    def drops(self, number: int, direction: str) -> dict[str, int]:
        port = self.plane.switch.guests[f"vm{number}"].port
        counters = port.tx_counters(0) if direction == "tx" else port.rx_counters(0)
        return {name: count for name, count in zip(DROP_NAMES, counters.drops, strict=True) if count}


def mac(number: int) -> str:
    return f"52:54:00:00:00:{number:02x}"


@pytest.fixture
def scene(world: World, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(world, tmp_path)
    with made.stack:
        yield made
    assert TAP not in [link["ifname"] for link in made.host.json("ip", "-j", "link")]


@pytest.mark.parametrize(("poll", "workers"), [("adaptive", 1), ("interrupt", 2), ("busy", 1)])
def test_frames_both_ways_are_counted(scene: Scene, poll: str, workers: int) -> None:
    scene.up(2, workers, poll)
    devices = [scene.device(1), scene.device(2, F_MRG_RXBUF)]
    wire = scene.wire()
    for turn in range(2):  # the second finds workers that have slept
        for number, device in enumerate(devices, 1):
            frames = [udp_frame(mac(number), scene.mac, number=turn * 100 + n, size=60 + n) for n in range(COUNT)]
            wire.send(frames)
            assert [frame for _, frame in device.receive(COUNT)] == frames
        everybody = [udp_frame("ff:ff:ff:ff:ff:ff", scene.mac, number=n) for n in range(COUNT)]
        wire.send(everybody)
        for device in devices:
            assert [frame for _, frame in device.receive(COUNT)] == everybody
        for number, device in enumerate(devices, 1):
            frames = [udp_frame(scene.mac, mac(number), number=n, size=60 + 7 * n) for n in range(COUNT)]
            for frame in frames:
                device.send(frame)
            assert wire.wait_received(mac(number), (turn + 1) * COUNT) == frames * (turn + 1)
    wire.send([udp_frame("52:54:00:00:00:99", scene.mac)] * COUNT)  # nobody's, as a bridge floods it
    wait_for(lambda: scene.counted("rx_unclaimed") == COUNT, 5, "frames for nobody")
    assert scene.counted("rx_packets") == 2 * 3 * COUNT + COUNT
    assert scene.counted("tx_packets") == 2 * 2 * COUNT
    assert scene.counted("rx_dropped") == 0
    for number in (1, 2):
        assert scene.drops(number, "rx") == scene.drops(number, "tx") == {}
        counters = scene.plane.switch.guests[f"vm{number}"].port.rx_counters(0)
        assert counters.packets == 2 * 2 * COUNT
        assert counters.copied_bytes == counters.bytes


def test_guests_reach_each_other_and_not_the_tap(scene: Scene) -> None:
    scene.up()
    one, two = scene.device(1), scene.device(2)
    wire = scene.wire()
    frames = [udp_frame(mac(2), mac(1), number=n) for n in range(COUNT)]
    for frame in frames:
        one.send(frame)
    assert [frame for _, frame in two.receive(COUNT)] == frames
    everybody = udp_frame("ff:ff:ff:ff:ff:ff", mac(1))
    one.send(everybody)
    assert [frame for _, frame in two.receive(1)] == [everybody]
    assert wire.wait_received(mac(1), 1) == [everybody]
    assert one.received() == []


@pytest.mark.parametrize("takes", [True, False])
def test_open_checksums_of_the_host(scene: Scene, takes: bool) -> None:
    scene.up(1)
    device = scene.device(1, F_GUEST_CSUM if takes else 0)
    sock = scene.socket()
    for n in range(COUNT):
        sock.sendto(b"%03d" % n * 30, (GUEST, 9))
    got = device.receive(COUNT)
    for n, (header, frame) in enumerate(got):
        flags, _, _, _, start, offset = struct.unpack_from("<BBHHHH", header)
        pseudo = frame[26:34] + struct.pack("!HH", 17, len(frame) - 34)
        assert frame[42:] == b"%03d" % n * 30
        if takes:
            assert (flags, start, offset) == (NEEDS_CSUM, 34, 6)
        else:
            assert flags == 0
            assert internet_checksum(pseudo + frame[34:]) == 0


@pytest.mark.parametrize("takes", [True, False])
def test_large_frames_of_the_host(scene: Scene, takes: bool) -> None:
    """UDP segmentation offload: one frame for many, whole for a guest that takes such, cut for others."""
    scene.up(1)
    device = scene.device(1, TAKES_ALL if takes else 0)
    sock = scene.socket()
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    payload = os.urandom(COUNT * 1000)
    sock.sendto(payload, (GUEST, 9))
    got = device.receive(1 if takes else COUNT)
    if takes:
        ((header, frame),) = got
        flags, kind, _, size, start, offset = struct.unpack_from("<BBHHHH", header)
        assert (flags, kind, size, start, offset) == (NEEDS_CSUM, UDP_L4, 1000, 34, 6)
        assert frame[42:] == payload
    else:
        assert b"".join(frame[42:] for _, frame in got) == payload
        for _, frame in got:
            assert internet_checksum(frame[26:34] + struct.pack("!HH", 17, len(frame) - 34) + frame[34:]) == 0
    counters = scene.plane.switch.guests["vm1"].port.rx_counters(0)
    assert counters.copied_bytes == counters.bytes


def large_udp(payload: bytes, size: int, **wrong: int) -> tuple[bytes, bytes]:
    """A guest's virtio-net header and GSO frame for the host's port 9, its checksum open."""
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(HOST)
    length = 8 + len(payload)
    pseudo = ~internet_checksum(addresses + struct.pack("!HH", 17, length)) & 0xFFFF
    udp = struct.pack("!HHHH", 9, 9, length, pseudo) + payload
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0, 64, 17, 0) + addresses
    ip = ip[:10] + struct.pack("!H", internet_checksum(ip)) + ip[12:]
    fields = {"flags": NEEDS_CSUM, "kind": UDP_L4, "hdr_len": 42, "size": size, "start": 34, "offset": 6} | wrong
    return struct.pack("<BBHHHHH", *fields.values(), 0), b"\x08\x00" + ip + udp


def test_large_frames_of_a_guest(scene: Scene) -> None:
    """The kernel gets them whole, and delivers the datagrams: so all of its checks are passed."""
    scene.up(1)
    device = scene.device(1, F_CSUM | F_HOST_TSO4 | F_HOST_USO)
    sock = scene.socket()
    payload = os.urandom(COUNT * 1000)
    header, frame = large_udp(payload, 1000)
    device.send(mac_bytes(scene.mac) + mac_bytes(mac(1)) + frame, header, cuts=[7, 30, 5000, 5001])
    assert b"".join(sock.recv(2000) for _ in range(COUNT)) == payload
    assert scene.counted("tx_gso_packets") == 1
    assert scene.counted("tx_packets") == 0
    assert scene.drops(1, "tx") == {}


def test_open_checksum_of_a_guest(scene: Scene) -> None:
    scene.up(1)
    device = scene.device(1, F_CSUM)
    sock = scene.socket()
    for n in range(COUNT):
        header, frame = large_udp(b"%d" % n, 0, kind=0, hdr_len=0)
        device.send(mac_bytes(scene.mac) + mac_bytes(mac(1)) + frame, header)
    assert [sock.recv(100) for _ in range(COUNT)] == [b"%d" % n for n in range(COUNT)]
    assert scene.counted("tx_csum_partial") == COUNT


@pytest.mark.parametrize(
    "wrong", [{"start": 36}, {"offset": 16}, {"size": 8}, {"kind": 1}, {"kind": 3}, {"flags": 0}, {"start": 60000}]
)
def test_a_false_description_is_that_frames_end_alone(scene: Scene, wrong: dict[str, int]) -> None:
    scene.up(2)
    hostile, other = scene.device(1, F_CSUM | F_HOST_TSO4 | F_HOST_USO), scene.device(2)
    wire = scene.wire()
    header, frame = large_udp(os.urandom(5000), **({"size": 1000} | wrong))
    for _ in range(COUNT):
        hostile.send(mac_bytes(scene.mac) + mac_bytes(mac(1)) + frame, header)
        other.send(udp_frame(scene.mac, mac(2)))
    assert len(wire.wait_received(mac(2), COUNT)) == COUNT
    wait_for(lambda: sum(scene.drops(1, "tx").values()) == COUNT, 5, "the frames to be dropped")
    assert wire.received_from(mac(1)) == []
    assert scene.drops(1, "tx") == {"bad_header": COUNT}


def test_tap_that_is_down(scene: Scene) -> None:
    scene.up(2)
    one, two = scene.device(1), scene.device(2)
    scene.host.ip("link", "set", TAP, "down")
    with scene.host.entered():
        assert scene.nic.follow_link()
        assert not scene.nic.link.up
    for n in range(COUNT):
        one.send(udp_frame(scene.mac, mac(1), number=n))
    wait_for(lambda: scene.drops(1, "tx") == {"link_down": COUNT}, 5, "frames to be dropped")
    one.send(udp_frame(mac(2), mac(1)))
    assert len(two.receive(1)) == 1
    scene.host.ip("link", "set", TAP, "up")
    with scene.host.entered():
        assert scene.nic.follow_link()
        assert scene.nic.link.up
    wire = scene.wire()
    one.send(udp_frame(scene.mac, mac(1)))
    assert len(wire.wait_received(mac(1), 1)) == 1
    wire.send([udp_frame(mac(2), scene.mac)])
    assert len(two.receive(1)) == 1


def test_tap_that_is_deleted(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.up(2)
    one, two = scene.device(1), scene.device(2)
    scene.host.ip("link", "del", TAP)
    one.send(udp_frame(scene.mac, mac(1)))
    wait_for(lambda: scene.drops(1, "tx") == {"link_down": 1}, 5, "a frame to be dropped")
    with scene.host.entered():
        assert scene.nic.follow_link()
        assert not scene.nic.follow_link()
    assert not scene.nic.link.up
    assert caplog.text.count(f"tap {TAP} was deleted") == 1
    assert scene.nic.facts["tap_state"] == "deleted by somebody else"
    for n in range(COUNT):
        one.send(udp_frame(mac(2), mac(1), number=n))
    assert len(two.receive(COUNT)) == COUNT
    counters = scene.plane.dp.worker_counters(0)
    turns = counters.heartbeat
    wait_for(lambda: counters.sleeps, 5, "the worker to sleep")
    assert counters.heartbeat - turns < 1_000_000  # it does not spin on a dead descriptor


def test_new_mtu(scene: Scene) -> None:
    scene.up(1)
    device = scene.device(1)
    wire = scene.wire()
    scene.host.ip("link", "set", "lo", "mtu", "2000")
    with scene.host.entered():
        scene.plane.loop.call(scene.plane.switch.publish)
        assert scene.nic.follow_mtu()
        assert not scene.nic.follow_mtu()
    scene.plane.loop.call(scene.plane.switch.publish)
    (link,) = scene.host.json("ip", "-j", "link", "show", TAP)
    assert link["mtu"] == scene.nic.mtu == 2000
    device.send(udp_frame(scene.mac, mac(1), size=2014))
    device.send(udp_frame(scene.mac, mac(1), size=2015))
    assert [len(frame) for frame in wire.wait_received(mac(1), 1)] == [2014]
    wait_for(lambda: scene.drops(1, "tx") == {"too_big": 1}, 5, "a frame to be dropped")


def test_a_taken_name_leaves_nothing(scene: Scene) -> None:
    scene.host.ip("link", "add", "other0", "type", "veth", "peer", TAP)
    network = Alone(scene.host)
    before = len(os.listdir("/proc/self/fd"))
    with scene.host.entered(), pytest.raises(NicError, match="there is an interface xvt0 already"):
        TapNic.open(network, TAP, 2, None)  # type: ignore[arg-type]
    assert network.closed
    assert len(os.listdir("/proc/self/fd")) == before
    scene.host.ip("link", "del", "other0")


def test_every_queue_is_read(scene: Scene) -> None:
    """Which queue the kernel chooses is its business; what comes by any of them arrives."""
    scene.up(1, workers=2)
    device = scene.device(1)
    sock = scene.socket()
    for n in range(COUNT * 2):
        sock.sendto(b"x", (GUEST, 1000 + n))
    assert len(device.receive(COUNT * 2)) == COUNT * 2
    assert isinstance(scene.nic.taps[0].counters, TapqCounters)
    assert len(scene.nic.taps) == 2
