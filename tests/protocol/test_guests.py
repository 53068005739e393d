# SPDX-License-Identifier: Apache-2.0
"""The whole way through the real data plane: two front-ends, frames from one guest's memory to the other's."""

from __future__ import annotations

import itertools
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.frontend import (
    F_CSUM,
    F_CTRL_VQ,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT,
    F_MQ,
    F_MRG_RXBUF,
    F_PACKED,
    F_PROTOCOL,
    F_VERSION_1,
    Buffer,
    NetDevice,
)
from support.plane import Plane
from support.process import wait_for
from xdpvhost.vhost.wire import Request

from .conftest import MakeDevice

Sockets = tuple[Path, Path]

BASE = F_PROTOCOL | F_VERSION_1
MAC1, MAC2 = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
COUNT = 23


def frame(number: int, size: int = 60, to: bytes = MAC2, source: bytes = MAC1) -> bytes:
    body = random.Random(number).randbytes(size - 18)
    return to + source + b"\x88\xb5" + struct.pack(">I", number) + body


def returned(device: NetDevice) -> int:
    """How many transmissions of pair 0 have ever been finished."""
    device.sent()
    return int(device.tx().returned)


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as plane:
        plane.guest()
        plane.guest()
        yield plane


@pytest.fixture
def sockets(tmp_path: Path) -> Sockets:
    return tmp_path / "vm1.sock", tmp_path / "vm2.sock"


FEATURES = {
    "legacy": F_PROTOCOL,
    "without protocol features": F_VERSION_1,
    "plain": BASE,
    "mergeable": BASE | F_MRG_RXBUF,
    "mergeable legacy": F_PROTOCOL | F_MRG_RXBUF,
    "indirect": BASE | F_INDIRECT,
    "event index": BASE | F_EVENT_IDX,
    "everything": BASE | F_MRG_RXBUF | F_INDIRECT | F_EVENT_IDX,
    "packed": BASE | F_PACKED,
    "packed, mergeable": BASE | F_PACKED | F_MRG_RXBUF,
    "packed, in order": BASE | F_PACKED | F_IN_ORDER | F_MRG_RXBUF,
    "packed, event index": BASE | F_PACKED | F_EVENT_IDX,
    "packed, everything": BASE | F_PACKED | F_IN_ORDER | F_MRG_RXBUF | F_INDIRECT | F_EVENT_IDX,
}


@pytest.mark.parametrize("right", FEATURES)
@pytest.mark.parametrize("left", ["legacy", "plain", "everything", "packed", "packed, everything"])
def test_frames_arrive_whole(plane: Plane, sockets: Sockets, left: str, right: str) -> None:
    """23 frames each way, every counter says 23, and what was copied is what was delivered."""
    one = NetDevice(sockets[0], features=FEATURES[left])
    two = NetDevice(sockets[1], features=FEATURES[right])
    with one, two:
        for device in (one, two):
            device.up()
            device.post(64)
        forth = [frame(n, 60 + 40 * n) for n in range(COUNT)]
        back = [frame(100 + n, 60 + 40 * n, MAC1, MAC2) for n in range(COUNT)]
        for number, (a, b) in enumerate(zip(forth, back, strict=True)):
            one.send(a, indirect=bool(one.features & F_INDIRECT and number % 2))
            two.send(b, indirect=bool(two.features & F_INDIRECT and number % 2))
        assert [got for _, got in two.receive(COUNT)] == forth
        assert [got for _, got in one.receive(COUNT)] == back
        wait_for(lambda: returned(one) == COUNT, 5, "the used buffers")
        vm1, vm2 = (plane.switch.guests[name].port for name in ("vm1", "vm2"))
        size = sum(map(len, forth))
        wait_for(lambda: vm1.tx_counters(0).packets == COUNT, 5, "the counters")
        assert vm1.tx_counters(0).bytes == size
        rx = vm2.rx_counters(0)
        assert (rx.packets, rx.bytes, rx.copied_bytes) == (COUNT, size, size)
        assert not sum(rx.drops) + sum(vm1.tx_counters(0).drops)


@pytest.mark.parametrize("cuts", [range(1, 12), (5, 20), (12, 13, 14), (1, 40)], ids=str)
def test_any_layout_of_the_header(
    net: MakeDevice, plane: Plane, sockets: Sockets, cuts: range | tuple[int, ...]
) -> None:
    with net(sockets[0], features=BASE) as one, net(sockets[1]) as two:
        one.up()
        two.up()
        two.post(8)
        one.send(frame(1), cuts=cuts)
        assert [got for _, got in two.receive(1)] == [frame(1)]


def test_merged_buffers(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    with net(sockets[0]) as one, net(sockets[1]) as two:
        one.up()
        two.up()
        two.post(200, size=100)
        big = frame(7, 1500)
        one.send(big)
        assert [got for _, got in two.receive(1)] == [big]


def test_receive_buffers_of_many_descriptors(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    with net(sockets[0]) as one, net(sockets[1], features=BASE | F_INDIRECT) as two:
        one.up()
        two.up()
        for indirect in (False, True):
            pieces = [5, 7, 1, 13, 300, 2000]
            two.rx().add([Buffer(two.memory.alloc(n), n, True) for n in pieces], indirect)
        for number in range(2):
            one.send(frame(number, 700))
        assert whole(two, 2) == [frame(0, 700), frame(1, 700)]


def whole(device: NetDevice, count: int) -> list[bytes]:
    got: list[bytes] = []

    def enough() -> bool:
        got.extend(data for _, data in device.received(recycle=False))
        return len(got) >= count

    wait_for(enough, 5, f"{count} frames")
    return got


def test_broadcast_and_unknown(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    with net(sockets[0]) as one, net(sockets[1]) as two:
        one.up()
        two.up()
        one.post(8)
        two.post(8)
        everybody = frame(1, 60, b"\xff" * 6)
        one.send(everybody)
        one.send(frame(2, 60, b"\x02" * 6))
        one.send(frame(3))
        assert [got for _, got in two.receive(2)] == [everybody, frame(3)]
        assert one.received() == [], "nobody hears himself"


def test_many_frames_wrap_every_index(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    """Also of packed rings whose size is no power of two, and that begin in the middle of a lap."""
    features = BASE | F_MRG_RXBUF | F_EVENT_IDX
    one = net(sockets[0], features=features, queue_size=8, memory_size=64 << 20)
    two = net(sockets[1], features=features, queue_size=16)
    with one, two:
        if one.features & F_PACKED:
            one.queues[1].close()
            two.queues[0].close()
            one.queues[1], two.queues[0] = one.new_queue(7), two.new_queue(13)
            one.tx().skip_to(4, 0)
            two.rx().skip_to(12, 1)
        else:
            one.tx().skip_to(0xFFF0)
            two.rx().skip_to(0xFFF8)
        one.up()
        two.up()
        two.post(two.rx().size)
        got: list[bytes] = []
        sent = 0
        numbers = itertools.count()
        deadline = time.monotonic() + 10
        while sent < 300:
            assert time.monotonic() < deadline, f"{sent} frames sent, {len(got)} received"
            if one.tx().free >= 2 and sent - len(got) < 8:
                one.send(frame(next(numbers)))
                sent += 1
            one.sent()
            got += [data for _, data in two.received()]
        wait_for(lambda: got.extend(data for _, data in two.received()) or len(got) == 300, 5, "300 frames")
        assert got == [frame(number) for number in range(300)]


def test_stop_and_start_lose_nothing(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    """GET_VRING_BASE says which frame comes next; frames queued while the ring is stopped are sent after it."""
    with net(sockets[0]) as one, net(sockets[1]) as two:
        one.up()
        two.up()
        two.post(64)
        one.send(frame(0))
        assert len(two.receive(1)) == 1
        base = one.front.get_base(1)
        assert one.sent() == 1
        assert base == one.tx().base
        for number in range(1, 5):
            one.send(frame(number))
        one.front.set_queue(1, one.tx(), base)
        assert [got for _, got in two.receive(4)] == [frame(number) for number in range(1, 5)]


def test_kick_before_enable_is_not_lost(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    with net(sockets[0]) as one, net(sockets[1]) as two:
        one.up()
        two.up()
        two.front.enable(0, False)
        two.post(8)
        two.front.enable(0)
        two.front.sync()
        one.send(frame(1))
        assert [got for _, got in two.receive(1)] == [frame(1)]


def test_disabled_ring_discards(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    with net(sockets[0]) as one, net(sockets[1]) as two:
        one.up()
        two.up()
        two.post(8)
        one.front.enable(1, False)
        one.front.sync()
        one.send(frame(1))
        wait_for(lambda: one.sent() == 1, 5, "the frame to be discarded")
        one.front.enable(1)
        one.front.sync()
        one.send(frame(2))
        assert [got for _, got in two.receive(1)] == [frame(2)]


def test_memory_and_call_replaced_under_traffic(net: MakeDevice, plane: Plane, sockets: Sockets) -> None:
    """Nothing that a guest has queued is lost; what is on its way to one whose rings are out for a moment would be."""
    with net(sockets[0]) as one, net(sockets[1]) as two:
        one.up()
        two.up()
        two.post(64)
        for turn in range(20):
            expected = [frame(10 * turn + n) for n in range(5)]
            for data in expected:
                one.send(data)
            one.front.set_mem_table(one.memory.slots, [one.memory.fd])
            two.front.file(Request.SET_VRING_CALL, 0, two.rx().call_fd)
            one.sent()
            assert [got for _, got in two.receive(5)] == expected
            two.front.set_mem_table(two.memory.split(2 << 20), [two.memory.fd] * 2)


def test_queue_pairs(net: MakeDevice, tmp_path: Path) -> None:
    with Plane(tmp_path, workers=2) as plane:
        plane.guest(4)
        plane.guest(1)
        features = BASE | F_MQ | F_CTRL_VQ
        with (
            net(tmp_path / "vm1.sock", features=features, pairs=4) as one,
            net(tmp_path / "vm2.sock") as two,
        ):
            ctrl = one.new_queue(64)
            one.up()
            one.front.set_queue(8, ctrl)
            one.front.enable(8)
            one.front.sync()
            two.up()
            two.post(64)
            status = one.memory.alloc(1)
            one.memory.write(status, b"\xaa")
            command = one.memory.alloc(4)
            one.memory.write(command, struct.pack("<BBH", 4, 0, 4))
            ctrl.add([Buffer(command, 2), Buffer(command + 2, 2), Buffer(status, 1, True)])
            wait_for(lambda: list(ctrl.reap()), 5, "the control command's answer")
            assert one.memory.read(status, 1) == b"\0"
            for pair in range(4):
                one.send(frame(pair), pair=pair)
            assert sorted(got for _, got in two.receive(4)) == sorted(frame(pair) for pair in range(4))
            port = plane.switch.guests["vm1"].port
            wait_for(
                lambda: [port.tx_counters(pair).packets for pair in range(4)] == [1] * 4, 5, "a frame from each pair"
            )
            ctrl.close()


def test_partial_checksum_is_finished_for_a_guest_without_guest_csum(
    net: MakeDevice, plane: Plane, sockets: Sockets
) -> None:
    with net(sockets[0], features=BASE | F_CSUM) as one, net(sockets[1], features=BASE) as two:
        one.up()
        two.up()
        two.post(4)
        data = MAC2 + MAC1 + b"\x88\xb5" + bytes(46)
        header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 14, 10, 0)
        one.send(data, header)
        header_in, got = two.receive(1)[0]
        assert header_in[0] & 1 == 0
        total = sum(struct.unpack(">23H", got[14:60]))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        assert total in (0xFFFF, 0)


def test_backend_restart_goes_on_where_it_was(net: MakeDevice, tmp_path: Path, sockets: Sockets) -> None:
    """A second daemon on the same guest memory; the guest kicks no more, its frames are found all the same."""
    with net(sockets[0]) as one, net(sockets[1]) as two:
        two.post(32)
        for turn in range(3):
            one.send(frame(turn))  # kicked while nobody listens
            with Plane(tmp_path) as plane:
                plane.guest()
                plane.guest()
                for device in (two, one):
                    device.up()
                assert [got for _, got in two.receive(1)] == [frame(turn)]
                wait_for(lambda turn=turn: returned(one) == turn + 1, 5, "the used buffer")
            one.front.close()
            two.front.close()
