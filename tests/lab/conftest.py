# SPDX-License-Identifier: Apache-2.0
"""The lab's tests run inside its machines only: `scripts/lab test`. Elsewhere there is nothing of them to collect.

`@pytest.mark.machine("bare")` on a test, its class or its module says on which kind of machine (support/machine.py) it
runs; without that, on the one that has everything.
"""

import os
from pathlib import Path

import pytest

HERE = os.environ.get("XDPVHOST_LAB", "")
collect_ignore_glob = [] if HERE else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "machine(kind): the kind of the lab's machine that this test is for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def elsewhere(item: pytest.Item) -> bool:
        if Path(__file__).parent not in item.path.parents:
            return False  # this hook sees every test of the session
        marker = item.get_closest_marker("machine")
        return (marker.args[0] if marker else "full") != HERE

    others = [item for item in items if elsewhere(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
