# SPDX-License-Identifier: Apache-2.0
"""The checklist for hostile guests, its data path: items G1 to G10, with split and with packed rings.

A guest that lies in its rings or memory loses its connection; one that sends nonsense has it dropped and counted. Two
other guests exchange frames through all of it (support/arena.py): none is lost, and nothing of the guest stays behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.arena import FEATURES, MACS, Arena, numbered
from support.frontend import (
    F_CTRL_VQ,
    F_EVENT_IDX,
    F_INDIRECT,
    F_MRG_RXBUF,
    F_PACKED,
    Buffer,
    NetDevice,
)
from support.process import wait_for
from support.virtqueue import DESC_INDIRECT, DESC_NEXT, DESC_WRITE, PACKED_AVAIL, PACKED_USED, PackedQueue, Queue

Trick = Callable[[NetDevice, Any], None]
KINDS = {"split": FEATURES | F_INDIRECT, "packed": FEATURES | F_INDIRECT | F_PACKED}
TO_FRIEND, TO_NOBODY = MACS[3], MACS[4]
VM3 = MACS[2]
FAR = 1 << 40


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    arena = Arena(tmp_path_factory.mktemp("arena"))
    try:
        yield arena
    finally:
        arena.close()


@pytest.fixture(params=KINDS)
def features(request: pytest.FixtureRequest) -> int:
    return KINDS[request.param]


def gpa(device: NetDevice) -> int:
    return device.memory.alloc(4096)


# ---- raw descriptors: (address, length, flags, next) ----


def put(queue: Queue, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
    """Writes descriptors 0, 1, … and makes `head` available."""
    for index, (addr, length, flags, following) in enumerate(descriptors):
        queue.write_desc(index, addr, length, flags, following)
    queue.push(head)
    queue.publish(kick=False)
    queue.kick()


def poke(queue: PackedQueue, *descriptors: tuple[int, int, int]) -> None:
    """Makes descriptors available from the queue's place on: (address, length, flags)."""
    first = queue.at
    shown = []
    for index, (addr, length, flags) in enumerate(descriptors):
        queue.write_desc(queue.at, addr, length, index)
        shown.append((queue.at, flags | queue.flags(queue.wrap)))
        queue.advance()
    for slot, flags in reversed(shown):
        queue.write_flags(slot, flags)
    assert shown[0][0] == first
    queue.kick()


def give(device: NetDevice, queue: Any, *descriptors: tuple[int, int, int]) -> None:
    """One chain, of either kind, with nothing checked: NEXT is set in all but the last."""
    last = len(descriptors) - 1
    if isinstance(queue, PackedQueue):
        poke(queue, *((a, n, flags | (DESC_NEXT if at < last else 0)) for at, (a, n, flags) in enumerate(descriptors)))
    else:
        put(
            queue,
            *((a, n, f | (DESC_NEXT if at < last else 0), at + 1) for at, (a, n, f) in enumerate(descriptors)),
        )


def table(device: NetDevice, queue: Any, *entries: tuple[int, int, int, int]) -> int:
    """An indirect table; where it is."""
    at = device.memory.alloc(max(16 * len(entries), 16))
    for index, (addr, length, flags, following) in enumerate(entries):
        if isinstance(queue, PackedQueue):
            queue.write_desc(index, addr, length, following, at)
            queue.write_flags(index, flags, at)
        else:
            queue.write_desc(index, addr, length, flags, following, at)
    return at


def at_the_end(device: NetDevice, queue: Any) -> int:
    """A table whose first entry is the last of memory, and says that there is another."""
    last = device.memory.gpa + device.memory.size - 16
    flags = 0 if isinstance(queue, PackedQueue) else DESC_NEXT
    device.memory.write(last, struct.pack("<QIHH", gpa(device), 12, flags, 1))
    return last


# ---- G1: indices and heads ----


def move_avail(by: int) -> Trick:
    def trick(_device: NetDevice, queue: Queue) -> None:
        queue.avail_idx = (queue.avail_idx + by) & 0xFFFF
        queue.publish(kick=False)
        queue.kick()

    return trick


G1_SPLIT: dict[str, Trick] = {
    "available index ahead by more than the ring": lambda d, q: move_avail(q.size + 1)(d, q),
    "available index back by one": move_avail(-1),
    "available index far back": move_avail(-0x7FFF),
    "head one behind the table": lambda _d, q: put(q, head=q.size),
    "head 0xffff": lambda _d, q: put(q, head=0xFFFF),
}


@pytest.mark.parametrize("trick", G1_SPLIT)
@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_g1_lies_about_indices(arena: Arena, trick: str, direction: str) -> None:
    with arena.faulted(KINDS["split"]) as device:
        G1_SPLIT[trick](device, device.tx() if direction == "tx" else device.rx())
        arena.send_to_guest(numbered(1, VM3, TO_FRIEND))


def test_g1_stale_entries_and_duplicate_heads(arena: Arena) -> None:
    """An index that is one, or a ring, too far shows old entries: empty chains, or the same one again and again."""
    with arena.nothing_left(), arena.device(KINDS["split"]) as device:
        device.up()
        queue = device.tx()
        move_avail(1)(device, queue)
        move_avail(queue.size - 1)(device, queue)
        wait_for(lambda: device.memory.u16(queue.used + 2) == queue.size, 5, "empty chains to come back")
        queue.write_desc(0, gpa(device), 72, 0, 0)
        for _ in range(queue.size):
            queue.push(0)
        queue.publish(kick=False)
        queue.kick()
        wait_for(lambda: device.memory.u16(queue.used + 2) == 2 * queue.size & 0xFFFF, 5, "one chain as often")
        assert device.front.ask_u64(1)


def test_g1_ids_of_a_packed_ring_are_echoed(arena: Arena) -> None:
    """An id means nothing to the device (virtio 1.2, 2.8.1): 0xffff, or the same one twice, goes back as it came."""
    with arena.nothing_left(), arena.device(KINDS["packed"]) as device:
        device.up()
        queue = device.tx()
        for ident in (0xFFFF, 300, 7, 7):
            slot, flags = queue.at, queue.flags(queue.wrap)
            queue.write_desc(slot, gpa(device), 72, ident)
            queue.write_flags(slot, flags)
            queue.advance()
            queue.kick()
            wait_for(lambda slot=slot: queue.read_flags(slot) & PACKED_USED, 5, "the descriptor to be used")
            assert struct.unpack("<H", device.memory.read(queue.desc + 16 * slot + 12, 2))[0] == ident


def test_g1_random_flags_all_over_a_packed_ring(arena: Arena) -> None:
    rng = random.Random(1)
    with arena.nothing_left():
        for _ in range(20):
            with arena.device(KINDS["packed"], queue_size=16) as device:
                device.up()
                queue = device.queues[rng.randrange(2)]
                for slot in range(queue.size):
                    where = rng.choice((gpa(device), 0, FAR))
                    queue.write_desc(slot, where, rng.choice((0, 12, 72, 2**32 - 1)), rng.randrange(65536))
                    queue.write_flags(slot, rng.randrange(65536))
                queue.kick()
                arena.send_to_guest(numbered(1, VM3, TO_FRIEND))
            arena.idle()


# ---- G2: chains ----

G2_SPLIT: dict[str, Trick] = {
    "next outside the table": lambda d, q: put(q, (gpa(d), 64, DESC_NEXT, q.size)),
    "next 0xffff": lambda d, q: put(q, (gpa(d), 64, DESC_NEXT, 0xFFFF)),
    "chain to itself": lambda d, q: put(q, (gpa(d), 64, DESC_NEXT, 0)),
    "loop of two": lambda d, q: put(q, (gpa(d), 64, DESC_NEXT, 1), (gpa(d), 64, DESC_NEXT, 0)),
    "loop of empty descriptors": lambda d, q: put(q, (gpa(d), 0, DESC_NEXT, 1), (gpa(d), 0, DESC_NEXT, 0)),
}
G2_PACKED: dict[str, Trick] = {
    "chain of the whole ring": lambda d, q: poke(q, *[(gpa(d), 1, DESC_NEXT)] * q.size),
}
G2_BOTH: dict[str, Trick] = {
    "address outside memory": lambda d, q: give(d, q, (FAR, 64, 0)),
    "address 0": lambda d, q: give(d, q, (0, 64, 0)),
    "address wraps": lambda d, q: give(d, q, (2**64 - 16, 64, 0)),
    "length over the end": lambda d, q: give(d, q, (d.memory.gpa + d.memory.size - 32, 64, 0)),
    "second descriptor outside": lambda d, q: give(d, q, (gpa(d), 12, 0), (FAR, 64, 0)),
    "indirect of no entries": lambda d, q: give(d, q, (table(d, q), 0, DESC_INDIRECT)),
    "indirect of 17 bytes": lambda d, q: give(d, q, (table(d, q, (gpa(d), 64, 0, 0)), 17, DESC_INDIRECT)),
    "indirect too long": lambda d, q: give(d, q, (gpa(d), 16 * (q.size + 1), DESC_INDIRECT)),
    "indirect of 4 GiB": lambda d, q: give(d, q, (gpa(d), 2**32 - 16, DESC_INDIRECT)),
    "indirect with next": lambda d, q: give(d, q, (table(d, q, (gpa(d), 64, 0, 0)), 16, DESC_INDIRECT), (gpa(d), 9, 0)),
    "indirect in indirect": lambda d, q: give(d, q, (table(d, q, (gpa(d), 16, DESC_INDIRECT, 0)), 16, DESC_INDIRECT)),
    "indirect outside memory": lambda d, q: give(d, q, (FAR, 16, DESC_INDIRECT)),
    "indirect over the end": lambda d, q: give(d, q, (at_the_end(d, q), 32, DESC_INDIRECT)),
}
G2_INDIRECT_SPLIT: dict[str, Trick] = {
    "loop in indirect": lambda d, q: give(
        d, q, (table(d, q, (gpa(d), 64, DESC_NEXT, 1), (gpa(d), 64, DESC_NEXT, 0)), 32, DESC_INDIRECT)
    ),
    "next outside indirect": lambda d, q: give(d, q, (table(d, q, (gpa(d), 64, DESC_NEXT, 1)), 16, DESC_INDIRECT)),
}


@pytest.mark.parametrize("trick", G2_BOTH)
def test_g2_chains_from_the_guest(arena: Arena, features: int, trick: str) -> None:
    with arena.faulted(features) as device:
        G2_BOTH[trick](device, device.tx())


@pytest.mark.parametrize("trick", [*G2_SPLIT, *G2_INDIRECT_SPLIT])
def test_g2_chains_of_a_split_ring(arena: Arena, trick: str) -> None:
    with arena.faulted(KINDS["split"]) as device:
        (G2_SPLIT | G2_INDIRECT_SPLIT)[trick](device, device.tx())


@pytest.mark.parametrize("trick", G2_PACKED)
@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_g2_chains_of_a_packed_ring(arena: Arena, trick: str, direction: str) -> None:
    with arena.faulted(KINDS["packed"]) as device:
        G2_PACKED[trick](device, device.tx() if direction == "tx" else device.rx())
        arena.send_to_guest(numbered(1, VM3, TO_FRIEND))


G2_RX: dict[str, Trick] = {
    "readable buffer": lambda d, q: give(d, q, (gpa(d), 2048, 0)),
    "address outside memory": lambda d, q: give(d, q, (FAR, 2048, DESC_WRITE)),
    "length over the end": lambda d, q: give(d, q, (d.memory.gpa + d.memory.size - 32, 64, DESC_WRITE)),
    "indirect outside memory": lambda d, q: give(d, q, (FAR, 16, DESC_INDIRECT)),
    "empty buffer": lambda d, q: give(d, q, (gpa(d), 0, DESC_WRITE)),
    "writable, then readable": lambda d, q: give(d, q, (gpa(d), 20, DESC_WRITE), (gpa(d), 2048, 0)),
}


@pytest.mark.parametrize("trick", G2_RX)
def test_g2_chains_towards_the_guest(arena: Arena, features: int, trick: str) -> None:
    with arena.faulted(features) as device:
        G2_RX[trick](device, device.rx())
        arena.send_to_guest(numbered(1, VM3, TO_FRIEND))


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_g2_memory_truncated_under_the_data_plane(arena: Arena, features: int, direction: str) -> None:
    """SIGBUS in a worker costs that guest its connection only."""
    with arena.faulted(features) as device:
        if direction == "rx":
            device.post(4)
        os.ftruncate(device.memory.fd, 0)
        device.tx().kick()
        arena.send_to_guest(numbered(1, VM3, TO_FRIEND))


# ---- G3: frames from the guest ----


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([0], "bad_header"),
        ([1], "bad_header"),
        ([11], "bad_header"),
        ([12], "runt"),
        ([12, 13], "runt"),
        ([1] * 12, "runt"),
        ([0, 12, 0], "runt"),
        ([12, 66000], "too_big"),
        ([12, 70000], "too_big"),
        ([12, -60], "bad_chain"),
        ([-2048], "bad_chain"),
    ],
    ids=str,
)
def test_g3_bad_frames_are_dropped_and_counted(arena: Arena, features: int, chain: list[int], reason: str) -> None:
    """Lengths around the header's, and above what a frame can have. Negative: device-writable descriptors."""
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        before = arena.drops("tx", reason)
        device.tx().add([Buffer(device.memory.alloc(max(abs(size), 1)), abs(size), size < 0) for size in chain])
        wait_for(lambda: device.sent() == 1, 5, "the chain to come back")
        wait_for(lambda: arena.drops("tx", reason) == before + 1, 5, f"a drop with reason {reason}")
        arena.heard()
        device.send(numbered(5, TO_FRIEND, VM3))
        wait_for(lambda: numbered(5, TO_FRIEND, VM3) in arena.heard(), 5, "a good frame after it")


def test_g3_header_and_frame_in_pieces_of_one_byte(arena: Arena, features: int) -> None:
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        arena.heard()
        frame = numbered(6, TO_FRIEND, VM3)
        device.send(frame, cuts=range(1, 12 + len(frame)), indirect=True)
        wait_for(lambda: frame in arena.heard(), 5, "the frame")


# ---- G4: buffers towards the guest ----


@pytest.mark.parametrize("mergeable", [0, F_MRG_RXBUF])
@pytest.mark.parametrize("size", [1, 5, 11, 12, 13, 40])
def test_g4_tiny_buffers(arena: Arena, features: int, size: int, mergeable: int) -> None:
    """Shorter than the header or the frame: what does not fit is dropped, and nothing is written beyond a buffer."""
    with arena.nothing_left(), arena.device(features & ~F_MRG_RXBUF | mergeable) as device:
        device.up()
        start = device.memory.alloc(64 * 200)
        device.memory.write(start, b"\xaa" * 64 * 200)
        for index in range(200):
            device.rx().add([Buffer(start + 64 * index, size, True)], publish=False)
        device.rx().publish()
        arena.send_to_guest(*(numbered(number, VM3, TO_FRIEND) for number in range(3)))
        device.front.ask_u64(1)
        memory = device.memory.read(start, 64 * 200)
        assert all(memory[64 * at + size : 64 * at + 64] == b"\xaa" * (64 - size) for at in range(200))


def test_g4_runt_first_descriptor(arena: Arena, features: int) -> None:
    """The header over several descriptors of one buffer, the first shorter than it."""
    with arena.nothing_left(), arena.device(features & ~F_MRG_RXBUF) as device:
        device.up()
        for first in (1, 5, 11):
            pieces = [first, 3, 2000]
            device.rx().add([Buffer(device.memory.alloc(n), n, True) for n in pieces])
            arena.send_to_guest(numbered(first, VM3, TO_FRIEND))
            got = wait_for(lambda: device.received(recycle=False), 5, "the frame")
            assert got[0][1] == numbered(first, VM3, TO_FRIEND)


def test_g4_no_buffers_and_too_few_for_a_large_frame(arena: Arena, features: int) -> None:
    """A frame that finds buffers for a part of it leaves them all unused."""
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        large = numbered(1, VM3, TO_FRIEND).ljust(1500, b"x")
        before = arena.drops("rx", "no_buffers")
        arena.send_to_guest(large)
        wait_for(lambda: arena.drops("rx", "no_buffers") == before + 1, 5, "a drop without buffers")
        device.post(3, size=100)
        arena.send_to_guest(large)
        wait_for(lambda: arena.drops("rx", "no_buffers") == before + 2, 5, "a drop half way")
        assert not device.received()
        device.post(30, size=100)
        arena.send_to_guest(large)
        assert [frame for _, frame in device.receive(1)] == [large]


# ---- G5: headers ----


def test_g5_random_headers(arena: Arena, features: int) -> None:
    """Whatever a header says, the frame is dropped or arrives with the length that it has."""
    rng = random.Random(5)
    wild = [
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 0xFFFF, 0xFFFF, 0),
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 60, 0, 0),
        struct.pack("<BBHHHHH", 0, 1, 0, 0, 0, 0, 0),
        struct.pack("<BBHHHHH", 0, 1, 0xFFFF, 1, 0, 0, 0),
        struct.pack("<BBHHHHH", 0, 0xFF, 0xFFFF, 1, 0, 0, 0xFFFF),
        struct.pack("<BBHHHHH", 0xFF, 0, 0, 0, 0, 0, 0),
        *(rng.randbytes(12) for _ in range(200)),
    ]
    everything = features | 1 | 1 << 11 | 1 << 12 | 1 << 13  # CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN
    with arena.nothing_left(), arena.device(everything) as device:
        device.up()
        for header in wild:
            frame = numbered(1, TO_FRIEND, VM3) + rng.randbytes(rng.randrange(200))
            device.send(frame, header)
            wait_for(lambda: device.sent() == 1, 5, "the chain to come back", 0.001)
            assert all(len(got) == len(frame) for got in arena.heard() if got[:12] == frame[:12])
        assert device.front.ask_u64(1)


# ---- G6: what changes while it is read ----


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_g6_descriptors_that_change_while_they_are_read(arena: Arena, features: int, direction: str) -> None:
    """Address, length, flags, next and header flip all the time: whatever is read, nobody else is harmed."""
    stop = threading.Event()
    rng = random.Random(6)
    with arena.nothing_left(), arena.device(features | F_EVENT_IDX, queue_size=16) as device:
        device.up()
        queue = device.tx() if direction == "tx" else device.rx()
        good, kind = gpa(device), DESC_WRITE if direction == "rx" else 0
        inner = table(device, queue, *[(good, 64, kind | DESC_NEXT, at + 1) for at in range(3)], (good, 64, kind, 0))
        laps = (0, PACKED_AVAIL, PACKED_USED, PACKED_AVAIL | PACKED_USED)
        shapes = [(good, 100, kind), (good, 2048, kind), (inner, 64, DESC_INDIRECT), (inner, 16, DESC_INDIRECT)]

        def mutate() -> None:
            while not stop.is_set():
                slot = rng.randrange(queue.size)
                addr, length, flags = rng.choice(shapes)
                if isinstance(queue, PackedQueue):
                    queue.write_desc(slot, addr, length, rng.randrange(16))
                    queue.write_flags(slot, flags | rng.choice(laps))
                else:
                    queue.write_desc(slot, addr, length, flags | rng.choice((0, DESC_NEXT)), rng.randrange(queue.size))
                device.memory.write(good, rng.randbytes(12))

        mutator = threading.Thread(target=mutate)
        mutator.start()
        try:
            for number in range(150):
                if not arena.endpoint.connected:
                    break
                if not isinstance(queue, PackedQueue):
                    queue.push(rng.randrange(queue.size))
                    queue.publish(kick=False)
                queue.kick()
                arena.send_to_guest(numbered(number, VM3, TO_FRIEND))
        finally:
            stop.set()
            mutator.join()


# ---- G7: notifications ----


def test_g7_kick_storm(arena: Arena, features: int) -> None:
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        device.post(8)
        before = arena.stream.delivered
        for _ in range(100_000):
            device.tx().kick()
            device.rx().kick()
        arena.stream.moved()
        assert arena.stream.delivered > before
        device.front.ask_u64(1)


def fill(eventfd: int) -> None:
    """So that it takes no more."""
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(eventfd)
    os.eventfd_write(eventfd, 2**64 - 2)


def test_g7_interrupts_that_nobody_takes(arena: Arena, features: int) -> None:
    """Its call descriptor is full; what cannot be told is counted, and the frames come all the same."""
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        device.post(64)
        fill(device.rx().call_fd)
        for number in range(8):
            arena.send_to_guest(numbered(number, VM3, TO_FRIEND))
        assert len(device.receive(8)) == 8
        assert arena.entry.port.rx_counters(0).calls_failed


def test_g7_interrupt_that_blocks(arena: Arena, features: int) -> None:
    """The front-end shares the descriptor and takes O_NONBLOCK away: the watchdog ends the write, and the session."""
    with arena.faulted(features) as device:
        device.post(64)
        fill(device.rx().call_fd)
        os.set_blocking(device.rx().call_fd, True)
        device.front.ask_u64(1)
        arena.friend.send(numbered(1, VM3, TO_FRIEND))


def test_g7_random_event_indices(arena: Arena, features: int) -> None:
    rng = random.Random(7)
    with arena.nothing_left(), arena.device(features | F_EVENT_IDX) as device:
        device.up()
        device.post(200)
        rx = device.rx()
        where = rx.avail if isinstance(rx, PackedQueue) else rx.avail + 4 + 2 * rx.size
        for number in range(100):
            device.memory.set_u16(where, rng.randrange(65536))
            if isinstance(rx, PackedQueue):
                device.memory.set_u16(where + 2, rng.randrange(65536))
            arena.send_to_guest(numbered(number, VM3, TO_FRIEND))
        got: list[Any] = []
        wait_for(lambda: got.extend(device.received(recycle=False)) or len(got) == 100, 5, "100 frames")


def test_g7_ring_without_buffers_for_seconds(arena: Arena, features: int) -> None:
    """What is sent to a guest that does not read is dropped, after a little patience; nobody waits for it."""
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        before, end = arena.stream.delivered, time.monotonic() + 3
        while time.monotonic() < end:
            arena.send_to_guest(*(numbered(number, VM3, TO_FRIEND) for number in range(32)))
        assert arena.stream.delivered - before > 200
        assert arena.drops("rx", "no_buffers") > 200


# ---- G8: isolation ----


def test_g8_everything_at_once(arena: Arena, features: int) -> None:
    """Bad frames, kicks and reconfiguration together; the others' bursts stay quick."""
    rng = random.Random(8)
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        mark = device.memory.mark()
        arena.stream.slowest = 0.0
        for turn in range(100):
            device.memory.release(mark)
            for _ in range(16):
                device.send(rng.randbytes(rng.randrange(14, 60)), rng.randbytes(12))
            device.tx().kick()
            device.front.enable(0, bool(turn % 2))
            device.front.set_mem_table(device.memory.slots, [device.memory.fd])
            wait_for(lambda: device.sent() >= 0 and not device.tx().chains, 5, "the chains to come back", 0.001)
        assert arena.stream.slowest < 1, "seconds for eight frames of the steady stream, on a shared machine"


# ---- G9: addresses and tags ----

SPOOFED = {
    "source of another guest": MACS[0],
    "source of everybody": b"\xff" * 6,
    "multicast source": b"\x01\x00\x5e\x00\x00\x01",
    "no source": bytes(6),
}


@pytest.mark.parametrize("source", SPOOFED)
def test_g9_spoofed_sources_divert_nothing(arena: Arena, features: int, source: str) -> None:
    """They are dropped and counted, and nothing of another guest comes to the one who says to be it."""
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        device.post(64)
        before, spoofed = arena.entry.port.rx_counters(0).packets, arena.drops("tx", "spoofed")
        for turn in range(20):
            sender = SPOOFED[source] if turn % 2 else VM3
            device.send(TO_FRIEND + sender + b"\x88\xb6" + bytes(50))
        wait_for(lambda: device.sent() >= 0 and not device.tx().chains, 5, "the frames to be sent")
        arena.stream.moved()
        assert arena.entry.port.rx_counters(0).packets == before
        assert arena.drops("tx", "spoofed") == spoofed + 10
        arena.heard()


@pytest.mark.parametrize(
    "tags",
    ["81000005", "81000fff", "88a8000581000006", "810000058100000581000005", "8100"],
)
def test_g9_tags_and_lengths(arena: Arena, features: int, tags: str) -> None:
    """One, two and three tags, half a tag, runts and giants."""
    with arena.nothing_left(), arena.device(features) as device:
        device.up()
        for size in (14, 15, 60, 1514, 9000, 65000):
            head = TO_FRIEND + VM3 + bytes.fromhex(tags)
            device.send(head + bytes(max(0, size - len(head))))
        wait_for(lambda: device.sent() >= 0 and not device.tx().chains, 5, "the frames to be sent")
        arena.heard()


# ---- G10: ends ----


def test_g10_reboot_loop_with_traffic(arena: Arena, features: int) -> None:
    with arena.nothing_left():
        for turn in range(60):
            with arena.device(features, queue_size=64, memory_size=1 << 20) as device:
                device.up()
                device.post(16)
                arena.send_to_guest(*(numbered(number, VM3, TO_FRIEND) for number in range(4)))
                if turn % 2:
                    device.down()


def program(*args: str | Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    child = subprocess.Popen(
        [sys.executable, "-m", "support.victim", *map(str, args)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


def kill(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


@pytest.mark.parametrize("kind", KINDS)
def test_g10_kill_9_the_front_end(arena: Arena, kind: str) -> None:
    """At a random point of its traffic, as a process of its own."""
    rng = random.Random(10)
    with arena.nothing_left():
        for _ in range(5):
            child = program("front-end", arena.path, kind)
            try:
                goal = arena.entry.port.tx_counters(0).packets + rng.randrange(1, 3000)
                wait_for(lambda goal=goal: arena.entry.port.tx_counters(0).packets >= goal, 10, "traffic", 0.001)
                arena.send_to_guest(*(numbered(number, VM3, TO_FRIEND) for number in range(8)))
            finally:
                kill(child)
            arena.idle()
    assert not arena.errors


@pytest.mark.parametrize("kind", KINDS)
def test_g10_kill_9_the_back_end(tmp_path: Path, kind: str) -> None:
    """Both front-ends live on and reconnect to its successor; no frame is lost, and only the last may come twice."""
    rng = random.Random(11)
    features = FEATURES | (F_PACKED if kind == "packed" else 0)
    one = NetDevice(tmp_path / "vm1.sock", features=features, memory_size=32 << 20)
    two = NetDevice(tmp_path / "vm2.sock", features=features)
    got: list[int] = []

    def receive() -> bool:
        got.extend(int.from_bytes(frame[14:22], "big") for _, frame in two.received())
        return True

    with one, two:
        two.post(128)
        sent = 0
        for _ in range(6):
            child = program("back-end", tmp_path)
            try:
                for device in (two, one):
                    device.sent()
                    receive()
                    device.up()
                goal = sent + rng.randrange(50, 400)
                end = time.monotonic() + 20
                while sent < goal:
                    assert time.monotonic() < end, f"{sent} sent, {len(got)} received"
                    one.sent()
                    receive()
                    if one.tx().free > 2 and sent - len(set(got)) < 64:
                        one.send(numbered(sent, MACS[1], MACS[0]))
                        sent += 1
            finally:
                kill(child)
            one.front.close()
            two.front.close()
        child = program("back-end", tmp_path)
        try:
            for device in (two, one):
                device.sent()
                receive()
                device.up()
            wait_for(lambda: receive() and len(set(got)) == sent, 10, f"{sent} frames")
        finally:
            kill(child)
    assert sorted(set(got)) == list(range(sent))
    assert len(got) - sent <= 6 * 32, "frames that came twice, a burst at most for each death"


# ---- the control virtqueue ----


def ctrl_device(arena: Arena, features: int) -> NetDevice:
    device = arena.device(features | F_CTRL_VQ)
    device.queues.append(device.new_queue(64))
    return device


@pytest.mark.parametrize("trick", G2_BOTH)
def test_g2_chains_of_the_control_queue(arena: Arena, features: int, trick: str) -> None:
    known = len(arena.faults)
    with arena.nothing_left():
        with ctrl_device(arena, features) as device:
            device.up()
            G2_BOTH[trick](device, device.queues[2])
            assert device.front.disconnected()
        arena.idle()
    assert len(arena.faults) == known + 1


def command(device: NetDevice, *parts: bytes, answer: int = 1) -> int | None:
    """Runs a control command; its answer's byte, if there is one."""
    chain = []
    for part in parts:
        at = device.memory.alloc(max(len(part), 1))
        device.memory.write(at, part)
        chain.append(Buffer(at, len(part)))
    status = device.memory.alloc(16)
    device.memory.write(status, b"\xaa" * 16)
    chain += [Buffer(status, answer, True)] if answer else []
    queue = device.queues[2]
    queue.add(chain)
    wait_for(lambda: list(queue.reap()), 5, "the command's chain to come back", 0.001)
    assert device.memory.read(status + 1, 15) == b"\xaa" * 15
    return device.memory.read(status, 1)[0] if answer else None


def test_g5_control_commands_at_random(arena: Arena, features: int) -> None:
    """Each is answered, whatever it says: Linux spins on the answer."""
    rng = random.Random(12)
    tables: Sequence[bytes] = (struct.pack("<I", 2**32 - 1), struct.pack("<I", 1) + bytes(5), bytes(8), bytes(3))
    with arena.nothing_left(), ctrl_device(arena, features) as device:
        device.up()
        for turn in range(300):
            kind = bytes((rng.randrange(8), rng.randrange(8)))
            data = rng.choice(tables) if turn % 3 else rng.randbytes(rng.choice((0, 1, 2, 6, 40, 600)))
            assert command(device, kind, data) in (0, 1)
        assert command(device, b"") == 1
        assert command(device, b"\0") == 1
        command(device, b"\0\0", b"\1", answer=0)
        assert device.front.ask_u64(1)


@contextlib.contextmanager
def flipping(change: Callable[[], None]) -> Iterator[None]:
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            change()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_g6_control_command_that_changes_while_it_is_read(arena: Arena, features: int) -> None:
    """Its counts grow after they were checked; the command was copied before."""
    rng = random.Random(13)
    with arena.nothing_left(), ctrl_device(arena, features) as device:
        device.up()
        at = device.memory.alloc(64)
        device.memory.write(at, bytes((1, 0)) + bytes(62))

        def change() -> None:
            device.memory.write(at, bytes((1, rng.randrange(2))) + struct.pack("<I", rng.choice((0, 1, 9, 2**32 - 1))))

        with flipping(change):
            for _ in range(200):
                status = device.memory.alloc(1)
                device.queues[2].add([Buffer(at, 64), Buffer(status, 1, True)])
                wait_for(lambda: list(device.queues[2].reap()), 5, "the answer", 0.001)
