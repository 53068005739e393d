# SPDX-License-Identifier: Apache-2.0
"""Every metric there is: name, type, labels and help. `docs/counters.md` is generated from this file.

Conventions. `rx` is towards the guest and `tx` is from it, as the guest sees them. `queue` counts NIC queues in
`xdpvhost_xdp_*`, `xdpvhost_xsk_*` and `xdpvhost_nic_*`, those of a tap in `xdpvhost_tap_*`, and the guest's queue
pairs in `xdpvhost_guest_*`. An empty `guest` label is the host's own share, `host port` that port's. A host port's
tap is among `xdpvhost_tap_*` with its own name as `iface`. Bytes are Ethernet frames without FCS.
Every series that can ever move exists with value 0 from the moment its object does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..datapath import CTRL_NAMES, DROP_NAMES
from ..vhost.errors import Violation
from ..vhost.offered import COUNTED, RESULTS

# struct xdp_statistics, linux/if_xdp.h
XSK_STATISTICS = (
    "rx_dropped",
    "rx_invalid_descs",
    "tx_invalid_descs",
    "rx_ring_full",
    "rx_fill_ring_empty_descs",
    "tx_ring_empty_descs",
)

# What ends a front-end's connection: its vhost-user violations, and what the data plane found in its rings and memory.
PROTOCOL_ERROR_REASONS = (*(violation.value for violation in Violation), "datapath")

# Requests of a front-end, by name, and what became of them.
MESSAGES = tuple((request, result) for request in COUNTED for result in RESULTS)


@dataclass(frozen=True)
class Metric:
    """One metric family. A counter's name ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    help: str


class Sample(NamedTuple):
    """One value; `labels` in the order of `metric.labels`."""

    metric: Metric
    labels: tuple[str, ...]
    value: int


BUILD_INFO = Metric("xdpvhost_build_info", "gauge", ("version", "abi"), "Always 1; the labels say what is running.")

XDP_VERDICTS = Metric(
    "xdpvhost_xdp_verdicts_total",
    "counter",
    ("iface", "queue", "guest", "verdict"),
    "Frames that the XDP program classified. Of a guest: redirect (to its socket), no_socket (known MAC, no socket on "
    "that queue: dropped). Of the host (guest empty): pass_unicast, pass_multicast, short (no full Ethernet header).",
)
XSK_RX_PACKETS = Metric(
    "xdpvhost_xsk_receive_packets_total",
    "counter",
    ("iface", "queue", "guest"),
    "Frames read from the guest's AF_XDP socket on this NIC queue.",
)
XSK_RX_BYTES = Metric(
    "xdpvhost_xsk_receive_bytes_total",
    "counter",
    ("iface", "queue", "guest"),
    "Bytes read from the guest's AF_XDP socket on this NIC queue.",
)
XSK_TX_PACKETS = Metric(
    "xdpvhost_xsk_transmit_packets_total", "counter", ("iface", "queue"), "Frames handed to the kernel to send."
)
XSK_TX_BYTES = Metric(
    "xdpvhost_xsk_transmit_bytes_total", "counter", ("iface", "queue"), "Bytes handed to the kernel to send."
)
XSK_DROPS = Metric(
    "xdpvhost_xsk_drops_total",
    "counter",
    ("iface", "queue", "guest", "reason"),
    "The kernel's six XDP_STATISTICS of each AF_XDP socket: " + ", ".join(XSK_STATISTICS) + ". "
    "guest empty: the queue's sending socket. tx_ring_empty_descs is no loss: the kernel found nothing to send.",
)
NIC_SENDTO = Metric(
    "xdpvhost_nic_sendto_total", "counter", ("iface", "queue"), "sendto() calls that told the kernel to send."
)
NIC_CHECKSUMS = Metric(
    "xdpvhost_nic_tx_checksums_total",
    "counter",
    ("iface", "queue"),
    "Frames to the NIC whose checksum the guest left open and the copy finished.",
)
NIC_DROPS = Metric(
    "xdpvhost_nic_drops_total",
    "counter",
    ("iface", "queue"),
    "Frames that the kernel took to send and dropped, as its sendto() told by EBUSY, or for GSO frames sendmsg() by "
    "ENOBUFS: the NIC's queue was full.",
)
NIC_GSO_PACKETS = Metric(
    "xdpvhost_nic_gso_packets_total",
    "counter",
    ("iface", "queue"),
    "Guests' GSO frames that the NIC took whole, by the packet socket. Not among the frames of xdpvhost_xsk_transmit.",
)
NIC_GSO_BYTES = Metric(
    "xdpvhost_nic_gso_bytes_total",
    "counter",
    ("iface", "queue"),
    "Bytes of those GSO frames. The kernel copied them out of the guest's memory: they are not in copied_bytes.",
)
MCAST_PACKETS = Metric(
    "xdpvhost_multicast_receive_packets_total",
    "counter",
    ("iface",),
    "Broadcast and multicast frames that the packet socket read from the NIC to flood them to the guests.",
)
MCAST_BYTES = Metric(
    "xdpvhost_multicast_receive_bytes_total", "counter", ("iface",), "Bytes of those broadcast and multicast frames."
)
MCAST_DROPPED = Metric(
    "xdpvhost_multicast_dropped_total",
    "counter",
    ("iface",),
    "Broadcast and multicast frames from the NIC that no guest gets: too long, too short, or not segmented yet (GSO).",
)
TAP_RX_PACKETS = Metric(
    "xdpvhost_tap_receive_packets_total",
    "counter",
    ("iface", "queue"),
    "Frames read from a tap: the one that stands for the NIC (`--serve vhost-user`), or a host port, which is named by "
    "its own interface; a GSO frame is one.",
)
TAP_RX_BYTES = Metric("xdpvhost_tap_receive_bytes_total", "counter", ("iface", "queue"), "Bytes of those frames.")
TAP_RX_DROPS = Metric(
    "xdpvhost_tap_receive_drops_total",
    "counter",
    ("iface", "queue", "reason"),
    "Frames read from the tap that nobody gets: malformed (not what their virtio-net header says), unclaimed (for "
    "nobody here, as a bridge floods them; no loss); of a host port what the NIC did not take, by the reasons of "
    "xdpvhost_guest_drops_total.",
)
TAP_TX_PACKETS = Metric(
    "xdpvhost_tap_transmit_packets_total", "counter", ("iface", "queue"), "Frames written to the tap, GSO frames apart."
)
TAP_TX_BYTES = Metric(
    "xdpvhost_tap_transmit_bytes_total",
    "counter",
    ("iface", "queue"),
    "Bytes of those frames. The kernel copied them out of the guest's memory: they are not in copied_bytes.",
)
TAP_TX_GSO_PACKETS = Metric(
    "xdpvhost_tap_transmit_gso_packets_total",
    "counter",
    ("iface", "queue"),
    "Guests' GSO frames that were written to the tap whole.",
)
TAP_TX_GSO_BYTES = Metric(
    "xdpvhost_tap_transmit_gso_bytes_total", "counter", ("iface", "queue"), "Bytes of those GSO frames."
)
TAP_TX_CHECKSUMS = Metric(
    "xdpvhost_tap_tx_checksums_total",
    "counter",
    ("iface", "queue"),
    "Frames written to the tap with the checksum that the guest left open, for the kernel or its NIC to finish.",
)
TAP_TX_DROPS = Metric(
    "xdpvhost_tap_transmit_drops_total",
    "counter",
    ("iface", "queue"),
    "Frames from the NIC that a host port did not take. What it does not take of a guest's is that guest's drop.",
)
TAP_GONE = Metric(
    "xdpvhost_tap_gone",
    "gauge",
    ("iface", "queue"),
    "0 while the tap is there; else the error number with which it ended. Guests reach only each other then.",
)

GUEST_RX_PACKETS = Metric(
    "xdpvhost_guest_rx_packets_total", "counter", ("guest", "queue"), "Frames delivered into the guest's memory."
)
GUEST_RX_BYTES = Metric(
    "xdpvhost_guest_rx_bytes_total", "counter", ("guest", "queue"), "Bytes delivered into the guest's memory."
)
GUEST_TX_PACKETS = Metric(
    "xdpvhost_guest_tx_packets_total",
    "counter",
    ("guest", "queue"),
    "Frames that the guest sent, delivered or not, malformed ones included.",
)
GUEST_TX_BYTES = Metric(
    "xdpvhost_guest_tx_bytes_total",
    "counter",
    ("guest", "queue"),
    "Bytes of those frames, delivered or not; of malformed ones nothing.",
)
GUEST_DROPS = Metric(
    "xdpvhost_guest_drops_total",
    "counter",
    ("guest", "queue", "direction", "reason"),
    "Frames dropped on the way to (rx) or from (tx) the guest: " + ", ".join(DROP_NAMES) + ". filtered is no loss: the "
    "guest has not asked for that address or VLAN.",
)
GUEST_KICKS = Metric(
    "xdpvhost_guest_kicks_total",
    "counter",
    ("guest", "queue", "direction"),
    "Wake-ups by the guest's notifications for its receive (rx) or transmit (tx) ring; none while a worker polls.",
)
GUEST_CALLS = Metric(
    "xdpvhost_guest_calls_total",
    "counter",
    ("guest", "queue", "direction"),
    "Interrupts sent to the guest for its receive (rx) or transmit (tx) ring.",
)
GUEST_CALLS_FAILED = Metric(
    "xdpvhost_guest_calls_failed_total",
    "counter",
    ("guest", "queue", "direction"),
    "Interrupts that the guest's call descriptor did not take.",
)
GUEST_RX_CHECKSUMS = Metric(
    "xdpvhost_guest_rx_checksums_total",
    "counter",
    ("guest", "queue", "result"),
    "Frames with an open checksum: handed to the guest as NEEDS_CSUM (partial), finished during the copy (finished).",
)
GUEST_CONTROL = Metric(
    "xdpvhost_guest_control_commands_total",
    "counter",
    ("guest", "class", "result"),
    "Commands of the guest's control virtqueue, for front-ends that leave it to the backend, by class ("
    + ", ".join(CTRL_NAMES)
    + ") and answer (ok, refused).",
)
COPIED_BYTES = Metric(
    "xdpvhost_copied_bytes_total",
    "counter",
    ("direction", "guest", "iface", "queue"),
    "Payload bytes that the CPU copied: direction guest (into that guest's memory, from the NIC or another guest; "
    "iface is empty) or nic (into UMEM, to be sent; guest is empty). Equal to the bytes delivered: one copy a frame.",
)
GUEST_CONNECTED = Metric(
    "xdpvhost_guest_connected", "gauge", ("guest",), "1 while a front-end (the guest's virtual machine) is attached."
)
GUEST_RECONNECTS = Metric(
    "xdpvhost_guest_reconnects_total", "counter", ("guest",), "Front-end connections after the first."
)
GUEST_MESSAGES = Metric(
    "xdpvhost_guest_messages_total",
    "counter",
    ("guest", "request", "result"),
    "vhost-user requests of the front-end: ok, refused (answered no, the session goes on), error (its end). `other` is "
    "all that are not served.",
)
GUEST_PROTOCOL_ERRORS = Metric(
    "xdpvhost_guest_protocol_errors_total",
    "counter",
    ("guest", "reason"),
    "Connections ended because the front-end broke the vhost-user protocol, or its rings or memory the virtio rules.",
)
CAPTURE_FRAMES = Metric(
    "xdpvhost_capture_frames_total",
    "counter",
    ("guest", "iface"),
    "Frames of a guest (iface is empty) or an interface (guest is empty) that were copied for `xdpvhost capture`.",
)
CAPTURE_LOST = Metric(
    "xdpvhost_capture_lost_total",
    "counter",
    ("guest", "iface"),
    "Frames that a capture lost, as its buffer was full or it took more than its share of a worker's time. They went "
    "their way all the same.",
)
GUEST_LEARNED = Metric(
    "xdpvhost_guest_learned_addresses",
    "gauge",
    ("guest",),
    "Addresses in the guest's pool that it has learned (learn=N).",
)
GUEST_LEARNING = Metric(
    "xdpvhost_guest_learning_total",
    "counter",
    ("guest", "result"),
    "What became of addresses that the guest has used without being given them: learned (they joined its pool), "
    "refused (somebody else's, this machine's, or there is no room), aged (not used for --mac-age), taken (configured "
    "for a guest meanwhile).",
)
GUEST_RATE_LIMIT = Metric(
    "xdpvhost_guest_rate_limit_bits",
    "gauge",
    ("guest", "direction"),
    "Bits a second that the guest may send (tx) or be sent (rx); 0: no limit.",
)
GUEST_STORM_LIMIT = Metric(
    "xdpvhost_guest_storm_limit_frames",
    "gauge",
    ("guest",),
    "Broadcast and multicast frames a second that the guest may send; 0: no limit.",
)
GUEST_LINK_OFF = Metric(
    "xdpvhost_guest_link_off", "gauge", ("guest",), "1 while the guest's link is switched off (link=off), else 0."
)

WORKER_POLLS = Metric(
    "xdpvhost_worker_polls_total",
    "counter",
    ("worker", "result"),
    "Turns of the worker's loop: busy (frames were moved), idle (there were none).",
)
WORKER_SLEEPS = Metric("xdpvhost_worker_sleeps_total", "counter", ("worker",), "Times that the worker went to sleep.")
WORKER_WAKEUPS = Metric(
    "xdpvhost_worker_wakeups_total", "counter", ("worker",), "Times that a notification ended the worker's sleep."
)
WORKER_CYCLES = Metric(
    "xdpvhost_worker_busy_cycles_total",
    "counter",
    ("worker",),
    "Timestamp-counter cycles of the turns that moved frames; divided by packets: cycles a frame.",
)
WORKER_PACKETS = Metric(
    "xdpvhost_worker_packets_total", "counter", ("worker",), "Frames that the worker read from any port."
)

LINK_PACKETS = Metric(
    "xdpvhost_link_packets_total",
    "counter",
    ("mode", "guest", "direction"),
    "Packets through the guest's device in a mode that the data plane doesn't serve; a GSO packet counts once.",
)
LINK_BYTES = Metric(
    "xdpvhost_link_bytes_total",
    "counter",
    ("mode", "guest", "direction"),
    "Bytes of `xdpvhost_link_packets_total`.",
)
LINK_DROPS = Metric(
    "xdpvhost_link_drops_total",
    "counter",
    ("mode", "guest", "direction"),
    "Packets that the kernel dropped at the guest's device: towards the guest, because it doesn't read; or from it.",
)
# Of modes without the data plane, which have none of the others.
LINK_METRICS: tuple[Metric, ...] = (LINK_PACKETS, LINK_BYTES, LINK_DROPS)

METRICS: tuple[Metric, ...] = (
    BUILD_INFO,
    XDP_VERDICTS,
    XSK_RX_PACKETS,
    XSK_RX_BYTES,
    XSK_TX_PACKETS,
    XSK_TX_BYTES,
    XSK_DROPS,
    NIC_SENDTO,
    NIC_CHECKSUMS,
    NIC_DROPS,
    NIC_GSO_PACKETS,
    NIC_GSO_BYTES,
    MCAST_PACKETS,
    MCAST_BYTES,
    MCAST_DROPPED,
    TAP_RX_PACKETS,
    TAP_RX_BYTES,
    TAP_RX_DROPS,
    TAP_TX_PACKETS,
    TAP_TX_BYTES,
    TAP_TX_GSO_PACKETS,
    TAP_TX_GSO_BYTES,
    TAP_TX_CHECKSUMS,
    TAP_TX_DROPS,
    TAP_GONE,
    GUEST_RX_PACKETS,
    GUEST_RX_BYTES,
    GUEST_TX_PACKETS,
    GUEST_TX_BYTES,
    GUEST_DROPS,
    GUEST_KICKS,
    GUEST_CALLS,
    GUEST_CALLS_FAILED,
    GUEST_RX_CHECKSUMS,
    GUEST_CONTROL,
    COPIED_BYTES,
    GUEST_CONNECTED,
    GUEST_RECONNECTS,
    GUEST_MESSAGES,
    GUEST_PROTOCOL_ERRORS,
    CAPTURE_FRAMES,
    CAPTURE_LOST,
    GUEST_LEARNED,
    GUEST_LEARNING,
    GUEST_RATE_LIMIT,
    GUEST_STORM_LIMIT,
    GUEST_LINK_OFF,
    WORKER_POLLS,
    WORKER_SLEEPS,
    WORKER_WAKEUPS,
    WORKER_CYCLES,
    WORKER_PACKETS,
    *LINK_METRICS,
)
