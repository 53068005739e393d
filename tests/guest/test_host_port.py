# SPDX-License-Identifier: Apache-2.0
"""`--host-port`: a Linux guest, the host and the network behind the NIC, each reaching the others."""

from collections.abc import Iterator

import pytest

from support.lab import NET_IP, NET_IP6, Lab, guest_ip, guest_ip6, spec
from support.process import wait_for
from support.uml import peer_program

TAP, TAP_IP, TAP_IP6 = "xvh-nic0", "192.0.2.9", "2001:db8::9"
BYTES = 64 << 20
PING = "ping -n -c 3 -i 0.1 -w 10"
OK = " 0% packet loss"


@pytest.fixture(scope="module")
def joined() -> Iterator[Lab]:
    """The NIC has no addresses of its own: the host is in the guests' network by its port alone."""
    with Lab() as made:
        made.host.ip("addr", "flush", "dev", "nic0")
        made.host.run("sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1")
        made.up([spec(1), spec(2, extra=",isolated=on")], ["--host-port", "--workers", "2"])
        made.host.ip("link", "set", TAP, "up")
        made.host.ip("addr", "add", f"{TAP_IP}/24", "dev", TAP)
        made.host.ip("addr", "add", f"{TAP_IP6}/64", "dev", TAP, "nodad")
        made.boot(1, 2)
        yield made


def test_everybody_reaches_everybody(joined: Lab) -> None:
    guest = joined.guests[1]
    for script in (f"{PING} {TAP_IP}", f"{PING} -6 {TAP_IP6}", f"{PING} {NET_IP}"):
        assert OK in guest.run(script, 15)
    for where, addresses in (
        (joined.host, (guest_ip(1), guest_ip6(1), NET_IP, NET_IP6)),
        (joined.net, (guest_ip(1), TAP_IP, TAP_IP6)),
    ):
        for address in addresses:
            output = where.run(*PING.split(), address).stdout
            assert OK in output
            assert "DUP" not in output


def test_an_isolated_guest_has_the_network_only(joined: Lab) -> None:
    guest = joined.guests[2]
    assert OK in guest.run(f"{PING} {NET_IP}", 15)
    status, output = guest.call(f"ping -n -c 2 -i 0.2 -w 2 {TAP_IP}")
    assert status != 0
    assert "100% packet loss" in output


def test_bulk_both_ways(joined: Lab) -> None:
    """With all offloads: what the guest sends in large frames reaches the host in such."""
    guest = joined.guests[1]
    with joined.host.start(peer_program(), "receive", TAP_IP, "7003", env={"LC_ALL": "C"}) as receiver:
        receiver.wait_line("listening", 10)
        sent = guest.run(f"peer send {TAP_IP} 7003 {BYTES} 29", 120)
        assert receiver.wait(10) == 0
        assert receiver.log().splitlines()[-1] == sent.strip()
    metrics = joined.daemon.metrics()
    assert metrics.total("xdpvhost_tap_transmit_gso_bytes_total", iface=TAP) > BYTES * 0.9
    log = guest.spawn(f"peer receive {guest_ip(1)} 7004")
    wait_for(lambda: guest.call(f"grep -q listening {log}")[0] == 0, 10, "the receiver", interval=0.1)
    sent = joined.host.run(peer_program(), "send", guest_ip(1), "7004", str(BYTES), "23", timeout=120).stdout
    wait_for(lambda: guest.call(f"grep -q ^{BYTES} {log}")[0] == 0, 20, "the receiver's checksum", interval=0.1)
    assert guest.run(f"tail -n 1 {log}") == sent
