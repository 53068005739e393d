# SPDX-License-Identifier: Apache-2.0
"""A host's route to one guest, and the NIC's answers for it: what `--routed` is made of.

The route dies with the guest's device. The proxy entry is the NIC's: it answers ARP (or neighbour solicitations) for
exactly the guest's address, as `ip neigh add proxy ADDRESS dev NIC` would; nobody else's address is claimed, which
`proxy_arp` on the NIC would do.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Mapping
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import NicError
from . import rtnl
from .changes import Changes

NTF_PROXY = 8
NUD_PERMANENT = 0x80

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def family(address: Ip) -> int:
    """AF_INET or AF_INET6."""
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6)


def route(address: Ip, device: int, what: str) -> None:
    """The host's route to the guest. Raises NicError when there is another one already."""

    def add(ip: Any) -> None:
        for message in ip.get_routes(family=family(address)):
            same = message.get_attr("RTA_DST") == str(address) and message["dst_len"] == address.max_prefixlen
            if same and message.get_attr("RTA_OIF") != device:
                raise NicError(f"{what}: this host has a route to {address} already; give each guest its own address")
        ip.route("replace", dst=f"{address}/{address.max_prefixlen}", oif=device, family=family(address), proto=4)

    rtnl.request(f"{what}: no route to {address}", add)


def answer(changes: Changes, address: Ip, what: str) -> None:
    """Let the NIC answer for the guest's address. An entry that somebody else made is used and left."""
    if changes.claim("proxy", address=str(address)) is None:
        if _answers(address, changes.ifindex, what):
            return
        changes.record("proxy", address=str(address))
    _neighbour("replace", address, changes.ifindex, f"{what}: {changes.iface} cannot answer for {address}")


def _answers(address: Ip, nic: int, what: str) -> bool:
    def look(ip: IPRoute) -> bool:
        try:
            ip.neigh("get", dst=str(address), ifindex=nic, family=family(address), flags=NTF_PROXY)
        except NetlinkError as error:
            if error.code != errno.ENOENT:
                raise
            return False
        return True

    return rtnl.request(f"{what}: who answers for {address} isn't known", look)


def _neighbour(command: str, address: Ip, nic: int, what: str) -> None:
    rtnl.request(
        what,
        lambda ip: ip.neigh(
            command, dst=str(address), ifindex=nic, family=family(address), flags=NTF_PROXY, state=NUD_PERMANENT
        ),
    )


def undo(iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `proxy`."""
    address = ipaddress.ip_address(args["address"])
    if iface is None:
        return f"{address}: the interface that answered for it is gone"
    try:
        _neighbour("del", address, int(args["ifindex"]), f"interface {iface}: still answers for {address}")
    except NicError as exc:
        if not (isinstance(exc.__cause__, NetlinkError) and exc.__cause__.code == errno.ENOENT):
            raise
    return f"interface {iface}: answers for {address} no more"
