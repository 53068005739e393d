# SPDX-License-Identifier: Apache-2.0
"""One vhost-user connection: messages with their descriptors in, replies out.

The socket is a byte stream, so a payload may come in pieces, two messages in one write, and a front-end may stop in the
middle. Descriptors arrive with the first byte of their message; any that arrive later belong to no message and are an
error. Nothing that a front-end does blocks: reads and writes wait in the event loop and have a deadline once a message
has begun. Every received descriptor is in an `FdBag` or closed when a method returns or raises.

The kernel itself closes those that it has no room for, and those that lie unread in a socket, in the thread that reads
or closes. So there is room for as many as one write can carry, and the `Closer` closes the socket.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass

from .closer import Closer
from .errors import ProtocolError, Violation
from .fds import Fd, FdBag
from .wire import HEADER, MAX_FDS, Header, request_name

_INT = array.array("i").itemsize
_SCM_MAX_FD = 253  # Linux: the most descriptors of one sendmsg, and so of one recvmsg


@dataclass(slots=True)
class Message:
    """A whole message; whoever holds it closes `fds`."""

    header: Header
    payload: bytes
    fds: FdBag


class Connection:
    """Owner of a connected stream socket. `timeout`: seconds for the rest of a begun message, and for a reply."""

    def __init__(self, sock: socket.socket, timeout: float = 10.0, closer: Closer | None = None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._timeout = timeout
        self._closer = closer or Closer()

    async def receive(self) -> Message | None:
        """The next message, or None when the front-end closed the connection between messages.

        Raises ProtocolError for a bad header, a message cut short or too many descriptors; ConnectionError.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await self._closer.room()
        except TimeoutError:
            raise ProtocolError(
                Violation.FDS, f"descriptors that came do not close within {self._timeout:g} s; sockets that linger?"
            ) from None
        data, fds = await self._read(HEADER.size)
        if not data:
            fds.close()
            return None
        try:
            async with asyncio.timeout(self._timeout):
                while len(data) < HEADER.size:
                    data += await self._more(HEADER.size - len(data), "a header")
                header = Header.parse(data)
                payload = b""
                while len(payload) < header.size:
                    payload += await self._more(header.size - len(payload), request_name(header.request))
            return Message(header, payload, fds)
        except TimeoutError:
            fds.close()
            raise ProtocolError(Violation.TRUNCATED, f"a message did not end within {self._timeout:g} s") from None
        except BaseException:
            fds.close()
            raise

    async def send(self, data: bytes, fd: Fd | None = None) -> None:
        """Sends all of `data`, and with its first byte a copy of `fd`.

        Raises ProtocolError when the front-end doesn't read for `timeout`; ConnectionError.
        """
        view = memoryview(data)
        control = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd.number]))]
        try:
            async with asyncio.timeout(self._timeout):
                while view:
                    try:
                        view = view[self._sock.sendmsg([view], control, socket.MSG_NOSIGNAL) :]
                        control = []
                    except (BlockingIOError, InterruptedError):
                        await self._wait(write=True)
                    except OSError as error:
                        if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                            raise
                        raise ConnectionAbortedError(error.errno, f"cannot answer: {error.strerror}") from error
        except TimeoutError:
            raise ProtocolError(
                Violation.STALLED, f"the front-end has not read its replies for {self._timeout:g} s"
            ) from None

    def hung_up(self) -> bool:
        """Whether the front-end has closed its end, even if messages are still unread."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return any(events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _fd, events in poll.poll(0))

    def shutdown(self) -> None:
        """Ends the connection for both sides; a pending `receive` returns."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The front-end sees the end now. Idempotent."""
        self.shutdown()
        if (number := self._sock.detach()) >= 0:
            self._closer.close(number)

    async def _more(self, size: int, what: str) -> bytes:
        data, fds = await self._read(size)
        late = len(fds)
        fds.close()
        if late:
            raise ProtocolError(Violation.FDS, f"{late} descriptors came in the middle of {what}, not with its start")
        if not data:
            raise ProtocolError(Violation.TRUNCATED, f"the connection ended in the middle of {what}")
        return data

    async def _read(self, size: int) -> tuple[bytes, FdBag]:
        """Up to `size` bytes, at least one unless the peer closed, with the descriptors that came along."""
        while True:
            try:
                data, control, flags, _ = self._sock.recvmsg(
                    size, socket.CMSG_SPACE(_SCM_MAX_FD * _INT), socket.MSG_CMSG_CLOEXEC
                )
                break
            except (BlockingIOError, InterruptedError):
                await self._wait(write=False)
        numbers = array.array("i")
        for level, kind, body in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers.frombytes(body[: len(body) - len(body) % _INT])
        fds = FdBag(numbers, self._closer)
        if len(fds) > MAX_FDS:
            fds.close()
            raise ProtocolError(Violation.FDS, f"more than {MAX_FDS} descriptors came with one message")
        if flags & socket.MSG_CTRUNC:
            fds.close()
            raise ProtocolError(
                Violation.FDS, "descriptors that came were lost: xdpvhost's limit of open files (ulimit -n) is reached"
            )
        return data, fds

    async def _wait(self, write: bool) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        fd = self._sock.fileno()
        if fd < 0:
            raise ConnectionAbortedError(9, os.strerror(9))

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        add: Callable[..., None] = loop.add_writer if write else loop.add_reader
        remove: Callable[[int], bool] = loop.remove_writer if write else loop.remove_reader
        add(fd, wake)
        try:
            await ready
        finally:
            remove(fd)
