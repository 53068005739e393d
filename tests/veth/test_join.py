# SPDX-License-Identifier: Apache-2.0
"""Segments that come from a wire, with finished checksums, reach a guest joined: verified, or not joined at all."""

import os
import socket
import struct
from collections.abc import Iterator

import pytest

from support.frames import PacketSocket, internet_checksum, mac_bytes, udp_frame
from support.frontend import F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_MRG_RXBUF, F_PROTOCOL, F_VERSION_1, NetDevice
from support.lab import Lab, guest_mac, spec

MAC = guest_mac(1)
F_GUEST_USO4, F_GUEST_USO6 = 1 << 54, 1 << 55
FEATURES = F_VERSION_1 | F_PROTOCOL | F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6
MSS = 1448
COUNT = 23  # in one burst, and together below 64 KiB
TCPV4, UDP_L4 = 1, 5


def segment(source: str, payload: bytes, number: int, sequence: int) -> bytes:
    """Ethernet, IPv4, TCP with an acknowledgement and a time-stamp option, all sums right."""
    addresses = socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.11")
    options = struct.pack("!BBBBII", 1, 1, 8, 10, 77, 88)
    tcp = struct.pack("!HHIIBBHHH", 5000, 80, sequence, 9, 8 << 4, 0x10, 512, 0, 0) + options + payload
    pseudo = addresses + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", internet_checksum(pseudo + tcp)) + tcp[18:]
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), number, 0x4000, 64, socket.IPPROTO_TCP, 0) + addresses
    ip = ip[:10] + struct.pack("!H", internet_checksum(ip)) + ip[12:]
    return mac_bytes(MAC) + mac_bytes(source) + b"\x08\x00" + ip + tcp


@pytest.fixture
def scene() -> Iterator[Lab]:
    with Lab(quiet=True, queues=1) as lab:
        yield lab


def receive(scene: Lab, features: int, frames: list[bytes], expected: int) -> list[tuple[bytes, bytes]]:
    """What the guest gets when all of them have come before it has buffers: the worker then has them in one burst."""
    daemon = scene.up([spec(1)])
    with NetDevice(daemon.socket("vm1"), features=features, memory_size=16 << 20) as device:
        device.up()
        with PacketSocket(scene.net, "eth0") as wire:
            wire.send(frames)
            daemon.wait_metric(len(frames), "xdpvhost_xdp_verdicts_total", guest="vm1", verdict="redirect")
            device.post(128, 1536)
            got = device.receive(expected)
    metrics = daemon.metrics()
    assert not any(metrics.by("reason", "xdpvhost_guest_drops_total").values())
    return got


def test_tcp_is_joined(scene: Lab) -> None:
    payload = os.urandom(MSS * COUNT - 5)
    parts = [payload[at : at + MSS] for at in range(0, len(payload), MSS)]
    frames = [segment(scene.net_mac, part, 7 + n, 1000 + n * MSS) for n, part in enumerate(parts)]
    ((header, frame),) = receive(scene, FEATURES, frames, 1)
    flags, kind, _, size, start, offset, _ = struct.unpack("<BBHHHHH", header)
    assert (flags, kind, size, start, offset) == (1, TCPV4, MSS, 34, 16)
    assert frame[66:] == payload
    assert struct.unpack_from("!H", frame, 16) == (len(frame) - 14,)
    assert internet_checksum(frame[14:34]) == 0
    assert frame[:16] + frame[18:24] + frame[26:50] + frame[52:66] == (
        frames[0][:16] + frames[0][18:24] + frames[0][26:50] + frames[0][52:66]
    )


@pytest.mark.parametrize("bad", [0, 11, COUNT - 1])
def test_a_damaged_segment_is_seen_by_the_guest(scene: Lab, bad: int) -> None:
    frames = [segment(scene.net_mac, os.urandom(MSS), 7 + n, 1000 + n * MSS) for n in range(COUNT)]
    frames[bad] = frames[bad][:900] + bytes([frames[bad][900] ^ 1]) + frames[bad][901:]
    got = receive(scene, FEATURES, frames, COUNT)
    assert [frame for _, frame in got] == frames
    assert all(header[:2] == b"\0\0" for header, _ in got)


@pytest.mark.parametrize("negotiated", [False, True])
def test_udp_is_joined_where_that_was_negotiated(scene: Lab, negotiated: bool) -> None:
    frames = [udp_frame(MAC, scene.net_mac, number=n, size=1042) for n in range(COUNT)]
    features = FEATURES | (F_GUEST_USO4 | F_GUEST_USO6 if negotiated else 0)
    got = receive(scene, features, frames, 1 if negotiated else COUNT)
    if negotiated:
        ((header, frame),) = got
        assert struct.unpack_from("<BBHHHH", header) == (1, UDP_L4, 42, 1000, 34, 6)
        assert frame[42:] == b"".join(sent[42:] for sent in frames)
    else:
        assert [frame for _, frame in got] == frames
