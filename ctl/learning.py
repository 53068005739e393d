# SPDX-License-Identifier: Apache-2.0
"""Addresses that guests have made up themselves: which of them join a pool, and when they leave it.

Theory of operation. With `learn=N` the data plane lets a guest send from N addresses that it wasn't given, notes them,
and tells us that there are new ones (datapath/src/learn.c). Frames *to* such an address reach the guest when it is one
of its keys, in the XDP program's table and in the workers' snapshot; that is decided here:

    nobody's                                     joins the guest's pool
    configured for somebody, or this machine's   denied: its frames are dropped; `refused`
    another guest's, who has learned it          the same; with us it is whose it was first, until it has aged
    refused by the NIC, or no room               the same
    one of this machine's devices has it now     leaves the pool, and is denied
    not used for `max_age` seconds               leaves the pool and the data plane: `aged`
    configured for somebody later                leaves them, too: `taken` (Switch.change_guest and add_guest see to it)

What is denied stays in the data plane's table for DENIED_FOR, so that the guest's next frame doesn't begin all this
again. A learned key is one (VLAN, MAC), as the frame had it. What leaves does so in a publication of its own, and so
does what joins. When one guest's keys are refused, the others' are not: each is tried by itself then.

A guest can make events as fast as it likes. So the control thread rests after a look for PERIOD, or REST times as long
as the look took.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .addresses import addresses_here
from .config import format_mac
from .errors import XdpvhostError

if TYPE_CHECKING:
    from .datapath import Learned
    from .nicport import NicPort
    from .pools import Key, Place
    from .switch import GuestEntry, Switch

    Tables = Mapping[GuestEntry, dict[Key, Learned]]

log = logging.getLogger(__name__)

PERIOD = 0.05  # seconds between two looks, at least
REST = 10  # times as long as it took
DENIED_FOR = 10.0  # seconds
ERROR_PERIOD = 60.0  # seconds between two errors in the log
RESULTS = ("learned", "refused", "aged", "taken")


@dataclass
class _Taken:
    """Who has what, in one look: by MAC those who were given it, by key those who have learned it."""

    configured: dict[bytes, list[GuestEntry]] = field(default_factory=dict)
    learned: dict[Key, GuestEntry] = field(default_factory=dict)

    @classmethod
    def of(cls, guests: Iterable[GuestEntry]) -> _Taken:
        taken = cls()
        for entry in guests:
            for mac in entry.place.macs:
                taken.configured.setdefault(mac, []).append(entry)
            taken.learned.update(dict.fromkeys(entry.place.learned, entry))
        return taken

    def refusal(self, entry: GuestEntry, key: Key) -> str | None:
        for other in self.configured.get(key[1], ()):
            if other is not entry and other.place.covers(key):
                return f"guest {other.name!r} has it"
        other_learner = self.learned.get(key)
        return None if other_learner is None else f"guest {other_learner.name!r} has learned it"


class Learning:
    """For the control thread only. `max_age`: seconds without a frame from an address until it is forgotten."""

    def __init__(self, switch: Switch, max_age: float) -> None:
        self._switch = switch
        self._max_age = max_age
        self._next = 0.0
        self._next_error = 0.0

    def look(self) -> float | None:
        """Take over what guests have learned, give up what is old.

        Seconds until there is to be another look, because this one came too soon; else None.
        """
        learners = [entry for entry in self._switch.guests.values() if entry.place.policy.learn or entry.place.learned]
        if not learners:
            return None
        begun = time.monotonic()
        if begun < self._next:
            return self._next - begun
        try:
            self._look(learners)
        finally:
            ended = time.monotonic()
            self._next = ended + max(PERIOD, REST * (ended - begun))
        return None

    def _look(self, learners: Iterable[GuestEntry]) -> None:
        tables = {entry: {found.key: found for found in entry.port.learned()} for entry in learners}
        ours = {host.mac for host in self._switch.hosts.values()}
        if any(tables.values()):
            ours |= addresses_here()
        self._take_away(tables, ours)
        self._give(tables, ours)

    def _take_away(self, tables: Tables, ours: set[bytes]) -> None:
        """What is old, and what is this machine's by now. `tables` are without it afterwards."""
        old: dict[GuestEntry, set[Key]] = {}
        left: dict[GuestEntry, Place] = {}
        for entry, table in tables.items():
            old[entry] = {key for key, found in table.items() if found.idle >= self._most_idle(found)}
            kept = {key for key in entry.place.learned & table.keys() if key[1] not in ours} - old[entry]
            if kept != entry.place.learned:
                left[entry] = replace(entry.place, learned=frozenset(kept))
        before = {entry: entry.place.learned for entry in left}
        failed = self._move(left)
        for entry, table in tables.items():
            if entry in failed:
                continue  # it has them still; the next look tries again
            for key in old[entry]:
                found = table.pop(key)
                entry.port.forget(found.mac, found.vlan)
                if not found.denied:
                    entry.learning["aged"] += 1
                    log.debug("guest %r: %s is forgotten, not used for %.0f s", entry.name, _words(key), found.idle)
            for key in (before.get(entry, frozenset()) - entry.place.learned) & table.keys():
                del table[key]
                _deny(entry, key, "a network device of this machine has it")

    def _most_idle(self, found: Learned) -> float:
        return DENIED_FOR if found.denied else self._max_age

    def _give(self, tables: Tables, ours: set[bytes]) -> None:
        """What is new and nobody's."""
        new = {
            entry: [found for key, found in table.items() if not found.denied and key not in entry.place.learned]
            for entry, table in tables.items()
            if not entry.nic.gone
        }
        if not any(new.values()):
            return
        taken = _Taken.of(self._switch.guests.values())
        room: dict[NicPort, int] = {}
        granted: dict[GuestEntry, set[Key]] = {}
        for entry, found in new.items():
            room.setdefault(entry.nic, self._switch.room(entry.nic))
            for mac, vlan, _, _ in sorted(found, key=lambda one: one.idle):
                key = vlan, mac
                if entry.place.has(key):
                    entry.port.forget(mac, vlan)  # it was configured after it was learned
                    continue
                why = self._refusal(entry, key, ours, taken, room[entry.nic])
                if why is not None:
                    _deny(entry, key, why)
                    continue
                taken.learned[key] = entry
                room[entry.nic] -= 1
                granted.setdefault(entry, set()).add(key)
        failed = self._move(
            {entry: replace(entry.place, learned=entry.place.learned | keys) for entry, keys in granted.items()}
        )
        for entry, keys in granted.items():
            for key in keys:
                if entry in failed:
                    _deny(entry, key, "see the error")
                    continue
                entry.learning["learned"] += 1
                log.debug("guest %r: %s is learned", entry.name, _words(key))

    @staticmethod
    def _refusal(entry: GuestEntry, key: Key, ours: set[bytes], taken: _Taken, room: int) -> str | None:
        if not entry.place.may_learn(key):
            return "it is in another VLAN"
        if why := taken.refusal(entry, key):
            return why
        if key[1] in ours:
            return "a network device of this machine has it"
        return None if room > 0 else "there is no room for more"

    def _move(self, places: Mapping[GuestEntry, Place]) -> set[GuestEntry]:
        """Together, or if that fails one by one; those that are where they were."""
        if not places:
            return set()
        try:
            self._switch.move(places)
        except (XdpvhostError, OSError) as exc:
            if len(places) > 1:
                return {entry for entry, place in places.items() if self._move({entry: place})}
            for entry in places:
                self._tell(entry, exc)
            return set(places)
        return set()

    def _tell(self, entry: GuestEntry, exc: Exception) -> None:
        """Once in a while: a guest can make this happen as often as it likes."""
        now = time.monotonic()
        told = now < self._next_error
        if not told:
            self._next_error = now + ERROR_PERIOD
        log.log(
            logging.DEBUG if told else logging.ERROR, "guest %r: what it has learned is refused: %s", entry.name, exc
        )


def _deny(entry: GuestEntry, key: Key, why: str) -> None:
    vlan, mac = key
    entry.port.deny(mac, vlan)
    entry.learning["refused"] += 1
    log.debug("guest %r: %s is not learned: %s", entry.name, _words(key), why)


def _words(key: Key) -> str:
    vlan, mac = key
    return f"{format_mac(mac)} in VLAN {vlan}" if vlan else format_mac(mac)
