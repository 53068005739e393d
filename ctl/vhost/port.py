# SPDX-License-Identifier: Apache-2.0
"""What the state machine asks of the data plane, and nothing else; the switch implements it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..datapath import Memory, Region, Vring
from .errors import ProtocolError
from .wire import NetState

__all__ = ["DevicePort", "EndpointSpec", "Memory", "Region", "Vring"]


class DevicePort(Protocol):
    """One guest's place in the switch, for as long as the guest is configured."""

    @property
    def name(self) -> str: ...
    @property
    def max_pairs(self) -> int: ...
    @property
    def mac(self) -> bytes: ...
    @property
    def mtu(self) -> int:
        """Largest MTU that the uplink carries, in bytes after the Ethernet header."""

    @property
    def device_features(self) -> int:
        """Virtio features to offer, with VHOST_USER_F_PROTOCOL_FEATURES."""

    @property
    def net_state(self) -> NetState:
        """Link and announcement, for the configuration space."""

    def memory(self, regions: Sequence[Region]) -> Memory: ...

    def shared(self, address: int, size: int) -> Memory:
        """Makes `size` bytes at `address` of this process, which the front-end may take away, known."""

    def inflight_size(self, num: int, packed: bool) -> int:
        """Bytes of one ring's part of an in-flight region."""

    def vring(
        self,
        mem: Memory,
        *,
        desc: int,
        avail: int,
        used: int,
        features: int,
        num: int,
        base: int,
        kick_fd: int,
        call_fd: int,
        enabled: bool,
        log: Memory | None = None,
        inflight: Memory | None = None,
        inflight_offset: int = 0,
        log_used: bool = False,
    ) -> Vring:
        """Makes a ring from front-end addresses. Raises DatapathError: EFAULT where memory doesn't hold it."""

    def apply(self, features: int, rings: Mapping[int, Vring], ctrl: int | None) -> None:
        """Publishes this set of rings. When it returns no worker touches a ring or memory that was left out."""

    def quiesce(self) -> None:
        """Returns when every worker has begun a new turn."""

    def save_state(self) -> bytes:
        """What the guest has set that is not in its memory: to go on elsewhere. No ring is published."""

    def load_state(self, state: bytes) -> None:
        """Takes over what `save_state` gave, here or elsewhere. Raises RequestRefused. No ring is published."""

    def reset_state(self) -> None:
        """Forgets what the guest has set. No ring is published."""

    def announce(self, mac: bytes) -> None:
        """Sends a RARP for `mac` on the uplink."""

    def attached(self, up: bool) -> None:
        """A front-end attached or left."""

    def message(self, request: str, result: str) -> None:
        """A request was served: `ok`, `refused` or `error`."""

    def protocol_error(self, error: ProtocolError) -> None:
        """A session ended by the front-end's fault; counted by the owner."""


class EndpointSpec(Protocol):
    """The part of a guest's configuration that its socket needs."""

    @property
    def name(self) -> str: ...
    @property
    def socket(self) -> Path: ...
    @property
    def socket_mode(self) -> str:
        """`server` or `client`."""
