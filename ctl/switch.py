# SPDX-License-Identifier: Apache-2.0
"""Control's picture of the switch: which NICs and guests there are, and what of them the workers see.

Theory of operation. The data plane only knows whole snapshots, so every change here (a guest added, a ring started, a
front-end gone) ends in `_publish()`, which describes everything anew. Slots number guests towards the XDP program and
the AF_XDP sockets; the guests' places in a snapshot are their places in `guests`.

A guest arrives in four steps, so that no frame is steered to where nobody looks: sockets, snapshot, steering, and only
then its vhost-user socket (ctl/daemon.py). It leaves in the opposite order.

A `GuestEntry` is what a guest's vhost-user session sees of all this (ctl/vhost/port.py).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import datapath, guest_state
from .addresses import check_addresses
from .capture.ports import PortCapture
from .config import format_mac
from .datapath import (
    Addresses,
    Datapath,
    GuestPort,
    GuestState,
    Memory,
    NicState,
    PacketPort,
    Region,
    Vring,
    Xsk,
)
from .errors import ConfigError, XdpvhostError
from .hostport import HostPort, address_for
from .learning import RESULTS
from .memoryuse import MemoryUse, compute_memory_use
from .pools import Key, Place
from .spec_policy import check_mtu, describe_vlans
from .vhost.errors import ProtocolError, RequestRefused, Violation
from .vhost.wire import DUPLEX_UNKNOWN, SPEED_UNKNOWN, NetState
from .xdp.maps import MAX_MACS, MAX_SLOTS

if TYPE_CHECKING:
    from .config import GuestSpec
    from .links.journal import Journal
    from .nicport import NicPort

log = logging.getLogger(__name__)

F_MTU, F_MAC, F_STATUS, F_MQ, F_LOG_ALL, F_PROTOCOL_FEATURES = (1 << bit for bit in (3, 5, 16, 22, 26, 30))
F_GUEST_ANNOUNCE = 1 << 21
F_SPEED_DUPLEX = 1 << 63
# CTRL_GUEST_OFFLOADS, CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, CTRL_MAC_ADDR, HASH_REPORT, RSS
NEEDS_OUR_CTRL_VQ = sum(1 << bit for bit in (2, 17, 18, 19, 20, 23, 57, 60))
MAX_PAIRS_WITH_CTRL = 127  # SET_VRING_KICK and _CALL have 8 bits for a ring's index, and its would be 256
REQUEST_PERIOD = 0.02  # seconds between two changes of addresses that a guest may ask for


class GuestEntry:
    """One configured guest. Implements DevicePort for its vhost-user sessions."""

    def __init__(self, switch: Switch, slot: int, spec: GuestSpec, nic: NicPort, port: GuestPort) -> None:
        self._switch = switch
        self.slot = slot
        self.place = Place(spec, Addresses(spec.mac))
        self.nic = nic
        self.port = port
        self.worker = slot % switch.dp.workers
        self.uplink = self.worker  # its pairs go on sending where they did when they move: nothing is overtaken
        self.xsks: Sequence[Xsk] = ()
        self.packet: PacketPort | None = None  # without XDP
        self.connected = False
        self.sessions = 0
        self.protocol_errors: Counter[str] = Counter({str(violation): 0 for violation in Violation})
        self.protocol_errors["datapath"] = 0
        self.messages: Counter[tuple[str, str]] = Counter()
        self.features = 0
        self.rings: Mapping[int, Vring] = {}
        self.ctrl: int | None = None
        self._fault_seen = False
        self.next_request = 0.0  # when it may ask for other addresses again
        self.refusal_told = False  # in this session
        self.config_changed: Callable[[], None] = _nobody_to_tell
        self.learning: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))  # what became of addresses that it made up
        self._announced: int | None = None  # acknowledgements there were when an announcement was asked for

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def max_pairs(self) -> int:
        return self.spec.queues

    @property
    def spec(self) -> GuestSpec:
        return self.place.spec

    @property
    def addresses(self) -> Addresses:
        return self.place.addresses

    @property
    def mac(self) -> bytes:
        return self.addresses.mac

    @property
    def listens_to(self) -> frozenset[bytes]:
        """Every address that is steered to it but what it has learned: its SPEC's, too, while it has another."""
        return self.place.macs

    @property
    def net_state(self) -> NetState:
        link = self.nic.link
        return NetState(
            link_up=link.up and not self.place.policy.link_down,
            announce=self._announced is not None and self._announced == self.port.ctrl.announced,
            speed=SPEED_UNKNOWN if link.speed is None else link.speed,
            duplex=DUPLEX_UNKNOWN if link.full_duplex is None else int(link.full_duplex),
        )

    @property
    def mtu(self) -> int:
        return self.nic.mtu

    @property
    def memory_use(self) -> MemoryUse:
        return compute_memory_use(self, self._switch.guests.values())

    @property
    def reconnects(self) -> int:
        """Sessions after the first."""
        return max(0, self.sessions - 1)

    @property
    def device_features(self) -> int:
        offered = datapath.features() | F_MTU | F_MAC | F_STATUS | F_LOG_ALL | F_PROTOCOL_FEATURES | F_SPEED_DUPLEX
        if self.max_pairs > MAX_PAIRS_WITH_CTRL:
            offered &= ~NEEDS_OUR_CTRL_VQ
        return offered if self.max_pairs > 1 else offered & ~F_MQ

    def memory(self, regions: Sequence[Region]) -> Memory:
        return self._switch.dp.memory(self.port, regions)

    def shared(self, address: int, size: int) -> Memory:
        return self._switch.dp.shared(self.port, address, size)

    def inflight_size(self, num: int, packed: bool) -> int:
        return datapath.inflight_size(num, packed)

    def vring(self, mem: Memory, **ring: Any) -> Vring:
        return self._switch.dp.vring(mem, **ring)

    def apply(self, features: int, rings: Mapping[int, Vring], ctrl: int | None) -> None:
        before = self.features, self.rings, self.ctrl
        self.features, self.rings, self.ctrl = features, dict(rings), ctrl
        try:
            self._switch.publish()
        except XdpvhostError:
            self.features, self.rings, self.ctrl = before
            raise
        if ctrl is not None and before[2] is None and features & F_GUEST_ANNOUNCE and self.port.ctrl.adopted:
            # it came from elsewhere, or from our predecessor: the network has to learn where it is now
            self._announced = self.port.ctrl.announced
            self.config_changed()

    def quiesce(self) -> None:
        self._switch.dp.quiesce()

    def save_state(self) -> bytes:
        mac, others = self.addresses
        own = b"" if mac == self.spec.mac else mac
        return guest_state.encode(guest_state.ControlState(self.port.ctrl.pairs, own, others))

    def load_state(self, state: bytes) -> None:
        try:
            loaded = guest_state.decode(state, self.max_pairs)
            wanted = Addresses(loaded.mac or self.spec.mac, loaded.others)
            self._switch.check_addresses(self, wanted)
            self._switch.listen_to(self, wanted)
        except (ValueError, XdpvhostError) as error:
            raise RequestRefused(str(error)) from error
        self.port.set_pairs(loaded.pairs)

    def reset_state(self) -> None:
        self._announced = None
        self._switch.listen_to(self, Addresses(self.spec.mac))
        self.port.reset_ctrl()

    def announce(self, mac: bytes) -> None:
        self.port.announce(mac)

    def attached(self, up: bool) -> None:
        self.connected = up
        self._announced = None
        try:
            self._switch.listen_to(self, Addresses(self.spec.mac))
        except XdpvhostError as exc:
            log.error("guest %r: keeps the addresses that it asked for: %s", self.name, exc)
        if up:
            self.sessions += 1
            self.port.reset()
            self._fault_seen = False
            self.refusal_told = False

    def message(self, request: str, result: str) -> None:
        self.messages[request, result] += 1

    def protocol_error(self, error: ProtocolError) -> None:
        self.protocol_errors[str(error.violation)] += 1

    def new_fault(self) -> str | None:
        """Why the data plane gave this guest up, once."""
        fault = self.port.fault
        code = fault.code
        if code == 0 or code >= datapath.FAULT_MAX or self._fault_seen:
            return None
        self._fault_seen = True
        self.protocol_errors["datapath"] += 1
        ring = "" if fault.ring == datapath.NO_RING else f" (ring {fault.ring}, {fault.detail:#x})"
        return datapath.fault_name(code) + ring


def _nobody_to_tell() -> None:
    pass


def _nothing(_key: Key) -> bool:
    return False


def _others(places: Mapping[GuestEntry, Place], entry: GuestEntry) -> list[frozenset[Key]]:
    """The keys of everybody else."""
    return [place.keys for other, place in places.items() if other is not entry]


class Switch:
    """The guests and NICs of one daemon. For the control thread only."""

    def __init__(self, dp: Datapath) -> None:
        self.dp = dp
        self.guests: dict[str, GuestEntry] = {}
        self.nics: list[NicPort] = []
        self.hosts: dict[NicPort, HostPort] = {}
        self._captures: dict[GuestEntry | NicPort, PortCapture] = {}
        self._new_mtus: set[NicPort] = set()  # with an MTU that the workers and guests don't know yet

    def add_nic(self, nic: NicPort) -> int:
        """Take ownership of an open NIC; its index."""
        self.nics.append(nic)
        self.publish()
        return len(self.nics) - 1

    def add_host_port(self, nic_index: int, name: str, journal: Journal) -> None:
        """Give the host a port among the guests of a NIC. On XdpvhostError nothing has changed."""
        nic = self.nics[nic_index]
        mac = address_for(nic.mac, [host.mac for host in self.hosts.values()])
        self.hosts[nic] = host = HostPort.open(nic, name, mac, self._free_slot(from_end=True), self.dp, journal)
        try:
            self.publish()
            host.steer()
        except BaseException:
            self._forget_host_port(nic)
            raise

    def _forget_host_port(self, nic: NicPort) -> None:
        self.hosts[nic].unsteer()
        host = self.hosts.pop(nic)
        try:
            self.publish()
        except BaseException:
            self.hosts[nic] = host  # the workers still see it
            raise
        host.close()

    def add_guest(self, spec: GuestSpec, nic_index: int = 0) -> GuestEntry:
        """Make a guest's port and sockets and steer its frames there. On XdpvhostError nothing has changed."""
        if spec.name in self.guests:
            raise ConfigError(f"guest {spec.name!r} exists already; remove it first, or choose another name")
        nic = self.nics[nic_index]
        self._check_place(Place(spec, Addresses(spec.mac)), nic)
        slot = self._free_slot()
        entry = GuestEntry(self, slot, spec, nic, self.dp.guest(spec.name, spec.queues, spec.mac))
        losers = self._without_learned(entry.place)
        before = {loser: loser.place for loser in losers}
        try:
            if losers:
                self.move(losers)
            entry.xsks = nic.add_guest(slot, spec.name, entry.place.keys)
            entry.packet = nic.packet_socket(slot)
            self.guests[spec.name] = entry
            self.publish()
            nic.steer(slot)
            self._sort_by_rules(entry)
        except BaseException:
            self._forget(entry)
            self._give_back(before)
            raise
        self._take_from(before)
        return entry

    def remove_guest(self, name: str) -> None:
        """Undo add_guest. The guest's session must have ended."""
        self._forget(self.guests[name])

    def _forget(self, entry: GuestEntry) -> None:
        entry.nic.unsteer(entry.slot)
        if self.guests.pop(entry.name, None) is not None:
            try:
                self.publish()
            except BaseException:
                self.guests[entry.name] = entry  # the workers still see it
                raise
        entry.nic.remove_guest(entry.slot)
        entry.port.close()
        self._captures.pop(entry, None)

    def _free_slot(self, *, from_end: bool = False) -> int:
        taken = {entry.slot for entry in self.guests.values()} | {host.slot for host in self.hosts.values()}
        for slot in reversed(range(MAX_SLOTS)) if from_end else range(MAX_SLOTS):
            if slot not in taken:
                return slot
        raise ConfigError(f"there are {MAX_SLOTS} guests and host ports already, which is the most; remove one first")

    def publish(self) -> None:
        """Show the workers everything as it is now; when it returns they have forgotten the rest."""
        guests: list[GuestState] = []
        for entry in self.guests.values():
            guests.append(
                GuestState(
                    port=entry.port,
                    nic=self.nics.index(entry.nic),
                    worker=entry.worker,
                    uplink=entry.uplink,
                    max_pairs=entry.max_pairs,
                    xsks=entry.xsks,
                    packet=entry.packet,
                    rings=entry.rings,
                    features=entry.features,
                    ctrl=entry.ctrl,
                    policy=entry.place.policy,
                    capture=self.captured(entry).native,
                )
            )
        macs = b"".join([entry.place.packed(index) for index, entry in enumerate(self.guests.values())])
        nics = [
            NicState(nic.queues, nic.mcast, nic.mtu, nic.taps, capture=self.captured(nic).native) for nic in self.nics
        ]
        for index, nic in enumerate(self.nics):
            if host := self.hosts.get(nic):
                nics[index] = replace(nics[index], host=host.tapq, host_xsks=host.xsks, host_packet=host.packet)
                macs += host.packed(index)
        self.dp.publish(guests, nics, macs)

    def assign(self, workers: Mapping[GuestEntry, int]) -> None:
        """Give guests other workers, in one publication, which holds all of them: no frame is lost or overtaken.

        Raises XdpvhostError, and then nothing has changed.
        """
        before = {entry: entry.worker for entry in workers}
        try:
            for entry, worker in workers.items():
                entry.worker = worker
            self.publish()
        except BaseException:
            for entry, worker in before.items():
                entry.worker = worker
            raise

    def captured(self, port: GuestEntry | NicPort) -> PortCapture:
        """What is captured of a guest or of a NIC; ctl/capture/ports.py changes it."""
        return self._captures.setdefault(port, PortCapture())

    # ---- what guests ask for

    def serve_requests(self) -> float | None:
        """Answer guests that ask for other addresses; seconds until the next one's turn, None when nobody waits."""
        now = time.monotonic()
        soonest: float | None = None
        for entry in list(self.guests.values()):
            if not entry.port.asks_for_addresses:
                continue
            if entry.next_request > now:
                soonest = min(soonest or entry.next_request, entry.next_request)
                continue
            entry.next_request = now + REQUEST_PERIOD
            self._serve_request(entry)
        return None if soonest is None else soonest - now

    def _serve_request(self, entry: GuestEntry) -> None:
        """A request that was taken is answered, whatever goes wrong: until then the guest can make no other one."""
        wanted, before = entry.port.asked_addresses(), entry.addresses
        if wanted is None:
            return
        granted = False
        try:
            self.check_addresses(entry, wanted)
            self.listen_to(entry, wanted)
            granted = True
        except XdpvhostError as exc:
            level = logging.DEBUG if entry.refusal_told else logging.WARNING  # a guest may ask 50 times a second
            log.log(level, "guest %r: refused another address: %s", entry.name, exc)
            entry.refusal_told = True
        except Exception:
            log.exception("guest %r: refused another address, by a bug in xdpvhost; please report it", entry.name)
        if entry.port.answer_addresses(granted):
            if granted:
                log.info("guest %r: listens to %s", entry.name, ", ".join(map(format_mac, sorted(entry.listens_to))))
        else:
            try:
                self.listen_to(entry, before)
            except XdpvhostError as exc:
                log.error("guest %r: keeps addresses that it gave up waiting for: %s", entry.name, exc)

    def others(self, entry: GuestEntry) -> list[GuestEntry]:
        return [other for other in self.guests.values() if other is not entry]

    def check_addresses(self, entry: GuestEntry, wanted: Addresses) -> None:
        """Raises ConfigError for addresses that a guest may not have when it asks for them."""
        check_addresses(entry, wanted, self.others(entry), self.hosts.values())

    def listen_to(self, entry: GuestEntry, addresses: Addresses) -> None:
        """Steer these addresses, and its SPEC's, to a guest. Raises XdpvhostError, and then nothing has changed."""
        if addresses != entry.addresses:
            self.move({entry: replace(entry.place, addresses=addresses)})

    # ---- what is changed while guests run

    def change_guest(self, name: str, spec: GuestSpec) -> GuestEntry:
        """Give a guest the pool and policy of another SPEC, with the same name, MAC and queues.

        Its session goes on. Raises XdpvhostError, and then nothing has changed.
        """
        entry = self.guests[name]
        place = replace(entry.place, spec=spec)
        if spec.mac_change == "deny" and entry.spec.mac_change == "allow":
            place = replace(place, addresses=Addresses(spec.mac))  # what it was granted is not its own any more
        self._check_place(place, entry.nic, entry)
        may = place.may_learn if place.policy.learn else _nothing
        place = replace(place, learned=frozenset(filter(may, place.learned)))
        link = entry.net_state.link_up
        losers = self._without_learned(place, entry)
        before, mine = {loser: loser.place for loser in losers}, {entry: entry.place}
        self.move({entry: place, **losers})
        self._forget_lost(mine)
        self._take_from(before)
        if entry.net_state.link_up != link:
            entry.config_changed()
        return entry

    def move(self, places: Mapping[GuestEntry, Place]) -> None:
        """Give guests other places, in one publication: what is new is steered before it, what is old no more after it.

        A key that goes from one guest to another is nobody's meanwhile. Raises XdpvhostError, and then nothing has
        changed.
        """
        before = {entry: entry.place for entry in places}
        kept = {entry: entry.place.keys.difference(*_others(places, entry)) for entry in places}

        def steer(keys: Mapping[GuestEntry, frozenset[Key]]) -> None:
            for entry, wanted in keys.items():
                entry.nic.set_keys(entry.slot, wanted)

        try:
            steer({entry: kept[entry] for entry in places if kept[entry] != before[entry].keys})
            steer({entry: kept[entry] | place.keys for entry, place in places.items() if place.keys - kept[entry]})
            for entry, place in places.items():
                entry.place = place
            self.publish()
        except BaseException:
            for entry, place in before.items():
                entry.place = place
            steer(kept)
            steer({entry: place.keys for entry, place in before.items()})
            raise
        steer({entry: place.keys for entry, place in places.items() if before[entry].keys - place.keys})
        for entry, place in places.items():
            if place.configured != before[entry].configured:
                self._sort_by_rules(entry)

    @staticmethod
    def _sort_by_rules(entry: GuestEntry) -> None:
        """The NIC brings what is configured to one queue; RSS spreads what has several pairs to go to."""
        entry.nic.sort_by_rules(entry.slot, entry.place.of_spec if entry.max_pairs == 1 else ())

    @staticmethod
    def _forget_lost(before: Mapping[GuestEntry, Place]) -> int:
        """Tell the data plane what these guests have no longer learned, as against `before`; how many that are."""
        count = 0
        for entry, place in before.items():
            for vlan, mac in place.learned - entry.place.learned:
                entry.port.forget(mac, vlan)
                count += 1
        return count

    def _take_from(self, losers: Mapping[GuestEntry, Place]) -> None:
        """`losers` had these places before somebody was given what they had learned: that is counted."""
        for entry, place in losers.items():
            entry.learning["taken"] += self._forget_lost({entry: place})

    def _give_back(self, losers: Mapping[GuestEntry, Place]) -> None:
        """They have these places again: who was to get what they had learned has failed. Never raises."""
        if places := {entry: place for entry, place in losers.items() if entry.place is not place}:
            try:
                self.move(places)
            except (XdpvhostError, OSError) as exc:
                log.error("learned addresses are not given back, and will be learned again: %s", exc)

    def room(self, nic: NicPort) -> int:
        """How many more keys the guests of a NIC may have. Its host port has some, too."""
        host = self.hosts.get(nic)
        taken = len(host.keys) if host else 0
        return MAX_MACS - taken - sum(len(entry.place.keys) for entry in self.guests.values() if entry.nic is nic)

    def _check_place(self, place: Place, nic: NicPort, entry: GuestEntry | None = None) -> None:
        """Raises ConfigError for a pool that meets another, or that there is no room for, or limits below one frame.

        `entry` is the guest that is to have it, if it is there already.
        """
        spec = place.spec
        check_mtu(spec, nic.mtu, entry.place.spec if entry is not None else None)
        keys = len(place.configured)
        for host in self.hosts.values():
            if host.mac in place.macs:
                raise ConfigError(
                    f"guest {spec.name!r}: {format_mac(host.mac)} is the address of host port {host.name}; give it "
                    "another"
                )
            if host.nic is nic:
                keys += len(host.keys)
        for other in self.guests.values():
            if other is entry:
                continue
            if met := place.meets(other.place):
                raise ConfigError(
                    f"guest {spec.name!r}: guest {other.name!r} listens to {format_mac(min(met))}; give each its own"
                )
            if other.nic is nic:
                keys += len(other.place.keys)
        if keys > MAX_MACS:
            raise ConfigError(
                f"guest {spec.name!r}: {len(place.macs)} addresses in {describe_vlans(place.policy)} take "
                f"{len(place.configured)} entries of the XDP program's table, and {keys - len(place.configured)} of "
                f"{MAX_MACS} are taken; give it a shorter trunk=, fewer macs=, or neither vlan= nor trunk=, which "
                "takes two entries an address"
            )

    def _without_learned(self, place: Place, entry: GuestEntry | None = None) -> dict[GuestEntry, Place]:
        """What becomes of guests that have learned an address which `place` is to have: what is configured comes first.

        `entry` is the guest that is to have it, if it is there already.
        """
        losers: dict[GuestEntry, Place] = {}
        for other in self.guests.values():
            if other is not entry and (lost := {key for key in other.place.learned if place.covers(key)}):
                losers[other] = replace(other.place, learned=other.place.learned - lost)
        return losers

    def _changed(self, follow: Callable[[NicPort], bool]) -> list[NicPort]:
        """The NICs of which `follow` says so. One that it fails for keeps no other from being followed."""
        changed: list[NicPort] = []
        for nic in self.nics:
            try:
                if follow(nic):
                    changed.append(nic)
            except (XdpvhostError, OSError) as exc:
                log.error("interface %s: %s", nic.iface, exc)
            except Exception:
                log.exception("interface %s: its MTU or link is not known; please report it", nic.iface)
        return changed

    def follow_links(self) -> None:
        """Tell the guests of NICs whose carrier or speed has changed."""
        changed = self._changed(lambda nic: nic.follow_link())
        for host in self.hosts.values():
            host.follow()
        for entry in self.guests.values():
            if entry.nic in changed:
                entry.config_changed()

    def follow_mtus(self) -> None:
        """Devices whose MTU has changed: what guests may send from now on.

        Raises XdpvhostError; the next call tries again.
        """
        self._new_mtus.update(self._changed(lambda nic: nic.follow_mtu()))
        if self._new_mtus:
            self.publish()
            changed, self._new_mtus = self._new_mtus, set()
            for entry in self.guests.values():
                if entry.nic in changed:
                    entry.config_changed()

    def faulted(self) -> list[tuple[GuestEntry, str]]:
        """Guests that the data plane gave up since the last call, and why."""
        return [(entry, why) for entry in self.guests.values() if (why := entry.new_fault()) is not None]

    def close(self) -> None:
        """Remove the guests, give the NICs back, also when the former fails. Every session must have ended."""
        nics = self.nics
        with ExitStack() as stack:
            for nic in nics:
                stack.callback(nic.close)
            try:
                for name in list(self.guests):
                    self.remove_guest(name)
                for nic in list(self.hosts):
                    self._forget_host_port(nic)
                self.nics = []
                self.publish()
            except BaseException:
                self.dp.close()  # the workers may still see the NICs
                raise
