# SPDX-License-Identifier: Apache-2.0
"""QEMU arguments, against golden files."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from support.golden import check_golden
from xdpvhost.config import parse_guest
from xdpvhost.errors import ConfigError
from xdpvhost.qemu import OLDEST, Version, arguments, check_memory, installed_version, parse_version, shell


@pytest.mark.parametrize(
    ("golden", "spec", "memory", "version"),
    [
        ("qemu-server.txt", "name=vm1,mac=52:54:00:00:00:01", "1G", (7, 2)),
        ("qemu-server-10.txt", "name=vm1,mac=52:54:00:00:00:01", "1G", (10, 0)),
        ("qemu-multiqueue.txt", "name=vm-4,mac=52:54:00:00:00:04,queues=4", "4G", (10, 0)),
        ("qemu-client.txt", "name=vm2,mac=52:54:00:00:00:02,socket=/tmp/vm2.sock,socket-mode=client", "512M", (10, 0)),
        ("qemu-quoted.txt", "name=vm3,mac=52:54:00:00:00:03,socket=/tmp/my vm's.sock", "1G", (10, 0)),
    ],
)
def test_arguments(golden: str, spec: str, memory: str, version: Version) -> None:
    check_golden(golden, shell(arguments(parse_guest(spec), memory, version)) + "\n")


@pytest.mark.parametrize(("text", "version"), [("7.2", (7, 2)), ("10.0.2", (10, 0)), ("9.2.90", (9, 2))])
def test_versions(text: str, version: Version) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "10", "ten.two", "10.0-rc1", "10."])
def test_bad_versions(text: str) -> None:
    with pytest.raises(ConfigError, match="--qemu-version"):
        parse_version(text)


@pytest.mark.parametrize("size", ["", "1", "0G", "1g", "-1G", "1.5G", "1GB"])
def test_bad_memory(size: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        check_memory(size)


@pytest.mark.parametrize(
    ("answer", "version"),
    [("QEMU emulator version 10.0.2 (Debian 1:10.0.2)", (10, 0)), ("something else", OLDEST)],
)
def test_the_installed_version_is_asked(tmp_path: Path, answer: str, version: Version) -> None:
    binary = tmp_path / "qemu"
    binary.write_text(f"#!/bin/sh\necho '{answer}'\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    assert installed_version(str(binary)) == version


def test_no_qemu_means_the_oldest() -> None:
    assert installed_version("no-such-qemu-here") == OLDEST
