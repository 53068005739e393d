# SPDX-License-Identifier: Apache-2.0
"""The order of things: modes take turns over the repeats, so that the machine's mood hits all alike.

One scene is up at a time, and one thing is measured at a time. Ctrl-C unwinds everything that is set up.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import DaemonError, XdpvhostError
from . import cost, modes, native, tcp
from .model import ModeResult, Report
from .network import Network
from .plan import HIGH, IDLE, IN, LOW, OUT, TCP, TITLES, Cpus, Plan, latency, rate
from .scene import Scene, new_directory, reason_of
from .workloads import Bench
from .world import World

Progress = Callable[[str, int, int], None]  # what, steps done, steps in all
Step = tuple[str, Callable[[Bench], None]]  # what a figure's name begins with, and how to measure it


def steps(plan: Plan) -> list[Step]:
    """The workloads of one scene, in order."""
    found: list[Step] = [(IDLE, lambda bench: bench.idle())]
    for load in (LOW, HIGH):
        per_second = plan.loads[load]
        found.append((latency(load), lambda bench, load=load, n=per_second: bench.round_trips(load, n)))  # type: ignore[misc]
    for size in plan.sizes:
        found.append((rate(IN, size), lambda bench, size=size: bench.rate_in(size)))  # type: ignore[misc]
    for size in plan.sizes:
        found.append((rate(OUT, size), lambda bench, size=size: bench.rate_out(size)))  # type: ignore[misc]
    return found


def run(plan: Plan, command: str, progress: Progress) -> Report:
    """Measure. Raises ConfigError for a bad plan, NicError where not even the veth can be made."""
    plan.check()
    chosen = modes.named(plan.modes)
    report = Report(facts=machine_facts(command), options={**asdict(plan), "sizes": list(plan.sizes)})
    results = {
        mode.name: ModeResult(mode=mode.name, title=mode.title, path=mode.path, facts=_copies(mode)) for mode in chosen
    }
    report.modes = list(results.values())
    todo = steps(plan)
    each = len(todo) + plan.uml
    total, done = plan.repeat * len(chosen) * each, 0
    cpus = Cpus.of_process()
    directory = Path(tempfile.mkdtemp(prefix="xvc-"))
    try:
        for turn in range(plan.repeat):
            for mode in chosen:
                result = results[mode.name]
                if result.reason:
                    done += each
                    continue
                at = done

                def tell(what: str, index: int, at: int = at, title: str = mode.title, turn: int = turn) -> None:
                    progress(f"{turn + 1}/{plan.repeat} {title}: {what}", at + index, total)

                _one_scene(plan, mode, result, todo, directory, cpus, tell)
                if plan.uml and not result.reason:
                    tell("TCP", len(todo))
                    _tcp(plan, mode, result, directory, cpus)
                done += each
        progress("done", total, total)
    finally:
        os.sched_setaffinity(0, cpus.all)
        shutil.rmtree(directory, ignore_errors=True)
    return report


def _one_scene(
    plan: Plan,
    mode: modes.Mode,
    result: ModeResult,
    todo: Sequence[Step],
    directory: Path,
    cpus: Cpus,
    tell: Callable[[str, int], None],
) -> None:
    tell("set up", 0)
    where = new_directory(directory)
    with World(plan.iface, plan.peer) as world, Network(world.net, world.peer) as network:
        try:
            scene = Scene(mode, world, where, cpus)
            try:
                world.wait_carrier()
            except BaseException:
                scene.close()
                raise
        except (XdpvhostError, OSError) as exc:
            result.reason = reason_of(exc)
            return
        with scene:
            result.facts |= scene.facts
            bench = Bench(scene, world, network, cpus, result, plan.seconds)
            os.sched_setaffinity(0, cpus.driver)
            try:
                for index, (workload, measure) in enumerate(todo):
                    tell(_words(workload), index)
                    try:
                        measure(bench)
                    except (XdpvhostError, OSError) as exc:
                        result.figure(workload, "rate", "frames/s").reason = reason_of(exc)
            finally:
                os.sched_setaffinity(0, cpus.all)


def _tcp(plan: Plan, mode: modes.Mode, result: ModeResult, directory: Path, cpus: Cpus) -> None:
    where, image = new_directory(directory), directory / "guest.cpio"
    try:
        if mode.device not in ("vhost-user", "virtio", "vhost-net"):
            raise DaemonError(f"User-Mode Linux has no device for {mode.title}")
        if not image.exists():
            tcp.initramfs(image)
        with World(plan.iface, plan.peer) as world, Scene(mode, world, where, cpus, attach=False) as scene:
            world.wait_carrier()
            tcp.measure(scene, world, result, cpus, image, plan.seconds)
    except (XdpvhostError, OSError, subprocess.SubprocessError) as exc:
        for way in (OUT, IN):
            result.figure(TCP, way, "Gb/s").reason = reason_of(exc)


def _words(workload: str) -> str:
    kind, _, rest = workload.partition("-")
    way, _, size = rest.partition("-")
    return f"{TITLES[way]}, {size} bytes" if kind == "rate" else f"round trips, {TITLES[way]}" if way else kind


def _copies(mode: modes.Mode) -> dict[str, str]:
    return {f"copies {way}": text for way, text in mode.copies.items()}


def machine_facts(command: str) -> dict[str, str]:
    """What a reader must know of this machine."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    seen = "counted" if cost.kernel_threads_visible() else "not counted: this PID namespace hides the kernel's threads"
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "kernel": os.uname().release,
        "cpu": model[1] if model else os.uname().machine,
        "cpus": str(len(os.sched_getaffinity(0))),
        "cycles": f"CPU time of the threads that serve × {native.tsc_hz() / 1e9:.2f} GHz (time stamp counter)",
        "instructions": cost.instructions_reason() or "counted by the CPU",
        "kernel's receive work": seen,
    }
