# SPDX-License-Identifier: Apache-2.0
"""What a host port is called, and which address it has."""

from __future__ import annotations

import pytest

from xdpvhost.config import HOST_PORT_LABEL, HOST_PORT_OF_EACH, check_host_port, check_options, parse_guest
from xdpvhost.errors import ConfigError
from xdpvhost.hostport import address_for, name_for


@pytest.mark.parametrize(
    ("nic", "port"),
    [
        ("00:1b:21:00:00:01", "02:1b:21:00:00:01"),
        ("52:54:00:00:00:01", "12:54:00:00:00:01"),
        ("02:42:ac:11:00:02", "42:42:ac:11:00:02"),
    ],
)
def test_the_address_is_made_of_the_nics(nic: str, port: str) -> None:
    assert address_for(bytes.fromhex(nic.replace(":", ""))).hex(":") == port


def test_interfaces_with_one_address_have_ports_with_different_ones() -> None:
    nic = bytes.fromhex("001b21ffffff")
    first = address_for(nic)
    second = address_for(nic, [first])
    third = address_for(nic, [first, second])
    assert [mac.hex(":") for mac in (first, second, third)] == [
        "02:1b:21:ff:ff:ff",
        "02:1b:21:00:00:00",
        "02:1b:21:00:00:01",
    ]


@pytest.mark.parametrize(
    ("wanted", "iface", "name"),
    [
        (HOST_PORT_OF_EACH, "eth0", "xvh-eth0"),
        (HOST_PORT_OF_EACH, "enp129s0f0", "xvh-enp129s0f0"),
        (HOST_PORT_OF_EACH, "enp129s0f0np0", "xvh-7"),
        ("mine", "eth0", "mine"),
    ],
)
def test_the_name(wanted: str, iface: str, name: str) -> None:
    assert name_for(wanted, iface, 7) == name


def test_what_is_refused() -> None:
    assert check_host_port(None, ["a"]) is None
    assert check_host_port("mine", ["a"]) == "mine"
    assert check_host_port(HOST_PORT_OF_EACH, ["a", "b"]) == HOST_PORT_OF_EACH
    for name in ("", "a/b", "sixteen-letters-", "..", "all"):
        with pytest.raises(ConfigError, match=r"--host-port .*: is no name for an interface"):
            check_host_port(name, ["a"])
    with pytest.raises(ConfigError, match="--host-port mine: each of 2 interfaces has its own"):
        check_host_port("mine", ["a", "b"])
    check_options("tap", "vhost-user", ["host_port"])
    with pytest.raises(ConfigError, match="--host-port: means nothing in mode tap"):
        check_options("tap", "qemu", ["host_port"])


def test_no_guest_can_be_taken_for_it() -> None:
    with pytest.raises(ConfigError, match="is not a guest name"):
        parse_guest(f"name={HOST_PORT_LABEL},mac=52:54:00:00:00:01")
