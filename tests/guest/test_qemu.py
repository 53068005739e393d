# SPDX-License-Identifier: Apache-2.0
"""What `xdpvhost qemu-args` prints starts virtual machines that work: with QEMU itself, emulated (TCG)."""

import re
import time

import pytest

from support.lab import NET_IP, PREFIX, Lab, guest_ip, guest_mac, spec
from support.process import wait_for
from support.qemu import Qemu, QemuLinux, qemu_args

PING = "ping -n -c 5 -i 0.1 -w 10"
PAYLOAD = 200_000


def no_loss(output: str) -> None:
    assert re.search(r"\b0% packet loss", output), output


def ping_both_ways(lab: Lab, guest: QemuLinux) -> None:
    """With neighbours learned anew: ARP requests are broadcast and replies unicast, in both directions."""
    lab.net.ip("neigh", "flush", "dev", "eth0")
    guest.run("ip neigh flush dev eth0")
    no_loss(guest.run(f"{PING} {NET_IP}", 15))
    lab.net.ip("neigh", "flush", "dev", "eth0")
    no_loss(lab.net.run(*f"{PING} {guest_ip(1)}".split()).stdout)


def configure(guest: QemuLinux) -> None:
    guest.configure(f"{guest_ip(1)}/{PREFIX}")


def session_of(mode: str, lab: Lab, queues: int = 1) -> str:
    extra = "" if mode == "server" else f",socket={lab.directory}/vm1-qemu.sock,socket-mode=client"
    return spec(1, queues=queues, extra=extra)


@pytest.mark.parametrize(("mode", "machine"), [("server", "q35"), ("client", "pc")])
def test_firmware_boots_from_the_network(quiet_lab: Lab, mode: str, machine: str) -> None:
    """iPXE, in the device's own ROM, is the guest: DHCP, TFTP, and it answers pings."""
    lab = quiet_lab
    (lab.directory / "boot.ipxe").write_text(f"#!ipxe\nimgfetch tftp://{NET_IP}/payload ||\nsleep 600\n")
    (lab.directory / "payload").write_bytes(bytes(n % 251 for n in range(PAYLOAD)))
    dnsmasq = ["--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces", "--no-ping"]
    dnsmasq += ["--dhcp-range=192.0.2.100,192.0.2.150,5m", "--dhcp-authoritative", "--user=root", "--pid-file="]
    dnsmasq += [f"--dhcp-leasefile={lab.directory}/leases", "--dhcp-boot=boot.ipxe", "--log-facility=-"]
    dnsmasq += ["--enable-tftp", f"--tftp-root={lab.directory}"]
    daemon = lab.up([session_of(mode, lab)])
    with lab.net.start("dnsmasq", *dnsmasq) as server:
        server.wait_line("DHCP, IP range", 10)
        with Qemu(qemu_args(daemon, "vm1"), "vm1", directory=lab.directory, machine=machine, extra=["-boot", "n"]):
            lease = server.wait_line(rf"DHCPACK\(eth0\) (192\.0\.2\.1\d\d) {guest_mac(1)}", 30)
            server.wait_line(rf"sent \S+/boot\.ipxe to {lease[1]}", 20)
            server.wait_line(rf"sent \S+/payload to {lease[1]}", 20)
            no_loss(lab.net.run(*f"{PING} {lease[1]}".split()).stdout)
            metrics = daemon.metrics()
    assert metrics.total("xdpvhost_guest_rx_bytes_total", guest="vm1") > PAYLOAD
    assert metrics.total("xdpvhost_guest_protocol_errors_total", guest="vm1") == 0


@pytest.mark.parametrize(("mode", "machine", "queues"), [("server", "q35", 1), ("client", "pc", 2)])
def test_linux_and_everything_that_may_restart(quiet_lab: Lab, mode: str, machine: str, queues: int) -> None:
    """A Linux guest is reset; the daemon is killed under it and comes back; the guest is killed and started anew."""
    lab = quiet_lab
    guest_spec = session_of(mode, lab, queues)
    daemon = lab.up([guest_spec])
    arguments = qemu_args(daemon, "vm1")
    with QemuLinux(arguments, "vm1", directory=lab.directory, machine=machine) as guest:
        assert guest.mac() == guest_mac(1)
        configure(guest)
        ping_both_ways(lab, guest)
        channels = guest.run("ethtool -l eth0").rpartition("Current hardware settings:")[2]
        assert f"Combined:\t{queues}" in channels
        up_since = guest.run("cat /proc/stat | grep btime; cat /proc/uptime").split()

        guest.reset()
        assert float(guest.run("cat /proc/uptime").split()[0]) < 60, up_since
        configure(guest)
        ping_both_ways(lab, guest)

        daemon.kill()
        time.sleep(0.5)  # the guest notices, and QEMU tries to connect in vain
        daemon = lab.up([guest_spec])
        daemon.wait_connected("vm1")
        assert qemu_args(daemon, "vm1") == arguments
        wait_for(lambda: guest.call("grep -q 1 /sys/class/net/eth0/carrier")[0] == 0, 10, "the guest's link")
        ping_both_ways(lab, guest)

        guest.qemu.kill()
        daemon.wait_connected("vm1", connected=False)
    with QemuLinux(arguments, "vm1", directory=lab.directory, machine=machine) as guest:
        configure(guest)
        ping_both_ways(lab, guest)
        assert daemon.metrics().total("xdpvhost_guest_protocol_errors_total", guest="vm1") == 0
