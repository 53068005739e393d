# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a front-end, and whether its session survives it.

Every error here is about one front-end. `ProtocolError` ends that front-end's session and nothing else;
`RequestRefused` answers no, and the session goes on.
"""

from __future__ import annotations

from enum import StrEnum

from ..errors import XdpvhostError


class Violation(StrEnum):
    """The class of a protocol error, for metrics and logs."""

    HEADER = "header"  # version, flags
    REQUEST = "request"  # unknown or not offered
    SIZE = "size"  # payload size
    FDS = "fds"  # number or kind of file descriptors
    VALUE = "value"  # a field out of its range
    MEMORY = "memory"  # memory table, or a ring outside it
    TRUNCATED = "truncated"  # the connection ended, or stalled, inside a message
    STALLED = "stalled"  # replies are not being read


class ProtocolError(XdpvhostError):
    """The front-end broke the protocol; its session ends, other guests don't notice."""

    def __init__(self, violation: Violation, message: str) -> None:
        super().__init__(message)
        self.violation = violation


class RequestRefused(XdpvhostError):
    """A well-formed request whose answer is no: a non-zero reply when one was asked for, and the session goes on.

    `answer`: the reply of a request that always has one.
    """

    def __init__(self, message: str, answer: bytes | None = None) -> None:
        super().__init__(message)
        self.answer = answer
