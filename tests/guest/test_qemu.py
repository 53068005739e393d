# SPDX-License-Identifier: Apache-2.0
"""What `xdpvhost qemu-args` prints starts virtual machines that work: with QEMU itself, emulated (TCG).

Everything runs with the installed QEMU and with a newer one. Each test leaves its guests running for the next.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from support.lab import NET_IP, PREFIX, Lab, guest_ip, guest_mac, spec
from support.process import wait_for
from support.qemu import Qemu, QemuLinux, Release, qemu_args, qemu_words
from support.traffic import PING, exchange, no_loss, ping, ping_from, wait_in_guest

PAYLOAD = 200_000
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
VIRTIO_F_RING_PACKED = 34
DRIVER = "/sys/bus/virtio/drivers/virtio_net"
SECOND_NET, SECOND_GUEST = "198.51.100.1", "198.51.100.13"


@dataclass(frozen=True)
class Kind:
    """A guest: its number, what xdpvhost does with its socket, its machine, its queue pairs, its bus for hot plug."""

    number: int
    mode: str
    machine: str
    pairs: int
    bus: str

    @property
    def name(self) -> str:
        return f"vm{self.number}"

    def spec(self, lab: Lab) -> str:
        extra = "" if self.mode == "server" else f",socket={lab.directory}/{self.name}-qemu.sock,socket-mode=client"
        return spec(self.number, queues=self.pairs, extra=extra)


KINDS = (Kind(1, "server", "q35", 1, "port1"), Kind(2, "client", "pc", 2, "pci.0"))


class Machines:
    """A Linux guest of each kind, and a third port that no machine has at first."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.lab = Lab(quiet=True)
        self.world = self.lab.world  # where a failure's report looks for logs
        try:
            self.lab.net.ip("addr", "add", f"{SECOND_NET}/{PREFIX}", "dev", "eth0")
            self.specs = [*(kind.spec(self.lab) for kind in KINDS), spec(3)]
            self.daemon = self.lab.up(self.specs)
            self.guests = {kind.number: self._guest(kind) for kind in KINDS}
            for guest in self.guests.values():
                guest.begin()
            for kind in KINDS:
                self.ready(kind)
        except BaseException:
            self.lab.close()
            raise

    def _guest(self, kind: Kind) -> QemuLinux:
        guest = QemuLinux(
            qemu_args(self.daemon, kind.name, self.release, "--memory", "384M"),
            kind.name,
            directory=self.lab.directory,
            release=self.release,
            machine=kind.machine,
            cpus=kind.pairs,
            extra=["-device", "pcie-root-port,id=port1,chassis=1"] if kind.machine == "q35" else [],
        )
        self.lab.world.stack.callback(guest.close)
        return guest

    def ready(self, kind: Kind) -> QemuLinux:
        guest = self.guests[kind.number].ready()
        guest.run("echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore")  # each device answers for its own address only
        guest.configure(f"{guest_ip(kind.number)}/{PREFIX}")
        return guest

    def exchange(self, *kinds: Kind) -> None:
        for kind in kinds:
            guest = self.guests[kind.number]
            wait_in_guest(guest, "grep -q 1 /sys/class/net/eth0/carrier", "its link")
            exchange(self.daemon, kind.name, self.lab.net, NET_IP, guest, guest_ip(kind.number))

    def well(self) -> bool:
        """Whether a failed test has left everything running."""
        with contextlib.suppress(AssertionError, OSError):
            facts = {guest["name"]: guest["connected"] for guest in self.daemon.api("guest-list")}
            return all(facts[k.name] and self.guests[k.number].call("true")[0] == 0 for k in KINDS)
        return False


@pytest.fixture(scope="module")
def booted(release: Release) -> Iterator[list[Machines]]:
    holder: list[Machines] = []
    yield holder
    for machines in holder:
        machines.lab.close()


@pytest.fixture
def machines(booted: list[Machines], release: Release) -> Machines:
    if booted and not booted[0].well():
        booted.pop().lab.close()
    if not booted:
        booted.append(Machines(release))
    return booted[0]


def test_firmware_boots_from_the_network(release: Release) -> None:
    """iPXE, in the device's own ROM, is the guest: DHCP, TFTP, and it answers pings."""
    with Lab() as lab:
        (lab.directory / "boot.ipxe").write_text(f"#!ipxe\nimgfetch tftp://{NET_IP}/payload ||\nsleep 600\n")
        (lab.directory / "payload").write_bytes(bytes(n % 251 for n in range(PAYLOAD)))
        dnsmasq = ["--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces"]
        dnsmasq += ["--dhcp-range=192.0.2.100,192.0.2.150,5m", "--dhcp-authoritative", "--no-ping", "--user=root"]
        dnsmasq += [f"--dhcp-leasefile={lab.directory}/leases", "--pid-file=", "--dhcp-boot=boot.ipxe"]
        dnsmasq += ["--enable-tftp", f"--tftp-root={lab.directory}"]
        dnsmasq += ["--enable-ra", "--dhcp-range=2001:db8::,ra-only"]  # iPXE waits 13 s for a router otherwise
        daemon = lab.up([kind.spec(lab) for kind in KINDS])
        with lab.net.start("dnsmasq", *dnsmasq) as server, contextlib.ExitStack() as stack:
            server.wait_line("DHCP, IP range", 10)
            for kind in KINDS:
                machine = Qemu(
                    qemu_args(daemon, kind.name, release),
                    kind.name,
                    directory=lab.directory,
                    release=release,
                    machine=kind.machine,
                    extra=["-boot", "n"],
                )
                stack.enter_context(machine)
            for kind in KINDS:
                lease = server.wait_line(rf"DHCPACK\(eth0\) (192\.0\.2\.1\d\d) {guest_mac(kind.number)}", 30)
                server.wait_line(rf"sent \S+/boot\.ipxe to {lease[1]}", 30)
                server.wait_line(rf"sent \S+/payload to {lease[1]}", 30)
                ping_from(lab.net, lease[1])
            metrics = daemon.metrics()
    for kind in KINDS:
        assert metrics.total("xdpvhost_guest_rx_bytes_total", guest=kind.name) > PAYLOAD
        assert metrics.total("xdpvhost_guest_protocol_errors_total", guest=kind.name) == 0


def test_boot(machines: Machines) -> None:
    """Addresses, queue pairs, and traffic: with the network, and from guest to guest."""
    machines.exchange(*KINDS)
    ping(machines.guests[1], guest_ip(2))
    for kind in KINDS:
        guest = machines.guests[kind.number]
        assert guest.mac() == guest_mac(kind.number)
        channels = guest.run("ethtool -l eth0").rpartition("Current hardware settings:")[2]
        assert f"Combined:\t{kind.pairs}" in channels
        for cpu in range(kind.pairs):  # each CPU sends by its own pair
            ping(guest, NET_IP, f"taskset {1 << cpu:#x}")
        sent = machines.daemon.metrics().by("queue", "xdpvhost_guest_tx_packets_total", guest=kind.name)
        assert len(sent) == kind.pairs
        assert all(count > 0 for count in sent.values()), sent


def test_driver_reload(machines: Machines) -> None:
    """The guest's driver lets the device go and takes it again, by sysfs and by unloading its module."""
    for kind in KINDS:
        guest = machines.guests[kind.number]
        device = guest.run(f"cd {DRIVER} && ls -d virtio*").strip()
        guest.run(f"echo {device} >{DRIVER}/unbind && [ ! -d /sys/class/net/eth0 ]")
        guest.run(f"echo {device} >{DRIVER}/bind && [ -d /sys/class/net/eth0 ]")
        guest.configure(f"{guest_ip(kind.number)}/{PREFIX}")
        machines.exchange(kind)
        guest.run("rmmod virtio_net && [ ! -d /sys/class/net/eth0 ]")
        guest.run("insmod /modules/virtio_net.ko && [ -d /sys/class/net/eth0 ]")
        guest.configure(f"{guest_ip(kind.number)}/{PREFIX}")
        machines.exchange(kind)


def test_queue_pairs_change_while_it_runs(machines: Machines) -> None:
    kind = KINDS[1]
    guest = machines.guests[kind.number]
    for pairs in (1, kind.pairs):
        guest.run(f"ethtool -L eth0 combined {pairs}")
        machines.exchange(kind)


def test_reset(machines: Machines) -> None:
    """The reset button for one, `reboot` inside the other. (Before hot plug, after which 7.2's firmware takes 30 s.)"""
    before = [guest.run(BOOT_ID) for guest in machines.guests.values()]
    machines.guests[1].reset()
    machines.guests[2].spawn("reboot -f")
    after = [machines.ready(kind).run(BOOT_ID) for kind in KINDS]
    assert not set(before) & set(after), "that was no reset"
    machines.exchange(*KINDS)


def test_second_device_is_plugged_and_unplugged(machines: Machines) -> None:
    """Twice, with traffic on both devices: the first one's rings move to the new memory table and back.

    The second one has packed virtqueues.
    """
    machine = machines.guests[1]
    words = qemu_words(machines.daemon, "vm3", machines.release, "--packed", "--queue-size", "512")
    for _ in range(2):
        machine.qemu.plug(words, KINDS[0].bus)
        wait_in_guest(machine, "[ -d /sys/class/net/eth1 ]", "a plugged eth1")
        assert machine.run("cat /sys/class/net/eth1/device/features")[VIRTIO_F_RING_PACKED] == "1"
        machine.configure(f"{SECOND_GUEST}/{PREFIX}", device="eth1")
        wait_in_guest(machine, "grep -q 1 /sys/class/net/eth1/carrier", "the link of eth1")
        exchange(machines.daemon, "vm3", machines.lab.net, SECOND_NET, machine, SECOND_GUEST, "eth1")
        machines.exchange(KINDS[0])
        machine.qemu.unplug(words)
        machines.daemon.wait_connected("vm3", connected=False)
        assert machine.call("[ -d /sys/class/net/eth1 ]")[0] != 0
        machines.exchange(KINDS[0])


def test_packed_device_after_a_restart_of_the_daemon(machines: Machines) -> None:
    """QEMU does not know where a packed ring was. Reloading the driver helps, as docs/troubleshooting.md says."""
    machine = machines.guests[1]
    words = qemu_words(machines.daemon, "vm3", machines.release, "--packed")
    machine.qemu.plug(words, KINDS[0].bus)
    wait_in_guest(machine, "[ -d /sys/class/net/eth1 ]", "a plugged eth1")
    device = machine.run("basename $(readlink /sys/class/net/eth1/device)").strip()
    machine.configure(f"{SECOND_GUEST}/{PREFIX}", device="eth1")
    exchange(machines.daemon, "vm3", machines.lab.net, SECOND_NET, machine, SECOND_GUEST, "eth1")
    machines.daemon.kill()
    machines.daemon = machines.lab.up(machines.specs)
    for name in ("vm1", "vm2", "vm3"):
        machines.daemon.wait_connected(name)
    machine.run(f"echo {device} >{DRIVER}/unbind && echo {device} >{DRIVER}/bind && [ -d /sys/class/net/eth1 ]")
    machine.configure(f"{SECOND_GUEST}/{PREFIX}", device="eth1")
    exchange(machines.daemon, "vm3", machines.lab.net, SECOND_NET, machine, SECOND_GUEST, "eth1")
    machine.qemu.unplug(words)
    machines.daemon.wait_connected("vm3", connected=False)
    machines.exchange(*KINDS)


def test_its_only_device_is_unplugged_and_plugged(machines: Machines) -> None:
    """The device that the machine was started with, by the id that `qemu-args` gives it; QEMU listens."""
    kind = KINDS[1]
    guest = machines.guests[kind.number]
    words = qemu_words(machines.daemon, kind.name, machines.release)
    guest.qemu.unplug(words)
    machines.daemon.wait_connected(kind.name, connected=False)
    guest.qemu.plug(words, kind.bus)
    wait_in_guest(guest, "[ -d /sys/class/net/eth0 ]", "a plugged eth0")
    guest.configure(f"{guest_ip(kind.number)}/{PREFIX}")
    machines.exchange(kind)


def test_daemon_is_killed_under_traffic_and_comes_back(machines: Machines) -> None:
    """QEMU as client and as server; the guests go on, their own streams of pings too."""
    before = [guest.run(BOOT_ID) for guest in machines.guests.values()]
    logs = {n: guest.spawn(f"exec ping -n -i 0.1 {NET_IP}") for n, guest in machines.guests.items()}
    for number, log in logs.items():
        wait_in_guest(machines.guests[number], f"grep -q icmp_seq=3 {log}", "pings")
    machines.daemon.kill()
    machines.daemon = machines.lab.up(machines.specs)
    for kind in KINDS:
        machines.daemon.wait_connected(kind.name)
        guest, log = machines.guests[kind.number], logs[kind.number]
        answered = int(guest.run(f"grep -c ' bytes from ' {log}"))
        more = f"[ $(grep -c ' bytes from ' {log}) -gt {answered + 5} ]"
        wait_in_guest(guest, more, "pings that are answered again")
        guest.run("killall ping")
    machines.exchange(*KINDS)
    assert [guest.run(BOOT_ID) for guest in machines.guests.values()] == before, "a guest did not go on"


def test_killed_under_traffic(machines: Machines) -> None:
    """kill -9 of one QEMU while it is busy: the other guest loses nothing. Then of that one, too; both start anew."""
    first, second = KINDS
    victim, witness = (machines.guests[kind.number] for kind in KINDS)
    with machines.lab.net.start("ping", "-n", "-i", "0.01", "-s", "1400", guest_ip(first.number)) as flood:
        flood.wait_line("icmp_seq=20 ", 10)
        log = witness.spawn(f"exec {' '.join(PING)} -c 40 {NET_IP}")
        wait_in_guest(witness, f"grep -q icmp_seq=5 {log}", "pings")
        victim.qemu.kill()
        machines.daemon.wait_connected(first.name, connected=False)
        wait_in_guest(witness, f"grep -q loss {log}", "the end of its pings")
        no_loss(witness.run(f"cat {log}"))
    with machines.lab.net.start("ping", "-n", "-i", "0.01", "-s", "1400", guest_ip(second.number)) as flood:
        flood.wait_line("icmp_seq=20 ", 10)
        witness.qemu.kill()
        machines.daemon.wait_connected(second.name, connected=False)
    for guest in (victim, witness):
        guest.close()
        guest.begin()
    for kind in KINDS:
        machines.ready(kind)
    machines.exchange(*KINDS)


def test_the_daemon_is_well(machines: Machines) -> None:
    """After all that: no protocol error, and nothing was copied twice."""
    metrics = machines.daemon.metrics()
    assert metrics.total("xdpvhost_guest_protocol_errors_total") == 0

    def copies() -> bool:
        now = machines.daemon.metrics()
        sent = now.total("xdpvhost_xsk_transmit_bytes_total")
        pairs = [(now.total("xdpvhost_copied_bytes_total", direction="nic"), sent)]
        for kind in KINDS:
            received = now.total("xdpvhost_guest_rx_bytes_total", guest=kind.name)
            pairs.append((now.total("xdpvhost_copied_bytes_total", direction="guest", guest=kind.name), received))
        return all(copied == delivered > 0 for copied, delivered in pairs)

    wait_for(copies, 5, "copied bytes to equal delivered bytes", interval=0.1)
