# SPDX-License-Identifier: Apache-2.0
"""Which capabilities this process has, and a refusal that names the missing one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import PrivilegeError

# include/uapi/linux/capability.h
CAPABILITIES = {
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_NICE": 23,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

# One of each row is enough: capabilities(7).
TRACE: tuple[tuple[str, ...], ...] = (("CAP_BPF", "CAP_SYS_ADMIN"), ("CAP_PERFMON", "CAP_SYS_ADMIN"))
UP: tuple[tuple[str, ...], ...] = (("CAP_NET_ADMIN",), ("CAP_NET_RAW",), *TRACE)
LEFTOVER: tuple[tuple[str, ...], ...] = (("CAP_SYS_ADMIN",),)  # to get at a program that somebody else loaded
CLEAN: tuple[tuple[str, ...], ...] = (("CAP_NET_ADMIN",), *LEFTOVER)


def effective() -> frozenset[str]:
    """The names, out of CAPABILITIES, in the calling thread's effective set."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            mask = int(line.split()[1], 16)
            return frozenset(name for name, bit in CAPABILITIES.items() if mask >> bit & 1)
    return frozenset()


def missing(needs: Sequence[Sequence[str]], have: frozenset[str] | None = None) -> list[str]:
    """What of `needs` this process lacks, as people say it. `have` defaults to the effective set."""
    present = effective() if have is None else have
    return [" or ".join(row) for row in needs if not present.intersection(row)]


def require(command: str, needs: Sequence[Sequence[str]], have: frozenset[str] | None = None) -> None:
    """Raise PrivilegeError naming what `command` lacks. `have` defaults to the effective set."""
    if lacking := missing(needs, have):
        raise PrivilegeError(f"`xdpvhost {command}` lacks {', '.join(lacking)}; run it as root or with sudo")
