# SPDX-License-Identifier: Apache-2.0
"""What a capture at full speed costs the other ports of the same worker, and that its own loss is counted."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from support.daemon import PROGRAM, Daemon
from support.fastguest import FastGuest
from support.netns import World
from support.process import wait_for
from xdpvhost.compare import native

MACS = [f"52:54:00:00:00:0{number}" for number in range(1, 5)]
SECONDS = 0.3
LEAST = 0.05  # of the rate without: it would be none if a worker waited


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("size", [64, 1500])
def test_others_go_on_and_every_frame_is_captured_or_counted(
    world: World, measured: Callable[[str], None], size: int
) -> None:
    """vm1 sends to vm2 and vm3 to vm4, as fast as one worker can; vm1 is captured; the command reads, or is stopped.

    What share of a worker's time a capture may take is tested in datapath/tests/test_capture.c. Here other tests may
    run beside this, so a rate only tells that nobody waits for the command.
    """
    nic, net = world.namespace("nic"), world.namespace("net")
    for namespace in (nic, net):  # whose multicast would be captured, too
        namespace.run("sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
    world.veth(nic, "nic0", net, "net0", queues=1)
    guests = [f"name=vm{number + 1},mac={mac}" for number, mac in enumerate(MACS)]
    with Daemon(nic, iface="nic0", guests=guests, options=["--poll", "busy"]) as daemon, ExitStack() as stack:
        devices = [FastGuest(daemon.socket(f"vm{number + 1}")) for number in range(4)]
        for sender, receiver, length in ((0, 1, size), (2, 3, 64)):
            addresses = bytes.fromhex((MACS[receiver] + MACS[sender]).replace(":", ""))
            devices[sender].fill(1, addresses + b"\x88\xb5" + bytes(length - 14))
            devices[receiver].fill(0, None)
        for device in devices:
            stack.callback(device.close)
            device.up()
        table = (native.Ring * 4)(*(device.ring(1 - number % 2) for number, device in enumerate(devices)))
        job = native.Job(program_fd=-1, socket_fd=-1, frame_len=64, rings=ctypes.addressof(table), nr_rings=4)
        cpus = sorted(os.sched_getaffinity(0))

        def total(name: str) -> int:
            return daemon.metrics().total(f"xdpvhost_{name}_total", guest="vm1")

        def settled() -> int:
            """How many frames vm1 has sent, when the worker has moved all that there was."""
            memory, queue = devices[0].memory, devices[0].tx()
            wait_for(
                lambda: memory.u16(queue.used + 2) == memory.u16(queue.avail + 2), 10, "vm1's ring to be done with"
            )
            return total("guest_tx_packets")

        def rate() -> float:
            """Frames a second that vm4 gets."""
            with on_cpu(cpus[0]):
                done = table[3].done
                native.run(job, SECONDS)
                return (table[3].done - done) / SECONDS

        for device in devices:
            for queue in device.queues:
                queue.publish()
        rate()
        alone = rate()
        for stopped in (False, True):
            before, lost_before, kept_before = settled(), total("capture_lost"), total("capture_frames")
            argv = ["capture", "vm1", "-w", "/dev/null", "--buffer", "1", "--run-dir", str(daemon.run_dir)]
            with nic.start(PROGRAM, *argv) as command:
                command.wait_line("capturing ", 10)
                wait_for(lambda: os.sched_getaffinity(command.pid) == set(cpus[:-1]), 5, "it to leave the worker's CPU")
                if stopped:
                    command.send(signal.SIGSTOP)
                ratio = rate() / alone
                sent = settled() - before
                command.send(signal.SIGCONT)
                command.send(signal.SIGINT)
                assert command.wait(10) == 0
            kept, lost = total("capture_frames") - kept_before, total("capture_lost") - lost_before
            assert kept + lost == sent > 10000
            assert kept > 0
            assert lost > 0 or not stopped
            how = "stopped" if stopped else "reading"
            measured(f"{size} bytes, {how}: {kept} captured, {lost} lost, vm4 at {ratio:.2f} of its rate")
            assert ratio > LEAST
