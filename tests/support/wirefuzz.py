# SPDX-License-Identifier: Apache-2.0
"""Sequences of vhost-user messages, from a seed or from a file, that a back-end must live through.

Most messages of a sequence are right, so that it gets somewhere: memory, rings, a log, an in-flight region. Some have a
number changed at random, bytes cut off or added, or other descriptors than they should. A sequence is text: a line a
message, with request, flags, payload, and the kinds of its descriptors.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xdpvhost.vhost.wire import Request

if TYPE_CHECKING:
    from .arena import Arena

CORPUS = Path(__file__).resolve().parents[1] / "protocol" / "corpus"
SEEDS = int(os.environ.get("XDPVHOST_WIREFUZZ_SEEDS", "40"))
FILE = 1 << 20
PAGE = 4096
GPA, USER = 0x4000_0000, 0x7E00_0000_0000
NUM = 8
FEATURES = (1 << 30 | 1 << 32, 1 << 30 | 1 << 32 | 1 << 34, 1 << 32 | 1 << 15, 1 << 30 | 1 << 32 | 1 << 26, 0)
KINDS = ("memory", "log", "event", "socket", "pipe", "null")
EDGES = (0, 1, 2, 3, 7, 8, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 2**31, 2**32 - 1, 2**63, 2**64 - PAGE, 2**64 - 1)


@dataclass(frozen=True)
class Message:
    request: int
    flags: int
    payload: bytes
    fds: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.request} {self.flags:#x} {self.payload.hex() or '-'} {','.join(self.fds) or '-'}"


def load(text: str) -> list[Message]:
    """Lines of `str(Message)`; others begin with #."""
    messages = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            request, flags, payload, fds = line.split()
            body = b"" if payload == "-" else bytes.fromhex(payload)
            messages.append(Message(int(request), int(flags, 0), body, () if fds == "-" else tuple(fds.split(","))))
    return messages


# ---- what is right ----


def _regions(rng: random.Random) -> bytes:
    cut = PAGE * rng.randrange(1, 255)
    if rng.random() < 0.5:
        return struct.pack("=II4Q", 1, 0, GPA, FILE, USER, 0)
    return struct.pack("=II8Q", 2, 0, GPA, cut, USER, 0, GPA + cut, FILE - cut, USER + cut, cut)


def _ring(rng: random.Random) -> int:
    return rng.choice((0, 0, 1, 1, 2))


def _right(rng: random.Random) -> Message:
    table = _regions(rng)
    ring = _ring(rng)
    place = USER + 0x10000 * ring
    choices: Sequence[Callable[[], Message]] = (
        lambda: Message(Request.GET_FEATURES, 1, b""),
        lambda: Message(Request.SET_FEATURES, 1, struct.pack("=Q", rng.choice(FEATURES))),
        lambda: Message(Request.SET_PROTOCOL_FEATURES, 1, struct.pack("=Q", rng.choice((0x8, 0x9B43F & ~8, 0x9)))),
        lambda: Message(Request.SET_MEM_TABLE, 1, table, ("memory",) * (len(table) // 32)),
        lambda: Message(Request.ADD_MEM_REG, 1, bytes(8) + table[8:40], ("memory",)),
        lambda: Message(Request.REM_MEM_REG, 1, bytes(8) + table[8:40]),
        lambda: Message(Request.SET_LOG_BASE, 1, struct.pack("=QQ", FILE - PAGE, rng.choice((0, 8, PAGE))), ("log",)),
        lambda: Message(Request.SET_LOG_FD, 1, b"", ("event",)),
        lambda: Message(Request.SET_VRING_NUM, 1, struct.pack("=II", ring, rng.choice((NUM, NUM, NUM, 7, 256)))),
        lambda: Message(Request.SET_VRING_BASE, 1, struct.pack("=II", ring, rng.choice((0, 3, 0x8000, 0x80028002)))),
        lambda: Message(
            Request.SET_VRING_ADDR,
            1,
            struct.pack("=IIQQQQ", ring, rng.randrange(2), place, place + 0x2000, place + 0x1000, GPA + 0x2000),
        ),
        lambda: Message(Request.SET_VRING_KICK, 1, struct.pack("=Q", ring), ("event",)),
        lambda: Message(Request.SET_VRING_KICK, 1, struct.pack("=Q", ring | 0x100)),
        lambda: Message(Request.SET_VRING_CALL, 1, struct.pack("=Q", ring), (rng.choice(("event", "socket", "pipe")),)),
        lambda: Message(Request.SET_VRING_ENABLE, 1, struct.pack("=II", ring, rng.randrange(2))),
        lambda: Message(Request.GET_VRING_BASE, 1, struct.pack("=II", ring, 0)),
        lambda: Message(Request.GET_INFLIGHT_FD, 1, struct.pack("=QQHHI", 0, 0, 2, NUM, 0)),
        lambda: Message(Request.SET_INFLIGHT_FD, 1, struct.pack("=QQHHI", PAGE, 0, 2, NUM, 0), ("log",)),
        lambda: Message(Request.SET_STATUS, 1, struct.pack("=Q", rng.choice((0, 15)))),
        lambda: Message(Request.RESET_DEVICE, 1, b""),
        lambda: Message(Request.SET_DEVICE_STATE_FD, 1, struct.pack("=II", rng.randrange(2), 0), ("pipe",)),
        lambda: Message(Request.CHECK_DEVICE_STATE, 1, b""),
        lambda: Message(Request.GET_CONFIG, 1, struct.pack("=III", 0, 12, 0) + bytes(12)),
        lambda: Message(Request.NET_SET_MTU, 1, struct.pack("=Q", 1500)),
        lambda: Message(Request.SEND_RARP, 1, b"\x52\x54\0\0\0\3\0\0"),
    )
    return rng.choice(choices)()


# ---- what is not ----


def _mutated(rng: random.Random, message: Message) -> Message:
    request, flags, payload, fds = message.request, message.flags, bytearray(message.payload), message.fds
    match rng.randrange(6):
        case 0 if payload:
            word = rng.choice((4, 8))
            at = rng.randrange(0, max(1, len(payload) - word + 1), 4)
            value = rng.choice(EDGES) & ((1 << 8 * word) - 1)
            payload[at : at + word] = value.to_bytes(word, "little")[: len(payload) - at]
        case 1 if payload:
            payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        case 2:
            payload = payload[: rng.randrange(len(payload) + 1)]
        case 3:
            payload += rng.randbytes(rng.randrange(1, 40))
        case 4:
            fds = tuple(
                rng.choice(("memory", "log", "event", "socket", "pipe", "null")) for _ in range(rng.randrange(4))
            )
        case _:
            request = rng.randrange(50)
    return Message(request, flags, bytes(payload), fds)


def sequence(rng: random.Random) -> list[Message]:
    """A front-end's life: set up as it should be, for the most part, then anything."""
    begin = [
        Message(Request.SET_FEATURES, 1, struct.pack("=Q", rng.choice(FEATURES))),
        Message(Request.SET_MEM_TABLE, 1, table := _regions(rng), ("memory",) * (len(table) // 32)),
    ]
    for ring in (0, 1):
        place = USER + 0x10000 * ring
        begin += [
            Message(Request.SET_VRING_NUM, 1, struct.pack("=II", ring, NUM)),
            Message(
                Request.SET_VRING_ADDR,
                1,
                struct.pack("=IIQQQQ", ring, 0, place, place + 0x2000, place + 0x1000, 0),
            ),
            Message(Request.SET_VRING_KICK, 1, struct.pack("=Q", ring), ("event",)),
            Message(Request.SET_VRING_ENABLE, 1, struct.pack("=II", ring, 1)),
        ]
    if rng.random() < 0.5:
        rng.shuffle(begin)
    messages = begin + [_right(rng) for _ in range(rng.randrange(40))]
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(messages))
        messages[at] = _mutated(rng, messages[at])
    return messages


# ---- playing it ----


class Descriptors:
    """One of each kind; memory is random, so that rings are full of nonsense, too."""

    def __init__(self, rng: random.Random) -> None:
        self._memory = os.memfd_create("fuzz-memory")
        os.ftruncate(self._memory, FILE)
        if rng.random() < 0.5:
            for ring in (0, 1):
                os.pwrite(self._memory, rng.randbytes(0x3000), 0x10000 * ring)
        self._log = os.memfd_create("fuzz-log")
        os.ftruncate(self._log, FILE)
        self._event = os.eventfd(1, os.EFD_NONBLOCK)
        self._pipe = os.pipe2(os.O_NONBLOCK)
        self._null = os.open(os.devnull, os.O_RDWR)
        self._sockets = socket.socketpair()

    def __getitem__(self, kind: str) -> int:
        return {
            "memory": self._memory,
            "log": self._log,
            "event": self._event,
            "pipe": self._pipe[1],
            "null": self._null,
            "socket": self._sockets[0].fileno(),
        }[kind]

    def close(self) -> None:
        for fd in (self._memory, self._log, self._event, *self._pipe, self._null):
            os.close(fd)
        for sock in self._sockets:
            sock.close()


def play(arena: Arena, messages: Sequence[Message]) -> None:
    """Sends them all, reads whatever is answered, and sees that nothing is left of it."""
    descriptors = Descriptors(random.Random(len(messages)))
    try:
        with arena.nothing_left(), arena.connect() as front:
            front.sock.settimeout(10)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for message in messages:
                    fds = [descriptors[kind] for kind in message.fds]
                    front.send(message.request, message.payload, fds, message.flags)
                front.send(Request.GET_QUEUE_NUM)
            front.sock.shutdown(1)
            assert front.disconnected(10), "the back-end neither answers nor closes"
    except AssertionError as error:
        raise AssertionError("\n".join([str(error), *map(str, messages)])) from error
    finally:
        descriptors.close()
