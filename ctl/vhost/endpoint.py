# SPDX-License-Identifier: Apache-2.0
"""A guest's vhost-user socket: where front-ends come, go, and come again.

Server mode listens and serves one front-end at a time. A second one is closed with a log line; but when the first has
hung up and its session is just ending, the newcomer (usually the same VMM reconnecting) waits for that instead.
Client mode connects, and tries again for ever with a short back-off. Either way a session that ends, by whatever cause,
leaves the endpoint ready for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError, XdpvhostError
from .backend import VhostUserDevice
from .closer import Closer
from .connection import Connection
from .errors import ProtocolError
from .port import DevicePort, EndpointSpec

log = logging.getLogger(__name__)

SOCKET_MODE = 0o660
LONGEST_PATH = 107  # sizeof(sockaddr_un.sun_path) less the final zero
BACKOFF_FIRST = 0.05
BACKOFF_MOST = 1.0
ACCEPT_PAUSE = 0.5


class Endpoint:
    """Runs a guest's socket. `timeout`: seconds that a front-end may leave a message or a reply half done."""

    def __init__(self, spec: EndpointSpec, port: DevicePort, timeout: float = 10.0) -> None:
        self._spec = spec
        self._port = port
        self._timeout = timeout
        self._listener: Listener | None = None
        self._runner: asyncio.Task[None] | None = None
        self._session: asyncio.Task[None] | None = None
        self._connection: Connection | None = None
        self._device: VhostUserDevice | None = None
        self._closing = False
        self._closer = Closer()
        self._not_before = 0.0
        self.sessions = 0

    @property
    def connected(self) -> bool:
        return self._device is not None

    @property
    def summary(self) -> Mapping[str, int]:
        """Facts about the current session, empty when there is none."""
        return self._device.summary if self._device else {}

    def open(self) -> None:
        """Makes the listening socket in server mode, so that its errors come before anything else is set up.

        `run` does it otherwise. Raises ConfigError.
        """
        check_path(self._spec.name, self._spec.socket)
        if self._spec.socket_mode == "server" and self._listener is None:
            self._listener = Listener(self._spec.name, self._spec.socket)

    async def run(self) -> None:
        """Serves front-ends until `close` or cancellation. Raises ConfigError when the socket cannot be made."""
        self.open()
        self._runner = asyncio.current_task()
        try:
            await (self._serve() if self._listener is not None else self._connect())
        except asyncio.CancelledError:
            if not self._closing:
                raise
        finally:
            await self._end_session()
            self._runner = None
            self._close_listener()

    async def close(self) -> None:
        """Ends the session and removes the socket. `run` returns. Idempotent."""
        self._closing = True
        runner = self._runner
        if runner is not None and runner is not asyncio.current_task():
            runner.cancel()
            await asyncio.wait([runner])
        self._close_listener()

    def disconnect(self, reason: str, hold_off: float = 0.0) -> None:
        """Ends the current session, for a cause that the data plane found. The endpoint goes on, after `hold_off` s."""
        self._not_before = time.monotonic() + hold_off
        if self._connection is not None:
            log.warning("guest %r: front-end disconnected: %s", self._spec.name, reason)
            self._connection.shutdown()
            if self._session is not None:
                self._session.cancel()

    def config_changed(self) -> None:
        """Tells the front-end that the device's configuration space is another now."""
        if self._device is not None:
            self._device.config_changed()

    async def _serve(self) -> None:
        assert self._listener is not None
        while True:
            sock = await self._listener.accept()
            if self._session is not None and not self._session.done():
                if self._connection is None or not self._connection.hung_up():
                    log.warning(
                        "guest %r: a second front-end on %s was refused, one is connected",
                        self._spec.name,
                        self._spec.socket,
                    )
                    Connection(sock, closer=self._closer).close()
                    await self._closer.room()
                    continue
                try:
                    await asyncio.wait([self._session])
                except asyncio.CancelledError:
                    Connection(sock, closer=self._closer).close()
                    raise
            try:
                await self._hold_off()
            except asyncio.CancelledError:
                Connection(sock, closer=self._closer).close()
                raise
            self._start_session(sock)

    async def _connect(self) -> None:
        backoff = BACKOFF_FIRST
        told = False
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            try:
                sock.connect(str(self._spec.socket))
            except OSError as error:
                sock.close()
                if not told:
                    log.info("guest %r: waiting for %s: %s", self._spec.name, self._spec.socket, error.strerror)
                    told = True
            except BaseException:
                sock.close()
                raise
            else:
                told = False
                try:
                    await self._hold_off()
                except asyncio.CancelledError:
                    Connection(sock, closer=self._closer).close()
                    raise
                began = asyncio.get_running_loop().time()
                await asyncio.wait([self._start_session(sock)])
                if asyncio.get_running_loop().time() - began > BACKOFF_MOST:
                    backoff = BACKOFF_FIRST
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, BACKOFF_MOST)

    async def _hold_off(self) -> None:
        await self._closer.room()
        await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))

    def _start_session(self, sock: socket.socket) -> asyncio.Task[None]:
        """From here on the session task owns the connection and the device, and it is this that closes both."""
        self._connection = connection = Connection(sock, self._timeout, self._closer)
        self._device = device = VhostUserDevice(self._port, connection)
        self.sessions += 1
        self._session = asyncio.create_task(self._run_session(connection, device), name=f"vhost-{self._spec.name}")
        self._session.add_done_callback(lambda _task: self._session_ended(connection, device))
        log.info("guest %r: front-end connected on %s", self._spec.name, self._spec.socket)
        self._port.attached(True)
        return self._session

    async def _run_session(self, connection: Connection, device: VhostUserDevice) -> None:
        name = self._spec.name
        try:
            await device.serve()
            log.info("guest %r: front-end left", name)
        except ProtocolError as error:
            log.error("guest %r: front-end disconnected: %s", name, error)
            self._port.protocol_error(error)
        except ConnectionError as error:
            log.info("guest %r: front-end vanished: %s", name, error.strerror or error)
        except XdpvhostError as error:
            log.error("guest %r: front-end disconnected: %s", name, error)
        except Exception:
            log.exception("guest %r: front-end disconnected by a bug in xdpvhost; please report it", name)
        finally:
            self._session_ended(connection, device)

    def _session_ended(self, connection: Connection, device: VhostUserDevice) -> None:
        """Runs at the session's end, and again as its task's callback: a task cancelled at birth has no other end."""
        if self._device is not device:
            return
        connection.close()
        try:
            device.close()
        except XdpvhostError as error:
            log.error("guest %r: %s", self._spec.name, error)
        self._device = self._connection = None
        self._port.attached(False)

    async def _end_session(self) -> None:
        session = self._session
        if session is not None:
            session.cancel()
            await asyncio.wait([session])
            await asyncio.sleep(0)  # lets the done callback run

    def _close_listener(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()


class Listener:
    """Owner of a listening socket and of its file."""

    def __init__(self, name: str, path: Path) -> None:
        """Raises ConfigError when `path` can't be used, or another program listens there."""
        self._name = name
        self._path = path
        remove_stale(name, path)
        try:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise ConfigError(f"guest {name!r}: cannot make a socket: {error.strerror}") from error
        try:
            bind_with_mode(self._sock, path, SOCKET_MODE)
            self._sock.listen(8)
            self._identity = identity(path)
        except OSError as error:
            self._sock.close()
            raise ConfigError(
                f"guest {name!r}: cannot listen on {path}: {error.strerror}; "
                "its directory must exist and be writable, or choose another socket=PATH"
            ) from error

    async def accept(self) -> socket.socket:
        """The next front-end. Goes on after a shortage of descriptors or memory."""
        while True:
            try:
                sock, _ = self._sock.accept()
                return sock
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                await self._readable()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error("guest %r: cannot accept a front-end now: %s", self._name, error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_reader(self._sock, wake)
        try:
            await ready
        finally:
            loop.remove_reader(self._sock)

    def close(self) -> None:
        """Removes the file too, unless somebody put another in its place."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # nobody connects any more
        if (number := self._sock.detach()) >= 0:
            Closer().close(number)
        if identity(self._path) == self._identity:
            self._path.unlink(missing_ok=True)


def bind_with_mode(sock: socket.socket, path: Path, mode: int) -> None:
    """Makes the socket's file with exactly this mode: a chmod afterwards would follow a link put in its place.

    The umask is the process's, but no other thread makes files.
    """
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(str(path))
    finally:
        os.umask(before)


def identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_path(name: str, path: Path) -> None:
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(
            f"guest {name!r}: socket path {path} has more than {LONGEST_PATH} bytes; choose a shorter socket=PATH"
        )


def remove_stale(name: str, path: Path) -> None:
    """Removes the socket of a program that is gone. Raises ConfigError for a live one, or for another kind of file."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"guest {name!r}: socket path {path} cannot be used: {error.strerror}") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"guest {name!r}: {path} exists and is not a socket; remove it or choose another socket=PATH")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as probe:
        refused = probe.connect_ex(str(path)) == errno.ECONNREFUSED
    if not refused:
        raise ConfigError(f"guest {name!r}: another program listens on {path}; stop it, or choose another socket=PATH")
    path.unlink(missing_ok=True)
