# SPDX-License-Identifier: Apache-2.0
"""Which unicast addresses a guest may listen to, when it asks for others than its SPEC's.

A guest asks through its control virtqueue (virtio 1.2, 5.1.6.5.2), if its front-end leaves that to us. It may have what
is nobody else's: no configured address of another guest, none that another guest listens to, none of this machine's
own network devices, and no host port's. The address of its SPEC stays reserved for it meanwhile, so there is always a
way back.

`mac-change=deny`, the default, allows none of it: whoever may choose any address on a network can take over a station
that happens to be silent, and the switches outside would believe it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from .config import format_mac
from .errors import ConfigError
from .links.netlink import local_addresses

if TYPE_CHECKING:
    from .datapath import Addresses
    from .hostport import HostPort
    from .switch import GuestEntry


def check_addresses(
    entry: GuestEntry, wanted: Addresses, others: Iterable[GuestEntry], hosts: Iterable[HostPort] = ()
) -> None:
    """Raises ConfigError for addresses that the guest may not have."""
    new = set(wanted.all).difference(entry.spec.port.macs)
    if not new:
        return
    if entry.spec.mac_change != "allow":
        raise ConfigError(f"{_list(new)}: its SPEC says mac-change=deny")
    place = replace(entry.place, addresses=wanted)
    for other in others:
        if taken := new & place.meets(other.place):
            raise ConfigError(f"{_list(taken)}: guest {other.name!r} has it")
        if taken := {mac for vlan, mac in other.place.learned if mac in new and place.covers((vlan, mac))}:
            raise ConfigError(f"{_list(taken)}: guest {other.name!r} uses it")
    for host in hosts:
        if host.mac in new:
            raise ConfigError(f"{format_mac(host.mac)}: host port {host.name} has it")
    if taken := new & addresses_here():
        raise ConfigError(f"{_list(taken)}: a network device of this machine has it")


def addresses_here() -> set[bytes]:
    """Those of this machine's own network devices."""
    return _local_addresses(int(time.monotonic()))


@lru_cache(maxsize=1)
def _local_addresses(_second: int) -> set[bytes]:
    """Asked once a second at most: the kernel lists every device of the machine while the event loop waits."""
    return local_addresses()


def _list(macs: Iterable[bytes]) -> str:
    return ", ".join(format_mac(mac) for mac in sorted(macs))
