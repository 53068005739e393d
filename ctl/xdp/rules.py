# SPDX-License-Identifier: Apache-2.0
"""What the NIC sorts by itself: for each address of a guest a rule that has its frames arrive at the guest's own queue.

Guests get queues round robin. A rule changes where a frame arrives, never whose it is: the XDP program looks at each
frame all the same, and a guest has a socket at every queue. So a rule that can't be had is no loss but of order: RSS
chooses the queue then, "in software" as `status` says. A guest with several queue pairs gets no rules: RSS spreads its
frames over them.

Only a SPEC's addresses get rules: a guest can ask for others a thousand times a second, and each rule is written to the
journal and to the NIC. A driver that takes no rule for an address is asked once, and so is one that takes none for an
address in a VLAN.

An address in one VLAN (an access port's) gets a rule for that VLAN, if the NIC takes such, else one for the address.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass

from ..links.ntuple import OwnRules, Rule
from .maps import VLAN_ANY, VLAN_NONE

log = logging.getLogger(__name__)

NO_SUCH_RULE = (errno.EINVAL, errno.EOPNOTSUPP)
_WORDS = {
    errno.EOPNOTSUPP: "the driver has no rules for addresses",
    errno.EINVAL: "the driver has no such rules",
    errno.ENOSPC: "the NIC's table of rules is full",
    errno.EPERM: "it takes CAP_NET_ADMIN",
}


def rules_for(keys: Collection[tuple[int, bytes]], queue: int) -> set[Rule]:
    """Keys are (VLAN, address), as the XDP program has them."""
    vlans: dict[bytes, list[int]] = {}
    for vlan, mac in keys:
        vlans.setdefault(mac, []).append(vlan)
    return {
        Rule(mac, queue, found[0] if len(found) == 1 and found[0] not in (VLAN_NONE, VLAN_ANY) else None)
        for mac, found in vlans.items()
    }


@dataclass(frozen=True)
class Refusal:
    """Why there is no rule, in words for `status`; `may_pass`: when another one goes."""

    why: str
    may_pass: bool

    @classmethod
    def of(cls, exc: OSError) -> Refusal:
        code, text = exc.errno or 0, exc.strerror or str(exc)
        if text == os.strerror(code):
            text = _WORDS.get(code, text)
        return cls(text, code in (errno.ENOSPC, errno.EEXIST))


class GuestRules:
    """The rules of one NIC's guests, by slot. Never raises: what the NIC refuses is done in software."""

    def __init__(self, iface: str, own: OwnRules | None, why_none: str, nr_queues: int) -> None:
        """`own` None: none at all, `why_none`."""
        self._iface = iface
        self._own = own
        self._why_none = why_none
        self._nr_queues = nr_queues
        self._made: dict[int, dict[Rule, Rule]] = {}  # what was wanted, and what it became
        self._refused: dict[int, dict[Rule, Refusal]] = {}
        self._told: set[str] = set()
        self._none: Refusal | None = None  # the driver takes no such rules
        self._no_vlans = False  # not with a VLAN

    def __str__(self) -> str:
        if self._own is None:
            return self._why_none
        made = sum(map(len, self._made.values()))
        reasons = [refusal.why for refused in self._refused.values() for refusal in refused.values()]
        if not reasons:
            return f"{made} in hardware"
        return f"{made} in hardware, {len(reasons)} in software: {'; '.join(dict.fromkeys(reasons))}"

    def set(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        """A guest's rules are those for these keys, from now on."""
        if self._own is None:
            return
        wanted = rules_for(keys, slot % self._nr_queues)
        made = self._made.setdefault(slot, {})
        refused = self._refused.setdefault(slot, {})
        gone = [rule for rule in made if rule not in wanted]
        for rule in gone:
            self._own.remove(made.pop(rule))
        for rule in [rule for rule in refused if rule not in wanted]:
            del refused[rule]
        for rule in sorted(wanted - made.keys() - refused.keys(), key=str):
            self._try(slot, rule)
        if gone:
            self._fill_up()

    def drop(self, slot: int) -> None:
        self.set(slot, ())
        self._made.pop(slot, None)
        self._refused.pop(slot, None)

    def _fill_up(self) -> None:
        """There is room again for rules that found none, or that another guest's stood in the way of."""
        for slot, refused in self._refused.items():
            for rule in [rule for rule, refusal in refused.items() if refusal.may_pass]:
                del refused[rule]
                self._try(slot, rule)

    def _try(self, slot: int, rule: Rule) -> None:
        if self._none is not None:
            self._refuse(slot, rule, self._none)
            return
        try:
            self._made[slot][rule] = self._add_one_of(rule)
        except OSError as exc:
            refusal = Refusal.of(exc)
            if exc.errno in NO_SUCH_RULE:
                self._none = refusal
            self._refuse(slot, rule, refusal)

    def _add_one_of(self, rule: Rule) -> Rule:
        """The rule, or the one without its VLAN where the driver has none for VLANs. Raises OSError."""
        if rule.vlan is not None and not self._no_vlans:
            try:
                return self._add(rule)
            except OSError as exc:
                if exc.errno not in NO_SUCH_RULE:
                    raise
                self._no_vlans = True
        return self._add(Rule(rule.mac, rule.queue) if rule.vlan is not None else rule)

    def _refuse(self, slot: int, rule: Rule, refusal: Refusal) -> None:
        self._refused[slot][rule] = refusal
        self._tell(rule, refusal.why)

    def _add(self, rule: Rule) -> Rule:
        """Raises OSError."""
        assert self._own is not None
        for others in self._made.values():
            if any((other.mac, other.vlan) == (rule.mac, rule.vlan) for other in others.values()):
                raise FileExistsError(errno.EEXIST, "another guest has the same address in another VLAN")
        self._own.add(rule)
        return rule

    def _tell(self, rule: Rule, why: str) -> None:
        level = logging.DEBUG if why in self._told else logging.INFO
        self._told.add(why)
        log.log(level, "interface %s: no n-tuple rule `%s`, XDP does it alone: %s", self._iface, rule, why)
