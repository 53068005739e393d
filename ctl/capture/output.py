# SPDX-License-Identifier: Apache-2.0
"""Where a capture goes: a file, which may be on a full disk, or a pipe, whose reader may be slow or gone.

What was written is valid, however it ends: a file is cut back to its last whole block.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ..errors import ConfigError, OutputError
from .pcapng import whole

PIECE = 4096  # PIPE_BUF: what a pipe that is ready takes without blocking
STALLED = 0.5  # seconds that a slow reader gets when it is time to end


class Gone(Exception):
    """The pipe's reader has had enough."""


class Output:
    """An open file (mode 0600 if new: frames are somebody's business), or standard output for `-`."""

    def __init__(self, path: str, stop: Callable[[], bool]) -> None:
        """Raises ConfigError when it can't be opened. `stop`: asked while a pipe does not take anything."""
        self.name = "standard output" if path == "-" else path
        self._stop = stop
        self._own = path != "-"
        if self._own:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                raise ConfigError(f"cannot write {Path(path)}: {exc.strerror}; give another file") from exc
        else:
            self._fd = sys.stdout.fileno()
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)

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
            with contextlib.suppress(OutputError):
                self.close()

    def write(self, blocks: memoryview) -> None:
        """Whole blocks. Raises OutputError, and then as many of them as fitted are there; Gone."""
        done = 0
        try:
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

    def _wait(self) -> None:
        while not select.select([], [self._fd], [], STALLED)[1]:
            if self._stop():
                raise Gone

    def _failure(self, exc: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self.name}: {exc.strerror}; what is there is valid to its last frame. Make room, or use "
            "another file system, -s or a FILTER"
        )
