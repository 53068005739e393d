# SPDX-License-Identifier: Apache-2.0
"""File descriptors that came over a socket: each has exactly one owner, and closing twice is harmless.

Control never writes to one of them: the front-end shares its file, may clear O_NONBLOCK behind our back, and a full
one would then block the daemon. Workers do, under a watchdog (datapath/src/dp.c).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from .errors import ProtocolError, Violation


class Fd:
    """One owned descriptor; `number` is -1 once closed."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    @property
    def kind(self) -> str:
        """`eventfd`, `pipe`, `socket`, or what the kernel calls anything else."""
        target = os.readlink(f"/proc/self/fd/{self.number}")
        if target.startswith("anon_inode:"):
            return target.removeprefix("anon_inode:").strip("[]")
        return target.split(":", 1)[0] if target.startswith(("pipe:", "socket:")) else target

    def __repr__(self) -> str:
        return f"Fd({self.number})"


class FdBag:
    """The descriptors of one message. A handler takes what it keeps; `close` disposes of the rest on every path."""

    __slots__ = ("_fds",)

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._fds = [Fd(number) for number in numbers]

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> Fd:
        """Hands over the oldest descriptor; the caller owns it now."""
        return self._fds.pop(0)

    def take_all(self) -> list[Fd]:
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        for fd in self.take_all():
            fd.close()


def close_fd(fd: Fd | None) -> None:
    if fd is not None:
        fd.close()


def notification_fd(fds: FdBag, what: str) -> Fd:
    """Takes a kick, call or error descriptor and makes it non-blocking.

    The specification allows eventfds and pipes, User-Mode Linux sends one end of a socket pair. Anything else could
    be readable for ever or refuse to be polled, so it is an error here and not a surprise in a worker.
    """
    fd = fds.take()
    try:
        kind = fd.kind
        if kind not in ("eventfd", "pipe", "socket"):
            raise ProtocolError(
                Violation.FDS, f"{what} is a descriptor of {kind}; an eventfd, a pipe or a stream socket is needed"
            )
        os.set_blocking(fd.number, False)
    except OSError as error:
        fd.close()
        raise ProtocolError(Violation.FDS, f"{what} cannot be made non-blocking: {error.strerror}") from error
    except ProtocolError:
        fd.close()
        raise
    return fd
