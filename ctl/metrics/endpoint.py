# SPDX-License-Identifier: Apache-2.0
"""The Prometheus endpoint: one registry, one collector, one thread that serves /metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..config import MetricsAddress
from ..errors import ConfigError
from .declared import METRICS, Metric
from .samples import Sample

Family = CounterMetricFamily | GaugeMetricFamily


class Source(Protocol):
    """Where the samples come from."""

    def read(self) -> list[Sample]: ...


def _family(metric: Metric) -> Family:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)


class NativeCollector(Collector):
    """Turns one reading of all counters into metric families, in the order of their declaration."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterable[Family]:
        return [_family(metric) for metric in METRICS]

    def collect(self) -> Iterable[Family]:
        families = {metric.name: _family(metric) for metric in METRICS}
        for sample in self._source.read():
            families[sample.metric.name].add_metric(sample.labels, sample.value)
        return families.values()


def registry(source: Source) -> CollectorRegistry:
    """A registry of nothing but xdpvhost's own metrics."""
    result = CollectorRegistry(auto_describe=False)
    result.register(NativeCollector(source))
    return result


class Endpoint:
    """Serves /metrics on `address` until closed. Port 0 takes any; `address` then has the one in use.

    Raises ConfigError when the address can't be bound.
    """

    def __init__(self, address: MetricsAddress, source: Source) -> None:
        try:
            self._server, self._thread = start_http_server(address.port, address.host, registry(source))
        except OSError as exc:
            cause = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)
            raise ConfigError(
                f"cannot serve metrics on {address}: {cause}; give another --metrics ADDR:PORT, or --metrics none"
            ) from exc
        self.address = MetricsAddress(address.host, self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
