# SPDX-License-Identifier: Apache-2.0
"""A NIC that serves guests and stays the kernel's own.

Theory of operation
-------------------
`Nic.open` takes these steps, and `close` takes them back in reverse; both go through one ExitStack, so that a failure
at any step leaves the NIC as it was:

1. Look: does it exist, is nobody else's XDP program on it, does its MTU fit.
2. Prepare (ctl/links/nicprep.py): up, VLAN tags left in frames, queue count. Journalled.
3. Attach the XDP program, still passing everything (ctl/xdp/program.py). Journalled.
4. A packet socket for broadcast and multicast, which also holds the guests' addresses in the NIC's filter; and one
   that sends guests' GSO frames, if the NIC takes such (ctl/xdp/gsosock.py).
5. For every receive queue: frames, rings, the base socket that sends (ctl/xdp/xsk.py), and the data plane's `Nicq`.

A guest comes and goes in two steps each, with the caller's publication to the workers between them:

    add_guest   -> sockets, nothing arrives     | publish with them    | steer   -> frames arrive
    unsteer     -> no more frames arrive        | publish without them | remove_guest -> sockets closed

So no frame is redirected to a socket that no worker reads, and no worker reads a socket that is closed.

Who owns what: the Nic owns its descriptors, mappings, BPF object, Nicq, Xsk and PacketPort objects. `close` may only be
called when the last publication no longer has any of them.

What it doesn't do: follow changes of the queue count, or a device that is removed and comes back.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

from .. import privileges
from ..datapath import NICQ_PARTIAL_CSUM, NICQ_SG, NICQ_TX_CSUM, Datapath, Nicq, NicqConf, PacketPort, Tapq, Xsk
from ..errors import NicError
from ..links import ethtool
from ..links.journal import Entry, Journal
from ..links.netdev import device_features
from ..links.netlink import Link, device_mtu, get_link, link_name
from ..links.nicprep import AddressFilter, NicPrep
from ..links.ntuple import OwnRules
from . import gsosock, libxdp, tags
from .maps import MAX_QUEUES, MAX_SLOTS, VLAN_ANY, VLAN_NONE
from .packet import GROUPS, PacketSocket, Program, addressed_to
from .program import PROGRAM, SteerProgram, refuse_occupied
from .rules import GuestRules
from .umem import RX_FRAMES, TX_FRAMES, Framing, checksums_here, framing_for, lift_memlock_limit, too_large
from .xsk import GuestSocket, QueueSockets, SeveralPiecesRefused, close_together

log = logging.getLogger(__name__)

Native = TypeVar("Native", Nicq, PacketPort)

# Drivers of physical-looking devices whose other end is a local stack all the same.
_LOCAL_STACK_DRIVERS = frozenset({"virtio_net", "xen_netfront"})


@dataclass(frozen=True)
class NicOptions:
    """What the user asked for. `queues`: receive queues, None for as many as the NIC has."""

    iface: str
    xdp_mode: str = "auto"
    bind: str = "auto"
    ntuple: str = "off"
    queues: int | None = None


@dataclass(frozen=True)
class NicFacts:
    """What is in use, beside what was asked for."""

    iface: str
    ifindex: int
    driver: str
    mac: str
    mtu: int
    queues: int
    xdp_asked: str
    xdp_in_use: str
    dispatcher: bool
    dispatcher_detail: str
    program_id: int
    bind_asked: str
    bind_in_use: str  # zerocopy or copy; mixed where the queues differ
    chunk: int  # bytes a frame, or a piece of one
    several_pieces: bool  # larger frames have several (XDP_USE_SG)
    umem_bytes: int  # a queue
    hugepages: str  # hugetlb, transparent or normal; mixed where the queues differ
    tx_checksums: str  # who finishes those that guests leave open: device, or copy: and why
    partial_checksums: bool  # local stacks send into it
    vlan_tags: str  # where they are seen
    ntuple_rules: str  # how many are in hardware, and why not more
    warnings: tuple[str, ...]


@dataclass
class _Guest:
    name: str
    keys: frozenset[tuple[int, bytes]]
    sockets: list[GuestSocket]
    xsks: list[Xsk]
    packets: PacketSocket | None = None  # without XDP: where its frames come instead, and the data plane's side of it
    heard: PacketPort | None = None
    undo_steering: ExitStack = field(default_factory=ExitStack)
    steered: set[tuple[int, bytes]] = field(default_factory=set)  # what of the keys is in the XDP program's table
    accepted: set[bytes] = field(default_factory=set)  # what is in the NIC's filter for it

    @property
    def macs(self) -> set[bytes]:
        return {mac for _, mac in self.keys}


def _in_vlan(keys: Collection[tuple[int, bytes]]) -> bool:
    return any(VLAN_NONE < vlan < VLAN_ANY for vlan, _ in keys)


def _addressed_to(guest: _Guest) -> Program:
    return addressed_to(sorted(guest.macs))


class Nic:
    """One NIC with its guests, by slot. For the control thread only."""

    def __init__(self, options: NicOptions, link: Link, dp: Datapath) -> None:
        self.options = options
        self.iface = link.name
        self.ifindex = link.index
        self.mtu = self._device_mtu = link.mtu
        self._mac = link.mac
        self.link = ethtool.LinkState()
        self.gone = False
        self.queues: list[Nicq] = []
        self.taps: list[Tapq] = []  # none: NIC queues
        self.mcast: PacketPort | None = None
        self.facts: NicFacts
        self._dp = dp
        self._stack = ExitStack()
        self._sockets: list[QueueSockets] = []
        self._guests: dict[int, _Guest] = {}
        self._gso, self._gso_fd = 0, -1
        self._framing: Framing
        self._program: SteerProgram | None = None  # None: --xdp-mode none
        self._tags = tags.BOTH  # as packet sockets have it
        self._filter: AddressFilter
        self._rules: GuestRules

    @classmethod
    def open(cls, options: NicOptions, dp: Datapath, journal: Journal) -> Self:
        """Prepare the NIC and attach to it; no guest's frames are steered yet.

        Raises NicError or PrivilegeError, and then the NIC is as it was.
        """
        privileges.require("up", privileges.UP)
        libxdp.refuse_missing()
        lift_memlock_limit()
        nic = cls(options, get_link(options.iface), dp)
        try:
            nic._open(journal)
        except OSError as exc:
            nic.close()
            raise NicError(f"interface {options.iface}: {exc.strerror or exc}") from exc
        except BaseException:
            nic.close()
            raise
        return nic

    @staticmethod
    def refuse(options: NicOptions) -> None:
        """Raise what `open` would, as far as looking tells it: before another interface is changed for nothing."""
        link = get_link(options.iface)
        try:
            refuse_occupied(link.index, link.name)
        except OSError as exc:
            raise NicError(f"interface {options.iface}: {exc.strerror or exc}") from exc
        framing_for(link.mtu)

    @property
    def mac(self) -> bytes:
        return self._mac

    @property
    def nr_queues(self) -> int:
        return len(self.queues)

    @property
    def umem_bytes(self) -> int:
        return sum(sockets.memory.size for sockets in self._sockets)

    @property
    def promiscuous(self) -> bool:
        """Whether the NIC's filter refused a guest's address, so that it takes everything."""
        return self._filter.promiscuous

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- opening and closing

    def _open(self, journal: Journal) -> None:
        link = get_link(self.iface)
        refuse_occupied(self.ifindex, self.iface)
        device = device_features(self.ifindex)
        checksums_why = checksums_here(device)
        self._framing = replace(framing_for(self.mtu), tx_metadata=checksums_why is None)

        prep = NicPrep(link, journal)
        self._stack.callback(prep.undo)
        prep.bring_up()
        tags_beside = prep.keep_vlan_tags()
        nr_queues = prep.set_queues(self.options.queues)
        if nr_queues > MAX_QUEUES:
            raise NicError(
                f"interface {self.iface}: it has {nr_queues} receive queues and at most {MAX_QUEUES} are supported: "
                f"`ethtool -L {self.iface} combined {MAX_QUEUES}`"
            )
        self._rules = self._open_rules(prep, nr_queues)
        if self.options.xdp_mode != "none":
            self._attach(prep, nr_queues, tags_beside, tags.refusal(device))
            prep.note_side_effects()
        self.link = ethtool.link_state(self.iface)

        groups = PacketSocket(self.iface)
        self._stack.callback(groups.close)
        groups.listen(GROUPS)
        self._filter = AddressFilter(groups.socket, self.ifindex, prep.filters_vlans)
        self._filter.accept_multicast()
        driver = link.kind or ethtool.driver(self.iface) or "unknown"
        partial = link.local_stack or driver in _LOCAL_STACK_DRIVERS
        # A generic program, or none, has no business with a driver's zero-copy path, which would bypass it.
        native = self._program is not None and self._program.mode == "native"
        bind = "copy" if not native and self.options.bind == "auto" else self.options.bind
        self._open_gso(link)
        for queue in range(nr_queues):
            self._open_queue(queue, bind, partial)
        self.mcast = self._owned(self._dp.packet_port(groups.socket.fileno()))
        self.facts = self._facts(link, driver, partial, checksums_why, prep.warnings)

    def _open_rules(self, prep: NicPrep, nr_queues: int) -> GuestRules:
        """Switching such rules on may take the link down for a moment, so it is done before there are guests."""
        if self.options.ntuple == "off":
            return GuestRules(self.iface, None, "off", nr_queues)
        if self.options.xdp_mode == "none":
            why_none: str | None = "without XDP all queues are alike"
        elif nr_queues == 1:
            why_none = "there is one queue"
        else:
            why_none = prep.allow_ntuple()
        return GuestRules(self.iface, None if why_none else OwnRules(prep), f"none: {why_none}", nr_queues)

    def _attach(self, prep: NicPrep, nr_queues: int, tags_beside: bool, tags_refusal: str | None) -> None:
        """The journal's entry comes first, and learns the program's id afterwards."""
        prep.expect_side_effects()
        entry = prep.record("xdp", name=PROGRAM)
        try:
            program = SteerProgram.attach(
                self.ifindex,
                self.iface,
                self.options.xdp_mode,
                nr_queues,
                self._framing.several,
                tags_beside=tags_beside and tags_refusal is None,
            )
        except BaseException:
            prep.done(entry)  # not undone by name: what is on the NIC by now may be another xdpvhost's
            raise
        self._stack.callback(self._detach, prep, entry, program)
        prep.amend(entry, program_id=program.program_id)
        self._program = program
        if program.native_refusal is not None:
            prep.warnings.append(f"generic XDP is slower; {program.native_refusal}")
        if program.mode == "generic":
            prep.keep_frames_apart()
        if program.sees_tags_beside:
            self._tags = tags.BOTH
        elif tags_beside:
            self._tags = tags.UNSEEN
            prep.warnings.append(tags.warning(prep.link, program.tags_refusal or tags_refusal or "unknown"))
        else:
            self._tags = tags.IN_FRAMES

    def _detach(self, prep: NicPrep, entry: Entry, program: SteerProgram) -> None:
        """What can't be detached stays in the journal, and `prep` tries once more."""
        if not program.close():
            return
        try:
            prep.done(entry)
        except OSError as exc:
            log.error("interface %s: the XDP program is detached, which cannot be noted: %s", self.iface, exc)

    def _open_gso(self, link: Link) -> None:
        """All queues share the socket: it takes a frame to the device in the call, whichever worker makes it."""
        self._gso = gsosock.takes(link)
        if self._gso:
            sock = gsosock.gso_socket(self.iface)
            self._stack.callback(sock.close)
            self._gso_fd = sock.fileno()

    def _open_queue(self, queue: int, bind: str, partial: bool) -> None:
        try:
            sockets = QueueSockets(self.iface, queue, self._framing, bind)
        except SeveralPiecesRefused as exc:
            raise too_large(self.iface, self.mtu, str(exc)) from exc
        self._stack.callback(sockets.close)
        self._sockets.append(sockets)
        conf = NicqConf(
            umem=sockets.memory.address,
            umem_size=sockets.memory.size,
            chunk=self._framing.chunk,
            rx_frames=RX_FRAMES,
            tx_frames=TX_FRAMES,
            flags=(NICQ_PARTIAL_CSUM if partial else 0)
            | (NICQ_SG if self._framing.several else 0)
            | (NICQ_TX_CSUM if sockets.tx_metadata else 0),
            fill=sockets.fill,
            comp=sockets.completion,
            tx=sockets.tx,
            fd=sockets.fd,
            queue=queue,
            gso=0 if sockets.zerocopy else self._gso,
            gso_fd=self._gso_fd,
        )
        self.queues.append(self._owned(self._dp.nicq(conf)))

    def _owned(self, thing: Native) -> Native:
        self._stack.callback(thing.close)
        return thing

    def _facts(
        self, link: Link, driver: str, partial: bool, checksums_why: str | None, warnings: Sequence[str]
    ) -> NicFacts:
        if checksums_why is None and not all(s.tx_metadata for s in self._sockets):
            checksums_why = "the kernel refuses metadata before frames"
        modes = {"zerocopy" if s.zerocopy else "copy" for s in self._sockets}
        pages = {s.memory.pages for s in self._sockets}
        program = self._program
        return NicFacts(
            iface=self.iface,
            ifindex=self.ifindex,
            driver=driver,
            mac=link.mac.hex(":"),
            mtu=self.mtu,
            queues=self.nr_queues,
            xdp_asked=self.options.xdp_mode,
            xdp_in_use=program.mode if program else "none",
            dispatcher=program.dispatcher if program else False,
            dispatcher_detail=program.dispatcher_detail if program else "no XDP program",
            program_id=program.program_id if program else 0,
            bind_asked=self.options.bind,
            bind_in_use=modes.pop() if len(modes) == 1 else "mixed",
            chunk=self._framing.chunk,
            several_pieces=self._framing.several,
            umem_bytes=self._sockets[0].memory.size,
            hugepages=pages.pop() if len(pages) == 1 else "mixed",
            tx_checksums=f"copy: {checksums_why}" if checksums_why else "device",
            partial_checksums=partial,
            vlan_tags=self._tags,
            ntuple_rules=str(self._rules),
            warnings=tuple(warnings),
        )

    def close(self) -> None:
        """Undo everything: the NIC is exactly as it was before `open`. Idempotent; logs what it can't undo."""
        self._remove(list(self._guests))
        self._stack.close()
        self.queues.clear()
        self._sockets.clear()
        self.mcast = None

    # ---- guests

    def add_guest(self, slot: int, name: str, keys: Collection[tuple[int, bytes]]) -> list[Xsk]:
        """Sockets for a guest on every queue. `keys` are (VLAN, address), VLAN 0 for untagged and 0xffff for any tag.

        Without XDP there are none, but a packet socket: packet_socket().

        Raises NicError, and then nothing of it is left.
        """
        if not 0 <= slot < MAX_SLOTS or slot in self._guests:
            raise NicError(f"interface {self.iface}: slot {slot} for guest {name!r} is taken or not below {MAX_SLOTS}")
        self._refuse_own(name, keys)
        with ExitStack() as undo, self._changing(name):
            guest = _Guest(name, frozenset(keys), [], [])
            if self._program is None:
                guest.packets = PacketSocket(self.iface)
                undo.callback(guest.packets.close)
                guest.heard = self._dp.packet_port(guest.packets.socket.fileno())
                undo.callback(guest.heard.close)
            for queue, owner in enumerate(self._sockets if self._program else ()):
                sock = owner.guest()
                undo.callback(sock.close)
                guest.sockets.append(sock)
                xsk = self._dp.xsk(self.queues[queue], sock.ring, sock.fd)
                undo.callback(xsk.close)
                guest.xsks.append(xsk)
            if self._program:
                self._program.maps.zero(slot)
            undo.pop_all()
        self._guests[slot] = guest
        return list(guest.xsks)

    def packet_socket(self, slot: int) -> PacketPort | None:
        """Where a guest's frames arrive without XDP."""
        return self._guests[slot].heard

    def steer(self, slot: int) -> None:
        """Let a guest's frames in. Once the workers read its sockets. Raises NicError, and then none come in."""
        guest = self._guests[slot]
        guest.undo_steering.close()
        with ExitStack() as undo, self._changing(guest.name):
            if self._program:
                for queue, sock in enumerate(guest.sockets):
                    self._program.maps.set_socket(slot, queue, sock.fd)
                    undo.callback(self._quietly, self._program.maps.clear_socket, slot, queue)
            undo.callback(self._drop_keys, guest, keep=frozenset())
            self._add_keys(slot)
            if guest.packets:
                guest.packets.listen(_addressed_to(guest))
                undo.callback(self._quietly, guest.packets.silence)
            guest.undo_steering = undo.pop_all()

    def set_keys(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        """Steer frames with these keys to the guest, and no others, from now on.

        Raises NicError, and then nothing has changed.
        """
        guest = self._guests[slot]
        self._refuse_own(guest.name, keys)
        before, guest.keys = guest.keys, frozenset(keys)
        try:
            with self._changing(guest.name):
                self._add_keys(slot)
                if guest.packets:
                    guest.packets.listen(_addressed_to(guest))
        except BaseException:
            guest.keys = before
            raise
        finally:
            self._drop_keys(guest, keep=guest.keys)

    def _refuse_own(self, name: str, keys: Collection[tuple[int, bytes]]) -> None:
        if any(mac == self._mac for _, mac in keys):
            raise NicError(
                f"guest {name!r}: {self._mac.hex(':')} is the address of {self.iface} itself: give it another"
            )

    def _add_keys(self, slot: int) -> None:
        """What of the guest's keys is missing. Raises NicError or OSError; the caller drops what there is by then."""
        guest, maps = self._guests[slot], self._program.maps if self._program else None
        if _in_vlan(guest.keys):
            self._filter.accept_vlans()
        for mac in sorted(guest.macs - guest.accepted):
            self._filter.add(mac)
            guest.accepted.add(mac)
        for vlan, mac in sorted(guest.keys - guest.steered):
            if maps is not None:
                if maps.owner(vlan, mac) not in (None, slot):
                    raise NicError(f"guest {guest.name!r}: {mac.hex(':')} is another guest's in VLAN {vlan}")
                maps.set_mac(vlan, mac, slot)
            guest.steered.add((vlan, mac))

    def _drop_keys(self, guest: _Guest, keep: frozenset[tuple[int, bytes]]) -> None:
        for vlan, mac in guest.steered - keep:
            if self._program:
                self._quietly(self._program.maps.clear_mac, vlan, mac)
            guest.steered.discard((vlan, mac))
        for mac in guest.accepted - {mac for _, mac in keep}:
            self._filter.remove(mac)
            guest.accepted.discard(mac)
        if self._filter.in_vlans and not any(_in_vlan(guest.steered) for guest in self._guests.values()):
            self._filter.refuse_vlans()

    def sort_by_rules(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        """Have the NIC bring frames with these keys to the guest's own queue, and no others, as far as it can."""
        self._rules.set(slot, keys)
        self.facts = replace(self.facts, ntuple_rules=str(self._rules))

    def unsteer(self, slot: int) -> None:
        """No more of its frames come in: they are the kernel's again. Before a publication without its sockets."""
        if slot in self._guests:
            self._rules.drop(slot)
            self.facts = replace(self.facts, ntuple_rules=str(self._rules))
            self._guests[slot].undo_steering.close()

    def remove_guest(self, slot: int) -> None:
        """Close its sockets. After a publication without them."""
        self._remove([slot])

    def _remove(self, slots: Sequence[int]) -> None:
        guests = [guest for slot in slots if (guest := self._guests.pop(slot, None)) is not None]
        for guest in guests:
            guest.undo_steering.close()
            for xsk in guest.xsks:
                xsk.close()
            if guest.heard:
                guest.heard.close()
            if guest.packets:
                guest.packets.close()
        close_together([sock for guest in guests for sock in guest.sockets])

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """Names the guest in what the kernel refuses."""
        try:
            yield
        except OSError as exc:
            if exc.errno == errno.E2BIG:
                raise NicError(f"guest {name!r}: the XDP program has no room for another address") from exc
            raise NicError(f"guest {name!r}: interface {self.iface} can't be set up: {exc.strerror}") from exc

    def _quietly(self, change: Callable[..., object], *args: object) -> None:
        try:
            change(*args)
        except OSError as exc:
            log.error("interface %s: %s", self.iface, exc)

    # ---- the device's link and MTU

    def follow_link(self) -> bool:
        """Look at carrier, speed and duplex; whether they changed."""
        name = link_name(self.ifindex)
        before = self.link
        self.link = ethtool.LinkState(up=False) if name is None else ethtool.link_state(name)
        if name is None and not self.gone:
            self.gone = True
            log.error(
                "interface %s: it is gone; its guests reach only each other; `xdpvhost down` and `up` when it is back",
                self.iface,
            )
        elif self.link.up != before.up:
            log.info("interface %s: carrier %s", self.iface, "is there" if self.link.up else "is lost")
        return self.link != before

    def follow_mtu(self) -> bool:
        """Take over the device's MTU as it is now, as far as the frames in use hold it; whether that changed ours.

        Frames that are too large for them never come: the driver or the kernel's copy drops them (rx_dropped).
        """
        name = link_name(self.ifindex)
        now = device_mtu(name) if name is not None else None
        if now is None or now == self._device_mtu:
            return False
        self._device_mtu = now
        usable = min(now, self._framing.largest_mtu)
        if usable < now:
            log.warning(
                "interface %s: its MTU is now %d, and the frames in use hold %d: larger ones are dropped until "
                "xdpvhost is started again",
                self.iface, now, usable,
            )  # fmt: skip
        else:
            log.info("interface %s: its MTU is now %d", self.iface, now)
        changed = usable != self.mtu
        self.mtu = usable
        self.facts = replace(self.facts, mtu=usable)
        return changed

    # ---- counters

    def verdicts(self) -> dict[tuple[int | None, int, str], int]:
        """(slot, queue, verdict) -> frames since the guest was added; slot None is the host."""
        return self._program.maps.verdicts(sorted(self._guests)) if self._program else {}

    def xsk_statistics(self) -> dict[tuple[int | None, int], dict[str, int]]:
        """(slot, queue) -> the kernel's six XDP_STATISTICS; slot None is the socket that sends."""
        found: dict[tuple[int | None, int], dict[str, int]] = {}
        for queue, owner in enumerate(self._sockets):
            found[None, queue] = owner.statistics()
        for slot, guest in self._guests.items():
            for queue, sock in enumerate(guest.sockets):
                found[slot, queue] = sock.statistics()
        return found
