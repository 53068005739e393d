# SPDX-License-Identifier: Apache-2.0
"""A real Linux guest: Debian's User-Mode Linux with the virtio_net driver as the front-end of a vhost-user socket.

How it works. User-Mode Linux is a Linux kernel built as a program. Its "physical" memory is an unlinked file in
TMPDIR, mapped shared, which is what a vhost-user backend needs; virtio_uml.device=SOCK:1 connects to the backend as
a network device. It boots a file system image made here (busybox, a few of the machine's programs with their
libraries, the modules) straight from memory, in about a second.

Our /init serves commands on the first serial line, which is one end of a socket pair: the host writes one line
`ID TIMEOUT BASE64(shell script)`, the guest answers `ID STATUS BASE64(output)`. One command at a time; a script may
leave things running with `cmd >file 2>&1 &`.

The guest's kernel, and every host process that carries one of the guest's processes, live in a PID namespace of
their own, so killing its first process leaves nothing, however it was killed.

What it does not do: reconnect. When the backend goes away, this kernel's device is dead until it boots again.
"""

import base64
import binascii
import hashlib
import lzma
import os
import select
import shlex
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from xdpvhost.compare import cpio
from xdpvhost.errors import DaemonError

from .netns import Namespace
from .process import Process, WaitTimeout, run

KERNEL = cpio.KERNEL
MODULES = ("virtio_net", "ipv6")
PROGRAMS = ("dash", "iperf3", "ethtool", "ip", "ping")
CACHE = Path(__file__).resolve().parents[2] / ".cache"
BOOT_DEADLINE = 60.0

_INIT = r"""#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do insmod /modules/"$module"; done
hostname "$guest"
ip link set lo up
exec 3<>/dev/ttyS0
stty raw -echo <&3
echo ready >&3
while read -r id limit script <&3; do
    echo "$script" | base64 -d >/tmp/.script
    timeout -s KILL "$limit" /bin/sh /tmp/.script </dev/null >/tmp/.output."$id" 2>&1 3>&-
    status=$?
    { printf '%s %s ' "$id" "$status"; base64 -w 0 </tmp/.output."$id"; echo; } >&3
    rm -f /tmp/.output."$id"
done
poweroff -f
"""

# busybox's udhcpc calls it with the lease in the environment.
_UDHCPC = r"""#!/bin/sh
case "$1" in
deconfig) ip addr flush dev "$interface" scope global; ip link set "$interface" up;;
bound | renew)
    ip addr replace "$ip/$mask" dev "$interface"
    [ -z "$router" ] || ip route replace default via "${router%% *}" dev "$interface";;
esac
"""


class GuestError(AssertionError):
    """The guest did not boot, a command in it failed, or it did not answer."""


def module_files(names: Sequence[str] = MODULES) -> list[Path]:
    """The modules' files with all they depend on, in the order in which to insert them."""
    try:
        return cpio.module_files(names)
    except DaemonError as error:
        raise GuestError(f"{error}: run scripts/setup") from error


def _libraries(program: str) -> list[str]:
    return [str(path) for path in cpio.libraries(Path(program))]


_Cpio = cpio.Cpio


def _program(name: str) -> str:
    path = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise GuestError(f"{name} is not installed: run scripts/setup")
    return os.path.realpath(path)


def compiled(name: str, *flags: str) -> Path:
    """tests/support/NAME.c as a program, compiled again only when it changed."""
    source = Path(__file__).with_name(f"{name}.c")
    program = CACHE / f"{name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    if not program.exists():
        CACHE.mkdir(exist_ok=True)
        temporary = program.with_suffix(f".{os.getpid()}")
        run(["gcc", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-o", temporary, source, *flags])
        temporary.rename(program)
    return program


def peer_program() -> Path:
    """tests/support/peer.c; guests have it as `peer`."""
    return compiled("peer", "-lcrypto")


def initramfs(programs: Sequence[str] = PROGRAMS) -> Path:
    """The guest's file system image, made again only when a part of it changed. Kept in .cache/."""
    paths = {name: _program(name) for name in programs} | {"peer": str(peer_program())}
    busybox = _program("busybox")
    modules = module_files()
    inputs = [busybox, *paths.values(), *map(str, modules)]
    key = hashlib.sha256((Path(__file__).read_text() + repr(programs)).encode())
    for item in inputs:
        info = os.stat(item)
        key.update(f"{item} {info.st_size} {info.st_mtime_ns}\n".encode())
    image = CACHE / f"guest-{key.hexdigest()[:16]}.cpio"
    if image.exists():
        return image

    archive = _Cpio()
    for name in ("proc", "sys", "tmp", "run", "etc", "root", "var"):
        archive.folder(name)
    archive.console()
    archive.file("init", _INIT.encode())
    archive.file("usr/share/udhcpc/default.script", _UDHCPC.encode())
    archive.file("etc/udhcpc/default.script", _UDHCPC.encode())
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", 0o644)
    archive.file("etc/group", b"root:x:0:\n", 0o644)
    archive.file("bin/busybox", Path(busybox).read_bytes())
    for applet in run([busybox, "--list"]).stdout.split():
        if applet not in ("busybox", "sh", *paths):
            archive.link(f"bin/{applet}", "busybox")
    archive.link("bin/sh", "dash")  # busybox's own shell would run its applets instead of the programs below
    libraries: set[str] = set()
    for name, path in paths.items():
        archive.file(f"bin/{name}", Path(path).read_bytes())
        libraries.update(_libraries(path))
    for library in sorted(libraries):
        archive.file(library.lstrip("/"), Path(library).read_bytes())
    order = []
    for module in modules:
        body = module.read_bytes()
        name = module.name.split(".ko")[0] + ".ko"
        archive.file(f"modules/{name}", lzma.decompress(body) if module.suffix == ".xz" else body, 0o644)
        order.append(name)
    archive.file("modules/order", "\n".join(order).encode(), 0o644)

    CACHE.mkdir(exist_ok=True)
    for old in CACHE.glob("guest-*.cpio"):
        old.unlink(missing_ok=True)
    temporary = image.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(archive.finish())
    temporary.rename(image)
    return image


class UmlGuest:
    """A guest; `with UmlGuest(socket_path, "vm1", directory=d) as g: g.run("ip addr")`.

    `sock` is the vhost-user socket of its eth0; `vector` instead an option of UML's own network driver (its device is
    vec0), for which the guest runs in the network namespace `inside`. Neither: a guest without a network device.
    `affinity`: the CPUs that it may use, as taskset(1) has them.
    """

    def __init__(
        self,
        sock: Path | None,
        name: str,
        *,
        directory: Path,
        mem: str = "128M",
        vector: str | None = None,
        inside: Namespace | None = None,
        affinity: str | None = None,
    ) -> None:
        self.name = name
        self.sock = sock
        self.vector = vector
        self.inside = inside
        self.affinity = affinity
        self.directory = directory
        self.mem = mem
        self._process: Process | None = None
        self._channel: socket.socket | None = None
        self._received = b""
        self._next_id = 0

    def begin(self) -> None:
        """Starts its kernel; ready() waits for it. Several guests boot at once so."""
        image = initramfs()
        here, there = socket.socketpair()
        self._channel = here
        uml_dir = self.directory / f"uml-{self.name}"
        uml_dir.mkdir(parents=True, exist_ok=True)
        argv = [str(KERNEL), f"mem={self.mem}", f"initrd={image}", f"umid={self.name}", f"uml_dir={uml_dir}/"]
        argv += ["root=/dev/ram0", "panic=-1", "con=null", "con0=null,fd:1", "ssl=null"]
        argv += [f"ssl0=fd:{there.fileno()}", f"guest={self.name}"]
        if self.sock is not None:
            argv.append(f"virtio_uml.device={self.sock}:1")
        if self.vector is not None:
            argv.append(f"vec0:{self.vector}")
        if self.affinity is not None:
            argv = ["taskset", "--cpu-list", self.affinity, *argv]
        argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", *argv]
        with there:
            self._process = Process(
                self.inside.argv(argv) if self.inside else argv,
                log=self.directory / f"{self.name}-console.log",
                name=f"guest {self.name}",
                env={"TMPDIR": "/dev/shm", "HOME": str(uml_dir)},
                pass_fds=(there.fileno(),),
            )

    def ready(self) -> Self:
        """Waits until it takes commands, and has its network device."""
        try:
            if self._line(BOOT_DEADLINE, "its boot") != "ready":
                raise GuestError(f"guest {self.name}: unexpected greeting\n{self.console()}")
            if self.sock is not None:
                self.run("[ -d /sys/class/net/eth0 ]", what=f"find eth0 behind {self.sock}")
        except BaseException:
            self.close()
            raise
        return self

    @property
    def process(self) -> Process:
        assert self._process is not None, f"guest {self.name} was not started"
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    def console(self) -> str:
        return self.process.tail(60)

    def _line(self, timeout: float, what: str) -> str:
        assert self._channel is not None
        end = time.monotonic() + timeout
        while b"\n" not in self._received:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._channel], [], [], left)[0]:
                raise WaitTimeout(f"guest {self.name} did not answer within {timeout:g} s: {what}\n{self.console()}")
            data = self._channel.recv(65536)
            if not data:
                raise GuestError(f"guest {self.name} ended during {what}\n{self.console()}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip()

    def call(self, script: str, timeout: float = 10) -> tuple[int, str]:
        """Runs a shell script in the guest; (exit status, what it printed). 137 says that it took too long."""
        assert self._channel is not None, f"guest {self.name} is not running"
        self._next_id += 1
        wire = base64.b64encode(script.encode()).decode()
        limit = max(1, round(timeout))
        self._channel.sendall(f"{self._next_id} {limit} {wire}\n".encode())
        end = time.monotonic() + limit + 10
        while True:
            number, _, rest = self._line(max(0.1, end - time.monotonic()), script).partition(" ")
            if number == str(self._next_id):
                break
        status, _, body = rest.partition(" ")
        try:
            return int(status), base64.b64decode(body, validate=True).decode(errors="replace")
        except (ValueError, binascii.Error):
            raise GuestError(f"guest {self.name}: garbled answer {rest[:200]!r} to: {script}") from None

    def run(self, script: str, timeout: float = 10, *, what: str | None = None) -> str:
        """Like call(), but a script that fails or takes too long is an error that shows its output."""
        status, output = self.call(script, timeout)
        if status == 137:
            raise GuestError(f"guest {self.name}: not done after {timeout:g} s: {what or script}\n{output}")
        if status != 0:
            raise GuestError(f"guest {self.name}: cannot {what or script}: exit status {status}\n{output}")
        return output

    def spawn(self, command: str) -> str:
        """Starts a command in the background; returns the name of its log file in the guest."""
        log = f"/tmp/log.{self._next_id}"
        self.run(f"setsid /bin/sh -c {shlex.quote(command)} </dev/null >{log} 2>&1 &")
        return log

    def configure(self, *addresses: str, device: str = "eth0") -> None:
        """Sets the link up and gives it addresses ("10.0.0.2/24", "fd00::2/64")."""
        lines = [f"ip link set {device} up"]
        lines += [f"ip addr add {a} dev {device}{' nodad' if ':' in a else ''}" for a in addresses]
        self.run(" && ".join(lines))

    def mac(self, device: str = "eth0") -> str:
        return self.run(f"cat /sys/class/net/{device}/address").strip()

    def close(self) -> None:
        """Kills it. May be called twice, and before begin()."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            self._process.close(grace=0)

    def __enter__(self) -> Self:
        self.begin()
        return self.ready()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
