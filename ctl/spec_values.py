# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that SPEC keys have: read from text, and written so that they read the same again.

Every reader takes the text and what opens its error message, `guest 'vm1': vlan=x`, and raises ConfigError.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable

from .errors import ConfigError

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_VLAN = 4094
RATE_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}  # bits a second, as ip and tc have them
SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20}  # bytes
MAX_RATE = 10**12
MAX_BURST = 2**30
MAX_ADDRESSES = 64  # XV_MAX_ADDRESSES

MAX_DIGITS = 15

_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")
_QUANTITY = re.compile(r"(\d{1,15})([kKMG]?)", re.ASCII)


def whole_number(text: str) -> int | None:
    """Decimal digits, 15 of them at most; None: it is something else. Also for options and other keys than these."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else None


def switch(text: str, what: str) -> bool:
    if text not in ("on", "off"):
        raise ConfigError(f"{what} is unknown; use on or off")
    return text == "on"


def write_switch(value: bool) -> str:
    return "on" if value else "off"


def number(least: int, most: int) -> Callable[[str, str], int]:
    def read(text: str, what: str) -> int:
        value = whole_number(text)
        if value is None or not least <= value <= most:
            raise ConfigError(f"{what} is not a number from {least} to {most}")
        return value

    return read


def vlan(text: str, what: str) -> int:
    value = whole_number(text)
    if value is None or not 1 <= value <= MAX_VLAN:
        raise ConfigError(f"{what} is no VLAN; use 1 to {MAX_VLAN}, or leave it out for a guest of no VLAN")
    return value


def vlans(text: str, what: str) -> frozenset[int]:
    """VLANs and ranges of them with + between: 10+20+30-40."""
    found: set[int] = set()
    for part in text.split("+"):
        match = _RANGE.fullmatch(part)
        if not match:
            raise ConfigError(f"{what}: {part!r} is no VLAN, nor a range of them; write it like 10+20+30-40")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= MAX_VLAN or not 1 <= last <= MAX_VLAN:
            raise ConfigError(f"{what}: {part} is not within 1 to {MAX_VLAN}, the VLANs that there are")
        if last < first:
            raise ConfigError(f"{what}: {part} runs backwards; write {last}-{first}")
        found.update(range(first, last + 1))
    return frozenset(found)


def write_vlans(values: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "+".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def addresses(text: str, what: str) -> tuple[Ip, ...]:
    """A guest's own IP addresses, with + between."""
    found: list[Ip] = []
    for part in text.split("+"):
        try:
            address = ipaddress.ip_address(part)
        except ValueError:
            raise ConfigError(f"{what}: {part!r} is no IP address; write one, or several with + between") from None
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            raise ConfigError(
                f"{what}: {part} has a scope, which ends at this machine; leave out what follows the address"
            )
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            raise ConfigError(f"{what}: {part} is an IPv4 address in IPv6 notation; write {address.ipv4_mapped}")
        if _is_nobodys(address):
            raise ConfigError(f"{what}: {part} is no address that can be routed to a guest")
        if address in found:
            raise ConfigError(f"{what}: {address} is there twice; give it once")
        found.append(address)
    if len(found) > MAX_ADDRESSES:
        raise ConfigError(f"{what[:60]}…: {len(found)} addresses, and a guest may have {MAX_ADDRESSES}")
    return tuple(found)


def _is_nobodys(address: Ip) -> bool:
    """No single machine's, or not one that others could reach."""
    if address.is_multicast or address.is_unspecified or address.is_loopback or address.is_link_local:
        return True
    return address.version == 4 and (address.is_reserved or address in _THIS_NETWORK)


def write_addresses(values: Iterable[Ip]) -> str:
    return "+".join(map(str, values))


def rate(text: str, what: str) -> int:
    """Bits a second; 0: no limit."""
    value = _quantity(text, RATE_UNITS)
    if value is None or value > MAX_RATE:
        raise ConfigError(f"{what} is no rate; write bits a second like 500k, 100M or 2.5G as 2500M, up to 1000G")
    return value


def write_rate(value: int) -> str:
    return _shortest(value, RATE_UNITS)


def size(text: str, what: str) -> int:
    """Bytes."""
    value = _quantity(text, SIZE_UNITS)
    if value is None or value > MAX_BURST:
        raise ConfigError(f"{what} is no size; write bytes like 65536, 64K or 1M, up to 1024M")
    return value


def write_size(value: int) -> str:
    return _shortest(value, SIZE_UNITS)


def _quantity(text: str, units: dict[str, int]) -> int | None:
    match = _QUANTITY.fullmatch(text)
    if not match:
        return None
    unit = next((unit for unit in units if unit.lower() == match[2].lower()), None)
    return None if unit is None else int(match[1]) * units[unit]


def _shortest(value: int, units: dict[str, int]) -> str:
    unit = next(unit for unit in sorted(units, key=lambda unit: -units[unit]) if value % units[unit] == 0)
    return f"{value // units[unit]}{unit}" if value else "0"
