# SPDX-License-Identifier: Apache-2.0
"""`--xdp-mode none`: guests' frames come and go by packet sockets, so that a local sender's GSO frames stay whole."""

from collections.abc import Iterator

import pytest

from support.lab import HOST_IP, NET_IP, NET_IP6, Lab, guest_ip, spec
from support.process import wait_for
from support.uml import peer_program

BYTES = 256 << 20
PING = "ping -n -c 3 -i 0.1 -w 10"
OK = " 0% packet loss"


@pytest.fixture(scope="module")
def bare() -> Iterator[Lab]:
    with Lab() as made:
        made.up([spec(1), spec(2)], ["--xdp-mode", "none"])
        made.boot(1, 2)
        yield made


def test_no_program_is_on_the_nic_and_the_sender_keeps_its_offload(bare: Lab) -> None:
    (link,) = bare.host.json("ip", "-j", "link", "show", "dev", "nic0")
    assert "xdp" not in link
    assert "tcp-segmentation-offload: on" in bare.net.run("ethtool", "-k", "eth0").stdout
    (nic,) = bare.daemon.api("status")["nics"]
    assert (nic["facts"]["xdp_asked"], nic["facts"]["xdp_in_use"]) == ("none", "none")


def test_reach(bare: Lab) -> None:
    """By ARP and neighbour discovery, whose answers are unicast; the host is reached, too, and nobody answers twice."""
    for script in (f"{PING} {NET_IP}", f"{PING} -6 {NET_IP6}", f"{PING} {guest_ip(2)}"):
        assert OK in bare.guests[1].run(script, 15)
    for address in (guest_ip(1), guest_ip(2), HOST_IP):
        output = bare.net.run(*PING.split(), address).stdout
        assert OK in output
        assert "DUP" not in output


def test_bulk_to_the_guest_is_whole(bare: Lab) -> None:
    guest = bare.guests[1]
    log = guest.spawn(f"peer receive {guest_ip(1)} 7001")
    wait_for(lambda: guest.call(f"grep -q listening {log}")[0] == 0, 10, "the receiver", interval=0.1)
    before = bare.daemon.metrics()
    sent = bare.net.run(peer_program(), "send", guest_ip(1), "7001", str(BYTES), "23", timeout=120).stdout
    wait_for(lambda: guest.call(f"grep -q ^{BYTES} {log}")[0] == 0, 20, "the receiver's checksum", interval=0.1)
    assert guest.run(f"tail -n 1 {log}") == sent
    name = "xdpvhost_guest_rx_packets_total"
    packets = bare.daemon.metrics().total(name, guest="vm1") - before.total(name, guest="vm1")
    assert packets < BYTES / 15000, "frames of MTU size: they did not come whole"


def test_bulk_from_the_guest_is_whole(bare: Lab) -> None:
    before = bare.daemon.metrics()
    with bare.net.start(peer_program(), "receive", NET_IP, "7002", env={"LC_ALL": "C"}) as receiver:
        receiver.wait_line("listening", 10)
        sent = bare.guests[1].run(f"peer send {NET_IP} 7002 {BYTES} 29", 120)
        assert receiver.wait(10) == 0
        assert receiver.log().splitlines()[-1] == sent.strip()
    name = "xdpvhost_nic_gso_bytes_total"
    assert bare.daemon.metrics().total(name) - before.total(name) > BYTES * 0.9


def test_a_guest_that_is_removed_hears_nothing_more(bare: Lab) -> None:
    """Its socket is closed, the other guest's goes on."""
    bare.daemon.cli("guest", "add", "name=vm3,mac=52:54:00:00:00:03")
    bare.daemon.cli("guest", "rm", "vm3")
    assert OK in bare.net.run(*PING.split(), guest_ip(1)).stdout
    for line in bare.daemon.process.log().splitlines():
        assert " ERROR " not in line, line
        assert "Traceback" not in line, line
