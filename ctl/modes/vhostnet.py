# SPDX-License-Identifier: Apache-2.0
"""Mode `vhost-net`: the tap of mode `tap`, whose virtqueues the kernel's vhost threads serve.

One copy a frame less than mode `tap`, and no system call of QEMU's on the way.
"""

from __future__ import annotations

import logging
import os
from typing import Any, ClassVar

from ..config import GuestSpec, Mode, UpConfig
from ..errors import ConfigError, NicError
from ..feature import Feature
from ..links import opened, vhostnet
from ..links.changes import Changes
from ..links.netlink import Link
from ..links.tap import Owner
from ..service import Needs
from . import keys, tapped
from .tap import TapMode

log = logging.getLogger(__name__)


class VhostUplink(tapped.TapUplink):
    """Implements `Uplink`: taps, and the threads that serve them."""

    def __init__(self, config: UpConfig, changes: Changes) -> None:
        super().__init__(config, changes)
        self._pinned: set[tuple[int, str]] = set()  # threads, by number and start time
        self._refused = False  # and told

    def open(self) -> None:
        _require(None, f"interface {self.config.iface}")
        super().open()
        for entry in self.changes.journal.pending():  # a killed daemon's threads are pinned again below
            thread = entry.args.get("thread")
            if entry.kind == "vhost_pin" and self.changes.claim("vhost_pin", thread=thread) is not None:
                self._pinned.add((int(entry.args["thread"]), str(entry.args["start"])))

    def add_guest(self, spec: GuestSpec) -> None:
        _require(keys.owner_of(spec), f"guest {spec.name!r}")
        super().add_guest(spec)

    def follow(self) -> None:
        super().follow()
        if self.config.pin_vhost:
            self._forget_gone()
            for threads in self._threads().values():
                self._pin(threads)

    def _forget_gone(self) -> None:
        """Threads end with their virtual machine, and then there is nothing to put back."""
        for entry in self.changes.journal.pending():
            if entry.kind == "vhost_pin":
                key = int(entry.args["thread"]), str(entry.args["start"])
                if key in self._pinned and vhostnet.start_time(key[0]) != key[1]:
                    self.changes.forget(entry)
                    self._pinned.discard(key)

    def _threads(self) -> dict[str, list[int]]:
        """vhost's threads by the tap that somebody has open."""
        names = [str(entry.args["name"]) for entry in self.changes.journal.pending() if entry.kind == "tap"]
        return {
            name: [thread for opener in found for thread in opened.vhost_threads(opener.pid)]
            for name, found in opened.openers(names).items()
        }

    def _pin(self, threads: list[int]) -> None:
        cpus = sorted(self.config.pin_vhost)
        for thread in threads:
            key = thread, vhostnet.start_time(thread)
            if key in self._pinned or not key[1]:
                continue
            before = vhostnet.affinity(thread)
            entry = self.changes.record("vhost_pin", thread=thread, start=key[1], cpus=before)
            try:
                vhostnet.pin([thread], cpus)
            except OSError as exc:
                self.changes.forget(entry)
                if not self._refused:
                    self._refused = True
                    raise NicError(f"vhost thread {thread}: cannot run on CPUs {cpus}: {exc.strerror}") from exc
                return
            self._pinned.add(key)
            log.info("vhost thread %d: runs on CPUs %s", thread, ",".join(map(str, cpus)))

    def facts(self) -> dict[str, Any]:
        return super().facts() | {
            "zero_copy_tx": vhostnet.zero_copy_tx(),
        }

    def guest_facts(self, spec: GuestSpec) -> dict[str, Any]:
        facts = super().guest_facts(spec)
        name = keys.device_name(spec)
        threads = [t for o in opened.openers([name])[name] for t in opened.vhost_threads(o.pid)]
        asked = ",".join(map(str, self.config.pin_vhost)) or "anywhere"
        found = {thread: ",".join(map(str, vhostnet.affinity(thread))) for thread in threads}
        return facts | {
            "vhost_threads": threads,
            "vhost_cpus_asked": asked,
            "vhost_cpus_in_use": "; ".join(sorted(set(found.values()))) or "no thread yet",
        }


def _require(who: Owner | None, what: str) -> None:
    lacking = vhostnet.missing(who)
    if lacking is not None:
        raise NicError(f"{what}: {lacking.cause}; {lacking.remedy}")


class VhostNetMode(TapMode):
    """Implements `LinkMode`."""

    name: ClassVar[Mode] = "vhost-net"
    vhost: ClassVar[bool] = True

    def needs(self, config: UpConfig) -> Needs:
        return (*tapped.NET_ADMIN, ("CAP_SYS_NICE",)) if config.pin_vhost else tapped.NET_ADMIN

    def check_config(self, config: UpConfig) -> None:
        super().check_config(config)
        here = os.sched_getaffinity(0)
        strange = set(config.pin_vhost) - here
        if strange:
            raise ConfigError(
                f"--pin-vhost: this machine lets us use CPUs {','.join(map(str, sorted(here)))}, and not "
                f"{','.join(map(str, sorted(strange)))}"
            )

    def uplink(self, config: UpConfig, changes: Changes) -> VhostUplink:
        return VhostUplink(config, changes)

    def feature(self, link: Link) -> Feature:
        lacking = vhostnet.missing()
        if lacking is not None:
            return Feature("mode-vhost-net", False, lacking.cause, lacking.remedy)
        detail = f"{vhostnet.NODE} is there; experimental_zcopytx is {vhostnet.zero_copy_tx()}"
        return tapped.tap_feature("mode-vhost-net", link, detail)


MODE = VhostNetMode()
