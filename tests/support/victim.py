# SPDX-License-Identifier: Apache-2.0
"""Programs to be killed: `python -m support.victim front-end SOCKET KIND` and `python -m support.victim back-end DIR`.

The front-end brings a device up and sends and receives until it dies. The back-end serves two guests, vm1 and vm2.
Each says "ready" when it is.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from .arena import FEATURES, MACS, numbered
from .frontend import F_PACKED, NetDevice
from .plane import Plane


def front_end(path: Path, kind: str) -> None:
    with NetDevice(path, features=FEATURES | (F_PACKED if kind == "packed" else 0), queue_size=64) as device:
        device.up()
        device.post(32)
        frames = [numbered(number, MACS[4], MACS[2]) for number in range(32)]
        print("ready", flush=True)
        while True:
            mark = device.memory.mark()
            for frame in frames:
                device.send(frame)
            device.received()
            while device.tx().chains:
                device.sent()
            device.memory.release(mark)


def back_end(directory: Path) -> None:
    with Plane(directory) as plane:
        plane.guest()
        plane.guest()
        print("ready", flush=True)
        signal.pause()


if __name__ == "__main__":
    if sys.argv[1] == "front-end":
        front_end(Path(sys.argv[2]), sys.argv[3])
    else:
        back_end(Path(sys.argv[2]))
