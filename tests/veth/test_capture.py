# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost capture` on a veth: both ways, why frames were dropped, filters, full disks, what it costs the others."""

from __future__ import annotations

import json
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import PcapNgReader

from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.frontend import NetDevice
from support.netns import World
from support.process import Process, wait_for
from xdpvhost.capture import pcapng

MAC1, MAC2 = "52:54:00:00:00:01", "52:54:00:00:00:02"
VM1, VM2 = f"name=vm1,mac={MAC1}", f"name=vm2,mac={MAC2}"
COUNT = 23


class Host:
    """A "NIC" `nic0` in one namespace, its other end `net0` in another, and files."""

    def __init__(self, world: World) -> None:
        self.nic, self.net = world.namespace("nic"), world.namespace("net")
        for namespace in (self.nic, self.net):
            namespace.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
        world.veth(self.nic, "nic0", self.net, "net0")
        self.directory = world.directory

    def up(self, *guests: str, options: tuple[str, ...] = ()) -> Daemon:
        return Daemon(self.nic, iface="nic0", guests=guests, run_dir=self.directory / "run", options=options)

    def refused(self, daemon: Daemon, *args: str) -> tuple[int, str]:
        """What `capture` says that does not begin."""
        result = self.nic.run(PROGRAM, "capture", *args, "--run-dir", daemon.run_dir, check=False)
        assert "frames captured" not in result.stderr, result.stderr
        return result.returncode, result.stderr

    def send(self, destination: str, count: int = COUNT, size: int = 64) -> None:
        with PacketSocket(self.net, "net0") as out:
            source = self.net.mac("net0")
            out.send(udp_frame(destination, source, number=number, size=size) for number in range(count))


@pytest.fixture
def host(world: World) -> Host:
    return Host(world)


class Capture:
    """A running `xdpvhost capture PORT -w FILE`, which sees everything from now on."""

    def __init__(self, host: Host, daemon: Daemon, port: str, *args: str, file: Path | None = None) -> None:
        self.file = file or host.directory / f"{port.replace(':', '-')}.pcapng"
        argv = ["capture", port, "-w", str(self.file), "--run-dir", str(daemon.run_dir), *args]
        self.process: Process = host.nic.start(PROGRAM, *argv)
        self.process.wait_line("capturing ", 10)

    def frames(self) -> list[pcapng.Packet]:
        """What is in the file now; every block whole, as its writer promises even while it writes."""
        return list(read(self.file)[1])

    def wait_frames(self, count: int) -> None:
        wait_for(lambda: len(self.frames()) >= count, 10, f"{count} frames in {self.file.name}")

    def end(self, status: int = 0) -> str:
        """Ctrl-C; its last words."""
        if self.process.running:
            self.process.send(signal.SIGINT)
        assert self.process.wait(10) == status, self.process.tail()
        return self.process.log()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()


def read(file: Path) -> tuple[dict[int, bytes], list[pcapng.Packet], dict[int, int]]:
    """The interface's options, the frames, and the numbers of the statistics block; the rest of the file is checked."""
    data = memoryview(file.read_bytes())
    data = data[: pcapng.whole(data)]
    options: dict[int, bytes] = {}
    packets: list[pcapng.Packet] = []
    numbers: dict[int, int] = {}
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from("=II", data, at)
        (again,) = struct.unpack_from("=I", data, at + length - 4)
        assert length == again
        body = bytes(data[at + 8 : at + length - 4])
        if at == 0:
            assert kind == pcapng.SHB
        elif kind == pcapng.IDB:
            assert struct.unpack_from("=H", body) == (1,)
            options = dict(_options(body[8:]))
        elif kind == pcapng.ISB:
            numbers = {code: int.from_bytes(value, "little") for code, value in _options(body[12:]) if code > 3}
        else:
            assert kind == pcapng.EPB
            packets += pcapng.packets(data[at : at + length])
        at += length
    return options, packets, numbers


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        code, length = struct.unpack_from("=HH", data)
        if not code:
            return
        yield code, data[4 : 4 + length]
        data = data[4 + length + -length % 4 :]


def ways(packets: list[pcapng.Packet]) -> dict[tuple[str, str], int]:
    """How many frames there are of each direction and fate."""
    found: dict[tuple[str, str], int] = {}
    for packet in packets:
        key = {1: "in", 2: "out"}[packet.flags & 3], packet.comment.removeprefix("dropped: ")
        found[key] = found.get(key, 0) + 1
    return found


@contextmanager
def guest(daemon: Daemon, name: str, **more: Any) -> Iterator[NetDevice]:
    with NetDevice(daemon.socket(name), **more) as device:
        device.up()
        daemon.wait_connected(name)
        yield device


def test_both_ways_of_a_guest_and_of_the_interface(host: Host) -> None:
    """23 in, 19 out: each frame once at the guest and once at the interface, byte for byte, in order."""
    begin = time.time_ns()
    with host.up(VM1, VM2) as daemon, guest(daemon, "vm1") as vm1:
        vm1.post(64)
        with Capture(host, daemon, "vm1") as one, Capture(host, daemon, "nic0") as nic:
            status = {item["port"]: item for item in json.loads(daemon.cli("status", "--json"))["captures"]}
            assert {port: item["kind"] for port, item in status.items()} == {"vm1": "guest", "nic0": "interface"}
            assert status["vm1"]["pid"] == one.process.pid
            assert "captures" in daemon.cli("status")
            host.send(MAC1)
            vm1.receive(COUNT)
            outgoing = [udp_frame(host.net.mac("net0"), MAC1, number=n, size=100) for n in range(19)]
            for frame in outgoing:
                vm1.send(frame)
            for capture in (one, nic):
                capture.wait_frames(COUNT + 19)
                words = capture.end()
                assert f"{COUNT + 19} frames captured" in words
                assert "0 frames lost" in words
                options, packets, numbers = read(capture.file)
                assert ways(packets) == {("in", ""): COUNT, ("out", ""): 19}
                incoming = [udp_frame(MAC1, host.net.mac("net0"), number=n) for n in range(COUNT)]
                assert [p.data for p in packets if p.flags & 3 == 1] == incoming
                assert [p.data for p in packets if p.flags & 3 == 2] == outgoing
                assert all(p.length == len(p.data) for p in packets)
                assert all(begin < a.time <= b.time < time.time_ns() for a, b in pairwise(packets))
                assert options[2] == (b"vm1" if capture is one else b"nic0")
                assert options[9] == b"\x09"
                assert numbers == {4: COUNT + 19, 5: 0, 6: COUNT + 19, 8: COUNT + 19}
        metrics = daemon.metrics()
        assert metrics.by("guest", "xdpvhost_capture_frames_total") == {"vm1": COUNT + 19, "": COUNT + 19, "vm2": 0}
        assert metrics.total("xdpvhost_capture_lost_total") == 0
        assert json.loads(daemon.cli("status", "--json"))["captures"] == []


def test_others_can_read_it(host: Host) -> None:
    """scapy and tcpdump agree with us."""
    with host.up(VM1) as daemon:
        with Capture(host, daemon, "vm1", "-s", "60") as capture:
            host.send(MAC1, size=1400)
            capture.wait_frames(COUNT)
            capture.end()
        with PcapNgReader(str(capture.file)) as reader:
            seen = list(reader)
        assert len(seen) == COUNT
        assert {bytes(p)[:14] for p in seen} == {mac_bytes(MAC1) + mac_bytes(host.net.mac("net0")) + b"\x08\x00"}
        assert {(p.wirelen, len(bytes(p))) for p in seen} == {(1400, 60)}
        assert {bytes(c) for p in seen for c in p.comments} == {b"dropped: not_connected"}
        shown = host.nic.run("tcpdump", "-n", "-e", "-r", capture.file).stdout.splitlines()
        assert len(shown) == COUNT
        assert all("192.0.2.1.9 > 192.0.2.11.9: UDP" in line and "length 1400" in line for line in shown)
