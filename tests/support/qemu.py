# SPDX-License-Identifier: Apache-2.0
"""QEMU as the front-end: virtual machines started with what `xdpvhost qemu-args` prints, not a character changed.

The machine is emulated (TCG), so it needs no /dev/kvm. Everything that `qemu-args` leaves to the user (machine, CPU,
what to boot) is added in front of its output in a shell script, as a user would paste it.

Two kinds of guest:

- `Qemu`, the bare machine. With `-boot n` its firmware is the guest: iPXE, in the virtio-net device's own ROM.
- `QemuLinux`, Debian's cloud kernel with Debian's virtio_net, on the file system image of support/uml.py. It takes
  commands as a UmlGuest does, over its first serial line; the second is its console, in a log file. scripts/setup
  fetches the kernel's package and only unpacks it, to .cache/kernel.

And two releases of QEMU: the one that is installed, and a newer one that scripts/setup unpacks to .cache/qemu.
"""

import hashlib
import json
import lzma
import os
import re
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from . import uml
from .daemon import Daemon
from .netns import Namespace
from .process import Process, run, wait_for
from .qmp import Qmp

KERNEL = uml.CACHE / "kernel"
NEWER = uml.CACHE / "qemu"
PROGRAM = "qemu-system-x86_64"
MODULES = ("virtio_pci", "virtio_net")  # IPv6 is built into this kernel
TIMEOUT = 10.0


@dataclass(frozen=True)
class Release:
    """A QEMU: the program, with the folders of its firmware, and its version."""

    argv: tuple[str, ...]
    version: tuple[int, int]

    @property
    def kernel_options(self) -> tuple[str, ...]:
        """Without KVM, 7.2 crashes when a guest switches MSI-X on for a vhost-user device, and 10 does not."""
        return ("pci=nomsi",) if self.version < (10, 0) else ()


class NoRelease(Exception):
    """There is no such QEMU here; the message says why."""


@cache
def release(which: str) -> Release:
    """`installed`, or the `newer` one; NoRelease with the reason of scripts/setup."""
    if which == "installed":
        argv: tuple[str, ...] = (PROGRAM,)
    else:
        reason = NEWER / "reason"
        if reason.exists():
            raise NoRelease(reason.read_text().strip())
        share = NEWER / "usr" / "share"
        folders = (share / "seabios", share / "qemu", Path("/usr/lib/ipxe/qemu"))
        argv = (str(NEWER / "usr" / "bin" / PROGRAM), *(word for path in folders for word in ("-L", str(path))))
    match = re.search(r"version (\d+)\.(\d+)", run([argv[0], "--version"]).stdout)
    assert match is not None, f"{argv[0]} says no version"
    return Release(argv, (int(match[1]), int(match[2])))


class Qemu:
    """A virtual machine. `arguments` is the text that `xdpvhost qemu-args` printed; `extra` comes before it."""

    def __init__(
        self,
        arguments: str,
        name: str,
        *,
        directory: Path,
        release: Release,
        machine: str = "q35",
        cpus: int = 1,
        extra: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        namespace: Namespace | None = None,
    ) -> None:
        """`namespace`: where it runs, for one that opens a tap; any does for one that connects to a socket."""
        self.name = name
        self.monitor = directory / f"{name}.qmp"
        self.monitor.unlink(missing_ok=True)
        argv = [*release.argv, "-accel", "tcg", "-machine", machine, "-smp", str(cpus), "-display", "none"]
        argv += ["-nodefaults", "-qmp", f"unix:{self.monitor},server=on,wait=off", *extra]
        self.script = directory / f"{name}.sh"
        self.script.write_text(f"exec {shlex.join(argv)} \\\n{arguments}")
        self._qmp: Qmp | None = None
        log = directory / f"{name}-qemu.log"
        command: list[str | os.PathLike[str]] = ["sh", self.script]
        self.process = Process(
            command if namespace is None else namespace.argv(command), log=log, name=f"QEMU {name}", pass_fds=pass_fds
        )

    @property
    def qmp(self) -> Qmp:
        """The monitor's connection, made at first use."""
        if self._qmp is None:

            def listening() -> bool:
                assert self.process.running, f"{self.process.name} ended\n{self.process.tail()}"
                return self.monitor.exists()

            wait_for(listening, TIMEOUT, f"the monitor of {self.process.name}")
            self._qmp = Qmp(self.monitor, self.process.name)
        return self._qmp

    def plug(self, arguments: Sequence[str], bus: str) -> None:
        """Does by the monitor what the network's part of `qemu-args --json` does at start; the device goes to `bus`."""
        chardev = _properties(arguments, "-chardev")
        data: dict[str, object] = {"addr": {"type": "unix", "data": {"path": chardev["path"]}}}
        data["server"] = chardev.get("server") == "on"
        if data["server"]:
            data["wait"] = False
        data |= {key: int(chardev[key]) for key in ("reconnect", "reconnect-ms") if key in chardev}
        backend = {"type": "socket", "data": data}
        netdev = _properties(arguments, "-netdev")
        device = _properties(arguments, "-device")
        self.qmp.execute("chardev-add", {"id": chardev["id"], "backend": backend})
        self.qmp.execute("netdev_add", _typed(netdev, "type"))
        self.qmp.execute("device_add", {**_typed(device, "driver"), "bus": bus})

    def unplug(self, arguments: Sequence[str]) -> None:
        """Asks the guest to give the device up, waits until it has, and takes away what is behind it.

        A vhost-user netdev takes its chardev along.
        """
        device = _properties(arguments, "-device")["id"]
        self.qmp.execute("device_del", {"id": device})
        self.qmp.wait_event("DEVICE_DELETED", device=device)
        self.qmp.execute("netdev_del", {"id": _properties(arguments, "-netdev")["id"]})

    def kill(self) -> None:
        """kill -9: QEMU says goodbye to nobody."""
        self.process.send(signal.SIGKILL)
        assert self.process.wait(TIMEOUT) == -signal.SIGKILL

    def close(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        self.process.close(grace=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _properties(arguments: Sequence[str], option: str) -> dict[str, str]:
    """`type,key=value,…` of an option; the type has the key "" here."""
    value = arguments[arguments.index(option) + 1]
    first, *rest = value.split(",")
    return {"": first} | dict(item.split("=", 1) for item in rest)


def _typed(properties: dict[str, str], first: str) -> dict[str, object]:
    """As QMP has them: numbers and booleans, and the type under the key `first`."""
    words: dict[str, object] = {"on": True, "off": False}
    return {key or first: words.get(v, int(v) if v.isdigit() else v) for key, v in properties.items()}


def _command(name: str, release: Release, options: Sequence[str]) -> list[str]:
    return ["qemu-args", name, "--qemu-version", f"{release.version[0]}.{release.version[1]}", *options]


def qemu_args(daemon: Daemon, name: str, release: Release, *options: str) -> str:
    """What a user sees."""
    return daemon.cli(*_command(name, release, options))


def qemu_words(daemon: Daemon, name: str, release: Release, *options: str) -> list[str]:
    """The same as a list."""
    words: list[str] = json.loads(daemon.cli(*_command(name, release, ["--json", *options])))
    return words


def kernel() -> Path:
    image = KERNEL / "vmlinuz"
    if not image.exists():
        raise uml.GuestError(f"{image} is missing: run scripts/setup")
    return image


def _modules() -> dict[str, bytes]:
    """The modules and all they depend on, in the order in which to insert them."""
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in KERNEL.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered:
            return
        path = files.get(name)
        if path is None:
            raise uml.GuestError(f"module {name} is not in {KERNEL}: remove that folder and run scripts/setup")
        body = path.read_bytes()
        if path.suffix == ".xz":
            body = lzma.decompress(body)
        depends = re.search(rb"\0depends=([^\0]*)\0", body)
        for needed in depends[1].decode().split(",") if depends else ():
            if needed:
                add(needed.replace("-", "_"))
        ordered[name] = body

    for name in MODULES:
        add(name)
    return ordered


def hoard_program() -> Path:
    """tests/support/hoard.c; guests have it as `hoard`."""
    return uml.compiled("hoard", "-static")


def initramfs() -> Path:
    """User-Mode Linux's image, and behind it an archive with this kernel's modules, which replaces the others'."""
    base = uml.initramfs()
    hoard = hoard_program()
    key = f"{base.name} {hoard.name} {kernel().stat().st_mtime_ns} {MODULES}"
    image = base.with_name(f"qemu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cpio")
    if not image.exists():
        cpio = uml._Cpio()
        modules = _modules()
        for name, body in modules.items():
            cpio.file(f"modules/{name}.ko", body, 0o644)
        cpio.file("bin/hoard", hoard.read_bytes())
        cpio.file("modules/order", "\n".join(f"{name}.ko" for name in modules).encode(), 0o644)
        for old in uml.CACHE.glob("qemu-*.cpio"):
            old.unlink(missing_ok=True)
        temporary = image.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(base.read_bytes() + cpio.finish())
        temporary.rename(image)
    return image


class QemuLinux(uml.UmlGuest):
    """A Linux guest in QEMU; `with QemuLinux(qemu_args(daemon, "vm1", r), "vm1", release=r, …) as g: g.run("ip addr")`.

    Without network arguments it has no eth0, and ready() does not look for one. `identity` tells machines apart that
    are one guest, before and after its migration.
    """

    def __init__(
        self,
        arguments: str,
        name: str,
        *,
        directory: Path,
        release: Release,
        machine: str = "q35",
        cpus: int = 1,
        extra: Sequence[str] = (),
        identity: str = "",
        namespace: Namespace | None = None,
    ) -> None:
        super().__init__(Path("its virtio-net device") if "-netdev" in arguments else None, name, directory=directory)
        self.arguments = arguments
        self.release = release
        self.machine = machine
        self.cpus = cpus
        self.extra = tuple(extra)
        self.identity = identity or name
        self.namespace = namespace
        self._qemu: Qemu | None = None

    @property
    def qemu(self) -> Qemu:
        assert self._qemu is not None, f"guest {self.name} was not started"
        return self._qemu

    @property
    def console_log(self) -> Path:
        return self.directory / f"{self.identity}-console.log"

    def begin(self) -> None:
        here, there = socket.socketpair()
        self._channel = here
        self._received = b""
        extra = ["-kernel", str(kernel()), "-initrd", str(initramfs())]
        append = ["console=ttyS1", "loglevel=5", "mitigations=off", *self.release.kernel_options, f"guest={self.name}"]
        extra += ["-append", " ".join(append)]
        extra += ["-chardev", f"socket,id=commands,fd={there.fileno()}", "-serial", "chardev:commands"]
        extra += ["-serial", f"file:{self.console_log}", *self.extra]
        with there:
            self._qemu = Qemu(
                self.arguments,
                self.identity,
                directory=self.directory,
                release=self.release,
                machine=self.machine,
                cpus=self.cpus,
                extra=extra,
                pass_fds=(there.fileno(),),
                namespace=self.namespace,
            )
        self._process = self._qemu.process

    def console(self) -> str:
        lines = self.console_log.read_text(errors="replace").splitlines() if self.console_log.exists() else []
        return "\n".join([self.process.tail(20), *lines[-40:]])

    def take_over(self, other: "QemuLinux") -> None:
        """From now on it answers: `other` has migrated here."""
        self._next_id = other._next_id

    def reset(self) -> None:
        """Presses the reset button; ready() waits until it takes commands again."""
        self.qemu.qmp.execute("system_reset")

    def close(self) -> None:
        super().close()
        if self._qemu is not None:
            self._qemu.close()
