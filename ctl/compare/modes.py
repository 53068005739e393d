# SPDX-License-Identifier: Apache-2.0
"""The modes that are compared: how each is set up (by xdpvhost itself, where it can), and what its guest drives.

Copies are those of a frame's payload by a CPU between the NIC's (or veth's) buffer and the guest's memory: known from
the systems' code, and confirmed by counters for our own data plane.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mode:
    """One row. `options` go to `xdpvhost up`; `device`: vhost-user, virtio, e1000e, vhost-net, netdev or testpmd."""

    name: str
    title: str
    path: str
    device: str
    options: tuple[str, ...] = ()
    copies: dict[str, str] = field(default_factory=dict)
    live: bool = True  # whether a veth takes live XDP frames in this mode: it needs NAPI, by native XDP or GRO


XDP_COPIES = {
    "in": "2 (kernel into UMEM, data plane into the guest); 1 with zero-copy bind",
    "out": "2 (data plane into UMEM, kernel into an skb); 1 with zero-copy bind",
}
VHOST_COPIES = {"in": "1 (vhost worker, skb to guest)", "out": "1 (vhost worker, guest to skb)"}
QEMU_COPIES = {
    "in": "2 (kernel into QEMU's buffer, QEMU into the guest)",
    "out": "1 (kernel, from the guest's memory into an skb)",
}

MODES: tuple[Mode, ...] = (
    Mode(
        "xdp",
        "xdpvhost, XDP",
        "NIC → XDP → AF_XDP → data plane → vhost-user",
        "vhost-user",
        ("--mode", "xdp"),
        XDP_COPIES,
    ),
    Mode(
        "xdp-generic",
        "xdpvhost, generic XDP",
        "NIC → skb → XDP → AF_XDP → data plane → vhost-user",
        "vhost-user",
        ("--mode", "xdp", "--xdp-mode", "generic"),
        XDP_COPIES,
        live=False,
    ),
    Mode(
        "xdp-none",
        "xdpvhost, no XDP",
        "NIC → packet socket → data plane → vhost-user; AF_XDP to send",
        "vhost-user",
        ("--mode", "xdp", "--xdp-mode", "none"),
        {
            "in": "1 (kernel, skb into the guest, for large frames) or 2 (over a buffer of ours)",
            "out": XDP_COPIES["out"],
        },
    ),
    Mode(
        "tap-vhost-user",
        "xdpvhost over a tap",
        "NIC → bridge → tap → data plane → vhost-user",
        "vhost-user",
        ("--mode", "tap", "--serve", "vhost-user"),
        {
            "in": "1 (kernel) and what the data plane counts",
            "out": "1 (kernel, from the guest's memory into an skb)",
        },
    ),
    Mode("tap", "tap, QEMU", "NIC → bridge → tap → QEMU → virtio", "virtio", ("--mode", "tap"), QEMU_COPIES),
    Mode(
        "vhost-net",
        "vhost-net",
        "NIC → bridge → tap → vhost worker → virtio",
        "vhost-net",
        ("--mode", "vhost-net"),
        VHOST_COPIES,
    ),
    Mode("macvtap", "macvtap, QEMU", "NIC → macvtap → QEMU → virtio", "virtio", ("--mode", "macvtap"), QEMU_COPIES),
    Mode(
        "emulated",
        "e1000e, emulated",
        "NIC → bridge → tap → QEMU → e1000e",
        "e1000e",
        ("--mode", "emulated"),
        QEMU_COPIES,
    ),
    Mode(
        "vf",
        "SR-IOV VF",
        "NIC's own switch → VF; its netdev, with packet sockets, is the guest",
        "netdev",
        ("--mode", "vf"),
        {"in": "0 (the card writes into the guest)", "out": "0 (the card reads from the guest)"},
    ),
    Mode(
        "dpdk",
        "DPDK testpmd (peer)",
        "NIC → XDP → AF_XDP PMD → testpmd → vhost PMD",
        "testpmd",
        (),
        {
            "in": "2 (kernel into UMEM, vhost PMD into the guest)",
            "out": "2 (vhost PMD into an mbuf in UMEM, kernel into an skb)",
        },
    ),
)

NAMES = tuple(mode.name for mode in MODES)


def named(names: tuple[str, ...]) -> list[Mode]:
    """Those modes, in the order of the table; all when there is no name."""
    return [mode for mode in MODES if not names or mode.name in names]
