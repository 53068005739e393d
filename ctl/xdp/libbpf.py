# SPDX-License-Identifier: Apache-2.0
"""libbpf through ctypes: what it takes to open an object, size and read its maps, and ask what XDP a device runs.

libbpf 1.x: a function that returns an int returns a negative errno, one that returns a pointer returns NULL and sets
errno. What the library prints, the verifier's log among it, goes to the logger `xdpvhost.libbpf`; `captured_log()`
also collects it for an error message.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from ..errors import NicError

log = logging.getLogger("xdpvhost.libbpf")

PROG_TYPE_EXT = 28
BPF_F_XDP_DEV_BOUND_ONLY = 1 << 6
MODES = {0: None, 1: "native", 2: "generic", 3: "hardware", 4: "several"}  # enum XDP_ATTACHED_*

# libbpf's and libxdp's print callback. A va_list argument is a pointer on every Linux ABI that Debian has 64-bit for.
PRINT_FN = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)
WARN, INFO, DEBUG = range(3)

_captures = threading.local()


class XdpQueryOpts(Structure):
    """struct bpf_xdp_query_opts up to attach_mode, which every libbpf 1.x has."""

    _fields_ = (
        ("sz", c_size_t),
        ("prog_id", c_uint32),
        ("drv_prog_id", c_uint32),
        ("hw_prog_id", c_uint32),
        ("skb_prog_id", c_uint32),
        ("attach_mode", c_uint8),
    )


class XdpAttachOpts(Structure):
    _fields_ = (("sz", c_size_t), ("old_prog_fd", c_int))


class TestRunOpts(Structure):
    """struct bpf_test_run_opts (BPF_PROG_TEST_RUN)."""

    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class XdpMd(Structure):
    """struct xdp_md, the context of an XDP program."""

    _fields_ = (
        ("data", c_uint32),
        ("data_end", c_uint32),
        ("data_meta", c_uint32),
        ("ingress_ifindex", c_uint32),
        ("rx_queue_index", c_uint32),
        ("egress_ifindex", c_uint32),
    )


class ProgInfo(Structure):
    """The beginning of struct bpf_prog_info."""

    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", c_uint8 * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", ctypes.c_char * 16),
    )


_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libbpf_set_print": (c_void_p, (PRINT_FN,)),
    "libbpf_num_possible_cpus": (c_int, ()),
    "bpf_object__open_file": (c_void_p, (c_char_p, c_void_p)),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__find_map_by_name": (c_void_p, (c_void_p, c_char_p)),
    "bpf_object__find_program_by_name": (c_void_p, (c_void_p, c_char_p)),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_program__set_type": (c_int, (c_void_p, c_int)),
    "bpf_program__set_expected_attach_type": (c_int, (c_void_p, c_int)),
    "bpf_program__set_ifindex": (None, (c_void_p, c_uint32)),
    "bpf_program__flags": (c_uint32, (c_void_p,)),
    "bpf_program__set_flags": (c_int, (c_void_p, c_uint32)),
    "bpf_program__set_attach_target": (c_int, (c_void_p, c_int, c_char_p)),
    "bpf_raw_tracepoint_open": (c_int, (c_char_p, c_int)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__set_initial_value": (c_int, (c_void_p, c_char_p, c_size_t)),
    "bpf_map__set_max_entries": (c_int, (c_void_p, c_uint32)),
    "bpf_map__max_entries": (c_uint32, (c_void_p,)),
    "bpf_map__key_size": (c_uint32, (c_void_p,)),
    "bpf_map__value_size": (c_uint32, (c_void_p,)),
    "bpf_map_lookup_elem": (c_int, (c_int, c_char_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_char_p, c_char_p, c_uint64)),
    "bpf_map_delete_elem": (c_int, (c_int, c_char_p)),
    "bpf_map_get_next_key": (c_int, (c_int, c_char_p, c_void_p)),
    "bpf_obj_get_info_by_fd": (c_int, (c_int, c_void_p, POINTER(c_uint32))),
    "bpf_prog_get_fd_by_id": (c_int, (c_uint32,)),
    "bpf_prog_test_run_opts": (c_int, (c_int, POINTER(TestRunOpts))),
    "bpf_xdp_query": (c_int, (c_int, c_int, POINTER(XdpQueryOpts))),
    "bpf_xdp_detach": (c_int, (c_int, c_uint32, POINTER(XdpAttachOpts))),
}


def load_library(soname: str, package: str, prototypes: dict[str, tuple[Any, tuple[Any, ...]]]) -> ctypes.CDLL:
    """dlopen `soname` and declare its functions. Raises NicError naming the Debian package that has it."""
    try:
        lib = ctypes.CDLL(soname, use_errno=True)
        for name, (restype, argtypes) in prototypes.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = restype, argtypes
    except (OSError, AttributeError) as exc:
        raise NicError(f"cannot use {soname}: {exc}; install Debian's {package}") from exc
    return lib


@cache
def print_fn(library_name: str) -> Any:
    """A C library's print callback, alive for ever: to the logger, and to this thread's innermost `captured_log()`."""
    libc = ctypes.CDLL(None)
    libc.vsnprintf.argtypes = (c_void_p, c_size_t, c_char_p, c_void_p)

    def on_print(level: int, template: bytes, arguments: int) -> int:
        if level >= DEBUG and not log.isEnabledFor(logging.DEBUG):
            return 0
        text = ctypes.create_string_buffer(1 << 16)
        libc.vsnprintf(text, len(text), template, arguments)
        line = text.value.decode(errors="replace").rstrip()
        lines: list[tuple[int, str]] | None = getattr(_captures, "lines", None)
        if lines is not None:
            lines.append((level, line))
        log.debug("%s: %s", library_name, line)
        return 0

    return PRINT_FN(on_print)


@contextmanager
def captured_log() -> Iterator[list[tuple[int, str]]]:
    """Inside, what libbpf and libxdp print in this thread is also appended to the list: (level, text)."""
    outer = getattr(_captures, "lines", None)
    lines: list[tuple[int, str]] = []
    _captures.lines = lines
    try:
        yield lines
    finally:
        _captures.lines = outer


@cache
def libbpf() -> ctypes.CDLL:
    lib = load_library("libbpf.so.1", "libbpf1", _PROTOTYPES)
    lib.libbpf_set_print(print_fn("libbpf"))
    return lib


def check(result: int, what: str) -> int:
    """`result`, or OSError for a negative errno."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Map:
    """A BPF map of an open object. The object owns the descriptor."""

    def __init__(self, handle: int, name: str) -> None:
        self._handle = handle
        self._name = name
        self.key_size = int(libbpf().bpf_map__key_size(handle))
        self.value_size = int(libbpf().bpf_map__value_size(handle))

    @property
    def fd(self) -> int:
        """Valid once the object is loaded."""
        return check(libbpf().bpf_map__fd(self._handle), f"BPF map {self._name}")

    @property
    def max_entries(self) -> int:
        return int(libbpf().bpf_map__max_entries(self._handle))

    def set_max_entries(self, count: int) -> None:
        """Before the object is loaded."""
        check(libbpf().bpf_map__set_max_entries(self._handle, count), f"BPF map {self._name}: {count} entries")

    def set_initial(self, value: bytes) -> None:
        """Before the object is loaded: what a section of global data holds at first."""
        result = libbpf().bpf_map__set_initial_value(self._handle, value, len(value))
        check(result, f"BPF map {self._name}: {len(value)} bytes at first")

    def update(self, key: bytes, value: bytes) -> None:
        assert len(key) == self.key_size
        check(libbpf().bpf_map_update_elem(self.fd, key, value, 0), f"BPF map {self._name}")

    def delete(self, key: bytes) -> bool:
        """False: there was no such key."""
        result = libbpf().bpf_map_delete_elem(self.fd, key)
        if result == -errno.ENOENT:
            return False
        check(result, f"BPF map {self._name}")
        return True

    def lookup(self, key: bytes) -> bytes | None:
        value = ctypes.create_string_buffer(self.value_size)
        return value.raw if self._lookup(key, value) else None

    def lookup_percpu(self, key: bytes) -> list[bytes]:
        """One value for each possible CPU."""
        stride = (self.value_size + 7) & ~7
        value = ctypes.create_string_buffer(stride * possible_cpus())
        if not self._lookup(key, value):
            return []
        return [value.raw[at : at + self.value_size] for at in range(0, len(value), stride)]

    def clear_percpu(self, key: bytes) -> None:
        self.update(key, bytes(((self.value_size + 7) & ~7) * possible_cpus()))

    def keys(self) -> Iterator[bytes]:
        following = ctypes.create_string_buffer(self.key_size)
        key: bytes | None = None
        while libbpf().bpf_map_get_next_key(self.fd, key, following) == 0:
            key = following.raw
            yield key

    def _lookup(self, key: bytes, value: ctypes.Array[ctypes.c_char]) -> bool:
        assert len(key) == self.key_size
        result = libbpf().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return False
        check(result, f"BPF map {self._name}")
        return True


class BpfObject:
    """An ELF object with programs and maps. Closing it drops our references; what is attached stays attached."""

    def __init__(self, path: Path) -> None:
        """Opens and parses, loads nothing. Raises OSError."""
        ctypes.set_errno(0)
        handle = libbpf().bpf_object__open_file(os.fsencode(path), None)
        if not handle:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot open the BPF object {path}: {os.strerror(code)}; build it with `make -C bpf`")
        self.path = path
        self.handle: int | None = handle

    def load(self) -> None:
        check(libbpf().bpf_object__load(self.handle), f"cannot load the BPF object {self.path}")

    def map(self, name: str) -> Map:
        handle = libbpf().bpf_object__find_map_by_name(self.handle, name.encode())
        if not handle:
            raise OSError(errno.ENOENT, f"BPF object {self.path} has no map {name}")
        return Map(handle, name)

    def program_fd(self, name: str) -> int:
        """Of a loaded program."""
        return check(libbpf().bpf_program__fd(self._program(name)), f"BPF program {name}")

    def make_replacement(self, name: str, target_fd: int) -> None:
        """Before loading: this program is to replace the function of its own name in another one (freplace)."""
        handle = self._program(name)
        check(libbpf().bpf_program__set_type(handle, PROG_TYPE_EXT), f"BPF program {name}")
        check(libbpf().bpf_program__set_expected_attach_type(handle, 0), f"BPF program {name}")
        check(libbpf().bpf_program__set_attach_target(handle, target_fd, name.encode()), f"BPF program {name}")

    def bind_to_device(self, name: str, ifindex: int) -> None:
        """Before loading: this XDP program will run on one device only, and may ask its driver about frames (6.3)."""
        handle = self._program(name)
        flags = libbpf().bpf_program__flags(handle) | BPF_F_XDP_DEV_BOUND_ONLY
        check(libbpf().bpf_program__set_flags(handle, flags), f"BPF program {name}")
        libbpf().bpf_program__set_ifindex(handle, ifindex)

    def _program(self, name: str) -> int:
        handle: int | None = libbpf().bpf_object__find_program_by_name(self.handle, name.encode())
        if not handle:
            raise OSError(errno.ENOENT, f"BPF object {self.path} has no program {name}")
        return handle

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            libbpf().bpf_object__close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def possible_cpus() -> int:
    return check(libbpf().libbpf_num_possible_cpus(), "number of possible CPUs")


@dataclass(frozen=True)
class XdpState:
    """What a device runs: `programs` are ids, in `mode` native, generic, hardware, or several at a time."""

    mode: str | None
    programs: tuple[int, ...]


def xdp_state(ifindex: int) -> XdpState:
    """Raises OSError (ENODEV when the device is gone)."""
    opts = XdpQueryOpts(sz=ctypes.sizeof(XdpQueryOpts))
    check(libbpf().bpf_xdp_query(ifindex, 0, byref(opts)), f"XDP state of interface {ifindex}")
    ids: Sequence[int] = (opts.drv_prog_id, opts.skb_prog_id, opts.hw_prog_id)
    # One program alone is in prog_id; the per-mode fields are only sure to be there when there are several.
    return XdpState(MODES.get(opts.attach_mode), tuple(dict.fromkeys(i for i in (opts.prog_id, *ids) if i)))


def attach_replacement(program_fd: int) -> int:
    """Attach a loaded replacement to its target; it goes with the descriptor. Raises OSError."""
    return check(libbpf().bpf_raw_tracepoint_open(None, program_fd), "cannot attach a replacement program")


def xdp_detach(ifindex: int, mode: str, program_fd: int) -> None:
    """Detach exactly this program. Raises OSError when another one is there."""
    flags = {"native": 1 << 2, "generic": 1 << 1, "hardware": 1 << 3}[mode] | 1 << 4  # XDP_FLAGS_*; REPLACE
    opts = XdpAttachOpts(sz=ctypes.sizeof(XdpAttachOpts), old_prog_fd=program_fd)
    check(libbpf().bpf_xdp_detach(ifindex, flags, byref(opts)), f"cannot detach the XDP program of interface {ifindex}")


def program_by_id(program_id: int) -> int:
    """A descriptor of a loaded program, to be closed by the caller. Needs CAP_SYS_ADMIN. Raises OSError."""
    return check(libbpf().bpf_prog_get_fd_by_id(program_id), f"BPF program {program_id}")


def program_info(program_fd: int) -> ProgInfo:
    info = ProgInfo()
    length = c_uint32(ctypes.sizeof(info))
    check(libbpf().bpf_obj_get_info_by_fd(program_fd, byref(info), byref(length)), "BPF program information")
    return info


def program_name(program_id: int) -> str | None:
    """None: the program is gone, or we may not ask."""
    try:
        fd = program_by_id(program_id)
    except OSError:
        return None
    try:
        name: bytes = program_info(fd).name
        return name.decode(errors="replace")
    except OSError:
        return None
    finally:
        os.close(fd)


def run_once(program_fd: int, frame: bytes, context: XdpMd | None = None) -> tuple[int, bytes]:
    """Run a program once on a frame (BPF_PROG_TEST_RUN): its verdict and the frame after it."""
    room = ctypes.create_string_buffer(len(frame) + 512)
    opts = TestRunOpts(
        sz=ctypes.sizeof(TestRunOpts),
        data_in=ctypes.cast(c_char_p(frame), c_void_p),
        data_size_in=len(frame),
        data_out=ctypes.addressof(room),
        data_size_out=len(room),
        repeat=1,
    )
    if context is not None:
        opts.ctx_in, opts.ctx_size_in = ctypes.addressof(context), ctypes.sizeof(context)
    check(libbpf().bpf_prog_test_run_opts(program_fd, byref(opts)), f"BPF_PROG_TEST_RUN with {len(frame)} bytes")
    return int(opts.retval), room.raw[: opts.data_size_out]
