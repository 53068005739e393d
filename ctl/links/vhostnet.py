# SPDX-License-Identifier: Apache-2.0
"""/dev/vhost-net: is it there, who may open it, and where its threads run.

The module vhost_net gives each queue of a guest a kernel thread that moves frames between the guest's rings and a tap.
Whoever starts the virtual machine opens /dev/vhost-net; xdpvhost only looks.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tap import Owner

NODE = Path("/dev/vhost-net")
ZEROCOPY = Path("/sys/module/vhost_net/parameters/experimental_zcopytx")


@dataclass(frozen=True)
class Missing:
    """Why /dev/vhost-net can't be used, and what would help."""

    cause: str
    remedy: str


def missing(who: Owner | None = None, node: Path = NODE) -> Missing | None:
    """None when we may use it, and the user and group who shall start the virtual machine as well."""
    try:
        os.close(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        found = node.stat()
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.EACCES):
            return Missing(f"{node} may not be opened ({exc.strerror})", f"`chgrp kvm {node}; chmod 660 {node}`")
        return _absent(exc, node)
    if not stat.S_ISCHR(found.st_mode):
        return Missing(f"{node} is no device", "remove it, and `modprobe vhost_net`")
    if who is not None and not _permits(found, who):
        return Missing(
            f"{node} (mode {stat.S_IMODE(found.st_mode):o}, owner {found.st_uid}, group {found.st_gid}) may not be "
            f"opened by {_words(who)}",
            f"`setfacl -m u:{who.uid}:rw {node}`, or put the user into its group"
            if who.uid is not None
            else f"`chgrp {who.gid} {node}; chmod g+rw {node}`",
        )
    return None


def _words(who: Owner) -> str:
    words = ([] if who.uid is None else [f"user {who.uid}"]) + ([] if who.gid is None else [f"group {who.gid}"])
    return " or ".join(words)


def _permits(found: os.stat_result, who: Owner) -> bool:
    """By mode bits; an access control list is taken for a yes."""
    if who == Owner() or who.uid == 0:
        return True
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o006 == 0o006:
        return True
    if who.uid is not None and who.uid == found.st_uid:
        return mode & 0o600 == 0o600
    if mode & 0o060 == 0o060 and found.st_gid in _groups(who):
        return True
    return _has_acl(NODE)


def _groups(who: Owner) -> set[int]:
    import pwd

    groups = set() if who.gid is None else {who.gid}
    with suppress(KeyError):
        if who.uid is not None:
            entry = pwd.getpwuid(who.uid)
            groups.update(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return groups


def _has_acl(node: Path) -> bool:
    with suppress(OSError):
        return "system.posix_acl_access" in os.listxattr(node)
    return False


def _absent(exc: OSError, node: Path) -> Missing:
    if exc.errno in (errno.ENODEV, errno.ENXIO):  # a static node whose module isn't loaded
        cause = f"{node}: module vhost_net isn't loaded"
    else:
        cause = f"{node}: {exc.strerror}"
    release = platform.release()
    if Path("/sys/module/vhost_net").exists():
        return Missing(
            f"{cause}; module vhost_net is there", f"`mknod {node} c 10 238`: this /dev isn't the kernel's own"
        )
    modules = Path("/lib/modules") / release
    if any(modules.glob("kernel/drivers/vhost/vhost_net.ko*")):
        return Missing(cause, "`modprobe vhost_net`")
    return Missing(
        f"{cause}; kernel {release} has no module vhost_net here",
        "use a kernel with CONFIG_VHOST_NET, like Debian's linux-image-amd64, and `modprobe vhost_net`",
    )


def zero_copy_tx(path: Path = ZEROCOPY) -> str:
    """The module's option experimental_zcopytx: `on`, `off`, or `unknown`. Only reloading the module changes it."""
    try:
        return "off" if path.read_text().strip() in ("0", "N") else "on"
    except OSError:
        return "unknown"


def pin(threads: Collection[int], cpus: Collection[int]) -> list[int]:
    """Let the threads run on these CPUs only; those that weren't so. Threads that are gone are no error.

    Raises OSError when the kernel refuses: CPUs that the machine hasn't got, or too few privileges.
    """
    moved = []
    for thread in threads:
        with suppress(ProcessLookupError):
            if os.sched_getaffinity(thread) != set(cpus):
                os.sched_setaffinity(thread, cpus)
                moved.append(thread)
    return moved


def affinity(thread: int) -> list[int]:
    """The CPUs that a thread may run on; none when it is gone."""
    with suppress(OSError):
        return sorted(os.sched_getaffinity(thread))
    return []


def start_time(thread: int) -> str:
    """With its number, what tells a thread from all later ones; empty when it is gone: proc(5), starttime."""
    with suppress(OSError):
        return Path(f"/proc/{thread}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def undo_pin(_iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `vhost_pin`."""
    thread = int(args["thread"])
    if start_time(thread) != args["start"]:
        return f"vhost thread {thread}: is gone"
    with suppress(ProcessLookupError):
        os.sched_setaffinity(thread, args["cpus"])
    return f"vhost thread {thread}: runs on CPUs {args['cpus']} again"
