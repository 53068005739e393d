# SPDX-License-Identifier: Apache-2.0
"""Mode `tap`, and what all modes of links have in common: a real bridge, real taps, and a host that is as it was."""

from __future__ import annotations

import json
import os

import pytest

from support.daemon import PROGRAM
from support.frames import PacketSocket, udp_frame
from support.linkhost import LinkHost, OpenTap, operstate
from support.netns import World
from support.process import wait_for

MAC1, MAC2 = (f"52:54:00:00:00:0{i}" for i in (1, 2))
VM1, VM2 = (f"name=vm{i},mac=52:54:00:00:00:0{i}" for i in (1, 2))
COUNT = 23
BRIDGE = "xvbr-nic0"


@pytest.fixture
def host(world: World) -> LinkHost:
    return LinkHost(world)


def both_ways(host: LinkHost, tap: OpenTap, mac: str) -> None:
    """23 frames from the network to the guest, and 23 back."""
    net_mac = host.net.mac("net0")
    with PacketSocket(host.net, "net0") as wire:
        wait_for(lambda: operstate(host.nic, "nic0") == "UP", 10, "the NIC")
        sent = [udp_frame(mac, net_mac, number=n, size=60 + n) for n in range(COUNT)]
        wire.send(sent)
        assert tap.wait_received(net_mac, COUNT, to=mac) == sent
        back = [udp_frame(net_mac, mac, number=n, size=60 + 7 * n) for n in range(COUNT)]
        for frame in back:
            tap.send(frame)
        assert wire.wait_received(mac, COUNT) == back


def test_frames_pass_and_the_host_is_as_it_was(host: LinkHost) -> None:
    before = host.state()
    with host.up("tap", [VM1, f"{VM2},tap=mine"]) as daemon:
        (bridge,) = host.nic.json("ip", "-j", "link", "show", "dev", BRIDGE)
        assert bridge["address"] == host.nic.mac("nic0")
        assert host.link("nic0")["master"] == host.link("tap-vm1")["master"] == host.link("mine")["master"] == BRIDGE
        with OpenTap(host.nic, "tap-vm1") as one, OpenTap(host.nic, "mine") as two:
            both_ways(host, one, MAC1)
            both_ways(host, two, MAC2)
            one.send(udp_frame(MAC2, MAC1, number=5))
            assert two.wait_received(MAC1, 1) == [udp_frame(MAC2, MAC1, number=5)]
            guest = daemon.guest("vm1")
            assert guest["connected"]
            assert guest["opened_by"] == [f"{_comm()} (pid {os.getpid()})"]
            assert (guest["rx"]["packets"] >= COUNT, guest["tx"]["packets"]) == (True, COUNT + 1)
            metrics = daemon.metrics()
            assert metrics.total("xdpvhost_link_packets_total", guest="vm1", direction="tx") == COUNT + 1
            text = daemon.cli("status")
            for word in ("mode", "tap-vm1", "xvbr-nic0", "asked", "in use"):
                assert word in text
            assert "guests' devices" in daemon.cli("stats")
        daemon.down()
        assert "stopped: nic0 is as it was" in daemon.process.log()
    host.wait_as(before)
    assert not host.run_dir.exists()


def _comm() -> str:
    with open("/proc/self/comm", encoding="utf-8") as comm:
        return comm.read().strip()


def test_several_queues_and_an_owner(host: LinkHost) -> None:
    with host.up("tap", [f"{VM1},queues=3,owner=nobody,group=4711"]) as daemon:
        taps = [OpenTap(host.nic, "tap-vm1", multi_queue=True) for _ in range(3)]
        try:
            guest = daemon.guest("vm1")
            assert (guest["queues_asked"], guest["queues_in_use"], guest["vnet_header"]) == (3, 3, True)
            assert (guest["owner_asked"], guest["owner_in_use"]) == ("nobody", 65534)
            assert (guest["group_asked"], guest["group_in_use"]) == ("4711", 4711)
        finally:
            for tap in taps:
                tap.close()
        args = daemon.cli("qemu-args", "vm1")
        assert "ifname=tap-vm1" in args
        assert "queues=3" in args


OPEN = """
import fcntl, os, struct, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x5102))
"""


@pytest.mark.parametrize("options", [(), ("--serve", "vhost-user")], ids=["qemu", "vhost-user"])
def test_a_tap_of_nobody_is_not_everybodys(host: LinkHost, options: tuple[str, ...]) -> None:
    """The kernel lets anybody open a tap that has neither an owner nor a group."""
    with host.up("tap", [f"{VM1},queues=2"], options):
        links = [link["ifname"] for link in host.nic.json("ip", "-j", "link") if link["ifname"][:3] in ("tap", "xvt")]
        assert len(links) == 1
        done = host.nic.run(
            "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", OPEN, links[0],
            check=False,
        )  # fmt: skip
        assert "Operation not permitted" in done.stderr, done.stderr


def test_an_existing_bridge_is_used_and_left(host: LinkHost) -> None:
    host.nic.ip("link", "add", "br7", "address", "52:54:00:00:07:07", "type", "bridge", "forward_delay", "0")
    host.nic.ip("link", "set", "br7", "up")
    before = host.state()
    with host.up("tap", [VM1], ["--bridge", "br7"]) as daemon:
        assert host.link("nic0")["master"] == "br7"
        assert not host.has(BRIDGE)
        with OpenTap(host.nic, "tap-vm1") as tap:
            both_ways(host, tap, MAC1)
        status = daemon.api("status")["nics"][0]["facts"]
        assert (status["bridge_asked"], status["bridge_in_use"]) == ("br7", "br7")
        daemon.down()
    assert "nic0 is as it was" in daemon.process.log()
    host.wait_as(before)


def test_a_nic_that_is_in_the_bridge_already_stays_there(host: LinkHost) -> None:
    host.nic.ip("link", "add", "br7", "type", "bridge", "forward_delay", "0")
    host.nic.ip("link", "set", "br7", "up")
    host.nic.ip("link", "set", "nic0", "master", "br7")
    wait_for(lambda: operstate(host.nic, "br7") == "UP", 10, "the bridge")
    before = host.state()
    assert "is in bridge br7 already; `--bridge br7` uses that one" in host.refused("--mode", "tap", status=3)
    with host.up("tap", [VM1], ["--bridge", "br7"]) as daemon, OpenTap(host.nic, "tap-vm1") as tap:
        both_ways(host, tap, MAC1)
        daemon.down()
    host.wait_as(before, without=["fdb"])  # a bridge learns, and forgets when it likes
    with host.up("tap", [VM1], ["--force"]) as daemon:
        assert host.link("nic0")["master"] == BRIDGE
        daemon.down()
    wait_for(lambda: operstate(host.nic, "br7") == "UP", 10, "the bridge")
    host.wait_as(before, without=["fdb"])  # a bridge learns, and forgets when it likes


def addressed(world: World) -> LinkHost:
    host = LinkHost(world, ipv6=True)
    for args in (
        "addr add 192.0.2.2/24 dev nic0",
        "addr add 192.0.2.3/24 dev nic0 label nic0:x",
        "addr add 2001:db8::2/64 dev nic0 nodad",
        "route add default via 192.0.2.1 dev nic0 metric 50 mtu 1400",
        "route add 198.51.100.0/24 dev nic0 src 192.0.2.3",
        "-6 route add 2001:db8:1::/48 via 2001:db8::1 dev nic0",
        "route add 203.0.113.0/24 via 192.0.2.1 dev nic0 table 77",
    ):
        host.nic.ip(*args.split())
    host.net.ip("addr", "add", "192.0.2.1/24", "dev", "net0")
    wait_for(lambda: not _tentative(host, "nic0"), 10, "duplicate address detection")
    return host


def _tentative(host: LinkHost, device: str) -> bool:
    (link,) = host.nic.json("ip", "-j", "addr", "show", "dev", device)
    return any(address.get("tentative") for address in link["addr_info"])


def test_a_nic_with_addresses_is_refused_and_moves_by_force(world: World) -> None:
    host = addressed(world)
    before = host.state()
    words = host.refused("--mode", "tap", "--guest", VM1, status=3)
    assert "interface nic0: has 192.0.2.2/24, 192.0.2.3/24, 2001:db8::2/64 and carries the default route" in words
    assert "`--force` moves" in words
    host.wait_as(before)
    with host.up("tap", [VM1], ["--force"]) as daemon:
        (default,) = host.nic.json("ip", "-j", "route", "show", "default")
        assert (default["dev"], default["gateway"], default["metrics"]) == (BRIDGE, "192.0.2.1", [{"mtu": 1400}])
        host.nic.run("ping", "-c1", "-W5", "192.0.2.1")
        with OpenTap(host.nic, "tap-vm1") as tap:
            both_ways(host, tap, MAC1)
        daemon.down()
    host.wait_as(before)


def test_routes_that_need_others_move_too(world: World) -> None:
    """A gateway outside of every prefix, a prefix route that NetworkManager made in the kernel's name, and a route that
    sends from an IPv6 address, which may not be a tentative one.
    """
    host = addressed(world)
    host.nic.ip("addr", "add", "10.9.0.5/32", "dev", "nic0")
    host.nic.ip("route", "add", "10.9.0.1", "dev", "nic0", "scope", "link")
    host.nic.ip("route", "add", "default", "via", "10.9.0.1", "metric", "60")
    host.nic.ip("addr", "add", "10.8.0.5/24", "dev", "nic0", "noprefixroute")
    host.nic.ip("route", "add", "10.8.0.0/24", "dev", "nic0", "proto", "kernel", "scope", "link", "src", "10.8.0.5")
    host.nic.ip("route", "add", "10.7.0.0/24", "via", "10.8.0.1")
    host.nic.ip("addr", "add", "2001:db8::3/64", "dev", "nic0")
    wait_for(lambda: not _tentative(host, "nic0"), 10, "duplicate address detection")
    host.nic.ip("-6", "route", "add", "2001:db8:2::/48", "via", "2001:db8::1", "src", "2001:db8::3", "dev", "nic0")
    before = host.state()
    with host.up("tap", [VM1], ["--force"]) as daemon:
        there = {route["dst"] for route in host.nic.json("ip", "-j", "route", "show", "dev", BRIDGE)}
        assert {"default", "10.9.0.1", "10.8.0.0/24", "10.7.0.0/24"} <= there
        there = {route["dst"] for route in host.nic.json("ip", "-6", "-j", "route", "show", "dev", BRIDGE)}
        assert "2001:db8:2::/48" in there
        daemon.down()
    host.wait_as(before)


@pytest.mark.parametrize("killed", [False, True], ids=["in order", "after kill -9"])
def test_a_lease_that_went_stays_gone(world: World, killed: bool) -> None:
    host = addressed(world)
    before = host.state()
    lease = "192.0.2.77/24"
    host.nic.ip("addr", "add", lease, "dev", "nic0", "valid_lft", "1000", "preferred_lft", "1000")
    with host.up("tap", [VM1], ["--force"]) as daemon:
        host.nic.ip("addr", "del", lease, "dev", BRIDGE)
        if killed:
            daemon.kill()
            with host.up("tap", [VM1], ["--force"]) as second:
                assert "192.0.2.77" not in host.nic.run("ip", "addr").stdout
                second.down()
        else:
            daemon.down()
    host.wait_as(before)


def test_an_address_that_another_interfaces_route_needs(world: World) -> None:
    host = addressed(world)
    host.nic.ip("link", "set", "lo", "up")
    host.nic.ip("route", "add", "203.0.113.0/24", "dev", "lo", "src", "192.0.2.2")
    before = host.state()
    words = host.refused("--mode", "tap", "--force", "--guest", VM1, status=3)
    assert "the route to 203.0.113.0 through another interface sends from 192.0.2.2" in words
    host.wait_as(before)


def test_after_kill_9_clean_gives_everything_back(world: World) -> None:
    host = addressed(world)
    before = host.state()
    with host.up("tap", [VM1], ["--force"]) as daemon:
        daemon.kill()
    assert host.has("tap-vm1")
    result = host.cli("clean", "--run-dir", host.run_dir)
    assert result.returncode == 0, result.stderr
    for words in ("tap tap-vm1: deleted", "bridge xvbr-nic0: deleted", "nic0: has 192.0.2.2"):
        assert words in result.stdout
    host.wait_as(before)
    assert not host.run_dir.exists()


def test_after_kill_9_the_next_up_takes_over(world: World) -> None:
    """The virtual machine that has the tap open notices nothing; a guest that is gone from the wishes is undone."""
    host = addressed(world)
    before = host.state()
    with host.up("tap", [VM1, VM2], ["--force"]) as daemon, OpenTap(host.nic, "tap-vm1") as tap:
        both_ways(host, tap, MAC1)
        indexes = {name: host.link(name)["ifindex"] for name in ("tap-vm1", BRIDGE)}
        daemon.kill()
        tap.frames.clear()
        with host.up("tap", [VM1]) as second:
            assert {name: host.link(name)["ifindex"] for name in indexes} == indexes
            assert not host.has("tap-vm2")
            assert "undone, left by a killed daemon: tap tap-vm2: deleted" in second.process.log()
            both_ways(host, tap, MAC1)
            second.down()
    host.wait_as(before)


def test_after_kill_9_other_wishes_start_anew(host: LinkHost) -> None:
    before = host.state()
    with host.up("tap", [VM1]) as daemon:
        daemon.kill()
    with host.up("tap", [VM1], ["--bridge", "other"]) as daemon:
        assert host.link("tap-vm1")["master"] == "other"
        assert not host.has(BRIDGE)
        daemon.kill()
    with host.up("tap", [VM1], ["--bridge", "other"]) as daemon:
        assert host.link("nic0")["master"] == "other"
        daemon.down()
    host.wait_as(before)


def test_up_twice_changes_nothing(host: LinkHost) -> None:
    with host.up("tap", [VM1]) as daemon:
        wait_for(lambda: operstate(host.nic, BRIDGE) == "UP", 10, "the bridge")
        before = host.state()
        arguments = ["--mode", "tap", "--run-dir", str(host.run_dir), "--iface", "nic0"]
        again = host.cli("up", *arguments, "--guest", VM1)
        assert again.returncode == 0, again.stderr
        assert "already up: nic0" in again.stderr
        other = host.cli("up", *arguments, "--guest", VM2)
        assert other.returncode == 6
        assert "what it was asked for differs: guests name=vm1" in other.stderr
        host.wait_as(before)
        daemon.down()


@pytest.mark.parametrize("taken", ["tap-vm2", BRIDGE])
def test_a_name_that_is_taken_leaves_nothing_half_made(host: LinkHost, taken: str) -> None:
    host.nic.ip("link", "add", taken, "type", "veth", "peer", "name", "its-peer")
    before = host.state()
    words = host.refused("--mode", "tap", "--guest", VM1, "--guest", VM2, status=3)
    assert f"there is an interface {taken} already, which isn't ours" in words
    host.wait_as(before)
    assert not host.run_dir.exists()


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--bridge", "lo"], 3, "--bridge lo: that interface is no bridge"),
        (["--guest", f"{VM1},owner=no-such-user"], 2, "this machine has no user 'no-such-user'"),
        (["--guest", f"{VM1},socket-mode=server,address=192.0.2.11"], 2, "address= is for --routed"),
        (["--guest", f"{VM1},tap=a/b"], 2, "tap=a/b is no name for an interface"),
        (["--routed", "--guest", VM1], 2, "--routed needs its address"),
        (["--routed", "--bridge", "b"], 2, "exclude each other"),
        (["--workers", "2"], 2, "--workers: means nothing in mode tap"),
        (["--guest", VM1, "--guest", f"{VM2},tap=tap-vm1"], 2, "is the device of guest 'vm1'"),
    ],
)
def test_what_is_refused_changes_nothing(host: LinkHost, args: list[str], status: int, words: str) -> None:
    before = host.state()
    assert words in host.refused("--mode", "tap", *args, status=status)
    host.wait_as(before)


def test_guests_come_and_go(host: LinkHost) -> None:
    with host.up("tap") as daemon:
        assert daemon.cli("guest", "add", VM1) == "guest vm1: 52:54:00:00:00:01 on tap-vm1\n"
        with OpenTap(host.nic, "tap-vm1") as tap:
            both_ways(host, tap, MAC1)
        assert "tap-vm1" in daemon.cli("guest", "list")
        refused = host.cli("guest", "add", f"{VM2},tap=lo", "--run-dir", daemon.run_dir)
        assert (refused.returncode, "there is an interface lo already" in refused.stderr) == (3, True)
        daemon.cli("guest", "rm", "vm1")
        assert not host.has("tap-vm1")
        assert daemon.api("guest-list") == []
        daemon.down()


def test_a_new_mtu_reaches_the_taps(host: LinkHost) -> None:
    with host.up("tap", [VM1]) as daemon:
        host.net.ip("link", "set", "net0", "mtu", "1400")
        host.nic.ip("link", "set", "nic0", "mtu", "1400")
        wait_for(lambda: host.link("tap-vm1")["mtu"] == 1400, 10, "the tap's MTU")
        assert host.link(BRIDGE)["mtu"] == 1400
        daemon.down()


def test_the_data_plane_is_not_loaded(host: LinkHost) -> None:
    with host.up("tap", [VM1]) as daemon:
        with open(f"/proc/{daemon.pid}/maps", encoding="utf-8") as maps:
            loaded = maps.read()
        for library in ("libxdpvhost", "libxdp.so", "libbpf.so"):
            assert library not in loaded
        daemon.down()


def test_net_admin_is_enough(host: LinkHost) -> None:
    """The others, that AF_XDP takes, are not asked for."""
    drop = ["setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all"]
    command = [*drop, str(PROGRAM), "up", "--iface", "nic0", "--mode", "tap", "--metrics", "none"]
    before = host.state()
    process = host.nic.start(*command, "--run-dir", str(host.run_dir), "--guest", VM1, own_sysfs=True)
    try:
        process.wait_line(r"\bready: ", 20)
        assert host.has("tap-vm1")
    finally:
        process.close(grace=10)
    host.wait_as(before)


def test_routed(world: World) -> None:
    """The guest is on the NIC's network by its own address, and no bridge is made; the NIC keeps its addresses."""
    host = addressed(world)
    before = host.state()
    with host.up("tap", [f"{VM1},address=192.0.2.11"], ["--routed"]) as daemon:
        assert not host.has(BRIDGE)
        (route,) = host.nic.json("ip", "-j", "route", "show", "192.0.2.11")
        assert route["dev"] == "tap-vm1"
        with OpenTap(host.nic, "tap-vm1") as tap, PacketSocket(host.net, "net0") as wire:
            # the network asks who 192.0.2.11 is, and the NIC answers; the frames arrive at the guest
            host.net.run("ping", "-c1", "-W1", "192.0.2.11", check=False)
            nic_mac, tap_mac = host.nic.mac("nic0"), host.nic.mac("tap-vm1")
            (neighbour,) = host.net.json("ip", "-j", "neigh", "show", "192.0.2.11")
            assert neighbour["lladdr"] == nic_mac
            host.nic.ip("neigh", "replace", "192.0.2.11", "lladdr", MAC1, "dev", "tap-vm1")
            sent = [udp_frame(nic_mac, host.net.mac("net0"), number=n) for n in range(COUNT)]
            wire.send(sent)
            got = [frame for frame in tap.wait_received(tap_mac, COUNT) if frame[12:14] == b"\x08\x00"]
            wait_for(
                lambda: len([f for f in tap.collect() if _is_udp(f)]) >= COUNT, 10, "23 frames routed to the guest"
            )
            assert {frame[42:46] for frame in tap.frames if _is_udp(frame)} == {f[42:46] for f in sent}
            assert all(frame[:6] == bytes.fromhex(MAC1.replace(":", "")) for frame in got)
            # and back, to the address that the tap answers for
            for number in range(COUNT):
                tap.send(udp_frame(tap_mac, MAC1, number=number, ip_source="192.0.2.11", ip_destination="192.0.2.1"))
            wait_for(lambda: len([f for f in wire.collect() if _from_guest(f)]) >= COUNT, 10, "23 frames back")
        daemon.down()
    host.wait_as(before)


@pytest.mark.parametrize("address", ["192.0.2.11", "2001:db8::11"])
def test_routed_leaves_an_answer_that_was_there(world: World, address: str) -> None:
    host = addressed(world)
    host.nic.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1", "net.ipv6.conf.nic0.proxy_ndp=1")
    host.nic.ip("neigh", "add", "proxy", address, "dev", "nic0")
    with host.up("tap", [f"{VM1},address={address}"], ["--routed"]) as daemon:
        daemon.cli("guest", "rm", "vm1")
        assert address in host.nic.run("ip", "neigh", "show", "proxy").stdout
        daemon.down()
    assert address in host.nic.run("ip", "neigh", "show", "proxy").stdout


def test_routed_ipv6(world: World) -> None:
    """Only on a host that routes IPv6 already, and there the NIC answers for the guest."""
    host = addressed(world)
    host.net.ip("addr", "add", "2001:db8::1/64", "dev", "net0", "nodad")
    arguments = ["--mode", "tap", "--routed", "--guest", f"{VM1},address=2001:db8::11"]
    before = host.state()
    assert "this host routes no IPv6; `sysctl net.ipv6.conf.all.forwarding=1`" in host.refused(*arguments, status=3)
    host.wait_as(before)
    host.nic.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
    before = host.state()
    with host.up("tap", [f"{VM1},address=2001:db8::11+192.0.2.11"], ["--routed"]) as daemon:
        assert daemon.guest("vm1")["addresses"] == ["2001:db8::11", "192.0.2.11"]
        with OpenTap(host.nic, "tap-vm1") as tap:

            def asked() -> bool:
                host.net.run("ping", "-c1", "-W1", "2001:db8::11", check=False)
                target = bytes.fromhex("20010db8000000000000000000000011")
                return any(frame[54] == 135 and frame[62:78] == target for frame in tap.collect() if len(frame) >= 78)

            wait_for(asked, 15, "the host to look for the guest on its tap")
            (neighbour,) = host.net.json("ip", "-j", "neigh", "show", "2001:db8::11")
            assert neighbour["lladdr"] == host.nic.mac("nic0")
        daemon.down()
    host.wait_as(before)


def test_a_route_that_is_taken(world: World) -> None:
    host = addressed(world)
    before = host.state()
    host.nic.ip("route", "add", "192.0.2.11/32", "dev", "lo")
    words = host.refused("--mode", "tap", "--routed", "--guest", f"{VM1},address=192.0.2.11", status=3)
    assert "this host has a route to 192.0.2.11 already" in words
    host.nic.ip("route", "del", "192.0.2.11/32")
    host.wait_as(before)


def _is_udp(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[30:34] == bytes([192, 0, 2, 11])


def _from_guest(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[26:30] == bytes([192, 0, 2, 11])


def test_the_nic_vanishes(host: LinkHost) -> None:
    """What was made beside it is undone all the same."""
    with host.up("tap", [VM1]) as daemon:
        host.nic.ip("link", "del", "nic0")
        daemon.process.send(15)
        daemon.process.wait(15)
    assert [link["ifname"] for link in host.nic.json("ip", "-j", "link")] == ["lo"]
    assert json.loads(host.cli("clean", "--run-dir", host.run_dir, "--json").stdout) == []
