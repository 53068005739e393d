# SPDX-License-Identifier: Apache-2.0
"""Traffic between a guest and the network, checked by its content and in the daemon's counters.

A guest here is whatever runs shell scripts and has `peer` (support/uml.py); the network is a namespace.
"""

import re

from .daemon import Daemon, Metrics
from .netns import Namespace
from .process import wait_for
from .uml import UmlGuest, peer_program

# An emulated guest may take longer than the interval to answer.
PING = ("ping", "-n", "-c", "3", "-i", "0.05", "-W", "5")
STREAM = 1_000_000
GRACE = 15.0


def no_loss(output: str) -> None:
    assert re.search(r"\b0% packet loss", output), output


def wait_in_guest(guest: UmlGuest, script: str, what: str, deadline: float = GRACE) -> None:
    wait_for(lambda: guest.call(script)[0] == 0, deadline, f"guest {guest.name}: {what}", interval=0.1)


def ping(guest: UmlGuest, address: str, prefix: str = "") -> None:
    no_loss(guest.run(f"{prefix} {' '.join(PING)} {address}", GRACE))


def ping_from(net: Namespace, address: str) -> None:
    no_loss(net.run(*PING, address).stdout)


def stream_in(net: Namespace, guest: UmlGuest, address: str, port: int, size: int = STREAM) -> None:
    """The network sends `size` pseudo-random bytes by TCP to the guest's `address`; SHA-256 is compared."""
    log = guest.spawn(f"peer receive {address} {port}")
    wait_in_guest(guest, f"grep -q listening {log}", "a listening peer")
    sent = net.run(peer_program(), "send", address, str(port), str(size), str(port), timeout=60).stdout
    wait_in_guest(guest, f"grep -q '^{sent.strip()}$' {log}", f"to have received {sent}")


def stream_out(net: Namespace, guest: UmlGuest, address: str, port: int, size: int = STREAM) -> None:
    """The same from the guest to the network's `address`."""
    with net.start(peer_program(), "receive", address, str(port)) as receiver:
        receiver.wait_line("listening", GRACE)
        sent = guest.run(f"peer send {address} {port} {size} {port}", 60)
        assert receiver.wait(GRACE) == 0
        receiver.wait_line(f"^{sent.strip()}$", 1)


def exchange(
    daemon: Daemon, port: str, net: Namespace, net_address: str, guest: UmlGuest, address: str, device: str = "eth0"
) -> Metrics:
    """Neighbours are learned anew (ARP requests are broadcast, replies unicast), then pings and streams both ways.

    `port` is the guest's name for the daemon, whose counters must have seen it all. Returns the last scrape.
    """
    counters = ("xdpvhost_guest_rx_bytes_total", "xdpvhost_guest_tx_bytes_total")
    before = daemon.metrics()
    guest.run(f"ip neigh flush dev {device}")
    ping(guest, net_address)
    net.ip("neigh", "flush", "to", address)
    ping_from(net, address)
    stream_in(net, guest, address, 7001)
    stream_out(net, guest, net_address, 7002)
    after = daemon.metrics()
    for counter in counters:
        moved = after.total(counter, guest=port) - before.total(counter, guest=port)
        assert moved > STREAM, f"{counter} of {port} went up by {moved} for a stream of {STREAM} bytes"
    assert after.total("xdpvhost_guest_protocol_errors_total", guest=port) == 0
    return after
