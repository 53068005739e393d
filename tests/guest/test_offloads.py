# SPDX-License-Identifier: Apache-2.0
"""A Linux guest with two queue pairs, its offloads switched by ethtool: content and the receiving kernels' counters."""

from collections.abc import Callable, Iterator

import pytest

from support.lab import NET_IP, Lab, guest_ip, spec
from support.process import wait_for
from support.uml import UmlGuest, peer_program

BYTES = 24 << 20
SETTINGS = {
    "all-on": "tx on sg on tso on gso on gro on rx-gro-hw on",
    "no-tx-checksum": "tx off sg on gso on gro on rx-gro-hw on",
    "no-segmentation": "tx on sg on tso off gso off gro on rx-gro-hw on",
    "no-scatter-gather": "tx on sg off gro on rx-gro-hw on",
    "nothing-merged-for-it": "tx on sg on tso on gso on gro on rx-gro-hw off",
    "all-off": "gso off tso off sg off tx off gro off rx-gro-hw off",
}


@pytest.fixture(scope="module", params=["auto", "none"], ids=["xdp", "no-xdp"])
def pair(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab() as made:
        made.up([spec(1, queues=2), spec(2)], ["--xdp-mode", request.param])
        made.boot(1, 2)
        yield made


@pytest.fixture(params=SETTINGS)
def switched(request: pytest.FixtureRequest, pair: Lab) -> Lab:
    """The first guest with one of the settings."""
    pair.guests[1].run(f"ethtool -K eth0 {SETTINGS[request.param]}")
    return pair


def tcp_errors(read: Callable[[str], str]) -> dict[str, int]:
    """Segments that a kernel found wrong: bad in any way, and by their checksum."""
    names, values = (line.split()[1:] for line in read("/proc/net/snmp").splitlines() if line.startswith("Tcp:"))
    found = dict(zip(names, map(int, values), strict=True))
    return {name: found[name] for name in ("InErrs", "InCsumErrors")}


def in_guest(guest: UmlGuest) -> Callable[[str], str]:
    return lambda path: guest.run(f"cat {path}")


def receive_in_guest(lab: Lab, number: int, port: int, send: Callable[[], str]) -> None:
    guest = lab.guests[number]
    before = tcp_errors(in_guest(guest))
    log = guest.spawn(f"peer receive {guest_ip(number)} {port}")
    wait_for(lambda: guest.call(f"grep -q listening {log}")[0] == 0, 10, "the receiver", interval=0.1)
    sent = send()
    wait_for(lambda: guest.call(f"grep -q ^{BYTES} {log}")[0] == 0, 30, "the receiver's checksum", interval=0.1)
    assert guest.run(f"tail -n 1 {log}").strip() == sent.strip()
    assert tcp_errors(in_guest(guest)) == before


def test_to_the_network(switched: Lab) -> None:
    def read(path: str) -> str:
        return switched.net.run("cat", path).stdout

    before = tcp_errors(read)
    with switched.net.start(peer_program(), "receive", NET_IP, "7001", env={"LC_ALL": "C"}) as receiver:
        receiver.wait_line("listening", 10)
        sent = switched.guests[1].run(f"peer send {NET_IP} 7001 {BYTES} 37", 60)
        assert receiver.wait(10) == 0
        assert receiver.log().splitlines()[-1] == sent.strip()
    assert tcp_errors(read) == before


def test_from_the_network(switched: Lab) -> None:
    def send() -> str:
        return switched.net.run(peer_program(), "send", guest_ip(1), "7002", str(BYTES), "41", timeout=60).stdout

    receive_in_guest(switched, 1, 7002, send)


def test_to_another_guest(switched: Lab) -> None:
    receive_in_guest(switched, 2, 7003, lambda: switched.guests[1].run(f"peer send {guest_ip(2)} 7003 {BYTES} 43", 60))


def test_from_another_guest(switched: Lab) -> None:
    receive_in_guest(switched, 1, 7004, lambda: switched.guests[2].run(f"peer send {guest_ip(1)} 7004 {BYTES} 47", 60))


def test_with_both_queue_pairs(pair: Lab) -> None:
    """Both are switched on by the guest, which has but one CPU; many flows use both transmit rings, and with XDP, where
    each of the NIC's queues has its pair, both receive rings.
    """
    guest = pair.guests[1]
    guest.run("ethtool -L eth0 combined 2")
    try:
        before = pair.daemon.metrics()
        with pair.net.start("iperf3", "-s", "-1", "--forceflush", env={"LC_ALL": "C"}) as server:
            server.wait_line("Server listening", 10)
            guest.run(f"iperf3 -c {NET_IP} -P 8 -n 16M --bidir", 60)
        after = pair.daemon.metrics()
        names = ["xdpvhost_guest_tx_packets_total", "xdpvhost_guest_rx_packets_total"]
        for name in names if pair.daemon.api("status")["nics"][0]["facts"]["xdp_in_use"] != "none" else names[:1]:
            moved = [after.total(name, guest="vm1", queue=q) - before.total(name, guest="vm1", queue=q) for q in (0, 1)]
            assert min(moved) > 0, name
    finally:
        guest.run("ethtool -L eth0 combined 1")
