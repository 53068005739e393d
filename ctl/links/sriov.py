# SPDX-License-Identifier: Apache-2.0
"""A NIC's virtual functions: how many it has and may have, and which PCI function each of them is.

The number is a sysfs attribute of the physical function. The kernel changes it only from or to 0, and all VFs go when
it does; so VFs that somebody uses are looked for first. It waits for a virtual machine to let go of its VF when it
takes one away, which may be for ever: that, too, is refused beforehand.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import NicError
from . import ethtool, vfconfig, vfio, vfnetdev
from .netlink import Link, link_name
from .pci import SYS, Function, Lacking, function_of, read, write


@dataclass(frozen=True)
class Card:
    """The SR-IOV side of a physical function; `iface` is its network device's name."""

    function: Function
    iface: str

    @property
    def total(self) -> int:
        """The most VFs that it can have, as its driver and firmware are."""
        return int(read(self.function.directory / "sriov_totalvfs") or 0)

    @property
    def count(self) -> int:
        """How many it has."""
        return int(read(self.function.directory / "sriov_numvfs") or 0)

    def vf(self, number: int) -> Function | None:
        """VF `number` as a PCI function; None when there is no such VF."""
        link = self.function.directory / f"virtfn{number}"
        return Function(link.resolve().name, self.function.sys) if link.is_symlink() else None

    def vfs(self) -> dict[int, Function]:
        """By number."""
        found = {number: self.vf(number) for number in range(self.count)}
        return {number: function for number, function in found.items() if function is not None}

    def set_count(self, count: int) -> None:
        """From or to 0, or it is as it was. Raises NicError or PrivilegeError."""
        what = f"interface {self.iface}: it cannot be given {count} VFs"
        try:
            write(self.function.directory / "sriov_numvfs", str(count), what)
        except NicError as exc:
            raise NicError(f"{exc}{_why(exc.__cause__)}") from exc
        if self.count != count:
            raise NicError(f"{what}: it has {self.count} now; `dmesg` may say why")


def _why(cause: BaseException | None) -> str:
    number = cause.errno if isinstance(cause, OSError) else None
    if number == errno.ENOENT:
        return ": its driver has no SR-IOV; use a driver that has"
    if number == errno.EBUSY:
        return ": one of its VFs is held by a virtual machine, or bridged by the card's driver; end that first"
    if number in (errno.ENOMEM, errno.EINVAL, errno.ENOSPC):
        return (
            ": the firmware left no room for their memory or bus numbers; switch SR-IOV on in the firmware's setup, or "
            "start the kernel with pci=realloc,assign-busses"
        )
    return "; `dmesg` may say more"


def card_of(link: Link, sys: Path = SYS) -> Card:
    """The card behind `link`. Raises Lacking for a device that can't have VFs, and says why not."""
    function = function_of(link.index, sys)
    if function is None:
        kind = link.kind or ethtool.driver(link.name) or "it"
        raise Lacking(
            f"interface {link.name}: {kind} is not a PCI device, and only those have VFs", "use a NIC with SR-IOV"
        )
    return check_card(function, link.name)


def check_card(function: Function, iface: str) -> Card:
    """Raises Lacking when the function can't have VFs."""
    what = f"interface {iface} ({function}, driver {function.driver or 'none'})"
    if (physical := function.physical) is not None:
        raise Lacking(f"{what} is itself a VF, of {physical}", "use the interface of its physical function")
    if not (function.directory / "sriov_totalvfs").exists():
        raise Lacking(
            f"{what} has no SR-IOV capability",
            "use a NIC that has; where this one should, switch SR-IOV on in its firmware, and in the machine's setup",
        )
    card = Card(function, iface)
    if card.total == 0:
        raise Lacking(f"{what} may have 0 VFs", "raise the number in the card's own firmware (its vendor's tool does)")
    return card


def users(card: Card, *, hosts: bool = True) -> list[str]:
    """What uses the card's VFs, in words. `hosts`: also what the host itself does with their network devices."""
    found = []
    for number, function in card.vfs().items():
        used = use_of(function, hosts=hosts)
        if used:
            found.append(f"VF {number} ({function}): {used}")
    return found


def use_of(function: Function, *, hosts: bool = True) -> str:
    """What a VF is used for, in words; empty when it is free."""
    held = vfio.holders(function)
    if held:
        return f"a virtual machine has it ({', '.join(held)})"
    return vfnetdev.use_of(function, hosts=hosts)


def check_count(card: Card, count: int, *, force: bool) -> None:
    """May the number of VFs be changed to `count`? Raises NicError when it may not."""
    what = f"interface {card.iface}"
    if count > card.total:
        raise NicError(f"{what}: {count} VFs asked for, and the card can have {card.total}; give --vfs {card.total}")
    if card.count in (0, count):
        return
    used = users(card)
    if used:
        raise NicError(
            f"{what}: it has {card.count} VFs, which must all go before there can be {count}, and they are used: "
            f"{'; '.join(used)}; end that, or give --vfs {card.count}"
        )
    if not force:
        raise NicError(
            f"{what}: it has {card.count} VFs, which must all go before there can be {count}; give --vfs {card.count} "
            "to use them, or --force to replace them"
        )


def undo_count(iface: str, args: Mapping[str, Any]) -> str:
    """Entry `sriov_numvfs`: `pci`, `count` that we set, `before`, and `settings` that the VFs had before."""
    what = f"interface {iface}"
    card = Card(Function(str(args["pci"])), iface)
    before, count, now = int(args["before"]), int(args["count"]), card.count
    if not card.function.exists:
        return f"{what}: its card is gone"
    if now == before and before != count:
        return f"{what}: {now} VFs as before"
    if now not in (0, count):
        return f"{what}: it has {now} VFs by now, which are not ours"
    used = users(card, hosts=False)
    if used:
        raise NicError(f"{what}: its VFs are used: {'; '.join(used)}; end that, then `xdpvhost clean`")
    card.set_count(0)
    if before:
        card.set_count(before)
        _restore(iface, int(args["ifindex"]), args.get("settings", {}))
    return f"{what}: {before} VFs"


def _restore(iface: str, ifindex: int, settings: Mapping[str, Mapping[str, Any]]) -> None:
    for number, values in settings.items():
        state = vfconfig.read_vfs(ifindex).get(int(number))
        if state is not None:
            wanted = vfconfig.VfSettings.from_json(values)
            vfconfig.apply(iface, ifindex, int(number), wanted, state.settings)


def same_vf(args: Mapping[str, Any]) -> Function | None:
    """The VF of an entry, `vf` of `pci`, if it is still the function `vf_pci`; None when that is gone."""
    function = Card(Function(str(args["pci"])), "").vf(int(args["vf"]))
    return function if function is not None and function.address == args["vf_pci"] else None


def undo_settings(iface: str, args: Mapping[str, Any]) -> str:
    """Entry `vf_settings`: `pci`, `vf`, `vf_pci`, `asked`, `before`; `ours` when the VF goes away with us anyway."""
    what = f"interface {iface}, VF {args['vf']}"
    function = same_vf(args)
    if function is None:
        return f"{what}: is gone"
    held = vfio.holders(function)
    if held:  # without its VLAN and spoof check it would be let loose
        raise NicError(f"{what}: a virtual machine has it ({', '.join(held)}); end that, then `xdpvhost clean`")
    asked, before = (vfconfig.VfSettings.from_json(args[key]) for key in ("asked", "before"))
    try:
        return vfconfig.undo_settings(iface, int(args["ifindex"]), int(args["vf"]), asked, before)
    except NicError as exc:
        if not args.get("ours"):
            raise
        return f"{what}: left as it is until the VF goes ({exc})"


def undo_driver(iface: str, args: Mapping[str, Any]) -> str:
    """Entry `vf_driver`: `pci`, `vf`, `vf_pci`, `driver` and `override` that we gave it, and `before` of both."""
    function = same_vf(args)
    what = f"interface {iface}, VF {args['vf']} ({args['vf_pci']})"
    if function is None:
        return f"{what}: is gone"
    before: Mapping[str, Any] = args["before"]
    return f"{what}: " + vfio.give_back(
        function, ours=(args["driver"], args["override"]), before=(before["driver"], before["override"])
    )


def undo_netns(iface: str, args: Mapping[str, Any]) -> str:
    """Entry `vf_netns`: `pci`, `vf`, `vf_pci`, `name` that it had, `inode` and `netns` of where it went."""
    what = f"interface {iface}, VF {args['vf']} ({args['vf_pci']})"
    function = same_vf(args)
    if function is None or link_name(int(args["ifindex"])) is None:
        return f"{what}: is gone"
    return f"{what}: " + vfnetdev.bring_home(function, str(args["name"]), int(args["inode"]))


def number_wanted(card: Card, asked: int | None, least: int) -> int:
    """How many VFs to have: as asked, or those that there are, or the `least` that will do. Raises NicError."""
    if asked is not None:
        return asked
    have = card.count
    if have == 0:
        return least
    if have < least:
        raise NicError(
            f"interface {card.iface}: it has {have} VFs and {least} are needed; give --vfs {least} "
            f"(at most {card.total})"
        )
    return have


def free_vf(card: Card, taken: Sequence[int]) -> int:
    """The first VF that nobody uses. Raises NicError when there is none."""
    why = []
    for number, function in card.vfs().items():
        used = "another guest has it" if number in taken else use_of(function)
        if not used and function.driver == vfio.DRIVER:
            used = f"somebody bound it to {vfio.DRIVER}"
        if not used:
            return number
        why.append(f"VF {number}: {used}")
    raise NicError(
        f"interface {card.iface}: none of its {card.count} VFs is free ({'; '.join(why) or 'there are none'}); "
        f"`xdpvhost down`, then `up` with --vfs N (at most {card.total}), or end what uses one"
    )
