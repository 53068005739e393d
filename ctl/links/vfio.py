# SPDX-License-Identifier: Apache-2.0
"""Giving a PCI function to virtual machines: is there an IOMMU, is the function alone in its group, who may open it.

vfio-pci hands a function to a process only together with its whole IOMMU group, because within one devices reach each
other's memory. PCI bridges in a group don't count (the kernel allows them); anything else does.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import NicError
from . import modules
from .pci import SYS, Function, Lacking, read

DRIVER = "vfio-pci"
BACKEND = "vfio_iommu_type1"
NOIOMMU = "vfio-noiommu"  # the name of groups that vfio makes where there is no IOMMU
DEV = Path("/dev")

IN_A_MACHINE = (
    "in a virtual machine: give it an IOMMU, with QEMU `-machine q35,kernel-irqchip=split -device "
    "intel-iommu,intremap=on,caching-mode=on`, and intel_iommu=on on its kernel's command line"
)


def check_iommu(sys: Path = SYS) -> None:
    """Raises Lacking when no IOMMU is at work, and says how to switch it on."""
    with suppress(OSError):
        groups = os.listdir(sys / "kernel/iommu_groups")
        if any(read(sys / "kernel/iommu_groups" / group / "name") != NOIOMMU for group in groups):
            return
    tables = sys / "firmware/acpi/tables"
    if (tables / "DMAR").exists():
        remedy = "add intel_iommu=on to the kernel's command line, and boot again"
    elif (tables / "IVRS").exists():
        remedy = "take amd_iommu=off and iommu=off from the kernel's command line, and boot again"
    else:
        remedy = f"switch VT-d or AMD-Vi on in the firmware's setup ({IN_A_MACHINE})"
    raise Lacking("the IOMMU is off (no groups in /sys/kernel/iommu_groups)", remedy)


def check_driver(sys: Path = SYS, modules_in: Path | None = None) -> None:
    """Raises Lacking when vfio-pci, or what connects it to the IOMMU, isn't there, and says how to get it."""
    if not (sys / "bus/pci/drivers" / DRIVER).is_dir():
        remedy = modules.remedy(DRIVER, "CONFIG_VFIO_PCI", sys, modules_in)
        raise Lacking(f"driver {DRIVER} is not loaded", remedy)
    # QEMU says "No available IOMMU models" without; either will do.
    if all(modules.state(name, sys, modules_in) != "loaded" for name in (BACKEND, "iommufd")):
        remedy = modules.remedy(BACKEND, "CONFIG_VFIO_IOMMU_TYPE1", sys, modules_in)
        raise Lacking(f"module {BACKEND} is not loaded", remedy)


def check_group(function: Function) -> None:
    """Raises Lacking when the function is in no IOMMU group, or not alone in it."""
    group = function.group
    if group is None or read(_group(function) / "name") == NOIOMMU:
        raise Lacking(f"PCI function {function} is in no IOMMU group", "look into `dmesg | grep -i iommu`")
    others = sharing(function)
    if others:
        devices = ", ".join(f"{other} ({other.driver or 'no driver'})" for other in others)
        raise Lacking(
            f"PCI function {function} shares IOMMU group {group} with {devices}",
            "put the card into a slot whose root port separates its functions (PCIe ACS)",
        )


def sharing(function: Function) -> list[Function]:
    """What else, other than bridges, is in its IOMMU group."""
    try:
        names = sorted(os.listdir(_group(function) / "devices"))
    except OSError:
        return []
    others = [Function(name, function.sys) for name in names if name != function.address]
    return [other for other in others if not other.is_bridge]


def _group(function: Function) -> Path:
    return function.sys / "kernel/iommu_groups" / (function.group or "-")


def check(function: Function) -> None:
    """All of the above. Raises Lacking."""
    check_iommu(function.sys)
    check_driver(function.sys)
    check_group(function)


def bind(function: Function) -> None:
    """Give it to vfio-pci, and to no other driver. Raises NicError or PrivilegeError."""
    function.set_override(DRIVER)
    if function.driver == DRIVER:
        return
    function.unbind()
    function.probe()
    if function.driver != DRIVER:
        raise NicError(f"PCI function {function}: {DRIVER} does not take it; `dmesg` may say why")


def bind_default(function: Function) -> None:
    """Let go of it and let its own driver find it anew, with what the card is set to. Raises NicError."""
    function.unbind()
    function.set_override(None)
    function.probe()


def give_back(function: Function, ours: tuple[str | None, str | None], before: tuple[str | None, str | None]) -> str:
    """From our (driver, override) to those before, where they are still ours; what was done. Raises NicError."""
    driver, override = function.driver, function.override
    if (driver, override) == before:
        return f"driver {driver or 'none'} as before"
    if driver not in (ours[0], before[0], None):
        return f"driver {driver} has it by now, which is not ours"
    if driver == DRIVER != before[0]:
        held = holders(function)
        if held:
            raise NicError(f"a virtual machine has it ({', '.join(held)}); end that, then `xdpvhost clean`")
    if driver != before[0]:
        function.unbind()
    if override in (ours[1], None):
        function.set_override(before[1])
    if before[0] is not None and function.driver is None:
        function.probe()
        if function.driver is None:
            raise NicError(f"driver {before[0]} does not take it back; `modprobe {before[0]}`, then `xdpvhost clean`")
    return f"driver {function.driver or 'none'}"


def node(function: Function, dev: Path = DEV) -> Path:
    """The file that a virtual machine opens to get the function's group."""
    return dev / "vfio" / (function.group or "-")


def check_node(function: Function, dev: Path = DEV) -> None:
    """Raises Lacking when the file isn't there."""
    path = node(function, dev)
    if not path.exists():
        raise Lacking(f"PCI function {function}: there is no {path}", f"mount devtmpfs at {dev}")


def who_may_open(path: Path) -> str:
    """Owner, group and mode of a device file, as `ls` has them; empty when it is missing."""
    try:
        found = path.stat()
    except OSError:
        return ""
    user, group = str(found.st_uid), str(found.st_gid)
    with suppress(KeyError):
        user = pwd.getpwuid(found.st_uid).pw_name
    with suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    return f"{user}:{group} {stat.S_IMODE(found.st_mode):04o}"


def holders(function: Function, dev: Path = DEV) -> list[str]:
    """Which processes have a function of vfio-pci's open: as "NAME, pid N", or "unknown". Empty: none has."""
    if function.driver != DRIVER or function.group is None:
        return []
    # The file of a group, and the function's own for who uses iommufd.
    files = [node(function, dev)]
    with suppress(OSError):
        files += [dev / "vfio/devices" / name for name in os.listdir(function.directory / "vfio-dev")]
    found = sorted(set(_openers({str(path) for path in files})))
    if not found and _is_open(files[0]):
        found = ["unknown"]
    return found


def _is_open(path: Path) -> bool:
    """A group can be opened once at a time, so trying tells."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno == errno.EBUSY
    return False


def _openers(paths: set[str]) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for fd in os.listdir(process / "fd"):
                with suppress(OSError):
                    if os.readlink(process / "fd" / fd) in paths:
                        yield f"{read(process / 'comm')}, pid {process.name}"
