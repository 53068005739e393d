# SPDX-License-Identifier: Apache-2.0
"""The addresses and routes of a NIC: what there are, and how they move to a bridge and back.

A NIC that is a bridge's port hears no IP packet any more, so its addresses, and the routes through it, go to the
bridge: routes off, addresses off, addresses on, routes on, one after the other. The journal has them all before the
first is touched, and the way back starts from there. Connections survive the moment in between.

Left alone: IPv6 link-local addresses and what the kernel makes by itself of an address (its own and its prefix's
routes). Refused: routes over several interfaces, kinds of routes that this file can't put back exactly, and addresses
that a route of another interface sends from.

An address that a DHCP client or a router gave keeps what is left of its lifetime; who renews it, on the NIC, must be
told about the bridge.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import NicError
from . import rtnl
from .changes import Changes

FOREVER = 0xFFFFFFFF
RT_TABLE_LOCAL = 255
RTPROT_KERNEL = 2
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
IFA_F_TENTATIVE, IFA_F_DADFAILED, IFA_F_PERMANENT = 0x40, 0x08, 0x80
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200

Address = dict[str, Any]
Route = dict[str, Any]

_ROUTE_FIELDS = ("family", "tos", "proto", "scope", "type")
_ROUTE_ATTRIBUTES = ("RTA_GATEWAY", "RTA_PREFSRC", "RTA_PRIORITY", "RTA_TABLE", "RTA_PREF")
_ROUTE_IGNORED = {"RTA_DST", "RTA_OIF", "RTA_CACHEINFO", "RTA_METRICS", *_ROUTE_ATTRIBUTES}


@dataclass(frozen=True)
class InUse:
    """What a NIC is good for at present, beyond xdpvhost."""

    addresses: tuple[str, ...]
    default_route: bool


def in_use(index: int, name: str) -> InUse:
    """Of the interface with that index."""
    addresses, routes = _read(index, name)
    return InUse(
        tuple(f"{address['address']}/{address['prefixlen']}" for address in addresses),
        any(route["dst"] is None and route["type"] == RTN_UNICAST for route in routes),
    )


def move(changes: Changes, source: int, target: int, name: str) -> None:
    """From the NIC `source`, called `name`, to the bridge `target`, which is up. Nothing when it has none.

    Raises NicError, also for what can't be moved; the caller then undoes what was announced.
    """
    entry = changes.claim("addresses", source=source, target=target)
    if entry is not None and entry.args.get("moved"):
        return
    addresses, routes = _read(source, name, alone=entry is None)
    if entry is None:
        if not addresses and not routes:
            return
        entry = changes.record("addresses", source=source, target=target, addresses=addresses, routes=routes)
    _transfer(entry.args["addresses"], entry.args["routes"], source, target, name)
    changes.amend(entry, moved=True)


def undo(iface: str, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `addresses`."""
    source, target = int(args["source"]), int(args["target"])
    addresses = _with_what_is_left(args["addresses"], target, moved=bool(args.get("moved")))
    _transfer(addresses, args["routes"], target, source, iface, labels=True)
    return f"interface {iface}: has {', '.join(a['address'] for a in addresses) or 'its routes'} again"


def _read(index: int, name: str, *, alone: bool = False) -> tuple[list[Address], list[Route]]:
    """With `alone`, NicError when a route of another interface needs one of the addresses."""
    what = f"interface {name}: its addresses"

    def read(ip: IPRoute) -> tuple[list[Any], list[Any]]:
        families = (socket.AF_INET, socket.AF_INET6)
        return (
            [message for family in families for message in ip.get_addr(family=family, index=index)],
            [message for family in families for message in ip.get_routes(family=family)],
        )

    address_messages, route_messages = rtnl.request(what, read)
    addresses = [a for a in map(_address, address_messages) if a is not None]
    if alone:
        _refuse_dependants(route_messages, addresses, index, name)
    # whose prefix route the kernel is told not to make, has one that somebody else made in the kernel's name
    own = any(address["flags"] & IFA_F_NOPREFIXROUTE for address in addresses)
    routes = [_route(message, name) for message in route_messages if _is_through(message, index, own)]
    return addresses, routes


def _refuse_dependants(messages: Sequence[Any], addresses: Sequence[Address], index: int, name: str) -> None:
    """The kernel drops every route, of whatever device, when the address that it sends from is deleted."""
    moving = {address["address"] for address in addresses}
    for message in messages:
        source = message.get_attr("RTA_PREFSRC")
        local = message.get_attr("RTA_TABLE") == RT_TABLE_LOCAL
        if source in moving and not local and not _is_through(message, index, True):
            raise NicError(
                f"interface {name}: the route to {message.get_attr('RTA_DST') or 'default'} through another interface "
                f"sends from {source}, and would be lost when that moves; delete it, or use --routed"
            )


def _address(message: Any) -> Address | None:
    family = int(message["family"])
    local = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
    if family == socket.AF_INET6 and int(local.partition(":")[0] or "0", 16) & 0xFFC0 == 0xFE80:
        return None
    peer = message.get_attr("IFA_ADDRESS")
    life = message.get_attr("IFA_CACHEINFO") or {}
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    found: Address = {
        "family": family,
        "address": local,
        "prefixlen": int(message["prefixlen"]),
        "scope": int(message["scope"]),
        "flags": int(flags) & ~(IFA_F_TENTATIVE | IFA_F_DADFAILED | IFA_F_PERMANENT),
        "valid": int(life.get("ifa_valid", FOREVER)),
        "preferred": int(life.get("ifa_preferred", life.get("ifa_prefered", FOREVER))),
    }
    for key, value in (
        ("peer", peer if peer != local else None),
        ("broadcast", message.get_attr("IFA_BROADCAST")),
        ("label", message.get_attr("IFA_LABEL")),
        ("metric", message.get_attr("IFA_RT_PRIORITY")),
        ("proto", message.get_attr("IFA_PROTO")),
    ):
        if value is not None:
            found[key] = value
    return found


def _is_through(message: Any, index: int, kernels: bool) -> bool:
    """`kernels`: those of protocol "kernel" count, too."""
    destination = message.get_attr("RTA_DST") or ""
    if message.get_attr("RTA_TABLE") == RT_TABLE_LOCAL or destination.startswith(("fe80:", "ff00:")):
        return False
    if message["proto"] == RTPROT_KERNEL and not kernels:
        return False
    hops = message.get_attr("RTA_MULTIPATH") or ()
    return message.get_attr("RTA_OIF") == index or any(hop["oif"] == index for hop in hops)


def _route(message: Any, name: str) -> Route:
    destination = message.get_attr("RTA_DST")
    shown = f"{destination}/{message['dst_len']}" if destination else "default"
    strange = {key for key, _ in message["attrs"]} - _ROUTE_IGNORED
    if strange or message["src_len"]:
        why = "over several interfaces" if "RTA_MULTIPATH" in strange else f"with {', '.join(sorted(strange))}"
        raise NicError(
            f"interface {name}: the route to {shown} {why} can't be moved to the bridge; move it by hand, or use "
            "--routed"
        )
    route: Route = {field: int(message[field]) for field in _ROUTE_FIELDS}
    route["dst"] = f"{destination}/{message['dst_len']}" if destination else None
    route["flags"] = int(message["flags"]) & RTNH_F_ONLINK
    for attribute in _ROUTE_ATTRIBUTES:
        value = message.get_attr(attribute)
        if value is not None:
            route[attribute] = value
    metrics = message.get_attr("RTA_METRICS")
    if metrics is not None:
        route["metrics"] = {key.removeprefix("RTAX_").lower(): value for key, value in metrics["attrs"]}
    return route


def _with_what_is_left(addresses: Sequence[Address], index: int, *, moved: bool) -> list[Address]:
    """With the lifetimes that they have now on the interface with that index, as far as they are there.

    One with an end that was `moved` there and isn't there any more has expired, or its lease went to another.
    """
    if all(address["valid"] == FOREVER for address in addresses) or rtnl.link_message(index) is None:
        return list(addresses)
    now = {(a["address"], a["prefixlen"]): a for a in _read(index, str(index))[0]}
    left = []
    for address in addresses:
        found = now.get((address["address"], address["prefixlen"]))
        if found is not None:
            left.append(address | {"valid": found["valid"], "preferred": found["preferred"]})
        elif not moved or address["valid"] == FOREVER:
            left.append(address)
    return left


def _transfer(
    addresses: Sequence[Address], routes: Sequence[Route], source: int, target: int, name: str, *, labels: bool = False
) -> None:
    """Each step is harmless when it was made before. Labels have the NIC's name in them, so only the NIC gets them.

    What is refused keeps nothing else from being put back: it may be all that a remote host is reached by.
    """
    routes = sorted(routes, key=lambda route: "RTA_GATEWAY" in route)  # a gateway's own route comes before it is used
    refused: list[NetlinkError] = []

    def attempt(step: Callable[[], Any]) -> None:
        try:
            with _harmless(errno.EEXIST):
                step()
        except NetlinkError as exc:
            refused.append(exc)

    def transfer(ip: IPRoute) -> None:
        for route in reversed(routes):
            with _harmless(errno.ESRCH, errno.ENODEV):
                ip.route("del", **_route_request(route, source))
        for address in reversed(addresses):
            with _harmless(errno.EADDRNOTAVAIL, errno.ENODEV):
                ip.addr("del", **_address_request(address, source))
        for address in _as_listed(addresses):
            # It was checked on this link already. While it is checked again, no route may send from it.
            unchecked = address | {"flags": address["flags"] | IFA_F_NODAD} if _is_ipv6(address) else address
            attempt(partial(ip.addr, "add", **_address_request(unchecked, target, labels=labels)))
        for route in routes:
            attempt(partial(ip.route, "append", **_route_request(route, target)))
        for address in filter(_is_ipv6, addresses):
            attempt(partial(ip.addr, "replace", **_address_request(address, target, labels=labels)))
        if refused:
            raise refused[0]

    rtnl.request(f"interface {name}: its addresses and routes cannot be moved", transfer)


def _as_listed(addresses: Sequence[Address]) -> list[Address]:
    """In the order in which to add them to have them listed so: a new IPv6 address comes before the others, an IPv4
    address behind them.
    """
    return [a for a in addresses if not _is_ipv6(a)] + [a for a in reversed(addresses) if _is_ipv6(a)]


def _is_ipv6(address: Address) -> bool:
    return bool(address["family"] == socket.AF_INET6)


@contextmanager
def _harmless(*codes: int) -> Iterator[None]:
    """Refusals that say that the step was made before."""
    try:
        yield
    except NetlinkError as exc:
        if exc.code not in codes:
            raise


def _address_request(address: Address, index: int, *, labels: bool = False) -> dict[str, Any]:
    request: dict[str, Any] = {
        "index": index,
        "family": address["family"],
        "prefixlen": address["prefixlen"],
        "scope": address["scope"],
        "local": address["address"],
        "address": address.get("peer", address["address"]),
        "IFA_FLAGS": address["flags"],
        "IFA_CACHEINFO": {
            "ifa_valid": address["valid"],
            "ifa_preferred": address["preferred"],
            "cstamp": 0,
            "tstamp": 0,
        },
    }
    for key, attribute in (("broadcast", "broadcast"), ("metric", "IFA_RT_PRIORITY"), ("proto", "IFA_PROTO")):
        if key in address:
            request[attribute] = address[key]
    if labels and "label" in address:
        request["label"] = address["label"]
    return request


def _route_request(route: Route, index: int) -> dict[str, Any]:
    request: dict[str, Any] = {field: route[field] for field in _ROUTE_FIELDS}
    request["oif"] = index
    request["flags"] = route["flags"]
    if route["dst"] is not None:
        request["dst"] = route["dst"]
    for attribute in _ROUTE_ATTRIBUTES:
        if attribute in route:
            request[attribute.removeprefix("RTA_").lower()] = route[attribute]
    if "metrics" in route:
        request["metrics"] = route["metrics"]
    return request
