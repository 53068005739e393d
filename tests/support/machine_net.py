# SPDX-License-Identifier: Apache-2.0
"""The network of the lab's machine, for the tests that run in it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .netns import Namespace
from .process import run, wait_for

NIC, WIRE = "nic0", "wire0"
GUEST = "52:54:00:00:00:01"
COUNT = 23
DEADLINE = 30.0


@dataclass(frozen=True)
class Root(Namespace):
    """The machine's own network namespace, used as the tests use theirs."""

    @property
    def path(self) -> Path:
        return Path("/proc/1/ns/net")

    def argv(self, argv: Sequence[str | os.PathLike[str]], *, own_sysfs: bool = False) -> list[str]:
        """As it is: the tests run in this namespace, and /sys is its own."""
        return [os.fspath(a) for a in argv]


def wait_carrier(name: str) -> None:
    carrier = Path(f"/sys/class/net/{name}/carrier")
    wait_for(lambda: carrier.read_text() == "1\n", DEADLINE, f"the carrier of {name}")


@contextmanager
def cable_up() -> Iterator[None]:
    """nic0 and wire0 are up and their carrier is there; without IPv6 they send nothing by themselves."""
    for name in (NIC, WIRE):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        run(["ip", "link", "set", name, "up"])
    try:
        for name in (NIC, WIRE):
            wait_carrier(name)
        yield
    finally:
        for name in (NIC, WIRE):
            run(["ip", "link", "set", name, "down"])
