# SPDX-License-Identifier: Apache-2.0
"""Two real Linux guests (User-Mode Linux, Debian's virtio_net) on one NIC, and the network behind it."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.lab import GIB, HOST_IP, NET_IP, NET_IP6, Lab, guest_ip, guest_ip6, guest_mac
from support.process import Process, cpu_seconds, wait_for
from support.uml import UmlGuest, peer_program

MDNS = "224.0.0.251"
PING = "ping -n -c 5 -i 0.1 -w 10"


def losses(output: str) -> int:
    match = re.search(r"(\d+)% packet loss", output)
    assert match is not None, output
    return int(match[1])


def serve(lab: Lab, *argv: str) -> Process:
    return lab.net.start(*argv, env={"LC_ALL": "C"})


def wait_in_guest(guest: UmlGuest, script: str, what: str, deadline: float = 10) -> None:
    wait_for(lambda: guest.call(script)[0] == 0, deadline, what, interval=0.1)


def start_iperf_server(guest: UmlGuest) -> None:
    guest.spawn("iperf3 -s -1 --forceflush")
    wait_in_guest(guest, "netstat -ltn | grep -q :5201", f"iperf3 to listen in {guest.name}")


@contextmanager
def joined(lab: Lab, number: int) -> Iterator[None]:
    """The guest is in the multicast group; whatever is done in the block, it has to hear."""
    guest = lab.guests[number]
    log = guest.spawn(f"peer listen {MDNS} 5353 {guest_ip(number)}")
    wait_in_guest(guest, f"grep -q listening {log}", f"{guest.name} to join the group")
    yield
    wait_in_guest(guest, f"grep -q heard {log}", f"{guest.name} to hear the datagram")


class TestReach:
    def test_guest_has_the_mac_of_its_spec(self, lab: Lab) -> None:
        assert lab.guests[1].mac() == guest_mac(1)
        assert lab.guests[2].mac() == guest_mac(2)

    def test_ping_both_ways_with_learned_neighbours(self, lab: Lab) -> None:
        """ARP requests are broadcast and replies unicast, in both directions; nothing is configured."""
        lab.net.ip("neigh", "flush", "dev", "eth0")
        lab.guests[1].run("ip neigh flush dev eth0")
        assert losses(lab.guests[1].run(f"{PING} {NET_IP}", 15)) == 0
        lab.net.ip("neigh", "flush", "dev", "eth0")
        assert losses(lab.net.run(*f"{PING} {guest_ip(1)}".split()).stdout) == 0
        neighbours = {n["dst"]: n for n in lab.net.json("ip", "-j", "neigh", "show", "dev", "eth0")}
        assert neighbours[guest_ip(1)]["lladdr"] == guest_mac(1)
        assert "PERMANENT" not in neighbours[guest_ip(1)]["state"]
        assert lab.net_mac in lab.guests[1].run("ip neigh show dev eth0")

    def test_guest_to_guest(self, lab: Lab) -> None:
        lab.guests[1].run("ip neigh flush dev eth0")
        assert losses(lab.guests[1].run(f"{PING} {guest_ip(2)}", 15)) == 0
        assert losses(lab.guests[2].run(f"{PING} {guest_ip(1)}", 15)) == 0

    def test_guest_to_guest_traffic_does_not_go_by_the_nic(self, lab: Lab) -> None:
        lab.guests[1].run(f"{PING} {guest_ip(2)}", 15)
        before = lab.daemon.metrics()
        lab.guests[1].run(f"ping -n -c 23 -i 0.02 -w 10 {guest_ip(2)}", 15)
        after = lab.daemon.metrics()
        name = "xdpvhost_guest_rx_packets_total"
        assert after.total(name, guest="vm2") - before.total(name, guest="vm2") >= 23
        name = "xdpvhost_xsk_transmit_packets_total"
        assert after.total(name) - before.total(name) < 23

    def test_large_pings(self, lab: Lab) -> None:
        assert losses(lab.guests[1].run(f"{PING} -s 1472 -M do {NET_IP}", 15)) == 0
        assert losses(lab.guests[1].run(f"{PING} -s 8000 {NET_IP}", 15)) == 0

    def test_ipv6_neighbour_discovery(self, lab: Lab) -> None:
        """Neighbour solicitation is multicast: steering by unicast MAC is where others lose it."""
        lab.net.ip("-6", "neigh", "flush", "dev", "eth0")
        lab.guests[1].run("ip -6 neigh flush dev eth0")
        assert losses(lab.guests[1].run(f"{PING} -6 {NET_IP6}", 15)) == 0
        lab.net.ip("-6", "neigh", "flush", "dev", "eth0")
        assert losses(lab.net.run(*f"{PING} -6 {guest_ip6(1)}".split()).stdout) == 0
        assert losses(lab.guests[1].run(f"{PING} -6 {guest_ip6(2)}", 15)) == 0

    def test_ipv6_link_local(self, lab: Lab) -> None:
        wait_in_guest(
            lab.guests[1],
            "ip -6 addr show dev eth0 scope link | grep -v tentative | grep -q fe80",
            "the guest's link-local address",
        )
        addresses = lab.net.json("ip", "-j", "-6", "addr", "show", "dev", "eth0")[0]["addr_info"]
        (local,) = [a["local"] for a in addresses if a["scope"] == "link"]
        assert losses(lab.guests[1].run(f"{PING} -6 {local}%eth0", 15)) == 0

    def test_duplicate_address_is_detected(self, lab: Lab) -> None:
        """DAD asks by multicast, and the answer comes by multicast, too."""
        guest = lab.guests[1]
        guest.run(f"ip -6 addr add {NET_IP6}/64 dev eth0")
        try:
            wait_in_guest(guest, "ip -6 addr show dev eth0 | grep -q dadfailed", "duplicate address detection")
        finally:
            guest.run(f"ip -6 addr del {NET_IP6}/64 dev eth0")

    def test_multicast_reaches_every_guest(self, lab: Lab) -> None:
        """As mDNS does it: UDP to 224.0.0.251, port 5353."""
        with joined(lab, 1), joined(lab, 2):
            lab.net.run(peer_program(), "tell", MDNS, "5353", NET_IP, "who is vm.local?")

    def test_multicast_from_a_guest_reaches_network_and_guests(self, lab: Lab) -> None:
        with serve(lab, str(peer_program()), "listen", MDNS, "5353", NET_IP) as receiver:
            receiver.wait_line("listening", 10)
            with joined(lab, 2):
                lab.guests[1].run(f"peer tell {MDNS} 5353 {guest_ip(1)} 'here is vm1'")
            receiver.wait_line("heard here is vm1", 10)

    def test_dhcp(self, lab: Lab) -> None:
        """The server's frames come from a local stack, with offloads on: only the pseudo-header's checksum."""
        arguments = ["--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=eth0", "--bind-interfaces"]
        arguments += ["--dhcp-range=192.0.2.100,192.0.2.150,5m", "--dhcp-authoritative", "--no-ping", "--user=root"]
        guest = lab.guests[2]
        with serve(lab, "dnsmasq", *arguments, f"--dhcp-leasefile={lab.directory}/leases", "--pid-file=") as server:
            server.wait_line("DHCP, IP range", 10)
            guest.run("ip addr flush dev eth0 scope global")
            try:
                guest.run("udhcpc -i eth0 -n -q -f -t 5 -T 2", 30)
                assert re.search(r"inet 192\.0\.2\.1[0-5]\d/24", guest.run("ip addr show dev eth0"))
                assert losses(guest.run(f"{PING} {NET_IP}", 15)) == 0
            finally:
                guest.run("ip addr flush dev eth0 scope global")
                guest.configure(f"{guest_ip(2)}/24", f"{guest_ip6(2)}/64")


class TestThroughput:
    def test_the_sender_has_its_offloads_on(self, lab: Lab) -> None:
        assert "tx-checksumming: on" in lab.net.run("ethtool", "-k", "eth0").stdout

    @pytest.mark.parametrize("options", ["", "-R"], ids=["from-guest", "to-guest"])
    def test_iperf_tcp(self, lab: Lab, options: str) -> None:
        with serve(lab, "iperf3", "-s", "-1", "--forceflush") as server:
            server.wait_line("Server listening", 10)
            report = json.loads(lab.guests[1].run(f"iperf3 -c {NET_IP} -t 2 -J {options}", 30))
        assert report["end"]["sum_received"]["bytes"] > 10_000_000

    @pytest.mark.parametrize("options", ["", "-R"], ids=["from-guest", "to-guest"])
    def test_iperf_udp(self, lab: Lab, options: str) -> None:
        with serve(lab, "iperf3", "-s", "-1", "--forceflush") as server:
            server.wait_line("Server listening", 10)
            script = f"iperf3 -c {NET_IP} -u -b 10M -l 1200 -t 2 -J {options}"
            report = json.loads(lab.guests[1].run(script, 30))
        assert report["end"]["sum"]["packets"] > 1000
        assert report["end"]["sum"]["lost_percent"] < 5

    def test_iperf_guest_to_guest(self, lab: Lab) -> None:
        start_iperf_server(lab.guests[2])
        report = json.loads(lab.guests[1].run(f"iperf3 -c {guest_ip(2)} -t 2 -J", 30))
        assert report["end"]["sum_received"]["bytes"] > 10_000_000

    def test_one_gib_to_the_guest(self, lab: Lab) -> None:
        guest = lab.guests[1]
        log = guest.spawn(f"peer receive {guest_ip(1)} 7001")
        wait_in_guest(guest, f"grep -q listening {log}", "the receiver")
        sent = lab.net.run(peer_program(), "send", guest_ip(1), "7001", str(GIB), "23", timeout=120).stdout
        wait_in_guest(guest, f"grep -q ^{GIB} {log}", "the receiver's checksum")
        assert guest.run(f"tail -n 1 {log}") == sent

    def test_one_gib_from_the_guest(self, lab: Lab) -> None:
        with serve(lab, str(peer_program()), "receive", NET_IP, "7002") as receiver:
            receiver.wait_line("listening", 10)
            sent = lab.guests[1].run(f"peer send {NET_IP} 7002 {GIB} 29", 120)
            assert receiver.wait(10) == 0
            assert receiver.log().splitlines()[-1] == sent.strip()

    def test_one_copy_a_frame(self, lab: Lab) -> None:
        """After all of the above: the bytes copied are the bytes delivered, NIC->guest, guest->NIC, guest->guest."""

        def equal() -> bool:
            scrape = lab.daemon.metrics()
            pairs = [
                (
                    scrape.total("xdpvhost_copied_bytes_total", direction="guest", guest=name),
                    scrape.total("xdpvhost_guest_rx_bytes_total", guest=name),
                )
                for name in ("vm1", "vm2")
            ]
            sent = scrape.total("xdpvhost_xsk_transmit_bytes_total")
            pairs.append((scrape.total("xdpvhost_copied_bytes_total", direction="nic"), sent))
            return all(copied == delivered > 0 for copied, delivered in pairs)

        wait_for(equal, 5, "copied bytes to equal delivered bytes", interval=0.1)


class TestHost:
    """The NIC stays the host's NIC."""

    def test_host_traffic_is_undisturbed_while_guests_run(self, lab: Lab) -> None:
        with serve(lab, "iperf3", "-s", "-1", "--forceflush") as server:
            server.wait_line("Server listening", 10)
            lab.guests[1].spawn(f"iperf3 -c {NET_IP} -t 4")
            server.wait_line("connected to", 10)
            lab.net.ip("neigh", "flush", "dev", "eth0")
            lab.host.ip("neigh", "flush", "dev", "nic0")
            assert losses(lab.net.run(*f"ping -n -c 20 -i 0.05 -w 10 {HOST_IP}".split()).stdout) == 0
            assert losses(lab.host.run(*f"ping -n -c 20 -i 0.05 -w 10 {NET_IP}".split()).stdout) == 0
            neighbours = {n["dst"]: n for n in lab.host.json("ip", "-j", "neigh", "show", "dev", "nic0")}
            assert neighbours[NET_IP]["lladdr"] == lab.net_mac
            assert server.running, "the guest's traffic ended too early to say anything"

    def test_host_tcp_both_ways(self, lab: Lab) -> None:
        size = str(64 << 20)
        for server, client, address in ((lab.host, lab.net, HOST_IP), (lab.net, lab.host, NET_IP)):
            with server.start(peer_program(), "receive", address, "7003") as receiver:
                receiver.wait_line("listening", 10)
                sent = client.run(peer_program(), "send", address, "7003", size, "31").stdout
                assert receiver.wait(10) == 0
                assert receiver.log().splitlines()[-1] == sent.strip()

    def test_host_keystrokes(self, lab: Lab) -> None:
        """Many small messages answered one by one, as ssh has them."""
        with lab.host.entered():
            listener = socket.create_server((HOST_IP, 7004))

        def echo() -> None:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(64):
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        with listener:
            with lab.net.entered():
                client = socket.create_connection((HOST_IP, 7004), timeout=10)
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for number in range(200):
                    message = f"key {number}".encode()
                    client.sendall(message)
                    assert client.recv(64) == message
            thread.join(10)
        assert not thread.is_alive()

    def test_idle_daemon_uses_about_no_cpu(self, lab: Lab) -> None:
        """Connected guests that are silent cost nothing: some second and a half of quiet has under 2 % of a CPU."""
        pid = lab.daemon.pid
        begin = (time.monotonic(), cpu_seconds(pid))

        def quiet() -> bool:
            nonlocal begin
            now = (time.monotonic(), cpu_seconds(pid))
            if now[0] - begin[0] < 1.5:
                return False
            share = (now[1] - begin[1]) / (now[0] - begin[0])
            begin = now
            return share < 0.02

        wait_for(quiet, 15, "the idle daemon to use under 2 % of a CPU", interval=0.1)

    def test_the_daemon_is_well(self, lab: Lab) -> None:
        """After everything above: no protocol error, no fault, no reconnect, and nothing alarming in its log."""
        scrape = lab.daemon.metrics()
        assert scrape.total("xdpvhost_guest_protocol_errors_total") == 0
        assert scrape.total("xdpvhost_guest_reconnects_total") == 0
        for line in lab.daemon.process.log().splitlines():
            assert " ERROR " not in line, line
            assert "Traceback" not in line, line
