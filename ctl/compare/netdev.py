# SPDX-License-Identifier: Apache-2.0
"""A guest that is a network device of this kernel: an SR-IOV VF, as a container would have it.

There are no rings to drive: the guest sends and receives by packet sockets, and a program of its own counts what
arrives. So the guest costs other than elsewhere, and nothing serves it that could be measured.
"""

from __future__ import annotations

from ..links import ethtool, netlink
from . import native
from .network import Network
from .processes import wait_until
from .world import Namespace

LINK = 15.0


class NoRing:
    """Stands where a ring would be: no buffers, no notifications."""

    def __init__(self) -> None:
        self.ring = native.Ring(num=1, kick_fd=-1, kind=native.E1000)  # which is empty without being looked at
        self.room = 0

    def prepare(self, frame: bytes) -> None:
        """There are no buffers."""

    def interrupts(self, wanted: bool) -> None:
        """They are the kernel's own affair."""


class Netdev:
    """The device `name` in `namespace`."""

    def __init__(self, namespace: Namespace, name: str) -> None:
        self.rx, self.tx = NoRing(), NoRing()
        self.network = Network(namespace, name)
        self._name = name

    def start(self) -> None:
        """Waits for its link. Raises DaemonError."""
        with self.network.namespace.entered():
            link = netlink.get_link(self._name)
            if not link.up:
                netlink.set_up(link.index, True)  # `up` of this mode puts it back with the VF
            wait_until(lambda: ethtool.link_state(self._name).up, LINK, f"the link of {self._name}")

    def calls(self) -> int | None:
        """Not known: they are the kernel's."""
        return None

    def close(self) -> None:
        self.network.close()
