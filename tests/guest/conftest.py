# SPDX-License-Identifier: Apache-2.0
"""Labs for tests with real guests; see support/lab.py for the scene."""

from collections.abc import Iterator

import pytest

from support.lab import Lab, spec
from support.qemu import NoRelease, Release
from support.qemu import release as qemu_release

RELEASES = [
    "installed",
    pytest.param("newer", marks=pytest.mark.may_skip("only the installed QEMU is promised; setup says why not")),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The daemon with two Linux guests, booted once for a module."""
    with Lab() as made:
        made.up([spec(1), spec(2)])
        made.boot(1, 2)
        yield made


@pytest.fixture
def quiet_lab() -> Iterator[Lab]:
    """Namespaces that send nothing by themselves, for exact counts; the test starts the daemon."""
    with Lab(quiet=True) as made:
        yield made


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> Release:
    """Every QEMU that is here."""
    try:
        return qemu_release(request.param)
    except NoRelease as reason:
        pytest.skip(str(reason))
