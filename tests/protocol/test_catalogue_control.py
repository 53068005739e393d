# SPDX-License-Identifier: Apache-2.0
"""The checklist for hostile front-ends, its control socket: items C1 to C14, a test or more for each.

Whatever a front-end sends, its own session is all that it can lose. Two other guests exchange frames through all of
it (support/arena.py): none is lost, and no descriptor, mapping or ring stays. docs/hostile-guests.md has the list.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import wirefuzz
from support.arena import MACS, Arena, mapped_files, numbered
from support.endpoint import fd_count
from support.frontend import (
    F_LOG_ALL,
    F_PACKED,
    F_PROTOCOL,
    F_VERSION_1,
    NEED_REPLY,
    P_LOG_SHMFD,
    P_MEM_SLOTS,
    P_MQ,
    P_REPLY_ACK,
    Disconnected,
    FrontEnd,
    GuestMemory,
    NetDevice,
    Slot,
)
from support.linger import LINGER, lingering
from support.process import wait_for
from xdpvhost.errors import ConfigError
from xdpvhost.vhost import closer, memory
from xdpvhost.vhost.backend import TABLE
from xdpvhost.vhost.endpoint import Endpoint
from xdpvhost.vhost.errors import Violation
from xdpvhost.vhost.memory import Mapping
from xdpvhost.vhost.offered import UNSUPPORTED
from xdpvhost.vhost.wire import Request

REQUESTS = [*range(51), 2**31, 2**32 - 1]
PAYLOADS = {
    "none": 0,
    "u64": 8,
    "vring state": 8,
    "log description": 16,
    "in-flight description": 24,
    "device state transfer": 8,
}


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("arena"))
    try:
        yield arena
    finally:
        arena.close()


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Arena]:
    """A back-end that waits only 0.2 s for the rest of a message or for its replies to be read."""
    arena = Arena(tmp_path, timeout=0.2)
    try:
        yield arena
    finally:
        arena.close()


FULL = F_PROTOCOL | F_VERSION_1
LOGGING = P_MQ | P_REPLY_ACK | P_LOG_SHMFD


# ---- C1 ----


@pytest.mark.parametrize("size", [0, 1, 7, 8, 12, 40, 300])
def test_c1_every_request_with_any_size(arena: Arena, size: int) -> None:
    arena.survives(*(lambda front, r=request: front.send(r, bytes(size)) for request in REQUESTS))


def test_c1_payload_one_byte_too_long(arena: Arena) -> None:
    arena.survives(*(lambda front, r=request: front.send(r, bytes(513)) for request in REQUESTS))
    for request, entry in TABLE.items():
        size = PAYLOADS.get(entry.payload.NAME, 40) + 1
        arena.refused(
            lambda front, r=request, n=size: front.send(r, bytes(n)), Violation.SIZE, Violation.VALUE, Violation.FDS
        )


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0xD, 0x11, 0xFFFFFFFF])
def test_c1_flags(arena: Arena, flags: int) -> None:
    arena.refused(lambda front: front.send(Request.GET_FEATURES, flags=flags), Violation.HEADER)


@pytest.mark.parametrize("size", [513, 4096, 2**31, 2**32 - 1])
def test_c1_announced_size(arena: Arena, size: int) -> None:
    arena.refused(lambda front: front.send_raw(struct.pack("=III", 5, 1, size)), Violation.SIZE)


@pytest.mark.parametrize("request_", [*UNSUPPORTED, 0, 45, 50, 2**31])
def test_c1_unknown_requests_end_the_session(arena: Arena, request_: int) -> None:
    words = arena.refused(lambda front: front.send(request_), Violation.REQUEST)
    assert "not a request that xdpvhost offers" in words


def test_c1_unknown_request_is_answered_first_when_asked(arena: Arena) -> None:
    with arena.connect() as front:
        front.set_protocol_features(P_REPLY_ACK)
        front.tell(Request.GPU_SET_SOCKET, expect=1)
        assert front.disconnected()
    arena.idle()


# ---- C2 ----


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 32])
def test_c2_every_request_with_any_number_of_descriptors(arena: Arena, count: int) -> None:
    with open(os.devnull) as null:
        payloads = {r: bytes(PAYLOADS.get(TABLE[r].payload.NAME, 40) if r in TABLE else 0) for r in range(1, 45)}
        arena.survives(
            *(lambda front, r=r, p=p: front.send(r, p, [null.fileno()] * count) for r, p in payloads.items())
        )


@pytest.mark.parametrize("count", [1, 8])
def test_c2_surplus_descriptors_are_refused(arena: Arena, count: int) -> None:
    with open(os.devnull) as null:
        arena.refused(lambda front: front.send(Request.GET_FEATURES, b"", [null.fileno()] * count), Violation.FDS)


def test_c2_more_descriptors_than_a_message_may_have(arena: Arena) -> None:
    with open(os.devnull) as null:
        words = arena.refused(lambda front: front.send(Request.GET_FEATURES, b"", [null.fileno()] * 9), Violation.FDS)
    assert "more than 8" in words


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
@pytest.mark.parametrize("path", ["/dev/null", "/", "/proc/self/status"])
def test_c2_descriptor_of_the_wrong_kind(arena: Arena, request_: int, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        words = arena.refused(lambda front: front.send(request_, bytes(8), [fd]), Violation.FDS)
        assert "an eventfd, a pipe or a unix stream socket is needed" in words
    finally:
        os.close(fd)


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_BACKEND_REQ_FD])
@pytest.mark.parametrize(
    ("family", "kind"), [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)]
)
def test_c2_socket_of_the_wrong_kind(arena: Arena, request_: int, family: int, kind: int) -> None:
    payload = b"" if request_ == Request.SET_BACKEND_REQ_FD else bytes(8)
    with socket.socket(family, kind) as sock:
        words = arena.refused(lambda front: front.send(request_, payload, [sock.fileno()]), Violation.FDS)
    assert "a socket that is not a unix stream" in words


def test_c2_backend_channel_must_be_a_socket(arena: Arena) -> None:
    reading, writing = os.pipe()
    try:
        arena.refused(lambda front: front.send(Request.SET_BACKEND_REQ_FD, b"", [writing]), Violation.FDS)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("path", ["/dev/null", "/", "/dev/zero"])
def test_c2_memory_of_the_wrong_kind(arena: Arena, path: str) -> None:
    table = struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0)
    fd = os.open(path, os.O_RDONLY)
    try:
        arena.refused(lambda front: front.send(Request.SET_MEM_TABLE, table, [fd]), Violation.MEMORY)
    finally:
        os.close(fd)


def test_c2_read_only_memory(arena: Arena) -> None:
    table = struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4096)
        fd = os.open(file.name, os.O_RDONLY)
        try:
            arena.refused(lambda front: front.send(Request.SET_MEM_TABLE, table, [fd]), Violation.MEMORY)
        finally:
            os.close(fd)


def buried(fd: int) -> int:
    """A unix socket in whose queue the descriptor lies."""
    here, there = socket.socketpair()
    with here:
        socket.send_fds(here, [b"x"], [fd])
    return there.detach()


def nine(front: FrontEnd, fd: int) -> None:
    with open(os.devnull) as null:
        front.send(Request.GET_FEATURES, b"", [*[null.fileno()] * 8, fd])


def unread(front: FrontEnd, fd: int) -> None:
    """Behind a bad message, while the daemon is still at those before it."""
    front.send_raw(struct.pack("=III", Request.SET_OWNER, 1, 0) * 200 + struct.pack("=III", 99, 1, 0))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        front.send_raw(b"y", [fd])


def inside_another(front: FrontEnd, fd: int) -> None:
    outer = buried(fd)
    try:
        front.send(Request.SET_VRING_ERR, bytes(8), [outer])
    finally:
        os.close(outer)
    front.sync()
    front.sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("how", [nine, unread, inside_another], ids=lambda how: how.__name__)
def test_c2_descriptor_that_lingers(arena: Arena, how: Callable[[FrontEnd, int], None]) -> None:
    """Closing it takes seconds; whoever drops the last reference waits, be that in recvmsg or in close."""
    with arena.nothing_left():
        with lingering() as (fd, _peer), arena.connect() as front:
            how(front, fd)
            os.close(fd)
            assert front.disconnected()
            arena.idle()
            assert arena.plane.loop.longest(LINGER / 2) < LINGER / 4


def test_c2_many_descriptors_that_linger(impatient: Arena) -> None:
    """Each is closed in a thread; above a few of them nothing more is read, and then the session ends."""
    arena = impatient
    with arena.nothing_left(), contextlib.ExitStack() as peers:
        before = threading.active_count()
        with arena.connect() as front:
            for _ in range(4 * closer.MOST):
                fd, _peer = peers.enter_context(lingering())
                outer = buried(fd)
                os.close(fd)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    front.send(Request.SET_VRING_ERR, bytes(8), [outer])
                os.close(outer)
            assert front.disconnected()
        arena.idle()
        assert threading.active_count() <= before + closer.MOST
        assert arena.plane.loop.longest(LINGER / 8) < LINGER / 8
    assert "do not close" in str(arena.errors[-1])


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_BACKEND_REQ_FD])
def test_c2_own_end_of_the_connection(arena: Arena, request_: int) -> None:
    """Kept by the daemon it would keep the session alive when the front-end is gone."""
    payload = b"" if request_ == Request.SET_BACKEND_REQ_FD else bytes(8)
    words = arena.refused(lambda front: front.send(request_, payload, [front.sock.fileno()]), Violation.FDS)
    assert "made by name" in words


# ---- C3 ----


def test_c3_one_byte_at_a_time(arena: Arena) -> None:
    memory = GuestMemory()
    with arena.connect() as front:
        for byte in struct.pack("=III", Request.GET_FEATURES, 1, 0):
            front.send_raw(bytes([byte]))
        assert len(front.receive()[2]) == 8
        table = struct.pack("=III", 5, 1, 40) + struct.pack("=II", 1, 0) + memory.slots[0].pack()
        front.send_raw(table[:1], [memory.fd])
        for at in range(1, len(table)):
            front.send_raw(table[at : at + 1])
        front.sync()
        assert arena.endpoint.summary["regions"] == 1
    memory.close()
    arena.idle()


def test_c3_two_messages_in_one_write(arena: Arena) -> None:
    with arena.connect() as front:
        front.send_raw(struct.pack("=III", Request.GET_FEATURES, 1, 0) * 3)
        assert [len(front.receive()[2]) for _ in range(3)] == [8, 8, 8]


@pytest.mark.parametrize("sent", range(1, 20))
def test_c3_half_a_message(arena: Arena, sent: int) -> None:
    whole = struct.pack("=IIIQ", Request.SET_FEATURES, 1, 8, 0)

    def attack(front: FrontEnd) -> None:
        front.send_raw(whole[:sent])
        front.sock.shutdown(1)

    assert "in the middle of" in arena.refused(attack, Violation.TRUNCATED)


@pytest.mark.parametrize("cut", [12, 16])
def test_c3_descriptors_with_the_second_half(arena: Arena, cut: int) -> None:
    fd = os.eventfd(0)
    whole = struct.pack("=IIIQ", Request.SET_VRING_KICK, 1, 8, 0)

    def attack(front: FrontEnd) -> None:
        front.send_raw(whole[:cut])
        front.send_raw(whole[cut:], [fd])

    try:
        arena.refused(attack, Violation.FDS)
    finally:
        os.close(fd)


def test_c3_message_that_never_ends(impatient: Arena) -> None:
    words = impatient.refused(lambda front: front.send_raw(b"\1\0\0\0"), Violation.TRUNCATED)
    assert "did not end within" in words


# ---- C4 ----


@pytest.mark.parametrize("index", [3, 255, 256, 0x10000, 2**32 - 1])
@pytest.mark.parametrize(
    "request_",
    [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.GET_VRING_BASE, Request.SET_VRING_ENABLE],
)
def test_c4_ring_number(arena: Arena, request_: int, index: int) -> None:
    arena.refused(lambda front: front.send(request_, struct.pack("=II", index, 1)), Violation.VALUE)


@pytest.mark.parametrize("index", [3, 255, 256, 2**32 - 1])
def test_c4_ring_number_of_an_address(arena: Arena, index: int) -> None:
    arena.refused(
        lambda front: front.send(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, 0, 0, 0, 0)),
        Violation.VALUE,
    )


@pytest.mark.parametrize("value", [3, 0xFF, 0x200, 0x10000, 2**63])
@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_c4_ring_number_of_a_descriptor(arena: Arena, request_: int, value: int) -> None:
    fd = os.eventfd(0)
    try:
        arena.refused(lambda front: front.send(request_, struct.pack("=Q", value), [fd]), Violation.VALUE)
        arena.refused(lambda front: front.send(request_, struct.pack("=Q", 0x100), [fd]), Violation.FDS)
        arena.refused(lambda front: front.send(request_, struct.pack("=Q", 0)), Violation.FDS)
    finally:
        os.close(fd)


# ---- C5 ----

PAGE = 4096
FILE = 16 * PAGE


def table(*slots: Slot) -> bytes:
    return struct.pack("=II", len(slots), 0) + b"".join(slot.pack() for slot in slots)


@pytest.mark.parametrize(
    ("slots", "violation"),
    [
        ([], Violation.VALUE),
        ([Slot(i * PAGE, PAGE, i * PAGE, 0) for i in range(9)], Violation.VALUE),
        ([Slot(0, 0, 0, 0)], Violation.VALUE),
        ([Slot(0, PAGE, 0, 2**64 - PAGE)], Violation.VALUE),
        ([Slot(2**64 - PAGE, PAGE, 0, 0)], Violation.VALUE),
        ([Slot(0, FILE + 1, 0, 0)], Violation.MEMORY),
        ([Slot(0, FILE, 0, 1)], Violation.MEMORY),
        ([Slot(0, PAGE, 0, FILE)], Violation.MEMORY),
        ([Slot(0, 2**62, 0, 0)], Violation.MEMORY),
        ([Slot(i << 43, 9 << 40, i << 43, 0) for i in range(0, 4, 2)], Violation.MEMORY),
        ([Slot(0, 2 * PAGE, 0, 0), Slot(PAGE, PAGE, 1 << 30, 0)], Violation.MEMORY),
        ([Slot(0, PAGE, 0, 0), Slot(0, PAGE, 1 << 30, 0)], Violation.MEMORY),
    ],
    ids=str,
)
def test_c5_memory_table(arena: Arena, slots: list[Slot], violation: Violation) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, FILE)
    try:
        fds = [fd] * min(len(slots), 8)
        arena.refused(lambda front: front.send(Request.SET_MEM_TABLE, table(*slots), fds), violation)
        if len(slots) == 1 and violation is Violation.MEMORY:
            add = bytes(8) + slots[0].pack()
            arena.refused(lambda front: front.send(Request.ADD_MEM_REG, add, [fd]), violation)
    finally:
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_c5_table_with_the_wrong_number_of_files(arena: Arena, count: int) -> None:
    memory = GuestMemory()
    body = table(*memory.split(PAGE))
    arena.refused(lambda front: front.send(Request.SET_MEM_TABLE, body, [memory.fd] * count), Violation.FDS)
    memory.close()


def test_c5_a_guest_has_its_share_of_addresses(arena: Arena) -> None:
    """Sparse files cost a front-end nothing, the daemon's addresses are everyone's."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 << 40)
    try:
        slots = [Slot(0, 8 << 40, 0, 8 << 40), Slot(8 << 40, 8 << 40, 8 << 40, 0)]
        with arena.connect() as front:
            front.set_protocol_features(P_MEM_SLOTS)
            front.set_mem_table(slots, [fd, fd])
            front.sync()
            front.add_mem_reg(Slot(16 << 40, PAGE, 16 << 40, 0), fd)
            assert front.disconnected()
        arena.idle()
        assert "a guest can have" in str(arena.errors[-1])
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "limit", "words"),
    [
        ("MAX_MAPPED", lambda: Mapping.mapped + PAGE, "all guests together can have"),
        ("max_mappings", lambda: lambda: Mapping.count, "raise sysctl vm.max_map_count"),
    ],
)
def test_c5_all_guests_leave_some(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, name: str, limit: Callable[[], object], words: str
) -> None:
    """Addresses and mappings are the process's; a front-end that would take the last of them is refused."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2 * PAGE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, limit())
            one = table(Slot(0, 2 * PAGE, 0, 0))
            told = arena.refused(lambda front: front.send(Request.SET_MEM_TABLE, one, [fd]), Violation.MEMORY)
        assert words in told
    finally:
        os.close(fd)


def test_c5_removed_region_must_exist_and_added_one_must_not(arena: Arena) -> None:
    memory = GuestMemory()
    slot = memory.slots[0]
    body = bytes(8) + slot.pack()

    def add_twice(front: FrontEnd) -> None:
        front.send(Request.ADD_MEM_REG, body, [memory.fd])
        front.send(Request.ADD_MEM_REG, body, [memory.fd])

    arena.refused(lambda front: front.send(Request.REM_MEM_REG, body), Violation.MEMORY)
    arena.refused(add_twice, Violation.MEMORY)
    memory.close()


# ---- C6, C7, C8, C9: values ----


def set_up(device: NetDevice, front: FrontEnd, kind: int = 0) -> None:
    front.set_protocol_features(P_MEM_SLOTS)
    front.set_features(FULL | kind)
    front.set_mem_table(device.memory.split(1 << 20), [device.memory.fd] * 2)


@pytest.mark.parametrize(
    "where",
    ["unmapped", "straddling", "at the end"],
)
@pytest.mark.parametrize("part", ["desc", "used", "avail"])
def test_c6_ring_outside_memory(arena: Arena, part: str, where: str) -> None:
    device = arena.device()
    memory, queue = device.memory, device.queues[0]
    outside = {
        "unmapped": 0x1000,
        "straddling": memory.user_base + (1 << 20) - 32,
        "at the end": memory.user_base + memory.size - 32,
    }[where]

    def attack(front: FrontEnd) -> None:
        set_up(device, front)
        parts = {name: memory.user(getattr(queue, name)) for name in ("desc", "used", "avail")} | {part: outside}
        front.state(Request.SET_VRING_NUM, 0, queue.size)
        front.set_addr(0, **parts)
        front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)

    assert "ring 0 is not inside guest memory" in arena.refused(attack, Violation.MEMORY)
    device.close()


@pytest.mark.parametrize(("part", "by"), [("desc", 8), ("avail", 1), ("used", 2)])
def test_c6_misaligned_ring(arena: Arena, part: str, by: int) -> None:
    parts = dict.fromkeys(("desc", "used", "avail"), 0x10000) | {part: 0x10000 + by}
    body = struct.pack("=IIQQQQ", 0, 0, *parts.values(), 0)
    assert "is not aligned" in arena.refused(lambda front: front.send(Request.SET_VRING_ADDR, body), Violation.VALUE)


@pytest.mark.parametrize("kind", [0, F_PACKED])
def test_c6_parts_of_a_ring_in_one_place(arena: Arena, kind: int) -> None:
    """What the device writes is what it reads next: the guest's own trouble."""
    with arena.nothing_left():
        with arena.device(FULL | kind) as device:
            front, queue = device.connect(), device.tx()
            set_up(device, front, kind)
            at = device.memory.user(queue.desc)
            front.enable(1)
            front.state(Request.SET_VRING_NUM, 1, queue.size)
            front.set_addr(1, at, at, at)
            front.file(Request.SET_VRING_KICK, 1, queue.kick_fd)
            queue.kick()
            arena.stream.moved()
        arena.idle()


def test_c6_running_ring_loses_its_memory(arena: Arena) -> None:
    """A whole new table that no longer holds a running ring is an error; region by region it is not."""
    with arena.nothing_left():
        with arena.device() as device:
            device.up()
            other = GuestMemory(1 << 20, gpa=0x9000_0000, user_addr=0x6E00_0000_0000)
            device.front.send(Request.SET_MEM_TABLE, table(*other.slots), [other.fd])
            assert device.front.disconnected()
            other.close()
        arena.idle()


@pytest.mark.parametrize("num", [0, 32769, 65535, 65536, 2**31, 2**32 - 1])
def test_c7_ring_size(arena: Arena, num: int) -> None:
    arena.refused(lambda front: front.send(Request.SET_VRING_NUM, struct.pack("=II", 0, num)), Violation.VALUE)


@pytest.mark.parametrize("num", [3, 255])
def test_c7_size_of_a_split_ring(arena: Arena, num: int) -> None:
    """Packed rings may have such a size, and features may come later: a ring's start shows it."""
    device = arena.device()

    def attack(front: FrontEnd) -> None:
        queue, user = device.queues[0], device.memory.user
        front.state(Request.SET_VRING_NUM, 0, num)
        set_up(device, front)
        front.set_addr(0, user(queue.desc), user(queue.used), user(queue.avail))
        front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)

    assert "a power of two is needed" in arena.refused(attack, Violation.VALUE)
    device.close()


@pytest.mark.parametrize("num", [1, 2, 32768])
def test_c7_extreme_ring_sizes_are_served(arena: Arena, num: int) -> None:
    with arena.nothing_left(), arena.device(FULL, queue_size=num, memory_size=16 << 20) as device:
        device.up()
        assert sorted(arena.entry.rings) == [0, 1]


@pytest.mark.parametrize("kind", [0, F_PACKED])
def test_c7_size_changes_while_the_ring_runs(arena: Arena, kind: int) -> None:
    with arena.nothing_left(), arena.device(FULL | kind, protocol_features=P_MQ | P_REPLY_ACK) as device:
        device.up()
        device.post(16)
        for num in (128, 1, 256, 2, 64):
            device.front.state(Request.SET_VRING_NUM, 0, num)
            device.front.sync()


def test_c8_base(arena: Arena) -> None:
    device = arena.device()

    def attack(front: FrontEnd) -> None:
        set_up(device, front)
        front.set_queue(0, device.queues[0], 65536)

    assert "is not an index of 16 bits" in arena.refused(attack, Violation.VALUE)
    device.close()
    with arena.device(FULL) as device:
        for queue in device.queues:
            queue.skip_to(0xFFFF)
        device.up()
        assert device.down() == [0xFFFF, 0xFFFF]
    arena.idle()


@pytest.mark.parametrize("base", [256, 0x7FFF, 0x81008000, 2**32 - 1])
def test_c8_base_outside_a_packed_ring(arena: Arena, base: int) -> None:
    device = arena.device(FULL | F_PACKED)

    def attack(front: FrontEnd) -> None:
        set_up(device, front, F_PACKED)
        front.set_queue(0, device.queues[0], base)

    arena.refused(attack, Violation.VALUE)
    device.close()


@pytest.mark.parametrize("kind", [0, F_PACKED])
def test_c8_base_asked_before_setup_twice_and_in_traffic(arena: Arena, kind: int) -> None:
    with arena.nothing_left(), arena.device(FULL | kind) as device:
        front = device.connect()
        assert [front.get_base(index) for index in (0, 0, 1, 2)] == [0] * 4
        front.close()
        arena.idle()
        device.up()
        device.post(64)
        for _ in range(20):
            device.send(numbered(1, MACS[4], MACS[2]))
            bases = device.down()
            assert device.down() == bases
            for index, queue in enumerate(device.queues):
                device.front.set_queue(index, queue, bases[index])
            device.front.sync()
        wait_for(lambda: not device.sent() and not device.tx().chains, 5, "every frame to be sent")


@pytest.mark.parametrize("value", [2, 2**32 - 1])
def test_c4_enable_is_a_boolean(arena: Arena, value: int) -> None:
    arena.refused(lambda front: front.send(Request.SET_VRING_ENABLE, struct.pack("=II", 0, value)), Violation.VALUE)


def test_c9_features_that_were_not_offered(arena: Arena) -> None:
    arena.refused(lambda front: front.send(Request.SET_FEATURES, struct.pack("=Q", 1 << 33)), Violation.VALUE)
    arena.refused(lambda front: front.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", 1 << 8)), Violation.VALUE)
    arena.refused(lambda front: front.send(Request.SET_STATUS, struct.pack("=Q", 256)), Violation.VALUE)


def test_c9_features_change_while_rings_run(arena: Arena) -> None:
    """Also from split to packed, by which the rings become others: what was in them is no ring of the other kind."""
    rng = random.Random(9)
    bits = [0, F_PACKED, 1 << 15, 1 << 28, 1 << 29, 1 << 35]
    with arena.nothing_left(), arena.device(FULL, protocol_features=P_MQ | P_REPLY_ACK) as device:
        device.up()
        device.post(16)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the rings may be nonsense by then
            for _ in range(100):
                device.front.send(Request.SET_FEATURES, struct.pack("=Q", FULL | rng.choice(bits) | rng.choice(bits)))
            device.front.sock.shutdown(1)
        assert device.front.disconnected()


def test_c9_protocol_features_without_bit_30(arena: Arena) -> None:
    """As QEMU before 7.2 does; and none at all."""
    for features in (F_VERSION_1, 0):
        with arena.nothing_left(), arena.connect() as front:
            front.set_features(features)
            front.set_protocol_features(P_MQ | P_REPLY_ACK)
            front.tell(Request.SET_OWNER)


# ---- C10 ----


@pytest.mark.parametrize(
    ("size", "offset", "violation"),
    [
        (0, 0, Violation.VALUE),
        (PAGE, 2**64 - PAGE, Violation.VALUE),
        (2**64 - 1, 1, Violation.VALUE),
        (PAGE + 1, 0, Violation.MEMORY),
        (PAGE, 1, Violation.MEMORY),
        (1 << 35, 0, Violation.MEMORY),
    ],
)
def test_c10_log_with_wrong_numbers(arena: Arena, size: int, offset: int, violation: Violation) -> None:
    """Empty, wrapping, beyond its file, larger than any memory."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    try:
        arena.refused(lambda front: front.send(Request.SET_LOG_BASE, struct.pack("=QQ", size, offset), [fd]), violation)
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", [0, F_PACKED])
def test_c10_log_too_small_for_memory(arena: Arena, kind: int) -> None:
    """Pages without a bit would be left behind: the session ends, whether log or feature comes first."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    try:
        for log_first in (False, True):
            known = len(arena.errors)
            with arena.nothing_left():
                with arena.device(FULL | kind, protocol_features=LOGGING) as device:
                    device.up()
                    if log_first:
                        device.front.set_log(fd, 8)
                        device.front.send(Request.SET_FEATURES, struct.pack("=Q", device.features | F_LOG_ALL))
                    else:
                        device.front.set_features(device.features | F_LOG_ALL)
                        device.front.send(Request.SET_LOG_BASE, struct.pack("=QQ", 8, 0), [fd])
                    assert device.front.disconnected()
                arena.idle()
            assert len(arena.errors) == known + 1
            assert "does not cover guest memory" in str(arena.errors[-1])
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", [0, F_PACKED])
def test_c10_log_all_toggled_under_load(arena: Arena, kind: int) -> None:
    """(That no frame is lost by it is in test_live.py.) Log, feature and addresses change 200 times in all orders."""
    rng = random.Random(10)
    fd = os.memfd_create("log")
    os.ftruncate(fd, 1 << 20)
    try:
        with arena.nothing_left(), arena.device(FULL | kind, protocol_features=LOGGING) as device:
            device.up()
            device.post(16)
            front, user = device.front, device.memory.user
            for _ in range(200):
                match rng.randrange(4):
                    case 0:
                        front.set_log(fd, (1 << 20) - 8 * rng.randrange(9), 0)
                    case 1:
                        front.set_features(device.features | F_LOG_ALL)
                    case 2:
                        front.set_features(device.features)
                    case _:
                        at = rng.randrange(2)
                        queue = device.queues[at]
                        flags = rng.randrange(2)
                        front.set_addr(at, user(queue.desc), user(queue.used), user(queue.avail), flags, queue.used)
            front.sync()
            assert arena.endpoint.connected
    finally:
        os.close(fd)


# ---- C11 ----


def test_c11_enable_before_everything(arena: Arena) -> None:
    with arena.nothing_left(), arena.connect() as front:
        for index in (0, 1, 2):
            for on in (1, 1, 0, 1):
                front.state(Request.SET_VRING_ENABLE, index, on)
        assert [front.get_base(index) for index in (0, 1, 2)] == [0, 0, 0]


@pytest.mark.parametrize("kind", [0, F_PACKED])
def test_c11_storm_of_enable_kick_and_base(arena: Arena, kind: int) -> None:
    with arena.nothing_left(), arena.device(FULL | kind) as device:
        device.up()
        device.post(16)
        queue = device.queues[0]
        for turn in range(300):
            device.front.enable(0, bool(turn % 2))
            queue.kick()
            device.front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)
            device.front.get_base(turn % 2)
            device.front.file(Request.SET_VRING_KICK, turn % 2, device.queues[turn % 2].kick_fd)
        arena.stream.moved()


@pytest.mark.parametrize("step", range(1, 25))
def test_c11_disconnect_at_each_step(arena: Arena, step: int) -> None:
    """The front-end is gone after its `step`th message, however far its device had come."""
    known = len(arena.faults)
    with arena.nothing_left():
        with arena.device(protocol_features=0) as device:
            front = device.connect()
            send, left = front.send_raw, step

            def send_some(data: bytes, fds: object = ()) -> None:
                nonlocal left
                if left == 0:
                    raise Disconnected
                left -= 1
                send(data, fds)  # type: ignore[arg-type]

            front.send_raw = send_some  # type: ignore[method-assign]
            device.connect = lambda: front  # type: ignore[method-assign]
            with contextlib.suppress(Disconnected):
                device.up()
        arena.idle()
    assert len(arena.faults) == known


def test_c11_a_thousand_reconnects(arena: Arena) -> None:
    """Descriptors, mappings and memory stay flat, whether the session ended in order, in a message, or in an error."""
    with arena.nothing_left(), arena.device(memory_size=1 << 20, queue_size=64, rx_size=256) as device:
        flat: list[tuple[int, int]] = []
        memory: list[int] = []
        for turn in range(1000):
            device.up()
            if turn % 3 == 0:
                device.front.send_raw(b"\1")
            elif turn % 3 == 1:
                device.front.send(Request.GPU_SET_SOCKET)
            device.front.close()
            if turn % 250 == 249:
                arena.idle()
                gc.collect()
                flat.append((fd_count(), mapped_files()))
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
        assert flat == flat[:1] * 4
        assert memory[3] - memory[0] < 4 << 20, f"resident bytes: {memory}"


# ---- C12 ----


def test_c12_need_reply_on_every_message(arena: Arena) -> None:
    """Each is answered exactly once, whether it has a reply of its own or not."""
    with arena.nothing_left(), arena.device(protocol_features=P_MQ | P_REPLY_ACK) as device:
        device.up()
        front = device.front
        plain = [r for r, entry in TABLE.items() if entry.payload.NAME == "none" and not entry.fds[0]]
        for request in plain:
            front.ask(request, flags=1 | NEED_REPLY)
        for request in (Request.SET_VRING_ENABLE, Request.SET_VRING_BASE, Request.GET_VRING_BASE):
            front.ask(request, struct.pack("=II", 0, 1), flags=1 | NEED_REPLY)
        front.sync()


def test_c12_front_end_that_never_reads_its_replies(impatient: Arena) -> None:
    def attack(front: FrontEnd) -> None:
        front.sock.settimeout(10)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                front.send(Request.GET_FEATURES)

    impatient.refused(attack, Violation.STALLED)


# ---- C13 ----


def test_c13_iotlb_is_not_offered(arena: Arena) -> None:
    """Without VIRTIO_F_ACCESS_PLATFORM there are no misses to storm with: an answer to none ends the session."""
    with arena.connect() as front:
        assert not front.ask_u64(Request.GET_FEATURES) & 1 << 33
    arena.idle()
    entry = struct.pack("=QQQBB6x", 0, 4096, 0, 3, 2)
    assert "not a request" in arena.refused(lambda front: front.send(Request.IOTLB_MSG, entry), Violation.REQUEST)


# ---- C14 ----


def test_c14_second_front_end_is_sent_away(arena: Arena) -> None:
    with arena.nothing_left(), arena.device() as device:
        device.up()
        for _ in range(20):
            with arena.connect() as second:
                assert second.disconnected()
        device.front.sync()


def test_c14_second_front_end_leaves_a_descriptor_that_lingers(arena: Arena) -> None:
    with arena.nothing_left(), arena.device() as device:
        device.up()
        with lingering() as (fd, _peer), arena.connect() as second:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                second.send_raw(b"x", [fd])
            os.close(fd)
            assert second.disconnected()
            assert arena.plane.loop.longest(LINGER / 2) < LINGER / 4
        device.front.sync()


def test_c14_stale_socket_is_replaced_and_a_live_one_is_not(arena: Arena, tmp_path: Path) -> None:
    class Spec:
        name, socket, socket_mode = "vm9", tmp_path / "vm9.sock", "server"

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(Spec.socket))
    endpoint = Endpoint(Spec(), arena.entry)
    endpoint.open()
    with pytest.raises(ConfigError, match="another program listens"):
        Endpoint(Spec(), arena.entry).open()
    arena.plane.loop.call(endpoint._close_listener)
    assert not Spec.socket.exists()


@pytest.mark.parametrize("place", ["file/vm9.sock", "nowhere/vm9.sock"])
def test_c14_directory_that_cannot_be_used(arena: Arena, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")

    class Spec:
        name, socket, socket_mode = "vm9", tmp_path / place, "server"

    with pytest.raises(ConfigError, match="vm9"):
        Endpoint(Spec(), arena.entry).open()


# ---- sequences at random ----


@pytest.mark.parametrize("case", sorted(wirefuzz.CORPUS.glob("*.txt")), ids=lambda path: path.stem)
def test_fuzz_corpus(arena: Arena, case: Path) -> None:
    """Sequences of messages that are worth keeping."""
    wirefuzz.play(arena, wirefuzz.load(case.read_text()))


@pytest.mark.parametrize("seed", range(wirefuzz.SEEDS))
def test_fuzz_sequences(arena: Arena, seed: int) -> None:
    """Sequences of right, wrong and mutated messages, with memory tables, logs and in-flight regions among them."""
    wirefuzz.play(arena, wirefuzz.sequence(random.Random(seed)))
