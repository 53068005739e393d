# SPDX-License-Identifier: Apache-2.0
"""What is asked for: options, and the names of workloads and metrics as they stand in results."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ..errors import ConfigError

SIZES = (64, 512, 1500)
MAC = "52:54:00:00:00:01"
PROBE_SIZE = 64

IN, OUT = "in", "out"  # network to guest, guest to network
LOW, HIGH = "low", "high"
IDLE, TCP = "idle", "tcp"
TITLES = {IN: "network → guest", OUT: "guest → network", LOW: "low load", HIGH: "high load"}


def rate(way: str, size: int) -> str:
    """The name of a workload."""
    return f"rate-{way}-{size}"


def latency(load: str) -> str:
    """The name of a workload."""
    return f"latency-{load}"


@dataclass(frozen=True)
class Plan:
    """Options of `xdpvhost compare`; times in seconds, loads in frames a second."""

    modes: tuple[str, ...] = ()  # empty: all
    sizes: tuple[int, ...] = SIZES
    seconds: float = 1.0
    repeat: int = 5
    loads: dict[str, int] = field(default_factory=lambda: {LOW: 1000, HIGH: 50000})
    uml: bool = False
    iface: str | None = None
    peer: str | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        if (self.iface is None) != (self.peer is None):
            raise ConfigError("--iface and --peer belong together: the NIC, and the interface at its other end")
        if len(os.sched_getaffinity(0)) < 2:
            raise ConfigError(
                "two CPUs are needed, one for what serves the guest and one for guest and network; this process may "
                f"use {len(os.sched_getaffinity(0))}"
            )


@dataclass(frozen=True)
class Cpus:
    """Who runs where: guest and network on one CPU, all that serves the guest on another."""

    driver: set[int]
    server: set[int]
    all: set[int]

    @classmethod
    def of_process(cls) -> Cpus:
        cpus = sorted(os.sched_getaffinity(0))
        return cls({cpus[0]}, {cpus[1]}, set(cpus))
