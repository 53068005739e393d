# SPDX-License-Identifier: Apache-2.0
"""Measures TCP of real guests (User-Mode Linux, iperf3) through xdpvhost, and through a tap, which they would else use.

All systems are set up at once and measured in turn, so that whatever else the machine does hits all alike. The guests'
kernel, memory and command line are the same but for the network device. Nothing is pinned, except for what pins itself.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from support.lab import NET_IP, PREFIX, Lab, guest_ip, guest_mac, spec
from support.netns import Namespace, World
from support.process import wait_for
from support.uml import UmlGuest

TOP = Path(__file__).resolve().parents[1]

WAYS = {"out": "guest to network", "in": "network to guest", "guest-guest": "guest to guest"}
SYSTEMS = {
    "xdpvhost": "xdpvhost",
    "xdpvhost-none": "xdpvhost --xdp-mode none",
    "tap-bridge": "tap, bridged to the veth",
    "tap-host": "tap, its host end is the peer",
}
# What "ethtool -K" is told in the guest. rx-gro-hw is VIRTIO_NET_F_GUEST_TSO*, switched by the control virtqueue.
OFFLOADS = {
    "on": "tx on sg on tso on gso on gro on rx-gro-hw on",
    "no merging": "tx on sg on tso on gso on gro on rx-gro-hw off",
    "off": "gso off tso off sg off tx off gro off rx-gro-hw off",
}


@dataclass
class Row:
    way: str
    system: str
    offloads: str
    gbits: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.gbits)


@dataclass(frozen=True)
class Target:
    """Row `better` has at least `factor` times the rate of row `worse`. Rows are (way, system, offloads)."""

    text: str
    better: tuple[str, str, str]
    worse: tuple[str, str, str]
    factor: float


TARGETS = (
    Target(
        "guest to guest, whole frames or not", ("guest-guest", "xdpvhost", "on"), ("guest-guest", "xdpvhost", "off"), 3
    ),
    Target("network to guest, merged or not", ("in", "xdpvhost-none", "on"), ("in", "xdpvhost-none", "off"), 1.5),
    Target("the same, by XDP", ("in", "xdpvhost", "on"), ("in", "xdpvhost", "off"), 1.5),
    Target("guest to network, than a tap", ("out", "xdpvhost", "on"), ("out", "tap-bridge", "on"), 1),
    Target("network to guest, than a tap", ("in", "xdpvhost", "on"), ("in", "tap-bridge", "on"), 1),
    Target("the same, without XDP", ("in", "xdpvhost-none", "on"), ("in", "tap-bridge", "on"), 1),
)


def queue(net: Namespace) -> None:
    """Give the network's end of the veth a queue, as every NIC has one; else what a ring of 256 can't hold is lost."""
    net.run("tc", "qdisc", "replace", "dev", "eth0", "root", "pfifo", "limit", "1000")


class System:
    """Guests on a way to the network: the namespace of the network, the guests, and their device's name."""

    def __init__(self, net: Namespace, guests: list[UmlGuest], device: str) -> None:
        self.net = net
        self.guests = guests
        self.device = device
        self.offloads = ""

    def set_offloads(self, which: str) -> None:
        if which == self.offloads or self.device != "eth0":
            return
        for guest in self.guests:
            guest.run(f"ethtool -K {self.device} {OFFLOADS[which]}")
        self.offloads = which


def xdpvhost(stack: ExitStack, memory: str, options: list[str]) -> System:
    lab = stack.enter_context(Lab(quiet=True))
    lab.up([spec(1), spec(2)], options)
    lab.boot(1, 2, mem=memory)
    queue(lab.net)
    return System(lab.net, [lab.guests[1], lab.guests[2]], "eth0")


def tap(stack: ExitStack, memory: str, bridged: bool) -> System:
    """UML's own driver on taps: in a bridge with a veth, as an owner would have it, or with the peer's address."""
    world = stack.enter_context(World())
    net = world.namespace("net")
    host = world.namespace("host") if bridged else net
    if bridged:
        world.veth(net, "eth0", host, "nic0")
        host.ip("link", "add", "br0", "type", "bridge")
        host.ip("link", "set", "br0", "up")
        host.ip("link", "set", "nic0", "master", "br0")
        net.ip("addr", "add", f"{NET_IP}/{PREFIX}", "dev", "eth0")
        queue(net)
    guests = []
    for number in (1, 2) if bridged else (1,):
        name = f"tap{number}"
        host.ip("tuntap", "add", name, "mode", "tap")
        host.ip("link", "set", name, "up")
        if bridged:
            host.ip("link", "set", name, "master", "br0")
        else:
            host.ip("addr", "add", f"{NET_IP}/{PREFIX}", "dev", name)
        vector = f"transport=tap,ifname={name},depth=128,gro=1,mac={guest_mac(number)}"
        label = f"{'bridge' if bridged else 'host'}{number}"
        guest = UmlGuest(None, label, directory=world.directory, mem=memory, vector=vector, inside=host)
        world.stack.callback(guest.close)
        guest.begin()
        guests.append(guest)
    for number, guest in enumerate(guests, 1):
        guest.ready().configure(f"{guest_ip(number)}/{PREFIX}", device="vec0")
    return System(net, guests, "vec0")


MAKE: dict[str, Callable[[ExitStack, str], System]] = {
    "xdpvhost": lambda stack, memory: xdpvhost(stack, memory, []),
    "xdpvhost-none": lambda stack, memory: xdpvhost(stack, memory, ["--xdp-mode", "none"]),
    "tap-bridge": lambda stack, memory: tap(stack, memory, bridged=True),
    "tap-host": lambda stack, memory: tap(stack, memory, bridged=False),
}


def measure(system: System, way: str, seconds: int, write: str) -> float:
    """Gb/s that arrived."""
    client = system.guests[0]
    # Linux's own default at both ends: BBR, which this host may have, paces by a model of the path
    command = f"iperf3 -J -C cubic -t {seconds} -l {write} -c"
    if way == "guest-guest":
        server = system.guests[1]
        server.spawn("iperf3 -s -1 --forceflush")
        wait_for(lambda: server.call("netstat -ltn | grep -q :5201")[0] == 0, 10, "iperf3 to listen", interval=0.1)
        report = client.run(f"{command} {guest_ip(2)}", seconds + 20)
    else:
        with system.net.start("iperf3", "-s", "-1", "--forceflush", env={"LC_ALL": "C"}) as process:
            process.wait_line("Server listening", 10)
            report = client.run(f"{command} {NET_IP} {'-R' if way == 'in' else ''}", seconds + 20)
    return float(json.loads(report)["end"]["sum_received"]["bits_per_second"]) / 1e9


def rows_of(systems: tuple[str, ...], ways: tuple[str, ...], offloads: tuple[str, ...]) -> list[Row]:
    rows = []
    for way in ways:
        for system in systems:
            if system.startswith("tap"):
                if (way, system) != ("guest-guest", "tap-host"):
                    rows.append(Row(way, system, "on"))
            elif (way, system) != ("guest-guest", "xdpvhost-none"):  # the NIC has no part in it
                rows += [Row(way, system, which) for which in OFFLOADS if which != "no merging" or way == "in"]
    return [row for row in rows if row.offloads in offloads]


def verdicts(rows: list[Row]) -> list[tuple[Target, float]]:
    found = {(row.way, row.system, row.offloads): row for row in rows}
    return [
        (target, found[target.better].median / found[target.worse].median)
        for target in TARGETS
        if target.better in found and target.worse in found
    ]


def sentence(target: Target, ratio: float) -> str:
    wanted = f"at least {target.factor:g}" if target.factor > 1 else "above 1"
    met = ratio >= target.factor if target.factor > 1 else ratio > 1
    return f"{target.text}: {ratio:.2f} ({wanted}: {'met' if met else 'MISSED'})"


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Gb/s, median of the samples (smallest to largest)")
    for name in ("way", "system", "offloads"):
        table.add_column(name)
    table.add_column("Gb/s", justify="right")
    for row in rows:
        spread = f"{row.median:.2f} ({min(row.gbits):.2f} to {max(row.gbits):.2f})"
        table.add_row(WAYS[row.way], SYSTEMS[row.system], row.offloads, spread)
    console.print(table)
    for target, ratio in verdicts(rows):
        console.print(sentence(target, ratio))


BEGIN, END = "<!-- RESULTS of scripts/bench tcp --document: do not edit -->", "<!-- END OF TCP RESULTS -->"


def document(rows: list[Row], facts: dict[str, object], path: Path) -> None:
    """Replace the results in a Markdown file, between BEGIN and END."""
    lines = [
        f"{facts['cpu']}, {facts['cpus']} CPUs, kernel {facts['kernel']}, guests' {facts['guest']}, {facts['date']}: "
        f"`{facts['command']}`.",
        "",
        "| way | system | guest's offloads | Gb/s, median (all samples) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{row.median:.2f} ({min(row.gbits):.2f} to {max(row.gbits):.2f})"
        lines.append(f"| {WAYS[row.way]} | {SYSTEMS[row.system]} | {row.offloads} | {spread} |")
    lines += ["", *(f"- {sentence(target, ratio)}" for target, ratio in verdicts(rows))]
    head, _, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise click.ClickException(f"{path}: the lines {BEGIN!r} and {END!r} are missing")
    path.write_text("\n".join([head + BEGIN, "", *lines, "", END + tail]))


@click.command()
@click.option("--repeat", default=5, show_default=True, help="Samples of each row.")
@click.option("--seconds", default=3, show_default=True, help="Length of a sample.")
# TCP's windows grow with memory; with 128 MiB they, and not the path, limit the rate
@click.option("--memory", default="512M", show_default=True, help="Of each guest.")
# a system call costs a User-Mode Linux process some 100 us, whatever the network
@click.option("--write", default="1M", show_default=True, help="iperf3's -l: bytes of a write.")
@click.option("--way", "ways", type=click.Choice(list(WAYS)), multiple=True, default=tuple(WAYS), show_default=True)
@click.option(
    "--system", "systems", type=click.Choice(list(SYSTEMS)), multiple=True, default=tuple(SYSTEMS), show_default=True
)
@click.option(
    "--offloads", type=click.Choice(list(OFFLOADS)), multiple=True, default=tuple(OFFLOADS), show_default=True
)
@click.option("--document", "page", type=click.Path(path_type=Path, exists=True), help="Put the results in this page.")
@click.option("--output", type=click.Path(path_type=Path), default=TOP / ".cache" / "bench" / "tcp.json")
def main(
    repeat: int,
    seconds: int,
    memory: str,
    write: str,
    ways: tuple[str, ...],
    systems: tuple[str, ...],
    offloads: tuple[str, ...],
    page: Path | None,
    output: Path,
) -> None:
    """TCP of real guests, through xdpvhost and through a tap; writes OUTPUT."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    rows = rows_of(systems, ways, offloads)
    with ExitStack() as stack:
        made = {name: MAKE[name](stack, memory) for name in systems}
        guest_kernel = made[systems[0]].guests[0].run("uname -r").strip()
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("", total=repeat * len(rows))
            for turn in range(repeat):
                for row in rows:
                    progress.update(task, description=f"{turn + 1}/{repeat} {row.way} {row.system} {row.offloads}")
                    made[row.system].set_offloads(row.offloads)
                    row.gbits.append(measure(made[row.system], row.way, seconds, write))
                    progress.advance(task)
    show(rows, console)
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["scripts/bench", "tcp", *sys.argv[1:]]),
        "kernel": os.uname().release,
        "guest": guest_kernel,
        "cpu": re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        "cpus": len(os.sched_getaffinity(0)),
        "rows": [asdict(row) | {"median": row.median} for row in rows],
        "targets": [{"text": t.text, "ratio": ratio, "wanted": t.factor} for t, ratio in verdicts(rows)],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(facts, indent=1) + "\n")
    if page is not None:
        document(rows, facts, page)
    console.print(f"written: {output}")


if __name__ == "__main__":
    main()
