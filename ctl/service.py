# SPDX-License-Identifier: Apache-2.0
"""What the daemon needs of whatever serves its guests.

Theory of operation. `ctl/daemon.py` knows the life of `xdpvhost up`: run directory, locks, journal, signals, API,
metrics, the way down. How guests get their frames is behind `Service`, and which one does follows from `--mode`:

    xdp                        ctl/serve_xdp.py     AF_XDP and vhost-user, the data plane
    tap --serve vhost-user     ctl/serve_tap.py     the data plane and vhost-user, over a tap
    every other                ctl/serve_links.py   devices that a virtual machine opens by itself; one file a mode in
                                                    ctl/modes/

A service that only makes links must not pay for the data plane: nothing is imported before its mode is known.

All methods are called on the event loop's thread, except `samples` (the metrics server's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ConfigError

if TYPE_CHECKING:
    from .api import Handler
    from .config import GuestSpec, UpConfig
    from .links.journal import Entry, Journal
    from .metrics.declared import Sample

Needs = Sequence[Sequence[str]]  # one capability of each row: ctl/privileges.py


@dataclass(frozen=True)
class Leftover:
    """What a killed daemon's journal has of our interfaces: `adopted` is kept and undone at the end, the rest now."""

    adopted: Sequence[Entry]
    needs: Needs = ()  # what undoing the rest takes beyond the service's own privileges


class Service(Protocol):
    """One daemon's interfaces and guests. Made from an `UpConfig` alone; nothing happens before `open`."""

    @property
    def needs(self) -> Needs:
        """Privileges without which `open` can't work."""
        ...

    def leftover(self, journal: Journal, ifindexes: Sequence[int]) -> Leftover:
        """Before anything is undone or opened: what of the pending entries `open` takes over.

        `ifindexes`: of `UpConfig.ifaces`, in that order.
        """
        ...

    async def open(self, journal: Journal) -> None:
        """Prepare the interfaces and serve the configured guests. Raises XdpvhostError; `close` is called then, too."""
        ...

    async def close(self) -> None:
        """End every guest and give the interfaces back. May be called at any time, and again. Logs, never raises."""
        ...

    @property
    def guests(self) -> Sequence[GuestSpec]:
        """Those there are, configured at the start or added since."""
        ...

    def add_guest(self, spec: GuestSpec) -> Mapping[str, Any]:
        """Serve one more; its description. Raises XdpvhostError, and then nothing has changed."""
        ...

    def set_guest(self, name: str, changes: Mapping[str, str]) -> Mapping[str, Any]:
        """Give a guest's SPEC keys other values (an empty one: the default), while it runs; its description.

        Raises XdpvhostError, and then nothing has changed.
        """
        ...

    async def remove_guest(self, name: str) -> Mapping[str, Any]:
        """Serve it no longer; its last description. Raises ConfigError when there is none."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `status` shows beyond the daemon's own facts; `nics` is one of the keys."""
        ...

    def describe_guests(self) -> list[dict[str, Any]]:
        """For `guest list` and `status`. Each has `name`, `mac`, `queues` and `spec`."""
        ...

    def summary(self) -> str:
        """The middle of the line that says that everything is ready."""
        ...

    def read(self) -> list[Sample]:
        """All counters. Any thread; empty when closed."""
        ...

    def handlers(self) -> Mapping[str, Handler]:
        """API methods beyond those that every daemon has."""
        ...


def service_for(config: UpConfig) -> Service:
    """The service that does what `config` asks for."""
    if config.mode == "xdp":
        from .serve_xdp import XdpService

        return XdpService(config)
    if config.mode == "tap" and config.serve == "vhost-user":
        from .serve_tap import TapService

        return TapService(config)
    from .serve_links import LinkService

    return LinkService(config)


def no_such_guest(name: str, known: Sequence[GuestSpec]) -> ConfigError:
    """What to raise for a guest that isn't there."""
    names = ", ".join(spec.name for spec in known) or "none"
    return ConfigError(f"guest {name!r} does not exist; guests here: {names}")
