# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost rebalance`: guests move between workers, under traffic, and no frame is lost or overtaken."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, set_transmit_queue, udp_frame
from support.frontend import NetDevice
from support.netns import Namespace, World
from support.process import wait_for

MACS = [f"52:54:00:00:00:0{i}" for i in range(1, 5)]
GUESTS = [f"name=vm{i},mac={mac}" for i, mac in enumerate(MACS, 1)]
WINDOW = 100  # frames on their way at a time: fewer than any ring or socket holds
NUMBER = slice(42, 46)


@dataclass
class Host:
    nic: Namespace
    net: Namespace
    world: World

    def up(self, *guests: str, workers: int = 2) -> Daemon:
        return Daemon(
            self.nic, iface="nic0", guests=guests, run_dir=self.world.directory / "run",
            options=["--workers", str(workers)],
        )  # fmt: skip


@pytest.fixture
def host(world: World) -> Host:
    nic, net = world.namespace("nic"), world.namespace("net")
    for namespace in (nic, net):
        namespace.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
    world.veth(nic, "nic0", net, "net0")
    set_transmit_queue(net, "net0", 0)  # a sender that moves to another CPU would overtake itself there
    return Host(nic, net, world)


def attach(stack: ExitStack, daemon: Daemon, name: str) -> NetDevice:
    device = stack.enter_context(NetDevice(daemon.socket(name)))
    device.up()
    device.post(128)
    return device


def number_of(frame: bytes) -> int:
    return int(struct.unpack("!I", frame[NUMBER])[0])


@dataclass
class Streams:
    """Numbered frames from the wire to a guest, and from the guest to the wire, never more than WINDOW on their way."""

    wire: PacketSocket
    guest: NetDevice
    wire_mac: str
    guest_mac: str
    sent: list[int] = field(default_factory=lambda: [0, 0])
    got: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    failed: list[BaseException] = field(default_factory=list)

    def step(self, more: bool) -> None:
        for _ in range(16 if more else 0):
            if self.sent[0] - len(self.got[0]) < WINDOW:
                self.wire.send([udp_frame(self.guest_mac, self.wire_mac, number=self.sent[0])])
                self.sent[0] += 1
            if self.sent[1] - len(self.got[1]) < WINDOW:
                self.guest.send(udp_frame(self.wire_mac, self.guest_mac, number=self.sent[1]))
                self.sent[1] += 1
        self.guest.sent()
        self.got[0].extend(number_of(frame) for _, frame in self.guest.received())
        self.wire.frames.clear()
        self.got[1].extend(map(number_of, self.wire.received_from(self.guest_mac)))

    @contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()

        def run() -> None:
            try:
                while not stop.is_set():
                    self.step(more=True)
            except BaseException as error:
                self.failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def check(self) -> None:
        """Every frame has come, once, and in its place."""
        assert not self.failed, self.failed

        def all_there() -> bool:
            self.step(more=False)
            return [len(numbers) for numbers in self.got] == self.sent

        wait_for(all_there, 5, "the frames on their way")
        assert self.got[0] == list(range(self.sent[0]))
        assert self.got[1] == list(range(self.sent[1]))


def test_moved_under_a_stream(host: Host) -> None:
    with host.up(*GUESTS[:2]) as daemon, ExitStack() as stack:
        vm1 = attach(stack, daemon, "vm1")
        wire = stack.enter_context(PacketSocket(host.net, "net0"))
        streams = Streams(wire, vm1, host.net.mac("net0"), MACS[0])
        moves = 0
        with streams.running():
            for turn in range(60):
                wait_for(lambda turn=turn: streams.failed or streams.sent[0] > 100 * (turn + 1), 20, "more traffic")
                answer = daemon.api("rebalance", move={"vm1": (turn + 1) % 2, "vm2": turn % 2})
                moves += len(answer["moves"])
        streams.check()
        assert moves == 120
        assert min(streams.sent) > 5000
        drops = daemon.metrics().by("reason", "xdpvhost_guest_drops_total", guest="vm1")
        assert not any(drops.values()), drops
        packets = daemon.metrics().by("worker", "xdpvhost_worker_packets_total")
        assert min(packets.values()) > 1000, packets  # both had it


def test_it_evens_out_what_it_measures(host: Host) -> None:
    """Two guests with traffic begin on one worker, and don't stay there; a second look moves nobody."""
    with host.up(*GUESTS) as daemon, ExitStack() as stack:
        assert [guest["worker"] for guest in daemon.api("guest-list")] == [0, 1, 0, 1]
        vm1, vm3 = attach(stack, daemon, "vm1"), attach(stack, daemon, "vm3")
        wires = [stack.enter_context(PacketSocket(host.net, "net0")) for _ in range(2)]
        mac = host.net.mac("net0")
        both = [Streams(wires[0], vm1, mac, MACS[0]), Streams(wires[1], vm3, mac, MACS[2])]
        with both[0].running(), both[1].running():
            wait_for(lambda: all(streams.sent[0] > 500 for streams in both), 20, "traffic")
            result = json.loads(daemon.cli("rebalance", "--json"))
            assert [worker["worker"] for worker in result["workers"]] == [0, 1]
            rates = {guest["name"]: guest for guest in result["guests"]}
            for name in ("vm1", "vm3"):
                assert rates[name]["rx_packets"] > 100
                assert rates[name]["tx_packets"] > 100
                assert rates[name]["rx_bytes"] == pytest.approx(64 * rates[name]["rx_packets"], rel=0.1)
            assert rates["vm2"]["rx_packets"] == rates["vm2"]["busy_percent"] == 0
            (move,) = result["moves"]
            assert move["guest"] in ("vm1", "vm3")
            assert (move["from"], move["to"]) == (0, 1)
            busy = [worker["busy_percent"] for worker in result["workers"]]
            expected = [worker["expected_percent"] for worker in result["workers"]]
            assert max(expected) < max(busy)
            where = {guest["name"]: guest["worker"] for guest in daemon.api("guest-list")}
            assert {where["vm1"], where["vm3"]} == {0, 1}
            assert (where["vm2"], where["vm4"]) == (1, 1)  # idle ones stay
        for streams in both:
            streams.check()
        text = daemon.cli("status")
        assert "queues of nic0" in text
        assert "busy" in text
        assert "nothing was moved" in daemon.cli("rebalance")


def test_who_does_what(host: Host) -> None:
    with host.up(f"{GUESTS[0]},queues=2", GUESTS[1]) as daemon:
        guests = {guest["name"]: guest for guest in daemon.api("guest-list")}
        assert (guests["vm1"]["pair_workers"], guests["vm1"]["socket_workers"]) == ([0, 1], [0, 1, 0, 1])
        assert (guests["vm2"]["pair_workers"], guests["vm2"]["socket_workers"]) == ([1], [1, 0, 1, 0])
        status = json.loads(daemon.cli("status", "--json"))
        queues = status["nics"][0]["assignment"]
        assert [queue["queue"] for queue in queues] == [0, 1, 2, 3]
        assert all(queue["readers"] == {"0": 1, "1": 1} for queue in queues)
        assert [queue["sending_pairs"] for queue in queues] == [1, 2, 0, 0]
        assert [worker["guests"] for worker in status["worker_loads"]] == [["vm1"], ["vm2"]]
        assert "guest vm1: from worker 0 to 1" in daemon.cli("rebalance", "vm1=1")
        status = json.loads(daemon.cli("status", "--json"))
        assert [worker["guests"] for worker in status["worker_loads"]] == [[], ["vm1", "vm2"]]
        queues = status["nics"][0]["assignment"]
        assert [queue["readers"] for queue in queues] == [{"1": 2}, {"0": 2}, {"1": 2}, {"0": 2}]
        assert [queue["sending_pairs"] for queue in queues] == [1, 2, 0, 0]  # they send where they did
        assert "nothing was moved" in daemon.cli("rebalance", "vm1=1")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("vm7=0",), "guest 'vm7' does not exist; guests here: vm1, vm2"),
        (("vm1=1", "vm2=2"), "guest 'vm2': there is no worker 2, but 2, from 0 on"),
        (("vm1=1", "vm2"), "'vm2' is not GUEST=WORKER"),
    ],
)
def test_refusals_move_nobody(host: Host, args: tuple[str, ...], words: str) -> None:
    with host.up(*GUESTS[:2]) as daemon:
        result = host.nic.run(PROGRAM, "rebalance", *args, "--run-dir", daemon.run_dir, check=False)
        assert result.returncode == 2
        assert words in result.stderr
        assert [guest["worker"] for guest in daemon.api("guest-list")] == [0, 1]
