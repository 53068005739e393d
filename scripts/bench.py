# SPDX-License-Identifier: Apache-2.0
"""Measures xdpvhost beside DPDK's testpmd: the same front-end, the same generator, one after the other in one run.

The back-end has a CPU of its own; guests and network share another, as one loop (datapath/synthetic/guest.c). Rates
are what that loop saw arrive. Cycles a packet are the back-end's own count: of the polls that moved packets, divided
by the packets (testpmd --record-core-cycles; xdpvhost_worker_busy_cycles_total). Only ratios within one run mean
anything.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from support.daemon import Daemon
from support.fastguest import RING, FastGuest
from support.netns import Namespace, World
from support.testpmd import PROGRAM as TESTPMD
from support.testpmd import TestPmd, VirtioUser
from xdpvhost.compare import native
from xdpvhost.xdp.libbpf import BpfObject, check, libbpf

TOP = Path(__file__).resolve().parents[1]
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
STRANGER = "02:00:00:00:00:99"
DRIVER_CPU, BACKEND_CPU = 0, 1

WAYS = {
    "nic-guest": "NIC to guest",
    "guest-nic": "guest to NIC",
    "guest-guest": "guest to guest",
    "guest-guest-pmd": "guest to guest, testpmd",
    "guest-guest-packed": "guest to guest, testpmd, packed, in order",
}
BACKENDS = ("xdpvhost", "dpdk")


@dataclass
class Sample:
    """One measurement."""

    packets_per_second: float
    cycles_per_packet: float


@dataclass
class Row:
    """One way, one size, one back-end; several samples."""

    way: str
    size: int
    backend: str
    samples: list[Sample] = field(default_factory=list)

    def median(self, what: str) -> float:
        return statistics.median(float(getattr(s, what)) for s in self.samples)

    def spread(self, what: str) -> tuple[float, float]:
        values = [getattr(s, what) for s in self.samples]
        return min(values), max(values)


def make_frame(destination: str, source: str, size: int) -> bytes:
    header = bytes.fromhex(destination.replace(":", "") + source.replace(":", "") + "88b5")
    return header + bytes(i & 0xFF for i in range(size - len(header)))


# ---- back-ends: each gives (paths of the guests' sockets, packets and cycles so far) ----

Cost = Callable[[], tuple[int, int]]


@contextmanager
def xdpvhost(host: Namespace, pairs: int) -> Iterator[tuple[list[Path], Cost]]:
    guests = [f"name=vm{i + 1},mac={mac}" for i, mac in enumerate(MACS)]
    with Daemon(host, iface="nic0", guests=guests, options=["--poll", "busy"]) as daemon:

        def cost() -> tuple[int, int]:
            metrics = daemon.metrics()
            return metrics.total("xdpvhost_worker_packets_total"), metrics.total("xdpvhost_worker_busy_cycles_total")

        yield [daemon.socket(f"vm{i + 1}") for i in range(2)], cost


@contextmanager
def dpdk(host: Namespace, pairs: int) -> Iterator[tuple[list[Path], Cost]]:
    """testpmd forwarding between two vhost ports, or between an AF_XDP and a vhost port."""
    paths = [host.directory / f"dpdk{i}.sock" for i in range(2)]
    vdevs = [f"net_vhost{i},iface={path},queues=1" for i, path in enumerate(paths)]
    if pairs == 1:
        vdevs[1] = "net_af_xdp0,iface=nic0,start_queue=0,queue_count=1"
    argv = ["stdbuf", "-oL", str(TESTPMD), f"--lcores=0@{DRIVER_CPU},1@{BACKEND_CPU}", "--no-huge", "-m", "512"]
    argv += ["--no-pci", "--no-telemetry", "--file-prefix=bench-backend"]
    argv += [word for vdev in vdevs for word in ("--vdev", vdev)]
    argv += ["--", "-i", "--nb-cores=1", "--forward-mode=io", "--record-core-cycles", "--total-num-mbufs=16384"]
    with host.start(*argv, env={"RUNTIME_DIRECTORY": str(host.directory)}, stdin=subprocess.PIPE) as process:
        process.wait_line("testpmd>", 30)
        process.stdin.write(b"start\n")
        process.stdin.flush()

        asked = itertools.count()

        def cost() -> tuple[int, int]:
            before, word = len(process.log()), f"asked{next(asked)}"
            process.stdin.write(f"show fwd stats all\n{word}\n".encode())
            process.stdin.flush()
            process.wait_line(rf"testpmd> {word}\b", 5)  # the prompt echoes what it reads, also what it does not know
            match = re.search(r"total cycles=(\d+) / total \S+ packets=(\d+)", process.log()[before:])
            return (int(match[2]), int(match[1])) if match else (0, 0)

        yield paths, cost
        process.stdin.write(b"stop\nquit\n")
        process.stdin.flush()


SYSTEMS = {"xdpvhost": xdpvhost, "dpdk": dpdk}


class Bench:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def measure(self, way: str, size: int, backend: str) -> Sample:
        with World() as world, ExitStack() as stack:
            host, net = world.namespace("host"), world.namespace("net")
            world.veth(host, "nic0", net, "net0", queues=1)
            to_nic = way in ("nic-guest", "guest-nic")
            paths, cost = stack.enter_context(SYSTEMS[backend](host, 1 if to_nic else 2))
            if way in ("guest-guest-pmd", "guest-guest-packed"):
                return self._pmd(world, paths, size, cost, packed=way == "guest-guest-packed")
            return self._driven(net, stack, paths, way, size, cost)

    def _driven(self, net: Namespace, stack: ExitStack, paths: list[Path], way: str, size: int, cost: Cost) -> Sample:
        guests = [FastGuest(path) for path in paths[: 2 if way == "guest-guest" else 1]]
        job = native.Job(nanoseconds=int(self.seconds * 1e9), program_fd=-1, socket_fd=-1, frame_len=size)
        rings: list[native.Ring] = []
        watch = 0
        received: Callable[[], int] | None = None
        if way != "guest-nic":
            guests[-1].fill(0, None)
        if way != "nic-guest":
            to = MACS[1] if way == "guest-guest" else STRANGER
            guests[0].fill(1, make_frame(to, MACS[0], size))
        for guest in guests:
            stack.callback(guest.close)
            guest.up()
        if way == "nic-guest":
            rings = [guests[0].ring(0)]
        elif way == "guest-nic":
            rings = [guests[0].ring(1)]
        else:
            rings, watch = [guests[0].ring(1), guests[1].ring(0)], 1
        if way != "guest-guest":
            with net.entered():
                received = self._network(net, stack, job, way, size)
        for guest in guests:
            for queue in guest.queues:
                queue.publish()
        table = (native.Ring * len(rings))(*rings)
        job.rings, job.nr_rings = ctypes.addressof(table), len(table)
        os.sched_setaffinity(0, {DRIVER_CPU})
        try:
            with net.entered():
                native.run(job, 0.3)  # warm up: sockets, caches, the guest's driver
                before, done, arrived = cost(), table[watch].done, received() if received else 0
                started = time.monotonic()
                native.run(job, self.seconds)
                elapsed = time.monotonic() - started
                count = received() - arrived if way == "guest-nic" and received else table[watch].done - done
                after = cost()
        finally:
            os.sched_setaffinity(0, {DRIVER_CPU, BACKEND_CPU})
        if count < 1000:
            raise AssertionError(f"{way} at {size} bytes: only {count} packets in {elapsed:.1f} s")
        return Sample(count / elapsed, (after[1] - before[1]) / max(1, after[0] - before[0]))

    def _network(self, net: Namespace, stack: ExitStack, job: native.Job, way: str, size: int) -> Callable[[], int]:
        """The veth's other end: a source of frames for the guest, or a sink that counts."""
        ifindex = int(net.json("ip", "-j", "link", "show", "dev", "net0")[0]["ifindex"])
        obj = stack.enter_context(BpfObject(native.TRAFFIC))
        obj.load()
        zero = bytes(4)
        obj.map("device").update(zero, ifindex.to_bytes(4, "little"))
        if way == "nic-guest":
            frame = ctypes.create_string_buffer(make_frame(MACS[0], STRANGER, size), size)
            stack.callback(lambda: frame)  # keeps it alive
            job.frame, job.program_fd = ctypes.addressof(frame), obj.program_fd("source")
        sink = obj.program_fd("sink")
        check(libbpf().bpf_xdp_attach(ifindex, sink, 0, None), "cannot attach the sink")
        counts = obj.map("received")
        return lambda: sum(int.from_bytes(value, "little") for value in counts.lookup_percpu(zero))

    def _pmd(self, world: World, paths: list[Path], size: int, cost: Cost, packed: bool) -> Sample:
        """One testpmd with two virtio-user ports, each sending to the other's guest what it received from it."""
        os.sched_setaffinity(0, {DRIVER_CPU})
        try:
            ports = [
                VirtioUser(path, mac, queue_size=RING, packed_vq=packed, in_order=packed)
                for path, mac in zip(paths, MACS, strict=True)
            ]
            extra = [f"--eth-peer={i},{MACS[1 - i]}" for i in range(2)] + [f"--txpkts={size}"]
            with TestPmd(ports, directory=world.directory, mode="mac", extra=extra) as pmd:
                pmd.command("set burst 32")
                pmd.command("start tx_first 16")
                self._pause(0.5)
                before, cost_before, started = pmd.stats(0), cost(), time.monotonic()
                other_before = pmd.stats(1)
                self._pause(self.seconds)
                after, other, elapsed, cost_after = pmd.stats(0), pmd.stats(1), time.monotonic() - started, cost()
        finally:
            os.sched_setaffinity(0, {DRIVER_CPU, BACKEND_CPU})
        count = after.rx_packets - before.rx_packets + other.rx_packets - other_before.rx_packets
        if count < 1000:
            raise AssertionError(f"two front-ends at {size} bytes: only {count} packets in {elapsed:.1f} s")
        return Sample(count / elapsed, (cost_after[1] - cost_before[1]) / max(1, cost_after[0] - cost_before[0]))

    @staticmethod
    def _pause(seconds: float) -> None:
        time.sleep(seconds)  # the length of a measurement


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="median of the samples (smallest to largest)")
    for name in ("way", "bytes", "back-end", "Mpps", "cycles/packet", "cycles, ratio to DPDK"):
        table.add_column(name, justify="left" if name in ("way", "back-end") else "right")
    for row in rows:
        peer = next((r for r in rows if (r.way, r.size, r.backend) == (row.way, row.size, "dpdk")), None)
        low, high = row.spread("packets_per_second")
        cheap, dear = row.spread("cycles_per_packet")
        ratio = row.median("cycles_per_packet") / peer.median("cycles_per_packet") if peer and peer is not row else None
        table.add_row(
            WAYS[row.way],
            str(row.size),
            row.backend,
            f"{row.median('packets_per_second') / 1e6:.2f} ({low / 1e6:.2f} to {high / 1e6:.2f})",
            f"{row.median('cycles_per_packet'):.0f} ({cheap:.0f} to {dear:.0f})",
            f"{ratio:.2f}" if ratio else "",
        )
    console.print(table)


BEGIN, END = "<!-- RESULTS of scripts/bench --document: do not edit -->", "<!-- END OF RESULTS -->"


def document(rows: list[Row], facts: dict[str, object], path: Path) -> None:
    """Replace the results in a Markdown file, between BEGIN and END."""
    lines = [
        f"{facts['cpu']}, kernel {facts['kernel']}, {facts['date']}: `{facts['command']}`.",
        "",
        "| way | bytes | back-end | Mpps, median (all samples) | cycles a packet, median (all samples) | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = next((r for r in rows if (r.way, r.size, r.backend) == (row.way, row.size, "dpdk")), None)
        cycles, rate = row.median("cycles_per_packet"), row.median("packets_per_second") / 1e6
        ratio = f"{cycles / peer.median('cycles_per_packet'):.2f}" if peer and peer is not row else ""
        low, high = (value / 1e6 for value in row.spread("packets_per_second"))
        cheap, dear = row.spread("cycles_per_packet")
        lines.append(
            f"| {WAYS[row.way]} | {row.size} | {row.backend} | {rate:.2f} ({low:.2f} to {high:.2f}) "
            f"| {cycles:.0f} ({cheap:.0f} to {dear:.0f}) | {ratio} |"
        )
    head, _, rest = path.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise click.ClickException(f"{path}: the lines {BEGIN!r} and {END!r} are missing")
    path.write_text("\n".join([head + BEGIN, "", *lines, "", END + tail]))


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((row.way, row.size) for row in rows))
    labels = [f"{WAYS[way].replace(', ', ',' + chr(10))}\n{size} bytes" for way, size in cases]
    figure, axes = plt.subplots(2, 1, figsize=(max(8.0, 1.7 * len(cases)), 8.5), layout="constrained")
    units = (("packets_per_second", "million packets a second", 1e6), ("cycles_per_packet", "cycles a packet", 1.0))
    for axis, (what, label, scale) in zip(axes, units, strict=True):
        for offset, backend in enumerate(BACKENDS):
            mine = [next((r for r in rows if (r.way, r.size, r.backend) == (*c, backend)), None) for c in cases]
            found = [(i, r) for i, r in enumerate(mine) if r is not None]
            medians = [r.median(what) / scale for _, r in found]
            spreads = [r.spread(what) for _, r in found]
            errors = [
                [m - low / scale for m, (low, _) in zip(medians, spreads, strict=True)],
                [high / scale - m for m, (_, high) in zip(medians, spreads, strict=True)],
            ]
            at = [i + (offset - 0.5) * 0.38 for i, _ in found]
            bars = axis.bar(at, medians, 0.36, yerr=errors, capsize=3, label=backend)
            axis.bar_label(bars, fmt="%.2f" if scale > 1 else "%.0f", padding=4, fontsize=8)
        axis.set_xticks(range(len(cases)), labels, fontsize=8)
        axis.set_ylabel(label)
        axis.margins(y=0.15)
        axis.legend()
    figure.suptitle("xdpvhost and DPDK testpmd, one run, one CPU for the back-end; bars: median, whiskers: all samples")
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--repeat", default=5, show_default=True, help="Samples of each row.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of a sample.")
@click.option("--size", "sizes", type=click.IntRange(60, 1514), multiple=True, default=(64, 1500), show_default=True)
@click.option("--way", "ways", type=click.Choice(list(WAYS)), multiple=True, default=tuple(WAYS), show_default=True)
@click.option("--backend", "backends", type=click.Choice(BACKENDS), multiple=True, default=BACKENDS, show_default=True)
@click.option("--document", "page", type=click.Path(path_type=Path, exists=True), help="Put the results in this page.")
@click.option("--output", type=click.Path(path_type=Path), default=TOP / ".cache" / "bench" / "result")
def main(
    repeat: int,
    seconds: float,
    sizes: tuple[int, ...],
    ways: tuple[str, ...],
    backends: tuple[str, ...],
    page: Path | None,
    output: Path,
) -> None:
    """Measure packet rates and cycles a packet; writes OUTPUT.json and OUTPUT.png."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    if len(os.sched_getaffinity(0)) < 2:
        raise click.ClickException("two CPUs are needed: one for the back-end, one for guests and network")
    bench = Bench(seconds)
    rows = [Row(way, size, backend) for way in ways for size in sizes for backend in backends]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=repeat * len(rows))
        for turn in range(repeat):
            for row in rows:
                progress.update(task, description=f"{turn + 1}/{repeat} {row.way} {row.size} {row.backend}")
                row.samples.append(bench.measure(row.way, row.size, row.backend))
                progress.advance(task)
    show(rows, console)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["scripts/bench", *sys.argv[1:]]),
        "kernel": os.uname().release,
        "cpu": re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        "rows": [asdict(row) for row in rows],
    }
    output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    plot(rows, output.with_suffix(".png"))
    if page is not None:
        document(rows, facts, page)
    console.print(f"written: {output.with_suffix('.json')} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
