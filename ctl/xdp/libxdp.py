# SPDX-License-Identifier: Apache-2.0
"""libxdp through ctypes: attaching programs (with or without its dispatcher), and AF_XDP sockets.

Works with 1.3.1 (Debian 12) and later. Pointers come back as ERR_PTR (the top 4095 addresses) or NULL with errno set,
depending on version and function; `pointer()` knows both.

The ring structs (xsk_ring_prod, xsk_ring_cons) are kept by reference inside libxdp, so whoever makes a socket keeps
them alive until the socket is deleted.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_bool, c_char_p, c_int, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any

from ..errors import NicError
from .libbpf import PRINT_FN, libbpf, load_library, print_fn

MODES = {"native": 1, "generic": 2, "hardware": 3}  # enum xdp_attach_mode
MODE_NAMES = {number: name for name, number in MODES.items()}
SKIP_DISPATCHER = "LIBXDP_SKIP_DISPATCHER"
XDP_UMEM_TX_METADATA_LEN = 1 << 2  # the kernel then looks at tx_metadata_len
INHIBIT_PROG_LOAD = 1  # XSK_LIBXDP_FLAGS__INHIBIT_PROG_LOAD

_MAX_ERRNO = 4095


class XskRing(Structure):
    """struct xsk_ring_prod and struct xsk_ring_cons, which have the same fields."""

    _fields_ = (
        ("cached_prod", c_uint32),
        ("cached_cons", c_uint32),
        ("mask", c_uint32),
        ("size", c_uint32),
        ("producer", c_void_p),
        ("consumer", c_void_p),
        ("ring", c_void_p),
        ("flags", c_void_p),
    )


class UmemConfig(Structure):
    _fields_ = (
        ("fill_size", c_uint32),
        ("comp_size", c_uint32),
        ("frame_size", c_uint32),
        ("frame_headroom", c_uint32),
        ("flags", c_uint32),
    )


class UmemOpts(Structure):
    """struct xsk_umem_opts of libxdp 1.5, up to tx_metadata_len."""

    _fields_ = (
        ("sz", c_size_t),
        ("fd", c_int),
        ("size", c_uint64),
        ("fill_size", c_uint32),
        ("comp_size", c_uint32),
        ("frame_size", c_uint32),
        ("frame_headroom", c_uint32),
        ("flags", c_uint32),
        ("tx_metadata_len", c_uint32),
    )


class SocketConfig(Structure):
    _fields_ = (
        ("rx_size", c_uint32),
        ("tx_size", c_uint32),
        ("libxdp_flags", c_uint32),
        ("xdp_flags", c_uint32),
        ("bind_flags", c_uint16),
    )


_RING = POINTER(XskRing)
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "libxdp_set_print": (c_void_p, (PRINT_FN,)),
    "libxdp_strerror": (c_int, (c_int, c_char_p, c_size_t)),
    "xdp_program__from_bpf_obj": (c_void_p, (c_void_p, c_char_p)),
    "xdp_program__set_xdp_frags_support": (c_int, (c_void_p, c_bool)),
    "xdp_program__from_id": (c_void_p, (c_uint32,)),
    "xdp_program__close": (None, (c_void_p,)),
    "xdp_program__name": (c_char_p, (c_void_p,)),
    "xdp_program__id": (c_uint32, (c_void_p,)),
    "xdp_program__fd": (c_int, (c_void_p,)),
    "xdp_program__attach": (c_int, (c_void_p, c_int, c_int, c_uint32)),
    "xdp_program__detach": (c_int, (c_void_p, c_int, c_int, c_uint32)),
    "xdp_multiprog__get_from_ifindex": (c_void_p, (c_int,)),
    "xdp_multiprog__next_prog": (c_void_p, (c_void_p, c_void_p)),
    "xdp_multiprog__close": (None, (c_void_p,)),
    "xdp_multiprog__attach_mode": (c_int, (c_void_p,)),
    "xdp_multiprog__is_legacy": (c_bool, (c_void_p,)),
    "xsk_umem__create": (c_int, (POINTER(c_void_p), c_void_p, c_uint64, _RING, _RING, POINTER(UmemConfig))),
    "xsk_umem__delete": (c_int, (c_void_p,)),
    "xsk_socket__create_shared": (
        c_int,
        (POINTER(c_void_p), c_char_p, c_uint32, c_void_p, _RING, _RING, _RING, _RING, POINTER(SocketConfig)),
    ),
    "xsk_socket__delete": (None, (c_void_p,)),
    "xsk_socket__fd": (c_int, (c_void_p,)),
}


@cache
def libxdp() -> ctypes.CDLL:
    libbpf()  # first, so that its print callback is ours
    lib = load_library("libxdp.so.1", "libxdp1", _PROTOTYPES)
    lib.libxdp_set_print(print_fn("libxdp"))
    return lib


def error_text(code: int) -> str:
    """Text for a positive error number of libxdp, which has its own beside errno's."""
    text = ctypes.create_string_buffer(256)
    libxdp().libxdp_strerror(-code, text, len(text))
    return text.value.decode(errors="replace") or os.strerror(code)


def check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"{what}: {error_text(-result)}")


def pointer(value: int | None, what: str) -> int:
    """A pointer that libxdp returned. Raises OSError when it is an error."""
    if value is None or value == 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {error_text(code)}")
    code = (1 << ctypes.sizeof(c_void_p) * 8) - value
    if code <= _MAX_ERRNO:
        raise OSError(code, f"{what}: {error_text(code)}")
    return value


@contextmanager
def dispatcher_skipped(skip: bool) -> Iterator[None]:
    """libxdp reads this from the environment on every attach."""
    old = os.environ.get(SKIP_DISPATCHER)
    if skip:
        os.environ[SKIP_DISPATCHER] = "1"
    try:
        yield
    finally:
        if skip:
            if old is None:
                os.environ.pop(SKIP_DISPATCHER, None)
            else:
                os.environ[SKIP_DISPATCHER] = old


def dispatched(ifindex: int) -> tuple[str, tuple[tuple[int, str], ...]] | None:
    """Mode and programs (id, name) of libxdp's dispatcher on a device; None when there is none.

    Only looks, and only where there is something: on a device without a program libxdp would warn.
    """
    lib = libxdp()
    try:
        multi = pointer(lib.xdp_multiprog__get_from_ifindex(ifindex), f"interface {ifindex}")
    except OSError:
        return None
    try:
        if lib.xdp_multiprog__is_legacy(multi):
            return None
        found: list[tuple[int, str]] = []
        program = lib.xdp_multiprog__next_prog(None, multi)
        while program:
            name = lib.xdp_program__name(program) or b""
            found.append((lib.xdp_program__id(program), name.decode(errors="replace")))
            program = lib.xdp_multiprog__next_prog(program, multi)
        return MODE_NAMES.get(lib.xdp_multiprog__attach_mode(multi), "unknown"), tuple(found)
    finally:
        lib.xdp_multiprog__close(multi)


def has_tx_metadata() -> bool:
    return hasattr(libxdp(), "xsk_umem__create_opts")


def make_umem_with_metadata(area: int, size: int, config: UmemConfig, room: int, fill: XskRing, comp: XskRing) -> int:
    """As `make_umem`, with `room` bytes for struct xsk_tx_metadata before each frame that is sent. Raises OSError."""
    create = libxdp().xsk_umem__create_opts
    create.restype, create.argtypes = c_void_p, (c_void_p, _RING, _RING, POINTER(UmemOpts))
    opts = UmemOpts(
        ctypes.sizeof(UmemOpts), 0, size, config.fill_size, config.comp_size, config.frame_size, config.frame_headroom,
        config.flags | XDP_UMEM_TX_METADATA_LEN, room,
    )  # fmt: skip
    return pointer(create(area, byref(fill), byref(comp), byref(opts)), "UMEM with metadata")


def make_umem(area: int, size: int, config: UmemConfig, fill: XskRing, comp: XskRing) -> int:
    """Register memory with the kernel; fills in the two rings. Raises OSError."""
    handle = c_void_p()
    result = libxdp().xsk_umem__create(byref(handle), area, size, byref(fill), byref(comp), byref(config))
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    assert handle.value is not None
    return handle.value


def make_socket(
    ifname: str,
    queue: int,
    umem: int,
    rings: Sequence[XskRing | None],
    config: SocketConfig,
) -> int:
    """Create and bind a socket; rings are rx, tx, fill, completion. Raises OSError.

    The first socket of a UMEM is given the UMEM's own fill and completion rings. Later ones on the same device and
    queue share them, and libxdp ignores what it is given.
    """
    handle = c_void_p()
    name = ctypes.create_string_buffer(ifname.encode(), 16)  # libxdp copies IFNAMSIZ - 1 bytes, whatever its length
    pointers = [None if ring is None else byref(ring) for ring in rings]
    result = libxdp().xsk_socket__create_shared(byref(handle), name, queue, umem, *pointers, byref(config))
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    assert handle.value is not None
    return handle.value


def socket_fd(handle: int) -> int:
    return int(libxdp().xsk_socket__fd(handle))


def delete_socket(handle: int) -> None:
    libxdp().xsk_socket__delete(handle)


def delete_umem(handle: int) -> None:
    """After its last socket. Raises OSError (EBUSY) before."""
    result = libxdp().xsk_umem__delete(handle)
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def attach(program: int, ifindex: int, mode: str) -> None:
    check(libxdp().xdp_program__attach(program, ifindex, MODES[mode], 0), f"attach in {mode} mode")


def detach(program: int, ifindex: int, mode: str) -> None:
    check(libxdp().xdp_program__detach(program, ifindex, MODES[mode], 0), f"detach in {mode} mode")


def program_from_object(bpf_object: int | None, section: str) -> int:
    """The object stays the caller's."""
    found = libxdp().xdp_program__from_bpf_obj(bpf_object, section.encode())
    return pointer(found, f"BPF object without a program in section {section}")


def allow_frags(program: int) -> None:
    """Before it is loaded: it takes frames of several pieces, as a program in a section `xdp.frags` does. OSError."""
    check(libxdp().xdp_program__set_xdp_frags_support(program, True), "XDP program for frames of several pieces")


def program_from_id(program_id: int) -> int:
    return pointer(libxdp().xdp_program__from_id(program_id), f"BPF program {program_id}")


def close_program(program: int) -> None:
    libxdp().xdp_program__close(program)


def program_id(program: int) -> int:
    return int(libxdp().xdp_program__id(program))


def program_fd(program: int) -> int:
    return int(libxdp().xdp_program__fd(program))


def refuse_missing() -> None:
    """Raise NicError when the libraries aren't there, before anything is changed."""
    try:
        libxdp()
    except OSError as exc:
        raise NicError(str(exc)) from exc
