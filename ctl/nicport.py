# SPDX-License-Identifier: Apache-2.0
"""The way to the network, as the switch and the metrics see it: a NIC with AF_XDP (ctl/xdp/nic.py), or a tap."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .datapath import Nicq, PacketPort, Tapq, Xsk
    from .links.ethtool import LinkState


class NicPort(Protocol):
    """One open NIC with its guests, by slot. For the control thread only, except the counters."""

    @property
    def iface(self) -> str: ...

    @property
    def ifindex(self) -> int: ...

    @property
    def gone(self) -> bool:
        """Whether somebody has taken it away. It never comes back."""
        ...

    @property
    def mac(self) -> bytes:
        """The interface's own address, which no guest may have."""
        ...

    @property
    def mtu(self) -> int: ...

    @property
    def link(self) -> LinkState: ...

    @property
    def nr_queues(self) -> int: ...

    @property
    def queues(self) -> Sequence[Nicq]: ...

    @property
    def umem_bytes(self) -> int:
        """Of the frames of all queues; 0 without AF_XDP."""
        ...

    @property
    def taps(self) -> Sequence[Tapq]:
        """Instead of `queues`."""
        ...

    @property
    def mcast(self) -> PacketPort | None: ...

    @property
    def facts(self) -> Any:
        """What `status` shows: a dataclass or a dict."""
        ...

    def close(self) -> None:
        """Give it back as it was. After a publication without it. Idempotent."""
        ...

    def add_guest(self, slot: int, name: str, keys: Collection[tuple[int, bytes]]) -> list[Xsk]:
        """Room for a guest, to whom nothing is steered yet. Raises NicError, and then nothing of it is left.

        A key is (VLAN, MAC); VLAN 0 are untagged frames, 0xffff those of any other VLAN: ctl/pools.py.
        """
        ...

    def packet_socket(self, slot: int) -> PacketPort | None:
        """Where a guest's frames arrive, if not by AF_XDP sockets or a tap."""
        ...

    def steer(self, slot: int) -> None: ...

    def set_keys(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        """Its keys are these from now on. Raises NicError, and then nothing has changed."""
        ...

    def sort_by_rules(self, slot: int, keys: Collection[tuple[int, bytes]]) -> None:
        """Have the NIC bring frames with these keys to the guest's own queue, as far as it can. Never raises."""
        ...

    def unsteer(self, slot: int) -> None: ...

    def remove_guest(self, slot: int) -> None: ...

    def follow_link(self) -> bool:
        """Look at carrier, speed and duplex; whether they changed."""
        ...

    def follow_mtu(self) -> bool:
        """Look at the MTU; whether `mtu` changed."""
        ...

    def verdicts(self) -> Mapping[tuple[int | None, int, str], int]: ...

    def xsk_statistics(self) -> Mapping[tuple[int | None, int], Mapping[str, int]]: ...
