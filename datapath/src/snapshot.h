/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the workers see: who is there, who polls what, which MAC is whose. Made by control, immutable, replaced whole.
 */
#ifndef XV_SNAPSHOT_H
#define XV_SNAPSHOT_H

#include "policy.h"
#include "port.h"

#define NO_PORT UINT32_MAX /* not a guest here: the uplink */

/* The host port of a NIC, as a port beside the guests. */
static inline uint32_t host_port(uint32_t nic)
{
	return XV_HOST_PORT + nic;
}

struct port { /* a guest */
	struct xv_guest *guest;
	struct xv_vring **rx; /* nr_rx receive rings by pair, NULL where not started */
	uint32_t nr_rx, nic, worker;
	uint32_t join;        /* GSO_BITs that each of its receive rings takes over merged buffers */
	bool own_ctrl;        /* the control virtqueue is ours, so pairs are switched on by it */
	uint32_t rules;       /* what of its rx_rules counts: FILTER_BY_*, PORT_HASHES */
	uint64_t mac;         /* filter_word() of its first address, 0: it has none */
	struct policy *policy; /* NULL: nothing is checked */
	struct xv_capture *capture; /* its frames are copied there, NULL: nobody looks */
	bool gated;           /* what goes to it is looked at: it has only some VLANs, or is switched off */
	bool judged;          /* what comes from it is looked at: ingress.c */
	struct learned *learned; /* addresses that it has learned, NULL: it may not */
	struct bucket *tx_rate, *rx_rate, *storm; /* of the guest, NULL: no limit. Set by xv_publish() */
};

#define PORT_HASHES 4u  /* frames are hashed, if its rules say so */
#define PORT_LIMITED 8u /* frames take from its `rx_rate` */

struct nic {
	struct xv_nicq **queues;
	uint32_t nr_queues, max_len; /* max_len: largest untagged frame, Ethernet header included */
	struct xv_packet *mcast;
	struct xv_tapq **taps;
	uint32_t nr_taps;
	uint32_t nr_guests;
	struct xv_tapq *host; /* the host's own port among the guests, or NULL */
	struct xv_capture *capture; /* the guests' frames from and to it are copied there, or NULL */
};

struct mac_entry {
	uint64_t key;  /* MAC_EMPTY or mac_key() */
	uint32_t port;
};

#define MAC_EMPTY UINT64_MAX

struct uplink { /* where frames for nobody here go: one of the two, or nowhere */
	struct xv_nicq *nicq;
	struct xv_tapq *tap;
};

struct tx_source { /* a guest's transmit ring */
	struct xv_vring *vring;
	struct uplink uplink;
	uint32_t port, pair;
};

struct xsk_source {
	struct xv_xsk *xsk;
	uint32_t port, hint; /* a guest or a host_port() */
};

struct ctrl_source {
	struct xv_vring *vring;
	uint64_t features;
	uint32_t max_pairs;
};

struct mcast_source {
	struct xv_packet *mcast;
	uint32_t nic;
};

struct tap_source {
	struct xv_tapq *tap;
	uint32_t nic;
	bool alone; /* there is one guest at most on that NIC, and no host port */
	bool is_host; /* a host port, no way to the network */
	struct uplink uplink; /* a host port's */
};

struct packet_source { /* where the frames of a guest, or a host_port(), arrive without XDP */
	struct xv_packet *socket;
	uint32_t port;
};

struct duty { /* of one worker */
	struct tx_source *tx;
	struct xsk_source *xsk;
	struct ctrl_source *ctrl;
	struct mcast_source *mcast;
	struct packet_source *packet;
	struct tap_source *tap;
	uint32_t nr_tx, nr_xsk, nr_ctrl, nr_mcast, nr_packet, nr_tap;
	struct source **hot, **waiting; /* the worker's: room for its lists, each for every source but multicast (hot.h) */
};

struct snapshot {
	uint64_t serial; /* tells it from a later one at the same address */
	struct port *ports;
	struct nic *nics;
	uint64_t mac_factor;    /* odd, and random: guests that learn can't choose addresses that meet in the table */
	struct mac_entry *macs; /* mac_mask + 1 slots, at most half of them taken */
	uint32_t nr_ports, nr_nics, mac_mask, mac_shift;
	uint32_t nr_workers;
	struct duty duties[];
};

static inline uint64_t mac_key(const uint8_t mac[6], uint16_t vlan)
{
	uint64_t key = 0;

	memcpy(&key, mac, 6);
	return key | (uint64_t)vlan << 48;
}

static inline uint32_t mac_slot(const struct snapshot *snap, uint64_t key)
{
	const uint64_t hash = key * snap->mac_factor;

	return (uint32_t)(((hash ^ hash >> 32) * 0x9e3779b97f4a7c15ull) >> snap->mac_shift) & snap->mac_mask;
}

static inline uint32_t mac_find(const struct snapshot *snap, uint64_t key)
{
	for (uint32_t at = mac_slot(snap, key);; at = (at + 1) & snap->mac_mask) {
		if (snap->macs[at].key == key)
			return snap->macs[at].port;
		if (snap->macs[at].key == MAC_EMPTY)
			return NO_PORT;
	}
}

/* Whose the address is in that VLAN; NO_PORT: nobody's here. */
static inline uint32_t mac_owner(const struct snapshot *snap, const uint8_t mac[6], uint16_t vlan)
{
	uint32_t port = mac_find(snap, mac_key(mac, vlan));

	if (unlikely(port == NO_PORT && vlan))
		port = mac_find(snap, mac_key(mac, XV_VLAN_ANY));
	return port;
}

/* 0 or -errno: -EINVAL when conf contradicts itself. Binds each vring to its guest's queue. */
int snapshot_new(const struct xv_snapshot_conf *conf, uint32_t workers, struct snapshot **out);
void snapshot_free(struct snapshot *snap);

#endif
