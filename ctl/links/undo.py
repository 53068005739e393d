# SPDX-License-Identifier: Apache-2.0
"""How each kind of journal entry is undone, by an orderly shutdown and after a killed daemon alike.

Every handler takes the entry's args, is harmless when the change was never made or is already undone, and returns what
it did in a few words. It raises NicError or OSError when the entry must stay in the journal.

An interface that another xdpvhost serves by now is left alone: its lock is taken while something is undone on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

from ..errors import DaemonError, NicError
from ..rundir import InterfaceLock
from ..xdp.program import detach_leftover
from . import ethtool
from .journal import Undo
from .netlink import Namespace, boot_id, get_link, link_name, set_up

GONE = "the interface is gone"


def handlers(held: int | None = None) -> dict[str, Undo]:
    """`held`: the index of the interface whose lock the caller has."""
    kinds = {"link_up": _link_up, "features": _features, "channels": _channels, "xdp": _xdp}
    return {kind: partial(_undo, held, change) for kind, change in kinds.items()}


def _undo(held: int | None, change: Callable[[str, Mapping[str, Any]], str], args: Mapping[str, Any]) -> str:
    if args.get("boot_id", boot_id()) != boot_id():
        return f"interface {args['iface']}: the machine was booted since"
    iface = _interface(args)
    if iface is None:
        return GONE
    try:
        lock = None if int(args["ifindex"]) == held else InterfaceLock(iface, "`xdpvhost clean` can undo it afterwards")
    except DaemonError as exc:
        raise NicError(str(exc)) from exc
    with closing(lock) if lock else nullcontext():
        return change(iface, args)


def _interface(args: Mapping[str, Any]) -> str | None:
    """The present name of the entry's device; None when it is gone.

    Raises NicError when the device is in a network namespace that is not ours.
    """
    recorded = Namespace(int(args["netns_cookie"]), int(args["netns_inode"]))
    if recorded != Namespace.current():
        if not recorded.exists():
            return None
        raise NicError(
            f"interface {args['iface']}: it is in another network namespace (inode {recorded.inode}): "
            "run `xdpvhost clean` there"
        )
    return link_name(int(args["ifindex"]))


def _link_up(iface: str, args: Mapping[str, Any]) -> str:
    set_up(int(args["ifindex"]), False)
    return f"interface {iface}: set down"


def _features(iface: str, args: Mapping[str, Any]) -> str:
    now = ethtool.features(iface)
    before: Mapping[str, bool] = args["before"]
    wrong = {n: v for n, v in before.items() if n in now and now[n].changeable and now[n].active != v}
    if not wrong:
        return f"interface {iface}: features as before"
    ethtool.set_features(iface, wrong)
    return f"interface {iface}: " + ", ".join(f"{name} {'on' if value else 'off'}" for name, value in wrong.items())


def _channels(iface: str, args: Mapping[str, Any]) -> str:
    wanted = int(args["rx"]), int(args["tx"]), int(args["combined"])
    now = ethtool.channels(get_link(iface))
    if now is None or (now.rx, now.tx, now.combined) == wanted:
        return f"interface {iface}: queues as before"
    ethtool.set_channels(iface, *wanted)
    return f"interface {iface}: {wanted[0]} receive, {wanted[1]} transmit, {wanted[2]} combined queues"


def _xdp(iface: str, args: Mapping[str, Any]) -> str:
    if detach_leftover(int(args["ifindex"]), args.get("program_id")):
        return f"interface {iface}: XDP program detached"
    return f"interface {iface}: no XDP program of ours"
