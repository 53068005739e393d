# SPDX-License-Identifier: Apache-2.0
"""The XDP program on a device: loading, attaching, finding and detaching it.

libxdp attaches it. With a bpffs and a kernel that takes freplace programs it goes into libxdp's dispatcher, beside
other programs; elsewhere it is the device's only program. Native mode is tried before generic unless one is asked for.
A device that runs a foreign program outside a dispatcher is refused, never taken over.

Where VLAN tags may come beside frames (ctl/xdp/tags.py), a program is tried first that sees those. It is bound to the
device, which libxdp's dispatcher is not (before libxdp 1.6), so it is the device's only program; see
docs/decisions/0011-tags-beside-frames.md.

Every attempt loads the object anew: libxdp leaves a program that it has loaded for one way of attaching unusable for
another.

A program outlives its loader. If we are killed it stays, passing the host's frames and dropping the guests'; the
journal remembers it, and `detach_leftover` takes it off.
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import NicError, PrivilegeError
from . import libxdp
from .libbpf import WARN, BpfObject, captured_log, program_by_id, program_name, xdp_detach, xdp_state
from .maps import SteerMaps, size_maps

log = logging.getLogger(__name__)

PROGRAM = "xdpvhost_steer"
SECTION = "xdp"
DISPATCHER = "xdp_dispatcher"
OBJECT = Path(__file__).parent.parent / "_native" / "steer.bpf.o"
TAGS_OBJECT = OBJECT.with_name("steer_tags.bpf.o")
XDP_MODES = ("auto", "native", "generic")

_CHATTER = ("Kernel error message: ",)


@dataclass(frozen=True)
class Found:
    """A program that a device runs, by itself or in a dispatcher. `name` is None when we may not ask."""

    program_id: int
    name: str | None
    mode: str | None
    dispatcher: bool


def attached(ifindex: int) -> tuple[Found, ...]:
    """What a device runs. Raises OSError."""
    state = xdp_state(ifindex)
    if not state.programs:
        return ()
    names = {i: program_name(i) for i in state.programs}
    if DISPATCHER in names.values():
        with captured_log():
            multi = libxdp.dispatched(ifindex)
        if multi is not None:
            mode, members = multi
            return tuple(Found(i, name, mode, True) for i, name in members)
    return tuple(Found(i, name, state.mode, False) for i, name in names.items())


def refuse_occupied(ifindex: int, iface: str) -> None:
    """Raise NicError if we can't share the device with what it runs."""
    for found in attached(ifindex):
        what = f"XDP program {found.name or 'of unknown name'} (id {found.program_id})"
        if found.name == PROGRAM:
            raise NicError(
                f"interface {iface}: another xdpvhost is on it ({what}): stop that one with `xdpvhost down`, "
                f"or, if it was killed, run `xdpvhost clean`, or `xdp-loader unload {iface} --id {found.program_id}`"
            )
        if not found.dispatcher:
            raise NicError(
                f"interface {iface}: {what} is attached in {found.mode} mode: detach it with "
                f"`xdp-loader unload {iface} --all` or `ip link set {iface} xdp off`"
            )


def bpffs() -> str | None:
    """Where libxdp finds a mounted bpffs for its dispatcher, if there is one."""
    wanted = os.environ.get("LIBXDP_BPFFS", "/sys/fs/bpf")
    with open("/proc/thread-self/mounts", encoding="utf-8", errors="replace") as mounts:
        fields = [line.split() for line in mounts]
    # The last mount on a directory is the one that shows.
    kinds = [f[2] for f in fields if f[1] == wanted]
    return wanted if kinds and kinds[-1] == "bpf" else None


class SteerProgram:
    """Our program, attached to one device. Owns the BPF object, and so the maps."""

    def __init__(
        self, obj: BpfObject, handle: int, ifindex: int, nr_queues: int, frags: bool, sees_tags_beside: bool
    ) -> None:
        self.frags = frags
        self.sees_tags_beside = sees_tags_beside
        self._object: BpfObject | None = obj
        self._handle: int | None = handle
        self._ifindex = ifindex
        self.program_id = libxdp.program_id(handle)
        found = {f.program_id: f for f in attached(ifindex)}.get(self.program_id)
        if found is None:  # the dispatcher runs a clone of it
            found = next((f for f in attached(ifindex) if f.name == PROGRAM), None)
            if found is None:
                raise OSError(errno.EPERM, "cannot tell which program in the dispatcher is ours without CAP_SYS_ADMIN")
            self.program_id = found.program_id
        assert found.mode is not None
        self.mode: str = found.mode
        self.dispatcher = found.dispatcher
        self.dispatcher_detail = _dispatcher_detail(self.dispatcher, sees_tags_beside)
        self.native_refusal: str | None = None
        self.tags_refusal: str | None = None  # why VLAN tags beside frames are not seen, although that was asked for
        self.maps = SteerMaps(obj, nr_queues)

    @classmethod
    def attach(
        cls,
        ifindex: int,
        iface: str,
        mode: str,
        nr_queues: int,
        frags: bool = False,
        path: Path = OBJECT,
        tags_beside: bool = False,
    ) -> SteerProgram:
        """Load and attach. `mode`: auto, native or generic; `frags`: there will be frames of several pieces.

        Without `frags` a veth whose other end has a large MTU still wants a program that takes such frames: one is
        tried when the other is refused. `tags_beside`: VLAN tags beside frames are to be seen, if possible; see
        `tags_refusal`. Raises NicError, and then nothing is attached.
        """
        refuse_occupied(ifindex, iface)
        if tags_beside:
            bound = "" if mode == "generic" else cls._attach_bound(ifindex, nr_queues, frags)
            if isinstance(bound, SteerProgram):
                return bound
            program = cls.attach(ifindex, iface, mode, nr_queues, frags, path)
            program.tags_refusal = "generic XDP can't see it" if program.mode == "generic" else bound
            return program
        refusals: dict[str, str] = {}
        attempts = [(frags, False), (frags, True)]  # with frames of several pieces; without libxdp's dispatcher
        if not frags:
            attempts += [(True, False), (True, True)]
        for candidate in ("native", "generic") if mode == "auto" else (mode,):
            last: int | None = None
            for pieces, skip in attempts:
                if pieces != frags and last != errno.ERANGE:
                    break
                with captured_log() as lines:
                    try:
                        program = cls._attempt(ifindex, candidate, nr_queues, path, skip, pieces)
                    except OSError as exc:
                        last = exc.errno
                        if pieces == frags:  # what was asked for is what the message is about
                            refusals[candidate] = _explain(exc, iface, candidate, [text for _, text in lines])
                        if skip or exc.errno in (errno.ENOENT, errno.ENODEV):
                            _raise_if_hopeless(exc, iface, lines)
                        continue
                program.native_refusal = refusals.get("native") if program.mode == "generic" else None
                return program
        tried = "; ".join(refusals.values())
        raise NicError(f"interface {iface}: cannot attach the XDP program: {tried}")

    @classmethod
    def _attach_bound(cls, ifindex: int, nr_queues: int, frags: bool) -> SteerProgram | str:
        """The program that sees tags beside frames, or why it can't be had. What else is wrong, the plain one tells."""
        if attached(ifindex):
            return "other XDP programs are on the interface, and one that sees it must be alone"
        error: OSError
        for pieces in (frags,) if frags else (False, True):
            with captured_log() as lines:
                try:
                    return cls._attempt(ifindex, "native", nr_queues, TAGS_OBJECT, True, pieces, bound=True)
                except OSError as exc:
                    error = exc
            if error.errno != errno.ERANGE:
                break
        log.debug("interface %d: no program that sees VLAN tags beside frames: %s; %s", ifindex, error, lines)
        return f"the kernel refuses a program that sees it ({libxdp.error_text(error.errno or 0)})"

    @classmethod
    def _attempt(
        cls,
        ifindex: int,
        mode: str,
        nr_queues: int,
        path: Path,
        skip_dispatcher: bool,
        frags: bool,
        bound: bool = False,
    ) -> SteerProgram:
        obj = BpfObject(path)
        handle: int | None = None
        try:
            size_maps(obj, nr_queues)
            if bound:
                obj.bind_to_device(PROGRAM, ifindex)
            handle = libxdp.program_from_object(obj.handle, SECTION)
            if frags:
                libxdp.allow_frags(handle)
            with libxdp.dispatcher_skipped(skip_dispatcher):
                libxdp.attach(handle, ifindex, mode)
            try:
                return cls(obj, handle, ifindex, nr_queues, frags, bound)
            except BaseException:
                libxdp.detach(handle, ifindex, mode)
                raise
        except BaseException:
            if handle is not None:
                libxdp.close_program(handle)
            obj.close()
            raise

    def close(self) -> bool:
        """Detach, then unload. Logs a failure, never raises. Whether it is off; a device that is gone is rid of it."""
        is_off = True
        self.maps.close()
        handle, self._handle = self._handle, None
        obj, self._object = self._object, None
        if handle is not None:
            try:
                detach(self._ifindex, self.program_id, libxdp.program_fd(handle))
            except OSError as exc:
                is_off = exc.errno in (errno.ENODEV, errno.ENOENT)
                level = logging.DEBUG if is_off else logging.ERROR
                log.log(level, "interface %d: cannot detach the XDP program: %s", self._ifindex, exc.strerror)
            libxdp.close_program(handle)
        if obj is not None:
            obj.close()
        return is_off


def detach(ifindex: int, program_id: int, program_fd: int) -> None:
    """Take exactly this program off the device, and leave whatever else runs in a dispatcher. Raises OSError."""
    found = next((f for f in attached(ifindex) if f.program_id == program_id), None)
    if found is None:
        raise OSError(errno.ENOENT, "it is no longer attached")
    assert found.mode is not None
    if not found.dispatcher:
        xdp_detach(ifindex, found.mode, program_fd)
        return
    with captured_log():
        member = libxdp.program_from_id(program_id)
        try:
            libxdp.detach(member, ifindex, found.mode)
        finally:
            libxdp.close_program(member)


def detach_leftover(ifindex: int, program_id: int | None) -> bool:
    """Take off a program of ours whose loader died. False: there is none. Raises OSError.

    Without an id (the loader died before it could note it) it is known by its name.
    """
    ours = [f for f in attached(ifindex) if program_id in (None, f.program_id) and f.name in (None, PROGRAM)]
    if program_id is None:
        ours = [f for f in ours if f.name == PROGRAM]
    for found in ours:
        fd = program_by_id(found.program_id)
        try:
            detach(ifindex, found.program_id, fd)
        finally:
            os.close(fd)
    return bool(ours)


def _dispatcher_detail(in_use: bool, bound: bool) -> str:
    if in_use:
        return "in libxdp's dispatcher"
    if bound:
        return "single program: it sees VLAN tags beside frames, and is bound to the interface for that"
    where = os.environ.get("LIBXDP_BPFFS", "/sys/fs/bpf")
    if bpffs() is None:
        return f"single program: no bpffs is mounted at {where} (`mount -t bpf bpf {where}`)"
    if os.environ.get(libxdp.SKIP_DISPATCHER) == "1":
        return f"single program: {libxdp.SKIP_DISPATCHER} is set"
    return "single program: the kernel refuses libxdp's dispatcher (it needs freplace programs)"


def _explain(error: OSError, iface: str, mode: str, lines: list[str]) -> str:
    """One clause: what the kernel refused in this mode, and what helps."""
    said = [line.split(prefix, 1)[1] for line in lines for prefix in _CHATTER if prefix in line]
    cause = said[-1].strip() if said else libxdp.error_text(error.errno or 0)
    if error.errno == errno.ERANGE or "MTU" in cause:
        remedy = f"lower the MTU: `ip link set {iface} mtu 3498` at both ends of a veth, or use --xdp-mode generic"
    elif error.errno == errno.ENOSPC or "queue" in cause:
        remedy = (
            "a veth needs at least as many receive queues as its other end has transmit queues: "
            f"`ethtool -L {iface} rx N`, or `ethtool -L PEER tx 1` at the other end"
        )
    elif error.errno == errno.EOPNOTSUPP:
        remedy = "use --xdp-mode generic" if mode == "native" else "use an interface that can run XDP"
    elif error.errno in (errno.EEXIST, errno.EBUSY):
        remedy = f"another XDP program is on it: see `ip link show {iface}` and `xdp-loader status {iface}`"
    else:
        remedy = "the log at debug level has what libbpf said"
    return f"{mode} mode: {cause} ({remedy})"


def _raise_if_hopeless(error: OSError, iface: str, lines: list[tuple[int, str]]) -> None:
    """Errors that no other mode can cure: a missing object, a missing capability, the verifier."""
    if error.errno == errno.ENOENT and not lines:
        raise NicError(str(error.strerror)) from error
    if error.errno == errno.ENODEV:
        raise NicError(f"interface {iface}: it disappeared while the XDP program was being attached") from error
    if error.errno == errno.EPERM:
        raise PrivilegeError(
            f"interface {iface}: the kernel does not let us load or attach an XDP program: "
            "run as root, or with CAP_NET_ADMIN, CAP_BPF and CAP_PERFMON"
        ) from error
    verifier = [text for level, text in lines if level == WARN and "PROG LOAD LOG" in text]
    if verifier:
        log.error("%s", verifier[-1])
        raise NicError(
            f"interface {iface}: the kernel's verifier refuses the XDP program (its log is above); "
            "this is a bug in xdpvhost or an unsupported kernel"
        ) from error
