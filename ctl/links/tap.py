# SPDX-License-Identifier: Apache-2.0
"""Persistent taps with a virtio-net header, for QEMU to open.

A persistent tap outlives the process that made it. Who opens it says which offloads it has (TUNSETOFFLOAD); an owner or
a group may open it without privileges. A tap that several queue pairs share is another kind of tap than one that has
one queue: QEMU asks for several with `queues=N`, and the kernel refuses the one for the other.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, NicError, PrivilegeError
from . import rtnl
from .changes import Changes
from .rtnl import Identity

TUN = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x0100, 0x8000


@dataclass(frozen=True)
class Owner:
    """Who may open a device without privileges. With both, whoever is both; with neither, nobody.

    Of a tap the kernel takes "neither" for "everybody" (`tun_not_capable()`), so `make` gives such a one to root.
    """

    uid: int | None = None
    gid: int | None = None

    @property
    def tap_uid(self) -> int | None:
        return 0 if self == Owner() else self.uid


def owner(user: str | None, group: str | None, what: str) -> Owner:
    """Names or numbers. Raises ConfigError for those that this machine doesn't know."""
    return Owner(
        None if user is None else _number(user, what, "user"), None if group is None else _number(group, what, "group")
    )


def _number(name: str, what: str, kind: str) -> int:
    if name.isascii() and name.isdigit() and int(name) < 0xFFFFFFFF:
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"{what}: this machine has no {kind} {name!r}; give another, or its number") from None


def make(changes: Changes, name: str, queues: int, who: Owner, what: str) -> int:
    """A tap of ours, down; a killed daemon's, if it is still there. Returns its index.

    Raises NicError when the name is taken, PrivilegeError; what was announced is then for the caller to undo.
    """
    wanted = {"name": name, "queues": queues, "uid": who.uid, "gid": who.gid}
    entry = changes.claim("tap", **wanted)
    if entry is not None:
        index = rtnl.find(Identity.of(entry.args))
        if index is not None:
            return index
        changes.forget(entry)
    rtnl.refuse_taken(name, what, "give another with tap=NAME")
    identity = Identity.new(changes.iface)
    entry = changes.record("tap", **identity.args, **wanted)
    fd = _open_new(identity.temporary, queues, what)
    try:
        if who.tap_uid is not None:  # at once: until then everybody may open it
            fcntl.ioctl(fd, TUNSETOWNER, who.tap_uid)
        if who.gid is not None:
            fcntl.ioctl(fd, TUNSETGROUP, who.gid)
        index = socket.if_nametoindex(identity.temporary)
        changes.amend(entry, index=index)
        rtnl.change(index, f"{what}: cannot have an alias", ifalias=identity.token)
        rtnl.change(index, f"{what}: cannot be named {name}", ifname=name)
        fcntl.ioctl(fd, TUNSETPERSIST, 1)  # last: until then it is gone when we are
    finally:
        os.close(fd)
    return index


def _open_new(name: str, queues: int, what: str) -> int:
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL | (IFF_MULTI_QUEUE if queues > 1 else 0)
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise _no_tun(exc, what) from exc
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", os.fsencode(name), flags))
    except OSError as exc:
        os.close(fd)
        if exc.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"{what}: no tap may be made; run as root, or with CAP_NET_ADMIN") from exc
        raise NicError(f"{what}: no tap can be made: {exc.strerror}") from exc
    return fd


def _no_tun(exc: OSError, what: str) -> NicError | PrivilegeError:
    if exc.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"{what}: {TUN} may not be opened; run as root")
    return NicError(f"{what}: {TUN}: {exc.strerror}; `modprobe tun` (CONFIG_TUN) makes it")


def missing() -> str:
    """Why taps can't be had on this machine, or nothing."""
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return f"{TUN}: {exc.strerror}"
    return ""


def facts(index: int) -> dict[str, Any]:
    """What the kernel says of a tap: header, queues in use, who may open it."""
    message = rtnl.link_message(index)
    info = None if message is None else message.get_attr("IFLA_LINKINFO")
    data = None if info is None else info.get_attr("IFLA_INFO_DATA")
    if data is None:
        return {}

    def of(name: str) -> Any:
        return data.get_attr(f"IFLA_TUN_{name}")

    return {
        "vnet_header": bool(of("VNET_HDR")),
        "persistent": bool(of("PERSIST")),
        "multi_queue": bool(of("MULTI_QUEUE")),
        "queues_in_use": of("NUM_QUEUES") if of("MULTI_QUEUE") else None,
        "owner": of("OWNER"),
        "group": of("GROUP"),
    }


def undo(_iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `tap`."""
    what = f"tap {args['name']}"
    return f"{what}: deleted" if rtnl.delete(Identity.of(args), what) else f"{what}: is gone"
