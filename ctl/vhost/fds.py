# SPDX-License-Identifier: Apache-2.0
"""File descriptors that came over a socket: each has exactly one owner, and closing twice is harmless.

Control never writes to one of them: the front-end shares its file, may clear O_NONBLOCK behind our back, and a full
one would then block the daemon. Workers do, under a watchdog (datapath/src/dp.c).

A descriptor can be of a file in a FUSE file system of the front-end's own, where stat and even close wait for an answer
that need not come. So what it is, is found out without asking the file: by the name that /proc gives it, its seals, and
the mount that it is on. Only files of `LOCAL` file systems are asked anything, and whatever may stall is closed by the
guest's `Closer`. Not even /proc is asked for more of what has no path: its text for an epoll descriptor has a line for
each item, and is written while the reader waits.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from .closer import Closer
from .errors import ProtocolError, Violation

IN_MEMORY = frozenset({"hugetlbfs", "ramfs", "tmpfs"})
LOCAL = IN_MEMORY | {"btrfs", "ext2", "ext3", "ext4", "f2fs", "xfs"}


class Fd:
    """One owned descriptor; `number` is -1 once closed. `closer` is for when that may stall."""

    __slots__ = ("_closer", "number")

    def __init__(self, number: int, closer: Closer | None = None) -> None:
        self.number = number
        self._closer = closer

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            if _closes_at_once(number):
                os.close(number)
            else:
                (self._closer or Closer()).close(number)

    @property
    def kind(self) -> str:
        """`eventfd`, `pipe`, `socket`, or what the kernel calls anything else."""
        return _kind(self.number)

    @property
    def file_system(self) -> str:
        """The type of file system that the file is in; `unknown` if it isn't mounted here. Raises OSError."""
        return _file_system(self.number) if has_path(self.kind) else "unknown"

    def __repr__(self) -> str:
        return f"Fd({self.number})"


class FdBag:
    """The descriptors of one message. A handler takes what it keeps; `close` disposes of the rest on every path."""

    __slots__ = ("_fds",)

    def __init__(self, numbers: Iterable[int] = (), closer: Closer | None = None) -> None:
        self._fds = [Fd(number, closer) for number in numbers]

    def __len__(self) -> int:
        return len(self._fds)

    @property
    def oldest(self) -> Fd:
        return self._fds[0]

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


def _kind(number: int) -> str:
    target = os.readlink(f"/proc/self/fd/{number}")
    if target.startswith("anon_inode:"):
        return target.removeprefix("anon_inode:").strip("[]")
    return target.split(":", 1)[0] if target.startswith(("pipe:", "socket:")) else target


def _file_system(number: int) -> str:
    try:
        fcntl.fcntl(number, fcntl.F_GET_SEALS)
        return "tmpfs"  # or hugetlbfs, or a memfd of either kind: nothing else has seals
    except OSError:
        fdinfo = Path(f"/proc/self/fdinfo/{number}").read_bytes()
        return mount_type(fdinfo, Path("/proc/self/mountinfo").read_bytes())


def mount_type(fdinfo: bytes, mountinfo: bytes) -> str:
    """The type of file system of a descriptor, from the texts of proc(5).

    A mount point's name has its blanks and newlines escaped, and may have any other byte in it.
    """
    mount = next((line.split()[1] for line in fdinfo.split(b"\n") if line.startswith(b"mnt_id:")), None)
    for line in mountinfo.split(b"\n"):
        place, _, source = line.partition(b" - ")
        if mount is not None and place.split(b" ", 1)[0] == mount:
            return os.fsdecode(source.split(b" ", 1)[0])
    return "unknown"


def _socket_family(number: int) -> tuple[int, int]:
    """Family and type."""
    sock = socket.socket(fileno=number)
    try:
        return sock.family, sock.type
    finally:
        sock.detach()


def _has_name(number: int) -> bool:
    """Whether either end of a connected unix socket is bound. Raises OSError."""
    sock = socket.socket(fileno=number)
    try:
        return bool(sock.getsockname() or sock.getpeername())
    finally:
        sock.detach()


def _closes_at_once(number: int) -> bool:
    """Whether it is known that closing this cannot wait. A terminal may drain; for sockets closer.py has the reason."""
    try:
        kind = _kind(number)
        if kind in ("eventfd", "pipe"):
            return True
        if not has_path(kind) or _file_system(number) not in LOCAL:
            return False
        mode = os.fstat(number).st_mode
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    except OSError:
        return False


def has_path(kind: str) -> bool:
    """Whether a descriptor of this kind is of a file in some file system; memfds count, too."""
    return kind.startswith("/")


def check_channel(fds: FdBag, what: str) -> None:
    """Raises ProtocolError when the oldest descriptor, which is only closed, is of a kind that no front-end sends."""
    try:
        kind = fds.oldest.kind
        if kind == "socket" and _socket_family(fds.oldest.number)[0] != socket.AF_UNIX:
            kind = "a socket that is not a unix socket"
    except OSError as error:
        raise ProtocolError(Violation.FDS, f"{what}: {error.strerror}") from error
    if kind not in ("eventfd", "pipe", "socket"):
        raise ProtocolError(
            Violation.FDS, f"{what} is a descriptor of {kind}; a pipe, a unix socket or an eventfd is needed"
        )


def notification_fd(fds: FdBag, what: str) -> Fd:
    """Takes a kick, call or error descriptor and makes it non-blocking.

    The specification allows eventfds and pipes, User-Mode Linux sends one end of a socket pair. Anything else could
    be readable for ever, refuse to be polled or linger when closed, so it is an error here and not a surprise later.
    A socket must be one of a pair, which has no names: a front-end's own end of a vhost-user connection has one, and
    kept here it would keep that connection alive when the front-end is gone.
    """
    fd = fds.take()
    try:
        kind = fd.kind
        if kind == "socket" and _socket_family(fd.number) != (socket.AF_UNIX, socket.SOCK_STREAM):
            kind = "a socket that is not a unix stream"
        elif kind == "socket" and _has_name(fd.number):
            kind = "a socket of a connection made by name"
        if kind not in ("eventfd", "pipe", "socket"):
            raise ProtocolError(
                Violation.FDS, f"{what} is a descriptor of {kind}; an eventfd, a pipe or a unix stream socket is needed"
            )
        os.set_blocking(fd.number, False)
    except OSError as error:
        fd.close()
        raise ProtocolError(Violation.FDS, f"{what} cannot be made non-blocking: {error.strerror}") from error
    except ProtocolError:
        fd.close()
        raise
    return fd
