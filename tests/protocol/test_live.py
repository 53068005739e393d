# SPDX-License-Identifier: Apache-2.0
"""Changes to a device under traffic, with the real data plane: nothing is lost, and what was written is logged."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.frontend import (
    F_EVENT_IDX,
    F_INDIRECT,
    F_LOG_ALL,
    F_MRG_RXBUF,
    F_PROTOCOL,
    F_VERSION_1,
    P_LOG_SHMFD,
    P_MEM_SLOTS,
    P_MQ,
    P_REPLY_ACK,
    NetDevice,
)
from support.plane import Plane
from support.process import wait_for
from support.virtqueue import PackedQueue

from .conftest import MakeDevice
from .test_guests import frame

FEATURES = F_PROTOCOL | F_VERSION_1 | F_MRG_RXBUF | F_EVENT_IDX
PROTOCOL = P_MQ | P_REPLY_ACK | P_LOG_SHMFD | P_MEM_SLOTS
PAGE = 4096


class Bitmap:
    """A dirty log as the front-end sees it. `slack`: bytes before it in its file."""

    def __init__(self, device: NetDevice, slack: int = 0) -> None:
        self.size = (device.memory.gpa + device.memory.size) // PAGE // 8
        self.slack = slack
        self.fd = os.memfd_create("log")
        os.ftruncate(self.fd, slack + self.size)
        self.map = mmap.mmap(self.fd, slack + self.size)

    def pages(self) -> set[int]:
        """Marked pages, which are clean afterwards."""
        marked = {
            8 * at + bit
            for at, byte in enumerate(self.map[self.slack :])
            if byte
            for bit in range(8)
            if byte >> bit & 1
        }
        self.map[self.slack :] = bytes(self.size)
        return marked

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def plane(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(tmp_path, workers=request.param) as plane:
        plane.guest()
        plane.guest()
        yield plane


@contextmanager
def pair(net: MakeDevice, tmp_path: Path) -> Iterator[tuple[NetDevice, NetDevice]]:
    """A sender and a receiver with buffers for a while."""
    one, two = (
        net(tmp_path / f"vm{number}.sock", features=FEATURES, protocol_features=PROTOCOL, memory_size=size << 20)
        for number, size in ((1, 64), (2, 8))
    )
    with one, two:
        one.up()
        two.up()
        two.post(200)
        yield one, two


class Stream:
    """Frames from one device to another for as long as the block runs; then every one of them must have arrived."""

    def __init__(self, one: NetDevice, two: NetDevice) -> None:
        self._one, self._two = one, two
        self._stop = threading.Event()
        self._sent = 0
        self.got: list[bytes] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            while self._sent - len(self.got) < 100 and self._one.tx().free > 2:
                self._one.send(frame(self._sent))
                self._sent += 1
            self._one.sent()
            self.got += [data for _, data in self._two.received()]

    def __enter__(self) -> Stream:
        self._thread.start()
        wait_for(lambda: len(self.got) > 100, 10, "traffic")
        return self

    def moved(self) -> None:
        """Returns when some frames more have come through."""
        goal = len(self.got) + 20
        wait_for(lambda: len(self.got) >= goal, 10, f"frame {goal}")

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

        def all_there() -> bool:
            self.got += [data for _, data in self._two.received()]
            return len(self.got) == self._sent

        wait_for(all_there, 5, f"{self._sent} frames")
        assert self.got == [frame(number) for number in range(self._sent)]


def replace_memory(device: NetDevice, turn: int) -> None:
    device.front.set_mem_table(device.memory.split((1 + turn % 3) << 20), [device.memory.fd] * 2)


def toggle_features(device: NetDevice, turn: int) -> None:
    device.front.set_features(device.features | (0 if turn % 2 else F_INDIRECT))


def replace_kicks(device: NetDevice, turn: int) -> None:
    for index, queue in enumerate(device.queues):
        device.front.file(12, index, queue.kick_fd)


def add_and_remove_memory(device: NetDevice, turn: int) -> None:
    slot = device.memory.slots[0]
    more = type(slot)(1 << 40, PAGE, 1 << 40, 0)
    if turn % 2:
        device.front.rem_mem_reg(more)
    else:
        device.front.add_mem_reg(more, device.memory.fd)


CHANGES: dict[str, Callable[[NetDevice, int], None]] = {
    "memory table": replace_memory,
    "memory slots": add_and_remove_memory,
    "features": toggle_features,
    "kick descriptors": replace_kicks,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_no_frame_is_lost_by_a_change(net: MakeDevice, plane: Plane, tmp_path: Path, change: str, side: str) -> None:
    with pair(net, tmp_path) as (one, two), Stream(one, two) as stream:
        for turn in range(50):
            CHANGES[change](one if side == "sender" else two, turn)
            if turn % 10 == 0:
                stream.moved()
    for name in ("vm1", "vm2"):
        port = plane.switch.guests[name].port
        assert not sum(port.rx_counters(0).drops) + sum(port.tx_counters(0).drops)


def start_logging(device: NetDevice, bitmap: Bitmap, ring: bool) -> None:
    """In QEMU's order: log, feature, addresses."""
    front, user = device.front, device.memory.user
    front.set_log(bitmap.fd, bitmap.size, bitmap.slack)
    front.set_features(device.features | F_LOG_ALL)
    for index, queue in enumerate(device.queues):
        front.set_addr(index, user(queue.desc), user(queue.used), user(queue.avail), int(ring), queue.used)
    front.sync()


def stop_logging(device: NetDevice) -> None:
    front, user = device.front, device.memory.user
    front.set_features(device.features)
    for index, queue in enumerate(device.queues):
        front.set_addr(index, user(queue.desc), user(queue.used), user(queue.avail))
    front.sync()


def pages_of(gpa: int, size: int) -> set[int]:
    return set(range(gpa // PAGE, (gpa + size - 1) // PAGE + 1))


@pytest.mark.parametrize("ring", [True, False], ids=["with the rings", "without the rings"])
@pytest.mark.parametrize("slack", [0, 3 * PAGE, 3 * PAGE + 8])
def test_every_page_that_is_written_is_logged_and_no_other(
    net: MakeDevice, plane: Plane, tmp_path: Path, ring: bool, slack: int
) -> None:
    """C10 and CVE-2026-86563, where the offset of the log was added twice: the bits are where the front-end looks."""
    with pair(net, tmp_path) as (one, two):
        bitmap = Bitmap(two, slack)
        start_logging(two, bitmap, ring)
        rings = set[int]()
        for queue in two.queues:
            rings |= pages_of(queue.used, queue.used_bytes)
            if isinstance(queue, PackedQueue):
                rings |= pages_of(queue.desc, 16 * queue.size)
        bitmap.pages()
        before = two.memory.read(two.memory.gpa, two.memory.size)
        for number in range(300, 323):
            one.send(frame(number, 1000))
        wait_for(lambda: plane.switch.guests["vm2"].port.rx_counters(0).packets == 23, 5, "23 frames")
        two.front.sync()
        after = two.memory.read(two.memory.gpa, two.memory.size)
        changed = {
            (two.memory.gpa + at) // PAGE
            for at in range(0, two.memory.size, PAGE)
            if before[at : at + PAGE] != after[at : at + PAGE]
        }
        marked = bitmap.pages()
        buffers = set[int]()
        for _, chain in two.rx().chains.values():
            buffers |= pages_of(chain[0].gpa, chain[0].size)
        assert changed - rings <= marked, "a page would be left behind"
        assert marked - rings <= buffers
        if ring:
            assert changed <= marked
        else:
            assert not marked & (rings - buffers)
        assert bitmap.map[:slack] == bytes(slack)
        stop_logging(two)
        bitmap.pages()
        one.send(frame(1))
        wait_for(lambda: plane.switch.guests["vm2"].port.rx_counters(0).packets == 24, 5, "one frame more")
        two.front.sync()
        assert not bitmap.pages(), "logging is off"
        bitmap.close()


def test_logging_on_and_off_under_traffic(net: MakeDevice, plane: Plane, tmp_path: Path) -> None:
    """C10: the rings go on, frame by frame."""
    with pair(net, tmp_path) as (one, two):
        bitmap = Bitmap(two)
        with Stream(one, two) as stream:
            for turn in range(20):
                start_logging(two, bitmap, bool(turn % 2))
                bitmap.pages()
                stream.moved()
                assert bitmap.pages()
                stop_logging(two)
        bitmap.close()


def test_log_truncated_under_the_data_plane(net: MakeDevice, plane: Plane, tmp_path: Path) -> None:
    """Its guest loses its connection, and nobody else anything."""
    with pair(net, tmp_path) as (one, two):
        bitmap = Bitmap(two)
        start_logging(two, bitmap, True)
        os.ftruncate(bitmap.fd, 0)
        one.send(frame(1))
        assert two.front.disconnected()
        bitmap.close()
        assert [name for name, _ in plane.faults] == ["vm2"]
        one.front.sync()
        two.up()
