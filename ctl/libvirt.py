# SPDX-License-Identifier: Apache-2.0
"""The elements of a libvirt domain that put a virtual machine on its guest port.

libvirt's `mode` says what QEMU does with the socket, so it is the opposite of the SPEC's. `reconnect` exists for a QEMU
that connects; one that listens is connected to again by xdpvhost. Guest memory must be shared, and memfd is what
`qemu-args` uses, too. libvirt gives the device its interrupt vectors by itself.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from .config import GuestSpec, format_mac
from .qemu import DEFAULT_DEVICE, Device


def memory_backing() -> str:
    """`<memoryBacking>`, a child of `<domain>`: all of the guest's memory in a memfd that back-ends may map."""
    root = ET.Element("memoryBacking")
    ET.SubElement(root, "source", type="memfd")
    ET.SubElement(root, "access", mode="shared")
    return element_text(root)


def interface(spec: GuestSpec, device: Device = DEFAULT_DEVICE) -> str:
    """`<interface>`, a child of `<devices>`, or a file for `virsh attach-device`."""
    root = ET.Element("interface", type="vhostuser")
    ET.SubElement(root, "mac", address=format_mac(spec.mac))
    mode = "client" if spec.socket_mode == "server" else "server"
    source = ET.SubElement(root, "source", type="unix", path=str(spec.socket), mode=mode)
    if mode == "client":
        ET.SubElement(source, "reconnect", enabled="yes", timeout="1")
    ET.SubElement(root, "model", type="virtio")
    driver: dict[str, str] = {}
    if spec.queues > 1:
        driver["queues"] = str(spec.queues)
    if device.queue_size:
        driver["rx_queue_size"] = driver["tx_queue_size"] = str(device.queue_size)
    if device.packed:
        driver["packed"] = "on"
    if driver:
        ET.SubElement(root, "driver", driver)
    return element_text(root)


def element_text(root: ET.Element) -> str:
    """The XML, one element a line."""
    ET.indent(root)
    return ET.tostring(root, encoding="unicode")
