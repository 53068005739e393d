# SPDX-License-Identifier: Apache-2.0
"""A tap of the data plane's own, in the place of a NIC: the same vhost-user back-end over a tap instead of AF_XDP.

Theory of operation. The tap has a queue for each worker. What comes from it goes through the data plane's switch: by
destination MAC to a guest, group frames to all. So nothing is steered, and a guest that comes or goes changes nothing
here. What is behind the tap (a bridge with the NIC, say) is a `Network`, which was opened before and is closed after.

The tap ends with its descriptors. Should somebody else delete it, guests are told that the link is down, go on with
each other, and get it back with the next `up`. They are told, too, when the tap is set down, and when it is up again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from .datapath import TapqConf
from .errors import NicError
from .links import ethtool
from .links.netlink import device_mtu, link_name
from .links.tapqueues import HEADER, TapQueues

if TYPE_CHECKING:
    from .datapath import Datapath, Nicq, PacketPort, Tapq, Xsk

log = logging.getLogger(__name__)

MAX_NAME = 15  # IFNAMSIZ with its NUL is 16


class Network(Protocol):
    """What is behind the tap."""

    @property
    def iface(self) -> str:
        """The NIC's name."""
        ...

    @property
    def ifindex(self) -> int: ...

    @property
    def mac(self) -> bytes:
        """The NIC's own, which no guest may have."""
        ...

    def attach(self, index: int, name: str, mtu: int) -> None:
        """Connect the new tap, set its MTU, and set it up. Raises NicError."""
        ...

    def set_mtu(self, index: int, mtu: int) -> None:
        """The NIC's MTU has changed: the tap's follows. Raises NicError."""
        ...

    def facts(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def tap_name(iface: str) -> str:
    """Of our tap for this NIC."""
    return f"xvt-{iface}"[:MAX_NAME]


class TapNic:
    """Implements `nicport.NicPort`."""

    queues: Sequence[Nicq] = ()
    mcast: PacketPort | None = None

    def __init__(self, network: Network, mtu: int) -> None:
        self.network = network
        self.iface = network.iface
        self.ifindex = network.ifindex
        self.mtu = mtu
        self.link = ethtool.LinkState()
        self.taps: list[Tapq] = []
        self.gone = False
        self._tap: TapQueues
        self._asked = 0
        self._stack = ExitStack()
        self._stack.callback(network.close)

    @classmethod
    def open(cls, network: Network, name: str, queues: int, dp: Datapath) -> Self:
        """Make the tap and connect it. `network` is closed in the end, or when this raises NicError."""
        nic = cls(network, _mtu(network.ifindex) or 1500)
        try:
            nic._open(name, queues, dp)
        except BaseException:
            nic.close()
            raise
        return nic

    def _open(self, name: str, queues: int, dp: Datapath) -> None:
        what = f"interface {self.iface}"
        self._asked = queues
        self._tap = tap = TapQueues.open(name, queues, what)
        self._stack.callback(tap.close)
        for queue, fd in enumerate(tap.fds):
            tapq = dp.tapq(TapqConf(fd=fd, header_len=HEADER, gso=tap.gso, queue=queue))
            self._stack.callback(tapq.close)
            self.taps.append(tapq)
        self.network.attach(tap.index, name, self.mtu)
        self.link = self._link_now()

    def close(self) -> None:
        """The tap is gone, and what is behind it as it was. Idempotent."""
        self._stack.close()
        self.taps.clear()

    @property
    def mac(self) -> bytes:
        return self.network.mac

    @property
    def nr_queues(self) -> int:
        return len(self.taps)

    @property
    def umem_bytes(self) -> int:
        return 0

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "tap": self._tap.name,
            "tap_state": "deleted by somebody else" if self.gone else "there",
            "queues_asked": self._asked,
            "queues_in_use": len(self.taps),
            "vnet_header": HEADER,
            "offloads_asked": ["csum", "tso4", "tso6", "ecn", "uso4", "uso6"],
            "offloads_in_use": list(self._tap.offloads),
            **self.network.facts(),
        }

    # ---- guests: the switch finds them by itself

    def add_guest(self, slot: int, name: str, keys: Collection[tuple[int, bytes]]) -> list[Xsk]:
        """Raises NicError for the NIC's own address."""
        self._refuse_own(f"guest {name!r}", keys)
        return []

    def _refuse_own(self, what: str, keys: Collection[tuple[int, bytes]]) -> None:
        own = self.network.mac
        if any(mac == own for _, mac in keys):
            raise NicError(f"{what}: {own.hex(':')} is the address of {self.iface} itself: give it another")

    def packet_socket(self, slot: int) -> PacketPort | None:
        return None

    def steer(self, slot: int) -> None:
        pass

    def set_keys(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        self._refuse_own("another address", keys)

    def sort_by_rules(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        """The kernel chooses the queue, by flow."""

    def unsteer(self, slot: int) -> None:
        pass

    def remove_guest(self, slot: int) -> None:
        pass

    # ---- while it runs

    def follow_link(self) -> bool:
        """The NIC's carrier, and whether the tap is there and up."""
        if not self.gone and self._was_deleted():
            self.gone = True
            log.error(
                "interface %s: tap %s was deleted; guests reach only each other; `xdpvhost down` and `up` make it anew",
                self.iface, self._tap.name,
            )  # fmt: skip
        before, self.link = self.link, self._link_now()
        if self.link.up != before.up:
            log.info("interface %s: link of its guests %s", self.iface, "is there" if self.link.up else "is lost")
        return self.link != before

    def _was_deleted(self) -> bool:
        """A worker has noticed it, or there is no such device."""
        return any(tap.counters.gone for tap in self.taps) or link_name(self._tap.index) is None

    def _link_now(self) -> ethtool.LinkState:
        state = self._state_of(self.ifindex)
        return replace(state, up=state.up and not self.gone and self._state_of(self._tap.index).up)

    @staticmethod
    def _state_of(index: int) -> ethtool.LinkState:
        name = link_name(index)
        return ethtool.LinkState(up=False) if name is None else ethtool.link_state(name)

    def follow_mtu(self) -> bool:
        now = _mtu(self.ifindex)
        if now is None or now == self.mtu:
            return False
        self.mtu = now
        if not self.gone:
            self.network.set_mtu(self._tap.index, now)
        log.info("interface %s: its MTU is now %d, and so is its tap's", self.iface, now)
        return True

    # ---- counters: there is no XDP

    def verdicts(self) -> Mapping[tuple[int | None, int, str], int]:
        return {}

    def xsk_statistics(self) -> Mapping[tuple[int | None, int], Mapping[str, int]]:
        return {}


def _mtu(ifindex: int) -> int | None:
    name = link_name(ifindex)
    return None if name is None else device_mtu(name)


def random_port_mac() -> bytes:
    """For a tap in a bridge: high, so that no bridge takes it for its own."""
    return b"\xfe" + os.urandom(5)
