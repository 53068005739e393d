# SPDX-License-Identifier: Apache-2.0
"""A real QEMU whose guest is the synthetic one: its processor halts at its first instruction, for ever.

What a guest's driver would do is done from outside, by QEMU's own test protocol (docs/devel/testing/qtest in QEMU's
tree): PCI configuration once, then a register write for each notification. The rings are in memory that we share with
QEMU, so frames move exactly as they do with a real guest. What differs: a notification is a message on a socket, where
KVM has an eventfd; and the guest polls, so interrupts are neither delivered nor counted.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..errors import DaemonError
from .memory import Memory
from .processes import Child

PROGRAM = "qemu-system-x86_64"
FIRMWARE = 64 << 10
RESET = 0xFFF0  # where the processor starts, in the firmware's last 64 KiB
HALT = b"\xfa\xf4\xeb\xfd"  # cli; hlt; and again, should anything wake it
SLOT = 4
TIMEOUT = 20.0
BAR_BASE = 0xE000_0000
BAR_STEP = 0x0100_0000


@dataclass(frozen=True)
class Capability:
    """One capability in a device's configuration space."""

    id: int
    offset: int


class Machine:
    """QEMU with one network device in PCI slot 4, its memory ours."""

    def __init__(
        self,
        memory: Memory,
        directory: Path,
        arguments: Sequence[str],
        files: Mapping[int, str],
        cpus: set[int],
    ) -> None:
        """`arguments`: what `xdpvhost qemu-args` prints, for the network; `files`: which it wants to be open."""
        self._stack = ExitStack()
        program = shutil.which(PROGRAM)
        if program is None:
            raise DaemonError(f"{PROGRAM} is not installed; on Debian: apt install qemu-system-x86")
        firmware = directory / "halt.bin"
        firmware.write_bytes((b"\xf4" * RESET + HALT).ljust(FIRMWARE, b"\xf4"))
        size = f"{memory.size >> 20}M"
        backend = f"memory-backend-file,id=mem,size={size},mem-path=/proc/self/fd/{memory.fd},share=on"
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        with theirs:
            argv = [program, "-accel", "tcg", "-machine", "q35,memory-backend=mem", "-m", size, "-object", backend]
            argv += ["-nodefaults", "-display", "none", "-bios", str(firmware), *arguments]
            argv += ["-chardev", f"socket,id=qtest,fd={theirs.fileno()}", "-qtest", "chardev:qtest"]
            argv += ["-qtest-log", "/dev/null"]
            opened = "".join(f" {number}<>{path}" for number, path in files.items())
            argv = ["sh", "-c", f"exec {shlex.join(argv)}{opened}"]
            try:
                log = directory / "qemu.log"
                self.child = Child(argv, log, cpus=cpus, pass_fds=(memory.fd, theirs.fileno()))
            except BaseException:
                self._stack.close()
                raise
        self._stack.callback(self.child.close, 1)
        ours.settimeout(TIMEOUT)
        self.socket = ours
        self._received = b""
        self._next_bar = BAR_BASE
        try:
            self.command("inl 0xcfc")  # it is up
        except BaseException:
            self.close()
            raise

    def command(self, text: str) -> str:
        """Raises DaemonError when QEMU has ended or doesn't answer."""
        try:
            self.socket.sendall(text.encode() + b"\n")
            while True:
                line, end, rest = self._received.partition(b"\n")
                if end:
                    self._received = rest
                    words = line.decode().split()
                    if words[0] == "OK":
                        return words[1] if len(words) > 1 else ""
                    if words[0] != "IRQ":
                        raise DaemonError(f"QEMU answers {line.decode()!r} to {text!r}")
                    continue
                data = self.socket.recv(4096)
                if not data:
                    raise ConnectionResetError
                self._received += data
        except (ConnectionError, TimeoutError) as exc:
            with contextlib.suppress(Exception):
                self.child.popen.wait(1)
            raise DaemonError(f"QEMU does not answer: {self.child.tail()}") from exc

    def read(self, address: int, size: int) -> int:
        return int(self.command(f"read{'bwlq'[size.bit_length() - 1]} {address:#x}"), 0)

    def write(self, address: int, value: int, size: int) -> None:
        self.command(f"write{'bwlq'[size.bit_length() - 1]} {address:#x} {value:#x}")

    # ---- the device's PCI configuration ----

    def config_read(self, offset: int, size: int = 4) -> int:
        self.command(f"outl 0xcf8 {0x8000_0000 | SLOT << 11 | offset & 0xFC:#x}")
        word = int(self.command("inl 0xcfc"), 0)
        return word >> 8 * (offset & 3) & ((1 << 8 * size) - 1)

    def config_write(self, offset: int, value: int) -> None:
        """32 bits."""
        self.command(f"outl 0xcf8 {0x8000_0000 | SLOT << 11 | offset & 0xFC:#x}")
        self.command(f"outl 0xcfc {value:#x}")

    def map_bar(self, number: int) -> int:
        """Gives a memory BAR an address; the address."""
        address, self._next_bar = self._next_bar, self._next_bar + BAR_STEP
        wide = self.config_read(0x10 + 4 * number) & 0x4
        self.config_write(0x10 + 4 * number, address)
        if wide:
            self.config_write(0x14 + 4 * number, 0)
        return address

    def enable(self) -> None:
        """Memory space and bus mastering."""
        self.config_write(0x04, 0x6)

    def capabilities(self) -> list[Capability]:
        found, at = [], self.config_read(0x34, 1)
        while at:
            found.append(Capability(self.config_read(at, 1), at))
            at = self.config_read(at + 1, 1)
        return found

    def close(self) -> None:
        self._stack.close()


def in_slot(arguments: Sequence[str], extra: str = "") -> list[str]:
    """QEMU's arguments with the device in our slot, and with more properties of it."""
    result = list(arguments)
    at = result.index("-device") + 1
    result[at] += f",addr={SLOT:#x}{extra}"
    return result
