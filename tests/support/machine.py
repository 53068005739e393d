# SPDX-License-Identifier: Apache-2.0
"""The lab: a whole machine in QEMU, for what the kernel that the tests run on lacks (docs/lab.md).

How it works. `boot()` starts a q35 with an IOMMU and two igb cards with SR-IOV, with Debian's newest kernel that
scripts/setup unpacked to .cache/lab/kernel. Its first file system is small: busybox, the modules that 9p needs, and
`machine.init`, which mounts what it needs from the host (9p, read-only, below an overlay in the machine's memory):

    /usr                    the host's: Python, libraries, iproute2, DPDK …
    /usr/lib/modules/…      of .cache/lab/kernel
    the checkout            with its venv, at the same path as here
    /lab/out                a folder of the caller's, the only one that can be written to: results

So there is no image to build or to go stale (decision 0010). One command runs, in bash, in the checkout. What it prints
comes over a virtio-serial port while it runs, its exit status over another, the kernel's console over the first serial
line into a log. Then the machine ends.

Network cards, by name there (`KINDS` says which machine has what):

    nic0   igb, 7 VFs possible, on a port with ACS: each function is an IOMMU group of its own
    wire0  virtio-net, the other end of nic0's cable
    nic1   igb on a port without ACS: all its functions are one IOMMU group. Its cable ends nowhere

The network's other half is a QEMU hub: frames of nic0 and of its VFs come out of wire0, and the other way round.
"""

import fcntl
import hashlib
import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import uml
from .process import run as run_here
from .qemu import NoRelease, Release, release

TOP = Path(__file__).resolve().parents[2]
LAB = uml.CACHE / "lab"
KERNEL = LAB / "kernel"
FIRST = ("9pnet_virtio", "9p", "overlay")  # what mounting the rest needs; virtio-pci and virtio-console are built in
LATER = ("virtio_net", "igb", "tun", "veth", "bridge", "8021q", "vhost_net", "macvtap", "vfio_pci")
ETC = ("passwd", "group", "nsswitch.conf", "ld.so.cache", "protocols", "services", "ethertypes", "localtime")
OPTIONS = ("console=ttyS0", "loglevel=4", "mitigations=off", "nokaslr", "panic=-1", "audit=0", "apparmor=0")
IOMMU = ("intel_iommu=on",)
ADDRESSES = {"nic0": "52:54:00:4c:00:01", "nic1": "52:54:00:4c:00:02", "wire0": "52:54:00:4c:00:03"}


class MachineError(AssertionError):
    """The lab's machine can't be made, or did not do its work; the message says why, with its console."""


@dataclass(frozen=True)
class Kind:
    """What a machine has. `without`: modules that are not there at all. Memory in MiB."""

    name: str
    iommu: bool = True
    without: tuple[str, ...] = ()
    cpus: int = 2
    memory: int = 2048


KINDS = {
    kind.name: kind
    for kind in (
        Kind("full"),
        Kind("bare", iommu=False, without=("vhost_net", "macvtap")),
    )
}


def kernel() -> tuple[Path, str]:
    """The kernel's image and its release; MachineError with the reason of scripts/setup."""
    reason = KERNEL / "reason"
    if reason.exists():
        raise MachineError(reason.read_text().strip())
    releases = sorted((KERNEL / "usr" / "lib" / "modules").glob("*"))
    if not releases:
        raise MachineError(f"{KERNEL} is missing: run scripts/setup")
    return KERNEL / "boot" / "vmlinuz", releases[-1].name


def newer_qemu() -> Release:
    """The first QEMU with igb was 8: the one that scripts/setup unpacked, else the installed one if it is no older."""
    try:
        return release("newer")
    except NoRelease as reason:
        installed = release("installed")
        if installed.version >= (8, 0):
            return installed
        raise MachineError(f"the lab needs QEMU 8 or later: {reason}") from None


@cache
def _accelerator(argv: tuple[str, ...]) -> str:
    """`kvm` where a guest really runs under it, which a /dev/kvm does not promise; else `tcg`.

    The guest is a boot sector that writes 16 to the device that ends QEMU with the status 2 * 16 + 1.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    code = bytes.fromhex("b010 ba0105 ee f4 ebfd")  # mov al, 16; mov dx, 0x501; out dx, al; hlt; jmp
    with tempfile.TemporaryDirectory(prefix="xv-") as folder:
        disk = Path(folder) / "disk"
        disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
        tried = [*argv, "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-nodefaults", "-display", "none"]
        tried += ["-device", "isa-debug-exit", "-drive", f"file={disk},format=raw,snapshot=on"]
        try:
            done = subprocess.run(tried, capture_output=True, timeout=10, check=False)
        except subprocess.TimeoutExpired:
            return "tcg"
    return "kvm" if done.returncode == 33 else "tcg"


def _module_folder(without: Sequence[str]) -> Path:
    """What the machine sees as /usr/lib/modules/RELEASE. A module that is left out is not mentioned there, either."""
    _, version = kernel()
    whole = KERNEL / "usr" / "lib" / "modules" / version
    if not without:
        return whole
    base = LAB / f"without-{'-'.join(sorted(without))}" / "usr"
    with _making():
        return _modules_without(without, base, whole)


def _modules_without(without: Sequence[str], base: Path, whole: Path) -> Path:
    version = whole.name
    folder = base / "lib" / "modules" / version
    if not folder.exists() or folder.stat().st_mtime < whole.stat().st_mtime:
        making = base.with_name("usr.making")
        if making.exists():
            run_here(["rm", "-r", making])
        copy = making / "lib" / "modules" / version
        copy.parent.mkdir(parents=True)
        run_here(["cp", "--archive", "--link", whole, copy])
        for name in without:
            found = [path for path in copy.rglob("*.ko") if path.stem.replace("-", "_") == name]
            if not found:
                raise MachineError(f"there is no module {name} in {whole} that could be left out")
            found[0].unlink()
        for index in copy.glob("modules.*"):
            if index.name not in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
                index.unlink()  # or depmod would write through the hard links
        run_here(["depmod", "-b", making, version])
        copy.touch()
        if base.exists():
            run_here(["rm", "-r", base])
        making.rename(base)
    return folder


def _first_modules() -> dict[str, bytes]:
    """FIRST with all they depend on, in the order in which to insert them."""
    _, version = kernel()
    folder = KERNEL / "usr" / "lib" / "modules" / version
    needs = dict(line.split(":", 1) for line in (folder / "modules.dep").read_text().splitlines())
    paths = {Path(path).stem.replace("-", "_"): path for path in needs}
    ordered: dict[str, bytes] = {}
    for name in FIRST:
        for path in [*reversed(needs[paths[name]].split()), paths[name]]:  # modules.dep has the last needed first
            ordered.setdefault(Path(path).name, (folder / path).read_bytes())
    return ordered


@contextmanager
def _making() -> Iterator[None]:
    """What several machines use is made once, by the first, also when all are started at once."""
    with (LAB / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _base() -> bytes:
    """The part of the first file system that is the same for every start. Kept in .cache/lab."""
    image, _ = kernel()
    busybox = Path(uml._program("busybox"))
    init = Path(__file__).with_suffix(".init")
    key = hashlib.sha256(Path(__file__).read_bytes() + init.read_bytes())
    for path in (busybox, image):
        key.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    made = LAB / f"base-{key.hexdigest()[:16]}.cpio"
    with _making():
        if made.exists():
            return made.read_bytes()
        cpio = uml._Cpio()
        for name in ("proc", "sys", "dev", "tmp", "run", "etc", "root", "var", "usr", "lab"):
            cpio.folder(name)
        for name in ("bin", "sbin", "lib", "lib64"):
            cpio.link(name, f"usr/{name}")
        cpio.console()
        cpio.file("init", init.read_bytes())
        cpio.file("busybox", busybox.read_bytes())
        modules = _first_modules()
        for name, body in modules.items():
            cpio.file(f"modules/{name}", body, 0o644)
        cpio.file("modules/order", "\n".join(modules).encode(), 0o644)
        for old in LAB.glob("base-*"):
            old.unlink()
        data = bytes(cpio.data)
        temporary = made.with_suffix(".making")
        temporary.write_bytes(data)
        temporary.rename(made)
        return data


def _etc(cpio: uml._Cpio) -> None:
    """The few things of /etc that programs look for. Not the rest: it is nobody's business there."""
    for name in ETC:
        path = Path("/etc") / name
        if path.exists():
            cpio.file(f"etc/{name}", path.read_bytes(), 0o644)
    cpio.file("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n", 0o644)
    for path in Path("/etc/alternatives").iterdir():
        if path.is_symlink():
            cpio.link(f"etc/alternatives/{path.name}", os.readlink(path))


@dataclass(frozen=True)
class Boot:
    """A machine that is about to start: `argv` is QEMU's, the files are in `directory`."""

    argv: list[str]
    directory: Path
    accelerator: str

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    @property
    def qemu_log(self) -> Path:
        return self.directory / "qemu.log"

    def status(self) -> int | None:
        """The exit status of the command; None as long as, or because, it did not end by itself."""
        text = (self.directory / "status").read_text() if (self.directory / "status").exists() else "Nehalem"
        return int(text) if text.strip() else None

    def report(self) -> str:
        """The end of the console's log, and what QEMU said."""
        logs = [log.read_text(errors="replace") for log in (self.console_log, self.qemu_log) if log.exists()]
        return "\n".join("\n".join(text.replace("\r", "").splitlines()[-60:]) for text in logs)


def prepare(kind: Kind, command: str, *, out: Path, directory: Path, output: int | None) -> Boot:
    """A machine that runs `command` (bash); its output goes to the socket `output`, or to the terminal without one."""
    image, version = kernel()
    found = newer_qemu()
    accelerator = _accelerator(found.argv)
    settings = {
        "lab_top": str(TOP),
        "lab_release": version,
        "lab_kind": kind.name,
        "lab_modules": " ".join(m for m in LATER if m not in kind.without),
        "lab_addresses": " ".join(f"{name}={mac}" for name, mac in ADDRESSES.items()),
        "lab_terminal": "",
    }
    if output is None:
        size = os.get_terminal_size() if sys.stdin.isatty() else os.terminal_size((120, 40))
        settings["lab_terminal"] = f"rows {size.lines} cols {size.columns}"
    cpio = uml._Cpio()
    cpio.inode = 1 << 20  # not the numbers of the base's files
    cpio.file("lab.conf", "".join(f"{k}={shlex.quote(v)}\n" for k, v in settings.items()).encode(), 0o644)
    cpio.file("lab.command", f"{command}\n".encode(), 0o755)
    _etc(cpio)
    initrd = directory / "initramfs.cpio"
    initrd.write_bytes(_base() + cpio.finish())

    cpu = "host" if accelerator == "kvm" else "Nehalem"
    options = [*OPTIONS, *(IOMMU if kind.iommu else ("intel_iommu=off",))]
    argv = [*found.argv, "-nodefaults", "-display", "none", "-no-reboot", "-accel", accelerator, "-cpu", cpu]
    argv += ["-machine", "q35,kernel-irqchip=split", "-smp", str(kind.cpus), "-m", str(kind.memory)]
    argv += ["-kernel", str(image), "-initrd", str(initrd), "-append", " ".join(options)]
    if kind.iommu:
        argv += ["-device", "intel-iommu,intremap=on,caching-mode=on"]
    argv += ["-chardev", f"file,id=console,path={directory / 'console.log'}", "-serial", "chardev:console"]
    argv += ["-chardev", f"file,id=status,path={directory / 'status'}", "-device", "virtio-serial-pci"]
    argv += ["-device", "virtserialport,chardev=status,name=status"]
    if output is None:
        argv += ["-chardev", "stdio,id=user,signal=off", "-serial", "chardev:user"]
    else:
        argv += ["-chardev", f"socket,id=user,fd={output}", "-device", "virtserialport,chardev=user,name=output"]
    for tag, path in (("usr", Path("/usr")), ("modules", _module_folder(kind.without)), ("top", TOP)):
        argv += ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none,readonly=on,multidevs=remap"]
    argv += ["-virtfs", f"local,path={out},mount_tag=out,security_model=none,multidevs=remap"]
    argv += _cards()
    return Boot(argv, directory, accelerator)


def _cards() -> list[str]:
    """The network cards and the cables between them."""
    argv = []
    for number, (name, acs) in enumerate((("nic0", "off"), ("nic1", "on"))):
        argv += ["-device", f"pcie-root-port,id=port-{name},chassis={number + 1},disable-acs={acs}"]
        argv += ["-netdev", f"hubport,id={name},hubid={number}"]
        argv += ["-device", f"igb,bus=port-{name},netdev={name},mac={ADDRESSES[name]}"]
    argv += ["-netdev", "hubport,id=wire0,hubid=0"]
    return [*argv, "-device", f"virtio-net-pci,netdev=wire0,mac={ADDRESSES['wire0']},"]


def run(kind: Kind, command: str, *, out: Path, timeout: float, output: Callable[[bytes], object] | None) -> int:
    """Boots a machine, runs the command in it, and returns its exit status.

    `output` gets what it prints, while it runs; without one it has the caller's terminal. `out` is its /lab/out.
    MachineError, with the end of the console's log, if there is no status after `timeout` seconds, or ever. The whole
    log is out/console-KIND.log.
    """
    here, there = socket.socketpair()
    with here, tempfile.TemporaryDirectory(prefix="xv-lab-") as folder:
        with there:
            boot = prepare(
                kind, command, out=out, directory=Path(folder), output=None if output is None else there.fileno()
            )
            stdin = None if output is None else subprocess.DEVNULL
            with boot.qemu_log.open("wb") as log:
                process = subprocess.Popen(boot.argv, stdin=stdin, stderr=log, pass_fds=(there.fileno(),))
        end = time.monotonic() + timeout
        try:
            while output is not None and select.select([here], [], [], max(0, end - time.monotonic()))[0]:
                data = here.recv(1 << 16)
                if not data:
                    break
                output(data)
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise MachineError(f"the lab's machine was not done after {timeout:g} s\n{boot.report()}") from None
        finally:
            process.kill()
            process.wait()
            shutil.copy(boot.console_log, out / f"console-{kind.name}.log")
        status = boot.status()
        if status is None:
            raise MachineError(f"the lab's machine ended (QEMU: {process.returncode})\n{boot.report()}")
        return status
