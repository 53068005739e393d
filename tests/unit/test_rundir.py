# SPDX-License-Identifier: Apache-2.0
"""Locks on run directory and interface, and stale sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.process import wait_for
from xdpvhost.errors import DaemonError, NicError
from xdpvhost.rundir import LOCK_FILE, InterfaceLock, RunDir, interface_index, remove_stale_sockets, wait_unlocked


def test_a_run_directory_is_made_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    with RunDir(path):
        assert (path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
    assert not path.exists()


def test_a_run_directory_that_was_there_stays(tmp_path: Path) -> None:
    with RunDir(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_with_something_in_it_stays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDir(path) as run_dir:
        run_dir.journal.write_text("{}\n")
    assert [p.name for p in path.iterdir()] == ["journal.jsonl"]


def test_one_daemon_a_run_directory(tmp_path: Path) -> None:
    with RunDir(tmp_path), pytest.raises(DaemonError, match=rf"pid {os.getpid()}\) runs in .*xdpvhost down"):
        RunDir(tmp_path)
    RunDir(tmp_path).close()


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from xdpvhost.rundir import *; "
        "a = RunDir(Path(sys.argv[1])); b = InterfaceLock('lo'); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(DaemonError, match=f"pid {holder.pid}"):
            RunDir(tmp_path)
        with pytest.raises(DaemonError, match=rf"\(pid {holder.pid}\) has interface lo"):
            InterfaceLock("lo")
        assert not wait_unlocked(tmp_path, 0.05)
        holder.send_signal(signal.SIGKILL)
    assert wait_unlocked(tmp_path, 5)
    RunDir(tmp_path).close()
    InterfaceLock("lo").close()


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DaemonError, match="--run-dir"):
        RunDir(tmp_path / "file" / "run")
    with pytest.raises(DaemonError, match="--run-dir"):
        RunDir(tmp_path / "file")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_run_directory_that_others_may_write(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(DaemonError, match=rf"written by others \(mode {mode:o}\).*--run-dir"):
        RunDir(tmp_path)
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o755)
    RunDir(tmp_path).close()


def test_a_run_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(DaemonError, match=rf"is owned by user {owner}; .*--run-dir"):
        RunDir(tmp_path)


def test_no_such_interface() -> None:
    with pytest.raises(NicError, match="'nope0' does not exist"):
        interface_index("nope0")
    with pytest.raises(NicError, match="does not exist"):
        InterfaceLock("a name much longer than interfaces have")


def test_stale_sockets_go_and_live_ones_stay(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.sock" for name in ("stale", "live", "theirs", "file")}
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as off:
        dead.bind(str(paths["stale"]))
        off.bind(str(paths["theirs"]))
    paths["file"].write_text("")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(paths["live"]))
        live.listen()
        live.settimeout(0)
        assert remove_stale_sockets(tmp_path, keep=[paths["theirs"]]) == [paths["stale"]]
        with pytest.raises(BlockingIOError):
            live.accept()
    assert sorted(tmp_path.iterdir()) == sorted([paths["file"], paths["live"], paths["theirs"]])


def test_waiting_for_no_daemon_is_short(tmp_path: Path) -> None:
    wait_for(lambda: wait_unlocked(tmp_path, 1), 1, "no lock to be seen")
