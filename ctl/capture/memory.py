# SPDX-License-Identifier: Apache-2.0
"""The memory that a capture's two ends share: a memfd that nobody can shrink, so that no worker can lose it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Self

from ..errors import XdpvhostError

PAGE = 4096  # of facts, before the ring; CAPTURE_PAGE in datapath/src/capring.h
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class CaptureMemory:
    """A mapping of it. Owns the mapping, not the descriptor."""

    def __init__(self, fd: int) -> None:
        """Map all of `fd`."""
        self.size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        first = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(first)
        del first

    @property
    def ring(self) -> int:
        """Bytes of its ring."""
        return self.size - PAGE

    @classmethod
    def make(cls, ring: int) -> tuple[Self, int]:
        """New memory for a ring of `ring` bytes, and its descriptor, which is the caller's. All of it is there already:
        no worker waits for a page, or finds that there is none. Raises XdpvhostError."""
        fd = os.memfd_create("xdpvhost-capture", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, PAGE + ring)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            return cls(fd), fd
        except OSError as exc:
            os.close(fd)
            raise XdpvhostError(
                f"no memory for a capture of {ring >> 10} KiB: {exc.strerror}; give a smaller --buffer"
            ) from exc

    def close(self) -> None:
        """Unmap it; after every native object that uses it. Idempotent."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
