# SPDX-License-Identifier: Apache-2.0
"""Either side may vanish at any moment, and the other goes on when it is back.

The guest here is DPDK's driver in server mode: it listens, xdpvhost connects. (User-Mode Linux never reconnects.)
"""

import signal

import pytest

from support.frames import PacketSocket, udp_frame
from support.lab import HOST_IP, Lab, guest_mac, spec
from support.process import wait_for
from support.testpmd import TestPmd, VirtioUser

COUNT = 23


def exchange(lab: Lab, pmd: TestPmd, pairs: int = 1) -> None:
    """23 frames to the guest and 23 from each of its queue pairs, on top of what was before."""
    before = pmd.stats().rx_packets
    with PacketSocket(lab.net, "eth0") as wire:
        pmd.stop()
        pmd.send(COUNT, destination=lab.net_mac)
        assert len(wire.wait_received(guest_mac(1), COUNT * pairs)) == COUNT * pairs
        wire.send(udp_frame(guest_mac(1), lab.net_mac, number=n) for n in range(COUNT))
        pmd.wait_received(before + COUNT)
    assert pmd.stats().rx_packets == before + COUNT


@pytest.mark.parametrize("pairs", [1, 4])
def test_kill_9_and_up_again(quiet_lab: Lab, pairs: int) -> None:
    socket = quiet_lab.directory / "guest.sock"
    guest = spec(1, queues=pairs, extra=f",socket={socket},socket-mode=client")
    port = VirtioUser(socket, guest_mac(1), queues=pairs, server=True)
    # A front-end that listens boots only when a back-end is there, so the daemon comes first.
    daemon = quiet_lab.up([guest])
    with TestPmd([port], directory=quiet_lab.directory) as pmd:
        daemon.wait_connected("vm1")
        exchange(quiet_lab, pmd, pairs)
        daemon.kill()
        again = quiet_lab.up([guest])
        again.wait_connected("vm1")
        wait_for(pmd.link_up, 10, "the guest's link", interval=0.1)
        exchange(quiet_lab, pmd, pairs)
        assert quiet_lab.host.run("ping", "-c", "1", "-w", "5", HOST_IP).returncode == 0
        again.down()
    assert "xdp" not in quiet_lab.host.run("ip", "-d", "link", "show", "dev", "nic0").stdout


def test_front_end_comes_and_goes(quiet_lab: Lab) -> None:
    """A virtual machine that is killed and started again finds its port again."""
    daemon = quiet_lab.up([spec(1)])
    for _ in range(3):
        with TestPmd([VirtioUser(daemon.socket("vm1"), guest_mac(1))], directory=quiet_lab.directory) as pmd:
            daemon.wait_connected("vm1")
            exchange(quiet_lab, pmd)
        daemon.wait_connected("vm1", connected=False)
    assert daemon.metrics().total("xdpvhost_guest_reconnects_total", guest="vm1") == 2


def test_down_puts_the_nic_back(quiet_lab: Lab) -> None:
    def facts() -> str:
        link = quiet_lab.host.run("ip", "-d", "-j", "link", "show", "dev", "nic0").stdout
        features = quiet_lab.host.run("ethtool", "-k", "nic0").stdout
        addresses = quiet_lab.host.run("bridge", "fdb", "show", "dev", "nic0").stdout
        peer = quiet_lab.net.run("ethtool", "-k", "eth0").stdout
        return link + features + addresses + peer

    before = facts()
    daemon = quiet_lab.up([spec(1)])
    assert facts() != before
    daemon.process.send(signal.SIGTERM)
    assert daemon.process.wait(15) == 0
    assert facts() == before
    assert not daemon.run_dir.exists()
