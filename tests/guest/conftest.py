# SPDX-License-Identifier: Apache-2.0
"""Labs for tests with real guests; see support/lab.py for the scene."""

from collections.abc import Iterator

import pytest

from support.lab import Lab, spec


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
