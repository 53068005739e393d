# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost up` on a veth: its whole life, every command on it, every refusal, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, udp_frame
from support.frontend import NetDevice
from support.netns import QUEUES, Namespace, World
from support.process import wait_for

MAC1, MAC2, MAC3 = (f"52:54:00:00:00:0{i}" for i in (1, 2, 3))
VM1, VM2, VM3 = (f"name=vm{i},mac=52:54:00:00:00:0{i}" for i in (1, 2, 3))
COUNT = 23


@dataclass
class Host:
    """A "NIC" `nic0` in one namespace, its other end `net0` in another."""

    nic: Namespace
    net: Namespace
    directory: Path

    def up(self, *guests: str, **more: Any) -> Daemon:
        return Daemon(self.nic, iface="nic0", guests=guests, run_dir=self.directory / "run", **more)

    def cli(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        return self.nic.run(PROGRAM, *args, check=False)

    def state(self) -> dict[str, Any]:
        """What `up` may change on the NIC, as the kernel tells it."""
        (link,) = self.nic.json("ip", "-j", "-d", "link", "show", "dev", "nic0")
        volatile = ("stats", "stats64")
        features = self.nic.run("ethtool", "-k", "nic0").stdout
        peer = self.net.run("ethtool", "-k", "net0").stdout
        return {
            "link": {key: value for key, value in link.items() if key not in volatile},
            "features": features,
            "peer": peer,
            "channels": self.nic.run("ethtool", "-l", "nic0", check=False).stdout,
            "addresses": self.nic.json("ip", "-j", "maddr", "show", "dev", "nic0"),
            "fdb": self.nic.json("bridge", "-j", "fdb", "show", "dev", "nic0"),
        }


@pytest.fixture
def host(world: World) -> Iterator[Host]:
    nic, net = world.namespace("nic"), world.namespace("net")
    for namespace in (nic, net):
        namespace.run("sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")
    world.veth(nic, "nic0", net, "net0")
    return Host(nic, net, world.directory)


def send(host: Host, destination: str, count: int = COUNT) -> None:
    with PacketSocket(host.net, "net0") as out:
        out.send(udp_frame(destination, host.net.mac("net0"), number=number) for number in range(count))


def test_it_comes_up_says_so_once_and_gives_the_nic_back(host: Host) -> None:
    before = host.state()
    with host.up(VM1, VM2) as daemon:
        during = host.state()
        assert during["link"]["xdp"]["mode"] == 1
        ready = [line for line in daemon.process.log().splitlines() if "ready: " in line]
        assert len(ready) == 1
        assert f"nic0 with {QUEUES} queues, 2 guests, 1 workers" in ready[0]
        daemon.down()
        assert "stopped: nic0 is as it was" in daemon.process.log()
    assert host.state() == before
    assert not (host.directory / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_put_the_nic_back(host: Host, number: signal.Signals) -> None:
    before = host.state()
    with host.up(VM1) as daemon:
        daemon.process.send(number)
        assert daemon.process.wait(15) == 0
    assert host.state() == before


def test_down_returns_when_the_nic_is_back(host: Host) -> None:
    before = host.state()
    with host.up(VM1) as daemon:
        daemon.cli("down")
        assert host.state() == before
        assert daemon.process.wait(5) == 0


def test_systemd_is_notified(host: Host) -> None:
    path = host.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(10)
        with host.up(VM1, env={"NOTIFY_SOCKET": str(path)}) as daemon:
            assert receiver.recv(4096).split(b"\n")[0] == b"READY=1"
            daemon.down()
            assert receiver.recv(4096) == b"STOPPING=1"


def test_status_and_stats(host: Host) -> None:
    with host.up(
        VM1, f"{VM2},queues=2", options=["--workers", "2", "--xdp-mode", "native", "--bind", "copy"]
    ) as daemon:
        status = json.loads(daemon.cli("status", "--json"))
        assert (status["pid"], status["workers"], status["poll"]) == (daemon.pid, 2, "adaptive")
        (nic,) = status["nics"]
        assert (nic["iface"], nic["queues"], nic["mtu"]) == ("nic0", QUEUES, 1500)
        facts = nic["facts"]
        assert (facts["xdp_asked"], facts["xdp_in_use"]) == ("native", "native")
        assert (facts["bind_asked"], facts["bind_in_use"]) == ("copy", "copy")
        guests = {guest["name"]: guest for guest in status["guests"]}
        assert (guests["vm1"]["queues"], guests["vm2"]["queues"]) == (1, 2)
        assert not guests["vm1"]["connected"]
        one, two = (guests[name]["memory"] for name in ("vm1", "vm2"))
        assert one["socket_rings"] == two["socket_rings"] == QUEUES * 1024 * 16
        assert one["umem_share"] == QUEUES * facts["umem_bytes"] // 2
        assert 1024 < one["data_plane"] < two["data_plane"]  # two pairs have two sets of counters
        text = daemon.cli("status")
        assert "asked" in text
        assert "in use" in text
        assert MAC2 in text
        counters = json.loads(daemon.cli("stats", "--json"))["counters"]
        assert {c["labels"]["worker"] for c in counters if c["name"] == "xdpvhost_worker_sleeps_total"} == {"0", "1"}
        assert "NIC queues" in daemon.cli("stats")


def test_every_frame_is_in_every_counter(host: Host) -> None:
    """23 frames for a guest that isn't there, 23 for nobody: each is counted where it went, and nowhere else."""
    with host.up(VM1, VM2) as daemon:
        start = daemon.metrics()
        assert start.total("xdpvhost_xdp_verdicts_total", guest="vm1") == 0
        send(host, MAC1)
        daemon.wait_metric(COUNT, "xdpvhost_guest_drops_total", guest="vm1")
        send(host, "52:54:00:99:99:99")
        metrics = daemon.wait_metric(COUNT, "xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")
        verdicts = metrics.by("verdict", "xdpvhost_xdp_verdicts_total", guest="vm1")
        assert verdicts == {"redirect": COUNT, "no_socket": 0}
        assert metrics.total("xdpvhost_xsk_receive_packets_total", guest="vm1") == COUNT
        assert metrics.total("xdpvhost_xsk_receive_bytes_total", guest="vm1") == 64 * COUNT
        drops = metrics.by("reason", "xdpvhost_guest_drops_total", guest="vm1", direction="rx")
        assert {reason: count for reason, count in drops.items() if count} == {"not_connected": COUNT}
        assert metrics.total("xdpvhost_guest_rx_packets_total") == 0
        assert metrics.total("xdpvhost_copied_bytes_total") == 0
        assert metrics.total("xdpvhost_xdp_verdicts_total", guest="vm2") == 0
        assert metrics.total("xdpvhost_guest_drops_total", guest="vm2") == 0
        (vm1,) = (guest for guest in daemon.api("guest-list") if guest["name"] == "vm1")
        assert vm1["rx"]["drops"]["not_connected"] == COUNT


def test_guests_come_and_go(host: Host) -> None:
    with host.up() as daemon:
        path = daemon.socket("vm1")
        assert daemon.api("guest-list") == []
        daemon.cli("guest", "add", VM1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        added = json.loads(daemon.cli("guest", "add", VM2, "--json"))
        assert added["name"] == "vm2"
        send(host, MAC2)
        daemon.wait_metric(COUNT, "xdpvhost_xsk_receive_packets_total", guest="vm2")
        assert "vm1" in daemon.cli("guest", "list")
        daemon.cli("guest", "rm", "vm2")
        assert not daemon.socket("vm2").exists()
        assert "vm2" not in daemon.metrics().text
        send(host, MAC2)
        daemon.wait_metric(COUNT, "xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")
        daemon.cli("guest", "add", VM3)
        assert daemon.metrics().total("xdpvhost_xdp_verdicts_total", guest="vm3") == 0
        assert [guest["name"] for guest in daemon.api("guest-list")] == ["vm1", "vm3"]
        daemon.down()
        assert not path.exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (f"name=vm1,mac={MAC2}", "the name is in use"),
        (f"name=vm2,mac={MAC1}", "is taken by guest 'vm1'"),
        (f"name=vm2,mac={MAC2},socket=/no/such/directory/x.sock", "cannot listen on /no/such/directory/x.sock"),
        (f"name=vm2,mac={MAC2},socket=/etc/passwd", "/etc/passwd exists and is not a socket"),
    ],
)
def test_a_guest_that_is_refused_changes_nothing(host: Host, spec: str, words: str) -> None:
    with host.up(VM1) as daemon:
        before = daemon.api("guest-list")
        result = host.cli("guest", "add", spec, "--run-dir", daemon.run_dir)
        assert result.returncode == 2
        assert words in result.stderr
        assert daemon.api("guest-list") == before
        assert {dict(labels).get("guest") for _, labels in daemon.metrics().samples} == {None, "", "vm1"}
        send(host, MAC2)
        daemon.wait_metric(COUNT, "xdpvhost_xdp_verdicts_total", guest="", verdict="pass_unicast")


def test_removing_a_stranger(host: Host) -> None:
    with host.up(VM1) as daemon:
        result = host.cli("guest", "rm", "vm7", "--run-dir", daemon.run_dir)
        assert result.returncode == 2
        assert "guest 'vm7' does not exist; guests here: vm1" in result.stderr


def test_a_guests_nonsense_ends_its_connection_only(host: Host) -> None:
    with host.up(VM1, VM2) as daemon:
        with socket.socket(socket.AF_UNIX) as good, socket.socket(socket.AF_UNIX) as bad:
            good.connect(str(daemon.socket("vm1")))
            bad.connect(str(daemon.socket("vm2")))
            daemon.wait_connected("vm1")
            daemon.wait_connected("vm2")
            assert daemon.metrics().by("guest", "xdpvhost_guest_connected") == {"vm1": 1, "vm2": 1}
            bad.sendall(b"\xff" * 12)
            bad.settimeout(10)
            assert bad.recv(1) == b""
            daemon.wait_connected("vm2", connected=False)
            assert daemon.guest("vm1")["connected"]
        metrics = daemon.metrics()
        assert metrics.total("xdpvhost_guest_protocol_errors_total", guest="vm2", reason="header") == 1
        assert metrics.total("xdpvhost_guest_protocol_errors_total") == 1
        assert sum(daemon.guest("vm2")["protocol_errors"].values()) == 1
        with socket.socket(socket.AF_UNIX) as again:
            again.connect(str(daemon.socket("vm2")))
            daemon.wait_connected("vm2")
        assert daemon.metrics().total("xdpvhost_guest_reconnects_total", guest="vm2") == 1


def test_a_connected_guest_is_counted_both_ways(host: Host) -> None:
    """23 in, 23 out: frames, bytes and copied bytes agree everywhere, in metrics, status and stats."""
    with host.up(VM1, VM2) as daemon, NetDevice(daemon.socket("vm1")) as vm1:
        vm1.up()
        vm1.post(64)
        daemon.wait_connected("vm1")
        send(host, MAC1)
        assert len(vm1.receive(COUNT)) == COUNT
        with PacketSocket(host.net, "net0") as wire:
            for number in range(COUNT):
                vm1.send(udp_frame(host.net.mac("net0"), MAC1, number=number))
            wire.wait_received(MAC1, COUNT)
        metrics = daemon.wait_metric(COUNT, "xdpvhost_xsk_transmit_packets_total")
        for name in ("xdp_verdicts", "xsk_receive_packets", "guest_rx_packets", "guest_tx_packets"):
            assert metrics.total(f"xdpvhost_{name}_total", guest="vm1") == COUNT
        for name in ("xsk_receive_bytes", "guest_rx_bytes", "guest_tx_bytes", "copied_bytes"):
            assert metrics.total(f"xdpvhost_{name}_total", guest="vm1") == 64 * COUNT
        assert metrics.total("xdpvhost_xsk_transmit_bytes_total") == 64 * COUNT
        assert metrics.by("direction", "xdpvhost_copied_bytes_total") == {"guest": 64 * COUNT, "nic": 64 * COUNT}
        assert metrics.total("xdpvhost_guest_drops_total") == 0
        assert metrics.total("xdpvhost_guest_kicks_total", guest="vm1", direction="tx") > 0
        assert metrics.total("xdpvhost_guest_calls_total", guest="vm1", direction="rx") > 0
        guest = daemon.guest("vm1")
        assert (guest["rx"]["packets"], guest["tx"]["packets"], guest["rx"]["copied_bytes"]) == (
            COUNT,
            COUNT,
            64 * COUNT,
        )
        assert {"VERSION_1", "MRG_RXBUF"} <= set(guest["feature_names"])
        assert "VERSION_1" in daemon.cli("status")


def test_a_fault_in_a_ring_costs_its_guest_the_connection_and_nobody_else(host: Host) -> None:
    with (
        host.up(VM1, VM2) as daemon,
        NetDevice(daemon.socket("vm1")) as vm1,
        NetDevice(daemon.socket("vm2")) as vm2,
    ):
        vm1.up()
        vm1.post(64)
        vm2.up()
        vm2.tx().push(0x7FFF)
        vm2.tx().publish()
        assert vm2.front.disconnected()
        daemon.wait_connected("vm2", connected=False)
        assert daemon.metrics().total("xdpvhost_guest_protocol_errors_total", guest="vm2", reason="datapath") == 1
        assert "guest 'vm2': front-end disconnected: " in daemon.process.log()
        send(host, MAC1)
        assert len(vm1.receive(COUNT)) == COUNT
        with NetDevice(daemon.socket("vm2")) as again:
            again.up()
            again.post(64)
            send(host, MAC2)
            assert len(again.receive(COUNT)) == COUNT
        assert daemon.metrics().total("xdpvhost_guest_protocol_errors_total") == 1


def test_a_guest_is_removed_while_it_is_connected(host: Host) -> None:
    with host.up(VM1, VM2) as daemon, NetDevice(daemon.socket("vm1")) as vm1, NetDevice(daemon.socket("vm2")) as vm2:
        for device in (vm1, vm2):
            device.up()
            device.post(64)
        daemon.cli("guest", "rm", "vm1")
        assert vm1.front.disconnected()
        send(host, MAC2)
        assert len(vm2.receive(COUNT)) == COUNT
        daemon.down()
        assert vm2.front.disconnected()


def test_client_mode_waits_for_the_front_end(host: Host) -> None:
    path = host.directory / "theirs.sock"
    with host.up(f"{VM1},socket={path},socket-mode=client") as daemon:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(10)
            connection, _ = listener.accept()
            with connection:
                daemon.wait_connected("vm1")
            daemon.wait_connected("vm1", connected=False)
        daemon.down()
        assert path.exists()


# ---- two daemons, killed daemons


def test_one_daemon_an_interface_and_one_a_run_directory(host: Host) -> None:
    with host.up(VM1) as daemon:
        other = host.directory / "other"
        same_iface = host.cli("up", "--iface", "nic0", "--run-dir", other, "--metrics", "none")
        assert same_iface.returncode == 6
        assert f"another xdpvhost (pid {daemon.pid}) has interface nic0" in same_iface.stderr
        assert not other.exists()
        same_dir = host.cli("up", "--iface", "lo", "--run-dir", daemon.run_dir, "--metrics", "none")
        assert same_dir.returncode == 6
        assert f"another xdpvhost (pid {daemon.pid}) runs in {daemon.run_dir}" in same_dir.stderr
        refused = host.cli("clean", "--run-dir", daemon.run_dir)
        assert refused.returncode == 6
        assert daemon.guest("vm1")["name"] == "vm1"
        daemon.down()


def test_after_kill_9_up_works_again_and_leaves_nothing(host: Host) -> None:
    before = host.state()
    for _ in range(2):
        with host.up(VM1, VM2) as daemon:
            send(host, MAC1)
            daemon.wait_metric(COUNT, "xdpvhost_xdp_verdicts_total", guest="vm1", verdict="redirect")
            daemon.kill()
        assert (daemon.run_dir / "vm1.sock").exists()
        assert host.state() != before
    with host.up(VM1) as daemon:
        assert "left by a killed daemon" in daemon.process.log()
        assert not daemon.socket("vm2").exists()
        with socket.socket(socket.AF_UNIX) as front:
            front.connect(str(daemon.socket("vm1")))
            daemon.wait_connected("vm1")
        daemon.down()
    assert host.state() == before


def test_an_old_journal_does_not_take_down_a_nic_that_another_serves(host: Host) -> None:
    before = host.state()
    with host.up(VM1) as killed:
        killed.kill()
    with Daemon(host.nic, iface="nic0", guests=[VM1], run_dir=host.directory / "run") as daemon:
        old = host.directory / "old"
        old.mkdir(mode=0o755)
        where = json.loads((daemon.run_dir / "journal.jsonl").read_text().splitlines()[0])
        (old / "journal.jsonl").write_text(json.dumps({**where, "kind": "link_up"}) + "\n")
        refused = host.cli("clean", "--run-dir", old)
        assert refused.returncode == 3
        assert f"another xdpvhost (pid {daemon.pid}) has interface nic0" in refused.stderr
        assert host.state()["link"]["xdp"]["mode"] == 1
        assert "UP" in host.state()["link"]["flags"]
        daemon.down()
    assert host.state() == before


def test_kill_9_and_up_do_not_flap_the_link(host: Host) -> None:
    host.nic.ip("link", "set", "nic0", "down")
    before = host.state()
    with host.up(VM1) as daemon:
        daemon.kill()
    monitor = host.nic.start("ip", "monitor", "link", "dev", "nic0")
    with host.up(VM1) as daemon:
        assert "nic0: set down" not in daemon.process.log()
        assert "state DOWN" not in monitor.log()
        daemon.kill()
    with host.up(VM1) as daemon:
        daemon.down()
    assert host.state() == before


def test_clean_undoes_what_kill_9_left(host: Host) -> None:
    before = host.state()
    with host.up(VM1) as daemon:
        daemon.kill()
    result = host.cli("clean", "--run-dir", daemon.run_dir, "--json")
    assert result.returncode == 0, result.stderr
    undone = json.loads(result.stdout)
    assert all(fact["done"] for fact in undone)
    assert {"xdp", "socket"} <= {fact["what"] for fact in undone}
    assert host.state() == before
    assert not daemon.run_dir.exists()
    again = host.cli("clean", "--run-dir", daemon.run_dir)
    assert (again.returncode, again.stdout) == (0, "")


# ---- refusals of `up`; each leaves the NIC alone


def test_no_such_interface(host: Host) -> None:
    result = host.cli("up", "--iface", "nope0", "--run-dir", host.directory / "run")
    assert result.returncode == 3
    assert "'nope0' does not exist" in result.stderr
    assert not (host.directory / "run").exists()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--guest", f"{VM1},socket=/proc/x.sock"], 2, "cannot listen on /proc/x.sock"),
        (["--metrics", "192.0.2.1:9477"], 2, "cannot serve metrics on 192.0.2.1:9477"),
        (["--bind", "zerocopy"], 3, "zero-copy"),
    ],
)
def test_a_refused_start_leaves_the_nic_alone(host: Host, args: list[str], code: int, words: str) -> None:
    before = host.state()
    result = host.cli("up", "--iface", "nic0", "--run-dir", host.directory / "run", "--metrics", "none", *args)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert host.state() == before
    assert not (host.directory / "run").exists()


@pytest.mark.parametrize(
    ("drop", "named"),
    [
        ("net_admin", "CAP_NET_ADMIN"),
        ("net_raw", "CAP_NET_RAW"),
        ("perfmon,-sys_admin", "CAP_PERFMON or CAP_SYS_ADMIN"),
    ],
)
def test_a_missing_capability_is_named(host: Host, drop: str, named: str) -> None:
    argv = ("setpriv", f"--bounding-set=-{drop}", "--inh-caps=-all", "--", PROGRAM, "up", "--iface", "nic0")
    result = host.nic.run(*argv, check=False)
    assert result.returncode == 4
    assert f"lacks {named};" in result.stderr


def test_metrics_can_be_somewhere_else_or_nowhere(host: Host) -> None:
    with host.up(VM1, metrics="[::1]:0") as daemon:
        url = daemon.api("status")["metrics"]
        assert url.startswith("http://[::1]:")
        assert not url.startswith("http://[::1]:0/")
        daemon.down()
    with host.up(VM1, metrics="none") as daemon:
        daemon.metrics_address = "127.0.0.1:9477"
        assert daemon.api("status")["metrics"] is None
        with pytest.raises(urllib.error.URLError):
            daemon.metrics()


# ---- features, trace


def test_features(host: Host) -> None:
    before = host.state()
    found = {feature["name"]: feature for feature in json.loads(host.cli("features", "nic0", "--json").stdout)}
    assert all(feature["supported"] for feature in found.values() if feature["required"])
    assert "capabilities" in host.cli("features", "nic0").stdout
    assert host.state() == before
    missing = host.cli("features", "nope0")
    assert missing.returncode == 3
    assert "nope0" in missing.stderr


def test_trace_drops_names_guest_and_cause(host: Host) -> None:
    """The daemon stands still, so its guest's receive ring fills, and the kernel drops the rest."""
    with host.up(VM1, VM2) as daemon:
        tracer = host.nic.start(PROGRAM, "trace", "drops", "--json", "--run-dir", daemon.run_dir, separate_stdout=True)
        tracer.wait_line("tracing drops", 20)
        try:
            os.kill(daemon.pid, signal.SIGSTOP)
            sent = 0

            def lost() -> list[dict[str, Any]]:
                return [json.loads(line) for line in tracer.stdout_path.read_text().splitlines()]

            def some_lost() -> bool:
                nonlocal sent
                send(host, MAC2, 100)
                sent += 100
                return len(lost()) >= COUNT

            wait_for(some_lost, 20, "drops to be traced")
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        for drop in lost():
            assert (drop["kind"], drop["iface"], drop["guest"]) == ("redirect", "nic0", "vm2")
            assert drop["cause"] in ("rx_ring_full", "fill_ring_empty")
        tracer.send(signal.SIGINT)
        assert tracer.wait(10) == 0
        assert "vm2: " in tracer.log()
        traced = len(lost())
        metrics = daemon.metrics()
        kernel = metrics.by("reason", "xdpvhost_xsk_drops_total", guest="vm2")
        assert kernel["rx_ring_full"] + kernel["rx_dropped"] == traced
        daemon.wait_metric(sent - traced, "xdpvhost_xsk_receive_packets_total", guest="vm2")
