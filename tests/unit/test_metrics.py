# SPDX-License-Identifier: Apache-2.0
"""Every series is declared, exists with zero from the start, and carries its counter's value; the docs are current."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import generate_latest

from support.daemon import Metrics
from support.fake_plane import FakeDatapath, FakeSwitch
from support.golden import check_golden
from xdpvhost.config import MetricsAddress, change_guest
from xdpvhost.datapath import CTRL_NAMES, DROP_NAMES, Datapath
from xdpvhost.errors import ConfigError
from xdpvhost.learning import RESULTS
from xdpvhost.metrics import endpoint as endpoint_module
from xdpvhost.metrics import table
from xdpvhost.metrics.declared import BUILD_INFO, LINK_METRICS, METRICS, PROTOCOL_ERROR_REASONS, XSK_STATISTICS
from xdpvhost.metrics.endpoint import Endpoint, registry
from xdpvhost.metrics.samples import Counters, Sample
from xdpvhost.switch import Switch

DOCS = Path(__file__).resolve().parents[2] / "docs"


def counters(switch: FakeSwitch, dp: FakeDatapath | None = None) -> Counters:
    return Counters(cast(Datapath, dp or FakeDatapath()), cast(Switch, switch))


def scrape(source: Counters) -> Metrics:
    return Metrics(generate_latest(registry(source)).decode())


def test_names_are_unique_and_follow_the_conventions() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("xdpvhost_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")


def test_the_names_that_were_promised() -> None:
    promised = {
        "xdpvhost_xdp_verdicts_total": ("iface", "queue", "guest", "verdict"),
        "xdpvhost_xsk_receive_packets_total": ("iface", "queue", "guest"),
        "xdpvhost_xsk_receive_bytes_total": ("iface", "queue", "guest"),
        "xdpvhost_xsk_transmit_packets_total": ("iface", "queue"),
        "xdpvhost_xsk_transmit_bytes_total": ("iface", "queue"),
        "xdpvhost_xsk_drops_total": ("iface", "queue", "guest", "reason"),
        "xdpvhost_guest_rx_packets_total": ("guest", "queue"),
        "xdpvhost_guest_tx_packets_total": ("guest", "queue"),
        "xdpvhost_guest_rx_bytes_total": ("guest", "queue"),
        "xdpvhost_guest_tx_bytes_total": ("guest", "queue"),
        "xdpvhost_guest_drops_total": ("guest", "queue", "direction", "reason"),
        "xdpvhost_guest_kicks_total": ("guest", "queue", "direction"),
        "xdpvhost_guest_calls_total": ("guest", "queue", "direction"),
        "xdpvhost_copied_bytes_total": ("direction", "guest", "iface", "queue"),
        "xdpvhost_worker_polls_total": ("worker", "result"),
        "xdpvhost_guest_connected": ("guest",),
        "xdpvhost_guest_reconnects_total": ("guest",),
        "xdpvhost_guest_messages_total": ("guest", "request", "result"),
        "xdpvhost_guest_protocol_errors_total": ("guest", "reason"),
    }
    declared = {metric.name: metric.labels for metric in METRICS}
    assert promised.items() <= declared.items()


def test_every_series_is_zero_from_the_start() -> None:
    metrics = scrape(counters(FakeSwitch("vm1", "vm2"), FakeDatapath(workers=2)))
    assert {name for name, _ in metrics.samples} == {metric.name for metric in METRICS if metric not in LINK_METRICS}
    moved = {key: value for key, value in metrics.samples.items() if value and key[0] != BUILD_INFO.name}
    assert moved == {}
    per_ring = {"guest": "vm1", "queue": "1", "direction": "tx"}
    assert len(metrics.series("xdpvhost_guest_drops_total", **per_ring)) == len(DROP_NAMES)
    assert len(metrics.series("xdpvhost_xsk_drops_total", guest="vm2", queue="0")) == len(XSK_STATISTICS)
    assert len(metrics.series("xdpvhost_xsk_drops_total", guest="", queue="0")) == len(XSK_STATISTICS)
    assert len(metrics.series("xdpvhost_guest_protocol_errors_total", guest="vm1")) == len(PROTOCOL_ERROR_REASONS)
    assert len(metrics.series("xdpvhost_worker_polls_total")) == 4


def test_every_series_moves_with_its_counter() -> None:
    """Give every native counter another value; each value appears exactly once, under a sensible name."""
    switch, dp = FakeSwitch("vm1", queues=1), FakeDatapath()
    nic, guest = switch.nics[0], switch.guests["vm1"]
    blocks = [
        guest.port.rx_counters(0), guest.port.tx_counters(0), guest.xsks[0].counters, nic.queues[0].counters,
        nic.mcast.counters, nic.taps[0].counters, dp.worker_counters(0),
    ]  # fmt: skip
    unread = {"reserved", "heartbeat"}
    value = 1000
    expected = set()
    for block in blocks:
        for field, *_ in block._fields_:
            if field == "drops":
                for index in range(len(DROP_NAMES)):
                    value += 1
                    block.drops[index] = value
                    expected.add(value)
            elif field not in unread:
                value += 1
                setattr(block, field, value)
                expected.add(value)
    guest.port.ctrl.accepted[CTRL_NAMES.index("mq")], guest.port.ctrl.refused[0] = 31, 37
    guest.reconnects = 41
    guest.protocol_errors["memory"] = 43
    guest.messages["SET_MEM_TABLE", "ok"] = 61
    for result, count in zip(RESULTS, (101, 103, 107, 109), strict=True):
        guest.learning[result] = count
    spec = change_guest(guest.spec, {"tx-rate": "800", "rx-rate": "1600", "storm": "83", "link": "off", "vlan": "7"})
    guest.place = replace(guest.place, spec=spec, learned=frozenset((7, bytes((2, 0, 0, 0, 0, n))) for n in range(89)))
    nic.changed_verdicts[0, 0, "redirect"] = 47
    nic.changed_verdicts[None, 0, "pass_multicast"] = 53
    nic.changed_statistics[0, 0] = dict.fromkeys(XSK_STATISTICS, 0) | {"rx_ring_full": 59}
    switch.captured(guest).frames, switch.captured(guest).lost = 67, 71
    switch.captured(nic).frames, switch.captured(nic).lost = 73, 79
    expected |= {31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79}
    expected |= {101, 103, 107, 109, 800, 1600, 83, 1, 89}
    metrics = scrape(counters(switch, dp))
    shown = [int(value) for (name, _), value in metrics.samples.items() if value and name != BUILD_INFO.name]
    assert sorted(shown) == sorted(expected)
    drops = guest.port.tx_counters(0).drops
    assert metrics.total("xdpvhost_guest_drops_total", reason="runt", direction="tx") == drops[DROP_NAMES.index("runt")]
    assert metrics.total("xdpvhost_xdp_verdicts_total", guest="vm1", verdict="redirect") == 47
    assert metrics.total("xdpvhost_xdp_verdicts_total", guest="", verdict="pass_multicast") == 53
    assert metrics.by("guest", "xdpvhost_capture_lost_total") == {"vm1": 71, "": 79}
    assert metrics.total("xdpvhost_copied_bytes_total", direction="nic") == nic.queues[0].counters.copied_bytes


def test_connected_is_a_gauge() -> None:
    switch = FakeSwitch("vm1", "vm2")
    switch.guests["vm2"].connected = True
    metrics = scrape(counters(switch))
    assert metrics.by("guest", "xdpvhost_guest_connected") == {"vm1": 0, "vm2": 1}


def test_a_protocol_error_of_a_new_kind_is_shown() -> None:
    switch = FakeSwitch("vm1")
    switch.guests["vm1"].protocol_errors["something new"] = 2
    metrics = scrape(counters(switch))
    assert metrics.total("xdpvhost_guest_protocol_errors_total", reason="something new") == 2


def test_a_removed_guest_takes_its_series_along() -> None:
    switch = FakeSwitch("vm1", "vm2")
    source = counters(switch)
    del switch.guests["vm1"]
    assert {dict(labels).get("guest") for _, labels in scrape(source).samples} == {None, "", "vm2"}


def test_no_reading_while_the_switch_changes() -> None:
    source = counters(FakeSwitch("vm1"))
    result: list[list[Sample]] = []
    reader = threading.Thread(target=lambda: result.append(source.read()))
    with source.lock:
        reader.start()
        reader.join(0.05)
        assert reader.is_alive()
    reader.join(5)
    assert result
    assert result[0]


def test_nothing_is_read_after_close() -> None:
    source = counters(FakeSwitch("vm1"))
    source.close()
    assert source.read() == []
    assert scrape(source).samples == {}


def test_the_text_is_golden() -> None:
    text = generate_latest(registry(counters(FakeSwitch("vm1", queues=1)))).decode()
    check_golden("metrics.txt", text)


def test_the_endpoint_serves_and_closes() -> None:
    endpoint = Endpoint(MetricsAddress("127.0.0.1", 0), counters(FakeSwitch("vm1")))
    url = f"http://{endpoint.address}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert Metrics(answer.read().decode()).total("xdpvhost_guest_connected", guest="vm1") == 0
    with pytest.raises(ConfigError, match=r"cannot serve metrics on .*Address already in use.*--metrics"):
        Endpoint(endpoint.address, counters(FakeSwitch()))
    endpoint.close()
    with pytest.raises(OSError, match="refused"):
        opener.open(url, timeout=5)


def test_silent_clients_are_few_and_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(endpoint_module._RequestHandler, "timeout", 0.5)
    endpoint = Endpoint(MetricsAddress("127.0.0.1", 0), counters(FakeSwitch("vm1")))
    place = ("127.0.0.1", endpoint.address.port)
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(place, timeout=5)) for _ in range(3)]
        begun = time.monotonic()
        assert clients[2].recv(1) == b"", "one too many"
        assert time.monotonic() - begun < 0.4
        assert [client.recv(1) for client in clients[:2]] == [b"", b""]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{endpoint.address}/metrics", timeout=5) as answer:
            assert answer.read()
    endpoint.close()


def test_an_address_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match=r"cannot serve metrics on 192\.0\.2\.1:9477"):
        Endpoint(MetricsAddress("192.0.2.1", 9477), counters(FakeSwitch()))
    with pytest.raises(ConfigError, match=r"cannot serve metrics on no\.such\.host\.invalid:1"):
        Endpoint(MetricsAddress("no.such.host.invalid", 1), counters(FakeSwitch()))


def test_the_documented_table_is_current() -> None:
    path = DOCS / "counters.md"
    assert path.read_text() == table.render(), "run `python3 -m xdpvhost.metrics.table > docs/counters.md`"
