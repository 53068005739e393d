# SPDX-License-Identifier: Apache-2.0
"""Which capabilities the kernel plane needs, and whether we have them."""

from __future__ import annotations

from ..errors import PrivilegeError

_NUMBERS = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}

# Each a choice of which one is enough. CAP_SYS_ADMIN stands in for CAP_BPF and CAP_PERFMON.
REQUIRED: tuple[tuple[str, ...], ...] = (
    ("CAP_NET_ADMIN",),
    ("CAP_NET_RAW",),
    ("CAP_BPF", "CAP_SYS_ADMIN"),
    ("CAP_PERFMON", "CAP_SYS_ADMIN"),
)


def effective() -> frozenset[str]:
    """Those of the calling thread, of the ones that matter here."""
    with open("/proc/thread-self/status", encoding="ascii", errors="replace") as status:
        mask = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return frozenset(name for name, number in _NUMBERS.items() if mask >> number & 1)


def missing() -> tuple[str, ...]:
    have = effective()
    return tuple(choice[0] for choice in REQUIRED if not have.intersection(choice))


def require() -> None:
    """Raises PrivilegeError naming every capability that is missing."""
    lacking = missing()
    if lacking:
        raise PrivilegeError(
            f"missing {', '.join(lacking)}: run as root, or grant it with `setpriv` or AmbientCapabilities"
        )
