# SPDX-License-Identifier: Apache-2.0
"""A descriptor whose last close takes seconds."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

LINGER = 4  # seconds


@contextlib.contextmanager
def lingering() -> Iterator[tuple[int, socket.socket]]:
    """A TCP socket that waits for a peer which doesn't read. Who gets it closes it; it lingers until the block ends."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        sock = socket.create_connection(listener.getsockname())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
        sock.setblocking(False)
        peer, _ = listener.accept()
    with peer:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(65536))
        yield sock.detach(), peer
