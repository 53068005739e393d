# SPDX-License-Identifier: Apache-2.0
"""Bug classes that were published against vhost back-ends, a test for each, named after it.

Not here, since there is nothing like it in a network back-end of this kind:

- CVE-2020-10724, CVE-2020-14374 to 14378, CVE-2026-86845 to 86848: crypto sessions and requests. What could concern us
  of them (a header that changes while it is read, an index beyond its table) is G6, G1 and G2.
- CVE-2021-3544 to 3546: GPU commands.
- CVE-2020-10942: vhost-net's tap and packet sockets are handed over by descriptor; nothing of that kind is taken here.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from support.arena import FEATURES, MACS, Arena, numbered
from support.frontend import (
    F_CTRL_VQ,
    F_IN_ORDER,
    F_INDIRECT,
    F_LOG_ALL,
    F_MRG_RXBUF,
    F_PACKED,
    P_INFLIGHT,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    Buffer,
    FrontEnd,
    NetDevice,
    Slot,
)
from support.process import wait_for
from support.virtqueue import DESC_INDIRECT, PackedQueue
from xdpvhost.vhost.errors import Violation
from xdpvhost.vhost.wire import Request

from .test_catalogue_guest import FAR, give, gpa, table

PROTOCOL = P_MQ | P_REPLY_ACK | P_LOG_SHMFD | P_INFLIGHT
INFLIGHT = struct.Struct("=QQHHI")
PAGE = 4096
TO_FRIEND, VM3 = MACS[3], MACS[2]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("arena"))
    try:
        yield arena
    finally:
        arena.close()


@pytest.fixture(params=["split", "packed"])
def features(request: pytest.FixtureRequest) -> int:
    return FEATURES | F_INDIRECT | (F_PACKED if request.param == "packed" else 0)


def sent_whole(arena: Arena, device: NetDevice, frame: bytes) -> None:
    """The fourth guest gets this frame, which the device has just made available."""
    wait_for(lambda: frame in arena.heard(), 5, "the frame")


def up_with(device: NetDevice, slots: list[Slot]) -> None:
    front = device.connect()
    front.set_features(device.features)
    front.set_mem_table(slots, [device.memory.fd] * len(slots))
    for index, queue in enumerate(device.queues):
        front.enable(index)
        front.set_queue(index, queue)
    front.sync()


def test_cve_2018_1059_buffers_over_the_end_of_a_region(arena: Arena, features: int) -> None:
    """Regions that follow each other for the guest lie anywhere here: each piece is looked up, a gap is an error."""
    with arena.nothing_left():
        with arena.device(features) as device:
            memory = device.memory
            frame = numbered(1, TO_FRIEND, VM3)
            cut = memory.alloc(8192, PAGE) - memory.gpa + PAGE
            start = memory.gpa + cut - 30
            up_with(device, memory.split(cut))
            memory.write(start, bytes(12) + frame)
            arena.heard()
            device.tx().add([Buffer(start, 12 + len(frame))])
            sent_whole(arena, device, frame)
        arena.idle()
    with arena.nothing_left():
        with arena.device(features) as device:
            low, high = device.memory.split(4 << 20)
            up_with(device, [low, Slot(high.gpa + PAGE, high.size - PAGE, high.user_addr + PAGE, high.offset + PAGE)])
            give(device, device.tx(), (low.gpa + low.size - 30, 72, 0))
            assert device.front.disconnected()
        arena.idle()


def test_cve_2018_1059_indirect_tables_over_the_end_of_a_region(arena: Arena, features: int) -> None:
    with arena.nothing_left(), arena.device(features) as device:
        memory, queue = device.memory, device.tx()
        frame = numbered(2, TO_FRIEND, VM3)
        cut = memory.alloc(8192, PAGE) - memory.gpa + PAGE
        data = gpa(device)
        memory.write(data, bytes(12) + frame)
        up_with(device, memory.split(cut))
        at = memory.gpa + cut - 24  # the second entry lies in two regions
        pieces = [(data, 12), (data + 12, 20), (data + 32, len(frame) - 20)]
        for index, (addr, length) in enumerate(pieces):
            more = index < len(pieces) - 1
            if isinstance(queue, PackedQueue):
                queue.write_desc(index, addr, length, 0, at)
                queue.write_flags(index, 0, at)
            else:
                queue.write_desc(index, addr, length, int(more), index + 1, at)
        arena.heard()
        give(device, queue, (at, 48, DESC_INDIRECT))
        sent_whole(arena, device, frame)


def test_cve_2018_1059_rings_over_the_end_of_a_region(arena: Arena, features: int) -> None:
    device = arena.device(features)
    ring = device.queues[0].desc - device.memory.gpa

    def attack(front: FrontEnd) -> None:
        front.set_features(device.features)
        front.set_mem_table(device.memory.split(ring + 2048), [device.memory.fd] * 2)
        front.set_queue(0, device.queues[0])

    assert "not inside guest memory" in arena.refused(attack, Violation.MEMORY)
    device.close()


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_cve_2019_14818_repeated_messages_leak_nothing(arena: Arena, features: int) -> None:
    """A ring's size, base, address and descriptors, ten thousand times over."""
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        queue, user = device.queues[0], device.memory.user
        front = device.front
        after: list[int] = []
        for turn in range(2500):
            front.send(Request.SET_VRING_NUM, struct.pack("=II", 0, (128, 256)[turn % 2]))
            front.send(Request.SET_VRING_BASE, struct.pack("=II", 0, 0))
            front.send(Request.SET_VRING_CALL, struct.pack("=Q", 0), [queue.call_fd])
            front.set_addr(0, user(queue.desc), user(queue.used), user(queue.avail))
            if turn in (500, 2499):
                front.sync()
                after.append(resident())
        assert after[1] - after[0] < 4 << 20


def test_cve_2020_10722_log_size_and_offset_wrap(arena: Arena) -> None:
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    for size, offset in ((PAGE, 2**64 - PAGE), (2**64 - PAGE, PAGE), (2**64 - 1, 2**64 - 1)):
        body = struct.pack("=QQ", size, offset)
        arena.refused(lambda front, body=body: front.send(Request.SET_LOG_BASE, body, [fd]), Violation.VALUE)
    os.close(fd)


@pytest.mark.parametrize("index", [0x10000, 0x10001, 0x10100, 2**31])
def test_cve_2020_10723_ring_number_of_more_than_16_bits(arena: Arena, index: int) -> None:
    """Not cut off to a number that exists."""
    fd = os.eventfd(0)
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        body = struct.pack("=Q", index)
        arena.refused(lambda front, r=request, body=body: front.send(r, body, [fd]), Violation.VALUE)
    os.close(fd)
    for request in (Request.SET_VRING_NUM, Request.GET_VRING_BASE, Request.SET_VRING_ENABLE):
        body = struct.pack("=II", index, 1)
        arena.refused(lambda front, r=request, body=body: front.send(r, body), Violation.VALUE)


@pytest.mark.parametrize("where", [FAR, 0, 2**64 - 16])
@pytest.mark.parametrize("place", range(4))
def test_cve_2020_10725_unmapped_descriptor_in_a_packed_batch(arena: Arena, where: int, place: int) -> None:
    """In whichever of the descriptors that are looked at together."""
    with arena.faulted(FEATURES | F_PACKED) as device:
        queue = device.tx()
        good = gpa(device)
        shown = []
        for index in range(8):
            queue.write_desc(queue.at, where if index == place else good, 72, index)
            shown.append((queue.at, queue.flags(queue.wrap)))
            queue.advance()
        for slot, flags in reversed(shown):
            queue.write_flags(slot, flags)
        queue.kick()


def test_cve_2020_10725_empty_descriptors_in_a_packed_batch(arena: Arena) -> None:
    with arena.nothing_left(), arena.device(FEATURES | F_PACKED) as device:
        device.up()
        arena.heard()
        for _ in range(4):
            device.tx().add([Buffer(0, 0)], publish=False)
        device.send(numbered(3, TO_FRIEND, VM3))
        sent_whole(arena, device, numbered(3, TO_FRIEND, VM3))


def test_cve_2020_10726_inflight_region_asked_for_again_and_again(arena: Arena, features: int) -> None:
    with arena.nothing_left(), arena.device(features, protocol_features=PROTOCOL) as device:
        device.up()
        before = resident()
        for _ in range(300):
            description, fd = device.front.get_inflight(2, 256)
            assert fd is not None
            device.front.set_inflight(description, fd)
            os.close(fd)
        assert resident() - before < 8 << 20


@pytest.mark.parametrize(("queues", "size"), [(65535, 256), (4, 256), (0, 256), (2, 65535), (2, 32769), (2, 0)])
def test_cve_2021_3839_inflight_numbers_beyond_the_device(arena: Arena, queues: int, size: int) -> None:
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 1 << 20)
    for request, fds in ((Request.SET_INFLIGHT_FD, [fd]), (Request.GET_INFLIGHT_FD, [])):
        body = INFLIGHT.pack(1 << 16, 0, queues, size, 0)
        arena.refused(lambda front, r=request, b=body, f=fds: front.send(r, b, f), Violation.VALUE)
    os.close(fd)


@pytest.mark.parametrize("count", [0, 2, 8])
def test_cve_2022_0669_surplus_descriptors_of_inflight_messages(arena: Arena, count: int) -> None:
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 1 << 20)
    body = INFLIGHT.pack(1 << 16, 0, 2, 256, 0)
    arena.refused(lambda front: front.send(Request.SET_INFLIGHT_FD, body, [fd] * count), Violation.FDS)
    if count:
        arena.refused(lambda front: front.send(Request.GET_INFLIGHT_FD, body, [fd] * count), Violation.FDS)
    os.close(fd)


@pytest.mark.parametrize("pieces", [(1,) * 12, (3, 3, 3, 3), (11, 1), (1, 11), (12,), (6, 7)], ids=str)
def test_cve_2022_2132_header_over_many_descriptors(arena: Arena, features: int, pieces: tuple[int, ...]) -> None:
    """More than two, and chains that end before the header does."""
    frame = numbered(4, TO_FRIEND, VM3)
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        arena.heard()
        data = bytes(12) + frame
        at = device.memory.alloc(len(data))
        device.memory.write(at, data)
        edges = [0, *(sum(pieces[: n + 1]) for n in range(len(pieces))), len(data)]
        device.tx().add([Buffer(at + a, b - a) for a, b in pairwise(edges)])
        sent_whole(arena, device, frame)
        before = arena.drops("tx", "bad_header")
        for length in range(1, 12):
            device.tx().add([Buffer(at + n, 1) for n in range(length)])
        wait_for(lambda: arena.drops("tx", "bad_header") == before + 11, 5, "eleven drops")


@pytest.mark.parametrize(
    ("start", "offset"), [(0xFFFF, 0xFFFF), (0xFFFF, 1), (1, 0xFFFF), (59, 0), (60, 2), (0, 59), (0xFFFE, 2)]
)
def test_cve_2024_11614_checksum_beyond_the_frame(arena: Arena, features: int, start: int, offset: int) -> None:
    """csum_start plus csum_offset wraps, or ends behind the frame."""
    with arena.nothing_left(), arena.device(features | 1) as device:
        device.up()
        before = arena.drops("tx", "bad_header")
        header = struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0)
        device.send(numbered(5, TO_FRIEND, VM3), header)
        wait_for(lambda: arena.drops("tx", "bad_header") == before + 1, 5, "the drop")


def racing(device: NetDevice, at: int, variants: list[bytes], turns: int, frame: bytes) -> None:
    """Sends the same buffer again and again while its bytes at `at` change."""
    stop = threading.Event()
    rng = random.Random(1)

    def mutate() -> None:
        while not stop.is_set():
            device.memory.write(at, rng.choice(variants))

    thread = threading.Thread(target=mutate)
    thread.start()
    try:
        for _ in range(turns):
            device.tx().add([Buffer(at, 12 + len(frame))])
            wait_for(lambda: device.sent() == 1, 5, "the chain to come back", 0.0005)
    finally:
        stop.set()
        thread.join()


def test_dpdk_285e6b8b18_header_that_changes_while_it_is_read(arena: Arena, features: int) -> None:
    """Offloads are judged by a copy of the header, and carried out by the same copy."""
    frame = numbered(6, TO_FRIEND, VM3)
    headers = [
        bytes(12),
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 14, 6, 0),
        struct.pack("<BBHHHHH", 1, 1, 54, 1, 34, 16, 0),
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 0xFFFF, 0xFFFF, 0),
    ]
    with arena.nothing_left(), arena.device(features | 1 | 1 << 11) as device:
        device.up()
        at = gpa(device)
        device.memory.write(at, bytes(12) + frame)
        racing(device, at, headers, 300, frame)
        assert device.front.ask_u64(Request.GET_FEATURES)


def test_dpdk_6ec1778134_control_queue_chains_and_ring_numbers(arena: Arena, features: int) -> None:
    """A chain of its whole table and more, and rings 255, 256 and 257."""
    with arena.nothing_left():
        with arena.device(features | F_CTRL_VQ, queue_size=64) as device:
            device.queues.append(device.new_queue(64))
            device.up()
            ctrl, at = device.queues[2], gpa(device)
            ctrl.add([Buffer(at, 1)] * 63 + [Buffer(at + 64, 1, True)])
            wait_for(lambda: list(ctrl.reap()), 5, "the answer")
            ctrl.add([Buffer(table(device, ctrl, (at, 1, 0, 0)), 2), Buffer(at + 64, 1, True)])
            wait_for(lambda: list(ctrl.reap()), 5, "the answer")
        arena.idle()
    for index in (255, 256, 257):
        body = struct.pack("=II", index, 1)
        arena.refused(lambda front, b=body: front.send(Request.SET_VRING_ENABLE, b), Violation.VALUE)


@pytest.mark.parametrize("size", [0, 1 << 20 | 1, 1 << 40, 2**63, 2**64 - 1])
def test_cve_2026_86561_memory_larger_than_its_file(arena: Arena, size: int) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 20)
    body = struct.pack("=II4Q", 1, 0, 0, size, 0, 0)
    arena.refused(lambda front: front.send(Request.SET_MEM_TABLE, body, [fd]), Violation.VALUE, Violation.MEMORY)
    os.close(fd)


def test_cve_2026_86562_control_command_read_twice(arena: Arena, features: int) -> None:
    """Counts of a MAC table that grow behind the check: test_g6_control_command_that_changes_while_it_is_read has the
    race; here the lengths of its descriptors change, too."""
    stop = threading.Event()
    rng = random.Random(2)
    with arena.nothing_left(), arena.device(features | F_CTRL_VQ, queue_size=64) as device:
        device.queues.append(device.new_queue(64))
        device.up()
        ctrl, at = device.queues[2], gpa(device)

        def mutate() -> None:
            while not stop.is_set():
                slot = rng.randrange(4)
                device.memory.write(ctrl.desc + 16 * slot + 8, struct.pack("<I", rng.choice((1, 2, 64, 4097, 2**31))))
                device.memory.write(at, bytes((1, 0)) + struct.pack("<I", rng.randrange(2**32)))

        thread = threading.Thread(target=mutate)
        thread.start()
        try:
            for _ in range(100):
                if not arena.endpoint.connected or ctrl.free < 4:
                    break
                ctrl.add([Buffer(at, 2), Buffer(at + 2, 64), Buffer(at + 128, 1, True)])
                list(ctrl.reap())
                arena.stream.moved()
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("offset", [PAGE, 3 * PAGE, 8, 12345])
def test_cve_2026_86563_log_offset_added_once(arena: Arena, features: int, offset: int) -> None:
    """The bits are where the front-end looks for them, and not a byte of the file around them changes."""
    with arena.nothing_left(), arena.device(features, protocol_features=PROTOCOL) as device:
        device.up()
        device.post(8)
        size = (device.memory.gpa + device.memory.size) // PAGE // 8
        fd = os.memfd_create("log")
        os.ftruncate(fd, offset + size + 2 * PAGE)
        device.front.set_log(fd, size, offset)
        device.front.set_features(device.features | F_LOG_ALL)
        device.front.sync()
        arena.send_to_guest(*(numbered(number, VM3, TO_FRIEND) for number in range(4)))
        wait_for(lambda: len(device.received(recycle=False)) >= 1, 5, "frames")
        device.front.set_features(device.features)
        device.front.sync()
        content = os.pread(fd, offset + size + 2 * PAGE, 0)
        os.close(fd)
        assert not any(content[:offset])
        assert not any(content[offset + size :])
        marked = {at: byte for at, byte in enumerate(content[offset : offset + size]) if byte}
        pages = {8 * at + bit for at, byte in marked.items() for bit in range(8) if byte >> bit & 1}
        assert pages
        first = device.memory.gpa // PAGE
        assert pages <= set(range(first, first + device.memory.size // PAGE))


@pytest.mark.parametrize(("made_for", "num"), [(64, 256), (256, 64), (8, 32768)])
def test_cve_2026_86565_ring_size_changes_after_the_inflight_region(
    arena: Arena, features: int, made_for: int, num: int
) -> None:
    """A ring larger than its part does not start; a smaller one uses a part of it; nothing is written beyond."""
    with arena.nothing_left():
        with arena.device(features, queue_size=num, memory_size=16 << 20, protocol_features=PROTOCOL) as device:
            front = device.connect()
            front.set_protocol_features(PROTOCOL)
            front.set_features(device.features)
            description, fd = front.get_inflight(2, made_for)
            assert fd is not None
            front.set_inflight(description, fd)
            size = os.fstat(fd).st_size
            front.set_mem_table(device.memory.slots, [device.memory.fd])
            front.state(Request.SET_VRING_NUM, 0, made_for)
            front.send(Request.SET_VRING_NUM, struct.pack("=II", 0, num))
            queue, user = device.queues[0], device.memory.user
            parts = (user(queue.desc), user(queue.used), user(queue.avail))
            front.send(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, *parts, 0))
            front.send(Request.SET_VRING_KICK, struct.pack("=Q", 0), [queue.kick_fd])
            if num > made_for:
                assert front.disconnected()
            else:
                front.sync()
            assert os.fstat(fd).st_size == size
            os.close(fd)
        arena.idle()


@pytest.mark.parametrize("mergeable", [0, F_MRG_RXBUF])
@pytest.mark.parametrize("pieces", [(5, 3), (11, 1), (1, 1, 1), (11, 2, 1), (12, 1), (1, 12, 40)], ids=str)
def test_cve_2026_86566_runt_buffers_towards_the_guest(
    arena: Arena, features: int, pieces: tuple[int, ...], mergeable: int
) -> None:
    """The first descriptor is shorter than the header and the second than the rest of it: nothing underflows."""
    with arena.nothing_left(), arena.device(features & ~F_MRG_RXBUF | mergeable) as device:
        device.up()
        start = device.memory.alloc(64 * 64)
        device.memory.write(start, b"\xaa" * 4096)
        for turn in range(8):
            at = start + 256 * turn
            device.rx().add([Buffer(at + 64 * n, piece, True) for n, piece in enumerate(pieces)])
        arena.send_to_guest(*(numbered(number, VM3, TO_FRIEND) for number in range(3)))
        device.front.ask_u64(Request.GET_FEATURES)
        for turn in range(8):
            memory = device.memory.read(start + 256 * turn, 256)
            for n, piece in enumerate(pieces):
                assert memory[64 * n + piece : 64 * n + 64] == b"\xaa" * (64 - piece)


def test_cve_2026_93683_indirect_length_read_once(arena: Arena, features: int) -> None:
    """It shrinks and grows, to no multiple of 16 and beyond memory, while the table is walked."""
    stop = threading.Event()
    rng = random.Random(3)
    with arena.nothing_left():
        with arena.device(features, queue_size=16) as device:
            device.up()
            queue, data = device.tx(), gpa(device)
            inner = table(device, queue, *[(data, 12, 1, at + 1) for at in range(7)], (data, 60, 0, 0))

            def mutate() -> None:
                while not stop.is_set():
                    slot = rng.randrange(16)
                    device.memory.write(queue.desc + 16 * slot + 8, struct.pack("<I", rng.choice((128, 16, 32, 128))))

            thread = threading.Thread(target=mutate)
            thread.start()
            try:
                for turn in range(300):
                    if not arena.endpoint.connected or queue.free < 1:
                        break
                    give(device, queue, (inner, 128, DESC_INDIRECT))
                    if turn % 50 == 0:
                        arena.stream.moved()
            finally:
                stop.set()
                thread.join()
        arena.idle()


@pytest.mark.parametrize("kind", [1, 4, 5, 0x81, 0x84], ids=hex)
@pytest.mark.parametrize("header_length", [0, 1, 54, 70, 0xFFFF])
def test_cve_2026_100236_gso_header_longer_than_the_frame(
    arena: Arena, features: int, kind: int, header_length: int
) -> None:
    """hdr_len is the guest's word, and the frame's own headers may be a lie: both are checked before either is used."""
    everything = features | 1 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 56
    frames = [
        numbered(1, TO_FRIEND, VM3),
        TO_FRIEND + VM3 + b"\x08\x00" + b"\x4f" + bytes(8) + b"\x06" + bytes(40),
        TO_FRIEND + VM3 + b"\x86\xdd" + b"\x60" + bytes(5) + b"\x06" + bytes(8),
        TO_FRIEND + VM3 + b"\x08\x00" + b"\x45" + bytes(8) + b"\x06" + bytes(22) + b"\xf0" + bytes(7),
    ]
    with arena.nothing_left(), arena.device(everything) as device:
        device.up()
        for frame in frames:
            for start in (14, 34, 54, 0xFFFF):
                device.send(frame, struct.pack("<BBHHHHH", 1, kind, header_length, 100, start, 16, 0))
        wait_for(lambda: device.sent() >= 0 and not device.tx().chains, 5, "the chains to come back")
        arena.heard()
        assert device.front.ask_u64(Request.GET_FEATURES)


@pytest.mark.parametrize("count", [9, 255, 2**31, 2**32 - 1])
def test_qemu_4403_numbers_that_index_arrays(arena: Arena, count: int) -> None:
    """Regions of a memory table, and rings of every message that names one."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, PAGE)
    body = struct.pack("=II", count, 0) + struct.pack("=QQQQ", 0, PAGE, 0, 0) * 8
    arena.refused(lambda front: front.send(Request.SET_MEM_TABLE, body, [fd] * 8), Violation.VALUE)
    address = struct.pack("=IIQQQQ", count, 0, 0, 0, 0, 0)
    arena.refused(lambda front: front.send(Request.SET_VRING_ADDR, address), Violation.VALUE)
    os.close(fd)


def test_qemu_3974_3882_ring_size_changes_under_traffic(arena: Arena, features: int) -> None:
    """With frames on their way in order; and with an in-flight region, which is for one size, so that it is refused."""
    with arena.nothing_left(), arena.device(features | F_IN_ORDER, protocol_features=PROTOCOL) as device:
        device.up()
        for turn in range(20):
            device.send(numbered(turn, TO_FRIEND, VM3))
            device.front.state(Request.SET_VRING_NUM, 1, 128)
            device.front.state(Request.SET_VRING_NUM, 1, 256)
        assert device.front.ask_u64(Request.GET_FEATURES)
    with arena.nothing_left():
        with arena.device(features, protocol_features=PROTOCOL) as device:
            device.up()
            description, fd = device.front.get_inflight(2, 256)
            assert fd is not None
            device.front.set_inflight(description, fd)
            os.close(fd)
            device.front.send(Request.SET_VRING_NUM, struct.pack("=II", 1, 128))
            assert device.front.disconnected()
        arena.idle()
    arena.heard()


def test_cve_2016_5403_more_available_than_the_ring_has(arena: Arena) -> None:
    with arena.faulted(FEATURES) as device:
        queue = device.tx()
        queue.avail_idx = queue.size + 1
        queue.publish(kick=False)
        queue.kick()


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_cve_2019_14835_empty_descriptors_while_logging(arena: Arena, features: int, direction: str) -> None:
    """As many of them as fit in a chain: what is to be logged is never more than what was written."""
    size = (0x4000_0000 + (8 << 20)) // PAGE // 8
    fd = os.memfd_create("log")
    os.ftruncate(fd, size)
    with arena.nothing_left():
        with arena.device(features | F_LOG_ALL, protocol_features=PROTOCOL, queue_size=64) as device:
            device.up()
            device.front.set_log(fd, size)
            write = direction == "rx"
            queue = device.rx() if write else device.tx()
            at = gpa(device)
            for _ in range(3):
                nothing = [Buffer(at, 0, write)]
                queue.add(nothing * 15 + [Buffer(at, 100 if write else 72, write)] + nothing * 4)
            arena.send_to_guest(numbered(1, VM3, TO_FRIEND))
            device.front.ask_u64(Request.GET_FEATURES)
        arena.idle()
    os.close(fd)


def test_cve_2018_16880_very_many_tiny_buffers_for_one_frame(arena: Arena, features: int) -> None:
    """A frame that would need more buffers than are ever merged is dropped."""
    with arena.nothing_left(), arena.device(features, queue_size=1024) as device:
        device.up()
        start = device.memory.alloc(16 * 1024)
        for index in range(1000):
            device.rx().add([Buffer(start + 16 * index, 13 if index % 2 else 12, True)], publish=False)
        device.rx().publish()
        before = arena.drops("rx", "too_big")
        arena.send_to_guest(numbered(1, VM3, TO_FRIEND).ljust(9000, b"x"))
        wait_for(lambda: arena.drops("rx", "too_big") == before + 1 or arena.faults, 5, "the drop")


def test_cve_2024_0340_replies_have_nothing_of_our_memory(arena: Arena) -> None:
    """Every byte of every reply is one that was meant: padding and what lies behind a structure are zero."""
    with arena.nothing_left(), arena.connect() as front:
        for _ in range(20):
            assert front.get_config(256)[64:] == bytes(192)
            description, fd = front.get_inflight(2, 256)
            assert fd is not None
            content = os.pread(fd, 1 << 20, 0)
            os.close(fd)
            assert description[20:] == bytes(4)
            assert not any(content)
            answer, channel = front.ask_fd(Request.SET_DEVICE_STATE_FD, struct.pack("=II", 1, 0), [front.sock.fileno()])
            assert channel is not None
            assert answer == bytes(8)
            assert not any(os.pread(channel, 1 << 17, 0))
            os.close(channel)
