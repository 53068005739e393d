# SPDX-License-Identifier: Apache-2.0
"""A guest that lies in its rings loses its connection; two others talk on, and nothing of it stays in this process."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.endpoint import fd_count, map_count
from support.frontend import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_MRG_RXBUF,
    F_PROTOCOL,
    F_VERSION_1,
    Buffer,
    NetDevice,
    Queue,
)
from support.plane import Plane
from support.process import wait_for
from support.virtqueue import DESC_INDIRECT, DESC_NEXT, DESC_WRITE
from xdpvhost.datapath import DROP_NAMES

from .test_guests import MAC1, frame

FEATURES = F_PROTOCOL | F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT
MAC3 = bytes.fromhex("525400000003")
Trick = Callable[[NetDevice, Queue], None]


class Bystanders:
    """Two honest guests that exchange frames."""

    def __init__(self, directory: Path) -> None:
        self.one = NetDevice(directory / "vm1.sock", memory_size=64 << 20)
        self.two = NetDevice(directory / "vm2.sock")
        self._number = 0

    def up(self) -> None:
        self.one.up()
        self.two.up()
        self.two.post(64)

    def talk(self) -> None:
        self._number += 1
        self.one.sent()
        self.one.send(frame(self._number))
        assert frame(self._number) in [got for _, got in self.two.receive(1)]

    def close(self) -> None:
        self.one.close()
        self.two.close()


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as plane:
        for _ in range(3):
            plane.guest()
        yield plane


@pytest.fixture
def bystanders(plane: Plane, tmp_path: Path) -> Iterator[Bystanders]:
    both = Bystanders(tmp_path)
    both.up()
    both.talk()
    yield both
    both.talk()
    both.close()


@contextmanager
def hostile(plane: Plane, tmp_path: Path, bystanders: Bystanders) -> Iterator[NetDevice]:
    """A third guest; when the block ends it must have lost its connection, and everything is as before it came."""
    fds, maps = fd_count(), map_count()
    with NetDevice(tmp_path / "vm3.sock", features=FEATURES) as device:
        device.up()
        yield device
        assert device.front.disconnected()
        bystanders.talk()
        assert [name for name, _ in plane.faults] == ["vm3"]
    wait_for(lambda: not plane.endpoints["vm3"].connected, 5, "the session to end")
    wait_for(lambda: fd_count() == fds, 5, f"{fds} descriptors, as before")
    assert map_count() == maps
    with NetDevice(tmp_path / "vm3.sock", features=FEATURES) as again:
        again.up()
        again.post(4)
        bystanders.one.send(frame(1, to=MAC3))
        assert [got for _, got in again.receive(1)] == [frame(1, to=MAC3)]


def put(queue: Queue, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
    """Writes descriptors 0, 1, … and makes `head` available."""
    for index, (addr, length, flags, following) in enumerate(descriptors):
        queue.write_desc(index, addr, length, flags, following)
    queue.push(head)
    queue.publish(kick=False)
    queue.kick()


def indirect(device: NetDevice, queue: Queue, length: int, *entries: tuple[int, int, int, int], flags: int = 0) -> None:
    table = device.memory.alloc(max(16 * len(entries), 16))
    for index, entry in enumerate(entries):
        queue.write_desc(index, *entry, table=table)
    put(queue, (table, length, DESC_INDIRECT | flags, 0))


def avail_jump(device: NetDevice, queue: Queue) -> None:
    queue.avail_idx = (queue.avail_idx + queue.size + 1) & 0xFFFF
    queue.publish(kick=False)
    queue.kick()


def avail_back(device: NetDevice, queue: Queue) -> None:
    queue.avail_idx = (queue.avail_idx - 1) & 0xFFFF
    queue.publish(kick=False)
    queue.kick()


def gpa(device: NetDevice) -> int:
    return device.memory.alloc(4096)


TRICKS: dict[str, Trick] = {
    "avail index ahead": avail_jump,
    "avail index back": avail_back,
    "head outside the table": lambda d, q: put(q, head=q.size),
    "head 0xffff": lambda d, q: put(q, head=0xFFFF),
    "next outside the table": lambda d, q: put(q, (gpa(d), 64, DESC_NEXT, q.size)),
    "chain to itself": lambda d, q: put(q, (gpa(d), 64, DESC_NEXT, 0)),
    "loop of two": lambda d, q: put(q, (gpa(d), 64, DESC_NEXT, 1), (gpa(d), 64, DESC_NEXT, 0)),
    "address outside memory": lambda d, q: put(q, (1 << 40, 64, 0, 0)),
    "address 0": lambda d, q: put(q, (0, 64, 0, 0)),
    "address wraps": lambda d, q: put(q, (2**64 - 16, 64, 0, 0)),
    "length over the end": lambda d, q: put(q, (d.memory.gpa + d.memory.size - 32, 64, 0, 0)),
    "indirect of no entries": lambda d, q: indirect(d, q, 0),
    "indirect of 17 bytes": lambda d, q: indirect(d, q, 17, (gpa(d), 64, 0, 0)),
    "indirect too long": lambda d, q: indirect(d, q, 16 * (q.size + 1), (gpa(d), 64, 0, 0)),
    "indirect with next": lambda d, q: indirect(d, q, 16, (gpa(d), 64, 0, 0), flags=DESC_NEXT),
    "indirect in indirect": lambda d, q: indirect(d, q, 16, (gpa(d), 16, DESC_INDIRECT, 0)),
    "loop in indirect": lambda d, q: indirect(d, q, 32, (gpa(d), 64, 1, 1), (gpa(d), 64, 1, 0)),
    "next outside indirect": lambda d, q: indirect(d, q, 16, (gpa(d), 64, DESC_NEXT, 1)),
    "indirect outside memory": lambda d, q: put(q, (1 << 40, 16, DESC_INDIRECT, 0)),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_lies_on_the_way_out(plane: Plane, tmp_path: Path, bystanders: Bystanders, trick: str) -> None:
    with hostile(plane, tmp_path, bystanders) as device:
        TRICKS[trick](device, device.tx())


RX_TRICKS: dict[str, Trick] = {
    "avail index ahead": avail_jump,
    "head outside the table": lambda d, q: put(q, head=q.size),
    "readable buffer": lambda d, q: put(q, (gpa(d), 2048, 0, 0)),
    "loop": lambda d, q: put(q, (gpa(d), 1, DESC_NEXT | DESC_WRITE, 0)),
    "address outside memory": lambda d, q: put(q, (1 << 40, 2048, DESC_WRITE, 0)),
    "length over the end": lambda d, q: put(q, (d.memory.gpa + d.memory.size - 32, 64, DESC_WRITE, 0)),
    "indirect outside memory": lambda d, q: put(q, (1 << 40, 16, DESC_INDIRECT, 0)),
}


@pytest.mark.parametrize("trick", RX_TRICKS)
def test_lies_on_the_way_in(plane: Plane, tmp_path: Path, bystanders: Bystanders, trick: str) -> None:
    with hostile(plane, tmp_path, bystanders) as device:
        RX_TRICKS[trick](device, device.rx())
        bystanders.one.send(frame(1, to=MAC3))


@pytest.mark.parametrize("direction", ["out", "in"])
def test_memory_truncated_under_the_data_plane(
    plane: Plane, tmp_path: Path, bystanders: Bystanders, direction: str
) -> None:
    """SIGBUS in a worker costs that guest its connection only."""
    with hostile(plane, tmp_path, bystanders) as device:
        if direction == "out":
            device.send(frame(1, to=MAC1), cuts=(12,))
            wait_for(lambda: device.sent() == 1, 5, "an honest frame")
        else:
            device.post(4)
        os.ftruncate(device.memory.fd, 0)
        device.tx().kick()
        bystanders.one.send(frame(1, to=MAC3))


def dropped(plane: Plane, reason: str) -> int:
    return plane.switch.guests["vm3"].port.tx_counters(0).drops[DROP_NAMES.index(reason)]


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([0], "bad_header"),
        ([1], "bad_header"),
        ([11], "bad_header"),
        ([12], "runt"),
        ([12, 13], "runt"),
        ([1] * 12, "runt"),
        ([12, 70000], "too_big"),
        ([12, -60], "bad_chain"),
        ([-2048], "bad_chain"),
    ],
    ids=str,
)
def test_bad_frames_are_dropped_and_counted(
    plane: Plane, tmp_path: Path, bystanders: Bystanders, chain: list[int], reason: str
) -> None:
    """Negative sizes are device-writable descriptors, which the driver has no business to send."""
    with NetDevice(tmp_path / "vm3.sock", features=FEATURES) as device:
        device.up()
        device.tx().add([Buffer(device.memory.alloc(max(abs(size), 1)), abs(size), size < 0) for size in chain])
        wait_for(lambda: device.sent() == 1, 5, "the chain to come back")
        wait_for(lambda: dropped(plane, reason) == 1, 5, f"a drop with reason {reason}")
        device.send(frame(5, to=bytes.fromhex("525400000002"), source=MAC3))
        got = bystanders.two.receive(1)
        assert got[0][1][6:12] == MAC3
        assert plane.faults == []


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 0xFFFF, 0xFFFF, 0),
        struct.pack("<BBHHHHH", 1, 0, 0, 0, 60, 0, 0),
        struct.pack("<BBHHHHH", 0, 1, 0, 0, 0, 0, 0),
        struct.pack("<BBHHHHH", 0, 0xFF, 0xFFFF, 1, 0, 0, 0xFFFF),
        struct.pack("<BBHHHHH", 0xFF, 0, 0, 0, 0, 0, 0),
    ],
    ids=bytes.hex,
)
def test_nonsense_in_the_header(plane: Plane, tmp_path: Path, bystanders: Bystanders, header: bytes) -> None:
    with NetDevice(tmp_path / "vm3.sock", features=FEATURES) as device:
        device.up()
        device.send(frame(1, to=bytes.fromhex("525400000002"), source=MAC3), header)
        wait_for(lambda: device.sent() == 1, 5, "the chain to come back")
        assert plane.faults == []


def test_descriptors_that_change_while_they_are_read(plane: Plane, tmp_path: Path, bystanders: Bystanders) -> None:
    """Flags, length and next of a posted chain flip all the time: whatever is read, nobody else is harmed."""
    stop = threading.Event()
    features = FEATURES | F_EVENT_IDX
    with NetDevice(tmp_path / "vm3.sock", features=features) as device:
        device.up()
        queue = device.tx()
        good = device.memory.alloc(4096)
        table = device.memory.alloc(64)
        variants = [
            (good, 100, 0, 0),
            (good, 100, DESC_NEXT, 1),
            (table, 32, DESC_INDIRECT, 0),
            (good, 12, DESC_NEXT, 0),
        ]
        queue.write_desc(1, good, 100, 0, 0)
        for at in range(4):
            queue.write_desc(at, good, 64, 0, 0, table=table)

        def mutate() -> None:
            turn = 0
            while not stop.is_set():
                queue.write_desc(0, *variants[turn % len(variants)])
                turn += 1

        mutator = threading.Thread(target=mutate)
        mutator.start()
        try:
            for _ in range(200):
                if plane.faults:
                    break
                queue.push(0)
                queue.publish(kick=False)
                queue.kick()
                bystanders.talk()
        finally:
            stop.set()
            mutator.join()
    bystanders.talk()
