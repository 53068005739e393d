# SPDX-License-Identifier: Apache-2.0
"""Addresses that a guest makes up, and limits, with a real daemon and front-ends: who gets which frames, how many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Ether

from support.daemon import Daemon
from support.frames import udp_frame
from support.frontend import NetDevice
from support.netns import Namespace, World
from support.process import wait_for
from support.tagsock import TagSocket
from support.wire import Q, tagged

MAC1, MAC2 = "52:54:00:00:00:01", "52:54:00:00:00:02"
INNER = [f"02:00:00:00:01:{n:02x}" for n in range(4)]
SOURCE, ALL = "02:00:00:00:00:77", "ff:ff:ff:ff:ff:ff"
COUNT = 23
DROPS, LEARNING = "xdpvhost_guest_drops_total", "xdpvhost_guest_learning_total"


class Scene:
    """`nic0` for the daemon; the other end of the veth, `net0`, is the network."""

    def __init__(self, world: World, stack: ExitStack) -> None:
        self.world, self._stack = world, stack
        self.nic: Namespace = world.namespace("nic")
        self.net: Namespace = world.namespace("net")
        for namespace in (self.nic, self.net):
            namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        world.veth(self.nic, "nic0", self.net, "net0", queues=2)
        self.wire = stack.enter_context(TagSocket(self.net, "net0"))

    def up(self, *guests: str, options: tuple[str, ...] = ()) -> None:
        run_dir = self.world.directory / "run"
        daemon = Daemon(self.nic, iface="nic0", guests=guests, run_dir=run_dir, options=options)
        self.daemon = self._stack.enter_context(daemon)

    def attach(self, name: str) -> NetDevice:
        guest = self._stack.enter_context(NetDevice(self.daemon.socket(name)))
        guest.up()
        guest.post(64)
        return guest

    def learned(self, name: str) -> set[tuple[str, int]]:
        return {(found["mac"], found["vlan"]) for found in self.daemon.guest(name)["learned"]}

    def wait_learned(self, name: str, *expected: tuple[str, int]) -> None:
        wait_for(lambda: self.learned(name) == set(expected), 5, f"{name} to have learned {expected}")

    def drops(self, name: str) -> dict[str, int]:
        return {why: count for why, count in self.daemon.metrics().by("reason", DROPS, guest=name).items() if count}

    def arrive(self, mac: str, count: int = COUNT, size: int = 64) -> list[bytes]:
        frames = [udp_frame(mac, SOURCE, number=number, size=size) for number in range(count)]
        self.wire.send(frames)
        return frames


@pytest.fixture
def scene(world: World) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(world, stack)


def send(guest: NetDevice, *frames: bytes) -> float:
    """And wait until the device is done with them; in seconds."""
    begun, done = time.monotonic(), [0]
    for frame in frames:
        guest.send(frame)

    def finished() -> bool:
        done[0] += guest.sent()
        return done[0] == len(frames)

    wait_for(finished, 20, "the frames to be taken", interval=0.001)
    return time.monotonic() - begun


def got(guest: NetDevice, count: int = COUNT) -> list[bytes]:
    return [frame for _, frame in guest.receive(count)]


def test_an_address_is_learned_and_used(scene: Scene) -> None:
    scene.up(f"name=vm1,mac={MAC1},learn=2")
    vm1 = scene.attach("vm1")
    out = [udp_frame(SOURCE, INNER[0], number=n) for n in range(COUNT)]
    send(vm1, *out)
    assert scene.wire.wait_received(INNER[0], COUNT) == out, "from the first frame on"
    scene.wait_learned("vm1", (INNER[0], 0))
    assert scene.arrive(INNER[0]) == got(vm1)
    send(vm1, tagged(udp_frame(SOURCE, INNER[1]), (Q, 7)))
    scene.wait_learned("vm1", (INNER[0], 0), (INNER[1], 7))
    assert f"{INNER[1]} (learned)" in scene.daemon.cli("guest", "list")
    metrics = scene.daemon.metrics()
    assert metrics.total("xdpvhost_guest_learned_addresses", guest="vm1") == 2
    send(vm1, udp_frame(SOURCE, INNER[2]))
    assert scene.drops("vm1") == {"spoofed": 1}, "no third one"
    assert metrics.by("result", LEARNING, guest="vm1") == {"learned": 2, "refused": 0, "aged": 0, "taken": 0}


def test_an_address_is_forgotten(scene: Scene) -> None:
    scene.up(f"name=vm1,mac={MAC1},learn=2", options=("--mac-age", "3"))
    vm1 = scene.attach("vm1")
    send(vm1, *(udp_frame(SOURCE, mac) for mac in INNER[:2]))
    scene.daemon.wait_metric(2, LEARNING, guest="vm1", result="learned")

    def aged() -> bool:
        send(vm1, udp_frame(SOURCE, INNER[0]))  # this one is in use all the time
        return scene.learned("vm1") == {(INNER[0], 0)}

    wait_for(aged, 20, "the other address to be forgotten")
    send(vm1, udp_frame(SOURCE, INNER[2]))
    wait_for(lambda: (INNER[2], 0) in scene.learned("vm1"), 5, "the third to be learned")
    assert scene.drops("vm1") == {}
    metrics = scene.daemon.metrics()
    results = metrics.by("result", LEARNING, guest="vm1")
    assert results["aged"] >= 1, "and more if this machine stood still"
    there = metrics.total("xdpvhost_guest_learned_addresses", guest="vm1")
    assert results == {"learned": there + results["aged"], "refused": 0, "aged": results["aged"], "taken": 0}


def test_what_is_configured_is_never_learned(scene: Scene) -> None:
    scene.up(f"name=vm1,mac={MAC1},learn=4", f"name=vm2,mac={MAC2}")
    vm1, vm2 = scene.attach("vm1"), scene.attach("vm2")
    send(vm1, *(udp_frame(SOURCE, MAC2) for _ in range(COUNT)))
    assert scene.drops("vm1") == {"spoofed": COUNT}
    assert scene.learned("vm1") == set()
    assert scene.arrive(MAC2) == got(vm2)
    ours = scene.nic.mac("nic0")
    send(vm1, udp_frame(SOURCE, ours))
    scene.daemon.wait_metric(1, LEARNING, guest="vm1", result="refused")
    assert scene.learned("vm1") == set()
    scene.wire.frames.clear()
    send(vm1, *(udp_frame(SOURCE, ours) for _ in range(COUNT)), udp_frame(SOURCE, MAC1))
    assert len(scene.wire.wait_received(MAC1, 1)) == 1
    assert scene.drops("vm1") == {"spoofed": 2 * COUNT}, "once it is refused, not one more passes"
    before = scene.daemon.metrics().total("xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")
    scene.arrive(ours)
    scene.daemon.wait_metric(before + COUNT, "xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")


@pytest.mark.parametrize("how", ["add", "set"])
def test_what_is_configured_later_takes_it(scene: Scene, how: str) -> None:
    scene.up(f"name=vm1,mac={MAC1},learn=4", *([f"name=vm2,mac={MAC2}"] if how == "set" else []))
    vm1 = scene.attach("vm1")
    send(vm1, udp_frame(SOURCE, INNER[0]))
    scene.wait_learned("vm1", (INNER[0], 0))
    if how == "add":
        scene.daemon.cli("guest", "add", f"name=vm2,mac={INNER[0]}")
    else:
        scene.daemon.cli("guest", "set", "vm2", f"macs={INNER[0]}")
    assert scene.learned("vm1") == set()
    vm2 = scene.attach("vm2")
    assert scene.arrive(INNER[0]) == got(vm2)
    assert vm1.received() == []
    send(vm1, udp_frame(SOURCE, INNER[0]))
    assert scene.drops("vm1") == {"spoofed": 1}
    assert scene.daemon.metrics().by("result", LEARNING, guest="vm1")["taken"] == 1


def test_a_flood_of_made_up_addresses(scene: Scene) -> None:
    """It learns what it may, and its neighbour loses nothing."""
    scene.up(f"name=vm1,mac={MAC1},learn=16", f"name=vm2,mac={MAC2}")
    vm1, vm2 = scene.attach("vm1"), scene.attach("vm2")
    made_up = [f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}" for n in range(1024, 1024 + 600)]
    for start in range(0, len(made_up), 100):
        send(vm1, *(udp_frame(SOURCE, mac) for mac in made_up[start : start + 100]))
        assert scene.arrive(MAC2) == got(vm2)
    assert scene.drops("vm1") == {"spoofed": 600 - 16}
    wait_for(lambda: len(scene.learned("vm1")) == 16, 5, "16 addresses to be learned")
    scene.daemon.cli("guest", "set", "vm1", "learn=")
    assert scene.learned("vm1") == set()


def test_an_access_port_learns_in_its_vlan(scene: Scene) -> None:
    scene.up(f"name=vm1,mac={MAC1},vlan=10,learn=1")
    vm1 = scene.attach("vm1")
    send(vm1, udp_frame(SOURCE, INNER[0]))
    assert scene.wire.wait_received(INNER[0], 1) == [tagged(udp_frame(SOURCE, INNER[0]), (Q, 10))]
    scene.wait_learned("vm1", (INNER[0], 10))
    frames = [udp_frame(INNER[0], SOURCE, number=number) for number in range(COUNT)]
    scene.wire.send(tagged(frame, (Q, 10)) for frame in frames)
    assert got(vm1) == frames
    scene.daemon.cli("guest", "set", "vm1", "vlan=20")
    assert scene.learned("vm1") == set()


# ---- limits


def test_a_storm_is_cut(scene: Scene) -> None:
    scene.up(f"name=vm1,mac={MAC1},storm=1,storm-burst=5", f"name=vm2,mac={MAC2}")
    vm1, vm2 = scene.attach("vm1"), scene.attach("vm2")
    seconds = send(vm1, *(udp_frame(ALL, MAC1, number=n) for n in range(COUNT)))
    passed = COUNT - scene.drops("vm1")["storm"]
    assert 5 <= passed <= 5 + seconds + 1
    assert len(got(vm2, passed)) == passed
    send(vm1, *(udp_frame(MAC2, MAC1, number=n) for n in range(COUNT)))
    assert len(got(vm2)) == COUNT, "it is about groups only"
    scene.daemon.cli("guest", "set", "vm1", "storm=,storm-burst=")
    send(vm1, *(udp_frame(ALL, MAC1, number=n) for n in range(COUNT)))
    assert len(got(vm2)) == COUNT
    assert scene.drops("vm1") == {"storm": COUNT - passed}


def test_what_it_sends_waits_and_what_it_is_sent_is_dropped(scene: Scene) -> None:
    scene.up(f"name=vm1,mac={MAC1},tx-rate=800k,tx-burst=2K,rx-rate=800k,rx-burst=10000")
    vm1 = scene.attach("vm1")
    seconds = send(vm1, *(udp_frame(SOURCE, MAC1, number=n, size=1000) for n in range(62)))
    assert len(scene.wire.wait_received(MAC1, 62)) == 62, "none is lost"
    assert seconds > 0.5, f"60,000 bytes above the burst at 100,000 a second took {seconds:.2f} s"
    scene.arrive(MAC1, 50, size=1000)
    wait_for(lambda: scene.drops("vm1").get("rate", 0) >= 30, 5, "most of 50,000 bytes to be dropped")
    wait_for(lambda: len(vm1.received()) + 50 >= 50, 5, "the rest")
    passed = scene.daemon.metrics().total("xdpvhost_guest_rx_packets_total", guest="vm1")
    assert passed >= 10
    assert passed + scene.drops("vm1")["rate"] == 50
    facts = scene.daemon.guest("vm1")["limits"]
    assert (facts["tx"], facts["rx"]) == ({"bits": 800_000, "burst": 2048}, {"bits": 800_000, "burst": 10_000})
    scene.daemon.cli("guest", "set", "vm1", "tx-rate=,tx-burst=,rx-rate=,rx-burst=")
    assert send(vm1, *(udp_frame(SOURCE, MAC1, number=n, size=1000) for n in range(62))) < 0.5
    drops = scene.drops("vm1")
    vm1.received()
    assert scene.arrive(MAC1, 50, size=1000) == got(vm1, 50)
    assert scene.drops("vm1") == drops


def test_only_its_own_ip_addresses(scene: Scene) -> None:
    scene.up(f"name=vm1,mac={MAC1},address=192.0.2.11+2001:db8::11")
    vm1 = scene.attach("vm1")

    def ip(source: str) -> bytes:
        return bytes(
            Ether(src=MAC1, dst=SOURCE) / IP(src=source, dst="192.0.2.1") / UDP(sport=9, dport=9) / (b"x" * 18)
        )

    def arp(sender: str, mac: str = MAC1) -> bytes:
        return bytes(Ether(src=MAC1, dst=ALL) / ARP(hwsrc=mac, psrc=sender, pdst="192.0.2.1"))

    good = [ip("192.0.2.11"), arp("192.0.2.11"), arp("0.0.0.0")]
    bad = [ip("192.0.2.12"), arp("192.0.2.12"), arp("192.0.2.11", MAC2)]
    send(vm1, *(frame for pair in zip(good, bad, strict=True) for frame in pair))
    assert scene.wire.wait_received(MAC1, 3) == good
    assert scene.drops("vm1") == {"ip_spoofed": 3}
    scene.daemon.cli("guest", "set", "vm1", "address=192.0.2.12")
    scene.wire.frames.clear()
    send(vm1, *bad)
    assert scene.wire.wait_received(MAC1, 2) == bad[:2]
