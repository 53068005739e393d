# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost capture`: start it, write what comes, end it, say how much it was.

The command reads in turns: all that is there, then a short sleep. It keeps off the workers' CPUs where there are
others, and gives way to everybody else (`nice`): when the machine is short of time, the capture loses frames, and not
the guests.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import click

from .. import api
from ..datapath import CAPTURE_IN, CAPTURE_OUT, CapreadConf, CaptureReader
from ..errors import ConfigError, DaemonError, DatapathError, XdpvhostError
from . import lines, pcapng
from .libpcap import Filter
from .memory import CaptureMemory
from .output import Gone, Output

log = logging.getLogger(__name__)

Direction = Literal["in", "out", "inout"]
DIRECTIONS = {"in": CAPTURE_IN, "out": CAPTURE_OUT, "inout": CAPTURE_IN | CAPTURE_OUT}
ROOM = 1 << 20  # bytes of blocks that are written at once
SLEEP_LEAST, SLEEP_MOST = 0.001, 0.005  # seconds; a ring of 8 MiB holds what 10 Gbit/s bring in 6 ms
NICE = 10
ALL = (1 << 64) - 1


@dataclass(frozen=True)
class Wishes:
    """What to capture, and where to. `count` 0 and `seconds` None: until interrupted."""

    port: str
    output: str | None  # None: lines on a terminal
    expression: str = ""
    snaplen: int = 262144
    direction: Direction = "inout"
    drops_only: bool = False
    count: int = 0
    seconds: float | None = None
    buffer: int = 8 << 20


class _Sink(Protocol):
    def write(self, blocks: memoryview) -> None: ...


class _Terminal:
    def write(self, blocks: memoryview) -> None:
        for packet in pcapng.packets(blocks):
            click.echo(lines.line(packet))
        sys.stdout.flush()


def run(run_dir: Path, wishes: Wishes) -> None:
    """Capture until it is time to end. Raises XdpvhostError; a summary is on stderr in any case once it has begun."""
    if wishes.output is None and not sys.stdout.isatty():
        raise ConfigError("capture: standard output is no terminal; say -w - for pcapng there, or -w FILE")
    if wishes.output == "-" and sys.stdout.isatty():
        raise ConfigError("capture: -w - would write pcapng to a terminal; redirect it, or leave -w out")
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(Filter(wishes.expression)) if wishes.expression else None
        interrupted = _until_interrupted(stack)
        sink: _Sink = _Terminal()
        if wishes.output is not None:
            try:
                sink = stack.enter_context(Output(wishes.output, interrupted))
            except Gone:
                log.info("nobody reads %s; nothing was captured", wishes.output)
                return
        session = stack.enter_context(api.Session(run_dir))
        facts = session.call(
            "capture-start",
            {"port": wishes.port, "buffer": wishes.buffer, "snaplen": wishes.snaplen, "pid": os.getpid()},
        )
        fd = session.take_fd()
        try:
            memory = stack.enter_context(CaptureMemory(fd))
        finally:
            os.close(fd)
        reader = stack.enter_context(_reader(memory, wishes, program))
        _Capture(session, reader, sink, wishes, facts, interrupted).run()


def _reader(memory: CaptureMemory, wishes: Wishes, program: Filter | None) -> CaptureReader:
    conf = CapreadConf(
        memory=memory.address,
        size=memory.size,
        filter=program.function if program else 0,
        program=program.program if program else 0,
        directions=DIRECTIONS[wishes.direction],
        drops_only=int(wishes.drops_only),
    )
    try:
        return CaptureReader(conf)
    except DatapathError as exc:
        raise DatapathError(f"{exc}; is the daemon of another version than this command?", exc.errno) from exc


def _until_interrupted(stack: contextlib.ExitStack) -> Callable[[], bool]:
    """A flag: an exception could come between a frame's arrival and its block."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.signal(number, lambda number, _frame: signals.append(number))
        stack.callback(signal.signal, number, before)
    return lambda: bool(signals)


def _give_way(worker_cpus: Collection[int]) -> None:
    """Nice alone does not do it: it counts within a session or control group, and the daemon is in another."""
    os.nice(NICE)
    with contextlib.suppress(OSError):
        if others := os.sched_getaffinity(0).difference(worker_cpus):
            os.sched_setaffinity(0, others)


class _Capture:
    """One that has begun."""

    def __init__(
        self,
        session: api.Session,
        reader: CaptureReader,
        sink: _Sink,
        wishes: Wishes,
        facts: dict[str, Any],
        interrupted: Callable[[], bool],
    ) -> None:
        self._session = session
        self._reader = reader
        self._sink = sink
        self._wishes = wishes
        self._facts = facts
        self._interrupted = interrupted
        self._buffer = (ctypes.c_char * ROOM)()
        self._left = wishes.count or ALL
        self._frames = 0  # that the sink has

    def run(self) -> None:
        wishes, begin = self._wishes, time.time_ns()
        end = None if wishes.seconds is None else time.monotonic() + wishes.seconds
        what = f"{self._facts['kind']} {self._facts['port']!r}"
        log.info("capturing %s%s", what, f", filter {wishes.expression}" if wishes.expression else "")
        _give_way(self._facts["worker_cpus"])
        unforeseen: DaemonError | None = None
        try:
            if wishes.output is not None:
                name = self._facts["port"]
                self._put(pcapng.section_header())
                self._put(pcapng.interface(name, what, wishes.snaplen, wishes.expression or None))
            try:
                self._read_until(end)
            except DaemonError as exc:
                unforeseen = exc
            if wishes.output is not None:
                counters = self._reader.counters
                self._put(pcapng.statistics(begin, time.time_ns(), counters.seen, counters.lost, counters.taken))
        except Gone:
            log.info("the output's reader has gone")
        finally:
            self._summary()
        if unforeseen is not None:
            raise unforeseen

    def _put(self, block: bytes) -> None:
        self._sink.write(memoryview(block))

    def _read_until(self, end: float | None) -> None:
        sleep = SLEEP_LEAST
        while self._left:
            if self._interrupted() or (end is not None and time.monotonic() >= end):
                self._stop()
                return
            ended = self._reader.ended  # before the look: what comes before it is seen
            if self._read():
                sleep = SLEEP_LEAST
                continue
            if ended:
                raise DaemonError(f"the daemon ended the capture of {self._facts['port']!r}; all that came is written")
            if select.select([self._session], [], [], sleep)[0]:
                while self._read():
                    pass
                raise DaemonError(f"the daemon has gone; what it captured of {self._facts['port']!r} is written")
            sleep = min(2 * sleep, SLEEP_MOST)

    def _stop(self) -> None:
        """Nothing comes any more; what there is is written."""
        with contextlib.suppress(XdpvhostError):
            self._session.call("capture-stop", {"port": self._facts["port"]})
        while self._left and self._read():
            pass

    def _read(self) -> bool:
        """One turn; whether there was anything, wanted or not."""
        counters = self._reader.counters  # live
        seen, taken = counters.seen, counters.taken
        length = self._reader.blocks(self._buffer, self._left)
        if length:
            self._sink.write(memoryview(self._buffer).cast("B")[:length])
            self._frames += counters.taken - taken
        self._left -= counters.taken - taken
        return bool(counters.seen != seen)

    def _summary(self) -> None:
        counters = self._reader.counters
        click.echo(
            f"{self._frames} frames captured\n{counters.seen} frames of {self._facts['port']} looked at\n"
            f"{counters.lost} frames lost: the buffer was full, or it took too much of a worker's time",
            err=True,
        )
