# SPDX-License-Identifier: Apache-2.0
"""Network namespaces and veth pairs with random names. What a World makes is undone when it closes, last first."""

import ctypes
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .process import Process, run

CLONE_NEWNET = 0x40000000
QUEUES = 4

# Own sysfs, so that /sys/class/net shows the namespace's devices, but the machine's bpffs and tracefs on top of it.
# (`ip netns exec` would hide both.)
_SYSFS = """
set -e
keep=$(mktemp -d)
mount -t tmpfs -o size=4k none "$keep"
mkdir "$keep/bpf" "$keep/tracing"
mount --bind /sys/fs/bpf "$keep/bpf"
mount --bind /sys/kernel/tracing "$keep/tracing"
mount -t sysfs none /sys
mount --bind "$keep/bpf" /sys/fs/bpf
mount --bind "$keep/tracing" /sys/kernel/tracing
umount -l "$keep"
rmdir "$keep"
exec "$@"
"""


@dataclass(frozen=True)
class Namespace:
    name: str
    directory: Path  # where logs of its processes go

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    def argv(self, argv: Sequence[str | os.PathLike[str]], *, own_sysfs: bool = False) -> list[str]:
        """The command line that runs `argv` in this namespace; own_sysfs: /sys shows the namespace's devices."""
        prefix = ["nsenter", f"--net={self.path}", "--"]
        if own_sysfs:
            prefix += ["unshare", "--mount", "--", "sh", "-c", _SYSFS, "sh"]
        return prefix + [os.fspath(a) for a in argv]

    def run(
        self,
        *argv: str | os.PathLike[str],
        check: bool = True,
        timeout: float = 30,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return run(self.argv(argv), check=check, timeout=timeout, input=input)

    def ip(self, *args: str) -> None:
        self.run("ip", *args)

    def json(self, *argv: str) -> Any:
        return json.loads(self.run(*argv).stdout or "null")

    def start(
        self,
        *argv: str | os.PathLike[str],
        env: Mapping[str, str] | None = None,
        own_sysfs: bool = False,
        stdin: int | None = None,
        separate_stdout: bool = False,
    ) -> Process:
        base = os.path.basename(os.fspath(argv[0]))
        log = self.directory / f"{base}-{secrets.token_hex(3)}.log"
        return Process(
            self.argv(argv, own_sysfs=own_sysfs),
            log=log,
            name=f"{base} in {self.name}",
            env=env,
            stdin=stdin,
            separate_stdout=separate_stdout,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in this namespace inside the block: sockets made there stay there."""
        libc = ctypes.CDLL(None, use_errno=True)

        def setns(fd: int) -> None:
            if libc.setns(fd, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter network namespace {self.name}")

        old = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            new = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(new)
            finally:
                os.close(new)
            try:
                yield
            finally:
                setns(old)
        finally:
            os.close(old)

    def mac(self, device: str) -> str:
        return str(self.json("ip", "-j", "link", "show", "dev", device)[0]["address"])


class World:
    """Namespaces, links and a temporary directory; everything is undone at close, also after a failure half-way."""

    def __init__(self, directory: Path | None = None) -> None:
        self.stack = ExitStack()
        self.token = secrets.token_hex(3)
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="xv-"))  # short: a unix socket's path has 108 bytes
            self.stack.callback(shutil.rmtree, directory, ignore_errors=True)
        self.directory = directory

    def namespace(self, label: str) -> Namespace:
        namespace = Namespace(f"xv-{self.token}-{label}", self.directory)
        run(["ip", "netns", "add", namespace.name])
        self.stack.callback(run, ["ip", "netns", "del", namespace.name])
        namespace.ip("link", "set", "lo", "up")
        return namespace

    def veth(
        self,
        a: Namespace,
        a_name: str,
        b: Namespace,
        b_name: str,
        *,
        queues: int = QUEUES,
        mtu: int = 1500,
    ) -> None:
        """A veth pair with `queues` receive and transmit queues at both ends, both up."""
        count = ("numtxqueues", str(queues), "numrxqueues", str(queues))
        here = (a_name, "netns", a.name, *count)
        there = (b_name, "netns", b.name, *count)
        run(["ip", "link", "add", *here, "type", "veth", "peer", "name", *there])
        self.stack.callback(a.run, "ip", "link", "del", a_name, check=False)
        for namespace, name in ((a, a_name), (b, b_name)):
            namespace.ip("link", "set", name, "mtu", str(mtu), "up")

    def close(self) -> None:
        self.stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
