# SPDX-License-Identifier: Apache-2.0
"""The demonstration behind scripts/demo: the tests' own scene (tests/support/lab.py), played for a person to watch."""

import argparse
import json
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from support.daemon import Metrics
from support.lab import HOST_IP, NET_IP, NET_IP6, Lab, guest_ip, guest_mac, spec
from support.process import wait_for
from support.uml import UmlGuest

SCENE = f"""\
  namespace "net"               namespace "host"
  eth0 {NET_IP} <--- veth ---> nic0 {HOST_IP}    the host's NIC, and it stays that
                                 |
                              xdpvhost up --iface nic0
                                 |- vm1  {guest_mac(1)}  {guest_ip(1)}
                                 `- vm2  {guest_mac(2)}  {guest_ip(2)}
"""
PING = "ping -n -c 5 -i 0.2 -w 10"

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    console.print(f"[bold cyan]==[/] {text}", soft_wrap=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Says what happens, and how long it took."""
    say(text)
    begin = time.monotonic()
    yield
    console.print(f"   [green]done[/] in {time.monotonic() - begin:.1f} s")


@dataclass(frozen=True)
class Flow:
    """One direction of one guest, between two looks at its counters."""

    guest: str
    direction: str
    packets: int
    drops: int
    packet_rate: float
    bit_rate: float


class Rates:
    """Packets and bits a second of each guest, between two looks."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.last: tuple[float, Metrics] = (time.monotonic(), lab.daemon.metrics())

    def look(self) -> list[Flow]:
        then, before = self.last
        now, scrape = time.monotonic(), self.lab.daemon.metrics()
        self.last = (now, scrape)

        def rate(name: str, guest: str) -> float:
            return (scrape.total(name, guest=guest) - before.total(name, guest=guest)) / (now - then)

        return [
            Flow(
                guest=guest,
                direction=direction,
                packets=scrape.total(f"xdpvhost_guest_{direction}_packets_total", guest=guest),
                drops=scrape.total("xdpvhost_guest_drops_total", guest=guest, direction=direction),
                packet_rate=rate(f"xdpvhost_guest_{direction}_packets_total", guest),
                bit_rate=8 * rate(f"xdpvhost_guest_{direction}_bytes_total", guest),
            )
            for guest in (f"vm{number}" for number in self.lab.guests)
            for direction in ("rx", "tx")
        ]


def flow_table(flows: list[Flow]) -> Table:
    table = Table("guest", "direction", "packets", "packets/s", "Mbit/s", "drops")
    for f in flows:
        rates = (f"{f.packet_rate:,.0f}", f"{f.bit_rate / 1e6:,.0f}")
        table.add_row(f.guest, f.direction, f"{f.packets:,}", *rates, f"{f.drops:,}")
    return table


def flow_line(flows: list[Flow]) -> str:
    busy = [f"{f.guest} {f.direction} {f.packet_rate:,.0f} packets/s {f.bit_rate / 1e6:,.0f} Mbit/s" for f in flows]
    return "   " + (", ".join(text for text, f in zip(busy, flows, strict=True) if f.packet_rate >= 1) or "idle")


def watch(lab: Lab, work: Callable[[], str]) -> str:
    """Runs `work` and shows the guests' counters meanwhile; what `work` returned."""
    results: list[str] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    rates = Rates(lab)
    thread.start()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while thread.is_alive():
            thread.join(1.0)
            flows = rates.look()
            if console.is_terminal:
                live.update(flow_table(flows), refresh=True)
            else:
                console.print(flow_line(flows), soft_wrap=True)
    if failures:
        raise failures[0]
    return results[0]


def ping(who: str, output: str) -> None:
    lost, times = re.search(r"\d+% packet loss", output), re.search(r"= ([\d./]+) ms", output)
    if lost is None or times is None:
        raise AssertionError(f"{who}: no answer\n{output}")
    console.print(f"   {who}: {lost[0]}, min/avg/max/mdev {times[1]} ms")


def iperf(lab: Lab, text: str, client: UmlGuest, address: str, seconds: int, options: str) -> None:
    say(f"iperf3 {text}: {seconds} s")
    report = json.loads(
        watch(lab, lambda: client.run(f"iperf3 -c {address} -t {seconds} -J {options}", 30 + 2 * seconds))
    )
    end = report["end"]
    lost = f", {end['sum']['lost_percent']:.2f} % lost" if "-u" in options else ""
    received = end.get("sum_received", end["sum"]) if "-u" in options else end["sum_received"]
    console.print(f"   [green]{received['bits_per_second'] / 1e6:,.0f} Mbit/s[/] received{lost}")


def play(seconds: int) -> None:
    with step("making two network namespaces and a veth pair with 4 queues"):
        lab = Lab()
    with lab:
        console.print(SCENE, markup=False)
        with step("starting the daemon on nic0"):
            guests = [spec(1), spec(2)]
            lab.up(guests)
        console.print("   " + shlex.join(lab.daemon.command), markup=False, soft_wrap=True)
        console.print("   " + lab.daemon.process.log().splitlines()[-1], markup=False, soft_wrap=True)
        with step("booting two Linux guests (User-Mode Linux, virtio_net)"):
            lab.boot(1, 2)
        vm1, vm2 = lab.guests[1], lab.guests[2]
        driver = vm1.run("ethtool -i eth0 | sed -n 's/^driver: //p'").strip()
        console.print(f"   vm1: {vm1.run('uname -sr').strip()}, eth0 is {driver}, MAC {vm1.mac()}")

        console.print(lab.daemon.cli("status"), markup=False, soft_wrap=True)

        say("ping, with nothing configured in any neighbour table")
        ping("network -> vm1", lab.net.run(*f"{PING} {guest_ip(1)}".split()).stdout)
        ping("vm2 -> network", vm2.run(f"{PING} {NET_IP}", 15))
        ping("vm1 -> network, IPv6", vm1.run(f"{PING} -6 {NET_IP6}", 15))
        ping("vm1 -> vm2", vm1.run(f"{PING} {guest_ip(2)}", 15))
        ping("network -> host, over the same NIC", lab.net.run(*f"{PING} {HOST_IP}".split()).stdout)

        with lab.net.start("iperf3", "-s", "--forceflush") as server:
            server.wait_line("Server listening", 10)
            iperf(lab, "TCP vm1 -> network", vm1, NET_IP, seconds, "")
            iperf(lab, "TCP network -> vm1", vm1, NET_IP, seconds, "-R")
            iperf(lab, "UDP network -> vm1", vm1, NET_IP, seconds, "-R -u -b 10M -l 1200")
        vm2.spawn("iperf3 -s -1")
        wait_for(lambda: vm2.call("netstat -ltn | grep -q :5201")[0] == 0, 10, "iperf3 in vm2")
        iperf(lab, "TCP vm1 -> vm2", vm1, guest_ip(2), seconds, "")

        scrape = lab.daemon.metrics()
        delivered = scrape.total("xdpvhost_guest_rx_bytes_total")
        copied = scrape.total("xdpvhost_copied_bytes_total", direction="guest")
        say(f"one copy a frame: {copied:,} bytes copied into guests' memory, {delivered:,} delivered there")
        with step("ending the daemon; nic0 goes back to how it was"):
            lab.daemon.down()
            assert "xdp" not in lab.host.run("ip", "-d", "link", "show", "dev", "nic0").stdout
    say("[green]all done, and nothing left behind[/]")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Shows xdpvhost at work on this machine alone.")
    parser.add_argument("--seconds", type=int, default=3, help="how long each iperf3 runs (default 3)")
    play(parser.parse_args().seconds)


if __name__ == "__main__":
    main()
