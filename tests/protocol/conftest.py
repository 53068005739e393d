# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from support.endpoint import FakePort, idle, serving
from support.frontend import F_IN_ORDER, F_MRG_RXBUF, F_PACKED, F_PROTOCOL, F_VERSION_1, FrontEnd, NetDevice
from xdpvhost.vhost.endpoint import Endpoint


class Bench:
    """A fake data plane with a running endpoint, and front-ends for it."""

    def __init__(self, port: FakePort, path: Path, endpoint: Endpoint) -> None:
        self.port = port
        self.path = path
        self.endpoint = endpoint

    def connect(self) -> FrontEnd:
        return FrontEnd.connect(self.path)

    def device(self, **options: object) -> NetDevice:
        return NetDevice(self.path, **options)  # type: ignore[arg-type]

    def idle(self) -> None:
        idle(self.endpoint)


def bench_for(port: FakePort, path: Path, timeout: float = 5.0) -> Iterator[Bench]:
    with serving(port, path, timeout=timeout) as (endpoint, _loop):
        yield Bench(port, path, endpoint)
    port.settled()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from bench_for(FakePort(), tmp_path / "vm1.sock")


@pytest.fixture
def bench4(tmp_path: Path) -> Iterator[Bench]:
    """Four queue pairs."""
    yield from bench_for(FakePort(max_pairs=4), tmp_path / "vm1.sock")


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Bench]:
    """A back-end that waits only 0.2 s for the rest of a message or for its replies to be read."""
    yield from bench_for(FakePort(), tmp_path / "vm1.sock", timeout=0.2)


class MakeDevice(Protocol):
    """Makes a device whose queues are of the kind that the test runs with."""

    def __call__(self, path: Path, features: int = ..., **options: Any) -> NetDevice: ...


KINDS = {"split": 0, "packed": F_PACKED | F_VERSION_1, "packed, in order": F_PACKED | F_VERSION_1 | F_IN_ORDER}


@pytest.fixture(params=KINDS)
def net(request: pytest.FixtureRequest) -> MakeDevice:
    kind = KINDS[request.param]

    def make(path: Path, features: int = F_VERSION_1 | F_MRG_RXBUF | F_PROTOCOL, **options: Any) -> NetDevice:
        return NetDevice(path, features=features | kind, **options)

    return make
