# SPDX-License-Identifier: Apache-2.0
"""The message orders of real front-ends, as read in their sources and recorded from them, and stopping again."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from support.endpoint import MAC
from support.frontend import (
    F_CTRL_VQ,
    F_LOG_ALL,
    F_MQ,
    F_MRG_RXBUF,
    F_PROTOCOL,
    F_VERSION_1,
    P_CONFIG,
    P_LOG_SHMFD,
    P_MQ,
    P_REPLY_ACK,
    P_STATUS,
    FrontEnd,
    GuestMemory,
    NetDevice,
    Queue,
)
from support.plane import Plane
from xdpvhost.vhost.wire import Request

from .conftest import Bench, MakeDevice
from .test_guests import frame

DRIVER_OK = 15


@contextlib.contextmanager
def queues(count: int) -> Iterator[tuple[GuestMemory, list[Queue]]]:
    memory = GuestMemory()
    made = [Queue(memory) for _ in range(count)]
    try:
        yield memory, made
    finally:
        for queue in made:
            queue.close()
        memory.close()


def test_qemu(bench: Bench) -> None:
    """ENABLE comes before memory, addresses and kicks; memory is two regions at an unaligned offset."""
    with queues(2) as (memory, (rx, tx)), bench.connect() as front:
        user = memory.user
        offered = front.ask_u64(Request.GET_FEATURES)
        assert offered & F_PROTOCOL
        protocol = front.ask_u64(Request.GET_PROTOCOL_FEATURES)
        front.set_protocol_features(protocol)
        assert front.ask_u64(Request.GET_QUEUE_NUM) == 1
        ours, theirs = socket.socketpair()
        with ours, theirs:
            front.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        front.tell(Request.SET_OWNER)
        front.ask_u64(Request.GET_FEATURES)
        for index, queue in enumerate((rx, tx)):
            front.file(Request.SET_VRING_CALL, index, queue.call_fd)
            front.file(Request.SET_VRING_ERR, index, queue.call_fd)
        for _ in range(3):
            front.enable(0)
            front.enable(1)
        front.set_features(F_PROTOCOL | F_VERSION_1)
        assert front.ask_u64(Request.GET_STATUS) == 0
        front.tell(Request.SET_STATUS, struct.pack("=Q", DRIVER_OK & ~4))
        front.set_mem_table(memory.split(0xC0000), [memory.fd, memory.fd])
        for index, queue in enumerate((rx, tx)):
            front.state(Request.SET_VRING_NUM, index, queue.size)
            front.state(Request.SET_VRING_BASE, index, 7)
            front.set_addr(index, user(queue.desc), user(queue.used), user(queue.avail))
            assert index not in bench.port.now.rings
            front.file(Request.SET_VRING_KICK, index, queue.kick_fd)
            assert index in bench.port.now.rings
            queue.interrupts()
            front.file(Request.SET_VRING_CALL, index, queue.call_fd)
            front.sync()
            assert queue.interrupts(), "a call descriptor set on a running ring is signalled once"
        front.tell(Request.SET_STATUS, struct.pack("=Q", DRIVER_OK))
        assert front.ask_u64(Request.GET_STATUS) == DRIVER_OK
        now = bench.port.now
        assert (now.features, now.ctrl) == (F_PROTOCOL | F_VERSION_1, None)
        assert [(r.num, r.base, r.enabled, len(r.memory.regions)) for r in now.rings.values()] == [
            (256, 7, True, 2)
        ] * 2
        # stop; QEMU enables again after it
        assert front.get_base(0) == 7
        assert front.get_base(1) == 7
        assert not bench.port.now.rings
        front.tell(Request.SET_STATUS, struct.pack("=Q", 0))
        front.enable(0)
        front.enable(1)
        front.sync()
        assert not bench.port.now.rings
        # and start again
        for index, queue in enumerate((rx, tx)):
            front.set_queue(index, queue, 9)
        front.sync()
        assert [(r.base, r.enabled) for r in bench.port.now.rings.values()] == [(9, True)] * 2


def test_old_qemu_never_acknowledges_bit_30(bench: Bench) -> None:
    """QEMU before 7.2 negotiates protocol features and leaves bit 30 out of SET_FEATURES: rings are enabled."""
    with bench.device(features=F_VERSION_1 | F_MRG_RXBUF) as device:
        front = device.connect()
        front.set_protocol_features(P_MQ)
        front.set_features(device.features)
        front.set_mem_table(device.memory.slots, [device.memory.fd])
        for index, queue in enumerate(device.queues):
            front.set_queue(index, queue)
        front.sync()
        assert [ring.enabled for ring in bench.port.now.rings.values()] == [True, True]
        front.enable(1, False)
        front.sync()
        assert [ring.enabled for ring in bench.port.now.rings.values()] == [True, False]


def test_user_mode_linux(bench: Bench) -> None:
    """Sockets as call descriptors, room for two regions, MAC by GET_CONFIG, stop by ENABLE(0) only."""
    with queues(3) as (memory, rings), bench.connect() as front, contextlib.ExitStack() as stack:
        front.tell(Request.SET_OWNER)
        front.ask_u64(Request.GET_FEATURES)
        protocol = front.ask_u64(Request.GET_PROTOCOL_FEATURES)
        chosen = protocol & (P_REPLY_ACK | P_CONFIG | 1 << 5)
        assert front.ask(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", chosen), flags=1 | 8) == bytes(8)
        front.protocol_features = chosen
        ours, theirs = socket.socketpair()
        front.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        stack.callback(ours.close)
        theirs.close()
        assert b"".join(front.get_config(at + 1)[at:] for at in range(6)) == MAC
        assert front.get_config(8)[6:] == struct.pack("=H", 1)
        features = F_PROTOCOL | F_VERSION_1 | F_CTRL_VQ | F_MRG_RXBUF
        front.set_features(features)
        front.set_mem_table(memory.slots, [memory.fd], room_for=2)
        ends = []
        for index, queue in enumerate(rings):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.setblocking(False)
            stack.callback(ours.close)
            ends.append(ours)
            front.file(Request.SET_VRING_CALL, index, theirs.fileno())
            theirs.close()
            front.state(Request.SET_VRING_NUM, index, queue.size)
            front.state(Request.SET_VRING_BASE, index, 0)
            user = memory.user
            front.set_addr(index, user(queue.desc), user(queue.used), user(queue.avail), log=2**64 - 1)
        for index, queue in enumerate(rings):
            front.file(Request.SET_VRING_KICK, index, queue.kick_fd)
            front.enable(index)
        now = bench.port.now
        assert sorted(now.rings) == [0, 1, 2]
        assert now.ctrl == 2
        for ours in ends:
            assert ours.recv(64) == (1).to_bytes(8, "little")
        for vring in now.rings.values():
            vring.base = 5
        for index in (2, 1, 0):
            front.enable(index, False)
        front.sync()
        assert not bench.port.now.rings, "its memory is freed after this, so nothing may run any more"
        # a resume: ENABLE alone brings the rings back where they were
        for index in range(3):
            front.enable(index)
        front.sync()
        assert [ring.base for ring in bench.port.now.rings.values()] == [5, 5, 5]


def test_dpdk_virtio_user(bench4: Bench) -> None:
    """SET_OWNER first, guest physical addresses are virtual, ENABLE at the very end, both at stop."""
    with bench4.device(pairs=4) as device, bench4.connect() as front:
        base = 0x10063A000
        front.tell(Request.SET_OWNER)
        front.ask_u64(Request.GET_FEATURES)
        front.ask_u64(Request.GET_PROTOCOL_FEATURES)
        front.set_protocol_features(P_MQ | P_REPLY_ACK | P_STATUS)
        assert front.ask_u64(Request.GET_QUEUE_NUM) == 4
        device.memory.user_base = device.memory.gpa = base
        memory = device.memory
        shift = base - 0x4000_0000
        for index, queue in enumerate(device.queues):
            front.send(Request.SET_VRING_CALL, struct.pack("=Q", index), [queue.call_fd])
        front.set_features(F_PROTOCOL | F_VERSION_1 | F_MQ | F_MRG_RXBUF)
        front.tell(Request.SET_STATUS, struct.pack("=Q", 11))
        assert front.ask_u64(Request.GET_STATUS) == 11
        front.set_mem_table(memory.slots, [memory.fd])
        for index, queue in enumerate(device.queues):
            front.send(Request.SET_VRING_NUM, struct.pack("=II", index, queue.size))
            front.send(Request.SET_VRING_BASE, struct.pack("=II", index, 0))
            addresses = (queue.desc + shift, queue.used + shift, queue.avail + shift)
            front.send(Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, *addresses, 0))
            front.send(Request.SET_VRING_KICK, struct.pack("=Q", index), [queue.kick_fd])
        front.sync()
        assert [ring.enabled for ring in bench4.port.now.rings.values()] == [False] * 8
        for index in (0, 1):
            front.send(Request.SET_VRING_ENABLE, struct.pack("=II", index, 1))
        front.tell(Request.SET_STATUS, struct.pack("=Q", DRIVER_OK))
        assert [ring.enabled for ring in bench4.port.now.rings.values()] == [True] * 2 + [False] * 6
        assert bench4.port.now.ctrl is None
        for index in (0, 1):
            front.send(Request.SET_VRING_ENABLE, struct.pack("=II", index, 0))
        assert [front.get_base(index) for index in range(8)] == [0] * 8
        assert not bench4.port.now.rings


def test_control_ring_needs_the_feature(bench4: Bench) -> None:
    """Index 2 is the control ring without MQ, index 8 with it, and no ring at all is one without CTRL_VQ."""
    for features, expected in ((F_CTRL_VQ, 2), (F_CTRL_VQ | F_MQ, 8), (F_MQ, None)):
        with bench4.device(pairs=1) as device:
            device.queues.append(Queue(device.memory))
            front = device.connect()
            front.set_features(F_PROTOCOL | F_VERSION_1 | features)
            front.set_mem_table(device.memory.slots, [device.memory.fd])
            front.set_queue(0, device.queues[0])
            front.set_queue(1, device.queues[1])
            front.sync()
            assert bench4.port.now.ctrl is None
            front.set_queue(8 if features & F_MQ else 2, device.queues[2])
            front.sync()
            assert bench4.port.now.ctrl == expected
        bench4.idle()


def test_restarted_backend_needs_no_kick(bench: Bench) -> None:
    """A guest that kicked our predecessor does not kick again; it also gets the interrupt that it may have missed."""
    with bench.device() as device:
        device.up(bases=[41, 42])
        assert [ring.base for ring in bench.port.now.rings.values()] == [41, 42]
        assert all(queue.interrupts() for queue in device.queues)


# ---- any legal order ----

Step = Callable[[], object]


def ring_steps(front: FrontEnd, device: NetDevice, index: int) -> list[Step]:
    queue, user = device.queues[index], device.memory.user
    return [
        partial(front.file, Request.SET_VRING_CALL, index, queue.call_fd),
        partial(front.state, Request.SET_VRING_NUM, index, queue.size),
        partial(front.state, Request.SET_VRING_BASE, index, queue.base),
        partial(front.set_addr, index, user(queue.desc), user(queue.used), user(queue.avail), 1, queue.used),
        partial(front.file, Request.SET_VRING_KICK, index, queue.kick_fd),
        partial(front.enable, index),
    ]


@pytest.mark.parametrize("seed", range(12))
def test_any_order_brings_a_device_up_and_restarts_it(net: MakeDevice, tmp_path: Path, seed: int) -> None:
    """Everything that a device needs, each once, shuffled; also while it logs, and again after its rings were stopped.

    What is sent and received says that each ring went on at the right place.
    """
    rng = random.Random(seed)
    with Plane(tmp_path) as plane:
        plane.guest()
        plane.guest()
        one = net(plane.path("vm1"), protocol_features=P_LOG_SHMFD)
        two = net(plane.path("vm2"), protocol_features=P_LOG_SHMFD)
        log = os.memfd_create("log")
        with one, two:
            size = (two.memory.gpa + two.memory.size) // 4096 // 8
            os.ftruncate(log, size)
            for device in (one, two):
                front = device.connect()
                features = device.features | (F_LOG_ALL if rng.random() < 0.5 else 0)
                steps: list[Step] = [
                    partial(front.set_protocol_features, P_LOG_SHMFD),
                    partial(front.tell, Request.SET_OWNER),
                    partial(front.set_features, features),
                    partial(front.set_mem_table, device.memory.slots, [device.memory.fd]),
                    partial(front.set_log, log, size),
                    *ring_steps(front, device, 0),
                    *ring_steps(front, device, 1),
                ]
                rng.shuffle(steps)
                for step in steps:
                    step()
                front.sync()
            two.post(64)
            number = 0
            for _ in range(6):
                expected = [frame(number + n) for n in range(5)]
                for data in expected:
                    one.send(data)
                number += 5
                assert [got for _, got in two.receive(5)] == expected
                one.sent()
                for device, index in ((one, 1), (two, 0)):
                    if rng.random() < 0.7:
                        base = device.front.get_base(index)
                        list(device.received()) if index == 0 else device.sent()
                        assert base == device.queues[index].base, "where the driver is, too"
                        again = [step for step in ring_steps(device.front, device, index) if rng.random() < 0.6]
                        kick = partial(device.front.file, Request.SET_VRING_KICK, index, device.queues[index].kick_fd)
                        again += [kick] * 2
                        rng.shuffle(again)
                        for step in again:
                            step()
                        device.front.sync()
        os.close(log)
        assert plane.faults == []
