# SPDX-License-Identifier: Apache-2.0
"""What a SPEC says about a guest's place on its network: its pool (MACs in VLANs), and what it may do there.

Theory of operation. A guest of the data plane has a *pool*: the (VLAN, MAC) pairs whose frames are its own. It is

    transparent     the default: all its MACs, untagged and in every VLAN; tags are the guest's business
    an access port  vlan=N: all its MACs in that one VLAN; the guest sends and receives untagged
    a trunk         trunk=10+20-30: all its MACs in each of those VLANs; the guest sends and receives tagged

No two pools may intersect. The same MAC may be two guests' in different VLANs; but a transparent guest is in every one.

Everything else a SPEC says here becomes a `Policy`, which the data plane enforces. Names are those of mode vf where it
has such a key, and so of `ip link set vf`. `tx` is from the guest and `rx` is towards it, as everywhere.

The values of these keys are kept as text in `GuestSpec.keys`, in one notation only: see `canonical`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from . import spec_values as values
from .errors import ConfigError
from .policy import MAX_LEARNED, Bucket, Policy

if TYPE_CHECKING:
    from .config import GuestSpec

Keys = tuple[tuple[str, str], ...]

MAX_MACS = 64  # of one SPEC
FRAME_OVERHEAD = 18  # Ethernet header and one tag, in front of what an MTU counts
SHORTEST_FRAME = 64
BURST_SECONDS = 100  # the default burst is what the rate sends in a hundredth of a second,
LEAST_BURST = (1 << 16) + 64  # and at least the longest frame that there is
MAX_STORM = 10**9
LIMIT_KEYS = ("tx-rate", "tx-burst", "rx-rate", "rx-burst")  # that are measured by an MTU


class _Key(NamedTuple):
    syntax: str
    read: Callable[[str, str], Any]
    write: Callable[[Any], str]
    default: Any


def _read_macs(text: str, what: str) -> tuple[bytes, ...]:
    from .config import parse_mac

    guest = what.partition(": ")[0]
    found: list[bytes] = []
    for part in text.split("+"):
        mac = parse_mac(part, guest)
        if mac in found:
            raise ConfigError(f"{what}: {part} is there twice; give it once")
        found.append(mac)
    if len(found) >= MAX_MACS:
        raise ConfigError(f"{guest}: macs= has {len(found)} addresses; a guest may have {MAX_MACS} with its mac=")
    return tuple(found)


def _write_macs(macs: Iterable[bytes]) -> str:
    return "+".join(mac.hex(":") for mac in macs)


_SWITCH = (values.switch, values.write_switch)
_RATE = _Key("BITS", values.rate, values.write_rate, 0)
_BURST = _Key("BYTES", values.size, values.write_size, None)
_KEYS: Mapping[str, _Key] = {
    "macs": _Key("MAC[+MAC…]", _read_macs, _write_macs, ()),
    "vlan": _Key("N", values.vlan, str, 0),
    "trunk": _Key("N[-N][+N…]", values.vlans, values.write_vlans, frozenset()),
    "spoof-check": _Key("on|off", *_SWITCH, True),
    "learn": _Key("N", values.number(0, MAX_LEARNED), str, 0),
    "isolated": _Key("on|off", *_SWITCH, False),
    "address": _Key("IP[+IP…]", values.addresses, values.write_addresses, ()),
    "storm": _Key("N", values.number(0, MAX_STORM), str, 0),
    "storm-burst": _Key("N", values.number(1, MAX_STORM), str, None),
    "tx-rate": _RATE,
    "tx-burst": _BURST,
    "rx-rate": _RATE,
    "rx-burst": _BURST,
    "link": _Key("on|off", *_SWITCH, True),
}

PORT_KEYS: Mapping[str, str] = {name: key.syntax for name, key in _KEYS.items()}  # and what their values are like
PORT_MODES = ("xdp", "tap")  # whose guests may be the data plane's


@dataclass(frozen=True)
class PortSpec:
    """The keys' meaning. `macs`: all of the guest's, the one of its configuration space first."""

    macs: tuple[bytes, ...]
    policy: Policy
    given: frozenset[str] = frozenset()  # names of the keys that are not at their default


def port_of(spec: GuestSpec) -> PortSpec:
    """Raises ConfigError for values that no guest can have. Of modes without these keys: a port that checks nothing."""
    if spec.mode not in PORT_MODES:
        return PortSpec((spec.mac,), Policy())
    return _port(spec.name, spec.mac, tuple((key, text) for key, text in spec.keys if key in _KEYS))


@lru_cache(maxsize=2048)
def _port(name: str, mac: bytes, keys: Keys) -> PortSpec:
    what = f"guest {name!r}"
    found = _read(what, keys)
    given = frozenset(key for key, value in found.items() if value != _KEYS[key].default)
    if mac in found["macs"]:
        raise ConfigError(f"{what}: macs= has {mac.hex(':')}, which is its mac= already; leave it out")
    if found["vlan"] and found["trunk"]:
        raise ConfigError(
            f"{what}: vlan={found['vlan']} makes it an access port, trunk= one of several VLANs; leave one of them out"
        )
    if found["learn"] and not found["spoof-check"]:
        raise ConfigError(
            f"{what}: learn={found['learn']} with spoof-check=off: it may use any address without learning; "
            "leave one of them out"
        )
    policy = Policy(
        access=found["vlan"],
        trunk=found["trunk"],
        addresses=found["address"],
        spoof_check=found["spoof-check"],
        isolated=found["isolated"],
        link_down=not found["link"],
        learn=found["learn"],
        tx=_bytes_bucket(what, found, "tx"),
        rx=_bytes_bucket(what, found, "rx"),
        storm=_storm_bucket(what, found),
    )
    return PortSpec((mac, *found["macs"]), policy, given)


class _Read(dict[str, Any]):
    """Values by key; the default of those that were not given."""

    def __missing__(self, name: str) -> Any:
        return _KEYS[name].default


def _read(what: str, keys: Iterable[tuple[str, str]]) -> _Read:
    return _Read({key: _KEYS[key].read(text, f"{what}: {key}={text}") for key, text in keys})


def _bytes_bucket(what: str, found: _Read, way: str) -> Bucket:
    bits, burst = found[f"{way}-rate"], found[f"{way}-burst"]
    if not bits:
        if burst is not None:
            raise ConfigError(f"{what}: {way}-burst= without {way}-rate= limits nothing; add {way}-rate=BITS")
        return Bucket()
    _check_limits(what, way, bits, burst, SHORTEST_FRAME)
    rate = (bits + 7) // 8
    return Bucket(rate, max(rate // BURST_SECONDS, LEAST_BURST) if burst is None else burst)


def _check_limits(what: str, way: str, bits: int, burst: int | None, frame: int) -> None:
    if bits < 8 * frame:
        raise ConfigError(
            f"{what}: {way}-rate={values.write_rate(bits)} is below one frame of {frame} bytes a second; "
            f"give it {8 * frame} or more"
        )
    if burst is not None and burst < frame:
        raise ConfigError(
            f"{what}: {way}-burst={values.write_size(burst)} is below one frame of {frame} bytes: each frame would "
            f"have to wait until it is paid; give it {frame} or more, or leave it out"
        )


def _storm_bucket(what: str, found: _Read) -> Bucket:
    rate, burst = found["storm"], found["storm-burst"]
    if not rate:
        if burst is not None:
            raise ConfigError(f"{what}: storm-burst= without storm= limits nothing; add storm=N")
        return Bucket()
    return Bucket(rate, rate if burst is None else burst)


def check_mtu(spec: GuestSpec, mtu: int, before: GuestSpec | None = None) -> None:
    """Raises ConfigError for limits below one full frame of a device with this MTU.

    `before`: what the guest has been until now. Its limits, if they stay, were right when they were set: that the MTU
    has grown since is no reason to refuse another change.
    """
    if spec.mode not in PORT_MODES or (before is not None and _limits(before) == _limits(spec)):
        return
    what = f"guest {spec.name!r}"
    found = _read(what, ((key, text) for key, text in spec.keys if key in _KEYS))
    for way in ("tx", "rx"):
        if found[f"{way}-rate"]:
            _check_limits(what, way, found[f"{way}-rate"], found[f"{way}-burst"], mtu + FRAME_OVERHEAD)


def _limits(spec: GuestSpec) -> Keys:
    return tuple((key, text) for key, text in spec.keys if key in LIMIT_KEYS)


def canonical(name: str, keys: Iterable[tuple[str, str]]) -> Keys:
    """The same in the one notation that is kept: in the table's order, without what is the default anyhow.

    Keys that are not of this table come first, as they are. Raises ConfigError for values that can't be read.
    """
    given = dict(keys)
    others = tuple((key, text) for key, text in given.items() if key not in _KEYS)
    found = _read(f"guest {name!r}", ((key, text) for key, text in given.items() if key in _KEYS))
    return others + tuple(
        (key, kind.write(found[key])) for key, kind in _KEYS.items() if key in found and found[key] != kind.default
    )


# ---- pools


def share_vlan(one: Policy, other: Policy) -> bool:
    """Whether there is a VLAN in which both are."""
    mine, theirs = vlans_of(one), vlans_of(other)
    return mine is None or theirs is None or not mine.isdisjoint(theirs)


def vlans_of(policy: Policy) -> frozenset[int] | None:
    """None: in every one, and untagged."""
    if policy.access:
        return frozenset((policy.access,))
    return policy.trunk or None


def describe_vlans(policy: Policy) -> str:
    """For people."""
    if policy.access:
        return f"VLAN {policy.access}"
    return f"trunk {values.write_vlans(policy.trunk)}" if policy.trunk else "every VLAN"


def overlap(one: PortSpec, other: PortSpec) -> bytes | None:
    """A MAC that both have in the same VLAN."""
    common = frozenset(one.macs).intersection(other.macs)
    return min(common) if common and share_vlan(one.policy, other.policy) else None
