# SPDX-License-Identifier: Apache-2.0
"""What every test gets: a world of its own, its logs in a failure's report, and no silent skips.

A skip has to be announced: `@pytest.mark.may_skip("why that is all right")` on the test, its class or its module.
Any other skip is a failure, so that a missing tool or kernel feature can't hide a test.
"""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.netns import World

MEASURED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []
    config.addinivalue_line("markers", "may_skip(reason): this test may be skipped, and the reason says why")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        marker = item.get_closest_marker("may_skip")
        if marker is None or not (marker.args and marker.args[0]):
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome = "failed"
            report.longrepr = f"unexpected skip ({why}): only a test marked may_skip(reason) may be skipped"
    if report.failed:
        for log in _logs(item):
            report.sections.append((log.name, "\n".join(log.read_text(errors="replace").splitlines()[-60:])))
    return report


def _logs(item: pytest.Item) -> list[Path]:
    """The logs of all processes that the test's world, or its lab's, has started."""
    made = getattr(item, "funcargs", {}).values()
    worlds = [w for w in (getattr(m, "world", m) for m in made) if isinstance(w, World)]
    return sorted(log for w in worlds for log in w.directory.glob("**/*.log"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report: Any = yield
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"unexpected skip of a whole module: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[MEASURED]:
        terminalreporter.section("measured")
        for line in config.stash[MEASURED]:
            terminalreporter.line(line)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Puts a line with what a test measured into the run's summary."""
    return lambda text: request.config.stash[MEASURED].append(f"{request.node.name}: {text}")


@pytest.fixture
def world() -> Iterator[World]:
    """Namespaces, links and a directory that are gone after the test."""
    with World() as made:
        yield made
