# SPDX-License-Identifier: Apache-2.0
"""Real guests over the data plane's own tap, in a bridge with the NIC: TCP both ways, whole, with content checked."""

from collections.abc import Iterator

import pytest

from support.lab import HOST_IP, NET_IP, NET_IP6, Lab, guest_ip, spec
from support.process import wait_for
from support.uml import peer_program

BYTES = 256 << 20
PING = "ping -n -c 3 -i 0.1 -w 10"
OK = " 0% packet loss"


@pytest.fixture(scope="module")
def tapped() -> Iterator[Lab]:
    with Lab() as made:
        made.up([spec(1), spec(2)], ["--mode", "tap", "--serve", "vhost-user", "--force"])
        made.boot(1, 2)
        yield made


def test_reach(tapped: Lab) -> None:
    """The network, each other, and, as the bridge is the host's, the host as well."""
    for script in (f"{PING} {NET_IP}", f"{PING} -6 {NET_IP6}", f"{PING} {guest_ip(2)}", f"{PING} {HOST_IP}"):
        assert OK in tapped.guests[1].run(script, 15)
    for address in (guest_ip(1), guest_ip(2), HOST_IP):
        output = tapped.net.run(*PING.split(), address).stdout
        assert OK in output
        assert "DUP" not in output


def test_bulk_to_the_guest_is_whole(tapped: Lab) -> None:
    guest = tapped.guests[1]
    log = guest.spawn(f"peer receive {guest_ip(1)} 7001")
    wait_for(lambda: guest.call(f"grep -q listening {log}")[0] == 0, 10, "the receiver", interval=0.1)
    before = tapped.daemon.metrics()
    sent = tapped.net.run(peer_program(), "send", guest_ip(1), "7001", str(BYTES), "23", timeout=120).stdout
    wait_for(lambda: guest.call(f"grep -q ^{BYTES} {log}")[0] == 0, 20, "the receiver's checksum", interval=0.1)
    assert guest.run(f"tail -n 1 {log}") == sent
    name = "xdpvhost_guest_rx_packets_total"
    packets = tapped.daemon.metrics().total(name, guest="vm1") - before.total(name, guest="vm1")
    assert packets < BYTES / 15000, "frames of MTU size: they did not come whole"


def test_bulk_from_the_guest_is_whole(tapped: Lab) -> None:
    before = tapped.daemon.metrics()
    with tapped.net.start(peer_program(), "receive", NET_IP, "7002", env={"LC_ALL": "C"}) as receiver:
        receiver.wait_line("listening", 10)
        sent = tapped.guests[1].run(f"peer send {NET_IP} 7002 {BYTES} 29", 120)
        assert receiver.wait(10) == 0
        assert receiver.log().splitlines()[-1] == sent.strip()
    name = "xdpvhost_tap_transmit_gso_bytes_total"
    assert tapped.daemon.metrics().total(name) - before.total(name) > BYTES * 0.9


def test_nothing_went_wrong(tapped: Lab) -> None:
    for line in tapped.daemon.process.log().splitlines():
        assert " ERROR " not in line, line
        assert "Traceback" not in line, line
    metrics = tapped.daemon.metrics()
    assert metrics.total("xdpvhost_tap_receive_drops_total", reason="malformed") == 0
    assert metrics.total("xdpvhost_guest_drops_total", reason="bad_header") == 0
