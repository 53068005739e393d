# SPDX-License-Identifier: Apache-2.0
"""A NIC's table of n-tuple rules as drivers keep it, behind the ioctl: byte for byte what the kernel would be handed.

Limits and errors are those of Linux' drivers: igb and igc have few locations, which the caller chooses, and say EINVAL
for an empty one; mlx5 says ENOENT; sfc chooses by itself; ixgbe takes no `ether` rules at all.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from xdpvhost.links.ntuple import (
    FLOW_EXT,
    FLOW_SPEC,
    GRXCLSRLALL,
    GRXCLSRLCNT,
    GRXCLSRULE,
    LOC_ANY,
    LOC_SPECIAL,
    RXNFC,
    RXNFC_SIZE,
    SRXCLSRLDEL,
    SRXCLSRLINS,
    Rule,
)


def _keep(spec: bytes) -> bytes | None:
    return spec


@dataclass
class Card:
    """`chooses`: locations are the driver's business. `stores`: what it makes of a rule; None: it forgets it."""

    size: int = 16
    queues: int = 4
    chooses: bool = False
    vlans: bool = True
    refuses: int = 0  # every rule, with this error
    empty: int = errno.EINVAL
    stores: Callable[[bytes], bytes | None] = _keep
    deletes: bool = True
    rules: dict[int, bytes] = field(default_factory=dict)
    heard: list[str] = field(default_factory=list)  # insertions and deletions, as one would type them
    changed: Callable[[Card], None] = lambda card: None

    def ioctl(self, _iface: str, request: bytearray) -> None:
        command, kind, _, spec, count = RXNFC.unpack_from(request)
        assert len(request) >= RXNFC_SIZE
        location = FLOW_SPEC.unpack(spec)[-1]
        if self.refuses == errno.EOPNOTSUPP:
            raise _error(errno.EOPNOTSUPP)
        if command == GRXCLSRLCNT:
            RXNFC.pack_into(request, 0, command, kind, LOC_SPECIAL * self.chooses, spec, len(self.rules))
        elif command == GRXCLSRLALL:
            if count < len(self.rules):
                raise _error(errno.EMSGSIZE)
            RXNFC.pack_into(request, 0, command, kind, self.size, spec, len(self.rules))
            struct.pack_into(f"={len(self.rules)}I", request, RXNFC.size, *self.rules)
        elif command == GRXCLSRULE:
            if location not in self.rules:
                raise _error(self.empty)
            RXNFC.pack_into(request, 0, command, kind, 0, self.rules[location], 0)
        elif command == SRXCLSRLINS:
            RXNFC.pack_into(request, 0, command, kind, 0, self._insert(spec, location), 0)
        elif command == SRXCLSRLDEL:
            if location not in self.rules:
                raise _error(self.empty)
            self.heard.append(f"delete {location}")
            if self.deletes:
                del self.rules[location]
        else:
            raise _error(errno.EOPNOTSUPP)
        self.changed(self)

    def _insert(self, spec: bytes, location: int) -> bytes:
        kind, *_, queue, _ = FLOW_SPEC.unpack(spec)
        if self.refuses:
            raise _error(self.refuses)
        if queue >= self.queues or (kind & FLOW_EXT and not self.vlans):
            raise _error(errno.EINVAL)
        if self.chooses != (location == LOC_ANY):
            raise _error(errno.EINVAL)
        if self.chooses:
            location = next((at for at in range(self.size) if at not in self.rules), self.size)
            if location == self.size:
                raise _error(errno.ENOSPC)
        elif location >= self.size:
            raise _error(errno.EINVAL)
        placed = spec[:-8] + struct.pack("=I4x", location)
        self.heard.append(f"insert at {location}")
        made = self.stores(placed)
        if made is not None:
            self.rules[location] = made
        return placed

    def addresses(self) -> set[bytes]:
        """That there are rules for."""
        return {FLOW_SPEC.unpack(spec)[1][:6] for spec in self.rules.values()}

    def queue_of(self, mac: bytes) -> int | None:
        """Where frames to this address go."""
        for _, spec in sorted(self.rules.items()):
            queue: int = FLOW_SPEC.unpack(spec)[-2]
            if Rule(mac, queue).is_in(spec):
                return queue
        return None


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
