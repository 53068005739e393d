# SPDX-License-Identifier: Apache-2.0
"""Debian's Prometheus server scrapes a running daemon, and its answers equal the frames that were sent."""

import json
import urllib.parse
import urllib.request

from support.frames import PacketSocket, set_transmit_queue, udp_frame
from support.lab import Lab, guest_mac, spec
from support.netns import QUEUES
from support.process import wait_for
from support.testpmd import TestPmd, VirtioUser

COUNT = 23
CONFIG = """
global: {scrape_interval: 500ms, scrape_timeout: 500ms}
scrape_configs:
  - job_name: xdpvhost
    static_configs: [{targets: ["127.0.0.1:9477"]}]
"""


def query(lab: Lab, promql: str) -> dict[str, int]:
    """The instant vector's values by their `queue` label."""
    url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": promql})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with lab.host.entered(), opener.open(url, timeout=10) as answer:
        body = json.load(answer)
    assert body["status"] == "success", body
    return {r["metric"].get("queue", ""): int(float(r["value"][1])) for r in body["data"]["result"]}


def test_promql_equals_the_frames_sent(quiet_lab: Lab) -> None:
    daemon = quiet_lab.up([spec(1, queues=QUEUES)])
    config = quiet_lab.directory / "prometheus.yml"
    config.write_text(CONFIG)
    server = quiet_lab.host.start(
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={quiet_lab.directory}/tsdb",
        "--web.listen-address=127.0.0.1:9090",
    )
    with (
        server,
        TestPmd([VirtioUser(daemon.socket("vm1"), guest_mac(1), queues=QUEUES)], directory=quiet_lab.directory) as pmd,
    ):
        daemon.wait_connected("vm1")
        server.wait_line("Server is ready", 30)
        zero = {str(queue): 0 for queue in range(QUEUES)}
        received = 'sum by (queue) (xdpvhost_guest_rx_packets_total{guest="vm1"})'
        wait_for(lambda: query(quiet_lab, received) == zero, 20, "Prometheus to have every series at 0", interval=0.2)

        pmd.start()
        with PacketSocket(quiet_lab.net, "eth0") as wire:
            for queue in range(QUEUES):
                set_transmit_queue(quiet_lab.net, "eth0", queue)
                wire.send(udp_frame(guest_mac(1), quiet_lab.net_mac, number=n) for n in range(COUNT))
        pmd.wait_received(COUNT * QUEUES)
        pmd.stop()
        pmd.send(COUNT, destination=quiet_lab.net_mac)

        each = {str(queue): COUNT for queue in range(QUEUES)}
        expected = {
            received: each,
            'sum by (queue) (xdpvhost_guest_tx_packets_total{guest="vm1"})': each,
            'sum by (queue) (xdpvhost_xdp_verdicts_total{guest="vm1",verdict="redirect"})': each,
            'sum by (queue) (xdpvhost_xsk_receive_packets_total{guest="vm1"})': each,
            "sum(xdpvhost_xsk_transmit_packets_total)": {"": COUNT * QUEUES},
            "sum(xdpvhost_guest_drops_total)": {"": 0},
            "up": {"": 1},
        }
        for promql, values in expected.items():
            wait_for(
                lambda promql=promql, values=values: query(quiet_lab, promql) == values,  # type: ignore[misc]
                20,
                f"{promql} to be {values}; it is {query(quiet_lab, promql)}",
                interval=0.2,
            )
