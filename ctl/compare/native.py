# SPDX-License-Identifier: Apache-2.0
"""The synthetic guest (datapath/synthetic/guest.c) and its network (bpf/traffic.bpf.c) as Python objects."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_double, c_int, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from ..errors import DatapathError

NATIVE = Path(__file__).resolve().parent.parent / "_native"
LIBRARY = NATIVE / "libxvguest.so"
TRAFFIC = NATIVE / "traffic.bpf.o"

SPLIT, E1000 = 0, 1  # kinds of rings
EVENTFD, QTEST16, QTEST32 = 0, 1, 2  # notifiers
NR_BUCKETS = 32 * 40


class Ring(Structure):
    """struct xvg_ring. Addresses are this process's; `offered` and `seen` count modulo 65536."""

    _fields_ = (
        ("desc", c_void_p),
        ("avail", c_void_p),
        ("used", c_void_p),
        ("buffers", c_void_p),
        ("kick_addr", c_uint64),
        ("done", c_uint64),
        ("bytes", c_uint64),
        ("kicks", c_uint64),
        ("num", c_uint32),
        ("stride", c_uint32),
        ("kick_fd", c_int32),
        ("kick_value", c_uint32),
        ("offered", c_uint16),
        ("seen", c_uint16),
        ("kind", c_uint8),
        ("notifier", c_uint8),
        ("header", c_uint8),
        ("transmit", c_uint8),
    )


class Job(Structure):
    """struct xvg_job."""

    _fields_ = (
        ("rings", c_void_p),
        ("nr_rings", c_uint64),
        ("nanoseconds", c_uint64),
        ("program_fd", c_int32),
        ("socket_fd", c_int32),
        ("frame_len", c_uint32),
        ("reserved", c_uint32),
        ("frame", c_void_p),
    )


class Probe(Structure):
    """struct xvg_probe."""

    _fields_ = (
        ("rx", c_void_p),
        ("tx", c_void_p),
        ("nanoseconds", c_uint64),
        ("interval", c_uint64),
        ("buckets", c_void_p),
        ("nr_buckets", c_uint64),
        ("sent", c_uint64),
        ("received", c_uint64),
        ("refused", c_uint64),
        ("socket_fd", c_int32),
        ("guest_fd", c_int32),
        ("frame_len", c_uint32),
        ("run", c_uint32),
        ("frame", c_void_p),
        ("others", c_void_p),
        ("nr_others", c_uint64),
    )


@cache
def library() -> ctypes.CDLL:
    """Raises DatapathError where it was not built."""
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as exc:
        raise DatapathError(f"cannot load the synthetic guest {LIBRARY}: {exc}; build it with `scripts/build`") from exc
    lib.xvg_offer.argtypes, lib.xvg_offer.restype = (POINTER(Ring), c_uint32), None
    lib.xvg_drain.argtypes, lib.xvg_drain.restype = (POINTER(Ring), c_uint64), c_uint32
    lib.xvg_run.argtypes, lib.xvg_run.restype = (POINTER(Job),), c_int
    lib.xvg_probe.argtypes, lib.xvg_probe.restype = (POINTER(Probe),), c_int
    lib.xvg_bucket_middle.argtypes, lib.xvg_bucket_middle.restype = (c_uint64,), c_double
    lib.xvg_tsc_hz.argtypes, lib.xvg_tsc_hz.restype = (), c_double
    lib.xvg_count_instructions.argtypes, lib.xvg_count_instructions.restype = (c_int,), c_int
    return lib


@cache
def tsc_hz() -> float:
    """Cycles of the time stamp counter a second; 0 where there is none."""
    return float(library().xvg_tsc_hz())


def offer(ring: Ring, count: int) -> None:
    """Make the next buffers available, and notify the device if it wants that."""
    library().xvg_offer(ctypes.byref(ring), count)


def drain(ring: Ring, seconds: float) -> int:
    """Take all buffers back; how many the device still has after so long."""
    return int(library().xvg_drain(ctypes.byref(ring), int(seconds * 1e9)))


def run(job: Job, seconds: float) -> None:
    """Drive the rings for so long. Raises OSError."""
    job.nanoseconds = int(seconds * 1e9)
    if error := library().xvg_run(ctypes.byref(job)):
        raise OSError(error, f"the synthetic guest cannot run: {os.strerror(error)}")


def probe(wanted: Probe) -> None:
    """Raises OSError."""
    if error := library().xvg_probe(ctypes.byref(wanted)):
        raise OSError(error, f"the synthetic guest cannot measure round trips: {os.strerror(error)}")


def percentile(buckets: ctypes.Array[c_uint64], share: float) -> float:
    """Nanoseconds that `share` (0 to 1) of the frames took at most; the histogram must not be empty."""
    goal, seen = share * sum(buckets), 0
    for index, count in enumerate(buckets):
        seen += count
        if count and seen >= goal:
            return float(library().xvg_bucket_middle(index))
    raise ValueError("an empty histogram has no percentiles")
