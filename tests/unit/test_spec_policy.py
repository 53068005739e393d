# SPDX-License-Identifier: Apache-2.0
"""The SPEC keys of a guest's pool and policy: what they mean, what is refused and why, and that they come back."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpvhost import datapath, policy
from xdpvhost.config import (
    GuestSpec,
    change_guest,
    format_guest,
    parse_changes,
    parse_guest,
    parse_guests,
)
from xdpvhost.errors import ConfigError
from xdpvhost.policy import Bucket, Policy
from xdpvhost.spec_policy import LEAST_BURST, check_mtu

MAC, MAC2, MAC3 = (f"52:54:00:00:00:0{i}" for i in (1, 2, 3))
BASE = f"name=vm1,mac={MAC}"


def guest(keys: str = "", base: str = BASE) -> GuestSpec:
    return parse_guest(f"{base},{keys}" if keys else base)


def test_a_short_spec_is_strict_and_transparent() -> None:
    port = guest().port
    assert port.policy == Policy(spoof_check=True)
    assert port.macs == (bytes.fromhex("525400000001"),)


def test_every_key() -> None:
    port = guest(
        f"macs={MAC2}+{MAC3},trunk=10+20+30-33,learn=8,isolated=on,address=192.0.2.1+2001:db8::1,storm=100,"
        "storm-burst=10,tx-rate=100M,tx-burst=64K,rx-rate=1G,rx-burst=2M,link=off"
    ).port
    assert [mac.hex(":") for mac in port.macs] == [MAC, MAC2, MAC3]
    assert port.policy == Policy(
        trunk=frozenset((10, 20, 30, 31, 32, 33)),
        addresses=(ip_address("192.0.2.1"), ip_address("2001:db8::1")),
        spoof_check=True,
        isolated=True,
        link_down=True,
        learn=8,
        tx=Bucket(12_500_000, 65536),
        rx=Bucket(125_000_000, 2 << 20),
        storm=Bucket(100, 10),
    )


@pytest.mark.parametrize(
    ("keys", "bucket"),
    [
        ("tx-rate=0", Bucket()),
        ("tx-rate=1M", Bucket(125_000, LEAST_BURST)),
        ("tx-rate=1000K", Bucket(125_000, LEAST_BURST)),
        ("tx-rate=1G", Bucket(125_000_000, 1_250_000)),
        ("tx-rate=1000001", Bucket(125_001, LEAST_BURST)),
        ("tx-rate=8000,tx-burst=9018", Bucket(1000, 9018)),
    ],
)
def test_rates_are_bits_and_bursts_are_bytes(keys: str, bucket: Bucket) -> None:
    assert guest(keys).port.policy.tx == bucket


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("vlan=0", ["vlan=0 is no VLAN", "1 to 4094", "leave it out"]),
        ("vlan=4095", ["vlan=4095"]),
        ("vlan=x", ["vlan=x"]),
        ("vlan=²", ["vlan=²"]),
        ("trunk=0", ["trunk=0: 0 is not within 1 to 4094"]),
        ("trunk=10+4095", ["4095 is not within"]),
        ("trunk=4000-4095", ["4000-4095 is not within"]),
        ("trunk=20-10", ["runs backwards", "write 10-20"]),
        ("trunk=10,20", ["'20' is not key=value"]),
        ("trunk=10+", ["'' is no VLAN"]),
        ("vlan=5,trunk=10+20", ["vlan=5 makes it an access port", "leave one of them out"]),
        (f"macs={MAC2}+{MAC2}", ["macs=", "is there twice"]),
        (f"macs={MAC2}+{MAC}", ["which is its mac= already"]),
        ("macs=01:00:5e:00:00:01", ["multicast"]),
        ("macs=1", ["malformed"]),
        ("macs=" + "+".join(f"52:54:00:00:01:{i:02x}" for i in range(64)), ["64 addresses", "64 with its mac="]),
        ("spoof-check=maybe", ["spoof-check=maybe is unknown; use on or off"]),
        ("learn=1025", ["learn=1025 is not a number from 0 to 1024"]),
        ("learn=4,spoof-check=off", ["learn=4 with spoof-check=off"]),
        ("isolated=1", ["isolated=1 is unknown"]),
        ("address=10.0.0.1+10.0.0.1", ["is there twice"]),
        ("address=2001:db8::1+2001:DB8:0::0:1", ["2001:db8::1 is there twice"]),
        ("address=224.0.0.1", ["no address that can be routed"]),
        ("address=255.255.255.255", ["no address that can be routed"]),
        ("address=240.0.0.1", ["no address that can be routed"]),
        ("address=0.1.2.3", ["no address that can be routed"]),
        ("address=10.0.0.1+::ffff:10.0.0.1", ["IPv4 address in IPv6 notation; write 10.0.0.1"]),
        ("address=2001:db8::1%eth0", ["2001:db8::1%eth0 has a scope"]),
        ("vlan=0000000004095", ["is no VLAN"]),
        (f"vlan={'0' * 5000}1", ["is no VLAN"]),
        ("storm=0000000000001000000001", ["is not a number"]),
        ("learn=0000000000000000001025", ["is not a number"]),
        ("address=vm", ["'vm' is no IP address"]),
        ("address=" + "+".join(f"10.0.0.{n}" for n in range(1, 66)), ["65 addresses", "64"]),
        ("storm=-1", ["storm=-1 is not a number"]),
        ("storm-burst=5", ["storm-burst= without storm="]),
        ("tx-rate=fast", ["tx-rate=fast is no rate", "500k, 100M"]),
        ("tx-rate=1T", ["tx-rate=1T is no rate"]),
        ("tx-rate=1001G", ["up to 1000G"]),
        ("tx-rate=511", ["tx-rate=511 is below one frame of 64 bytes a second", "512 or more"]),
        ("rx-rate=1M,rx-burst=63", ["rx-burst=63 is below one frame of 64 bytes"]),
        ("rx-burst=64K", ["rx-burst= without rx-rate="]),
        ("rx-rate=1M,rx-burst=1G", ["rx-burst=1G is no size"]),
        ("link=up", ["link=up is unknown"]),
    ],
)
def test_a_bad_value_is_refused_and_says_why(keys: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        guest(keys)
    assert "guest " in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "mtu", "word"),
    [
        ("tx-rate=1M,tx-burst=1517", 1500, "tx-burst=1517 is below one frame of 1518 bytes"),
        ("rx-rate=12143", 1500, "rx-rate=12143 is below one frame of 1518 bytes a second; give it 12144"),
        ("rx-rate=1M,rx-burst=8K", 9000, "rx-burst=8K is below one frame of 9018 bytes"),
    ],
)
def test_limits_are_measured_by_the_mtu(keys: str, mtu: int, word: str) -> None:
    spec = guest(keys)
    with pytest.raises(ConfigError, match=word):
        check_mtu(spec, mtu)
    check_mtu(spec, 1400 if mtu == 1500 else 1500)


def test_limits_that_stay_are_not_measured_again() -> None:
    """The MTU has grown; the guest's link can be taken down all the same."""
    before = guest("tx-rate=1M,tx-burst=1600,vlan=10")
    for changes in ({"link": "off"}, {"vlan": "20", "storm": "5"}, {"tx-rate": "1000k"}):
        check_mtu(change_guest(before, changes), 9000, before)
    for changes in ({"tx-rate": "2M"}, {"tx-burst": "1700"}, {"rx-rate": "1000"}):
        with pytest.raises(ConfigError, match="below one frame of 9018 bytes"):
            check_mtu(change_guest(before, changes), 9000, before)
    with pytest.raises(ConfigError, match="below one frame of 9018 bytes: each frame would have to wait"):
        check_mtu(before, 9000)


def test_the_default_burst_passes_any_frame() -> None:
    check_mtu(guest("tx-rate=1M,rx-rate=1M"), 65535)
    assert guest("tx-rate=1M").port.policy.tx.burst >= 65535 + 18


@pytest.mark.parametrize(
    ("one", "two", "together"),
    [
        ("", "", False),
        ("vlan=10", "vlan=20", True),
        ("vlan=10", "vlan=10", False),
        ("vlan=10", "", False),
        ("", "trunk=10-20", False),
        ("trunk=10-20", "trunk=20-30", False),
        ("trunk=10-19", "trunk=20-30", True),
        ("trunk=10-19", "vlan=20", True),
        ("trunk=10-20", "vlan=20", False),
    ],
)
def test_pools_may_not_intersect(one: str, two: str, together: bool) -> None:
    """The second has the first's MAC, as one of its others."""
    specs = [f"{BASE},{one}".rstrip(","), f"name=vm2,mac={MAC2},macs={MAC3}+{MAC},{two}".rstrip(",")]
    if together:
        assert len(parse_guests(specs, Path("/run"))) == 2
        return
    with pytest.raises(ConfigError) as caught:
        parse_guests(specs, Path("/run"))
    assert f"guest 'vm2': macs={MAC} is taken by guest 'vm1'" in str(caught.value)
    if one or two:
        assert "which is in " in str(caught.value)


def test_an_unreadable_key_is_not_hidden_by_another_mode() -> None:
    for mode in ("xdp", "tap"):
        with pytest.raises(ConfigError, match="vlan=0 is no VLAN"):
            parse_guest(f"{BASE},vlan=0", mode=mode)


def test_one_notation() -> None:
    """What means the same is the same wish."""
    assert guest("link=on,spoof-check=on,learn=0,tx-rate=0") == guest()
    assert guest("trunk=3+1+2,tx-rate=1000k") == guest("tx-rate=1M,trunk=1-3")
    assert format_guest(guest("trunk=3+1+2+9,tx-rate=1000k,tx-burst=65536")).endswith(
        ",trunk=1-3+9,tx-rate=1M,tx-burst=64K"
    )


switches = st.sampled_from(["on", "off"])
spec_keys = st.fixed_dictionaries(
    {},
    optional={
        "macs": st.sets(st.integers(2, 99), min_size=1, max_size=5).map(
            lambda numbers: "+".join(f"52:54:00:00:00:{n:02d}" for n in sorted(numbers))
        ),
        "vlan": st.integers(1, 4094).map(str),
        "trunk": st.sets(st.integers(1, 4094), min_size=1).map(lambda vlans: "+".join(map(str, vlans))),
        "spoof-check": switches,
        "learn": st.integers(0, 1024).map(str),
        "isolated": switches,
        "address": st.ip_addresses().map(str),
        "storm": st.integers(0, 10**6).map(str),
        "tx-rate": st.integers(512, 10**12).map(str),
        "rx-rate": st.integers(1, 1000).map(lambda n: f"{n}M"),
        "rx-burst": st.integers(64, 1 << 30).map(str),
        "link": switches,
    },
)


@given(spec_keys)
def test_what_is_formatted_parses_back(keys: dict[str, str]) -> None:
    text = ",".join((BASE, *(f"{key}={value}" for key, value in keys.items())))
    try:
        spec = parse_guest(text)
    except ConfigError:
        return
    assert parse_guest(format_guest(spec), Path("/elsewhere")) == spec
    assert parse_guest(format_guest(spec)).port == spec.port


# ---- guest set


def test_changes_are_read_in_any_grouping() -> None:
    wanted = {"vlan": "", "trunk": "1+2", "link": "off"}
    assert parse_changes("vm1", ["vlan=,trunk=1+2", "link=off"]) == wanted
    with pytest.raises(ConfigError, match="'vlan' is not key=value; to take a key out, write vlan="):
        parse_changes("vm1", ["vlan"])
    with pytest.raises(ConfigError, match="given twice"):
        parse_changes("vm1", ["vlan=1", "vlan=2"])


def test_a_change_is_a_spec_of_its_own() -> None:
    before = guest("vlan=10,tx-rate=1M")
    after = change_guest(before, {"vlan": "", "trunk": "10-12", "mac-change": "allow"})
    assert after == guest("trunk=10-12,tx-rate=1M,mac-change=allow")
    assert change_guest(after, {"trunk": "", "vlan": "10", "mac-change": ""}) == before


@pytest.mark.parametrize("key", ["name", "mac", "queues", "socket", "socket-mode", "iface"])
def test_what_a_guest_keeps(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'vm1': {key}= can't be changed .* `xdpvhost guest rm vm1`"):
        change_guest(guest(), {key: "x"})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"vlna": "1"}, "unknown key 'vlna'; those that can be changed are mac-change, macs, vlan"),
        ({"vlan": "1"}, "leave one of them out"),
        ({"learn": "9", "spoof-check": "off"}, "learn=9 with spoof-check=off"),
    ],
)
def test_a_change_is_checked_as_a_whole(changes: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        change_guest(guest("trunk=10"), changes)


@pytest.mark.parametrize("key", ["learn", "mac-change", "vlan", "trunk"])
def test_a_value_brings_no_other_key_with_it(key: str) -> None:
    """Over the API a value is any text."""
    for more in ("iface=eth9", "socket=/tmp/x", "name=vm2", ""):
        with pytest.raises(ConfigError, match=f"guest 'vm1': {key}=.* has a comma"):
            change_guest(guest(), {key: f"8,{more}"})


def test_constants_are_the_data_planes() -> None:
    assert policy.MAX_LEARNED == datapath.MAX_LEARNED
