# SPDX-License-Identifier: Apache-2.0
"""What a small Linux guest boots from: a cpio archive, the libraries of programs, the modules of User-Mode Linux."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import DaemonError

KERNEL = Path("/usr/bin/linux.uml")
MODULE_ROOT = Path("/usr/lib/uml/modules")
FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Cpio:
    """A cpio archive in the "newc" format, which the kernel unpacks as its first file system."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.inode = 0
        self.folders: set[str] = set()

    def _add(self, name: str, mode: int, body: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self.inode += 1
        raw = name.encode() + b"\0"
        fields = (self.inode, mode, 0, 0, 1, 0, len(body), 0, 0, *device, len(raw), 0)
        self.data += b"070701" + b"".join(b"%08X" % f for f in fields) + raw
        self.data += b"\0" * (-len(self.data) % 4) + body
        self.data += b"\0" * (-len(self.data) % 4)

    def folder(self, name: str) -> None:
        if name and name not in self.folders:
            self.folder(name.rpartition("/")[0])
            self.folders.add(name)
            self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, body: bytes, mode: int = 0o755) -> None:
        self.folder(name.rpartition("/")[0])
        self._add(name, stat.S_IFREG | mode, body)

    def link(self, name: str, target: str) -> None:
        self.folder(name.rpartition("/")[0])
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        self.folder("dev")
        self._add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0)
        return bytes(self.data)


def program(name: str, package: str) -> Path:
    """An installed program's file. Raises DaemonError that names Debian's package."""
    path = shutil.which(name, path=FOLDERS)
    if path is None:
        raise DaemonError(f"{name} is not installed; on Debian: apt install {package}")
    return Path(path).resolve()


def libraries(path: Path) -> list[Path]:
    """What a program is linked with. Raises DaemonError."""
    done = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DaemonError(f"ldd {path}: {done.stderr.strip()}")
    words = [line.split("=>")[-1].split()[0] for line in done.stdout.splitlines() if "/" in line]
    found = [Path(word) for word in words if word.startswith("/")]
    # glibc loads it by itself when a thread is cancelled; iperf3 does that
    return found + [word.with_name("libgcc_s.so.1") for word in found if word.name == "libc.so.6"]


def module_files(names: Sequence[str]) -> list[Path]:
    """The modules' files with all they depend on, in the order in which to insert them (modules.dep is reversed)."""
    versions = sorted(MODULE_ROOT.iterdir()) if MODULE_ROOT.is_dir() else []
    if not KERNEL.exists() or not versions:
        raise DaemonError("User-Mode Linux is not installed; on Debian: apt install user-mode-linux")
    root = versions[-1]
    needs: dict[str, list[str]] = {}
    for line in (root / "modules.dep").read_text().splitlines():
        module, _, dependencies = line.partition(":")
        needs[module] = dependencies.split()
    ordered: list[str] = []
    for name in names:
        path = next((m for m in needs if m.rpartition("/")[2].split(".ko")[0] == name), None)
        if path is None:
            continue  # built into this kernel
        ordered += [m for m in [*reversed(needs[path]), path] if m not in ordered]
    return [root / m for m in ordered]
