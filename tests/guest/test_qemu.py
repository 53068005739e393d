# SPDX-License-Identifier: Apache-2.0
"""What `xdpvhost qemu-args` prints starts virtual machines that work: with QEMU itself, emulated (TCG)."""

import re
from contextlib import ExitStack

import pytest

from support.lab import NET_IP, PREFIX, Lab, guest_ip, guest_mac, spec
from support.process import wait_for
from support.qemu import Qemu, QemuLinux, qemu_args

PING = "ping -n -c 3 -i 0.2 -W 5"  # an emulated guest may take longer than the interval to answer
PAYLOAD = 200_000
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"

# Linux guests: number, socket mode, machine, queue pairs.
LINUX = [(1, "server", "q35", 1), (2, "client", "pc", 2)]


def no_loss(output: str) -> None:
    assert re.search(r"\b0% packet loss", output), output


def wait_in_guest(guest: QemuLinux, script: str, what: str) -> None:
    wait_for(lambda: guest.call(script)[0] == 0, 10, what, interval=0.1)


def guest_spec(number: int, mode: str, lab: Lab, queues: int = 1) -> str:
    extra = "" if mode == "server" else f",socket={lab.directory}/vm{number}-qemu.sock,socket-mode=client"
    return spec(number, queues=queues, extra=extra)


@pytest.mark.parametrize(("mode", "machine"), [("server", "q35"), ("client", "pc")])
def test_firmware_boots_from_the_network(mode: str, machine: str) -> None:
    """iPXE, in the device's own ROM, is the guest: DHCP, TFTP, and it answers pings."""
    with Lab() as lab:
        (lab.directory / "boot.ipxe").write_text(f"#!ipxe\nimgfetch tftp://{NET_IP}/payload ||\nsleep 600\n")
        (lab.directory / "payload").write_bytes(bytes(n % 251 for n in range(PAYLOAD)))
        dnsmasq = ["--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces"]
        dnsmasq += ["--dhcp-range=192.0.2.100,192.0.2.150,5m", "--dhcp-authoritative", "--no-ping", "--user=root"]
        dnsmasq += [f"--dhcp-leasefile={lab.directory}/leases", "--pid-file=", "--dhcp-boot=boot.ipxe"]
        dnsmasq += ["--enable-tftp", f"--tftp-root={lab.directory}"]
        dnsmasq += ["--enable-ra", "--dhcp-range=2001:db8::,ra-only"]  # iPXE waits 13 s for a router otherwise
        daemon = lab.up([guest_spec(1, mode, lab)])
        with lab.net.start("dnsmasq", *dnsmasq) as server:
            server.wait_line("DHCP, IP range", 10)
            with Qemu(qemu_args(daemon, "vm1"), "vm1", directory=lab.directory, machine=machine, extra=["-boot", "n"]):
                lease = server.wait_line(rf"DHCPACK\(eth0\) (192\.0\.2\.1\d\d) {guest_mac(1)}", 30)
                server.wait_line(rf"sent \S+/boot\.ipxe to {lease[1]}", 30)
                server.wait_line(rf"sent \S+/payload to {lease[1]}", 30)
                no_loss(lab.net.run(*f"{PING} {lease[1]}".split()).stdout)
                metrics = daemon.metrics()
    assert metrics.total("xdpvhost_guest_rx_bytes_total", guest="vm1") > PAYLOAD
    assert metrics.total("xdpvhost_guest_protocol_errors_total", guest="vm1") == 0


def test_linux_and_everything_that_may_restart(quiet_lab: Lab) -> None:
    """Linux guests are reset; the daemon is killed under them and comes back; they are killed and started anew."""
    lab = quiet_lab
    specs = [guest_spec(number, mode, lab, queues) for number, mode, _machine, queues in LINUX]
    daemon = lab.up(specs)
    arguments = {number: qemu_args(daemon, f"vm{number}") for number, *_rest in LINUX}

    def boot(stack: ExitStack) -> list[QemuLinux]:
        guests = []
        for number, _mode, machine, queues in LINUX:
            name = f"vm{number}"
            guest = QemuLinux(arguments[number], name, directory=lab.directory, machine=machine, cpus=queues)
            stack.callback(guest.close)
            guest.begin()
            guests.append(guest)
        for guest in guests:
            guest.ready()
        return guests

    def ping_all(guests: list[QemuLinux], *, fresh: bool) -> None:
        """With neighbours learned anew: ARP requests are broadcast and replies unicast, in both directions."""
        for (number, *_rest), guest in zip(LINUX, guests, strict=True):
            if fresh:
                guest.configure(f"{guest_ip(number)}/{PREFIX}")
            guest.run("ip neigh flush dev eth0")
            no_loss(guest.run(f"{PING} {NET_IP}", 15))
            lab.net.ip("neigh", "flush", "dev", "eth0")
            no_loss(lab.net.run(*f"{PING} {guest_ip(number)}".split()).stdout)
        no_loss(guests[0].run(f"{PING} {guest_ip(2)}", 15))

    with ExitStack() as stack:
        guests = boot(stack)
        ping_all(guests, fresh=True)
        for (number, _mode, _machine, queues), guest in zip(LINUX, guests, strict=True):
            assert guest.mac() == guest_mac(number)
            channels = guest.run("ethtool -l eth0").rpartition("Current hardware settings:")[2]
            assert f"Combined:\t{queues}" in channels
            for cpu in range(queues):  # each CPU sends by its own pair
                no_loss(guest.run(f"taskset {1 << cpu:#x} {PING} {NET_IP}", 15))
            sent = daemon.metrics().by("queue", "xdpvhost_guest_tx_packets_total", guest=f"vm{number}")
            assert len(sent) == queues
            assert all(count > 0 for count in sent.values()), sent

        before = [guest.run(BOOT_ID) for guest in guests]
        for guest in guests:
            guest.reset()
        for guest in guests:
            guest.ready()
        after = [guest.run(BOOT_ID) for guest in guests]
        assert not set(before) & set(after), "that was no reset"
        ping_all(guests, fresh=True)

        daemon.kill()
        daemon = lab.up(specs)
        for number, *_rest in LINUX:
            daemon.wait_connected(f"vm{number}")
        for guest in guests:
            wait_in_guest(guest, "grep -q 1 /sys/class/net/eth0/carrier", "the guest's link")
        ping_all(guests, fresh=False)
        assert [guest.run(BOOT_ID) for guest in guests] == after, "a guest did not go on"

        for guest in guests:
            guest.qemu.kill()
        for number, *_rest in LINUX:
            daemon.wait_connected(f"vm{number}", connected=False)
    with ExitStack() as stack:
        ping_all(boot(stack), fresh=True)
        assert daemon.metrics().total("xdpvhost_guest_protocol_errors_total") == 0
