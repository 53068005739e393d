# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost up` on a physical card's driver: AF_XDP in zero-copy mode, beside another program in libxdp's dispatcher.

One daemon for the module: under emulation it takes long to start.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon
from support.frames import PacketSocket, udp_frame
from support.frontend import F_MRG_RXBUF, F_PACKED, F_PROTOCOL, F_VERSION_1, NetDevice
from support.machine_net import COUNT, DEADLINE, GUEST, NIC, WIRE, Root, cable_up, wait_carrier
from support.process import run, wait_for
from xdpvhost.xdp.features import probe

OTHER = "52:54:00:00:00:02"
SPECS = [f"name=vm1,mac={GUEST}", f"name=vm2,mac={OTHER}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    return Root("root", tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def daemon(root: Root) -> Iterator[Daemon]:
    """xdp-filter is on nic0 first and lets everything pass; then xdpvhost comes, and asks for zero-copy."""
    with cable_up():
        run(["xdp-filter", "load", "--mode", "native", "--policy", "allow", "--features", "ethernet", NIC])
        try:
            with Daemon(root, iface=NIC, guests=SPECS, options=["--bind", "zerocopy"], deadline=90) as made:
                wait_carrier(NIC)  # the driver resets the card when its rings change
                yield made
        finally:
            run(["xdp-filter", "unload", NIC])


def test_features_say_what_this_card_can() -> None:
    found = {feature.name: feature for feature in probe(NIC)}
    for name in ("native-xdp", "zero-copy", "dispatcher"):
        assert found[name].supported is True, found[name]


def test_status_says_zerocopy_and_native(daemon: Daemon) -> None:
    (nic,) = daemon.api("status")["nics"]
    facts = nic["facts"]
    assert (facts["xdp_in_use"], facts["bind_asked"], facts["bind_in_use"]) == ("native", "zerocopy", "zerocopy")
    assert facts["dispatcher"] is True


def test_the_other_program_is_still_there(daemon: Daemon) -> None:
    programs = run(["xdp-loader", "status", NIC]).stdout
    assert "xdpfilt_alw_eth" in programs
    assert "xdpvhost_steer" in programs


@pytest.mark.parametrize("layout", [F_MRG_RXBUF, F_PACKED], ids=["split", "packed"])
def test_frames_both_ways(daemon: Daemon, root: Root, layout: int) -> None:
    there = root.mac(WIRE)
    drops = daemon.metrics().total("xdpvhost_guest_drops_total")
    with (
        NetDevice(daemon.socket("vm1"), features=F_PROTOCOL | F_VERSION_1 | layout) as guest,
        PacketSocket(root, WIRE) as wire,
    ):
        guest.up()
        guest.post(64)
        for turn in range(2):  # the second finds a worker that has slept
            frames = [udp_frame(GUEST, there, number=100 * turn + n, size=60 + n) for n in range(COUNT)]
            wire.send(frames)
            # The card spreads over its queues, each of which keeps the order.
            assert sorted(f for _, f in guest.receive(COUNT, deadline=DEADLINE)) == sorted(frames)
            back = [udp_frame(there, GUEST, number=100 * turn + n, size=60 + n) for n in range(COUNT)]
            for frame in back:
                guest.send(frame)
            assert wire.wait_received(GUEST, COUNT * (turn + 1), DEADLINE)[COUNT * turn :] == back
            wait_for(lambda: guest.sent() or not guest.tx().chains, DEADLINE, "used transmit buffers")
    assert daemon.metrics().total("xdpvhost_guest_drops_total") == drops


def test_guest_to_guest_and_broadcast(daemon: Daemon, root: Root) -> None:
    there = root.mac(WIRE)
    with (
        NetDevice(daemon.socket("vm1")) as one,
        NetDevice(daemon.socket("vm2")) as two,
        PacketSocket(root, WIRE) as wire,
    ):
        for guest in (one, two):
            guest.up()
            guest.post(64)
        frames = [udp_frame(OTHER, GUEST, number=n, size=60 + n) for n in range(COUNT)]
        for frame in frames:
            one.send(frame)
        assert [f for _, f in two.receive(COUNT, deadline=DEADLINE)] == frames
        group = [udp_frame("ff:ff:ff:ff:ff:ff", there, number=n, size=60 + n) for n in range(COUNT)]
        wire.send(group)
        for guest in (one, two):
            assert [f for _, f in guest.receive(COUNT, deadline=DEADLINE)] == group


def test_the_card_is_given_back(daemon: Daemon) -> None:
    """Last in this file."""
    daemon.down(60)
    assert "is as it was" in daemon.process.log()
    programs = run(["xdp-loader", "status", NIC]).stdout
    assert "xdpfilt_alw_eth" in programs
    assert "xdpvhost_steer" not in programs
    assert not Path("/sys/fs/bpf/xdp").exists() or "xdpvhost" not in str(list(Path("/sys/fs/bpf/xdp").rglob("*")))
