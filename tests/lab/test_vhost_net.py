# SPDX-License-Identifier: Apache-2.0
"""The kernel's own back-end between a guest's rings and nic0's cable, over a bridged tap, or a macvtap."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.frames import PacketSocket, udp_frame
from support.machine_net import COUNT, DEADLINE, GUEST, NIC, WIRE, Root, cable_up, wait_carrier
from support.process import run, wait_for
from support.vhostnet import VhostNet, open_macvtap, open_tap


@contextmanager
def bridged_tap() -> Iterator[int]:
    """A tap and nic0 on a bridge."""
    with ExitStack() as stack:
        run(["ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0"])
        stack.callback(run, ["ip", "link", "del", "br0"])
        tap = open_tap("tap0")
        stack.callback(os.close, tap)
        for name in ("br0", "tap0"):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        for name in ("tap0", NIC):
            run(["ip", "link", "set", name, "master", "br0"])
        stack.callback(run, ["ip", "link", "set", NIC, "nomaster"])
        for name in ("br0", "tap0"):
            run(["ip", "link", "set", name, "up"])
        forwarding = Path(f"/sys/class/net/{NIC}/brport/state")
        wait_for(lambda: forwarding.read_text() == "3\n", DEADLINE, "the bridge to forward")
        yield tap


@contextmanager
def macvtap() -> Iterator[int]:
    """A macvtap with the guest's address on nic0."""
    run(["ip", "link", "add", "link", NIC, "name", "mv0", "address", GUEST, "type", "macvtap", "mode", "bridge"])
    try:
        Path("/proc/sys/net/ipv6/conf/mv0/disable_ipv6").write_text("1")
        run(["ip", "link", "set", "mv0", "up"])
        wait_carrier("mv0")
        fd = open_macvtap("mv0")
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        run(["ip", "link", "del", "mv0"])


@pytest.mark.parametrize("network", [bridged_tap, macvtap])
def test_frames_both_ways(network: object, tmp_path: Path) -> None:
    assert callable(network)
    root = Root("root", tmp_path)
    with cable_up(), network() as tap, VhostNet(tap=tap) as guest, PacketSocket(root, WIRE) as wire:
        guest.up()
        guest.post(64)
        workers = [entry for entry in Path("/proc/self/task").iterdir() if "vhost" in (entry / "comm").read_text()]
        assert workers, "vhost has no worker thread"
        there = root.mac(WIRE)
        frames = [udp_frame(GUEST, there, number=n, size=60 + n) for n in range(COUNT)]
        wire.send(frames)
        arrived = [frame for _, frame in guest.receive(COUNT, deadline=DEADLINE)]
        assert arrived == frames
        back = [udp_frame(there, GUEST, number=n, size=60 + n) for n in range(COUNT)]
        for frame in back:
            guest.send(frame)
        assert wire.wait_received(GUEST, COUNT, DEADLINE) == back
        wait_for(lambda: guest.sent() or not guest.tx().chains, DEADLINE, "used transmit buffers")


@pytest.mark.machine("bare")
def test_without_the_module_there_is_no_device() -> None:
    with pytest.raises(FileNotFoundError):
        VhostNet().up()
