# SPDX-License-Identifier: Apache-2.0
"""A frame in one line, for a terminal. Whoever wants more has tcpdump or Wireshark read the pcapng."""

from __future__ import annotations

import time

from .pcapng import FLAG_OUT, Packet

TYPES = {
    0x0800: "IPv4",
    0x0806: "ARP",
    0x8035: "RARP",
    0x86DD: "IPv6",
    0x8847: "MPLS",
    0x8863: "PPPoE discovery",
    0x8864: "PPPoE",
    0x88CC: "LLDP",
}
TAGS = {b"\x81\x00": "vlan", b"\x88\xa8": "service vlan"}


def line(packet: Packet) -> str:
    """Time, direction, addresses, tags, type, length, and why it was dropped."""
    seconds, nanoseconds = divmod(packet.time, 10**9)
    words = [time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{nanoseconds // 1000:06d}"]
    words.append("Out" if packet.flags & 3 == FLAG_OUT else "In ")
    parts = _headers(packet.data)
    parts.append(f"length {packet.length}")
    if packet.comment:
        parts.append(packet.comment)
    return f"{' '.join(words)} {', '.join(parts)}"


def _headers(data: bytes) -> list[str]:
    if len(data) < 14:
        return []
    parts = [f"{data[6:12].hex(':')} > {data[:6].hex(':')}"]
    at = 12
    while (tag := TAGS.get(data[at : at + 2])) and len(data) >= at + 6:
        parts.append(f"{tag} {int.from_bytes(data[at + 2 : at + 4]) & 0xFFF}")
        at += 4
    kind = int.from_bytes(data[at : at + 2])
    parts.append("LLC" if kind < 0x600 else f"{TYPES.get(kind, 'type')} ({kind:#06x})")
    return parts
