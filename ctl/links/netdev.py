# SPDX-License-Identifier: Apache-2.0
"""The kernel's `netdev` generic netlink family, which pyroute2 has not: what a device's driver can do with XDP."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from pyroute2.netlink import NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from .netlink import outside_loop

NETDEV_CMD_DEV_GET = 1


class XdpFeatures(IntFlag):
    """enum netdev_xdp_act."""

    BASIC = 1
    REDIRECT = 2
    NDO_XMIT = 4
    XSK_ZEROCOPY = 8
    HW_OFFLOAD = 16
    RX_SG = 32
    NDO_XMIT_SG = 64


class RxMetadata(IntFlag):
    """enum netdev_xdp_rx_metadata: what a device-bound XDP program can ask the driver about a frame."""

    NOTHING = 0
    TIMESTAMP = 1
    HASH = 2
    VLAN_TAG = 4


class XskFeatures(IntFlag):
    """enum netdev_xsk_flags: what the driver does for frames that AF_XDP sends with metadata."""

    TX_TIMESTAMP = 1
    TX_CHECKSUM = 2
    TX_LAUNCH_TIME_FIFO = 4


@dataclass(frozen=True)
class DeviceFeatures:
    xdp: XdpFeatures
    xsk: XskFeatures  # none before 6.8
    metadata: RxMetadata = RxMetadata.NOTHING  # none before 6.6, no VLAN_TAG before 6.8


class _DeviceMessage(genlmsg):  # type: ignore[misc]
    prefix = "NETDEV_A_DEV_"
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "hex"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
        ("NETDEV_A_DEV_XDP_ZC_MAX_SEGS", "uint32"),
        ("NETDEV_A_DEV_XDP_RX_METADATA_FEATURES", "uint64"),
        ("NETDEV_A_DEV_XSK_FEATURES", "uint64"),
    )


def device_features(ifindex: int) -> DeviceFeatures | None:
    """None where the kernel doesn't say (before 6.3)."""

    def ask() -> DeviceFeatures | None:
        try:
            with GenericNetlinkSocket() as sock:
                sock.bind("netdev", _DeviceMessage)
                request = _DeviceMessage()
                request["cmd"], request["version"] = NETDEV_CMD_DEV_GET, 1
                request["attrs"] = [("NETDEV_A_DEV_IFINDEX", ifindex)]
                for answer in sock.nlm_request(request, msg_type=sock.prid, msg_flags=NLM_F_REQUEST):
                    return _features(answer)
        except (NetlinkError, OSError):
            return None
        return None

    return outside_loop(ask)


def _features(answer: genlmsg) -> DeviceFeatures | None:
    xdp = answer.get_attr("NETDEV_A_DEV_XDP_FEATURES")
    if xdp is None:
        return None
    return DeviceFeatures(
        XdpFeatures(xdp),
        XskFeatures(answer.get_attr("NETDEV_A_DEV_XSK_FEATURES") or 0),
        RxMetadata(answer.get_attr("NETDEV_A_DEV_XDP_RX_METADATA_FEATURES") or 0),
    )
