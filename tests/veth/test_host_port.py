# SPDX-License-Identifier: Apache-2.0
"""`up --host-port`: the host among the guests of its NIC, with its own stack on a tap."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, internet_checksum, mac_bytes, udp_frame
from support.frontend import NetDevice
from support.netns import Namespace, World
from support.process import wait_for

TAP = "xvh-nic0"
MACS = {f"vm{i}": f"52:54:00:00:00:0{i}" for i in (1, 2)}
HOST_IP, WIRE_IP, GUEST_IP = "192.0.2.1", "192.0.2.2", "192.0.2.11"
VM1, VM2 = (f"name={name},mac={mac}" for name, mac in MACS.items())
BYTES = 3 << 20


@dataclass
class Host:
    nic: Namespace
    net: Namespace
    directory: Path

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def up(self, *guests: str, options: tuple[str, ...] = ("--host-port",)) -> Daemon:
        daemon = Daemon(self.nic, iface="nic0", guests=guests, run_dir=self.run_dir, options=options)
        if self.has(TAP):
            self.nic.ip("addr", "add", f"{HOST_IP}/24", "dev", TAP)
            self.nic.ip("link", "set", TAP, "up")
        return daemon

    def has(self, name: str) -> bool:
        return self.nic.run("ip", "link", "show", "dev", name, check=False).returncode == 0

    def link(self, name: str) -> dict[str, Any]:
        (link,) = self.nic.json("ip", "-j", "link", "show", "dev", name)
        return dict(link)

    def state(self) -> list[Any]:
        found: list[Any] = []
        for link in self.nic.json("ip", "-j", "-d", "link"):
            found.append({key: value for key, value in link.items() if key not in ("stats", "stats64")})
        return [*found, self.nic.run("ethtool", "-k", "nic0").stdout, self.nic.json("ip", "-j", "maddr")]

    def ping(self, where: Namespace, address: str, *more: str) -> None:
        where.run("ping", "-n", "-c", "5", "-i", "0.02", "-W", "5", *more, address)

    def cli(self, *args: str | Path) -> Any:
        return self.nic.run(PROGRAM, *args, check=False)


@pytest.fixture
def host(world: World) -> Host:
    nic, net = world.namespace("nic"), world.namespace("net")
    for namespace in (nic, net):
        namespace.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
    # else nic0 answers for the host port's IP address, with its own
    nic.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore")
    world.veth(nic, "nic0", net, "net0")
    net.ip("addr", "add", f"{WIRE_IP}/24", "dev", "net0")
    return Host(nic, net, world.directory)


def attach(stack: ExitStack, daemon: Daemon, name: str) -> NetDevice:
    device = stack.enter_context(NetDevice(daemon.socket(name)))
    device.up()
    device.post(128)
    return device


def answer(mac: bytes, ip: bytes, frame: bytes) -> bytes | None:
    """What a station says to an ARP request for its address, or to an echo request."""
    if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == ip:
        return frame[6:12] + mac + frame[12:20] + b"\0\2" + mac + ip + frame[22:32]
    if frame[12:14] == b"\x08\0" and frame[23] == 1 and frame[34] == 8 and frame[30:34] == ip:
        header = frame[14:26] + ip + frame[26:30]
        end = 14 + int.from_bytes(frame[16:18])
        echo = b"\0\0\0\0" + frame[38:end]
        echo = echo[:2] + struct.pack("!H", internet_checksum(echo)) + echo[4:]
        return frame[6:12] + mac + b"\x08\0" + header + echo
    return None


@contextmanager
def station(device: NetDevice, mac: str) -> Iterator[None]:
    """A guest that answers for GUEST_IP, until the block ends."""
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            device.rx().interrupts(0.02)
            for _, frame in device.received():
                reply = answer(mac_bytes(mac), socket.inet_aton(GUEST_IP), frame)
                if reply:
                    device.send(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def stream(sender: Namespace, receiver: Namespace, address: str) -> None:
    """TCP, whose frames stand for many where they may."""
    data = bytes(range(256)) * (BYTES // 256)
    got = hashlib.sha256()
    with receiver.entered():
        listener = socket.create_server((address, 0))
    with sender.entered():
        out = socket.create_connection(listener.getsockname(), timeout=10)
    connection, _ = listener.accept()
    connection.settimeout(20)

    def send() -> None:
        with out:
            out.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    with listener, connection:
        while chunk := connection.recv(1 << 16):
            got.update(chunk)
    thread.join()
    assert got.digest() == hashlib.sha256(data).digest()


MODES = pytest.mark.parametrize("xdp", ["native", "generic", "none"])


@MODES
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_host_reaches_guests_and_the_wire(host: Host, xdp: str, workers: str) -> None:
    if xdp == "generic":  # it is handed a local sender's frames before they are cut, and can't take them
        host.net.run("ethtool", "-K", "net0", "tso", "off", "gso", "off")
    before = host.state()
    options = ("--host-port", "--xdp-mode", xdp, "--workers", workers)
    with host.up(VM1, VM2, options=options) as daemon, ExitStack() as stack:
        vm1, vm2 = attach(stack, daemon, "vm1"), attach(stack, daemon, "vm2")
        with station(vm1, MACS["vm1"]):
            host.ping(host.nic, GUEST_IP)
            host.ping(host.nic, GUEST_IP, "-s", "1400")
            host.ping(host.net, GUEST_IP)
        host.ping(host.nic, WIRE_IP)
        host.ping(host.net, HOST_IP)
        stream(host.nic, host.net, WIRE_IP)
        stream(host.net, host.nic, HOST_IP)
        # groups go everywhere: what vm1 asks all is heard by vm2, the wire and the host
        group = udp_frame("ff:ff:ff:ff:ff:ff", MACS["vm1"], number=5)
        vm2.received()
        with PacketSocket(host.nic, TAP) as tap, PacketSocket(host.net, "net0") as wire:
            vm1.send(group)
            assert [frame for _, frame in vm2.receive(1)] == [group]
            assert wire.wait_received(MACS["vm1"], 1) == [group]
            assert tap.wait_received(MACS["vm1"], 1) == [group]
            # unicast between guests is no business of the host's
            vm1.send(udp_frame(MACS["vm2"], MACS["vm1"], number=6))
            vm2.receive(1)
            assert len(tap.received_from(MACS["vm1"])) == 1
        daemon.down()
        assert "stopped: nic0 is as it was" in daemon.process.log()
    assert host.state() == before
    assert not host.run_dir.exists()


def test_what_is_told_of_it(host: Host) -> None:
    with host.up(VM1) as daemon, ExitStack() as stack:
        with station(attach(stack, daemon, "vm1"), MACS["vm1"]):
            host.ping(host.nic, GUEST_IP)
        host.ping(host.net, HOST_IP)
        status = json.loads(daemon.cli("status", "--json"))
        port = status["nics"][0]["host_port"]
        link = host.link(TAP)
        assert (port["tap"], port["mac"], port["mtu"]) == (TAP, link["address"], link["mtu"])
        assert port["state"] == "there"
        nic_mac = mac_bytes(host.nic.mac("nic0"))
        assert mac_bytes(port["mac"])[1:] == nic_mac[1:]
        assert mac_bytes(port["mac"])[0] & 3 == 2
        assert port["slot"] not in [guest["slot"] for guest in status["guests"]]
        assert status["guests"][0]["slot"] == 0
        text = daemon.cli("status")
        assert "host port mac" in text
        assert port["mac"] in text
        assert TAP in daemon.cli("stats")
        metrics = daemon.metrics()
        to, of = (f"xdpvhost_tap_{way}_packets_total" for way in ("transmit", "receive"))
        assert metrics.total(to, iface=TAP) == port["to_host"]["packets"] >= 10
        assert metrics.total(of, iface=TAP) == port["from_host"]["packets"] >= 10
        assert metrics.total("xdpvhost_xdp_verdicts_total", guest="host port", verdict="redirect") >= 5
        assert metrics.total("xdpvhost_xsk_receive_packets_total", guest="host port") >= 5
        assert metrics.total("xdpvhost_tap_transmit_drops_total", iface=TAP) == 0


def test_a_tap_that_is_down_costs_the_senders_only(host: Host) -> None:
    with host.up(VM1) as daemon, ExitStack() as stack:
        vm1 = attach(stack, daemon, "vm1")
        mac = host.link(TAP)["address"]
        host.nic.ip("link", "set", TAP, "down")
        vm1.send(udp_frame(mac, MACS["vm1"]))
        daemon.wait_metric(1, "xdpvhost_guest_drops_total", guest="vm1", direction="tx", reason="link_down")
        with PacketSocket(host.net, "net0") as wire:
            wire.send([udp_frame(mac, host.net.mac("net0"))])
            daemon.wait_metric(1, "xdpvhost_tap_transmit_drops_total", iface=TAP)
            vm1.send(udp_frame(host.net.mac("net0"), MACS["vm1"]))
            wire.wait_received(MACS["vm1"], 1)


def test_deleted_by_somebody_else(host: Host) -> None:
    with host.up(VM1, VM2) as daemon, ExitStack() as stack:
        vm1, vm2 = attach(stack, daemon, "vm1"), attach(stack, daemon, "vm2")
        host.nic.ip("link", "del", TAP)
        daemon.process.wait_line(f"its host port {TAP} was deleted", 5)
        vm1.send(udp_frame(MACS["vm2"], MACS["vm1"]))
        assert len(vm2.receive(1)) == 1
        assert json.loads(daemon.cli("status", "--json"))["nics"][0]["host_port"]["state"] == "deleted by somebody else"
        daemon.down()
        assert "stopped: nic0 is as it was" in daemon.process.log()


def test_its_mtu_follows_the_nics(host: Host) -> None:
    host.net.ip("link", "set", "net0", "mtu", "3000")
    host.nic.ip("link", "set", "nic0", "mtu", "3000")
    with host.up(VM1) as daemon:
        assert host.link(TAP)["mtu"] == 3000
        host.nic.ip("link", "set", "nic0", "mtu", "1400")
        wait_for(lambda: host.link(TAP)["mtu"] == 1400, 5, "the tap's MTU to follow")
        assert json.loads(daemon.cli("status", "--json"))["nics"][0]["host_port"]["mtu"] == 1400
        assert host.link(TAP)["address"] == json.loads(daemon.cli("status", "--json"))["nics"][0]["host_port"]["mac"]


@pytest.mark.parametrize("after", ["up", "clean"])
def test_kill_9_leaves_nothing(host: Host, after: str) -> None:
    before = host.state()
    with host.up(VM1) as daemon:
        mac = host.link(TAP)["address"]
        daemon.kill()
    wait_for(lambda: not host.has(TAP), 5, "the tap to go with its owner")
    if after == "up":
        with host.up(VM1) as daemon:
            assert host.link(TAP)["address"] == mac
            assert "its host port xvh-nic0 went with its daemon" in daemon.process.log()
            host.ping(host.nic, WIRE_IP)
            daemon.down()
    else:
        result = host.cli("clean", "--run-dir", host.run_dir, "--json")
        assert result.returncode == 0, result.stderr
        assert "host_port" in [fact["what"] for fact in json.loads(result.stdout)]
    assert host.state() == before


def test_refusals(host: Host) -> None:
    before = host.state()
    up = ("up", "--iface", "nic0", "--run-dir", host.run_dir, "--metrics", "none")
    for options, status, words in (
        (("--host-port", "a b"), 2, "is no name for an interface"),
        (("--host-port", "lo"), 3, "there is an interface lo already"),
        (("--host-port", "x0", "--iface", "lo"), 2, "each of 2 interfaces has its own"),
        (("--host-port", "--mode", "macvtap"), 2, "--host-port: means nothing in mode macvtap, only in xdp"),
    ):
        result = host.cli(*up, *options)
        assert (result.returncode, words in result.stderr) == (status, True), result.stderr
        assert host.state() == before
    with host.up(VM1, options=("--host-port", "mine")) as daemon:
        mac = host.link("mine")["address"]
        result = host.cli("guest", "add", f"name=vm2,mac={mac}", "--run-dir", host.run_dir)
        assert result.returncode == 2
        assert f"{mac} is the address of host port mine" in result.stderr
        assert len(daemon.api("guest-list")) == 1
    result = host.cli(*up, "--host-port", "--guest", f"name=vm1,mac={mac}")
    assert "is the address of host port xvh-nic0" in result.stderr
    assert host.state() == before


def test_two_interfaces_have_one_each(host: Host, world: World) -> None:
    other = world.namespace("other")
    world.veth(host.nic, "nic1", other, "net1")
    other.ip("addr", "add", "198.51.100.2/24", "dev", "net1")
    before = host.state()
    with host.up(VM1, options=("--host-port", "--iface", "nic1")) as daemon:
        host.nic.ip("addr", "add", "198.51.100.1/24", "dev", "xvh-nic1")
        host.nic.ip("link", "set", "xvh-nic1", "up")
        host.ping(host.net, HOST_IP)
        host.ping(other, "198.51.100.1")
        host.ping(host.nic, "198.51.100.2")
        ports = [nic["host_port"] for nic in json.loads(daemon.cli("status", "--json"))["nics"]]
        assert [port["tap"] for port in ports] == ["xvh-nic0", "xvh-nic1"]
        assert len({port["slot"] for port in ports} | {port["mac"] for port in ports}) == 4
        daemon.down()
    assert host.state() == before


def test_beside_a_tap_in_a_bridge(host: Host) -> None:
    options = ("--host-port", "--mode", "tap", "--serve", "vhost-user")
    with host.up(VM1, options=options) as daemon, ExitStack() as stack:
        with station(attach(stack, daemon, "vm1"), MACS["vm1"]):
            host.ping(host.nic, GUEST_IP)
            host.ping(host.net, GUEST_IP)
        host.ping(host.nic, WIRE_IP)
        host.ping(host.net, HOST_IP)
        stream(host.net, host.nic, HOST_IP)
        daemon.down()
    assert not host.has(TAP)
