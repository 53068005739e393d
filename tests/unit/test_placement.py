# SPDX-License-Identifier: Apache-2.0
"""Which interface a guest goes to."""

from __future__ import annotations

import pytest

from xdpvhost.config import check_ifaces, format_guest, parse_guest
from xdpvhost.errors import ConfigError
from xdpvhost.placement import check, choose

MAC = "52:54:00:00:00:01"
ANYWHERE = parse_guest(f"name=vm1,mac={MAC}")
ON_B = parse_guest(f"name=vm2,mac={MAC},iface=b")


@pytest.mark.parametrize(
    ("guests", "usable", "index"),
    [
        ([0, 0, 0], [True, True, True], 0),
        ([1, 0, 0], [True, True, True], 1),
        ([2, 1, 1], [True, True, True], 1),
        ([2, 1, 0], [True, True, False], 1),
        ([5, 0, 0], [True, False, False], 0),
        ([1, 0, 0], [False, False, False], 1),
    ],
)
def test_the_one_with_the_fewest_guests(guests: list[int], usable: list[bool], index: int) -> None:
    assert choose(ANYWHERE, ["a", "b", "c"], guests, usable) == index


def test_what_the_spec_says() -> None:
    assert choose(ON_B, ["a", "b"], [0, 9], [True, False]) == 1
    with pytest.raises(ConfigError, match=r"guest 'vm2': iface=b is not served here, but a; .* --iface b"):
        check(ON_B, ["a"])


def test_the_key_is_kept() -> None:
    assert ON_B.iface == "b"
    assert parse_guest(format_guest(ON_B)) == ON_B
    assert "iface" not in format_guest(ANYWHERE)
    with pytest.raises(ConfigError, match="unknown key 'iface' in mode tap"):
        parse_guest(f"name=vm2,mac={MAC},iface=b", mode="tap")


def test_interfaces_of_a_daemon() -> None:
    assert check_ifaces(["a", "b"], "xdp") == ("a", "b")
    assert check_ifaces(["a"], "tap") == ("a",)
    with pytest.raises(ConfigError, match="--iface b: mode vf serves one interface"):
        check_ifaces(["a", "b"], "vf")
    with pytest.raises(ConfigError, match="--iface a: is given twice"):
        check_ifaces(["a", "b", "a"], "xdp")
