# SPDX-License-Identifier: Apache-2.0
"""What the XDP program costs: BPF_PROG_TEST_RUN with many repeats, the median of several runs.

The one that asks the driver for VLAN tags is bound to its device, and BPF_PROG_TEST_RUN refuses such. Both are attached
in turns, and the kernel's own statistics (kernel.bpf_stats_enabled) say what they cost for frames that a veth receives:
redirected ones, and datagrams that a local stack sent as one (UDP_SEGMENT). The difference is what counts: each figure
has two looks at the clock in it.

scripts/world .venv/bin/python tests/bench/steer.py
"""

import json
import socket
import statistics
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import addressof, byref, c_char_p, c_void_p, cast, create_string_buffer, sizeof
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.netns import World
from support.process import run, wait_for
from xdpvhost.compare.native import TRAFFIC
from xdpvhost.xdp import maps
from xdpvhost.xdp.libbpf import BpfObject, TestRunOpts, XdpMd, check, libbpf
from xdpvhost.xdp.program import OBJECT, PROGRAM, SteerProgram
from xdpvhost.xdp.xsk import AF_XDP, SOL_XDP

XDP_RX_RING = 2
BPF_F_TEST_XDP_LIVE_FRAMES = 1 << 1
UDP_SEGMENT = 103
GUESTS, QUEUES, RUNS, REPEAT = 64, 4, 15, 1_000_000
ATTACHED_RUNS, ATTACHED_FRAMES = 9, 100_000
GUEST = bytes.fromhex("525400000021")
FRAMES = {
    "a guest's": GUEST + bytes(6) + b"\x08\x00",
    "a guest's, tagged": GUEST + bytes(6) + b"\x81\x00\x00\x64\x08\x00",
    "the host's": bytes.fromhex("5254000000ff") + bytes(6) + b"\x08\x00",
    "broadcast": b"\xff" * 6 + bytes(6) + b"\x08\x00",
}


def nanoseconds(program: int, frame: bytes, ifindex: int) -> int:
    room = create_string_buffer(1024)
    context = XdpMd(data_end=len(frame), ingress_ifindex=ifindex)
    opts = TestRunOpts(
        sz=sizeof(TestRunOpts),
        data_in=cast(c_char_p(frame), c_void_p),
        data_size_in=len(frame),
        data_out=addressof(room),
        data_size_out=len(room),
        ctx_in=addressof(context),
        ctx_size_in=sizeof(context),
        repeat=REPEAT,
    )
    check(libbpf().bpf_prog_test_run_opts(program, byref(opts)), "BPF_PROG_TEST_RUN")
    return int(opts.duration)


def main() -> None:
    in_the_same_run()
    as_attached()


def as_attached() -> None:
    costs: dict[tuple[str, bool], list[float]] = {}
    with World() as world, statistics_kept():
        a, b = world.namespace("a"), world.namespace("b")
        world.veth(a, "nic0", b, "net0", queues=1)
        b.ip("addr", "add", "192.0.2.1/24", "dev", "net0")
        b.ip("neigh", "add", "192.0.2.2", "lladdr", GUEST[:5].hex(":") + ":00", "dev", "net0")
        for _ in range(ATTACHED_RUNS):
            for kind, send in (("redirected", redirect), ("from a local stack", datagrams)):
                for tags_beside in (False, True):
                    with a.entered():
                        ifindex = socket.if_nametoindex("nic0")
                        program = SteerProgram.attach(ifindex, "nic0", "native", 1, tags_beside=tags_beside)
                        assert program.sees_tags_beside == tags_beside
                        fill(program.maps)
                    with b.entered():
                        send()
                    costs.setdefault((kind, tags_beside), []).append(kept(program.program_id))
                    with a.entered():
                        program.close()
    for (kind, tags_beside), runs in costs.items():
        what = "asks for tags" if tags_beside else "plain"
        median = statistics.median(runs)
        print(f"a guest's, {kind}, {what}: median {median:.0f} ns, {min(runs):.0f} to {max(runs):.0f}")


def redirect() -> None:
    """In bursts of 64."""
    frame = (GUEST[:5] + bytes(1) + bytes(6) + b"\x08\x00").ljust(64, b"\0")
    with BpfObject(TRAFFIC) as traffic:
        traffic.load()
        traffic.map("device").update(bytes(4), struct.pack("=I", socket.if_nametoindex("net0")))
        opts = TestRunOpts(
            sz=sizeof(TestRunOpts),
            data_in=cast(c_char_p(frame), c_void_p),
            data_size_in=len(frame),
            repeat=ATTACHED_FRAMES,
            flags=BPF_F_TEST_XDP_LIVE_FRAMES,
        )
        check(libbpf().bpf_prog_test_run_opts(traffic.program_fd("source"), byref(opts)), "BPF_PROG_TEST_RUN")


def datagrams() -> None:
    """In bursts of 40."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sender.connect(("192.0.2.2", 9))
        for _ in range(-(-ATTACHED_FRAMES // 40)):
            sender.send(bytes(40 * 1000))


@contextmanager
def statistics_kept() -> Iterator[None]:
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    before = switch.read_text()
    switch.write_text("1")
    try:
        yield
    finally:
        switch.write_text(before)


def kept(program_id: int) -> float:
    """Nanoseconds a run."""

    def done() -> dict[str, int] | None:
        found: dict[str, int] = json.loads(run(["bpftool", "-j", "prog", "show", "id", str(program_id)]).stdout)
        return found if found.get("run_cnt", 0) >= ATTACHED_FRAMES * 0.9 else None  # a full ring drops some

    found = wait_for(done, 10, "the frames")
    assert found is not None
    return found["run_time_ns"] / found["run_cnt"]


def fill(steering: maps.SteerMaps) -> None:
    for slot in range(GUESTS):
        for vlan in (maps.VLAN_NONE, maps.VLAN_ANY):
            steering.set_mac(vlan, GUEST[:5] + bytes([slot]), slot)


def in_the_same_run() -> None:
    with ExitStack() as stack:
        world = stack.enter_context(World())
        a, b = world.namespace("a"), world.namespace("b")
        world.veth(a, "nic0", b, "net0", queues=QUEUES)
        stack.enter_context(a.entered())
        ifindex = socket.if_nametoindex("nic0")
        attached = SteerProgram.attach(ifindex, "nic0", "native", QUEUES)  # the queues run, to pretend to come from
        stack.callback(attached.close)
        obj = stack.enter_context(BpfObject(OBJECT))
        maps.size_maps(obj, QUEUES)
        obj.load()
        steering = maps.SteerMaps(obj, QUEUES)
        stack.callback(steering.close)
        fill(steering)
        for slot in range(GUESTS):
            sock = stack.enter_context(socket.socket(AF_XDP, socket.SOCK_RAW, 0))
            sock.setsockopt(SOL_XDP, XDP_RX_RING, struct.pack("=I", 64))
            steering.set_socket(slot, 0, sock.fileno())
        for name, head in FRAMES.items():
            runs = [nanoseconds(obj.program_fd(PROGRAM), head.ljust(64, b"\0"), ifindex) for _ in range(RUNS)]
            print(f"{name}: median {statistics.median(runs):.0f} ns, {min(runs)} to {max(runs)}")


if __name__ == "__main__":
    main()
