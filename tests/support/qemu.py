# SPDX-License-Identifier: Apache-2.0
"""QEMU as the front-end: virtual machines started with what `xdpvhost qemu-args` prints, not a character changed.

The machine is emulated (TCG), so it needs no /dev/kvm. Everything that `qemu-args` leaves to the user (machine, CPU,
what to boot) is added in front of its output in a shell script, as a user would paste it.

Two kinds of guest:

- `Qemu`, the bare machine. With `-boot n` its firmware is the guest: iPXE, in the virtio-net device's own ROM.
- `QemuLinux`, Debian's cloud kernel with Debian's virtio_net, on the file system image of support/uml.py. It takes
  commands as a UmlGuest does, over its first serial line; the second is its console, in a log file. scripts/setup
  fetches the kernel's package and only unpacks it, to .cache/kernel.
"""

import json
import lzma
import re
import shlex
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import uml
from .daemon import Daemon
from .process import Process, wait_for

KERNEL = uml.CACHE / "kernel"
MODULES = ("virtio_pci", "virtio_net")  # IPv6 is built into this kernel
TIMEOUT = 10.0


class Qmp:
    """QEMU's monitor: one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(TIMEOUT)
            self._socket.connect(str(path))
            self._lines = self._socket.makefile("rb")
            self.events: list[str] = []
            self._object()  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def _object(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise AssertionError("QEMU closed its monitor")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def execute(self, command: str, **arguments: object) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = self._object()
            if "event" in answer:
                self.events.append(answer["event"])
            elif "error" in answer:
                raise AssertionError(f"QEMU refuses {command}: {answer['error']}")
            else:
                return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Qemu:
    """A virtual machine. `arguments` is the text that `xdpvhost qemu-args` printed; `extra` comes before it."""

    def __init__(
        self,
        arguments: str,
        name: str,
        *,
        directory: Path,
        machine: str = "q35",
        cpus: int = 1,
        extra: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.monitor = directory / f"{name}.qmp"
        self.monitor.unlink(missing_ok=True)
        argv = ["qemu-system-x86_64", "-accel", "tcg", "-machine", machine, "-smp", str(cpus), "-display", "none"]
        argv += ["-nodefaults", "-qmp", f"unix:{self.monitor},server=on,wait=off", *extra]
        self.script = directory / f"{name}.sh"
        self.script.write_text(f"exec {shlex.join(argv)} \\\n{arguments}")
        self._qmp: Qmp | None = None
        log = directory / f"{name}-qemu.log"
        self.process = Process(["sh", self.script], log=log, name=f"QEMU {name}", pass_fds=pass_fds)

    @property
    def qmp(self) -> Qmp:
        """The monitor's connection, made at first use."""
        if self._qmp is None:

            def listening() -> bool:
                assert self.process.running, f"{self.process.name} ended\n{self.process.tail()}"
                return self.monitor.exists()

            wait_for(listening, TIMEOUT, f"the monitor of {self.process.name}")
            self._qmp = Qmp(self.monitor)
        return self._qmp

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


def qemu_args(daemon: Daemon, name: str) -> str:
    """What a user sees."""
    return daemon.cli("qemu-args", name)


def _kernel() -> Path:
    kernel = KERNEL / "vmlinuz"
    if not kernel.exists():
        raise uml.GuestError(f"{kernel} is missing: run scripts/setup")
    return kernel


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


def initramfs(directory: Path) -> Path:
    """User-Mode Linux's image, and behind it an archive with this kernel's modules, which replaces the others'."""
    image = directory / "qemu.cpio"
    if not image.exists():
        cpio = uml._Cpio()
        modules = _modules()
        for name, body in modules.items():
            cpio.file(f"modules/{name}.ko", body, 0o644)
        cpio.file("modules/order", "\n".join(f"{name}.ko" for name in modules).encode(), 0o644)
        image.write_bytes(uml.initramfs().read_bytes() + cpio.finish())
    return image


class QemuLinux(uml.UmlGuest):
    """A Linux guest in QEMU; `with QemuLinux(qemu_args(daemon, "vm1"), "vm1", directory=d) as g: g.run("ip addr")`."""

    def __init__(self, arguments: str, name: str, *, directory: Path, machine: str = "q35", cpus: int = 1) -> None:
        super().__init__(Path("its virtio-net device"), name, directory=directory)
        self.arguments = arguments
        self.machine = machine
        self.cpus = cpus
        self._qemu: Qemu | None = None

    @property
    def qemu(self) -> Qemu:
        assert self._qemu is not None, f"guest {self.name} was not started"
        return self._qemu

    @property
    def console_log(self) -> Path:
        return self.directory / f"{self.name}-console.log"

    def begin(self) -> None:
        kernel, image = _kernel(), initramfs(self.directory)
        here, there = socket.socketpair()
        self._channel = here
        self._received = b""
        extra = ["-kernel", str(kernel), "-initrd", str(image)]
        # Without KVM, QEMU 7.2 crashes when a guest switches MSI-X on for a vhost-user device: docs/vhost-user.md.
        extra += ["-append", f"console=ttyS1 loglevel=5 mitigations=off pci=nomsi guest={self.name}"]
        extra += ["-chardev", f"socket,id=commands,fd={there.fileno()}", "-serial", "chardev:commands"]
        extra += ["-serial", f"file:{self.console_log}"]
        with there:
            self._qemu = Qemu(
                self.arguments,
                self.name,
                directory=self.directory,
                machine=self.machine,
                cpus=self.cpus,
                extra=extra,
                pass_fds=(there.fileno(),),
            )
        self._process = self._qemu.process

    def console(self) -> str:
        lines = self.console_log.read_text(errors="replace").splitlines() if self.console_log.exists() else []
        return "\n".join([self.process.tail(20), *lines[-40:]])

    def reset(self) -> None:
        """Presses the reset button; ready() waits until it takes commands again."""
        self.qemu.qmp.execute("system_reset")

    def close(self) -> None:
        super().close()
        if self._qemu is not None:
            self._qemu.close()
