# SPDX-License-Identifier: Apache-2.0
"""macvtaps on a NIC, and the character devices /dev/tapN by which they are opened. N is the interface's index.

The kernel makes the node in devtmpfs. Where /dev is something else (a container's), the node is made here, and taken
away again. It belongs to root: an owner or group is given to it, and it dies with its device.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import NicError
from . import rtnl
from .changes import Changes
from .rtnl import Identity
from .tap import Owner

DEV = Path("/dev")
SYS = Path("/sys/class/macvtap")


def make(changes: Changes, name: str, mac: bytes | None, mode: str, queues: int, what: str) -> int:
    """A macvtap of ours on the NIC, down; a killed daemon's, if it is still there. Returns its index.

    `mac` None: the NIC's, which mode passthru gives it. Raises NicError; what was announced is for the caller to undo.
    """
    wanted = {"name": name, "mode": mode, "queues": queues}
    entry = changes.claim("macvtap", **wanted)
    if entry is not None:
        index = rtnl.find(Identity.of(entry.args))
        if index is not None:
            return index
        changes.forget(entry)
    rtnl.refuse_taken(name, what, "give another with tap=NAME")
    identity = Identity.new(changes.iface)
    entry = changes.record("macvtap", **identity.args, **wanted)
    return rtnl.create(
        identity,
        lambda index: changes.amend(entry, index=index),
        name,
        "macvtap",
        f"{what}: macvtap {name}",
        link=changes.ifindex,
        macvtap_mode=mode,
        IFLA_NUM_TX_QUEUES=queues,
        IFLA_NUM_RX_QUEUES=queues,
        **({} if mac is None else {"address": mac.hex(":")}),
    )


def missing() -> str:
    """Why the kernel makes no macvtaps, or nothing: asked by making one on an interface that doesn't exist."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as ip:
        try:
            ip.link("add", ifname=Identity.new("probe").temporary, kind="macvtap", link=0x7FFFFFFF)
        except NetlinkError as exc:
            if exc.code == errno.EOPNOTSUPP:
                return "the kernel has no macvtap"
    return ""


def node(index: int) -> Path:
    """Where the device is opened."""
    return DEV / f"tap{index}"


def prepare_node(changes: Changes, index: int, who: Owner, what: str) -> Path:
    """See that the node is there and who may open it. Raises NicError."""
    path = node(index)
    number = _number(index, what)
    entry = changes.claim("node", path=str(path))
    try:
        found = path.stat() if path.exists() else None
        if found is not None and not (stat.S_ISCHR(found.st_mode) and number in (None, found.st_rdev)):
            raise NicError(f"{what}: {path} is another device, left by something else; remove it")
        if found is None:
            if number is None:
                raise NicError(
                    f"{what}: there is no {path}, and /sys doesn't say its number: is /dev a devtmpfs, and /sys of "
                    "this network namespace?"
                )
            if entry is None:
                changes.record("node", path=str(path), rdev=number)
            os.mknod(path, stat.S_IFCHR | 0o600, number)
        if who != Owner():
            os.chown(path, -1 if who.uid is None else who.uid, -1 if who.gid is None else who.gid)
            os.chmod(path, 0o600 if who.gid is None else 0o660)
    except OSError as exc:
        raise NicError(f"{what}: {path} cannot be prepared: {exc.strerror}") from exc
    return path


def _number(index: int, what: str) -> int | None:
    """The device number of the node; None when /sys doesn't say.

    Raises NicError when /sys is another network namespace's, and another device has this index there: it has the node.
    """
    message = rtnl.link_message(index)
    try:
        alias = (SYS / f"tap{index}" / "device" / "ifalias").read_text().strip()
        if message is not None and alias != (message.get_attr("IFLA_IFALIAS") or ""):
            raise NicError(
                f"{what}: {node(index)} is a device of another network namespace, whose /sys this is; run xdpvhost "
                "with `ip netns exec`, and try again for another index"
            )
        major, minor = (SYS / f"tap{index}" / "dev").read_text().split(":")
    except (OSError, ValueError):
        return None
    return os.makedev(int(major), int(minor))


def mode_in_use(index: int) -> str | None:
    """As the kernel tells it; None when the device is gone."""
    message = rtnl.link_message(index)
    info = None if message is None else message.get_attr("IFLA_LINKINFO")
    data = None if info is None else info.get_attr("IFLA_INFO_DATA")
    found = None if data is None else data.get_attr("IFLA_MACVTAP_MODE")
    return None if found is None else str(found)


def keep_address(changes: Changes, mac: bytes) -> None:
    """Announce that the NIC's address is going to be another one: in mode passthru it follows the guest's."""
    if changes.claim("mac") is None:
        changes.record("mac", mac=mac.hex(":"))


def undo(_iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `macvtap`."""
    what = f"macvtap {args['name']}"
    return f"{what}: deleted" if rtnl.delete(Identity.of(args), what) else f"{what}: is gone"


def undo_node(_iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `node`."""
    path = Path(args["path"])
    try:
        found = path.lstat()
    except FileNotFoundError:
        return f"{path}: is gone"
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != args["rdev"]:
        return f"{path}: is another device by now, and stays"
    path.unlink()
    return f"{path}: removed"


def undo_address(iface: str, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `mac`."""
    message = rtnl.link_message(int(args["ifindex"]))
    if message is None or message.get_attr("IFLA_ADDRESS") == args["mac"]:
        return f"interface {iface}: has its address {args['mac']}"
    rtnl.change(int(args["ifindex"]), f"interface {iface}: cannot have its address back", address=args["mac"])
    return f"interface {iface}: has its address {args['mac']} again"
