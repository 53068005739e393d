# SPDX-License-Identifier: Apache-2.0
"""On which of several interfaces a guest is: the one that its SPEC names, else the one with the fewest guests."""

from __future__ import annotations

from collections.abc import Sequence

from .config import GuestSpec
from .errors import ConfigError


def check(spec: GuestSpec, ifaces: Sequence[str]) -> None:
    """Raises ConfigError for iface=IF that isn't one of `ifaces`."""
    if spec.iface is not None and spec.iface not in ifaces:
        raise ConfigError(
            f"guest {spec.name!r}: iface={spec.iface} is not served here, but {', '.join(ifaces)}; leave it out, or "
            f"start `xdpvhost up` with --iface {spec.iface}, too"
        )


def choose(spec: GuestSpec, ifaces: Sequence[str], guests: Sequence[int], usable: Sequence[bool]) -> int:
    """The index in `ifaces`. `guests` counts those that each has, `usable` says which can take one.

    Of several with the fewest, the first. The named one is taken in any case. Raises ConfigError as `check` does.
    """
    check(spec, ifaces)
    if spec.iface is not None:
        return ifaces.index(spec.iface)
    return min(range(len(ifaces)), key=lambda index: (not usable[index], guests[index]))
