# SPDX-License-Identifier: Apache-2.0
"""How each kind of journal entry is undone, by an orderly shutdown and after a killed daemon alike.

Every handler takes the entry's args, is harmless when the change was never made or is already undone, and returns what
it did in a few words. It raises NicError or OSError when the entry must stay in the journal.

An interface that another xdpvhost serves by now is left alone: its lock is taken while something is undone on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

from ..errors import DaemonError, NicError
from ..rundir import InterfaceLock
from . import addresses, bridge, ethtool, macvtap, ntuple, proxy, sriov, sysctl, tap, vhostnet
from .journal import Undo
from .netlink import Namespace, boot_id, get_link, link_name, set_up

GONE = "the interface is gone"

Beside = Callable[[str | None, Mapping[str, Any]], str]


def handlers(held: Collection[int] = ()) -> dict[str, Undo]:
    """`held`: the indices of the interfaces whose locks the caller has."""
    # Changes to an interface, which are gone when it is. The handler gets its present name.
    on_it = {"link_up": _link_up, "features": _features, "channels": _channels, "xdp": _xdp, "ntuple": ntuple.undo}
    on_it |= {"addresses": addresses.undo, "mac": macvtap.undo_address} | _of_vfs()
    # Changes to the host for the sake of an interface, which stay when it goes. The handler gets None then.
    beside_it: dict[str, Beside] = {
        "wishes": _wishes,
        "host_port": _host_port,
        "tap": tap.undo,
        "bridge": bridge.undo,
        "port": bridge.undo_port,
        "macvtap": macvtap.undo,
        "node": macvtap.undo_node,
        "proxy": proxy.undo,
        "sysctl": sysctl.undo,
        "vhost_pin": vhostnet.undo_pin,
    }
    kinds = {kind: _or_gone(change) for kind, change in on_it.items()} | beside_it
    return {kind: partial(_undo, held, change) for kind, change in kinds.items()}


def _of_vfs() -> dict[str, Callable[[str, Mapping[str, Any]], str]]:
    return {
        "sriov_numvfs": sriov.undo_count,
        "vf_settings": sriov.undo_settings,
        "vf_driver": sriov.undo_driver,
        "vf_netns": sriov.undo_netns,
    }


def _or_gone(change: Callable[[str, Mapping[str, Any]], str]) -> Beside:
    return lambda iface, args: GONE if iface is None else change(iface, args)


def _undo(held: Collection[int], change: Beside, args: Mapping[str, Any]) -> str:
    if args.get("boot_id", boot_id()) != boot_id():
        return f"interface {args['iface']}: the machine was booted since"
    if not _namespace_is_ours(args):
        return GONE
    iface = link_name(int(args["ifindex"]))
    if iface is None:
        return change(None, args)
    try:
        mine = int(args["ifindex"]) in held
        lock = None if mine else InterfaceLock(iface, "`xdpvhost clean` can undo it afterwards")
    except DaemonError as exc:
        raise NicError(str(exc)) from exc
    with closing(lock) if lock else nullcontext():
        return change(iface, args)


def _namespace_is_ours(args: Mapping[str, Any]) -> bool:
    """False when the network namespace of the entry's device is gone, and all in it.

    Raises NicError when it is another one than ours.
    """
    recorded = Namespace(int(args["netns_cookie"]), int(args["netns_inode"]))
    if recorded != Namespace.current():
        if not recorded.exists():
            return False
        raise NicError(
            f"interface {args['iface']}: it is in another network namespace (inode {recorded.inode}): "
            "run `xdpvhost clean` there"
        )
    return True


def _wishes(_iface: str | None, args: Mapping[str, Any]) -> str:
    return f"interface {args['iface']}: was up in mode {args['wishes']['mode']}"


def _host_port(_iface: str | None, args: Mapping[str, Any]) -> str:
    return f"interface {args['iface']}: its host port {args['tap']} went with its daemon"


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
    from ..xdp.program import detach_leftover  # here, so that modes without XDP do without its libraries

    if detach_leftover(int(args["ifindex"]), args.get("program_id")):
        return f"interface {iface}: XDP program detached"
    return f"interface {iface}: no XDP program of ours"
