# SPDX-License-Identifier: Apache-2.0
"""Every way of waiting for work, with one worker and with two: frames arrive whole, in order, and none is forgotten."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.daemon import Daemon
from support.frames import PacketSocket, set_transmit_queue, udp_frame
from support.frontend import F_EVENT_IDX, F_MRG_RXBUF, F_PROTOCOL, F_VERSION_1, NetDevice
from support.lab import Lab, guest_mac, spec
from support.process import cpu_seconds, wait_for

COUNT = 23
GUESTS = 3
QUEUES = 4


@pytest.fixture
def scene() -> Iterator[Lab]:
    with Lab(quiet=True, queues=QUEUES) as lab:
        yield lab


def connect(stack: ExitStack, daemon: Daemon, features: int) -> list[NetDevice]:
    devices = []
    for number in range(1, GUESTS + 1):
        device = stack.enter_context(NetDevice(daemon.socket(f"vm{number}"), features=features))
        device.up()
        device.post(128)
        devices.append(device)
    return devices


@pytest.mark.parametrize(
    ("poll", "workers", "features"),
    [
        ("adaptive", 1, 0),
        ("adaptive", 2, F_EVENT_IDX | F_MRG_RXBUF),
        ("busy", 2, 0),
        ("interrupt", 1, F_EVENT_IDX | F_MRG_RXBUF),
        ("interrupt", 2, 0),
    ],
)
def test_all_ways(scene: Lab, poll: str, workers: int, features: int) -> None:
    options = ["--poll", poll, "--workers", str(workers)]
    daemon = scene.up([spec(number) for number in range(1, GUESTS + 1)], options)
    macs = [guest_mac(number) for number in range(1, GUESTS + 1)]
    with ExitStack() as stack:
        devices = connect(stack, daemon, F_PROTOCOL | F_VERSION_1 | features)
        wire = stack.enter_context(PacketSocket(scene.net, "eth0"))
        for turn in range(2):  # the second finds workers that have slept
            # from the network, on two of its queues, to each guest
            for queue in (0, QUEUES - 1):
                set_transmit_queue(scene.net, "eth0", queue)
                for device, mac in zip(devices, macs, strict=True):
                    frames = [udp_frame(mac, scene.net_mac, number=1000 * turn + n, size=60 + n) for n in range(COUNT)]
                    wire.send(frames)
                    assert [frame for _, frame in device.receive(COUNT)] == frames
            # from each guest to the next, and to the network
            for index, device in enumerate(devices):
                other = (index + 1) % GUESTS
                frames = [udp_frame(macs[other], macs[index], number=turn, size=60 + 7 * n) for n in range(COUNT)]
                for frame in frames:
                    device.send(frame)
                assert [frame for _, frame in devices[other].receive(COUNT)] == frames
                outside = [udp_frame(scene.net_mac, macs[index], number=n, size=100) for n in range(COUNT)]
                for frame in outside:
                    device.send(frame)
                assert wire.wait_received(macs[index], (turn + 1) * COUNT) == outside * (turn + 1)
                wait_for(lambda device=device: device.sent() or not device.tx().chains, 5, "used transmit buffers")
    drops = daemon.metrics().by("reason", "xdpvhost_guest_drops_total")
    assert not any(drops.values()), drops


@pytest.mark.parametrize("workers", [1, 2])
def test_guest_that_stops_reading_costs_nothing(scene: Lab, workers: int) -> None:
    """Frames wait for it while the daemon sleeps; the other guest's go on; when it reads again it gets them."""
    daemon = scene.up([spec(1), spec(2)], ["--workers", str(workers)])
    with ExitStack() as stack:
        stalled = stack.enter_context(NetDevice(daemon.socket("vm1")))
        other = stack.enter_context(NetDevice(daemon.socket("vm2")))
        stalled.up()
        other.up()
        other.post(64)
        wire = stack.enter_context(PacketSocket(scene.net, "eth0"))
        frames = [udp_frame(guest_mac(1), scene.net_mac, number=n) for n in range(COUNT)]
        wire.send(frames)
        daemon.wait_metric(COUNT, "xdpvhost_xdp_verdicts_total", guest="vm1", verdict="redirect")
        # processor time over two seconds of the daemon's own clock: a watchdog of 10 Hz, and nothing else
        uptime, used = float(daemon.api("status")["uptime_seconds"]), cpu_seconds(daemon.pid)
        wait_for(lambda: daemon.api("status")["uptime_seconds"] >= uptime + 2, 5, "two seconds to pass", interval=0.5)
        assert cpu_seconds(daemon.pid) - used < 0.2
        theirs = [udp_frame(guest_mac(2), scene.net_mac, number=n) for n in range(COUNT)]
        wire.send(theirs)
        assert [frame for _, frame in other.receive(COUNT)] == theirs
        stalled.post(64)
        assert [frame for _, frame in stalled.receive(COUNT)] == frames
