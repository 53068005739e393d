# SPDX-License-Identifier: Apache-2.0
"""The host's own port among the guests of a NIC: a tap, one end of which is the host's and the other the switch's.

Theory of operation. The host keeps the NIC as it was, with the NIC's own address, and guests don't reach it there: a
frame for that address leaves by the NIC. The host port is a second way in, with an address of its own. To the data
plane it is nearly a guest. Its address is in the MAC table (as `HOST_PORT` plus the NIC's index), and what the host
sends into the tap goes through the switch. What comes from the NIC for it is steered by the XDP program into sockets
of its own. So it has a slot, as guests have; those are taken from the end, and guests' numbers are what they are
without it.

The tap is down and has no IP address: both are for the administrator to set. Its MTU follows the NIC's. It is not
persistent: the kernel takes it away with this process. The journal has it all the same, so that `clean` says so.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from .config import HOST_PORT_LABEL, HOST_PORT_OF_EACH, format_mac
from .datapath import HOST_PORT, VLAN_ANY, TapqConf, pack_macs
from .errors import NicError, XdpvhostError
from .links import nicprep, rtnl
from .links.netlink import device_mtu, link_name
from .links.tapqueues import HEADER, TapQueues

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .datapath import Datapath, PacketPort, Tapq, Xsk
    from .links.journal import Entry, Journal
    from .nicport import NicPort

log = logging.getLogger(__name__)

MAX_MTU = 65521  # of a tap: what with its header makes 65535 bytes
LOCAL, OTHER_LOCAL = 0x02, 0x40  # bits of an address's first byte


def name_for(wanted: str, iface: str, ifindex: int) -> str:
    """`wanted` is the option's value: a name, or HOST_PORT_OF_EACH."""
    if wanted != HOST_PORT_OF_EACH:
        return wanted
    name = f"xvh-{iface}"
    return name if len(name) <= rtnl.MAX_NAME else f"xvh-{ifindex}"


def address_for(nic: bytes, taken: Collection[bytes] = ()) -> bytes:
    """A locally administered address made of the NIC's own: the same one whenever `up` runs.

    Interfaces that share an address, as VLAN devices do, get different ones: `taken` are the others' host ports.
    """
    first = nic[0] | LOCAL if not nic[0] & LOCAL else nic[0] ^ OTHER_LOCAL
    last = int.from_bytes(nic[3:])
    while (found := bytes([first]) + nic[1:3] + (last & 0xFFFFFF).to_bytes(3)) in taken:
        last += 1
    return found


def refuse_taken(name: str, iface: str) -> None:
    """Raises NicError when there is an interface of that name: before anything is changed."""
    rtnl.refuse_taken(name, f"interface {iface}: its host port", "choose another with --host-port NAME")


class HostPort:
    """One NIC's. For the control thread only, except the counters. Owner of the tap, and of its sockets on the NIC."""

    def __init__(self, nic: NicPort, name: str, mac: bytes, slot: int) -> None:
        self.nic = nic
        self.name = name
        self.mac = mac
        self.slot = slot
        self.mtu = 0
        self.gone = False
        self.tapq: Tapq
        self.xsks: Sequence[Xsk] = ()
        self.packet: PacketPort | None = None
        self._tap: TapQueues
        self._stack = ExitStack()

    @classmethod
    def open(cls, nic: NicPort, name: str, mac: bytes, slot: int, dp: Datapath, journal: Journal) -> Self:
        """Make the tap and its sockets; nothing is steered there yet. Raises XdpvhostError, and leaves nothing."""
        port = cls(nic, name, mac, slot)
        try:
            port._open(dp, journal)
        except BaseException:
            port.close()
            raise
        return port

    def _open(self, dp: Datapath, journal: Journal) -> None:
        what = f"interface {self.nic.iface}: its host port"
        where = {"iface": self.nic.iface, **nicprep.where(self.nic.ifindex)}
        self._stack.callback(_done, journal, journal.record("host_port", **where, tap=self.name))
        self._tap = tap = TapQueues.open(self.name, 1, what)
        self._stack.callback(tap.close)
        rtnl.change(tap.index, f"{what} {self.name} can't be set", address=format_mac(self.mac))
        self._follow_mtu()
        self.tapq = dp.tapq(TapqConf(fd=tap.fds[0], header_len=HEADER, gso=tap.gso, queue=0))
        self._stack.callback(self.tapq.close)
        self.xsks = self.nic.add_guest(self.slot, HOST_PORT_LABEL, self.keys)
        self._stack.callback(self.nic.remove_guest, self.slot)
        self.packet = self.nic.packet_socket(self.slot)

    @property
    def keys(self) -> list[tuple[int, bytes]]:
        """(VLAN, address) of what is its own: untagged frames, and those of any VLAN."""
        return [(0, self.mac), (VLAN_ANY, self.mac)]

    def packed(self, nic_index: int) -> bytes:
        """Its keys for a publication in which its NIC has that index."""
        return pack_macs(self.keys, HOST_PORT + nic_index)

    def steer(self) -> None:
        """Let frames from the NIC in. Once the workers know it. Raises NicError."""
        self.nic.steer(self.slot)
        log.info("interface %s: host port %s (%s)", self.nic.iface, self.name, format_mac(self.mac))

    def unsteer(self) -> None:
        """Before a publication without it."""
        self.nic.unsteer(self.slot)

    def close(self) -> None:
        """The tap is gone. After a publication without it. Idempotent."""
        self._stack.close()

    # ---- while it runs

    def follow(self) -> None:
        """Look at the NIC's MTU, and whether the tap is still there. Logs, never raises."""
        if self.gone:
            return
        if self.tapq.counters.gone or link_name(self._tap.index) is None:
            self.gone = True
            log.error(
                "interface %s: its host port %s was deleted; guests go on without it; `xdpvhost down` and `up` make it "
                "anew",
                self.nic.iface, self.name,
            )  # fmt: skip
            return
        try:
            self._follow_mtu()
        except (XdpvhostError, OSError) as exc:
            log.error("%s", exc)

    def _follow_mtu(self) -> None:
        """Raises NicError once for each MTU that is refused."""
        wanted = min(self.nic.mtu, MAX_MTU)
        if wanted == self.mtu:
            return
        self.mtu = wanted
        name = link_name(self._tap.index)
        if name is None:
            raise NicError(f"interface {self.nic.iface}: its host port {self.name} is gone")
        if device_mtu(name) != wanted:
            what = f"interface {self.nic.iface}: MTU {wanted} is refused by its host port {name}"
            rtnl.change(self._tap.index, what, mtu=wanted)

    def describe(self) -> dict[str, Any]:
        """For `status`."""
        counters = self.tapq.counters
        return {
            "tap": self.name,
            "ifindex": self._tap.index,
            "mac": format_mac(self.mac),
            "mtu": self.mtu,
            "state": "deleted by somebody else" if self.gone else "there",
            "slot": self.slot,
            "offloads": list(self._tap.offloads),
            "from_host": {"packets": counters.rx_packets, "bytes": counters.rx_bytes},
            "to_host": {
                "packets": counters.tx_packets + counters.tx_gso_packets,
                "bytes": counters.tx_bytes + counters.tx_gso_bytes,
            },
        }


def _done(journal: Journal, entry: Entry) -> None:
    try:
        journal.done(entry)
    except OSError as exc:
        log.error("tap %s is gone, which cannot be noted: %s", entry.args["tap"], exc)
