# SPDX-License-Identifier: Apache-2.0
"""What a NIC needs before its frames can be steered, each change announced in the journal.

- It is up.
- It leaves VLAN tags in the frame, where the XDP program reads them, and takes frames of any VLAN.
- It has as many receive queues as asked for, and sends on each of them.
- It takes n-tuple rules, if it can and they are wanted.

Attaching XDP itself switches features off (large receive offload in generic mode, for one). The journal has all that
could be switched before, and afterwards what was, so that it is switched on again.

What a killed daemon's journal says of this very NIC's state, `up` adopts instead of undoing it: it would have to make
the same change again, and the link would go down and up. It stays in the journal as what to put back in the end.

The guests' addresses get into the NIC's filter through a packet socket's memberships (`AddressFilter`), which the
kernel counts and drops with the socket: the same addresses that `bridge fdb add … self` would list, but not one of them
can be left behind, and none that the administrator put there is taken away.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections import Counter

from ..errors import NicError
from . import ethtool
from .journal import Entry, Journal
from .netlink import Link, Namespace, boot_id, get_link, set_up

log = logging.getLogger(__name__)

ADOPTED = frozenset({"link_up", "features"})
JOINING = "rx-gro"
NTUPLE = "rx-ntuple-filter"
VLAN_FILTERING = ("rx-vlan-filter", "rx-vlan-stag-filter")
VLAN_PARSING = ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse")

SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP, PACKET_DROP_MEMBERSHIP = 1, 2
PACKET_MR_PROMISC, PACKET_MR_ALLMULTI, PACKET_MR_UNICAST = 1, 2, 3


def where(ifindex: int) -> dict[str, object]:
    """What says of a journal's entry which interface it is about, and in which namespace and since which boot."""
    namespace = Namespace.current()
    return {
        "ifindex": ifindex,
        "netns_cookie": namespace.cookie,
        "netns_inode": namespace.inode,
        "boot_id": boot_id(),
    }


def adoptable(journal: Journal, ifindex: int) -> list[Entry]:
    """What is pending of the NIC that a new `NicPrep` for it adopts."""
    here = where(ifindex).items()
    return [entry for entry in journal.pending() if entry.kind in ADOPTED and here <= entry.args.items()]


def comes_beside(link: Link) -> bool:
    """Whether VLAN tags can come beside frames whatever the device's features say.

    Into a virtual device a sender on this machine puts such frames, into a bond its ports do. What is written into a
    tap is whole.
    """
    return link.kind not in (None, "tun")


class NicPrep:
    """The changes made to one NIC. `undo()` takes them back, last first."""

    def __init__(self, link: Link, journal: Journal) -> None:
        self.link = link
        self._journal = journal
        self._where = {"iface": link.name, **where(link.index)}
        self._entries = adoptable(journal, link.index)
        self._features = next((entry for entry in self._entries if entry.kind == "features"), None)
        self._before = {name: feature.active for name, feature in ethtool.features(link.name).items()}
        if self._features is not None:
            self._before.update(self._features.args["before"])
        self.warnings: list[str] = []
        self.filters_vlans = False  # it drops frames of VLANs that the host has no device for, unless promiscuous

    def record(self, kind: str, **args: object) -> Entry:
        """Announce a change to this NIC that `undo()` shall take back."""
        entry = self._journal.record(kind, **self._where, **args)
        self._entries.append(entry)
        return entry

    def bring_up(self) -> None:
        if not self.link.up:
            if not any(entry.kind == "link_up" for entry in self._entries):
                self.record("link_up")
            set_up(self.link.index, True)

    def keep_vlan_tags(self) -> bool:
        """Have tagged frames come, and tags left in them.

        A NIC may insist on filtering: see `filters_vlans`. Returns whether tags may come beside frames all the same: a
        NIC may insist on stripping them.
        """
        now = ethtool.features(self.link.name)
        active = [name for name in VLAN_PARSING + VLAN_FILTERING if name in now and now[name].active]
        wanted = {name: False for name in active if now[name].changeable}
        if wanted:
            known = self._features.args["before"] if self._features else {}
            self._note_features({**dict.fromkeys(wanted, True), **known})
            ethtool.set_features(self.link.name, wanted)
            now = ethtool.features(self.link.name)
        stuck = {name for name in active if now[name].active}
        self.filters_vlans = not stuck.isdisjoint(VLAN_FILTERING)
        return comes_beside(self.link) or not stuck.isdisjoint(VLAN_PARSING)

    def allow_ntuple(self) -> str | None:
        """Have the NIC take n-tuple rules. Why it takes none; None: it does."""
        found = ethtool.features(self.link.name).get(NTUPLE)
        if found is None or not (found.active or found.changeable):
            return "the driver has none"
        if not found.active:
            known = self._features.args["before"] if self._features else {}
            self._note_features({NTUPLE: False, **known})
            ethtool.set_features(self.link.name, {NTUPLE: True})
            if not ethtool.features(self.link.name)[NTUPLE].active:
                return f"{NTUPLE} can't be switched on"
        return None

    def keep_frames_apart(self) -> None:
        """For a generic program: the kernel's GRO joins frames before it, and sockets hold frames of the MTU's size.

        To be called between `expect_side_effects` and `note_side_effects`, which have it undone.
        """
        gro = ethtool.features(self.link.name).get(JOINING)
        if gro is not None and gro.active and gro.changeable:
            ethtool.set_features(self.link.name, {JOINING: False})
        elif gro is not None and gro.active:
            self.warnings.append("generic XDP, and GRO can't be switched off: frames that it joins are lost")
        if self.link.local_stack:
            self.warnings.append(
                "generic XDP: frames that a sender on this machine leaves to be cut (TSO) are lost: use native mode or "
                "`--xdp-mode none`, or `ethtool -K PEER tso off gso off` at the other end"
            )

    def set_queues(self, count: int | None) -> int:
        """Returns the number of receive queues, `count` if one is given. Raises NicError."""
        link = self.link
        rx, tx = ethtool.queues(link)
        if count is not None and count != rx:
            self._change_queues(count, rx)
            rx, tx = ethtool.queues(link)
        if rx > tx:
            raise NicError(
                f"interface {link.name}: it receives on {rx} queues and sends on {tx} only: make it as many, with "
                f"`ethtool -L {link.name} rx {tx}`"
            )
        return rx

    def _change_queues(self, count: int, rx: int) -> None:
        link = self.link
        found = ethtool.channels(link)
        most = found.max_receive if found else rx
        if found is None or not 1 <= count <= most:
            raise NicError(
                f"interface {link.name}: {count} queues asked for, and it can have "
                + (f"{rx}, no more and no fewer" if found is None else f"1 to {most}")
            )
        self.record("channels", rx=found.rx, tx=found.tx, combined=found.combined)
        if found.combined:
            ethtool.set_channels(link.name, 0, 0, count)
        else:
            ethtool.set_channels(link.name, count, max(found.tx, min(count, found.max_tx)), 0)

    def expect_side_effects(self) -> None:
        """Before XDP is attached: what could that change?"""
        now = ethtool.features(self.link.name)
        self._note_features({n: was for n, was in self._before.items() if n in now and now[n].changeable})

    def note_side_effects(self) -> None:
        """After XDP is attached: what did that change?"""
        now = ethtool.features(self.link.name)
        changed = {
            name: was
            for name, was in self._before.items()
            if name in now and now[name].changeable and now[name].active != was
        }
        self._note_features(changed)

    def _note_features(self, before: dict[str, bool]) -> None:
        if self._features is not None and before:
            self._journal.amend(self._features, before=before)
        elif self._features is not None:
            self.done(self._features)
            self._features = None
        elif before:
            self._features = self.record("features", before=before)

    def amend(self, entry: Entry, **args: object) -> None:
        self._journal.amend(entry, **args)

    def done(self, entry: Entry) -> None:
        """Undone by whoever made it."""
        self._entries.remove(entry)
        self._journal.done(entry)

    def take_back(self, entry: Entry) -> bool:
        """Undo one change. False: it can't be, and stays in the journal."""
        self._entries.remove(entry)
        return self._journal.undo(entry).ok

    def undo(self) -> None:
        while self._entries:
            self._journal.undo(self._entries.pop())


class AddressFilter:
    """Which frames a NIC accepts on behalf of the guests, held by a packet socket that the caller owns."""

    def __init__(self, sock: socket.socket, ifindex: int, filters_vlans: bool = False) -> None:
        """`filters_vlans`: frames of a VLAN come in promiscuous mode only."""
        self._socket = sock
        self._ifindex = ifindex
        self._filters_vlans = filters_vlans
        self.in_vlans = False  # promiscuous for that reason
        self._refused: Counter[bytes] = Counter()  # by how many guests: in different VLANs, they may have the same

    @property
    def promiscuous(self) -> bool:
        """Whether an address was refused, or the VLAN of one, so that the NIC takes everything."""
        return bool(self._refused) or self.in_vlans

    def accept_multicast(self) -> None:
        self._member(PACKET_ADD_MEMBERSHIP, PACKET_MR_ALLMULTI, b"")

    def accept_vlans(self) -> None:
        """There are guests in VLANs. Raises OSError when promiscuous mode is refused."""
        if self._filters_vlans and not self.in_vlans:
            self._member(PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, b"")
            self.in_vlans = True
            log.info("interface %d: its VLAN filter can't be switched off: promiscuous", self._ifindex)

    def refuse_vlans(self) -> None:
        """There are none any more."""
        if self.in_vlans:
            self.in_vlans = False
            self._drop(PACKET_MR_PROMISC, b"")

    def add(self, mac: bytes) -> None:
        """Raises OSError when even promiscuous mode is refused."""
        try:
            self._member(PACKET_ADD_MEMBERSHIP, PACKET_MR_UNICAST, mac)
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                raise
            log.warning("interface %d: refuses %s in its filter (%s), promiscuous", self._ifindex, mac.hex(":"), exc)
            if not self._refused:
                self._member(PACKET_ADD_MEMBERSHIP, PACKET_MR_PROMISC, b"")
            self._refused[mac] += 1

    def remove(self, mac: bytes) -> None:
        if mac not in self._refused:
            self._drop(PACKET_MR_UNICAST, mac)
            return
        self._refused -= Counter((mac,))
        if not self._refused:
            self._drop(PACKET_MR_PROMISC, b"")

    def _drop(self, kind: int, address: bytes) -> None:
        """A device that is gone has forgotten it already."""
        try:
            self._member(PACKET_DROP_MEMBERSHIP, kind, address)
        except OSError as exc:
            log.debug("interface %d: membership %d of %s is gone: %s", self._ifindex, kind, address.hex(":"), exc)

    def _member(self, option: int, kind: int, address: bytes) -> None:
        request = struct.pack("=iHH8s", self._ifindex, kind, len(address), address)  # struct packet_mreq
        self._socket.setsockopt(SOL_PACKET, option, request)


def prepare(iface: str, journal: Journal) -> NicPrep:
    """Raises NicError when there is no such interface."""
    return NicPrep(get_link(iface), journal)
