# SPDX-License-Identifier: Apache-2.0
"""The Prometheus endpoint: one registry, one collector, one thread that accepts, and one per connection, of few."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterable
from socketserver import ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..config import MetricsAddress
from ..errors import ConfigError
from .declared import METRICS, Metric, Sample

log = logging.getLogger(__name__)

Family = CounterMetricFamily | GaugeMetricFamily

MAX_CONNECTIONS = 16  # more are closed at once: descriptors and threads are the guests' too


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


class _RequestHandler(WSGIRequestHandler):
    timeout = 5.0  # seconds that a client may be silent in

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("metrics: %s: %s", client_address, sys.exc_info()[1])


class Endpoint:
    """Serves /metrics on `address` until closed. Port 0 takes any; `address` then has the one in use.

    Raises ConfigError when the address can't be bound.
    """

    def __init__(self, address: MetricsAddress, source: Source) -> None:
        try:
            family, _, _, _, place = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            served: type[_Server] = type("_FamilyServer", (_Server,), {"address_family": family})
            app = make_wsgi_app(registry(source))
            self._server = make_server(str(place[0]), address.port, app, served, handler_class=_RequestHandler)
        except OSError as exc:
            cause = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else str(exc)
            raise ConfigError(
                f"cannot serve metrics on {address}: {cause}; give another --metrics ADDR:PORT, or --metrics none"
            ) from exc
        self.address = MetricsAddress(address.host, self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="xdpvhost-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
