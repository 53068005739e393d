# SPDX-License-Identifier: Apache-2.0
"""Processes with a captured log that are gone for certain when their owner is, and waiting with a deadline."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

T = TypeVar("T")


class WaitTimeout(AssertionError):
    """A condition did not come true in time."""


def wait_for(condition: Callable[[], T], deadline: float, what: str, interval: float = 0.02) -> T:
    """Returns the first true value of condition(); raises WaitTimeout that names `what` after `deadline` seconds."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise WaitTimeout(f"waited {deadline:g} s for {what}; last value: {value!r}")
        time.sleep(interval)


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    check: bool = True,
    timeout: float = 30,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end. A failure's message has the command and everything that it printed."""
    done = subprocess.run(
        [os.fspath(a) for a in argv],
        input=input or "",
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        env=None if env is None else {**os.environ, **env},
        check=False,
    )
    if check and done.returncode != 0:
        command = " ".join(os.fspath(a) for a in argv)
        raise AssertionError(f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@dataclass(frozen=True)
class Identity:
    """A process that can't be confused with a later one of the same number."""

    pid: int
    start: str  # proc(5): starttime

    @property
    def alive(self) -> bool:
        stat = _stat(self.pid)
        return stat is not None and stat[19] == self.start and stat[0] not in "ZX"

    def kill(self) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, state first; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def descendants(pid: int) -> set[Identity]:
    """Every process that came from `pid`, itself not included."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            parents[Identity(int(entry.name), stat[19])] = int(stat[1])
    found: set[Identity] = set()
    front = {pid}
    while front:
        children = {i for i, parent in parents.items() if parent in front} - found
        found |= children
        front = {i.pid for i in children}
    return found


class Process:
    """A process in a session of its own, its output in a log file, killed with all its children at close.

    It also dies when the thread that started it does (PR_SET_PDEATHSIG), so start it from the main thread.
    """

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int | None = None,
        separate_stdout: bool = False,
    ) -> None:
        self.argv = [os.fspath(a) for a in argv]
        self.name = name or os.path.basename(self.argv[0])
        self.log_path = log
        self.stdout_path = log.with_suffix(".out") if separate_stdout else log
        with open(log, "ab") as err, open(self.stdout_path, "ab") as out:
            self.popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self.argv],
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=out,
                stderr=err,
                env=None if env is None else {**os.environ, **env},
                pass_fds=pass_fds,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self.popen.stdin is not None, f"{self.name} was started without a pipe on its stdin"
        return self.popen.stdin

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def wait_line(self, pattern: str, deadline: float) -> re.Match[str]:
        """Waits until a line of the log matches; fails at once, with the log, when the process ends before."""
        regex = re.compile(pattern, re.MULTILINE)

        def found() -> re.Match[str] | None:
            running = self.running
            match = regex.search(self.log())
            if match is None and not running:
                ended = f"{self.name} ended with status {self.popen.returncode} before it printed /{pattern}/"
                raise AssertionError(f"{ended}:\n{self.tail()}")
            return match

        try:
            match = wait_for(found, deadline, f"{self.name} to print /{pattern}/")
        except WaitTimeout as error:
            raise WaitTimeout(f"{error}\n{self.tail()}") from None
        assert match is not None
        return match

    def wait(self, deadline: float) -> int:
        """Waits for the process's own end and returns its exit status."""
        try:
            return self.popen.wait(deadline)
        except subprocess.TimeoutExpired:
            raise WaitTimeout(f"{self.name} still ran after {deadline:g} s\n{self.tail()}") from None

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and all that it started, whatever its session; returns when everything is gone."""
        tree = descendants(self.pid) if self.running else set()
        self._kill_group(signal.SIGKILL)
        for identity in tree:
            identity.kill()
        self.popen.wait()
        wait_for(lambda: not any(i.alive for i in tree), 10, f"the children of {self.name} to end")

    def close(self, grace: float = 3) -> None:
        """SIGTERM, `grace` seconds, then SIGKILL to everything that is left of the session. May be called twice."""
        try:
            if self.running and grace > 0:
                self._kill_group(signal.SIGTERM)
                self.popen.wait(grace)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()
            if self.popen.stdin is not None:
                self.popen.stdin.close()

    def _kill_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads, from /proc/PID/stat (proc(5): utime, stime)."""
    fields = _stat(pid)
    assert fields is not None, f"process {pid} is gone"
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
