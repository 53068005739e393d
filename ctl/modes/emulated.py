# SPDX-License-Identifier: Apache-2.0
"""Mode `emulated`: an Intel e1000e that QEMU emulates, over a tap; the guest needs no virtio driver.

The baseline of full virtualization: each register that the guest's driver touches is an exit into QEMU.
"""

from __future__ import annotations

from typing import ClassVar

from ..config import GuestSpec, Mode, format_mac
from ..errors import ConfigError
from ..feature import Feature
from ..libvirt import element_text
from ..links.netlink import Link
from ..qemu import Device
from . import keys, tapped
from .base import Facts, QemuNet
from .tap import TapMode, ethernet


class EmulatedMode(TapMode):
    """Implements `LinkMode`."""

    name: ClassVar[Mode] = "emulated"

    def check_spec(self, spec: GuestSpec) -> None:
        if spec.queues != 1:
            raise ConfigError(
                f"guest {spec.name!r}: queues={spec.queues}: QEMU's e1000e has one on a tap; leave it out"
            )
        super().check_spec(spec)

    def feature(self, link: Link) -> Feature:
        return tapped.tap_feature("mode-emulated", link, "QEMU's e1000e on a tap in a bridge with it")

    def qemu(self, spec: GuestSpec, device: Device, _facts: Facts | None) -> QemuNet:
        _no_virtio(device)
        netdev = f"tap,id=net-{spec.name},ifname={keys.device_name(spec)},script=no,downscript=no,vhost=off"
        nic = f"e1000e,id=nic-{spec.name},netdev=net-{spec.name},mac={format_mac(spec.mac)}"
        return QemuNet(["-netdev", netdev, "-device", nic])

    def libvirt(self, spec: GuestSpec, device: Device, _facts: Facts | None) -> str:
        _no_virtio(device)
        return element_text(ethernet(spec, "e1000e"))


def _no_virtio(device: Device) -> None:
    if device != Device():
        raise ConfigError("--queue-size and --packed are for virtio-net; an e1000e has neither, leave them out")


MODE = EmulatedMode()
