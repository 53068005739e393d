# SPDX-License-Identifier: Apache-2.0
"""The journal on disk: what it remembers after a crash at any point."""

import errno
import os
import signal
import stat
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from xdpvhost.errors import NicError, XdpvhostError
from xdpvhost.links.journal import COMPACT_FROM, Journal
from xdpvhost.links.undo import handlers


class Host:
    """Remembers what was undone, and refuses what it is told to refuse."""

    def __init__(self) -> None:
        self.undone: list[int] = []
        self.refuse: set[int] = set()
        self.stumble: set[int] = set()

    def undo(self, args: Mapping[str, Any]) -> str:
        number = args["number"]
        if number in self.refuse:
            raise NicError(f"number {number}: not now")
        if number in self.stumble:
            raise KeyError(number)
        self.undone.append(number)
        return f"number {number}"


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def journal(path: Path, host: Host) -> Journal:
    return Journal(path, {"number": host.undo})


def test_backwards_and_only_what_is_pending(path: Path, host: Host) -> None:
    first = journal(path, host)
    entries = [first.record("number", number=number) for number in range(5)]
    first.done(entries[2])
    first.done(entries[2])
    second = journal(path, host)
    assert [item.detail for item in second.replay_undo()] == ["number 4", "number 3", "number 1", "number 0"]
    assert host.undone == [4, 3, 1, 0]
    assert not path.exists()
    assert journal(path, host).replay_undo() == []


def test_amended(path: Path, host: Host) -> None:
    first = journal(path, host)
    first.amend(first.record("number", number=1), program_id=7)
    assert [entry.args for entry in journal(path, host).pending()] == [{"number": 1, "program_id": 7}]


def test_numbers_go_on(path: Path, host: Host) -> None:
    first = journal(path, host)
    first.record("number", number=0)
    first.done(first.record("number", number=1))
    second = journal(path, host)
    assert second.record("number", number=2).id == 3
    assert [entry.args["number"] for entry in journal(path, host).pending()] == [0, 2]


def test_what_fails_stays(path: Path, host: Host) -> None:
    host.refuse = {1}
    first = journal(path, host)
    for number in range(3):
        first.record("number", number=number)
    undone = first.replay_undo()
    assert [(item.args["number"], item.ok) for item in undone] == [(2, True), (1, False), (0, True)]
    assert undone[1].detail == "number 1: not now"
    host.refuse.clear()
    assert [item.ok for item in journal(path, host).replay_undo()] == [True]
    assert host.undone == [2, 0, 1]


def test_a_crash_while_writing(path: Path, host: Host) -> None:
    """Cut at every byte, the journal has the entries whose lines are whole, and can be written on."""
    first = journal(path, host)
    for number in range(3):
        first.record("number", number=number)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = journal(path, host)
        found = list(range(whole[:size].count(b"\n")))
        assert [entry.args["number"] for entry in again.pending()] == found
        again.record("number", number=9)
        assert [entry.args["number"] for entry in journal(path, host).pending()] == [*found, 9]


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"id": 1, "kind": "number"}', '{"id": "x", "kind": "", "args": {}}']
)
def test_damage(path: Path, host: Host, line: str) -> None:
    path.write_text(f'{line}\n{{"id": 2, "kind": "number", "args": {{}}}}\n')
    with pytest.raises(XdpvhostError, match=r"journal\.jsonl: line 1 is damaged"):
        journal(path, host)


def test_unknown_kind_stays(path: Path, host: Host) -> None:
    journal(path, host).record("spell", number=1)
    undone = journal(path, host).replay_undo()
    assert not undone[0].ok
    assert "unknown kind 'spell'" in undone[0].detail
    assert journal(path, host).pending()


def test_undoing_never_raises(path: Path, host: Host) -> None:
    """Neither for a bug nor for a run directory that is gone: the rest is undone all the same."""
    path = path.parent / "run" / path.name
    path.parent.mkdir()
    first = journal(path, host)
    for number in range(4):
        first.record("number", number=number)
    host.stumble = {2}
    path.unlink()
    path.parent.rmdir()
    undone = first.replay_undo()
    assert [(item.args["number"], item.ok) for item in undone] == [(3, True), (2, False), (1, True), (0, True)]
    assert [entry.args["number"] for entry in first.pending()] == [2]


def test_a_full_disk_takes_no_half_line(path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    first = journal(path, host)
    first.record("number", number=0)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
        with pytest.raises(OSError, match="cannot write"):
            first.record("number", number=1)
    first.record("number", number=2)
    assert [entry.args["number"] for entry in first.pending()] == [0, 2]
    assert [entry.args["number"] for entry in journal(path, host).pending()] == [0, 2]


def test_it_stays_small(path: Path, host: Host) -> None:
    """While one entry is pending all the time, thousands come and go."""
    first = journal(path, host)
    forever = first.record("number", number=-1)
    recent = deque(first.record("number", number=number) for number in range(9))
    largest = 0
    for number in range(9, 4000):
        recent.append(first.record("number", number=number))
        first.done(recent.popleft())
        first.amend(forever, last=number)
        largest = max(largest, path.stat().st_size)
    assert COMPACT_FROM / 2 < largest < COMPACT_FROM + 200
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    again = journal(path, host)
    assert again.pending() == first.pending() == [forever, *recent]
    assert all(item.ok for item in again.replay_undo())
    assert host.undone == [*reversed(range(3991, 4000)), -1]
    assert list(path.parent.iterdir()) == []


def test_much_that_is_pending_is_kept(path: Path, host: Host) -> None:
    """It grows to twice what is pending, and no entry is lost when it is written anew."""
    first = journal(path, host)
    entries = [first.record("number", number=number, what="x" * 80) for number in range(1000)]
    least = path.stat().st_size
    assert least > COMPACT_FROM
    for _ in range(5):
        for entry in entries[500:600]:
            first.amend(entry, what="y" * 80)
        assert path.stat().st_size < 2 * least + 200
    assert journal(path, host).pending() == entries
    for entry in entries[1:]:
        first.done(entry)
    assert path.stat().st_size < COMPACT_FROM + 200
    assert journal(path, host).pending() == entries[:1]


def test_killed_while_it_is_written_anew(path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, after and within every system call of it: what is pending then is what was before."""
    first = journal(path, host)
    kept = first.record("number", number=0)
    while path.stat().st_size < COMPACT_FROM - 120:
        first.done(first.record("number", number=1))
    other = first.record("number", number=2)
    before = path.read_bytes()
    assert COMPACT_FROM - 120 < len(before) < COMPACT_FROM
    sizes = []
    for step in range(40):
        path.write_bytes(before)
        pid = os.fork()
        if not pid:  # pragma: no cover
            _die_at(step, monkeypatch)
            first.amend(kept, more="z" * 80)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        again = journal(path, host)
        assert [(entry.id, entry.kind, entry.args["number"]) for entry in again.pending()] == [
            (kept.id, "number", 0),
            (other.id, "number", 2),
        ]
        sizes.append(path.stat().st_size)
        assert [item.name for item in path.parent.iterdir()] == [path.name]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        pytest.fail("it was killed each time")
    assert step > 8
    assert sizes[0] == len(before)
    assert max(sizes) > len(before)
    assert sizes[-1] < 300


def _die_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Kill this process at its system call number `step`; a write is half done then."""
    left = [step]
    for name in ("open", "write", "fsync", "close", "rename"):
        patch.setattr(os, name, _dying(getattr(os, name), left))


def _dying(call: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            if call.__name__ == "write":
                call(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return call(*args, **kwargs)

    return wrapped


def test_no_room_to_write_it_anew(path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on as it is."""
    first = journal(path, host)
    kept = first.record("number", number=0)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        for number in range(1, 1500):
            first.done(first.record("number", number=number))
    assert path.stat().st_size > COMPACT_FROM
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert journal(path, host).pending() == [kept]


def test_only_some(path: Path, host: Host) -> None:
    first = journal(path, host)
    entries = [first.record("number", number=number) for number in range(4)]
    first.done(entries[0])
    assert [item.args["number"] for item in first.replay_undo([entries[0], entries[1], entries[3]])] == [3, 1]
    assert first.pending() == [entries[2]]


def test_of_another_boot(path: Path) -> None:
    """The machine forgot the change; by now the index may be another device's."""
    args = {"iface": "lo", "ifindex": 1, "netns_cookie": 1, "netns_inode": 1, "boot_id": "another"}
    Journal(path).record("link_up", **args)
    assert [(item.ok, item.detail) for item in Journal(path).replay_undo()] == [
        (True, "interface lo: the machine was booted since")
    ]
    assert not path.exists()


def test_only_its_owner_reads_it(path: Path, host: Host) -> None:
    journal(path, host).record("number", number=1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_kind_has_a_handler() -> None:
    """Of NICs that the data plane serves, and of the modes of links."""
    links = {"wishes", "tap", "bridge", "port", "addresses", "macvtap", "node", "mac", "proxy", "sysctl", "vhost_pin"}
    vfs = {"sriov_numvfs", "vf_settings", "vf_driver", "vf_netns"}
    assert set(handlers()) >= {"link_up", "features", "channels", "xdp"} | links | vfs
