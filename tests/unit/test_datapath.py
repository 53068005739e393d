# SPDX-License-Identifier: Apache-2.0
"""The ctypes mirror against what the library says of itself."""

import ctypes
import errno
from pathlib import Path
from typing import cast

import pytest

from support.plane import NoNic
from xdpvhost import datapath
from xdpvhost.config import GuestSpec
from xdpvhost.datapath import CTRL_NAMES, DROP_MAX, DROP_NAMES, FAULT_MAX, MIRROR, Datapath, Region
from xdpvhost.errors import DatapathError
from xdpvhost.switch import Switch
from xdpvhost.xdp.nic import Nic

HEADER = Path(__file__).parents[2] / "datapath" / "include" / "xdpvhost.h"


def layout() -> list[tuple[str, str | None, int, int]]:
    count = ctypes.c_uint32()
    entries = datapath.library().xv_layout(ctypes.byref(count))
    return [
        (e.structure.decode(), e.field.decode() if e.field else None, e.offset, e.size) for e in entries[: count.value]
    ]


def test_every_field_is_where_the_library_has_it() -> None:
    seen: dict[str, set[str]] = {}
    for structure, name, offset, size in layout():
        mirror = MIRROR[structure]
        if name is None:
            assert ctypes.sizeof(mirror) == size, structure
            continue
        field = getattr(mirror, name)
        assert (field.offset, field.size) == (offset, size), f"{structure}.{name}"
        seen.setdefault(structure, set()).add(name)
    for structure, mirror in MIRROR.items():
        assert {f[0] for f in mirror._fields_} == seen[structure], f"{structure}: fields that the library does not list"


def test_names_are_complete() -> None:
    lib = datapath.library()
    assert tuple(lib.xv_drop_name(i).decode() for i in range(DROP_MAX)) == DROP_NAMES
    assert lib.xv_drop_name(DROP_MAX) is None
    assert tuple(lib.xv_ctrl_name(i).decode() for i in range(len(CTRL_NAMES))) == CTRL_NAMES
    assert lib.xv_ctrl_name(len(CTRL_NAMES)) is None
    assert lib.xv_fault_name(FAULT_MAX) is None
    assert all(lib.xv_fault_name(i) for i in range(FAULT_MAX))
    assert datapath.fault_name(999) == "unknown fault 999"


def test_constants_are_the_headers() -> None:
    text = HEADER.read_text()
    for name, value in {
        "XV_ABI": datapath.ABI,
        "XV_MAX_REGIONS": datapath.MAX_REGIONS,
        "XV_MAX_PAIRS": datapath.MAX_PAIRS,
        "XV_MAX_MACS": datapath.MAX_MACS,
        "XV_MAX_RING_SIZE": datapath.MAX_RING_SIZE,
        "XV_VLAN_ANY": datapath.VLAN_ANY,
        "XV_NICQ_PARTIAL_CSUM": datapath.NICQ_PARTIAL_CSUM,
        "XV_NICQ_SG": datapath.NICQ_SG,
        "XV_NICQ_TX_CSUM": datapath.NICQ_TX_CSUM,
        "XV_TX_METADATA": datapath.TX_METADATA,
    }.items():
        line = next(line for line in text.splitlines() if line.startswith(f"#define {name} "))
        assert int(line.split()[2].rstrip("u"), 0) == value, name


def test_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datapath, "ABI", datapath.ABI + 1)
    datapath.library.cache_clear()
    try:
        with pytest.raises(DatapathError, match="has ABI"):
            datapath.library()
    finally:
        datapath.library.cache_clear()


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDPVHOST_DATAPATH", str(tmp_path / "none.so"))
    datapath.library.cache_clear()
    try:
        with pytest.raises(DatapathError, match="make -C datapath install"):
            datapath.library()
    finally:
        datapath.library.cache_clear()


@pytest.mark.parametrize("poll", ["adaptive", "busy", "interrupt"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_start_pass_epochs_and_stop(poll: str, workers: int) -> None:
    with Datapath(workers, poll) as dp:
        dp.start()
        for _ in range(20):
            dp.publish([], [], [])
            dp.quiesce()
            dp.watchdog()
        dp.stop()
        dp.stop()


def test_a_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with Datapath(2) as dp:
        run = dp._lib.xv_worker_run
        monkeypatch.setattr(dp._lib, "xv_worker_run", lambda handle, i: -errno.ENOMEM if i else run(handle, i))
        with pytest.raises(DatapathError, match="worker 1 did not start"):
            dp.start()
        assert not dp._threads


class StubbornNic(NoNic):
    closed = False

    def unsteer(self, slot: int) -> None:
        raise OSError(errno.EIO, "no")

    def close(self) -> None:
        self.closed = True


def test_the_nic_is_given_back_also_when_a_guest_does_not_leave() -> None:
    nic = StubbornNic()
    with Datapath(1) as dp:
        switch = Switch(dp)
        switch.add_nic(cast(Nic, nic))
        dp.start()
        switch.add_guest(GuestSpec("vm1", bytes.fromhex("525400000001"), 1, Path("/none/vm1.sock")))
        with pytest.raises(OSError, match="no"):
            switch.close()
        assert nic.closed


def test_errors_carry_the_errno() -> None:
    with Datapath(1) as dp, dp.guest("vm1", 1, bytes(6)) as port:
        with pytest.raises(DatapathError, match="vm1") as caught:
            dp.memory(port, [Region(0, 4096, 0, 0), Region(0, 4096, 8192, 0)])
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(DatapathError, match="65 workers"):
        Datapath(65)


def test_use_after_close_is_an_error() -> None:
    with Datapath(1) as dp:
        port = dp.guest("vm1", 1, bytes(6))
        port.close()
        port.close()
        with pytest.raises(DatapathError, match="after close"):
            port.reset()
