# SPDX-License-Identifier: Apache-2.0
"""SPEC keys that several modes have: the device's name, who may open it, the guest's addresses."""

from __future__ import annotations

import hashlib
import re

from ..config import GuestSpec
from ..errors import ConfigError
from ..links.rtnl import MAX_NAME
from ..links.tap import Owner, owner
from ..spec_values import Ip, addresses

_IFNAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")


def device_name(spec: GuestSpec) -> str:
    """Of the guest's device: tap=NAME, or `tap-GUEST`, cut so that it fits and still differs from all others."""
    given = spec.key("tap")
    if given is not None:
        return given
    name = f"tap-{spec.name}"
    if len(name) <= MAX_NAME:
        return name
    return f"{name[:10]}-{hashlib.sha256(spec.name.encode()).hexdigest()[:4]}"


def check_device_name(spec: GuestSpec) -> None:
    """Raises ConfigError."""
    given = spec.key("tap")
    if given is not None and (not _IFNAME.fullmatch(given) or given in (".", "..", "all", "default")):
        raise ConfigError(
            f"guest {spec.name!r}: tap={given} is no name for an interface; use 1 to 15 letters, digits, underscores, "
            "dots and hyphens"
        )


def check_new_device(spec: GuestSpec, others: list[GuestSpec]) -> None:
    """Raises ConfigError when another guest's device has that name."""
    for other in others:
        if device_name(spec) == device_name(other):
            raise ConfigError(
                f"guest {spec.name!r}: tap={device_name(spec)} is the device of guest {other.name!r}; give each its own"
            )


def owner_of(spec: GuestSpec) -> Owner:
    """Who may open the guest's device. Raises ConfigError for users and groups that this machine hasn't got."""
    return owner(spec.key("owner"), spec.key("group"), f"guest {spec.name!r}")


def addresses_of(spec: GuestSpec) -> tuple[Ip, ...]:
    """The guest's own, out of address=A+B. Raises ConfigError."""
    text = spec.key("address")
    return () if text is None else addresses(text, f"guest {spec.name!r}: address={text}")


def virtio_device(name: str, mac: str, queues: int, size: int | None, packed: bool) -> str:
    """QEMU's virtio-net-pci for netdev `net-NAME`. On a tap, QEMU takes other receive queues' sizes only."""
    nic = f"virtio-net-pci,id=nic-{name},netdev=net-{name},mac={mac}"
    if queues > 1:
        nic += f",mq=on,vectors={2 * queues + 2}"
    if size:
        nic += f",rx_queue_size={size}"
    return nic + (",packed=on" if packed else "")
