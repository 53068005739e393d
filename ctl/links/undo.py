# SPDX-License-Identifier: Apache-2.0
"""How each kind of journal entry is undone, by an orderly shutdown and after a killed daemon alike.

Every handler takes the entry's args, is harmless when the change was never made or is already undone, and returns what
it did in a few words. It raises NicError or OSError when the entry must stay in the journal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import NicError
from ..xdp.program import detach_leftover
from . import ethtool
from .journal import Undo
from .netlink import Namespace, get_link, link_name, set_up

GONE = "the interface is gone"


def handlers() -> dict[str, Undo]:
    return {"link_up": _link_up, "features": _features, "channels": _channels, "xdp": _xdp}


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


def _link_up(args: Mapping[str, Any]) -> str:
    iface = _interface(args)
    if iface is None:
        return GONE
    set_up(int(args["ifindex"]), False)
    return f"interface {iface}: set down"


def _features(args: Mapping[str, Any]) -> str:
    iface = _interface(args)
    if iface is None:
        return GONE
    now = ethtool.features(iface)
    before: Mapping[str, bool] = args["before"]
    wrong = {n: v for n, v in before.items() if n in now and now[n].changeable and now[n].active != v}
    if not wrong:
        return f"interface {iface}: features as before"
    ethtool.set_features(iface, wrong)
    return f"interface {iface}: " + ", ".join(f"{name} {'on' if value else 'off'}" for name, value in wrong.items())


def _channels(args: Mapping[str, Any]) -> str:
    iface = _interface(args)
    if iface is None:
        return GONE
    wanted = int(args["rx"]), int(args["tx"]), int(args["combined"])
    now = ethtool.channels(get_link(iface))
    if now is None or (now.rx, now.tx, now.combined) == wanted:
        return f"interface {iface}: queues as before"
    ethtool.set_channels(iface, *wanted)
    return f"interface {iface}: {wanted[0]} receive, {wanted[1]} transmit, {wanted[2]} combined queues"


def _xdp(args: Mapping[str, Any]) -> str:
    iface = _interface(args)
    if iface is None:
        return GONE
    if detach_leftover(int(args["ifindex"]), args.get("program_id")):
        return f"interface {iface}: XDP program detached"
    return f"interface {iface}: no XDP program of ours"
