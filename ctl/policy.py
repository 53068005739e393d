# SPDX-License-Identifier: Apache-2.0
"""What a guest may do on its network: the data plane's `struct xv_policy_conf`, in Python's own types."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

MAX_LEARNED = 1024  # addresses of one guest: XV_MAX_LEARNED


@dataclass(frozen=True)
class Bucket:
    """A token bucket: `rate` units a second on average, `burst` of them at once. Rate 0: no limit."""

    rate: int = 0
    burst: int = 0


@dataclass(frozen=True)
class Policy:
    """One guest's. The default checks nothing and limits nothing."""

    access: int = 0  # the VLAN that its untagged frames are in, and it may send no other; 0: no access port
    trunk: frozenset[int] = frozenset()  # the VLANs in which it sends and receives tagged; empty: no trunk
    addresses: tuple[IPv4Address | IPv6Address, ...] = ()  # with any: ARP, ND, DHCP and IP only from these
    spoof_check: bool = False  # it sends only from its own MACs, and those that it has learned
    isolated: bool = False  # it only talks to the NIC
    link_down: bool = False  # nothing in, nothing out
    learn: int = 0  # source MACs that it may add to its own at a time
    tx: Bucket = Bucket()  # bytes of frames from it
    rx: Bucket = Bucket()  # bytes of frames to it
    storm: Bucket = Bucket()  # broadcast and multicast frames from it
