# SPDX-License-Identifier: Apache-2.0
"""The data plane's AF_XDP side in plain Python, for tests of the set-up alone: fill, receive, send, frame by frame."""

import ctypes
import errno
import socket
import struct
from dataclasses import dataclass, field

from xdpvhost.datapath import NicqConf, Ring


def _word(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address)


class FakeObject:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeNicq(FakeObject):
    def __init__(self, conf: NicqConf) -> None:
        super().__init__()
        self.conf = conf
        self._next_tx = 0
        for frame in range(conf.rx_frames):
            self._fill(frame * conf.chunk)

    def _fill(self, address: int) -> None:
        ring = self.conf.fill
        producer = _word(ring.producer)
        ctypes.c_uint64.from_address(ring.ring + 8 * (producer.value & ring.mask)).value = address
        producer.value += 1

    def read(self, address: int, length: int) -> bytes:
        data = ctypes.string_at(self.conf.umem + address, length)
        self._fill(address // self.conf.chunk * self.conf.chunk)
        return data

    def send(self, frame: bytes) -> None:
        conf, ring = self.conf, self.conf.tx
        address = (conf.rx_frames + self._next_tx % conf.tx_frames) * conf.chunk
        self._next_tx += 1
        ctypes.memmove(conf.umem + address, frame, len(frame))
        producer = _word(ring.producer)
        entry = struct.pack("=QII", address, len(frame), 0)
        ctypes.memmove(ring.ring + 16 * (producer.value & ring.mask), entry, len(entry))
        producer.value += 1
        kick = socket.socket(44, socket.SOCK_RAW, fileno=conf.fd)
        try:
            kick.send(b"", socket.MSG_DONTWAIT)
        except OSError as exc:
            if exc.errno not in (errno.EAGAIN, errno.EBUSY):
                raise
        finally:
            kick.detach()


class FakeXsk(FakeObject):
    def __init__(self, nicq: FakeNicq, ring: Ring, fd: int) -> None:
        super().__init__()
        self.nicq, self.ring, self.fd = nicq, ring, fd

    def receive(self) -> list[bytes]:
        """What arrived since the last call."""
        frames = []
        consumer, producer = _word(self.ring.consumer), _word(self.ring.producer)
        while consumer.value != producer.value:
            entry = ctypes.string_at(self.ring.ring + 16 * (consumer.value & self.ring.mask), 16)
            address, length, _ = struct.unpack("=QII", entry)
            frames.append(self.nicq.read(address, length))
            consumer.value += 1
        return frames


class FakePacketPort(FakeObject):
    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd


@dataclass
class FakeDatapath:
    """Has what ctl/xdp/nic.py calls. `fail_at`: the n-th object that is made raises instead."""

    fail_at: int | None = None
    made: list[FakeObject] = field(default_factory=list)

    def _make(self, thing: FakeObject) -> FakeObject:
        if self.fail_at is not None and len(self.made) + 1 >= self.fail_at:
            raise RuntimeError("asked to fail")
        self.made.append(thing)
        return thing

    def nicq(self, conf: NicqConf) -> FakeObject:
        return self._make(FakeNicq(conf))

    def xsk(self, nicq: FakeNicq, ring: Ring, fd: int) -> FakeObject:
        return self._make(FakeXsk(nicq, ring, fd))

    def packet_port(self, fd: int) -> FakeObject:
        return self._make(FakePacketPort(fd))
