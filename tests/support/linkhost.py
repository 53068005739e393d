# SPDX-License-Identifier: Apache-2.0
"""A host with a NIC for the modes that make links, the network at its other end, and guests that are open taps."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .daemon import PROGRAM, Daemon
from .netns import Namespace, World
from .process import wait_for

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 1, 2, 4
VNET_HEADER = 12  # struct virtio_net_hdr_v1

_VOLATILE = {
    "stats", "stats64", "valid_life_time", "preferred_life_time", "gc_timer", "hello_timer", "tcn_timer", "expires",
    "topology_change", "topology_change_detected", "topology_change_timer", "fdb_n_learned", "used", "updated",
    "tso_max_size", "tso_max_segs",  # a bridge keeps those of its last port
}  # fmt: skip


class OpenTap:
    """A queue of a guest's device, opened as QEMU does. Frames have a virtio-net header of 12 bytes, mostly zero."""

    def __init__(self, namespace: Namespace, name: str, *, multi_queue: bool = False, node: str | None = None) -> None:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if multi_queue else 0)
        with namespace.entered():
            self.fd = os.open(node or "/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            if node is None:
                fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
        fcntl.ioctl(self.fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
        self.frames: list[bytes] = []
        if node is None:
            wait_for(lambda: operstate(namespace, name) in ("UP", "UNKNOWN"), 10, f"{name} to be up")

    def send(self, frame: bytes) -> None:
        os.write(self.fd, bytes(VNET_HEADER) + frame)

    def collect(self) -> list[bytes]:
        while True:
            try:
                data = os.read(self.fd, 1 << 17)
            except BlockingIOError:
                return self.frames
            self.frames.append(data[VNET_HEADER:])

    def wait_received(self, source: str, count: int, *, to: str = "", deadline: float = 10) -> list[bytes]:
        """Waits until `count` frames or more with that source, and destination if given, have arrived."""
        mac, destination = (bytes.fromhex(address.replace(":", "")) for address in (source, to))

        def enough() -> list[bytes] | None:
            found = [frame for frame in self.collect() if frame[6:12] == mac and frame.startswith(destination)]
            return found if len(found) >= count else None

        frames = wait_for(enough, deadline, f"{count} frames from {source}")
        assert frames is not None
        return frames

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def operstate(namespace: Namespace, name: str) -> str:
    (link,) = namespace.json("ip", "-j", "link", "show", "dev", name)
    return str(link["operstate"])


class LinkHost:
    """`nic0` in one namespace, whose other end is `net0` in another."""

    def __init__(self, world: World, *, ipv6: bool = False) -> None:
        self.world = world
        self.nic, self.net = world.namespace("nic"), world.namespace("net")
        self.run_dir = world.directory / "run"
        if not ipv6:
            for namespace in (self.nic, self.net):
                namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        world.veth(self.nic, "nic0", self.net, "net0")
        wait_for(lambda: operstate(self.nic, "nic0") == "UP", 10, "the NIC")

    def up(self, mode: str, guests: Sequence[str] = (), options: Sequence[str] = (), **more: Any) -> Daemon:
        return Daemon(
            self.nic, iface="nic0", guests=guests, run_dir=self.run_dir, options=["--mode", mode, *options], **more
        )

    def refused(self, *args: str, status: int) -> str:
        """What `up` says on stderr when it must not come up."""
        result = self.cli("up", "--iface", "nic0", "--run-dir", self.run_dir, "--metrics", "none", *args)
        assert result.returncode == status, result.stderr
        return result.stderr

    def cli(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        return self.nic.run(PROGRAM, *args, check=False)

    def state(self) -> dict[str, Any]:
        """Everything about the host's network that a mode may change, as `ip -j` tells it."""
        json_of = self.nic.json
        found = {
            "links": json_of("ip", "-j", "-d", "link"),
            "addresses": json_of("ip", "-j", "addr"),
            "routes": json_of("ip", "-j", "route", "show", "table", "all"),
            "routes6": json_of("ip", "-6", "-j", "route", "show", "table", "all"),
            "proxies": json_of("ip", "-j", "neigh", "show", "proxy"),
            "proxies6": json_of("ip", "-6", "-j", "neigh", "show", "proxy"),
            "groups": [link | {"maddr": sorted(link["maddr"], key=str)} for link in json_of("ip", "-j", "maddr")],
            "fdb": json_of("bridge", "-j", "fdb"),
            "features": self.nic.run("ethtool", "-k", "nic0").stdout,
            "settings": self.nic.run("sh", "-c", "grep -s . /proc/sys/net/ipv?/conf/nic0/*; true").stdout,
        }
        return {key: _without_volatile(value) for key, value in found.items()}

    def wait_as(self, before: dict[str, Any], *, without: Collection[str] = ()) -> None:
        """Carrier and duplicate address detection take their time; then everything must be as it was `before`."""
        wanted = {key: value for key, value in before.items() if key not in without}
        last = [""]

        def same() -> bool:
            last[0] = different(wanted, self.state())
            return not last[0]

        try:
            wait_for(same, 10, "the host to be as it was", interval=0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{last[0]}") from None

    def has(self, device: str) -> bool:
        return bool(self.nic.run("ip", "link", "show", "dev", device, check=False).returncode == 0)

    def link(self, device: str) -> dict[str, Any]:
        (link,) = self.nic.json("ip", "-j", "-d", "link", "show", "dev", device)
        return dict(link)


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_volatile(v) for k, v in value.items() if k not in _VOLATILE}
    if isinstance(value, list):
        return [_without_volatile(item) for item in value]
    return value


def different(before: dict[str, Any], after: dict[str, Any]) -> str:
    """For people: what two states differ in; empty when they are the same."""
    found = []
    for key, old in before.items():
        was, now = (_lines(value) for value in (old, after[key]))
        found += [f"{key}: - {line}" for line in was if line not in now] + [
            f"{key}: + {line}" for line in now if line not in was
        ]
        if not found and was != now:
            found.append(f"{key}: another order: {now}")
    return "\n".join(found)


def _lines(value: Any) -> list[str]:
    return value.splitlines() if isinstance(value, str) else [json.dumps(item) for item in value]
