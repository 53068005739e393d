# SPDX-License-Identifier: Apache-2.0
"""A VF's network device: found in whichever network namespace it is, moved into one for a container, and brought home.

When a namespace dies, the kernel moves a hardware device that is in it into the initial namespace, as `devN` if its
name is taken there. So a device that isn't where it was put is looked for.

Other namespaces are entered by a thread that ends there: setns(2) is per thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import NicError, PrivilegeError
from .netlink import outside_loop
from .pci import Function, Netdev, netdevs

T = TypeVar("T")

NAMES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
# Drivers of functions that have no network device.
_OTHER_DRIVERS = frozenset({"vfio-pci", "pci-stub", "uio_pci_generic", "igb_uio", "xen-pciback"})


@dataclass(frozen=True)
class Place:
    """A network namespace, by a path that leads to it."""

    path: Path
    inode: int

    def __str__(self) -> str:
        if self.path.parent == NAMES:
            return f"namespace {self.path.name}"
        return f"the namespace of process {self.path.parent.parent.name}"


def named(name: str) -> Place:
    """The namespace that `ip netns` calls so. Raises NicError when there is none."""
    path = NAMES / name
    try:
        found = path.stat()
    except OSError as exc:
        known = ", ".join(sorted(p.name for p in NAMES.glob("*"))) or "none"
        raise NicError(
            f"no network namespace {name!r} in {NAMES}; make it with `ip netns add {name}`; there are: {known}"
        ) from exc
    return Place(path, found.st_ino)


def here() -> int:
    """The inode of the calling thread's namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def places() -> Iterator[Place]:
    """Every other namespace that a name or a process leads to, each once."""
    seen = {here()}
    for path in (*sorted(NAMES.glob("*")), *sorted(Path("/proc").glob("[0-9]*/ns/net"))):
        with suppress(OSError):
            inode = path.stat().st_ino
            if inode not in seen:
                seen.add(inode)
                yield Place(path, inode)


def within(place: Place, function: Callable[[], T]) -> T:
    """Call `function` in a thread in that namespace. Raises OSError when that can't be entered."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if libc.setns(fd, CLONE_NEWNET):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), str(place.path))
            finally:
                os.close(fd)
            result.append(function())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def find(function: Function) -> tuple[Place | None, Netdev] | None:
    """Where a function's network device is, None for the calling thread's namespace, and what it is like there."""
    device = netdevs().get(function.address)
    if device is not None:
        return None, device
    for place in places():
        with suppress(OSError, NetlinkError):
            device = within(place, netdevs).get(function.address)
            if device is not None:
                return place, device
    return None


def use_of(function: Function, *, hosts: bool = True) -> str:
    """What the VF's network device is used for, in words; empty when for nothing. `hosts`: by the host itself."""
    driver = function.driver
    if driver is None or driver in _OTHER_DRIVERS:
        return ""
    found = find(function)
    if found is None:
        return ""
    place, device = found
    if place is not None:
        return f"its device {device.name} is in {place}"
    if hosts and device.master is not None:
        return f"its device {device.name} is a port of another"
    if hosts and device.up and _has_addresses(device.index):
        return f"its device {device.name} has addresses"
    return ""


def _has_addresses(index: int) -> bool:
    """Other than link-local ones, which a device gets by being up."""

    def ask() -> bool:
        with IPRoute() as ip:
            return any(message["scope"] != 253 for message in ip.get_addr(index=index))

    return outside_loop(ask)


def send(device: Netdev, place: Place) -> None:
    """Move a device from the calling thread's namespace. It is down afterwards. Raises NicError or PrivilegeError."""
    fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _move(device, fd, None, f"interface {device.name}: cannot be moved into {place}")
    finally:
        os.close(fd)


def _move(device: Netdev, fd: int, name: str | None, what: str) -> None:
    """`name`: what it is called from then on."""

    def change() -> None:
        with IPRoute() as ip:
            if device.up:
                ip.link("set", index=device.index, state="down")
            if name is None:
                ip.link("set", index=device.index, net_ns_fd=fd)
            else:
                ip.link("set", index=device.index, net_ns_fd=fd, ifname=name)

    try:
        outside_loop(change)
    except NetlinkError as exc:
        if exc.code in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"{what}: run as root, or with CAP_NET_ADMIN in both namespaces") from exc
        if exc.code == errno.EEXIST:
            raise NicError(f"{what}: a device of that name is there already; rename one of them") from exc
        raise NicError(f"{what}: {os.strerror(exc.code)}") from exc


def bring_home(function: Function, name: str, inode: int) -> str:
    """Back into the calling thread's namespace, with its `name` if that is free, from the namespace `inode`.

    Returns what was done. A device in yet another namespace, which somebody else has moved it to, is left there; except
    the initial one, where the kernel puts what was in a namespace that died. Raises NicError or PrivilegeError.
    """
    found = find(function)
    if found is None:
        return "has no network device"
    place, device = found
    if place is None:
        return f"device {device.name} is here"
    initial = _initial()
    if place.inode != inode and place.inode != initial:
        return f"device {device.name} is in {place} by now, where we didn't put it"
    taken = _names()
    new = next(n for n in (name, *(f"vf{k}" for k in range(len(taken) + 1))) if n not in taken)
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        within(place, lambda: _move(device, fd, new, f"interface {device.name} in {place}: cannot be brought home"))
    finally:
        os.close(fd)
    return f"device {new} is back from {place}"


def _names() -> set[str]:
    def ask() -> set[str]:
        with IPRoute() as ip:
            return {message.get_attr("IFLA_IFNAME") for message in ip.get_links()}

    return outside_loop(ask)


def _initial() -> int | None:
    """Process 1's namespace, which in a container is the container's."""
    with suppress(OSError):
        return os.stat("/proc/1/ns/net").st_ino
    return None
