# SPDX-License-Identifier: Apache-2.0
"""The data plane's public header (datapath/include/xdpvhost.h) as Python objects.

This is the one place where control and data plane meet. The ctypes structs below mirror the header's; the library says
its own layout (`xv_layout`), and a test compares the two. Every native object has exactly one Python owner with a
`close()`; an object may only be closed after a `publish()` that left it out.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

from .errors import DatapathError
from .policy import Policy

log = logging.getLogger(__name__)

ABI = 10
MAX_REGIONS = 509
MAX_PAIRS = 128
MAX_RING_SIZE = 32768
NO_RING = 0xFFFFFFFF
VLAN_ANY = 0xFFFF
HOST_PORT = 0x80000000  # in MacEntry.guest, plus a NIC's index: its host port
MAX_LEARNED = 1024
CAPTURE_LEAST = 256 << 10  # bytes of a capture's ring
CAPTURE_IN, CAPTURE_OUT = 1, 2
POLICY_SPOOF_CHECK, POLICY_ISOLATED, POLICY_IP_CHECK, POLICY_LINK_DOWN = 1, 2, 4, 8
NICQ_PARTIAL_CSUM = 1
NICQ_SG = 2
NICQ_TX_CSUM = 4
TX_METADATA = 24
VRING_LOG_USED = 1
NICQ_GSO_TCP4, NICQ_GSO_TCP6, NICQ_GSO_ECN, NICQ_GSO_UDP = 1, 2, 4, 8
START_POLL = 0.001  # seconds between looks whether a worker has made its first turn
WORKER_NICE = -20  # of workers that never sleep
POLL_MODES = {"adaptive": 0, "busy": 1, "interrupt": 2}
DROP_MAX = 17
MAX_MACS = 16  # unicast addresses that a guest may listen to besides its own
FAULT_MAX = 7
FAULT_CALL_BLOCKED = 6

DROP_NAMES: tuple[str, ...] = (
    "not_connected",
    "no_buffers",
    "too_big",
    "runt",
    "bad_header",
    "bad_chain",
    "no_frames",
    "disabled",
    "no_uplink",
    "filtered",
    "link_down",
    "spoofed",
    "ip_spoofed",
    "vlan",
    "isolated",
    "storm",
    "rate",
)
CTRL_NAMES: tuple[str, ...] = ("rx", "mac", "vlan", "announce", "mq", "guest_offloads", "other")


class DpConf(Structure):
    _fields_ = (("workers", c_uint32), ("poll", c_uint32), ("spin_us", c_uint32), ("reserved", c_uint32))


class RegionConf(Structure):
    _fields_ = (("gpa", c_uint64), ("size", c_uint64), ("user_addr", c_uint64), ("host", c_uint64))


class VringConf(Structure):
    _fields_ = (
        ("desc", c_uint64),
        ("avail", c_uint64),
        ("used", c_uint64),
        ("features", c_uint64),
        ("log", c_uint64),
        ("inflight", c_uint64),
        ("inflight_offset", c_uint64),
        ("num", c_uint32),
        ("base", c_uint32),
        ("kick_fd", c_int32),
        ("call_fd", c_int32),
        ("enabled", c_uint32),
        ("flags", c_uint32),
    )


class Ring(Structure):
    """One AF_XDP ring as the kernel mapped it: addresses in this process, number of entries."""

    _fields_ = (
        ("producer", c_uint64),
        ("consumer", c_uint64),
        ("flags", c_uint64),
        ("ring", c_uint64),
        ("mask", c_uint32),
        ("size", c_uint32),
    )


class NicqConf(Structure):
    """One NIC queue: its UMEM (bytes at `umem`), frame counts, and the rings of the socket `fd` that sends."""

    _fields_ = (
        ("umem", c_uint64),
        ("umem_size", c_uint64),
        ("chunk", c_uint32),
        ("rx_frames", c_uint32),
        ("tx_frames", c_uint32),
        ("flags", c_uint32),
        ("fill", Ring),
        ("comp", Ring),
        ("tx", Ring),
        ("fd", c_int32),
        ("queue", c_uint32),
        ("gso", c_uint32),
        ("gso_fd", c_int32),
    )


class XskConf(Structure):
    _fields_ = (("rx", Ring), ("fd", c_int32), ("reserved", c_uint32))


class IpConf(Structure):
    _fields_ = (("address", c_uint8 * 16), ("version", c_uint32))


class BucketConf(Structure):
    _fields_ = (("rate", c_uint64), ("burst", c_uint64))


class PolicyConf(Structure):
    _fields_ = (
        ("trunk", c_uint64),
        ("addresses", c_uint64),
        ("nr_addresses", c_uint32),
        ("access", c_uint32),
        ("flags", c_uint32),
        ("learn", c_uint32),
        ("tx", BucketConf),
        ("rx", BucketConf),
        ("storm", BucketConf),
    )


class LearnedConf(Structure):
    _fields_ = (("mac", c_uint8 * 6), ("vlan", c_uint16), ("idle_ms", c_uint32), ("denied", c_uint32))


class GuestConf(Structure):
    _fields_ = (
        ("guest", c_uint64),
        ("rings", c_uint64),
        ("xsks", c_uint64),
        ("packet", c_uint64),
        ("features", c_uint64),
        ("policy", c_uint64),
        ("capture", c_uint64),
        ("nr_rings", c_uint32),
        ("nr_xsks", c_uint32),
        ("ctrl", c_uint32),
        ("nic", c_uint32),
        ("worker", c_uint32),
        ("max_pairs", c_uint32),
        ("uplink", c_uint32),
        ("reserved", c_uint32),
    )


class NicConf(Structure):
    _fields_ = (
        ("queues", c_uint64),
        ("mcast", c_uint64),
        ("taps", c_uint64),
        ("host", c_uint64),
        ("host_xsks", c_uint64),
        ("host_packet", c_uint64),
        ("capture", c_uint64),
        ("nr_queues", c_uint32),
        ("nr_taps", c_uint32),
        ("mtu", c_uint32),
        ("nr_host_xsks", c_uint32),
    )


class TapqConf(Structure):
    """One queue of a tap: a non-blocking descriptor of /dev/net/tun, and bytes of the virtio-net header there."""

    _fields_ = (("fd", c_int32), ("header_len", c_uint32), ("gso", c_uint32), ("queue", c_uint32))


class MacConf(Structure):
    _fields_ = (("mac", c_uint8 * 6), ("vlan", c_uint16), ("guest", c_uint32))


class SnapshotConf(Structure):
    _fields_ = (
        ("guests", c_uint64),
        ("nics", c_uint64),
        ("macs", c_uint64),
        ("nr_guests", c_uint32),
        ("nr_nics", c_uint32),
        ("nr_macs", c_uint32),
        ("reserved", c_uint32),
    )


class RxCounters(Structure):
    """Towards a guest, one queue pair."""

    _fields_ = (
        ("packets", c_uint64),
        ("bytes", c_uint64),
        ("copied_bytes", c_uint64),
        ("kicks", c_uint64),
        ("calls", c_uint64),
        ("calls_failed", c_uint64),
        ("csum_partial", c_uint64),
        ("csum_finished", c_uint64),
        ("drops", c_uint64 * DROP_MAX),
    )


class TxCounters(Structure):
    """From a guest, one queue pair."""

    _fields_ = (
        ("packets", c_uint64),
        ("bytes", c_uint64),
        ("kicks", c_uint64),
        ("calls", c_uint64),
        ("calls_failed", c_uint64),
        ("reserved", c_uint64),
        ("drops", c_uint64 * DROP_MAX),
    )


class XskCounters(Structure):
    _fields_ = (("packets", c_uint64), ("bytes", c_uint64))


class NicqCounters(Structure):
    _fields_ = (
        ("tx_packets", c_uint64),
        ("tx_bytes", c_uint64),
        ("copied_bytes", c_uint64),
        ("csum_finished", c_uint64),
        ("sendto_calls", c_uint64),
        ("sendto_busy", c_uint64),
        ("gso_packets", c_uint64),
        ("gso_bytes", c_uint64),
    )


class TapqCounters(Structure):
    """One queue of a tap; rx is from it. `gone`: the errno with which the tap ended, 0 while it is there."""

    _fields_ = (
        ("rx_packets", c_uint64),
        ("rx_bytes", c_uint64),
        ("rx_dropped", c_uint64),
        ("rx_unclaimed", c_uint64),
        ("drops", c_uint64 * DROP_MAX),
        ("gone", c_uint64),
        ("tx_packets", c_uint64),
        ("tx_bytes", c_uint64),
        ("tx_gso_packets", c_uint64),
        ("tx_gso_bytes", c_uint64),
        ("tx_csum_partial", c_uint64),
        ("tx_dropped", c_uint64),
    )


class PacketCounters(Structure):
    _fields_ = (("packets", c_uint64), ("bytes", c_uint64), ("dropped", c_uint64))


class CaptureCounters(Structure):
    """Of a captured port: frames and bytes that were put into the ring, frames that found it full."""

    _fields_ = (("frames", c_uint64), ("bytes", c_uint64), ("lost", c_uint64))


class CapreadConf(Structure):
    """The reading end: where the ring is mapped, and which frames are wanted."""

    _fields_ = (
        ("memory", c_uint64),
        ("size", c_uint64),
        ("filter", c_uint64),
        ("program", c_uint64),
        ("directions", c_uint32),
        ("drops_only", c_uint32),
    )


class CapreadCounters(Structure):
    """Frames read, those of them that were wanted, and those that were lost because the ring was full."""

    _fields_ = (("seen", c_uint64), ("taken", c_uint64), ("lost", c_uint64))


class WorkerCounters(Structure):
    _fields_ = (
        ("polls_busy", c_uint64),
        ("polls_idle", c_uint64),
        ("sleeps", c_uint64),
        ("wakeups", c_uint64),
        ("cycles_busy", c_uint64),
        ("packets", c_uint64),
        ("heartbeat", c_uint64),
    )


class CtrlState(Structure):
    """What a guest set through its control virtqueue; commands by class and answer."""

    _fields_ = (
        ("pairs", c_uint32),
        ("rx_mode", c_uint32),
        ("announced", c_uint32),
        ("adopted", c_uint32),
        ("accepted", c_uint64 * len(CTRL_NAMES)),
        ("refused", c_uint64 * len(CTRL_NAMES)),
    )


class MacRequestConf(Structure):
    _fields_ = (("mac", c_uint8 * 6), ("nr", c_uint16), ("others", c_uint8 * 6 * MAX_MACS))


class Fault(Structure):
    """Why the data plane gave a guest up; code 0: it did not."""

    _fields_ = (("code", c_uint32), ("ring", c_uint32), ("detail", c_uint64))


class LayoutEntry(Structure):
    _fields_ = (("structure", c_char_p), ("field", c_char_p), ("offset", c_uint32), ("size", c_uint32))


# The header's name of each mirrored struct. Counter structs are padded to 64 bytes there and only read through
# pointers here, so their own size may differ while every offset is the same.
MIRROR: Mapping[str, type[Structure]] = {
    "xv_dp_conf": DpConf,
    "xv_region": RegionConf,
    "xv_vring_conf": VringConf,
    "xv_ring": Ring,
    "xv_nicq_conf": NicqConf,
    "xv_xsk_conf": XskConf,
    "xv_ip": IpConf,
    "xv_bucket_conf": BucketConf,
    "xv_policy_conf": PolicyConf,
    "xv_learned": LearnedConf,
    "xv_guest_conf": GuestConf,
    "xv_nic_conf": NicConf,
    "xv_tapq_conf": TapqConf,
    "xv_mac_conf": MacConf,
    "xv_snapshot_conf": SnapshotConf,
    "xv_rx_counters": RxCounters,
    "xv_tx_counters": TxCounters,
    "xv_xsk_counters": XskCounters,
    "xv_nicq_counters": NicqCounters,
    "xv_tapq_counters": TapqCounters,
    "xv_packet_counters": PacketCounters,
    "xv_capture_counters": CaptureCounters,
    "xv_capread_counters": CapreadCounters,
    "xv_capread_conf": CapreadConf,
    "xv_worker_counters": WorkerCounters,
    "xv_ctrl_state": CtrlState,
    "xv_mac_request": MacRequestConf,
    "xv_fault": Fault,
}

_PROTOTYPES: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "xv_abi": (c_uint32, ()),
    "xv_layout": (POINTER(LayoutEntry), (POINTER(c_uint32),)),
    "xv_drop_name": (c_char_p, (c_uint32,)),
    "xv_fault_name": (c_char_p, (c_uint32,)),
    "xv_ctrl_name": (c_char_p, (c_uint32,)),
    "xv_features": (c_uint64, ()),
    "xv_dp_new": (c_int32, (POINTER(DpConf), POINTER(c_void_p))),
    "xv_dp_free": (None, (c_void_p,)),
    "xv_worker_run": (c_int32, (c_void_p, c_uint32)),
    "xv_dp_stop": (None, (c_void_p,)),
    "xv_dp_event_fd": (c_int32, (c_void_p,)),
    "xv_cycles_per_us": (c_uint64, (c_void_p,)),
    "xv_dp_watchdog": (None, (c_void_p,)),
    "xv_worker_counters": (POINTER(WorkerCounters), (c_void_p, c_uint32)),
    "xv_publish": (c_int32, (c_void_p, POINTER(SnapshotConf))),
    "xv_quiesce": (None, (c_void_p,)),
    "xv_guest_new": (c_int32, (c_uint32, POINTER(c_void_p))),
    "xv_guest_free": (None, (c_void_p,)),
    "xv_guest_rx_counters": (POINTER(RxCounters), (c_void_p, c_uint32)),
    "xv_guest_tx_counters": (POINTER(TxCounters), (c_void_p, c_uint32)),
    "xv_guest_ctrl": (POINTER(CtrlState), (c_void_p,)),
    "xv_guest_fault": (POINTER(Fault), (c_void_p,)),
    "xv_guest_set_mac": (None, (c_void_p, c_char_p)),
    "xv_guest_reset": (None, (c_void_p,)),
    "xv_guest_reset_ctrl": (None, (c_void_p,)),
    "xv_guest_set_pairs": (None, (c_void_p, c_uint32)),
    "xv_guest_mac_asks": (c_int32, (c_void_p,)),
    "xv_guest_mac_request": (c_int32, (c_void_p, POINTER(MacRequestConf))),
    "xv_guest_mac_answer": (c_int32, (c_void_p, c_int32)),
    "xv_guest_announce": (None, (c_void_p, c_char_p)),
    "xv_guest_learned": (c_uint32, (c_void_p, POINTER(LearnedConf), c_uint32)),
    "xv_guest_bytes": (c_uint64, (c_void_p,)),
    "xv_vring_bytes": (c_uint64, ()),
    "xv_xsk_bytes": (c_uint64, ()),
    "xv_packet_bytes": (c_uint64, ()),
    "xv_guest_forget": (None, (c_void_p, c_char_p, c_uint16)),
    "xv_guest_deny": (None, (c_void_p, c_char_p, c_uint16)),
    "xv_mem_new": (c_int32, (POINTER(RegionConf), c_uint32, c_void_p, POINTER(c_void_p))),
    "xv_mem_free": (None, (c_void_p,)),
    "xv_vring_new": (c_int32, (c_void_p, POINTER(VringConf), POINTER(c_void_p))),
    "xv_vring_free": (None, (c_void_p,)),
    "xv_vring_base": (c_uint32, (c_void_p,)),
    "xv_inflight_size": (c_uint32, (c_uint32, c_int32)),
    "xv_vring_set_call": (None, (c_void_p, c_int32)),
    "xv_vring_follow": (None, (c_void_p, c_void_p)),
    "xv_vring_set_enabled": (None, (c_void_p, c_int32)),
    "xv_nicq_new": (c_int32, (POINTER(NicqConf), POINTER(c_void_p))),
    "xv_nicq_free": (None, (c_void_p,)),
    "xv_nicq_counters": (POINTER(NicqCounters), (c_void_p,)),
    "xv_xsk_new": (c_int32, (c_void_p, POINTER(XskConf), POINTER(c_void_p))),
    "xv_xsk_free": (None, (c_void_p,)),
    "xv_xsk_counters": (POINTER(XskCounters), (c_void_p,)),
    "xv_tapq_new": (c_int32, (POINTER(TapqConf), POINTER(c_void_p))),
    "xv_tapq_free": (None, (c_void_p,)),
    "xv_tapq_counters": (POINTER(TapqCounters), (c_void_p,)),
    "xv_packet_new": (c_int32, (c_int32, POINTER(c_void_p))),
    "xv_packet_free": (None, (c_void_p,)),
    "xv_packet_counters": (POINTER(PacketCounters), (c_void_p,)),
    "xv_capture_new": (c_int32, (c_void_p, c_uint64, c_uint32, POINTER(c_void_p))),
    "xv_capture_end": (None, (c_void_p,)),
    "xv_capture_free": (None, (c_void_p,)),
    "xv_capture_counters": (POINTER(CaptureCounters), (c_void_p,)),
    "xv_capread_new": (c_int32, (POINTER(CapreadConf), POINTER(c_void_p))),
    "xv_capread_free": (None, (c_void_p,)),
    "xv_capread_blocks": (c_int64, (c_void_p, c_void_p, c_uint64, c_uint64)),
    "xv_capread_ended": (c_int32, (c_void_p,)),
    "xv_capread_counters": (POINTER(CapreadCounters), (c_void_p,)),
}


def library_path() -> Path:
    """Where the data plane is: XDPVHOST_DATAPATH, or beside this package as the build put it there."""
    override = os.environ.get("XDPVHOST_DATAPATH")
    return Path(override) if override else Path(__file__).parent / "_native" / "libxdpvhost.so"


@cache
def library() -> ctypes.CDLL:
    """The data plane's shared library, loaded and checked once.

    Raises DatapathError when it is missing or of another ABI.
    """
    path = library_path()
    try:
        lib = ctypes.CDLL(str(path), use_errno=True)
    except OSError as exc:
        raise DatapathError(
            f"cannot load the data plane {path}: {exc}; build it with `make -C datapath install`"
        ) from exc
    lib.xv_abi.restype = c_uint32
    found = lib.xv_abi()
    if found != ABI:
        raise DatapathError(
            f"data plane {path} has ABI {found}, this package needs {ABI}; rebuild it with scripts/setup"
        )
    for name, (restype, argtypes) in _PROTOTYPES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def fault_name(code: int) -> str:
    """The sentence for an xv_fault_code."""
    name: bytes | None = library().xv_fault_name(code)
    return name.decode() if name else f"unknown fault {code}"


def features() -> int:
    """Virtio feature bits that the data plane implements (virtio 1.2, 5.1.3 and 6)."""
    return int(library().xv_features())


def _check(result: int, what: str) -> None:
    if result < 0:
        error = DatapathError(f"{what}: {os.strerror(-result)}")
        error.errno = -result
        raise error


class Region(NamedTuple):
    """One region of guest memory. All in bytes; `host` is where it is mapped in this process."""

    gpa: int
    size: int
    user_addr: int
    host: int


class _Native:
    """Owner of one native object."""

    _free = ""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise DatapathError(f"{type(self).__name__} is used after close()")
        return self._handle

    def close(self) -> None:
        """Free it. Only after a publish() that left it out. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            getattr(library(), self._free)(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Memory(_Native):
    """A guest's memory table."""

    _free = "xv_mem_free"


class Vring(_Native):
    """One started virtqueue."""

    _free = "xv_vring_free"

    @property
    def base(self) -> int:
        """Where to go on, as GET_VRING_BASE answers it: an avail index, or the two places of a packed ring."""
        return int(library().xv_vring_base(self.handle))

    def follow(self, old: Vring) -> None:
        """Be published in the place of `old`, and go on where it is then; not before, and with no frame in between."""
        library().xv_vring_follow(self.handle, old.handle)

    def set_call(self, fd: int) -> None:
        """Interrupt the guest through `fd` (-1: not at all), and once at once; quiesce() before closing the old one."""
        library().xv_vring_set_call(self.handle, fd)

    def set_enabled(self, enabled: bool) -> None:
        """SET_VRING_ENABLE; Datapath.quiesce() before it is answered."""
        library().xv_vring_set_enabled(self.handle, int(enabled))


class Addresses(NamedTuple):
    """The unicast addresses that a guest listens to: its own, and others."""

    mac: bytes
    others: tuple[bytes, ...] = ()

    @property
    def all(self) -> tuple[bytes, ...]:
        return (self.mac, *self.others)


class Learned(NamedTuple):
    """An address that a guest has made up, in the data plane's table."""

    mac: bytes
    vlan: int
    idle: float  # seconds since it was last used, or denied
    denied: bool = False  # its frames are dropped

    @property
    def key(self) -> tuple[int, bytes]:
        return self.vlan, self.mac


class GuestPort(_Native):
    """A configured guest: counters that outlive its connections."""

    _free = "xv_guest_free"

    def __init__(self, handle: int, name: str, max_pairs: int) -> None:
        super().__init__(handle)
        self.name = name
        self.max_pairs = max_pairs

    @property
    def memory_bytes(self) -> int:
        """Of its counters, rules and table of learned addresses."""
        return int(library().xv_guest_bytes(self.handle))

    def rx_counters(self, pair: int) -> RxCounters:
        """Live counters of frames towards the guest."""
        counters: RxCounters = library().xv_guest_rx_counters(self.handle, pair).contents
        return counters

    def tx_counters(self, pair: int) -> TxCounters:
        """Live counters of frames from the guest."""
        counters: TxCounters = library().xv_guest_tx_counters(self.handle, pair).contents
        return counters

    @property
    def ctrl(self) -> CtrlState:
        state: CtrlState = library().xv_guest_ctrl(self.handle).contents
        return state

    @property
    def fault(self) -> Fault:
        fault: Fault = library().xv_guest_fault(self.handle).contents
        return fault

    def reset(self) -> None:
        """Forget fault and control state: a new front-end session begins. Its rings must not be published."""
        library().xv_guest_reset(self.handle)

    def reset_ctrl(self) -> None:
        """Forget what it set through its control virtqueue: a new driver begins. No ring may be published."""
        library().xv_guest_reset_ctrl(self.handle)

    def set_pairs(self, pairs: int) -> None:
        """What it had set before it came here; 1 to its most. No ring may be published."""
        library().xv_guest_set_pairs(self.handle, pairs)

    @property
    def asks_for_addresses(self) -> bool:
        return bool(library().xv_guest_mac_asks(self.handle))

    def asked_addresses(self) -> Addresses | None:
        """What the guest asks to listen to, once; it waits for answer_addresses() then."""
        request = MacRequestConf()
        if not library().xv_guest_mac_request(self.handle, byref(request)):
            return None
        return Addresses(bytes(request.mac), tuple(bytes(mac) for mac in request.others[: request.nr]))

    def answer_addresses(self, granted: bool) -> bool:
        """False: the guest was refused meanwhile, since this took too long, or is gone. Then undo the change."""
        return int(library().xv_guest_mac_answer(self.handle, int(granted))) == 0

    def learned(self) -> list[Learned]:
        """What the guest has learned (Policy.learn), and what of that it was denied."""
        learned = (LearnedConf * MAX_LEARNED)()
        n = min(int(library().xv_guest_learned(self.handle, learned, MAX_LEARNED)), MAX_LEARNED)
        return [
            Learned(bytes(entry.mac), entry.vlan, entry.idle_ms / 1000, bool(entry.denied)) for entry in learned[:n]
        ]

    def forget(self, mac: bytes, vlan: int) -> None:
        """Forget a learned address: it is too old, or was given away. Nothing happens if it is not learned."""
        library().xv_guest_forget(self.handle, mac, vlan)

    def deny(self, mac: bytes, vlan: int) -> None:
        """Drop frames from a learned address until it is forgotten. Nothing happens if it is not learned."""
        library().xv_guest_deny(self.handle, mac, vlan)

    def announce(self, mac: bytes) -> None:
        """Send a RARP request with this source on the guest's uplink (VHOST_USER_SEND_RARP)."""
        library().xv_guest_announce(self.handle, mac)


class Xsk(_Native):
    """A guest's receiving AF_XDP socket on one NIC queue."""

    _free = "xv_xsk_free"

    @property
    def counters(self) -> XskCounters:
        counters: XskCounters = library().xv_xsk_counters(self.handle).contents
        return counters


class Nicq(_Native):
    """One NIC queue with its UMEM and sending socket."""

    _free = "xv_nicq_free"

    @property
    def counters(self) -> NicqCounters:
        counters: NicqCounters = library().xv_nicq_counters(self.handle).contents
        return counters


class Tapq(_Native):
    """One queue of a tap. Its descriptor stays the caller's."""

    _free = "xv_tapq_free"

    @property
    def counters(self) -> TapqCounters:
        counters: TapqCounters = library().xv_tapq_counters(self.handle).contents
        return counters


class PacketPort(_Native):
    """The packet socket through which the guests hear a NIC's broadcast and multicast."""

    _free = "xv_packet_free"

    @property
    def counters(self) -> PacketCounters:
        counters: PacketCounters = library().xv_packet_counters(self.handle).contents
        return counters


class Capture(_Native):
    """The writing end of a capture: workers copy a port's frames to `size` bytes of shared memory at `address`.

    The memory is the caller's, has a page and a power of two of bytes, at least CAPTURE_LEAST, and outlives the object.
    """

    _free = "xv_capture_free"

    def __init__(self, address: int, size: int, snaplen: int) -> None:
        handle = c_void_p()
        _check(library().xv_capture_new(address, size, snaplen, byref(handle)), f"capture of {size} bytes")
        super().__init__(handle.value or 0)

    def end(self) -> None:
        """Tell the reader that nothing comes any more. After a publish() that left it out."""
        library().xv_capture_end(self.handle)

    @property
    def counters(self) -> CaptureCounters:
        counters: CaptureCounters = library().xv_capture_counters(self.handle).contents
        return counters


class CaptureReader(_Native):
    """The reading end, in another process. Raises DatapathError (EPROTO) when the writer is of another version."""

    _free = "xv_capread_free"

    def __init__(self, conf: CapreadConf) -> None:
        handle = c_void_p()
        _check(library().xv_capread_new(byref(conf), byref(handle)), "the daemon's capture")
        super().__init__(handle.value or 0)

    def blocks(self, buffer: ctypes.Array[Any], frames: int) -> int:
        """Put up to `frames` wanted frames into `buffer` as blocks of pcapng; the bytes that they take.

        0: there was none; `counters.seen` tells whether there were others. The buffer has room for the largest frame,
        70000 bytes.
        """
        done: int = library().xv_capread_blocks(self.handle, buffer, len(buffer), frames)
        _check(min(done, 0), "the daemon's capture")
        return done

    @property
    def ended(self) -> bool:
        """Whether nothing comes after what is there."""
        return bool(library().xv_capread_ended(self.handle))

    @property
    def counters(self) -> CapreadCounters:
        counters: CapreadCounters = library().xv_capread_counters(self.handle).contents
        return counters


@dataclass
class GuestState:
    """One guest as it is published: rings by vring index (even: towards the guest).

    Pair i, and its socket of NIC queue i, are on worker (worker + i) % workers; pair i sends on NIC queue (uplink + i)
    % queues. To change `worker` moves them, and no frame overtakes another.
    """

    port: GuestPort
    nic: int
    worker: int
    max_pairs: int
    uplink: int = 0
    xsks: Sequence[Xsk] = ()
    packet: PacketPort | None = None
    rings: Mapping[int, Vring] = field(default_factory=dict)
    features: int = 0
    ctrl: int | None = None
    policy: Policy | None = None
    capture: Capture | None = None


@dataclass
class NicState:
    """The way to the network: NIC queues, or queues of a tap. And the host's own port there, a tap.

    `host_xsks`, `host_packet`: where frames from NIC queues for the host port's address arrive, as for a guest.
    """

    queues: Sequence[Nicq]
    mcast: PacketPort | None
    mtu: int
    taps: Sequence[Tapq] = ()
    host: Tapq | None = None
    host_xsks: Sequence[Xsk] = ()
    host_packet: PacketPort | None = None
    capture: Capture | None = None


@dataclass(frozen=True)
class MacEntry:
    """(VLAN, MAC) belongs to guests[guest] of the same publication, or to the host port of nics[guest - HOST_PORT]."""

    mac: bytes
    vlan: int
    guest: int


_MAC_CONF = struct.Struct("=6sHI")  # MacConf


def pack_macs(keys: Iterable[tuple[int, bytes]], guest: int) -> bytes:
    """What a publication's `macs` may have instead of MacEntry: these (VLAN, MAC) belong to guests[guest]."""
    pack = _MAC_CONF.pack
    return b"".join([pack(mac, vlan, guest) for vlan, mac in keys])


def _packer(structure: type[Structure]) -> struct.Struct:
    """Makes a whole struct of 32- and 64-bit words at once, which is ten times as fast as field by field."""
    codes: dict[Any, str] = {c_uint64: "Q", c_uint32: "I"}
    return struct.Struct("=" + "".join(codes[kind] for _, kind, *_ in structure._fields_))


_GUEST_CONF = _packer(GuestConf)


def _address(data: bytes) -> int:
    """Of its first byte, for as long as it lives."""
    return ctypes.cast(c_char_p(data), c_void_p).value or 0


def _handles(objects: Sequence[_Native | None]) -> ctypes.Array[c_uint64]:
    return (c_uint64 * max(1, len(objects)))(*(o.handle if o else 0 for o in objects))


class _PolicyConf:
    """A policy as the data plane takes it, with what it points to."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._trunk = (c_uint64 * 64)()
        for vlan in policy.trunk:
            self._trunk[vlan // 64] |= 1 << vlan % 64
        self._addresses = (IpConf * max(1, len(policy.addresses)))()
        for conf, address in zip(self._addresses, policy.addresses, strict=False):
            conf.address[: len(address.packed)] = address.packed
            conf.version = address.version
        flags = (POLICY_SPOOF_CHECK if policy.spoof_check else 0) | (POLICY_ISOLATED if policy.isolated else 0)
        flags |= (POLICY_IP_CHECK if policy.addresses else 0) | (POLICY_LINK_DOWN if policy.link_down else 0)
        self._conf = PolicyConf(
            trunk=ctypes.addressof(self._trunk) if policy.trunk else 0,
            addresses=ctypes.addressof(self._addresses),
            nr_addresses=len(policy.addresses),
            access=policy.access,
            flags=flags,
            learn=policy.learn,
            tx=BucketConf(policy.tx.rate, policy.tx.burst),
            rx=BucketConf(policy.rx.rate, policy.rx.burst),
            storm=BucketConf(policy.storm.rate, policy.storm.burst),
        )
        self.address = ctypes.addressof(self._conf)


class Datapath:
    """The data plane: its workers, and what they see.

    All methods are for one control thread. `spin_us`: microseconds that an adaptive worker polls after the last frame.
    """

    def __init__(self, workers: int = 1, poll: str = "adaptive", spin_us: int = 50) -> None:
        self._lib = library()
        conf = DpConf(workers=workers, poll=POLL_MODES[poll], spin_us=spin_us)
        handle = c_void_p()
        _check(self._lib.xv_dp_new(byref(conf), byref(handle)), f"cannot make a data plane with {workers} workers")
        self._handle: c_void_p | None = handle
        self.workers = workers
        self.cpus: list[int] = []  # of the workers, when they have been started
        self.poll = poll
        self.event_fd = int(self._lib.xv_dp_event_fd(handle))
        self._threads: list[threading.Thread] = []
        self._policies: dict[int, _PolicyConf] = {}  # of the last publication, by the policy's id

    @property
    def handle(self) -> c_void_p:
        if self._handle is None:
            raise DatapathError("the data plane is used after close()")
        return self._handle

    def start(self) -> None:
        """Start the workers, one thread each, pinned to a CPU of its own where there are enough.

        When it returns, each has made its first turn. Raises DatapathError when one could not; then all are stopped.
        """
        cpus = sorted(os.sched_getaffinity(0))
        for index in range(self.workers):
            cpu = cpus[-1 - index % len(cpus)]
            self.cpus.append(cpu)
            thread = threading.Thread(target=self._run, args=(index, cpu), name=f"xdpvhost-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)
        for index, thread in enumerate(self._threads):
            while not self.worker_counters(index).heartbeat:
                thread.join(START_POLL)
                if not thread.is_alive():
                    self.stop()
                    raise DatapathError(f"worker {index} did not start; see the log")

    def _run(self, index: int, cpu: int) -> None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as exc:
            log.warning("worker %d: cannot pin to CPU %d: %s", index, cpu, exc)
        if self.poll == "busy":  # the others give way when somebody else wants their CPU: contended() in worker.c
            try:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WORKER_NICE)
            except OSError as exc:
                log.debug("worker %d: no better priority: %s", index, exc)
        result = self._lib.xv_worker_run(self._handle, index)
        if result < 0:
            log.error("worker %d stopped: %s", index, os.strerror(-result))

    def stop(self) -> None:
        """Stop and join the workers. Idempotent."""
        if self._handle is not None:
            self._lib.xv_dp_stop(self._handle)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def close(self) -> None:
        """Stop, then free. Every guest, ring and NIC queue may be closed after it."""
        self.stop()
        handle, self._handle = self._handle, None
        if handle is not None:
            self._lib.xv_dp_free(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watchdog(self) -> None:
        self._lib.xv_dp_watchdog(self.handle)

    def quiesce(self) -> None:
        """Return when every worker has begun a new turn, and so has seen all that was set before."""
        self._lib.xv_quiesce(self.handle)

    @property
    def cycles_per_second(self) -> int:
        """What the workers' cycles are counted in."""
        return 1_000_000 * int(self._lib.xv_cycles_per_us(self.handle))

    def worker_counters(self, worker: int) -> WorkerCounters:
        counters: WorkerCounters = self._lib.xv_worker_counters(self.handle, worker).contents
        return counters

    def memory(self, port: GuestPort, regions: Sequence[Region]) -> Memory:
        """A memory table of `port`. Raises DatapathError (EINVAL) when regions overlap or their addresses wrap."""
        table = (RegionConf * max(1, len(regions)))(*(RegionConf(*region) for region in regions))
        handle = c_void_p()
        result = self._lib.xv_mem_new(table, len(regions), port.handle, byref(handle))
        _check(result, f"memory table of guest {port.name!r}")
        return Memory(handle.value or 0)

    def shared(self, port: GuestPort, address: int, size: int) -> Memory:
        """Other memory of the front-end's, mapped at `address`: a dirty bitmap or an in-flight region.

        Guarded like the guest's own, for the front-end may truncate its file. Raises DatapathError.
        """
        return self.memory(port, [Region(0, size, 0, address)])

    def vring(
        self,
        mem: Memory,
        *,
        desc: int,
        avail: int,
        used: int,
        features: int,
        num: int,
        base: int,
        kick_fd: int,
        call_fd: int,
        enabled: bool,
        log: Memory | None = None,
        log_used: bool = False,
        inflight: Memory | None = None,
        inflight_offset: int = 0,
    ) -> Vring:
        """A virtqueue at the given front-end addresses.

        `log`: the dirty bitmap (`shared`), written while VHOST_F_LOG_ALL is among the features; `log_used`: for the
        ring's own parts too. `inflight`: the in-flight region, whose part at `inflight_offset` is this ring's.
        Raises DatapathError: EINVAL (size, alignment, base or in-flight part; virtio 1.2, 2.7 and 2.8), EFAULT (not
        inside one memory region).
        """
        conf = VringConf(
            desc=desc,
            avail=avail,
            used=used,
            features=features,
            log=log.handle if log else 0,
            inflight=inflight.handle if inflight else 0,
            inflight_offset=inflight_offset,
            num=num,
            base=base,
            kick_fd=kick_fd,
            call_fd=call_fd,
            enabled=int(enabled),
            flags=VRING_LOG_USED if log_used else 0,
        )
        handle = c_void_p()
        _check(self._lib.xv_vring_new(mem.handle, byref(conf), byref(handle)), f"virtqueue of {num} entries")
        return Vring(handle.value or 0)

    def guest(self, name: str, max_pairs: int, mac: bytes) -> GuestPort:
        handle = c_void_p()
        _check(self._lib.xv_guest_new(max_pairs, byref(handle)), f"guest {name!r} with {max_pairs} queue pairs")
        self._lib.xv_guest_set_mac(handle, mac)
        return GuestPort(handle.value or 0, name, max_pairs)

    def nicq(self, conf: NicqConf) -> Nicq:
        handle = c_void_p()
        _check(self._lib.xv_nicq_new(byref(conf), byref(handle)), f"NIC queue {conf.queue}")
        return Nicq(handle.value or 0)

    def xsk(self, nicq: Nicq, ring: Ring, fd: int) -> Xsk:
        handle = c_void_p()
        conf = XskConf(rx=ring, fd=fd)
        _check(self._lib.xv_xsk_new(nicq.handle, byref(conf), byref(handle)), "AF_XDP socket")
        return Xsk(handle.value or 0)

    def tapq(self, conf: TapqConf) -> Tapq:
        """Raises DatapathError: EINVAL when the descriptor may block, or the header has not 10 or 12 bytes."""
        handle = c_void_p()
        _check(self._lib.xv_tapq_new(byref(conf), byref(handle)), f"tap queue {conf.queue}")
        return Tapq(handle.value or 0)

    def packet_port(self, fd: int) -> PacketPort:
        handle = c_void_p()
        _check(self._lib.xv_packet_new(fd, byref(handle)), "packet socket")
        return PacketPort(handle.value or 0)

    def publish(self, guests: Sequence[GuestState], nics: Sequence[NicState], macs: Sequence[MacEntry] | bytes) -> None:
        """Make the workers see exactly this. When it returns, nothing touches what was left out.

        `macs` may be what pack_macs() makes, one after the other. A policy is made into its conf when it is first seen,
        so it is to be the same object as long as it is the same.
        """
        words = array("Q")  # handles that the confs point to
        places: list[tuple[int, int, int, int]] = []
        for state in guests:
            rings = len(words)
            if state.rings:
                words.extend([0] * (max(state.rings) + 1))
                for index, ring in state.rings.items():
                    words[rings + index] = ring.handle
            xsks = len(words)
            words.extend([xsk.handle for xsk in state.xsks])
            places.append((8 * rings, xsks - rings, 8 * xsks, len(words) - xsks))
        base = words.buffer_info()[0]
        policies: dict[int, _PolicyConf] = {}
        rows = [
            _GUEST_CONF.pack(
                state.port.handle,
                base + rings,
                base + xsks,
                state.packet.handle if state.packet else 0,
                state.features,
                self._policy(state.policy, policies) if state.policy is not None else 0,
                state.capture.handle if state.capture else 0,
                nr_rings,
                nr_xsks,
                NO_RING if state.ctrl is None else state.ctrl,
                state.nic,
                state.worker,
                state.max_pairs,
                state.uplink,
                0,
            )
            for state, (rings, nr_rings, xsks, nr_xsks) in zip(guests, places, strict=True)
        ]
        guest_table = b"".join(rows)
        keep: list[object] = []
        nic_table = (NicConf * max(1, len(nics)))()
        for nic_conf, nic in zip(nic_table, nics, strict=False):
            queues, taps = _handles(nic.queues), _handles(nic.taps)
            keep += [queues, taps]
            nic_conf.queues, nic_conf.nr_queues = ctypes.addressof(queues), len(nic.queues)
            nic_conf.mcast = nic.mcast.handle if nic.mcast else 0
            nic_conf.taps, nic_conf.nr_taps = ctypes.addressof(taps), len(nic.taps)
            nic_conf.mtu = nic.mtu
            nic_conf.host = nic.host.handle if nic.host else 0
            host_xsks = _handles(nic.host_xsks)
            keep.append(host_xsks)
            nic_conf.host_xsks, nic_conf.nr_host_xsks = ctypes.addressof(host_xsks), len(nic.host_xsks)
            nic_conf.host_packet = nic.host_packet.handle if nic.host_packet else 0
            nic_conf.capture = nic.capture.handle if nic.capture else 0
        if not isinstance(macs, bytes):
            macs = b"".join([_MAC_CONF.pack(entry.mac, entry.vlan, entry.guest) for entry in macs])
        conf_all = SnapshotConf(
            guests=_address(guest_table),
            nics=ctypes.addressof(nic_table),
            macs=_address(macs),
            nr_guests=len(guests),
            nr_nics=len(nics),
            nr_macs=len(macs) // _MAC_CONF.size,
        )
        _check(self._lib.xv_publish(self.handle, byref(conf_all)), "cannot publish to the workers")
        self._policies = policies

    def _policy(self, policy: Policy, used: dict[int, _PolicyConf]) -> int:
        """The address of its conf, kept in `used` for the next time."""
        conf = used.get(id(policy)) or self._policies.get(id(policy)) or _PolicyConf(policy)
        used[id(policy)] = conf
        return conf.address


def inflight_size(num: int, packed: bool) -> int:
    """Bytes of one ring's part of an in-flight region (vhost-user, "Inflight I/O tracking")."""
    return int(library().xv_inflight_size(num, int(packed)))


def is_ring_error(error: DatapathError) -> bool:
    """Whether xv_vring_new or xv_mem_new refused what the front-end sent, and not for want of memory."""
    return error.errno in (errno.EINVAL, errno.EFAULT)
