# SPDX-License-Identifier: Apache-2.0
"""Settings under /proc/sys/net, put back as they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import NicError
from .changes import Changes

ROOT = Path("/proc/sys/net")


def put(changes: Changes, key: str, value: str) -> None:
    """Set `key`, like `ipv4/conf/eth0/forwarding`, if it isn't so. Raises NicError."""
    path = ROOT / key
    try:
        before = path.read_text().strip()
        entry = changes.claim("sysctl", key=key)
        if before == value:
            return
        if entry is None:
            changes.record("sysctl", key=key, before=before, after=value)
        path.write_text(value)
    except OSError as exc:
        raise NicError(f"{path}: cannot be set to {value}: {exc.strerror}; set it by hand") from exc


def undo(_iface: str | None, args: Mapping[str, Any]) -> str:
    """Handler of entries of kind `sysctl`. What somebody else has set since stays."""
    path, before = ROOT / args["key"], str(args["before"])
    try:
        now = path.read_text().strip()
    except FileNotFoundError:
        return f"{path}: is gone"
    if now != str(args["after"]):
        return f"{path}: was changed to {now} since, and stays so"
    path.write_text(before)
    return f"{path}: {before}"
