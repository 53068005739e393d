# SPDX-License-Identifier: Apache-2.0
"""What moves a guest, or lets it survive a back-end: dirty log, in-flight region, bases, device state."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.endpoint import fd_count
from support.frontend import (
    F_INDIRECT,
    F_LOG_ALL,
    F_PACKED,
    F_PROTOCOL,
    F_VERSION_1,
    P_DEVICE_STATE,
    P_INFLIGHT,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    FrontEnd,
    NetDevice,
    Slot,
)
from support.process import wait_for
from xdpvhost.vhost.errors import Violation
from xdpvhost.vhost.wire import Request

from .conftest import Bench

PAGE = 4096
PROTOCOL = P_MQ | P_REPLY_ACK | P_LOG_SHMFD | P_INFLIGHT | P_DEVICE_STATE
PACKED = F_PROTOCOL | F_VERSION_1 | F_PACKED
INFLIGHT = struct.Struct("=QQHHI")


@contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("log")
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


def log_size(device: NetDevice) -> int:
    """As QEMU computes it: words of 64 pages up to the last address of memory."""
    return ((device.memory.gpa + device.memory.size - 1) // (64 * PAGE) + 1) * 8


def logged(bench: Bench) -> list[tuple[bool, bool]]:
    """Of each running ring: whether it has a log, and whether writes to the ring are logged, too."""
    return [(ring.log is not None, ring.log_used) for ring in bench.port.now.rings.values()]


# ---- dirty log ----


def test_migration_as_qemu_does_it(bench: Bench) -> None:
    """Log, feature, addresses with the log flag; all on rings that go on running; then everything backwards."""
    with bench.device(protocol_features=PROTOCOL) as device:
        device.up()
        front, user = device.front, device.memory.user
        for base, ring in enumerate(bench.port.now.rings.values()):
            ring.base = 100 + base
        published = len(bench.port.applied)
        with memfd(log_size(device)) as fd:
            front.set_log(fd, log_size(device))
            assert len(bench.port.applied) == published, "nothing is logged yet"
            front.set_features(device.features | F_LOG_ALL)
            assert logged(bench) == [(True, False)] * 2
            for index, queue in enumerate(device.queues):
                front.set_addr(index, user(queue.desc), user(queue.used), user(queue.avail), 1, queue.used)
            front.sync()
            assert logged(bench) == [(True, True)] * 2
            (area,) = bench.port.areas
            assert (area.size, area.address % PAGE) == (log_size(device), 0)
            front.set_features(device.features)
            for index, queue in enumerate(device.queues):
                front.set_addr(index, user(queue.desc), user(queue.used), user(queue.avail))
            front.sync()
        assert logged(bench) == [(False, False)] * 2
        assert [ring.base for ring in bench.port.now.rings.values()] == [100, 101]
        assert all(len(applied.rings) == 2 for applied in bench.port.applied[published:]), "no ring was ever away"
        assert device.down() == [100, 101]


def test_log_resized_while_logging(bench: Bench) -> None:
    """Memory was plugged in: QEMU sends a larger log first, then the table. The old log goes when nothing uses it."""
    with bench.device(protocol_features=PROTOCOL) as device, memfd(1 << 20) as fd:
        device.up()
        front, memory = device.front, device.memory
        front.set_log(fd, log_size(device))
        front.set_features(device.features | F_LOG_ALL)
        front.set_log(fd, 1 << 20)
        old, new = bench.port.areas
        assert (old.closed, new.closed) == (True, False)
        slots = [*memory.slots, Slot(memory.gpa + (1 << 30), 1 << 20, memory.user_base + (1 << 30), 0)]
        front.set_mem_table(slots, [memory.fd, memory.fd])
        front.sync()
        assert logged(bench) == [(True, False)] * 2


def test_log_at_an_offset_is_mapped_there_once(bench: Bench) -> None:
    """CVE-2026-86563: the offset must not be added to an address that has it already."""
    with bench.device(protocol_features=PROTOCOL) as device:
        device.up()
        size = log_size(device)
        with memfd(3 * PAGE + 9 + size) as fd:
            device.front.set_log(fd, size, 3 * PAGE + 9)
        (area,) = bench.port.areas
        assert (area.address % PAGE, area.size) == (9, size)


def test_rings_wait_for_the_log(bench: Bench) -> None:
    """QEMU restarts a device in the middle of a migration with LOG_ALL first and the log last."""
    with bench.device(protocol_features=PROTOCOL, features=F_PROTOCOL | F_VERSION_1 | F_LOG_ALL) as device:
        device.up()
        assert not bench.port.now.rings
        with memfd(log_size(device)) as fd:
            device.front.set_log(fd, log_size(device))
        assert logged(bench) == [(True, False)] * 2


def test_rings_wait_for_a_larger_log(bench: Bench) -> None:
    """A log of before that no longer covers memory counts as none, until the new one comes."""
    with bench.device(protocol_features=PROTOCOL) as device, memfd(1 << 20) as fd:
        device.up()
        front, memory = device.front, device.memory
        front.set_log(fd, log_size(device))
        front.set_features(device.features | F_LOG_ALL)
        slots = [*memory.slots, Slot(memory.gpa + (1 << 30), 1 << 20, memory.user_base + (1 << 30), 0)]
        front.set_mem_table(slots, [memory.fd, memory.fd])
        front.sync()
        assert not bench.port.now.rings
        front.set_log(fd, 1 << 20)
        assert logged(bench) == [(True, False)] * 2


def refused(bench: Bench, front: FrontEnd, violation: Violation) -> str:
    assert front.disconnected()
    wait_for(lambda: bench.port.errors, 5, "the error to be counted", interval=0.001)
    assert bench.port.errors[-1].violation is violation
    return str(bench.port.errors[-1])


def test_log_that_does_not_cover_memory_is_refused_while_logging(bench: Bench) -> None:
    with bench.device(protocol_features=PROTOCOL, features=F_PROTOCOL | F_VERSION_1 | F_LOG_ALL) as device:
        device.up()
        with memfd(PAGE) as fd:
            device.front.send(Request.SET_LOG_BASE, struct.pack("=QQ", PAGE, 0), [fd])
        assert "does not cover guest memory" in refused(bench, device.front, Violation.MEMORY)


@pytest.mark.parametrize(
    ("size", "offset", "violation"),
    [
        (0, 0, Violation.VALUE),
        (PAGE, 2**64 - PAGE, Violation.VALUE),
        (2**64 - 1, 8, Violation.VALUE),
        (PAGE + 1, 0, Violation.MEMORY),
        (PAGE, 8, Violation.MEMORY),
        (1 << 35, 0, Violation.MEMORY),
    ],
)
def test_log_with_wrong_numbers(bench: Bench, size: int, offset: int, violation: Violation) -> None:
    with bench.connect() as front, memfd(PAGE) as fd:
        front.send(Request.SET_LOG_BASE, struct.pack("=QQ", size, offset), [fd])
        refused(bench, front, violation)
    assert not bench.port.areas


@pytest.mark.parametrize("path", ["/dev/zero", "/", "file on a disk"])
def test_log_in_the_wrong_kind_of_file(bench: Bench, path: str) -> None:
    with bench.connect() as front, tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        file.truncate(PAGE)
        fd = os.dup(file.fileno()) if path == "file on a disk" else os.open(path, os.O_RDONLY)
        front.send(Request.SET_LOG_BASE, struct.pack("=QQ", PAGE, 0), [fd])
        os.close(fd)
        refused(bench, front, Violation.MEMORY)


def test_log_notifier_is_not_kept(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(PROTOCOL)
        front.sync()
        before = fd_count()
        for _ in range(10):
            notifier = os.eventfd(0)
            front.tell(Request.SET_LOG_FD, b"", [notifier])
            os.close(notifier)
        assert fd_count() == before


# ---- in-flight region ----


def test_inflight_region_is_sealed_and_comes_back(bench: Bench) -> None:
    with bench.device(protocol_features=PROTOCOL) as device:
        front = device.connect()
        front.set_protocol_features(PROTOCOL)
        front.set_features(device.features)
        description, fd = front.get_inflight(2, 256)
        assert fd is not None
        size, offset, queues, queue_size, _ = INFLIGHT.unpack(description)
        assert (size, offset, queues, queue_size) == (2 * bench.port.inflight_size(256, False), 0, 2, 256)
        assert os.fstat(fd).st_size == size
        for change in (0, size + 1):
            with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
                os.ftruncate(fd, change)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
        front.set_inflight(description, fd)
        os.close(fd)
        front.set_mem_table(device.memory.slots, [device.memory.fd])
        for index, queue in enumerate(device.queues):
            front.set_queue(index, queue)
        front.sync()
        (area,) = bench.port.areas
        assert [(ring.inflight, ring.inflight_offset) for ring in bench.port.now.rings.values()] == [
            (area, 0),
            (area, bench.port.inflight_size(256, False)),
        ]


def test_inflight_description_without_padding(bench: Bench) -> None:
    """A front-end that packs the struct gets an answer of the size that it sent."""
    with bench.connect() as front:
        front.set_features(PACKED)
        answer, fd = front.ask_fd(Request.GET_INFLIGHT_FD, struct.pack("=QQHH", 0, 0, 2, 100))
        assert fd is not None
        os.close(fd)
        assert struct.unpack("=QQHH", answer) == (2 * bench.port.inflight_size(100, True), 0, 2, 100)


def test_inflight_is_asked_for_again_and_again(bench: Bench) -> None:
    """CVE-2020-10726, CVE-2019-14818: what is repeated replaces, and the old one goes."""
    with bench.connect() as front:
        front.set_protocol_features(PROTOCOL)
        front.sync()
        before = fd_count()
        for _ in range(50):
            description, fd = front.get_inflight(2, 256)
            assert fd is not None
            front.set_inflight(description, fd)
            os.close(fd)
        assert fd_count() == before
        assert [area.closed for area in bench.port.areas] == [True] * 49 + [False]


@pytest.mark.parametrize(
    ("size", "offset", "queues", "queue_size", "violation"),
    [
        (0, 0, 2, 256, Violation.VALUE),
        (PAGE, 2**64 - PAGE, 2, 256, Violation.VALUE),
        (PAGE, 4, 2, 256, Violation.VALUE),
        (PAGE, 0, 0, 256, Violation.VALUE),
        (PAGE, 0, 4, 256, Violation.VALUE),
        (PAGE, 0, 65535, 256, Violation.VALUE),
        (PAGE, 0, 2, 0, Violation.VALUE),
        (PAGE, 0, 2, 32769, Violation.VALUE),
        (5 * PAGE, 0, 2, 256, Violation.MEMORY),
        (2**63, 0, 2, 256, Violation.MEMORY),
    ],
)
def test_inflight_with_wrong_numbers(
    bench: Bench, size: int, offset: int, queues: int, queue_size: int, violation: Violation
) -> None:
    with bench.connect() as front, memfd(4 * PAGE) as fd:
        front.send(Request.SET_INFLIGHT_FD, INFLIGHT.pack(size, offset, queues, queue_size, 0), [fd])
        refused(bench, front, violation)
    assert not bench.port.areas


@pytest.mark.parametrize(("num", "why"), [(256, "made for 128"), (64, "no room for ring 1")])
def test_ring_that_its_inflight_part_does_not_fit(bench: Bench, num: int, why: str) -> None:
    """CVE-2026-86565: the size of a ring changes after the region was made for another."""
    with bench.device(queue_size=num, protocol_features=PROTOCOL) as device:
        front = device.connect()
        front.set_features(device.features)
        front.set_mem_table(device.memory.slots, [device.memory.fd])
        size = (2 if num == 256 else 1) * bench.port.inflight_size(128, False)
        with memfd(size) as fd:
            front.send(Request.SET_INFLIGHT_FD, INFLIGHT.pack(size, 0, 2, 128, 0), [fd])
        for index, queue in enumerate(device.queues):
            front.set_queue(index, queue)
        assert why in refused(bench, front, Violation.VALUE if num == 256 else Violation.MEMORY)


# ---- bases ----


@pytest.mark.parametrize(
    ("given", "begins"),
    [
        (None, 0x80008000),
        (0x8000, 0x80008000),
        (5, 0x00050005),
        (0x80058005, 0x80058005),
        (0x00050007, 0x00050007),
        (0, 0),
    ],
)
@pytest.mark.parametrize("features_first", [True, False])
def test_base_of_a_packed_ring(bench: Bench, given: int | None, begins: int, features_first: bool) -> None:
    """Both indices with their wrap counters, or 16 bits for both, or the beginning; NUM need not be a power of two."""
    with bench.device(queue_size=3) as device:
        front, queue, user = device.connect(), device.queues[0], device.memory.user
        if features_first:
            front.set_features(PACKED)
        front.state(Request.SET_VRING_NUM, 0, 3)
        if given is not None:
            front.state(Request.SET_VRING_BASE, 0, given)
        if not features_first:
            front.set_features(PACKED)
        front.set_mem_table(device.memory.slots, [device.memory.fd])
        front.set_addr(0, user(queue.desc), user(queue.used), user(queue.avail) & ~3)
        front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)
        front.sync()
        ring = bench.port.now.rings[0]
        assert (ring.base, ring.num) == (begins, 3)
        ring.base = 0x80028002
        assert front.get_base(0) == 0x80028002


def test_ring_that_becomes_packed_begins_anew(bench: Bench) -> None:
    """Another driver in the same guest: a place in a split ring is none in a packed one."""
    with bench.device(queue_size=256) as device:
        device.up(bases=[7, 7])
        assert device.down() == [7, 7]
        device.front.set_features(PACKED)
        for index, queue in enumerate(device.queues):
            device.front.file(Request.SET_VRING_KICK, index, queue.kick_fd)
        device.front.sync()
        assert [ring.base for ring in bench.port.now.rings.values()] == [0x80008000] * 2


def test_driver_area_of_a_packed_ring_is_aligned(bench: Bench) -> None:
    with bench.device() as device:
        front, queue, user = device.connect(), device.queues[0], device.memory.user
        front.set_features(PACKED)
        front.set_mem_table(device.memory.slots, [device.memory.fd])
        front.state(Request.SET_VRING_NUM, 0, 8)
        front.set_addr(0, user(queue.desc), user(queue.used), user(queue.desc) + 2)
        front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)
        assert "driver area" in refused(bench, front, Violation.VALUE)


# ---- changes without a gap ----


def test_running_rings_change_in_one_step(bench: Bench) -> None:
    """Memory, features and kick descriptors are replaced without a moment in which a ring is away."""
    with bench.device(protocol_features=PROTOCOL) as device:
        device.up()
        published = len(bench.port.applied)
        for ring in bench.port.now.rings.values():
            ring.base = 9
        front = device.front
        front.set_mem_table(device.memory.split(1 << 20), [device.memory.fd] * 2)
        front.set_features(device.features | F_INDIRECT)
        front.file(Request.SET_VRING_KICK, 0, device.queues[0].kick_fd)
        front.sync()
        assert [sorted(applied.rings) for applied in bench.port.applied[published:]] == [[0, 1]] * 3
        assert [ring.base for ring in bench.port.now.rings.values()] == [9, 9]


# ---- device state ----


def test_device_state_goes_and_comes(bench: Bench) -> None:
    bench.port.state = b"what the guest has set"
    with bench.device(protocol_features=PROTOCOL) as device:
        device.up()
        before = fd_count()
        assert device.front.save_state() is None, "a device that runs has no state to move"
        device.down()
        state = device.front.save_state()
        assert state is not None
        bench.port.state = b""
        assert device.front.load_state(state)
        assert bench.port.state == b"what the guest has set"
        assert device.front.load_state(b""), "a front-end without a state may come, too"
        assert bench.port.state == b"what the guest has set"
        assert fd_count() == before - 2, "two kick descriptors less"


@pytest.mark.parametrize(
    "state",
    [
        b"X",
        b"XVST" + bytes(7),
        b"XVST" + struct.pack("=II", 2, 0),
        b"QEVM" + struct.pack("=II", 1, 0),
        b"XVST" + struct.pack("=II", 1, 2**32 - 1),
        b"XVST" + struct.pack("=II", 1, 3) + b"four",
        b"XVST" + struct.pack("=II", 1, 8) + b"nonsense",
        os.urandom(1 << 16),
    ],
    ids=len,
)
def test_device_state_of_somebody_else_is_refused(bench: Bench, state: bytes) -> None:
    with bench.connect() as front:
        front.set_protocol_features(PROTOCOL)
        assert not front.load_state(state)
        assert bench.port.state == b""
        assert front.load_state(b"XVST" + struct.pack("=II", 1, 2) + b"ok"), "the session goes on"
        assert bench.port.state == b"ok"


def test_device_state_has_a_limit(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(PROTOCOL)
        with pytest.raises(PermissionError):
            front.load_state(bytes((1 << 16) + 1))


def test_device_state_in_a_wrong_order(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(PROTOCOL)
        assert front.ask_u64(Request.CHECK_DEVICE_STATE) == 1
        before = fd_count()
        for phase in (0, 1, 2**32 - 1):
            for direction in (0, 1):
                reading, writing = os.pipe()
                payload = struct.pack("=II", direction, phase)
                answer, fd = front.ask_fd(Request.SET_DEVICE_STATE_FD, payload, [writing])
                os.close(reading)
                os.close(writing)
                assert struct.unpack("=Q", answer)[0] == (0x101 if phase else 0)
                if fd is not None:
                    os.close(fd)
        assert front.ask_u64(Request.CHECK_DEVICE_STATE) == 1, "the last one was refused"
        assert fd_count() == before
        front.send(Request.SET_DEVICE_STATE_FD, struct.pack("=II", 2, 0), [0])
        refused(bench, front, Violation.VALUE)


def test_reset_forgets_a_transfer(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(PROTOCOL)
        front.sync()
        before = fd_count()
        reading, writing = os.pipe()
        _, channel = front.ask_fd(Request.SET_DEVICE_STATE_FD, bytes(8), [writing])
        assert channel is not None
        for fd in (reading, writing, channel):
            os.close(fd)
        front.tell(Request.RESET_DEVICE)
        assert front.ask_u64(Request.CHECK_DEVICE_STATE) == 1, "there is none to check"
        assert fd_count() == before


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/"])
def test_device_state_by_a_channel_of_the_wrong_kind(bench: Bench, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    with bench.connect() as front:
        front.set_protocol_features(PROTOCOL)
        front.send(Request.SET_DEVICE_STATE_FD, bytes(8), [fd])
        os.close(fd)
        refused(bench, front, Violation.FDS)


def test_reset_forgets_what_the_guest_has_set(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        device.front.tell(Request.RESET_DEVICE)
        device.front.sync()
        assert bench.port.states_reset == 1
        device.front.tell(Request.SET_STATUS, struct.pack("=Q", 0))
        device.front.sync()
        assert bench.port.states_reset == 2
