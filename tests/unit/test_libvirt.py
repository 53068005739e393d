# SPDX-License-Identifier: Apache-2.0
"""The elements of a libvirt domain, against golden files."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from support.golden import check_golden
from xdpvhost.config import parse_guest
from xdpvhost.libvirt import interface, memory_backing
from xdpvhost.qemu import Device


@pytest.mark.parametrize(
    ("golden", "spec", "device"),
    [
        ("libvirt-server.xml", "name=vm1,mac=52:54:00:00:00:01", Device()),
        ("libvirt-client.xml", "name=vm2,mac=52:54:00:00:00:02,socket=/tmp/vm2.sock,socket-mode=client", Device()),
        ("libvirt-device.xml", "name=vm-4,mac=52:54:00:00:00:04,queues=4", Device(1024, packed=True)),
        ("libvirt-escaped.xml", 'name=vm3,mac=52:54:00:00:00:03,socket=/tmp/<my> "vm\'s" & co.sock', Device()),
    ],
)
def test_interface(golden: str, spec: str, device: Device) -> None:
    parsed = parse_guest(spec)
    text = interface(parsed, device)
    check_golden(golden, text + "\n")
    source = ET.fromstring(text).find("source")
    assert source is not None
    assert source.get("path") == str(parsed.socket)


def test_memory_backing() -> None:
    check_golden("libvirt-memory.xml", memory_backing() + "\n")
