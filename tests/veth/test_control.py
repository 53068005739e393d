# SPDX-License-Identifier: Apache-2.0
"""What a guest asks for by its control virtqueue, with a real daemon and NIC: steering follows, the link is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from support.control import ERR, FILTERS, MAC, OK, PROTOCOL, ControlGuest, tables
from support.daemon import Daemon
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.frontend import P_BACKEND_REQ, NetDevice
from support.netns import Namespace, World
from support.process import wait_for
from xdpvhost.vhost.wire import HEADER, BackendRequest, Request

MAC1, MAC2, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:0a:0a"
VM1, VM2 = f"name=vm1,mac={MAC1},mac-change=allow", f"name=vm2,mac={MAC2}"
SOURCE = "02:00:00:00:00:77"
COUNT = 23


class Scene:
    """A daemon with two guests on `nic0`; the other end of the veth, `net0`, is the network."""

    def __init__(self, world: World) -> None:
        self.nic: Namespace = world.namespace("nic")
        self.net: Namespace = world.namespace("net")
        for namespace in (self.nic, self.net):
            namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        world.veth(self.nic, "nic0", self.net, "net0", queues=2)
        self.daemon = Daemon(self.nic, iface="nic0", guests=[VM1, VM2], run_dir=world.directory / "run")

    def arrive(self, guest: NetDevice, mac: str) -> int:
        """How many of 23 frames to `mac` the guest receives, when the kernel or the guest has had them all."""
        before = self.daemon.metrics()
        with PacketSocket(self.net, "net0") as sender:
            sender.send(udp_frame(mac, SOURCE, number=number) for number in range(COUNT))

        def all_seen() -> bool:
            now = self.daemon.metrics()
            name = "xdpvhost_xdp_verdicts_total"
            passed = now.total(name, verdict="pass_unicast") - before.total(name, verdict="pass_unicast")
            names = ("xdpvhost_guest_rx_packets_total", "xdpvhost_guest_drops_total")
            taken = sum(now.total(n, guest=g) - before.total(n, guest=g) for n in names for g in ("vm1", "vm2"))
            return passed + taken >= COUNT

        wait_for(all_seen, 5, "23 frames to be counted")
        return len(guest.received())


@pytest.fixture
def scene(world: World) -> Iterator[Scene]:
    made = Scene(world)
    with made.daemon:
        yield made


def test_steering_follows_the_guests_address(scene: Scene) -> None:
    with ControlGuest(scene.daemon.socket("vm1"), features=FILTERS, protocol_features=PROTOCOL) as guest:
        guest.up_with_control()
        guest.post(64)
        assert scene.arrive(guest, MAC1) == COUNT
        assert scene.arrive(guest, OTHER) == 0, "it is the kernel's"
        assert guest.command(MAC, 1, mac_bytes(OTHER)) == OK
        assert scene.daemon.guest("vm1")["listens_to"] == sorted([MAC1, OTHER])
        assert scene.arrive(guest, OTHER) == COUNT
        assert scene.arrive(guest, MAC1) == 0, "steered to it still, and filtered"
        assert scene.daemon.metrics().total("xdpvhost_guest_drops_total", guest="vm1", reason="filtered") == COUNT
        assert guest.command(MAC, 1, mac_bytes(MAC1)) == OK
        assert scene.arrive(guest, OTHER) == 0
        assert guest.command(MAC, 0, tables([mac_bytes(OTHER)], [])) == OK
        assert scene.arrive(guest, OTHER) == COUNT
        assert scene.arrive(guest, MAC1) == COUNT
    wait_for(lambda: scene.daemon.guest("vm1")["listens_to"] == [MAC1], 5, "the address to be given back")


def test_it_may_send_from_what_it_was_granted(scene: Scene) -> None:
    def spoofed() -> int:
        return scene.daemon.metrics().total("xdpvhost_guest_drops_total", guest="vm1", reason="spoofed")

    with (
        ControlGuest(scene.daemon.socket("vm1"), features=FILTERS, protocol_features=PROTOCOL) as guest,
        PacketSocket(scene.net, "net0") as wire,
    ):
        guest.up_with_control()
        guest.send(udp_frame(SOURCE, OTHER))
        wait_for(lambda: spoofed() == 1, 5, "a frame to be dropped")
        assert guest.command(MAC, 1, mac_bytes(OTHER)) == OK
        for mac in (OTHER, MAC1):
            guest.send(udp_frame(SOURCE, mac))
            wire.wait_received(mac, 1)
        assert guest.command(MAC, 1, mac_bytes(MAC1)) == OK
        guest.send(udp_frame(SOURCE, OTHER))
        wait_for(lambda: spoofed() == 2, 5, "another frame to be dropped")


def test_not_the_nics_own_address(scene: Scene) -> None:
    with ControlGuest(scene.daemon.socket("vm1"), features=FILTERS, protocol_features=PROTOCOL) as guest:
        guest.up_with_control()
        for taken in (scene.nic.mac("nic0"), MAC2):
            assert guest.command(MAC, 1, mac_bytes(taken)) == ERR
        total = scene.daemon.metrics().total
        assert total("xdpvhost_guest_control_commands_total", guest="vm1", **{"class": "mac"}, result="refused") == 2


def test_a_guest_that_is_added_later_cannot_have_it(scene: Scene) -> None:
    with ControlGuest(scene.daemon.socket("vm1"), features=FILTERS, protocol_features=PROTOCOL) as guest:
        guest.up_with_control()
        assert guest.command(MAC, 1, mac_bytes(OTHER)) == OK
        with pytest.raises(AssertionError, match="guest 'vm1' listens to"):
            scene.daemon.api("guest-add", spec=f"name=vm3,mac={OTHER}")


def test_carrier_and_speed(scene: Scene) -> None:
    """The other end goes down: the front-end is told, and reads that the link is down."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with (
        ours,
        theirs,
        ControlGuest(scene.daemon.socket("vm1"), features=FILTERS, protocol_features=PROTOCOL | P_BACKEND_REQ) as guest,
    ):
        guest.up_with_control()
        guest.front.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        ours.settimeout(10)
        assert guest.config()[1] == 1
        assert guest.config()[4:6] == (10000, 1), "what a veth says of itself"
        scene.net.ip("link", "set", "net0", "down")
        request = HEADER.unpack(ours.recv(HEADER.size, socket.MSG_WAITALL))[0]
        assert request == BackendRequest.CONFIG_CHANGE_MSG
        assert guest.config()[1] == 0
        scene.net.ip("link", "set", "net0", "up")
        assert HEADER.unpack(ours.recv(HEADER.size, socket.MSG_WAITALL))[0] == BackendRequest.CONFIG_CHANGE_MSG
        assert guest.config()[1] == 1
