# SPDX-License-Identifier: Apache-2.0
"""rtnetlink requests whose refusal is one of our errors, and the devices that are ours.

A device that we make is told from all others by its alias, `xdpvhost IFACE TOKEN`: the token is random and was
announced in the journal before. A name alone is nobody's proof: the device that had it may be gone, and another one
have it by now. Until a device has its alias it has a name as random as the token.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ..errors import NicError, PrivilegeError
from .netlink import outside_loop

T = TypeVar("T")

MAX_NAME = 15  # IFNAMSIZ with its NUL is 16


def request(what: str, function: Callable[[IPRoute], T]) -> T:
    """Call `function` with an open socket. `what` opens the message of a NicError or PrivilegeError."""

    def call() -> T:
        with IPRoute() as ip:
            return function(ip)

    try:
        return outside_loop(call)
    except NetlinkError as exc:
        if exc.code in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(f"{what}: run as root, or with CAP_NET_ADMIN") from exc
        raise NicError(f"{what}: {os.strerror(exc.code)}{_kernel_says(exc)}") from exc


def _kernel_says(exc: NetlinkError) -> str:
    """The extended acknowledgement's text, if there is one."""
    text = str(exc.args[1]) if len(exc.args) > 1 else ""
    return f" ({text})" if text and text != os.strerror(exc.code) else ""


@dataclass(frozen=True)
class Identity:
    """How a device of ours is known: see above. `index` is 0 until it is made."""

    token: str
    temporary: str
    index: int = 0

    @classmethod
    def new(cls, iface: str) -> Identity:
        return cls(f"xdpvhost {iface} {secrets.token_hex(8)}", f"xv{secrets.token_hex(6)}")

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Identity:
        """Out of a journal entry's args."""
        return cls(str(args["token"]), str(args["temporary"]), int(args.get("index", 0)))

    @property
    def args(self) -> dict[str, Any]:
        return {"token": self.token, "temporary": self.temporary}


class _Look(threading.local):
    """What one thread has seen: see one_look()."""

    by_index: dict[int, Any] | None = None
    memory: dict[str, Any] | None = None


_look = _Look()


@contextmanager
def one_look() -> Iterator[None]:
    """Inside, this thread's questions about devices are answered by one look at all: for who asks about many."""
    messages = request("network devices", lambda ip: list(ip.get_links()))
    _look.by_index, _look.memory = {message["index"]: message for message in messages}, {}
    try:
        yield
    finally:
        _look.by_index = _look.memory = None


def once(key: str, function: Callable[[], T]) -> T:
    """What `function` answers; inside one_look() it is asked once."""
    if _look.memory is None:
        return function()
    if key not in _look.memory:
        _look.memory[key] = function()
    found: T = _look.memory[key]
    return found


def link_message(index: int) -> Any | None:
    """One device's message; None when there is none."""
    if _look.by_index is not None:
        return _look.by_index.get(index)
    try:
        return request(f"interface {index}", lambda ip: ip.link("get", index=index)[0])
    except NicError as exc:
        if isinstance(exc.__cause__, NetlinkError) and exc.__cause__.code == errno.ENODEV:
            return None
        raise


def index_of(name: str) -> int | None:
    """None when no device has that name."""
    if _look.by_index is not None:
        named = (index for index, message in _look.by_index.items() if message.get_attr("IFLA_IFNAME") == name)
        return next(named, None)
    return request(f"interface {name}", lambda ip: next(iter(ip.link_lookup(ifname=name)), None))


def find(identity: Identity) -> int | None:
    """The index of a device of ours; None when it isn't there."""
    if identity.index:
        message = link_message(identity.index)
        if message is not None and message.get_attr("IFLA_IFALIAS") == identity.token:
            return identity.index
    return index_of(identity.temporary)


def refuse_taken(name: str, what: str, remedy: str) -> None:
    """Raise NicError when some device has that name."""
    if index_of(name) is not None:
        raise NicError(f"{what}: there is an interface {name} already, which isn't ours; {remedy}")


def delete(identity: Identity, what: str) -> bool:
    """Delete a device of ours; False when it isn't there."""
    index = find(identity)
    if index is None:
        return False
    request(f"{what}: cannot be deleted", lambda ip: ip.link("del", index=index))
    return True


def change(index: int, what: str, **attributes: Any) -> None:
    """Set a device's attributes, as pyroute2's `link("set")` takes them."""
    request(what, lambda ip: ip.link("set", index=index, **attributes))


def create(
    identity: Identity, announce: Callable[[int], None], name: str, kind: str, what: str, **attributes: Any
) -> int:
    """Make a device of `kind`, `announce` its index, give it its alias, then its name. Returns the index.

    Whoever announced `identity` deletes it when this fails.
    """
    try:
        request(
            f"{what}: cannot be made",
            lambda ip: ip.link("add", ifname=identity.temporary, kind=kind, **attributes),
        )
    except NicError as exc:
        if isinstance(exc.__cause__, NetlinkError) and exc.__cause__.code == errno.EOPNOTSUPP:
            raise NicError(
                f"{what}: cannot be made: the kernel's module {kind} is not loaded, or this kernel has none; "
                f"`modprobe {kind}` (CONFIG_{kind.upper()})"
            ) from exc
        raise
    index = index_of(identity.temporary)
    if index is None:
        raise NicError(f"{what}: it was deleted as soon as it was made; try again")
    announce(index)
    change(index, f"{what}: cannot have an alias", ifalias=identity.token)
    change(index, f"{what}: cannot be named so", ifname=name)
    return index


def no_ipv6(name: str) -> None:
    """Frames pass through it; it isn't an IPv6 host of its own. Nothing where the kernel has no IPv6."""
    with suppress(FileNotFoundError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
