# SPDX-License-Identifier: Apache-2.0
"""A device's virtqueues: what the front-end has said of each, and which of them the data plane has.

Theory of operation
===================
A ring has facts that the front-end sets one by one, in any order: size, address, base, kick, call, enabled, started.
The data plane has a `Vring` for it exactly while it is *runnable*:

    started, address and size known, features and guest memory known, log known if there is to be one, and not parked

started   since a kick descriptor (or "no descriptor: poll") was set, until GET_VRING_BASE, RESET_DEVICE or status 0.
          The specification says "upon the first kick", but a front-end that outlived our predecessor kicked long ago
          and will not again; a ring without buffers costs nothing.
enabled   is independent of it: QEMU enables before everything. A started, disabled ring is in the data plane too, which
          discards what the guest sends. Without VHOST_USER_F_PROTOCOL_FEATURES rings are enabled from the start.
parked    User-Mode Linux never sends GET_VRING_BASE: it disables a ring, waits for an answer to GET_FEATURES, and frees
          the ring's memory. It is known by its call descriptors, which are sockets. Its disabled rings leave the data
          plane like stopped ones, and come back at ENABLE with the base they had.

log       With VHOST_F_LOG_ALL every write to guest memory must have its bit in the dirty log. QEMU restarts rings with
          the feature before it sends the log, so until there is a log that reaches the end of memory, no ring runs.

A running ring changes in one of two ways, and whoever changes a descriptor or the memory closes the old one afterwards,
when nothing uses it any more.

renew     The ring stays the same to the guest (memory table, log, features, kick descriptor): the new Vring is built
          beside the old one, follows it, and one publication replaces it. No frame is lost, none is seen twice.
detach,   The ring becomes another (size, addresses, base, layout), or its in-flight region would be written by two:
attach    it leaves the data plane, its base is noted, the facts change, it is built and published again. What
          arrives for it meanwhile is dropped.

A new Vring sends its guest one interrupt, because the last one may have died with our predecessor.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Iterable, Iterator

from ..errors import DatapathError
from .errors import ProtocolError, Violation
from .fds import Fd, close_fd
from .port import DevicePort, Memory, Vring
from .shared import DirtyLog, InflightRegion
from .wire import F_LOG_ALL, VIRTIO_F_RING_PACKED, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_RSS, VringAddr

log = logging.getLogger(__name__)

PACKED_START = 0x80008000  # both indices 0, both wrap counters 1 (virtio 1.2, 2.8.1)
PACKED_DRIVER_ALIGN = 4  # virtio 1.2, 2.8.10.1


class Ring:
    """The facts about one virtqueue that the front-end has set so far. Owns its descriptors and its Vring."""

    __slots__ = ("addr", "base", "call", "call_is_socket", "enabled", "err", "index", "kick", "num", "started", "vring")

    def __init__(self, index: int) -> None:
        self.index = index
        self.num = 0
        self.base: int | None = None  # as SET_VRING_BASE and GET_VRING_BASE have it; None: the beginning
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
        self.negotiated = False  # by SET_FEATURES: before it, nobody knows how the rings are laid out
        self.memory: Memory | None = None
        self.memory_end = 0  # the guest physical address behind all of it
        self.log: DirtyLog | None = None
        self.inflight: InflightRegion | None = None

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
        return 2 * self._port.max_pairs if self.features & (VIRTIO_NET_F_MQ | VIRTIO_NET_F_RSS) else 2

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

    @property
    def packed(self) -> bool:
        return bool(self.features & VIRTIO_F_RING_PACKED)

    @property
    def logging(self) -> bool:
        return bool(self.features & F_LOG_ALL)

    def base(self, ring: Ring) -> int:
        """Where the ring is to begin, encoded for its kind.

        Front-ends that don't know better give 16 bits for both places of a packed ring. The two are equal where nothing
        is under way, as in a stopped ring. User-Mode Linux gives 0 for the beginning, whatever the ring is.
        """
        if not self.packed:
            return ring.base or 0
        if ring.base is None or (ring.base == 0 and ring.call_is_socket):
            return PACKED_START
        return ring.base if ring.base >> 16 else ring.base | ring.base << 16

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

    def attach(self) -> None:
        """Puts every runnable ring that is not there into the data plane."""
        self._replace([])

    def renew(self, rings: Iterable[Ring], memory_incomplete: bool = False) -> None:
        """Builds those of `rings` that run anew, and every other runnable one, in one publication.

        `memory_incomplete`: the front-end is changing memory region by region, so a ring may lie outside for a while.
        Otherwise that is a ProtocolError. On an error everything is as before, but with an in-flight region the rings
        have left the data plane.
        """
        if self.inflight is None:
            self._replace([ring for ring in rings if ring.vring is not None], memory_incomplete)
        else:
            self.detach(rings)
            self._replace([], memory_incomplete)

    def _replace(self, running: Collection[Ring], memory_incomplete: bool = False) -> None:
        before = {ring: ring.vring for ring in running}
        after: dict[Ring, Vring | None] = dict.fromkeys(running)
        try:
            for ring in self._rings:
                if (ring.vring is None or ring in before) and self._can_run(ring):
                    after[ring] = self._build(ring, memory_incomplete)
            for ring, old in before.items():
                if (new := after[ring]) is not None and old is not None:
                    new.follow(old)
            if not any(after.values()) and not before:
                return
            for ring, new in after.items():
                ring.vring = new
            self.publish()
        except BaseException:
            for ring, new in after.items():
                ring.vring = before.get(ring)
                if new is not None:
                    new.close()
            raise
        for ring, old in before.items():
            assert old is not None
            ring.base = old.base
            old.close()

    def _can_run(self, ring: Ring) -> bool:
        if self.memory is None or not self.negotiated or not ring.runnable:
            return False
        return not self.logging or (self.log is not None and self.log.covers(self.memory_end))

    def check_log(self, dirty: DirtyLog) -> None:
        """Raises ProtocolError when guest memory reaches beyond the log: with it the rings would stop, unnoticed."""
        if not dirty.covers(self.memory_end):
            raise ProtocolError(
                Violation.MEMORY,
                f"dirty log of {dirty.size:#x} bytes does not cover guest memory up to {self.memory_end:#x}",
            )

    def stop(self, rings: Iterable[Ring]) -> None:
        """Stops rings: they leave the data plane, and only a new kick descriptor starts them again."""
        stopping = list(rings)
        self.detach(stopping)
        for ring in stopping:
            ring.started = False
            kick, ring.kick = ring.kick, None
            close_fd(kick)

    def _build(self, ring: Ring, memory_incomplete: bool) -> Vring | None:
        assert self.memory is not None
        assert ring.addr is not None
        base = self.base(ring)
        self._check_layout(ring, ring.addr, base)
        part = None
        if self.inflight is not None and ring.index < self.inflight.queues:
            part = self.inflight.part(ring.index, ring.num, self.packed)
        try:
            return self._port.vring(
                self.memory,
                desc=ring.addr.desc,
                avail=ring.addr.avail,
                used=ring.addr.used,
                features=self.features,
                num=ring.num,
                base=base,
                kick_fd=ring.kick.number if ring.kick else -1,
                call_fd=ring.call.number if ring.call else -1,
                enabled=ring.enabled,
                log=self.log.native if self.log and self.logging else None,
                inflight=None if part is None or self.inflight is None else self.inflight.native,
                inflight_offset=part or 0,
                log_used=self.logging and bool(ring.addr.flags & VringAddr.F_LOG),
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

    def _check_layout(self, ring: Ring, addr: VringAddr, base: int) -> None:
        """Checks what depends on the ring's kind: features, size and base may be set in any order."""
        if self.packed:
            if addr.avail % PACKED_DRIVER_ALIGN:
                raise ProtocolError(
                    Violation.VALUE,
                    f"packed ring {ring.index}: driver area at {addr.avail:#x} is not aligned to "
                    f"{PACKED_DRIVER_ALIGN} bytes (virtio 1.2, 2.8.10.1)",
                )
            return
        if ring.num & (ring.num - 1):
            raise ProtocolError(
                Violation.VALUE, f"split ring {ring.index} of {ring.num} entries; a power of two is needed"
            )
        if base > 0xFFFF:
            raise ProtocolError(Violation.VALUE, f"split ring {ring.index}: base {base:#x} is not an index of 16 bits")
