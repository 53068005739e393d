# SPDX-License-Identifier: Apache-2.0
"""Network devices over rtnetlink (pyroute2), and which network namespace we are in.

pyroute2 runs an event loop of its own for every call and can't do that inside a running one, so a caller that is in
asyncio gets a short-lived thread. A thread inherits its creator's network namespace.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import NicError, PrivilegeError

T = TypeVar("T")

SO_NETNS_COOKIE = 71
SIOCGIFMTU = 0x8921
IFF_UP = 1

# Devices into which no local stack sends: what arrives has been on a wire, or passed one.
_WIRE_KINDS = frozenset({"bond", "team"})


@dataclass(frozen=True)
class Link:
    """A device as the kernel describes it. `kind` is None for a physical one."""

    name: str
    index: int
    mtu: int
    up: bool
    mac: bytes
    kind: str | None
    master: int | None
    rx_queues: int  # allocated, not necessarily in use
    tx_queues: int

    @property
    def local_stack(self) -> bool:
        """Whether a stack on this machine may send into it, and leave checksums to be completed."""
        return self.kind is not None and self.kind not in _WIRE_KINDS


def outside_loop(function: Callable[[], T]) -> T:
    """Call `function` where no event loop runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, name="netlink")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def get_link(name: str) -> Link:
    """Raises NicError when there is no such interface in this network namespace."""
    if not name or len(os.fsencode(name)) > 15:
        raise NicError(f"interface {name!r}: a name has 1 to 15 bytes")

    def get() -> Any:
        with IPRoute() as ip:
            return ip.link("get", ifname=name)[0]

    try:
        message = outside_loop(get)
    except NetlinkError as exc:
        if exc.code == errno.ENODEV:
            raise NicError(
                f"no interface {name!r} in this network namespace: `ip link` lists those that there are"
            ) from exc
        raise NicError(f"interface {name}: {os.strerror(exc.code)}") from exc
    address = message.get_attr("IFLA_ADDRESS")
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        name=message.get_attr("IFLA_IFNAME"),
        index=message["index"],
        mtu=message.get_attr("IFLA_MTU"),
        up=bool(message["flags"] & IFF_UP),
        mac=bytes.fromhex(address.replace(":", "")) if address else b"",
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        master=message.get_attr("IFLA_MASTER"),
        rx_queues=message.get_attr("IFLA_NUM_RX_QUEUES") or 1,
        tx_queues=message.get_attr("IFLA_NUM_TX_QUEUES") or 1,
    )


def local_addresses() -> set[bytes]:
    """The hardware addresses of all devices in this network namespace."""

    def get() -> list[str | None]:
        with IPRoute() as ip:
            return [message.get_attr("IFLA_ADDRESS") for message in ip.get_links()]

    return {bytes.fromhex(address.replace(":", "")) for address in outside_loop(get) if address}


def link_name(index: int) -> str | None:
    """The name that a device has now; None when it is gone."""
    with suppress(OSError):
        return socket.if_indextoname(index)
    return None


def device_mtu(name: str) -> int | None:
    """By ioctl, for who asks every second; None when the device is gone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        answer = fcntl.ioctl(probe, SIOCGIFMTU, struct.pack("16si16x", os.fsencode(name), 0))
        return int(struct.unpack_from("=i", answer, 16)[0])
    return None


def set_up(index: int, up: bool) -> None:
    """Raises NicError or PrivilegeError."""

    def change() -> None:
        with IPRoute() as ip:
            ip.link("set", index=index, state="up" if up else "down")

    try:
        outside_loop(change)
    except NetlinkError as exc:
        what = f"interface {link_name(index) or index}: cannot be set {'up' if up else 'down'}"
        if exc.code in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"{what}: run as root, or with CAP_NET_ADMIN") from exc
        raise NicError(f"{what}: {os.strerror(exc.code)}") from exc


def boot_id() -> str:
    """Which boot of the machine this is. Empty when /proc doesn't say."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


@dataclass(frozen=True)
class Namespace:
    """A network namespace. The cookie is never used twice while the machine is up; 0 where the kernel has none."""

    cookie: int
    inode: int

    @classmethod
    def current(cls) -> Namespace:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                cookie = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
            except OSError:
                cookie = 0
        return cls(cookie, os.stat("/proc/thread-self/ns/net").st_ino)

    def exists(self) -> bool:
        """Whether a process or a name under /run/netns still holds it."""
        candidates = [*Path("/run/netns").glob("*"), *Path("/proc").glob("[0-9]*/ns/net")]
        for candidate in candidates:
            with suppress(OSError):
                if candidate.stat().st_ino == self.inode:
                    return True
        return False
