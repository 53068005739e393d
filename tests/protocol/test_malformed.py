# SPDX-License-Identifier: Apache-2.0
"""Whatever a front-end sends, its own session is all that it can lose, and no descriptor or mapping stays behind.

The letters are those of the checklist for hostile front-ends: C1 headers and sizes, C2 descriptors, C3 pieces, C4 ring
numbers, C5 memory tables, C6 ring addresses, C7 sizes, C8 bases, C9 features, C11 order, C12 replies, C14 sockets.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.endpoint import fd_count, map_count
from support.frontend import F_PROTOCOL, F_VERSION_1, P_MEM_SLOTS, P_REPLY_ACK, FrontEnd, GuestMemory, NetDevice, Slot
from support.process import wait_for
from xdpvhost.vhost.backend import TABLE
from xdpvhost.vhost.errors import Violation
from xdpvhost.vhost.offered import UNSUPPORTED
from xdpvhost.vhost.wire import Request

from .conftest import Bench

REQUESTS = [*range(51), 2**31, 2**32 - 1]
Attack = Callable[[FrontEnd], None]


@contextlib.contextmanager
def nothing_left(bench: Bench) -> Iterator[None]:
    """Asserts that the block costs its session, and nothing else: no descriptor, mapping or ring stays."""
    fds, maps = fd_count(), map_count()
    yield
    bench.idle()
    bench.port.settled()
    wait_for(lambda: fd_count() == fds, 5, f"{fds} descriptors, as before", interval=0.001)
    assert map_count() == maps
    with bench.connect() as front:
        assert front.ask_u64(Request.GET_FEATURES), "the next front-end is served"
    bench.idle()


def refused(bench: Bench, attack: Attack, *violations: Violation) -> str:
    """The attack ends the session with an error of one of these classes; its message."""
    known = len(bench.port.errors)
    with nothing_left(bench):
        with bench.connect() as front:
            attack(front)
            assert front.disconnected()
        bench.idle()
        assert len(bench.port.errors) == known + 1
        error = bench.port.errors[-1]
        assert error.violation in violations, str(error)
    return str(error)


def survives(bench: Bench, attack: Attack) -> None:
    """The attack ends the session or not; the daemon is as before."""
    with nothing_left(bench), bench.connect() as front:
        front.sock.settimeout(5)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            attack(front)


# ---- C1 ----


@pytest.mark.parametrize("size", [0, 1, 7, 8, 12, 40, 300])
def test_c1_every_request_with_any_size(bench: Bench, size: int) -> None:
    for request in REQUESTS:
        survives(bench, lambda front, request=request: front.send(request, bytes(size)))


@pytest.mark.parametrize("request_", REQUESTS)
def test_c1_payload_one_byte_too_long(bench: Bench, request_: int) -> None:
    survives(bench, lambda front: front.send(request_, bytes(513)))
    entry = TABLE.get(request_)
    if entry is not None:
        needed = {"none": 0, "u64": 8, "vring state": 8}.get(entry.payload.NAME, 40)
        refused(
            bench, lambda front: front.send(request_, bytes(needed + 1)), Violation.SIZE, Violation.VALUE, Violation.FDS
        )


@pytest.mark.parametrize("flags", [0, 2, 3, 5, 0xD, 0x11, 0xFFFFFFFF])
def test_c1_flags(bench: Bench, flags: int) -> None:
    refused(bench, lambda front: front.send(Request.GET_FEATURES, flags=flags), Violation.HEADER)


@pytest.mark.parametrize("size", [513, 4096, 2**31, 2**32 - 1])
def test_c1_announced_size(bench: Bench, size: int) -> None:
    refused(bench, lambda front: front.send_raw(struct.pack("=III", 5, 1, size)), Violation.SIZE)


@pytest.mark.parametrize("request_", [*UNSUPPORTED, 0, 45, 50, 2**31])
def test_unknown_requests_end_the_session(bench: Bench, request_: int) -> None:
    words = refused(bench, lambda front: front.send(request_), Violation.REQUEST)
    assert "not a request that xdpvhost offers" in words


def test_unknown_request_is_answered_first_when_asked(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(P_REPLY_ACK)
        front.tell(Request.GPU_SET_SOCKET, expect=1)
        assert front.disconnected()
    bench.idle()


# ---- C2 ----


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 32])
def test_c2_every_request_with_any_number_of_descriptors(bench: Bench, count: int) -> None:
    with open(os.devnull) as null:
        for request in range(1, 45):
            entry = TABLE.get(request)
            size = {"none": 0, "u64": 8, "vring state": 8}.get(entry.payload.NAME, 40) if entry else 0
            payload = bytes(size)
            survives(bench, lambda front, r=request, p=payload: front.send(r, p, [null.fileno()] * count))


@pytest.mark.parametrize("count", [1, 8])
def test_c2_surplus_descriptors_are_refused(bench: Bench, count: int) -> None:
    with open(os.devnull) as null:
        refused(bench, lambda front: front.send(Request.GET_FEATURES, b"", [null.fileno()] * count), Violation.FDS)


def test_c2_more_descriptors_than_a_message_may_have(bench: Bench) -> None:
    with open(os.devnull) as null:
        words = refused(bench, lambda front: front.send(Request.GET_FEATURES, b"", [null.fileno()] * 9), Violation.FDS)
    assert "more than 8" in words


@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
@pytest.mark.parametrize("path", ["/dev/null", "/", "/proc/self/status"])
def test_c2_descriptor_of_the_wrong_kind(bench: Bench, request_: int, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        words = refused(bench, lambda front: front.send(request_, bytes(8), [fd]), Violation.FDS)
        assert "an eventfd, a pipe or a unix stream socket is needed" in words
    finally:
        os.close(fd)


@pytest.mark.parametrize("request_", [Request.SET_VRING_CALL, Request.SET_BACKEND_REQ_FD])
@pytest.mark.parametrize(
    ("family", "kind"), [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)]
)
def test_c2_socket_of_the_wrong_kind(bench: Bench, request_: int, family: int, kind: int) -> None:
    payload = b"" if request_ == Request.SET_BACKEND_REQ_FD else bytes(8)
    with socket.socket(family, kind) as sock:
        words = refused(bench, lambda front: front.send(request_, payload, [sock.fileno()]), Violation.FDS)
    assert "a socket that is not a unix stream" in words


def test_c2_backend_channel_must_be_a_socket(bench: Bench) -> None:
    reading, writing = os.pipe()
    try:
        refused(bench, lambda front: front.send(Request.SET_BACKEND_REQ_FD, b"", [writing]), Violation.FDS)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("path", ["/dev/null", "/", "/dev/zero"])
def test_c2_memory_of_the_wrong_kind(bench: Bench, path: str) -> None:
    table = struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0)
    fd = os.open(path, os.O_RDONLY)
    try:
        refused(bench, lambda front: front.send(Request.SET_MEM_TABLE, table, [fd]), Violation.MEMORY)
    finally:
        os.close(fd)


def test_c2_read_only_memory(bench: Bench) -> None:
    table = struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4096)
        fd = os.open(file.name, os.O_RDONLY)
        try:
            refused(bench, lambda front: front.send(Request.SET_MEM_TABLE, table, [fd]), Violation.MEMORY)
        finally:
            os.close(fd)


# ---- C3 ----


def test_c3_one_byte_at_a_time(bench: Bench) -> None:
    memory = GuestMemory()
    with bench.connect() as front:
        for byte in struct.pack("=III", Request.GET_FEATURES, 1, 0):
            front.send_raw(bytes([byte]))
        assert len(front.receive()[2]) == 8
        table = struct.pack("=III", 5, 1, 40) + struct.pack("=II", 1, 0) + memory.slots[0].pack()
        front.send_raw(table[:1], [memory.fd])
        for at in range(1, len(table)):
            front.send_raw(table[at : at + 1])
        front.sync()
        assert bench.endpoint.summary["regions"] == 1
    memory.close()
    bench.idle()


def test_c3_two_messages_in_one_write(bench: Bench) -> None:
    with bench.connect() as front:
        front.send_raw(struct.pack("=III", Request.GET_FEATURES, 1, 0) * 3)
        assert [len(front.receive()[2]) for _ in range(3)] == [8, 8, 8]


@pytest.mark.parametrize("sent", range(1, 20))
def test_c3_half_a_message(bench: Bench, sent: int) -> None:
    whole = struct.pack("=IIIQ", Request.SET_FEATURES, 1, 8, 0)

    def attack(front: FrontEnd) -> None:
        front.send_raw(whole[:sent])
        front.sock.shutdown(1)

    assert "in the middle of" in refused(bench, attack, Violation.TRUNCATED)


@pytest.mark.parametrize("cut", [12, 16])
def test_c3_descriptors_with_the_second_half(bench: Bench, cut: int) -> None:
    fd = os.eventfd(0)
    whole = struct.pack("=IIIQ", Request.SET_VRING_KICK, 1, 8, 0)

    def attack(front: FrontEnd) -> None:
        front.send_raw(whole[:cut])
        front.send_raw(whole[cut:], [fd])

    try:
        refused(bench, attack, Violation.FDS)
    finally:
        os.close(fd)


def test_c3_message_that_never_ends(impatient: Bench) -> None:
    words = refused(impatient, lambda front: front.send_raw(b"\1\0\0\0"), Violation.TRUNCATED)
    assert "did not end within" in words


# ---- C4 ----


@pytest.mark.parametrize("index", [3, 255, 256, 0x10000, 2**32 - 1])
@pytest.mark.parametrize(
    "request_",
    [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.GET_VRING_BASE, Request.SET_VRING_ENABLE],
)
def test_c4_ring_number(bench: Bench, request_: int, index: int) -> None:
    refused(bench, lambda front: front.send(request_, struct.pack("=II", index, 1)), Violation.VALUE)


@pytest.mark.parametrize("index", [3, 255, 256, 2**32 - 1])
def test_c4_ring_number_of_an_address(bench: Bench, index: int) -> None:
    refused(
        bench,
        lambda front: front.send(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, 0, 0, 0, 0)),
        Violation.VALUE,
    )


@pytest.mark.parametrize("value", [3, 0xFF, 0x200, 0x10000, 2**63])
@pytest.mark.parametrize("request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_c4_ring_number_of_a_descriptor(bench: Bench, request_: int, value: int) -> None:
    fd = os.eventfd(0)
    try:
        refused(bench, lambda front: front.send(request_, struct.pack("=Q", value), [fd]), Violation.VALUE)
        refused(bench, lambda front: front.send(request_, struct.pack("=Q", 0x100), [fd]), Violation.FDS)
        refused(bench, lambda front: front.send(request_, struct.pack("=Q", 0)), Violation.FDS)
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
def test_c5_memory_table(bench: Bench, slots: list[Slot], violation: Violation) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, FILE)
    try:
        fds = [fd] * min(len(slots), 8)
        refused(bench, lambda front: front.send(Request.SET_MEM_TABLE, table(*slots), fds), violation)
        if len(slots) == 1 and violation is Violation.MEMORY:
            add = bytes(8) + slots[0].pack()
            refused(bench, lambda front: front.send(Request.ADD_MEM_REG, add, [fd]), violation)
    finally:
        os.close(fd)


@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_c5_table_with_the_wrong_number_of_files(bench: Bench, count: int) -> None:
    memory = GuestMemory()
    body = table(*memory.split(PAGE))
    refused(bench, lambda front: front.send(Request.SET_MEM_TABLE, body, [memory.fd] * count), Violation.FDS)
    memory.close()


def test_c5_offset_may_be_any(bench: Bench) -> None:
    memory = GuestMemory(1 << 20)
    with bench.connect() as front:
        front.set_mem_table([Slot(0, 1000, 0, 123)], [memory.fd])
        front.sync()
        region = bench.port.memories[-1].regions[0]
        assert (region.size, region.host % PAGE) == (1000, 123)
    memory.close()
    bench.idle()


def test_c5_a_guest_has_its_share_of_addresses(bench: Bench) -> None:
    """Sparse files cost a front-end nothing, the daemon's addresses are everyone's."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 << 40)
    try:
        slots = [Slot(0, 8 << 40, 0, 8 << 40), Slot(8 << 40, 8 << 40, 8 << 40, 0)]
        with bench.connect() as front:
            front.set_protocol_features(P_MEM_SLOTS)
            front.set_mem_table(slots, [fd, fd])
            front.sync()
            front.add_mem_reg(Slot(16 << 40, PAGE, 16 << 40, 0), fd)
            assert front.disconnected()
        bench.idle()
        assert "a guest can have" in str(bench.port.errors[-1])
    finally:
        os.close(fd)


def test_c5_only_the_region_is_mapped(bench: Bench) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 2**62)
    try:
        with bench.connect() as front:
            front.set_mem_table([Slot(0, 2 * PAGE, 0, 2**62 - 3 * PAGE + 5)], [fd])
            front.sync()
            (region,) = bench.port.memories[-1].regions
            places = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
            sizes = [int(end, 16) - int(start, 16) for start, end in places if int(start, 16) == region.host - 5]
            assert sizes == [3 * PAGE]
    finally:
        os.close(fd)
    bench.idle()


def test_c5_removed_region_must_exist_and_added_one_must_not(bench: Bench) -> None:
    memory = GuestMemory()
    slot = memory.slots[0]
    body = bytes(8) + slot.pack()

    def add_twice(front: FrontEnd) -> None:
        front.send(Request.ADD_MEM_REG, body, [memory.fd])
        front.send(Request.ADD_MEM_REG, body, [memory.fd])

    refused(bench, lambda front: front.send(Request.REM_MEM_REG, body), Violation.MEMORY)
    refused(bench, add_twice, Violation.MEMORY)
    memory.close()


# ---- C6, C7, C8, C9: values ----


def set_up(device: NetDevice, front: FrontEnd) -> None:
    front.set_protocol_features(P_MEM_SLOTS)
    front.set_features(F_PROTOCOL | F_VERSION_1)
    front.set_mem_table(device.memory.split(1 << 20), [device.memory.fd] * 2)


@pytest.mark.parametrize(
    "where",
    ["unmapped", "straddling", "at the end"],
)
@pytest.mark.parametrize("part", ["desc", "used", "avail"])
def test_c6_ring_outside_memory(bench: Bench, part: str, where: str) -> None:
    device = bench.device()
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

    assert "ring 0 is not inside guest memory" in refused(bench, attack, Violation.MEMORY)
    device.close()


def test_c6_running_ring_loses_its_memory(bench: Bench) -> None:
    """A whole new table that no longer holds a running ring is an error; region by region it is not."""
    with nothing_left(bench):
        with bench.device() as device:
            device.up()
            other = GuestMemory(1 << 20, gpa=0x9000_0000, user_addr=0x6E00_0000_0000)
            device.front.send(Request.SET_MEM_TABLE, table(*other.slots), [other.fd])
            assert device.front.disconnected()
            other.close()
        bench.idle()


@pytest.mark.parametrize("num", [0, 32769, 65535, 65536, 2**31, 2**32 - 1])
def test_c7_ring_size(bench: Bench, num: int) -> None:
    refused(bench, lambda front: front.send(Request.SET_VRING_NUM, struct.pack("=II", 0, num)), Violation.VALUE)


@pytest.mark.parametrize("num", [3, 255])
def test_c7_size_of_a_split_ring(bench: Bench, num: int) -> None:
    """Packed rings may have such a size, and features may come later: a ring's start shows it."""
    device = bench.device()

    def attack(front: FrontEnd) -> None:
        queue, user = device.queues[0], device.memory.user
        front.state(Request.SET_VRING_NUM, 0, num)
        set_up(device, front)
        front.set_addr(0, user(queue.desc), user(queue.used), user(queue.avail))
        front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)

    assert "a power of two is needed" in refused(bench, attack, Violation.VALUE)
    device.close()


@pytest.mark.parametrize("num", [1, 2, 32768])
def test_c7_extreme_ring_sizes_are_served(bench: Bench, num: int) -> None:
    with bench.device(queue_size=num, memory_size=16 << 20) as device:
        device.up()
        assert [ring.num for ring in bench.port.now.rings.values()] == [num, num]
    bench.idle()


def test_c8_base(bench: Bench) -> None:
    device = bench.device()

    def attack(front: FrontEnd) -> None:
        set_up(device, front)
        front.set_queue(0, device.queues[0], 65536)

    assert "is not an index of 16 bits" in refused(bench, attack, Violation.VALUE)
    device.close()
    with bench.device() as device:
        device.up(bases=[0xFFFF, 0xFFFF])
        assert device.down() == [0xFFFF, 0xFFFF]
    bench.idle()


@pytest.mark.parametrize("value", [2, 2**32 - 1])
def test_enable_is_a_boolean(bench: Bench, value: int) -> None:
    refused(bench, lambda front: front.send(Request.SET_VRING_ENABLE, struct.pack("=II", 0, value)), Violation.VALUE)


def test_c9_features_that_were_not_offered(bench: Bench) -> None:
    refused(bench, lambda front: front.send(Request.SET_FEATURES, struct.pack("=Q", 1 << 33)), Violation.VALUE)
    refused(bench, lambda front: front.send(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", 1 << 8)), Violation.VALUE)
    refused(bench, lambda front: front.send(Request.SET_STATUS, struct.pack("=Q", 256)), Violation.VALUE)


# ---- C11, C12 ----


def test_c11_two_hundred_reconnects(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        device.front.close()
        bench.idle()
        fds, maps = fd_count(), map_count()
        for turn in range(200):
            device.up()
            if turn % 3 == 0:
                device.front.send_raw(b"\1")
            elif turn % 3 == 1:
                device.front.send(Request.GPU_SET_SOCKET)
            device.front.close()
        bench.idle()
        wait_for(lambda: fd_count() == fds, 5, f"{fds} descriptors, as before", interval=0.001)
        assert map_count() == maps
        bench.port.settled()
    assert bench.endpoint.sessions == 201


def test_c12_front_end_that_never_reads_its_replies(impatient: Bench) -> None:
    def attack(front: FrontEnd) -> None:
        front.sock.settimeout(10)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                front.send(Request.GET_FEATURES)

    refused(impatient, attack, Violation.STALLED)


# ---- and at random ----


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, 45), st.sampled_from([1, 9]), st.binary(max_size=64), st.integers(0, 3)), max_size=12
    )
)
def test_random_messages(bench: Bench, messages: list[tuple[int, int, bytes, int]]) -> None:
    fd = os.eventfd(0)
    try:

        def attack(front: FrontEnd) -> None:
            for request, flags, payload, fds in messages:
                front.send(request, payload, [fd] * fds, flags)

        survives(bench, attack)
    finally:
        os.close(fd)
