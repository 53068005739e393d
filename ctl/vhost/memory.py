# SPDX-License-Identifier: Apache-2.0
"""Guest memory: regions of the front-end's files, mapped here.

A region is mapped from the file's block that it begins in, because QEMU's second region begins at an offset that is not
aligned to a hugepage and mmap would refuse it. Nothing is reserved or populated: an untouched guest costs no memory.
The mapping keeps the file alive, so the descriptor is closed at once.

What a file can still do to us later is to shrink: touching the lost part raises SIGBUS, which the data plane turns
into a fault of this guest. At mapping time the file must cover its region. The address space and the number of
mappings are everyone's, so a guest gets a share of them, and all guests together leave some.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from .errors import ProtocolError, Violation
from .fds import LOCAL, Fd
from .port import Region
from .wire import MAX_MEM_SLOTS, MemRegion

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_NORESERVE = 0x4000  # in Python's mmap from 3.12 only
_MADV_DONTDUMP = 16
MAX_MEMORY = 16 << 40  # bytes of one guest; a process has 128 TiB of addresses
MAX_MAPPED = 96 << 40  # bytes of all guests


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


@cache
def max_mappings() -> int:
    """Of all guests. The kernel allows a process `vm.max_map_count`, and most of ours are needed for them."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text()) * 3 // 4
    except (OSError, ValueError):
        return 49152  # of the kernel's default


class Mapping:
    """An address range made by mmap; `close` unmaps it, once."""

    __slots__ = ("address", "length", "offset")
    mapped: ClassVar[int] = 0  # bytes of all of them
    count: ClassVar[int] = 0

    def __init__(self, fd: int, offset: int, length: int) -> None:
        """Maps `length` bytes of `fd` from `offset`, shared and writable. Raises OSError."""
        if Mapping.mapped + length > MAX_MAPPED:
            raise OSError(errno.ENOMEM, f"all guests together can have {MAX_MAPPED:#x} bytes; run another xdpvhost")
        if Mapping.count >= max_mappings():
            raise OSError(
                errno.ENOMEM, f"all guests together can have {max_mappings()} regions; raise sysctl vm.max_map_count"
            )
        flags = mmap.MAP_SHARED | _MAP_NORESERVE
        address = _libc().mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
        if address == _MAP_FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address = int(address)
        self.offset = offset
        self.length = length
        Mapping.mapped += length
        Mapping.count += 1
        _libc().madvise(address, length, _MADV_DONTDUMP)

    def close(self) -> None:
        length, self.length = self.length, 0
        if length:
            _libc().munmap(self.address, length)
            Mapping.mapped -= length
            Mapping.count -= 1


@dataclass(frozen=True, slots=True, eq=False)
class MappedRegion:
    """A region of the front-end with its mapping, which it owns."""

    region: MemRegion
    mapping: Mapping
    file: tuple[int, int]  # device and inode

    def is_again(self, region: MemRegion, fd: Fd) -> bool:
        """Whether `region` of `fd` is this very region."""
        if region != self.region or fd.file_system not in LOCAL:
            return False
        status = os.fstat(fd.number)
        return (status.st_dev, status.st_ino) == self.file

    @property
    def for_datapath(self) -> Region:
        region, mapping = self.region, self.mapping
        return Region(region.gpa, region.size, region.user_addr, mapping.address + region.offset - mapping.offset)

    def close(self) -> None:
        self.mapping.close()


def map_file(what: str, fd: Fd, offset: int, size: int, kinds: Collection[str]) -> tuple[Mapping, tuple[int, int]]:
    """Maps bytes [offset, offset + size) of a regular file, and says which file (device, inode) it is.

    The mapping begins with the block that `offset` is in. Raises ProtocolError when the file is not in a file system
    of these `kinds`, cannot be mapped, or is too short.
    """
    try:
        if not fd.kind.startswith("/"):
            raise ProtocolError(Violation.MEMORY, f"{what}: its descriptor is not a file that can be mapped")
        if (kind := fd.file_system) not in kinds:
            raise ProtocolError(
                Violation.MEMORY, f"{what} is in a file system of type {kind}; use a memfd, tmpfs or hugetlbfs"
            )
        status = os.fstat(fd.number)
        if not stat.S_ISREG(status.st_mode):
            raise ProtocolError(Violation.MEMORY, f"{what}: its descriptor is not a file that can be mapped")
        end = offset + size
        if end > status.st_size:
            raise ProtocolError(
                Violation.MEMORY, f"{what} needs {end:#x} bytes of its file, which has only {status.st_size:#x}"
            )
        # mmap and munmap of hugetlbfs want whole pages, whose size is the file's block size (and 4096 elsewhere).
        block = -(-status.st_blksize // mmap.PAGESIZE) * mmap.PAGESIZE
        start = offset // block * block
        mapping = Mapping(fd.number, start, -(-end // block) * block - start)
        return mapping, (status.st_dev, status.st_ino)
    except OSError as error:
        raise ProtocolError(Violation.MEMORY, f"{what} cannot be mapped: {error.strerror}") from error


def map_region(region: MemRegion, fd: Fd) -> MappedRegion:
    """Maps one region and closes `fd`.

    Raises ProtocolError when the file is not one that can be mapped, or is shorter than the region says.
    """
    try:
        mapping, file = map_file(f"memory region at {region.gpa:#x}", fd, region.offset, region.size, LOCAL)
        return MappedRegion(region, mapping, file)
    finally:
        fd.close()


def map_table(regions: Sequence[MemRegion], fds: Sequence[Fd]) -> list[MappedRegion]:
    """Maps a whole table or nothing. Closes every descriptor. Raises ProtocolError."""
    mapped: list[MappedRegion] = []
    try:
        check_table(regions)
        for region, fd in zip(regions, fds, strict=True):
            mapped.append(map_region(region, fd))
    except BaseException:
        unmap(mapped)
        for fd in fds:
            fd.close()
        raise
    return mapped


def unmap(regions: Sequence[MappedRegion]) -> None:
    for region in regions:
        region.close()


def check_table(regions: Sequence[MemRegion]) -> None:
    """Raises ProtocolError when the regions are too many or too large, or two share guest physical addresses."""
    if len(regions) > MAX_MEM_SLOTS:
        raise ProtocolError(Violation.MEMORY, f"{len(regions)} memory regions, {MAX_MEM_SLOTS} slots were offered")
    if (size := sum(region.size for region in regions)) > MAX_MEMORY:
        raise ProtocolError(Violation.MEMORY, f"{size:#x} bytes of memory, a guest can have {MAX_MEMORY:#x}")
    in_order = sorted(regions, key=lambda region: region.gpa)
    for left, right in pairwise(in_order):
        if left.gpa + left.size > right.gpa:
            raise ProtocolError(Violation.MEMORY, f"memory regions at {left.gpa:#x} and {right.gpa:#x} overlap")
