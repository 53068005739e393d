# SPDX-License-Identifier: Apache-2.0
"""DPDK's testpmd: with net_virtio_user as a front-end, with net_vhost as a back-end to compare with.

It is driven through its prompt on a pipe. Commands are done one after the other and the prompt echoes what it reads,
so a made-up word after a command shows up in the log only when that command is done.
"""

import os
import re
import secrets
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .process import Process, wait_for

PROGRAM = Path("/usr/bin/dpdk-testpmd")


@dataclass(frozen=True)
class VirtioUser:
    """A front-end port (DPDK's net_virtio_user) on a vhost-user socket."""

    path: Path
    mac: str
    queues: int = 1
    mrg_rxbuf: bool = True
    packed_vq: bool = False
    in_order: bool = False
    vectorized: bool = False
    queue_size: int = 256
    server: bool = False  # it listens and the back-end connects; only so does it take a back-end that comes back

    def argument(self, index: int) -> str:
        words = [f"net_virtio_user{index}", f"path={self.path}", f"mac={self.mac}", f"queues={self.queues}"]
        words += [f"queue_size={self.queue_size}", f"mrg_rxbuf={self.mrg_rxbuf:d}", f"packed_vq={self.packed_vq:d}"]
        words += [f"in_order={self.in_order:d}", f"vectorized={self.vectorized:d}"]
        return ",".join(words + (["server=1"] if self.server else []))


@dataclass(frozen=True)
class Vhost:
    """A back-end port (DPDK's net_vhost), the reference for ours."""

    path: Path
    queues: int = 1
    client: bool = False

    def argument(self, index: int) -> str:
        return f"net_vhost{index},iface={self.path},queues={self.queues},client={self.client:d}"


@dataclass(frozen=True)
class PortStats:
    rx_packets: int
    rx_bytes: int
    rx_missed: int
    rx_errors: int
    rx_nombuf: int
    tx_packets: int
    tx_bytes: int
    tx_errors: int


class TestPmd:
    """A testpmd with the given ports, at its prompt, not yet forwarding."""

    __test__ = False  # not a test class

    def __init__(
        self,
        ports: Sequence[VirtioUser | Vhost],
        *,
        directory: Path,
        mode: str = "rxonly",
        extra: Sequence[str] = (),
        memory: int = 512,
    ) -> None:
        self.ports = list(ports)
        queues = max(p.queues for p in ports)
        name = f"testpmd-{secrets.token_hex(3)}"
        cpus = ",".join(str(c) for c in sorted(os.sched_getaffinity(0)))
        argv = ["stdbuf", "-oL", str(PROGRAM), f"--lcores=0@({cpus}),1@({cpus})", "--no-huge", "-m", str(memory)]
        argv += ["--no-pci", "--single-file-segments", "--no-telemetry", f"--file-prefix={name}"]
        for index, port in enumerate(ports):
            argv += ["--vdev", port.argument(index)]
        argv += ["--", "-i", "--nb-cores=1", f"--forward-mode={mode}", f"--rxq={queues}", f"--txq={queues}"]
        argv += ["--total-num-mbufs=8192", *extra]
        self._next = 0
        self.process = Process(
            argv,
            log=directory / f"{name}.log",
            name=name,
            stdin=subprocess.PIPE,
            env={"RUNTIME_DIRECTORY": str(directory)},  # where DPDK leaves its files
        )
        try:
            self.process.wait_line(r"testpmd>", 30)
        except BaseException:
            self.process.close(grace=0)
            raise

    def command(self, text: str, deadline: float = 10) -> str:
        """Gives a command at the prompt; returns what it printed."""
        self._next += 1
        word = f"done{self._next}"
        before = len(self.process.log())
        self.process.stdin.write(f"{text}\n{word}\n".encode())
        self.process.stdin.flush()
        self.process.wait_line(rf"testpmd> {word}\b", deadline)
        return self.process.log()[before:]

    def start(self) -> None:
        self.command("start")

    def stop(self) -> None:
        self.command("stop")

    def send(self, count: int, *, size: int = 64, destination: str | None = None, port: int = 0) -> None:
        """Sends `count` UDP frames of `size` bytes on each queue of each port, then goes on in the forwarding mode."""
        assert 1 <= count <= 512, "testpmd's burst is at most 512"
        if destination is not None:
            self.command(f"set eth-peer {port} {destination}")
        self.command(f"set txpkts {size}")
        self.command(f"set burst {count}")
        self.command("start tx_first 1")

    def stats(self, port: int = 0) -> PortStats:
        text = self.command(f"show port stats {port}")

        def number(name: str) -> int:
            match = re.search(rf"{name}:\s*(\d+)", text)
            assert match is not None, f"no {name} in what testpmd printed:\n{text}"
            return int(match[1])

        return PortStats(
            rx_packets=number("RX-packets"),
            rx_bytes=number("RX-bytes"),
            rx_missed=number("RX-missed"),
            rx_errors=number("RX-errors"),
            rx_nombuf=number("RX-nombuf"),
            tx_packets=number("TX-packets"),
            tx_bytes=number("TX-bytes"),
            tx_errors=number("TX-errors"),
        )

    def xstats(self, port: int = 0) -> dict[str, int]:
        """All of a port's statistics, also each queue's (`rx_q0_good_packets`)."""
        return {k: int(v) for k, v in re.findall(r"^(\w+): (\d+)", self.command(f"show port xstats {port}"), re.M)}

    def wait_received(self, count: int, deadline: float = 10, port: int = 0) -> PortStats:
        """Waits until the port has received `count` frames or more."""

        def enough() -> PortStats | None:
            stats = self.stats(port)
            return stats if stats.rx_packets >= count else None

        stats = wait_for(enough, deadline, f"{count} frames at testpmd's port {port}", interval=0.1)
        assert stats is not None
        return stats

    def link_up(self, port: int = 0) -> bool:
        return "Link status: up" in self.command(f"show port info {port}")

    def close(self) -> None:
        self.process.close(grace=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
