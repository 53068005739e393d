# SPDX-License-Identifier: Apache-2.0
"""Mode `tap`: virtio-net served by QEMU in user space, over a tap on a bridge (or routed).

Two copies a frame and one system call: the kernel's bridge brings it to the tap, QEMU reads it and writes it into the
guest's memory.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any, ClassVar

from ..config import GuestSpec, Mode, UpConfig, format_mac
from ..feature import Feature
from ..libvirt import element_text
from ..links.changes import Changes
from ..links.netlink import Link
from ..qemu import Device
from ..service import Needs
from . import keys, tapped
from .base import Facts, QemuNet


class TapMode:
    """Implements `LinkMode`; `vhost` says who serves the virtqueues: the kernel, or QEMU itself."""

    name: ClassVar[Mode] = "tap"
    vhost: ClassVar[bool] = False

    def needs(self, _config: UpConfig) -> Needs:
        return tapped.NET_ADMIN

    def uplink_wishes(self, config: UpConfig) -> dict[str, Any]:
        return tapped.tap_wishes(config)

    def check_config(self, config: UpConfig) -> None:
        tapped.check_tap_config(config)

    def check_spec(self, spec: GuestSpec) -> None:
        tapped.check_tap_spec(spec)

    def check_new_guest(self, spec: GuestSpec, others: Sequence[GuestSpec]) -> None:
        tapped.check_new_tap(spec, others)

    def uplink(self, config: UpConfig, changes: Changes) -> tapped.TapUplink:
        return tapped.TapUplink(config, changes)

    def feature(self, link: Link) -> Feature:
        return tapped.tap_feature("mode-tap", link, "QEMU reads and writes a tap in a bridge with it")

    def qemu(self, spec: GuestSpec, device: Device, _facts: Facts | None) -> QemuNet:
        netdev = (
            f"tap,id=net-{spec.name},ifname={keys.device_name(spec)},script=no,downscript=no,"
            f"vhost={'on' if self.vhost else 'off'}"
        )
        if spec.queues > 1:
            netdev += f",queues={spec.queues}"
        nic = keys.virtio_device(spec.name, format_mac(spec.mac), spec.queues, device.queue_size, device.packed)
        return QemuNet(["-netdev", netdev, "-device", nic])

    def libvirt(self, spec: GuestSpec, device: Device, _facts: Facts | None) -> str:
        return element_text(virtio_ethernet(spec, device, "vhost" if self.vhost else "qemu"))


def virtio_ethernet(spec: GuestSpec, device: Device, backend: str) -> ET.Element:
    """`<interface>` of a virtio-net device that `backend` serves: qemu, or vhost."""
    root = ethernet(spec, "virtio")
    driver = {"name": backend}
    if spec.queues > 1:
        driver["queues"] = str(spec.queues)
    if device.queue_size:
        driver["rx_queue_size"] = str(device.queue_size)  # QEMU refuses another tx_queue_size on a tap
    if device.packed:
        driver["packed"] = "on"
    ET.SubElement(root, "driver", driver)
    return root


def ethernet(spec: GuestSpec, model: str) -> ET.Element:
    """`<interface>` on an existing tap or macvtap (libvirt 5.7 and later)."""
    root = ET.Element("interface", type="ethernet")
    ET.SubElement(root, "mac", address=format_mac(spec.mac))
    ET.SubElement(root, "target", dev=keys.device_name(spec), managed="no")
    ET.SubElement(root, "model", type=model)
    return root


MODE = TapMode()
