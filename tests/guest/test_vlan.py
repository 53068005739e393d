# SPDX-License-Identifier: Apache-2.0
"""Linux guests (User-Mode Linux) that are access ports, and are changed by `guest set` while they run."""

import json
from collections.abc import Iterator

import pytest

from support.lab import NET_IP, Lab, guest_ip, spec
from support.process import wait_for


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Guests 1 and 2 are in VLAN 10, guest 3 is transparent, as the network's own end of the veth is untagged."""
    with Lab(quiet=True) as made:
        made.up([spec(1, extra=",vlan=10"), spec(2, extra=",vlan=10"), spec(3)])
        made.boot(1, 2, 3)
        yield made


def reaches(lab: Lab, number: int, ip: str) -> bool:
    """Whether a guest's ping is answered, with neighbours learned anew."""
    guest = lab.guests[number]
    guest.run("ip neigh flush dev eth0")
    return guest.call(f"ping -n -c 3 -i 0.2 -W 2 {ip}")[0] == 0


def put(lab: Lab, number: int, *changes: str) -> None:
    lab.daemon.cli("guest", "set", f"vm{number}", *changes)


def test_access_ports_are_a_network_of_their_own(lab: Lab) -> None:
    assert reaches(lab, 1, guest_ip(2))
    assert not reaches(lab, 1, guest_ip(3))
    assert not reaches(lab, 1, NET_IP)
    assert reaches(lab, 3, NET_IP)
    assert not reaches(lab, 3, guest_ip(1))


def test_a_guest_moves_to_another_vlan_while_it_runs(lab: Lab) -> None:
    put(lab, 2, "vlan=20")
    try:
        assert not reaches(lab, 1, guest_ip(2))
        put(lab, 1, "vlan=")
        assert reaches(lab, 1, NET_IP)
        assert reaches(lab, 1, guest_ip(3))
        assert not reaches(lab, 1, guest_ip(2))
    finally:
        put(lab, 1, "vlan=10")
        put(lab, 2, "vlan=10")
    assert reaches(lab, 1, guest_ip(2))
    for number in (1, 2, 3):
        guest = lab.daemon.guest(f"vm{number}")
        assert (guest["connected"], guest["reconnects"], guest["protocol_errors"]) == (True, 0, {})


def test_the_driver_sees_its_link_go(lab: Lab) -> None:
    carrier = "grep -q {} /sys/class/net/eth0/carrier"
    put(lab, 2, "link=off")
    try:
        wait_for(lambda: lab.guests[2].call(carrier.format(0))[0] == 0, 10, "the carrier to be lost")
        assert not reaches(lab, 1, guest_ip(2))
    finally:
        put(lab, 2, "link=on")
    wait_for(lambda: lab.guests[2].call(carrier.format(1))[0] == 0, 10, "the carrier to be back")
    assert reaches(lab, 1, guest_ip(2))


def test_it_uses_its_own_ip_addresses_only(lab: Lab) -> None:
    def spoofed() -> int:
        return lab.daemon.metrics().total("xdpvhost_guest_drops_total", guest="vm3", reason="ip_spoofed")

    guest, other = lab.guests[3], "192.0.2.99"
    ping = f"ping -n -c 3 -i 0.2 -W 2 -I {other} {NET_IP}"
    guest.run(f"ip addr add {other}/24 dev eth0")
    try:
        assert guest.call(ping)[0] == 0, "nothing is checked"
        put(lab, 3, f"address={guest_ip(3)}")
        before = spoofed()
        lab.net.ip("neigh", "flush", "dev", "eth0")
        assert guest.call(ping)[0] != 0
        assert spoofed() > before
        assert reaches(lab, 3, NET_IP), "from its own"
        put(lab, 3, f"address={guest_ip(3)}+{other}")
        assert guest.call(ping)[0] == 0
    finally:
        put(lab, 3, "address=")
        guest.run(f"ip addr del {other}/24 dev eth0")


def test_limits_hold_for_tcp(lab: Lab) -> None:
    """What waits in the guest's ring is not lost, so TCP fills the limit; towards the guest, it is found by losses."""
    limit = 50_000_000
    put(lab, 3, "tx-rate=50M", "rx-rate=50M", "rx-burst=256K")
    try:
        for way, least in (("", 0.6), ("-R", 0.2)):
            with lab.net.start("iperf3", "-s", "-1", "--forceflush") as server:
                server.wait_line("listening", 10)
                report = json.loads(lab.guests[3].run(f"iperf3 -c {NET_IP} -t 3 -J {way}", 40))
            rate = report["end"]["sum_received"]["bits_per_second"]
            assert least * limit < rate < 1.1 * limit, f"{rate / 1e6:.1f} Mbit/s {way}"
        drops = lab.daemon.guest("vm3")
        assert drops["tx"]["drops"]["no_frames"] == 0
    finally:
        put(lab, 3, "tx-rate=,rx-rate=,rx-burst=")
