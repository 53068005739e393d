# SPDX-License-Identifier: Apache-2.0
"""What this machine and a NIC can do for xdpvhost: named probes, each with what was found and what would help.

The probes change nothing on the NIC. What only shows when it is tried there (the driver's own limits) is told by
`Nic.open` and reported as asked / in use.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from .. import privileges
from ..feature import Feature
from ..links import ethtool
from ..links.netdev import DeviceFeatures, XdpFeatures, device_features
from ..links.netlink import Link, get_link
from ..links.nicprep import NTUPLE, VLAN_PARSING, comes_beside
from . import tags
from .libbpf import BpfObject, attach_replacement, captured_log
from .maps import MAX_QUEUES, size_maps
from .program import OBJECT, PROGRAM, attached, bpffs
from .umem import checksums_here, framing_for, largest_mtu
from .xsk import AF_XDP


def probe(iface: str) -> list[Feature]:
    """Raises NicError when there is no such interface."""
    link = get_link(iface)
    device = device_features(link.index)
    reported = None if device is None else device.xdp
    probes: tuple[Callable[[], Feature], ...] = (
        _capabilities,
        _program,
        lambda: _occupied(link),
        _af_xdp,
        lambda: _native(link, reported),
        lambda: _zerocopy(reported),
        _dispatcher,
        lambda: _queues(link),
        lambda: _mtu(link, reported),
        lambda: _tx_checksum(device),
        lambda: _vlan(link, device),
        lambda: _classification(link),
        _hugepages,
    )
    return [run() for run in probes]


def _capabilities() -> Feature:
    missing = privileges.missing(privileges.UP)
    detail = f"missing {', '.join(missing)}" if missing else "all that are needed"
    return Feature("capabilities", not missing, detail, "run as root" if missing else "", required=True)


def _program() -> Feature:
    """Does the verifier take our program?"""
    name = "xdp-program"
    try:
        with captured_log(), BpfObject(OBJECT) as obj:
            size_maps(obj, 1)  # with nothing to do the verifier would see nothing
            obj.load()
    except OSError as exc:
        remedy = "run as root" if exc.errno == errno.EPERM else "the log at debug level has what the verifier said"
        return Feature(name, False, str(exc.strerror), remedy, required=True)
    return Feature(name, True, f"{OBJECT.name} loads", required=True)


def _occupied(link: Link) -> Feature:
    name = "xdp-free"
    try:
        found = attached(link.index)
    except OSError as exc:
        return Feature(name, None, f"cannot ask: {exc.strerror}")
    if not found:
        return Feature(name, True, "no XDP program is attached", required=True)
    names = ", ".join(f"{f.name or 'unknown'} (id {f.program_id}, {f.mode})" for f in found)
    if any(f.name == PROGRAM for f in found):
        return Feature(name, False, f"xdpvhost is on it: {names}", "`xdpvhost down` or `xdpvhost clean`", required=True)
    if all(f.dispatcher for f in found):
        return Feature(name, True, f"libxdp's dispatcher runs {names}", required=True)
    return Feature(name, False, f"attached: {names}", f"`ip link set {link.name} xdp off`", required=True)


def _af_xdp() -> Feature:
    name = "af-xdp"
    try:
        socket.socket(AF_XDP, socket.SOCK_RAW, 0).close()
    except OSError as exc:
        remedy = "run as root" if exc.errno == errno.EPERM else "use a kernel with CONFIG_XDP_SOCKETS"
        return Feature(name, False, str(exc.strerror), remedy, required=True)
    return Feature(name, True, "the kernel has AF_XDP sockets", required=True)


def _native(link: Link, reported: XdpFeatures | None) -> Feature:
    name = "native-xdp"
    driver = link.kind or ethtool.driver(link.name) or "unknown driver"
    if reported is None:
        return Feature(name, None, f"{driver}: this kernel doesn't tell (6.3 and later do); it will be tried")
    if XdpFeatures.BASIC in reported and XdpFeatures.REDIRECT in reported:
        return Feature(name, True, driver)
    return Feature(name, False, f"{driver} has no native XDP: generic mode will be used, which is slower")


def _zerocopy(reported: XdpFeatures | None) -> Feature:
    name = "zero-copy"
    if reported is None:
        return Feature(name, None, "this kernel doesn't tell (6.3 and later do); it will be tried")
    if XdpFeatures.XSK_ZEROCOPY in reported:
        return Feature(name, True, "the driver says so")
    return Feature(name, False, "the driver has none: the kernel copies each frame once")


def _dispatcher() -> Feature:
    """Sharing the NIC with other XDP programs: what libxdp itself tries before it uses its dispatcher."""
    name = "dispatcher"
    if bpffs() is None:
        where = os.environ.get("LIBXDP_BPFFS", "/sys/fs/bpf")
        return Feature(name, False, f"no bpffs at {where}", f"`mount -t bpf bpf {where}`")
    try:
        with captured_log(), BpfObject(OBJECT) as target, BpfObject(OBJECT) as replacement:
            target.load()
            replacement.make_replacement(PROGRAM, target.program_fd(PROGRAM))
            replacement.load()
            os.close(attach_replacement(replacement.program_fd(PROGRAM)))
    except OSError as exc:
        cause = os.strerror(exc.errno or 0)
        return Feature(name, False, f"the kernel refuses freplace programs ({cause}): ours will be the NIC's only one")
    return Feature(name, True, "the kernel takes freplace programs: other XDP programs may run beside ours")


def _queues(link: Link) -> Feature:
    rx, tx = ethtool.queues(link)
    detail = f"{rx} receive, {tx} transmit"
    if rx > tx:
        return Feature("queues", False, detail, f"`ethtool -L {link.name} rx {tx}`", required=True)
    if rx > MAX_QUEUES:
        return Feature(
            "queues",
            False,
            f"{detail}; at most {MAX_QUEUES}",
            f"`ethtool -L {link.name} combined {MAX_QUEUES}`",
            required=True,
        )
    return Feature("queues", True, detail, required=True)


def _mtu(link: Link, reported: XdpFeatures | None) -> Feature:
    """A frame that is larger than a page needs several pieces: of the driver in native mode, of the kernel always."""
    framing = framing_for(link.mtu)
    if not framing.several:
        return Feature("mtu", True, f"{link.mtu}: frames of {framing.chunk} bytes", required=True)
    most = largest_mtu(4096)
    remedy = f"`ip link set {link.name} mtu {most}` or less"
    detail = f"{link.mtu}: frames of several pieces of {framing.chunk} bytes"
    if reported is None:  # told since 6.3; XDP_USE_SG came with 6.6
        return Feature("mtu", False, f"{link.mtu}; this kernel holds {most} at most", remedy, required=True)
    if XdpFeatures.RX_SG in reported:
        return Feature("mtu", True, detail, required=True)
    return Feature("mtu", None, f"{detail}, which the driver has not: generic mode will be tried", remedy)


def _tx_checksum(device: DeviceFeatures | None) -> Feature:
    why = checksums_here(device)
    if why is None:
        return Feature("tx-checksum", True, "the device finishes the checksums that guests leave open")
    return Feature("tx-checksum", False, f"{why}: they are finished during the copy")


def _vlan(link: Link, device: DeviceFeatures | None) -> Feature:
    """Can the program see VLAN tags?"""
    name = "vlan-tags"
    found = {n: f for n, f in ethtool.features(link.name).items() if n in VLAN_PARSING}
    stuck = [n for n, f in found.items() if f.active and not f.changeable]
    why = tags.refusal(device)
    if not stuck and not comes_beside(link):
        return Feature(name, True, "stay in the frame while xdpvhost runs")
    if why is None:
        return Feature(name, True, "in the frame or beside it: the driver tells the program, in native mode")
    if stuck:
        detail = f"{', '.join(stuck)} can't be switched off, and {why}: guests' VLANs can't be told apart"
        return Feature(name, False, detail, tags.remedy(link))
    detail = f"those that a sender on this machine leaves beside the frame are not seen: {why}"
    return Feature(name, None, detail, tags.remedy(link))


def _classification(link: Link) -> Feature:
    found = ethtool.features(link.name).get(NTUPLE)
    if found is None or not (found.active or found.changeable):
        return Feature("hardware-classification", False, "no ethtool n-tuple filters: frames are sorted by XDP alone")
    detail = "the NIC has ethtool n-tuple filters; whether it takes rules for addresses, `status` says"
    return Feature("hardware-classification", True, detail)


def _hugepages() -> Feature:
    with open("/proc/meminfo", encoding="ascii") as info:
        free = next((int(line.split()[1]) for line in info if line.startswith("HugePages_Free:")), 0)
    remedy = "" if free else "`sysctl vm.nr_hugepages=64` for fewer TLB misses"
    return Feature("hugepages", free > 0, f"{free} free", remedy)
