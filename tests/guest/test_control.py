# SPDX-License-Identifier: Apache-2.0
"""Linux's own driver with the control virtqueue at the back-end (User-Mode Linux): `ip` and `ethtool` in the guest."""

import re
from collections.abc import Iterator

import pytest

from support.frames import PacketSocket, udp_frame
from support.lab import NET_IP, Lab, guest_ip, guest_mac, spec
from support.process import wait_for

NEW_MAC = "52:54:00:00:0a:0a"
GROUP = "01:00:5e:01:02:03"
SOURCE = "02:00:00:00:00:77"
COUNT = 23


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Guest 1 has two queue pairs and may change its address, guest 2 may not."""
    with Lab() as made:
        made.up([spec(1, queues=2, extra=",mac-change=allow"), spec(2)])
        made.boot(1, 2)
        yield made


def commands(lab: Lab, number: int, kind: str, result: str = "ok") -> float:
    return lab.daemon.metrics().total(
        "xdpvhost_guest_control_commands_total", guest=f"vm{number}", result=result, **{"class": kind}
    )


def filtered(lab: Lab, number: int) -> float:
    return lab.daemon.metrics().total("xdpvhost_guest_drops_total", guest=f"vm{number}", reason="filtered")


def pings(lab: Lab) -> None:
    """With neighbours learned anew, both ways."""
    lab.net.ip("neigh", "flush", "dev", "eth0")
    lab.guests[1].run("ip neigh flush dev eth0")
    output = lab.guests[1].run(f"ping -n -c 5 -i 0.1 -w 10 {NET_IP}", 15)
    assert " 0% packet loss" in output, output
    output = lab.net.run("ping", "-n", "-c", "5", "-i", "0.1", "-w", "10", guest_ip(1)).stdout
    assert " 0% packet loss" in output, output


def test_nothing_of_the_drivers_start_was_refused(lab: Lab) -> None:
    for number in (1, 2):
        for kind in ("rx", "mac", "vlan", "mq", "announce", "guest_offloads", "other"):
            assert commands(lab, number, kind, "refused") == 0, kind
        assert commands(lab, number, "rx") > 0
        assert commands(lab, number, "mac") > 0
    assert commands(lab, 1, "mq") > 0


def test_the_guests_address(lab: Lab) -> None:
    guest = lab.guests[1]
    guest.run(f"ip link set dev eth0 address {NEW_MAC}")
    try:
        assert lab.daemon.guest("vm1")["listens_to"] == sorted([guest_mac(1), NEW_MAC])
        pings(lab)
        neighbours = {n["dst"]: n for n in lab.net.json("ip", "-j", "neigh", "show", "dev", "eth0")}
        assert neighbours[guest_ip(1)]["lladdr"] == NEW_MAC
    finally:
        guest.run(f"ip link set dev eth0 address {guest_mac(1)}")
    assert lab.daemon.guest("vm1")["listens_to"] == [guest_mac(1)]
    pings(lab)


def test_an_address_that_it_may_not_have(lab: Lab) -> None:
    for number, mac in ((2, NEW_MAC), (1, guest_mac(2)), (1, lab.host.mac("nic0"))):
        status, output = lab.guests[number].call(f"ip link set dev eth0 address {mac}")
        assert status != 0, output
        assert lab.guests[number].mac() == guest_mac(number)
    pings(lab)


def test_groups_and_modes(lab: Lab) -> None:
    """Only what the guest listens to is delivered; the rest is counted as filtered."""
    steps = [
        ("true", False),
        (f"ip maddr add {GROUP} dev eth0", True),
        (f"ip maddr del {GROUP} dev eth0", False),
        ("ip link set dev eth0 allmulticast on", True),
        ("ip link set dev eth0 allmulticast off", False),
        ("ip link set dev eth0 promisc on", True),
        ("ip link set dev eth0 promisc off", False),
    ]
    guest = lab.guests[1]
    for script, wanted in steps:
        done = commands(lab, 1, "rx") + commands(lab, 1, "mac")
        guest.run(script)
        if script != "true":  # newer drivers do it in a work queue
            wait_for(
                lambda done=done: commands(lab, 1, "rx") + commands(lab, 1, "mac") > done, 5, f"the effect of: {script}"
            )
        before, there = filtered(lab, 2), filtered(lab, 1)
        with PacketSocket(lab.net, "eth0") as wire:
            wire.send(udp_frame(GROUP, SOURCE, number=number) for number in range(COUNT))
        wait_for(lambda before=before: filtered(lab, 2) - before >= COUNT, 5, "23 frames that guest 2 does not want")
        kept_away = filtered(lab, 1) - there
        assert (kept_away < COUNT) if wanted else (kept_away >= COUNT), (script, kept_away)


def test_offloads_at_run_time(lab: Lab) -> None:
    """What the driver of this kernel can switch by the control virtqueue: GRO in hardware, that is GUEST_TSO."""
    guest = lab.guests[1]
    shown = guest.run("ethtool -k eth0")
    names = [
        name for name in ("rx-gro-hw", "large-receive-offload") if re.search(rf"^{name}: \w+(?! \[fixed)$", shown, re.M)
    ]
    if not names:
        pytest.fail(f"this kernel's driver switches no offload at run time:\n{shown}")
    for word in ("off", "on"):
        done = commands(lab, 1, "guest_offloads")
        guest.run(f"ethtool -K eth0 {names[0]} {word}")
        assert commands(lab, 1, "guest_offloads") == done + 1
        pings(lab)
    assert commands(lab, 1, "guest_offloads", "refused") == 0


def test_carrier(lab: Lab) -> None:
    """The network's end goes down; the driver hears of it by CONFIG_CHANGE_MSG and reads its configuration space."""
    guest = lab.guests[2]
    speed = guest.run("cat /sys/class/net/eth0/speed").strip()
    assert speed == "10000", "what a veth says of itself"
    lab.net.ip("link", "set", "eth0", "down")
    try:
        wait_for(lambda: guest.call("grep -q 0 /sys/class/net/eth0/carrier")[0] == 0, 10, "the carrier to be lost")
    finally:
        lab.net.ip("link", "set", "eth0", "up")
    wait_for(lambda: guest.call("grep -q 1 /sys/class/net/eth0/carrier")[0] == 0, 10, "the carrier to be back")


def test_rss(lab: Lab) -> None:
    guest = lab.guests[1]
    done = commands(lab, 1, "mq")
    guest.run("ethtool -L eth0 combined 2")
    assert lab.daemon.guest("vm1")["pairs_in_use"] == 2
    table = guest.run("ethtool -x eth0")
    assert "RX flow hash indirection table for eth0 with 2 RX ring(s)" in table
    guest.run("ethtool -X eth0 equal 2")
    assert commands(lab, 1, "mq") > done
    assert commands(lab, 1, "mq", "refused") == 0
    pings(lab)
    before = lab.daemon.metrics()
    with PacketSocket(lab.net, "eth0") as wire:
        wire.send(udp_frame(guest_mac(1), SOURCE, number=number, ports=(1000 + number, 9)) for number in range(64))
    name = "xdpvhost_guest_rx_packets_total"

    def spread() -> bool:
        now = lab.daemon.metrics()
        moved = [now.total(name, guest="vm1", queue=q) - before.total(name, guest="vm1", queue=q) for q in "01"]
        return sum(moved) >= 64 and min(moved) > 8

    wait_for(spread, 5, "64 flows in two queues")
