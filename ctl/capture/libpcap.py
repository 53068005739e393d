# SPDX-License-Identifier: Apache-2.0
"""tcpdump expressions: compiled by libpcap, and run by its bpf_filter(), which the native reader calls directly.

libpcap is needed for filters and nothing else, and is loaded when there is one.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_uint, c_uint32, c_void_p
from functools import cache
from typing import Any, Self

from ..errors import ConfigError, XdpvhostError

LIBRARIES = ("libpcap.so.0.8", "libpcap.so.1")  # Debian's name, and everybody else's
DLT_EN10MB = 1
SNAPLEN = 262144
OPTIMIZE = 1
PCAP_NETMASK_UNKNOWN = 0xFFFFFFFF


class BpfProgram(Structure):
    """struct bpf_program."""

    _fields_ = (("bf_len", c_uint), ("bf_insns", c_void_p))


@cache
def library() -> Any:
    """Raises XdpvhostError that says what to install."""
    for name in LIBRARIES:
        try:
            lib = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise XdpvhostError(
            "a FILTER needs libpcap, which is not here; install it with `apt install libpcap0.8`, or capture without "
            "FILTER"
        )
    lib.pcap_open_dead.restype, lib.pcap_open_dead.argtypes = c_void_p, (c_int, c_int)
    lib.pcap_compile.restype = c_int
    lib.pcap_compile.argtypes = (c_void_p, POINTER(BpfProgram), c_char_p, c_int, c_uint32)
    lib.pcap_geterr.restype, lib.pcap_geterr.argtypes = c_char_p, (c_void_p,)
    lib.pcap_freecode.restype, lib.pcap_freecode.argtypes = None, (POINTER(BpfProgram),)
    lib.pcap_close.restype, lib.pcap_close.argtypes = None, (c_void_p,)
    return lib


class Filter:
    """A compiled expression over Ethernet frames. `function` and `program` are for datapath.CapreadConf."""

    def __init__(self, expression: str) -> None:
        """Raises ConfigError with libpcap's own words when it doesn't compile."""
        self._lib = lib = library()
        self.expression = expression
        self._program = BpfProgram()
        dead = lib.pcap_open_dead(DLT_EN10MB, SNAPLEN)
        if not dead:
            raise XdpvhostError("libpcap: out of memory")
        try:
            text = expression.encode(errors="surrogateescape")
            if lib.pcap_compile(dead, byref(self._program), text, OPTIMIZE, PCAP_NETMASK_UNKNOWN) != 0:
                why = lib.pcap_geterr(dead).decode(errors="replace")
                raise ConfigError(f"filter {expression!r}: {why}; `man pcap-filter` has the syntax")
        finally:
            lib.pcap_close(dead)
        self.function = ctypes.cast(lib.bpf_filter, c_void_p).value or 0
        self.program: int = self._program.bf_insns or 0

    def close(self) -> None:
        """Idempotent."""
        if self.program:
            self._lib.pcap_freecode(byref(self._program))
            self.program = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
