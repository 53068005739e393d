# SPDX-License-Identifier: Apache-2.0
"""Memory that a front-end shares besides the guest's: the dirty-page log and the in-flight region.

Workers write there while the front-end holds the other end of the file and may truncate it, so the data plane guards
it as it guards guest memory. Only files in memory are taken: a worker must not wait for a disk.

The log has one bit for each page of 4096 bytes from guest physical address 0 on. A page without a bit would not be
moved with its guest, so a log that does not reach the end of memory counts as none: rings wait for a better one.

An in-flight region has a part of equal size for each ring. It is ours when it is asked for (a sealed memfd) but comes
back from the front-end as any descriptor, with any numbers.
"""

from __future__ import annotations

import fcntl
import os
from typing import Self

from .errors import ProtocolError, Violation
from .fds import IN_MEMORY, Fd
from .memory import Mapping, map_file
from .port import DevicePort, Memory
from .wire import MAX_RING_SIZE, Inflight, Log

LOG_PAGE = 4096
LOG_PER_BYTE = LOG_PAGE * 8  # bytes of guest memory
MAX_LOG = 1 << 34  # for addresses below 2^49: a front-end may use its own virtual ones as guest physical


class SharedArea:
    """`size` bytes at `offset` of a front-end's file, mapped, and known to the data plane as `native`."""

    __slots__ = ("_mapping", "native", "size")

    def __init__(self, port: DevicePort, what: str, fd: Fd, offset: int, size: int) -> None:
        """Raises ProtocolError when the file is not right for it, DatapathError. `fd` stays the caller's."""
        mapping, _file = map_file(what, fd, offset, size, IN_MEMORY)
        try:
            # The mapping begins at or before `offset`, which must not be added again (CVE-2026-86563).
            self.native: Memory = port.shared(mapping.address + offset - mapping.offset, size)
        except BaseException:
            mapping.close()
            raise
        self._mapping: Mapping = mapping
        self.size = size

    def close(self) -> None:
        """Only when no published ring uses it."""
        self.native.close()
        self._mapping.close()


class DirtyLog(SharedArea):
    """The bitmap of SET_LOG_BASE."""

    __slots__ = ()

    def __init__(self, port: DevicePort, log: Log, fd: Fd) -> None:
        if log.size > MAX_LOG:
            raise ProtocolError(Violation.MEMORY, f"dirty log of {log.size:#x} bytes, {MAX_LOG:#x} are allowed")
        super().__init__(port, "dirty log", fd, log.offset, log.size)

    def covers(self, end: int) -> bool:
        """Whether every page below guest physical address `end` has its bit."""
        return end <= self.size * LOG_PER_BYTE


class InflightRegion(SharedArea):
    """The region of SET_INFLIGHT_FD, for rings 0 to `queues` - 1 of up to `queue_size` entries."""

    __slots__ = ("_port", "queue_size", "queues")

    def __init__(self, port: DevicePort, region: Inflight, fd: Fd) -> None:
        region.check_area()
        check_inflight(port, region)
        if region.size > (most := region.queues * port.inflight_size(MAX_RING_SIZE, True)):
            raise ProtocolError(
                Violation.MEMORY,
                f"in-flight region of {region.size:#x} bytes, {region.queues} rings never need more than {most:#x}",
            )
        super().__init__(port, "in-flight region", fd, region.offset, region.size)
        self._port = port
        self.queues, self.queue_size = region.queues, region.queue_size

    def part(self, index: int, num: int, packed: bool) -> int:
        """Where the part of ring `index`, of `num` entries, begins. Raises ProtocolError when it has no room."""
        if num > self.queue_size:
            raise ProtocolError(
                Violation.VALUE,
                f"ring {index} of {num} entries is larger than its in-flight region, made for {self.queue_size}",
            )
        each = self._port.inflight_size(self.queue_size, packed)
        if (index + 1) * each > self.size:
            raise ProtocolError(
                Violation.MEMORY, f"in-flight region of {self.size:#x} bytes has no room for ring {index}"
            )
        return index * each


def check_inflight(port: DevicePort, region: Inflight) -> None:
    """Raises ProtocolError when a region is for rings that this device cannot have."""
    rings = 2 * port.max_pairs + 1
    if not 0 < region.queues <= rings:
        raise ProtocolError(
            Violation.VALUE, f"in-flight region for {region.queues} rings, this device has {rings} rings at most"
        )
    if not 0 < region.queue_size <= MAX_RING_SIZE:
        raise ProtocolError(
            Violation.VALUE, f"in-flight region for rings of {region.queue_size} entries, 1 to {MAX_RING_SIZE} can be"
        )


class SealedFile:
    """A memfd of ours for the front-end, whose size nobody can change any more. Owns its descriptor."""

    __slots__ = ("fd", "size")

    def __init__(self, name: str, size: int) -> None:
        """Raises OSError."""
        self.fd = Fd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        self.size = size
        try:
            os.ftruncate(self.fd.number, size)
            fcntl.fcntl(self.fd.number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except BaseException:
            self.fd.close()
            raise

    def write(self, data: bytes) -> Self:
        """Puts `data` at the beginning; whoever reads the descriptor begins there. Closed when that raises OSError."""
        try:
            os.pwrite(self.fd.number, data, 0)
        except BaseException:
            self.fd.close()
            raise
        return self

    def read(self) -> bytes:
        return os.pread(self.fd.number, self.size, 0)

    def close(self) -> None:
        self.fd.close()
