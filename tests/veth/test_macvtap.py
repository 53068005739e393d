# SPDX-License-Identifier: Apache-2.0
"""Mode `macvtap` with frames, in each of its four modes; and mode `vhost-net` where there is no /dev/vhost-net."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from support.daemon import PROGRAM
from support.frames import PacketSocket, udp_frame
from support.linkhost import LinkHost, OpenTap, operstate
from support.netns import World
from support.process import wait_for

MAC1, MAC2 = (f"52:54:00:00:00:0{i}" for i in (1, 2))
VM1, VM2 = (f"name=vm{i},mac=52:54:00:00:00:0{i}" for i in (1, 2))
COUNT = 23


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


@pytest.mark.parametrize("mode", ["bridge", "private", "vepa", "passthru"])
def test_frames_pass_and_the_host_is_as_it_was(host: LinkHost, mode: str) -> None:
    before = host.state()
    nic_mac = host.nic.mac("nic0")
    with host.up("macvtap", [VM1], ["--macvtap-mode", mode]) as daemon:
        guest = daemon.guest("vm1")
        assert (guest["macvtap_mode_asked"], guest["macvtap_mode_in_use"]) == (mode, mode)
        assert not guest["connected"]
        assert host.nic.mac("nic0") == (MAC1 if mode == "passthru" else nic_mac)
        with OpenTap(host.nic, "tap-vm1", node=guest["node"]) as tap:
            both_ways(host, tap, MAC1)
            guest = daemon.guest("vm1")
            assert guest["connected"]
            assert guest["opened_by"][0].endswith(f"(pid {os.getpid()})")
        args = daemon.cli("qemu-args", "vm1")
        assert f"3<>{guest['node']}" in args
        assert "node" in daemon.cli("status")
        daemon.down()
    assert not Path(guest["node"]).exists()
    host.wait_as(before)


@pytest.mark.parametrize(("mode", "reach"), [("bridge", True), ("private", False), ("vepa", False)])
def test_whom_guests_reach(host: LinkHost, mode: str, reach: bool) -> None:
    with host.up("macvtap", [VM1, VM2], ["--macvtap-mode", mode]) as daemon:
        nodes = [daemon.guest(name)["node"] for name in ("vm1", "vm2")]
        with (
            OpenTap(host.nic, "tap-vm1", node=nodes[0]) as one,
            OpenTap(host.nic, "tap-vm2", node=nodes[1]) as two,
            PacketSocket(host.net, "net0") as wire,
        ):
            wait_for(lambda: operstate(host.nic, "tap-vm1") == "UP", 10, "the macvtap")
            frames = [udp_frame(MAC2, MAC1, number=n) for n in range(COUNT)]
            for frame in frames:
                one.send(frame)
            if reach:
                assert two.wait_received(MAC1, COUNT) == frames
                assert wire.received_from(MAC1) == []
            else:
                assert wire.wait_received(MAC1, COUNT) == frames
                assert [frame for frame in two.collect() if frame in frames] == []
        daemon.down()


def test_several_queues_and_an_owner(host: LinkHost) -> None:
    with host.up("macvtap", [f"{VM1},queues=2,owner=nobody,group=4711,tap=mine"]) as daemon:
        node = Path(daemon.guest("vm1")["node"])
        found = node.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (65534, 4711, 0o660)
        one, two = (OpenTap(host.nic, "mine", node=str(node)) for _ in range(2))
        one.close()
        two.close()
        assert "fds=3:4" in daemon.cli("qemu-args", "vm1")
        daemon.down()


# A /dev as a container has it: a tmpfs with a few nodes, where the kernel puts no new ones.
BARE_DEV = """
set -e
keep=$(mktemp -d)
mount --bind /dev "$keep"
mount -t tmpfs -o size=64k none /dev
mkdir /dev/net
for node in null urandom net/tun; do touch "/dev/$node"; mount --bind "$keep/$node" "/dev/$node"; done
umount -l "$keep"
rmdir "$keep"
exec "$@"
"""


def test_without_a_devtmpfs_the_node_is_made(host: LinkHost) -> None:
    before = host.state()
    up = [str(PROGRAM), "up", "--iface", "nic0", "--mode", "macvtap", "--metrics", "none"]
    command = ["unshare", "--mount", "--", "sh", "-c", BARE_DEV, "sh", *up, "--guest", f"{VM1},group=4711"]
    process = host.nic.start(*command, "--run-dir", str(host.run_dir), own_sysfs=True)
    try:
        process.wait_line(r"\bready: ", 20)
        (guest,) = json.loads(host.cli("guest", "list", "--json", "--run-dir", host.run_dir).stdout)
        node = Path(f"/proc/{process.pid}/root{guest['node']}")
        found = node.stat()
        assert (stat.S_ISCHR(found.st_mode), stat.S_IMODE(found.st_mode), found.st_gid) == (True, 0o660, 4711)
        with OpenTap(host.nic, "tap-vm1", node=str(node)) as tap:
            both_ways(host, tap, MAC1)
    finally:
        process.close(grace=10)
    assert f"{guest['node']}: is gone" not in process.log()
    assert "nic0 is as it was" in process.log()
    host.wait_as(before)


def test_after_kill_9(host: LinkHost) -> None:
    """The next `up` takes over the device, with a virtual machine on it; `clean` takes it away."""
    before = host.state()
    with host.up("macvtap", [VM1]) as daemon:
        node = daemon.guest("vm1")["node"]
        with OpenTap(host.nic, "tap-vm1", node=node) as tap:
            daemon.kill()
            with host.up("macvtap", [VM1]) as second:
                assert second.guest("vm1")["node"] == node
                both_ways(host, tap, MAC1)
                second.kill()
    result = host.cli("clean", "--run-dir", host.run_dir)
    assert result.returncode == 0, result.stderr
    assert "macvtap tap-vm1: deleted" in result.stdout
    host.wait_as(before)
    assert not Path(node).exists()


def test_passthru_after_kill_9_gives_the_address_back(host: LinkHost) -> None:
    before = host.state()
    with host.up("macvtap", [VM1], ["--macvtap-mode", "passthru"]) as daemon:
        assert host.nic.mac("nic0") == MAC1
        daemon.kill()
        with host.up("macvtap", [VM1], ["--macvtap-mode", "passthru"]) as second:
            assert host.nic.mac("nic0") == MAC1
            second.kill()
    assert host.cli("clean", "--run-dir", host.run_dir).returncode == 0
    host.wait_as(before)


def test_passthru_takes_the_nic_from_the_host(host: LinkHost) -> None:
    host.nic.ip("addr", "add", "192.0.2.2/24", "dev", "nic0")
    before = host.state()
    arguments = ["--mode", "macvtap", "--macvtap-mode", "passthru", "--guest", VM1]
    assert "has 192.0.2.2/24, which would stop working" in host.refused(*arguments, status=3)
    with host.up("macvtap", [VM1], ["--macvtap-mode", "passthru", "--force"]) as daemon:
        refused = host.cli("guest", "add", VM2, "--run-dir", daemon.run_dir)
        assert refused.returncode == 2
        assert "guest 'vm1' has interface nic0 for itself" in refused.stderr
        daemon.down()
    host.wait_as(before)


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--guest", f"{VM1},tap=lo"], 3, "there is an interface lo already"),
        (["--guest", VM1, "--guest", f"{VM2},tap=lo"], 3, "there is an interface lo already"),
        (["--bridge", "br0"], 2, "--bridge: means nothing in mode macvtap"),
        (["--macvtap-mode", "passthru", "--guest", VM1, "--guest", VM2], 2, "to one guest"),
    ],
)
def test_what_is_refused_changes_nothing(host: LinkHost, args: list[str], status: int, words: str) -> None:
    before = host.state()
    assert words in host.refused("--mode", "macvtap", *args, status=status)
    host.wait_as(before)
    assert not host.run_dir.exists()


def test_a_port_of_a_bridge_is_refused(host: LinkHost) -> None:
    host.nic.ip("link", "add", "br7", "type", "bridge")
    host.nic.ip("link", "set", "nic0", "master", "br7")
    assert "is a port of another interface" in host.refused("--mode", "macvtap", "--guest", VM1, status=3)


def test_vhost_net_that_is_missing_is_named(host: LinkHost) -> None:
    """Kernels with vhost_net are the lab's; this one has none."""
    assert not Path("/dev/vhost-net").exists(), "this machine has vhost-net: run the tests of mode vhost-net on it"
    before = host.state()
    words = host.refused("--mode", "vhost-net", "--guest", VM1, status=3)
    assert "/dev/vhost-net: No such file or directory" in words
    assert "vhost_net" in words
    host.wait_as(before)
    features = host.cli("features", "nic0")
    lines = [" ".join(line.replace("│", " ").split()) for line in features.stdout.splitlines()]
    assert any(line.startswith("mode-vhost-net no /dev/vhost-net") for line in lines), features.stdout
    for mode in ("tap", "macvtap", "emulated"):
        assert any(line.startswith(f"mode-{mode} yes") for line in lines), features.stdout


def test_emulated_is_a_tap(host: LinkHost) -> None:
    before = host.state()
    with host.up("emulated", [VM1]) as daemon:
        with OpenTap(host.nic, "tap-vm1") as tap:
            wait_for(lambda: operstate(host.nic, "xvbr-nic0") == "UP", 10, "the bridge")
            both_ways(host, tap, MAC1)
        assert "e1000e" in daemon.cli("qemu-args", "vm1")
        daemon.down()
    host.wait_as(before)


def test_there_are_no_workers_to_rebalance(host: LinkHost) -> None:
    with host.up("macvtap", [VM1]):
        refused = host.cli("rebalance", "--run-dir", host.run_dir)
        assert refused.returncode == 2
        assert "in mode macvtap: it has no workers" in refused.stderr
