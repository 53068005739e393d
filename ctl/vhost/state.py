# SPDX-License-Identifier: Apache-2.0
"""The device's state as it travels with a migrating guest (vhost-user.rst, "Migrating back-end state").

What is not in guest memory and not in the rings' indices: what the guest has set through the control virtqueue, if
xdpvhost serves that. The front-end carries it as bytes that mean nothing to it, from one xdpvhost to another.

The specification lets the back-end bring the channel, and a sealed file of ours is a better one than a front-end's
pipe: nothing here ever waits for the other side, and the file has its size from the start. To save, the state is in it
before the front-end reads. To load, the front-end writes at most `MOST` bytes, and CHECK_DEVICE_STATE, which it sends
when it is done, reads them, once.
"""

from __future__ import annotations

import os
import struct

from .errors import RequestRefused
from .fds import Fd
from .port import DevicePort
from .shared import SealedFile
from .wire import DeviceState

MAGIC = b"XVST"
VERSION = 1
HEADER = struct.Struct("<4sII")  # magic, version, bytes that follow
MOST = 1 << 16


def wrap(state: bytes) -> bytes:
    return HEADER.pack(MAGIC, VERSION, len(state)) + state


def unwrap(data: bytes) -> bytes | None:
    """The state in `data`, which may have zeros behind it; None for no state at all. Raises RequestRefused."""
    if not any(data):
        return None
    if len(data) < HEADER.size:
        raise RequestRefused(f"a device state of {len(data)} bytes is too short to be one of xdpvhost's")
    magic, version, size = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise RequestRefused("the device state is not one of xdpvhost's")
    if version != VERSION:
        raise RequestRefused(f"the device state has version {version}, this xdpvhost knows {VERSION} only")
    end = HEADER.size + size
    if end > len(data) or any(data[end:]):
        raise RequestRefused(f"the device state says that it has {size} bytes, which is not so")
    return data[HEADER.size : end]


class Transfer:
    """One state on its way, in a file. `close` is harmless twice."""

    def __init__(self, port: DevicePort, direction: int) -> None:
        """Raises OSError."""
        self._port = port
        self._loads = direction == DeviceState.LOAD
        if self._loads:
            self._file = SealedFile("xdpvhost-load", MOST)
        else:
            state = wrap(port.save_state())
            self._file = SealedFile("xdpvhost-save", len(state)).write(state)

    def front_end(self) -> Fd:
        """The descriptor for the front-end, which the caller owns. Its place in the file is the beginning."""
        return Fd(os.dup(self._file.fd.number))

    def finish(self) -> None:
        """The front-end says that it has read, or written, everything. Raises RequestRefused for a bad state."""
        if self._loads and (state := unwrap(self._file.read())) is not None:
            self._port.load_state(state)

    def close(self) -> None:
        self._file.close()
