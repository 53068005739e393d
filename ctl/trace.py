# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost trace drops`: which guest lost a frame inside the kernel, and why.

Theory of operation. When XDP redirects a frame into an AF_XDP socket and the socket can't take it, the kernel fires the
tracepoint xdp:xdp_redirect_err with the map's index and an error number. The index is slot * NIC queues + NIC queue
(bpf/steer.h), so it names the guest; the number names the cause. xdp:xdp_exception tells of frames that the program
could not handle at all; those belong to no guest. A small program made by bcc sits on both and sends each event here.

bcc compiles that program with clang and insists on a kernel source tree, although the program includes nothing from it.
It gets a stub tree: a dozen tiny headers in a temporary directory, named by BCC_KERNEL_SOURCE. So this works on a
machine without kernel headers. tracefs, when it is not mounted, is mounted in a mount namespace of this process only.

The program looks only at frames of the daemon's XDP program, by its id, so other interfaces' and namespaces' drops stay
out. Under libxdp's dispatcher the kernel reports the dispatcher's id instead; there the interface's index decides.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import platform
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from .config import HOST_PORT_LABEL
from .errors import ConfigError, DaemonError, SilentError, XdpvhostError

log = logging.getLogger(__name__)

Status = Mapping[str, Any]
Kind = Literal["redirect", "exception"]

REFRESH_PERIOD = 1.0

# net/xdp/xsk.c: what __xsk_map_redirect() and xsk_rcv() return, from facts read in 6.1, 6.12 and 6.18
CAUSES: Mapping[int, tuple[str, str]] = {
    6: ("not_bound", "the guest's socket is not bound; it is being set up or taken down"),
    12: ("fill_ring_empty", "the NIC queue has no free UMEM frame: the data plane is too slow"),
    22: ("wrong_queue", "the frame came in on another queue than the guest's socket is bound to"),
    28: ("too_big", "the frame is larger than a UMEM frame; lower the sender's MTU, or turn its GRO and TSO off"),
    105: ("rx_ring_full", "the guest's socket is full: its receive ring is not emptied fast enough"),
}
ACTIONS = ("XDP_ABORTED", "XDP_DROP", "XDP_PASS", "XDP_TX", "XDP_REDIRECT")

PROGRAM = """
struct drop_event {
    u64 when;
    u32 kind;
    u32 prog_id;
    u32 act;
    int ifindex;
    int err;
    int map_id;
    u32 map_index;
    u32 reserved;
};
BPF_PERF_OUTPUT(drops);

TRACEPOINT_PROBE(xdp, xdp_redirect_err)
{
    struct drop_event event = {};
    event.prog_id = args->prog_id;
    if (!wanted(args->prog_id, args->ifindex))
        return 0;
    event.when = bpf_ktime_get_ns();
    event.act = args->act;
    event.ifindex = args->ifindex;
    event.err = args->err;
    event.map_id = args->map_id;
    event.map_index = args->map_index;
    drops.perf_submit(args, &event, sizeof(event));
    return 0;
}

TRACEPOINT_PROBE(xdp, xdp_exception)
{
    struct drop_event event = {};
    event.prog_id = args->prog_id;
    if (!wanted(args->prog_id, args->ifindex))
        return 0;
    event.when = bpf_ktime_get_ns();
    event.kind = 1;
    event.act = args->act;
    event.ifindex = args->ifindex;
    drops.perf_submit(args, &event, sizeof(event));
    return 0;
}
"""


class RawEvent(ctypes.Structure):
    """struct drop_event of PROGRAM."""

    _fields_ = (
        ("when", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("act", ctypes.c_uint32),
        ("ifindex", ctypes.c_int32),
        ("err", ctypes.c_int32),
        ("map_id", ctypes.c_int32),
        ("map_index", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Drop:
    """One frame lost. `guest` and `queue` (the NIC's) are None where the kernel doesn't tell."""

    time: float
    kind: Kind
    iface: str
    guest: str | None
    queue: int | None
    cause: str
    detail: str

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.time))
        port = HOST_PORT_LABEL if self.guest == HOST_PORT_LABEL else f"guest {self.guest or '?'}"
        whose = f"{port} queue {self.queue}" if self.kind == "redirect" else "no guest"
        return f"{clock} {self.iface} {whose}: {self.cause}: {self.detail}"


class Resolver:
    """Names the interface and the guest of an event, from the daemon's status; asks again when it meets a stranger.

    A slot may pass to another guest, so whoever uses it for long calls `refresh` now and then.
    """

    def __init__(self, status: Callable[[], Status]) -> None:
        self._ask = status
        self._status = status()
        if self._status.get("mode", "xdp") != "xdp":
            raise ConfigError(
                f"trace drops: in mode {self._status['mode']} no frame passes XDP; `xdpvhost stats` counts the drops "
                "of each guest's device"
            )

    def refresh(self) -> None:
        """Raises DaemonError when the daemon is gone, or another, whose XDP program nobody watches, is in its place."""
        watched = self.filter
        try:
            self._status = self._ask()
        except SilentError as exc:
            log.debug("%s", exc)  # busy or stopped: what it said last still holds
        if self.filter != watched:
            raise DaemonError("the daemon was started anew; start the trace again")

    @property
    def filter(self) -> str:
        """A C condition on prog_id and ifindex: events of the daemon's XDP programs."""
        nics = self._status["nics"]
        return " || ".join(
            f"ifindex == {nic['ifindex']}" if nic["facts"]["dispatcher"] else f"prog_id == {nic['facts']['program_id']}"
            for nic in nics
        )

    def drop(self, event: RawEvent) -> Drop:
        nic = next((nic for nic in self._status["nics"] if nic["ifindex"] == event.ifindex), None)
        iface = nic["iface"] if nic else f"ifindex {event.ifindex}"
        if event.kind == 1:
            action = ACTIONS[event.act] if event.act < len(ACTIONS) else f"action {event.act}"
            detail = f"the XDP program's {action} could not be carried out"
            return Drop(time.time(), "exception", iface, None, None, "exception", detail)
        queues = nic["queues"] if nic else 1
        slot, queue = divmod(event.map_index, queues)
        cause, detail = CAUSES.get(abs(event.err), ("unknown", f"error {event.err} ({os.strerror(abs(event.err))})"))
        return Drop(time.time(), "redirect", iface, self._guest(slot), queue, cause, detail)

    def _guest(self, slot: int) -> str | None:
        name = self._find(slot)
        if name is None:
            self.refresh()
            name = self._find(slot)
        return name

    def _find(self, slot: int) -> str | None:
        for nic in self._status["nics"]:
            if (nic.get("host_port") or {}).get("slot") == slot:
                return HOST_PORT_LABEL
        return next((guest["name"] for guest in self._status["guests"] if guest["slot"] == slot), None)


def _stub_headers() -> Mapping[str, str]:
    major, minor = (int(part) for part in platform.release().split("-")[0].split(".")[:2])
    types = "\n".join(
        f"typedef {kind} {prefix}{width};"
        for width, signed in ((8, "signed char"), (16, "short"), (32, "int"), (64, "long long"))
        for prefix, kind in (
            ("__s", signed),
            ("s", signed),
            ("__u", f"unsigned {signed.removeprefix('signed ')}"),
            ("u", f"unsigned {signed.removeprefix('signed ')}"),
        )
    )
    orders = "\n".join(f"typedef __u{width} __{order}{width};" for width in (16, 32, 64) for order in ("be", "le"))
    return {
        "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
        "include/generated/autoconf.h": "",
        "include/linux/types.h": (
            f"#pragma once\n{types}\n{orders}\ntypedef __u16 __sum16;\ntypedef __u32 __wsum;\n"
            "typedef __u64 __attribute__((aligned(8))) __aligned_u64;\n"
            "typedef unsigned long size_t;\ntypedef unsigned long uintptr_t;\n"
            "typedef _Bool bool;\n#define true 1\n#define false 0\n"
            "#ifndef NULL\n#define NULL ((void *)0)\n#endif\n"
        ),
        "include/linux/version.h": (
            "#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))\n"
            f"#define LINUX_VERSION_CODE KERNEL_VERSION({major}, {minor}, 0)\n"
        ),
        "include/linux/bpf_common.h": "#pragma once\n",
        "include/uapi/linux/bpf.h": "",
        "include/uapi/linux/if_packet.h": "",
        "include/uapi/linux/if_ether.h": "",
        "include/linux/if_packet.h": "",
        "include/linux/if_ether.h": "",
        "include/linux/log2.h": "",
        "include/linux/fs.h": "",
        "include/asm/page.h": "",
    }


@contextmanager
def _stub_kernel_source() -> Iterator[Path]:
    """A directory that passes for a kernel source tree, in BCC_KERNEL_SOURCE while it exists."""
    before = os.environ.get("BCC_KERNEL_SOURCE")
    with tempfile.TemporaryDirectory(prefix="xdpvhost-bcc-") as name:
        tree = Path(name)
        for path, text in _stub_headers().items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        os.environ["BCC_KERNEL_SOURCE"] = name
        try:
            yield tree
        finally:
            if before is None:
                del os.environ["BCC_KERNEL_SOURCE"]
            else:
                os.environ["BCC_KERNEL_SOURCE"] = before


CLONE_NEWNS = 0x00020000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


def _need_tracefs() -> None:
    """Have tracefs where bcc looks for it, without leaving a mount behind."""
    if any(Path(place, "events", "xdp").is_dir() for place in TRACEFS):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    steps: tuple[tuple[str, Callable[[], int]], ...] = (
        ("make a mount namespace", lambda: libc.unshare(CLONE_NEWNS)),
        ("make mounts private", lambda: libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)),
        ("mount tracefs", lambda: libc.mount(b"tracefs", TRACEFS[0].encode(), b"tracefs", ctypes.c_ulong(0), None)),
    )
    for what, step in steps:
        if step() != 0:
            cause = os.strerror(ctypes.get_errno())
            raise XdpvhostError(
                f"trace drops: cannot {what}: {cause}; mount it with `mount -t tracefs tracefs {TRACEFS[0]}`"
            )
    if not Path(TRACEFS[0], "events", "xdp").is_dir():
        raise XdpvhostError("trace drops: this kernel has no xdp tracepoints; it needs CONFIG_BPF_EVENTS")


def _load(condition: str) -> Any:
    """The bcc object with PROGRAM attached, for events that meet `condition`.

    Raises XdpvhostError that says what to install.
    """
    try:
        bcc = importlib.import_module("bcc")
    except ImportError as exc:
        raise XdpvhostError(
            f"trace drops needs bcc ({exc}); install it with `apt install python3-bpfcc` (PyPI's `bcc` is another), "
            "in a Python that sees Debian's packages"
        ) from exc
    _need_tracefs()
    text = f"static inline int wanted(u32 prog_id, int ifindex) {{ return {condition}; }}\n{PROGRAM}"
    try:
        with _stub_kernel_source():
            return bcc.BPF(text=text)
    except Exception as exc:
        log.debug("bcc does not take the stub headers: %s", exc)
    try:
        return bcc.BPF(text=text)
    except Exception as exc:
        raise XdpvhostError(
            f"trace drops: bcc could not load its program ({exc}); install the kernel's headers with "
            f"`apt install linux-headers-{platform.release()}`"
        ) from exc


def drops(status: Callable[[], Status], *, as_json: bool, seconds: float | None) -> None:
    """Print each lost frame to stdout until interrupted or `seconds` are over, then a summary to the log.

    Raises DaemonError when the daemon ends before that.
    """
    resolver = Resolver(status)
    summary: Counter[tuple[str, str]] = Counter()
    events: list[RawEvent] = []  # an exception could not leave bcc's callback

    def on_event(_cpu: int, data: int, _size: int) -> None:
        events.append(RawEvent.from_buffer_copy(ctypes.string_at(data, ctypes.sizeof(RawEvent))))

    def show() -> None:
        for event in events:
            drop = resolver.drop(event)
            summary[drop.guest or "no guest", drop.cause] += 1
            click.echo(msgspec.json.encode(drop) if as_json else str(drop))
        events.clear()

    def on_lost(count: int) -> None:
        log.warning("%d events came too fast to be shown", count)

    bpf = _load(resolver.filter)
    bpf["drops"].open_perf_buffer(on_event, page_cnt=64, lost_cb=on_lost)
    log.info("tracing drops%s", f" for {seconds:g} s" if seconds else ", until interrupted")
    end = time.monotonic() + seconds if seconds else None
    fresh = time.monotonic()
    interrupted: list[int] = []  # a flag, for an exception could come between an event's arrival and its line
    before = signal.signal(signal.SIGINT, lambda number, _frame: interrupted.append(number))
    try:
        while not interrupted and (end is None or time.monotonic() < end):
            left = 1.0 if end is None else max(0.001, min(1.0, end - time.monotonic()))
            bpf.perf_buffer_poll(timeout=max(1, int(left * 1000)))
            show()
            if time.monotonic() - fresh >= REFRESH_PERIOD:
                resolver.refresh()
                fresh = time.monotonic()
        bpf.perf_buffer_poll(timeout=0)  # what has come since
        show()
    finally:
        signal.signal(signal.SIGINT, before)
        bpf.cleanup()
        for (guest, cause), count in sorted(summary.items()):
            log.info("%s: %s: %d frames", guest, cause, count)
        if not summary:
            log.info("no frame was lost in the kernel")
