# SPDX-License-Identifier: Apache-2.0
"""Addresses that guests have made up themselves: which of them join a pool, and when they leave it.

Theory of operation. With `learn=N` the data plane lets a guest send from N addresses that it wasn't given, notes them,
and tells us that there are new ones (datapath/src/learn.c). Frames *to* such an address reach the guest when it is one
of its keys, in the XDP program's table and in the workers' snapshot; that is decided here:

    nobody's                                     joins the guest's pool
    configured for somebody, or this machine's   forgotten, also in the data plane: `refused`
    another guest's, who has learned it          the same; with us it is whose it was first, until it has aged
    not used for `max_age` seconds               leaves the pool and the data plane: `aged`
    configured for somebody later                leaves them, too: `taken` (Switch.change_guest and add_guest see to it)

A learned key is one (VLAN, MAC), as the frame had it. A guest can make events as fast as it likes, so there is a
PERIOD between two looks, and one publication a look at most.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .addresses import addresses_here
from .config import format_mac
from .errors import XdpvhostError

if TYPE_CHECKING:
    from .pools import Key, Place
    from .switch import GuestEntry, Switch

log = logging.getLogger(__name__)

PERIOD = 0.05  # seconds between two looks
RESULTS = ("learned", "refused", "aged", "taken")


class Learning:
    """For the control thread only. `max_age`: seconds without a frame from an address until it is forgotten."""

    def __init__(self, switch: Switch, max_age: float) -> None:
        self._switch = switch
        self._max_age = max_age
        self._next = 0.0
        self._failing = False

    def look(self) -> float | None:
        """Take over what guests have learned, give up what is old.

        Seconds until there is to be another look, because this one came too soon; else None.
        """
        learners = [entry for entry in self._switch.guests.values() if entry.place.policy.learn or entry.place.learned]
        if not learners:
            return None
        now = time.monotonic()
        if now < self._next:
            return self._next - now
        self._next = now + PERIOD
        tables = {entry: {(vlan, mac): idle for mac, vlan, idle in entry.port.learned()} for entry in learners}
        places: dict[GuestEntry, Place] = {}
        results: dict[GuestEntry, Counter[str]] = {}
        for entry, table in tables.items():
            places[entry], results[entry] = self._judge(entry, table, places)
        changed = {entry: place for entry, place in places.items() if place != entry.place}
        try:
            if changed:
                self._switch.move(changed)
            self._failing = False
        except XdpvhostError as exc:
            log.log(logging.DEBUG if self._failing else logging.ERROR, "learned addresses are refused: %s", exc)
            self._failing = True
            results = {
                entry: Counter(refused=len(table.keys() - entry.place.learned)) for entry, table in tables.items()
            }
        for entry, table in tables.items():
            for vlan, mac in table.keys() - entry.place.learned:
                entry.port.forget(mac, vlan)
            entry.learning.update(results[entry])
        return None

    def _judge(
        self, entry: GuestEntry, table: Mapping[Key, float], judged: Mapping[GuestEntry, Place]
    ) -> tuple[Place, Counter[str]]:
        """The guest's place with what it is to have learned, and how often which RESULT came about."""
        results: Counter[str] = Counter()
        kept: set[Key] = set()
        room = self._switch.room(entry.nic) + len(entry.place.learned)
        for key, idle in sorted(table.items(), key=lambda item: item[1]):
            if idle >= self._max_age:
                results["aged"] += 1
                log.debug("guest %r: %s is forgotten, not used for %.0f s", entry.name, _words(key), idle)
                continue
            if entry.place.has(key):
                continue  # it was configured after it was learned
            why = "there is no room for more" if len(kept) >= room else self._refusal(entry, key, judged)
            if why is not None:
                results["refused"] += 1
                log.debug("guest %r: %s is not learned: %s", entry.name, _words(key), why)
                continue
            kept.add(key)
            if key not in entry.place.learned:
                results["learned"] += 1
                log.debug("guest %r: %s is learned", entry.name, _words(key))
        return replace(entry.place, learned=frozenset(kept)), results

    def _refusal(self, entry: GuestEntry, key: Key, judged: Mapping[GuestEntry, Place]) -> str | None:
        if not entry.place.may_learn(key):
            return "it is in another VLAN"
        if key in entry.place.learned:
            return None
        for other in self._switch.others(entry):
            place = judged.get(other, other.place)
            if place.covers(key):
                return f"guest {other.name!r} has it"
            if key in place.learned or key in other.place.learned:
                return f"guest {other.name!r} has learned it"
        if key[1] in addresses_here():
            return "a network device of this machine has it"
        return None


def _words(key: Key) -> str:
    vlan, mac = key
    return f"{format_mac(mac)} in VLAN {vlan}" if vlan else format_mac(mac)
