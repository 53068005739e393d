# SPDX-License-Identifier: Apache-2.0
"""The scene that most tests and the demo play in: a "network", a host with a NIC, xdpvhost on it, and guests.

    namespace net                 namespace host
    eth0 192.0.2.1  <-- veth -->  nic0 192.0.2.2, the interface of `xdpvhost up`
                                    |- vm1  52:54:00:00:00:01  192.0.2.11
                                    `- vm2  52:54:00:00:00:02  192.0.2.12

IPv6 is 2001:db8::/64 with the same last numbers (hexadecimal 11 and 12). The sending end keeps its offloads on.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .daemon import Daemon
from .netns import QUEUES, World
from .uml import UmlGuest

NET_IP, HOST_IP = "192.0.2.1", "192.0.2.2"
NET_IP6, HOST_IP6 = "2001:db8::1", "2001:db8::2"
PREFIX = 24
GIB = 1 << 30


def guest_mac(number: int) -> str:
    return f"52:54:00:00:00:{number:02x}"


def guest_ip(number: int) -> str:
    return f"192.0.2.{10 + number}"


def guest_ip6(number: int) -> str:
    return f"2001:db8::{10 + number}"


def spec(number: int, *, queues: int = 1, extra: str = "") -> str:
    return f"name=vm{number},mac={guest_mac(number)},queues={queues}{extra}"


class Lab:
    """Namespaces, veth and addresses are there; up() starts the daemon, boot() the guests. `quiet`: no IPv6."""

    def __init__(self, *, queues: int = QUEUES, mtu: int = 1500, quiet: bool = False, directory: Path | None = None):
        self.world = World(directory)
        try:
            self.net = self.world.namespace("net")
            self.host = self.world.namespace("host")
            if quiet:
                for namespace in (self.net, self.host):
                    namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
            self.world.veth(self.net, "eth0", self.host, "nic0", queues=queues, mtu=mtu)
            addresses = [(self.net, "eth0", NET_IP, NET_IP6), (self.host, "nic0", HOST_IP, HOST_IP6)]
            for namespace, device, ip, ip6 in addresses:
                namespace.ip("addr", "add", f"{ip}/{PREFIX}", "dev", device)
                if not quiet:
                    namespace.ip("addr", "add", f"{ip6}/64", "dev", device, "nodad")
        except BaseException:
            self.world.close()
            raise
        self.directory = self.world.directory
        self.guests: dict[int, UmlGuest] = {}
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        assert self._daemon is not None, "the daemon was not started"
        return self._daemon

    @property
    def net_mac(self) -> str:
        return self.net.mac("eth0")

    def up(self, guests: Sequence[str], options: Sequence[str] = ()) -> Daemon:
        """Starts `xdpvhost up` on nic0; it is ended when the lab closes."""
        self._daemon = Daemon(self.host, iface="nic0", guests=guests, options=options)
        self.world.stack.callback(self._daemon.close)
        return self._daemon

    def boot(self, *numbers: int, mem: str = "128M") -> None:
        """Boots UML guests, all at once, and configures their addresses."""
        for number in numbers:
            name = f"vm{number}"
            guest = UmlGuest(self.daemon.socket(name), name, directory=self.directory, mem=mem)
            self.world.stack.callback(guest.close)
            self.guests[number] = guest
            guest.begin()
        for number in numbers:
            self.guests[number].ready().configure(f"{guest_ip(number)}/{PREFIX}", f"{guest_ip6(number)}/64")

    def close(self) -> None:
        self.world.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
