# SPDX-License-Identifier: Apache-2.0
"""A running `xdpvhost up` in a namespace, its API and its metrics."""

import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .netns import Namespace
from .process import Process, wait_for

TOP = Path(__file__).resolve().parents[2]
PROGRAM = TOP / ".venv" / "bin" / "xdpvhost"

Labels = frozenset[tuple[str, str]]
_SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One scrape. `total("xdpvhost_guest_rx_packets_total", guest="vm1")` sums the series that have those labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples: dict[tuple[str, Labels], float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                match = _SAMPLE.match(line)
                assert match is not None, f"not in Prometheus' text format: {line}"
                labels = frozenset(_LABEL.findall(match["labels"] or ""))
                self.samples[match["name"], labels] = float(match["value"])

    def series(self, name: str, **labels: object) -> dict[Labels, float]:
        """The series of that name that have all those labels; at least one exists."""
        wanted = {(k, str(v)) for k, v in labels.items()}
        found = {key: v for (n, key), v in self.samples.items() if n == name and wanted <= key}
        assert found, f"no series {name} with {labels} in the metrics"
        return found

    def total(self, name: str, **labels: object) -> int:
        return int(sum(self.series(name, **labels).values()))

    def by(self, label: str, name: str, **labels: object) -> dict[str, int]:
        """Sums for each value of one label."""
        sums: dict[str, int] = {}
        for key, value in self.series(name, **labels).items():
            group = dict(key)[label]
            sums[group] = sums.get(group, 0) + int(value)
        return sums


class Daemon:
    """`xdpvhost up` in `namespace`; ready when the constructor returns."""

    def __init__(
        self,
        namespace: Namespace,
        *,
        iface: str,
        guests: Sequence[str] = (),
        run_dir: Path | None = None,
        options: Sequence[str] = (),
        metrics: str = "127.0.0.1:9477",
        env: Mapping[str, str] | None = None,
        deadline: float = 20,
    ) -> None:
        self.namespace = namespace
        self.iface = iface
        self.run_dir = run_dir or namespace.directory / "run"
        self.metrics_address = metrics
        arguments = ["up", "--iface", iface, "--run-dir", str(self.run_dir), "--metrics", metrics, *options]
        for guest in guests:
            arguments += ["--guest", guest]
        self.command = ["xdpvhost", *arguments]
        self.process: Process = namespace.start(PROGRAM, *arguments, own_sysfs=True, env=env)
        try:
            self.process.wait_line(r"\bready: ", deadline)
        except BaseException:
            self.process.close()
            raise

    @property
    def pid(self) -> int:
        """The daemon's own process: the shell that prepared its /sys has become it."""
        return self.process.pid

    def socket(self, guest: str) -> Path:
        return self.run_dir / f"{guest}.sock"

    def cli(self, *args: str, check: bool = True) -> str:
        """Runs an xdpvhost command on this daemon and returns what it printed on stdout."""
        return self.namespace.run(PROGRAM, *args, "--run-dir", self.run_dir, check=check).stdout

    def api(self, method: str, **params: object) -> Any:
        """Asks the API socket; an error of the daemon's is an AssertionError with its message."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(20)
            connection.connect(str(self.run_dir / "api.sock"))
            connection.sendall(json.dumps({"method": method, "params": params}).encode() + b"\n")
            answer = json.loads(connection.makefile("rb").readline())
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def metrics(self) -> Metrics:
        with self.namespace.entered():
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{self.metrics_address}/metrics", timeout=10) as answer:
                return Metrics(answer.read().decode())

    def guest(self, name: str) -> dict[str, Any]:
        return next(g for g in self.api("guest-list") if g["name"] == name)

    def wait_connected(self, name: str, deadline: float = 10, *, connected: bool = True) -> None:
        state = "attached" if connected else "detached"
        wait_for(lambda: self.guest(name)["connected"] == connected, deadline, f"guest {name} to be {state}")

    def wait_metric(self, value: int, name: str, *, deadline: float = 10, **labels: object) -> Metrics:
        """Waits until the sum of a metric is `value`; the scrape that showed it."""
        last: list[int] = []

        def there() -> Metrics | None:
            scrape = self.metrics()
            last[:] = [scrape.total(name, **labels)]
            return scrape if last[0] == value else None

        try:
            scrape = wait_for(there, deadline, f"{name} {labels} to be {value}", interval=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {last}") from None
        assert scrape is not None
        return scrape

    def kill(self) -> None:
        """kill -9: nothing is undone."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.kill()

    def down(self, deadline: float = 15) -> None:
        """SIGTERM, and its exit status must be 0."""
        self.process.send(signal.SIGTERM)
        status = self.process.wait(deadline)
        assert status == 0, f"xdpvhost up ended with status {status}\n{self.process.tail()}"

    def close(self) -> None:
        self.process.close(grace=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
