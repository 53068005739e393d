# SPDX-License-Identifier: Apache-2.0
"""Every MTU: frames of one piece and of several, in both directions, whole, for guests with and without merging."""

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from support.daemon import Daemon
from support.frames import PacketSocket, internet_checksum, mac_bytes, udp_frame
from support.frontend import F_CSUM, F_GUEST_CSUM, F_MRG_RXBUF, F_PROTOCOL, F_VERSION_1, Buffer, NetDevice
from support.lab import Lab, guest_ip, guest_mac, spec
from support.process import wait_for

CHUNK = 4096
PIECE = CHUNK - 256  # the kernel keeps a headroom in every chunk that it fills
BASE = F_VERSION_1 | F_PROTOCOL
MAC = guest_mac(1)
NEEDS_CSUM = 1


def lengths(mtu: int) -> list[int]:
    """Around what one piece, two, and so on hold, in both directions, and the longest frame."""
    most = mtu + 14
    borders = {60, 61, 1514, most - 1, most}
    for size in (PIECE, CHUNK):
        borders |= {size * n + d for n in range(1, most // size + 1) for d in (-1, 0, 1)}
    return sorted(length for length in borders if 60 <= length <= most)


def noise(destination: str, source: str, size: int) -> bytes:
    """A frame of `size` bytes in which no two places look alike; its type is the local experimental one."""
    return mac_bytes(destination) + mac_bytes(source) + b"\x88\xb5" + os.urandom(size - 14)


@pytest.fixture
def scene(mtu: int) -> Iterator[Lab]:
    with Lab(quiet=True, queues=2, mtu=mtu) as lab:
        yield lab


def up(scene: Lab, *options: str) -> Daemon:
    return scene.up([spec(1)], options)


def receive(device: NetDevice, wire: PacketSocket, frames: list[bytes]) -> None:
    """From the network to the guest, a few at a time: a veth's ring has 256 entries, and the guest a few buffers."""
    for at in range(0, len(frames), 3):
        wire.send(frames[at : at + 3])
        assert [frame for _, frame in device.receive(len(frames[at : at + 3]))] == frames[at : at + 3]


@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("mtu", [9000, 65535])
@pytest.mark.parametrize(("features", "buffer", "count"), [(F_MRG_RXBUF, 1536, 140), (0, 70000, 6)])
def test_frames_of_several_pieces(scene: Lab, mtu: int, mode: str, features: int, buffer: int, count: int) -> None:
    daemon = up(scene, "--xdp-mode", mode)
    facts = daemon.api("status")["nics"][0]["facts"]
    assert (facts["mtu"], facts["chunk"], facts["several_pieces"]) == (mtu, CHUNK, True)
    assert (facts["xdp_in_use"], facts["bind_in_use"]) == (mode, "copy")
    with NetDevice(daemon.socket("vm1"), features=BASE | features, memory_size=32 << 20) as device:
        device.up()
        device.post(count, buffer)
        with PacketSocket(scene.net, "eth0") as wire:
            sizes = lengths(mtu)
            frames = [noise(MAC, scene.net_mac, size) for size in sizes]
            receive(device, wire, frames)
            out = [noise(scene.net_mac, MAC, size) for size in sizes]
            for n, frame in enumerate(out):
                device.send(frame, cuts=range(1, len(frame), 5000) if n % 2 else ())
                wire.wait_received(MAC, n + 1)
                device.sent()
            assert wire.wait_received(MAC, len(out)) == out
    metrics = daemon.metrics()
    drops = metrics.by("reason", "xdpvhost_guest_drops_total")
    assert not any(drops.values()), drops
    for direction in ("rx", "tx"):
        assert metrics.total(f"xdpvhost_guest_{direction}_bytes_total") == sum(sizes)


@pytest.mark.parametrize("mtu", [9000])
@pytest.mark.parametrize("features", [0, F_GUEST_CSUM])
def test_checksums_over_all_pieces(scene: Lab, mtu: int, features: int) -> None:
    """The sender's stack leaves them to the device; the guest either may do that, too, or wants them finished."""
    daemon = up(scene)
    scene.net.ip("neigh", "add", guest_ip(1), "lladdr", MAC, "dev", "eth0", "nud", "permanent")
    features |= BASE | F_MRG_RXBUF | F_CSUM
    with NetDevice(daemon.socket("vm1"), features=features, memory_size=32 << 20) as device:
        device.up()
        device.post(128)
        with scene.net.entered():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender, PacketSocket(scene.net, "eth0") as wire:
            for number, size in enumerate((1, 1472, 1799, 3797, 3798, 3799, 7637, 7638, 8971, 8972)):
                payload = os.urandom(size)
                sender.sendto(payload, (guest_ip(1), 9))
                ((header, frame),) = device.receive(1)
                assert frame[42 : 42 + size] == payload
                open_sum = bool(header[0] & NEEDS_CSUM)
                assert open_sum == bool(features & F_GUEST_CSUM)
                length = 8 + size
                pseudo = frame[26:34] + struct.pack("!BBH", 0, socket.IPPROTO_UDP, length)
                if open_sum:
                    assert struct.unpack_from("<HH", header, 6) == (34, 6)
                    assert int.from_bytes(frame[40:42]) == internet_checksum(pseudo) ^ 0xFFFF
                else:
                    assert internet_checksum(pseudo + frame[34 : 34 + length]) == 0
                # and back, finished on the way out
                whole = bytearray(udp_frame(scene.net_mac, MAC, number=number, size=max(60, 42 + size)))
                right = bytes(whole)
                whole[40:42] = (internet_checksum(pseudo_of(right)) ^ 0xFFFF).to_bytes(2)
                device.send(bytes(whole), struct.pack("<BBHHHH", NEEDS_CSUM, 0, 0, 0, 34, 6))
                assert wire.wait_received(MAC, number + 1)[-1] == right


def pseudo_of(frame: bytes) -> bytes:
    return frame[26:34] + struct.pack("!BBH", 0, socket.IPPROTO_UDP, len(frame) - 34)


@pytest.mark.parametrize("mtu", [9000])
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_no_chunk_is_lost(scene: Lab, mode: str, mtu: int) -> None:
    """Three times as many chunks as a queue has, in both directions, past a guest that does not read for a while."""
    daemon = up(scene, "--xdp-mode", mode)
    count = 2048
    with NetDevice(daemon.socket("vm1"), memory_size=32 << 20) as device:
        device.up()
        frame = noise(MAC, scene.net_mac, 9014)
        back = noise(scene.net_mac, MAC, 9014)
        with PacketSocket(scene.net, "eth0") as wire:
            for _ in range(count // 8):  # nobody reads: the oldest make room
                wire.send([frame] * 8)
            daemon.wait_metric(count, "xdpvhost_xdp_verdicts_total", guest="vm1", verdict="redirect")
            device.post(128)
            kept = device.receive(1)
            metrics = daemon.metrics()
            dropped = metrics.total("xdpvhost_guest_drops_total", guest="vm1", reason="no_buffers")
            dropped += metrics.total("xdpvhost_xsk_drops_total", guest="vm1")
            kept += device.receive(count - dropped - len(kept))
            assert {f for _, f in kept} == {frame}
            for _ in range(3):
                new = noise(MAC, scene.net_mac, 9014)
                wire.send([new])
                assert [f for _, f in device.receive(1)] == [new]
            gpa = device.memory.alloc(12 + len(back))
            device.memory.write(gpa, bytes(12) + back)
            for _ in range(count // 32):
                for _ in range(32):
                    device.tx().add([Buffer(gpa, 12 + len(back))], publish=False)
                device.tx().publish()
                assert wire.wait_received(MAC, 32) == [back] * 32
                wire.frames.clear()
                wait_for(lambda: device.sent() or not device.tx().chains, 5, "used transmit buffers")


@pytest.mark.parametrize("mtu", [68])
def test_the_least_mtu(scene: Lab, mtu: int) -> None:
    daemon = up(scene)
    with NetDevice(daemon.socket("vm1"), features=BASE) as device:
        device.up()
        device.post(16)
        with PacketSocket(scene.net, "eth0") as wire:
            receive(device, wire, [noise(MAC, scene.net_mac, size) for size in (60, 81, 82)])
            for size in (60, 82, 83):
                device.send(noise(scene.net_mac, MAC, size))
            daemon.wait_metric(1, "xdpvhost_guest_drops_total", guest="vm1", reason="too_big", direction="tx")
            assert [len(frame) for frame in wire.wait_received(MAC, 2)] == [60, 82]


@pytest.mark.parametrize("mtu", [1500])
def test_the_mtu_changes(scene: Lab, mtu: int) -> None:
    """What guests send follows it, as far as the frames in use hold; what they receive never breaks anything."""
    daemon = up(scene)

    def change(to: int) -> None:
        for namespace, device in ((scene.net, "eth0"), (scene.host, "nic0")):
            namespace.ip("link", "set", device, "mtu", str(to))

    def in_use() -> int:
        return int(daemon.api("status")["nics"][0]["mtu"])

    with NetDevice(daemon.socket("vm1"), features=BASE) as device:
        device.up()
        device.post(16, 4096)
        with PacketSocket(scene.net, "eth0") as wire:
            for to, used in ((1400, 1400), (1700, 1700), (3000, 1766), (1500, 1500)):
                change(to)
                wait_for(lambda used=used: in_use() == used, 5, f"the daemon to use MTU {used}")
                device.send(noise(scene.net_mac, MAC, used + 15))
                device.send(noise(scene.net_mac, MAC, used + 14))
                sent = [len(frame) for frame in wire.wait_received(MAC, 1)]
                assert sent == [used + 14]
                wire.frames.clear()
                receive(device, wire, [noise(MAC, scene.net_mac, used + 14)])
            change(3000)
            wire.send([noise(MAC, scene.net_mac, 3000)])  # larger than a frame of UMEM: the kernel drops and counts it
            receive(device, wire, [noise(MAC, scene.net_mac, 60)])
    assert "its MTU is now 3000" in daemon.process.log()
