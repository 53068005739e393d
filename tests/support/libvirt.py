# SPDX-License-Identifier: Apache-2.0
"""libvirt as a user has it: a daemon of its own for an unprivileged user, and virsh on it.

Everything of it lies in the world's directory. QEMU runs as that user, too, so socket permissions are tested for real.
"""

import contextlib
import os
import shutil
import signal
import socket
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from . import qemu, uml
from .netns import Namespace
from .process import Process, run, wait_for

USER = GROUP = 65534  # nobody, nogroup
AS_USER = ("setpriv", "--reuid", str(USER), "--regid", str(GROUP), "--clear-groups", "--")


class Libvirt:
    """A running session daemon; virsh() talks to it. close() leaves no domain running."""

    def __init__(self, directory: Path, namespace: Namespace | None = None) -> None:
        """`namespace`: where virtual machines find the devices that they open."""
        directory.chmod(0o755)  # it has to be passed through
        self.directory = directory / "libvirt"
        self.runtime = self.directory / "run"
        self.images = self.directory / "images"
        config = self.directory / "config" / "libvirt"
        for folder in (self.runtime, self.images, config):
            folder.mkdir(parents=True)
        (config / "qemu.conf").write_text('stdio_handler = "file"\n')  # no virtlogd
        self.kernel = Path(shutil.copy(qemu.kernel(), self.images / "kernel"))
        self.initrd = Path(shutil.copy(qemu.initramfs(), self.images / "initrd"))
        for path in (self.directory, *self.directory.rglob("*")):
            os.chown(path, USER, GROUP)
        names = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config"}
        names |= {"XDG_CACHE_HOME": "cache", "XDG_DATA_HOME": "data"}
        self.env = {key: str(self.directory / name) for key, name in names.items()}
        log = directory / "libvirtd.log"
        daemon = [*AS_USER, "libvirtd"]
        command = daemon if namespace is None else namespace.argv(daemon)
        self.process = Process(command, log=log, name="libvirtd", env=self.env)
        try:
            wait_for(self._answers, 20, "libvirtd to answer", interval=0.1)
        except BaseException:
            self.close()
            raise

    def _answers(self) -> bool:
        assert self.process.running, f"libvirtd ended\n{self.process.tail()}"
        return run([*AS_USER, "virsh", "-c", "qemu:///session", "version"], env=self.env, check=False).returncode == 0

    def virsh(self, *args: str | Path) -> str:
        return run([*AS_USER, "virsh", "-q", "-c", "qemu:///session", *args], env=self.env).stdout

    def close(self) -> None:
        pids = [int(path.read_text()) for path in (self.runtime / "libvirt" / "qemu" / "run").glob("vm*.pid")]
        self.process.close()
        for pid in pids:  # of domains that the test did not come to destroy
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class LibvirtGuest(uml.UmlGuest):
    """A Linux guest in a libvirt domain. `elements` is what `xdpvhost libvirt-xml` printed, not a character changed."""

    def __init__(self, libvirt: Libvirt, name: str, elements: Sequence[str], *, release: qemu.Release) -> None:
        super().__init__(Path("its interface element"), name, directory=libvirt.runtime)
        self.libvirt = libvirt
        self.release = release
        self.commands = libvirt.runtime / f"{name}.cmd"
        self.console_log = libvirt.runtime / f"{name}.console"
        self.file = libvirt.directory / f"{name}.xml"
        memory, *interfaces = elements
        self.file.write_text(self._domain(memory, interfaces))

    def _emulator(self) -> Path:
        """libvirt wants a program, and adds its own arguments."""
        if len(self.release.argv) == 1:
            return Path(shutil.which(self.release.argv[0]) or self.release.argv[0])
        wrapper = self.libvirt.directory / "qemu-system-x86_64"
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(self.release.argv)} "$@"\n')
        wrapper.chmod(0o755)
        return wrapper

    def _domain(self, memory: str, interfaces: Sequence[str]) -> str:
        options = ("console=ttyS1", "loglevel=5", "mitigations=off", *self.release.kernel_options)
        return f"""<domain type='qemu'>
<name>{self.name}</name>
<memory unit='MiB'>384</memory>
<vcpu>1</vcpu>
{memory}
<os>
  <type arch='x86_64' machine='q35'>hvm</type>
  <kernel>{self.libvirt.kernel}</kernel>
  <initrd>{self.libvirt.initrd}</initrd>
  <cmdline>{" ".join(options)} guest={self.name}</cmdline>
</os>
<features><acpi/></features>
<devices>
  <emulator>{self._emulator()}</emulator>
  <serial type='unix'><source mode='bind' path='{self.commands}'/></serial>
  <serial type='file'><source path='{self.console_log}'/></serial>
  <memballoon model='none'/>
{"".join(interfaces)}
</devices>
</domain>
"""

    def begin(self) -> None:
        """`virsh define` and `start`. Paused until its first word can be heard."""
        self.libvirt.virsh("define", self.file)
        self.libvirt.virsh("start", "--paused", self.name)
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._channel.connect(str(self.commands))
        self._received = b""
        self.libvirt.virsh("resume", self.name)

    def defined_interface(self) -> ET.Element:
        """What libvirt made of our element."""
        element = ET.fromstring(self.libvirt.virsh("dumpxml", "--inactive", self.name)).find("devices/interface")
        assert element is not None
        return element

    def end(self) -> None:
        self.libvirt.virsh("destroy", self.name)
        self.libvirt.virsh("undefine", self.name)

    def console(self) -> str:
        logs = (self.console_log, self.libvirt.directory / "cache" / "libvirt" / "qemu" / "log" / f"{self.name}.log")
        lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()[-40:]]
        return "\n".join(lines)
