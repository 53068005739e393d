# SPDX-License-Identifier: Apache-2.0
"""What a stranger's descriptor is, found out without asking its file, and who closes it."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.process import wait_for
from xdpvhost import daemon
from xdpvhost.vhost import fds
from xdpvhost.vhost.errors import ProtocolError, Violation
from xdpvhost.vhost.fds import LOCAL, Fd, mount_type
from xdpvhost.vhost.memory import MappedRegion, Mapping, map_region
from xdpvhost.vhost.wire import MemRegion

MOUNTS = (
    b"24 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
    b"30 24 0:24 / /dev/shm rw - tmpfs tmpfs rw\n"
    b"31 24 0:40 / /home/u/a\\040-\\040tmpfs rw,nosuid - fuse.sshfs u@h:/ rw,user_id=1000\n"
    b"32 24 0:41 / /home/u/x\x0c33\xe2\x80\xa833\xff rw - fuse x rw\n"
)


@pytest.mark.parametrize(
    ("mount", "kind"),
    [(24, "ext4"), (30, "tmpfs"), (31, "fuse.sshfs"), (32, "fuse"), (33, "unknown"), (3, "unknown"), (2, "unknown")],
)
def test_mount_of_a_descriptor(mount: int, kind: str) -> None:
    assert mount_type(b"pos:\t0\nflags:\t02\nmnt_id:\t%d\nino:\t24\n" % mount, MOUNTS) == kind


def test_without_a_mount_it_is_unknown() -> None:
    assert mount_type(b"pos:\t0\n", MOUNTS) == "unknown"
    assert not {"fuse", "fuseblk", "fuse.sshfs", "nfs", "nfs4", "overlay", "unknown"} & LOCAL


def huge() -> int:
    try:
        return os.memfd_create("guest", os.MFD_HUGETLB)
    except OSError:
        pytest.skip("no hugetlbfs")


SOURCES: dict[str, tuple[Callable[[], int], bool]] = {
    "memfd": (lambda: os.memfd_create("guest"), True),
    "hugetlb memfd": (huge, True),
    "tmpfs": (lambda: os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR), True),
    "directory": (lambda: os.open("/dev/shm", os.O_RDONLY), True),
    "eventfd": (lambda: os.eventfd(0), True),
    "unix socket": (lambda: socket.socket(socket.AF_UNIX).detach(), False),
    "tcp socket": (lambda: socket.socket(socket.AF_INET).detach(), False),
    "null": (lambda: os.open("/dev/null", os.O_RDONLY), False),
    "proc": (lambda: os.open("/proc/self/status", os.O_RDONLY), False),
    "pidfd": (lambda: os.pidfd_open(os.getpid()), False),
}


def closers(number: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each closing of this descriptor, whether it is on the thread of the caller of this."""
    here, close, seen = threading.current_thread(), os.close, list[bool]()

    def watched(which: int) -> None:
        close(which)
        if which == number:
            seen.append(threading.current_thread() is here)

    monkeypatch.setattr(fds.os, "close", watched)
    return seen


@pytest.mark.parametrize("source", SOURCES)
def test_what_may_stall_is_closed_elsewhere(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, at_once = SOURCES[source]
    number = make()
    seen = closers(number, monkeypatch)
    Fd(number).close()
    wait_for(lambda: bool(seen), 5, "it to be closed", interval=0.001)
    assert seen == [at_once]


def test_regular_file_of_a_local_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as file:
        fd = Fd(os.dup(file.fileno()))
        if fd.file_system not in LOCAL:
            pytest.skip(f"the temporary directory is in {fd.file_system}")
        seen = closers(fd.number, monkeypatch)
        fd.close()
        assert seen == [True]


def test_memory_elsewhere_is_refused_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file in FUSE: whoever calls stat for it may wait for ever."""

    def stalls(*_: object) -> None:
        raise AssertionError("the daemon hangs here")

    fd, again = Fd(os.open("/proc/self/status", os.O_RDONLY)), Fd(os.open("/proc/self/status", os.O_RDONLY))
    region = MemRegion(0, 4096, 0, 0)
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        mapped = MappedRegion(region, Mapping(file.fileno(), 0, 4096), (0, 0))
    seen = closers(fd.number, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stalls)
        assert not mapped.is_again(region, again)
        with pytest.raises(ProtocolError, match="is in a file system of type proc") as caught:
            map_region(region, fd)
    assert caught.value.violation is Violation.MEMORY
    wait_for(lambda: seen == [False], 5, "it to be closed", interval=0.001)
    again.close()
    mapped.close()


@pytest.mark.parametrize("make", [select.epoll, lambda: socket.socket(socket.AF_UNIX)], ids=["epoll", "unix"])
def test_proc_is_asked_about_files_only(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """fdinfo of an epoll descriptor has a line for each of its items, of which there may be hundreds of thousands."""

    def stalls(path: Path) -> bytes:
        raise AssertionError(f"the daemon reads {path}")

    monkeypatch.setattr(Path, "read_bytes", stalls)
    with make() as hostile, tempfile.TemporaryFile() as file:
        file.truncate(4096)
        mapped = MappedRegion(region := MemRegion(0, 4096, 0, 0), Mapping(file.fileno(), 0, 4096), (0, 0))
        fd = Fd(os.dup(hostile.fileno()))
        assert not mapped.is_again(region, fd)
        assert fd.file_system == "unknown"
        fd.close()
        mapped.close()


def test_sealed_memory() -> None:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert Fd(fd).file_system == "tmpfs"
    os.close(fd)


def test_all_descriptors_that_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        daemon.raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
