# SPDX-License-Identifier: Apache-2.0
"""A missing capability is named."""

from __future__ import annotations

import pytest

from xdpvhost import privileges
from xdpvhost.errors import PrivilegeError

ALL = frozenset(privileges.CAPABILITIES)


@pytest.mark.parametrize(
    ("have", "named"),
    [
        (ALL - {"CAP_NET_ADMIN"}, "lacks CAP_NET_ADMIN;"),
        (ALL - {"CAP_NET_RAW"}, "lacks CAP_NET_RAW;"),
        (ALL - {"CAP_BPF", "CAP_SYS_ADMIN"}, "lacks CAP_BPF or CAP_SYS_ADMIN;"),
        (ALL - {"CAP_PERFMON", "CAP_SYS_ADMIN"}, "lacks CAP_PERFMON or CAP_SYS_ADMIN;"),
        (frozenset(), "lacks CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF or CAP_SYS_ADMIN, CAP_PERFMON or CAP_SYS_ADMIN;"),
    ],
)
def test_what_is_missing_is_named(have: frozenset[str], named: str) -> None:
    with pytest.raises(PrivilegeError, match=named):
        privileges.require("up", privileges.UP, have)


@pytest.mark.parametrize("have", [ALL, ALL - {"CAP_BPF", "CAP_PERFMON"}, ALL - {"CAP_SYS_ADMIN"}])
def test_either_of_two_is_enough(have: frozenset[str]) -> None:
    privileges.require("up", privileges.UP, have)


def test_undoing_takes_more() -> None:
    """A program that another process loaded is only to be had with CAP_SYS_ADMIN."""
    with pytest.raises(PrivilegeError, match="`xdpvhost clean` lacks CAP_SYS_ADMIN;"):
        privileges.require("clean", privileges.CLEAN, ALL - {"CAP_SYS_ADMIN"})


def test_the_effective_set_has_only_known_names() -> None:
    assert privileges.effective() <= ALL
