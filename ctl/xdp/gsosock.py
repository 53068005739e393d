# SPDX-License-Identifier: Apache-2.0
"""The packet socket that sends guests' GSO frames whole (datapath/src/gsosock.c), where the NIC takes such frames.

Its frames and AF_XDP's must not overtake each other. They can't on a veth, which has no queue to send from, and where
there is only one such queue; and only in copy mode, where AF_XDP's frames have reached the device when its sendto()
returns. On other NICs the data plane cuts.
"""

from __future__ import annotations

import socket

from ..datapath import NICQ_GSO_ECN, NICQ_GSO_TCP4, NICQ_GSO_TCP6, NICQ_GSO_UDP
from ..links import ethtool
from ..links.netlink import Link
from ..links.nicprep import SOL_PACKET

PACKET_VNET_HDR, PACKET_QDISC_BYPASS = 15, 20
SO_SNDBUFFORCE = 32
SNDBUF = 8 << 20  # bytes that may wait in the device, with the kernel's own overhead

# The kernel's name of a feature -> what the data plane may send whole with it.
_OFFLOADS = {
    "tx-tcp-segmentation": NICQ_GSO_TCP4,
    "tx-tcp6-segmentation": NICQ_GSO_TCP6,
    "tx-tcp-ecn-segmentation": NICQ_GSO_ECN,
    "tx-udp-segmentation": NICQ_GSO_UDP,
}


def takes(link: Link) -> int:
    """NICQ_GSO_*: the GSO frames that may be sent whole to this NIC, bound in copy mode."""
    if link.kind != "veth" and ethtool.queues(link)[1] != 1:
        return 0
    features = ethtool.features(link.name)
    bits = sum(bit for name, bit in _OFFLOADS.items() if name in features and features[name].active)
    return bits if bits & ~NICQ_GSO_ECN else 0


def gso_socket(iface: str) -> socket.socket:
    """Sends only: it has no protocol, so nothing is ever received by it. Raises OSError."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        for option in (PACKET_VNET_HDR, PACKET_QDISC_BYPASS):
            sock.setsockopt(SOL_PACKET, option, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SNDBUF)
        sock.bind((iface, 0))
    except BaseException:
        sock.close()
        raise
    return sock
