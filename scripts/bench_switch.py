# SPDX-License-Identifier: Apache-2.0
"""Measures the switch between guests: many of them at once, a noisy one beside a quiet one, and changes under load.

As in scripts/bench.py the back-end has a CPU of its own, and guests and network share the other, as one loop.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import socket
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from bench import BACKEND_CPU, DRIVER_CPU, make_frame
from rich.console import Console
from rich.table import Table

from support.daemon import Daemon
from support.fastguest import BUFFER, HEADER, FastGuest
from support.netns import Namespace, World
from xdpvhost.compare import native
from xdpvhost.xdp.libbpf import BpfObject, check, libbpf

TOP = Path(__file__).resolve().parents[1]
NETWORK = "02:00:00:00:00:99"
SUNK = "06:00:00:00:00:99"  # the network counts and drops what goes there
PROBE_SIZE = 64
PROBES = 2000  # a second
PACE = 1_000_000
NOISES = {
    "alone": None,
    "beside a flood to the NIC": SUNK,
    "beside a flood of broadcasts": "ff:ff:ff:ff:ff:ff",
    "beside a flood to a guest that stopped reading": "52:54:00:00:00:03",
}
LIMITS = {"no limits": "", "tx-rate=50M, storm=1000": ",tx-rate=50M,storm=1000"}
Samples = dict[str, list[float]]


def mac(number: int) -> str:
    return f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}"


def spec(number: int, more: str = "") -> str:
    return f"name=vm{number},mac={mac(number)}{more}"


class Net:
    """The veth's other end."""

    def __init__(self, namespace: Namespace, stack: ExitStack) -> None:
        self.namespace = namespace
        link = namespace.json("ip", "-j", "link", "show", "dev", "net0")[0]
        self.ifindex = int(link["ifindex"])
        self.obj = stack.enter_context(BpfObject(native.TRAFFIC))
        self.obj.load()
        self.obj.map("device").update(bytes(4), self.ifindex.to_bytes(4, "little"))

    def attach(self, program: str) -> None:
        with self.namespace.entered():
            check(
                libbpf().bpf_xdp_attach(self.ifindex, self.obj.program_fd(program), 0, None), f"cannot attach {program}"
            )

    def received(self) -> int:
        return sum(int.from_bytes(value, "little") for value in self.obj.map("received").lookup_percpu(bytes(4)))

    def pace(self, per_second: int) -> None:
        interval = 10**9 // per_second if per_second else 0
        self.obj.map("pace").update(bytes(4), b"".join(n.to_bytes(8, "little") for n in (interval, 0, 0)))

    def sent(self) -> int:
        value = self.obj.map("pace").lookup(bytes(4))
        assert value is not None
        return int.from_bytes(value[16:24], "little")

    def probe_socket(self, stack: ExitStack) -> socket.socket:
        with self.namespace.entered():
            sock = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)))
            sock.bind(("net0", 0x88B5))
        return sock


@contextmanager
def scene(specs: list[str], options: list[str]) -> Iterator[tuple[Daemon, Net, ExitStack]]:
    with World() as world, ExitStack() as stack:
        host, net = world.namespace("host"), world.namespace("net")
        world.veth(host, "nic0", net, "net0", queues=1)
        daemon = stack.enter_context(Daemon(host, iface="nic0", guests=specs, options=options, deadline=60))
        yield daemon, Net(net, stack), stack


@contextmanager
def driving() -> Iterator[None]:
    os.sched_setaffinity(0, {DRIVER_CPU})
    try:
        yield
    finally:
        os.sched_setaffinity(0, {DRIVER_CPU, BACKEND_CPU})


def connect(daemon: Daemon, numbers: list[int], stack: ExitStack) -> list[FastGuest]:
    guests = []
    for number in numbers:
        guest = FastGuest(daemon.socket(f"vm{number}"))
        stack.callback(guest.close)
        guests.append(guest)
    return guests


# ---- guest to guest ----


def pairs(count: int, size: int, seconds: float) -> Samples:
    """`count` guests, each of which sends to its neighbour as fast as that takes it. Frames a second, all together."""
    numbers = list(range(1, count + 1))
    with scene([spec(n) for n in numbers], ["--poll", "busy"]) as (daemon, _, stack):
        guests = connect(daemon, numbers, stack)
        for number, guest in zip(numbers, guests, strict=True):
            guest.fill(0, None)
            guest.fill(1, make_frame(mac((number - 1 ^ 1) + 1), mac(number), size))
            guest.up()
        rings = (native.Ring * (2 * count))(*(guest.ring(index) for guest in guests for index in (0, 1)))
        for guest in guests:
            for queue in guest.queues:
                queue.publish()
        job = native.Job(rings=ctypes.addressof(rings), nr_rings=len(rings), program_fd=-1, socket_fd=-1)

        def cost() -> tuple[int, int]:
            metrics = daemon.metrics()
            return metrics.total("xdpvhost_worker_packets_total"), metrics.total("xdpvhost_worker_busy_cycles_total")

        with driving():
            native.run(job, 0.3)
            before, done, started = cost(), [ring.done for ring in rings[::2]], time.monotonic()
            native.run(job, seconds)
            elapsed, after = time.monotonic() - started, cost()
        each = [ring.done - was for ring, was in zip(rings[::2], done, strict=True)]
        return {
            "frames/s": [sum(each) / elapsed],
            "cycles/frame": [(after[1] - before[1]) / max(1, after[0] - before[0])],
            "least share": [min(each) * count / max(1, sum(each))],
        }


# ---- a quiet guest beside a noisy one ----


def quiet(noise: str, limits: str, seconds: float) -> Samples:
    """Round trips of a quiet guest to the network, in microseconds, while another one does what it can."""
    specs = [spec(1), spec(2, LIMITS[limits]), spec(3)]
    with scene(specs, []) as (daemon, net, stack):
        net.attach("sift")
        calm, noisy, stopped = connect(daemon, [1, 2, 3], stack)
        calm.fill(0, None)
        calm.fill(1, b"")  # buffers for what it will send
        flood = NOISES[noise]
        noisy.fill(0, None)
        noisy.fill(1, make_frame(flood or SUNK, mac(2), 60))
        for guest in (calm, noisy, stopped):  # the last one never offers a buffer
            guest.up()
        sock = net.probe_socket(stack)
        rx, tx = calm.ring(0), calm.ring(1)
        others = (native.Ring * 2)(noisy.ring(0), noisy.ring(1))
        start = ctypes.addressof(ctypes.c_char.from_buffer(calm.memory.map)) - calm.memory.gpa
        for ring, index in ((rx, 0), (tx, 1)):
            ring.buffers, ring.stride, ring.header = start + calm.buffers[index], BUFFER, HEADER
            ring.desc = start + calm.queues[index].desc
        tx.offered = tx.seen = 0
        calm.queues[0].publish()
        noisy.queues[0].publish()
        if flood:
            noisy.queues[1].publish()
        frame = (ctypes.c_uint8 * PROBE_SIZE).from_buffer_copy(make_frame(mac(1), NETWORK, PROBE_SIZE))
        buckets = (ctypes.c_uint64 * native.NR_BUCKETS)()
        probe = native.Probe(
            rx=ctypes.addressof(rx),
            tx=ctypes.addressof(tx),
            interval=10**9 // PROBES,
            buckets=ctypes.addressof(buckets),
            nr_buckets=len(buckets),
            socket_fd=sock.fileno(),
            guest_fd=-1,
            frame_len=PROBE_SIZE,
            run=1,
            frame=ctypes.addressof(frame),
            others=ctypes.addressof(others),
            nr_others=2 if flood else 0,
        )
        with driving():
            for run, length in ((1, 0.3), (2, seconds)):
                ctypes.memset(buckets, 0, ctypes.sizeof(buckets))
                probe.sent = probe.received = probe.refused = 0
                probe.run, probe.nanoseconds = run, int(length * 1e9)
                noise_before = others[1].done
                native.probe(probe)
        if not probe.received:
            raise AssertionError(f"{noise}, {limits}: no frame came back")
        due = probe.sent + probe.refused
        found = {name: [native.percentile(buckets, share) / 1e3] for name, share in (("p50", 0.5), ("p99", 0.99))}
        return found | {
            "lost %": [100 * (due - probe.received) / due],
            "noise, frames/s": [(others[1].done - noise_before) / seconds],
        }


# ---- changes under load ----


def change(seconds: float, per_second: int, changing: bool) -> Samples:
    """Frames through one guest while others come, change and go: what is lost of them."""
    with scene([spec(1)], ["--poll", "busy"]) as (daemon, net, stack):
        guest = FastGuest(daemon.socket("vm1"), 4096)  # a guest shares a CPU with the network here: room for 4 ms
        stack.callback(guest.close)
        guest.fill(0, None)
        guest.up()
        ring = (native.Ring * 1)(guest.ring(0))
        guest.queues[0].publish()
        frame = ctypes.create_string_buffer(make_frame(mac(1), NETWORK, 64), 64)
        job = native.Job(
            rings=ctypes.addressof(ring),
            nr_rings=1,
            program_fd=net.obj.program_fd("paced"),
            socket_fd=-1,
            frame_len=64,
            frame=ctypes.addressof(frame),
        )
        net.attach("sink")
        steps, stop = [0], threading.Event()
        worst: list[BaseException] = []

        def others() -> None:
            """What an operator may do, one after the other."""
            try:
                for number in itertools.cycle(range(2, 10)):
                    name = f"vm{number}"
                    for method, params in (
                        ("guest-add", {"spec": spec(number, ",vlan=10")}),
                        ("guest-set", {"name": name, "set": {"vlan": "20", "tx-rate": "100M"}}),
                        ("guest-set", {"name": name, "set": {"macs": mac(1000 + number), "storm": "500"}}),
                        ("guest-rm", {"name": name}),
                    ):
                        if stop.is_set():
                            return
                        daemon.api(method, **params)
                        steps[0] += 1
            except BaseException as error:
                worst.append(error)

        with driving(), net.namespace.entered():
            net.pace(per_second)
            native.run(job, 0.3)
            net.pace(per_second)
            done = ring[0].done
            thread = threading.Thread(target=others)
            if changing:
                thread.start()
            started = time.monotonic()
            try:
                native.run(job, seconds)
            finally:
                elapsed = time.monotonic() - started
                stop.set()
                if changing:
                    thread.join()
            sent, received = net.sent(), ring[0].done - done
        if worst:
            raise worst[0]
        return {
            "sent, frames/s": [sent / elapsed],
            "lost": [sent - received],
            "changes": [steps[0] if changing else 0],
        }


# ---- all of it ----


def cases(seconds: float) -> dict[tuple[str, str], Callable[[], Samples]]:
    found: dict[tuple[str, str], Callable[[], Samples]] = {}
    for count in (2, 8, 32):
        for size in (64, 1500):
            found["pairs", f"{count} guests, {size} bytes"] = partial(pairs, count, size, seconds)
    for noise, limits in itertools.product(NOISES, LIMITS):
        if NOISES[noise] or not LIMITS[limits]:
            found["quiet", f"{noise}, {limits}" if NOISES[noise] else noise] = partial(quiet, noise, limits, seconds)
    for changing in (False, True):
        what = "others come, change and go" if changing else "nothing changes"
        found["change", what] = partial(change, seconds, PACE, changing)
    return found


def show(results: dict[tuple[str, str], Samples], console: Console) -> None:
    for group in dict.fromkeys(group for group, _ in results):
        mine = {case: samples for (of, case), samples in results.items() if of == group}
        table = Table(title=f"{group}: median (smallest to largest)")
        table.add_column("case")
        names = list(next(iter(mine.values())))
        for name in names:
            table.add_column(name, justify="right")
        for case, samples in mine.items():
            cells = [samples[name] for name in names]
            table.add_row(
                case, *(f"{number(statistics.median(c))} ({number(min(c))} to {number(max(c))})" for c in cells)
            )
        console.print(table)


def cell(values: list[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


BEGIN, END = "<!-- RESULTS of scripts/bench switch --document: do not edit -->", "<!-- END OF THE SWITCH'S RESULTS -->"


def document(results: dict[tuple[str, str], Samples], facts: dict[str, Any], path: Path) -> None:
    """Replace the results in a Markdown file, between BEGIN and END."""
    lines = [
        f"{facts['cpu']}, kernel {facts['kernel']}, {facts['date']}: `{facts['command']}`. Medians, and all samples.",
        "",
    ]
    for group in dict.fromkeys(group for group, _ in results):
        mine = {case: samples for (of, case), samples in results.items() if of == group}
        names = list(next(iter(mine.values())))
        lines += [f"| {group} | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        lines += [f"| {case} | {' | '.join(cell(samples[name]) for name in names)} |" for case, samples in mine.items()]
        lines.append("")
    head, _, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise click.ClickException(f"{path}: the lines {BEGIN!r} and {END!r} are missing")
    path.write_text("\n".join([head + BEGIN, "", *lines, END + tail]))


def plot(results: dict[tuple[str, str], Samples], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 5.5), layout="constrained")
    counts = (2, 8, 32)
    for offset, size in enumerate((64, 1500)):
        found = [results.get(("pairs", f"{count} guests, {size} bytes"), {}).get("frames/s", [0.0]) for count in counts]
        bars(left, offset, [[v / 1e6 for v in samples] for samples in found], f"{size} bytes", "%.2f")
    left.set_xticks(range(len(counts)), [f"{count} guests" for count in counts])
    left.set_ylabel("million frames a second, all guests together")
    left.set_title("Guest to guest: each sends to its neighbour")
    left.legend()
    names = [case for group, case in results if group == "quiet"]
    for offset, what in enumerate(("p50", "p99")):
        bars(right, offset, [results["quiet", name][what] for name in names], what, "%.0f")
    right.set_xticks(range(len(names)), [textwrap.fill(name, 15) for name in names], fontsize=7)
    right.set_ylabel("microseconds")
    right.set_yscale("log")
    right.set_title("Round trips of a quiet guest")
    right.legend()
    figure.suptitle("One worker on one CPU, guests and network on the other; bars: median, whiskers: all samples")
    figure.savefig(path, dpi=110)


def bars(axis: Any, offset: int, samples: list[list[float]], label: str, fmt: str) -> None:
    middle = [statistics.median(values) for values in samples]
    below = [m - min(values) for m, values in zip(middle, samples, strict=True)]
    above = [max(values) - m for m, values in zip(middle, samples, strict=True)]
    at = [i + (offset - 0.5) * 0.38 for i in range(len(samples))]
    axis.bar_label(
        axis.bar(at, middle, 0.36, yerr=[below, above], capsize=3, label=label), fmt=fmt, padding=4, fontsize=8
    )
    axis.margins(y=0.15)


@click.command()
@click.option("--repeat", default=5, show_default=True, help="Samples of each case.")
@click.option("--seconds", default=1.0, show_default=True, help="Length of a sample.")
@click.option("--what", "groups", type=click.Choice(["pairs", "quiet", "change"]), multiple=True, help="Only these.")
@click.option("--document", "page", type=click.Path(path_type=Path, exists=True), help="Put the results in this page.")
@click.option("--output", type=click.Path(path_type=Path), default=TOP / ".cache" / "bench" / "switch")
def main(repeat: int, seconds: float, groups: tuple[str, ...], page: Path | None, output: Path) -> None:
    """Measure the switch; writes OUTPUT.json and, of all groups, OUTPUT.png.

    pairs: 2, 8 and 32 guests, each sending to its neighbour. quiet: round trips of a guest beside a noisy one, with and
    without limits on that. change: a million frames a second through one guest while others come, change and go.
    """
    console = Console(width=None if sys.stdout.isatty() else 130)
    if len(os.sched_getaffinity(0)) < 2:
        raise click.ClickException("two CPUs are needed: one for the back-end, one for guests and network")
    wanted = {key: measure for key, measure in cases(seconds).items() if not groups or key[0] in groups}
    results: dict[tuple[str, str], Samples] = {key: {} for key in wanted}
    for turn in range(repeat):
        for key, measure in wanted.items():
            console.print(f"{turn + 1}/{repeat} {key[0]}: {key[1]}", highlight=False)
            for name, values in measure().items():
                results[key].setdefault(name, []).extend(values)
    show(results, console)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["scripts/bench switch", *sys.argv[1:]]),
        "kernel": os.uname().release,
        "cpu": re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        "rows": [{"group": group, "case": case, "samples": samples} for (group, case), samples in results.items()],
    }
    output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    if page is not None:
        document(results, facts, page)
    if not groups:
        plot(results, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
