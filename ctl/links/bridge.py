# SPDX-License-Identifier: Apache-2.0
"""A bridge for a NIC and its guests, and what is in it.

Ours: without spanning tree, so without a delay before a port forwards; it has the NIC's MAC and MTU. An existing one is
left as it is: only ports come and go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import NicError
from . import rtnl
from .changes import Changes
from .netlink import Link, get_link
from .rtnl import Identity


def make(changes: Changes, name: str, nic: Link, what: str) -> int:
    """A bridge of ours with the NIC's MAC and MTU, down; a killed daemon's, if it is still there. Returns its index."""
    entry = changes.claim("bridge", name=name)
    if entry is not None:
        index = rtnl.find(Identity.of(entry.args))
        if index is not None:
            return index
        changes.forget(entry)
    rtnl.refuse_taken(name, what, f"use it with --bridge {name} if it is a bridge, or name another")
    identity = Identity.new(changes.iface)
    entry = changes.record("bridge", name=name, **identity.args)
    return rtnl.create(
        identity,
        lambda index: changes.amend(entry, index=index),
        name,
        "bridge",
        f"bridge {name}",
        address=nic.mac.hex(":"),
        mtu=nic.mtu,
        br_forward_delay=0,
        br_stp_state=0,
    )


def existing(name: str) -> Link | None:
    """The bridge of that name; None when no interface has it. Raises NicError when that is something else, or down."""
    if rtnl.index_of(name) is None:
        return None
    link = get_link(name)
    if link.kind != "bridge":
        raise NicError(f"--bridge {name}: that interface is no bridge but {link.kind or 'a NIC'}; name another")
    if not link.up:
        raise NicError(f"--bridge {name}: that bridge is down; `ip link set {name} up`")
    return link


def put_in(changes: Changes, index: int, name: str, bridge: int) -> None:
    """Make a device a port of a bridge; it may be one of another bridge now, and will be again.

    What a bridge knows of a port (its cost, say) stays with the port that it was.
    """
    entry = changes.claim("port", device=index, bridge=bridge)
    message = rtnl.link_message(index)
    before = None if message is None else message.get_attr("IFLA_MASTER")
    if before == bridge:
        return
    if entry is None:
        changes.record("port", device=index, name=name, bridge=bridge, before=before or 0)
    rtnl.change(index, f"interface {name}: cannot be put into the bridge", master=bridge)


def undo_port(_iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `port`."""
    index, before = int(args["device"]), int(args["before"])
    message = rtnl.link_message(index)
    name = args["name"] if message is None else message.get_attr("IFLA_IFNAME")
    if message is None or message.get_attr("IFLA_MASTER") != args["bridge"]:
        return f"interface {name}: not in that bridge any more"
    if before and rtnl.link_message(before) is None:
        before = 0
    rtnl.change(index, f"interface {name}: cannot be taken out of the bridge", master=before)
    return f"interface {name}: {'back in its bridge' if before else 'out of the bridge'}"


def undo(_iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `bridge`."""
    what = f"bridge {args['name']}"
    return f"{what}: deleted" if rtnl.delete(Identity.of(args), what) else f"{what}: is gone"
