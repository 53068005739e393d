# SPDX-License-Identifier: Apache-2.0
"""Child processes with a log that end when their owner does, however it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

from ..errors import DaemonError

T = TypeVar("T")
TAIL = 12


def wait_until(condition: Callable[[], T], seconds: float, what: str, interval: float = 0.01) -> T:
    """The first true value of condition(). Raises DaemonError that names `what`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() >= end:
            raise DaemonError(f"waited {seconds:g} s for {what}")
        time.sleep(interval)
    return value


class Child:
    """A process in a session of its own (Ctrl-C is ours alone), in the network namespace of the calling thread.

    It also dies when the thread that started it does, so start it from the main thread.
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        cpus: set[int] | None = None,
        pass_fds: Sequence[int] = (),
        env: dict[str, str] | None = None,
        stdin: int | None = None,
    ) -> None:
        self.argv = list(argv)
        self.name = os.path.basename(self.argv[0])
        self.log = log
        prefix = ["setpriv", "--pdeathsig", "KILL", "--"]
        if cpus:
            prefix += ["taskset", "--cpu-list", ",".join(map(str, sorted(cpus)))]
        with log.open("ab") as out:
            self.popen = subprocess.Popen(
                [*prefix, *self.argv],
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=out,
                stderr=out,
                env=None if env is None else {**os.environ, **env},
                pass_fds=pass_fds,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self.popen.stdin is not None
        return self.popen.stdin

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The last lines of its log, for an error message."""
        return " | ".join(self.text().strip().splitlines()[-TAIL:]) or "it printed nothing"

    def alive(self) -> None:
        """Raises DaemonError when it has ended."""
        if self.popen.poll() is not None:
            raise DaemonError(f"{self.name} ended with status {self.popen.returncode}: {self.tail()}")

    def wait_line(self, pattern: str, seconds: float, start: int = 0) -> re.Match[str]:
        """Waits for a line of the log, from character `start` on. Raises DaemonError with the log."""
        regex = re.compile(pattern, re.MULTILINE)

        def found() -> re.Match[str] | None:
            match = regex.search(self.text(), start)
            if match is None:
                self.alive()
            return match

        try:
            match = wait_until(found, seconds, f"{self.name} to print /{pattern}/")
        except DaemonError as exc:
            raise DaemonError(f"{exc}: {self.tail()}") from None
        assert match is not None
        return match

    def close(self, grace: float = 10) -> None:
        """SIGTERM, time to undo things, SIGKILL to what is left of its session."""
        with contextlib.suppress(ProcessLookupError):
            if self.popen.poll() is None and grace:
                self.popen.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.popen.wait(grace)
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        if self.popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.popen.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()
