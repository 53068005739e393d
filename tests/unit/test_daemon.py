# SPDX-License-Identifier: Apache-2.0
"""How `up` ends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from xdpvhost import daemon, privileges
from xdpvhost.config import UpConfig
from xdpvhost.errors import NicError
from xdpvhost.links.journal import Journal


def test_it_does_not_claim_that_the_nic_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Something stays in the journal: that is an error, not a success."""

    async def come_up(self: daemon.Daemon, _: asyncio.AbstractEventLoop) -> None:
        self._journal = journal = Journal(tmp_path / "journal.jsonl")
        self._not_ours = frozenset({journal.record("link_up").id})
        journal.record("xdp")
        self._stop.set()

    monkeypatch.setattr(privileges, "effective", lambda: frozenset(privileges.CAPABILITIES))
    monkeypatch.setattr(daemon.Daemon, "_come_up", come_up)
    monkeypatch.setattr(daemon.Daemon, "_ready_line", lambda _: "")
    with caplog.at_level("INFO"), pytest.raises(NicError, match=r"nic0: not undone: xdp .*xdpvhost clean --run-dir"):
        daemon.run(UpConfig(iface="nic0", guests=(), run_dir=tmp_path))
    assert "nic0 is NOT as it was" in caplog.text
    assert "is as it was" not in caplog.text
