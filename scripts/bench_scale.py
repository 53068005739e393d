# SPDX-License-Identifier: Apache-2.0
"""Measures what the number of guests costs: the rate to one of them, an idle daemon's CPU, memory, time to start.

One daemon with a single guest and one with many are up at the same time, each on a veth of its own; they take turns. As
in scripts/bench.py the worker has a CPU of its own, and guests and network share the other.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from bench import make_frame
from bench_switch import NETWORK, Net, driving, mac
from rich.console import Console
from rich.table import Table

from support.daemon import Daemon
from support.fastguest import FastGuest
from support.frontend import F_PROTOCOL, F_VERSION_1, NetDevice
from support.netns import World
from xdpvhost.compare import native

TOP = Path(__file__).resolve().parents[1]
QUEUES = 4
ADDRESSES = 4  # of each guest: 1,024 of 256
SIZE = 64
START = 120.0  # seconds that a daemon may take
WANTED_RATIO, WANTED_IDLE = 0.9, 2.0
KERNEL = ("Slab", "VmallocUsed", "PageTables", "Percpu", "KernelStack")


def spec(number: int) -> str:
    others = "+".join(mac(number + extra * 1000) for extra in range(1, ADDRESSES))
    return f"name=vm{number},mac={mac(number)},macs={others}"


class Idle(NetDevice):
    """A guest that has buffers, and nothing to say."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, features=F_VERSION_1 | F_PROTOCOL, memory_size=1 << 20)

    def start(self) -> None:
        self.post(128)
        self.up()


@dataclass
class Memory:
    """Bytes of the daemon, and of the kernel for everything on the machine."""

    rss: int
    private: int
    kernel: int

    @classmethod
    def of(cls, pid: int) -> Memory:
        mine = _kib(Path(f"/proc/{pid}/smaps_rollup").read_text())
        machine = _kib(Path("/proc/meminfo").read_text())
        return cls(mine["Rss"], mine["Private_Clean"] + mine["Private_Dirty"], sum(machine[name] for name in KERNEL))

    def each(self, before: Memory, guests: int) -> dict[str, float]:
        """KiB a guest that it has grown by since `before`."""
        return {
            name: (getattr(self, name) - getattr(before, name)) / guests / 1024 for name in ("rss", "private", "kernel")
        }


def _kib(text: str) -> dict[str, int]:
    return {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class System:
    """A daemon with so many guests, all connected, and a network that sends to the first."""

    def __init__(self, count: int, options: list[str], stack: ExitStack) -> None:
        self.count = count
        self.world = stack.enter_context(World())
        host, net = self.world.namespace("host"), self.world.namespace("net")
        self.world.veth(host, "nic0", net, "net0", queues=QUEUES)
        started = time.monotonic()
        self.daemon = stack.enter_context(
            Daemon(host, iface="nic0", guests=[spec(n + 1) for n in range(count)], options=options, deadline=START)
        )
        self.start_seconds = time.monotonic() - started
        self.configured = Memory.of(self.daemon.pid)
        self.net = Net(net, stack)
        self.guest = FastGuest(self.daemon.socket("vm1"))
        stack.callback(self.guest.close)
        self.guest.fill(0, None)
        self.guest.up()
        self.ring = (native.Ring * 1)(self.guest.ring(0))
        self.guest.queues[0].publish()
        for number in range(2, count + 1):
            idle = Idle(self.daemon.socket(f"vm{number}"))
            stack.callback(idle.close)
            idle.start()
        self.connected = Memory.of(self.daemon.pid)
        self.net.attach("sink")
        self.frame = ctypes.create_string_buffer(make_frame(mac(1), NETWORK, SIZE), SIZE)
        self.job = native.Job(
            rings=ctypes.addressof(self.ring),
            nr_rings=1,
            program_fd=self.net.obj.program_fd("source"),
            socket_fd=-1,
            frame_len=SIZE,
            frame=ctypes.addressof(self.frame),
        )

    def rate(self, seconds: float) -> dict[str, float]:
        """Frames a second that the first guest gets, and the worker's cycles for each."""
        with driving(), self.net.namespace.entered():
            native.run(self.job, 0.2)
            before, done, started = self._cost(), self.ring[0].done, time.monotonic()
            native.run(self.job, seconds)
            elapsed, arrived, after = time.monotonic() - started, self.ring[0].done - done, self._cost()
        if arrived < 1000:
            raise AssertionError(f"{self.count} guests: only {arrived} frames in {elapsed:.1f} s")
        return {
            "frames/s": arrived / elapsed,
            "cycles/frame": (after[1] - before[1]) / max(1, after[0] - before[0]),
        }

    def idle(self, seconds: float) -> float:
        """Per cent of a CPU that the daemon takes while nothing happens."""
        time.sleep(1)  # what came before is over
        before = cpu_seconds(self.daemon.pid)
        time.sleep(seconds)
        return 100 * (cpu_seconds(self.daemon.pid) - before) / seconds

    def _cost(self) -> tuple[int, int]:
        metrics = self.daemon.metrics()
        return metrics.total("xdpvhost_worker_packets_total"), metrics.total("xdpvhost_worker_busy_cycles_total")


def measure(
    count: int, repeat: int, seconds: float, idle_seconds: float, poll: str, console: Console
) -> dict[str, Any]:
    with ExitStack() as stack:
        options = ["--poll", poll]
        few = System(1, options, stack)
        console.print(f"1 guest is up after {few.start_seconds:.1f} s", highlight=False)
        kernel = Memory.of(few.daemon.pid).kernel
        many = System(count, options, stack)
        console.print(f"{count} guests are up after {many.start_seconds:.1f} s", highlight=False)
        samples: dict[str, dict[str, list[float]]] = {"1": {}, str(count): {}}
        idle = {"1": [few.idle(idle_seconds)], str(count): [many.idle(idle_seconds)]}
        for _ in range(repeat):
            for system in (few, many):
                for name, value in system.rate(seconds).items():
                    samples[str(system.count)].setdefault(name, []).append(value)
        grown = count - 1
        at_rest, all_connected = (
            # the first daemon's own kernel memory is in both of these, the second's only in the latter
            {**memory.each(reference, grown), "kernel": (memory.kernel - kernel) / count / 1024}
            for memory, reference in ((many.configured, few.configured), (many.connected, few.connected))
        )
        status = many.daemon.api("status")
        return {
            "samples": samples,
            "idle %": idle,
            "start, s": {"1": few.start_seconds, str(count): many.start_seconds},
            "KiB a guest": {"configured": at_rest, "connected": all_connected},
            "memory in status": status["guests"][0]["memory"],
        }


def ratio(found: dict[str, Any], count: int) -> float:
    few, many = (found["samples"][key]["frames/s"] for key in ("1", str(count)))
    return statistics.median(many) / statistics.median(few)


def verdicts(found: dict[str, Any], count: int) -> list[str]:
    rate, idle = ratio(found, count), found["idle %"][str(count)][0]
    return [
        f"rate with {count} guests to that with one: {rate:.2f} (at least {WANTED_RATIO}: {met(rate >= WANTED_RATIO)})",
        f"idle daemon with {count} guests: {idle:.2f} % of a CPU (below {WANTED_IDLE:g}: {met(idle < WANTED_IDLE)})",
    ]


def met(yes: bool) -> str:
    return "met" if yes else "MISSED"


def cell(values: list[float], scale: float = 1, digits: int = 2) -> str:
    scaled = [value * scale for value in values]
    return f"{statistics.median(scaled):.{digits}f} ({min(scaled):.{digits}f} to {max(scaled):.{digits}f})"


def rows(found: dict[str, Any], count: int) -> list[tuple[str, str, str]]:
    def both(name: str, scale: float, digits: int) -> tuple[str, str]:
        few, many = (cell(found["samples"][key][name], scale, digits) for key in ("1", str(count)))
        return few, many

    kib = found["KiB a guest"]
    memory = [
        (
            f"KiB for each guest, {state}: daemon's RSS, of that its own; kernel",
            "",
            ", ".join(f"{kib[state][part]:.0f}" for part in ("rss", "private", "kernel")),
        )
        for state in ("configured", "connected")
    ]
    idle, start = found["idle %"], found["start, s"]
    return [
        ("Mpps to one guest, 64 bytes, median (all samples)", *both("frames/s", 1e-6, 2)),
        ("worker's cycles a frame, median (all samples)", *both("cycles/frame", 1, 0)),
        ("idle daemon, % of a CPU", f"{idle['1'][0]:.2f}", f"{idle[str(count)][0]:.2f}"),
        ("seconds until it is ready", f"{start['1']:.1f}", f"{start[str(count)]:.1f}"),
        *memory,
    ]


BEGIN, END = "<!-- RESULTS of scripts/bench scale --document: do not edit -->", "<!-- END OF SCALE RESULTS -->"


def document(found: dict[str, Any], facts: dict[str, Any], count: int, path: Path) -> None:
    """Replace the results in a Markdown file, between BEGIN and END."""
    lines = [
        f"{facts['cpu']}, {os.cpu_count()} CPUs, kernel {facts['kernel']}, {facts['date']}: `{facts['command']}`.",
        "",
    ]
    lines += [f"| | 1 guest | {count} guests |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(found, count)]
    lines += ["", *(f"- {line}" for line in verdicts(found, count))]
    head, _, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise click.ClickException(f"{path}: the lines {BEGIN!r} and {END!r} are missing")
    path.write_text("\n".join([head + BEGIN, "", *lines, "", END + tail]))


def plot(found: dict[str, Any], count: int, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rates, idle, memory) = plt.subplots(1, 3, figsize=(13, 4.5), layout="constrained")
    names = ["1 guest", f"{count} guests"]
    samples = [[v / 1e6 for v in found["samples"][key]["frames/s"]] for key in ("1", str(count))]
    middle = [statistics.median(values) for values in samples]
    whiskers = [
        [m - min(v) for m, v in zip(middle, samples, strict=True)],
        [max(v) - m for m, v in zip(middle, samples, strict=True)],
    ]
    rates.bar_label(rates.bar(names, middle, 0.6, yerr=whiskers, capsize=4), fmt="%.2f", padding=6)
    rates.set_ylabel("million frames a second")
    rates.set_title(f"To one guest, {SIZE} bytes (ratio {ratio(found, count):.2f})")
    idle.bar_label(idle.bar(names, [found["idle %"][key][0] for key in ("1", str(count))], 0.6), fmt="%.2f", padding=3)
    idle.axhline(WANTED_IDLE, linestyle="--", color="grey")
    idle.set_ylabel("% of a CPU")
    idle.set_title("The daemon, all guests connected and idle")
    states = ["configured", "connected"]
    below = [0.0, 0.0]
    for part, label in (("private", "daemon"), ("kernel", "kernel")):
        values = [found["KiB a guest"][state][part] for state in states]
        memory.bar(states, values, 0.6, bottom=below, label=label)
        below = [b + v for b, v in zip(below, values, strict=True)]
    memory.set_ylabel("KiB a guest")
    memory.set_title(f"Memory of each of {count} guests")
    memory.legend()
    for axis in (rates, idle, memory):
        axis.margins(y=0.15)
    figure.suptitle(f"A veth NIC with {QUEUES} queues, {ADDRESSES} addresses a guest; bars: median, whiskers: all")
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--guests", "count", default=256, show_default=True, help="Of the large daemon.")
@click.option("--repeat", default=7, show_default=True, help="Samples of each rate.")
@click.option("--seconds", default=1.0, show_default=True, help="Length of a sample.")
@click.option("--idle-seconds", default=10.0, show_default=True, help="How long the idle daemons are watched.")
@click.option("--poll", type=click.Choice(["adaptive", "busy", "interrupt"]), default="adaptive", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=TOP / ".cache" / "bench" / "scale")
@click.option("--document", "page", type=click.Path(path_type=Path, exists=True), help="A page to put the table into.")
def main(
    count: int, repeat: int, seconds: float, idle_seconds: float, poll: str, output: Path, page: Path | None
) -> None:
    """Compare a daemon with one guest and one with many on a veth with four queues; writes OUTPUT.json and .png."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    if len(os.sched_getaffinity(0)) < 2:
        raise click.ClickException("two CPUs are needed: one for the worker, one for guests and network")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found = measure(count, repeat, seconds, idle_seconds, poll, console)
    table = Table("", "1 guest", f"{count} guests")
    for row in rows(found, count):
        table.add_row(*row)
    console.print(table)
    for line in verdicts(found, count):
        console.print(line, highlight=False)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["scripts/bench scale", *sys.argv[1:]]),
        "kernel": os.uname().release,
        "cpu": re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        "guests": count,
        **found,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(found, count, output.with_suffix(".png"))
    if page:
        document(found, facts, count, page)


if __name__ == "__main__":
    main()
