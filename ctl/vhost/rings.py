# SPDX-License-Identifier: Apache-2.0
"""A device's virtqueues: what the front-end has said of each, and which of them the data plane has.

Theory of operation
===================
A ring has facts that the front-end sets one by one, in any order: size, address, base, kick, call, enabled, started.
The data plane has a `Vring` for it exactly while it is *runnable*:

    started, address and size known, guest memory known, and not parked

started   since a kick descriptor (or "no descriptor: poll") was set, until GET_VRING_BASE, RESET_DEVICE or status 0.
          The specification says "upon the first kick", but a front-end that outlived our predecessor kicked long ago
          and will not again; a ring without buffers costs nothing.
enabled   is independent of it: QEMU enables before everything. A started, disabled ring is in the data plane too, which
          discards what the guest sends. Without VHOST_USER_F_PROTOCOL_FEATURES rings are enabled from the start.
parked    User-Mode Linux never sends GET_VRING_BASE: it disables a ring, waits for an answer to GET_FEATURES, and frees
          the ring's memory. It is known by its call descriptors, which are sockets. Its disabled rings leave the data
          plane like stopped ones, and come back at ENABLE with the base they had.

Every change of a running ring goes through the same three steps: `detach` publishes the rings without it, notes its
base and frees it; then the facts change; then `attach` builds every runnable ring that has no Vring, publishes, and
sends each new ring's guest one interrupt, because the last one may have died with our predecessor. Whoever changes a
descriptor or the memory closes the old one after `detach`, when nothing uses it any more.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Iterable, Iterator

from ..errors import DatapathError
from .errors import ProtocolError, Violation
from .fds import Fd, close_fd
from .port import DevicePort, Memory, Vring
from .wire import VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VringAddr

log = logging.getLogger(__name__)


class Ring:
    """The facts about one virtqueue that the front-end has set so far. Owns its descriptors and its Vring."""

    __slots__ = ("addr", "base", "call", "call_is_socket", "enabled", "err", "index", "kick", "num", "started", "vring")

    def __init__(self, index: int) -> None:
        self.index = index
        self.num = 0
        self.base = 0
        self.addr: VringAddr | None = None
        self.kick: Fd | None = None
        self.call: Fd | None = None
        self.err: Fd | None = None
        self.call_is_socket = False
        self.started = False
        self.enabled = False
        self.vring: Vring | None = None

    @property
    def parked(self) -> bool:
        return self.call_is_socket and not self.enabled

    @property
    def runnable(self) -> bool:
        return self.started and self.num > 0 and self.addr is not None and not self.parked

    def close(self) -> None:
        """Frees the Vring, which must have left the data plane, and closes the descriptors."""
        if self.vring is not None:
            self.vring.close()
            self.vring = None
        for fd in (self.kick, self.call, self.err):
            close_fd(fd)


class Rings:
    """All virtqueues of one device, with the features and the memory that they run with."""

    def __init__(self, port: DevicePort) -> None:
        self._port = port
        self._rings = [Ring(index) for index in range(2 * port.max_pairs + 1)]
        self.features = 0
        self.memory: Memory | None = None

    def __iter__(self) -> Iterator[Ring]:
        return iter(self._rings)

    def __getitem__(self, index: int) -> Ring:
        """Raises ProtocolError for a ring that this device cannot have."""
        if index >= len(self._rings):
            raise ProtocolError(
                Violation.VALUE, f"ring {index} does not exist, this device has {len(self._rings)} rings at most"
            )
        return self._rings[index]

    @property
    def _ctrl(self) -> int | None:
        """Which ring is the control virtqueue, should the front-end leave it to us (virtio 1.2, 5.1.2)."""
        if not self.features & VIRTIO_NET_F_CTRL_VQ:
            return None
        return 2 * self._port.max_pairs if self.features & VIRTIO_NET_F_MQ else 2

    def publish(self, without: Collection[Ring] = ()) -> None:
        """Shows the data plane the rings that it has, less those in `without`.

        The last ring has no queue pair: if it isn't the control virtqueue either, there is nothing to do in it.
        """
        ctrl = self._ctrl
        rings = {
            ring.index: ring.vring
            for ring in self._rings
            if ring.vring is not None
            and ring not in without
            and (ring.index < 2 * self._port.max_pairs or ring.index == ctrl)
        }
        self._port.apply(self.features, rings, ctrl if ctrl in rings else None)

    def detach(self, rings: Iterable[Ring]) -> None:
        """Takes rings out of the data plane; afterwards nothing touches them, and their base is known."""
        leaving = [ring for ring in rings if ring.vring is not None]
        if not leaving:
            return
        self.publish(without=leaving)
        for ring in leaving:
            assert ring.vring is not None
            ring.base = ring.vring.base
            ring.vring.close()
            ring.vring = None

    def attach(self, memory_incomplete: bool = False) -> None:
        """Puts every runnable ring that is not there into the data plane.

        `memory_incomplete`: the front-end is changing memory region by region, so a ring may lie outside for a while.
        Otherwise that is a ProtocolError.
        """
        if self.memory is None:
            return
        starting = [ring for ring in self._rings if ring.runnable and ring.vring is None]
        for ring in starting:
            ring.vring = self._build(ring, self.memory, memory_incomplete)
        if any(ring.vring is not None for ring in starting):
            self.publish()

    def stop(self, rings: Iterable[Ring]) -> None:
        """Stops rings: they leave the data plane, and only a new kick descriptor starts them again."""
        stopping = list(rings)
        self.detach(stopping)
        for ring in stopping:
            ring.started = False
            kick, ring.kick = ring.kick, None
            close_fd(kick)

    def _build(self, ring: Ring, memory: Memory, memory_incomplete: bool) -> Vring | None:
        assert ring.addr is not None
        try:
            return self._port.vring(
                memory,
                desc=ring.addr.desc,
                avail=ring.addr.avail,
                used=ring.addr.used,
                features=self.features,
                num=ring.num,
                base=ring.base,
                kick_fd=ring.kick.number if ring.kick else -1,
                call_fd=ring.call.number if ring.call else -1,
                enabled=ring.enabled,
            )
        except DatapathError as error:
            if error.errno == errno.EFAULT:
                if memory_incomplete:
                    log.info("guest %r: ring %d waits for the memory that holds it", self._port.name, ring.index)
                    return None
                raise ProtocolError(Violation.MEMORY, f"ring {ring.index} is not inside guest memory") from error
            if error.errno == errno.EINVAL:
                raise ProtocolError(Violation.VALUE, f"ring {ring.index} cannot be used: {error}") from error
            raise
