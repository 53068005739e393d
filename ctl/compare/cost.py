# SPDX-License-Identifier: Apache-2.0
"""What serving costs: CPU time, instructions and context switches of all threads that serve, the kernel's included.

CPU time is the scheduler's own count (proc(5), schedstat), in nanoseconds. Cycles are that time × the rate of the time
stamp counter: not what the core's clock did, but the same unit for all rows. Instructions come from the CPU's counter,
where perf_event_open gives it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import native

PROC = Path("/proc")


@dataclass(frozen=True)
class Spent:
    """Of a set of threads, since they began; or between two looks."""

    nanoseconds: int = 0
    switches: int = 0
    instructions: int | None = None

    def __sub__(self, before: Spent) -> Spent:
        counted = self.instructions is not None and before.instructions is not None
        return Spent(
            self.nanoseconds - before.nanoseconds,
            self.switches - before.switches,
            (self.instructions or 0) - (before.instructions or 0) if counted else None,
        )


def threads_of(pids: Iterable[int]) -> list[int]:
    """The thread ids of processes."""
    found: list[int] = []
    for pid in pids:
        with contextlib.suppress(OSError):
            found += [int(entry.name) for entry in (PROC / str(pid) / "task").iterdir()]
    return found


def kernel_threads(prefix: str) -> list[int]:
    """The threads of the kernel whose name begins so; none where /proc has another PID namespace."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "comm").read_text().startswith(prefix) and not (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


@cache
def kernel_threads_visible() -> bool:
    """Whether this PID namespace is the machine's: kthreadd is process 2 there."""
    with contextlib.suppress(OSError):
        return (PROC / "2" / "comm").read_text().strip() == "kthreadd"
    return False


@cache
def instructions_reason() -> str:
    """Why instructions can't be counted; empty when they can."""
    fd = native.library().xvg_count_instructions(0)
    if fd >= 0:
        os.close(fd)
        return ""
    if -fd in (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV, errno.ENXIO):
        return "this machine shows its guests no hardware counters (perf_event_open: no such event)"
    return f"perf_event_open: {os.strerror(-fd)}"


class Meter:
    """Counters of some threads; instructions are counted from here on."""

    def __init__(self, threads: Iterable[int]) -> None:
        self.threads = list(threads)
        self._counters: list[int] = []
        if not instructions_reason():
            for thread in self.threads:
                fd = native.library().xvg_count_instructions(thread)
                if fd >= 0:
                    self._counters.append(fd)

    def read(self) -> Spent:
        nanoseconds = switches = 0
        for thread in self.threads:
            with contextlib.suppress(OSError):
                nanoseconds += int((PROC / str(thread) / "schedstat").read_text().split()[0])
                for line in (PROC / str(thread) / "status").read_text().splitlines():
                    if "ctxt_switches" in line:
                        switches += int(line.split()[1])
        counted = len(self._counters) == len(self.threads) and self._counters
        total = sum(int.from_bytes(os.read(fd, 8), "little") for fd in self._counters) if counted else None
        return Spent(nanoseconds, switches, total)

    def close(self) -> None:
        for fd in self._counters:
            os.close(fd)
        self._counters.clear()
