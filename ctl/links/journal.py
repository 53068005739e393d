# SPDX-License-Identifier: Apache-2.0
"""The journal of changes to the host: written before each change, so that even `kill -9` leaves nothing behind unknown.

A line is a JSON object. `{"id": 3, "kind": "link_up", "args": {…}}` announces a change, the same id again with new args
amends it, and `{"id": 3, "done": true}` says that it was undone. What is announced and not done is what a dead daemon
left behind; an entry may describe a change that never came to be, so undoing must be harmless then. A last line cut
short by a crash was never followed by its change, and is ignored.

Once the file has COMPACT_FROM bytes, and more than half of them are of no use any more, it is written anew without
them: to another file beside it, which then takes its place. A crash leaves one of the two, and they say the same.

Undoing runs backwards. How each kind is undone is in `ctl/links/undo.py`; an orderly shutdown goes the same way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import XdpvhostError

COMPACT_FROM = 64 << 10  # bytes

log = logging.getLogger(__name__)

Undo = Callable[[Mapping[str, Any]], str]


@dataclass
class Entry:
    """A change that was announced and not yet undone. `args` are JSON values."""

    id: int
    kind: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Undone:
    """What came of undoing one entry. Not `ok`: it stays in the journal, `detail` says why."""

    kind: str
    args: Mapping[str, Any]
    ok: bool
    detail: str


class Journal:
    """One run directory's journal. One process at a time has it open (the daemon's lock sees to that)."""

    def __init__(self, path: Path, handlers: Mapping[str, Undo] | None = None) -> None:
        """`path` is made at the first change; what it holds already is pending.

        `handlers`: those of `ctl/links/undo.py` for a caller that has locked its interface; None: for one that has not.
        """
        self.path = path
        self._handlers = handlers
        self._pending: dict[int, Entry] = {}
        self._next = 1
        self._lengths: dict[int, int] = {}  # of the last lines of pending entries
        self._compact_from = COMPACT_FROM
        self._new = path.with_name(f"{path.name}.new")
        self._load()

    def record(self, kind: str, **args: Any) -> Entry:
        """Announce a change. When this returns it is on disk, and the change may be made."""
        entry = Entry(self._next, kind, dict(args))
        self._next += 1
        size = self._write(_encode(entry))
        self._pending[entry.id] = entry
        self._announced(entry, size)
        return entry

    def amend(self, entry: Entry, **args: Any) -> None:
        """Add what became known about a change only after it was made."""
        entry.args.update(args)
        self._announced(entry, self._write(_encode(entry)))

    def done(self, entry: Entry) -> None:
        """The change is undone. A second time does nothing."""
        if self._pending.pop(entry.id, None) is None:
            return
        self._lengths.pop(entry.id, None)
        if self._pending:
            self._compact(self._write(_json({"id": entry.id, "done": True})))
        else:
            self.path.unlink(missing_ok=True)
            self._compact_from = COMPACT_FROM

    def pending(self) -> list[Entry]:
        """What is not undone yet, oldest first."""
        return list(self._pending.values())

    def undo(self, entry: Entry) -> Undone:
        """Undo one change, if it is still there to be undone. Logs a failure and never raises."""
        try:
            detail = self._handler(entry.kind)(entry.args)
        except Exception as exc:
            unforeseen = None if isinstance(exc, (XdpvhostError, OSError)) else exc
            log.error("cannot undo %s: %s", entry.kind, exc, exc_info=unforeseen)
            return Undone(entry.kind, dict(entry.args), False, str(exc))
        try:
            self.done(entry)
        except OSError as exc:
            log.error("%s is undone, which cannot be noted: %s", entry.kind, exc)
        return Undone(entry.kind, dict(entry.args), True, detail)

    def replay_undo(self, entries: Sequence[Entry] | None = None) -> list[Undone]:
        """Undo what is pending of `entries`, or everything, last change first. What fails stays pending."""
        return [self.undo(entry) for entry in reversed(self.pending()) if entries is None or entry in entries]

    def _handler(self, kind: str) -> Undo:
        if self._handlers is None:
            from .undo import handlers  # here, because it imports what writes journals

            self._handlers = handlers()
        try:
            return self._handlers[kind]
        except KeyError:
            raise XdpvhostError(
                f"{self.path}: entry of unknown kind {kind!r}, from another version of xdpvhost"
            ) from None

    def _load(self) -> None:
        with contextlib.suppress(OSError):
            self._new.unlink()  # of a compaction that a crash cut short
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            log.warning("%s: its last line was cut short; that change was never made", self.path)
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                item = json.loads(line)
                key = int(item["id"])
                if item.get("done"):
                    self._pending.pop(key, None)
                    self._lengths.pop(key, None)
                else:
                    self._lengths[key] = len(line) + 1
                    self._pending[key] = Entry(key, str(item["kind"]), dict(item["args"]))
            except (ValueError, KeyError, TypeError) as exc:
                raise XdpvhostError(
                    f"{self.path}: line {number} is damaged ({exc}): look at it, undo by hand what it says, delete it"
                ) from exc
            self._next = max(self._next, key + 1)

    def _announced(self, entry: Entry, size: int) -> None:
        """Its line is the last one of a file of `size` bytes."""
        self._lengths[entry.id] = len(_encode(entry))
        self._compact(size)

    def _compact(self, size: int) -> None:
        """Write it anew with what is pending alone, if that is less than half of its `size`. Logs, never raises."""
        if size < self._compact_from or size <= 2 * sum(self._lengths.values()):
            return
        data = b"".join(map(_encode, self._pending.values()))
        try:
            fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                if os.write(fd, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(self._new, self.path)
            self._sync_directory()
        except OSError as exc:
            log.warning("%s: can't be written anew without what is done, so it grows: %s", self.path, exc.strerror)
            self._compact_from = 2 * size
            with contextlib.suppress(OSError):
                self._new.unlink()

    def _write(self, data: bytes) -> int:
        """Append a line. Answers the size of the file then."""
        is_new = not self.path.exists()
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            try:
                if os.write(fd, data) != len(data):
                    raise OSError(errno.ENOSPC, f"cannot write {self.path}: {os.strerror(errno.ENOSPC)}")
                os.fsync(fd)
            except OSError:
                with contextlib.suppress(OSError):  # half a line would spoil the next one
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        if is_new:
            self._sync_directory()
        return size + len(data)

    def _sync_directory(self) -> None:
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _encode(entry: Entry) -> bytes:
    return _json({"id": entry.id, "kind": entry.kind, "args": entry.args})


def _json(item: Mapping[str, Any]) -> bytes:
    return json.dumps(item, separators=(",", ":")).encode() + b"\n"
