# SPDX-License-Identifier: Apache-2.0
"""Guest SPECs and options: what is taken, what is refused, and that a refusal names its cause."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpvhost.config import (
    GuestSpec,
    MetricsAddress,
    check_new_guest,
    check_run_dir,
    format_guest,
    format_mac,
    parse_guest,
    parse_guests,
    parse_metrics,
)
from xdpvhost.errors import ConfigError

RUN = Path("/run/xdpvhost")
MAC = "52:54:00:00:00:01"


def test_a_short_spec_gets_the_defaults() -> None:
    assert parse_guest(f"name=vm1,mac={MAC}") == GuestSpec(
        "vm1", bytes.fromhex("525400000001"), 1, Path("/run/xdpvhost/vm1.sock"), "server"
    )


def test_a_full_spec() -> None:
    spec = parse_guest("name=a.b_c-D9,mac=52-54-00-AB-CD-EF,queues=4,socket=/tmp/x.sock,socket-mode=client", RUN)
    assert spec == GuestSpec("a.b_c-D9", bytes.fromhex("525400abcdef"), 4, Path("/tmp/x.sock"), "client")


def test_the_default_socket_lies_in_the_run_directory(tmp_path: Path) -> None:
    assert parse_guest(f"name=vm1,mac={MAC}", tmp_path).socket == tmp_path / "vm1.sock"


def test_a_relative_socket_is_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_guest(f"name=vm1,mac={MAC},socket=x.sock").socket == tmp_path / "x.sock"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", ["not key=value", "name=NAME"]),
        ("vm1", ["'vm1' is not key=value"]),
        ("name=vm1", ["'mac' is missing"]),
        (f"mac={MAC}", ["'name' is missing"]),
        (f"name=vm1,mac={MAC},", ["'' is not key=value"]),
        (f"name=vm1,mac={MAC},vlans=3", ["unknown key 'vlans'", "queues, socket, socket-mode"]),
        (f"Name=vm1,mac={MAC}", ["unknown key 'Name'"]),
        (f"name=vm1,name=vm2,mac={MAC}", ["'name' is given twice"]),
        (f"name=,mac={MAC}", ["'name' has no value"]),
        (f"name=vm1,mac={MAC},queues=", ["'queues' has no value"]),
        (f"name=a b,mac={MAC}", ["name=a b", "letters, digits"]),
        (f"name=a/b,mac={MAC}", ["name=a/b"]),
        (f"name=..,mac={MAC}", ["name=.."]),
        (f"name={'x' * 33},mac={MAC}", ["1 to 32"]),
        (f"name=näme,mac={MAC}", ["name=näme"]),
        (f"name=api,mac={MAC}", ["name=api", "api.sock"]),
        ("name=vm1,mac=52:54:00:00:00", ["malformed", "six"]),
        ("name=vm1,mac=52:54:00:00:00:0g", ["malformed"]),
        ("name=vm1,mac=52:54:00:00:00:01:02", ["malformed"]),
        ("name=vm1,mac=52:54-00:00:00:01", ["malformed"]),
        ("name=vm1,mac=525400000001", ["malformed"]),
        ("name=vm1,mac=00:00:00:00:00:00", ["all zero"]),
        ("name=vm1,mac=01:00:5e:00:00:01", ["multicast"]),
        ("name=vm1,mac=ff:ff:ff:ff:ff:ff", ["multicast"]),
        (f"name=vm1,mac={MAC},queues=0", ["queues=0", "1 to 128"]),
        (f"name=vm1,mac={MAC},queues=129", ["queues=129"]),
        (f"name=vm1,mac={MAC},queues=-1", ["queues=-1"]),
        (f"name=vm1,mac={MAC},queues=two", ["queues=two"]),
        (f"name=vm1,mac={MAC},queues=²", ["queues=²"]),
        (f"name=vm1,mac={MAC},queues={'9' * 5000}", ["1 to 128"]),
        (f"name=vm1,mac={MAC},queues=000000001999", ["1 to 128"]),
        (f"name=vm1,mac={MAC},queues={'0' * 5000}1", ["1 to 128"]),
        (f"name=vm1,mac={MAC},socket-mode=both", ["socket-mode=both", "server or client"]),
        (f"name=vm1,mac={MAC},socket=/{'s' * 107}", ["108 bytes", "107", "--run-dir"]),
        (f"name=vm1,mac={MAC},socket=/tmp/\0x", ["unprintable"]),
    ],
)
def test_a_bad_spec_is_refused_and_says_why(spec: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_guest(spec)
    for word in words:
        assert word in str(caught.value)


def test_a_socket_path_is_measured_in_bytes() -> None:
    assert parse_guest(f"name=vm1,mac={MAC},socket=/{'s' * 106}").socket == Path("/" + "s" * 106)
    with pytest.raises(ConfigError, match="109 bytes"):
        parse_guest(f"name=vm1,mac={MAC},socket=/{'ö' * 54}")


def test_a_long_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--run-dir"):
        check_run_dir(tmp_path / ("d" * 100))


@pytest.mark.parametrize(
    ("second", "word"),
    [
        ("name=vm1,mac=52:54:00:00:00:02", "name is in use"),
        ("name=vm2,mac=52:54:00:00:00:01", "taken by guest 'vm1'"),
        ("name=vm2,mac=52-54-00-00-00-01", "taken by guest 'vm1'"),
        ("name=vm2,mac=52:54:00:00:00:02,socket=/run/xdpvhost/vm1.sock", "in use by guest 'vm1'"),
    ],
)
def test_two_guests_share_nothing(second: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_guests([f"name=vm1,mac={MAC}", second], RUN)


def test_an_unlike_guest_is_welcome() -> None:
    first = parse_guest(f"name=vm1,mac={MAC}")
    check_new_guest(parse_guest("name=vm2,mac=52:54:00:00:00:02"), [first])


def test_too_many_guests() -> None:
    specs = [f"name=vm{i},mac=52:54:00:00:{i >> 8:02x}:{i & 255:02x}" for i in range(513)]
    assert len(parse_guests(specs[:512], RUN)) == 512
    with pytest.raises(ConfigError, match="513 guests"):
        parse_guests(specs, RUN)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("none", None),
        ("127.0.0.1:9477", MetricsAddress("127.0.0.1", 9477)),
        ("localhost:0", MetricsAddress("localhost", 0)),
        ("[::1]:9477", MetricsAddress("::1", 9477)),
    ],
)
def test_metrics_addresses(text: str, address: MetricsAddress | None) -> None:
    assert parse_metrics(text) == address
    assert address is None or str(address) == text


@pytest.mark.parametrize(
    "text", ["", "9477", ":9477", "host:", "host:x", "host:65536", "::1:9477", "host:-1", "h:²", "h:00000000099999"]
)
def test_bad_metrics_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="--metrics"):
        parse_metrics(text)


names = st.from_regex(r"[A-Za-z0-9_.-]{1,32}", fullmatch=True).filter(lambda name: name not in (".", "..", "api"))
macs = st.binary(min_size=6, max_size=6).map(lambda mac: bytes([mac[0] & 0xFE]) + mac[1:]).filter(any)


@given(names, macs, st.integers(1, 128), st.sampled_from(["server", "client"]))
def test_what_is_formatted_parses_back(name: str, mac: bytes, queues: int, mode: str) -> None:
    spec = parse_guest(f"name={name},mac={format_mac(mac)},queues={queues},socket-mode={mode}", RUN)
    assert (spec.name, spec.mac, spec.queues, spec.socket_mode) == (name, mac, queues, mode)
    assert parse_guest(format_guest(spec), Path("/elsewhere")) == spec


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with suppress(ConfigError):
        parse_guest(text)


def test_mac_change() -> None:
    assert parse_guest(f"name=vm1,mac={MAC}").mac_change == "deny"
    spec = parse_guest(f"name=vm1,mac={MAC},mac-change=allow")
    assert spec.mac_change == "allow"
    assert parse_guest(format_guest(spec)) == spec
    with pytest.raises(ConfigError, match="mac-change=maybe is unknown; use deny or allow"):
        parse_guest(f"name=vm1,mac={MAC},mac-change=maybe")
