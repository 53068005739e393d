# SPDX-License-Identifier: Apache-2.0
"""A session's guest memory: its table of regions, replaced whole or one by one while rings run.

QEMU before 8.0 sends ADD_MEM_REG and REM_MEM_REG once for every queue pair. All pairs have the same memory: the first
one counts. So a region may be added again, by the same file, as often as there are more pairs, and it is as often
removed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..errors import DatapathError
from .errors import ProtocolError, Violation
from .fds import Fd
from .memory import MappedRegion, check_table, map_region, map_table, unmap
from .port import DevicePort
from .rings import Rings
from .wire import MAX_MEM_SLOTS, MemRegion

log = logging.getLogger(__name__)


class GuestMemory:
    """Owns the mappings of one front-end's regions, and the data plane's table of them, which `rings` run with."""

    def __init__(self, port: DevicePort, rings: Rings) -> None:
        self._port = port
        self._rings = rings
        self._regions: list[MappedRegion] = []
        self._repeats: dict[MemRegion, int] = {}  # how often each of them was added again
        self._owed: dict[tuple[int, int, int], int] = {}  # how often a removed one, by its place, is removed again

    def __len__(self) -> int:
        return len(self._regions)

    def set_table(self, regions: Sequence[MemRegion], fds: Sequence[Fd]) -> None:
        """Replaces everything. Closes `fds`. Raises ProtocolError."""
        mapped = map_table(regions, fds)
        self._repeats.clear()
        self._owed.clear()
        self._replace(mapped, self._regions, incomplete=False)

    def add(self, region: MemRegion, fd: Fd) -> None:
        """One more region. Closes `fd`. Raises ProtocolError."""
        try:
            repeats = self._repeats.get(region, 0)
            if repeats < self._port.max_pairs - 1 and any(mapped.is_again(region, fd) for mapped in self._regions):
                self._repeats[region] = repeats + 1
                return
            check_table([*(mapped.region for mapped in self._regions), region])
            added = map_region(region, fd)
        finally:
            fd.close()
        self._owed.pop(region.place, None)
        self._replace([*self._regions, added], (), incomplete=True)

    def remove(self, region: MemRegion) -> None:
        """One region less. Raises ProtocolError."""
        place = region.place
        gone = [mapped for mapped in self._regions if mapped.region.place == place]
        if not gone and self._owed.get(place):
            self._owed[place] -= 1
            return
        for mapped in gone:
            if repeats := self._repeats.pop(mapped.region, 0):
                self._owed[place] = repeats
        if len(self._owed) > MAX_MEM_SLOTS:
            del self._owed[next(iter(self._owed))]
        if not gone:
            raise ProtocolError(Violation.MEMORY, f"there is no memory region at {region.gpa:#x} to remove")
        kept = [mapped for mapped in self._regions if mapped not in gone]
        self._replace(kept, gone, incomplete=True)

    def close(self) -> None:
        """Gives everything back. Only when the data plane has no ring of this guest."""
        if self._rings.memory is not None:
            self._rings.memory.close()
        unmap(self._regions)

    def _replace(self, regions: list[MappedRegion], dropped: Sequence[MappedRegion], incomplete: bool) -> None:
        """Moves all rings to a new table; `dropped` is unmapped when nothing uses it any more."""
        rings, old = self._rings, (self._rings.memory, self._rings.memory_end)
        new = [mapped for mapped in regions if mapped not in self._regions]
        try:
            rings.memory = self._port.memory([region.for_datapath for region in regions]) if regions else None
        except DatapathError as error:
            unmap(new)
            raise ProtocolError(Violation.MEMORY, f"memory table cannot be used: {error}") from error
        rings.memory_end = max((mapped.region.gpa + mapped.region.size for mapped in regions), default=0)
        dirty = rings.log if rings.logging else None
        if dirty is not None and dirty.covers(old[1]) and not dirty.covers(rings.memory_end):
            log.warning(
                "guest %r: its rings wait for a dirty log that reaches the new end of memory, %#x",
                self._port.name,
                rings.memory_end,
            )
        try:
            rings.renew(rings, memory_incomplete=incomplete)
        except BaseException:
            if rings.memory is not None:
                rings.memory.close()
            rings.memory, rings.memory_end = old
            unmap(new)
            raise
        self._regions = regions
        if old[0] is not None:
            old[0].close()
        unmap(dropped)
