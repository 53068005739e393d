# SPDX-License-Identifier: Apache-2.0
"""Driver name, offload features and channel counts of a device: pyroute2's ethtool ioctls with our errors."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyroute2.ethtool.ioctl import IoctlEthtool, NoSuchDevice, NotSupportedError

from ..errors import NicError, PrivilegeError
from .netlink import Link

SIOCETHTOOL = 0x8946
SIOCGIFFLAGS = 0x8913
IFF_RUNNING = 0x40
ETHTOOL_GDRVINFO = 3


@dataclass(frozen=True)
class Feature:
    active: bool
    changeable: bool


@dataclass(frozen=True)
class Channels:
    """Queues in use, and how many there can be. A device has combined ones, or separate, or both."""

    rx: int
    tx: int
    combined: int
    max_rx: int
    max_tx: int
    max_combined: int

    @property
    def receive(self) -> int:
        return self.rx + self.combined

    @property
    def transmit(self) -> int:
        return self.tx + self.combined

    @property
    def max_receive(self) -> int:
        return max(self.max_rx, self.max_combined)


@dataclass(frozen=True)
class LinkState:
    """Carrier, speed in Mb/s and duplex; None and the like where the driver doesn't say."""

    up: bool = True
    speed: int | None = None
    full_duplex: bool | None = None


@contextmanager
def _ethtool(iface: str) -> Iterator[IoctlEthtool]:
    tool = IoctlEthtool(iface)
    try:
        yield tool
    except NoSuchDevice as exc:
        raise NicError(f"no interface {iface!r} in this network namespace") from exc
    finally:
        tool.close()


def driver(iface: str) -> str | None:
    """The driver's name as `ethtool -i` has it."""
    info = ctypes.create_string_buffer(struct.pack("=I", ETHTOOL_GDRVINFO), 196)  # struct ethtool_drvinfo
    request = struct.pack("16sP16x", iface.encode(), ctypes.addressof(info))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe, SIOCETHTOOL, request)
        except OSError:
            return None
    return info.raw[4:36].split(b"\0")[0].decode(errors="replace") or None


def link_state(iface: str) -> LinkState:
    """As it is now; up when the device is gone, for that is another matter."""
    up = True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        answer = fcntl.ioctl(probe, SIOCGIFFLAGS, struct.pack("16sH22x", os.fsencode(iface), 0))
        up = bool(struct.unpack_from("=H", answer, 16)[0] & IFF_RUNNING)
    try:
        with _ethtool(iface) as tool:
            found = tool.get_link_settings()
    except (NicError, NotSupportedError, OSError):
        return LinkState(up)
    speed = int(found.speed)
    return LinkState(up, speed if 0 < speed < 0x7FFFFFFF else None, {0: False, 1: True}.get(int(found.duplex)))


def features(iface: str) -> dict[str, Feature]:
    """By the kernel's own names (`rx-vlan-hw-parse`); empty where the device has no ethtool."""
    try:
        with _ethtool(iface) as tool:
            found = tool.get_features()
    except (NotSupportedError, OSError):
        return {}
    return {
        name: Feature(found.is_active(name), found.is_available(name) and not found.is_never_changed(name))
        for name, *_ in found
        if name
    }


def set_features(iface: str, wanted: Mapping[str, bool]) -> None:
    """Raises NicError or PrivilegeError."""
    what = f"interface {iface}: cannot change {', '.join(wanted)}"
    try:
        with _ethtool(iface) as tool:
            found = tool.get_features()
            for name, value in wanted.items():
                found[name] = value
            # The kernel answers with a positive number when a driver adjusted what was asked, which pyroute2 takes for
            # a refusal. What came of it is read back by whoever cares.
            with suppress(NotSupportedError):
                tool.set_features(found)
    except OSError as exc:
        raise _error(what, exc) from exc


def channels(link: Link) -> Channels | None:
    """None where the driver doesn't say."""
    try:
        with _ethtool(link.name) as tool:
            found = tool.get_channels()
    except (NotSupportedError, OSError):
        return None
    return Channels(
        rx=found.rx_count,
        tx=found.tx_count,
        combined=found.combined_count,
        max_rx=found.max_rx,
        max_tx=found.max_tx,
        max_combined=found.max_combined,
    )


def set_channels(iface: str, rx: int, tx: int, combined: int) -> None:
    """Raises NicError or PrivilegeError."""
    what = f"interface {iface}: cannot be given {rx} receive, {tx} transmit and {combined} combined queues"
    try:
        with _ethtool(iface) as tool:
            found = tool.get_channels()
            found.rx_count, found.tx_count, found.combined_count = rx, tx, combined
            tool.set_channels(found)
    except NotSupportedError as exc:
        raise NicError(f"{what}: its driver can't change them") from exc
    except OSError as exc:
        raise _error(what, exc) from exc


def queues(link: Link) -> tuple[int, int]:
    """Receive and transmit queues in use.

    From the driver, else from sysfs if the one that is mounted shows this very device, else one of each.
    """
    found = channels(link)
    if found is not None and found.receive and found.transmit:
        return found.receive, found.transmit
    directory = Path("/sys/class/net") / link.name
    with suppress(OSError, ValueError):
        address = bytes.fromhex((directory / "address").read_text().strip().replace(":", ""))
        if int((directory / "ifindex").read_text()) == link.index and address == link.mac:
            names = os.listdir(directory / "queues")
            return sum(n.startswith("rx-") for n in names) or 1, sum(n.startswith("tx-") for n in names) or 1
    return 1, 1


def _error(what: str, error: OSError) -> NicError | PrivilegeError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"{what}: run as root, or with CAP_NET_ADMIN")
    return NicError(f"{what}: {error.strerror}")
