# SPDX-License-Identifier: Apache-2.0
"""Live migration: a running QEMU guest moves from one xdpvhost to another under traffic, and nothing is corrupted.

    namespace net: br0 192.0.2.1
        |- a0  <-- veth -->  nic0 in namespace a: xdpvhost, QEMU that the guest leaves
        `- b0  <-- veth -->  nic0 in namespace b: xdpvhost, QEMU that it comes to

What the traffic is for: pings measure the gap. TCP streams both ways must lose and change nothing. And a stream that
the guest leaves in its socket until it has moved lies in pages that xdpvhost alone has written: support/hoard.c.
"""

import itertools
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.daemon import Daemon
from support.lab import NET_IP, PREFIX, guest_ip, guest_mac, spec
from support.netns import Namespace, World
from support.process import Process, wait_for
from support.qemu import QemuLinux, Release, hoard_program, qemu_args
from support.traffic import exchange, wait_in_guest

VIRTIO_F_RING_PACKED = 34
GUEST, MAC = guest_ip(1), guest_mac(1)
RATE, KEPT_RATE = 400, 1600  # blocks of 1400 bytes a second
PING_INTERVAL = 0.01
MTU = 9000  # a frame fills several of the guest's buffers, and the driver writes to the first only
GAP_LIMIT = 5.0  # seconds; the machine may be busy
SLOW = 16 << 20  # bytes a second: the first pass over memory takes some seconds, in which traffic makes pages dirty


@dataclass(frozen=True)
class Site:
    """A host: its namespace, its port of the bridge, its daemon."""

    name: str
    namespace: Namespace
    port: str
    daemon: Daemon


class Network:
    """The bridge and the two sites."""

    def __init__(self, world: World, pairs: int) -> None:
        self.world = world
        self.net = world.namespace("net")
        self.net.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        self.net.ip("link", "add", "br0", "type", "bridge")
        self.net.ip("addr", "add", f"{NET_IP}/{PREFIX}", "dev", "br0")
        self.net.ip("link", "set", "br0", "mtu", str(MTU), "up")
        self.sites = [self._site(name, pairs) for name in ("a", "b")]

    def _site(self, name: str, pairs: int) -> Site:
        namespace = self.world.namespace(name)
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        self.world.veth(self.net, f"{name}0", namespace, "nic0", queues=pairs, mtu=MTU)
        self.net.ip("link", "set", f"{name}0", "master", "br0")
        run_dir = self.world.directory / name
        daemon = Daemon(namespace, iface="nic0", guests=[spec(1, queues=pairs)], run_dir=run_dir)
        self.world.stack.callback(daemon.close)
        return Site(name, namespace, f"{name}0", daemon)

    def place(self) -> str:
        """The port behind which the bridge believes the guest to be."""
        entries = self.net.json("bridge", "-j", "fdb", "show", "br", "br0")
        return next((str(e["ifname"]) for e in entries if e["mac"] == MAC and e["ifname"] != "br0"), "nowhere")


def start_guest(
    network: Network, site: Site, release: Release, pairs: int, options: Sequence[str], extra: Sequence[str]
) -> QemuLinux:
    """`options` are those of qemu-args, `extra` is for QEMU itself."""
    guest = QemuLinux(
        qemu_args(site.daemon, "vm1", release, "--memory", "384M", *options),
        "vm1",
        directory=network.world.directory,
        release=release,
        cpus=pairs,
        extra=extra,
        identity=f"vm1-{site.name}",
    )
    network.world.stack.callback(guest.close)
    guest.begin()
    return guest


def requests(site: Site, request: str) -> int:
    """How often the front-end said it, with success."""
    return site.daemon.metrics().total("xdpvhost_guest_messages_total", guest="vm1", request=request, result="ok")


def query(guest: QemuLinux) -> dict[str, Any]:
    answer: dict[str, Any] = guest.qemu.qmp.execute("query-migrate")
    assert answer.get("status") != "failed", answer
    return answer


class Traffic:
    """Everything that goes on during a migration; finish() looks at what arrived."""

    def __init__(self, network: Network, guest: QemuLinux) -> None:
        net, hoard = network.net, hoard_program()
        guest.run("echo 90000 100000 200000 >/proc/sys/net/ipv4/tcp_mem")
        self.kept = guest.spawn(f"echo $$ >/tmp/keep.pid; exec hoard keep {GUEST} 7001")
        self.pulled = guest.spawn(f"exec hoard pull {GUEST} 7002")
        for log in (self.kept, self.pulled):
            wait_in_guest(guest, f"grep -q listening {log}", "a listening hoard")
        self.fill = self._start(network, hoard, "push", GUEST, "7001", str(KEPT_RATE))
        self.push = self._start(network, hoard, "push", GUEST, "7002", str(RATE))
        self.pull = self._start(network, hoard, "pull", NET_IP, "7003")
        self.pull.wait_line("listening", 10)
        self.pushed = guest.spawn(f"echo $$ >/tmp/push.pid; exec hoard push {NET_IP} 7003 {RATE}")
        self.ping = self._start(network, "ping", "-n", "-D", "-i", str(PING_INTERVAL), GUEST)
        self.announced = net.start("tcpdump", "-l", "-n", "-e", "-i", "br0", "ether src", MAC, "and (rarp or arp)")
        network.world.stack.callback(self.announced.close)
        self.announced.wait_line("listening on", 10)
        self.wait_pings(20)

    @staticmethod
    def _start(network: Network, *argv: str | Path) -> Process:
        process = network.net.start(*argv)
        network.world.stack.callback(process.close)
        return process

    def answers(self) -> list[float]:
        return [float(t) for t in re.findall(r"^\[(\d+\.\d+)\] \d+ bytes from", self.ping.log(), re.MULTILINE)]

    def wait_pings(self, more: int) -> None:
        wanted = len(self.answers()) + more
        wait_for(lambda: len(self.answers()) >= wanted, 20, f"{more} more answered pings", interval=0.1)

    def gap(self) -> float:
        """The longest time between two answered pings, in seconds."""
        times = self.answers()
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    @staticmethod
    def _stop(sender: Process) -> int:
        sender.send(signal.SIGTERM)
        assert sender.wait(20) == 0, sender.tail()
        return int(sender.wait_line(r"^(\d+) pushed$", 1)[1])

    def lost_pings(self) -> int:
        numbers = [int(n) for n in re.findall(r" icmp_seq=(\d+) ", self.ping.log())]
        return max(numbers) - len(set(numbers))

    def finish(self, guest: QemuLinux) -> str:
        """Ends everything and compares what arrived with what was sent; a summary."""
        self.ping.close()
        kept, streamed = self._stop(self.fill), self._stop(self.push)
        guest.run("kill -USR1 $(cat /tmp/keep.pid) && kill -TERM $(cat /tmp/push.pid)")
        for count, log in ((kept, self.kept), (streamed, self.pulled)):
            wait_in_guest(guest, f"grep -Eq 'received|wrong' {log}", "the end of a stream")
            assert f"\n{count} received\n" in guest.run(f"cat {log}"), guest.run(f"cat {log}")
        assert self.pull.wait(20) == 0, self.pull.tail()
        pulled = int(self.pull.wait_line(r"^(\d+) received$", 1)[1])
        wait_in_guest(guest, f"grep -q '^{pulled} pushed$' {self.pushed}", f"to have pushed {pulled} blocks")
        sizes = (f"{count * 1.4 / 1000:.1f}" for count in (kept, streamed, pulled))
        return "{} MB kept, {} MB in, {} MB out, all right".format(*sizes)


def migrate(source: QemuLinux, destination: QemuLinux, uri: str) -> dict[str, Any]:
    """Slowly enough for a pass under traffic, but nothing is paused: it has to converge. QEMU's last figures."""
    source.qemu.qmp.execute("migrate-set-parameters", {"max-bandwidth": SLOW, "downtime-limit": 300})
    source.qemu.qmp.execute("migrate", {"uri": uri})
    wait_for(lambda: query(source)["status"] == "completed", 60, "the migration to converge", interval=0.1)
    figures = query(source)
    wait_for(lambda: destination.qemu.qmp.execute("query-status")["running"], 10, "the guest to run there")
    destination.take_over(source)
    return figures


@pytest.mark.may_skip("an emulated guest's own writes get lost when QEMU before 9.0 migrates it")
@pytest.mark.parametrize(
    ("pairs", "ring", "announcer"),
    [(1, "split", "guest"), (2, "split", "daemon"), (1, "packed", "daemon"), (2, "packed", "guest")],
)
def test_moves_under_traffic(
    world: World, release: Release, pairs: int, ring: str, announcer: str, measured: Callable[[str], None]
) -> None:
    """Who tells the network: the guest's driver (GUEST_ANNOUNCE), or xdpvhost by a RARP when the driver can't.

    With the latter the guest has one large buffer a frame instead of mergeable ones, too.
    """
    if release.version < (9, 0):
        pytest.skip("QEMU before 9.0 forgets to reset TCG's TLB when it collects dirty pages")
    network = Network(world, pairs)
    here, there = network.sites
    off = [] if announcer == "guest" else [f"virtio-net-pci.{name}=off" for name in ("guest_announce", "mrg_rxbuf")]
    extra = [word for name in off for word in ("-global", name)]
    options = ["--packed"] if ring == "packed" else []
    source = start_guest(network, here, release, pairs, options, extra)
    uri = f"unix:{world.directory}/migration.sock"
    destination = start_guest(network, there, release, pairs, options, [*extra, "-incoming", uri])
    source.ready().configure(f"{GUEST}/{PREFIX}")
    source.run(f"ip link set eth0 mtu {MTU}")
    features = source.run("cat /sys/class/net/eth0/device/features")
    assert features[VIRTIO_F_RING_PACKED] == ("1" if ring == "packed" else "0")
    exchange(here.daemon, "vm1", network.net, NET_IP, source, GUEST)
    assert network.place() == here.port
    wait_for(lambda: destination.qemu.qmp.execute("query-status")["status"] == "inmigrate", 10, "the other QEMU")

    # One that is cancelled leaves the guest where it was, and nobody logs any more.
    source.qemu.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    source.qemu.qmp.execute("migrate", {"uri": "exec:cat >/dev/null"})
    wait_for(lambda: requests(here, "SET_LOG_BASE") > 0, 10, "a dirty log")
    exchange(here.daemon, "vm1", network.net, NET_IP, source, GUEST)
    source.qemu.qmp.execute("migrate_cancel")
    wait_for(lambda: query(source)["status"] == "cancelled", 10, "the migration to be cancelled")

    traffic = Traffic(network, source)
    logs = requests(here, "SET_LOG_BASE")
    figures = migrate(source, destination, uri)
    assert requests(here, "SET_LOG_BASE") > logs, "no dirty log was used"
    traffic.wait_pings(50)
    gap, content = traffic.gap(), traffic.finish(destination)
    lost = traffic.lost_pings()
    assert lost <= gap / PING_INTERVAL * 1.5 + 10
    assert network.place() == there.port
    assert gap < GAP_LIMIT
    told = traffic.announced.log()
    if announcer == "guest":
        assert f"Request who-has {GUEST} " in told, told
        assert requests(there, "SEND_RARP") == 0
    else:
        assert f"Reverse Request who-is {MAC}" in told, told
        assert requests(there, "SEND_RARP") >= 1
    source.qemu.qmp.execute("quit")
    here.daemon.wait_connected("vm1", connected=False)
    exchange(there.daemon, "vm1", network.net, NET_IP, destination, GUEST)
    for site in network.sites:
        assert site.daemon.metrics().total("xdpvhost_guest_protocol_errors_total") == 0
    ram = figures["ram"]
    measured(
        f"QEMU {release.version[0]}.{release.version[1]}: pings stopped for {gap * 1000:.0f} ms, {lost} lost (QEMU's "
        f"downtime {figures['downtime']} ms); {ram['dirty-sync-count']} passes, {ram['transferred'] >> 20} MiB in "
        f"{figures['total-time'] / 1000:.1f} s; {content}"
    )
