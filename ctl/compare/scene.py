# SPDX-License-Identifier: Apache-2.0
"""One mode, set up with one guest attached, ready to be measured.

Everything is made by `xdpvhost up` itself, as a user would, and taken down by its end. What a scene can't do here it
says by raising XdpvhostError, whose message becomes the row's reason.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from .. import api
from ..errors import DaemonError
from . import cost, native
from .e1000 import E1000e
from .frontend import VhostUser
from .memory import Memory
from .modes import Mode
from .netdev import Netdev
from .network import Network
from .plan import MAC, Cpus
from .processes import Child, wait_until
from .qtest import Machine, in_slot
from .vhost_net import VhostNet, open_tap
from .virtio_pci import VirtioPci
from .world import World

GUEST = "vm1"
READY = 90.0  # an emulated machine takes its time
TESTPMD = "dpdk-testpmd"
DELIVERED = ("xdpvhost_guest_rx_bytes_total", "xdpvhost_xsk_transmit_bytes_total", "xdpvhost_tap_transmit_bytes_total")


class Queue(Protocol):
    """One direction of a guest's device: a native ring, and buffers that it knows how to prepare."""

    ring: native.Ring

    @property
    def room(self) -> int: ...

    def prepare(self, frame: bytes) -> None: ...

    def interrupts(self, wanted: bool) -> None: ...


class Device(Protocol):
    """What the synthetic guest drives."""

    @property
    def rx(self) -> Queue: ...

    @property
    def tx(self) -> Queue: ...

    def start(self) -> None: ...

    def calls(self) -> int | None:
        """Interrupts since the last time; None where they can't be seen."""
        ...

    def close(self) -> None: ...


class Scene:
    """`with Scene(mode, world, directory, cpus) as scene:` with a device that has started, its receive ring full.

    Without `attach` there is only what serves a guest, and no guest.
    """

    def __init__(self, mode: Mode, world: World, directory: Path, cpus: Cpus, attach: bool = True) -> None:
        self.mode = mode
        self.world = world
        self.directory = directory
        self.cpus = cpus
        self.facts: dict[str, str] = {}
        self._stack = ExitStack()
        self._pids: list[int] = []
        self._daemon: Path | None = None
        self._workers: VhostNet | None = None
        self.guest_network: Network | None = None  # where the guest is a device of this kernel
        try:
            if not attach:
                self._testpmd() if mode.device == "testpmd" else self._up()
                return
            self.memory = Memory()
            self._stack.callback(self.memory.close)
            self.device = self._device()
            self._stack.callback(self.device.close)
            self.device.start()
            if self.device.rx.room:
                native.offer(self.device.rx.ring, self.device.rx.room)
        except BaseException:
            self.close()
            raise

    # ---- making ----

    def _device(self) -> Device:
        match self.mode.device:
            case "vhost-user":
                self._up()
                return VhostUser(self.memory, self.directory / f"{GUEST}.sock")
            case "virtio":
                self._up()
                return VirtioPci(self.memory, self._machine(",disable-legacy=on"))
            case "e1000e":
                self._up()
                return E1000e(self.memory, self._machine())
            case "vhost-net":
                self._up()
                tap = next(guest["device"] for guest in api.call(self.directory, "guest-list"))
                with self.world.host.entered():
                    device = VhostNet(self.memory, open_tap(tap), self.cpus.server)
                self._pids = []
                self._workers = device
                return device
            case "netdev":
                self._up(",to=netdev")
                name = next(guest["device"] for guest in api.call(self.directory, "guest-list"))
                self._pids = []
                guest = Netdev(self.world.host, name)
                self.guest_network = guest.network
                return guest
            case "testpmd":
                return VhostUser(self.memory, self._testpmd())
            case other:
                raise DaemonError(f"this version has no synthetic guest for {other}")

    def _up(self, keys: str = "") -> None:
        """`xdpvhost up` with our guest."""
        argv = [sys.executable, "-m", "xdpvhost", "up", "--iface", self.world.iface, "--run-dir", str(self.directory)]
        argv += ["--metrics", "none", "--guest", f"name={GUEST},mac={MAC}{keys}", *self.mode.options]
        with self.world.host.entered():
            child = Child(argv, self.directory / "up.log", cpus=self.cpus.server)
        self._stack.callback(child.close)
        self._ready(child)
        self._pids.append(child.pid)
        self._daemon = self.directory
        for nic in api.call(self.directory, "status").get("nics", []):
            for key, value in nic.get("facts", nic).items():
                if key.endswith("_in_use") and isinstance(value, str):
                    self.facts[key.removesuffix("_in_use")] = value

    @staticmethod
    def _ready(child: Child) -> None:
        try:
            child.wait_line(r"ready: ", READY)
        except DaemonError:
            errors = re.findall(r"^Error: (.*)", child.text(), re.MULTILINE)
            if errors:
                raise DaemonError(str(errors[-1])) from None
            raise

    def _machine(self, extra: str = "") -> Machine:
        argv = [sys.executable, "-m", "xdpvhost", "qemu-args", GUEST, "--run-dir", str(self.directory), "--json"]
        with self.world.host.entered():
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DaemonError(done.stderr.strip().removeprefix("Error: "))
        printed: Any = json.loads(done.stdout)
        words: list[str] = printed["args"] if isinstance(printed, dict) else printed
        files = {int(k): v for k, v in printed["files"].items()} if isinstance(printed, dict) else {}
        network = words[words.index("-netdev") :]
        with self.world.host.entered():
            machine = Machine(self.memory, self.directory, in_slot(network, extra), files, self.cpus.server)
        self._stack.callback(machine.close)
        self._pids = [machine.child.pid]  # the daemon has no part in moving frames
        self.facts["served by"] = f"QEMU {_qemu_version()}"
        return machine

    def _testpmd(self) -> Path:
        if shutil.which(TESTPMD) is None:
            raise DaemonError(f"{TESTPMD} is not installed; on Debian: apt install dpdk")
        if not self.world.own:
            raise DaemonError("testpmd is only run over a veth of our own: it takes the NIC's queue for itself")
        path = self.directory / "dpdk.sock"
        driver, server = min(self.cpus.driver), min(self.cpus.server)
        argv = ["stdbuf", "-oL", TESTPMD, f"--lcores=0@{driver},1@{server}", "--no-huge", "-m", "512", "--no-pci"]
        argv += [
            "--no-telemetry",
            f"--file-prefix={self.directory.name}",
            "--vdev",
            f"net_vhost0,iface={path},queues=1",
        ]
        argv += ["--vdev", f"net_af_xdp0,iface={self.world.iface},start_queue=0,queue_count=1", "--", "-i"]
        argv += ["--nb-cores=1", "--forward-mode=io", "--total-num-mbufs=16384"]
        env = {"RUNTIME_DIRECTORY": str(self.directory)}
        with self.world.host.entered():
            child = Child(argv, self.directory / "testpmd.log", env=env, stdin=subprocess.PIPE)
        self._stack.callback(child.close, 2)
        child.wait_line("testpmd>", READY)
        child.stdin.write(b"start\n")
        child.stdin.flush()
        wait_until(path.exists, READY, f"testpmd's socket {path}")
        self._pids = [child.pid]
        return path

    # ---- what is to be known of it ----

    def threads(self) -> list[int]:
        """Those that serve the guest; the NIC's own (World.threaded) come on top."""
        return cost.threads_of(self._pids) + (self._workers.threads if self._workers else [])

    def copied(self) -> tuple[int, int] | None:
        """Payload bytes that our data plane has copied, and delivered, so far; None where it isn't in use."""
        if self._daemon is None or self.mode.device != "vhost-user":
            return None
        copied = delivered = 0
        for counter in api.call(self._daemon, "stats")["counters"]:
            if counter["name"] == "xdpvhost_copied_bytes_total":
                copied += counter["value"]
            elif counter["name"] in DELIVERED:
                delivered += counter["value"]
        return copied, delivered

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()


def _qemu_version() -> str:
    done = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\S+)", done.stdout)
    return found[1] if found else "of unknown version"


_numbers = itertools.count(1)


def new_directory(parent: Path) -> Path:
    """For one scene's sockets and logs. Short: a unix socket's path has 108 bytes."""
    path = parent / str(next(_numbers))
    path.mkdir()
    return path


def reason_of(error: Exception) -> str:
    """For a row: one line."""
    return " ".join(str(error).split())
