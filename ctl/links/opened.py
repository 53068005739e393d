# SPDX-License-Identifier: Apache-2.0
"""Which processes have a tap or macvtap open, and the vhost threads that serve them."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import rtnl

PROC = Path("/proc")


@dataclass(frozen=True)
class Opener:
    """A process with the device open."""

    pid: int
    name: str


def openers(devices: Collection[str]) -> dict[str, list[Opener]]:
    """By device: a tap's name, or the path of a macvtap's node. Processes that we may not look into are left out."""
    held = rtnl.once("openers", _all_held)
    return {device: held.get(device, []) for device in devices}


def _all_held() -> dict[str, list[Opener]]:
    found: dict[str, list[Opener]] = {}
    for process in PROC.glob("[0-9]*"):
        with suppress(OSError):
            for device in _held(process):
                opener = Opener(int(process.name), (process / "comm").read_text().strip())
                found.setdefault(device, []).append(opener)
    return found


def _held(process: Path) -> set[str]:
    held = set()
    for fd in (process / "fd").iterdir():
        with suppress(OSError):
            target = os.readlink(fd)
            if target.startswith("/dev/tap"):
                held.add(target)
            elif target.endswith("/tun"):
                for line in (process / "fdinfo" / fd.name).read_text().splitlines():
                    if line.startswith("iff:"):
                        held.add(line.split(maxsplit=1)[1].strip())
    return held


def vhost_threads(pid: int) -> list[int]:
    """The kernel threads that vhost made for a process: its own threads since Linux 6.4, kthreads before.

    They have the process's number in their name, not the device's: those of all its devices are listed.
    """
    name = f"vhost-{pid}"
    tasks = [*(PROC / str(pid) / "task").glob("[0-9]*"), *PROC.glob("[0-9]*")]
    found = set()
    for task in tasks:
        with suppress(OSError):
            if (task / "comm").read_text().strip() == name[:15]:
                found.add(int(task.name))
    return sorted(found)
