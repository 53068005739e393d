# SPDX-License-Identifier: Apache-2.0
"""The API over a real socket: client, server, and what neither sends."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.process import wait_for
from xdpvhost import api
from xdpvhost.api import MAX_LINE, ApiServer, Held, Params, text_param, texts_param
from xdpvhost.errors import ConfigError, DaemonError, DatapathError, NicError, OutputError, XdpvhostError


async def _echo(params: Params) -> Any:
    return {"got": dict(params)}


async def _guest_rm(params: Params) -> Any:
    return text_param(params, "name")


async def _nic(_: Params) -> Any:
    raise NicError("interface 'eth9' does not exist")


async def _datapath(_: Params) -> Any:
    raise DatapathError("no memory", 12)


async def _bug(_: Params) -> Any:
    raise KeyError("oops")


async def _null(_: Params) -> Any:
    return None


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    handlers = {"echo": _echo, "guest-rm": _guest_rm, "nic": _nic, "dp": _datapath, "bug": _bug, "null": _null}
    running = ApiServer(tmp_path, handlers)
    await running.start()
    yield running
    await running.close()


async def _call(server: ApiServer, method: str, params: Params | None = None) -> Any:
    return await asyncio.to_thread(api.call, server.path.parent, method, params)


async def _raw(server: ApiServer, data: bytes) -> list[dict[str, Any]]:
    """Send bytes, half-close, return every answer until the end."""
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return [json.loads(line) for line in answer.splitlines()]


async def test_a_request_is_answered(server: ApiServer) -> None:
    assert await _call(server, "echo", {"x": [1, "zwei", None]}) == {"got": {"x": [1, "zwei", None]}}
    assert await _call(server, "null") is None


async def test_only_the_owner_may_connect(server: ApiServer) -> None:
    mode = server.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "api.sock"))
    server = ApiServer(tmp_path, {"echo": _echo})
    await server.start()
    assert await _call(server, "echo") == {"got": {}}
    await server.close()
    assert not server.path.exists()
    await server.close()


async def test_many_requests_on_one_connection_are_answered_in_order(server: ApiServer) -> None:
    lines = b"".join(json.dumps({"method": "echo", "params": {"i": i}}).encode() + b"\n" for i in range(23))
    assert await _raw(server, lines) == [{"result": {"got": {"i": i}}} for i in range(23)]


async def test_errors_keep_their_class_message_and_exit_code(server: ApiServer) -> None:
    with pytest.raises(NicError, match="'eth9' does not exist"):
        await _call(server, "nic")
    with pytest.raises(DatapathError, match="no memory"):
        await _call(server, "dp")
    with pytest.raises(ConfigError, match="'name' must be a string"):
        await _call(server, "guest-rm", {"name": 7})
    with pytest.raises(ConfigError, match="unknown parameter 'force'"):
        await _call(server, "guest-rm", {"name": "vm1", "force": True})
    answers = await _raw(server, b'{"method": "nic"}\n{"method": "nic"}\n')
    assert answers[1]["error"] == {"kind": "NicError", "message": "interface 'eth9' does not exist", "exit_code": 3}


async def test_a_bug_in_a_handler_is_logged_and_the_server_goes_on(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DaemonError, match=r"oops.*see its log"):
        await _call(server, "bug")
    assert "api bug failed" in caplog.text
    assert await _call(server, "null") is None


async def test_an_unknown_method_is_named_and_keeps_the_connection(server: ApiServer) -> None:
    answers = await _raw(server, b'{"method": "reboot"}\n{"method": "null"}\n')
    assert "unknown method 'reboot'; known are bug, dp, echo" in answers[0]["error"]["message"]
    assert answers[1] == {"result": None}


@pytest.mark.parametrize(
    "line",
    [
        b"hello\n",
        b"[]\n",
        b"{}\n",
        b'{"method": 1}\n',
        b'{"method": "echo", "params": 3}\n',
        b'{"method": "x", "y": 1}\n',
        b"\xff\xfe\n",
        b"\n",
    ],
)
async def test_nonsense_is_answered_once_and_ends_the_connection(server: ApiServer, line: bytes) -> None:
    answers = await _raw(server, line + b'{"method": "null"}\n')
    assert len(answers) == 1
    assert "not a line of JSON as documented" in answers[0]["error"]["message"]
    assert answers[0]["error"]["exit_code"] == 2
    assert await _call(server, "null") is None


async def test_an_endless_line_is_refused(server: ApiServer) -> None:
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(b"x" * (3 * MAX_LINE))
    answer = json.loads(await reader.readline())
    assert f"at most {MAX_LINE} bytes" in answer["error"]["message"]
    writer.close()


async def test_a_client_that_leaves_in_mid_line_harms_nobody(server: ApiServer) -> None:
    _, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(b'{"method": ')
    writer.close()
    assert await _call(server, "null") is None


async def test_close_ends_idle_connections(server: ApiServer) -> None:
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    writer.write(b'{"method": "null"}\n')
    assert json.loads(await reader.readline()) == {"result": None}
    await server.close()
    assert await reader.read() == b""
    writer.close()


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match=r"no xdpvhost daemon is running in .*xdpvhost up") as caught:
        api.call(tmp_path, "status")
    assert caught.value.exit_code == 6


def test_a_dead_daemon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "api.sock"))
    with pytest.raises(DaemonError, match="no xdpvhost daemon is running"):
        api.call(tmp_path, "status")


def test_a_run_directory_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="shorter --run-dir"):
        api.call(Path("/" + "d" * 120), "status")


@pytest.mark.parametrize(("answer", "words"), [(b"", "ended before it answered"), (b"tcp\n", "with no JSON")])
def test_something_else_listens(tmp_path: Path, answer: bytes, words: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen()

        async def scene() -> None:
            asked = asyncio.to_thread(api.call, tmp_path, "status")

            async def play() -> None:
                connection, _ = await asyncio.to_thread(listener.accept)
                with connection:
                    await asyncio.to_thread(connection.recv, 4096)
                    connection.sendall(answer)

            await asyncio.gather(asked, play())

        with pytest.raises(DaemonError, match=words):
            asyncio.run(scene())


def test_a_silent_daemon_times_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "api.sock"))
        listener.listen()
        with pytest.raises(DaemonError, match=r"did not answer status in 0\.1 s"):
            api.call(tmp_path, "status", timeout=0.1)


async def test_an_answer_with_a_descriptor_lasts_as_long_as_its_connection(tmp_path: Path) -> None:
    """The client has the descriptor, further requests work, and the end is told once, however it comes."""
    ends: list[str] = []

    async def hold(params: Params) -> Held:
        fd = os.memfd_create("held")
        os.write(fd, str(params["name"]).encode())
        return Held({"name": params["name"]}, fd, lambda: ends.append(str(params["name"])))

    async def echo(params: Params) -> Any:
        return dict(params)

    server = ApiServer(tmp_path, {"hold": hold, "echo": echo})
    await server.start()

    def client(name: str) -> None:
        with api.Session(tmp_path) as session:
            assert session.call("echo", {"x": 1}) == {"x": 1}
            assert session.call("hold", {"name": name}) == {"name": name}
            assert session.call("echo", {"x": 2}) == {"x": 2}
            fd = session.take_fd()
            assert not os.get_inheritable(fd)
            assert os.pread(fd, 99, 0) == name.encode()
            os.close(fd)
            assert ends == [n for n in ("a", "b") if n < name]

    before = len(os.listdir("/proc/self/fd"))
    for name in ("a", "b"):
        await asyncio.to_thread(client, name)
        await asyncio.to_thread(wait_for, lambda name=name: name in ends, 5, "the end to be told")
    assert ends == ["a", "b"]
    assert len(os.listdir("/proc/self/fd")) == before
    await server.close()


async def test_a_client_that_reads_nothing_gets_no_descriptor(tmp_path: Path) -> None:
    """Its unread answers fill the socket, and then the connection ends: nobody waits for it."""
    ends: list[int] = []

    async def hold(_: Params) -> Held:
        return Held("x" * 4096, os.memfd_create("held"), lambda: ends.append(1))

    server = ApiServer(tmp_path, {"hold": hold})
    await server.start()
    before = len(os.listdir("/proc/self/fd"))
    reader, writer = await asyncio.open_unix_connection(str(server.path))
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    count = 0
    while not ends:
        writer.write(b'{"method": "hold"}\n')
        count += 1
        await asyncio.sleep(0.001)
    assert len(ends) <= count < 10000
    writer.close()
    await asyncio.to_thread(wait_for, lambda: len(os.listdir("/proc/self/fd")) <= before, 5, "descriptors to be closed")
    await server.close()


def test_every_error_of_ours_has_its_own_exit_code() -> None:
    kinds: list[type[XdpvhostError]] = [ConfigError, NicError, DatapathError, DaemonError, OutputError]
    assert len({kind.exit_code for kind in kinds} | {XdpvhostError.exit_code, 0}) == len(kinds) + 2


def test_an_object_of_numbers() -> None:
    assert api.numbers_param({}, "move") == {}
    assert api.numbers_param({"move": {"vm1": 3}}, "move") == {"vm1": 3}
    for params in ({"move": [1]}, {"move": {"vm1": "3"}}, {"move": {"vm1": True}}, {"other": {}}, {"move": {}, "x": 1}):
        with pytest.raises(ConfigError, match="it takes 'move' only, an object of whole numbers"):
            api.numbers_param(params, "move")


def test_a_name_and_an_object_of_strings() -> None:
    assert texts_param({"name": "vm1", "set": {"vlan": "10", "link": ""}}, "name", "set") == (
        "vm1",
        {"vlan": "10", "link": ""},
    )


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"set": {"vlan": "10"}}, "'name' must be a string"),
        ({"name": "vm1"}, "'set' must be an object of strings"),
        ({"name": "vm1", "set": {}}, "that isn't empty"),
        ({"name": "vm1", "set": ["vlan=10"]}, "must be an object of strings"),
        ({"name": "vm1", "set": {"vlan": 10}}, "must be an object of strings"),
        ({"name": "vm1", "set": {"vlan": "10"}, "force": True}, "unknown parameter 'force'"),
    ],
)
def test_other_parameters_are_refused(params: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        texts_param(params, "name", "set")
