# SPDX-License-Identifier: Apache-2.0
"""sd_notify(3): tell systemd, when it asked to be told, that the service is ready or stopping."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send e.g. `READY=1` to $NOTIFY_SOCKET; nothing when it isn't set. Never fails: a lost notice is a log line."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(state.encode())
    except OSError as exc:
        log.warning("cannot notify systemd of %s: %s", state.partition("\n")[0], exc)
