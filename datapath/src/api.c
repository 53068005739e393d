// SPDX-License-Identifier: Apache-2.0
/* What the library says of itself: ABI, layout, names, features. */
#include <linux/virtio_config.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>

#include "nethdr.h"

uint32_t xv_abi(void)
{
	return XV_ABI;
}

#define SIZE(s) {#s, NULL, 0, sizeof(struct s)}
#define FIELD(s, f) {#s, #f, offsetof(struct s, f), sizeof(((struct s *)0)->f)}

static const struct xv_layout_entry layout[] = {
	SIZE(xv_dp_conf), FIELD(xv_dp_conf, workers), FIELD(xv_dp_conf, poll), FIELD(xv_dp_conf, spin_us),
	FIELD(xv_dp_conf, reserved),
	SIZE(xv_region), FIELD(xv_region, gpa), FIELD(xv_region, size), FIELD(xv_region, user_addr), FIELD(xv_region, host),
	SIZE(xv_vring_conf), FIELD(xv_vring_conf, desc), FIELD(xv_vring_conf, avail), FIELD(xv_vring_conf, used),
	FIELD(xv_vring_conf, features), FIELD(xv_vring_conf, log), FIELD(xv_vring_conf, inflight),
	FIELD(xv_vring_conf, inflight_offset), FIELD(xv_vring_conf, num), FIELD(xv_vring_conf, base),
	FIELD(xv_vring_conf, kick_fd), FIELD(xv_vring_conf, call_fd), FIELD(xv_vring_conf, enabled),
	FIELD(xv_vring_conf, flags),
	SIZE(xv_ring), FIELD(xv_ring, producer), FIELD(xv_ring, consumer), FIELD(xv_ring, flags), FIELD(xv_ring, ring),
	FIELD(xv_ring, mask), FIELD(xv_ring, size),
	SIZE(xv_nicq_conf), FIELD(xv_nicq_conf, umem), FIELD(xv_nicq_conf, umem_size), FIELD(xv_nicq_conf, chunk),
	FIELD(xv_nicq_conf, rx_frames), FIELD(xv_nicq_conf, tx_frames), FIELD(xv_nicq_conf, flags),
	FIELD(xv_nicq_conf, fill), FIELD(xv_nicq_conf, comp), FIELD(xv_nicq_conf, tx), FIELD(xv_nicq_conf, fd),
	FIELD(xv_nicq_conf, queue), FIELD(xv_nicq_conf, gso), FIELD(xv_nicq_conf, gso_fd),
	SIZE(xv_xsk_conf), FIELD(xv_xsk_conf, rx), FIELD(xv_xsk_conf, fd), FIELD(xv_xsk_conf, reserved),
	SIZE(xv_guest_conf), FIELD(xv_guest_conf, guest), FIELD(xv_guest_conf, rings), FIELD(xv_guest_conf, xsks), FIELD(xv_guest_conf, packet),
	FIELD(xv_guest_conf, features), FIELD(xv_guest_conf, policy), FIELD(xv_guest_conf, capture), FIELD(xv_guest_conf, nr_rings), FIELD(xv_guest_conf, nr_xsks),
	FIELD(xv_guest_conf, ctrl), FIELD(xv_guest_conf, nic), FIELD(xv_guest_conf, worker),
	FIELD(xv_guest_conf, max_pairs), FIELD(xv_guest_conf, uplink), FIELD(xv_guest_conf, reserved),
	SIZE(xv_nic_conf), FIELD(xv_nic_conf, queues), FIELD(xv_nic_conf, mcast), FIELD(xv_nic_conf, nr_queues),
	FIELD(xv_nic_conf, taps), FIELD(xv_nic_conf, host), FIELD(xv_nic_conf, host_xsks),
	FIELD(xv_nic_conf, host_packet), FIELD(xv_nic_conf, capture), FIELD(xv_nic_conf, nr_taps), FIELD(xv_nic_conf, mtu),
	FIELD(xv_nic_conf, nr_host_xsks),
	SIZE(xv_tapq_conf), FIELD(xv_tapq_conf, fd), FIELD(xv_tapq_conf, header_len), FIELD(xv_tapq_conf, gso),
	FIELD(xv_tapq_conf, queue),
	SIZE(xv_mac_conf), FIELD(xv_mac_conf, mac), FIELD(xv_mac_conf, vlan), FIELD(xv_mac_conf, guest),
	SIZE(xv_snapshot_conf), FIELD(xv_snapshot_conf, guests), FIELD(xv_snapshot_conf, nics),
	FIELD(xv_snapshot_conf, macs), FIELD(xv_snapshot_conf, nr_guests), FIELD(xv_snapshot_conf, nr_nics),
	FIELD(xv_snapshot_conf, nr_macs), FIELD(xv_snapshot_conf, reserved),
	FIELD(xv_rx_counters, packets), FIELD(xv_rx_counters, bytes), FIELD(xv_rx_counters, copied_bytes),
	FIELD(xv_rx_counters, kicks), FIELD(xv_rx_counters, calls), FIELD(xv_rx_counters, calls_failed),
	FIELD(xv_rx_counters, csum_partial), FIELD(xv_rx_counters, csum_finished), FIELD(xv_rx_counters, drops),
	FIELD(xv_tx_counters, packets), FIELD(xv_tx_counters, bytes), FIELD(xv_tx_counters, kicks),
	FIELD(xv_tx_counters, calls), FIELD(xv_tx_counters, calls_failed), FIELD(xv_tx_counters, reserved),
	FIELD(xv_tx_counters, drops),
	FIELD(xv_xsk_counters, packets), FIELD(xv_xsk_counters, bytes),
	FIELD(xv_nicq_counters, tx_packets), FIELD(xv_nicq_counters, tx_bytes), FIELD(xv_nicq_counters, copied_bytes),
	FIELD(xv_nicq_counters, csum_finished), FIELD(xv_nicq_counters, sendto_calls),
	FIELD(xv_nicq_counters, sendto_busy), FIELD(xv_nicq_counters, gso_packets),
	FIELD(xv_nicq_counters, gso_bytes),
	FIELD(xv_tapq_counters, rx_packets), FIELD(xv_tapq_counters, rx_bytes), FIELD(xv_tapq_counters, rx_dropped),
	FIELD(xv_tapq_counters, rx_unclaimed), FIELD(xv_tapq_counters, drops), FIELD(xv_tapq_counters, gone), FIELD(xv_tapq_counters, tx_packets),
	FIELD(xv_tapq_counters, tx_bytes), FIELD(xv_tapq_counters, tx_gso_packets),
	FIELD(xv_tapq_counters, tx_gso_bytes), FIELD(xv_tapq_counters, tx_csum_partial),
	FIELD(xv_tapq_counters, tx_dropped),
	FIELD(xv_packet_counters, packets), FIELD(xv_packet_counters, bytes), FIELD(xv_packet_counters, dropped),
	FIELD(xv_worker_counters, polls_busy), FIELD(xv_worker_counters, polls_idle), FIELD(xv_worker_counters, sleeps),
	FIELD(xv_worker_counters, wakeups), FIELD(xv_worker_counters, cycles_busy), FIELD(xv_worker_counters, packets),
	FIELD(xv_worker_counters, heartbeat),
	SIZE(xv_ctrl_state), FIELD(xv_ctrl_state, pairs), FIELD(xv_ctrl_state, rx_mode),
	FIELD(xv_ctrl_state, announced), FIELD(xv_ctrl_state, adopted), FIELD(xv_ctrl_state, accepted),
	FIELD(xv_ctrl_state, refused),
	SIZE(xv_mac_request), FIELD(xv_mac_request, mac), FIELD(xv_mac_request, nr), FIELD(xv_mac_request, others),
	SIZE(xv_ip), FIELD(xv_ip, address), FIELD(xv_ip, version),
	SIZE(xv_bucket_conf), FIELD(xv_bucket_conf, rate), FIELD(xv_bucket_conf, burst),
	SIZE(xv_policy_conf), FIELD(xv_policy_conf, trunk), FIELD(xv_policy_conf, addresses),
	FIELD(xv_policy_conf, nr_addresses), FIELD(xv_policy_conf, access), FIELD(xv_policy_conf, flags),
	FIELD(xv_policy_conf, learn), FIELD(xv_policy_conf, tx), FIELD(xv_policy_conf, rx), FIELD(xv_policy_conf, storm),
	SIZE(xv_learned), FIELD(xv_learned, mac), FIELD(xv_learned, vlan), FIELD(xv_learned, idle_ms),
	FIELD(xv_learned, denied),
	FIELD(xv_capture_counters, frames), FIELD(xv_capture_counters, bytes), FIELD(xv_capture_counters, lost),
	SIZE(xv_capread_counters), FIELD(xv_capread_counters, seen), FIELD(xv_capread_counters, taken),
	FIELD(xv_capread_counters, lost),
	SIZE(xv_capread_conf), FIELD(xv_capread_conf, memory), FIELD(xv_capread_conf, size), FIELD(xv_capread_conf, filter),
	FIELD(xv_capread_conf, program), FIELD(xv_capread_conf, directions), FIELD(xv_capread_conf, drops_only),
	SIZE(xv_fault), FIELD(xv_fault, code), FIELD(xv_fault, ring), FIELD(xv_fault, detail),
};

const struct xv_layout_entry *xv_layout(uint32_t *n)
{
	*n = ARRAY_SIZE(layout);
	return layout;
}

const char *xv_drop_name(uint32_t drop)
{
	static const char *const names[XV_DROP_MAX] = {
		[XV_DROP_NOT_CONNECTED] = "not_connected",
		[XV_DROP_NO_BUFFERS] = "no_buffers",
		[XV_DROP_TOO_BIG] = "too_big",
		[XV_DROP_RUNT] = "runt",
		[XV_DROP_BAD_HEADER] = "bad_header",
		[XV_DROP_BAD_CHAIN] = "bad_chain",
		[XV_DROP_NO_FRAMES] = "no_frames",
		[XV_DROP_DISABLED] = "disabled",
		[XV_DROP_NO_UPLINK] = "no_uplink",
		[XV_DROP_FILTERED] = "filtered",
		[XV_DROP_LINK_DOWN] = "link_down",
		[XV_DROP_SPOOFED] = "spoofed",
		[XV_DROP_IP_SPOOFED] = "ip_spoofed",
		[XV_DROP_VLAN] = "vlan",
		[XV_DROP_ISOLATED] = "isolated",
		[XV_DROP_STORM] = "storm",
		[XV_DROP_RATE] = "rate",
	};

	return drop < XV_DROP_MAX ? names[drop] : NULL;
}

const char *xv_ctrl_name(uint32_t class)
{
	static const char *const names[XV_CTRL_CLASSES] = {
		[XV_CTRL_RX] = "rx",
		[XV_CTRL_MAC] = "mac",
		[XV_CTRL_VLAN] = "vlan",
		[XV_CTRL_ANNOUNCE] = "announce",
		[XV_CTRL_MQ] = "mq",
		[XV_CTRL_GUEST_OFFLOADS] = "guest_offloads",
		[XV_CTRL_OTHER] = "other",
	};

	return class < XV_CTRL_CLASSES ? names[class] : NULL;
}

const char *xv_fault_name(uint32_t code)
{
	static const char *const names[XV_FAULT_MAX] = {
		[XV_FAULT_NONE] = "no fault",
		[XV_FAULT_MEMORY_GONE] = "its memory was truncated while mapped",
		[XV_FAULT_AVAIL_INDEX] = "the avail index ran ahead by more than the ring's size",
		[XV_FAULT_HEAD] = "an avail entry names a descriptor outside the table",
		[XV_FAULT_CHAIN] = "a descriptor chain loops, leaves its table or has a bad indirect table",
		[XV_FAULT_ADDRESS] = "a descriptor points outside the guest's memory",
		[XV_FAULT_CALL_BLOCKED] = "its call descriptor blocks",
	};

	return code < XV_FAULT_MAX ? names[code] : NULL;
}

uint64_t xv_features(void)
{
	return 1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_F_ANY_LAYOUT | 1ull << VIRTIO_RING_F_INDIRECT_DESC |
	       1ull << VIRTIO_RING_F_EVENT_IDX | 1ull << VIRTIO_F_RING_PACKED | 1ull << VIRTIO_F_IN_ORDER |
	       1ull << VIRTIO_F_RING_RESET | 1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_NET_F_CSUM |
	       1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_HOST_TSO6 | 1ull << VIRTIO_NET_F_HOST_ECN |
	       1ull << VIRTIO_NET_F_GUEST_TSO4 | 1ull << VIRTIO_NET_F_GUEST_TSO6 | 1ull << VIRTIO_NET_F_GUEST_ECN |
	       1ull << F_GUEST_USO4 | 1ull << F_GUEST_USO6 | 1ull << F_HOST_USO | 1ull << VIRTIO_NET_F_GUEST_CSUM | 1ull << VIRTIO_NET_F_CTRL_VQ | 1ull << VIRTIO_NET_F_CTRL_RX |
	       1ull << VIRTIO_NET_F_CTRL_RX_EXTRA | 1ull << VIRTIO_NET_F_CTRL_VLAN | 1ull << VIRTIO_NET_F_CTRL_MAC_ADDR |
	       1ull << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS | 1ull << VIRTIO_NET_F_RSS | 1ull << VIRTIO_NET_F_HASH_REPORT | 1ull << VIRTIO_NET_F_MQ | 1ull << VIRTIO_NET_F_GUEST_ANNOUNCE;
}
