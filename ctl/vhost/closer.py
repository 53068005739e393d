# SPDX-License-Identifier: Apache-2.0
"""Closes what may stall, in threads beside the event loop, and says when there is too much of it.

A TCP socket with SO_LINGER waits for its peer, a file in FUSE for a server that need not answer. A unix socket takes
with it the descriptors that lie unread in its queue, a listening one those of who waits to be accepted, so it is no
better than they are. Whoever drops the last reference waits.

Each guest has a `Closer`, and what a front-end sends is bounded with it: above `MOST` descriptors under way nothing
more is read from that guest's front-ends until there is room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque

log = logging.getLogger(__name__)

MOST = 8  # descriptors under way, and threads


class Closer:
    """Owner of descriptors until they are closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: deque[int] = deque()
        self._threads = 0
        self._under_way = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def close(self, number: int) -> None:
        """Returns at once; the descriptor is closed some time later."""
        with self._lock:
            self._numbers.append(number)
            self._under_way += 1
            if self._threads == MOST:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._run, name=f"xdpvhost-close-{number}", daemon=True).start()
        except RuntimeError as error:
            with self._lock:
                self._threads -= 1
            log.error("descriptor %d stays open, closing it may take for ever: %s", number, error)

    async def room(self) -> None:
        """Returns when no more than `MOST` descriptors are under way."""
        while True:
            event = asyncio.Event()
            with self._lock:
                if self._under_way <= MOST:
                    return
                self._waiting.append((asyncio.get_running_loop(), event))
            await event.wait()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._numbers:
                    self._threads -= 1
                    return
                number = self._numbers.popleft()
            with contextlib.suppress(OSError):
                os.close(number)
            with self._lock:
                self._under_way -= 1
                woken: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
                if self._under_way <= MOST:
                    woken, self._waiting = self._waiting, woken
            for loop, event in woken:
                with contextlib.suppress(RuntimeError):  # the daemon is gone, and its loop with it
                    loop.call_soon_threadsafe(event.set)
