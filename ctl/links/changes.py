# SPDX-License-Identifier: Apache-2.0
"""The changes that a mode of links makes to the host: journalled, undone in reverse, and taken over after kill -9.

Whose they are. A change belongs to the NIC (guest None) or to one guest. A guest's are undone when it is removed, the
NIC's at the end.

Taking over. A daemon that was killed leaves virtual machines running on the devices it made. The next `up` for the same
NIC, in the same run directory, with the same options, claims each change that it would make again, and keeps the
device. What of the old one's changes nobody claimed is undone when everything is open. With other options
(`WISHES` tells), or after a reboot, or in another network namespace, all is undone first and made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .journal import Entry, Journal
from .nicprep import ADOPTED, NicPrep, prepare, where

log = logging.getLogger(__name__)

WISHES = "wishes"  # the kind of entry that remembers how the NIC was asked for
GUEST = "guest"  # the key in an entry's args that says whose it is


def adoptable(journal: Journal, ifindex: int, wishes: dict[str, Any], guests: Sequence[str]) -> list[Entry]:
    """What of the pending entries an `up` with these wishes takes over; `guests` are SPECs as format_guest makes them.

    Entries of a guest that isn't asked for in the same words are not among them.
    """
    here = where(ifindex).items()
    mine = [entry for entry in journal.pending() if here <= entry.args.items()]
    if not any(entry.kind == WISHES and entry.args["wishes"] == wishes for entry in mine):
        return []
    return [entry for entry in mine if entry.args.get(GUEST) in (None, *guests)]


class Changes:
    """The changes to one NIC's host. For the control thread only."""

    def __init__(self, journal: Journal, iface: str, ifindex: int, leftover: Sequence[Entry] = ()) -> None:
        """`leftover`: what `adoptable` found; some of it is still pending."""
        self.journal = journal
        self.iface = iface
        self.ifindex = ifindex
        self._where = {"iface": iface, **where(ifindex)}
        self._unclaimed = [entry for entry in leftover if entry.kind not in ADOPTED]  # NicPrep claims those
        self._made: list[Entry] = []
        self._prep: NicPrep | None = None
        self.owner: str | None = None  # SPEC of the guest whose changes are being made

    @property
    def nic(self) -> NicPrep:
        """The NIC's own settings; those of its changes are undone after all others."""
        if self._prep is None:
            self._prep = prepare(self.iface, self.journal)
        return self._prep

    def note_wishes(self, wishes: dict[str, Any]) -> None:
        """Before everything else."""
        if self.claim(WISHES, wishes=wishes) is None:
            self.record(WISHES, wishes=wishes)

    def record(self, kind: str, **args: Any) -> Entry:
        """Announce a change. When this returns it is on disk, and the change may be made."""
        owner = {} if self.owner is None else {GUEST: self.owner}
        entry = self.journal.record(kind, **self._where, **owner, **args)
        self._made.append(entry)
        return entry

    def claim(self, kind: str, **args: Any) -> Entry | None:
        """Take over a killed daemon's change of this kind and owner that has these `args`.

        The caller must look whether it was really made, and make it if not.
        """
        for entry in self._unclaimed:
            if entry.kind == kind and entry.args.get(GUEST) == self.owner and args.items() <= entry.args.items():
                self._unclaimed.remove(entry)
                self._made.append(entry)
                return entry
        return None

    def has(self, kind: str, **args: Any) -> bool:
        """Whether a change of this kind with these `args` is made, or left by a killed daemon and not yet claimed."""
        entries = (*self._unclaimed, *self._made)
        return any(entry.kind == kind and args.items() <= entry.args.items() for entry in entries)

    def amend(self, entry: Entry, **args: Any) -> None:
        """Add what became known about a change only after it was made."""
        self.journal.amend(entry, **args)

    def forget(self, entry: Entry) -> None:
        """It isn't there any more, or never was."""
        self._made.remove(entry)
        self.journal.done(entry)

    def undo(self, owner: str | None) -> bool:
        """Undo the changes of a guest, or the NIC's; False when something could not be undone, which stays pending."""
        mine = [entry for entry in self._made if entry.args.get(GUEST) == owner]
        done = True
        for entry in reversed(mine):
            self._made.remove(entry)
            done &= self.journal.undo(entry).ok
        if owner is None and self._prep is not None:
            self._prep.undo()
        return done

    def undo_unclaimed(self) -> None:
        """What a killed daemon made and nobody wants any more."""
        while self._unclaimed:
            undone = self.journal.undo(self._unclaimed.pop())
            if undone.ok:
                log.warning("undone, left by a killed daemon: %s", undone.detail)
