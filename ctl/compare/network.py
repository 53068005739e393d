# SPDX-License-Identifier: Apache-2.0
"""The network behind the NIC: a source of frames, a sink that counts, and a packet socket for round trips."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Self

from ..errors import NicError
from ..links import netlink
from ..xdp.libbpf import BpfObject, check, libbpf
from . import native
from .world import Namespace

ETHERTYPE = 0x88B5  # for experiments: nothing else uses it
SOL_PACKET, PACKET_QDISC_BYPASS = 263, 20


def make_frame(destination: str, source: str, size: int) -> bytes:
    """`size` bytes, without the FCS."""
    header = bytes.fromhex(destination.replace(":", "") + source.replace(":", "")) + ETHERTYPE.to_bytes(2, "big")
    return header + bytes(i & 0xFF for i in range(size - len(header)))


def packet_socket(namespace: Namespace, iface: str) -> socket.socket:
    """Sends and receives frames of ETHERTYPE on an interface, past the queueing disciplines. Raises OSError."""
    with namespace.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.htons(ETHERTYPE))
        try:
            sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
            sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
            sock.bind((iface, ETHERTYPE))
        except BaseException:
            sock.close()
            raise
        return sock


class Network:
    """The interface at the NIC's other end."""

    def __init__(self, namespace: Namespace, iface: str) -> None:
        self.namespace, self.iface = namespace, iface
        with namespace.entered():
            link = netlink.get_link(iface)
        self.ifindex, self.mac = link.index, link.mac.hex(":")  # a card only takes frames that are for it
        self._stack = ExitStack()
        self._object = BpfObject(native.TRAFFIC)
        self._stack.callback(self._object.close)
        try:
            self._object.load()
            self._object.map("device").update(bytes(4), self.ifindex.to_bytes(4, "little"))
            self.socket = self._stack.enter_context(packet_socket(namespace, iface))
        except BaseException:
            self._stack.close()
            raise

    @contextmanager
    def sink(self) -> Iterator[None]:
        """Inside, every frame that arrives is counted and dropped. Raises NicError."""
        program = self._object.program_fd("sink")
        with self.namespace.entered():
            try:
                check(libbpf().bpf_xdp_attach(self.ifindex, program, 0, None), f"interface {self.iface}")
            except OSError as exc:
                raise NicError(
                    f"interface {self.iface}: cannot attach the program that counts: {exc.strerror}"
                ) from exc
        try:
            yield
        finally:
            with self.namespace.entered(), suppress(OSError):
                check(libbpf().bpf_xdp_attach(self.ifindex, -1, 0, None), f"interface {self.iface}")

    def received(self) -> int:
        """Frames that the sink has counted."""
        return sum(int.from_bytes(value, "little") for value in self._object.map("received").lookup_percpu(bytes(4)))

    def source(self, job: native.Job, frame: bytes, live: bool) -> object:
        """Make `job` send the frame; what is returned must live as long as the job.

        `live`: by redirecting into the interface, which a veth and few drivers take; else by the packet socket.
        """
        buffer = ctypes.create_string_buffer(frame, len(frame))
        job.frame, job.frame_len = ctypes.addressof(buffer), len(frame)
        job.program_fd = self._object.program_fd("source") if live else -1
        job.socket_fd = -1 if live else self.socket.fileno()
        return buffer

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self.close()
