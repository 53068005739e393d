# SPDX-License-Identifier: Apache-2.0
"""Known workload first: 23 frames, and every counter on the way says 23. The guest is DPDK's virtio driver."""

from collections.abc import Mapping
from itertools import combinations

import pytest
from _pytest.mark import ParameterSet

from support.frames import PacketSocket, set_transmit_queue, udp_frame
from support.lab import Lab, guest_mac, spec
from support.netns import QUEUES
from support.testpmd import TestPmd, VirtioUser

COUNT = 23
SIZE = 64

SWITCHES = ("packed_vq", "mrg_rxbuf", "in_order", "vectorized")


def shape(pairs: int, *chosen: str) -> ParameterSet:
    """One way for DPDK's driver to go: its data path depends on all four switches."""
    switches = {switch: switch in chosen for switch in SWITCHES}
    return pytest.param(
        pairs,
        switches,
        id="-".join(
            [f"{pairs}-pairs", "packed" if "packed_vq" in chosen else "split", *(c for c in chosen if c != "packed_vq")]
        ),
    )


shapes = pytest.mark.parametrize(
    ("pairs", "switches"),
    [
        shape(pairs, *chosen)
        for pairs in (1, 4)
        for n in range(len(SWITCHES) + 1)
        for chosen in combinations(SWITCHES, n)
    ],
)


def start(lab: Lab, pairs: int, switches: Mapping[str, bool]) -> TestPmd:
    daemon = lab.up([spec(1, queues=pairs)])
    port = VirtioUser(daemon.socket("vm1"), guest_mac(1), queues=pairs, **switches)
    pmd = TestPmd([port], directory=lab.directory, mode="rxonly")
    lab.world.stack.callback(pmd.close)
    daemon.wait_connected("vm1")
    return pmd


@shapes
def test_receives_23_frames_on_each_nic_queue(quiet_lab: Lab, pairs: int, switches: Mapping[str, bool]) -> None:
    pmd = start(quiet_lab, pairs, switches)
    pmd.start()
    source = quiet_lab.net_mac
    total = COUNT * QUEUES
    with PacketSocket(quiet_lab.net, "eth0") as wire:
        for queue in range(QUEUES):
            set_transmit_queue(quiet_lab.net, "eth0", queue)
            wire.send(udp_frame(guest_mac(1), source, size=SIZE, number=n) for n in range(COUNT))
    stats = pmd.wait_received(total)
    assert (stats.rx_packets, stats.rx_bytes, stats.rx_errors, stats.rx_nombuf) == (total, total * SIZE, 0, 0)

    scrape = quiet_lab.daemon.wait_metric(total, "xdpvhost_guest_rx_packets_total", guest="vm1")
    each = {str(queue): COUNT for queue in range(QUEUES)}
    nic = {"iface": "nic0", "guest": "vm1"}
    assert scrape.by("queue", "xdpvhost_xdp_verdicts_total", verdict="redirect", **nic) == each
    assert scrape.total("xdpvhost_xdp_verdicts_total", verdict="no_socket", **nic) == 0
    assert scrape.by("queue", "xdpvhost_xsk_receive_packets_total", **nic) == each
    assert scrape.total("xdpvhost_xsk_receive_bytes_total", **nic) == total * SIZE
    assert scrape.total("xdpvhost_xsk_drops_total", **nic) == 0
    by_pair = {str(pair): total // pairs for pair in range(pairs)}
    assert scrape.by("queue", "xdpvhost_guest_rx_packets_total", guest="vm1") == by_pair
    assert scrape.total("xdpvhost_guest_rx_bytes_total", guest="vm1") == total * SIZE
    assert scrape.total("xdpvhost_copied_bytes_total", direction="guest", guest="vm1") == total * SIZE
    assert scrape.total("xdpvhost_guest_drops_total", guest="vm1") == 0
    if pairs > 1:
        xstats = pmd.xstats()
        assert [xstats[f"rx_q{pair}_good_packets"] for pair in range(pairs)] == [COUNT] * pairs


@shapes
def test_transmits_23_frames_from_each_pair(quiet_lab: Lab, pairs: int, switches: Mapping[str, bool]) -> None:
    pmd = start(quiet_lab, pairs, switches)
    total = COUNT * pairs
    with PacketSocket(quiet_lab.net, "eth0") as wire:
        pmd.send(COUNT, size=SIZE, destination=quiet_lab.net_mac)
        frames = wire.wait_received(guest_mac(1), total)
    assert len(frames) == total
    assert {len(frame) for frame in frames} == {SIZE}
    assert pmd.stats().tx_packets == total

    scrape = quiet_lab.daemon.wait_metric(total, "xdpvhost_guest_tx_packets_total", guest="vm1")
    each = {str(pair): COUNT for pair in range(pairs)}
    assert scrape.by("queue", "xdpvhost_guest_tx_packets_total", guest="vm1") == each
    assert scrape.total("xdpvhost_guest_tx_bytes_total", guest="vm1") == total * SIZE
    assert scrape.total("xdpvhost_guest_drops_total", guest="vm1") == 0
    assert scrape.total("xdpvhost_xsk_transmit_packets_total", iface="nic0") == total
    assert scrape.total("xdpvhost_xsk_transmit_bytes_total", iface="nic0") == total * SIZE
    assert scrape.total("xdpvhost_copied_bytes_total", direction="nic", iface="nic0") == total * SIZE
    assert scrape.total("xdpvhost_nic_drops_total", iface="nic0") == 0


def test_frames_for_others_do_not_reach_the_guest(quiet_lab: Lab) -> None:
    """Unknown unicast is the host's; the guest's 23 come after it, so that nothing is waited for in vain."""
    pmd = start(quiet_lab, 1, {})
    pmd.start()
    with PacketSocket(quiet_lab.net, "eth0") as wire, PacketSocket(quiet_lab.host, "nic0") as host:
        wire.send(udp_frame("52:54:00:00:00:99", quiet_lab.net_mac, number=n) for n in range(COUNT))
        wire.send(udp_frame(guest_mac(1), quiet_lab.net_mac, number=n) for n in range(COUNT))
        assert pmd.wait_received(COUNT).rx_packets == COUNT
        assert len(host.wait_received(quiet_lab.net_mac, COUNT)) == COUNT
    scrape = quiet_lab.daemon.metrics()
    assert scrape.total("xdpvhost_xdp_verdicts_total", verdict="pass_unicast") == COUNT
    assert scrape.total("xdpvhost_xdp_verdicts_total", verdict="redirect", guest="vm1") == COUNT


def test_guest_to_guest_23_frames(quiet_lab: Lab) -> None:
    """From one guest's memory into the other's: one copy, and the NIC sees nothing."""
    daemon = quiet_lab.up([spec(1), spec(2)])
    ports = [VirtioUser(daemon.socket(f"vm{n}"), guest_mac(n)) for n in (1, 2)]
    with (
        TestPmd(ports[:1], directory=quiet_lab.directory) as first,
        TestPmd(ports[1:], directory=quiet_lab.directory) as second,
    ):
        daemon.wait_connected("vm1")
        daemon.wait_connected("vm2")
        second.start()
        first.send(COUNT, size=SIZE, destination=guest_mac(2))
        assert second.wait_received(COUNT).rx_packets == COUNT
    scrape = daemon.metrics()
    assert scrape.total("xdpvhost_guest_tx_packets_total", guest="vm1") == COUNT
    assert scrape.total("xdpvhost_guest_rx_packets_total", guest="vm2") == COUNT
    assert scrape.total("xdpvhost_copied_bytes_total", direction="guest", guest="vm2") == COUNT * SIZE
    assert scrape.total("xdpvhost_copied_bytes_total", direction="nic") == 0
    assert scrape.total("xdpvhost_xsk_transmit_packets_total") == 0
