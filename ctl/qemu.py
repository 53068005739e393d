# SPDX-License-Identifier: Apache-2.0
"""The QEMU arguments that put a virtual machine on its guest port.

Facts they rest on: vhost-user needs guest memory that can be shared (memfd, share=on); QEMU wants the same number of
`queues` on the netdev as pairs in the device, and 2 vectors a pair plus one for configuration and one for control.
A QEMU that connects must reconnect by itself when the daemon is restarted: `reconnect=SECONDS` until QEMU 9.1,
`reconnect-ms=` from 9.2 on, where the old name is deprecated and later removed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .config import GuestSpec, format_mac
from .errors import ConfigError

Version = tuple[int, int]

QEMU = "qemu-system-x86_64"
OLDEST: Version = (7, 2)  # Debian 12: what is assumed where none is installed


@dataclass(frozen=True)
class Device:
    """What may be chosen for the virtio-net device: entries of each virtqueue (None: QEMU's own), packed virtqueues."""

    queue_size: int | None = None
    packed: bool = False


DEFAULT_DEVICE = Device()


def parse_version(text: str) -> Version:
    """`10.0` or `10.0.2`; ConfigError otherwise."""
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(\.\d+)*", text)
    if not match:
        raise ConfigError(f"--qemu-version {text}: not a version; write it like 10.0")
    return int(match[1]), int(match[2])


def installed_version(binary: str = QEMU) -> Version:
    """What `binary --version` says, or OLDEST when it is not installed or says something else."""
    path = shutil.which(binary)
    if path is None:
        return OLDEST
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return OLDEST
    match = re.search(r"version (\d+)\.(\d+)", answer)
    return (int(match[1]), int(match[2])) if match else OLDEST


def check_memory(size: str) -> str:
    """A size as QEMU takes it: digits and K, M, G or T."""
    if not re.fullmatch(r"[1-9]\d{0,15}[KMGT]", size):
        raise ConfigError(f"--memory {size}: not a size; write it like 1G or 512M")
    return size


def arguments(
    spec: GuestSpec, memory: str = "1G", version: Version = OLDEST, device: Device = DEFAULT_DEVICE
) -> list[str]:
    """argv fragments, option and value in turn; machine, CPU and disk are the user's to add."""
    name = spec.name
    chardev = f"socket,id=chr-{name},path={spec.socket}"  # config refuses commas in paths
    if spec.socket_mode == "client":
        chardev += ",server=on,wait=off"
    elif version >= (9, 2):
        chardev += ",reconnect-ms=1000"
    else:
        chardev += ",reconnect=1"
    netdev = f"vhost-user,id=net-{name},chardev=chr-{name}"
    nic = f"virtio-net-pci,id=nic-{name},netdev=net-{name},mac={format_mac(spec.mac)}"
    if spec.queues > 1:
        netdev += f",queues={spec.queues}"
        nic += f",mq=on,vectors={2 * spec.queues + 2}"
    if device.queue_size:
        nic += f",rx_queue_size={device.queue_size},tx_queue_size={device.queue_size}"
    if device.packed:
        nic += ",packed=on"
    return [
        "-m",
        memory,
        "-object",
        f"memory-backend-memfd,id=mem-{name},size={memory},share=on",
        "-numa",
        f"node,memdev=mem-{name}",
        "-chardev",
        chardev,
        "-netdev",
        netdev,
        "-device",
        nic,
    ]


def shell(args: Sequence[str], files: Mapping[int, str] | None = None) -> str:
    """The arguments as lines to paste into a shell command, one option a line, and files that the shell opens last.

    A file's path is for the shell to expand: it may have a `$(…)` in it.
    """
    lines = [f"{option} {shlex.quote(value)}" for option, value in zip(args[::2], args[1::2], strict=True)]
    lines += [f"{fd}<>{path}" for fd, path in (files or {}).items()]
    return " \\\n".join(lines)
