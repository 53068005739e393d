# SPDX-License-Identifier: Apache-2.0
"""The daemon's API: JSON lines over the unix socket RUN_DIR/api.sock (mode 0600).

One request a line, one answer a line, any number of them a connection, answered in order:

    {"method": "guest-add", "params": {"spec": "name=vm1,mac=52:54:00:00:00:01"}}
    {"result": {...}}
    {"error": {"kind": "ConfigError", "message": "...", "exit_code": 2}}

Methods: status, stats, guest-add {spec}, guest-set {name, set: {KEY: VALUE}}, guest-rm {name}, guest-list, down; where
the data plane serves guests, rebalance {move: {GUEST: WORKER}}, capture-start {port, buffer, snaplen, pid} and
capture-stop {port}. A line that is no request, or longer than MAX_LINE bytes, is answered with an error and ends the
connection; everything else keeps it.

The answer of capture-start comes with a descriptor (SCM_RIGHTS), and what it stands for ends with the connection: when
the client is gone, however it ended, the daemon learns of it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from .config import API_SOCKET, MAX_SOCKET_PATH
from .errors import ConfigError, DaemonError, DatapathError, NicError, PrivilegeError, SilentError, XdpvhostError

log = logging.getLogger(__name__)

MAX_LINE = 1 << 16
CLIENT_TIMEOUT = 30.0

Params = Mapping[str, Any]
Handler = Callable[[Params], Awaitable[Any]]


@dataclass(frozen=True)
class Held:
    """A handler's answer that comes with a descriptor, and lasts until `end`: called once, when the connection is over.

    The server closes `fd` when it has been sent.
    """

    result: Any
    fd: int
    end: Callable[[], None]


_KINDS: Mapping[str, type[XdpvhostError]] = {
    kind.__name__: kind for kind in (ConfigError, NicError, PrivilegeError, DatapathError, DaemonError)
}


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    method: str
    params: dict[str, Any] = {}


class ErrorReply(msgspec.Struct, frozen=True):
    kind: str
    message: str
    exit_code: int


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Exactly one of the two is meant; a missing result is null."""

    result: Any = None
    error: ErrorReply | None = None


def _refuse(error: Exception) -> Reply:
    code = error.exit_code if isinstance(error, XdpvhostError) else XdpvhostError.exit_code
    return Reply(error=ErrorReply(kind=type(error).__name__, message=str(error), exit_code=code))


def text_param(params: Params, key: str) -> str:
    """The string `params[key]`; ConfigError when it is missing, not a string, or not alone."""
    value = params.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"api request: parameter {key!r} must be a string")
    unknown = sorted(set(params) - {key})
    if unknown:
        raise ConfigError(f"api request: unknown parameter {unknown[0]!r}; it takes {key!r} only")
    return value


def numbers_param(params: Params, key: str) -> dict[str, int]:
    """The object of whole numbers `params[key]`, empty when it is missing; ConfigError for all else."""
    found = params.get(key, {})
    if set(params) - {key} or not isinstance(found, dict) or any(type(value) is not int for value in found.values()):
        raise ConfigError(f"api request: it takes {key!r} only, an object of whole numbers")
    return dict(found)


def texts_param(params: Params, key: str, texts: str) -> tuple[str, dict[str, str]]:
    """The string `params[key]` and the object of strings `params[texts]`; ConfigError for all else."""
    name = text_param({other: value for other, value in params.items() if other != texts}, key)
    found = params.get(texts)
    if not isinstance(found, dict) or not found or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"api request: parameter {texts!r} must be an object of strings that isn't empty")
    return name, found


class ApiServer:
    """Serves `handlers` on RUN_DIR/api.sock; a stale socket there is replaced.

    The caller holds the run directory's lock, so nobody else can be listening.
    """

    def __init__(self, run_dir: Path, handlers: Mapping[str, Handler]) -> None:
        self.path = run_dir / API_SOCKET
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(listener.fileno(), 0o600)  # bind() gives the file this mode: it is never open to others
            listener.bind(str(self.path))
            self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_LINE)
        except OSError as exc:
            listener.close()
            raise DaemonError(f"cannot listen on {self.path}: {exc.strerror}; check the directory's owner") from exc

    async def close(self) -> None:
        """Stop listening, let each connection finish the answer it is writing, remove the socket."""
        if self._server is None:
            return
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.ExitStack() as held:
            while True:
                try:
                    line = await reader.readline()
                except ValueError:
                    reply, go_on = _refuse(ConfigError(f"api request: a line has at most {MAX_LINE} bytes")), False
                else:
                    if not line:
                        return
                    reply, go_on = await self._answer(line)
                if isinstance(reply.result, Held):
                    held.callback(reply.result.end)
                    _send_held(writer, reply.result)
                else:
                    writer.write(_encode(reply) + b"\n")
                    await writer.drain()
                if not go_on:
                    return

    async def _answer(self, line: bytes) -> tuple[Reply, bool]:
        try:
            request = msgspec.json.decode(line, type=Request)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            return _refuse(ConfigError(f"api request is not a line of JSON as documented: {exc}")), False
        handler = self._handlers.get(request.method)
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return _refuse(ConfigError(f"api request: unknown method {request.method!r}; known are {known}")), True
        try:
            return Reply(result=await handler(request.params)), True
        except XdpvhostError as exc:
            return _refuse(exc), True
        except Exception as exc:
            log.exception("api %s failed", request.method)
            return _refuse(exc), True


def _send_held(writer: asyncio.StreamWriter, held: Held) -> None:
    """Past the transport, which can't send descriptors: so only to a client that has read its last answer."""
    try:
        if writer.transport.get_write_buffer_size():
            raise ConnectionError("the client does not read")
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as connection:
            line = _encode(Reply(result=held.result)) + b"\n"
            if socket.send_fds(connection, [line], [held.fd]) != len(line):
                raise ConnectionError("the client does not read")
    except BlockingIOError as exc:
        raise ConnectionError("the client does not read") from exc
    finally:
        os.close(held.fd)


def _encode(reply: Reply) -> bytes:
    if reply.error is None:
        return msgspec.json.encode({"result": reply.result})
    return msgspec.json.encode({"error": reply.error})


class Session:
    """One connection to the daemon of `run_dir`, for requests one after the other.

    Raises DaemonError when none is running there, also when it ends in between.
    """

    def __init__(self, run_dir: Path, timeout: float = CLIENT_TIMEOUT) -> None:
        self._run_dir = run_dir
        self._path = path = run_dir / API_SOCKET
        self._timeout = timeout
        self._unread = b""
        self._fds: list[int] = []
        if len(str(path).encode()) > MAX_SOCKET_PATH:
            raise ConfigError(f"{path} is too long for a unix socket; give a shorter --run-dir")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            self.close()
            raise DaemonError(
                f"no xdpvhost daemon is running in {run_dir}; start one with `xdpvhost up`, or name its --run-dir"
            ) from exc
        except PermissionError as exc:
            self.close()
            raise DaemonError(f"may not use {path}; it is its owner's, run this as root or with sudo") from exc
        except TimeoutError as exc:
            self.close()
            raise SilentError(f"the daemon of {run_dir} took no connection in {timeout:g} s; see its log") from exc
        except OSError as exc:
            self.close()
            raise DaemonError(f"cannot talk to the daemon on {path}: {exc}; see its log") from exc

    def close(self) -> None:
        """End the connection, and with it what was only for its time. Idempotent."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable between requests: the daemon is gone."""
        return self._socket.fileno()

    def take_fd(self) -> int:
        """The descriptor that came with an answer; the caller's from now on."""
        return self._fds.pop(0)

    def call(self, method: str, params: Params | None = None) -> Any:
        """The daemon's result, or whatever error it answered, as its own class."""
        line = msgspec.json.encode({"method": method, "params": dict(params or {})}) + b"\n"
        try:
            self._socket.sendall(line)
            answer = self._read_line()
        except TimeoutError as exc:
            raise SilentError(
                f"the daemon of {self._run_dir} did not answer {method} in {self._timeout:g} s; see its log"
            ) from exc
        except OSError as exc:
            raise DaemonError(f"cannot talk to the daemon on {self._path}: {exc}; see its log") from exc
        if not answer:
            raise DaemonError(f"the daemon of {self._run_dir} ended before it answered {method}; see its log")
        try:
            reply = msgspec.json.decode(answer, type=Reply)
        except msgspec.DecodeError as exc:
            raise DaemonError(
                f"the daemon on {self._path} answered {method} with no JSON: {exc}; is it xdpvhost's?"
            ) from exc
        if reply.error is None:
            return reply.result
        if reply.error.kind == "DatapathError":
            raise DatapathError(reply.error.message)
        kind = _KINDS.get(reply.error.kind)
        if kind is None:
            raise DaemonError(f"the daemon failed at {method}: {reply.error.message}; see its log")
        raise kind(reply.error.message)

    def _read_line(self) -> bytes:
        """One answer; what there was when the connection ended before it did."""
        parts = [self._unread]
        while b"\n" not in parts[-1]:
            data, fds, _flags, _address = socket.recv_fds(self._socket, MAX_LINE, 1)
            self._fds += fds
            for fd in fds:
                os.set_inheritable(fd, False)  # recv_fds ignores MSG_CMSG_CLOEXEC
            if not data:
                break
            parts.append(data)
        line, _, self._unread = b"".join(parts).partition(b"\n")
        return line


def call(run_dir: Path, method: str, params: Params | None = None, timeout: float = CLIENT_TIMEOUT) -> Any:
    """Ask the daemon of `run_dir` and return its result.

    Raises DaemonError when none is running there, and whatever error the daemon answered, as its own class.
    """
    with Session(run_dir, timeout) as session:
        return session.call(method, params)
