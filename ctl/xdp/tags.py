# SPDX-License-Identifier: Apache-2.0
"""VLAN tags that come beside their frames, where a plain XDP program does not see them.

A NIC that strips tags keeps them in the receive descriptor; a veth gets those that its other end left to "the device"
in the socket buffer. A frame without its tag looks untagged, and would go to another guest than the one in its VLAN.
First, tags are left in frames (ctl/links/nicprep.py). Where that can't be, a program that is bound to the device asks
the driver, frame by frame (bpf/steer.bpf.c, STEER_TAGS_BESIDE). Where that can't be either, we warn.
"""

from __future__ import annotations

from ..links.netdev import DeviceFeatures, RxMetadata
from ..links.netlink import Link

IN_FRAMES = "in frames"
BOTH = "in frames and beside them"
UNSEEN = "in frames; beside them they are not seen"


def refusal(device: DeviceFeatures | None) -> str | None:
    """Why a program can't ask the driver for tags; None: it can, in native mode."""
    if device is None or not device.metadata:
        return "the kernel doesn't tell the program of it (6.8 and later do, with some drivers)"
    if RxMetadata.VLAN_TAG not in device.metadata:
        return "the driver doesn't tell the program of it"
    return None


def remedy(link: Link) -> str:
    if link.kind == "veth":
        return "`ethtool -K PEER txvlan off` at the other end, or --xdp-mode none"
    return "--xdp-mode none"  # a bridge, a bond: the kernel has taken tags out of frames before they get there


def warning(link: Link, why: str) -> str:
    return (
        "a frame whose VLAN tag comes beside it is taken for untagged, and can reach a guest of another VLAN: "
        f"{why}: {remedy(link)}"
    )
