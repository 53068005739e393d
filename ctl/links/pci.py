# SPDX-License-Identifier: Apache-2.0
"""PCI functions as sysfs shows them, who drives them, and which network device is theirs.

Which device belongs to which function is asked over rtnetlink (IFLA_PARENT_DEV_NAME, Linux 5.13), not read from sysfs:
a sysfs shows the devices of the network namespace that it was mounted in, and of no other.

The root of sysfs is a parameter, so that tests may show a machine that they haven't got.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from ..errors import NicError, PrivilegeError
from .netlink import outside_loop

SYS = Path("/sys")
BRIDGE_CLASS = 0x0604  # PCI-to-PCI bridges, root ports among them


class Lacking(NicError):
    """Something that this machine or card has not: what, and how to get it."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(f"{detail}: {remedy}" if remedy else detail)
        self.detail = detail
        self.remedy = remedy


@dataclass(frozen=True)
class Function:
    """One PCI function, like 0000:01:10.0. It may be gone at any time: what is asked then is None or empty."""

    address: str
    sys: Path = SYS

    def __str__(self) -> str:
        return self.address

    @property
    def directory(self) -> Path:
        return self.sys / "bus/pci/devices" / self.address

    @property
    def exists(self) -> bool:
        return self.directory.exists()

    @property
    def driver(self) -> str | None:
        return _target(self.directory / "driver")

    @property
    def override(self) -> str | None:
        """The only driver that may have it, where somebody said so."""
        text = read(self.directory / "driver_override")
        return None if text in ("", "(null)") else text

    @property
    def group(self) -> str | None:
        """Its IOMMU group's number; None where no IOMMU is at work."""
        return _target(self.directory / "iommu_group")

    @property
    def is_bridge(self) -> bool:
        text = read(self.directory / "class")
        return bool(text) and int(text, 16) >> 8 == BRIDGE_CLASS

    @property
    def physical(self) -> Function | None:
        """The physical function that this is a virtual one of."""
        address = _target(self.directory / "physfn")
        return Function(address, self.sys) if address else None

    def unbind(self) -> None:
        """Take it from its driver, if it has one. Raises NicError or PrivilegeError."""
        driver = self.driver
        if driver is not None:
            write(
                self.directory / "driver/unbind", self.address, f"PCI function {self}: {driver} does not let go of it"
            )

    def set_override(self, driver: str | None) -> None:
        """None: any driver that knows it may have it. Raises NicError or PrivilegeError."""
        what = f"PCI function {self}: it cannot be reserved for driver {driver or 'any'}"
        write(self.directory / "driver_override", driver or "", what)

    def probe(self) -> None:
        """Let the kernel look for a driver; `driver` says what came of it. Raises NicError or PrivilegeError."""
        with suppress(_NoDriver):
            write(self.sys / "bus/pci/drivers_probe", self.address, f"PCI function {self}: no driver takes it")


class _NoDriver(NicError):
    """The kernel has looked, and there is none."""


def _target(path: Path) -> str | None:
    with suppress(OSError):
        return os.path.basename(os.readlink(path))
    return None


def read(path: Path) -> str:
    """A sysfs attribute without its newline; empty where there is none."""
    with suppress(OSError):
        return path.read_text().strip()
    return ""


def write(path: Path, text: str, what: str) -> None:
    """One write(2), as sysfs wants it. `what` opens the message of the NicError or PrivilegeError."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode() + b"\n")
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
            remedy = "mount sysfs writable" if exc.errno == errno.EROFS else "run as root"
            raise PrivilegeError(f"{what} ({path}: {exc.strerror}): {remedy}") from exc
        if path.name == "drivers_probe":
            raise _NoDriver(f"{what}: {exc.strerror}") from exc
        raise NicError(f"{what} ({path}: {exc.strerror})") from exc


@dataclass(frozen=True)
class Netdev:
    """A network device in the calling thread's namespace. `master`: the index of what it is a port of."""

    name: str
    index: int
    up: bool
    mac: str
    master: int | None = None


def function_of(ifindex: int, sys: Path = SYS) -> Function | None:
    """The PCI function behind a network device; None for a device that isn't one of PCI's, or is gone."""

    def ask() -> Any:
        with IPRoute() as ip:
            return next((message for message in ip.get_links() if message["index"] == ifindex), None)

    message = outside_loop(ask)
    return None if message is None or not _parent(message) else Function(_parent(message), sys)


def netdevs() -> dict[str, Netdev]:
    """The first network device of each PCI function in the calling thread's namespace."""

    def ask() -> list[Any]:
        with IPRoute() as ip:
            return list(ip.get_links())

    found: dict[str, Netdev] = {}
    for message in outside_loop(ask):
        if _parent(message):
            found.setdefault(_parent(message), _netdev(message))
    return found


def _parent(message: Any) -> str:
    if message.get_attr("IFLA_PARENT_DEV_BUS_NAME") != "pci":
        return ""
    return str(message.get_attr("IFLA_PARENT_DEV_NAME") or "")


def _netdev(message: Any) -> Netdev:
    return Netdev(
        name=message.get_attr("IFLA_IFNAME"),
        index=message["index"],
        up=bool(message["flags"] & 1),
        mac=message.get_attr("IFLA_ADDRESS") or "",
        master=message.get_attr("IFLA_MASTER"),
    )
