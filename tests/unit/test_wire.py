# SPDX-License-Identifier: Apache-2.0
"""The codec: what is packed is parsed, and whatever is not a message is a ProtocolError and nothing else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpvhost.vhost import wire
from xdpvhost.vhost.errors import ProtocolError, Violation

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
PAYLOADS = (
    wire.Empty,
    wire.U64,
    wire.VringState,
    wire.VringAddr,
    wire.VringFile,
    wire.MemTable,
    wire.SingleRegion,
    wire.Config,
)


@st.composite
def regions(draw: st.DrawFn) -> wire.MemRegion:
    size = draw(st.integers(1, 2**63))
    start = st.integers(0, 2**64 - 1 - size)
    return wire.MemRegion(draw(start), size, draw(start), draw(start))


payloads = st.one_of(
    st.just(wire.Empty()),
    st.builds(wire.U64, u64),
    st.builds(wire.VringState, u32, u32),
    st.builds(
        wire.VringAddr,
        index=u32,
        flags=st.sampled_from((0, 1)),
        desc=u64.map(lambda v: v & ~15),
        used=u64.map(lambda v: v & ~3),
        avail=u64.map(lambda v: v & ~1),
        log=u64,
    ),
    st.builds(wire.VringFile, st.integers(0, 255), st.booleans()),
    st.lists(regions(), min_size=1, max_size=8).map(lambda rs: wire.MemTable(tuple(rs))),
    st.builds(wire.SingleRegion, regions()),
    st.builds(wire.Config, u32, u32, st.binary(max_size=256)),
)


@given(payloads)
def test_packed_is_parsed(payload: wire.Payload) -> None:
    packed = payload.pack()  # type: ignore[attr-defined]
    assert type(payload).parse(packed) == payload  # type: ignore[attr-defined]


@given(st.sampled_from(PAYLOADS), st.binary(max_size=300))
def test_anything_else_is_a_protocol_error(payload: type, data: bytes) -> None:
    try:
        parsed = payload.parse(data)  # type: ignore[attr-defined]
    except ProtocolError:
        return
    if payload is not wire.MemTable and payload is not wire.SingleRegion:
        assert parsed.pack() == data


@given(st.binary(min_size=12, max_size=12))
def test_header(data: bytes) -> None:
    request, flags, size = struct.unpack("=III", data)
    good = flags & 3 == 1 and not flags & ~0b1011 and size <= wire.MAX_PAYLOAD
    try:
        header = wire.Header.parse(data)
    except ProtocolError:
        assert not good
    else:
        assert good
        assert (header.request, header.size, header.need_reply) == (request, size, bool(flags & 8))


@pytest.mark.parametrize(
    ("request_", "flags", "size", "violation", "words"),
    [
        (1, 0, 0, Violation.HEADER, "version 0"),
        (1, 2, 0, Violation.HEADER, "version 2"),
        (1, 5, 0, Violation.HEADER, "reply flag"),
        (1, 0x11, 0, Violation.HEADER, "unknown flags"),
        (5, 1, 4097, Violation.SIZE, "SET_MEM_TABLE announces 4097"),
        (99, 1, 2**32 - 1, Violation.SIZE, "request 99"),
    ],
)
def test_bad_header_says_why(request_: int, flags: int, size: int, violation: Violation, words: str) -> None:
    with pytest.raises(ProtocolError, match=words) as caught:
        wire.Header.parse(struct.pack("=III", request_, flags, size))
    assert caught.value.violation is violation


@pytest.mark.parametrize(
    ("payload", "data", "violation"),
    [
        (wire.MemTable, b"\0" * 7, Violation.SIZE),
        (wire.MemTable, struct.pack("=II", 0, 0), Violation.VALUE),
        (wire.MemTable, struct.pack("=II", 9, 0) + b"\1" * 288, Violation.VALUE),
        (wire.MemTable, struct.pack("=II", 2, 0) + struct.pack("=QQQQ", 0, 1, 0, 0), Violation.SIZE),
        (wire.MemTable, struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 0, 0, 0, 0), Violation.VALUE),
        (wire.MemTable, struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 2**64 - 1, 1, 0, 0), Violation.VALUE),
        (wire.MemTable, struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 0, 4096, 2**64 - 4096, 0), Violation.VALUE),
        (wire.MemTable, struct.pack("=II", 1, 0) + struct.pack("=QQQQ", 0, 2**63, 0, 2**63), Violation.VALUE),
        (wire.VringFile, struct.pack("=Q", 0x10000), Violation.VALUE),
        (wire.VringFile, struct.pack("=Q", 0x200), Violation.VALUE),
        (wire.VringAddr, struct.pack("=IIQQQQ", 0, 2, 0, 0, 0, 0), Violation.VALUE),
        (wire.VringAddr, struct.pack("=IIQQQQ", 0, 0, 8, 0, 0, 0), Violation.VALUE),
        (wire.VringAddr, struct.pack("=IIQQQQ", 0, 0, 0, 2, 0, 0), Violation.VALUE),
        (wire.VringAddr, struct.pack("=IIQQQQ", 0, 0, 0, 0, 1, 0), Violation.VALUE),
        (wire.Config, struct.pack("=III", 0, 257, 0) + b"\0" * 257, Violation.VALUE),
        (wire.Config, struct.pack("=III", 0, 8, 0), Violation.SIZE),
        (wire.Empty, b"\0", Violation.SIZE),
        (wire.U64, b"\0" * 4, Violation.SIZE),
    ],
)
def test_bad_payload_says_why(payload: type, data: bytes, violation: Violation) -> None:
    with pytest.raises(ProtocolError) as caught:
        payload.parse(data)  # type: ignore[attr-defined]
    assert caught.value.violation is violation


def test_memory_table_may_have_room_for_more_regions() -> None:
    """User-Mode Linux announces one region in a payload of two."""
    region = wire.MemRegion(4096, 8192, 4096, 0)
    packed = struct.pack("=II", 1, 0) + region.pack() + bytes(32)
    assert wire.MemTable.parse(packed).regions == (region,)


def test_net_config_layout() -> None:
    mac = bytes.fromhex("525400000001")
    space = wire.net_config(mac, 4, 1500, wire.NetState())
    assert len(space) == 24
    assert space[:6] == mac
    assert struct.unpack_from("=HHHIBBHI", space, 6) == (1, 4, 1500, 0xFFFFFFFF, 0xFF, 0, 0, 0)
    state = wire.NetState(link_up=False, announce=True, speed=25000, duplex=1)
    space = wire.net_config(mac, 4, 1500, state, rss=True)
    assert struct.unpack_from("=HHHIBBHI", space, 6) == (2, 4, 1500, 25000, 1, 40, 128, 0x1FF)


def test_reply_flags_are_exact() -> None:
    assert struct.unpack_from("=III", wire.reply(1, b"12345678")) == (1, 5, 8)
