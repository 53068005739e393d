# SPDX-License-Identifier: Apache-2.0
"""The ring state machine, and reconfiguration of a running device."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from support.frontend import (
    F_INDIRECT,
    F_MQ,
    F_PROTOCOL,
    F_VERSION_1,
    P_MEM_SLOTS,
    P_MQ,
    P_REPLY_ACK,
    GuestMemory,
    NetDevice,
    Slot,
)
from xdpvhost.vhost.offered import COUNTED
from xdpvhost.vhost.wire import Request

from .conftest import Bench

PAGE = 4096
MEMORY_STEPS = P_MQ | P_REPLY_ACK | P_MEM_SLOTS


def running(bench: Bench) -> list[int]:
    return sorted(bench.port.now.rings)


def test_get_base_of_a_ring_never_set_up(bench: Bench) -> None:
    with bench.connect() as front:
        assert front.get_base(0) == 0
        assert front.get_base(2) == 0


def test_get_base_stops_and_keeps_everything_else(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        bench.port.now.rings[0].base = 1234
        assert device.front.get_base(0) == 1234
        assert running(bench) == [1]
        assert device.front.get_base(0) == 1234, "asked twice, answered the same"
        device.front.file(Request.SET_VRING_KICK, 0, device.queues[0].kick_fd)
        assert running(bench) == [0, 1]
        ring = bench.port.now.rings[0]
        assert (ring.base, ring.num, ring.enabled) == (1234, 256, True)


def test_disabled_ring_stays_and_enable_publishes_again(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        quiesced = bench.port.quiesced
        device.front.enable(1, False)
        device.front.sync()
        assert running(bench) == [0, 1]
        assert not bench.port.now.rings[1].enabled
        assert bench.port.quiesced == quiesced + 1
        published = len(bench.port.applied)
        device.front.enable(1)
        device.front.sync()
        assert bench.port.now.rings[1].enabled
        assert len(bench.port.applied) == published + 1, "so that a kick before ENABLE is not lost"


def test_no_kick_descriptor_means_polling(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        device.front.file(Request.SET_VRING_KICK, 0, None)
        device.front.sync()
        assert bench.port.now.rings[0].kick_fd == -1
        device.front.file(Request.SET_VRING_CALL, 0, None)
        device.front.sync()
        assert bench.port.now.rings[0].call_fd == -1


def test_kick_before_everything_else(bench: Bench) -> None:
    with bench.device() as device:
        front = device.connect()
        queue = device.queues[0]
        user = device.memory.user
        front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)
        front.set_features(F_PROTOCOL | F_VERSION_1)
        front.state(Request.SET_VRING_NUM, 0, queue.size)
        front.set_addr(0, user(queue.desc), user(queue.used), user(queue.avail))
        front.sync()
        assert not running(bench)
        front.set_mem_table(device.memory.slots, [device.memory.fd])
        front.sync()
        assert running(bench) == [0]


def test_call_replaced_on_a_running_ring(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        ring = bench.port.now.rings[0]
        old, new = ring.call_fd, os.eventfd(0, os.EFD_NONBLOCK)
        try:
            quiesced = bench.port.quiesced
            device.front.file(Request.SET_VRING_CALL, 0, new)
            device.front.sync()
            assert bench.port.now.rings[0] is ring, "the ring goes on"
            assert bench.port.quiesced == quiesced + 1
            assert ring.call_fd != old
            assert os.eventfd_read(new) == 1
        finally:
            os.close(new)


def test_memory_table_replaced_while_running(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        for ring, base in zip(bench.port.now.rings.values(), (11, 12), strict=True):
            ring.base = base
        for _ in range(2):
            device.front.set_mem_table(device.memory.split(1 << 20), [device.memory.fd] * 2)
        device.front.sync()
        assert [ring.base for ring in bench.port.now.rings.values()] == [11, 12]
        assert [memory.closed for memory in bench.port.memories] == [True, True, False]


def test_features_changed_while_running(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        first = bench.port.now.rings[0]
        device.front.set_features(device.features)
        device.front.sync()
        assert bench.port.now.rings[0] is first, "a late repeat changes nothing"
        device.front.set_features(device.features | F_INDIRECT)
        device.front.sync()
        assert bench.port.now.features == device.features | F_INDIRECT
        assert bench.port.now.rings[0].features == device.features | F_INDIRECT
        assert first.closed


def test_address_repeated_and_changed_while_running(bench: Bench) -> None:
    """A migration repeats the address with the log flag; that must not disturb the ring."""
    with bench.device() as device:
        device.up()
        first = bench.port.now.rings[0]
        queue, user = device.queues[0], device.memory.user
        device.front.set_addr(0, user(queue.desc), user(queue.used), user(queue.avail), flags=1, log=4096)
        device.front.sync()
        assert bench.port.now.rings[0] is first
        first.base = 3
        other = device.queues[1]
        device.front.set_addr(0, user(other.desc), user(other.used), user(other.avail))
        device.front.sync()
        assert bench.port.now.rings[0].desc == user(other.desc)
        assert bench.port.now.rings[0].base == 3


def test_size_and_base_changed_while_running(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        device.front.state(Request.SET_VRING_NUM, 0, 64)
        device.front.state(Request.SET_VRING_BASE, 0, 0xFFFF)
        device.front.sync()
        assert (bench.port.now.rings[0].num, bench.port.now.rings[0].base) == (64, 0xFFFF)


def test_reset_device(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        device.front.tell(Request.RESET_DEVICE)
        device.front.sync()
        assert not running(bench)
        assert device.front.get_base(0) == 0
        assert bench.endpoint.summary["rings_enabled"] == 0
        assert bench.endpoint.summary["regions"] == 1, "QEMU tells memory changes only"
        for index in (0, 1):
            device.front.enable(index)
        device.front.set_features(device.features)
        for index, queue in enumerate(device.queues):
            device.front.set_queue(index, queue)
        device.front.sync()
        assert running(bench) == [0, 1]


def test_reset_owner_is_ignored(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        device.front.tell(Request.RESET_OWNER)
        device.front.sync()
        assert running(bench) == [0, 1]


def test_status_zero_stops_the_rings(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        bench.port.now.rings[1].base = 77
        device.front.tell(Request.SET_STATUS, struct.pack("=Q", 0))
        device.front.sync()
        assert not running(bench)
        assert device.front.get_base(1) == 77


def test_memory_slots(bench: Bench) -> None:
    """Rings live on across added regions, wait while theirs is away, and come back with it."""
    with bench.device(protocol_features=MEMORY_STEPS) as device:
        front = device.connect()
        front.set_protocol_features(MEMORY_STEPS)
        assert front.ask_u64(Request.GET_MAX_MEM_SLOTS) == 509
        front.set_features(device.features)
        low, high = device.memory.split(1 << 20)
        front.add_mem_reg(low, device.memory.fd)
        for index, queue in enumerate(device.queues):
            front.set_queue(index, queue)
            front.enable(index)
        assert running(bench) == [0, 1]
        bench.port.now.rings[0].base = 5
        front.add_mem_reg(high, device.memory.fd)
        assert running(bench) == [0, 1]
        front.rem_mem_reg(low)
        assert not running(bench)
        front.add_mem_reg(low, device.memory.fd)
        assert running(bench) == [0, 1]
        assert bench.port.now.rings[0].base == 5
        front.rem_mem_reg(low)
        front.rem_mem_reg(high)
        assert bench.endpoint.summary["regions"] == 0


def test_regions_of_qemu_before_8_come_once_for_each_pair(bench4: Bench) -> None:
    """One pair more or less than the device has is the most that is taken for that, and only the very same region."""
    memory, other = GuestMemory(), GuestMemory()
    slot = memory.slots[0]
    request = bytes(8) + slot.pack()
    for turn in range(2):
        with bench4.connect() as front:
            front.set_protocol_features(MEMORY_STEPS)
            for _ in range(4):
                front.add_mem_reg(slot, memory.fd)
                assert bench4.endpoint.summary["regions"] == 1
            for _ in range(4):
                front.rem_mem_reg(slot)
                assert bench4.endpoint.summary["regions"] == 0
            front.add_mem_reg(slot, memory.fd)
            if turn:  # another file at the same place
                front.send(Request.ADD_MEM_REG, request, [other.fd])
            else:  # one removal more than there were additions
                front.rem_mem_reg(slot)
                front.send(Request.REM_MEM_REG, request)
            assert front.disconnected()
        bench4.idle()
    with bench4.connect() as front:  # one addition more than pairs
        front.set_protocol_features(MEMORY_STEPS)
        for _ in range(4):
            front.add_mem_reg(slot, memory.fd)
        front.send(Request.ADD_MEM_REG, request, [memory.fd])
        assert front.disconnected()
    memory.close()
    other.close()


def test_every_memory_slot_can_be_used(bench: Bench) -> None:
    memory = GuestMemory(509 * 4096)
    with bench.connect() as front:
        front.set_protocol_features(MEMORY_STEPS)
        slots = memory.split(*range(4096, 509 * 4096, 4096))
        for slot in slots:
            front.add_mem_reg(slot, memory.fd)
        assert bench.endpoint.summary["regions"] == 509
        front.send(Request.ADD_MEM_REG, bytes(8) + struct.pack("=QQQQ", 1 << 40, 4096, 1 << 40, 0), [memory.fd])
        assert front.disconnected()
    memory.close()
    bench.idle()


def test_removed_region_may_come_with_a_descriptor(bench: Bench) -> None:
    memory = GuestMemory()
    with bench.connect() as front:
        front.set_protocol_features(MEMORY_STEPS)
        slot = memory.slots[0]
        front.add_mem_reg(slot, memory.fd)
        front.tell(Request.REM_MEM_REG, bytes(8) + slot.pack(), [memory.fd])
        assert bench.endpoint.summary["regions"] == 0
    memory.close()


def test_mtu(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(P_REPLY_ACK | 1 << 4 | 1 << 9)
        front.tell(Request.NET_SET_MTU, struct.pack("=Q", 1400))
        assert front.get_config(12)[10:] == struct.pack("=H", 1400)
        for refused in (67, 1501, 2**64 - 1):
            front.tell(Request.NET_SET_MTU, struct.pack("=Q", refused), expect=1)
        assert front.get_config(12)[10:] == struct.pack("=H", 1400)


@pytest.mark.parametrize(
    ("asked", "now", "told"), [(None, 1300, 1300), (None, 9000, 9000), (1400, 1300, 1300), (1400, 9000, 1400)]
)
def test_mtu_of_the_uplink_changes(bench: Bench, asked: int | None, now: int, told: int) -> None:
    with bench.connect() as front:
        front.set_protocol_features(P_REPLY_ACK | 1 << 4 | 1 << 9)
        if asked is not None:
            front.tell(Request.NET_SET_MTU, struct.pack("=Q", asked))
        bench.port.mtu = now
        assert front.get_config(12)[10:] == struct.pack("=H", told)


def test_config_space(bench4: Bench) -> None:
    with bench4.connect() as front:
        front.set_protocol_features(P_REPLY_ACK | 1 << 9)
        space = front.get_config(256)
        assert space[24:] == bytes(232)
        assert struct.unpack_from("=6sHHH", space) == (bytes.fromhex("525400000001"), 1, 4, 1500)
        assert front.get_config(6, offset=0) == space[:6]
        assert front.ask(Request.GET_CONFIG, struct.pack("=III", 200, 100, 0) + bytes(100)) == b""
        front.tell(Request.SET_CONFIG, struct.pack("=III", 0, 6, 0) + bytes(6), expect=1)
        assert front.get_config(256) == space


def test_requests_are_counted_by_name_and_result(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(P_REPLY_ACK | 1 << 4)
        front.ask_u64(Request.GET_FEATURES)
        front.ask_u64(Request.GET_FEATURES)
        front.tell(Request.NET_SET_MTU, struct.pack("=Q", 1), expect=1)
        front.state(Request.SET_VRING_NUM, 0, 256)
        front.send(Request.SET_VRING_NUM, struct.pack("=II", 0, 0))
        assert front.disconnected()
    for number in (Request.VRING_KICK, 99, 2**31):
        with bench.connect() as front:
            front.send(number)
            assert front.disconnected()
    assert bench.port.messages == {
        ("SET_PROTOCOL_FEATURES", "ok"): 1,
        ("GET_FEATURES", "ok"): 2,
        ("NET_SET_MTU", "refused"): 1,
        ("SET_VRING_NUM", "ok"): 1,
        ("SET_VRING_NUM", "error"): 1,
        ("other", "error"): 3,
    }
    assert {name for name, _ in bench.port.messages} <= set(COUNTED)


def test_rarp(bench: Bench) -> None:
    with bench.connect() as front:
        front.set_protocol_features(P_REPLY_ACK | 1 << 2)
        mac = bytes.fromhex("525400aabbcc")
        front.tell(Request.SEND_RARP, mac + b"\0\0")
        front.tell(Request.SEND_RARP, b"\xff" * 6 + b"\0\0", expect=1)
        assert bench.port.announced == [mac]


def test_queue_pairs_without_and_with_mq(bench4: Bench) -> None:
    with bench4.device(pairs=4, features=F_PROTOCOL | F_VERSION_1 | F_MQ) as device:
        device.up()
        assert running(bench4) == list(range(8))
        for index in range(2, 8):
            device.front.enable(index, False)
        device.front.sync()
        assert [ring.enabled for ring in bench4.port.now.rings.values()] == [True] * 2 + [False] * 6


def test_need_reply_on_every_message(bench: Bench) -> None:
    """Each is answered exactly once, also those with a reply of their own."""
    with bench.device(protocol_features=MEMORY_STEPS) as device:
        device.up()
        front = device.front
        for request in (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM):
            assert len(front.ask(request, flags=1 | 8)) == 8
        answer = front.ask(Request.GET_VRING_BASE, struct.pack("=II", 0, 0), flags=1 | 8)
        assert struct.unpack("=II", answer) == (0, 0)
        front.sync()


def test_need_reply_counts_from_its_negotiation_on(bench: Bench) -> None:
    """User-Mode Linux waits for an answer to the very message that negotiates answers."""
    with bench.connect() as front:
        front.send(Request.SET_OWNER, flags=1 | 8)
        assert front.ask(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", P_REPLY_ACK), flags=1 | 8) == bytes(8)
        assert front.ask_u64(Request.GET_FEATURES)


@pytest.mark.parametrize("step", range(12))
def test_disconnect_at_each_step(bench: Bench, step: int) -> None:
    with bench.device() as device:
        front = device.connect()
        queue = device.queues[0]
        user = device.memory.user
        steps = [
            lambda: front.set_protocol_features(P_MQ),
            lambda: front.tell(Request.SET_OWNER),
            lambda: front.set_features(device.features),
            lambda: front.file(Request.SET_VRING_CALL, 0, queue.call_fd),
            lambda: front.file(Request.SET_VRING_ERR, 0, queue.call_fd),
            lambda: front.enable(0),
            lambda: front.set_mem_table(device.memory.slots, [device.memory.fd]),
            lambda: front.state(Request.SET_VRING_NUM, 0, queue.size),
            lambda: front.set_addr(0, user(queue.desc), user(queue.used), user(queue.avail)),
            lambda: front.file(Request.SET_VRING_KICK, 0, queue.kick_fd),
            lambda: front.enable(0, False),
        ]
        for action in steps[:step]:
            action()
    bench.idle()
    bench.port.settled()
    assert not bench.port.errors


def test_storm_of_state_changes(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        queue = device.queues[0]
        for turn in range(200):
            device.front.enable(0, bool(turn % 2))
            device.front.file(Request.SET_VRING_KICK, 0, queue.kick_fd)
            device.front.get_base(0)
        assert running(bench) == [1]


def test_config_changed_is_told(bench: Bench) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, bench.connect() as front:
        front.set_protocol_features(P_REPLY_ACK | 1 << 5 | 1 << 9)
        front.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        bench.endpoint.config_changed()
        ours.settimeout(5)
        assert ours.recv(64) == struct.pack("=III", 2, 1, 0)


def test_device_is_reusable(bench: Bench) -> None:
    for turn in range(5):
        with NetDevice(bench.path) as device:
            device.up(bases=[turn, turn])
            assert device.down() == [turn, turn]
        bench.idle()


def test_offset_of_a_region_may_be_any(bench: Bench) -> None:
    memory = GuestMemory(1 << 20)
    with bench.connect() as front:
        front.set_mem_table([Slot(0, 1000, 0, 123)], [memory.fd])
        front.sync()
        region = bench.port.memories[-1].regions[0]
        assert (region.size, region.host % PAGE) == (1000, 123)
    memory.close()
    bench.idle()


def test_only_the_region_is_mapped(bench: Bench) -> None:
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
