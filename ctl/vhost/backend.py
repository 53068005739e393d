# SPDX-License-Identifier: Apache-2.0
"""The vhost-user back-end's state machine for one virtio-net device and one front-end session.

Theory of operation
===================
A session is: messages in, state changed, the data plane told, reply out; one message at a time. `TABLE` maps every
request that is served to one small handler, with its payload, its descriptors and the protocol feature that gates it.
A request that is not in the table is in offered.py with the reason, and docs/vhost-user.md is generated from both.

Rings, their states and how they enter and leave the data plane are in rings.py; a handler here says what changes, then
`Rings.renew`, or between `Rings.detach` and `Rings.attach`. Guest memory is in guestmem.py.

Who owns what: the session owns the mappings, the `Memory`, log, in-flight region, the `Vring`s and every descriptor it
was sent, and `close` gives all of it back: the rings leave the data plane first, then they, the memory and its mappings
go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from ..errors import DatapathError
from .connection import Connection, Message
from .errors import ProtocolError, RequestRefused, Violation
from .fds import Fd, FdBag, check_channel, close_fd, notification_fd
from .guestmem import GuestMemory
from .offered import ERROR, OFFERED, OK, OTHER, REFUSED
from .port import DevicePort
from .rings import Rings
from .shared import DirtyLog, InflightRegion, SealedFile, check_inflight
from .state import Transfer
from .wire import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    MAX_CONFIG,
    MAX_MEM_SLOTS,
    MAX_RING_SIZE,
    U64,
    VIRTIO_F_RING_PACKED,
    VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_RSS,
    BackendRequest,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Log,
    MemTable,
    Payload,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
    message,
    net_config,
    reply,
    request_name,
)

log = logging.getLogger(__name__)

MIN_MTU = 68
ACK_OK = U64(0).pack()
ACK_FAILED = U64(1).pack()
TRANSFER_FAILED = 1
TRANSFER_NO_FD = 0x100


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply's payload, and a descriptor that goes with it. Who sends it closes `fd`."""

    payload: bytes
    fd: Fd | None = None


class VhostUserDevice:
    """One front-end's session with one device; `serve` runs it to its end."""

    def __init__(self, port: DevicePort, connection: Connection) -> None:
        self._port = port
        self._connection = connection
        self._protocol_features = ProtocolFeature(0)
        self._status = 0
        self._mtu_set: int | None = None  # by NET_SET_MTU
        self._rings = Rings(port)
        self._memory = GuestMemory(port, self._rings)
        self._backend_channel: Fd | None = None
        self._transfer: Transfer | None = None
        self._closed = False

    async def serve(self) -> None:
        """Answers messages until the front-end leaves. Raises ProtocolError, ConnectionError; always ends closed."""
        try:
            while (received := await self._connection.receive()) is not None:
                try:
                    answer = self._dispatch(received)
                except ProtocolError:
                    if self._wants_ack(received):
                        with contextlib.suppress(ProtocolError, ConnectionError):
                            await self._connection.send(reply(received.header.request, ACK_FAILED))
                    raise
                finally:
                    received.fds.close()
                if answer is not None:
                    try:
                        await self._connection.send(reply(received.header.request, answer.payload), answer.fd)
                    finally:
                        close_fd(answer.fd)
                await asyncio.sleep(0)
        finally:
            self.close()

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self._port.apply(0, {}, None)
        except DatapathError:
            log.critical("guest %r: the data plane keeps its rings, so its memory stays mapped", self._port.name)
            raise
        for ring in self._rings:
            ring.close()
        self._memory.close()
        for area in (self._rings.log, self._rings.inflight, self._transfer):
            if area is not None:
                area.close()
        close_fd(self._backend_channel)

    def config_changed(self) -> None:
        """Tells the front-end to read the configuration space again, if it reads ours and gave a channel for that."""
        if self._backend_channel is not None and ProtocolFeature.CONFIG in self._protocol_features:
            send_notice(self._backend_channel, message(BackendRequest.CONFIG_CHANGE_MSG))

    @property
    def summary(self) -> Mapping[str, int]:
        """Facts for `xdpvhost status`."""
        return {
            "features": self._rings.features,
            "protocol_features": int(self._protocol_features),
            "status": self._status,
            "regions": len(self._memory),
            "rings_started": sum(ring.started for ring in self._rings),
            "rings_running": sum(ring.vring is not None for ring in self._rings),
            "rings_enabled": sum(ring.enabled for ring in self._rings),
        }

    # ---- one message ----

    def _wants_ack(self, received: Message) -> bool:
        """REPLY_ACK counts from the message on that negotiates it: User-Mode Linux waits for that one's answer."""
        entry = TABLE.get(received.header.request)
        own_reply = entry is not None and entry.replies
        return received.header.need_reply and not own_reply and ProtocolFeature.REPLY_ACK in self._protocol_features

    def _dispatch(self, received: Message) -> Answer | None:
        """Checks and serves one message, and counts it; the reply, or None. Raises ProtocolError."""
        number = received.header.request
        name = Request(number).name if number in TABLE else OTHER
        try:
            served = self._serve(received)
        except RequestRefused as refused:
            self._port.message(name, REFUSED)
            log.warning("guest %r: %s: %s", self._port.name, request_name(number), refused)
            answer = refused.answer or (ACK_FAILED if self._wants_ack(received) else None)
            return Answer(answer) if answer else None
        except ProtocolError as error:
            self._port.message(name, ERROR)
            raise ProtocolError(error.violation, f"{request_name(number)}: {error}") from error
        except Exception:
            self._port.message(name, ERROR)
            raise
        self._port.message(name, OK)
        if served is None and self._wants_ack(received):
            return Answer(ACK_OK)
        return served

    def _serve(self, received: Message) -> Answer | None:
        number = received.header.request
        entry = TABLE.get(number)
        if entry is None:
            raise ProtocolError(Violation.REQUEST, "it is not a request that xdpvhost offers")
        payload = entry.payload.parse(received.payload)
        expected = payload.fds
        few, many = entry.fds if expected is None else (expected, expected)
        if not few <= len(received.fds) <= many:
            belong = f"{few}" if few == many else f"{few} to {many}"
            raise ProtocolError(Violation.FDS, f"{len(received.fds)} descriptors came with it, {belong} would be right")
        answer = entry.handler(self, payload, received.fds)
        return Answer(answer) if isinstance(answer, bytes) else answer

    # ---- handlers: session and features ----

    def _get_features(self, _payload: Empty, _fds: FdBag) -> bytes:
        return U64(self._port.device_features).pack()

    def _set_features(self, payload: U64, _fds: FdBag) -> None:
        if extra := payload.value & ~self._port.device_features:
            raise ProtocolError(Violation.VALUE, f"features {extra:#x} were not offered")
        if self._rings.negotiated and all(ring.vring is None for ring in self._rings):
            self._port.reset_state()  # another driver begins, which expects what a reset leaves
        if self._rings.negotiated and payload.value == self._rings.features:
            return
        if payload.value & F_LOG_ALL and not self._rings.logging and self._rings.log is not None:
            self._rings.check_log(self._rings.log)
        if (payload.value ^ self._rings.features) & VIRTIO_F_RING_PACKED:
            self._rings.detach(self._rings)
            if self._rings.negotiated:  # places in a ring of the other kind mean nothing; before, they are of this kind
                for ring in self._rings:
                    ring.base = None
        self._rings.features, self._rings.negotiated = payload.value, True
        if not payload.value & F_PROTOCOL_FEATURES:
            for ring in self._rings:
                ring.enabled = True
        self._rings.renew(self._rings)

    def _get_protocol_features(self, _payload: Empty, _fds: FdBag) -> bytes:
        return U64(OFFERED).pack()

    def _set_protocol_features(self, payload: U64, _fds: FdBag) -> None:
        if extra := payload.value & ~OFFERED:
            raise ProtocolError(Violation.VALUE, f"protocol features {extra:#x} were not offered")
        self._protocol_features = ProtocolFeature(payload.value)

    def _nothing(self, _payload: Empty, _fds: FdBag) -> None:
        return None

    def _get_queue_num(self, _payload: Empty, _fds: FdBag) -> bytes:
        return U64(self._port.max_pairs).pack()

    def _set_backend_req_fd(self, _payload: Empty, fds: FdBag) -> None:
        channel = notification_fd(fds, "the back-end channel")
        if channel.kind != "socket":
            channel.close()
            raise ProtocolError(Violation.FDS, "the back-end channel is not a socket")
        old, self._backend_channel = self._backend_channel, channel
        close_fd(old)

    def _get_status(self, _payload: Empty, _fds: FdBag) -> bytes:
        return U64(self._status).pack()

    def _set_status(self, payload: U64, _fds: FdBag) -> None:
        if payload.value > 0xFF:
            raise ProtocolError(Violation.VALUE, f"device status {payload.value:#x} is not an 8-bit value")
        self._status = payload.value
        if self._status == 0:
            self._rings.stop(self._rings)
            self._port.reset_state()

    def _reset_device(self, _payload: Empty, _fds: FdBag) -> None:
        """Memory, log and call descriptors stay: QEMU sends only memory changes, and its call descriptors just once."""
        self._rings.stop(self._rings)
        for ring in self._rings:
            ring.num, ring.base, ring.addr, ring.enabled = 0, None, None, False
        if self._rings.inflight is not None:
            self._rings.inflight.close()
            self._rings.inflight = None
        self._drop_transfer()
        self._rings.features, self._rings.negotiated, self._status = 0, False, 0
        self._mtu_set = None
        self._port.reset_state()

    # ---- handlers: memory ----

    def _set_mem_table(self, payload: MemTable, fds: FdBag) -> None:
        self._memory.set_table(payload.regions, fds.take_all())

    def _get_max_mem_slots(self, _payload: Empty, _fds: FdBag) -> bytes:
        return U64(MAX_MEM_SLOTS).pack()

    def _add_mem_reg(self, payload: SingleRegion, fds: FdBag) -> None:
        self._memory.add(payload.region, fds.take())

    def _rem_mem_reg(self, payload: SingleRegion, _fds: FdBag) -> None:
        self._memory.remove(payload.region)

    # ---- handlers: rings ----

    def _set_vring_num(self, payload: VringState, _fds: FdBag) -> None:
        ring, num = self._rings[payload.index], payload.num
        if not 0 < num <= MAX_RING_SIZE:
            raise ProtocolError(
                Violation.VALUE, f"ring {ring.index} of {num} entries; 1 to {MAX_RING_SIZE} are possible"
            )
        if num != ring.num:
            self._rings.detach([ring])
            ring.num = num
            self._rings.attach()

    def _set_vring_addr(self, payload: VringAddr, _fds: FdBag) -> None:
        ring = self._rings[payload.index]
        if payload == ring.addr:
            return
        if payload.same_ring(ring.addr):
            ring.addr = payload
            if self._rings.logging:
                self._rings.renew([ring])
        else:
            self._rings.detach([ring])
            ring.addr = payload
            self._rings.attach()

    def _set_vring_base(self, payload: VringState, _fds: FdBag) -> None:
        ring = self._rings[payload.index]
        self._rings.detach([ring])
        ring.base = payload.num
        self._rings.attach()

    def _get_vring_base(self, payload: VringState, _fds: FdBag) -> bytes:
        ring = self._rings[payload.index]
        self._rings.stop([ring])
        return VringState(ring.index, self._rings.base(ring)).pack()

    def _set_vring_enable(self, payload: VringState, _fds: FdBag) -> None:
        ring = self._rings[payload.index]
        if payload.num > 1:
            raise ProtocolError(Violation.VALUE, f"ring {ring.index}: enable is 0 or 1, not {payload.num}")
        if ring.enabled == bool(payload.num):
            return
        ring.enabled = bool(payload.num)
        if ring.parked:
            self._rings.detach([ring])
        elif ring.vring is None:
            self._rings.attach()
        else:
            ring.vring.set_enabled(ring.enabled)
            if ring.enabled:
                self._rings.publish()
            else:
                self._port.quiesce()

    def _set_vring_kick(self, payload: VringFile, fds: FdBag) -> None:
        ring = self._rings[payload.index]
        kick = notification_fd(fds, f"the kick of ring {ring.index}") if payload.has_fd else None
        old, ring.kick, ring.started = ring.kick, kick, True
        try:
            self._rings.renew([ring])
        except BaseException:
            if ring.vring is not None:  # it is in the data plane with its old descriptor
                old, ring.kick = ring.kick, old
            close_fd(old)
            raise
        close_fd(old)

    def _set_vring_call(self, payload: VringFile, fds: FdBag) -> None:
        ring = self._rings[payload.index]
        call = notification_fd(fds, f"the call of ring {ring.index}") if payload.has_fd else None
        old, ring.call = ring.call, call
        ring.call_is_socket = call is not None and call.kind == "socket"
        if ring.parked:
            try:
                self._rings.detach([ring])
            except BaseException:
                old, ring.call = ring.call, old  # it is in the data plane with its old descriptor
                close_fd(old)
                raise
        elif ring.vring is not None:
            ring.vring.set_call(call.number if call else -1)
            self._port.quiesce()
        close_fd(old)
        self._rings.attach()

    def _set_vring_err(self, payload: VringFile, fds: FdBag) -> None:
        ring = self._rings[payload.index]
        err = notification_fd(fds, f"the error notifier of ring {ring.index}") if payload.has_fd else None
        old, ring.err = ring.err, err
        close_fd(old)

    # ---- handlers: migration and recovery ----

    def _set_log_base(self, payload: Log, fds: FdBag) -> bytes:
        """The reply has no payload: QEMU takes any, DPDK sends none, and both front-ends know this one."""
        fd = fds.take()
        try:
            new = DirtyLog(self._port, payload, fd)
        finally:
            fd.close()
        rings, old = self._rings, self._rings.log
        try:
            if rings.logging:
                rings.check_log(new)
            rings.log = new
            rings.renew(rings if rings.logging else ())
        except BaseException:
            rings.log = old
            new.close()
            raise
        if old is not None:
            old.close()
        return b""

    def _set_log_fd(self, _payload: Empty, fds: FdBag) -> None:
        notification_fd(fds, "the log's notifier").close()

    def _get_inflight_fd(self, payload: Inflight, _fds: FdBag) -> Answer:
        check_inflight(self._port, payload)
        size = payload.queues * self._port.inflight_size(payload.queue_size, self._rings.packed)
        try:
            file = SealedFile("xdpvhost-inflight", size)
        except OSError as error:
            nothing = replace(payload, size=0, offset=0).pack()
            raise RequestRefused(f"cannot make an in-flight region: {error.strerror}", nothing) from error
        return Answer(replace(payload, size=size, offset=0).pack(), file.fd)

    def _set_inflight_fd(self, payload: Inflight, fds: FdBag) -> None:
        fd = fds.take()
        try:
            new = InflightRegion(self._port, payload, fd)
        finally:
            fd.close()
        try:
            self._rings.detach(self._rings)
        except DatapathError:
            new.close()
            raise
        old, self._rings.inflight = self._rings.inflight, new
        if old is not None:
            old.close()
        self._rings.attach()

    def _set_device_state_fd(self, payload: DeviceState, fds: FdBag) -> Answer:
        """The channel is always ours; the front-end's is closed with its message."""
        check_channel(fds, "the channel of the device's state")
        self._drop_transfer()
        failed = U64(TRANSFER_FAILED | TRANSFER_NO_FD).pack()
        if payload.phase != DeviceState.STOPPED:
            raise RequestRefused(f"migration phase {payload.phase} is not known", failed)
        if any(ring.vring is not None for ring in self._rings):
            raise RequestRefused("the device's rings are running", failed)
        try:
            self._transfer = Transfer(self._port, payload.direction)
            return Answer(U64(0).pack(), self._transfer.front_end())
        except OSError as error:
            self._drop_transfer()
            raise RequestRefused(f"cannot make a channel: {error.strerror}", failed) from error

    def _drop_transfer(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.close()

    def _check_device_state(self, _payload: Empty, _fds: FdBag) -> bytes:
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise RequestRefused("no device state was transferred", ACK_FAILED)
        try:
            transfer.finish()
        except (RequestRefused, OSError) as error:
            raise RequestRefused(f"device state: {error}", ACK_FAILED) from error
        finally:
            transfer.close()
        return ACK_OK

    # ---- handlers: virtio-net ----

    def _send_rarp(self, payload: U64, _fds: FdBag) -> None:
        mac = payload.pack()[:6]
        if mac[0] & 1 or not any(mac):
            raise RequestRefused(f"{mac.hex(':')} is not a station's address")
        self._port.announce(mac)

    def _net_set_mtu(self, payload: U64, _fds: FdBag) -> None:
        if not MIN_MTU <= payload.value <= self._port.mtu:
            raise RequestRefused(f"MTU {payload.value} is not between {MIN_MTU} and the uplink's {self._port.mtu}")
        self._mtu_set = payload.value

    @property
    def _mtu(self) -> int:
        """The uplink's may change under a session."""
        return self._port.mtu if self._mtu_set is None else min(self._mtu_set, self._port.mtu)

    def _get_config(self, payload: Config, _fds: FdBag) -> bytes:
        """As many bytes as were asked for, zeros behind the structure; no payload at all is the answer to nonsense."""
        size = len(payload.data)
        if payload.offset + size > MAX_CONFIG:
            return b""
        port = self._port
        rss = bool(port.device_features & (VIRTIO_NET_F_RSS | VIRTIO_NET_F_HASH_REPORT))
        space = net_config(port.mac, port.max_pairs, self._mtu, port.net_state, rss).ljust(MAX_CONFIG, b"\0")
        return Config(payload.offset, payload.flags, space[payload.offset : payload.offset + size]).pack()

    def _set_config(self, _payload: Config, _fds: FdBag) -> None:
        raise RequestRefused("a virtio-net device's configuration space is read-only")


def send_notice(channel: Fd, data: bytes) -> None:
    """Writes to the back-end channel without waiting; a front-end that lets it fill up misses the notice."""
    try:
        with socket.socket(fileno=os.dup(channel.number)) as sock:
            sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # O_NONBLOCK is the front-end's to clear
    except OSError as error:
        log.info("back-end channel: %s", error.strerror)


P = TypeVar("P", bound=Payload)
Handler = Callable[[VhostUserDevice, P, FdBag], Answer | bytes | None]


@dataclass(frozen=True, slots=True)
class Entry(Generic[P]):
    """How one request is served: payload class, (fewest, most) descriptors, handler, and the line for the docs."""

    payload: Any
    handler: Handler[P]
    does: str
    fds: tuple[int, int] = (0, 0)
    needs: ProtocolFeature | None = None
    replies: bool = False


_D = VhostUserDevice
_PF = ProtocolFeature

TABLE: Mapping[int, Entry[Any]] = {
    Request.GET_FEATURES: Entry(Empty, _D._get_features, "virtio features of the data plane, and bit 30", replies=True),
    Request.SET_FEATURES: Entry(
        U64,
        _D._set_features,
        "anything not offered ends the session, and so does LOG_ALL with a log that ends before guest memory does; "
        "running rings are rebuilt; without bit 30 all rings are enabled",
    ),
    Request.SET_OWNER: Entry(Empty, _D._nothing, "accepted: a connection is a session"),
    Request.RESET_OWNER: Entry(Empty, _D._nothing, "ignored, as the specification recommends; deprecated"),
    Request.SET_MEM_TABLE: Entry(
        MemTable,
        _D._set_mem_table,
        "1-8 regions, one file each; running rings move to the new table at the index they had",
        fds=(1, 8),
    ),
    Request.SET_LOG_BASE: Entry(
        Log,
        _D._set_log_base,
        "a bitmap in a memfd, tmpfs or hugetlbfs; one that ends before guest memory does is an error while logging; "
        "the reply has no payload",
        fds=(1, 1),
        needs=_PF.LOG_SHMFD,
        replies=True,
    ),
    Request.SET_LOG_FD: Entry(
        Empty,
        _D._set_log_fd,
        "closed: it is optional to signal it, and front-ends look at the log themselves",
        fds=(1, 1),
    ),
    Request.SET_VRING_NUM: Entry(
        VringState, _D._set_vring_num, "1 to 32768; a split ring cannot start if it is not a power of two"
    ),
    Request.SET_VRING_ADDR: Entry(
        VringAddr,
        _D._set_vring_addr,
        "front-end addresses, aligned; with VHOST_VRING_F_LOG writes to the ring itself are logged, too, at the guest "
        "physical address that memory says it has",
    ),
    Request.SET_VRING_BASE: Entry(
        VringState,
        _D._set_vring_base,
        "split: next available index, 16 bits; packed: both indices with their wrap counters, 32 bits, or 16 for both",
    ),
    Request.GET_VRING_BASE: Entry(
        VringState,
        _D._get_vring_base,
        "stops the ring; its base, encoded as in SET_VRING_BASE, also for a ring that was never set up",
        replies=True,
    ),
    Request.SET_VRING_KICK: Entry(
        VringFile, _D._set_vring_kick, "starts the ring; without a descriptor the ring is polled", fds=(0, 1)
    ),
    Request.SET_VRING_CALL: Entry(
        VringFile,
        _D._set_vring_call,
        "eventfd, pipe or one of a pair of unix stream sockets; replaced on a running ring it is signalled once",
        fds=(0, 1),
    ),
    Request.SET_VRING_ERR: Entry(
        VringFile,
        _D._set_vring_err,
        "kept, never signalled: the front-end may make it block, and the end of the session says as much",
        fds=(0, 1),
    ),
    Request.GET_PROTOCOL_FEATURES: Entry(
        Empty, _D._get_protocol_features, "the bits that gate rows of this table", replies=True
    ),
    Request.SET_PROTOCOL_FEATURES: Entry(
        U64, _D._set_protocol_features, "legal before SET_FEATURES; anything not offered ends the session"
    ),
    Request.GET_QUEUE_NUM: Entry(
        Empty, _D._get_queue_num, "queue pairs, which is what QEMU and DPDK compare with", needs=_PF.MQ, replies=True
    ),
    Request.SET_VRING_ENABLE: Entry(
        VringState, _D._set_vring_enable, "any time, for any ring, started or not; also without protocol features"
    ),
    Request.SEND_RARP: Entry(U64, _D._send_rarp, "a RARP for that address on the uplink", needs=_PF.RARP),
    Request.NET_SET_MTU: Entry(
        U64, _D._net_set_mtu, "68 up to the uplink's MTU; refused otherwise, the session goes on", needs=_PF.MTU
    ),
    Request.SET_BACKEND_REQ_FD: Entry(
        Empty,
        _D._set_backend_req_fd,
        "kept for CONFIG_CHANGE_MSG, which is never sent with need_reply",
        fds=(1, 1),
        needs=_PF.BACKEND_REQ,
    ),
    Request.GET_CONFIG: Entry(
        Config,
        _D._get_config,
        "struct virtio_net_config, zeros behind it up to 256 bytes; an empty reply beyond that",
        needs=_PF.CONFIG,
        replies=True,
    ),
    Request.SET_CONFIG: Entry(
        Config, _D._set_config, "refused: nothing in it is writable; the session goes on", needs=_PF.CONFIG
    ),
    Request.RESET_DEVICE: Entry(
        Empty,
        _D._reset_device,
        "rings stopped, disabled and forgotten, features and status zero; memory and call descriptors stay",
        needs=_PF.RESET_DEVICE,
    ),
    Request.GET_INFLIGHT_FD: Entry(
        Inflight,
        _D._get_inflight_fd,
        "a sealed memfd with a part for each ring, by the features set so far",
        needs=_PF.INFLIGHT_SHMFD,
        replies=True,
    ),
    Request.SET_INFLIGHT_FD: Entry(
        Inflight,
        _D._set_inflight_fd,
        "a memfd, or a file in tmpfs or hugetlbfs; a ring that its part has no room for is an error when it starts",
        fds=(1, 1),
        needs=_PF.INFLIGHT_SHMFD,
    ),
    Request.GET_MAX_MEM_SLOTS: Entry(
        Empty, _D._get_max_mem_slots, str(MAX_MEM_SLOTS), needs=_PF.CONFIGURE_MEM_SLOTS, replies=True
    ),
    Request.ADD_MEM_REG: Entry(
        SingleRegion,
        _D._add_mem_reg,
        "running rings move to the larger table at the index they had",
        fds=(1, 1),
        needs=_PF.CONFIGURE_MEM_SLOTS,
    ),
    Request.REM_MEM_REG: Entry(
        SingleRegion,
        _D._rem_mem_reg,
        "identified by address and size; a ring inside waits for its memory to come back; a stray descriptor is closed",
        fds=(0, 1),
        needs=_PF.CONFIGURE_MEM_SLOTS,
    ),
    Request.SET_STATUS: Entry(U64, _D._set_status, "kept; 0 stops all rings", needs=_PF.STATUS),
    Request.GET_STATUS: Entry(Empty, _D._get_status, "what SET_STATUS said last", needs=_PF.STATUS, replies=True),
    Request.SET_DEVICE_STATE_FD: Entry(
        DeviceState,
        _D._set_device_state_fd,
        "while no ring runs; the channel is a sealed memfd of ours, the front-end's pipe or unix socket is closed",
        fds=(1, 1),
        needs=_PF.DEVICE_STATE,
        replies=True,
    ),
    Request.CHECK_DEVICE_STATE: Entry(
        Empty,
        _D._check_device_state,
        "a state to load is read and taken over now; none at all is fine, one that is not ours is refused",
        needs=_PF.DEVICE_STATE,
        replies=True,
    ),
}
