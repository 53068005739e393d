# SPDX-License-Identifier: Apache-2.0
"""What a scene is put through. Each workload adds one sample to every figure that it is about.

In a rate the guest's rings are never the limit: it takes and offers as fast as the device does, and wants no
interrupts, as drivers don't under load. In round trips it wants them (so they can be counted), but polls all the same:
what a guest needs to wake up is the same in every mode, and not in these figures.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from . import cost, native
from .model import ModeResult
from .network import Network, make_frame
from .plan import IDLE, IN, MAC, OUT, PROBE_SIZE, Cpus, latency, rate
from .scene import Scene
from .world import World

WARM_UP = 0.15
DRAIN = 2.0
ENOUGH = 50  # frames; fewer are no rate
UNSERVED = "nothing on this machine serves it that could be measured"
_runs = itertools.count(1)  # tells a probe's frames from late ones of the probe before


@dataclass
class Bench:
    """What all measurements of one scene share."""

    scene: Scene
    world: World
    network: Network
    cpus: Cpus
    result: ModeResult
    seconds: float

    # ---- rates ----

    def rate_in(self, size: int) -> None:
        """Frames a second from the network to the guest."""
        ring, guest = self.scene.device.rx.ring, self.scene.guest_network
        job = self._job(ring)
        mac = guest.mac if guest else MAC
        live = self.world.own and self.scene.mode.live
        if not live:
            self.result.facts["source of frames"] = "a packet socket, which is slower than redirected XDP frames"
        alive = self.network.source(job, make_frame(mac, self.network.mac, size), live=live)
        with guest.sink() if guest else nullcontext(), self.world.threaded(self.cpus.driver) as nic:
            with self._measured(rate(IN, size), [] if guest else nic, ring) as measured:
                self._drive(job, WARM_UP)
                measured.begin(guest.received if guest else lambda: ring.done)
                self._drive(job, self.seconds)
                measured.end()
        del alive

    def rate_out(self, size: int) -> None:
        """Frames a second from the guest to the network, counted where they arrive."""
        queue, guest = self.scene.device.tx, self.scene.guest_network
        job = self._job(queue.ring)
        frame = make_frame(self.network.mac, guest.mac if guest else MAC, size)
        queue.prepare(frame)
        alive = guest.source(job, frame, live=False) if guest else None
        with self.network.sink(), self.world.threaded(self.cpus.driver):
            with self._measured(rate(OUT, size), [], queue.ring) as measured:
                if queue.room:
                    native.offer(queue.ring, queue.room)
                self._drive(job, WARM_UP)
                measured.begin(self.network.received)
                self._drive(job, self.seconds)
                measured.end()
            if left := native.drain(queue.ring, DRAIN):
                raise OSError(0, f"{left} frames that the guest sent never came back")
        del alive

    def _drive(self, job: native.Job, seconds: float) -> None:
        with self.network.namespace.entered():  # the kernel looks up the device of live frames in the caller's
            native.run(job, seconds)

    def _job(self, ring: native.Ring) -> native.Job:
        return native.Job(
            rings=ctypes.addressof(ring), nr_rings=0 if self.scene.guest_network else 1, program_fd=-1, socket_fd=-1
        )

    @contextmanager
    def _measured(self, workload: str, nic: list[int], ring: native.Ring) -> Iterator[_Measured]:
        measured = _Measured(self, workload, nic, ring)
        try:
            yield measured
        finally:
            measured.close()

    # ---- round trips ----

    def round_trips(self, load: str, per_second: int) -> None:
        """Latencies in microseconds, from when a frame was due to when it was back."""
        device, workload, guest = self.scene.device, latency(load), self.scene.guest_network
        mac = guest.mac if guest else MAC
        frame = (ctypes.c_uint8 * PROBE_SIZE).from_buffer_copy(make_frame(mac, self.network.mac, PROBE_SIZE))
        buckets = (ctypes.c_uint64 * native.NR_BUCKETS)()
        wanted = native.Probe(
            rx=ctypes.addressof(device.rx.ring),
            tx=ctypes.addressof(device.tx.ring),
            interval=10**9 // per_second,
            buckets=ctypes.addressof(buckets),
            nr_buckets=len(buckets),
            socket_fd=self.network.socket.fileno(),
            guest_fd=guest.socket.fileno() if guest else -1,
            frame_len=len(frame),
            run=next(_runs),
            frame=ctypes.addressof(frame),
        )
        device.tx.prepare(b"")
        wanted.nanoseconds = int(WARM_UP * 1e9)
        native.probe(wanted)
        ctypes.memset(buckets, 0, ctypes.sizeof(buckets))
        wanted.sent = wanted.received = wanted.refused = 0
        wanted.run = next(_runs)  # frames of the warm-up that come late don't count
        wanted.nanoseconds = int(self.seconds * 1e9)
        device.rx.interrupts(True)
        device.tx.interrupts(True)
        device.calls()
        meter, kicks = cost.Meter(self.scene.threads()), device.rx.ring.kicks + device.tx.ring.kicks
        try:
            before, started = meter.read(), time.monotonic()
            native.probe(wanted)
            spent, elapsed = meter.read() - before, time.monotonic() - started
        finally:
            meter.close()
            device.rx.interrupts(False)
            device.tx.interrupts(False)
        native.drain(device.tx.ring, 0.2)
        figure = self.result.figure
        due = wanted.sent + wanted.refused
        figure(workload, "lost", "%").add(100 * (due - wanted.received) / max(1, due))
        if not wanted.received:
            for name in ("p50", "p99", "p99.9"):
                figure(workload, name, "µs").reason = "no frame came back"
            return
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)):
            figure(workload, name, "µs").add(native.percentile(buckets, share) / 1e3)
        if not meter.threads:
            figure(workload, "cpu", "%").reason = UNSERVED
            return
        figure(workload, "cpu", "%").add(spent.nanoseconds / elapsed / 1e7)
        figure(workload, "switches", "1/frame").add(spent.switches / wanted.received)
        notified = device.rx.ring.kicks + device.tx.ring.kicks - kicks
        figure(workload, "kicks", "1/frame").add(notified / wanted.received)
        calls, interrupts = device.calls(), figure(workload, "interrupts", "1/frame")
        if calls is None:
            interrupts.reason = "a device of QEMU's or of this kernel: its interrupts can't be seen from here"
        else:
            interrupts.add(calls / wanted.received)

    # ---- nothing at all ----

    def idle(self) -> None:
        """CPU time of a guest that is attached and silent."""
        time.sleep(WARM_UP)  # whoever polls for a while has stopped after that
        meter = cost.Meter(self.scene.threads())
        try:
            before, started = meter.read(), time.monotonic()
            time.sleep(self.seconds)  # the length of a measurement
            spent, elapsed = meter.read() - before, time.monotonic() - started
        finally:
            meter.close()
        if not meter.threads:
            self.result.figure(IDLE, "cpu", "%").reason = UNSERVED
            return
        self.result.figure(IDLE, "cpu", "%").add(spent.nanoseconds / elapsed / 1e7)
        self.result.figure(IDLE, "switches", "1/s").add(spent.switches / elapsed)


class _Measured:
    """One rate: `begin` and `end` look at everything that is counted."""

    def __init__(self, bench: Bench, workload: str, nic: list[int], ring: native.Ring) -> None:
        self._bench, self._workload, self._ring = bench, workload, ring
        self._meter = cost.Meter([*bench.scene.threads(), *nic])

    def begin(self, count: Callable[[], int]) -> None:
        self._count = count
        self._copied = self._bench.scene.copied()
        self._before = self._look()

    def _look(self) -> tuple[float, int, cost.Spent, int]:
        return time.monotonic(), self._count(), self._meter.read(), self._ring.kicks

    def end(self) -> None:
        now = self._look()
        elapsed, count = now[0] - self._before[0], now[1] - self._before[1]
        spent, kicks = now[2] - self._before[2], now[3] - self._before[3]
        figure, workload = self._bench.result.figure, self._workload
        if count < ENOUGH:
            figure(workload, "rate", "frames/s").reason = f"only {count} frames arrived in {elapsed:.1f} s"
            return
        figure(workload, "rate", "frames/s").add(count / elapsed)
        cycles, instructions = figure(workload, "cycles", "1/frame"), figure(workload, "instructions", "1/frame")
        if not self._meter.threads:
            cycles.reason = instructions.reason = UNSERVED
            return
        cycles.add(spent.nanoseconds * native.tsc_hz() / 1e9 / count)
        if spent.instructions is not None:
            instructions.add(spent.instructions / count)
        else:
            instructions.reason = cost.instructions_reason() or "not every thread could be counted"
        figure(workload, "switches", "1/frame").add(spent.switches / count)
        figure(workload, "kicks", "1/frame").add(kicks / count)
        copied = self._bench.scene.copied()
        if copied is not None and self._copied is not None and copied[1] > self._copied[1]:
            share = (copied[0] - self._copied[0]) / (copied[1] - self._copied[1])
            figure(workload, "copies by the data plane", "bytes/byte").add(share)

    def close(self) -> None:
        self._meter.close()
