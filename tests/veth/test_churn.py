# SPDX-License-Identifier: Apache-2.0
"""A steady stream through one guest while others are added, changed and removed: nothing lost, nothing out of order."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from support.daemon import Daemon
from support.frames import PacketSocket, udp_frame
from support.frontend import NetDevice
from support.netns import World
from support.process import wait_for

MAC, SOURCE = "52:54:00:00:00:01", "02:00:00:00:00:77"
BURST = 64
ROUNDS = 60
DROPS = "xdpvhost_guest_drops_total"


class Stream:
    """Bursts from the network to the guest, and from the guest to the network; each is complete before the next."""

    def __init__(self, guest: NetDevice, wire: PacketSocket) -> None:
        self._guest, self._wire = guest, wire
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream")
        self.frames = 0  # each way
        self._sent = 0
        self._mark = guest.memory.mark()
        self.slowest = 0.0
        self.wrong: str | None = None

    def _run(self) -> None:
        try:
            for start in itertools.count(0, BURST):
                if self._stop.is_set():
                    return
                begun = time.monotonic()
                self._burst(start)
                self.slowest = max(self.slowest, time.monotonic() - begun)
                self.frames += BURST
        except BaseException as error:  # the test's own thread tells it
            self.wrong = f"after {self.frames} frames: {error!r}"

    def _burst(self, start: int) -> None:
        there = [udp_frame(MAC, SOURCE, number=start + n) for n in range(BURST)]
        back = [udp_frame(SOURCE, MAC, number=start + n) for n in range(BURST)]
        self._wire.send(there)
        for frame in back:
            self._guest.send(frame)
        assert [frame for _, frame in self._guest.receive(BURST, deadline=20)] == there
        assert self._wire.wait_received(MAC, BURST, 20) == back
        self._wire.frames.clear()
        self._sent += self._guest.sent()
        wait_for(self._all_taken, 20, "the device to be done with the frames", interval=0.001)
        self._guest.memory.release(self._mark)

    def _all_taken(self) -> bool:
        self._sent += self._guest.sent()
        return self._sent == self.frames + BURST

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def churn(daemon: Daemon, number: int) -> None:
    """A neighbour comes, becomes others in turn, and goes."""
    name = f"vm{number}"
    api = daemon.api
    api("guest-add", spec=f"name={name},mac=52:54:00:00:01:{number:02x},vlan=10")
    api("guest-set", name=name, set={"vlan": "", "trunk": "10-200"})
    api("guest-set", name=name, set={"trunk": "", "macs": "+".join(f"52:54:00:00:02:{n:02x}" for n in range(30))})
    api("guest-set", name=name, set={"tx-rate": "1M", "rx-rate": "2M", "storm": "100", "isolated": "on"})
    api("guest-set", name=name, set={"link": "off", "macs": ""})
    api("guest-set", name="vm1", set={"macs": f"52:54:00:00:03:{number:02x}", "tx-rate": f"{number}G"})
    api("guest-rm", name=name)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_loses_nothing_while_others_come_and_go(world: World, workers: int) -> None:
    nic, net = world.namespace("nic"), world.namespace("net")
    for namespace in (nic, net):
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    world.veth(nic, "nic0", net, "net0")
    with (
        Daemon(nic, iface="nic0", guests=[f"name=vm1,mac={MAC}"], options=["--workers", str(workers)]) as daemon,
        NetDevice(daemon.socket("vm1")) as guest,
        PacketSocket(net, "net0") as wire,
    ):
        guest.up()
        guest.post(200)
        with Stream(guest, wire) as stream:
            for number in range(2, 2 + ROUNDS):
                before = stream.frames
                churn(daemon, number)
                assert stream.wrong is None, stream.wrong
            moved = stream.frames
        assert stream.wrong is None, stream.wrong
        assert moved > before > 0
        metrics = daemon.metrics()
        assert metrics.total("xdpvhost_guest_rx_packets_total", guest="vm1") == stream.frames
        assert metrics.total("xdpvhost_guest_tx_packets_total", guest="vm1") == stream.frames
        assert metrics.total(DROPS, guest="vm1") == 0
        assert daemon.guest("vm1")["reconnects"] == 0
