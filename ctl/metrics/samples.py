# SPDX-License-Identifier: Apache-2.0
"""All counters of a running daemon as one stream of samples: what /metrics and `xdpvhost stats` both show.

Theory of operation. Counters are 64-bit words in native memory with one writer each; reading one needs no lock. What
does need one is that their owners stay: a guest that is removed while its counters are being read would leave a pointer
to freed memory. So the daemon holds `Counters.lock` whenever it adds or removes guests or NICs, and `read()` holds it
from the first sample to the last. A scrape runs in a thread of its own; the event loop waits for it at most when a
guest is added or removed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .. import __version__
from ..config import HOST_PORT_LABEL
from ..datapath import ABI, CTRL_NAMES, DROP_NAMES, RxCounters, TapqCounters, TxCounters
from ..learning import RESULTS
from ..xdp.maps import GUEST_VERDICTS, HOST_VERDICTS
from . import declared as m
from .declared import Sample

if TYPE_CHECKING:
    from ..capture.ports import PortCapture
    from ..datapath import Datapath
    from ..hostport import HostPort
    from ..nicport import NicPort
    from ..switch import GuestEntry, Switch


class Counters:
    """The one reader of every counter; see the theory of operation above."""

    def __init__(self, dp: Datapath, switch: Switch) -> None:
        self.lock = threading.Lock()
        self._dp = dp
        self._switch = switch
        self._open = True

    def read(self) -> list[Sample]:
        """All samples, grouped by nothing in particular. Empty after close()."""
        with self.lock:
            return list(self._samples()) if self._open else []

    def close(self) -> None:
        """Read nothing any more: the native objects are about to be freed."""
        with self.lock:
            self._open = False

    def _samples(self) -> Iterator[Sample]:
        yield Sample(m.BUILD_INFO, (__version__, str(ABI)), 1)
        guests = list(self._switch.guests.values())
        for nic in self._switch.nics:
            yield from _nic_samples(nic, self._switch.hosts.get(nic), guests)
            yield from _capture_samples(("", nic.iface), self._switch.captured(nic))
        for guest in guests:
            yield from _guest_samples(guest)
            yield from _capture_samples((guest.name, ""), self._switch.captured(guest))
        for worker in range(self._dp.workers):
            yield from _worker_samples(self._dp, worker)


def _nic_samples(nic: NicPort, host: HostPort | None, all_guests: list[GuestEntry]) -> Iterator[Sample]:
    guests = [guest for guest in all_guests if guest.nic is nic]
    slots: dict[int | None, str] = {guest.slot: guest.name for guest in guests}
    slots[None] = ""
    if host is not None:
        slots[host.slot] = HOST_PORT_LABEL

    verdicts = {
        (slot, queue, verdict): 0
        for slot in slots
        for queue in range(len(nic.queues))
        for verdict in (HOST_VERDICTS if slot is None else GUEST_VERDICTS)
    }
    for key, count in nic.verdicts().items():
        if key in verdicts or (count and key[0] in slots):
            verdicts[key] = count
    for (slot, queue, verdict), count in verdicts.items():
        yield Sample(m.XDP_VERDICTS, (nic.iface, str(queue), slots[slot], verdict), count)

    receivers = [(guest.name, guest.xsks) for guest in guests]
    if host is not None:
        receivers.append((HOST_PORT_LABEL, host.xsks))
    for name, xsks in receivers:
        for queue, xsk in enumerate(xsks):
            labels = (nic.iface, str(queue), name)
            counters = xsk.counters
            yield Sample(m.XSK_RX_PACKETS, labels, counters.packets)
            yield Sample(m.XSK_RX_BYTES, labels, counters.bytes)

    statistics = nic.xsk_statistics()
    for slot, name in slots.items():
        for queue in range(len(nic.queues)):
            reasons = statistics.get((slot, queue), {})
            for reason in m.XSK_STATISTICS:
                yield Sample(m.XSK_DROPS, (nic.iface, str(queue), name, reason), reasons.get(reason, 0))

    for queue, nicq in enumerate(nic.queues):
        port = (nic.iface, str(queue))
        tx = nicq.counters
        yield Sample(m.XSK_TX_PACKETS, port, tx.tx_packets)
        yield Sample(m.XSK_TX_BYTES, port, tx.tx_bytes)
        yield Sample(m.NIC_SENDTO, port, tx.sendto_calls)
        yield Sample(m.NIC_DROPS, port, tx.sendto_busy)
        yield Sample(m.NIC_GSO_PACKETS, port, tx.gso_packets)
        yield Sample(m.NIC_GSO_BYTES, port, tx.gso_bytes)
        yield Sample(m.NIC_CHECKSUMS, port, tx.csum_finished)
        yield Sample(m.COPIED_BYTES, ("nic", "", *port), tx.copied_bytes)

    for queue, tap in enumerate(nic.taps):
        yield from _tap_samples((nic.iface, str(queue)), tap.counters)
    if host is not None:
        yield from _tap_samples((host.name, "0"), host.tapq.counters)

    if nic.mcast is not None:
        mcast = nic.mcast.counters
        yield Sample(m.MCAST_PACKETS, (nic.iface,), mcast.packets)
        yield Sample(m.MCAST_BYTES, (nic.iface,), mcast.bytes)
        yield Sample(m.MCAST_DROPPED, (nic.iface,), mcast.dropped)


def _tap_samples(port: tuple[str, str], tap: TapqCounters) -> Iterator[Sample]:
    yield Sample(m.TAP_RX_PACKETS, port, tap.rx_packets)
    yield Sample(m.TAP_RX_BYTES, port, tap.rx_bytes)
    yield Sample(m.TAP_RX_DROPS, (*port, "malformed"), tap.rx_dropped)
    yield Sample(m.TAP_RX_DROPS, (*port, "unclaimed"), tap.rx_unclaimed)
    for reason, count in zip(DROP_NAMES, tap.drops, strict=True):
        yield Sample(m.TAP_RX_DROPS, (*port, reason), count)
    yield Sample(m.TAP_TX_PACKETS, port, tap.tx_packets)
    yield Sample(m.TAP_TX_BYTES, port, tap.tx_bytes)
    yield Sample(m.TAP_TX_GSO_PACKETS, port, tap.tx_gso_packets)
    yield Sample(m.TAP_TX_GSO_BYTES, port, tap.tx_gso_bytes)
    yield Sample(m.TAP_TX_CHECKSUMS, port, tap.tx_csum_partial)
    yield Sample(m.TAP_TX_DROPS, port, tap.tx_dropped)
    yield Sample(m.TAP_GONE, port, tap.gone)


def _guest_samples(guest: GuestEntry) -> Iterator[Sample]:
    name = guest.name
    yield Sample(m.GUEST_CONNECTED, (name,), int(guest.connected))
    yield Sample(m.GUEST_RECONNECTS, (name,), guest.reconnects)
    errors = guest.protocol_errors
    for reason in dict.fromkeys((*m.PROTOCOL_ERROR_REASONS, *errors)):
        yield Sample(m.GUEST_PROTOCOL_ERRORS, (name, reason), errors.get(reason, 0))
    for request, result in m.MESSAGES:
        yield Sample(m.GUEST_MESSAGES, (name, request, result), guest.messages[request, result])
    policy = guest.place.policy
    yield Sample(m.GUEST_LEARNED, (name,), len(guest.place.learned))
    for result in RESULTS:
        yield Sample(m.GUEST_LEARNING, (name, result), guest.learning[result])
    yield Sample(m.GUEST_RATE_LIMIT, (name, "rx"), 8 * policy.rx.rate)
    yield Sample(m.GUEST_RATE_LIMIT, (name, "tx"), 8 * policy.tx.rate)
    yield Sample(m.GUEST_STORM_LIMIT, (name,), policy.storm.rate)
    yield Sample(m.GUEST_LINK_OFF, (name,), int(policy.link_down))
    ctrl = guest.port.ctrl
    for kind, accepted, refused in zip(CTRL_NAMES, ctrl.accepted, ctrl.refused, strict=True):
        yield Sample(m.GUEST_CONTROL, (name, kind, "ok"), accepted)
        yield Sample(m.GUEST_CONTROL, (name, kind, "refused"), refused)
    for pair in range(guest.port.max_pairs):
        ring = (name, str(pair))
        rx, tx = guest.port.rx_counters(pair), guest.port.tx_counters(pair)
        yield Sample(m.GUEST_RX_PACKETS, ring, rx.packets)
        yield Sample(m.GUEST_RX_BYTES, ring, rx.bytes)
        yield Sample(m.GUEST_TX_PACKETS, ring, tx.packets)
        yield Sample(m.GUEST_TX_BYTES, ring, tx.bytes)
        yield Sample(m.COPIED_BYTES, ("guest", name, "", str(pair)), rx.copied_bytes)
        yield Sample(m.GUEST_RX_CHECKSUMS, (*ring, "partial"), rx.csum_partial)
        yield Sample(m.GUEST_RX_CHECKSUMS, (*ring, "finished"), rx.csum_finished)
        yield from _ring_samples(ring, "rx", rx)
        yield from _ring_samples(ring, "tx", tx)


def _ring_samples(ring: tuple[str, str], direction: str, counters: RxCounters | TxCounters) -> Iterator[Sample]:
    labels = (*ring, direction)
    yield Sample(m.GUEST_KICKS, labels, counters.kicks)
    yield Sample(m.GUEST_CALLS, labels, counters.calls)
    yield Sample(m.GUEST_CALLS_FAILED, labels, counters.calls_failed)
    for reason, count in zip(DROP_NAMES, counters.drops, strict=True):
        yield Sample(m.GUEST_DROPS, (*labels, reason), count)


def _capture_samples(port: tuple[str, str], captured: PortCapture) -> Iterator[Sample]:
    yield Sample(m.CAPTURE_FRAMES, port, captured.total_frames)
    yield Sample(m.CAPTURE_LOST, port, captured.total_lost)


def _worker_samples(dp: Datapath, index: int) -> Iterator[Sample]:
    worker, counters = str(index), dp.worker_counters(index)
    yield Sample(m.WORKER_POLLS, (worker, "busy"), counters.polls_busy)
    yield Sample(m.WORKER_POLLS, (worker, "idle"), counters.polls_idle)
    yield Sample(m.WORKER_SLEEPS, (worker,), counters.sleeps)
    yield Sample(m.WORKER_WAKEUPS, (worker,), counters.wakeups)
    yield Sample(m.WORKER_CYCLES, (worker,), counters.cycles_busy)
    yield Sample(m.WORKER_PACKETS, (worker,), counters.packets)
