# SPDX-License-Identifier: Apache-2.0
"""What a guest has set through its control virtqueue, as it travels with the guest (ctl/vhost/state.py).

Queue pairs and unicast addresses: a guest that resumes elsewhere sets neither again, and would be served by one pair,
and hear of its SPEC's address only. Receive filters do not travel: they are open for a guest that resumes, until it
sets them again, so it may receive more than it asked for, but not less. A guest that has set nothing has no state.
"""

from __future__ import annotations

import msgspec

from .datapath import MAX_MACS


class ControlState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`mac` is empty if it is its SPEC's."""

    pairs: int = 1
    mac: bytes = b""
    others: tuple[bytes, ...] = ()

    def check(self, max_pairs: int) -> None:
        """Raises ValueError for what no guest can have set."""
        if not 1 <= self.pairs <= max_pairs:
            raise ValueError(f"{self.pairs} queue pairs, this guest has {max_pairs} at most")
        if len(self.others) > MAX_MACS:
            raise ValueError(f"{len(self.others)} addresses, {MAX_MACS} are possible")
        for mac in (*((self.mac,) if self.mac else ()), *self.others):
            if len(mac) != 6 or mac[0] & 1 or not any(mac):
                raise ValueError(f"{mac.hex(':')} is not a station's address")


def encode(state: ControlState) -> bytes:
    return b"" if state == ControlState() else msgspec.json.encode(state)


def decode(data: bytes, max_pairs: int) -> ControlState:
    """Raises ValueError."""
    state = msgspec.json.decode(data, type=ControlState) if data else ControlState()
    state.check(max_pairs)
    return state
