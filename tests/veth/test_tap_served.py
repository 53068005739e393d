# SPDX-License-Identifier: Apache-2.0
"""`up --mode tap --serve vhost-user`: the data plane's guests over its own tap, in a bridge with the NIC."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack

import pytest

from support.daemon import Daemon
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.frontend import F_MRG_RXBUF, F_PROTOCOL, F_VERSION_1, NetDevice
from support.linkhost import LinkHost, operstate
from support.netns import World
from support.process import wait_for
from support.tagsock import TagSocket
from support.wire import Q, tagged

MAC1, MAC2 = (f"52:54:00:00:00:0{i}" for i in (1, 2))
VM1, VM2 = (f"name=vm{i},mac=52:54:00:00:00:0{i}" for i in (1, 2))
COUNT = 23
BRIDGE, TAP = "xvbr-nic0", "xvt-nic0"
SERVE = ("--serve", "vhost-user")


@pytest.fixture
def host(world: World) -> LinkHost:
    made = LinkHost(world)
    wait_for(lambda: operstate(made.nic, "nic0") == "UP", 10, "the NIC's carrier, which is part of its state")
    return made


def guest(stack: ExitStack, daemon: Daemon, name: str) -> NetDevice:
    device = stack.enter_context(NetDevice(daemon.socket(name), features=F_PROTOCOL | F_VERSION_1 | F_MRG_RXBUF))
    device.up()
    device.post(128)
    return device


def received_from(device: NetDevice, mac: str, count: int) -> list[bytes]:
    """What else a stack in the bridge says to groups is left out."""
    found: list[bytes] = []
    while len(found) < count:
        found += [frame for _, frame in device.receive(1) if frame[6:12] == mac_bytes(mac)]
    return found


def both_ways(host: LinkHost, device: NetDevice, mac: str) -> None:
    """23 frames from the network to the guest, and 23 back."""
    net_mac = host.net.mac("net0")
    with PacketSocket(host.net, "net0") as wire:
        wait_for(lambda: operstate(host.nic, "nic0") == "UP", 10, "the NIC")
        sent = [udp_frame(mac, net_mac, number=n, size=60 + n) for n in range(COUNT)]
        wire.send(sent)
        assert received_from(device, net_mac, COUNT) == sent
        back = [udp_frame(net_mac, mac, number=n, size=60 + 7 * n) for n in range(COUNT)]
        for frame in back:
            device.send(frame)
        assert wire.wait_received(mac, COUNT) == back


@pytest.mark.parametrize("workers", [1, 2])
def test_frames_pass_and_the_host_is_as_it_was(host: LinkHost, workers: int) -> None:
    before = host.state()
    options = [*SERVE, "--workers", str(workers)]
    with host.up("tap", [VM1, VM2], options) as daemon, ExitStack() as stack:
        assert host.link("nic0")["master"] == host.link(TAP)["master"] == BRIDGE
        one, two = guest(stack, daemon, "vm1"), guest(stack, daemon, "vm2")
        both_ways(host, one, MAC1)
        both_ways(host, two, MAC2)
        one.send(udp_frame(MAC2, MAC1, number=5))
        assert received_from(two, MAC1, 1) == [udp_frame(MAC2, MAC1, number=5)]
        metrics = daemon.metrics()
        assert metrics.total("xdpvhost_tap_transmit_packets_total", iface="nic0") == 2 * COUNT
        assert metrics.total("xdpvhost_tap_receive_packets_total", iface="nic0") >= 2 * COUNT
        assert metrics.total("xdpvhost_tap_gone") == 0
        drops = metrics.by("reason", "xdpvhost_guest_drops_total")
        del drops["not_connected"]  # what the host's stack sent to a group before the guests came
        assert not any(drops.values()), drops
        status = json.loads(daemon.cli("status", "--json"))
        (nic,) = status["nics"]
        assert status["mode"] == "tap"
        assert (nic["iface"], nic["queues"], nic["mtu"]) == ("nic0", workers, 1500)
        facts = nic["facts"]
        assert (facts["tap"], facts["queues_asked"], facts["queues_in_use"]) == (TAP, workers, workers)
        assert (facts["bridge_asked"], facts["bridge_in_use"]) == ("one of our own", BRIDGE)
        assert {"csum", "tso4", "tso6"} <= set(facts["offloads_in_use"]) <= set(facts["offloads_asked"])
        text = daemon.cli("status")
        for word in (TAP, BRIDGE, "asked", "in use", "offloads", MAC2):
            assert word in text
        assert "vhost-user" in daemon.cli("qemu-args", "vm1")
        assert 'type="vhostuser"' in daemon.cli("libvirt-xml", "vm1")
        daemon.down()
        assert "stopped: nic0 is as it was" in daemon.process.log()
    host.wait_as(before)
    assert not host.run_dir.exists()


def test_pools_and_policy_hold_here_too(host: LinkHost) -> None:
    with (
        host.up("tap", [f"{VM1},vlan=10", f"{VM2},vlan=10,isolated=on"], SERVE) as daemon,
        ExitStack() as stack,
        TagSocket(host.net, "net0") as wire,
    ):
        one, two = guest(stack, daemon, "vm1"), guest(stack, daemon, "vm2")
        wait_for(lambda: operstate(host.nic, "nic0") == "UP", 10, "the NIC")
        net_mac = host.net.mac("net0")
        frames = [udp_frame(MAC1, net_mac, number=n) for n in range(COUNT)]
        wire.send(tagged(frame, (Q, 10)) for frame in frames)
        assert received_from(one, net_mac, COUNT) == frames
        one.send(udp_frame(net_mac, MAC1))
        assert wire.wait_received(MAC1, 1) == [tagged(udp_frame(net_mac, MAC1), (Q, 10))]
        two.send(udp_frame(MAC1, MAC2))
        two.send(udp_frame(MAC1, "52:54:00:00:00:03"))
        drops = "xdpvhost_guest_drops_total"
        daemon.wait_metric(1, drops, guest="vm2", reason="isolated")
        daemon.wait_metric(1, drops, guest="vm2", reason="spoofed")
        daemon.cli("guest", "set", "vm2", "isolated=off")
        two.send(udp_frame(MAC1, MAC2))
        assert received_from(one, MAC2, 1) == [udp_frame(MAC1, MAC2)]


def test_guests_come_and_go(host: LinkHost) -> None:
    with host.up("tap", [VM1], SERVE) as daemon, ExitStack() as stack:
        one = guest(stack, daemon, "vm1")
        daemon.cli("guest", "add", VM2)
        both_ways(host, guest(stack, daemon, "vm2"), MAC2)
        daemon.cli("guest", "rm", "vm2")
        both_ways(host, one, MAC1)
        refused = host.cli("guest", "add", "name=vm3,mac=52:54:00:00:00:03,tap=mine", "--run-dir", host.run_dir)
        assert refused.returncode == 2
        assert "tap= is for a tap that QEMU opens" in refused.stderr
        assert [g["name"] for g in daemon.api("guest-list")] == ["vm1"]


def test_tap_deleted_is_told_and_survived(host: LinkHost) -> None:
    before = host.state()
    with host.up("tap", [VM1, VM2], SERVE) as daemon, ExitStack() as stack:
        one, two = guest(stack, daemon, "vm1"), guest(stack, daemon, "vm2")
        host.nic.ip("link", "del", TAP)
        daemon.process.wait_line(f"tap {TAP} was deleted", 5)
        one.send(udp_frame(MAC2, MAC1))
        assert received_from(two, MAC1, 1) == [udp_frame(MAC2, MAC1)]
        one.send(udp_frame(host.net.mac("net0"), MAC1))
        daemon.wait_metric(1, "xdpvhost_guest_drops_total", guest="vm1", direction="tx", reason="link_down")
        assert json.loads(daemon.cli("status", "--json"))["nics"][0]["facts"]["tap_state"] == "deleted by somebody else"
        daemon.down()
    host.wait_as(before)


@pytest.mark.parametrize("after", ["up", "clean"])
def test_killed(host: LinkHost, after: str) -> None:
    before = host.state()
    with host.up("tap", [VM1], SERVE) as daemon:
        index = host.link(BRIDGE)["ifindex"]
        daemon.process.send(signal.SIGKILL)
        daemon.process.wait(10)
    wait_for(lambda: not host.has(TAP), 5, "the tap to go with its owner")
    if after == "up":
        with host.up("tap", [VM1], SERVE) as daemon, ExitStack() as stack:
            assert host.link(BRIDGE)["ifindex"] == index  # taken over
            both_ways(host, guest(stack, daemon, "vm1"), MAC1)
            daemon.down()
    else:
        assert host.cli("clean", "--run-dir", host.run_dir).returncode == 0
    host.wait_as(before)


def test_refusals_leave_nothing(host: LinkHost) -> None:
    host.nic.ip("link", "add", "other0", "type", "veth", "peer", TAP)
    before = host.state()
    mode = ("--mode", "tap", *SERVE)
    assert f"there is an interface {TAP} already" in host.refused(*mode, "--guest", VM1, status=3)
    host.wait_as(before)
    assert "use --serve qemu" in host.refused(*mode, "--guest", f"{VM1},owner=root", status=2)
    assert "use --serve qemu" in host.refused(*mode, "--routed", status=2)
    assert "--bind" in host.refused(*mode, "--bind", "copy", status=2)
    host.nic.ip("link", "del", "other0")
    before = host.state()
    own = host.nic.mac("nic0")
    assert "address of nic0 itself" in host.refused(*mode, "--guest", f"name=vm1,mac={own}", status=3)
    host.wait_as(before)


def test_addresses_move_with_force_only(host: LinkHost) -> None:
    host.nic.ip("address", "add", "192.0.2.1/24", "dev", "nic0")
    host.nic.ip("link", "set", "nic0", "up")
    before = host.state()
    assert "--force" in host.refused("--mode", "tap", *SERVE, status=3)
    with host.up("tap", [VM1], [*SERVE, "--force"]) as daemon:
        (bridge,) = host.nic.json("ip", "-j", "address", "show", "dev", BRIDGE)
        assert "192.0.2.1" in [address["local"] for address in bridge["addr_info"]]
        daemon.down()
    host.wait_as(before)


def test_new_mtu(host: LinkHost) -> None:
    with host.up("tap", [VM1], SERVE) as daemon:
        host.nic.ip("link", "set", "nic0", "mtu", "2000")
        wait_for(lambda: host.link(TAP)["mtu"] == 2000, 5, "the tap's MTU to follow")
        wait_for(lambda: daemon.api("status")["nics"][0]["mtu"] == 2000, 5, "the daemon to know")
