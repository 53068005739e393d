# SPDX-License-Identifier: Apache-2.0
"""Pools and policy with a real daemon, real frames and front-ends: VLANs, addresses, and changes while guests run."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import Dot1Q, Ether

from support.control import FILTERS, PROTOCOL, ControlGuest
from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, udp_frame
from support.frontend import P_BACKEND_REQ, NetDevice
from support.netns import Namespace, World
from support.process import wait_for
from support.tagsock import TagSocket
from support.wire import SO_MARK, Q, Wire, tagged
from xdpvhost.vhost.wire import HEADER, BackendRequest, Request

MAC1, MAC2, MAC3, SHARED = (f"52:54:00:00:00:0{i}" for i in (1, 2, 3, 9))
SOURCE = "02:00:00:00:00:77"
COUNT = 23
RED, BLUE = 10, 20
DROPS = "xdpvhost_guest_drops_total"


class Scene:
    """A daemon on `nic0`; the other end of the veth, `net0`, is the network. Tags are in the frames there."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.nic: Namespace = world.namespace("nic")
        self.net: Namespace = world.namespace("net")
        for namespace in (self.nic, self.net):
            namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        world.veth(self.nic, "nic0", self.net, "net0", queues=2)

    def up(self, *guests: str, options: tuple[str, ...] = ()) -> Daemon:
        return Daemon(self.nic, iface="nic0", guests=guests, run_dir=self.world.directory / "run", options=options)

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.nic.run(PROGRAM, *args, "--run-dir", self.world.directory / "run", check=False)

    def arrive(self, mac: str, vlan: int | None = None) -> list[bytes]:
        """23 frames from the network to `mac`; what they look like without their tag."""
        frames = [udp_frame(mac, SOURCE, number=number) for number in range(COUNT)]
        with PacketSocket(self.net, "net0") as sender:
            sender.send(frames if vlan is None else (tagged(frame, (Q, vlan)) for frame in frames))
        return frames


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


@pytest.fixture
def guests(scene: Scene) -> Iterator[Guests]:
    with Guests(scene) as made:
        yield made


class Guests:
    """Front-ends of the daemon's guests."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.open: list[NetDevice] = []

    def attach(self, daemon: Daemon, *names: str) -> list[NetDevice]:
        made = []
        for name in names:
            guest = NetDevice(daemon.socket(name))
            self.open.append(guest)
            guest.up()
            guest.post(64)
            made.append(guest)
        return made

    def __enter__(self) -> Guests:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self.open:
            guest.close()


def frames(guest: NetDevice, count: int = COUNT) -> list[bytes]:
    return [frame for _, frame in guest.receive(count)]


def send(guest: NetDevice, made: list[bytes]) -> None:
    """And the device is done with them."""
    for frame in made:
        guest.send(frame)
    done = [0]

    def finished() -> bool:
        done[0] += guest.sent()
        return done[0] == len(made)

    wait_for(finished, 10, "the frames to be taken")


def leaving(mac: str, *, to: str = SOURCE) -> list[bytes]:
    """23 frames of a guest's to the network."""
    return [udp_frame(to, mac, number=number) for number in range(COUNT)]


def nothing_but(daemon: Daemon, guest: str, **expected: int) -> None:
    """The guest's drops, by reason; all others are 0."""
    wait_for(
        lambda: {k: v for k, v in daemon.metrics().by("reason", DROPS, guest=guest).items() if v} == expected,
        5,
        f"the drops of {guest} to be {expected}, not {daemon.metrics().by('reason', DROPS, guest=guest)}",
    )


def test_an_access_port(scene: Scene, guests: Guests) -> None:
    with scene.up(f"name=vm1,mac={MAC1},vlan={RED}") as daemon, TagSocket(scene.net, "net0") as wire:
        (vm1,) = guests.attach(daemon, "vm1")
        sent = scene.arrive(MAC1, RED)
        assert frames(vm1) == sent, "without the tag"
        scene.arrive(MAC1, BLUE)
        scene.arrive(MAC1)
        daemon.wait_metric(2 * COUNT, "xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")
        assert vm1.received() == []
        out = leaving(MAC1)
        send(vm1, out)
        assert wire.wait_received(MAC1, COUNT) == [tagged(frame, (Q, RED)) for frame in out]
        send(vm1, [tagged(frame, (Q, RED)) for frame in out])
        nothing_but(daemon, "vm1", vlan=COUNT)


def test_a_trunk(scene: Scene, guests: Guests) -> None:
    with (
        scene.up(f"name=vm1,mac={MAC1},trunk={RED}+{BLUE}-{BLUE + 2}") as daemon,
        TagSocket(scene.net, "net0") as wire,
    ):
        (vm1,) = guests.attach(daemon, "vm1")
        for vlan in (RED, BLUE, BLUE + 2):
            assert [tagged(frame, (Q, vlan)) for frame in scene.arrive(MAC1, vlan)] == frames(vm1)
        for other in (BLUE + 3, None):
            scene.arrive(MAC1, other)
        daemon.wait_metric(2 * COUNT, "xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")
        out = [tagged(frame, (Q, BLUE)) for frame in leaving(MAC1)]
        send(vm1, out)
        assert wire.wait_received(MAC1, COUNT) == out
        send(vm1, leaving(MAC1))
        nothing_but(daemon, "vm1", vlan=COUNT)


def test_one_mac_in_two_vlans(scene: Scene, guests: Guests) -> None:
    red, blue = (f"name={name},mac={SHARED},vlan={vlan}" for name, vlan in (("red", RED), ("blue", BLUE)))
    with scene.up(red, blue) as daemon:
        first, second = guests.attach(daemon, "red", "blue")
        assert scene.arrive(SHARED, RED) == frames(first)
        assert scene.arrive(SHARED, BLUE) == frames(second)
        result = scene.cli("guest", "add", f"name=vm3,mac={MAC3},macs={SHARED}")
        assert result.returncode == 2
        assert (
            f"macs={SHARED} is taken by guest 'red', which is in VLAN {RED}, and this one in every VLAN"
            in result.stderr
        )
        daemon.cli("guest", "rm", "red")
        assert scene.arrive(SHARED, BLUE) == frames(second), "the NIC's filter has the address for it still"


def test_several_addresses_and_none_but_those(scene: Scene, guests: Guests) -> None:
    with scene.up(f"name=vm1,mac={MAC1},macs={MAC2}") as daemon, TagSocket(scene.net, "net0") as wire:
        (vm1,) = guests.attach(daemon, "vm1")
        assert scene.arrive(MAC2) == frames(vm1)
        send(vm1, leaving(MAC2))
        assert len(wire.wait_received(MAC2, COUNT)) == COUNT
        send(vm1, leaving(MAC3))
        nothing_but(daemon, "vm1", spoofed=COUNT)
        assert wire.received_from(MAC3) == []
        daemon.cli("guest", "set", "vm1", "spoof-check=off")
        send(vm1, leaving(MAC3))
        assert len(wire.wait_received(MAC3, COUNT)) == COUNT


def test_isolated_guests_reach_the_network_only(scene: Scene, guests: Guests) -> None:
    with (
        scene.up(f"name=vm1,mac={MAC1},isolated=on", f"name=vm2,mac={MAC2}") as daemon,
        TagSocket(scene.net, "net0") as wire,
    ):
        vm1, vm2 = guests.attach(daemon, "vm1", "vm2")
        send(vm1, leaving(MAC1, to=MAC2))
        nothing_but(daemon, "vm1", isolated=COUNT)
        send(vm1, leaving(MAC1))
        assert len(wire.wait_received(MAC1, COUNT)) == COUNT
        daemon.cli("guest", "set", "vm1", "isolated=")
        send(vm1, leaving(MAC1, to=MAC2))
        assert len(frames(vm2)) == COUNT


def test_kernel_made_frames_in_a_vlan(scene: Scene, guests: Guests) -> None:
    """UDP of the kernel's own, whose tag is beside the frame, as a bridge with VLANs and a VLAN device leave it."""
    net = scene.net
    net.ip("address", "add", "192.0.2.1/24", "dev", "net0")
    Wire(scene.world, net, "net0")
    with scene.up(f"name=red,mac={SHARED},vlan={RED}", f"name=blue,mac={SHARED},vlan={BLUE}") as daemon:
        red, blue = guests.attach(daemon, "red", "blue")
        net.ip("neigh", "add", "192.0.2.11", "lladdr", SHARED, "dev", "net0", "nud", "permanent")
        with net.entered():
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            sender.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", Q << 16 | RED))
            for number in range(COUNT):
                sender.sendto(b"%d" % number, ("192.0.2.11", 9))
        got = [Ether(frame) for frame in frames(red)]
        assert [bytes(frame[UDP].payload) for frame in got] == [b"%d" % number for number in range(COUNT)]
        assert not any(Dot1Q in frame for frame in got)
        assert blue.received() == []


def test_guest_set_while_it_runs(scene: Scene, guests: Guests) -> None:
    spec = f"name=vm1,mac={MAC1},vlan={RED}"
    with scene.up(spec, f"name=vm2,mac={MAC2}") as daemon:
        vm1, _ = guests.attach(daemon, "vm1", "vm2")
        assert scene.arrive(MAC1, RED) == frames(vm1)
        facts = json.loads(daemon.cli("guest", "set", "vm1", f"vlan={BLUE}", f"macs={MAC3}", "tx-rate=100M", "--json"))
        assert (facts["vlan"], facts["macs"], facts["limits"]["tx"]["bits"]) == (BLUE, [MAC1, MAC3], 100_000_000)
        assert scene.arrive(MAC1, BLUE) == frames(vm1)
        assert scene.arrive(MAC3, BLUE) == frames(vm1)
        scene.arrive(MAC1, RED)
        daemon.wait_metric(COUNT, "xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")
        assert vm1.received() == []
        guest = daemon.guest("vm1")
        assert (guest["connected"], guest["reconnects"], guest["protocol_errors"]) == (True, 0, {})
        assert f"VLAN {BLUE}" in daemon.cli("guest", "list")
        assert "100Mbit/s" in daemon.cli("status")

        again = ("up", "--iface", "nic0", "--metrics", daemon.metrics_address, "--guest", f"name=vm2,mac={MAC2}")
        same = scene.cli(*again, "--guest", f"name=vm1,mac={MAC1},tx-rate=100000k,macs={MAC3},vlan={BLUE}")
        assert (same.returncode, "already up" in same.stderr) == (0, True)
        assert scene.cli(*again, "--guest", spec).returncode == 6
        daemon.cli("guest", "set", "vm1", "vlan=,macs=,tx-rate=", f"vlan={RED}".replace("vlan", "trunk"))
        assert [tagged(frame, (Q, RED)) for frame in scene.arrive(MAC1, RED)] == frames(vm1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["vlan=4095"], "vlan=4095 is no VLAN"),
        (["trunk=1-4094"], "leave one of them out"),
        (["vlan=", f"macs={MAC2}"], "is taken by guest 'vm2'"),
        ([f"vlan={BLUE}", "tx-rate=1k"], "tx-rate=1k is below one frame of 1518 bytes a second"),
        (["rx-rate=1M,rx-burst=1517"], "rx-burst=1517 is below one frame of 1518 bytes"),
        (["learn=1", "spoof-check=off"], "learn=1 with spoof-check=off"),
        (["queues=2"], "queues= can't be changed while it is there"),
        (["vlan=", "trunk=1-4094", "macs=" + "+".join(f"52:54:00:00:01:0{i}" for i in range(5))], "18432 are taken"),
        (["vlan=", "macs={nic}"], "is the address of nic0 itself"),
    ],
)
def test_a_change_that_is_refused_changes_nothing(scene: Scene, guests: Guests, changes: list[str], words: str) -> None:
    with scene.up(f"name=vm1,mac={MAC1},vlan={RED}", f"name=vm2,mac={MAC2}") as daemon:
        vm1, vm2 = guests.attach(daemon, "vm1", "vm2")
        before = daemon.api("guest-list")
        result = scene.cli("guest", "set", "vm1", *(text.format(nic=scene.nic.mac("nic0")) for text in changes))
        assert result.returncode in (2, 3)
        assert "guest 'vm1'" in result.stderr
        assert words in result.stderr
        assert daemon.api("guest-list") == before
        assert scene.arrive(MAC1, RED) == frames(vm1)
        assert scene.arrive(MAC2) == frames(vm2)


def test_a_link_that_is_switched_off(scene: Scene) -> None:
    """The front-end is told, the guest reads that the link is down, and nothing passes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with (
        scene.up(f"name=vm1,mac={MAC1}") as daemon,
        ours,
        theirs,
        ControlGuest(daemon.socket("vm1"), features=FILTERS, protocol_features=PROTOCOL | P_BACKEND_REQ) as guest,
        TagSocket(scene.net, "net0") as wire,
    ):
        guest.up_with_control()
        guest.post(64)
        guest.front.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        ours.settimeout(10)

        def told() -> bool:
            request: int = HEADER.unpack(ours.recv(HEADER.size, socket.MSG_WAITALL))[0]
            return request == BackendRequest.CONFIG_CHANGE_MSG

        assert guest.config()[1] == 1
        daemon.cli("guest", "set", "vm1", "link=off")
        assert told()
        assert guest.config()[1] == 0
        send(guest, leaving(MAC1))
        scene.arrive(MAC1)
        nothing_but(daemon, "vm1", link_down=2 * COUNT)
        assert wire.received_from(MAC1) == []
        assert not daemon.guest("vm1")["link"]
        daemon.cli("guest", "set", "vm1", "link=on")
        assert told()
        assert guest.config()[1] == 1
        assert scene.arrive(MAC1) == frames(guest)


def test_a_table_that_is_full(scene: Scene) -> None:
    """Four trunks of every VLAN fit, a fifth doesn't, and says so."""
    every = [f"name=vm{i},mac=52:54:00:00:00:0{i},trunk=1-4094" for i in range(1, 6)]
    with scene.up(*every[:4]) as daemon:
        result = scene.cli("guest", "add", every[4])
        assert result.returncode == 2
        assert "take 4094 entries of the XDP program's table, and 16376 of 18432 are taken" in result.stderr
        assert len(daemon.api("guest-list")) == 4
