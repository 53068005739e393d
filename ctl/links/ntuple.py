# SPDX-License-Identifier: Apache-2.0
"""ethtool n-tuple rules, `ether dst MAC [vlan VLAN] -> receive queue`, by ioctl: what `ethtool -N` does.

A NIC has one table of rules, which is the administrator's as much as ours. Rules are known by their location in it.
Some drivers choose it (RX_CLS_LOC_SPECIAL), for others it must be a free one: we take those at the end, which count
least.

A rule of ours is announced in the journal before it is made, and read back afterwards, since drivers have been seen to
take what they don't do. It is taken back only if what is at its location is still that very rule. The location is in
the journal, or, where the driver chooses and the daemon died before it could note it, the rule is looked for.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import NicError
from .journal import Entry
from .netlink import link_name
from .nicprep import NicPrep

SIOCETHTOOL = 0x8946
GRXCLSRLCNT, GRXCLSRULE, GRXCLSRLALL, SRXCLSRLDEL, SRXCLSRLINS = range(0x2E, 0x33)  # ETHTOOL_*
ETHER_FLOW = 0x12
FLOW_EXT, FLOW_MAC_EXT = 1 << 31, 1 << 30
LOC_SPECIAL, LOC_ANY = 1 << 31, 0xFFFFFFFF  # RX_CLS_*

# struct ethtool_rx_flow_spec: type; header and its extension (VLAN type and tag, data), their masks; queue, location
FLOW_SPEC = struct.Struct("=I52s8x2s2s8s52s8x2s2s8s4xQI4x")
RXNFC = struct.Struct("=IIQ168sI")  # struct ethtool_rxnfc without rule_locs[]: command, type, data, rule, count
RXNFC_SIZE = 192

_WHOLE_MAC = b"\xff" * 6 + bytes(8)  # struct ethhdr: the destination, and nothing else
_VID = 0x0FFF


def ethtool_ioctl(iface: str, request: bytearray) -> None:
    """`request` is a struct ethtool_rxnfc with room for what comes back. Raises OSError."""
    area = (ctypes.c_char * len(request)).from_buffer(request)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, SIOCETHTOOL, struct.pack("16sP16x", os.fsencode(iface), ctypes.addressof(area)))


@dataclass(frozen=True)
class Rule:
    """Frames to this address, in any VLAN or in this one, arrive at this receive queue."""

    mac: bytes
    queue: int
    vlan: int | None = None

    def __str__(self) -> str:
        vlan = "" if self.vlan is None else f" vlan {self.vlan}"
        return f"ether dst {self.mac.hex(':')}{vlan} action {self.queue}"

    @property
    def args(self) -> dict[str, object]:
        """As the journal has it."""
        return {"mac": self.mac.hex(":"), "vlan": self.vlan, "queue": self.queue}

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> Rule:
        return cls(bytes.fromhex(args["mac"].replace(":", "")), int(args["queue"]), args["vlan"])

    def pack(self, location: int) -> bytes:
        """struct ethtool_rx_flow_spec."""
        kind, tag, mask = ETHER_FLOW, 0, 0
        if self.vlan is not None:
            kind, tag, mask = ETHER_FLOW | FLOW_EXT, self.vlan, _VID
        return FLOW_SPEC.pack(
            kind,
            self.mac, bytes(2), tag.to_bytes(2, "big"), bytes(8),
            _WHOLE_MAC, bytes(2), mask.to_bytes(2, "big"), bytes(8),
            self.queue, location,
        )  # fmt: skip

    def is_for_the_frames_of(self, spec: bytes) -> bool:
        """Whether another rule decides about the same frames."""
        kind, header, _, tag, _, mask, _, tag_mask, data_mask, _, _ = FLOW_SPEC.unpack(spec)
        if kind & ~(FLOW_EXT | FLOW_MAC_EXT) != ETHER_FLOW or mask[:14] != _WHOLE_MAC or header[:6] != self.mac:
            return False
        wanted = int.from_bytes(tag_mask, "big") & _VID if kind & FLOW_EXT else 0
        if kind & FLOW_EXT and (any(data_mask) or wanted not in (0, _VID)):
            return False
        return self.vlan == (int.from_bytes(tag, "big") & _VID if wanted else None)

    def is_in(self, spec: bytes) -> bool:
        """Whether this is the very rule, wherever it is."""
        return self.is_for_the_frames_of(spec) and FLOW_SPEC.unpack(spec)[-2] == self.queue


class RuleTable:
    """A NIC's rules. Every method may raise OSError, EOPNOTSUPP where the driver has none."""

    def __init__(self, iface: str) -> None:
        self.iface = iface

    def _call(self, command: int, spec: bytes = bytes(FLOW_SPEC.size), count: int = 0) -> bytearray:
        request = bytearray(RXNFC_SIZE + 4 * count)
        RXNFC.pack_into(request, 0, command, 0, 0, spec, count)
        ethtool_ioctl(self.iface, request)
        return request

    def chooses_locations(self) -> bool:
        return bool(RXNFC.unpack_from(self._call(GRXCLSRLCNT))[2] & LOC_SPECIAL)

    def locations(self) -> tuple[set[int], int]:
        """Those that are taken, and how many there are; 0 where the driver doesn't say."""
        count: int = RXNFC.unpack_from(self._call(GRXCLSRLCNT))[4]
        answer = self._call(GRXCLSRLALL, count=count)
        _, _, size, _, found = RXNFC.unpack_from(answer)
        taken = struct.unpack_from(f"={min(found, count)}I", answer, RXNFC.size)
        return set(taken), size & ~LOC_SPECIAL

    def get(self, location: int) -> bytes | None:
        """The struct ethtool_rx_flow_spec there."""
        try:
            answer = self._call(GRXCLSRULE, _at(location))
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.EINVAL):  # drivers say either
                return None
            raise
        spec: bytes = RXNFC.unpack_from(answer)[3]
        return spec

    def find(self, rule: Rule) -> int | None:
        for location in sorted(self.locations()[0]):
            if (spec := self.get(location)) is not None and rule.is_in(spec):
                return location
        return None

    def insert(self, rule: Rule, location: int) -> int:
        """Where it is now."""
        answer = self._call(SRXCLSRLINS, rule.pack(location))
        made: int = FLOW_SPEC.unpack(RXNFC.unpack_from(answer)[3])[-1]
        return made if location == LOC_ANY else location

    def delete(self, location: int) -> None:
        self._call(SRXCLSRLDEL, _at(location))


def _at(location: int) -> bytes:
    return FLOW_SPEC.pack(0, b"", b"", b"", b"", b"", b"", b"", b"", 0, location)


class OwnRules:
    """The rules on a NIC that are ours: journalled through its NicPrep, which takes back what is left."""

    def __init__(self, prep: NicPrep) -> None:
        self._prep = prep
        self._entries: dict[Rule, Entry] = {}

    def __contains__(self, rule: Rule) -> bool:
        return rule in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, rule: Rule) -> None:
        """Raises OSError whose text says why the NIC does without it; then nothing is left of it."""
        table = RuleTable(link_name(self._prep.link.index) or self._prep.link.name)
        taken, size = table.locations()
        for location in taken - set(self._locations()):
            spec = table.get(location)
            if spec is not None and rule.is_for_the_frames_of(spec):
                raise FileExistsError(errno.EEXIST, f"rule {location} is for the same frames, and not ours")
        chosen = None
        if not table.chooses_locations():
            chosen = next((at for at in range(size - 1, -1, -1) if at not in taken), None)
            if chosen is None:
                raise OSError(errno.ENOSPC, f"the NIC's table of {size} rules is full")
        entry = self._prep.record("ntuple", location=chosen, **rule.args)
        try:
            made = table.insert(rule, LOC_ANY if chosen is None else chosen)
            if chosen is None:
                self._prep.amend(entry, location=made)
            spec = table.get(made)
            if spec is None or not rule.is_in(spec):
                if spec is not None and made not in taken:
                    table.delete(made)
                raise OSError(errno.EIO, "the driver takes such rules, and has others then")
        except BaseException:
            self._prep.take_back(entry)
            raise
        self._entries[rule] = entry

    def remove(self, rule: Rule) -> None:
        """What can't be removed stays in the journal."""
        self._prep.take_back(self._entries.pop(rule))

    def _locations(self) -> Iterator[int]:
        return (entry.args["location"] for entry in self._entries.values())


def undo(iface: str, args: Mapping[str, Any]) -> str:
    """For the journal. Raises NicError or OSError when the rule is still there."""
    rule, table = Rule.from_args(args), RuleTable(iface)
    try:
        location = args["location"] if args["location"] is not None else table.find(rule)
        spec = None if location is None else table.get(location)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return f"interface {iface}: no n-tuple rules"
        raise
    if location is None or spec is None:
        return f"interface {iface}: n-tuple rule `{rule}` is gone"
    if not rule.is_in(spec):
        return f"interface {iface}: n-tuple rule {location} is another one by now"
    table.delete(location)
    spec = table.get(location)
    if spec is not None and rule.is_in(spec):
        raise NicError(
            f"interface {iface}: the driver does not delete n-tuple rule {location}, `{rule}`: "
            f"`ethtool -N {iface} delete {location}`"
        )
    return f"interface {iface}: n-tuple rule {location} deleted"
