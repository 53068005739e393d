# SPDX-License-Identifier: Apache-2.0
"""The modes of `xdpvhost up` that make links for a virtual machine to open: one file each, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..config import MODES, Mode
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..feature import Feature
    from .base import LinkMode

# Each has a `MODE: LinkMode`.
_MODULES: dict[Mode, str] = {
    "tap": "tap",
    "vhost-net": "vhostnet",
    "macvtap": "macvtap",
    "vf": "vf",
    "emulated": "emulated",
}


def mode_for(name: Mode) -> LinkMode:
    """Raises ConfigError for a mode that makes no links, or that this version hasn't got."""
    try:
        module = import_module(f".{_MODULES[name]}", __name__)
    except (KeyError, ModuleNotFoundError) as exc:
        raise ConfigError(f"--mode {name}: this version has no such mode of links") from exc
    mode: LinkMode = module.MODE
    return mode


def link_modes() -> list[LinkMode]:
    """All that this version has."""
    found = []
    for name in MODES:
        try:
            found.append(mode_for(name))
        except ConfigError:
            continue
    return found


def probe(iface: str) -> list[Feature]:
    """Which of them this machine can do on a NIC. Changes nothing. Raises NicError when there is no such interface."""
    from ..links.netlink import get_link

    link = get_link(iface)
    return [mode.feature(link) for mode in link_modes()]
