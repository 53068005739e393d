# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor by QEMU's own client library (PyPI's qemu.qmp), for tests that are not asynchronous.

The library runs on an asyncio loop of the connection's own, which turns only while a call here waits; events that come
in between are kept in the socket, and found by the next wait_event().
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from qemu.qmp import EventListener, QMPClient, QMPError

T = TypeVar("T")

TIMEOUT = 20.0


class Qmp:
    """A connection to the monitor at `path`. A refused command is an AssertionError with QEMU's message."""

    def __init__(self, path: Path, name: str) -> None:
        self._name = name
        self._runner = asyncio.Runner()
        self._client = QMPClient(name)
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        try:
            self._run(self._client.connect(str(path)), "to be greeted")
        except BaseException:
            self._runner.close()
            raise

    def _run(self, work: Coroutine[Any, Any, T], what: str, timeout: float = TIMEOUT) -> T:
        try:
            return self._runner.run(asyncio.wait_for(work, timeout))
        except TimeoutError:
            raise AssertionError(f"{self._name}: waited {timeout:g} s {what}") from None
        except QMPError as error:
            raise AssertionError(f"{self._name}: {what}: {error}") from None

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Keys are QMP's own, with hyphens."""
        return self._run(self._client.execute(command, dict(arguments or {})), f"for {command} {arguments or ''}")

    def wait_event(self, name: str, timeout: float = TIMEOUT, **data: object) -> dict[str, Any]:
        """The data of the next event of that name that has those values; what comes before it is forgotten."""

        async def find() -> dict[str, Any]:
            while True:
                event = await self._listener.get()
                seen = cast(dict[str, Any], event.get("data", {}))
                if event["event"] == name and data.items() <= seen.items():
                    return seen

        return self._run(find(), f"for the event {name} {data or ''}", timeout)

    def close(self) -> None:
        with contextlib.suppress(AssertionError, EOFError, OSError):  # QEMU may be gone
            self._run(self._client.disconnect(), "to say goodbye")
        self._runner.close()
