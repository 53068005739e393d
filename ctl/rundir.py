# SPDX-License-Identifier: Apache-2.0
"""Who may run where: one daemon a run directory, one daemon an interface.

The run directory is locked by flock on RUN_DIR/daemon.lock, whose content is the daemon's pid. The interface is locked
by an abstract unix socket `xdpvhost/IFINDEX`: abstract names belong to a network namespace as interface indexes do, and
vanish with their process, so that nothing is left after kill -9. Both locks say who holds them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self

from .errors import ConfigError, DaemonError, NicError
from .vhost.endpoint import remove_stale

LOCK_FILE = "daemon.lock"
JOURNAL_FILE = "journal.jsonl"
SO_ACCEPTCON = 0x10000  # flag in /proc/net/unix: listening


class RunDirTaken(DaemonError):
    """Another daemon has the run directory."""


class RunDir:
    """The locked run directory of one daemon. close() removes the lock, and the directory if it was made here."""

    def __init__(self, path: Path) -> None:
        """Make `path` when it is missing, and lock it. Raises DaemonError when another daemon has it."""
        self.path = path
        self._fd: int | None = None
        try:
            path.mkdir(mode=0o755, parents=True)
            self._made = True
        except FileExistsError:
            self._made = False
        except OSError as exc:
            raise DaemonError(f"cannot make run directory {path}: {exc.strerror}; give another --run-dir") from exc
        _refuse_foreign(path)
        self._fd = self._lock()

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL_FILE

    def _lock(self) -> int:
        lock = self.path / LOCK_FILE
        while True:
            try:
                fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as exc:
                raise DaemonError(f"cannot lock {lock}: {exc.strerror}; give another --run-dir") from exc
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
                os.close(fd)
                raise RunDirTaken(
                    f"another xdpvhost (pid {pid}) runs in {self.path}; end it with `xdpvhost down`, or give another "
                    "--run-dir"
                ) from None
            if _same_file(fd, lock):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
            os.close(fd)  # its last owner removed it between our open and our lock

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is None:
            return
        if self.journal.exists() and not self.journal.stat().st_size:
            self.journal.unlink()
        (self.path / LOCK_FILE).unlink(missing_ok=True)
        os.close(fd)
        if self._made:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def adopt(self) -> None:
        """Let close() remove the directory as if it was made here, when nothing else is in it."""
        self._made = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_foreign(path: Path) -> None:
    """What the journal says is done as root, so nobody else may write it, or put something else in its place."""
    try:
        found = path.stat()
    except OSError as exc:
        raise DaemonError(f"cannot use run directory {path}: {exc.strerror}; give another --run-dir") from exc
    if found.st_uid != os.geteuid():
        raise DaemonError(f"run directory {path} is owned by user {found.st_uid}; chown it, or give another --run-dir")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DaemonError(
            f"run directory {path} may be written by others (mode {stat.S_IMODE(found.st_mode):o}); `chmod 755` it, or "
            "give another --run-dir"
        )


def _same_file(fd: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    opened = os.fstat(fd)
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)


def wait_unlocked(path: Path, timeout: float) -> bool:
    """Wait until no daemon has the run directory `path`; False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
        finally:
            os.close(fd)
    return False


def interface_index(iface: str) -> int:
    """The index of `iface` in this network namespace; NicError when there is none."""
    try:
        return socket.if_nametoindex(iface)
    except OSError as exc:
        raise NicError(f"interface {iface!r} does not exist here; `ip link` lists those that do") from exc


class InterfaceLock:
    """Holds the interface until closed; DaemonError, with `remedy` after "end it", when another xdpvhost does."""

    def __init__(
        self, iface: str, remedy: str = "add the guest to it with `xdpvhost guest add`, or use another interface"
    ) -> None:
        self.index = interface_index(iface)
        address = f"\0xdpvhost/{self.index}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(address)
            self._socket.listen()
        except OSError as exc:
            self._socket.close()
            if exc.errno != errno.EADDRINUSE:
                raise NicError(f"cannot lock interface {iface}: {exc.strerror}; try again") from exc
            raise DaemonError(f"another xdpvhost{_holder(address)} has interface {iface}; end it, {remedy}") from exc

    def close(self) -> None:
        self._socket.close()


class InterfaceLocks:
    """Those of all interfaces of one daemon, taken by index: of two daemons that want the same, one gets them all."""

    def __init__(self, ifaces: Sequence[str]) -> None:
        """Raises as InterfaceLock does, and ConfigError for two names of one interface; then none is held."""
        self.indices = [interface_index(iface) for iface in ifaces]
        by_index: dict[int, str] = {}
        for index, iface in zip(self.indices, ifaces, strict=True):
            other = by_index.setdefault(index, iface)
            if other != iface:
                raise ConfigError(f"--iface {iface}: is another name of {other}; give one of them")
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            for _, iface in sorted(by_index.items()):
                undo.callback(InterfaceLock(iface).close)
            self._stack = undo.pop_all()

    def close(self) -> None:
        self._stack.close()


def _holder(address: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(address)
            pid, user, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return ""
    if user != os.geteuid():
        return f" (pid {pid}, user {user})"
    return f" (pid {pid})" if pid else ""  # 0: it is out of our PID namespace


def _listening() -> frozenset[str]:
    """Paths of the unix sockets that this network namespace's processes listen on."""
    paths = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and int(fields[3], 16) & SO_ACCEPTCON:
            paths.add(fields[7])
    return frozenset(paths)


def remove_stale_sockets(run_dir: Path, keep: Collection[Path] = ()) -> list[Path]:
    """Remove the sockets in `run_dir` that nobody listens on; the caller has the directory's lock. What was removed.

    A front-end that listens there itself must not be disturbed by a connection that is only a question: those in `keep`
    are left alone, and so are all that the kernel says are listening.
    """
    removed = []
    listening = _listening()
    for path in sorted(run_dir.glob("*.sock")):
        if path in keep or str(path) in listening or not stat.S_ISSOCK(path.lstat().st_mode):
            continue
        with contextlib.suppress(ConfigError):
            remove_stale(path.stem, path)
            removed.append(path)
    return removed
