# SPDX-License-Identifier: Apache-2.0
"""What a kernel event means, and what is said where bcc is missing."""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import pytest

from xdpvhost import trace
from xdpvhost.errors import ConfigError, DaemonError, XdpvhostError
from xdpvhost.trace import PROGRAM, RawEvent, Resolver, Status

STATUS: dict[str, Any] = {
    "nics": [{"iface": "eth0", "ifindex": 7, "queues": 4, "facts": {"program_id": 23, "dispatcher": False}}],
    "guests": [{"name": "vm1", "slot": 0}, {"name": "vm2", "slot": 1}],
}


@pytest.mark.parametrize(
    ("err", "index", "guest", "queue", "cause"),
    [
        (-105, 0, "vm1", 0, "rx_ring_full"),
        (-12, 3, "vm1", 3, "fill_ring_empty"),
        (-28, 4, "vm2", 0, "too_big"),
        (-22, 6, "vm2", 2, "wrong_queue"),
        (-6, 1, "vm1", 1, "not_bound"),
        (-5, 1, "vm1", 1, "unknown"),
        (-105, 8, None, 0, "rx_ring_full"),
    ],
)
def test_an_index_names_the_guest_and_an_error_the_cause(
    err: int, index: int, guest: str | None, queue: int, cause: str
) -> None:
    drop = Resolver(lambda: STATUS).drop(RawEvent(prog_id=23, ifindex=7, act=4, err=err, map_index=index))
    assert (drop.kind, drop.iface, drop.guest, drop.queue, drop.cause) == ("redirect", "eth0", guest, queue, cause)
    assert str(drop).endswith(f"eth0 guest {guest or '?'} queue {queue}: {cause}: {drop.detail}")


def test_a_host_port_has_a_slot_too() -> None:
    status = copy.deepcopy(STATUS)
    status["nics"][0]["host_port"] = {"tap": "xvh-eth0", "slot": 511}
    drop = Resolver(lambda: status).drop(RawEvent(prog_id=23, ifindex=7, act=4, err=-105, map_index=4 * 511 + 2))
    assert drop.guest == "host port"
    assert f"eth0 host port queue 2: rx_ring_full: {drop.detail}" in str(drop)


def test_an_exception_belongs_to_no_guest() -> None:
    drop = Resolver(lambda: STATUS).drop(RawEvent(kind=1, ifindex=7, act=4))
    assert (drop.kind, drop.guest, drop.queue) == ("exception", None, None)
    assert "XDP_REDIRECT" in drop.detail


def test_a_guest_that_came_later_is_asked_for() -> None:
    status = copy.deepcopy(STATUS)
    asked = []

    def ask() -> Status:
        asked.append(1)
        return copy.deepcopy(status)

    resolver = Resolver(ask)
    status["guests"].append({"name": "vm3", "slot": 2})
    assert resolver.drop(RawEvent(ifindex=7, err=-12, map_index=9)).guest == "vm3"
    assert resolver.drop(RawEvent(ifindex=7, err=-12, map_index=9)).guest == "vm3"
    assert len(asked) == 2


def test_a_slot_may_pass_to_another_guest() -> None:
    status = copy.deepcopy(STATUS)
    resolver = Resolver(lambda: copy.deepcopy(status))
    status["guests"][1]["name"] = "vm3"
    resolver.refresh()
    assert resolver.drop(RawEvent(ifindex=7, err=-12, map_index=4)).guest == "vm3"


def test_another_daemon_ends_it() -> None:
    status = copy.deepcopy(STATUS)
    resolver = Resolver(lambda: copy.deepcopy(status))
    status["nics"][0]["facts"]["program_id"] = 24
    with pytest.raises(DaemonError, match="started anew"):
        resolver.refresh()


def test_the_daemons_end_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What came before that is shown."""
    event = RawEvent(prog_id=23, ifindex=7, act=4, err=-12, map_index=0)
    answers = [STATUS]

    def ask() -> Status:
        if not answers:
            raise DaemonError("no xdpvhost daemon is running")
        return answers.pop()

    class Perf:
        def open_perf_buffer(self, callback: Any, **_: object) -> None:
            self.callback = callback

    class Bpf:
        perf = Perf()

        def __getitem__(self, _: str) -> Perf:
            return self.perf

        def perf_buffer_poll(self, timeout: int) -> None:
            self.perf.callback(0, ctypes.addressof(event), ctypes.sizeof(event))

        def cleanup(self) -> None:
            pass

    monkeypatch.setattr(trace, "_load", lambda _: Bpf())
    monkeypatch.setattr(trace, "REFRESH_PERIOD", 0.0)
    with pytest.raises(DaemonError, match="no xdpvhost daemon"):
        trace.drops(ask, as_json=False, seconds=5)
    assert "guest vm1 queue 0: fill_ring_empty" in capsys.readouterr().out


def test_only_the_daemons_own_program_is_watched() -> None:
    assert Resolver(lambda: STATUS).filter == "prog_id == 23"
    dispatched = copy.deepcopy(STATUS)
    dispatched["nics"][0]["facts"]["dispatcher"] = True
    assert Resolver(lambda: dispatched).filter == "ifindex == 7"


def test_the_event_has_no_padding() -> None:
    names = [name for name, _ in RawEvent._fields_]
    body = PROGRAM.partition("struct drop_event {")[2].partition("}")[0]
    assert [line.split()[-1].rstrip(";") for line in body.strip().splitlines()] == names
    assert sum(getattr(RawEvent, name).size for name in names) == 40


def test_without_bcc_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(trace.importlib, "import_module", missing)
    with pytest.raises(XdpvhostError, match="apt install python3-bpfcc"):
        trace.drops(lambda: STATUS, as_json=False, seconds=0.1)


def test_where_bcc_wants_headers_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bcc:
        @staticmethod
        def BPF(text: str) -> Any:
            raise Exception("Failed to compile BPF module <text>")

    monkeypatch.setattr(trace.importlib, "import_module", lambda _: Bcc)
    monkeypatch.setattr(trace, "_need_tracefs", lambda: None)
    monkeypatch.setattr(trace.platform, "release", lambda: "6.1.0-23-amd64")
    with pytest.raises(XdpvhostError, match=r"apt install linux-headers-6\.1\.0-23-amd64"):
        trace.drops(lambda: STATUS, as_json=False, seconds=0.1)


def test_modes_without_xdp_have_nothing_to_trace() -> None:
    with pytest.raises(ConfigError, match=r"in mode macvtap no frame passes XDP; `xdpvhost stats`"):
        Resolver(lambda: {**STATUS, "mode": "macvtap"})
