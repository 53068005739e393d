# SPDX-License-Identifier: Apache-2.0
"""What `xdpvhost libvirt-xml` prints makes domains that `virsh define` and `start` accept, and that carry traffic."""

import json
import os
import xml.etree.ElementTree as ET
from contextlib import ExitStack

from support.lab import NET_IP, PREFIX, Lab, guest_ip, guest_mac, spec
from support.libvirt import GROUP, USER, Libvirt, LibvirtGuest
from support.qemu import release
from support.traffic import exchange, ping, wait_in_guest

SECOND_NET, SECOND_GUEST = "198.51.100.1", "198.51.100.13"


def attributes(element: ET.Element) -> set[tuple[str, str, str]]:
    return {(item.tag, key, value) for item in element.iter() for key, value in item.attrib.items()}


def test_domains(quiet_lab: Lab) -> None:
    """QEMU connects, with options for its device; QEMU listens; a third is attached. The daemon is killed under all."""
    lab = quiet_lab
    lab.net.ip("addr", "add", f"{SECOND_NET}/{PREFIX}", "dev", "eth0")
    run_dir = lab.host.directory / "run"
    run_dir.mkdir()
    os.chown(run_dir, 0, GROUP)
    run_dir.chmod(0o2755)  # the remedy in docs/troubleshooting.md: new sockets have that group
    with Libvirt(lab.directory) as libvirt, ExitStack() as stack:
        specs = [spec(1), spec(2, extra=f",socket={libvirt.runtime}/vm2.sock,socket-mode=client"), spec(3)]
        daemon = lab.up(specs)
        assert (daemon.socket("vm1").stat().st_gid, daemon.socket("vm1").stat().st_mode & 0o777) == (GROUP, 0o660)
        guests: dict[int, LibvirtGuest] = {}
        for number, options in ((1, ["--queue-size", "1024"]), (2, [])):
            name = f"vm{number}"
            printed = json.loads(daemon.cli("libvirt-xml", name, "--json", *options))
            elements = [printed["memoryBacking"], printed["interface"]]
            guests[number] = LibvirtGuest(libvirt, name, elements, release=release("installed"))
            stack.callback(guests[number].close)
            guests[number].begin()
            defined = guests[number].defined_interface()
            assert attributes(ET.fromstring(printed["interface"])) <= attributes(defined), ET.tostring(defined)
        for number, guest in guests.items():
            guest.ready().configure(f"{guest_ip(number)}/{PREFIX}")
            guest.run("echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore")
            assert guest.mac() == guest_mac(number)
            exchange(daemon, f"vm{number}", lab.net, NET_IP, guest, guest_ip(number))
        assert "RX:\t\t1024" in guests[1].run("ethtool -g eth0")
        ping(guests[1], guest_ip(2))

        file = libvirt.directory / "vm3.xml"
        file.write_text(daemon.cli("libvirt-xml", "vm3", "--interface"))
        libvirt.virsh("attach-device", "vm1", file)
        wait_in_guest(guests[1], "[ -d /sys/class/net/eth1 ]", "an attached eth1")
        guests[1].configure(f"{SECOND_GUEST}/{PREFIX}", device="eth1")
        exchange(daemon, "vm3", lab.net, SECOND_NET, guests[1], SECOND_GUEST, "eth1")

        daemon.kill()
        daemon = lab.up(specs)
        for number, guest in guests.items():
            daemon.wait_connected(f"vm{number}")
            wait_in_guest(guest, "grep -q 1 /sys/class/net/eth0/carrier", "its link")
            exchange(daemon, f"vm{number}", lab.net, NET_IP, guest, guest_ip(number))

        libvirt.virsh("detach-device", "vm1", file)
        daemon.wait_connected("vm3", connected=False)
        for number, guest in guests.items():
            guest.end()
            daemon.wait_connected(f"vm{number}", connected=False)
        assert libvirt.virsh("list", "--all", "--name").split() == []
        assert daemon.metrics().total("xdpvhost_guest_protocol_errors_total") == 0
    assert os.getuid() != USER
