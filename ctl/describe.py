# SPDX-License-Identifier: Apache-2.0
"""What `status` and `guest list` say about a guest's place in the switch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .spec_policy import describe_vlans
from .spec_values import write_vlans

if TYPE_CHECKING:
    from .config import GuestSpec
    from .policy import Bucket
    from .switch import GuestEntry


def describe_learned(entry: GuestEntry) -> list[dict[str, Any]]:
    """The addresses in its pool that it has made up, the last one used first."""
    idle = {found.key: found.idle for found in entry.port.learned()} if entry.place.learned else {}
    found = sorted((idle[key], *key) for key in entry.place.learned if key in idle)
    return [{"mac": mac.hex(":"), "vlan": vlan, "idle_seconds": seconds} for seconds, vlan, mac in found]


def describe_port(spec: GuestSpec) -> dict[str, Any]:
    """As JSON values. Rates in bits a second and bursts in bytes, or in frames; None where there is no limit."""
    port = spec.port
    policy = port.policy
    return {
        "macs": [mac.hex(":") for mac in port.macs],
        "vlans": describe_vlans(policy),
        "vlan": policy.access or None,
        "trunk": write_vlans(policy.trunk) or None,
        "spoof_check": policy.spoof_check,
        "learn": policy.learn,
        "isolated": policy.isolated,
        "addresses": [str(address) for address in policy.addresses],
        "link": not policy.link_down,
        "limits": {
            "tx": _bytes_limit(policy.tx),
            "rx": _bytes_limit(policy.rx),
            "storm": {"frames": policy.storm.rate, "burst": policy.storm.burst} if policy.storm.rate else None,
        },
    }


def _bytes_limit(bucket: Bucket) -> dict[str, int] | None:
    return {"bits": 8 * bucket.rate, "burst": bucket.burst} if bucket.rate else None
