# SPDX-License-Identifier: Apache-2.0
"""Where a capture goes: a file, which may be on a full disk, or a pipe, whose reader may be slow or gone.

What was written is valid, however it ends: a file is cut back to its last whole block. It is opened before the capture
begins, and is as it was until the first block is written.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ..errors import ConfigError, OutputError
from .pcapng import whole

log = logging.getLogger(__name__)

PIECE = 4096  # PIPE_BUF: what a pipe that is ready takes without blocking
NO_READER = 0.05  # seconds between looks whether a named pipe has one
STALLED = 0.5  # seconds that a slow reader gets when it is time to end


class Gone(Exception):
    """The pipe's reader has had enough."""


class Output:
    """An open file (mode 0600 if new: frames are somebody's business), or standard output for `-`."""

    def __init__(self, path: str, stop: Callable[[], bool]) -> None:
        """A named pipe is waited for until it has a reader.

        `stop`: asked while a pipe has none, or does not take anything. Raises ConfigError when it can't be opened, and
        Gone when it is time to stop.
        """
        self.name = "standard output" if path == "-" else path
        self._stop = stop
        self._own = path != "-"
        self._made = False
        self._begun = False
        if self._own:
            try:
                self._fd = self._open(path)
            except OSError as exc:
                raise ConfigError(f"cannot write {Path(path)}: {exc.strerror}; give another file") from exc
        else:
            self._fd = sys.stdout.fileno()
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)

    def _open(self, path: str) -> int:
        """Without a moment in which a signal is not heard: open() of a named pipe goes on waiting after one."""
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            self._made = True
        except FileExistsError:
            fd = self._open_existing(path, flags)
        os.set_blocking(fd, True)
        return fd

    def _open_existing(self, path: str, flags: int) -> int:
        told = False
        while True:
            try:
                return os.open(path, flags | os.O_CREAT, 0o600)
            except OSError as exc:
                if exc.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
                    raise
            if not told:
                log.info("waiting for somebody to read %s", path)
                told = True
            if self._stop():
                raise Gone
            time.sleep(NO_READER)

    def close(self) -> None:
        """Raises OutputError when what was written turns out not to be."""
        if not self._own:
            return
        self._own = False
        try:
            os.close(self._fd)
        except OSError as exc:
            raise self._failure(exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            if self._made and not self._begun:
                with contextlib.suppress(OSError):
                    os.unlink(self.name)
            with contextlib.suppress(OutputError):
                self.close()

    def write(self, blocks: memoryview) -> None:
        """Whole blocks. Raises OutputError, and then as many of them as fitted are there; Gone."""
        done = 0
        try:
            self._begin()
            while done < len(blocks):
                if self._regular:
                    done += os.write(self._fd, blocks[done:])
                else:
                    self._wait()
                    done += os.write(self._fd, blocks[done : done + PIECE])
        except BrokenPipeError:
            raise Gone from None
        except OSError as exc:
            if self._regular:
                with contextlib.suppress(OSError):
                    end = os.fstat(self._fd).st_size
                    os.ftruncate(self._fd, end - done + whole(blocks[:done]))
            raise self._failure(exc) from exc

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            if self._own and self._regular:
                os.ftruncate(self._fd, 0)

    def _wait(self) -> None:
        while not select.select([], [self._fd], [], STALLED)[1]:
            if self._stop():
                raise Gone

    def _failure(self, exc: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self.name}: {exc.strerror}; what is there is valid to its last frame. Make room, or use "
            "another file system, -s or a FILTER"
        )
