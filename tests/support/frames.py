# SPDX-License-Identifier: Apache-2.0
"""Raw Ethernet frames into and out of a device, by packet sockets."""

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from .netns import Namespace
from .process import run, wait_for

ETH_P_ALL = 3
PACKET_OUTGOING = 4
SO_RCVBUFFORCE = 33


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def udp_frame(
    destination: str,
    source: str,
    *,
    size: int = 64,
    number: int = 0,
    ip_source: str = "192.0.2.1",
    ip_destination: str = "192.0.2.11",
    ports: tuple[int, int] = (9, 9),
) -> bytes:
    """An Ethernet frame of `size` bytes without FCS: IPv4, UDP with a right checksum, `number` opens the payload."""
    payload = struct.pack("!I", number).ljust(size - 14 - 20 - 8, b"\0")
    addresses = ipaddress.IPv4Address(ip_source).packed + ipaddress.IPv4Address(ip_destination).packed
    udp = struct.pack("!HHHH", *ports, 8 + len(payload), 0) + payload
    pseudo = addresses + struct.pack("!BBH", 0, socket.IPPROTO_UDP, len(udp))
    udp = udp[:6] + struct.pack("!H", internet_checksum(pseudo + udp) or 0xFFFF) + udp[8:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), number & 0xFFFF, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    header = header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:]
    return mac_bytes(destination) + mac_bytes(source) + b"\x08\x00" + header + udp


def set_transmit_queue(namespace: Namespace, device: str, queue: int) -> None:
    """What this device sends from now on leaves by that one of its transmit queues (XPS: from every CPU to it).

    A connected socket keeps the queue that it had; a packet socket follows.
    """
    every = ",".join(f"{word:08x}" for word in _cpu_mask_words())
    queues = f"/sys/class/net/{device}/queues"
    script = f"for q in {queues}/tx-*; do echo 0 >$q/xps_cpus; done; echo {every} >{queues}/tx-{queue}/xps_cpus"
    run(namespace.argv(["sh", "-ec", script], own_sysfs=True))


def _cpu_mask_words() -> list[int]:
    """A bit for each CPU, in words of 32 bits, highest first (Documentation/networking/scaling.rst)."""
    mask = (1 << (os.cpu_count() or 1)) - 1
    words = []
    while mask:
        words.append(mask & 0xFFFFFFFF)
        mask >>= 32
    return words[::-1]


class PacketSocket:
    """A packet socket on a device: sends frames, and collects what comes in from the wire."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        with namespace.entered():
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            self.socket.bind((device, ETH_P_ALL))
        self.frames: list[bytes] = []

    def send(self, frames: Iterable[bytes]) -> None:
        self.socket.setblocking(True)
        for frame in frames:
            self.socket.send(frame)
        self.socket.setblocking(False)

    def collect(self) -> list[bytes]:
        """Everything that has arrived since the socket was opened."""
        while True:
            try:
                frame, address = self.socket.recvfrom(1 << 17)
            except BlockingIOError:
                return self.frames
            if address[2] != PACKET_OUTGOING:
                self.frames.append(frame)

    def received_from(self, mac: str) -> list[bytes]:
        source = mac_bytes(mac)
        return [f for f in self.collect() if f[6:12] == source]

    def wait_received(self, mac: str, count: int, deadline: float = 10) -> list[bytes]:
        """Waits until `count` frames or more with that source address have arrived."""

        def enough() -> list[bytes] | None:
            frames = self.received_from(mac)
            return frames if len(frames) >= count else None

        frames = wait_for(enough, deadline, f"{count} frames from {mac}")
        assert frames is not None
        return frames

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
