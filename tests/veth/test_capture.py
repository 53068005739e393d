# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost capture` on a veth: both ways, why frames were dropped, filters, full disks, what it costs the others."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import PcapNgReader

from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.frontend import F_CSUM, F_HOST_TSO4, F_MRG_RXBUF, F_PROTOCOL, F_VERSION_1, NetDevice
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


def drops(daemon: Daemon, name: str) -> dict[tuple[str, str], int]:
    """As the metrics count them, with the names that a capture has for the directions."""
    metrics = daemon.metrics()
    return {
        ({"rx": "in", "tx": "out"}[direction], reason): count
        for direction in ("rx", "tx")
        for reason, count in metrics.by("reason", "xdpvhost_guest_drops_total", guest=name, direction=direction).items()
        if count
    }


def dropped(packets: list[pcapng.Packet]) -> dict[tuple[str, str], int]:
    return {(way, why): count for (way, why), count in ways(packets).items() if why}


def test_what_a_guest_sends_and_is_dropped(host: Host) -> None:
    """Spoofed, too long, no Ethernet frame, a nonsensical header: each counted, and shown with its reason."""
    stranger = host.net.mac("net0")
    with host.up(VM1) as daemon, guest(daemon, "vm1") as vm1:
        with Capture(host, daemon, "vm1") as capture, Capture(host, daemon, "iface:nic0", "--drops") as nic:
            for number in range(3):
                vm1.send(udp_frame(stranger, MAC2, number=number))
            for number in range(5):
                vm1.send(udp_frame(stranger, MAC1, number=number, size=3000))
            for _ in range(7):
                vm1.send(b"short")
            for _ in range(11):
                vm1.send(udp_frame(stranger, MAC1), header=b"\x01\x00")
            vm1.send(udp_frame(stranger, MAC1))
            capture.wait_frames(27)
            capture.end()
            nic.end()
        expected = {("out", "spoofed"): 3, ("out", "too_big"): 5, ("out", "runt"): 7, ("out", "bad_header"): 11}
        assert drops(daemon, "vm1") == expected
        assert ways(capture.frames()) == expected | {("out", ""): 1}
        assert {p.length for p in capture.frames() if "bad_header" in p.comment or "runt" in p.comment} == {0}
        assert ways(nic.frames()) == {("out", "too_big"): 5}


def test_what_finds_no_buffers(host: Host) -> None:
    """From the NIC: the oldest that waited too long are shown. From a guest: at the one that has no buffers."""
    with host.up(VM1, VM2) as daemon, guest(daemon, "vm1") as vm1, guest(daemon, "vm2", queue_size=1024) as vm2:
        with (
            Capture(host, daemon, "vm1") as one,
            Capture(host, daemon, "vm2") as two,
            Capture(host, daemon, "nic0") as nic,
        ):
            host.send(MAC1, count=2000)
            wait_for(lambda: drops(daemon, "vm1").get(("in", "no_buffers"), 0) > 0, 10, "frames to be dropped")
            daemon.wait_metric(2000, "xdpvhost_xdp_verdicts_total", guest="vm1", verdict="redirect")
            for number in range(60):
                vm2.send(udp_frame(MAC1, MAC2, number=number, size=99))
            two.wait_frames(60)
            vm1.post(200)
            last = udp_frame(MAC1, host.net.mac("net0"), number=5000, size=77)
            with PacketSocket(host.net, "net0") as out:
                out.send([last])
            wait_for(lambda: (vm1.receive(1), any(p.data == last for p in one.frames()))[1], 10, "the last frame")
            for capture in (one, two, nic):
                capture.end()
        counted = drops(daemon, "vm1")
        assert dropped(one.frames()) == counted
        assert ways(two.frames()) == {("out", ""): 60}
        from_nic = [p for p in one.frames() if len(p.data) != 99]
        assert sorted(p.data for p in from_nic) == sorted(p.data for p in nic.frames())
        assert len(from_nic) == 2001
        assert set(ways(nic.frames())) == {("in", "")}


def test_tags_of_an_access_port(host: Host) -> None:
    """The guest's frames have no tag at the guest, and have one at the interface, both ways."""
    tag = b"\x81\x00\x00\x05"
    source = host.net.mac("net0")
    with host.up(f"{VM1},vlan=5") as daemon, guest(daemon, "vm1") as vm1:
        vm1.post(64)
        with Capture(host, daemon, "vm1") as one, Capture(host, daemon, "nic0", "vlan 5") as nic:
            incoming, outgoing = udp_frame(MAC1, source), udp_frame(source, MAC1, size=80)
            with PacketSocket(host.net, "net0") as out:
                out.send([incoming[:12] + tag + incoming[12:]])
            assert [frame for _, frame in vm1.receive(1)] == [incoming]
            vm1.send(outgoing)
            nic.wait_frames(2)
            one.wait_frames(2)
            one.end()
            nic.end()
        assert sorted(p.data for p in one.frames()) == sorted([incoming, outgoing])
        assert sorted(p.data for p in nic.frames()) == sorted(f[:12] + tag + f[12:] for f in (incoming, outgoing))


def test_open_checksums_and_gso_are_flagged(host: Host) -> None:
    """A frame of 4 KiB that the guest leaves to be cut: one frame at both ports, as it is."""
    features = F_VERSION_1 | F_MRG_RXBUF | F_PROTOCOL | F_CSUM | F_HOST_TSO4
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 4040, 1, 0, 64, 6, 0, bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2)))
    tcp = struct.pack("!HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 512, 0, 0)
    frame = mac_bytes(host.net.mac("net0")) + mac_bytes(MAC1) + b"\x08\x00" + ip + tcp + bytes(4000)
    header = struct.pack("<BBHHHH", 1, 1, 54, 1000, 34, 16)
    with host.up(VM1) as daemon, guest(daemon, "vm1", features=features) as vm1:
        with Capture(host, daemon, "vm1") as one, Capture(host, daemon, "nic0") as nic:
            vm1.send(frame, header=header)
            for capture in (one, nic):
                capture.wait_frames(1)
                capture.end()
                (packet,) = capture.frames()
                assert packet.length == len(frame)
                assert packet.data[54:] == frame[54:]
                assert packet.flags & (1 << 9 | 1 << 11) == 1 << 9 | 1 << 11


def test_filters_directions_and_counts(host: Host) -> None:
    with host.up(VM1) as daemon, guest(daemon, "vm1") as vm1:
        vm1.post(200)
        with (
            Capture(host, daemon, "vm1", "-c", "5", "udp", "port", "9 and ip[4:2] >= 10") as some,
            Capture(host, daemon, "nic0", "-Q", "out") as out,
        ):
            host.send(MAC1)
            vm1.receive(COUNT)
            for number in range(2):
                vm1.send(udp_frame(host.net.mac("net0"), MAC1, number=number))
            assert some.process.wait(10) == 0
            out.wait_frames(2)
            assert "2 frames captured" in out.end()
            assert "5 frames captured" in some.process.log()
            assert [struct.unpack_from("!H", p.data, 18)[0] for p in some.frames()] == [10, 11, 12, 13, 14]
            options, _, numbers = read(some.file)
            assert options[11] == b"\0udp port 9 and ip[4:2] >= 10"
            assert numbers[6] == 5
            assert ways(out.frames()) == {("out", ""): 2}
        begin = time.monotonic()
        with Capture(host, daemon, "vm1", "--seconds", "0.3") as brief:
            assert brief.process.wait(10) == 0
        assert 0.3 <= time.monotonic() - begin < 9


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["vm1", "-w", "x.pcapng", "udp and and"], 2, "filter 'udp and and': "),
        (["vm7", "-w", "x.pcapng"], 2, "there is no guest and no interface 'vm7' here; there are: vm1, nic0"),
        (["guest:nic0", "-w", "x.pcapng"], 2, "there is no guest and no interface 'guest:nic0'"),
        (["vm1"], 2, "say -w - for pcapng there, or -w FILE"),
        (["vm1", "-w", "/no/such/x.pcapng"], 2, "cannot write /no/such/x.pcapng: No such file or directory"),
    ],
)
def test_what_does_not_begin(host: Host, args: list[str], code: int, words: str) -> None:
    with host.up(VM1) as daemon:
        result = host.refused(daemon, *args)
        assert result[0] == code, result
        assert words in result[1]
        assert not Path("x.pcapng").exists()
        wait_for(lambda: daemon.api("status")["captures"] == [], 5, "no capture to be left")


def test_one_capture_a_port(host: Host) -> None:
    with host.up(VM1) as daemon, Capture(host, daemon, "vm1") as first:
        code, words = host.refused(daemon, "guest:vm1", "-w", "/dev/null")
        assert code == 2
        assert f"guest 'vm1' is being captured already, by process {first.process.pid}; end that" in words
        first.end()
        with Capture(host, daemon, "vm1") as second:
            second.end()


def test_all_captures_have_a_gigabyte(host: Host) -> None:
    with host.up(VM1) as daemon, Capture(host, daemon, "vm1", "--buffer", "512") as first:
        code, words = host.refused(daemon, "iface:nic0", "-w", "/dev/null", "--buffer", "1024")
        assert code == 2
        assert f"there are guest 'vm1' (process {first.process.pid}) with 512 MiB" in words
        with Capture(host, daemon, "iface:nic0", "--buffer", "8") as second:
            second.end()
        first.end()
        with Capture(host, daemon, "iface:nic0", "--buffer", "1024") as alone:
            alone.end()


def test_a_named_pipe_without_a_reader(host: Host) -> None:
    """Nothing is captured until somebody reads, and Ctrl-C ends it before that, too."""
    pipe = host.directory / "pipe"
    os.mkfifo(pipe)
    with host.up(VM1) as daemon:
        argv = [PROGRAM, "capture", "vm1", "-w", str(pipe), "--run-dir", str(daemon.run_dir)]
        process = host.nic.start(*argv)
        process.wait_line("waiting for somebody to read", 10)
        assert daemon.api("status")["captures"] == []
        process.send(signal.SIGINT)
        assert process.wait(10) == 0
        process = host.nic.start(*argv)
        process.wait_line("waiting for somebody to read", 10)
        with pipe.open("rb") as reader:
            process.wait_line("capturing ", 10)
            host.send(MAC1)
            process.send(signal.SIGINT)
            assert process.wait(10) == 0
            assert reader.read(4) == b"\n\r\r\n"


def test_a_guest_that_is_called_like_the_interface(host: Host) -> None:
    with host.up(f"name=nic0,mac={MAC1}") as daemon:
        code, words = host.refused(daemon, "nic0", "-w", "/dev/null")
        assert code == 2
        assert "'nic0' is a guest and an interface; say guest:nic0 or iface:nic0" in words
        with Capture(host, daemon, "guest:nic0") as one, Capture(host, daemon, "iface:nic0") as two:
            assert "capturing guest 'nic0'" in one.end()
            assert "capturing interface 'nic0'" in two.end()


def test_lines_on_a_terminal(host: Host) -> None:
    with host.up(VM1) as daemon:
        ours, theirs = pty.openpty()
        argv = [PROGRAM, "capture", "vm1", "-c", str(COUNT), "--run-dir", daemon.run_dir]
        with subprocess.Popen(host.nic.argv(argv), stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
            os.close(theirs)
            assert process.stderr is not None
            assert "capturing" in process.stderr.readline()
            host.send(MAC1)
            shown = b""
            with suppress(OSError):  # the terminal's other end is closed
                while data := os.read(ours, 65536):
                    shown += data
            assert process.wait(10) == 0
        os.close(ours)
        lines = shown.decode().splitlines()
        assert len(lines) == COUNT
        shape = rf"{host.net.mac('net0')} > {MAC1}, IPv4 \(0x0800\), length 64, dropped: not_connected"
        assert all(re.fullmatch(rf"\d\d:\d\d:\d\d\.\d{{6}} In  {shape}", line) for line in lines), lines[0]


def test_a_pipe(host: Host) -> None:
    """tcpdump reads it as it comes; when that has enough, the capture ends, too."""
    with host.up(VM1) as daemon:
        capture = f"{PROGRAM} capture vm1 -w - --run-dir {daemon.run_dir}"
        process = host.nic.start("bash", "-c", f"{capture} | tcpdump -n -c 3 -r - 2>&1; echo ${{PIPESTATUS[0]}}")
        process.wait_line("capturing ", 10)
        host.send(MAC1, count=3)
        wait_for(lambda: process.log().count("192.0.2.11") >= 3, 10, "tcpdump to show 3 frames")

        def ended() -> bool:
            host.send(MAC1, count=1)
            return not process.running

        wait_for(ended, 10, "the capture to end")
        assert process.log().splitlines()[-1] == "0"
        assert "reader has gone" in process.log()


def test_a_killed_command_leaves_nothing(host: Host) -> None:
    with host.up(VM1) as daemon, guest(daemon, "vm1") as vm1:
        vm1.post(64)
        before = sorted(os.listdir(daemon.run_dir))
        for _ in range(3):
            with Capture(host, daemon, "vm1") as capture:
                assert sorted(os.listdir(daemon.run_dir)) == before
                os.kill(capture.process.pid, signal.SIGKILL)
            wait_for(lambda: daemon.api("status")["captures"] == [], 1, "the daemon to notice")
        host.send(MAC1)
        vm1.receive(COUNT)
        daemon.down()


@pytest.mark.parametrize("how", ["kill -9", "down", "guest rm"])
def test_the_daemon_or_the_guest_goes_first(host: Host, how: str) -> None:
    with host.up(VM1) as daemon, Capture(host, daemon, "vm1") as capture:
        host.send(MAC1)
        daemon.wait_metric(COUNT, "xdpvhost_capture_frames_total", guest="vm1")
        if how == "kill -9":
            daemon.kill()
        elif how == "down":
            daemon.down()
        else:
            daemon.cli("guest", "rm", "vm1")
        assert capture.process.wait(10) == 6, capture.process.tail()
        assert f"{COUNT} frames captured" in capture.process.log()
        _, packets, numbers = read(capture.file)
        assert len(packets) == COUNT
        assert numbers[6] == COUNT


def test_full_disks(host: Host) -> None:
    small = host.directory / "small"
    small.mkdir()
    host.nic.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
    try:
        with host.up(VM1) as daemon:
            full = host.nic.run(PROGRAM, "capture", "vm1", "-w", "/dev/full", "--run-dir", daemon.run_dir, check=False)
            assert full.returncode == 7
            assert "cannot write /dev/full: No space left on device" in full.stderr
            with Capture(host, daemon, "vm1", file=small / "x.pcapng") as capture:
                host.send(MAC1, count=500, size=777)
                assert capture.process.wait(10) == 7, capture.process.tail()
                assert "No space left on device; what is there is valid" in capture.process.log()
            assert capture.file.stat().st_size > 60000
            packets = capture.frames()
            assert 50 < len(packets) < 90
            assert pcapng.whole(memoryview(capture.file.read_bytes())) == capture.file.stat().st_size
            with PcapNgReader(str(capture.file)) as reader:
                assert len(list(reader)) == len(packets)
            assert daemon.api("status")["captures"] == []
    finally:
        host.nic.run("umount", small)


def test_a_command_that_does_not_read_loses_and_others_do_not(host: Host) -> None:
    """Stopped, with a buffer of 1 MiB: what it holds is captured, the rest counted, and the guest gets everything."""
    with host.up(VM1) as daemon, guest(daemon, "vm1", queue_size=1024, memory_size=32 << 20) as vm1:
        vm1.post(1000)
        with Capture(host, daemon, "vm1", "--buffer", "1") as capture:
            os.kill(capture.process.pid, signal.SIGSTOP)
            count = 0
            for _ in range(20):
                host.send(MAC1, count=100, size=1400)
                vm1.receive(100)
                count += 100
            os.kill(capture.process.pid, signal.SIGCONT)
            metrics = daemon.metrics()
            kept = metrics.total("xdpvhost_capture_frames_total", guest="vm1")
            lost = metrics.total("xdpvhost_capture_lost_total", guest="vm1")
            assert kept + lost == count
            assert kept == (1 << 20) // 1440  # header and frame, in multiples of 32
            capture.wait_frames(kept)
            words = capture.end()
            assert f"{kept} frames captured" in words
            assert f"{lost} frames lost" in words
            assert read(capture.file)[2] == {4: count, 5: lost, 6: kept, 8: kept}


def test_starting_and_ending_under_load_loses_nothing_else(host: Host) -> None:
    """Captures come and go 20 times, while a guest sends to another: every frame arrives."""
    with host.up(VM1, VM2, options=("--workers", "2")) as daemon:
        with guest(daemon, "vm1", memory_size=64 << 20) as vm1, guest(daemon, "vm2") as vm2:
            vm2.post(200)
            stop = threading.Event()

            def churn() -> None:
                while not stop.is_set():
                    for port in ("vm1", "vm2", "nic0"):
                        argv = [
                            "capture",
                            port,
                            "-w",
                            "/dev/null",
                            "--seconds",
                            "0.01",
                            "--run-dir",
                            str(daemon.run_dir),
                        ]
                        host.nic.run(PROGRAM, *argv)

            thread = threading.Thread(target=churn)
            thread.start()
            try:
                sent, end = 0, time.monotonic() + 5
                while time.monotonic() < end:
                    for _ in range(50):
                        vm1.send(udp_frame(MAC2, MAC1, number=sent % 65536))
                        sent += 1
                    vm2.receive(50)
                    vm1.sent()
            finally:
                stop.set()
                thread.join()
            assert sent > 1000
            assert drops(daemon, "vm2") == {}
            assert daemon.metrics().total("xdpvhost_capture_frames_total", guest="vm1") > 0


def test_without_xdp(host: Host) -> None:
    """Frames by packet sockets, GSO ones too, are shown as any other."""
    with host.up(VM1, options=("--xdp-mode", "none")) as daemon, guest(daemon, "vm1") as vm1:
        vm1.post(64)
        with Capture(host, daemon, "vm1") as one, Capture(host, daemon, "nic0") as nic:
            host.send(MAC1)
            vm1.receive(COUNT)
            for capture in (one, nic):
                capture.wait_frames(COUNT)
                capture.end()
                assert ways(capture.frames()) == {("in", ""): COUNT}
