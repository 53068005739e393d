# SPDX-License-Identifier: Apache-2.0
"""What `xdpvhost qemu-args` prints in the modes of links starts virtual machines that reach the network."""

import json
import xml.etree.ElementTree as ET
from contextlib import ExitStack

import pytest

from support.daemon import PROGRAM
from support.lab import NET_IP, NET_IP6, PREFIX, guest_ip, guest_mac, spec
from support.libvirt import Libvirt, LibvirtGuest
from support.linkhost import LinkHost
from support.netns import World
from support.process import run
from support.qemu import Qemu, QemuLinux, Release, qemu_args
from support.qemu import release as qemu_release
from support.traffic import ping, ping_from, stream_in, stream_out


def addressed(world: World, *, ipv6: bool = False) -> LinkHost:
    host = LinkHost(world, ipv6=ipv6)
    host.net.ip("addr", "add", f"{NET_IP}/{PREFIX}", "dev", "net0")
    if ipv6:
        host.net.ip("addr", "add", f"{NET_IP6}/64", "dev", "net0", "nodad")
    return host


@pytest.fixture
def host(world: World) -> LinkHost:
    return addressed(world)


def linux(stack: ExitStack, host: LinkHost, arguments: str, number: int, release: Release) -> QemuLinux:
    guest = QemuLinux(
        arguments,
        f"vm{number}",
        directory=host.world.directory,
        release=release,
        cpus=2,
        namespace=host.nic,
    )
    stack.callback(guest.close)
    return guest


@pytest.mark.parametrize("mode", ["tap", "macvtap"])
def test_linux(host: LinkHost, release: Release, mode: str) -> None:
    """With one queue pair in the older QEMU and two in the newer, to save time."""
    queues = 2 if release.version >= (10, 0) else 1
    before = host.state()
    with host.up(mode, [spec(1, queues=queues)]) as daemon, ExitStack() as stack:
        guest = linux(stack, host, qemu_args(daemon, "vm1", release, "--memory", "384M"), 1, release)
        guest.begin()
        guest.ready().configure(f"{guest_ip(1)}/{PREFIX}")
        ping(guest, NET_IP)
        ping_from(host.net, guest_ip(1))
        stream_in(host.net, guest, guest_ip(1), 5001)
        stream_out(host.net, guest, NET_IP, 5002)
        facts = daemon.guest("vm1")
        assert facts["connected"]
        assert [f"(pid {guest.process.pid})" in who for who in facts["opened_by"]] == [True]
        assert daemon.metrics().total("xdpvhost_link_packets_total", guest="vm1", direction="tx") > 0
        # a daemon that is killed takes nothing from the guest
        daemon.kill()
        ping(guest, NET_IP)
        with host.up(mode, [spec(1, queues=queues)]) as second:
            ping(guest, NET_IP)
            second.down()
    host.wait_as(before, without=["fdb"])


def test_emulated(world: World) -> None:
    """The e1000e's own ROM is the guest: it gets an address by DHCP, and answers pings."""
    release = qemu_release("installed")
    host = addressed(world, ipv6=True)
    dnsmasq = ["--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=net0", "--bind-interfaces"]
    dnsmasq += ["--dhcp-range=192.0.2.100,192.0.2.150,5m", "--dhcp-authoritative", "--no-ping", "--user=root"]
    dnsmasq += [f"--dhcp-leasefile={host.world.directory}/leases", "--pid-file=", "--dhcp-boot=boot.ipxe"]
    dnsmasq += ["--enable-tftp", f"--tftp-root={host.world.directory}"]
    dnsmasq += ["--enable-ra", "--dhcp-range=2001:db8::,ra-only"]  # iPXE waits 13 s for a router otherwise
    (host.world.directory / "boot.ipxe").write_text("#!ipxe\nsleep 600\n")
    with host.up("emulated", [spec(1)]) as daemon, host.net.start("dnsmasq", *dnsmasq) as server:
        server.wait_line("DHCP, IP range", 10)
        machine = Qemu(
            qemu_args(daemon, "vm1", release),
            "vm1",
            directory=host.world.directory,
            release=release,
            extra=["-boot", "n"],
            namespace=host.nic,
        )
        with machine:
            lease = server.wait_line(rf"DHCPACK\(net0\) (192\.0\.2\.1\d\d) {guest_mac(1)}", 60)
            server.wait_line(rf"sent \S+/boot\.ipxe to {lease[1]}", 60)
            ping_from(host.net, lease[1])
        daemon.down()


def attributes(element: ET.Element) -> set[tuple[str, str, str]]:
    return {(item.tag, key, value) for item in element.iter() for key, value in item.attrib.items()}


@pytest.mark.parametrize("mode", ["tap", "macvtap"])
def test_libvirt(host: LinkHost, mode: str) -> None:
    """libvirt as an unprivileged user, who owns the device."""
    with host.up(mode, [spec(1, queues=2, extra=",owner=nobody")]) as daemon, ExitStack() as stack:
        libvirt = stack.enter_context(Libvirt(host.world.directory, host.nic))
        printed = json.loads(daemon.cli("libvirt-xml", "vm1", "--json"))
        guest = LibvirtGuest(libvirt, "vm1", ["", printed["interface"]], release=qemu_release("installed"))
        stack.callback(guest.close)
        guest.begin()
        defined = guest.defined_interface()
        assert attributes(ET.fromstring(printed["interface"])) <= attributes(defined), ET.tostring(defined)
        guest.ready().configure(f"{guest_ip(1)}/{PREFIX}")
        ping(guest, NET_IP)
        assert daemon.guest("vm1")["connected"]
        guest.end()
        daemon.down()


def test_libvirt_takes_the_others(world: World) -> None:
    """Those that can't be started here: there is no vhost-net, and no e1000e driver in the guest."""
    libvirt = Libvirt(world.directory)
    with libvirt:
        for number, mode in ((1, "vhost-net"), (2, "emulated")):
            argv = ["libvirt-xml", spec(number), "--mode", mode, "--json"]
            printed = json.loads(run([PROGRAM, *argv]).stdout)
            guest = LibvirtGuest(libvirt, f"vm{number}", ["", printed["interface"]], release=qemu_release("installed"))
            libvirt.virsh("define", guest.file)
            defined = guest.defined_interface()
            assert attributes(ET.fromstring(printed["interface"])) <= attributes(defined), ET.tostring(defined)
            libvirt.virsh("undefine", f"vm{number}")
