# SPDX-License-Identifier: Apache-2.0
"""Blocks of pcapng (draft-ietf-opsawg-pcapng): those around the frames' own, which the native reader makes."""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .. import __version__

SHB, IDB, ISB, EPB = 0x0A0D0D0A, 1, 5, 6
BYTE_ORDER = 0x1A2B3C4D
LINKTYPE_ETHERNET = 1
NANOSECONDS = 9  # if_tsresol
FLAG_IN, FLAG_OUT = 1, 2

Option = tuple[int, bytes]


def _block(kind: int, body: bytes, options: list[Option]) -> bytes:
    for code, value in options:
        body += struct.pack("=HH", code, len(value)) + value + bytes(-len(value) % 4)
    if options:
        body += struct.pack("=HH", 0, 0)
    length = struct.pack("=I", len(body) + 12)
    return struct.pack("=I", kind) + length + body + length


def section_header() -> bytes:
    """Section Header Block, of a section whose length is not told."""
    application = f"xdpvhost {__version__}"
    options = [(3, f"{platform.system()} {platform.release()}".encode()), (4, application.encode())]
    return _block(SHB, struct.pack("=IHHq", BYTE_ORDER, 1, 0, -1), options)


def interface(name: str, description: str, snaplen: int, expression: str | None) -> bytes:
    """Interface Description Block: times in nanoseconds; `expression` is the filter that was asked for."""
    options = [(2, name.encode()), (3, description.encode()), (9, bytes([NANOSECONDS]))]
    if expression:
        options.append((11, b"\0" + expression.encode(errors="replace")))  # 0: a string follows
    return _block(IDB, struct.pack("=HHI", LINKTYPE_ETHERNET, 0, snaplen), options)


def statistics(begin: int, end: int, seen: int, lost: int, taken: int) -> bytes:
    """Interface Statistics Block. Times in ns since the epoch; frames looked at, lost before that, and in the file."""

    def stamp(when: int) -> bytes:
        return struct.pack("=II", when >> 32, when & 0xFFFFFFFF)

    options = [(2, stamp(begin)), (3, stamp(end))]
    options += [(code, struct.pack("=Q", n)) for code, n in ((4, seen + lost), (5, lost), (6, taken), (8, taken))]
    return _block(ISB, struct.pack("=I", 0) + stamp(end), options)


def whole(data: memoryview) -> int:
    """How many of the leading bytes are whole blocks."""
    at = 0
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("=I", data, at + 4)
        if length < 12 or at + length > len(data):
            break
        at += length
    return at


class Options(NamedTuple):
    """Of an Enhanced Packet Block, those that we write ourselves."""

    flags: int
    comment: str


@dataclass(frozen=True)
class Packet:
    """One Enhanced Packet Block: time in ns since the epoch, the bytes that were kept, the frame's own length."""

    time: int
    data: bytes
    length: int
    flags: int
    comment: str


def packets(blocks: memoryview) -> Iterator[Packet]:
    """The frames in whole blocks that the native reader made."""
    at = 0
    while at < len(blocks):
        _kind, length, _interface, high, low, kept, original = struct.unpack_from("=7I", blocks, at)
        data = bytes(blocks[at + 28 : at + 28 + kept])
        options = _options(blocks[at + 28 + kept + -kept % 4 : at + length - 4])
        yield Packet(high << 32 | low, data, original, options.flags, options.comment)
        at += length


def _options(data: memoryview) -> Options:
    at, flags, comment = 0, 0, ""
    while at + 4 <= len(data):
        code, length = struct.unpack_from("=HH", data, at)
        value = data[at + 4 : at + 4 + length]
        if code == 0:
            break
        if code == 1:
            comment = bytes(value).decode()
        elif code == 2:
            (flags,) = struct.unpack("=I", value)
        at += 4 + length + -length % 4
    return Options(flags, comment)
