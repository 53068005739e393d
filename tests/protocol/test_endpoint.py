# SPDX-License-Identifier: Apache-2.0
"""Sockets: stale and foreign ones, modes, second front-ends, reconnection of either side."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from support.endpoint import FakePort, Spec, fd_count, idle, listener, serving
from support.frontend import FLAGS, NEED_REPLY, P_REPLY_ACK, FrontEnd, NetDevice
from support.process import wait_for
from xdpvhost.errors import ConfigError, DatapathError
from xdpvhost.vhost.endpoint import Endpoint
from xdpvhost.vhost.errors import Violation
from xdpvhost.vhost.wire import Request

from .conftest import Bench


def test_socket_is_for_owner_and_group_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "vm1.sock"
    with serving(FakePort(), path):
        status = path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o660
    assert not path.exists()


@pytest.mark.parametrize("umask", [0, 0o077])
def test_socket_is_born_with_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int) -> None:
    """A chmod of its path could hit a file that somebody linked there meanwhile."""
    monkeypatch.setattr(os, "chmod", None)
    before = os.umask(umask)
    try:
        endpoint = Endpoint(Spec("vm1", tmp_path / "vm1.sock"), FakePort())
        endpoint.open()
        assert stat.S_IMODE((tmp_path / "vm1.sock").stat().st_mode) == 0o660
        asyncio.run(endpoint.close())
    finally:
        assert os.umask(before) == umask


def test_no_descriptor_for_the_listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", none_left)
    with pytest.raises(ConfigError, match="guest 'vm1': cannot make a socket: Too many open files"):
        Endpoint(Spec("vm1", tmp_path / "vm1.sock"), FakePort()).open()


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "vm1.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(FakePort(), path), FrontEnd.connect(path) as front:
        assert front.ask_u64(Request.GET_FEATURES)


def test_live_socket_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "vm1.sock"
    with listener(path), pytest.raises(ConfigError, match="another program listens on"):
        Endpoint(Spec("vm1", path), FakePort()).open()
    assert path.exists()


def test_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "vm1.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        Endpoint(Spec("vm1", path), FakePort()).open()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("mode", ["server", "client"])
def test_path_too_long(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ConfigError, match="more than 107 bytes"):
        Endpoint(Spec("vm1", tmp_path / ("x" * 108), mode), FakePort()).open()


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory must exist"):
        Endpoint(Spec("vm1", tmp_path / "none" / "vm1.sock"), FakePort()).open()


def test_socket_replaced_by_somebody_else_survives_our_end(tmp_path: Path) -> None:
    path = tmp_path / "vm1.sock"
    with serving(FakePort(), path):
        path.unlink()
        path.write_text("theirs")
    assert path.read_text() == "theirs"


def test_second_front_end_is_refused_with_a_log_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), bench.connect() as first:
        first.sync()
        with bench.connect() as second:
            assert second.disconnected()
        first.sync()
        assert "second front-end" in caplog.text
    bench.idle()
    with bench.connect() as third:
        third.sync()


def test_new_connection_of_a_front_end_that_hung_up_is_served(bench: Bench) -> None:
    """A VMM that reconnects at once must not be refused because its old session has messages left to read."""
    for _ in range(50):
        first = bench.connect()
        for _ in range(20):
            first.send(Request.GET_FEATURES)
        first.close()
        with bench.connect() as second:
            second.sync()


def test_client_waits_for_its_server_and_comes_back(tmp_path: Path) -> None:
    path, port = tmp_path / "vm1.sock", FakePort()
    with serving(port, path, "client") as (endpoint, _loop):
        for _ in range(2):
            with listener(path) as server:
                for _ in range(3):
                    sock, _ = server.accept()
                    with FrontEnd(sock) as front:
                        front.sync()
            path.unlink()
        idle(endpoint)
    port.settled()
    assert len(port.ups) == 12


def test_disconnect_from_outside(bench: Bench) -> None:
    with bench.device() as device:
        device.up()
        bench.endpoint.disconnect("the data plane gave the guest up")
        assert device.front.disconnected()
        bench.idle()
        bench.port.settled()
        device.up()
        assert bench.endpoint.connected


def test_close_during_a_session(tmp_path: Path) -> None:
    path, port = tmp_path / "vm1.sock", FakePort()
    before = fd_count()
    device = NetDevice(path)
    with serving(port, path):
        device.up()
    assert device.front.disconnected()
    port.settled()
    device.close()
    wait_for(lambda: fd_count() == before, 5, "the descriptors to be closed", interval=0.001)


def test_cancelled_before_its_first_step(tmp_path: Path) -> None:
    """A session cancelled in the same turn of the loop in which it was made still gives everything back."""
    port = FakePort()
    path = tmp_path / "vm1.sock"
    before = fd_count()

    async def scenario() -> None:
        endpoint = Endpoint(Spec("vm1", path), port)
        ours, theirs = socket.socketpair()
        with theirs:
            session = endpoint._start_session(ours)
            session.cancel()
            await asyncio.wait([session])
            await asyncio.sleep(0)
        assert not endpoint.connected

    asyncio.run(scenario())
    port.settled()
    assert fd_count() == before


def test_error_of_a_front_end_that_is_gone_is_counted(tmp_path: Path) -> None:
    """It asked for an answer, but doesn't wait for it."""
    port = FakePort()

    async def scenario() -> None:
        endpoint = Endpoint(Spec("vm1", tmp_path / "vm1.sock"), port)
        ours, theirs = socket.socketpair()
        with FrontEnd(theirs) as front:
            front.set_protocol_features(P_REPLY_ACK)
            front.send(Request.GPU_SET_SOCKET, flags=FLAGS | NEED_REPLY)
        await endpoint._start_session(ours)

    asyncio.run(scenario())
    assert [error.violation for error in port.errors] == [Violation.REQUEST]
    port.settled()


def test_new_kick_is_closed_when_the_data_plane_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise DatapathError("no memory")

    with bench.device() as device:
        device.up()
        before = fd_count()
        with monkeypatch.context() as patch:
            patch.setattr(bench.port, "apply", fails)
            device.front.send(Request.SET_VRING_KICK, bytes(8), [device.queues[0].kick_fd])
            assert device.front.disconnected()
            bench.idle()
        wait_for(lambda: fd_count() == before - 1, 5, "nothing but the connection to be closed", interval=0.001)
    for ring in bench.port.now.rings.values():
        ring.close()
        ring.memory.closed = True
    bench.port.applied.clear()


def test_broken_handler_ends_the_session_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(mac: bytes) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(bench.port, "announce", broken)
    with bench.connect() as front:
        front.send(Request.SEND_RARP, b"\x52" + bytes(7))
        assert front.disconnected()
    bench.idle()
    with bench.connect() as front:
        front.sync()


def test_shortage_of_descriptors_does_not_end_the_listener(bench: Bench) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as waiting:
        held = os.dup(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 1, hard))
        try:
            extra = []
            try:
                while True:
                    extra.append(os.dup(0))
            except OSError:
                pass
            waiting.connect(str(bench.path))
        finally:
            for fd in (*extra, held):
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        FrontEnd(waiting).sync()
    bench.idle()
