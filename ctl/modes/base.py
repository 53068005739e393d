# SPDX-License-Identifier: Apache-2.0
"""What a mode of links is: devices made for a NIC and its guests, which virtual machines open by themselves.

A mode has two sides. `LinkMode` is what can be known without the machine (SPEC keys, QEMU arguments, libvirt elements)
and the question what the machine can do. `Uplink` is one NIC in that mode, while `up` runs.

Every change that an Uplink makes goes through its `Changes` (ctl/links/changes.py): announced in the journal before it
is made, undone by its handler in ctl/links/undo.py, last first. Should `up` be killed, the next one with the same
wishes finds the announced changes in its `Changes` and takes them over: see `Changes.claim`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..config import GuestSpec, Mode, UpConfig
    from ..feature import Feature
    from ..links.changes import Changes
    from ..links.netlink import Link
    from ..qemu import Device
    from ..service import Needs

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class QemuNet:
    """argv fragments, option and value in turn, and files that the starting shell opens: `3<>PATH`.

    A path may have a `$(…)` in it, for what is only known when the guest's device exists.
    """

    args: Sequence[str]
    files: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkCounters:
    """Of a guest, as the guest sees it: rx is towards it. Drops are the host's."""

    rx_packets: int
    rx_bytes: int
    rx_drops: int
    tx_packets: int
    tx_bytes: int
    tx_drops: int


class Uplink(Protocol):
    """One NIC, and its guests' devices. For the event loop's thread, except `counters`."""

    def open(self) -> None:
        """What it makes for the NIC. Raises XdpvhostError; the caller undoes what was announced until then."""
        ...

    def add_guest(self, spec: GuestSpec) -> None:
        """What it makes for a guest. Raises XdpvhostError; the caller undoes as above."""
        ...

    def remove_guest(self, spec: GuestSpec) -> None:
        """Before its changes are undone: refuse, or forget it. Usually nothing."""
        ...

    def follow(self) -> None:
        """Called every second: the NIC's MTU, threads to pin. May raise XdpvhostError, which is logged."""
        ...

    def close(self) -> None:
        """After the guests' changes were undone, before the NIC's are. Usually nothing."""
        ...

    def facts(self) -> dict[str, Any]:
        """Of the NIC, for `status`. What was asked for and what is in use come as KEY_asked and KEY_in_use."""
        ...

    def guest_facts(self, spec: GuestSpec) -> dict[str, Any]:
        """Of a guest, as above; `device` is its device's name, `connected` whether a virtual machine has it open."""
        ...

    def counters(self, spec: GuestSpec) -> LinkCounters | None:
        """None when its device is gone, or doesn't count. Any thread."""
        ...


class LinkMode(Protocol):
    """The singleton `MODE` of each file beside this one."""

    @property
    def name(self) -> Mode: ...

    def needs(self, config: UpConfig) -> Needs:
        """Privileges without which `up` in this mode can't work."""
        ...

    def uplink_wishes(self, config: UpConfig) -> dict[str, Any]:
        """The options that shape what is made for the NIC, as JSON values: with others, nothing is taken over."""
        ...

    def check_config(self, config: UpConfig) -> None:
        """Raises ConfigError for options that contradict each other, or a guest of `config.guests`."""
        ...

    def check_spec(self, spec: GuestSpec) -> None:
        """Raises ConfigError for values of the mode's own keys (`spec.keys`), or a number of queues, it can't have."""
        ...

    def check_new_guest(self, spec: GuestSpec, others: Sequence[GuestSpec]) -> None:
        """Raises ConfigError when it wants what another has; names and MACs are compared already."""
        ...

    def uplink(self, config: UpConfig, changes: Changes) -> Uplink:
        """Nothing happens before `Uplink.open`."""
        ...

    def feature(self, link: Link) -> Feature:
        """`mode-NAME`: can this machine, and this NIC, do it? If not: what is missing, and how to get it."""
        ...

    def qemu(self, spec: GuestSpec, device: Device, facts: Facts | None) -> QemuNet:
        """What attaches a virtual machine. `facts`: the guest's, out of a running daemon; None without one."""
        ...

    def libvirt(self, spec: GuestSpec, device: Device, facts: Facts | None) -> str:
        """`<interface>`, or whatever goes into `<devices>`."""
        ...
