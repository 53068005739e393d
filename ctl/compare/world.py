# SPDX-License-Identifier: Apache-2.0
"""Where a comparison happens: a "host" with the NIC in it, and a "network" behind that NIC.

Without `--iface` both are network namespaces of our own with a veth pair between them. The namespaces have no name:
they live as long as the descriptors that hold them, so not even kill -9 leaves anything. With `--iface IF --peer IF2`
both are the namespace that we are in, the interfaces stay where they are, and what was changed of them is put back.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pyroute2 import IPRoute

from ..errors import NicError
from ..links import ethtool, netlink
from .cost import kernel_threads
from .processes import wait_until

CLONE_NEWNET = 0x40000000
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432  # the same on every architecture
FSCONFIG_CMD_CREATE = 6
CARRIER = 15.0


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter a network namespace: {os.strerror(code)}")


class Namespace:
    """A network namespace of ours, or the one that we are in (fd -1)."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def make(cls) -> Namespace:
        """A new one. It is gone when the descriptor is closed and no process is left in it."""
        made: list[int] = []
        failed: list[OSError] = []

        def create() -> None:  # a thread of its own has a namespace of its own
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                failed.append(OSError(code, f"cannot make a network namespace: {os.strerror(code)}"))
                return
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

        thread = threading.Thread(target=create, name="namespace")
        thread.start()
        thread.join()
        if failed:
            raise NicError(f"{failed[0].strerror}; run as root")
        return cls(made[0])

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and processes that it starts, are in this namespace inside the block."""
        if self.fd < 0:
            yield
            return
        old = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self.fd)
            try:
                yield
            finally:
                _setns(old)
        finally:
            os.close(old)

    def sysfs(self) -> int:
        """A descriptor of a sysfs that shows this namespace's devices, mounted nowhere. Raises OSError."""
        libc = ctypes.CDLL(None, use_errno=True)
        with self.entered():
            context = libc.syscall(SYS_FSOPEN, b"sysfs", 1)
            if context < 0:
                raise OSError(ctypes.get_errno(), "fsopen")
            try:
                libc.syscall(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
                mount = libc.syscall(SYS_FSMOUNT, context, 1, 0)
                if mount < 0:
                    raise OSError(ctypes.get_errno(), "fsmount")
                return int(mount)
            finally:
                os.close(context)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class World:
    """Host and network, with their two interfaces up. `close` undoes everything, last first."""

    def __init__(self, iface: str | None = None, peer: str | None = None) -> None:
        self._stack = ExitStack()
        self.own = iface is None
        token = secrets.token_hex(2)
        self.iface, self.peer = iface or f"nic{token}", peer or f"net{token}"
        try:
            if self.own:
                self.host, self.net = Namespace.make(), Namespace.make()
                self._stack.callback(self.host.close)
                self._stack.callback(self.net.close)
                self._make_veth()
            else:
                self.host = self.net = Namespace(-1)
                self._take(self.iface)
                self._take(self.peer)
        except BaseException:
            self.close()
            raise

    def _make_veth(self) -> None:
        with self.host.entered(), IPRoute() as ip:
            self._quiet()
            ip.link("set", index=1, state="up")
            ip.link("add", ifname=self.iface, kind="veth", peer={"ifname": self.peer, "net_ns_fd": self.net.fd})
            ip.link("set", index=ip.link_lookup(ifname=self.iface)[0], state="up")
            # frames that are redirected into a veth need NAPI at its other end: an XDP program there, or GRO
            ethtool.set_features(self.iface, {"rx-gro": True})
        with self.net.entered(), IPRoute() as ip:
            self._quiet()
            ip.link("set", index=1, state="up")
            ip.link("set", index=ip.link_lookup(ifname=self.peer)[0], state="up")

    @staticmethod
    def _quiet() -> None:
        """No IPv6 in this namespace: nothing is on the wire but what is measured."""
        for which in ("all", "default"):
            with contextlib.suppress(OSError):
                Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6").write_text("1")

    def _take(self, name: str) -> None:
        link = netlink.get_link(name)
        if not link.up:
            netlink.set_up(link.index, True)
            self._stack.callback(netlink.set_up, link.index, False)

    def wait_carrier(self) -> None:
        """Cards take a while to find their link, anew after each change of their set-up. Raises DaemonError."""
        for namespace, name in ((self.host, self.iface), (self.net, self.peer)):
            with namespace.entered():
                wait_until(lambda name=name: ethtool.link_state(name).up, CARRIER, f"the link of {name}")  # type: ignore[misc]

    @contextmanager
    def threaded(self, cpus: set[int]) -> Iterator[list[int]]:
        """Inside, frames that the NIC receives are handled by threads of the kernel on `cpus`, which can be counted.

        Their thread ids; empty where the kernel can't, or where this PID namespace doesn't show them.
        """
        changed: list[tuple[Namespace, str]] = []
        try:
            for namespace, name in ((self.host, self.iface), (self.net, self.peer)):
                with contextlib.suppress(OSError):
                    if self._read_threaded(namespace, name) == "0":
                        self._write_threaded(namespace, name, "1")
                        changed.append((namespace, name))
            for name in (self.iface, self.peer):
                for thread in kernel_threads(f"napi/{name}-"):
                    with contextlib.suppress(OSError):
                        os.sched_setaffinity(thread, cpus)
            yield kernel_threads(f"napi/{self.iface}-")
        finally:
            for namespace, name in changed:
                with contextlib.suppress(OSError):
                    self._write_threaded(namespace, name, "0")

    @staticmethod
    def _attribute(mount: int, name: str) -> Path:
        return Path(f"/proc/self/fd/{mount}/class/net/{name}/threaded")

    def _read_threaded(self, namespace: Namespace, name: str) -> str:
        mount = namespace.sysfs()
        try:
            return self._attribute(mount, name).read_text().strip()
        finally:
            os.close(mount)

    def _write_threaded(self, namespace: Namespace, name: str, value: str) -> None:
        mount = namespace.sysfs()
        try:
            self._attribute(mount, name).write_text(value)
        finally:
            os.close(mount)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()
