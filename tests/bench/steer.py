# SPDX-License-Identifier: Apache-2.0
"""What the XDP program costs: BPF_PROG_TEST_RUN with many repeats, the median of several runs.

scripts/world .venv/bin/python tests/bench/steer.py
"""

import socket
import statistics
import struct
import sys
from contextlib import ExitStack
from ctypes import addressof, byref, c_char_p, c_void_p, cast, create_string_buffer, sizeof
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.netns import World
from xdpvhost.xdp import maps
from xdpvhost.xdp.libbpf import BpfObject, TestRunOpts, XdpMd, check, libbpf
from xdpvhost.xdp.program import OBJECT, PROGRAM, SteerProgram
from xdpvhost.xdp.xsk import AF_XDP, SOL_XDP

XDP_RX_RING = 2
GUESTS, QUEUES, RUNS, REPEAT = 64, 4, 15, 1_000_000
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
        for slot in range(GUESTS):
            mac = GUEST[:5] + bytes([slot])
            for vlan in (maps.VLAN_NONE, maps.VLAN_ANY):
                steering.set_mac(vlan, mac, slot)
            sock = stack.enter_context(socket.socket(AF_XDP, socket.SOCK_RAW, 0))
            sock.setsockopt(SOL_XDP, XDP_RX_RING, struct.pack("=I", 64))
            steering.set_socket(slot, 0, sock.fileno())
        for name, head in FRAMES.items():
            runs = [nanoseconds(obj.program_fd(PROGRAM), head.ljust(64, b"\0"), ifindex) for _ in range(RUNS)]
            print(f"{name}: median {statistics.median(runs):.0f} ns, {min(runs)} to {max(runs)}")


if __name__ == "__main__":
    main()
