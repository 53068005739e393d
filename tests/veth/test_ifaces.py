# SPDX-License-Identifier: Apache-2.0
"""One daemon with two interfaces: guests are spread, networks stay apart, and both are given back."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, mac_bytes, udp_frame
from support.frontend import NetDevice
from support.netns import QUEUES, Namespace, World
from support.process import wait_for

NICS = ("nic0", "nic1")
MACS = {f"vm{i}": f"52:54:00:00:00:0{i}" for i in range(1, 6)}
COUNT = 23


def spec(name: str, iface: str | None = None) -> str:
    return f"name={name},mac={MACS[name]}" + (f",iface={iface}" if iface else "")


@dataclass
class Host:
    """`nic0` and `nic1` in one namespace, their other ends `net0` and `net1` in one each."""

    nic: Namespace
    nets: dict[str, Namespace]
    directory: Path

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def up(self, *guests: str, options: tuple[str, ...] = ()) -> Daemon:
        more = ["--iface", "nic1", *options]
        return Daemon(self.nic, iface="nic0", guests=guests, run_dir=self.run_dir, options=more)

    def cli(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        return self.nic.run(PROGRAM, *args, check=False)

    def refused(self, *args: str) -> str:
        result = self.cli("up", *args, "--run-dir", self.run_dir, "--metrics", "none")
        assert result.returncode in (2, 3, 6), result.stderr
        assert not self.run_dir.exists()
        return result.stderr

    def state(self) -> list[Any]:
        found: list[Any] = []
        for nic in NICS:
            (link,) = self.nic.json("ip", "-j", "-d", "link", "show", "dev", nic)
            found.append({key: value for key, value in link.items() if key not in ("stats", "stats64")})
            found.append(self.nic.run("ethtool", "-k", nic).stdout)
            found.append(self.nic.json("ip", "-j", "maddr", "show", "dev", nic))
        return found

    def wire(self, nic: str) -> PacketSocket:
        return PacketSocket(self.nets[nic], nic.replace("nic", "net"))

    def mac(self, nic: str) -> str:
        return self.nets[nic].mac(nic.replace("nic", "net"))


@pytest.fixture
def host(world: World) -> Host:
    nic = world.namespace("nic")
    nets = {"nic0": world.namespace("a"), "nic1": world.namespace("b")}
    for namespace in (nic, *nets.values()):
        namespace.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
    for name, net in nets.items():
        world.veth(nic, name, net, name.replace("nic", "net"))
    return Host(nic, nets, world.directory)


def attach(stack: ExitStack, daemon: Daemon, name: str) -> NetDevice:
    device = stack.enter_context(NetDevice(daemon.socket(name)))
    device.up()
    device.post(128)
    return device


def both_ways(host: Host, nic: str, name: str, device: NetDevice) -> None:
    """23 frames each way between a guest and the network of its interface."""
    with host.wire(nic) as wire:
        sent = [udp_frame(MACS[name], host.mac(nic), number=n) for n in range(COUNT)]
        wire.send(sent)
        assert [frame for _, frame in device.receive(COUNT)] == sent
        back = [udp_frame(host.mac(nic), MACS[name], number=n) for n in range(COUNT)]
        for frame in back:
            device.send(frame)
        assert wire.wait_received(MACS[name], COUNT) == back


def test_guests_are_spread_and_both_interfaces_are_given_back(host: Host) -> None:
    before = host.state()
    guests = [spec("vm1"), spec("vm2"), spec("vm3", "nic0")]
    with host.up(*guests, options=("--workers", "2")) as daemon, ExitStack() as stack:
        log = daemon.process.log()
        assert f"nic0 with {QUEUES} queues, nic1 with {QUEUES} queues, 3 guests, 2 workers" in log
        where = {guest["name"]: guest["iface"] for guest in daemon.api("guest-list")}
        assert where == {"vm1": "nic1", "vm2": "nic0", "vm3": "nic0"}  # vm3 counts before it is there
        assert "guest 'vm1': on interface nic1, which has the fewest guests" in log
        assert "guest 'vm3': on interface nic0, as its SPEC says" in log
        status = json.loads(daemon.cli("status", "--json"))
        assert [(nic["iface"], nic["state"]) for nic in status["nics"]] == [("nic0", "there"), ("nic1", "there")]
        assert len({guest["slot"] for guest in status["guests"]}) == 3
        text = daemon.cli("status")
        assert "nic1 (fewest guests)" in text
        assert "interface nic0" in text
        assert "interface nic1" in text
        added = json.loads(daemon.cli("guest", "add", spec("vm4"), "--json"))
        assert (added["iface"], added["iface_asked"]) == ("nic1", None)
        added = json.loads(daemon.cli("guest", "add", spec("vm5", "nic1"), "--json"))
        assert (added["iface"], added["iface_asked"]) == ("nic1", "nic1")
        for name, nic in (("vm1", "nic1"), ("vm2", "nic0"), ("vm5", "nic1")):
            both_ways(host, nic, name, attach(stack, daemon, name))
        metrics = daemon.metrics()
        for nic, frames in (("nic0", COUNT), ("nic1", 2 * COUNT)):
            assert metrics.total("xdpvhost_xsk_transmit_packets_total", iface=nic) == frames
            assert metrics.total("xdpvhost_xdp_verdicts_total", iface=nic, verdict="redirect") == frames
        daemon.down()
        assert "stopped: nic0, nic1 are as they were" in daemon.process.log()
    assert host.state() == before
    assert not host.run_dir.exists()


def test_networks_of_two_interfaces_stay_apart(host: Host) -> None:
    """A guest on one is a stranger to the other: unicast leaves by the NIC, and groups don't cross."""
    with host.up(spec("vm1", "nic0"), spec("vm2", "nic1"), spec("vm3", "nic0")) as daemon, ExitStack() as stack:
        vm1, vm2, vm3 = (attach(stack, daemon, name) for name in ("vm1", "vm2", "vm3"))
        with host.wire("nic0") as here, host.wire("nic1") as there:
            stranger = udp_frame(MACS["vm2"], MACS["vm1"])
            group = udp_frame("ff:ff:ff:ff:ff:ff", MACS["vm1"])
            vm1.send(stranger)
            vm1.send(group)
            assert here.wait_received(MACS["vm1"], 2) == [stranger, group]
            assert [frame for _, frame in vm3.receive(1)] == [group]
            from_wire = udp_frame("ff:ff:ff:ff:ff:ff", host.mac("nic1"))
            there.send([from_wire, udp_frame(MACS["vm1"], host.mac("nic1")), udp_frame(MACS["vm2"], host.mac("nic1"))])
            assert len(vm2.receive(2)) == 2
            # what came to nic1 for a guest of nic0 is nobody's there: the host's
            daemon.wait_metric(1, "xdpvhost_xdp_verdicts_total", iface="nic1", guest="", verdict="pass_unicast")
            assert there.received_from(MACS["vm1"]) == []
            assert vm1.received() == []
            assert [frame for _, frame in vm3.received() if frame[6:12] == mac_bytes(host.mac("nic1"))] == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--iface", "nic0", "--iface", "nope0"), "interface 'nope0' does not exist"),
        (("--iface", "nic0", "--iface", "lo", "--xdp-mode", "native"), "interface lo"),
        (("--iface", "nic0", "--iface", "nic0"), "--iface nic0: is given twice"),
        (("--iface", "nic0", "--iface", "other-name"), "--iface other-name: is another name of nic0"),
        (("--iface", "nic0", "--iface", "nic1", "--mode", "macvtap"), "--iface nic1: mode macvtap serves one"),
        (("--iface", "nic0", "--iface", "nic1", "--mode", "tap", "--serve", "vhost-user"), "mode tap serves one"),
        (("--iface", "nic0", "--guest", spec("vm1", "nic1")), "guest 'vm1': iface=nic1 is not served here, but nic0"),
    ],
)
def test_refusals_change_neither(host: Host, args: tuple[str, ...], words: str) -> None:
    host.nic.ip("link", "property", "add", "dev", "nic0", "altname", "other-name")
    before = host.state()
    assert words in host.refused(*args)
    assert host.state() == before


def test_one_that_is_occupied_keeps_the_other_from_being_touched(host: Host) -> None:
    host.nic.ip("link", "set", "nic0", "down")
    with Daemon(host.nic, iface="nic1", run_dir=host.directory / "other", metrics="none") as other:
        before = host.state()
        monitor = host.nic.start("ip", "monitor", "link")
        said = host.refused("--iface", "nic0", "--iface", "nic1", "--guest", spec("vm1"))
        assert f"another xdpvhost (pid {other.pid}) has interface nic1" in said
        host.nic.ip("link", "set", "lo", "down")
        wait_for(lambda: "lo:" in monitor.log(), 5, "the monitor to tell of the last change")
        assert "nic0" not in monitor.log()
        assert host.state() == before
        other.kill()
    monitor.close()
    # now it is its program that is in the way; nic0 is not even set up for that
    before = host.state()
    said = host.refused("--iface", "nic0", "--iface", "nic1", "--guest", spec("vm1"))
    assert "interface nic1: another xdpvhost is on it" in said
    assert host.state() == before
    assert host.cli("clean", "--run-dir", host.directory / "other").returncode == 0


def test_up_twice(host: Host) -> None:
    guests = ("--guest", spec("vm1"), "--guest", spec("vm2"), "--metrics", "127.0.0.1:9477")
    with host.up(spec("vm1"), spec("vm2")) as daemon:
        for order in (NICS, NICS[::-1]):
            both = [arg for nic in order for arg in ("--iface", nic)]
            again = host.cli("up", *both, *guests, "--run-dir", daemon.run_dir)
            assert again.returncode == 0
            assert "already up" in again.stderr
        other = host.cli("up", "--iface", "nic0", *guests, "--run-dir", daemon.run_dir)
        assert other.returncode == 6
        assert "ifaces nic0 nic1 instead of nic0" in other.stderr


@pytest.mark.parametrize("after", ["up", "up with one", "clean"])
def test_killed(host: Host, after: str) -> None:
    host.nic.ip("link", "set", "nic1", "down")
    before = host.state()
    with host.up(spec("vm1"), spec("vm2")) as daemon:
        daemon.kill()
    assert host.state() != before
    if after == "clean":
        result = host.cli("clean", "--run-dir", host.run_dir, "--json")
        assert result.returncode == 0, result.stderr
        assert [fact["what"] for fact in json.loads(result.stdout)].count("xdp") == 2
    elif after == "up":
        monitor = host.nic.start("ip", "monitor", "link", "dev", "nic1")
        with host.up(spec("vm1"), spec("vm2")) as daemon, ExitStack() as stack:
            assert "state DOWN" not in monitor.log()  # it stayed up: taken over
            assert "left by a killed daemon" in daemon.process.log()
            both_ways(host, "nic1", "vm2", attach(stack, daemon, "vm2"))
            daemon.down()
        monitor.close()
    else:  # the other one is given back at once
        with Daemon(host.nic, iface="nic0", guests=[spec("vm1")], run_dir=host.run_dir) as daemon:
            assert "nic1: set down" in daemon.process.log()
            daemon.down()
    assert host.state() == before


def test_one_that_goes_away_costs_its_own_guests_only(host: Host) -> None:
    with host.up(spec("vm1", "nic0"), spec("vm2", "nic1"), spec("vm3", "nic1")) as daemon, ExitStack() as stack:
        vm1, vm2, vm3 = (attach(stack, daemon, name) for name in ("vm1", "vm2", "vm3"))
        host.nic.ip("link", "del", "nic1")
        daemon.process.wait_line("interface nic1: it is gone", 5)
        both_ways(host, "nic0", "vm1", vm1)
        vm2.send(udp_frame(MACS["vm3"], MACS["vm2"]))  # they still have each other
        assert [frame for _, frame in vm3.receive(1)] == [udp_frame(MACS["vm3"], MACS["vm2"])]
        status = json.loads(daemon.cli("status", "--json"))
        assert [nic["state"] for nic in status["nics"]] == ["there", "gone"]
        assert "gone" in daemon.cli("status")
        daemon.metrics()
        assert daemon.process.log().count("nic1: it is gone") == 1
        added = json.loads(daemon.cli("guest", "add", spec("vm4"), "--json"))
        assert added["iface"] == "nic0"  # fewer guests, but no way out
        refused = host.cli("guest", "add", spec("vm5", "nic1"), "--run-dir", daemon.run_dir)
        assert refused.returncode == 3
        assert "nic1" in refused.stderr
        daemon.cli("guest", "rm", "vm3")
        both_ways(host, "nic0", "vm1", vm1)
        daemon.down()
    (link,) = host.nic.json("ip", "-j", "link", "show", "dev", "nic0")
    assert "xdp" not in link
    assert not host.run_dir.exists()
