# SPDX-License-Identifier: Apache-2.0
"""A guest's place in the switch: under which keys its frames find it, and from which addresses it may send.

A key is (VLAN, MAC) as the XDP program and the data plane look frames up: VLAN 0 are untagged and priority-tagged
frames, VLAN_ANY those of any VLAN that has no key of its own. A transparent guest has both for each of its MACs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .datapath import VLAN_ANY, Addresses, pack_macs
from .spec_policy import share_vlan, vlans_of

if TYPE_CHECKING:
    from .config import GuestSpec
    from .policy import Policy

Key = tuple[int, bytes]


def keys_of(policy: Policy, macs: Iterable[bytes]) -> frozenset[Key]:
    """Of every MAC in every VLAN that the policy has."""
    vlans = vlans_of(policy) or (0, VLAN_ANY)
    return frozenset((vlan, mac) for mac in macs for vlan in vlans)


@dataclass(frozen=True)
class Place:
    """What a guest was given. Replaced as a whole by `Switch.move`; `learned` are keys that it has earned by itself."""

    spec: GuestSpec
    addresses: Addresses  # as it asked for by its control virtqueue
    learned: frozenset[Key] = frozenset()

    @cached_property
    def macs(self) -> frozenset[bytes]:
        """Every address that is its own in all its VLANs: its SPEC's, too, while it has asked for another."""
        return frozenset((*self.spec.port.macs, *self.addresses.all))

    @cached_property
    def configured(self) -> frozenset[Key]:
        return keys_of(self.spec.port.policy, self.macs)

    @cached_property
    def of_spec(self) -> frozenset[Key]:
        """What its SPEC says alone: the guest has no say in these."""
        return keys_of(self.spec.port.policy, self.spec.port.macs)

    @cached_property
    def keys(self) -> frozenset[Key]:
        return self.configured | self.learned

    @cached_property
    def policy(self) -> Policy:
        return self.spec.port.policy

    def has(self, key: Key) -> bool:
        """Whether frames with this VLAN and MAC are its own by what was configured."""
        vlan, mac = key
        return key in self.configured or (bool(vlan) and (VLAN_ANY, mac) in self.configured)

    def covers(self, key: Key) -> bool:
        """Whether a learned key, another guest's, meets what is configured here."""
        vlan, mac = key
        return mac in self.macs and (vlan == VLAN_ANY or self._is_in(vlan))

    def may_learn(self, key: Key) -> bool:
        """Whether a key is in its VLANs, and not its own without being learned."""
        return self._is_in(key[0]) and not self.has(key)

    def _is_in(self, vlan: int) -> bool:
        vlans = vlans_of(self.policy)
        return vlans is None or vlan in vlans

    def meets(self, other: Place) -> frozenset[bytes]:
        """The addresses that both have in the same VLAN by what was configured."""
        common = self.macs & other.macs
        return common if common and share_vlan(self.policy, other.policy) else frozenset()

    def packed(self, index: int) -> bytes:
        """Its keys for a publication in which it is guest `index`."""
        known: tuple[int, bytes] | None = self.__dict__.get("_packed")
        if known is None or known[0] != index:
            known = index, pack_macs(self.keys, index)
            self.__dict__["_packed"] = known
        return known[1]
